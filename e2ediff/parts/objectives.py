"""The controls: the plainest ways to train encoder, decoder and denoiser together.

Shapes: B batch, C H W image, N latent tokens, D latent channels.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar

import attrs
import torch
from attrs import validators

from e2ediff.backbone import Decode
from e2ediff.data import Batch
from e2ediff.losses import (
    AutoencoderObjective,
    DecodeNoise,
    Space,
    mean_clean_loss,
    noise_levels,
    unfit_prediction,
)
from e2ediff.objective import Draw, Nets, Terms, sg


@attrs.frozen(kw_only=True)
class Coupled(AutoencoderObjective):
    """Naive joint training: the velocity loss reaches the encoder through input and target.

    Expected to collapse: its best value is (pi / 2) tr Sigma^(1/2) of the latents, which falls
    when the encoder shrinks their variance or, at fixed variance, their rank.
    Kept as the control that shows why the others exist.

    `reconstruction` compares decoded images with the originals.
    `denoising_weight` multiplies the velocity loss, `clamp` bounds its weight near the data.

    Source: the failing baseline of DSD (arXiv 2511.14716), "latent collapse".
    """

    static_graph: ClassVar[bool] = True

    denoising_weight: float = attrs.field(default=1.0, validator=validators.ge(0))
    clamp: float = attrs.field(default=400.0, validator=validators.gt(0))

    def terms(self, nets: Nets, batch: Batch, draw: Draw, phase: str) -> Terms:
        """Reconstruction and velocity loss; no gradient is stopped."""
        z = nets.online.encode(batch.x)  # (B, N, D)
        levels = noise_levels(z, draw, nets.path, 1)
        x_hat, *outs = nets.online.run(Decode(z=z), *(n.denoise() for n in levels))
        # v_hat - v = (x0_hat - z) sqrt(w_t): with no gradient stopped, the weighted clean loss
        # and the velocity loss have the same gradients as well as the same value.
        losses = {
            "reconstruction": self.reconstruction(x_hat, batch.x, nets.frozen),
            "denoising": mean_clean_loss(outs, levels, z, nets, "v", self.clamp),
        }
        weights = {"reconstruction": 1.0, "denoising": self.denoising_weight}
        return Terms(losses, weights, z, decoded=x_hat)

    def stops(self, phase: str) -> Collection[str]:
        """None: the velocity loss reaches the encoder, which is the point."""
        return ()

    def problems(self, nets: Nets) -> Sequence[tuple[str, str]]:
        """A prediction whose velocity error has no bound."""
        return unfit_prediction(nets, "v", "")


@attrs.frozen(kw_only=True)
class Detached(AutoencoderObjective):
    """The denoiser learns the latents, and the latents learn nothing from the denoiser.

    Both the denoiser's input and its target are stopped; only shared weights couple the two.

    `reconstruction` compares decoded images with the originals, after `decode_noise` on the
    latents.
    `denoising_weight` multiplies the denoising loss.
    `draws` is the number of noise levels trained on for each reconstruction.
    `weight` is the space whose weight multiplies the clean error (`x0`: unweighted), and `clamp`
    its largest value.

    Source: the stop-gradients of UNITE (arXiv 2603.22283), section 3.
    """

    static_graph: ClassVar[bool] = True

    denoising_weight: float = attrs.field(default=1.0, validator=validators.ge(0))
    weight: Space = "x0"
    clamp: float = attrs.field(default=400.0, validator=validators.gt(0))
    draws: int = attrs.field(default=1, validator=validators.ge(1))
    decode_noise: DecodeNoise = attrs.field(factory=DecodeNoise)

    def terms(self, nets: Nets, batch: Batch, draw: Draw, phase: str) -> Terms:
        """Reconstruction, and the clean error of a stopped latent averaged over the draws."""
        z = nets.online.encode(batch.x)  # (B, N, D)
        levels = noise_levels(sg(z), draw, nets.path, self.draws)
        x_hat, *outs = nets.online.run(
            Decode(z=self.decode_noise(z, draw, nets.path)), *(n.denoise() for n in levels)
        )
        losses = {
            "reconstruction": self.reconstruction(x_hat, batch.x, nets.frozen),
            "denoising": mean_clean_loss(outs, levels, sg(z), nets, self.weight, self.clamp),
        }
        weights = {"reconstruction": 1.0, "denoising": self.denoising_weight}
        return Terms(losses, weights, z, decoded=x_hat)

    def stops(self, phase: str) -> Collection[str]:
        """The denoiser learns from stopped latents."""
        return ("denoising",)

    def problems(self, nets: Nets) -> Sequence[tuple[str, str]]:
        """Latents that outgrow the noise before decoding, and an unbounded weight."""
        return [*self.decode_noise.problems(nets), *unfit_prediction(nets, self.weight)]


@attrs.frozen(kw_only=True)
class TwoStage(AutoencoderObjective):
    """First the autoencoder, then, with the autoencoder as it is, the denoiser.

    `autoencoder_fraction` of the training images go to the first stage.
    `reconstruction`, `decode_noise`, `weight`, `clamp` and `draws` are those of `detached`.
    Needs a backbone whose denoiser has weights of its own, or the second stage would undo the
    first; such a network has more parameters than one trunk for all modes.

    Source: latent diffusion (Rombach et al. 2021, arXiv 2112.10752), section 3.
    """

    phases: ClassVar[tuple[str, ...]] = ("autoencoder", "denoiser")
    trial: ClassVar[tuple[str, ...]] = ("backbone.trunks=denoiser_apart",)

    autoencoder_fraction: float = attrs.field(
        default=0.5, validator=[validators.gt(0), validators.lt(1)]
    )
    weight: Space = "x0"
    clamp: float = attrs.field(default=400.0, validator=validators.gt(0))
    draws: int = attrs.field(default=1, validator=validators.ge(1))
    decode_noise: DecodeNoise = attrs.field(factory=DecodeNoise)

    def terms(self, nets: Nets, batch: Batch, draw: Draw, phase: str) -> Terms:
        """Reconstruction in the first stage, the clean error of fixed latents in the second."""
        if phase == "autoencoder":
            z = nets.online.encode(batch.x)  # (B, N, D)
            x_hat = nets.online.decode(self.decode_noise(z, draw, nets.path))
            losses = {"reconstruction": self.reconstruction(x_hat, batch.x, nets.frozen)}
            return Terms(losses, {"reconstruction": 1.0}, z, decoded=x_hat)
        with torch.no_grad():  # no graph of an encoder that this stage leaves alone
            z = nets.online.encode(batch.x)
        levels = noise_levels(z, draw, nets.path, self.draws)
        outs = nets.online.run(*(n.denoise() for n in levels))
        losses = {"denoising": mean_clean_loss(outs, levels, z, nets, self.weight, self.clamp)}
        return Terms(losses, {"denoising": 1.0}, z)

    def span(self, phase: str) -> tuple[float, float]:
        """The autoencoder's fraction first, the denoiser's the rest."""
        cut = self.autoencoder_fraction
        return (0.0, cut) if phase == "autoencoder" else (cut, 1.0)

    def stops(self, phase: str) -> Collection[str]:
        """The second stage leaves the first as it is."""
        return ("denoising",) if phase == "denoiser" else ()

    def problems(self, nets: Nets) -> Sequence[tuple[str, str]]:
        """A denoiser that shares the autoencoder's weights, and what `detached` refuses."""
        found = [*self.decode_noise.problems(nets), *unfit_prediction(nets, self.weight)]
        if not nets.online.latent.learned:
            what = "two_stage has no first stage with latents that are not learned; try `detached`"
            found.insert(0, ("objective", what))
        if not nets.online.denoiser_apart:
            what = (
                "two_stage needs a denoiser with weights of its own: add "
                "`--set backbone.trunks=denoiser_apart`, or choose a backbone that has one"
            )
            found.insert(0, ("objective", what))
        return found
