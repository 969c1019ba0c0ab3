"""Every sampler of core on a Gaussian mixture: order, distribution, grids, and what it costs."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from e2ediff_testing import make_nets
from hypothesis import given
from hypothesis import strategies as st
from mixture import (
    PATHS,
    MixtureDenoiser,
    anything,
    asks_once_where_it_begins,
    each_path,
    mean_error,
    measured_order,
    normal_quantiles,
    quantile_error,
    silent,
    trajectory_end,
)

from e2ediff.condition import Labels
from e2ediff.denoiser import Plain
from e2ediff.parts.interpolants import Linear, VarianceExploding
from e2ediff.parts.samplers import RK4, Euler, Heun, Midpoint
from e2ediff.sampler import Karras

# Order


@each_path
@pytest.mark.parametrize(
    ("sampler", "order"),
    [(Euler(), 1), (Heun(), 2), (Midpoint(), 2), (RK4(), 4)],
    ids=["euler", "heun", "midpoint", "rk4"],
)
def test_halving_the_steps_divides_the_error_by_two_to_the_order(path, sampler, order) -> None:
    """Against 512 steps of RK4, in float64."""
    found = measured_order(sampler, path, trajectory_end(RK4(), path, 512), 80)
    assert found == pytest.approx(order, abs=0.35)


# The law of the samples


@pytest.mark.parametrize("path", PATHS[:2], ids=["linear", "cosine"])
@pytest.mark.parametrize("sampler", [
    Euler(steps=400), Heun(steps=100), Midpoint(steps=100), RK4(steps=50),
    Heun(steps=60, spacing=Karras(rho=3.0)), Heun(steps=100, shift=0.5),
], ids=lambda s: f"{type(s).__name__}-{getattr(s, 'spacing', '')}"[:24])  # fmt: skip
def test_the_ode_carries_quantiles_of_noise_to_quantiles_of_the_mixture(path, sampler) -> None:
    """The clean estimate of the last interval pulls samples together, least in fine last ones."""
    assert quantile_error(sampler, path) < 0.02


def test_exploding_variance_reaches_the_mixture_too() -> None:
    """sigma_max 10 starts at N(0, 100), where N(0.2, 101) would be exact: 0.01 of probability."""
    sampler = Heun(steps=60, spacing="karras")
    assert quantile_error(sampler, VarianceExploding(sigma_max=10.0)) < 0.03


# Grids and costs


@given(
    steps=st.integers(1, 60), rho=st.floats(0.5, 50.0), t_start=st.sampled_from([0.0, 0.05, 0.3])
)
@each_path
def test_karras_times_rise_and_their_noise_levels_fall_as_asked(path, steps, rho, t_start) -> None:
    grid = Euler(steps=steps, spacing=Karras(rho=rho), t_start=t_start).grid(path)
    assert (len(grid), grid[0], grid[-1]) == (steps + 1, t_start, 1.0)
    assert all(a < b for a, b in pairwise(grid))
    inner = torch.tensor(grid[1:-1], dtype=torch.float64)
    levels = (path.sigma(inner) / path.alpha(inner)) ** (1 / rho)
    if steps > 3:
        drops = -levels.diff()
        torch.testing.assert_close(drops, drops.mean().expand_as(drops), rtol=1e-5, atol=1e-7)
        assert levels[-1].item() ** rho == pytest.approx(0.002, rel=1e-6)


def test_a_grid_without_a_path_is_that_of_the_straight_one() -> None:
    sampler = Heun(steps=9, spacing="karras")
    torch.testing.assert_close(torch.tensor(sampler.grid()), torch.tensor(sampler.grid(Linear())))


def test_options_of_a_grid_that_contradict_one_another_are_refused() -> None:
    with pytest.raises(ValueError, match="warps the uniform spacing alone"):
        Euler(spacing="karras", shift=0.5)
    with pytest.raises(ValueError, match="'sigma_max' must be > sigma_min"):
        Karras(sigma_min=2.0, sigma_max=1.0)


@pytest.mark.parametrize(
    ("sampler", "calls"),
    [(Euler(steps=7), 7), (Heun(steps=7), 13), (Midpoint(steps=7), 13), (RK4(steps=7), 25)],
    ids=lambda s: type(s).__name__,
)
def test_a_sampler_costs_the_calls_it_says(sampler, calls) -> None:
    f = Plain(make_nets().online, Linear(), "x0")
    sampler.sample(f, torch.zeros(2, 4, 6), Labels(torch.zeros(2).long(), 4), torch.randn_like)
    assert (f.calls, f.rows) == (calls, 2 * calls)


@pytest.mark.parametrize(
    "sampler", [Euler(), Heun(), Midpoint(), RK4()], ids=lambda s: type(s).__name__
)
def test_a_sampler_that_asks_once_asks_where_its_step_begins(sampler) -> None:
    asks_once_where_it_begins(sampler)


def test_at_equal_calls_the_higher_order_is_nearer() -> None:
    """Twenty calls on the linear path, by noise level; what the orders are for."""
    levels = Karras(sigma_min=0.02)
    exact = RK4(steps=300, spacing=levels).sample(
        MixtureDenoiser(Linear()), normal_quantiles(101), anything(101), silent
    )
    euler, heun = (
        mean_error(s, exact)
        for s in (Euler(steps=20, spacing=levels), Heun(steps=10, spacing=levels))
    )
    assert heun < euler / 2
