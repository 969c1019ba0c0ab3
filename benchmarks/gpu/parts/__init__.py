"""The parts of the check: each module has a function `run`, which `part.py` calls."""
