"""Search the weights, guidance and sampler that suit a trained run, on a cheap score."""
