"""Running: the engine, its directory on disk, and its checkpoints."""
