"""Count network calls of sampling, by sampling once with a network that only counts."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor, nn

from e2ediff.backbone import Backbone
from e2ediff.condition import Condition
from e2ediff.denoiser import Plain
from e2ediff.host.recipe import Recipe
from e2ediff.model.build import build_nets
from e2ediff.model.inference import Model


@attrs.frozen
class Calls:
    """Rows that one sampled image takes through the network, by mode."""

    denoise: int
    decode: int


def count_calls(recipe: Recipe) -> Calls:
    """Sample one image with the recipe's sampler and guidance, and count rows.

    An adaptive solver is counted on a denoiser that always returns zero.
    Another network that guidance uses counts as one of this recipe's size.
    """
    counting = _Counting(build_nets(recipe, torch.device("meta"))[0].online)
    guidance = recipe.guidance
    if guidance is not None and guidance.references:
        other = Plain(counting, recipe.interpolant, recipe.predicts)
        guidance = guidance.with_references(dict.fromkeys(guidance.references, other))
    Model(recipe, counting, guidance, rows=1).sample(recipe.data.image.conditioning.example(1))
    return Calls(counting.denoised, counting.decoded)


class _Counting(Backbone):
    """Returns zeros of the right shape, and counts rows."""

    def __init__(self, like: Backbone) -> None:
        super().__init__()
        self.image, self.latent, self.latent_norm = like.image, like.latent, like.latent_norm
        self.place = nn.Parameter(torch.zeros(1))  # sampling happens on the device of the weights
        self.denoised = self.decoded = 0

    def encode(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), self.latent.tokens, self.latent.dim)

    def decode(self, z: Tensor) -> Tensor:
        self.decoded += len(z)
        return z.new_zeros(len(z), self.image.channels, self.image.height, self.image.width)

    def denoise(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.denoised += len(z_t)
        return torch.zeros_like(z_t)
