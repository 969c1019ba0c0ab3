"""Files that others made: which are images, where they lie, how they are labelled and opened."""
