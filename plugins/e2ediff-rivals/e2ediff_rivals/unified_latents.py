"""Unified Latents: a diffusion prior whose KL is a weighted squared error.

Shapes: B batch, C H W image, N latent tokens, D latent channels.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import ClassVar, Literal

import attrs
import torch
from attrs import validators
from torch import Tensor

from e2ediff.backbone import Decode, Denoise
from e2ediff.data import Batch
from e2ediff.interpolant import Interpolant, last_time, spread
from e2ediff.losses import AutoencoderObjective, PixelLoss
from e2ediff.nn.pixel_decoding import noised_image
from e2ediff.objective import Draw, Nets, Terms

_LAST_TIME = 1 / (1 + math.exp(-5))  # of images, where log(t^2 / (1 - t)^2) is 10


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
    Samples go on to t = 1 by the clean estimates that the prior gives at t_0.

    With `decoder: diffusion` the decoder is a diffusion model of the image, given z_0, and the
    reconstruction is the image's own bound at one noise level x_t = t x + (1 - t) eps,

        1/2 integral d(t^2 / (1 - t)^2)/dt sigmoid(`decoder_bias` - l) |x - g(x_t, t, z_0)|^2 dt,

    l = log(t^2 / (1 - t)^2), up to the time where l is 10, at which noise is less than a level of
    256. It trains the encoder through z_0. Sampling and reconstruction take the decoder's own
    steps, of which the backbone has the number.

    Options:
        logsnr: Log signal-to-noise ratio of the latents at t_0; 5 is a noise of 0.08 on latents
            of unit variance.
        kl_weight: Weight of the KL, in nats for each latent channel; it sets the bit rate.
        decoder: `pixels`, which `reconstruction` compares with the originals, or `diffusion`, for
            a backbone that denoises pixels (`vit` with `decoder: denoising`).
        decoder_bias: The log signal-to-noise ratio about which the diffusion decoder's bound
            stops counting finer noise: the higher, the finer the detail that latents must hold.
        reconstruction: Compares decoded images with the originals, with `decoder: pixels`.

    Times are the recipe's, scaled to [0, t_0]: with `times: uniform` the loss is the integral,
    with another law it is weighted by that law's density. Those of the image are
    drawn anew from the same law.

    Source: Unified Latents (Heek et al. 2026, arXiv 2602.17270): fixed noise tied to the prior's
    least noise, log-SNR 5, the KL as a squared error weighted by exp(logsnr) d logsnr, no
    stop-gradient, and a diffusion decoder with a sigmoid-weighted bound. Ours: `pixels`,
    kl_weight, the linear path's times, z_0 divided by alpha (the decoder then meets sampled
    latents at the scale it was trained on), clean latents in sampling and reconstruction, where
    the paper decodes z_0 with its noise, and no second stage with a prior trained anew.
    Of the sigmoid only accounts of the paper were read: sigmoid(l - b), with a bias b, and a loss
    factor. Ours: to read it as the weight of the clean error for each unit of l, which but for a
    constant is sigmoid(b - l) of the bound; b = 0, no loss factor (kl_weight has its part), the
    last noise level, the straight path of images, and one noise for all that is decoded.
    The two decoders are compared in docs/results/rivals.md; neither has been compared with the
    paper's figures.
    """

    static_graph: ClassVar[bool] = True

    trial: ClassVar[tuple[str, ...]] = ("backbone.latent_norm=none",)

    logsnr: float = attrs.field(default=5.0, validator=[validators.ge(-5), validators.le(20)])
    kl_weight: float = attrs.field(default=0.01, validator=validators.gt(0))
    decoder: Literal["pixels", "diffusion"] = "pixels"
    decoder_bias: float = 0.0

    def terms(self, nets: Nets, batch: Batch, draw: Draw, phase: str) -> Terms:
        """Return the reconstruction through the fixed noise, and the KL at one time an image."""
        z = nets.online.encode(batch.x)  # (B, N, D)
        t_0 = least_noise(nets.path, self.logsnr)
        ratio = math.exp(-0.5 * self.logsnr)  # sigma / alpha at t_0
        t = draw.t * t_0
        z_t = nets.path.mix(z, draw.noise(z), t)
        decode, diffusion = Decode(z=z + ratio * draw.noise(z)), self.decoder == "diffusion"
        if diffusion:
            t_x = draw.again().t * _LAST_TIME
            decode = attrs.evolve(
                decode, x_t=noised_image(batch.x, draw.noise(batch.x), t_x), t=t_x
            )
        x_hat, out = nets.online.run(decode, Denoise(z_t=z_t, t=t, condition=draw.condition))
        clean = nets.path.estimate(out, z_t, t, nets.predicts).x0
        if diffusion:
            reconstruction = _LAST_TIME * image_rate(x_hat, batch.x, t_x, self.decoder_bias)
        else:
            reconstruction = self.reconstruction(x_hat, batch.x, nets.frozen)
        kl = t_0 * kl_rate(clean, z, nets.path, t)
        losses = {"reconstruction": reconstruction, "kl": kl}
        decoded = None if diffusion else x_hat
        return Terms(losses, {"reconstruction": 1.0, "kl": self.kl_weight}, z, decoded=decoded)

    def trained_until(self, path: Interpolant) -> float:
        """Return the time t_0."""
        try:
            return least_noise(path, self.logsnr)
        except TypeError:  # a plugin's path need not be hashable
            return least_noise.__wrapped__(path, self.logsnr)

    def stops(self, phase: str) -> Collection[str]:
        """Return none: the KL trains the encoder."""
        return ()

    def problems(self, nets: Nets) -> Sequence[tuple[str, str]]:
        """Find a latent norm, an unbounded prediction, a path that does not end in noise."""
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
        if self.decoder == "diffusion" and not nets.online.denoises_pixels:
            what = (
                "diffusion needs a decoder that denoises pixels: set backbone.decoder: denoising, "
                "for a backbone that has it, such as vit, or objective.decoder: pixels"
            )
            found.append(("objective.decoder", what))
        if self.decoder == "pixels" and nets.online.denoises_pixels:
            what = (
                "pixels would train a decoder that denoises at its own few steps alone; set "
                "objective.decoder: diffusion, or backbone.decoder: direct"
            )
            found.append(("objective.decoder", what))
        if self.decoder == "pixels" and self.decoder_bias != 0:
            what = "weighs the loss of a diffusion decoder; leave it out with decoder: pixels"
            found.append(("objective.decoder_bias", what))
        if self.decoder == "diffusion" and self.reconstruction != PixelLoss():
            what = "a diffusion decoder has a loss of its own; leave objective.reconstruction out"
            found.append(("objective.reconstruction", what))
        return found


def kl_rate(clean: Tensor, z: Tensor, path: Interpolant, t: Tensor) -> Tensor:
    """Return 1/2 d(alpha^2 / sigma^2)/dt |z - clean|^2 in nats, a mean over images and channels.

    That is t / (1 - t)^3 times the squared error on the linear path.

    Source: Kingma et al. 2021 (VDM, arXiv 2107.00630), eq. 17, the variational bound in
    continuous time.
    """
    a, s = path.alpha(t), path.sigma(t)
    slope = a / s**3 * (path.alpha_dot(t) * s - a * path.sigma_dot(t))  # (B,), half of dSNR/dt
    return (spread(slope, z) * (z - clean.float()).square()).mean()


def image_rate(clean: Tensor, x: Tensor, t: Tensor, bias: float) -> Tensor:
    """Return the rate of `kl_rate` on the straight path times sigmoid(bias - logsnr), of images.

    At bias 0 it is t / ((1 - t) (t^2 + (1 - t)^2)) times the squared error of the clean estimate
    (B, C, H, W) at times (B,) below 1.
    """
    rate = t / (1 - t) ** 3 * torch.sigmoid(bias - 2 * (t / (1 - t)).clamp_min(1e-6).log())
    return (spread(rate, x) * (x.float() - clean.float()).square()).mean()


@lru_cache(maxsize=16)
def least_noise(path: Interpolant, logsnr: float) -> float:
    """Return the time at which a path has this log signal-to-noise ratio."""
    one = torch.zeros(1, dtype=torch.float64)
    return float(last_time(lambda t: path.logsnr(t) < logsnr, one))
