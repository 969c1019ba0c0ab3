"""The JiT network: a plain transformer that denoises patches of pixels.

Shapes: B batch, C H W image, N patches, D = C patch^2 pixels of a patch, W width, K context.
"""

from __future__ import annotations

from typing import ClassVar

import attrs
import torch
from attrs import validators
from torch import Tensor, nn

from e2ediff.backbone import LatentSpec
from e2ediff.condition import Condition
from e2ediff.data import ImageSpec
from e2ediff.nn.backbone import PatchBackbone, PatchConfig
from e2ediff.nn.layers import (
    MLP,
    Block,
    Context,
    Rotary,
    SwiGLUWidth,
    TimeEmbedding,
    Trunk,
    context_problems,
    initialise,
    patchify,
    sincos_positions,
    unpatchify,
)


@attrs.frozen(kw_only=True)
class JiTConfig(PatchConfig):
    """A denoiser of pixels: the latent is the image, cut into patches.

    `width`, `depth` and `heads` shape the transformer; `patch` is the side of a patch in pixels.
    `bottleneck` is the width between the two linear layers that embed a patch.
    `context` tokens of the condition join the patches after the first `context_start` blocks; 0
    leaves them out.
    `mlp_ratio` is the perceptron's hidden width over `width`, of which its gate costs a third.
    `swiglu_width` says how what is left becomes whole: the nearest `multiple_of_8`, or
    `truncated`, as in JiT's code, which at JiT-L's and JiT-H's width is another, 2730 and 3413.
    `attention` is that of `vit`.

    Encoding and decoding have no weights and lose nothing, so every trained weight is the
    denoiser's, and the latent is not normalised: pixels lie in [-1, 1].

    Source: JiT (Li & He 2025, arXiv 2511.13720). From a copy of its code: RMSNorm, SwiGLU, qk-norm
    and rotary positions beside sincos ones, adaLN-zero, the bottleneck, 32 in-context class
    tokens, times embedded at frequencies from 1 down. Ours: no dropout, which JiT-B does without,
    and perceptrons of a `multiple_of_8`.
    """

    trial: ClassVar[tuple[str, ...]] = (
        "objective=pixel",
        "backbone.width=16",
        "backbone.depth=2",
        "backbone.heads=2",
        "backbone.patch=8",
        "backbone.context=2",
        "backbone.context_start=1",
    )

    bottleneck: int = attrs.field(default=128, validator=validators.gt(0))
    context: int = attrs.field(default=32, validator=validators.ge(0))
    context_start: int = attrs.field(default=4, validator=validators.ge(0))
    mlp_ratio: float = attrs.field(default=4.0, validator=validators.gt(0))
    swiglu_width: SwiGLUWidth = "multiple_of_8"

    def problems(self, image: ImageSpec) -> list[tuple[str, str]]:
        """Sizes that do not divide one another, and context that would never join."""
        found = super().problems(image)
        if self.width % self.heads or (self.width // self.heads) % 4:
            what = f"{self.heads} do not cut the width, {self.width}, into multiples of 4"
            found.append(("heads", what))
        return found + context_problems(self.context, self.context_start, self.depth)

    def build(self, image: ImageSpec) -> JiT:
        """A freshly initialised network."""
        return JiT(self, image)


class JiT(PatchBackbone):
    """The network of `JiTConfig`."""

    config: JiTConfig
    positions: Tensor

    def __init__(self, config: JiTConfig, image: ImageSpec) -> None:
        c, grid, dim = config, config.grid(image), image.channels * config.patch**2
        latent = LatentSpec(grid[0] * grid[1], dim, norm="none", grid=grid, learned=False)
        super().__init__(config, image, latent, c.context)
        self.denoiser_apart = True
        self.embed_pixels = nn.Sequential(
            nn.Linear(dim, c.bottleneck, bias=False), nn.Linear(c.bottleneck, c.width)
        )
        self.embed_time = TimeEmbedding(c.width, 10000.0 ** (-torch.arange(128) / 128))
        self.embed_label = image.conditioning.embedding(c.width)
        self.embed_context = nn.Parameter(torch.empty(c.context, c.width))
        self.register_buffer("positions", sincos_positions(grid, c.width), persistent=False)
        self.rotary = Rotary(grid, c.width // c.heads, base=10000.0)

        blocks = [
            Block(
                c.width,
                c.heads,
                MLP(c.width, c.mlp_ratio, "swiglu", c.swiglu_width),
                "block",
                norm="rms",
            )
            for _ in range(c.depth)
        ]
        self.trunk = Trunk(blocks, c.width, shared=False, norm="rms")
        self.head_pixels = nn.Linear(c.width, dim)
        times = [m.weight for m in self.embed_time.layers if isinstance(m, nn.Linear)]
        own = self.embed_label.parameters(recurse=False)
        small = (*own, self.embed_context, *times)
        initialise(self, small, [self.head_pixels])

    def encode(self, x: Tensor) -> Tensor:
        """The image's patches, (B, C, H, W) -> (B, N, D)."""
        return patchify(x.float(), self.config.patch)

    def decode(self, z: Tensor) -> Tensor:
        """Patches put together, (B, N, D) -> (B, C, H, W)."""
        return unpatchify(z.float(), self.config.patch, self.grid)

    def denoise(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Prediction (B, N, D) from z_t (B, N, D), t (B,) and a condition a row."""
        tokens = self.embed_pixels(z_t) + self.positions
        named = self.embed_label(condition)  # (B, W)
        context = Context.of(named, self.embed_context, self.config.context_start)
        c = self.embed_time(t) + named
        h, _ = self.trunk(tokens, c, frozenset(), self.rotary(), context)
        out: Tensor = self.head_pixels(h).float()
        return out
