"""The ViT with three modes: one network encodes, decodes and denoises.

Shapes: B batch, C H W image, N tokens (one a patch), D latent channels, W trunk width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import attrs
import torch
from attrs import validators
from torch import Tensor, nn
from torch.nn import functional

from e2ediff.backbone import Decode, Denoise, Encode, FusedBackbone, LatentSpec, Output, Pass
from e2ediff.data import ImageSpec
from e2ediff.latent import NormKind, norm_problems
from e2ediff.nn.backbone import PatchBackbone, PatchConfig
from e2ediff.nn.layers import (
    MLP,
    Block,
    MLPKind,
    Modulation,
    Residual,
    Rotary,
    TimeEmbedding,
    Trunk,
    initialise,
    of_tokens,
    parted,
    patchify,
    sincos_positions,
    time_frequencies,
    unpatchify,
)
from e2ediff.nn.pixel_decoding import decoding_noise, last_step

Mode = Literal["encode", "decode", "denoise"]
Trunks = Literal["one", "decoder_apart", "denoiser_apart", "three"]

_TRUNK_OF: Mapping[Trunks, Mapping[Mode, str]] = {
    "one": {"encode": "all", "decode": "all", "denoise": "all"},
    "decoder_apart": {"encode": "encode", "decode": "decode", "denoise": "encode"},
    "denoiser_apart": {"encode": "autoencode", "decode": "autoencode", "denoise": "denoise"},
    "three": {"encode": "encode", "decode": "decode", "denoise": "denoise"},
}

# Of mode embeddings that are the only conditioning: with DiT's 0.02 the modulation starts so
# near zero that autoencoding learns slower (docs/results/late-times.md).
_OWN_STD = 0.5


@attrs.frozen(kw_only=True)
class ViTConfig(PatchConfig):
    """A vision transformer with one latent token for each patch.

    `width`, `depth` and `heads` shape the trunk; `patch` is the side of a patch in pixels and
    `latent_dim` the channels of a token.
    `latent_norm` is described at `e2ediff.latent.LatentNorm`.
    `trunks` says which modes share weights: `one` for all (DSD), `decoder_apart` (UNITE's
    split), `denoiser_apart` (needed by `two_stage`), or `three`.
    `mlp` is the perceptron's kind (`gelu`, `relu2` or `swiglu`) and `mlp_ratio` its hidden width
    over `width`.
    `qk_norm` normalises queries and keys; `position` is the encoding of positions.
    `modulation` places the adaLN weights in each block, in one layer for all, or in one layer
    plus a layer of rank `modulation_rank` in each block.
    `mode_conditioning` is what encode and decode passes are conditioned on in a trunk that
    denoises too: `time`, the denoiser's t = 1 without a condition and an embedding of the mode, or
    `own`, that embedding alone, which then begins large. With `time`, what encoding and decoding
    learn also changes the denoiser near t = 1, where few training times lie.
    `second_time` takes a second time r in denoise passes, as of an average velocity between t and
    r, by an embedding of r - t. Times of tokens are taken in any case.
    `time_frequencies` is the number of frequencies by which times are embedded, and `time_scale`
    the highest, in radians over [0, 1]; the lowest is about a ten-thousandth of it. SiT's weights
    fit with 128 and 1, DiT's with 128 and 1000.
    `refine` is the number of channels of two 3x3 convolutions after the patches are put
    together, which smooth the seams; 0 leaves them out. They work on squares of `refine_stride`
    pixels, where they reach further and have more channels for the same cost; `refine_depth`
    residual blocks of two convolutions may stand in the place of the first.
    `denoise_skip` adds the noised latent to the denoiser's answer, each channel times a gate that
    time and condition open from 0 on, so that what is already clean need not pass the trunk.
    `decoder` is `direct`, which gives the image in one pass, or `denoising`: decode passes may
    then have a noised image and its time, and give a clean estimate, and `decode` takes
    `decode_steps` of Euler's steps from noise to the image, each a pass, with gradients through
    all of them. That noise comes from `decode_seed` alone and is the same for all images, so that
    an image is a function of its latent, near for near latents, whatever it is decoded with.
    `norm_prediction` normalises the denoiser's output as the encoder's; off by default, because
    a posterior mean has less variance than the latents.
    `attention` is `xformers`, `sdpa` (torch chooses), or one of torch's kernels; `sdpa_fa3` and
    `sdpa_fa4` are FlashAttention 3 and 4, where they are installed, in the place of torch's own.
    `auto` takes the fastest that runs and agrees with the formula on CUDA, if it is over 5 %
    faster than `sdpa`, and `sdpa` elsewhere; a run that goes on, and a model of it, keep what the
    run chose first. Where a kernel supports half precision only, `sdpa` computes in float32.

    Source: DSD (arXiv 2511.14716) uses one network for the three roles, by one summary a ViT; its
    inner shape is not public, so the modes and every choice here are ours. adaLN-zero blocks as
    DiT (arXiv 2212.09748). The skip is a learned form of EDM's (Karras et al. 2022, arXiv
    2206.00364, table 1). A denoising decoder is that of Unified Latents (arXiv 2602.17270) in
    kind; its shape, its straight path, its steps and the one noise are ours. Ours, too: the time
    embedding's layers begin with Xavier's weights, where DiT's and SiT's have a std of 0.02.
    """

    latent_dim: int = attrs.field(validator=validators.gt(0))
    latent_norm: NormKind = "layer"
    trunks: Trunks = "one"
    mlp: MLPKind = "swiglu"
    mlp_ratio: float = attrs.field(default=4.0, validator=validators.gt(0))
    qk_norm: bool = True
    position: Literal["sincos", "learned", "rope"] = "sincos"
    modulation: Modulation = "block"
    modulation_rank: int = attrs.field(default=128, validator=validators.gt(0))
    mode_conditioning: Literal["time", "own"] = "time"
    second_time: bool = False
    time_frequencies: int = attrs.field(default=64, validator=validators.gt(0))
    time_scale: float = attrs.field(default=1000.0, validator=validators.gt(0))
    refine: int = attrs.field(default=0, validator=validators.ge(0))
    refine_stride: int = attrs.field(default=1, validator=validators.gt(0))
    refine_depth: int = attrs.field(default=0, validator=validators.ge(0))
    norm_prediction: bool = False
    denoise_skip: bool = False
    decoder: Literal["direct", "denoising"] = "direct"
    decode_steps: int = attrs.field(default=8, validator=validators.ge(1))
    decode_seed: int = 0

    def problems(self, image: ImageSpec) -> list[tuple[str, str]]:
        """Sizes that do not divide one another."""
        found = super().problems(image)
        if self.width % self.heads:
            found.append(("heads", f"{self.heads} does not divide the width, {self.width}"))
        if self.width % 4:
            found.append(("width", f"{self.width} is not a multiple of 4"))
        if self.position == "rope" and (self.width // self.heads) % 4:
            found.append(
                ("position", "rope needs a head width (width / heads) that is a multiple of 4")
            )
        if self.patch % self.refine_stride:
            what = f"{self.refine_stride} does not divide the patch, {self.patch}"
            found.append(("refine_stride", what))
        if self.decoder == "direct" and (self.decode_steps, self.decode_seed) != (8, 0):
            found.append(
                ("decoder", "direct takes no steps, so leave out decode_steps and decode_seed")
            )
        if self.refine == 0 and (self.refine_stride, self.refine_depth) != (1, 0):
            found.append(
                ("refine", "0 refines nothing, so leave out refine_stride and refine_depth")
            )
        return found + norm_problems(self.latent_norm, self.latent_dim)

    def build(self, image: ImageSpec) -> ViT:
        """A freshly initialised network."""
        return ViT(self, image)


class ViT(PatchBackbone, FusedBackbone):
    """The network of `ViTConfig`; fuses passes that share a trunk into one batch."""

    config: ViTConfig
    positions: Tensor
    decode_noise: Tensor

    def __init__(self, config: ViTConfig, image: ImageSpec) -> None:
        grid, width, dim = config.grid(image), config.width, config.latent_dim
        tokens = grid[0] * grid[1]
        super().__init__(config, image, LatentSpec(tokens, dim, config.latent_norm, grid))
        self.depth, self.width = config.depth, config.width
        self.masks = self.token_times = True
        self.second_time = config.second_time
        self.denoiser_apart = config.trunks in ("denoiser_apart", "three")
        self.decoder_apart = config.trunks in ("decoder_apart", "three")
        self.denoises_pixels = config.decoder == "denoising"
        self.embed_pixels = nn.Linear(image.channels * config.patch**2, width)
        self.embed_decode = nn.Linear(dim, width)
        self.embed_denoise = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        # Time and condition are the denoiser's: a trunk of its own shares nothing with the others.
        waves = time_frequencies(config.time_frequencies, config.time_scale)
        self.embed_time = TimeEmbedding(width, waves)
        self.embed_label = image.conditioning.embedding(width)
        if config.second_time:
            self.embed_gap = TimeEmbedding(width, waves.clone())
        if self.denoises_pixels:
            self.embed_noised = nn.Linear(image.channels * config.patch**2, width)
            self.embed_pixel_time = TimeEmbedding(width, waves.clone())
            noise = decoding_noise(image, config.decode_seed)
            self.register_buffer("decode_noise", noise, persistent=False)
        self.embed_mode = nn.ParameterDict(
            {m: nn.Parameter(torch.zeros(width)) for m in ("encode", "decode", "denoise")}
        )
        names = dict.fromkeys(_TRUNK_OF[config.trunks].values())
        self.embed_position = nn.ParameterDict()
        if config.position == "learned":
            for name in names:
                self.embed_position[name] = nn.Parameter(torch.randn(tokens, width) * 0.02)
        elif config.position == "sincos":
            place = sincos_positions(grid, width)
            self.register_buffer("positions", place, persistent=False)
        if config.position == "rope":
            self.rotary = Rotary(grid, width // config.heads)

        self.trunks = nn.ModuleDict({name: self._trunk() for name in names})
        self.head_latent = nn.Linear(width, dim)
        self.head_denoise = nn.Linear(width, dim)
        if config.denoise_skip:
            self.embed_skip = nn.Linear(width, dim)
        stride = config.refine_stride
        self.side = config.patch // stride  # of a patch, in the places that are refined
        channels = config.refine or image.channels
        self.head_pixels = nn.Linear(width, channels * self.side**2)
        self.refine: nn.Module = nn.Identity()
        if config.refine:
            first: list[nn.Module] = [Residual(channels) for _ in range(config.refine_depth)]
            self.refine = nn.Sequential(
                *(first or [nn.Conv2d(channels, channels, 3, padding=1)]),
                nn.ReLU(),
                nn.Conv2d(channels, image.channels * stride**2, 3, padding=1),
                *([nn.PixelShuffle(stride)] if stride > 1 else []),
            )
        # The encoder's head must not start at zero: constant latents are a fixed point of
        # self-distillation.
        heads = [self.head_denoise] if config.refine else [self.head_denoise, self.head_pixels]
        own = self.embed_label.parameters(recurse=False)
        small = (*own, self.mask_token, *self.embed_mode.values())
        if config.denoise_skip:
            heads = [*heads, self.embed_skip]
        initialise(self, small, heads)
        if config.mode_conditioning == "own":
            for embedding in self.embed_mode.values():
                nn.init.normal_(embedding, std=_OWN_STD)

    def _trunk(self) -> Trunk:
        c = self.config
        blocks = [
            Block(
                c.width,
                c.heads,
                MLP(c.width, c.mlp_ratio, c.mlp),
                c.modulation,
                c.modulation_rank,
                qk_norm=c.qk_norm,
            )
            for _ in range(c.depth)
        ]
        return Trunk(blocks, c.width, shared=c.modulation != "block")

    def _conditioning(self, p: Pass) -> tuple[Mode, Tensor, Tensor]:
        """Mode, input tokens (B, N, W) and conditioning (B, W), or (B, N, W), of one pass."""
        mode: Mode
        trunk_of = _TRUNK_OF[self.config.trunks]
        if isinstance(p, Denoise):
            mode, tokens = "denoise", self.embed_denoise(p.z_t)
        elif isinstance(p, Decode):
            mode, tokens = "decode", self.embed_decode(p.z)
            if p.x_t is not None:
                tokens = tokens + self.embed_noised(patchify(p.x_t, self.config.patch))
        else:
            if p.z_t is not None:
                raise ValueError("this encoder does not begin from noise; leave out z_t")
            mode, tokens = "encode", self.embed_pixels(patchify(p.x, self.config.patch))
            if p.mask is not None:
                tokens = torch.where(p.mask[..., None], self.mask_token, tokens)
        trunk = trunk_of[mode]
        if self.config.position == "learned":
            tokens = tokens + self.embed_position[trunk]
        elif self.config.position == "sincos":
            tokens = tokens + self.positions
        c = self.embed_mode[mode].expand(len(tokens), -1)
        if isinstance(p, Denoise):
            self.accept_times(p)
            t, label = p.t, self.embed_label(p.condition)
            if t.ndim == 2:  # of tokens
                c, label = c[:, None], label[:, None]
            c = c + self.embed_time(t) + label
            if self.config.second_time:
                r = t if p.r is None else p.r[:, None] if t.ndim == 2 else p.r
                c = c + self.embed_gap(r - t)
        elif trunk == trunk_of["denoise"] and self.config.mode_conditioning == "time":
            t = torch.ones(len(tokens), device=tokens.device)  # the clean end, without a condition
            null = self.image.conditioning.null(len(t), t.device)
            c = c + self.embed_time(t) + self.embed_label(null)
        if isinstance(p, Decode) and p.t is not None:
            c = c + self.embed_pixel_time(p.t)
        return mode, tokens, c

    def outputs(self, *passes: Pass) -> list[Output]:
        """Run passes; those that share a trunk go through it as one batch.

        Fused and single passes give the same values to rounding. Of a decoder's steps the last
        is fused, and has the features.
        """
        passes = tuple(self._at_last_step(p) if isinstance(p, Decode) else p for p in passes)
        return self._fused(passes)

    def _at_last_step(self, p: Decode) -> Decode:
        """The pass that gives the image: of a decoder that denoises, the last of its steps."""
        self.accept_image(p)
        if not self.denoises_pixels or p.x_t is not None:
            return p

        def clean(x_t: Tensor, t: Tensor) -> Tensor:
            return self._fused((Decode(z=p.z, x_t=x_t, t=t),))[0].value

        noise = self.decode_noise.expand(len(p.z), -1, -1, -1)
        x_t, t = last_step(clean, noise, self.config.decode_steps)
        return Decode(z=p.z, x_t=x_t, t=t, taps=p.taps)

    def _fused(self, passes: Sequence[Pass]) -> list[Output]:
        """Run passes, of which those that decode have all that they need."""
        modes, tokens, conditions = zip(*(self._conditioning(p) for p in passes), strict=True)
        if any(c.ndim == 3 for c in conditions):
            n = self.latent.tokens
            conditions = tuple(of_tokens(c).expand(-1, n, -1) for c in conditions)
        turn = self.rotary() if self.config.position == "rope" else None
        results: list[Output | None] = [None] * len(passes)
        trunk_of = _TRUNK_OF[self.config.trunks]
        for name, trunk in self.trunks.items():
            mine = [i for i, mode in enumerate(modes) if trunk_of[mode] == name]
            if not mine:
                continue
            taps = [passes[i].taps for i in mine]
            x, features = trunk(
                torch.cat([tokens[i] for i in mine]),
                torch.cat([conditions[i] for i in mine]),
                frozenset().union(*taps),
                turn,
            )
            parts = parted(x, features, [len(tokens[i]) for i in mine], taps)
            for i, (h, own) in zip(mine, parts, strict=True):
                results[i] = self._head(passes[i], h, own, conditions[i])
        return [r for r in results if r is not None]

    def _head(self, p: Pass, h: Tensor, features: Mapping[int, Tensor], c: Tensor) -> Output:
        """Read one pass's result from its tokens h (B, N, W)."""
        if isinstance(p, Encode):
            raw = self.head_latent(h).float()
            return Output(self.latent_norm(raw), features, raw)
        if isinstance(p, Denoise):
            out = self.head_denoise(h).float()
            if self.config.denoise_skip:
                out = out + of_tokens(self.embed_skip(functional.silu(c)).float()) * p.z_t
            return Output(self.latent_norm(out) if self.config.norm_prediction else out, features)
        places = unpatchify(self.head_pixels(h), self.side, self.grid)
        if self.config.refine_stride > 1:
            places = places.contiguous(memory_format=torch.channels_last)
        return Output(self.refine(places).float(), features)
