"""The UNITE network: registers are the latent, and the encoder is the denoiser, given the image.

Shapes: B batch, C H W image, N registers, D latent channels, P patches, W width, K context.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import attrs
import torch
from attrs import validators
from torch import Tensor, nn

from e2ediff.backbone import Decode, Denoise, Encode, FusedBackbone, LatentSpec, Output, Pass
from e2ediff.condition import Condition, concatenate
from e2ediff.data import ImageSpec
from e2ediff.latent import NormKind, norm_problems
from e2ediff.nn.backbone import PatchBackbone, PatchConfig
from e2ediff.nn.layers import (
    Context,
    Rotary,
    SwiGLUWidth,
    TimeEmbedding,
    Trunk,
    context_problems,
    initialise,
    parted,
    patchify,
)
from e2ediff_unite.decoder import Decoder, DecoderConfig
from e2ediff_unite.encoder import NormedBlock


@attrs.frozen(kw_only=True)
class UniteConfig(PatchConfig):
    """A generative encoder, whose registers are the latent, and a decoder of its own.

    `width`, `depth` and `heads` shape the trunk that both encodes and denoises; `patch` is the
    side of a patch in pixels; the latent is `registers` tokens of `latent_dim` channels, which
    have no place on the image.
    To denoise, the trunk sees the registers alone; to encode, the patches too, with registers
    that begin from noise, next to t = 0 and without a class: from fresh noise where the objective
    gives it, else from the same in every call, at t = 0.
    `context` class tokens join after the first `context_start` blocks; 0 leaves them out.
    `latent_norm` is described at `e2ediff.latent.LatentNorm`; `norm_prediction` sends the
    denoiser's answer through it too.
    `mlp_ratio` is the perceptron's hidden width over `width`, of which its gate costs a third.
    `swiglu_width` says how what is left becomes whole: the nearest `multiple_of_8`, or
    `truncated`, as in the released code, which is the same for B and XL and another for M and L.
    `decoder` has the shape of the decoder, by default the trunk's.
    `attention` is that of `vit`.

    Source: UNITE (arXiv 2603.22283), and its released code for the shapes: adaLN-zero with RMSNorm
    before and after each block, SwiGLU, qk-norm, rotary positions on a line, sine-cosine
    positions of registers, learned from there, random Fourier features of time, class tokens as
    JiT's; and for the start of weights: the trunk as a DiT's, decoder and embedding of patches
    as torch makes linear layers.
    Ours: normal quantiles for the random frequencies; a final layer that does not begin at zero,
    where every latent would be the same; the fixed start, as a latent outside the training step
    is a function of its image here, while the code draws noise and t from U[0, 0.01] always;
    images in [-1, 1], where the code has [0, 1]; and neither of two vectors, a time embedding and
    a label, that the code has and never uses.
    """

    trial: ClassVar[tuple[str, ...]] = (
        "backbone.width=16",
        "backbone.depth=2",
        "backbone.heads=2",
        "backbone.patch=8",
        "backbone.registers=4",
        "backbone.latent_dim=4",
        "backbone.context=2",
        "backbone.context_start=1",
    )

    registers: int = attrs.field(validator=validators.gt(0))
    latent_dim: int = attrs.field(validator=validators.gt(0))
    latent_norm: NormKind = "affine"
    norm_prediction: bool = True
    context: int = attrs.field(default=32, validator=validators.ge(0))
    context_start: int = attrs.field(default=4, validator=validators.ge(0))
    mlp_ratio: float = attrs.field(default=4.0, validator=validators.gt(0))
    swiglu_width: SwiGLUWidth = "multiple_of_8"
    decoder: DecoderConfig = attrs.field(factory=DecoderConfig)

    def problems(self, image: ImageSpec) -> list[tuple[str, str]]:
        """Sizes that do not divide one another, and context that would never join."""
        found = super().problems(image)
        if self.width % (2 * self.heads):
            what = f"{self.heads} do not cut the width, {self.width}, into even parts"
            found.append(("heads", what))
        found += context_problems(self.context, self.context_start, self.depth)
        found += norm_problems(self.latent_norm, self.latent_dim)
        inner = self.decoder.filled(self.width, self.depth, self.heads).problems()
        return [*found, *((f"decoder.{field}", what) for field, what in inner)]

    def build(self, image: ImageSpec) -> UniteNet:
        """A freshly initialised network."""
        return UniteNet(self, image)


class UniteNet(PatchBackbone, FusedBackbone):
    """The network of `UniteConfig`; fuses passes of one kind into one batch."""

    config: UniteConfig
    start: Tensor

    def __init__(self, config: UniteConfig, image: ImageSpec) -> None:
        c, latent = config, LatentSpec(config.registers, config.latent_dim, config.latent_norm)
        super().__init__(config, image, latent, c.context)
        self.depth, self.width = c.depth, c.width
        self.encodes_from_noise = self.decoder_apart = True
        self.embed_pixels = nn.Linear(image.channels * c.patch**2, c.width)
        self.embed_latent = nn.Linear(c.latent_dim, c.width)
        self.embed_register = nn.Parameter(line_positions(c.registers, c.width))
        self.embed_time = TimeEmbedding(c.width, 2 * math.pi * normal_quantiles(256))
        self.embed_label = image.conditioning.embedding(c.width)
        self.embed_context = nn.Parameter(torch.empty(c.context, c.width))
        self.register_buffer("start", fixed_noise(c.registers, c.latent_dim), persistent=False)
        line = (c.registers + self.grid[0] * self.grid[1],)
        self.rotary = Rotary(line, c.width // c.heads, base=10000.0)

        blocks = [
            NormedBlock(c.width, c.heads, c.mlp_ratio, c.swiglu_width) for _ in range(c.depth)
        ]
        self.trunk = Trunk(blocks, c.width, shared=False, norm="rms")
        self.head_latent = nn.Linear(c.width, c.latent_dim)
        own = c.decoder.filled(c.width, c.depth, c.heads)
        self.decoder = Decoder(own, c.registers, c.latent_dim, c.patch, self.grid, image.channels)
        times = [m.weight for m in self.embed_time.layers if isinstance(m, nn.Linear)]
        table = self.embed_label.parameters(recurse=False)
        small = (*table, self.embed_context, *times)
        initialise(self, small)
        decoding = [m for m in self.decoder.modules() if isinstance(m, nn.Linear)]
        for linear in (self.embed_pixels, *decoding):
            linear.reset_parameters()

    def outputs(self, *passes: Pass) -> list[Output]:
        """Run passes; those of one kind go through the network as one batch.

        Decode passes offer no features.
        Fused and single passes give the same values to rounding.

        Raises:
            ValueError: A pass asks for a mask, or gives one of `z_t` and `t` without the other.
        """
        results: list[Output | None] = [None] * len(passes)
        encodes = [(i, p) for i, p in enumerate(passes) if isinstance(p, Encode)]
        denoises = [(i, p) for i, p in enumerate(passes) if isinstance(p, Denoise)]
        decodes = [(i, p) for i, p in enumerate(passes) if isinstance(p, Decode)]
        # Encoding has the patches beside the registers, so its sequences are of another length.
        if encodes:
            whole = torch.cat([p.x for _, p in encodes])
            starts = [self._start(p) for _, p in encodes]
            for i, out in self._registers(starts, [(i, p.taps) for i, p in encodes], whole):
                raw = out.value
                results[i] = Output(self.latent_norm(raw), out.features, raw)
        if denoises:
            for _, p in denoises:
                self.accept_times(p)
            given = [(p.z_t, p.t, p.condition) for _, p in denoises]
            for i, out in self._registers(given, [(i, p.taps) for i, p in denoises]):
                value = self.latent_norm(out.value) if self.config.norm_prediction else out.value
                results[i] = Output(value, out.features)
        if decodes:
            for _, d in decodes:
                self.accept_image(d)
            x = self.decoder(torch.cat([p.z for _, p in decodes])).float()
            for (i, _), part in zip(decodes, x.split([len(p.z) for _, p in decodes]), strict=True):
                results[i] = Output(part)
        return [r for r in results if r is not None]

    def _start(self, p: Encode) -> tuple[Tensor, Tensor, Condition]:
        """What an encode pass denoises: z_t, t and null conditions."""
        if p.mask is not None:
            raise ValueError("this backbone cannot hide patches; leave out the mask")
        if (p.z_t is None) != (p.t is None):
            raise ValueError("an encode pass takes z_t and t together, or neither")
        t = p.x.new_zeros(len(p.x)) if p.t is None else p.t
        z_t = self.start.expand(len(p.x), -1, -1) if p.z_t is None else p.z_t
        return z_t, t, self.image.conditioning.null(len(t), t.device)

    def _registers(
        self,
        given: Sequence[tuple[Tensor, Tensor, Condition]],
        wanted: Sequence[tuple[int, tuple[int, ...]]],
        x: Tensor | None = None,
    ) -> list[tuple[int, Output]]:
        """The trunk's answer (B, N, D), before any norm, to each pass of one kind.

        Args:
            given: z_t, t and condition of each pass.
            wanted: Number and taps of each pass.
            x: Images of all passes, to encode; none to denoise.
        """
        n, sizes = self.latent.tokens, [len(t) for _, t, _ in given]
        z_t, t = torch.cat([z for z, _, _ in given]), torch.cat([t for _, t, _ in given])
        tokens = self.embed_latent(z_t) + self.embed_register  # (B, N, W)
        if x is not None:
            tokens = torch.cat([tokens, self.embed_pixels(patchify(x, self.config.patch))], dim=1)
        turn = self.rotary(tokens.shape[1])
        named = self.embed_label(concatenate([c for _, _, c in given]))  # (B, W)
        context = Context.of(named, self.embed_context, self.config.context_start)
        numbers, taps = zip(*wanted, strict=True)
        h, features = self.trunk(
            tokens, self.embed_time(t) + named, frozenset().union(*taps), turn, context
        )
        features = {tap: f[:, :n] for tap, f in features.items()}
        parts = parted(self.head_latent(h[:, :n]).float(), features, sizes, taps)
        return [(i, Output(*part)) for i, part in zip(numbers, parts, strict=True)]


def normal_quantiles(count: int) -> Tensor:
    """`count` numbers (count,) spread as those of a unit normal, without randomness."""
    spread: Tensor = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    return spread.float()


def fixed_noise(tokens: int, dim: int) -> Tensor:
    """Unit normal noise (tokens, dim), always the same.

    It is drawn on the CPU from a generator of its own, so it depends on the shape alone.
    """
    noise = torch.randn(tokens, dim, generator=torch.Generator().manual_seed(0), device="cpu")
    return noise.to(torch.get_default_device())


def line_positions(tokens: int, width: int) -> Tensor:
    """Sine and cosine positions on a line, (tokens, width); width is even.

    Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.5.
    """
    half = width // 2
    angles = torch.arange(tokens)[:, None] * 10000.0 ** (-torch.arange(half) / half)
    return torch.cat([angles.sin(), angles.cos()], dim=1)
