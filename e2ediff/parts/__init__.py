"""The parts that ship with e2ediff, one family a file."""
