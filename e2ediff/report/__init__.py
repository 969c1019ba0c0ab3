"""Ablations and reports: many runs by one grid, and one static page that compares runs."""
