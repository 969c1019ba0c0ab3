"""One optimizer step: forward, backward, update and averages, in one process or several."""
