"""Run the command line: `python -m temposae`, or `torchrun -m temposae train`."""

from .cli import main

if __name__ == "__main__":
    main()
