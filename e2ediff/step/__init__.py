"""One optimizer step in one process or several: its passes, update, averages and FLOPs."""
