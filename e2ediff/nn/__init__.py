"""What transformers share: blocks, positions and attention kernels."""
