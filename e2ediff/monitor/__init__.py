"""Observe a run while it trains: diagnostics, scores, previews, and the alarm."""
