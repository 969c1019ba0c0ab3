"""Files that others made: which are images, how one is opened, and addresses taken literally."""
