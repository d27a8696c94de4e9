"""`python -m temposae`, and with it `torchrun -m temposae train`."""

from .cli import main

main()
