"""Load batches from a source of images: their order, workers, and damaged images."""
