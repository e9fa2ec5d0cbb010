"""`python -m posthouse` is the command line."""

from posthouse.cli import main

main()
