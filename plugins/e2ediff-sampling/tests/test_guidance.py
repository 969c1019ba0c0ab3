"""Guidance on a Gaussian mixture, where every denoiser that it wraps is exact."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from e2ediff_sampling.adaptive import Dopri5
from e2ediff_sampling.classifier_free import APG, CFGPlusPlus, CFGZeroStar
from e2ediff_sampling.combined import Autoguidance, Chain, Interval
from e2ediff_sampling.multistep import DPMSolverPP2M, UniPC
from e2ediff_sampling.sde import SDE
from e2ediff_testing import GaussianDenoiser, check_guidance
from hypothesis import given
from hypothesis import strategies as st
from mixture import LABELS, NULL, Z_T, MixtureDenoiser, doubt, each_path, silent

from e2ediff.condition import Labels
from e2ediff.denoiser import Denoiser
from e2ediff.errors import RecipeError
from e2ediff.guidance import Reference
from e2ediff.parts.guidance import ClassifierFree
from e2ediff.parts.interpolants import Cosine, Linear
from e2ediff.parts.samplers import RK4, Euler, Heun, Midpoint

NULLS = LABELS.null()
scales = st.floats(0.0, 8.0)
inner_times = st.floats(0.05, 0.95)
WEAK = Reference(run="weak")


def auto(scale: float) -> Autoguidance:
    return Autoguidance(scale=scale, run="weak")


def armed(guidance, weak: Denoiser):
    return guidance.with_references({WEAK: weak})


@pytest.mark.parametrize(
    "guidance",
    [APG(), CFGZeroStar(), CFGPlusPlus(), auto(1.5), Interval(guidance=ClassifierFree()),
     Chain(parts=(auto(1.5), APG()))],
    ids=lambda g: type(g).__name__,
)  # fmt: skip
def test_guidance_keeps_the_contract(guidance) -> None:
    check_guidance(guidance)


@pytest.mark.parametrize(
    ("guidance", "asks"),
    [(APG(), True), (APG(scale=1.0), False), (CFGZeroStar(), True), (CFGPlusPlus(), True),
     (CFGPlusPlus(strength=0.0), True), (auto(1.5), False),
     (Interval(guidance=ClassifierFree()), True), (Interval(guidance=auto(1.5)), False),
     (Chain(parts=(auto(1.5), APG())), True), (Chain(parts=(auto(1.5),)), False),
     (Chain(), False)],
    ids=str,
)  # fmt: skip
def test_guidance_says_whether_it_needs_the_answer_without_a_condition(guidance, asks) -> None:
    assert guidance.asks_null is asks


# Scale 1


@pytest.mark.parametrize(
    "guidance",
    [APG(scale=1.0, eta=0.3, norm=2.0), CFGZeroStar(scale=1.0),
     auto(1.0), Interval(guidance=APG(scale=1.0), t_max=0.5), Chain(),
     Chain(parts=(ClassifierFree(scale=1.0), auto(1.0), Interval(guidance=CFGZeroStar(scale=1))))],
    ids=lambda g: type(g).__name__,
)  # fmt: skip
def test_scale_one_is_the_denoiser_itself_in_one_pass_and_loads_nothing(guidance) -> None:
    inner = MixtureDenoiser(Linear())
    f = guidance.wrap(inner)
    assert f is inner
    assert f.for_step(0.1, 0.2) is inner
    f(Z_T, 0.5, LABELS)
    assert inner.rows == [4]
    assert guidance.references == ()


@pytest.mark.parametrize("guidance", [APG(scale=2.0), CFGZeroStar(scale=2.0), CFGPlusPlus()])
def test_guidance_by_class_asks_once_for_twice_the_rows(guidance) -> None:
    inner = MixtureDenoiser(Linear())
    guidance.wrap(inner)(Z_T, 0.5, LABELS)
    assert inner.rows == [8]


# Each against its definition


@given(scale=scales, t=inner_times)
def test_apg_that_keeps_all_parts_is_classifier_free_guidance(scale, t) -> None:
    inner = MixtureDenoiser(Linear())
    apg = APG(scale=scale, eta=1.0, momentum=0.0).wrap(inner)(Z_T, t, LABELS)
    cfg = ClassifierFree(scale=scale).wrap(inner)(Z_T, t, LABELS)
    torch.testing.assert_close(apg.x0, cfg.x0)


@given(scale=st.floats(1.1, 8.0), t=inner_times)
def test_apg_moves_at_right_angles_to_the_conditional_answer(scale, t) -> None:
    inner = MixtureDenoiser(Linear())
    guided = APG(scale=scale).wrap(inner)(Z_T, t, LABELS).x0
    plain = inner(Z_T, t, LABELS).x0
    inside = ((guided - plain) * plain).sum(dim=(1, 2))
    torch.testing.assert_close(inside, torch.zeros_like(inside), rtol=0.0, atol=1e-9 * scale)


@given(norm=st.floats(0.01, 5.0), t=inner_times)
def test_apg_bounds_the_length_of_its_push(norm, t) -> None:
    inner = MixtureDenoiser(Linear())
    guided = APG(scale=2.0, eta=1.0, norm=norm).wrap(inner)(Z_T, t, LABELS).x0
    plain, null = inner(Z_T, t, LABELS).x0, inner(Z_T, t, NULLS).x0
    length = (guided - plain).flatten(1).norm(dim=1)
    wanted = (plain - null).flatten(1).norm(dim=1).clamp_max(norm)
    torch.testing.assert_close(length, wanted)


def test_apg_s_momentum_is_the_running_sum_of_the_steps_before_and_starts_anew() -> None:
    inner, times = MixtureDenoiser(Linear()), [0.2, 0.4, 0.6]
    f = APG(scale=2.0, eta=1.0, momentum=-0.5).wrap(inner)
    for _ in range(2):  # a second trajectory begins without memory
        step, running = f, torch.zeros_like(Z_T)
        for t in times:
            step = step.for_step(t, t + 0.2)
            plain, null = inner(Z_T, t, LABELS).x0, inner(Z_T, t, NULLS).x0
            running = plain - null - 0.5 * running
            for _ in range(2):  # a second question within a step changes nothing
                torch.testing.assert_close(step(Z_T, t, LABELS).x0, plain + running)


def test_a_sampler_hands_momentum_from_step_to_step() -> None:
    inner = MixtureDenoiser(Linear())
    without, having = (
        Euler(steps=6).sample(APG(scale=3.0, momentum=m).wrap(inner), Z_T, LABELS, silent)
        for m in (0.0, -0.75)
    )
    again = Euler(steps=6).sample(APG(scale=3.0, momentum=-0.75).wrap(inner), Z_T, LABELS, silent)
    assert (without - having).abs().max() > 1e-3
    assert torch.equal(having, again)


class Parallel(MixtureDenoiser):
    """Without the class the velocity is a third of what it is with it."""

    def __call__(self, z_t, t, condition):
        without, label = condition.label == NULL, condition.label.clamp_max(2)
        v = super().__call__(z_t, t, Labels(label, NULL)).v
        first = super().__call__(z_t, t, Labels(0 * label, NULL)).v
        v = torch.where(without[:, None, None], first / 3, v)
        times = torch.full((len(z_t),), t, dtype=z_t.dtype)
        return self.path.estimate(v, z_t, times, "v")


@given(scale=scales, t=inner_times)
def test_cfg_zero_star_ignores_an_unconditional_answer_that_differs_in_length(scale, t) -> None:
    inner, first = Parallel(Linear()), Labels(torch.zeros(4).long(), NULL)
    guided = CFGZeroStar(scale=scale, zero_until=0.0).wrap(inner)(Z_T, t, first)
    torch.testing.assert_close(guided.v, inner(Z_T, t, first).v)


@given(scale=scales, t=inner_times)
def test_cfg_zero_star_is_its_formula(scale, t) -> None:
    inner = MixtureDenoiser(Cosine())
    guided = CFGZeroStar(scale=scale, zero_until=0.0).wrap(inner)(Z_T, t, LABELS).v
    for i in range(4):
        c, u = inner(Z_T, t, LABELS).v[i], inner(Z_T, t, NULLS).v[i]
        s = (c * u).sum() / (u * u).sum()
        torch.testing.assert_close(guided[i], (1 - scale) * s * u + scale * c)


def test_cfg_zero_star_leaves_out_the_steps_that_end_in_time() -> None:
    inner = MixtureDenoiser(Linear())
    f = CFGZeroStar(scale=2.0, zero_until=0.1).wrap(inner)
    z = Euler().integrate(f, Z_T, [0.0, 0.05, 0.1], LABELS, silent)
    assert torch.equal(z, Z_T)
    assert inner.rows == []
    z = Euler().integrate(f, Z_T, [0.0, 0.05, 0.11], LABELS, silent)
    assert not torch.equal(z, Z_T)
    assert inner.rows == [8]


@pytest.mark.parametrize("sampler", [Euler(steps=1), Euler(steps=4, shift=0.05), Heun(steps=2)])
def test_cfg_zero_star_never_leaves_the_last_answer_out(sampler) -> None:
    """Also where every step would lie in the time that is left out."""
    inner = MixtureDenoiser(Linear())
    f = CFGZeroStar(scale=2.0, zero_until=1.0).wrap(inner)
    found = sampler.sample(f, Z_T, LABELS, silent)
    assert inner.rows == [8]
    assert not torch.equal(found, Z_T)


ONCE = (Euler(), DPMSolverPP2M(), UniPC(), SDE())
OFTEN = (Heun(), Midpoint(), RK4(), Dopri5())


@pytest.mark.parametrize("sampler", [*ONCE, *OFTEN], ids=lambda s: type(s).__name__)
def test_guidance_by_steps_is_refused_where_steps_are_not_what_it_counts(sampler) -> None:
    assert bool(CFGPlusPlus().problems(sampler)) is (sampler in OFTEN)
    assert not CFGPlusPlus(strength=0.0).problems(sampler)
    remembers = isinstance(sampler, DPMSolverPP2M | UniPC)
    assert bool(CFGZeroStar().problems(sampler)) is remembers
    assert not CFGZeroStar(zero_until=0.0).problems(sampler)
    assert bool(APG().problems(sampler)) is isinstance(sampler, Dopri5)
    assert not APG(momentum=0.0).problems(sampler)
    for plain in (
        ClassifierFree(),
        Interval(guidance=ClassifierFree()),
        Chain(parts=(ClassifierFree(),)),
    ):
        assert not plain.problems(sampler)


def test_guidance_within_guidance_says_where_the_trouble_is() -> None:
    within = Chain(parts=(ClassifierFree(), Interval(guidance=APG())))
    ((field, what),) = within.problems(Dopri5())
    assert field == "parts.1.guidance.momentum"
    assert "set momentum: 0" in what


@each_path
@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_cfg_plus_plus_is_its_algorithm(path, strength) -> None:
    """Guide x0 by `strength`, renoise with the unconditional noise; by DDIM steps on any path."""
    inner = MixtureDenoiser(path)
    f = CFGPlusPlus(strength=strength).wrap(inner)
    grid = Euler(steps=8).grid()[1:]  # VE and its kin begin anywhere; at t = 0 alpha may be 0
    found = wanted = Z_T * path.sigma(torch.tensor(grid[0]).double())
    for t, s in pairwise(grid[:-1]):
        found = DPMSolverPP2M().step(f.for_step(t, s), found, t, s, LABELS, silent)
        with_class, without = inner(wanted, t, LABELS), inner(wanted, t, NULLS)
        a, b = (path.alpha(torch.tensor(x).double()) for x in (t, s))
        sigma, sigma_s = (path.sigma(torch.tensor(x).double()) for x in (t, s))
        eps = without.eps + strength * (with_class.eps - without.eps)
        wanted = b * (wanted - sigma * eps) / a + sigma_s * without.eps
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


def test_cfg_plus_plus_by_euler_on_the_linear_path_is_its_algorithm_from_pure_noise() -> None:
    inner = MixtureDenoiser(Linear())
    found = Euler(steps=5).sample(CFGPlusPlus(strength=0.7).wrap(inner), Z_T, LABELS, silent)
    z = Z_T
    for i in range(5):
        t, s = i / 5, (i + 1) / 5
        c, u = inner(z, t, LABELS), inner(z, t, NULLS)
        x0 = u.x0 + 0.7 * (c.x0 - u.x0)
        z = s * x0 + (1 - s) * u.eps
    torch.testing.assert_close(found, z)


def test_cfg_plus_plus_of_strength_zero_is_unconditional_in_one_pass() -> None:
    inner = MixtureDenoiser(Linear())
    found = CFGPlusPlus(strength=0.0).wrap(inner)(Z_T, 0.5, LABELS)
    assert inner.rows == [4]
    assert torch.equal(found.x0, inner(Z_T, 0.5, NULLS).x0)


@given(scale=scales, t=inner_times)
def test_autoguidance_extrapolates_from_the_weak_answer(scale, t) -> None:
    strong, weak = MixtureDenoiser(Linear()), MixtureDenoiser(Linear(), widen=0.5)
    f = armed(auto(scale), weak).wrap(strong)
    x0, w = strong(Z_T, t, LABELS).x0, weak(Z_T, t, LABELS).x0
    torch.testing.assert_close(f(Z_T, t, LABELS).x0, w + scale * (x0 - w))


def test_autoguidance_by_a_wider_model_narrows_a_gaussian_as_the_ode_says() -> None:
    """The guided ODE is linear here: d log r / dt has a closed form, integrated by quadrature."""
    path, scale = Linear(), 2.0
    strong, weak = GaussianDenoiser(path, 0.0, 0.5), GaussianDenoiser(path, 0.0, 0.8)
    f = armed(auto(scale), weak).wrap(strong)
    start = torch.ones(1, 1, 1, dtype=torch.float64)
    found = Heun(steps=400).sample(f, start, torch.zeros(1).long(), silent).item()
    t = (torch.arange(200000, dtype=torch.float64) + 0.5) / 200000

    def gain(std):  # x0 = gain z
        return t * std**2 / (t**2 * std**2 + (1 - t) ** 2)

    guided = gain(0.8) + scale * (gain(0.5) - gain(0.8))
    slope = (guided - 1) / (1 - t)  # v = (x0 - z) / (1 - t)
    assert found == pytest.approx(slope.mean().exp().item(), rel=2e-3)
    assert found < 0.5


def test_autoguidance_without_its_network_says_how_to_get_one() -> None:
    with pytest.raises(RecipeError, match="autoguidance has no weak network here"):
        auto(2.0).wrap(MixtureDenoiser(Linear()))


# Combinations


@given(t=st.floats(0.0, 1.0))
def test_an_interval_guides_inside_alone(t) -> None:
    inner = MixtureDenoiser(Linear())
    f = Interval(guidance=APG(scale=3.0), t_min=0.3, t_max=0.6).wrap(inner)
    f(Z_T, t, LABELS)
    assert inner.rows == [8 if 0.3 <= t <= 0.6 else 4]


@pytest.mark.parametrize("exclusive", [False, True])
def test_the_interval_of_classifier_free_guidance_is_the_interval_around_it(exclusive) -> None:
    """Its ends, which are times of the grid, included."""
    ends = {"t_min": 0.2, "t_max": 0.7, "exclusive": exclusive}
    one = ClassifierFree(scale=2.0, **ends)
    two = Interval(guidance=ClassifierFree(scale=2.0), **ends)
    found = [
        Heun(steps=10).sample(g.wrap(MixtureDenoiser(Cosine())), Z_T, LABELS, silent)
        for g in (one, two)
    ]
    assert torch.equal(*found)


def test_an_interval_without_a_time_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'t_max' must be >= t_min, 0\.6, or no time is guided"):
        Interval(guidance=APG(scale=3.0), t_min=0.6, t_max=0.3)


@given(t=inner_times)
def test_a_chain_guides_what_is_guided_already(t) -> None:
    strong, weak = MixtureDenoiser(Linear()), MixtureDenoiser(Linear(), widen=0.5)
    chain = armed(Chain(parts=(auto(1.5), ClassifierFree(scale=3.0))), weak)
    found = chain.wrap(strong)(Z_T, t, LABELS).x0

    def sharp(condition):
        w = weak(Z_T, t, condition).x0
        return w + 1.5 * (strong(Z_T, t, condition).x0 - w)

    torch.testing.assert_close(found, sharp(NULLS) + 3.0 * (sharp(LABELS) - sharp(NULLS)))
    assert chain.references == ()


def test_references_are_found_wherever_they_lie() -> None:
    chain = Chain(parts=(ClassifierFree(), Interval(guidance=auto(2.0)), auto(3.0), auto(1.0)))
    assert chain.references == (WEAK, WEAK)


# What it is for


@pytest.mark.parametrize(
    "guidance",
    [CFGPlusPlus(strength=0.9), APG(scale=3.0, eta=1.0),
     Interval(guidance=ClassifierFree(scale=3.0), t_min=0.2, t_max=0.8)],
    ids=lambda g: type(g).__name__,
)  # fmt: skip
@pytest.mark.parametrize("label", [0, 2])
def test_guided_samples_of_a_class_are_more_surely_of_that_class(guidance, label) -> None:
    """By the posterior at samples of the outer classes, which guidance pushes apart.

    Not CFG-Zero*: in one dimension its two answers are always parallel, and it does nothing.
    """
    sampler = Euler(steps=40)
    assert doubt(sampler, label, guidance) < doubt(sampler, label, None) / 2
