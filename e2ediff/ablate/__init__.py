"""Plan and train grids of runs."""
