"""Prepare data for training: crop images once, find damaged ones, count classes."""
