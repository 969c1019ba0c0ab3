"""Train a run: start, observe, save, stop and resume it."""
