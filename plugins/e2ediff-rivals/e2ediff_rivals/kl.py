"""The VAE: latents with a Gaussian posterior, held near the unit normal by a KL term.

Shapes: B batch, C H W image, N latent tokens, D latent channels, W trunk width.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar

import attrs
from attrs import validators
from torch import Tensor, nn

from e2ediff.backbone import Backbone, Decode
from e2ediff.data import Batch
from e2ediff.losses import (
    AutoencoderObjective,
    Space,
    mean_clean_loss,
    noise_levels,
    unfit_prediction,
)
from e2ediff.objective import Draw, Nets, Terms, sg
from e2ediff_rivals.posterior import encoded_posterior, variance_head, variance_problems


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
        """Return the reconstruction of a sample, its KL, and the stopped sample's clean error."""
        posterior = encoded_posterior(nets, batch.x, self.std)
        z = posterior.sample(draw)
        levels = noise_levels(sg(z), draw, nets.path, self.draws)
        x_hat, *outs = nets.online.run(Decode(z=z), *(n.denoise() for n in levels))
        losses = {
            "reconstruction": self.reconstruction(x_hat, batch.x, nets.frozen),
            "denoising": mean_clean_loss(outs, levels, sg(z), nets, self.weight, self.clamp),
            "kl": unit_normal_kl(posterior.mean, posterior.log_variance),
        }
        weights = {"denoising": self.denoising_weight, "kl": self.kl_weight}
        return Terms(losses, {"reconstruction": 1.0, **weights}, posterior.mean, decoded=x_hat)

    def heads(self, backbone: Backbone) -> nn.ModuleDict:
        """Return the head of the log-variance, unless the std is fixed; it starts constant."""
        return variance_head(backbone, self.std)

    def stops(self, phase: str) -> Collection[str]:
        """Return the denoiser's loss, which learns from stopped latents."""
        return ("denoising",)

    def problems(self, nets: Nets) -> Sequence[tuple[str, str]]:
        """Find a variance to learn from a backbone without features, and an unbounded weight."""
        return [
            *unfit_prediction(nets, self.weight),
            *variance_problems(nets.online, self.std),
        ]


def unit_normal_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return the KL of N(mean, exp(log_variance)) from N(0, 1) in nats, a mean over elements."""
    return (mean.square() + log_variance.exp() - 1 - log_variance).mean() / 2
