"""Checks of samplers and of guidance."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from e2ediff.condition import ClassLabels, Condition, Labels
from e2ediff.guidance import Guidance
from e2ediff.interpolant import Estimate
from e2ediff.parts.interpolants import Linear
from e2ediff.sampler import Sampler
from e2ediff_testing.claims import is_float32, own_randomness
from e2ediff_testing.tiny import GaussianDenoiser


def check_sampler(s: Sampler) -> None:
    """Check for a rising grid; exact for one point, near a Gaussian's closed form, repeatable."""
    name, grid, g = type(s).__name__, s.grid(), torch.Generator().manual_seed(5)
    ends = (len(grid), grid[0], round(grid[-1], 9))
    assert ends == (s.steps + 1, 0, 1), f"{name}: grid() is {grid}; give steps + 1, from 0 to 1"
    assert all(a < b for a, b in itertools.pairwise(grid)), f"{name}: grid() must rise"
    start = torch.randn(4096, 1, 2, generator=g)
    condition = ClassLabels(1).example(len(start))
    kept = start.clone()

    def sample(std: float) -> Tensor:
        fresh = torch.Generator().manual_seed(6)
        f = GaussianDenoiser(Linear(), 1.0, std)
        return s.sample(f, start, condition, lambda like: torch.randn(like.shape, generator=fresh))

    with own_randomness(s):
        point = sample(0.0)
    is_float32(point, tuple(start.shape), f"{name}: sample()")
    assert (point - 1).abs().max() < 1e-3, f"{name}: data at 1 alone give samples off by > 0.001"
    z = sample(0.5)
    assert torch.equal(z, sample(0.5)), f"{name}: use only the noise that is handed over"
    seen = (round(float(z.mean()), 3), round(float(z.std()), 3))
    # Euler's std is off by less than 1.2 / steps here; 0.03 is the error of 4096 samples.
    close = math.dist(seen, (1, 0.5)) < 0.03 + 1.2 / s.steps
    assert close, f"{name}: N(1, 0.5^2) is sampled as mean, std = {seen}"
    assert torch.equal(start, kept), f"{name}: step() writes into z; return a new tensor"


class _Noting(GaussianDenoiser):
    """Notes whether it is asked without a condition for one of the first two of three rows."""

    asked_null = False

    def __call__(self, z_t: Tensor, t: float, condition: Condition) -> Estimate:
        self.asked_null |= bool(condition.nulls().view(-1, 3)[:, :2].any())
        return super().__call__(z_t, t, condition)


def check_guidance(g: Guidance) -> None:
    """Check for the same path, one consistent and repeatable estimate, inputs left alone.

    One that asks for answers without a condition must declare `asks_null`.
    """
    name, inner = type(g).__name__, _Noting(Linear(), 1.0, 0.5)
    others = {reference: GaussianDenoiser(Linear(), 0.8, 0.7) for reference in g.references}
    f, condition = g.with_references(others).wrap(inner), Labels(torch.tensor([0, 1, 4]), 4)
    assert f.path is inner.path, f"{name}: the guided denoiser must keep the inner path"
    f = f.for_step(0.0, 0.5)
    for t in (0.01, 0.5, 0.99):
        z_t = torch.linspace(-1, 2, 12).reshape(3, 2, 2)
        kept, times = z_t.clone(), torch.full((3,), t)
        with own_randomness(g):
            e, again = f(z_t, t, condition), f(z_t, t, condition)
        for key in ("x0", "eps", "v", "score"):
            is_float32(getattr(e, key), (3, 2, 2), f"{name}: {key} at t = {t}")
        assert torch.equal(e.x0, again.x0), f"{name}: the same question had two answers"
        assert torch.equal(z_t, kept), f"{name}: z_t was written to; return new tensors"
        gap = max(
            float((f.path.mix(e.x0, e.eps, times) - z_t).abs().max()),
            float((f.path.velocity(e.x0, e.eps, times) - e.v).abs().max()),
        )
        assert gap < 1e-3, f"{name}: x0, eps and v disagree by {gap:.2g}; use path.estimate"
    assert g.asks_null or not inner.asked_null, (
        f"{name}: it asks for answers without a condition; return True from `asks_null`, so that "
        "recipes with label_drop: 0 are refused"
    )
