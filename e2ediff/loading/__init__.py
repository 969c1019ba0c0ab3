"""From a source of images to batches: their order, workers, and damaged images."""
