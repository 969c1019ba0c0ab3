"""SpeeDiff's anchor: the denoiser's clean estimate, decoded and compared in pixels.

Shapes: B batch, C H W image, N latent tokens, D latent channels.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar, Literal

import attrs
from attrs import validators
from torch import Tensor

from e2ediff.backbone import Decode
from e2ediff.data import Batch
from e2ediff.losses import AutoencoderObjective, mean_clean_loss, noise_levels
from e2ediff.objective import Draw, Nets, Terms


@attrs.frozen(kw_only=True)
class Tweedie(AutoencoderObjective):
    """Naive joint training, with the denoised latents anchored to the pixels.

    The denoiser's clean estimate is the posterior mean E[z | z_t] (Tweedie's formula); decoded,
    it is compared with the image.
    A latent that shrinks below the noise loses its image in z_t, which this term penalises and
    the velocity loss does not.
    No gradient is stopped.

    Options:
        tweedie_weight: Weight of the pixel error of decoded clean estimates.
        times_weight: An image's share of that error: `t`, which leaves out what noise has
            erased, or `one`.
        tweedie_kind: Whether it is the mean absolute (`l1`) or squared (`l2`) difference.
        denoising_weight: Weight of the velocity loss.
        clamp: Bound of the velocity loss's weight near the data.
        reconstruction: Compares decoded latents, without noise, with the images.

    Source: SpeeDiff (CVPR 2026, Tweedie Pixel Reconstruction), of which the abstract was read:
    end-to-end training from scratch, and decoding a clean latent predicted from a noisy one.
    Ours: every weight, the weighting by t, pixels alone (SpeeDiff also aligns representations
    and has a VAE), and the estimate taken at the times of the velocity loss.
    """

    static_graph: ClassVar[bool] = True

    tweedie_weight: float = attrs.field(default=1.0, validator=validators.ge(0))
    times_weight: Literal["t", "one"] = "t"
    tweedie_kind: Literal["l1", "l2"] = "l2"
    denoising_weight: float = attrs.field(default=1.0, validator=validators.ge(0))
    clamp: float = attrs.field(default=400.0, validator=validators.gt(0))

    def terms(self, nets: Nets, batch: Batch, draw: Draw, phase: str) -> Terms:
        """Return the reconstruction, the velocity loss, and the pixels of the clean estimate."""
        z = nets.online.encode(batch.x)  # (B, N, D)
        levels = noise_levels(z, draw, nets.path, 1)
        x_hat, out = nets.online.run(Decode(z=z), levels[0].denoise())
        x_tweedie = nets.online.decode(levels[0].estimate(out, nets).x0)
        # With no gradient stopped this is the velocity loss, as `coupled` has it.
        denoising = mean_clean_loss([out], levels, z, nets, "v", self.clamp)
        losses = {
            "reconstruction": self.reconstruction(x_hat, batch.x, nets.frozen),
            "denoising": denoising,
            "tweedie": self._pixels(x_tweedie, batch.x, draw.t),
        }
        weights = {"denoising": self.denoising_weight, "tweedie": self.tweedie_weight}
        return Terms(losses, {"reconstruction": 1.0, **weights}, z, decoded=x_hat)

    def _pixels(self, x_hat: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Return the weighted error, a scalar, of images (B, C, H, W) at times (B,)."""
        difference = x_hat.float() - x.float()
        error = difference.abs() if self.tweedie_kind == "l1" else difference.square()
        each = error.mean(dim=(1, 2, 3))  # (B,)
        return (each * t).mean() if self.times_weight == "t" else each.mean()

    def stops(self, phase: str) -> Collection[str]:
        """Return none: the anchor takes their place."""
        return ()

    def problems(self, nets: Nets) -> Sequence[tuple[str, str]]:
        """Find a prediction whose clean estimate is unbounded."""
        if nets.predicts in ("eps", "score"):
            what = (
                f"{nets.predicts} gives no clean latent near noise, and tweedie decodes it "
                "there; set predicts: x0 or v"
            )
            return [("predicts", what)]
        return ()
