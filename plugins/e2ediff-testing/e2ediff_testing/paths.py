"""Checks of interpolants and of time samplers."""

from __future__ import annotations

import math

import torch

from e2ediff.interpolant import Interpolant
from e2ediff.times import MARGIN, TimeSampler
from e2ediff_testing.claims import is_float32, own_randomness


def check_interpolant(i: Interpolant) -> None:
    """Check ends, derivatives, rising signal-to-noise ratio, shapes and types."""
    name = type(i).__name__
    one, u = torch.ones(1, dtype=torch.float64), torch.linspace(0.001, 0.999, 997).double()
    ends = float(i.alpha(one)), float(i.sigma(one))
    assert math.dist(ends, (1, 0)) < 1e-12, f"{name}: alpha, sigma at t = 1 are {ends}, not (1, 0)"
    for f, dot in ((i.alpha, i.alpha_dot), (i.sigma, i.sigma_dot)):
        t = u.clone().requires_grad_()
        with own_randomness(i):
            value = f(t)
        for x in (u.float(), u):
            for kind, y in (("value", f(x)), ("derivative", dot(x))):
                seen = f"{name}: a coefficient's {kind} is {tuple(y.shape)} {y.dtype}"
                assert (y.shape, y.dtype) == (x.shape, x.dtype), f"{seen}; return what t is"
        slope = torch.zeros_like(u)
        if value.requires_grad:
            (slope,) = torch.autograd.grad(value.sum(), t)
        gap = ((slope - dot(u)).abs() / (1 + slope.abs())).max()
        assert gap < 1e-6, f"{name}: {dot.__name__} is off autograd's derivative by {gap:.2g}"
        assert torch.equal(t.detach(), u), f"{name}: {f.__name__} writes into t; leave it alone"
    assert (i.logsnr(u).diff() > 0).all(), f"{name}: alpha / sigma must rise strictly with t"


def check_times(t: TimeSampler) -> None:
    """Check for a rising quantile in [0, 1], and draws from the given generator alone."""
    name, cpu, u = type(t).__name__, torch.device("cpu"), torch.linspace(1e-4, 1 - 1e-4, 999)
    q = t.quantile(u)
    is_float32(q, (999,), f"{name}: quantile(u)")
    assert ((q >= 0) & (q <= 1)).all(), f"{name}: a quantile lies outside [0, 1]"
    assert (q.diff() >= 0).all(), f"{name}: quantile must not fall as u rises"
    g, counted = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    with own_randomness(t):
        drawn = t.draw(50, g, cpu)
    is_float32(drawn, (50,), f"{name}: draw(50)")
    assert MARGIN <= drawn.min() <= drawn.max() <= 1 - MARGIN, f"{name}: keep MARGIN from the ends"
    torch.rand(50, generator=counted)
    assert torch.equal(g.get_state(), counted.get_state()), f"{name}: draw n uniform numbers for n"
