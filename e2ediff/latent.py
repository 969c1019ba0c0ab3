"""Normalisation of latents, part of the latent contract.

Shapes: B batch, N tokens, D channels.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

NormKind = Literal["none", "layer", "affine", "batch", "position"]
NORM_KINDS: tuple[NormKind, ...] = get_args(NormKind)


class LatentNorm(nn.Module):
    """Give latents unit scale; only `affine` learns a scale of its own.

    | kind | what has mean 0 and variance 1 |
    |---|---|
    | `none` | nothing: DSD's loss then inflates the scale without bound |
    | `layer` | each token over its D channels; costs two degrees of freedom a token |
    | `affine` | as `layer`, then each channel has a learned scale and shift |
    | `batch` | each channel over batch and tokens; a constant per position counts as variance |
    | `position` | each channel of each token over the batch; closes that loophole |

    The last two take their statistics from the batch while the module trains, and stored ones
    in eval mode.
    Stored statistics belong to one set of weights: `calibrate` computes them for the weights in
    use, and they travel with those weights as buffers.
    A training step never writes them, so a step is a pure function of weights and batch.

    `affine` leaves the scale free as `none` does, more slowly: it is for objectives whose
    denoising loss has no gradient to the latents.

    Source: without affine parameters as REPA-E (arXiv 2504.10483), section 3, which normalises
    by batch so that the loss cannot be lowered by a scale; `affine` is UNITE's (arXiv
    2603.22283).
    """

    mean: Tensor
    var: Tensor

    def __init__(self, kind: NormKind, tokens: int, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.kind: NormKind = kind
        self.eps = eps
        if kind == "affine":
            self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        shape = (tokens, dim) if kind == "position" else (dim,)
        self.register_buffer("mean", torch.zeros(shape), persistent=self.has_statistics)
        self.register_buffer("var", torch.ones(shape), persistent=self.has_statistics)

    @property
    def has_statistics(self) -> bool:
        """Whether this kind needs `calibrate` before eval mode."""
        return self.kind in ("batch", "position")

    def _over(self) -> tuple[int, ...]:
        return (0,) if self.kind == "position" else (0, 1)

    def forward(self, raw: Tensor) -> Tensor:
        """Normalised latent, (B, N, D) -> (B, N, D), computed in float32."""
        z = raw.float()
        if self.kind == "none":
            return z
        if self.kind == "layer":
            return torch.nn.functional.layer_norm(z, z.shape[-1:], eps=self.eps)
        if self.kind == "affine":
            own = self.weight, self.bias
            return torch.nn.functional.layer_norm(z, z.shape[-1:], *own, eps=self.eps)
        if self.training:
            var, mean = torch.var_mean(z, dim=self._over(), correction=0)
        else:
            var, mean = self.var, self.mean
        return (z - mean) * torch.rsqrt(var + self.eps)

    @torch.no_grad()
    def calibrate(self, raw: Tensor) -> None:
        """Store the statistics of these latents before their norm, (M, N, D), M images."""
        if self.has_statistics:
            var, mean = torch.var_mean(raw.double(), dim=self._over(), correction=0)
            self.mean.copy_(mean)
            self.var.copy_(var)
