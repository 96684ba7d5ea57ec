"""`python -m bitdistill` is the command line."""

from bitdistill.cli import main

main()
