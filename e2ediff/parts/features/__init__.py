"""Feature networks: what losses and scores compare images by."""
