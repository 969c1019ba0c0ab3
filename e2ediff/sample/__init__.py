"""Load a trained run, and make images, reconstructions and interpolations with it."""
