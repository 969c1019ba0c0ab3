"""The parts that ship with e2ediff: a file, or a folder of files, for each registry."""
