"""`python -m tunesmith`, and with it `torchrun -m tunesmith`."""

from tunesmith.cli import main

main()
