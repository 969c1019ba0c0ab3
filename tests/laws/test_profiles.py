"""Power-function averages: what they hold, and what is made of them afterwards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from e2ediff_testing import make_nets
from hypothesis import given
from hypothesis import strategies as st

from e2ediff.model.averages import Average
from e2ediff.model.power_averages import (
    TOLERANCE,
    Point,
    inner_products,
    mixture,
    reachable,
    sigma_rel_of,
)
from e2ediff.parts.averages import Power, gamma_of


def walk(steps: int, seed: int = 0):
    """A parameter's values after each optimizer step: drift and noise, as of training."""
    noise = np.random.default_rng(seed).normal(size=steps)
    return 5 - 4 * np.exp(-np.arange(steps) / 30) + 0.3 * noise


def averaged(values, width: float):
    """The average after each step, in float64, by the recursion that runs use."""
    found, average = [], 0.0
    for step, value in enumerate(values, start=1):
        decay = Power(width=width).decay_at(step)
        average = decay * average + (1 - decay) * value
        found.append(average)
    return np.array(found)


@given(st.floats(0.002, 12**-0.5))
def test_width_and_exponent_round_trip(width) -> None:
    assert sigma_rel_of(gamma_of(width)) == pytest.approx(width, rel=1e-9)


def test_widths_are_those_of_the_paper() -> None:
    """Its section 3: gamma 16.97 is 5 %, 6.94 is 10 %; the mean over all time is 12^-0.5."""
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.005)
    assert sigma_rel_of(0) == pytest.approx(12**-0.5)


@given(st.floats(0.0, 200.0))
def test_the_width_is_the_profiles_standard_deviation(gamma) -> None:
    """Moments of (gamma + 1) tau^gamma on (0, 1)."""
    mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)
    assert sigma_rel_of(gamma) == pytest.approx((square - mean**2) ** 0.5, rel=1e-6)


def test_a_tracked_average_is_the_closed_form_sum_of_the_trajectory() -> None:
    """Step k weighs (k^(gamma + 1) - (k - 1)^(gamma + 1)) / n^(gamma + 1)."""
    net, n = make_nets().online, 25
    averages = {w: Average(net, Power(width=w)) for w in (0.05, 0.2)}
    start = [p.detach().double() for p in net.parameters()]
    values = walk(n)
    for value in values:
        with torch.no_grad():
            for p, old in zip(net.parameters(), start, strict=True):
                p.copy_(old * value)
        for average in averages.values():
            average.update()
    for width, average in averages.items():
        share = np.diff((np.arange(n + 1) / n) ** (gamma_of(width) + 1))
        assert share.sum() == pytest.approx(1)
        for p, old in zip(average.net.parameters(), start, strict=True):
            torch.testing.assert_close(p, (old * (share @ values)).float(), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(("a", "b"), [((1.0, 3.0), (0.4, 12.0)), ((0.5, 0.0), (0.9, 7.0))])
def test_inner_products_are_the_integrals(a, b) -> None:
    tau = (np.arange(200_000) + 0.5) / 200_000

    def profile(t, gamma):
        return np.where(tau <= t, (gamma + 1) * tau**gamma / t ** (gamma + 1), 0.0)

    columns = [np.array([x]) for x in (*a, *b)]
    assert inner_products(*columns)[0, 0] == pytest.approx(
        (profile(*a) * profile(*b)).mean(), 1e-4
    )


POINTS = [Point(w, s) for s in range(10, 321, 10) for w in (0.05, 0.1)]


def test_a_width_that_is_tracked_comes_back_as_it_is() -> None:
    for wanted in (Point(0.05, 320), Point(0.1, 200)):
        found = mixture(POINTS, wanted)
        expected = [float(p == wanted) for p in POINTS]
        assert found.coefficients == pytest.approx(expected, abs=1e-9)
        assert found.error < 1e-6


@pytest.mark.parametrize("width", [0.02, 0.03, 0.07, 0.13, 0.2, 0.24])
def test_an_untracked_width_agrees_with_one_that_was_tracked(width) -> None:
    """To a share of the parameter's movement that the profile's error bounds."""
    values = walk(320)
    stored = {w: averaged(values, w) for w in (0.05, 0.1)}
    found = mixture(POINTS, Point(width, 320))
    made = sum(
        c * stored[p.sigma_rel][p.step - 1]
        for c, p in zip(found.coefficients, POINTS, strict=True)
    )
    assert found.error <= TOLERANCE
    assert abs(made - averaged(values, width)[-1]) < 0.01
    others = [abs(stored[w][-1] - averaged(values, width)[-1]) for w in stored]
    assert min(others) > abs(made - averaged(values, width)[-1])


@given(st.floats(0.01, 0.28), st.integers(1, 6))
def test_a_parameter_that_never_moved_is_returned_by_any_mixture(width, moments) -> None:
    points = [Point(w, s) for s in range(1, moments + 1) for w in (0.05, 0.1)]
    assert sum(mixture(points, Point(width, moments)).coefficients) == pytest.approx(1, abs=1e-9)


def test_more_snapshots_reach_further() -> None:
    few, many = (reachable([p for p in POINTS if p.step % every == 0], 320) for every in (160, 10))
    assert set(few) < set(many)
    assert (many[0], many[-1]) == (0.02, 0.25)


def test_two_widths_that_are_nearly_one_do_no_harm() -> None:
    points = [Point(w, s) for s in range(10, 321, 10) for w in (0.05, 0.05 + 1e-9, 0.1)]
    found = mixture(points, Point(0.07, 320))
    assert found.error < 0.01
    assert max(map(abs, found.coefficients)) < 10
