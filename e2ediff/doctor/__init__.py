"""Check a machine and its installation, and pack what a report of a bug needs."""
