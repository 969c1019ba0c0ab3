"""The score of a sweep: its value, its error, and what pairs of candidates gain."""

from __future__ import annotations

import pytest
import torch
from e2ediff_sweep.proxy import Mean, Proxy, Z, difference

from e2ediff.distances import polynomial_mmd


def rows(n: int, seed: int, shift: float = 0.0, width: int = 4) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) + shift


def test_the_mean_of_the_shares_is_the_unbiased_distance() -> None:
    made, real = rows(40, 1, 0.3), rows(70, 2)
    found = Mean.of(Proxy.of(real).shares(made))
    assert found.value == pytest.approx(polynomial_mmd(made, real), rel=1e-9)


def test_shares_are_those_of_leaving_each_image_out() -> None:
    made, real = rows(9, 1, 0.5), rows(12, 2)
    whole, n = polynomial_mmd(made, real), len(made)
    for i, share in enumerate(Proxy.of(real).shares(made)):
        rest = torch.cat([made[:i], made[i + 1 :]])
        left_out = polynomial_mmd(rest, real)
        assert share == pytest.approx(n * whole - (n - 1) * left_out, rel=1e-7, abs=1e-9)


def test_the_error_is_the_spread_over_repetitions() -> None:
    """200 sets of one law against one reference; the spread is itself known to 5 %."""
    proxy = Proxy.of(rows(300, 0))
    found = [Mean.of(proxy.shares(rows(64, seed, 0.4))) for seed in range(1, 201)]
    spread = Mean.of([f.value for f in found]).error * 200**0.5
    told = sum(f.error for f in found) / len(found)
    assert told == pytest.approx(spread, rel=0.2)


def test_the_interval_of_a_difference_holds_the_true_one() -> None:
    """Of two laws whose difference is known from many rows; 95 % of 200, within 4 errors."""
    proxy = Proxy.of(rows(300, 0))
    many = rows(4000, 9)
    truth = difference(proxy.shares(many + 0.5), proxy.shares(many + 0.4)).value
    inside = 0
    for seed in range(10, 210):
        own = rows(64, seed)
        found = difference(proxy.shares(own + 0.5), proxy.shares(own + 0.4))
        inside += abs(found.value - truth) <= Z * found.error
    assert 176 <= inside <= 200


def test_equal_noise_tells_candidates_apart_that_unequal_noise_does_not() -> None:
    proxy, own, other = Proxy.of(rows(300, 0)), rows(64, 1), rows(64, 2)
    paired = difference(proxy.shares(own + 0.5), proxy.shares(own + 0.4))
    apart = difference(proxy.shares(other + 0.5), proxy.shares(own + 0.4))
    assert paired.value > 3 * paired.error
    assert paired.error < 0.5 * apart.error
