"""The Gaussian posterior of a variational encoder.

Shapes: B batch, C H W image, N latent tokens, D latent channels, W trunk width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs
import torch
from torch import Tensor, nn

from e2ediff.backbone import Backbone, Encode
from e2ediff.objective import Draw, Nets

_START = -4.0  # log-variance of a fresh head: a std of 0.14 on latents of unit scale
_HEAD = "log_variance"


@attrs.frozen(eq=False)
class Posterior:
    """N(mean, exp(log_variance)), both (B, N, D), of each element on its own."""

    mean: Tensor
    log_variance: Tensor

    def sample(self, draw: Draw) -> Tensor:
        """Draw a latent (B, N, D), differentiable in both."""
        return self.mean + torch.exp(self.log_variance / 2) * draw.noise(self.mean)

    def entropy(self) -> Tensor:
        """Return H(q) in nats, averaged over elements, a scalar."""
        return self.log_variance.mean() / 2 + math.log(2 * math.pi * math.e) / 2


def encoded_posterior(nets: Nets, x: Tensor, std: float | None) -> Posterior:
    """Encode images (B, C, H, W): the mean is the normalised latent.

    Args:
        nets: The networks; `heads` has that of `variance_head`, where there is one.
        x: Images.
        std: The posterior's standard deviation, or None where the head gives it.
    """
    last = nets.online.depth
    taps = (last,) if std is None else ()
    (encoded,) = nets.online.outputs(Encode(x=x, taps=taps))
    mean = encoded.value  # (B, N, D)
    if std is not None:
        return Posterior(mean, torch.full_like(mean, std).log() * 2)
    log_variance = nets.heads[_HEAD](encoded.features[last]).float()
    return Posterior(mean, log_variance.clamp(-30.0, 20.0))


def variance_head(backbone: Backbone, std: float | None) -> nn.ModuleDict:
    """Return the head of the log-variance, unless the std is fixed; it starts constant."""
    if std is not None:
        return nn.ModuleDict()
    head = nn.Linear(backbone.width, backbone.latent.dim)
    nn.init.zeros_(head.weight)
    nn.init.constant_(head.bias, _START)
    return nn.ModuleDict({_HEAD: head})


def variance_problems(backbone: Backbone, std: float | None) -> Sequence[tuple[str, str]]:
    """List a variance that is to be learned from a backbone without features."""
    if not backbone.latent.learned:
        what = "the posterior is an encoder's, and this backbone has none to train; choose another"
        return [("backbone", f"{what}, such as vit")]
    if std is not None or backbone.depth > 0:
        return []
    what = "is learned from features, which this backbone does not offer; give a number"
    return [("objective.std", what)]
