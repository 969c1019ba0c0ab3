"""The LDM-is-AE objective.

Shapes: B batch, C H W image, N latent tokens, D latent channels.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar

import attrs
import torch
from attrs import validators

from e2ediff.backbone import Encode
from e2ediff.data import Batch
from e2ediff.losses import (
    AutoencoderObjective,
    PixelLoss,
    Space,
    clean_loss,
    error_weight,
    noise_levels,
)
from e2ediff.objective import Draw, Nets, Terms
from e2ediff_ldm_is_ae.backbone import LDMIsAEConfig


def _squares() -> PixelLoss:
    return PixelLoss(kind="l2")


@attrs.frozen(kw_only=True)
class LDMIsAE(AutoencoderObjective):
    """Denoise latents through an image, and let the image be the clean one at every time.

        z_1 = encode(x),  z_t = alpha sg(z_1) + sigma eps,  F, z_hat = denoise(z_t, t),
        loss = reconstruction_weight mean w_t reconstruction(F, x)
             + denoising_weight mean w_t |z_hat - sg(z_1)|^2,  w_t = min(weight, clamp)

    The latent is stopped in both losses, so the encoder learns as the last part of the denoiser
    alone, DiT-E, and there only from images whose t is at least `encoder_from`; of the others
    gradients go through DiT-E's weights to DiT-D. 0 lets it learn from all. Nothing is decoded
    from a clean latent in training: the image of a pass whose t comes near 1 takes that place.
    It is for `predicts: x0`, by which DiT-E's answer is a latent at every time, as in encoding.
    Regularisers of the latent are refused, since nothing trains the encoder through it, and with
    `encoder_from` above 0 so is FSDP2.

    `reconstruction` compares F with the image; `weight` is the space whose weight w_t multiplies
    both errors, `x0` being unweighted, and `clamp` the largest such weight; 400 is 1 - t held
    above 0.05. `reconstruction_weight` and `denoising_weight` are those of the losses as a whole.

    Source: LDM-is-AE (arXiv 2609.37080). Its paper and its released code agree on the two losses,
    on w_t = 1 / (1 - t)^2 and on `encoder_from`. The paper's times are U[0, 1] (`times: uniform`),
    the script's logit-normal with mean -0.8 and std 0.8. The code's: squared errors, and the
    clamp. The script's: `denoising_weight` 10, where the argument's default is 2; it adds LPIPS
    with weight 1, by default 0.1, which is `reconstruction.perceptual` here. Of these weights the
    README's algorithm has only the name of one. Ours: z_1 does not know the class.
    """

    static_graph: ClassVar[bool] = True
    trains_latents: ClassVar[bool] = False

    trial: ClassVar[tuple[str, ...]] = ("backbone=ldm_is_ae", *LDMIsAEConfig.trial)

    reconstruction: PixelLoss = attrs.field(factory=_squares)
    reconstruction_weight: float = attrs.field(default=1.0, validator=validators.ge(0))
    denoising_weight: float = attrs.field(default=10.0, validator=validators.ge(0))
    weight: Space = "v"
    clamp: float = attrs.field(default=400.0, validator=validators.gt(0))
    encoder_from: float = attrs.field(default=0.5, validator=[validators.ge(0), validators.lt(1)])

    @property
    def needs_whole_weights(self) -> bool:  # type: ignore[override]
        """Return whether gradients go through DiT-E past its weights."""
        return self.encoder_from > 0

    def terms(self, nets: Nets, batch: Batch, draw: Draw, phase: str) -> Terms:
        """Return the errors of the image on the way and of the latent at the end."""
        with torch.no_grad():
            (z,) = nets.online.run(Encode(x=batch.x))  # (B, N, D)
        (level,) = noise_levels(z, draw, nets.path, 1)
        learns = draw.t >= self.encoder_from if self.encoder_from > 0 else None
        (out,) = nets.online.outputs(attrs.evolve(level.denoise(), encoder_learns=learns))
        assert out.image is not None
        w = error_weight(nets.path, draw.t, self.weight).clamp_max(self.clamp)  # (B,)
        guess = level.estimate(out.value, nets)
        losses = {
            "reconstruction": (
                w * self.reconstruction.each(out.image, batch.x, nets.frozen)
            ).mean(),
            "denoising": clean_loss(guess, z, nets.path, draw.t, self.weight, self.clamp),
        }
        weights = {
            "reconstruction": self.reconstruction_weight,
            "denoising": self.denoising_weight,
        }
        return Terms(losses, weights, z)

    def stops(self, phase: str) -> Collection[str]:
        """Return both: the latent that is encoded gets no gradient."""
        return ("reconstruction", "denoising")

    def problems(self, nets: Nets) -> Sequence[tuple[str, str]]:
        """Find a denoiser without an image on the way, and an unbounded weight."""
        if not nets.online.decodes_while_denoising:
            what = (
                "ldm_is_ae compares the image that a denoise pass goes through, and this backbone "
                "has none: choose backbone: ldm_is_ae"
            )
            return [("backbone", what)]
        if nets.predicts != "x0":
            what = (
                f"{nets.predicts} is not what an encoder answers, and the denoiser's last part is "
                "ldm_is_ae's encoder: set predicts: x0"
            )
            return [("predicts", what)]
        return []
