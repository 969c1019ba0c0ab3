"""The steps of a decoder that denoises images, given a latent.

Shapes: B batch, C H W image.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from e2ediff.data import ImageSpec
from e2ediff.interpolant import spread


def decoding_noise(image: ImageSpec, seed: int) -> Tensor:
    """Draw the unit normal noise (1, C, H, W) from which every image is decoded.

    It lies on the default device, as a buffer that a network makes in its constructor does.
    Randomness: a generator of its own, on the CPU, with this seed.
    """
    g = torch.Generator().manual_seed(seed)
    shape = (1, image.channels, image.height, image.width)
    noise = torch.randn(shape, generator=g, device="cpu")
    return noise.to(torch.empty(0).device)


def last_step(
    clean: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Take all of a decoder's steps but the last, and return where that begins.

    Euler's steps along the straight path x_t = t x + (1 - t) noise, between `steps` + 1 times
    that lie evenly in [0, 1]. The last one ends in the clean estimate itself, which is the image:
    a decoder that knows the image gives it back in any number of steps.

    Args:
        clean: The decoder's clean estimate (B, C, H, W) of x_t (B, C, H, W) at times (B,).
        noise: x_t at t = 0, (B, C, H, W).
        steps: Number of steps, at least 1; `clean` is called once less.

    Returns:
        x_t (B, C, H, W) and t (B,), differentiable in what `clean` depends on.
    """
    x_t, t = noise, noise.new_zeros(len(noise))
    for before, after in pairwise(i / steps for i in range(steps)):
        left = (1 - after) / (1 - before)  # of the noise
        x = clean(x_t, t)
        x_t, t = x + left * (x_t - x), torch.full_like(t, after)
    return x_t, t


def noised_image(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Mix images with noise, both (B, C, H, W), to x_t = t x + (1 - t) noise at times (B,)."""
    return spread(t, x) * x + spread(1 - t, noise) * noise
