"""A trained run loaded, and asked for images, reconstructions and interpolations."""
