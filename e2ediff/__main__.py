"""`python -m e2ediff`."""

from e2ediff.cli import main

main()
