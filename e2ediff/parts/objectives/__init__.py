"""Objectives that need no plugin."""
