"""The VAE: latents with a Gaussian posterior, held near the unit normal by a KL term.

Shapes: B batch, C H W image, N latent tokens, D latent channels, W trunk width.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar

import attrs
import torch
from attrs import validators
from torch import Tensor, nn

from e2ediff.backbone import Backbone, Decode, Encode
from e2ediff.data import Batch
from e2ediff.losses import (
    AutoencoderObjective,
    Space,
    mean_clean_loss,
    noise_levels,
    unfit_prediction,
)
from e2ediff.objective import Draw, Nets, Terms, sg

_START = -4.0  # log-variance of a fresh head: a std of 0.14 on latents of unit scale


@attrs.frozen(kw_only=True)
class KL(AutoencoderObjective):
    """A variational autoencoder, with a denoiser that does not train its latents.

        q(z | x) = N(z, s^2),   KL = 1/2 (z^2 + s^2 - 1 - log s^2), averaged over elements

    The mean is the encoder's normalised latent; the decoder and, stopped, the denoiser get a
    sample.
    `std` is s for all elements; without it a linear head on the encoder's last block predicts
    log s^2 for each.
    `kl_weight` multiplies the KL.
    `reconstruction` compares decoded images with the originals.
    `denoising_weight`, `weight`, `clamp` and `draws` are those of `detached`.

    Source: Kingma & Welling 2014 (arXiv 1312.6114), appendix B for the KL; Rombach et al. 2021
    (LDM, arXiv 2112.10752), appendix G, for a weight about 1e-6. Ours: the mean over elements,
    with which pixels are averaged too (LDM sums both), the normalised mean, which leaves the KL
    little but s to act on unless `latent_norm` is none, and joint training.
    """

    static_graph: ClassVar[bool] = True

    std: float | None = attrs.field(
        default=None, validator=validators.optional(validators.gt(0.0))
    )
    kl_weight: float = attrs.field(default=1e-6, validator=validators.ge(0))
    denoising_weight: float = attrs.field(default=1.0, validator=validators.ge(0))
    weight: Space = "x0"
    clamp: float = attrs.field(default=400.0, validator=validators.gt(0))
    draws: int = attrs.field(default=1, validator=validators.ge(1))

    def terms(self, nets: Nets, batch: Batch, draw: Draw, phase: str) -> Terms:
        """Reconstruction of a sample, its KL, and the clean error of the stopped sample."""
        last = nets.online.depth
        taps = (last,) if self.std is None else ()
        (encoded,) = nets.online.outputs(Encode(x=batch.x, taps=taps))
        mean = encoded.value  # (B, N, D)
        if self.std is None:
            log_variance = nets.heads["log_variance"](encoded.features[last]).float()
            log_variance = log_variance.clamp(-30.0, 20.0)
        else:
            log_variance = torch.full_like(mean, self.std).log() * 2
        z = mean + torch.exp(log_variance / 2) * draw.noise(mean)
        levels = noise_levels(sg(z), draw, nets.path, self.draws)
        x_hat, *outs = nets.online.run(Decode(z=z), *(n.denoise() for n in levels))
        losses = {
            "reconstruction": self.reconstruction(x_hat, batch.x, nets.frozen),
            "denoising": mean_clean_loss(outs, levels, sg(z), nets, self.weight, self.clamp),
            "kl": unit_normal_kl(mean, log_variance),
        }
        weights = {"denoising": self.denoising_weight, "kl": self.kl_weight}
        return Terms(losses, {"reconstruction": 1.0, **weights}, mean)

    def heads(self, backbone: Backbone) -> nn.ModuleDict:
        """The head of the log-variance, unless the std is fixed; it starts constant."""
        if self.std is not None:
            return nn.ModuleDict()
        head = nn.Linear(backbone.width, backbone.latent.dim)
        nn.init.zeros_(head.weight)
        nn.init.constant_(head.bias, _START)
        return nn.ModuleDict({"log_variance": head})

    def stops(self, phase: str) -> Collection[str]:
        """The denoiser learns from stopped latents."""
        return ("denoising",)

    def problems(self, nets: Nets) -> Sequence[tuple[str, str]]:
        """A variance to learn from a backbone without features, and an unbounded weight."""
        found = unfit_prediction(nets, self.weight)
        if self.std is None and nets.online.depth == 0:
            what = "is learned from features, which this backbone does not offer; give a number"
            found.append(("objective.std", what))
        return found


def unit_normal_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL of N(mean, exp(log_variance)) from N(0, 1) in nats, averaged over elements."""
    return (mean.square() + log_variance.exp() - 1 - log_variance).mean() / 2
