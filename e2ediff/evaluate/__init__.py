"""Score images against a reference; each score has a passport of all that determines it."""
