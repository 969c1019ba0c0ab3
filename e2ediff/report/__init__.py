"""One static page that compares runs: curves, tables, samples side by side, and a verdict."""
