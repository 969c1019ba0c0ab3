"""Samplers: from noise to clean latents."""
