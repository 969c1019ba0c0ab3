"""Build the networks of a recipe, and compute with trained ones."""
