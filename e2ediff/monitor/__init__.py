"""What is looked at while a run trains: diagnostics, scores, previews, and the alarm."""
