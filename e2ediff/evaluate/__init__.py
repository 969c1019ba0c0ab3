"""Scores of images against a reference, each with a passport of everything that decides it."""
