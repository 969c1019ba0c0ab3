"""The decoder: a plain vision transformer from latents to pixels.

Shapes: B batch, C H W image, N latent tokens, D latent channels, P patches, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from attrs import validators
from torch import Tensor, nn
from torch.nn import functional

from e2ediff.nn.layers import MLP, SelfAttention, sincos_positions, unpatchify

_SIZE = validators.optional(validators.gt(0))


@attrs.frozen(kw_only=True)
class DecoderConfig:
    """Shape of the decoder: `width`, `depth` and `heads`, each by default the trunk's.

    `embed_width` is the width between its first two linear layers, by default its own; UNITE's
    code (arXiv 2603.22283) has 768 for decoders of all sizes.
    """

    width: int | None = attrs.field(default=None, validator=_SIZE)
    depth: int | None = attrs.field(default=None, validator=_SIZE)
    heads: int | None = attrs.field(default=None, validator=_SIZE)
    embed_width: int | None = attrs.field(default=None, validator=_SIZE)

    def filled(self, width: int, depth: int, heads: int) -> DecoderConfig:
        """With the trunk's sizes for those that are not given."""
        return DecoderConfig(
            width=self.width or width,
            depth=self.depth or depth,
            heads=self.heads or heads,
            embed_width=self.embed_width,
        )

    def problems(self) -> Sequence[tuple[str, str]]:
        """Sizes, all of them given, that do not divide one another."""
        width, heads = self.width or 0, self.heads or 1
        found = []
        if width % heads:
            found.append(("heads", f"{heads} does not divide the width, {width}"))
        if width % 4:
            found.append(("width", f"{width} is not a multiple of 4"))
        return found


# As the released code. The extra token is zero in the first step, where its norm multiplies its
# gradient by 1 / sqrt(_EPS), which clipping bounds; from then on the number hardly matters.
_EPS = 1e-12


class ErfMLP(MLP):
    """A perceptron whose GELU is exact, where that of other networks is by tanh."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__(width, ratio, "gelu")

    def forward(self, x: Tensor) -> Tensor:
        """(B, P, W) -> (B, P, W)."""
        out: Tensor = self.outer(functional.gelu(self.inner(x)))
        return out


class PlainBlock(nn.Module):
    """Pre-norm attention and GELU perceptron, without conditioning."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=_EPS)
        self.attention = SelfAttention(width, heads, qk_norm=False)
        self.norm2 = nn.LayerNorm(width, eps=_EPS)
        self.mlp = ErfMLP(width, 4.0)

    def forward(self, x: Tensor) -> Tensor:
        """(B, P, W) -> (B, P, W)."""
        x = x + self.attention(self.norm1(x), None)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Decoder(nn.Module):
    """One token for each patch of the image, at fixed sine-cosine positions.

    Latent tokens become patches in their order; where their number is another they are
    interpolated along their line.

    Its linear layers begin as torch makes them, which `UniteNet` sees to.

    Source: UNITE (arXiv 2603.22283), released code, after MAE's decoder (arXiv 2111.06377): two
    linear layers before, a learned token beside the patches, norms with eps 1e-12, exact GELU.
    Ours: latents are interpolated on a line, because registers have no place; the code does it
    on a square. Images are in [-1, 1], the code's in [0, 1].
    """

    positions: Tensor

    def __init__(
        self,
        config: DecoderConfig,
        tokens: int,
        dim: int,
        patch: int,
        grid: tuple[int, int],
        channels: int,
    ) -> None:
        super().__init__()
        assert config.width is not None
        assert config.depth is not None
        assert config.heads is not None
        width = config.width
        self.tokens, self.patch, self.grid = tokens, patch, grid
        between = config.embed_width or width
        self.embed = nn.Sequential(nn.Linear(dim, between), nn.Linear(between, width))
        self.embed_extra = nn.Parameter(torch.zeros(width))
        self.register_buffer("positions", sincos_positions(grid, width), persistent=False)
        self.blocks = nn.ModuleList(PlainBlock(width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=_EPS)
        self.head = nn.Linear(width, channels * patch**2)

    def forward(self, z: Tensor) -> Tensor:
        """Latents (B, N, D) -> images (B, C, H, W)."""
        h = self.embed(z)
        if self.tokens != len(self.positions):
            h = functional.interpolate(h.mT, len(self.positions), mode="linear").mT
        x = torch.cat([self.embed_extra.expand(len(h), 1, -1).to(h.dtype), h + self.positions], 1)
        for block in self.blocks:
            x = block(x)
        return unpatchify(self.head(self.norm(x[:, 1:])), self.patch, self.grid)
