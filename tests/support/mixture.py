"""A one-dimensional Gaussian mixture, whose denoiser and whose ODE have closed forms."""

from __future__ import annotations

import torch

from e2ediff.denoiser import Denoiser
from e2ediff.interpolant import spread

WEIGHTS = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
MEANS = torch.tensor([-1.2, 0.4, 1.6], dtype=torch.float64)
STDS = torch.tensor([0.3, 0.25, 0.4], dtype=torch.float64)
NULL = 3


class MixtureDenoiser(Denoiser):
    """The exact denoiser: class k is component k, the null label is all of them.

    `widen` adds to each component's variance, which makes a weaker model of the same data.
    Counts its calls and the rows of each.
    """

    def __init__(self, path, widen: float = 0.0) -> None:
        self._path, self.widen = path, widen
        self.rows: list[int] = []

    @property
    def path(self):
        return self._path

    def __call__(self, z_t, t, condition):
        label = condition.label
        self.rows.append(len(z_t))
        times = torch.full((len(z_t),), t, dtype=z_t.dtype)
        a, s = spread(self._path.alpha(times), z_t), spread(self._path.sigma(times), z_t)
        means, var = MEANS.to(z_t), (STDS.square() + self.widen).to(z_t)
        z, a, s = z_t[..., None], a[..., None], s[..., None]  # (B, N, D, K)
        total = a**2 * var + s**2
        mine = torch.eye(NULL).to(z_t)[label.clamp_max(NULL - 1)]
        prior = torch.where(label[:, None] == NULL, WEIGHTS.to(z_t), mine)[:, None, None]
        logs = prior.log() - total.log() / 2 - (z - a * means) ** 2 / (2 * total)
        posterior = logs.softmax(dim=-1)
        clean = means + a * var / total * (z - a * means)
        return self._path.estimate((posterior * clean).sum(dim=-1), z_t, times, "x0")


def cdf(x: torch.Tensor) -> torch.Tensor:
    """The mixture's distribution function, any shape."""
    parts = torch.special.ndtr((x.double()[..., None] - MEANS) / STDS)
    return (WEIGHTS * parts).sum(dim=-1)


def normal_quantiles(n: int) -> torch.Tensor:
    """Quantiles of the unit normal at (i + 1/2) / n, (n, 1, 1), float64."""
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return torch.special.ndtri(u).reshape(n, 1, 1)
