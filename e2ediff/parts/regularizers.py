"""Regularisers against collapsed latents.

Each takes a matrix of n rows: every token (`of: token`), or every image with its tokens side
by side (`of: image`).

Shapes: B batch, N latent tokens, D latent channels; n rows of d columns.
"""

from __future__ import annotations

import math
from typing import ClassVar

import attrs
import torch
from attrs import validators
from torch import Tensor
from typing_extensions import override

from e2ediff.objective import Draw, sg
from e2ediff.regularizer import Regularizer, Rows, rows_of

_WEIGHT = validators.ge(0.0)
_POSITIVE = validators.gt(0.0)


@attrs.frozen(kw_only=True)
class VICReg(Regularizer):
    """Hinge on the standard deviation of each channel, and decorrelation of the channels.

        variance    1/d sum_j max(0, floor - sqrt(Var(z^j) + 1e-4))
        covariance  1/d sum_{i != j} C_ij^2,   C the covariance of the rows

    `weight` multiplies `variance_weight` times the first plus `covariance_weight` times the
    second; `floor` is the standard deviation asked for.
    `of` says what a row is: each `token`, or each `image`.

    Source: Bardes et al. 2022 (VICReg, arXiv 2105.04906), eqs. 1 to 4, with their ratio 25 to 1;
    the overall weight is ours. There is no invariance term: there are no two views.
    """

    term: ClassVar[str] = "vicreg"

    weight: float = attrs.field(default=0.1, validator=_WEIGHT)
    variance_weight: float = attrs.field(default=1.0, validator=_WEIGHT)
    covariance_weight: float = attrs.field(default=0.04, validator=_WEIGHT)
    floor: float = attrs.field(default=1.0, validator=_POSITIVE)
    of: Rows = "token"

    @override
    def loss(self, z: Tensor, draw: Draw) -> Tensor:
        rows = rows_of(z, self.of)
        centred = rows - rows.mean(dim=0)
        variance = centred.square().sum(dim=0) / (len(rows) - 1)  # (d,)
        hinge = torch.relu(self.floor - (variance + 1e-4).sqrt()).mean()
        # Without its diagonal; |C|_F is the same of the smaller of the two Gram matrices.
        tall = len(rows) > rows.shape[1]
        gram = (centred.mT @ centred if tall else centred @ centred.mT) / (len(rows) - 1)
        off = (gram.square().sum() - variance.square().sum()) / rows.shape[1]
        return self.variance_weight * hinge + self.covariance_weight * off


@attrs.frozen(kw_only=True)
class SIGReg(Regularizer):
    """Gaussianity of random one-dimensional projections, by the Epps-Pulley statistic.

        n integral |phi_n(s) - exp(-s^2 / 2)|^2 exp(-s^2 / 2) ds,   phi_n(s) = mean exp(i s a.z)

    averaged over `directions` unit vectors a, drawn anew in each step; the integral runs over
    [-`reach`, `reach`] by the trapezoid rule with `points` points.
    For normal rows its mean is 1.06, whatever their number.
    `weight` multiplies it.
    `of` says what a row is: each `token`, or each `image`.

    Source: Balestriero & LeCun 2025 (LeJEPA, arXiv 2511.08544), SIGReg with its 17 points on
    [-5, 5]; Epps & Pulley 1983 for the statistic. The numbers of directions and the weight are
    ours.
    """

    term: ClassVar[str] = "sigreg"

    weight: float = attrs.field(default=0.02, validator=_WEIGHT)
    directions: int = attrs.field(default=256, validator=validators.ge(1))
    points: int = attrs.field(default=17, validator=validators.ge(3))
    reach: float = attrs.field(default=5.0, validator=_POSITIVE)
    of: Rows = "token"

    def loss(self, z: Tensor, draw: Draw) -> Tensor:
        """The statistic of the rows, averaged over directions."""
        rows = rows_of(z, self.of)
        a = draw.noise(rows.new_empty(rows.shape[1], self.directions))
        return epps_pulley(rows @ (a / a.norm(dim=0)), self.points, self.reach).mean()


def epps_pulley(x: Tensor, points: int = 17, reach: float = 5.0) -> Tensor:
    """Epps-Pulley statistics of columns x (n, k) against N(0, 1), (k,); 0 for a perfect fit.

    Integrated over half of the symmetric range and doubled, one point at a time: never more
    than (n, k) numbers at once.
    """
    step = 2 * reach / (points - 1)
    total = torch.zeros_like(x[0])
    for k in range(points // 2):  # from the far end; at s = 0 both functions are 1
        s = reach - k * step
        normal = math.exp(-s * s / 2)  # the normal's characteristic function, and the weight
        error = (torch.cos(s * x).mean(dim=0) - normal).square()
        error = error + torch.sin(s * x).mean(dim=0).square()
        total = total + normal * step * (1 if k == 0 else 2) * error  # both ends count half
    return len(x) * total


@attrs.frozen(kw_only=True)
class VarianceExpansion(Regularizer):
    """A penalty on small variance that grows as it vanishes: mean 1 / (Var + `delta`).

    `weight` multiplies it; `delta` bounds it by 1 / delta.
    `of` says what a row is: each `token`, or each `image`; the variance is that of a channel
    over the rows.

    Source: the form 1 / (sigma^2 + delta) of Li et al. 2026 (Variance Expansion, arXiv
    2603.21085). There sigma^2 is the variance that a VAE's encoder predicts for one image; its
    use on the variance over a batch of deterministic latents, delta and the weight are ours.
    """

    weight: float = attrs.field(default=0.01, validator=_WEIGHT)
    delta: float = attrs.field(default=0.01, validator=_POSITIVE)
    of: Rows = "image"

    @override
    def loss(self, z: Tensor, draw: Draw) -> Tensor:
        return (1 / (rows_of(z, self.of).var(dim=0) + self.delta)).mean()


@attrs.frozen(kw_only=True)
class RankFilter(Regularizer):
    """Pulls the latents towards themselves with their weak modes raised.

    With the singular value decomposition Z = U diag(s) V^T of the centred rows, the target is
    sg(c U diag(s^(1 + `power`)) V^T), c keeping its Frobenius norm, and the loss the mean
    squared distance to it: 0 for equal singular values.
    `power` lies in [-1, 0): -1 whitens, 0 would change nothing.
    `weight` multiplies the loss.
    `of` says what a row is: each `token`, or each `image`.

    Source: the high-pass target filter of Zhuo et al. 2023 (Rank Differential Mechanism, arXiv
    2303.02387). Ours: its use as a loss beside any objective, centring, the kept norm, and that
    singular values below 1e-3 of the largest are raised no more than it.
    """

    weight: float = attrs.field(default=0.1, validator=_WEIGHT)
    power: float = attrs.field(default=-0.5, validator=[validators.ge(-1.0), validators.lt(0.0)])
    of: Rows = "token"

    def loss(self, z: Tensor, draw: Draw) -> Tensor:
        """Mean squared distance of the centred rows to their filtered selves."""
        rows = rows_of(z, self.of)
        centred = rows - rows.mean(dim=0)
        return (centred - self.target(sg(centred))).square().mean()

    def target(self, centred: Tensor) -> Tensor:
        """The filtered rows (n, d), by the eigenvectors of the smaller Gram matrix."""
        tall = len(centred) > centred.shape[1]
        squares, modes = torch.linalg.eigh(centred.mT @ centred if tall else centred @ centred.mT)
        squares = squares.clamp_min(1e-6 * squares[-1:] + 1e-12)
        gain = modes * squares.pow(self.power / 2) @ modes.mT
        filtered: Tensor = centred @ gain if tall else gain @ centred
        scale: Tensor = centred.norm() / filtered.norm().clamp_min(1e-12)
        return filtered * scale


@attrs.frozen(kw_only=True)
class Dispersive(Regularizer):
    """Repulsion of latents from one another: log mean exp(-|z_i - z_j|^2 / (d tau)).

    The mean runs over all pairs of images, each with itself included, so that the loss lies
    between log(1 / B) and 0, where all are one; d is the number of columns.
    `temperature` is tau and `weight` multiplies the loss.
    `of` says what is compared: whole latents (`image`), or tokens at the same position, averaged
    over positions (`token`).

    Source: Wang & He 2025 (Diffuse and Disperse, arXiv 2506.09027), the InfoNCE form with
    squared distances, tau 0.5 and weight 0.5 there. Its use on the encoder's latents instead of
    a denoiser's activations, and comparing by position, are ours.
    """

    weight: float = attrs.field(default=0.1, validator=_WEIGHT)
    temperature: float = attrs.field(default=0.5, validator=_POSITIVE)
    of: Rows = "image"

    def loss(self, z: Tensor, draw: Draw) -> Tensor:
        """The mean over positions, of which whole images have one."""
        rows = z.float().transpose(0, 1) if self.of == "token" else z.float().flatten(1)[None]
        size = rows.square().sum(dim=-1)  # (N or 1, B)
        apart = size[:, :, None] + size[:, None] - 2 * rows @ rows.mT  # (N or 1, B, B)
        # Exactly 0 on the diagonal, where the difference of large numbers leaves their rounding.
        apart = apart.clamp_min(0) * (1 - torch.eye(len(z), device=z.device))
        scaled = apart / (rows.shape[-1] * self.temperature)
        return torch.log(torch.exp(-scaled).mean(dim=(1, 2))).mean()
