"""Every sampler of the plugin on a Gaussian mixture: order, distribution, and what it costs."""

from __future__ import annotations

import math
from itertools import pairwise

import attrs
import pytest
import torch
from e2ediff_sampling.adaptive import Dopri5, dormand_prince
from e2ediff_sampling.multistep import DPMSolverPP2M, UniPC
from e2ediff_sampling.sde import SDE
from e2ediff_testing import GaussianDenoiser, check_sampler, make_nets
from mixture import (
    MEANS,
    PATHS,
    STDS,
    WEIGHTS,
    MixtureDenoiser,
    anything,
    asks_once_where_it_begins,
    cdf,
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
from e2ediff.errors import RecipeError
from e2ediff.parts.interpolants import Cosine, Linear, VarianceExploding
from e2ediff.parts.samplers import RK4, Euler
from e2ediff.sampler import Karras

ALL = [Dopri5(), DPMSolverPP2M(), UniPC(), SDE()]
each_sampler = pytest.mark.parametrize("sampler", ALL, ids=lambda s: type(s).__name__)


@each_sampler
def test_a_sampler_keeps_the_contract(sampler) -> None:
    check_sampler(sampler)


# Order


@each_path
@pytest.mark.parametrize(
    ("sampler", "order"),
    [(DPMSolverPP2M(), 2), (UniPC(order=1), 2), (UniPC(order=2), 3), (UniPC(order=3), 4),
     (SDE(strength=0), 1)],
    ids=["2m", "unipc1", "unipc2", "unipc3", "sde0"],
)  # fmt: skip
def test_halving_the_steps_divides_the_error_by_two_to_the_order(path, sampler, order) -> None:
    """Against 512 steps of RK4, in float64; UniPC's corrector adds one to its order."""
    n = 160 if sampler == UniPC(order=3) else 80
    found = measured_order(sampler, path, trajectory_end(RK4(), path, 512), n)
    assert found == pytest.approx(order, abs=0.35)


@each_path
def test_a_step_of_dormand_prince_has_order_five_and_knows_its_error(path) -> None:
    f = MixtureDenoiser(path)
    z = 0.7 * normal_quantiles(9)
    k = f(z, 0.5, anything(9)).v
    exact = RK4().integrate(f, z, [0.5 + 0.02 * i / 256 for i in range(257)], anything(9), silent)
    errors, estimates = [], []
    for n in (1, 2):
        at, slope, t, h = z, k, 0.5, 0.02 / n
        for _ in range(n):
            at, error, slope = dormand_prince(f, at, t, h, anything(9), slope)
            t += h
        errors.append((at - exact).abs().max().item())
        estimates.append(error.abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(5, abs=0.5), errors
    assert math.log2(estimates[0] / estimates[1]) == pytest.approx(5, abs=0.7), estimates
    assert errors[0] < estimates[0], "the estimate is that of the fourth-order solution"


@each_path
def test_dopri5_spends_calls_until_its_tolerance_is_met(path) -> None:
    f, calls, errors = MixtureDenoiser(path), [], []
    at = torch.tensor(0.1).double()
    start, condition = normal_quantiles(9) * path.sigma(at), anything(9)
    goal = RK4().integrate(f, start, Karras(sigma_min=0.05).times(600, 0.1, path)[:-1], condition,
                           silent)  # fmt: skip
    end = Karras(sigma_min=0.05).times(600, 0.1, path)[-2]
    for tolerance in (1e-3, 1e-6):
        f.rows.clear()
        found = Dopri5(rtol=tolerance, atol=tolerance).step(f, start, 0.1, end, condition, silent)
        calls.append(len(f.rows))
        errors.append((found - goal).abs().max().item())
    assert errors[0] < 30e-3
    assert errors[1] < 30e-6
    # an error of h^5 makes a thousandth of the tolerance cost four times the calls
    assert 2 < calls[1] / calls[0] < 6


def test_dopri5_gives_up_with_advice_when_the_calls_run_out() -> None:
    start = normal_quantiles(9)
    with pytest.raises(RecipeError, match=r"sampler.max_calls: 19 network calls have reached"):
        Dopri5(rtol=1e-9, atol=1e-9, max_calls=20).sample(
            MixtureDenoiser(Linear()), start, anything(9), silent
        )


def test_dopri5_bounds_the_error_of_the_worst_image_of_a_batch() -> None:
    """A thousand images at rest do not hide one that moves."""
    f, tight = MixtureDenoiser(Linear()), Dopri5(rtol=1e-5, atol=1e-5)
    moving = normal_quantiles(3)[:1]
    crowd = torch.cat([moving, torch.zeros(500, 1, 1).double()])
    alone = tight.sample(f, moving, anything(1), silent)
    among = tight.sample(f, crowd, anything(501), silent)[:1]
    torch.testing.assert_close(alone, among, rtol=0.0, atol=1e-4)


def test_dopri5_refuses_to_begin_where_it_would_end() -> None:
    with pytest.raises(
        ValueError, match=r"at t = 0\.3333, and sampling begins at 0\.5, not before"
    ):
        Dopri5(t_start=0.5, sigma_min=2.0).grid()


@pytest.mark.parametrize("sampler", [
    Dopri5(rtol=1e-6, atol=1e-6, sigma_min=1e-3), DPMSolverPP2M(steps=200), UniPC(steps=200),
    SDE(steps=2000, strength=0),
], ids=lambda s: type(s).__name__)  # fmt: skip
def test_t_eps_leaves_the_noise_that_its_ode_leaves(sampler) -> None:
    """dz/dt = (x0 - z) / max(1 - t, 0.05) ends 0.05 / e of its way from a known x0."""
    start = torch.tensor([[[1.0]], [[-2.0]]], dtype=torch.float64)
    f = GaussianDenoiser(Linear(), 0.3, 0.0)
    landed = sampler.sample(f, start, anything(2), silent)
    left = attrs.evolve(sampler, t_eps=0.05).sample(f, start, anything(2), silent)
    torch.testing.assert_close(landed, torch.full_like(start, 0.3))
    torch.testing.assert_close(left - 0.3, 0.05 / math.e * (start - 0.3), rtol=0.03, atol=0.0)


# The law of the samples


@pytest.mark.parametrize("path", PATHS[:2], ids=["linear", "cosine"])
@pytest.mark.parametrize("sampler", [
    Dopri5(), DPMSolverPP2M(steps=100, spacing="karras"), UniPC(steps=60, spacing="karras"),
], ids=lambda s: type(s).__name__)  # fmt: skip
def test_the_ode_carries_quantiles_of_noise_to_quantiles_of_the_mixture(path, sampler) -> None:
    """The clean estimate of the last interval pulls samples together, least in fine last ones."""
    assert quantile_error(sampler, path) < 0.02


@pytest.mark.parametrize("sampler", [
    UniPC(steps=40, spacing="karras"), Dopri5(), SDE(steps=400, spacing="karras", strength=0),
], ids=lambda s: type(s).__name__)  # fmt: skip
def test_exploding_variance_reaches_the_mixture_too(sampler) -> None:
    """sigma_max 10 starts at N(0, 100), where N(0.2, 101) would be exact: 0.01 of probability."""
    assert quantile_error(sampler, VarianceExploding(sigma_max=10.0)) < 0.03


def kolmogorov(samples: torch.Tensor) -> float:
    """Distance of an empirical distribution function from the mixture's."""
    ordered = samples.double().flatten().sort().values
    n = len(ordered)
    steps = torch.arange(1, n + 1, dtype=torch.float64) / n
    gap = torch.maximum((cdf(ordered) - steps).abs(), (cdf(ordered) - steps + 1 / n).abs())
    return gap.max().item()


@pytest.mark.parametrize(
    ("path", "sampler"),
    [
        (Linear(), SDE(steps=400)),
        (Linear(), SDE(steps=400, diffusion="constant")),
        (Linear(), SDE(steps=400, diffusion="sin2", strength=3.0)),
        (Linear(), SDE(steps=800, diffusion="sbdm", t_start=0.02)),
        (Cosine(), SDE(steps=400)),
        (VarianceExploding(sigma_max=10.0), SDE(steps=300, diffusion="sbdm", spacing="karras")),
    ],
    ids=["sigma", "constant", "sin2", "sbdm", "cosine", "ve-sbdm"],
)
def test_the_sde_has_the_mixture_for_every_diffusion(path, sampler) -> None:
    g = torch.Generator().manual_seed(0)
    n = 4000

    def noise(like):
        return torch.randn(like.shape, generator=g, dtype=like.dtype)

    start = noise(torch.empty(n, 1, 1, dtype=torch.float64))
    found = sampler.sample(MixtureDenoiser(path), start, anything(n), noise)
    # 1.63 / sqrt(n) is exceeded by one set of perfect samples in a hundred; 0.01 for the steps
    assert kolmogorov(found) < 1.63 / math.sqrt(n) + 0.01


@pytest.mark.parametrize("diffusion", ["sigma", "constant", "sin2"])
def test_the_sde_keeps_the_marginals_on_the_way(diffusion) -> None:
    """Mean and standard deviation of z_t at t = 0.6, from those of the mixture."""
    path, n, g = Linear(), 8000, torch.Generator().manual_seed(1)

    def noise(like):
        return torch.randn(like.shape, generator=g, dtype=like.dtype)

    start = noise(torch.empty(n, 1, 1, dtype=torch.float64))
    times = [0.6 * i / 200 for i in range(201)]
    sampler = SDE(diffusion=diffusion, strength=2.0)
    z = sampler.integrate(MixtureDenoiser(path), start, times, anything(n), noise)
    mean = (WEIGHTS * MEANS).sum()
    var = (WEIGHTS * (STDS.square() + MEANS.square())).sum() - mean**2
    std = (0.36 * var + 0.16).sqrt().item()
    # four standard errors, and one percent for the steps
    assert z.mean().item() == pytest.approx(0.6 * mean.item(), abs=4 * std / math.sqrt(n) + 0.01)
    assert z.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * n) + 0.01)


def moments_by_steps(sampler: SDE, path, times) -> torch.Tensor:
    """Mean and variance at the end, without a draw: on a Gaussian every step is affine in z."""
    f, condition = GaussianDenoiser(path, 0.7, 0.5), anything(1)
    places = torch.tensor([0.0, 1.0], dtype=torch.float64)[:, None, None]
    a, b = path.alpha(torch.tensor(times[0]).double()), path.sigma(torch.tensor(times[0]).double())
    mean, var = 0.7 * a, (0.5 * a) ** 2 + b**2
    for t, s in pairwise(times):
        zero, one = sampler.step(f, places, t, s, condition, torch.zeros_like).flatten()
        kick = sampler.step(f, places[:1], t, s, condition, torch.ones_like).item() - zero
        mean, var = zero + (one - zero) * mean, (one - zero) ** 2 * var + kick**2
    return torch.stack([mean, var])


@each_path
@pytest.mark.parametrize("diffusion", ["sigma", "constant", "sin2", "sbdm"])
def test_halving_the_steps_halves_the_sde_s_error_in_law(path, diffusion) -> None:
    """Mean and variance of a Gaussian from t = 0.2 to 0.8: weak order one, diffusion and all."""
    at = torch.tensor(0.8).double()
    a, b = path.alpha(at), path.sigma(at)
    goal = torch.stack([0.7 * a, (0.5 * a) ** 2 + b**2])
    sampler, errors = SDE(diffusion=diffusion, strength=1.5), []
    for n in (400, 800):
        times = [0.2 + 0.6 * i / n for i in range(n + 1)]
        errors.append((moments_by_steps(sampler, path, times) - goal).abs())
    # Where a term of the error vanishes, the rest of it is far below.
    orders = torch.log2(errors[0] / errors[1])[errors[0] > 1e-5 * goal.abs()]
    assert len(orders) >= 1
    torch.testing.assert_close(orders, torch.ones_like(orders), atol=0.1, rtol=0)


def test_the_sde_without_diffusion_is_euler_to_the_bit() -> None:
    noise, f = normal_quantiles(9), MixtureDenoiser(Linear())
    found = SDE(steps=9, strength=0).sample(f, noise, anything(9), silent)
    assert torch.equal(found, Euler(steps=9).sample(f, noise, anything(9), silent))


# Multistep samplers


@each_path
@pytest.mark.parametrize("sampler", [DPMSolverPP2M(steps=8), UniPC(steps=8)])
def test_a_sampler_with_memory_forgets_it_between_trajectories(path, sampler) -> None:
    f, noise = MixtureDenoiser(path), normal_quantiles(5)
    first = sampler.sample(f, noise, anything(5), silent)
    sampler.sample(f, 3 * noise, anything(5), silent)
    assert torch.equal(first, sampler.sample(f, noise, anything(5), silent))


# Costs


@pytest.mark.parametrize(
    "sampler",
    [DPMSolverPP2M(steps=7), UniPC(steps=7), SDE(steps=7)],
    ids=lambda s: type(s).__name__,
)
def test_a_sampler_costs_one_call_a_step(sampler) -> None:
    f = Plain(make_nets().online, Linear(), "x0")
    sampler.sample(f, torch.zeros(2, 4, 6), Labels(torch.zeros(2).long(), 4), torch.randn_like)
    assert (f.calls, f.rows) == (7, 14)


@each_sampler
def test_a_sampler_that_asks_once_asks_where_its_step_begins(sampler) -> None:
    if sampler.couples_images:
        assert not sampler.one_call_per_step
    else:
        asks_once_where_it_begins(sampler)


@pytest.mark.parametrize("sampler", [DPMSolverPP2M(), UniPC()], ids=lambda s: type(s).__name__)
def test_at_equal_calls_the_higher_order_is_nearer(sampler) -> None:
    """Twenty calls on the linear path, by noise level; what the orders are for."""
    levels = Karras(sigma_min=0.02)
    exact = RK4(steps=300, spacing=levels).sample(
        MixtureDenoiser(Linear()), normal_quantiles(101), anything(101), silent
    )
    higher, euler = (
        mean_error(attrs.evolve(s, steps=20, spacing=levels), exact) for s in (sampler, Euler())
    )
    assert higher < euler / 2
