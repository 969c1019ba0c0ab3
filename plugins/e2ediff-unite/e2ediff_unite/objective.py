"""The UNITE objective.

Shapes: B batch, C H W image, N latent tokens, D latent channels.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar, Literal

import attrs
from attrs import validators

from e2ediff.backbone import Decode, Encode
from e2ediff.data import Batch
from e2ediff.losses import (
    AutoencoderObjective,
    DecodeNoise,
    Space,
    mean_clean_loss,
    noise_levels,
    unfit_prediction,
)
from e2ediff.objective import Draw, Nets, Terms, sg


def _noise() -> DecodeNoise:
    return DecodeNoise(probability=0.5, t_min=0.7)


@attrs.frozen(kw_only=True)
class Unite(AutoencoderObjective):
    """Several denoising draws for each reconstruction, of latents that learn nothing from them.

        loss = reconstruction + denoising_weight sum_k min(w_t, clamp) |f(z_t, t) - sg(z)|^2,
        z_t = alpha sg(z) + sigma eps

    Encoder and denoiser meet in shared weights alone: use a backbone in which they share their
    trunk, `backbone: unite` or, with a token for each patch, `vit` with `trunks: decoder_apart`.

    `draws` is k, the noise levels trained on for each reconstruction, at that many times the
    denoiser's cost, each with times, noise and dropped labels of its own; `reduce` says whether
    their losses are added up (`sum`) or averaged (`mean`), and `denoising_weight` is the weight
    of that sum or mean.
    `weight` is the space whose weight w_t multiplies the clean error, `x0` being unweighted, and
    `clamp` the largest such weight; 400 is 1 - t held above 0.05.
    `reconstruction` compares decoded images with the originals, after `decode_noise` on the
    latents.
    Where the backbone encodes from noise, each image's registers begin from fresh unit noise at
    a time from U[0, `encode_time`].

    Source: UNITE (arXiv 2603.22283), section 3, and its released code, from which come the sum,
    w_t of velocities with its clamp, k = 3 (the reported models have 14), the noise with
    probability 0.5 from t = 0.7 on, and encode times up to 0.01. The paper writes the unweighted
    error (`weight: x0`). Its latent norm has learned scales (`backbone.latent_norm: affine`);
    its prediction passes that norm too (`backbone.norm_prediction`); times are logit-normal with
    a shift of 0.5 (`times: shifted`).
    Ours: images are in [-1, 1]. The code's are in [0, 1], where the same L1 is half as large, so
    its loss is half of ours with `denoising_weight: 2`, and its clip half of ours. Its
    reconstruction adds LPIPS, the sum of five maps with learned weights; ours
    (`reconstruction.perceptual`) is a mean of maps without weights.
    """

    static_graph: ClassVar[bool] = True

    draws: int = attrs.field(default=3, validator=validators.ge(1))
    reduce: Literal["sum", "mean"] = "sum"
    denoising_weight: float = attrs.field(default=1.0, validator=validators.ge(0))
    weight: Space = "v"
    clamp: float = attrs.field(default=400.0, validator=validators.gt(0))
    decode_noise: DecodeNoise = attrs.field(factory=_noise)
    encode_time: float = attrs.field(default=0.01, validator=[validators.ge(0), validators.lt(1)])

    def terms(self, nets: Nets, batch: Batch, draw: Draw, phase: str) -> Terms:
        """Reconstruction of noised latents, and the clean errors of stopped ones."""
        (z,) = nets.online.run(self._encode(nets, batch, draw))  # (B, N, D)
        levels = noise_levels(sg(z), draw, nets.path, self.draws, batch.condition)
        x_hat, *outs = nets.online.run(
            Decode(z=self.decode_noise(z, draw, nets.path)), *(n.denoise() for n in levels)
        )
        mean = mean_clean_loss(outs, levels, sg(z), nets, self.weight, self.clamp)
        losses = {
            "reconstruction": self.reconstruction(x_hat, batch.x, nets.frozen),
            "denoising": mean * self.draws if self.reduce == "sum" else mean,
        }
        weights = {"reconstruction": 1.0, "denoising": self.denoising_weight}
        return Terms(losses, weights, z, decoded=x_hat)

    def _encode(self, nets: Nets, batch: Batch, draw: Draw) -> Encode:
        """The encode pass, with a start of its own where the backbone takes one."""
        net = nets.online
        if not net.encodes_from_noise:
            return Encode(x=batch.x)
        eps = draw.noise(batch.x.new_empty(len(batch.x), net.latent.tokens, net.latent.dim))
        t = self.encode_time * draw.uniform(len(batch.x))
        return Encode(x=batch.x, z_t=eps, t=t)

    def stops(self, phase: str) -> Collection[str]:
        """The denoiser learns from stopped latents."""
        return ("denoising",)

    def problems(self, nets: Nets) -> Sequence[tuple[str, str]]:
        """Latents that outgrow the noise before decoding, and an unbounded weight."""
        return [*self.decode_noise.problems(nets), *unfit_prediction(nets, self.weight)]
