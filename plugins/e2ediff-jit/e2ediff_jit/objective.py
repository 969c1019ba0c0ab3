"""The objective of a denoiser alone.

Shapes: B batch, N latent tokens, D latent channels.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar

import attrs
from attrs import validators

from e2ediff.data import Batch
from e2ediff.losses import Space, mean_clean_loss, noise_levels, unfit_prediction
from e2ediff.objective import Draw, Nets, Objective, Terms
from e2ediff_jit.backbone import JiTConfig


@attrs.frozen(kw_only=True)
class Pixel(Objective):
    """Denoise, and nothing else: for latents that are not learned, such as pixels.

        loss = mean min(w_t, clamp) |f(z_t, t) - x|^2

    `weight` is the space whose weight w_t multiplies the clean error: `v` gives the loss of
    velocities, 1 / (1 - t)^2 on a straight path; `x0` is unweighted.
    `clamp` is the largest such weight; 400 is 1 - t held above 0.05.

    Source: JiT (Li & He 2025, arXiv 2511.13720), the loss of velocities by a network that
    predicts x; the clamp is its released code's.
    """

    static_graph: ClassVar[bool] = True

    trial: ClassVar[tuple[str, ...]] = ("backbone=jit", *JiTConfig.trial)

    weight: Space = "v"
    clamp: float = attrs.field(default=400.0, validator=validators.gt(0))

    def terms(self, nets: Nets, batch: Batch, draw: Draw, phase: str) -> Terms:
        """The clean error at one time an image."""
        z = nets.online.encode(batch.x)  # (B, N, D), the pixels themselves
        levels = noise_levels(z, draw, nets.path, 1)
        outs = nets.online.run(*(n.denoise() for n in levels))
        loss = mean_clean_loss(outs, levels, z, nets, self.weight, self.clamp)
        return Terms({"denoising": loss}, {"denoising": 1.0}, z)

    def stops(self, phase: str) -> Collection[str]:
        """None: there is no encoder that a loss could train."""
        return ()

    def problems(self, nets: Nets) -> Sequence[tuple[str, str]]:
        """An encoder that nothing would train, and an unbounded weight."""
        found = unfit_prediction(nets, self.weight)
        if nets.online.latent.learned:
            what = (
                "pixel trains the denoiser alone, and this backbone has an encoder to train: "
                "choose `backbone: jit`, or an objective such as `detached`"
            )
            found.insert(0, ("objective", what))
        return found
