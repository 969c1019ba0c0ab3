"""Losses that objectives share: pixels, predictions, and noise before decoding.

Shapes: B batch, C H W image, N latent tokens, D latent channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import attrs
import torch
from attrs import validators
from torch import Tensor, nn
from torch.nn import functional

from e2ediff.backbone import Backbone, Denoise
from e2ediff.condition import Condition
from e2ediff.data import ImageSpec
from e2ediff.errors import AbsentDataError, DataError
from e2ediff.features import FeatureConfig, trial_maps
from e2ediff.interpolant import Estimate, Interpolant, spread
from e2ediff.objective import Draw, Nets, Objective

Space = Literal["x0", "v", "eps"]
SPACES: tuple[Space, ...] = get_args(Space)
PixelKind = Literal["l1", "l2"]


@attrs.frozen(kw_only=True)
class PixelLoss:
    """How a reconstruction is compared with its image.

    `kind` is the mean absolute (`l1`) or squared (`l2`) difference of pixels in [-1, 1].
    `scales` counts the resolutions compared, each half the last (average pooling), with equal
    weights that sum to 1.
    `perceptual` names a feature network; its term is the mean squared distance of unit-length
    features at each place, averaged over the network's maps, times `perceptual_weight`.

    Source: the perceptual form is LPIPS (Zhang et al. 2018, arXiv 1801.03924), eq. 1, with all
    channel weights 1.
    """

    kind: PixelKind = "l1"
    scales: int = attrs.field(default=1, validator=validators.ge(1))
    perceptual: FeatureConfig | None = None
    perceptual_weight: float = attrs.field(default=1.0, validator=validators.ge(0))

    def problems(self, image: ImageSpec) -> list[tuple[str, str]]:
        """List options that do not fit images of this size: (option, complaint) pairs.

        A perceptual network is tried without weights; one that is not here is none of them.
        """
        found, most = [], min(image.height, image.width).bit_length()
        if self.scales > most:
            what = (
                f"{self.scales} halves images of {image.height} x {image.width} pixels to "
                f"nothing; set it to {most} or less"
            )
            found.append(("scales", what))
        if self.perceptual is not None:
            try:
                with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                    blank = self.perceptual.blank()
                    trial_maps(blank, (image.channels, image.height, image.width))
            except AbsentDataError:
                pass  # it may be on the machine that trains
            except DataError as error:
                found.append(("perceptual", str(error)))
        return found

    def frozen(self) -> nn.ModuleDict:
        """Return the feature network, under the name `perceptual`, or nothing."""
        if self.perceptual is None:
            return nn.ModuleDict()
        return nn.ModuleDict({"perceptual": self.perceptual.build()})

    def __call__(self, x_hat: Tensor, x: Tensor, frozen: nn.ModuleDict) -> Tensor:
        """Return the scalar loss of x_hat against x, both (B, C, H, W), in float32."""
        compare = functional.l1_loss if self.kind == "l1" else functional.mse_loss
        loss = torch.stack([compare(a, b) for a, b in self._resolutions(x_hat, x)]).mean()
        pairs = self._features(x_hat, x, frozen)
        if pairs:
            distances = [_unit_distance(f, g).mean() for f, g in pairs]
            loss = loss + self.perceptual_weight * torch.stack(distances).mean()
        return loss

    def each(self, x_hat: Tensor, x: Tensor, frozen: nn.ModuleDict) -> Tensor:
        """Return the loss of each image, (B,), for objectives that weight them; float32."""
        differences = [a - b for a, b in self._resolutions(x_hat, x)]
        terms = [
            (d.abs() if self.kind == "l1" else d.square()).mean((1, 2, 3)) for d in differences
        ]
        loss = torch.stack(terms).mean(0)
        pairs = self._features(x_hat, x, frozen)
        if pairs:
            distances = [_unit_distance(f, g).mean((1, 2)) for f, g in pairs]
            loss = loss + self.perceptual_weight * torch.stack(distances).mean(0)
        return loss

    def _resolutions(self, x_hat: Tensor, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Both images at every resolution, in float32."""
        found = [(x_hat.float(), x.float())]
        for _ in range(1, self.scales):
            a, b = found[-1]
            found.append((functional.avg_pool2d(a, 2), functional.avg_pool2d(b, 2)))
        return found

    def _features(
        self, x_hat: Tensor, x: Tensor, frozen: nn.ModuleDict
    ) -> list[tuple[Tensor, Tensor]]:
        """Maps of both by the perceptual network; none without one."""
        counted = "perceptual" in frozen or not x.is_meta  # `check` builds no such network
        if self.perceptual is None or not counted:
            return []
        network = frozen["perceptual"]
        with torch.no_grad():
            real = network(x)
        return list(zip(network(x_hat), real, strict=True))


def _unit_distance(f: Tensor, g: Tensor) -> Tensor:
    """Squared distances (B, H, W) of unit-length features (B, C, H, W)."""
    f, g = functional.normalize(f.float(), dim=1), functional.normalize(g.float(), dim=1)
    return (f - g).square().sum(dim=1)


def error_weight(path: Interpolant, t: Tensor, space: Space) -> Tensor:
    """Return what an error of the clean latent is multiplied with in another space, squared.

    ||v_hat - v||^2 = w ||x0_hat - x0||^2 with w = (alpha' - sigma' alpha / sigma)^2, which is
    1 / (1 - t)^2 on the linear path; for eps w = (alpha / sigma)^2; for x0 it is 1.

    Args:
        path: The interpolant.
        t: (B,), below 1.
        space: Where errors are measured.

    Returns:
        (B,), positive.

    Source: JiT (Li & He 2025, arXiv 2511.13720), table 1, for the linear path.
    """
    if space == "x0":
        return torch.ones_like(t)
    ratio = path.alpha(t) / path.sigma(t).clamp_min(1e-6)
    if space == "eps":
        return ratio.square()
    return (path.alpha_dot(t) - path.sigma_dot(t) * ratio).square()


def clean_loss(
    guess: Estimate,
    target: Tensor,
    path: Interpolant,
    t: Tensor,
    weight: Space = "x0",
    clamp: float = 400.0,
) -> Tensor:
    """Return the clean estimate's error, the mean of min(w_t, clamp) ||x0_hat - target||^2.

    With weight `v` this has the value of the velocity loss, while the noised latent does not
    appear outside the network: the form that DSD needs.

    Args:
        guess: The denoiser's estimate.
        target: Clean latents, (B, N, D).
        path: The interpolant.
        t: (B,).
        weight: The space whose weight w_t is used; `x0` is unweighted.
        clamp: Largest weight; 400 is that of 1 - t = 0.05 on the linear path.

    Source: loss transformation of DSD (arXiv 2511.14716); the clamp is JiT's.
    """
    w = error_weight(path, t, weight).clamp_max(clamp)  # (B,)
    return (spread(w, target) * (guess.x0.float() - target).square()).mean()


def direct_loss(
    guess: Estimate,
    target: Tensor,
    eps: Tensor,
    path: Interpolant,
    t: Tensor,
    space: Space,
    clamp: float = 400.0,
) -> Tensor:
    """Measure the error in `space` itself, its weight on the clean latent bounded by `clamp`.

    Where gradients flow into z_t but not into `target`, this differs from `clean_loss` in its
    gradient, not in its value: v_hat = (x0_hat - z_t) / (1 - t) carries z_t, v does not.
    Some modes of the latent are then driven to zero; see `docs/explanation/collapse.md`.

    Args:
        guess: The denoiser's estimate.
        target: Clean latents, (B, N, D).
        eps: The noise in z_t, (B, N, D).
        path: The interpolant.
        t: (B,).
        space: What is regressed.
        clamp: As in `clean_loss`.
    """
    if space == "x0":
        return clean_loss(guess, target, path, t)
    if space == "v":
        error = guess.v.float() - path.velocity(target, eps, t)
    else:
        error = guess.eps.float() - eps
    bound = (clamp / error_weight(path, t, space)).clamp_max(1.0)  # (B,)
    return (spread(bound, error) * error.square()).mean()


def unfit_prediction(
    nets: Nets, weight: Space, option: str = "objective.weight"
) -> list[tuple[str, str]]:
    """Report an error in the recipe whose weight on the network's own error has no bound.

    The clean estimate of an eps-network is off by sigma / alpha times its error, and that of a
    score-network by sigma^2 / alpha: next to noise the loss is nothing but these times, unless
    alpha stays clear of 0 or the error is measured, or weighted, as that of `eps`.

    Args:
        nets: The networks, and what they predict.
        weight: The space in which errors are measured or by which they are weighted.
        option: The recipe's key that chooses this space; "" where the objective has no choice.
    """
    if nets.predicts not in ("eps", "score") or weight == "eps":
        return []
    if float(nets.path.alpha(torch.zeros(1))) > 1e-3:
        return []
    cause = f"{option} {weight}" if option else f"the objective's error in {weight}"
    way_out = f"set {option}: eps, or predicts: x0 or v" if option else "set predicts: x0 or v"
    what = (
        f"{nets.predicts} and {cause} multiply the network's error by 1 / alpha(t)^2, which has "
        f"no bound next to noise; {way_out}"
    )
    return [("predicts", what)]


@attrs.frozen(eq=False)
class Noised:
    """A latent at one noise level: z_t and its noise eps, both (B, N, D), and the draw."""

    z_t: Tensor
    eps: Tensor
    draw: Draw

    def denoise(self, taps: tuple[int, ...] = ()) -> Denoise:
        """Return the pass that asks the denoiser about it."""
        return Denoise(z_t=self.z_t, t=self.draw.t, condition=self.draw.condition, taps=taps)

    def estimate(self, out: Tensor, nets: Nets) -> Estimate:
        """Complete the network's answer (B, N, D) to all four forms."""
        return nets.path.estimate(out, self.z_t, self.draw.t, nets.predicts)


def noise_levels(
    z: Tensor, draw: Draw, path: Interpolant, count: int, condition: Condition | None = None
) -> list[Noised]:
    """Noise z (B, N, D) at `count` noise levels, each with its own times and noise.

    The first has the draw's own times and conditions. With `condition`, the images' own, each
    further level drops rows of it anew; without it all levels share what the draw dropped.
    """
    levels = []
    for i in range(count):
        own = draw if i == 0 else draw.again(condition)
        eps = own.noise(z)
        levels.append(Noised(path.mix(z, eps, own.t), eps, own))
    return levels


def mean_clean_loss(
    outs: Sequence[Tensor],
    levels: Sequence[Noised],
    target: Tensor,
    nets: Nets,
    weight: Space,
    clamp: float,
) -> Tensor:
    """Average `clean_loss` of the network's answers over noise levels."""
    losses = [
        clean_loss(n.estimate(out, nets), target, nets.path, n.draw.t, weight, clamp)
        for out, n in zip(outs, levels, strict=True)
    ]
    return torch.stack(losses).mean()


@attrs.frozen(kw_only=True)
class AutoencoderObjective(Objective):
    """An objective whose decoder is trained to give the images back.

    `reconstruction` says how decoded images are compared with the originals.
    """

    reconstruction: PixelLoss = attrs.field(factory=PixelLoss)

    def frozen(self, backbone: Backbone) -> nn.ModuleDict:
        """Return the perceptual network, where one is named."""
        return self.reconstruction.frozen()


@attrs.frozen(kw_only=True)
class DecodeNoise:
    """Noise on the latents before decoding, so that shrinking them costs reconstruction.

    Each image's latent is mixed with noise at a time from U[t_min, 1] with this probability.

    Source: UNITE (arXiv 2603.22283), released code: probability 0.5, t_min 0.7.
    """

    probability: float = attrs.field(default=0.0, validator=[validators.ge(0), validators.le(1)])
    t_min: float = attrs.field(default=0.7, validator=[validators.gt(0), validators.lt(1)])

    def problems(self, nets: Nets) -> list[tuple[str, str]]:
        """Report latents of free scale, for an objective that calls this field `decode_noise`."""
        if self.probability == 0 or nets.online.latent.norm != "none":
            return []
        what = (
            "none lets the encoder outgrow the noise before decoding, which is there to make "
            "latents robust; choose layer, batch or position, of a backbone that has them, such "
            "as vit, or set objective.decode_noise.probability: 0"
        )
        return [("backbone.latent_norm", what)]

    def __call__(self, z: Tensor, draw: Draw, path: Interpolant) -> Tensor:
        """Noise some rows of z (B, N, D); differentiable in z."""
        if self.probability == 0:
            return z
        u = draw.uniform(2, len(z))
        t = torch.where(u[0] < self.probability, self.t_min + (1 - self.t_min) * u[1], 1.0)
        return path.mix(z, draw.noise(z), t)
