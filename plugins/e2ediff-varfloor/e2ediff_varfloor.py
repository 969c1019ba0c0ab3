"""Variance floor: keep every latent channel's std above a floor, as VICReg's hinge."""

import attrs
import torch

from e2ediff import hookimpl
from e2ediff.backbone import Decode
from e2ediff.losses import PixelLoss, mean_clean_loss, noise_levels, unfit_prediction
from e2ediff.objective import Objective, Terms, sg


@attrs.frozen(kw_only=True)
class VarianceFloor(Objective):
    """Reconstruct, denoise a stopped latent, and hinge each channel's std.

    `floor` is the std below which the hinge pulls, `floor_weight` multiplies it.

    Source: Bardes et al. 2022 (VICReg, arXiv 2105.04906), eq. 1.
    """

    floor: float = attrs.field(default=1.0, validator=attrs.validators.gt(0))
    floor_weight: float = 0.1

    def terms(self, nets, batch, draw, phase):
        """Three losses; only reconstruction and the hinge reach the encoder."""
        z = nets.online.encode(batch.x)  # (B, N, D)
        levels = noise_levels(sg(z), draw, nets.path, 1)
        x_hat, *outs = nets.online.run(Decode(z=z), *(n.denoise() for n in levels))
        losses = {
            "reconstruction": PixelLoss()(x_hat, batch.x, nets.frozen),
            "denoising": mean_clean_loss(outs, levels, sg(z), nets, "x0", 1.0),
            "variance": torch.relu(self.floor - z.flatten(0, 1).std(dim=0)).mean(),
        }
        weights = dict(zip(losses, (1.0, 1.0, self.floor_weight), strict=True))
        return Terms(losses, weights, z, decoded=x_hat)

    def stops(self, phase):
        """The denoiser learns from stopped latents."""
        return ("denoising",)

    def problems(self, nets):
        """A prediction whose clean error has no bound."""
        return unfit_prediction(nets, "x0", "")


@hookimpl
def register(add):
    """Make `objective: variance_floor` known."""
    add("objectives", "variance_floor", VarianceFloor)
