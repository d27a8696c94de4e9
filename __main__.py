"""`python -m temposae`, and with it `torchrun -m temposae train`."""

from .cli import main

if __name__ == "__main__":
    main()
