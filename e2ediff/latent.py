"""Latents: their normalisation, and the contract that says what a latent means.

Shapes: B batch, N tokens, D channels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Literal, get_args

import attrs
import torch
from torch import Tensor, nn

from e2ediff.errors import LatentError

NormKind = Literal["none", "layer", "affine", "batch", "position"]
NORM_KINDS: tuple[NormKind, ...] = get_args(NormKind)


def norm_problems(kind: NormKind, dim: int) -> list[tuple[str, str]]:
    """List what a backbone's `problems` says of a `latent_dim` that is too small for its norm."""
    if kind not in ("layer", "affine") or dim > 2:
        return []
    what = (
        "a layer norm takes two degrees of freedom of each token: give it at least 3 channels, "
        "or choose latent_norm batch or position"
    )
    return [("latent_dim", what)]


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
        """Normalise a latent, (B, N, D) -> (B, N, D), computed in float32."""
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


TIME = "0 is noise, 1 is data"
"""The convention of time, in which every latent is noised here."""


@attrs.frozen(kw_only=True)
class LatentContract:
    """What a latent (B, N, D) of one set of weights means to whoever decodes or denoises it.

    `tokens` and `dim` are N and D, `grid` the rows and columns of tokens that lie on the image
    plane.
    `norm` is the kind of `LatentNorm`, and `statistics` a hash of the mean and variance it
    subtracts and divides by, "" for kinds without: two encoders of one kind differ in them.
    `scale` is the standard deviation: 1 by construction for a normalised latent, measured for
    `none`.
    `time` is the convention by which latents are noised.

    A checkpoint's manifest has one for each set of weights.
    """

    tokens: int
    dim: int
    norm: str
    grid: tuple[int, int] | None = None
    statistics: str = ""
    scale: float = 1.0
    time: str = TIME

    @classmethod
    def read(cls, body: Mapping[str, object]) -> LatentContract:
        """Read it from JSON; keys of a later version are passed over.

        Raises:
            KeyError, TypeError, ValueError: It is no contract.
        """
        known = {field.name: body[field.name] for field in attrs.fields(cls)}
        grid, scale = known.pop("grid"), known["scale"]
        sides = grid if isinstance(grid, list | tuple) else ()
        numbers = (known["tokens"], known["dim"], *sides)
        if any(type(number) is not int or number < 1 for number in numbers):
            raise ValueError(f"tokens, dim and grid are {numbers}, expected whole numbers above 0")
        if len(sides) not in (0, 2) or (grid is not None and not sides):
            raise ValueError(f"grid is {grid!r}, expected two numbers or null")
        if not isinstance(scale, int | float) or not 0 <= scale < math.inf:
            raise ValueError(f"scale is {scale!r}, expected a finite number from 0 on")
        if not all(isinstance(known[name], str) for name in ("norm", "statistics", "time")):
            raise TypeError("norm, statistics and time are not all text")
        return cls(**known, grid=tuple(sides) or None)  # type: ignore[arg-type]

    def as_json(self) -> dict[str, object]:
        """Return the contract as JSON, which `read` accepts."""
        return attrs.asdict(self)

    def accept(self, other: LatentContract, who: str) -> None:
        """Take latents that keep the contract `other`.

        The scale of latents without a norm is a measurement, and is not compared.

        Args:
            other: What the latents are.
            who: Whose they are, for the message.

        Raises:
            LatentError: They mean something else here; both contracts are shown.
        """
        fields = ("tokens", "dim", "grid", "norm", "statistics", "time")
        differ = [f for f in fields if getattr(self, f) != getattr(other, f)]
        if differ:
            raise LatentError(
                f"latents of {who} differ in {', '.join(differ)} from what is expected here.\n"
                f"  theirs:   {other}\n  expected: {self}\n"
                "Decode and denoise latents with the weights that encoded them, or train for "
                "those latents."
            )

    def __str__(self) -> str:
        place = f" on a grid of {self.grid[0]} x {self.grid[1]}" if self.grid else ""
        held = f" (statistics {self.statistics[:12]})" if self.statistics else ""
        return (
            f"{self.tokens} tokens x {self.dim}{place}, norm {self.norm}{held}, "
            f"scale {self.scale:.3g}, t: {self.time}"
        )


@attrs.frozen(eq=False)
class Latents:
    """Latents z (B, N, D) with the contract they keep."""

    z: Tensor
    contract: LatentContract


def statistics_hash(norm: LatentNorm) -> str:
    """Return the SHA-256 of the stored statistics; "" for a kind without."""
    if not norm.has_statistics:
        return ""
    stored = torch.cat([norm.mean.flatten(), norm.var.flatten()]).float().cpu()
    return hashlib.sha256(stored.numpy().tobytes()).hexdigest()
