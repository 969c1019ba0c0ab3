"""GenFirst: direct end-to-end gradients, kept from collapse by the posterior's entropy.

Shapes: B batch, C H W image, N latent tokens, D latent channels.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar

import attrs
import torch
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
from e2ediff.objective import Draw, Nets, Terms
from e2ediff_rivals.posterior import encoded_posterior, variance_head, variance_problems


@attrs.frozen(kw_only=True)
class GenFirst(AutoencoderObjective):
    """A variational autoencoder under a diffusion prior that trains it, generation first.

        z ~ q(z | x) = N(mean, s^2),    KL(q | p) = E_q[-log p(z)] - H(q)
        loss = reconstruction + f `prior_weight` L_prior(z) - f `entropy_weight` H(q)

    L_prior, the denoiser's loss, stands for -log p. No gradient is stopped: reconstruction and
    prior both shrink the posterior, and the entropy H(q) keeps it open. f is 1 in the first phase,
    in which the prior shapes the latents, and `later_factor` after it, when the decoder recovers
    detail.
    Without a latent norm the latents settle where L_prior is `entropy_weight / prior_weight` a
    channel, less what reconstruction pulls: for unit normal latents and uniform times it is pi/2.

    Options:
        prior_weight, entropy_weight: Weights in the first phase; both terms are averaged over
            elements, the entropy in nats.
        first_phase: The share of training that is the first phase.
        later_factor: What multiplies both weights after it.
        std: s for all elements; without it a linear head on the encoder's last block predicts
            log s^2 for each.
        weight, clamp, draws: Of the denoising loss, as those of `detached`.
        reconstruction: Compares decoded images with the originals.

    Source: GenFirst (Zheng et al. 2026, arXiv 2608.29335), abstract and model card: the entropy
    term, the direct gradients, and two phases of which the second divides both weights by ten.
    Ours, as the text and the code, which is public, could not be had: every other number, the
    velocity loss as L_prior, means over elements, the head of the variance. They train a new prior
    on the latents at the end; here the prior of the joint training is sampled.
    """

    static_graph: ClassVar[bool] = True

    trial: ClassVar[tuple[str, ...]] = ("backbone.latent_norm=none",)

    prior_weight: float = attrs.field(default=0.03, validator=validators.gt(0))
    entropy_weight: float = attrs.field(default=0.03, validator=validators.ge(0))
    first_phase: float = attrs.field(default=0.5, validator=[validators.ge(0), validators.le(1)])
    later_factor: float = attrs.field(default=0.1, validator=[validators.ge(0), validators.le(1)])
    std: float | None = attrs.field(
        default=None, validator=validators.optional(validators.gt(0.0))
    )
    weight: Space = "v"
    clamp: float = attrs.field(default=400.0, validator=validators.gt(0))
    draws: int = attrs.field(default=1, validator=validators.ge(1))

    def terms(self, nets: Nets, batch: Batch, draw: Draw, phase: str) -> Terms:
        """Return a sample's reconstruction, the prior's loss of it, and its negative entropy."""
        posterior = encoded_posterior(nets, batch.x, self.std)
        z = posterior.sample(draw)  # (B, N, D)
        levels = noise_levels(z, draw, nets.path, self.draws)
        x_hat, *outs = nets.online.run(Decode(z=z), *(n.denoise() for n in levels))
        entropy = posterior.entropy()
        losses = {
            "reconstruction": self.reconstruction(x_hat, batch.x, nets.frozen),
            "denoising": mean_clean_loss(outs, levels, z, nets, self.weight, self.clamp),
            "negative_entropy": -entropy,
        }
        factor = self._factor(draw.progress)
        weights: dict[str, float | Tensor] = {
            "reconstruction": 1.0,
            "denoising": self.prior_weight * factor,
            "negative_entropy": self.entropy_weight * factor,
        }
        return Terms(losses, weights, posterior.mean, decoded=x_hat)

    def _factor(self, progress: Tensor) -> Tensor:
        """Return what multiplies both weights at this share of training, a scalar."""
        return torch.where(progress < self.first_phase, 1.0, self.later_factor)

    def heads(self, backbone: Backbone) -> nn.ModuleDict:
        """Return the head of the log-variance, unless the std is fixed."""
        return variance_head(backbone, self.std)

    def stops(self, phase: str) -> Collection[str]:
        """Return none: every loss trains the encoder."""
        return ()

    def problems(self, nets: Nets) -> Sequence[tuple[str, str]]:
        """Find a variance to learn without features, entropy without one, an unbounded weight."""
        found = [*unfit_prediction(nets, self.weight), *variance_problems(nets.online, self.std)]
        if nets.online.latent.learned and self.std is not None and self.entropy_weight > 0:
            what = (
                f"{self.std:g} is constant, and so is the entropy, which then keeps nothing open; "
                "leave it out, or set objective.entropy_weight: 0"
            )
            found.append(("objective.std", what))
        return found
