"""Files that others made: which are images, where they lie, their labels, and how one is opened."""
