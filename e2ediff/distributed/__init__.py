"""Run processes and threads: their number, communication, signals and failures."""
