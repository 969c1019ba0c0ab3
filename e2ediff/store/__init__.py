"""Files of a run on disks and stores: whole or absent, locked, hashed. Knows no network."""
