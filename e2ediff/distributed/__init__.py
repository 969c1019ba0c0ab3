"""Processes and threads: how many there are, what they agree on, and what ends them."""
