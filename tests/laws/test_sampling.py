"""Samplers and guidance against closed forms."""

from __future__ import annotations

import math
from itertools import pairwise

import attrs
import pytest
import torch
from e2ediff_testing import GaussianDenoiser, make_nets
from hypothesis import given
from hypothesis import strategies as st

from e2ediff.condition import Labels
from e2ediff.denoiser import Denoiser, Plain
from e2ediff.interpolant import KINDS
from e2ediff.parts.guidance import ClassifierFree
from e2ediff.parts.interpolants import Cosine, Linear, VarianceExploding
from e2ediff.parts.samplers import Euler, Heun

PATHS = [Linear(), Cosine(), VarianceExploding()]
each_path = pytest.mark.parametrize("path", PATHS, ids=str)
LABEL = Labels(torch.zeros(2, dtype=torch.long), 4)
MEAN, STD = 1.0, 0.7


def silent(like: torch.Tensor) -> torch.Tensor:
    raise AssertionError("a sampler of the ODE draws no noise")


def exact_flow(path, z, t: float, s: float):
    """Where the ODE's exact solution through z at t is at s, for N(MEAN, STD^2)."""
    at = torch.tensor([t, s], dtype=torch.float64)
    a, std = path.alpha(at), (path.alpha(at).square() * STD**2 + path.sigma(at).square()).sqrt()
    return a[1] * MEAN + std[1] / std[0] * (z - a[0] * MEAN)


@each_path
@pytest.mark.parametrize(
    ("sampler", "low", "high"), [(Euler, 0.7, 1.3), (Heun, 1.7, 2.4)], ids=["euler", "heun"]
)
def test_a_sampler_converges_at_its_order(path, sampler, low, high) -> None:
    """On [0.05, 0.95] in float64; the ends have their own rules."""
    f = GaussianDenoiser(path, MEAN, STD)
    start = torch.tensor([[[-1.0]], [[2.5]]], dtype=torch.float64)
    start = start * path.sigma(torch.tensor(0.05, dtype=torch.float64))
    goal = exact_flow(path, start, 0.05, 0.95)
    errors = []
    for n in (64, 128, 256, 512):
        times = [0.05 + 0.9 * i / n for i in range(n + 1)]
        found = sampler().integrate(f, start, times, LABEL, silent)
        errors.append((found - goal).abs().max().item())
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert all(low <= order <= high for order in orders), orders


@each_path
@pytest.mark.parametrize("sampler", [Euler(steps=400), Heun(steps=50)], ids=["euler", "heun"])
def test_unit_noise_becomes_the_target_gaussian(path, sampler) -> None:
    """The map from noise to samples is affine here, so two points are its mean and its std."""
    f = GaussianDenoiser(path, MEAN, STD)
    if isinstance(path, VarianceExploding):
        # All of the data's scale lies in its last hundredth of time: a uniform grid of 50 steps
        # misses it, and samples keep 41 % of their std.
        sampler = attrs.evolve(sampler, shift=30.0)
    start = torch.tensor([[[0.0]], [[1.0]]], dtype=torch.float64)
    origin, one = sampler.sample(f, start, LABEL, silent).flatten().tolist()
    # sigma_max 80 starts from N(0, 80^2) instead of N(MEAN, 80^2 + STD^2): 1 % of MEAN; the rest
    # is the solvers' error, at most 2 % at these numbers of steps.
    assert origin == pytest.approx(MEAN, abs=0.03)
    assert one - origin == pytest.approx(STD, rel=0.03)


@pytest.mark.parametrize("sampler", [Euler(steps=1), Heun(steps=1)], ids=["euler", "heun"])
def test_one_step_answers_with_the_clean_estimate_of_noise(sampler) -> None:
    f = GaussianDenoiser(Linear(), MEAN, STD)
    z = sampler.sample(f, torch.ones(2, 1, 1), LABEL, silent)
    assert torch.equal(z, torch.full_like(z, MEAN))


@given(steps=st.integers(1, 200), shift=st.floats(0.05, 20.0))
def test_a_grid_rises_from_noise_to_data(steps, shift) -> None:
    times = Euler(steps=steps, shift=shift).grid()
    assert (len(times), times[0]) == (steps + 1, 0.0)
    assert times[-1] == pytest.approx(1.0, abs=1e-12)  # the last one only ends the loop
    assert all(a < b for a, b in pairwise(times))
    if steps > 1 and shift < 1:
        assert times[1] < 1 / steps, "a shift below 1 puts more steps near the noise"


@pytest.mark.parametrize(("sampler", "calls"), [(Euler(steps=7), 7), (Heun(steps=7), 13)])
def test_a_sampler_costs_the_network_calls_it_says(sampler, calls) -> None:
    f = Plain(make_nets().online, Linear(), "x0")
    sampler.sample(f, torch.zeros(2, 4, 6), LABEL, silent)
    assert f.calls == calls


@each_path
@pytest.mark.parametrize("predicts", KINDS)
def test_the_plain_denoiser_completes_the_networks_answer(path, predicts) -> None:
    net = make_nets().online
    z_t = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    found = Plain(net, path, predicts)(z_t, 0.4, LABEL)
    answer = net.denoise(z_t, torch.full((2,), 0.4), LABEL)
    assert torch.equal(getattr(found, predicts), answer)


# Guidance


class Labelled(Denoiser):
    """Counts its calls and rows; the answer depends on the label, 3 being no class."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.inner = {k: GaussianDenoiser(Linear(), float(k), 0.5) for k in range(4)}

    @property
    def path(self):
        return Linear()

    def __call__(self, z_t, t, condition):
        self.rows.append(len(z_t))
        pairs = zip(z_t, condition.label, strict=True)
        x0 = [self.inner[int(k)](z[None], t, condition).x0 for z, k in pairs]
        times = torch.full((len(z_t),), t, dtype=z_t.dtype)
        return self.path.estimate(torch.cat(x0), z_t, times, "x0")


LABELS = Labels(torch.tensor([0, 2]), 3)
Z_T = torch.tensor([[[0.3, -1.0]], [[2.0, 0.1]]])


def test_guidance_of_scale_one_is_the_denoiser_itself_in_one_pass() -> None:
    inner = Labelled()
    f = ClassifierFree(scale=1.0).wrap(inner)
    assert f is inner
    f(Z_T, 0.5, LABELS)
    assert inner.rows == [2]


@given(scale=st.floats(0.0, 10.0), t=st.floats(0.05, 0.95))
def test_guidance_extrapolates_from_the_unconditional_answer(scale, t) -> None:
    inner = Labelled()
    guided = ClassifierFree(scale=scale).wrap(inner)(Z_T, t, LABELS)
    with_class = inner(Z_T, t, LABELS).x0
    without = inner(Z_T, t, LABELS.null()).x0
    torch.testing.assert_close(guided.x0, without + scale * (with_class - without))
    assert inner.rows[0] == (2 if scale == 1 else 4), "both answers come from one batch"


@given(t=st.floats(0.05, 0.95))
def test_guidance_of_scale_zero_is_unconditional(t) -> None:
    inner = Labelled()
    guided = ClassifierFree(scale=0.0).wrap(inner)(Z_T, t, LABELS)
    torch.testing.assert_close(guided.x0, inner(Z_T, t, LABELS.null()).x0)


@given(t=st.floats(0.05, 0.95))
def test_outside_of_its_interval_guidance_is_one_plain_pass(t) -> None:
    inner = Labelled()
    f = ClassifierFree(scale=3.0, t_min=0.3, t_max=0.6).wrap(inner)
    guided = f(Z_T, t, LABELS)
    rows = inner.rows[:]
    plain = inner(Z_T, t, LABELS)
    if 0.3 <= t <= 0.6:
        assert rows == [4]
        assert (guided.x0 - plain.x0).abs().max() > 1e-3
    else:
        assert rows == [2]
        assert torch.equal(guided.x0, plain.x0)


@pytest.mark.parametrize(
    ("interval", "said"),
    [({"t_min": 0.6, "t_max": 0.3}, r"'t_max' must be >= t_min, 0\.6, or no time is guided: 0\.3"),
     ({"t_min": 0.5, "t_max": 0.5, "exclusive": True}, r"'t_max' must be > t_min, 0\.5")],
)  # fmt: skip
def test_an_interval_without_a_time_is_refused(interval, said) -> None:
    with pytest.raises(ValueError, match=said):
        ClassifierFree(**interval)


def test_guidance_where_the_class_says_nothing_changes_nothing() -> None:
    inner = GaussianDenoiser(Cosine(), MEAN, STD)
    guided = ClassifierFree(scale=4.0).wrap(inner)(Z_T, 0.5, LABELS)
    torch.testing.assert_close(guided.x0, inner(Z_T, 0.5, LABELS).x0)


@pytest.mark.parametrize("shift", [0.05, 0.5, 1.0, 3.0, 30.0])
@pytest.mark.parametrize("t_start", [0.0, 0.01])
def test_a_grid_ends_at_one_exactly_and_rises(shift, t_start):
    grid = Heun(steps=13, shift=shift, t_start=t_start).grid()
    assert (grid[0], grid[-1]) == (t_start, 1.0)
    assert all(a < b for a, b in pairwise(grid))


@pytest.mark.parametrize("kind", ["eps", "score"])
def test_noise_predictions_with_small_errors_sample_the_right_scale_from_t_start(kind):
    class Erring(GaussianDenoiser):
        def __call__(self, z_t, t, condition):
            exact = getattr(super().__call__(z_t, t, condition), kind)
            times = torch.full((len(z_t),), t, dtype=z_t.dtype)
            return self.path.estimate(exact + 0.01, z_t, times, kind)

    f = Erring(Linear(), mean=0.3, std=0.7)
    g = torch.Generator().manual_seed(0)
    start = torch.randn(4096, 1, 1, generator=g, dtype=torch.float64)
    condition = Labels(torch.zeros(4096, dtype=torch.long), 1)
    z = Heun(steps=25, t_start=0.01).sample(f, start, condition, torch.randn_like)
    # An error of 0.01 in eps is one of 1 in x0 at t = 0.01, weighed by one step of 1 / 25.
    assert abs(float(z.std()) - 0.7) < 0.1
