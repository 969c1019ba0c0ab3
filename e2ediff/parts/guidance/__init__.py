"""Guidance: denoisers made of a denoiser asked several times, or of several."""
