"""Which weights, guidance and sampler suit a trained run: a search on a cheap score."""
