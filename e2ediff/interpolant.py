"""The interpolant (noise schedule): how data and noise are mixed, and read back.

Time runs from t = 0 (noise) to t = 1 (data), as in DSD, UNITE, JiT, SiT's code and
flow_matching.
DDPM, SD3, REPA and EDM count the other way; their t is our 1 - t.

Shapes: B batch, * any trailing dimensions (for latents N, D).
Times are (B,), one for each latent, or (B, N), one for each of its tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, get_args

import attrs
import torch
from torch import Tensor

Kind = Literal["x0", "eps", "v", "score"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# Below this a coefficient counts as zero: the quotient is then bounded instead of infinite.
# float32 near the data end keeps about 1e-7 / 1e-6 of relative accuracy.
_SMALLEST = 1e-6


@attrs.frozen
class Estimate:
    """One guess about a noised latent, in its four equivalent forms, each (B, *).

    `x0` is the clean latent, `eps` the noise, `v` the velocity dz/dt and `score` the gradient
    of the log-density of z_t.
    The four are consistent: alpha x0 + sigma eps = z_t and alpha' x0 + sigma' eps = v.
    """

    x0: Tensor
    eps: Tensor
    v: Tensor
    score: Tensor


class Interpolant(ABC):
    """z_t = alpha(t) x0 + sigma(t) eps.

    A subclass gives the two coefficients and their derivatives; everything else follows.
    alpha(1) = 1 and sigma(1) = 0, and alpha / sigma rises with t.

    Source: Albergo, Boffi, Vanden-Eijnden 2023 (arXiv 2303.08797), eq. 2.1 without the
    latent variable; Ma et al. 2024 (SiT, arXiv 2401.08740), eq. 2 with t counted from noise.
    """

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Weight of the data, (B,) -> (B,)."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Weight of the noise, (B,) -> (B,)."""

    @abstractmethod
    def alpha_dot(self, t: Tensor) -> Tensor:
        """d alpha / dt, (B,) -> (B,)."""

    @abstractmethod
    def sigma_dot(self, t: Tensor) -> Tensor:
        """d sigma / dt, (B,) -> (B,)."""

    def logsnr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2), (B,) -> (B,), strictly rising in t; bounded at both ends."""
        a = self.alpha(t).clamp_min(_SMALLEST)
        s = self.sigma(t).clamp_min(_SMALLEST)
        return 2 * (a.log() - s.log())

    def mix(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Noised latent z_t = alpha x0 + sigma eps.

        Args:
            x0: Clean latent, (B, *).
            eps: Noise, (B, *), unit normal.
            t: Time, (B,) or (B, N), in [0, 1]; 1 is data.

        Returns:
            (B, *), differentiable in x0 and eps.
        """
        return spread(self.alpha(t), x0) * x0 + spread(self.sigma(t), eps) * eps

    def velocity(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Velocity dz_t/dt = alpha' x0 + sigma' eps, (B, *), the target of a v-prediction."""
        return spread(self.alpha_dot(t), x0) * x0 + spread(self.sigma_dot(t), eps) * eps

    def estimate(self, value: Tensor, z_t: Tensor, t: Tensor, kind: Kind) -> Estimate:
        """Complete a prediction of one kind to all four, by one 2x2 solve.

        The unknowns are x0 and eps; the equations are alpha x0 + sigma eps = z_t and what
        `kind` says of `value`.
        For v the determinant alpha sigma' - alpha' sigma never vanishes (it is -1 on the linear
        path), so v -> eps needs no division by sigma.

        Args:
            value: The network's output, (B, *), read as `kind`.
            z_t: The noised latent that the network saw, (B, *).
            t: Time, (B,) or (B, N), in [0, 1].
            kind: What `value` is.

        Returns:
            An `Estimate`, differentiable in value and z_t.
            Where a coefficient is zero (eps from x0 at t = 1, x0 from eps at t = 0 on the
            linear path) the answer is bounded and of no use.
        """
        a, s = spread(self.alpha(t), z_t), spread(self.sigma(t), z_t)
        a_dot, s_dot = spread(self.alpha_dot(t), z_t), spread(self.sigma_dot(t), z_t)
        over_s = s.clamp_min(_SMALLEST)
        if kind == "x0":
            x0, eps = value, (z_t - a * value) / over_s
        elif kind == "v":
            det = a * s_dot - a_dot * s  # negative for every rising logSNR
            x0 = (s_dot * z_t - s * value) / det
            eps = (a * value - a_dot * z_t) / det
        else:
            eps = value if kind == "eps" else -s * value
            x0 = (z_t - s * eps) / a.clamp_min(_SMALLEST)
        v = value if kind == "v" else a_dot * x0 + s_dot * eps
        score = value if kind == "score" else -eps / over_s
        return Estimate(x0=x0, eps=eps, v=v, score=score)


def spread(coefficient: Tensor, like: Tensor) -> Tensor:
    """A coefficient shaped so that it multiplies `like` (B, *).

    (B,) becomes (B, 1, ..., 1); one for each token, (B, N), becomes (B, N, 1) for latents.
    """
    return coefficient.reshape(*coefficient.shape, *([1] * (like.ndim - coefficient.ndim)))


def last_time(before: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """The times in [0, 1] up to which a condition holds, by bisection, to float64's last places.

    Args:
        before: Of times (n,), which of them lie before the wanted ones, (n,), bool; true up to
            one time, false from there on.
        like: Shape (n,), type and device of the times; float64 for all the places.
    """
    low, high = torch.zeros_like(like), torch.ones_like(like)
    for _ in range(60):
        middle = (low + high) / 2
        early = before(middle)
        low, high = torch.where(early, middle, low), torch.where(early, high, middle)
    return (low + high) / 2
