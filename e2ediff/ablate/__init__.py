"""Grids of runs: planned, trained, and found again."""
