"""The network: three modes, passes as values, and the latent contract.

Shapes: B batch, C H W image, N latent tokens, D latent channels, W trunk width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import attrs
import torch
from torch import Tensor, nn

from e2ediff.condition import Condition
from e2ediff.data import ImageSpec
from e2ediff.latent import LatentContract, LatentNorm, NormKind, statistics_hash


@attrs.frozen
class LatentSpec:
    """The latents' shape: N tokens of D channels, and how they are normalised.

    `grid` is (rows, columns) where tokens lie on the image plane, token i being at row
    i // columns; `None` for tokens without a place (registers).
    `learned` is False where the latent is a fixed function of the image, such as its pixels:
    nothing of it can be trained, or collapse.
    """

    tokens: int
    dim: int
    norm: NormKind
    grid: tuple[int, int] | None = None
    learned: bool = True


@attrs.frozen(kw_only=True, eq=False)
class Encode:
    """Image to latent.

    Args:
        x: Images, (B, C, H, W), in [-1, 1].
        mask: (B, N), bool; True hides that patch behind the learned mask token.
        z_t: (B, N, D), what latents begin from, for a backbone that `encodes_from_noise`; without
            it they begin from a fixed one, so that a latent is a function of the image.
        t: (B,), the time of z_t, given with it.
        taps: Blocks (1 is the first) whose output tokens are wanted as features.
    """

    x: Tensor
    mask: Tensor | None = None
    z_t: Tensor | None = None
    t: Tensor | None = None
    taps: tuple[int, ...] = ()


@attrs.frozen(kw_only=True, eq=False)
class Decode:
    """Latent (B, N, D) to image.

    Args:
        z: (B, N, D).
        x_t: (B, C, H, W), the noised image t x + (1 - t) noise, for a backbone that
            `denoises_pixels`, whose answer is then its clean estimate of the image; without it
            such a backbone takes its own steps from noise to the image.
        t: (B,), the time of x_t, in [0, 1], given with it; 1 is the image.
        taps: Blocks (1 is the first) whose output tokens are wanted as features.
    """

    z: Tensor
    x_t: Tensor | None = None
    t: Tensor | None = None
    taps: tuple[int, ...] = ()


@attrs.frozen(kw_only=True, eq=False)
class Denoise:
    """Noised latent to a prediction.

    Args:
        z_t: (B, N, D).
        t: Time, (B,), in [0, 1]; 1 is data. For a backbone of `token_times` it may be (B, N).
        condition: One a row; null rows for unconditional.
        r: A second time, (B,), not before t, for a backbone of `second_time`, as of an average
            velocity between t and r; by default t itself.
        encoder_learns: (B,), bool: rows whose loss may train the weights that `encode` uses, for
            a backbone that `decodes_while_denoising`; by default all. Of the other rows gradients
            pass through these weights to what lies before them.
        taps: Blocks (1 is the first) whose output tokens are wanted as features.
    """

    z_t: Tensor
    t: Tensor
    condition: Condition
    r: Tensor | None = None
    encoder_learns: Tensor | None = None
    taps: tuple[int, ...] = ()


Pass = Encode | Decode | Denoise


@attrs.frozen(eq=False)
class Output:
    """What one pass returns.

    `value` is (B, N, D) for encode and denoise, (B, C, H, W) for decode, always float32.
    `features` maps each tap to (B, N, W).
    `raw` is the latent before its normalisation, for encode passes.
    `image` is the image (B, C, H, W), float32, that a denoise pass goes through, for a backbone
    that `decodes_while_denoising`.
    """

    value: Tensor
    features: Mapping[int, Tensor] = attrs.field(factory=dict)
    raw: Tensor | None = None
    image: Tensor | None = None


class Backbone(nn.Module, ABC):
    """A network that encodes, decodes and denoises.

    A subclass sets `image`, `latent` and `latent_norm` in its constructor, embeds conditions of
    any kind by `image.conditioning.embedding`, and implements the three modes; `outputs` is
    overridden to fuse passes or to offer features.
    `depth` and `width` say what can be tapped in encode and denoise passes: blocks 1 to depth,
    tokens (B, N, width); decode passes may offer fewer features, or none.
    `denoiser_apart` is True where `denoise` shares no weight with `encode` and `decode`, so that
    training one leaves the other as it is.
    `decoder_apart` is True where `decode` shares no weight with `encode` and `denoise`.
    `masks` is True where encode passes can hide patches.
    `encodes_from_noise` is True where the encoder is the denoiser, given the image: encode passes
    then take `z_t` and `t`.
    `token_times` is True where denoise passes take a time for each token, and `second_time` where
    they take a second time; `accept_times` refuses the others.
    `denoises_pixels` is True where the decoder is a denoiser of images, given the latent: decode
    passes then take `x_t` and `t`, and `decode` is a fixed number of deterministic steps from a
    noise that is the same for every image and on every call. Gradients flow through all of them,
    for that many times the memory and work. `accept_image` refuses the others.
    `decodes_while_denoising` is True where a denoise pass makes an image, `Output.image`, and
    encodes it to its answer; it then takes `encoder_learns`.
    `kernels_before` is what `prepare` returned when the run was last started, set before `prepare`
    of a run that goes on, or of a trained network; `use_attention` takes the same kernels again.
    """

    image: ImageSpec
    latent: LatentSpec
    latent_norm: LatentNorm
    depth: int = 0
    width: int = 0
    denoiser_apart: bool = False
    decoder_apart: bool = False
    masks: bool = False
    encodes_from_noise: bool = False
    token_times: bool = False
    second_time: bool = False
    denoises_pixels: bool = False
    decodes_while_denoising: bool = False
    kernels_before: Mapping[str, str] = MappingProxyType({})

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Return the latent (B, N, D) of images (B, C, H, W), normalised."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Return images (B, C, H, W) of latents (B, N, D); not clipped."""

    @abstractmethod
    def denoise(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Predict (B, N, D) of the recipe's `predicts` kind, from z_t, t (B,), condition."""

    def outputs(self, *passes: Pass) -> list[Output]:
        """Run passes, in any order and number, and return one `Output` for each.

        This default runs them one by one and offers no features; override it to fuse passes
        that do not need each other into one batch.

        Raises:
            ValueError: A pass asks for a mask, a start, features, times, rows or a noised image
                that this backbone lacks.
        """
        results = []
        for p in passes:
            if p.taps or (isinstance(p, Encode) and (p.mask is not None or p.z_t is not None)):
                what = "neither features, nor masks, nor encoding from noise"
                raise ValueError(f"{type(self).__name__} offers {what}")
            if isinstance(p, Encode):
                results.append(Output(self.encode(p.x)))
            elif isinstance(p, Decode):
                self.accept_image(p)
                if p.x_t is not None:
                    what = "denoises pixels, and needs `outputs` of its own that does"
                    raise ValueError(f"{type(self).__name__} {what}")
                results.append(Output(self.decode(p.z)))
            else:
                self.accept_times(p)
                results.append(Output(self.denoise(p.z_t, p.t, p.condition)))
        return results

    def accept_times(self, p: Denoise) -> None:
        """Refuse times and rows that this backbone would ignore; every `outputs` calls it.

        Raises:
            ValueError: The pass has times of tokens, a second time, or `encoder_learns`.
        """
        if p.t.ndim > 1 and not self.token_times:
            raise ValueError(f"{type(self).__name__} takes one time for each latent, not (B, N)")
        if p.r is not None and not self.second_time:
            raise ValueError(f"{type(self).__name__} takes one time, and no second one r")
        if p.encoder_learns is not None and not self.decodes_while_denoising:
            raise ValueError(
                f"{type(self).__name__} does not encode in denoise passes, so it "
                "cannot take encoder_learns"
            )

    def accept_image(self, p: Decode) -> None:
        """Refuse a noised image that this backbone would ignore; every `outputs` calls it.

        Raises:
            ValueError: The pass has a noised image, and the decoder denoises none; or it has one
                of `x_t` and `t` without the other.
        """
        if (p.x_t is None) != (p.t is None):
            raise ValueError("a decode pass takes x_t and t together, or neither")
        if p.x_t is not None and not self.denoises_pixels:
            raise ValueError(f"the decoder of {type(self).__name__} denoises no image x_t")

    def run(self, *passes: Pass) -> list[Tensor]:
        """Return the values of `outputs`, for objectives that need no features."""
        return [o.value for o in self.outputs(*passes)]

    def contract(self, scale: float = 1.0) -> LatentContract:
        """Return what this network's latents mean, with the statistics of its weights as they are.

        Args:
            scale: Standard deviation of the latents, where no norm fixes it.
        """
        spec, norm = self.latent, self.latent_norm
        return LatentContract(
            tokens=spec.tokens,
            dim=spec.dim,
            norm=spec.norm,
            grid=spec.grid,
            statistics=statistics_hash(norm),
            scale=scale if spec.norm == "none" else 1.0,
        )

    def blocks(self) -> Sequence[nn.Module]:
        """Return the repeated parts of the network, where nearly all of its weights and work lie.

        They are what is compiled, recomputed in the backward pass, and split over processes one
        by one; each is called as a module and returns a tensor.

        With `parallel: fsdp2` in bfloat16, the weights of their `nn.Linear` and convolutions
        arrive in bfloat16, as autocast would cast them. A block that computes with such a weight
        in float32 gives the layer a class of its own, derived from theirs.
        """
        return ()

    def prepare(self, device: torch.device, dtype: torch.dtype) -> Mapping[str, str]:
        """Choose kernels for this device and compute type; called after each move.

        Training steps, previews and scores compute in `dtype`; diagnosis and calibration run the
        same network in float32, without autocast. `e2ediff.nn.attention.use_attention` chooses
        for both.

        Returns:
            What was chosen and why, by topic, to be recorded in the run.

        Raises:
            KernelError: A kernel that the recipe asks for by name does not run here. A run then
                ends before its first step; a trained network is used as it was built.
        """
        return {}


class FusedBackbone(Backbone):
    """A backbone whose one method is `outputs`: each mode is a run of one pass."""

    @abstractmethod
    def outputs(self, *passes: Pass) -> list[Output]:
        """Run passes, in any order and number, and return one `Output` for each."""

    def encode(self, x: Tensor) -> Tensor:
        """Return the latent (B, N, D) of images (B, C, H, W), normalised."""
        return self.run(Encode(x=x))[0]

    def decode(self, z: Tensor) -> Tensor:
        """Return images (B, C, H, W) of latents (B, N, D); not clipped."""
        return self.run(Decode(z=z))[0]

    def denoise(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return the prediction (B, N, D) from z_t (B, N, D), t (B,) and a condition a row."""
        return self.run(Denoise(z_t=z_t, t=t, condition=condition))[0]


class BackboneConfig(ABC):
    """The recipe's `backbone:` block: a frozen value that builds the network."""

    @abstractmethod
    def build(self, image: ImageSpec) -> Backbone:
        """Build a freshly initialised network for these images.

        Randomness: torch's global generator, which the engine seeds from the recipe.
        """

    def problems(self, image: ImageSpec) -> Sequence[tuple[str, str]]:
        """List what does not fit the images, as (field, complaint), before anything is built."""
        return ()


def patch_problems(image: ImageSpec, patch: int) -> list[tuple[str, str]]:
    """List what a backbone's `problems` says of a `patch` that does not tile the images."""
    if image.height % patch == 0 and image.width % patch == 0:
        return []
    high, wide = (max(patch, side // patch * patch) for side in (image.height, image.width))
    size = high if high == wide else f"'[{high}, {wide}]'"
    common = math.gcd(image.height, image.width)
    fitting = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
    what = (
        f"{patch} does not divide the image, {image.height} x {image.width} (height x width); "
        f"expected a divisor of both: {fitting}. Or give --set data.size={size}"
    )
    return [("patch", what)]
