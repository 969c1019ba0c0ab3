"""Write one static page that compares runs: curves, tables, samples, and a verdict."""
