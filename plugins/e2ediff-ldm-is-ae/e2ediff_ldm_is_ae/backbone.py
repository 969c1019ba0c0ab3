"""The LDM-is-AE network: a denoiser of latents that goes through an image.

Shapes: B batch, C H W image, N tokens, one for each patch, D latent channels, P = C patch^2 pixels
of a patch, W width, K context.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import attrs
import torch
from attrs import validators
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from e2ediff.backbone import Decode, Denoise, Encode, FusedBackbone, LatentSpec, Output, Pass
from e2ediff.condition import Condition
from e2ediff.data import ImageSpec
from e2ediff.errors import ResourceError
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
    uncast,
    unpatchify,
)

LatentScale = Literal["rms", "none"]


@attrs.frozen(kw_only=True)
class LDMIsAEConfig(PatchConfig):
    """A denoiser in two parts, DiT-D and DiT-E, that make an image of a latent and a latent of it.

    DiT-D maps z_t to two things of the image's shape, F and F'; F is the image. DiT-E maps their
    mixture gamma(t) F + (1 - gamma(t)) F' to the clean latent, with gamma(t) = t^`gamma`; 0 leaves
    F' out. Both know time and class. At t = 1 the two are an autoencoder: `encode` is DiT-E of an
    image's patches, `decode` is DiT-D's F.

    `depth` counts the blocks of both parts, of which the last `encoder_depth` are DiT-E's; `width`
    and `heads` shape both; `patch` is the side of a patch in pixels; the latent has `latent_dim`
    channels for each patch.
    `bottleneck` is the width between the two linear layers that embed a token of either part.
    `context` tokens of the condition join after DiT-D's first `context_start` blocks, and in DiT-E
    from its first block on; 0 leaves them out.
    `mlp_ratio`, `swiglu_width` and `attention` are those of `jit`.
    `latent_scale` says what is done about the size of DiT-E's answer: `rms` divides it by its root
    mean square over all tokens and channels, one number an image; `none` leaves it free.
    `skip` adds to that answer the image itself, the pixels of each patch interpolated to
    `latent_dim` numbers, which has no weights.
    `eight_bit` clips F to [-1, 1] and rounds it to 256 levels before DiT-E, with the gradient of
    the clipping alone.

    Source: LDM-is-AE (arXiv 2609.37080). The paper's: 30 + 2 blocks of JiT-H, 128 channels,
    gamma 3. The released code's: embeddings and context of each part's own, `skip`. Its script's,
    not its arguments' defaults: `latent_scale: rms`, and `eight_bit`, which is off here and there
    by default. Ours: `encode` and `decode` see no class, where the code gives them the image's; no
    dropout, where the script has 0.2 behind attention and perceptrons of DiT-D's middle blocks.
    """

    trial: ClassVar[tuple[str, ...]] = (
        "objective=ldm_is_ae",
        "backbone.width=16",
        "backbone.depth=3",
        "backbone.encoder_depth=1",
        "backbone.heads=2",
        "backbone.patch=8",
        "backbone.latent_dim=6",
        "backbone.bottleneck=8",
        "backbone.context=2",
        "backbone.context_start=1",
    )

    latent_dim: int = attrs.field(default=128, validator=validators.gt(0))
    encoder_depth: int = attrs.field(default=2, validator=validators.gt(0))
    gamma: float = attrs.field(default=3.0, validator=validators.ge(0))
    latent_scale: LatentScale = "rms"
    skip: bool = True
    eight_bit: bool = False
    bottleneck: int = attrs.field(default=128, validator=validators.gt(0))
    context: int = attrs.field(default=32, validator=validators.ge(0))
    context_start: int = attrs.field(default=4, validator=validators.ge(0))
    mlp_ratio: float = attrs.field(default=4.0, validator=validators.gt(0))
    swiglu_width: SwiGLUWidth = "truncated"

    @property
    def decoder_depth(self) -> int:
        """Return the number of DiT-D's blocks."""
        return self.depth - self.encoder_depth

    def problems(self, image: ImageSpec) -> list[tuple[str, str]]:
        """Find sizes that do not divide one another, a part without blocks, late context."""
        found = super().problems(image)
        if self.width % self.heads or (self.width // self.heads) % 4:
            what = f"{self.heads} do not cut the width, {self.width}, into multiples of 4"
            found.append(("heads", what))
        if self.decoder_depth < 1:
            what = (
                f"{self.encoder_depth} of {self.depth} blocks leave none to DiT-D; expected at "
                f"most {self.depth - 1}, or a larger depth"
            )
            return [*found, ("encoder_depth", what)]
        return found + context_problems(self.context, self.context_start, self.decoder_depth)

    def build(self, image: ImageSpec) -> LDMIsAENet:
        """Return a freshly initialised network."""
        return LDMIsAENet(self, image)


class Part(nn.Module):
    """DiT-D or DiT-E: a transformer of tokens at fixed places, under a time and a condition.

    Args:
        config: The sizes that both parts share.
        image: The images.
        inputs: Channels of a token that comes in.
        outputs: Channels of a token that goes out.
        depth: Number of blocks.
        context_start: The blocks before the context joins.
        starts_at_zero: Whether a fresh network's answer is zero.

    Source: JiT (Li & He 2025, arXiv 2511.13720), of which LDM-is-AE's released code has two.
    """

    positions: Tensor

    def __init__(
        self,
        config: LDMIsAEConfig,
        image: ImageSpec,
        inputs: int,
        outputs: int,
        depth: int,
        context_start: int,
        *,
        starts_at_zero: bool,
    ) -> None:
        super().__init__()
        c, grid = config, config.grid(image)
        self.context_start = context_start
        self.embed_tokens = nn.Sequential(
            nn.Linear(inputs, c.bottleneck, bias=False), nn.Linear(c.bottleneck, c.width)
        )
        self.embed_time = TimeEmbedding(c.width, 10000.0 ** (-torch.arange(128) / 128))
        self.embed_label = image.conditioning.embedding(c.width)
        self.embed_context = nn.Parameter(torch.empty(c.context, c.width))
        self.register_buffer("positions", sincos_positions(grid, c.width), persistent=False)
        self.rotary = Rotary(grid, c.width // c.heads, base=10000.0)
        mlps = [MLP(c.width, c.mlp_ratio, "swiglu", c.swiglu_width) for _ in range(depth)]
        blocks = [Block(c.width, c.heads, mlp, "block", norm="rms") for mlp in mlps]
        self.trunk = Trunk(blocks, c.width, shared=False, norm="rms")
        self.head = nn.Linear(c.width, outputs)
        times = [m.weight for m in self.embed_time.layers if isinstance(m, nn.Linear)]
        small = (*self.embed_label.parameters(recurse=False), self.embed_context, *times)
        initialise(self, small, [self.head] if starts_at_zero else [])

    def forward(self, tokens: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Map (B, N, inputs) at t (B,) to (B, N, outputs), float32."""
        named = self.embed_label(condition)  # (B, W)
        context = Context.of(named, self.embed_context, self.context_start)
        h = self.embed_tokens(tokens) + self.positions
        h, _ = self.trunk(h, self.embed_time(t) + named, frozenset(), self.rotary(), context)
        out: Tensor = self.head(h).float()
        return out


class LDMIsAENet(PatchBackbone, FusedBackbone):
    """The network of `LDMIsAEConfig`; runs passes one by one."""

    config: LDMIsAEConfig
    narrow: Tensor

    def __init__(self, config: LDMIsAEConfig, image: ImageSpec) -> None:
        c, grid, pixels = config, config.grid(image), image.channels * config.patch**2
        latent = LatentSpec(grid[0] * grid[1], c.latent_dim, norm="none", grid=grid)
        super().__init__(config, image, latent, c.context)
        self.decodes_while_denoising = True
        self.dit_d = Part(
            c, image, c.latent_dim, 2 * pixels, c.decoder_depth, c.context_start,
            starts_at_zero=True,
        )  # fmt: skip
        self.dit_e = Part(c, image, pixels, c.latent_dim, c.encoder_depth, 0, starts_at_zero=False)
        # A matrix, since the gradient of torch's interpolation does not repeat bits on a GPU.
        narrow = functional.interpolate(torch.eye(pixels)[None], c.latent_dim, mode="linear")[0]
        self.register_buffer("narrow", narrow, persistent=False)  # (P, D)

    def outputs(self, *passes: Pass) -> list[Output]:
        """Run passes; those that denoise have their image too.

        Raises:
            ValueError: A pass asks for features, for a mask, for encoding from noise, for times
                of tokens or steps, or has a noised image.
        """
        return [self._one(p) for p in passes]

    def _one(self, p: Pass) -> Output:
        if p.taps or (isinstance(p, Encode) and (p.mask is not None or p.z_t is not None)):
            raise ValueError(
                "LDMIsAENet offers neither features, nor masks, nor encoding from noise"
            )
        if isinstance(p, Denoise):
            self.accept_times(p)
            return self._denoise(p)
        if isinstance(p, Decode):
            self.accept_image(p)
        given = p.x if isinstance(p, Encode) else p.z
        t = given.new_ones(len(given), dtype=torch.float32)
        condition = self.image.conditioning.null(len(t), t.device)
        if isinstance(p, Encode):
            patches = patchify(p.x.float(), self.config.patch)
            z = self._latent(patches, patches, t, condition)
            return Output(z, raw=z)
        return Output(self._image(self._halves(p.z, t, condition)[1]))

    def _denoise(self, p: Denoise) -> Output:
        """Return the clean latent, and the image on the way to it."""
        extra, patches = self._halves(p.z_t, p.t, p.condition)
        seen = eight_bit(patches) if self.config.eight_bit else patches
        mixed = self._mixed(seen, extra, p.t)
        z = self._latent(mixed, seen, p.t, p.condition)
        if p.encoder_learns is not None and torch.is_grad_enabled():
            still = self._latent(mixed, seen, p.t, p.condition, still=True)
            z = torch.where(p.encoder_learns[:, None, None], z, still)
        return Output(z, image=self._image(patches))

    def _halves(self, z: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """Return F' and F, each (B, N, P), by DiT-D of latents (B, N, D)."""
        extra, patches = self.dit_d(z, t, condition).chunk(2, dim=-1)
        return extra, patches

    def _mixed(self, patches: Tensor, extra: Tensor, t: Tensor) -> Tensor:
        """Return gamma(t) F + (1 - gamma(t)) F'."""
        share = t.float().pow(self.config.gamma)[:, None, None]
        return share * patches + (1 - share) * extra

    def _latent(
        self,
        mixed: Tensor,
        patches: Tensor,
        t: Tensor,
        condition: Condition,
        *,
        still: bool = False,
    ) -> Tensor:
        """Return the latent (B, N, D) by DiT-E of a mixture whose image part is `patches`.

        `still` keeps gradients from its weights, and lets them through to what is given.
        """
        if still:
            _refuse_sharded(self.dit_e)
            weights = {name: w.detach() for name, w in self.dit_e.named_parameters()}
            z: Tensor = functional_call(self.dit_e, weights, (mixed, t, condition))
        else:
            z = self.dit_e(mixed, t, condition)
        if self.config.latent_scale == "rms":
            z = z * torch.rsqrt(z.square().mean((1, 2), keepdim=True) + 1e-6)
        if self.config.skip:
            with uncast(z.device):
                z = z + patches @ self.narrow
        return z

    def _image(self, patches: Tensor) -> Tensor:
        return unpatchify(patches, self.config.patch, self.grid)


def eight_bit(x: Tensor) -> Tensor:
    """Round numbers to the 256 levels of an image in [-1, 1], with the gradient of clipping."""
    clipped = x.clamp(-1, 1)
    rounded = ((clipped + 1) * 127.5).round() / 127.5 - 1
    return clipped + (rounded - clipped).detach()


def _refuse_sharded(module: nn.Module) -> None:
    """Raise where FSDP2 would put weights with gradients in the place of those without."""
    if any(kind.__name__ == "FSDPModule" for m in module.modules() for kind in type(m).__mro__):
        raise ResourceError(
            "the denoiser's last part learns from some rows alone, which sharded weights cannot: "
            "set parallel: ddp, or objective.encoder_from: 0"
        )
