"""Unified Latents: a diffusion prior whose KL is a weighted squared error.

Shapes: B batch, C H W image, N latent tokens, D latent channels.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import ClassVar

import attrs
import torch
from attrs import validators
from torch import Tensor

from e2ediff.backbone import Decode, Denoise
from e2ediff.data import Batch
from e2ediff.interpolant import Interpolant, last_time, spread
from e2ediff.losses import AutoencoderObjective
from e2ediff.objective import Draw, Nets, Terms


@attrs.frozen(kw_only=True)
class UnifiedLatents(AutoencoderObjective):
    """Latents with fixed noise, under a diffusion prior that models nothing finer than it.

        z_0 = z + (sigma / alpha)(t_0) eps,   t_0 the time where log(alpha^2 / sigma^2) = `logsnr`
        KL  = 1/2 integral_0^{t_0} d(alpha^2 / sigma^2)/dt |z - f(z_t, t)|^2 dt

    The decoder gets z_0; the prior is trained up to t_0 and no further, so that the KL of the
    noisy latent is this integral, an upper bound of the latent's bits.
    No gradient is stopped: the KL pulls the encoder's scale down, reconstruction through the
    fixed noise pushes it up, and their balance is the bit rate.
    The encoder's scale is measured against the noise, hence `latent_norm: none`.

    Options:
        logsnr: Log signal-to-noise ratio of the latents at t_0; 5 is a noise of 0.08 on latents
            of unit variance.
        kl_weight: Weight of the KL, in nats for each latent channel; it sets the bit rate.
        reconstruction: Compares decoded images with the originals.

    Times are the recipe's, scaled to [0, t_0]: with `times: uniform` the loss is the integral,
    with another law it is weighted by that law's density.

    Source: Unified Latents (Heek et al. 2026, arXiv 2602.17270): fixed noise tied to the prior's
    least noise, log-SNR 5, the KL as a squared error weighted by exp(logsnr) d logsnr, no
    stop-gradient. Ours: pixels instead of a diffusion decoder, kl_weight, the linear path's
    times, z_0 divided by alpha (the decoder then meets sampled, clean latents at the scale it
    was trained on), and no second stage with a prior trained anew.
    """

    static_graph: ClassVar[bool] = True

    trial: ClassVar[tuple[str, ...]] = ("backbone.latent_norm=none",)

    logsnr: float = 5.0
    kl_weight: float = attrs.field(default=0.01, validator=validators.gt(0))

    def terms(self, nets: Nets, batch: Batch, draw: Draw, phase: str) -> Terms:
        """Reconstruction through the fixed noise, and the KL at one time an image."""
        z = nets.online.encode(batch.x)  # (B, N, D)
        t_0 = least_noise(nets.path, self.logsnr)
        ratio = float((-0.5 * torch.tensor(self.logsnr)).exp())  # sigma / alpha at t_0
        t = draw.t * t_0
        z_t = nets.path.mix(z, draw.noise(z), t)
        decode = Decode(z=z + ratio * draw.noise(z))
        x_hat, out = nets.online.run(decode, Denoise(z_t=z_t, t=t, condition=draw.condition))
        clean = nets.path.estimate(out, z_t, t, nets.predicts).x0
        losses = {
            "reconstruction": self.reconstruction(x_hat, batch.x, nets.frozen),
            "kl": t_0 * kl_rate(clean, z, nets.path, t),
        }
        return Terms(losses, {"reconstruction": 1.0, "kl": self.kl_weight}, z, decoded=x_hat)

    def stops(self, phase: str) -> Collection[str]:
        """None: the KL trains the encoder."""
        return ()

    def problems(self, nets: Nets) -> Sequence[tuple[str, str]]:
        """A latent norm, a prediction that is unbounded, a path that does not end in noise."""
        found = []
        if nets.online.latent.norm != "none":
            what = (
                f"{nets.online.latent.norm} fixes the scale by which the encoder sets its bit "
                "rate against the noise; set backbone.latent_norm: none"
            )
            found.append(("backbone.latent_norm", what))
        if nets.predicts in ("eps", "score"):
            what = (
                f"{nets.predicts} gives no clean latent near noise, and the KL measures it "
                "there; set predicts: x0 or v"
            )
            found.append(("predicts", what))
        if float(nets.path.logsnr(torch.zeros(1))) > -6:
            what = (
                "does not end in noise at t = 0, so the KL lacks a term; choose linear or cosine"
            )
            found.append(("interpolant", what))
        return found


def kl_rate(clean: Tensor, z: Tensor, path: Interpolant, t: Tensor) -> Tensor:
    """1/2 d(alpha^2 / sigma^2)/dt |z - clean|^2 in nats, averaged over images and channels.

    t / (1 - t)^3 times the squared error on the linear path.

    Source: Kingma et al. 2021 (VDM, arXiv 2107.00630), eq. 17, the variational bound in
    continuous time.
    """
    a, s = path.alpha(t), path.sigma(t)
    slope = a / s**3 * (path.alpha_dot(t) * s - a * path.sigma_dot(t))  # (B,), half of dSNR/dt
    return (spread(slope, z) * (z - clean.float()).square()).mean()


@lru_cache(maxsize=16)
def least_noise(path: Interpolant, logsnr: float) -> float:
    """The time at which a path has this log signal-to-noise ratio."""
    one = torch.zeros(1, dtype=torch.float64)
    return float(last_time(lambda t: path.logsnr(t) < logsnr, one))
