"""A run in time: begun, trained, observed, saved, stopped and continued."""
