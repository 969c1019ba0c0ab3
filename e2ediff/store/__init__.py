"""Store the files of a run: whole or absent, locked, hashed; knows nothing of networks."""
