"""A one-dimensional Gaussian mixture, whose denoiser and whose ODE have closed forms."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch

from e2ediff.condition import Labels
from e2ediff.denoiser import Denoiser
from e2ediff.guidance import Guidance
from e2ediff.interpolant import spread
from e2ediff.parts.interpolants import Cosine, Linear, VarianceExploding
from e2ediff.sampler import Karras, Sampler

PATHS = [Linear(), Cosine(), VarianceExploding(sigma_max=10.0)]
each_path = pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)

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


LABELS = Labels(torch.tensor([0, 2, 1, 0]), NULL)
Z_T = torch.tensor([[-0.4], [1.1], [0.2], [2.0]], dtype=torch.float64)[..., None].repeat(1, 3, 2)
Z_T[:, 1] *= 0.5
Z_T[..., 1] += 0.3
"""Noised latents (4, 3, 2) of which no two are equal, for LABELS."""


def cdf(x: torch.Tensor) -> torch.Tensor:
    """The mixture's distribution function, any shape."""
    parts = torch.special.ndtr((x.double()[..., None] - MEANS) / STDS)
    return (WEIGHTS * parts).sum(dim=-1)


def normal_quantiles(n: int) -> torch.Tensor:
    """Quantiles of the unit normal at (i + 1/2) / n, (n, 1, 1), float64."""
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return torch.special.ndtri(u).reshape(n, 1, 1)


def silent(like: torch.Tensor) -> torch.Tensor:
    """The noise of a sampler of the ODE, which draws none."""
    raise AssertionError("a sampler of the ODE draws no noise")


def anything(n: int) -> Labels:
    """The null label, n times."""
    return Labels(torch.full((n,), NULL), NULL)


@cache  # the finest one is the goal of many samplers
def trajectory_end(solver: Sampler, path, n: int) -> torch.Tensor:
    """Nine trajectories from t = 0.1 down to noise level 0.1, in n steps by noise level."""
    times = Karras(sigma_min=0.1).times(n + 1, 0.1, path)[:-1]
    start = normal_quantiles(9) * path.sigma(torch.tensor(0.1).double())
    return solver.integrate(MixtureDenoiser(path), start, times, anything(9), silent)


def measured_order(sampler: Sampler, path, goal: torch.Tensor, n: int) -> float:
    """The exponent by which the error falls from n to 2 n steps of `trajectory_end`."""
    errors = [(trajectory_end(sampler, path, k) - goal).abs().max().item() for k in (n, 2 * n)]
    return math.log2(errors[0] / errors[1])


def quantile_error(sampler: Sampler, path) -> float:
    """How far a sampler of the ODE carries quantiles of noise from quantiles of the mixture.

    In one dimension the flow is monotone, so its map is known exactly; a map that is not monotone
    fails here.
    """
    noise = normal_quantiles(201)
    found = sampler.sample(MixtureDenoiser(path), noise, anything(201), silent).flatten()
    assert (found.diff() > 0).all()
    return (cdf(found) - torch.special.ndtr(noise.flatten())).abs().max().item()


def mean_error(sampler: Sampler, exact: torch.Tensor) -> float:
    """Mean distance from `exact` of what a sampler makes of as many quantiles of the noise."""
    n = len(exact)
    found = sampler.sample(MixtureDenoiser(PATHS[0]), normal_quantiles(n), anything(n), silent)
    return (found - exact).abs().mean().item()


def asks_once_where_it_begins(sampler: Sampler) -> None:
    """Fails unless `one_call_per_step` says whether each step asks once, where it begins."""
    asked = []

    class Noting(MixtureDenoiser):
        def __call__(self, z_t, t, condition):
            asked.append(t)
            return super().__call__(z_t, t, condition)

    times = [0.1, 0.3, 0.5]
    start = normal_quantiles(4)
    sampler.integrate(Noting(Linear()), start, times, anything(4), torch.zeros_like)
    assert (asked == times[:-1]) is sampler.one_call_per_step


def doubt(sampler: Sampler, label: int, guidance: Guidance | None) -> float:
    """Mean posterior probability of the other classes at samples of a class, linear path."""
    noise, inner = normal_quantiles(64), MixtureDenoiser(Linear())
    f = inner if guidance is None else guidance.wrap(inner)
    z = sampler.sample(f, noise, Labels(torch.full((64,), label), NULL), silent)
    logs = -STDS.log() - (z - MEANS) ** 2 / (2 * STDS**2)
    return 1 - logs.flatten(0, 1).softmax(dim=-1)[:, label].mean().item()
