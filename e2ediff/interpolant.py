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
from functools import lru_cache
from typing import Generic, Literal, NamedTuple, TypeVar, get_args

import attrs
import torch
from torch import Tensor

Kind = Literal["x0", "eps", "v", "score"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# Below this a coefficient counts as zero: the quotient is then bounded instead of infinite.
# float32 near the data end keeps about 1e-7 / 1e-6 of relative accuracy.
_SMALLEST = 1e-6


_W = TypeVar("_W", Tensor, float)


class _Weights(NamedTuple, Generic[_W]):
    """A path's coefficients at a time, and what is divided by; `determinant` is never 0."""

    alpha: _W
    sigma: _W
    alpha_dot: _W
    sigma_dot: _W
    over_alpha: _W
    over_sigma: _W
    determinant: _W


def _weights(path: Interpolant, t: Tensor) -> _Weights[Tensor]:
    a, s, a_dot, s_dot = path.alpha(t), path.sigma(t), path.alpha_dot(t), path.sigma_dot(t)
    over_a, over_s = a.clamp_min(_SMALLEST), s.clamp_min(_SMALLEST)
    # The determinant is negative for every rising logSNR.
    return _Weights(a, s, a_dot, s_dot, over_a, over_s, a * s_dot - a_dot * s)


@lru_cache(maxsize=256)
def _numbers(path: Interpolant, t: float, dtype: torch.dtype) -> _Weights[float]:
    """Compute them on the CPU, once for all latents at this time."""
    return _Weights(*map(float, _weights(path, torch.tensor([t], dtype=dtype))))


@attrs.frozen(eq=False)
class Estimate:
    """One guess about a noised latent, in its four equivalent forms, each (B, *).

    `x0` is the clean latent, `eps` the noise, `v` the velocity dz/dt and `score` the gradient
    of the log-density of z_t; each is computed when it is asked for, as most callers need one.
    The four are consistent: alpha x0 + sigma eps = z_t and alpha' x0 + sigma' eps = v.
    `Interpolant.estimate` makes it.

    Raises, where a form is asked for:
        RuntimeError: z_t or the guess was changed in place since, so that its forms are lost.
    """

    _path: Interpolant
    _value: Tensor
    _z_t: Tensor
    _t: Tensor | float
    _kind: Kind
    _made_at: tuple[int, int] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "_made_at", (_changes(self._value), _changes(self._z_t)))

    @property
    def x0(self) -> Tensor:
        """Return the clean latent, (B, *)."""
        return self._value if self._kind == "x0" else self._x0(self._weights())

    @property
    def eps(self) -> Tensor:
        """Return the noise, (B, *)."""
        return self._value if self._kind == "eps" else self._eps(self._weights())

    @property
    def v(self) -> Tensor:
        """Return the velocity dz/dt, (B, *)."""
        if self._kind == "v":
            return self._value
        w = self._weights()
        return w.alpha_dot * self._x0(w) + w.sigma_dot * self._eps(w)

    @property
    def score(self) -> Tensor:
        """Return the gradient of the log-density of z_t, (B, *)."""
        if self._kind == "score":
            return self._value
        w = self._weights()
        return -self._eps(w) / w.over_sigma

    def _x0(self, w: _Weights[Tensor] | _Weights[float]) -> Tensor:
        if self._kind == "x0":
            return self._value
        if self._kind == "v":
            return (w.sigma_dot * self._z_t - w.sigma * self._value) / w.determinant
        return (self._z_t - w.sigma * self._eps(w)) / w.over_alpha

    def _eps(self, w: _Weights[Tensor] | _Weights[float]) -> Tensor:
        if self._kind == "x0":
            return (self._z_t - w.alpha * self._value) / w.over_sigma
        if self._kind == "v":
            return (w.alpha * self._value - w.alpha_dot * self._z_t) / w.determinant
        return self._value if self._kind == "eps" else -w.sigma * self._value

    def _weights(self) -> _Weights[Tensor] | _Weights[float]:
        """Return numbers where all rows share a time, else tensors shaped like the latent."""
        if (_changes(self._value), _changes(self._z_t)) != self._made_at:
            raise RuntimeError(
                "an estimate's z_t or its guess was changed in place before another of its forms "
                "was asked for: ask for it before, or change a copy"
            )
        path, t = self._path, self._t
        if isinstance(t, Tensor):
            return _Weights(*(spread(one, self._z_t) for one in _weights(path, t)))
        dtype = torch.float64 if self._z_t.dtype == torch.float64 else torch.float32
        try:
            return _numbers(path, t, dtype)
        except TypeError:  # a plugin's path need not be hashable
            return _numbers.__wrapped__(path, t, dtype)


def _changes(x: Tensor) -> int:
    """Return how often a tensor was changed in place; 0 where torch does not count that."""
    return 0 if x.is_inference() or torch.compiler.is_compiling() else x._version


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

    def estimate(self, value: Tensor, z_t: Tensor, t: Tensor | float, kind: Kind) -> Estimate:
        """Complete a prediction of one kind to all four, by one 2x2 solve.

        The unknowns are x0 and eps; the equations are alpha x0 + sigma eps = z_t and what
        `kind` says of `value`.
        For v the determinant alpha sigma' - alpha' sigma never vanishes (it is -1 on the linear
        path), so v -> eps needs no division by sigma.

        Args:
            value: The network's output, (B, *), read as `kind`.
            z_t: The noised latent that the network saw, (B, *).
            t: Time in [0, 1], (B,) or (B, N), or one number for all rows.
            kind: What `value` is.

        Returns:
            An `Estimate`, differentiable in value and z_t.
            Where a coefficient is zero (eps from x0 at t = 1, x0 from eps at t = 0 on the
            linear path) the answer is bounded and of no use.
        """
        if not isinstance(t, Tensor) and value.dtype != z_t.dtype:
            # Numbers do not widen a type, as tensors do.
            value = value.to(torch.promote_types(value.dtype, z_t.dtype))
        return Estimate(self, value, z_t, t, kind)


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
