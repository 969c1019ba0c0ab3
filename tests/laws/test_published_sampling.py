"""Sampling as released code does it, against its loops written out by hand.

JiT's and UNITE's velocity of an x-prediction is (x - z) / max(1 - t, 0.05), and JiT's loop is Heun
with an Euler step at the end, guided inside an interval without its ends.
"""

from __future__ import annotations

from itertools import pairwise

import attrs
import pytest
import torch
from mixture import MixtureDenoiser

from e2ediff.condition import Labels
from e2ediff.denoiser import Denoiser
from e2ediff.interpolant import Interpolant
from e2ediff.parts.guidance import ClassifierFree
from e2ediff.parts.interpolants import Cosine, Linear
from e2ediff.parts.samplers import RK4, Euler, Heun, Midpoint

LABEL = Labels(torch.tensor([0, 3, 1]), 4)
START = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(0))
T_EPS = 0.05


def clean(z, t, label):
    """Stand in for a network: a bounded guess that hears of latent, time and class."""
    shift = torch.as_tensor(label).float()[:, None, None]
    return torch.tanh(1.5 * z + shift - 0.7 * t) + 0.3 * torch.sin(2 * z * t)


class Guess(Denoiser):
    """`clean` as a denoiser, which notes when it is asked for how many latents."""

    def __init__(self, path: Interpolant) -> None:
        self.path = path
        self.asked: list[tuple[float, int]] = []

    def __call__(self, z_t, t, condition):
        self.asked.append((t, len(z_t)))
        return self.path.estimate(clean(z_t, t, condition.label), z_t, t, "x0")


def silent(like):
    raise AssertionError("a sampler of the ODE draws no noise")


def released(steps: int, *, heun: bool, scale: float = 1.0, low: float = 0.0, high: float = 1.0):
    """JiT's loop, in float32 as it has its times."""
    times = torch.linspace(0.0, 1.0, steps + 1)

    def velocity(z, t):
        with_class, without = (
            (clean(z, t, label) - z) / (1 - t).clamp_min(T_EPS)
            for label in (LABEL.label, LABEL.null().label)
        )
        inside = t < high and (low == 0 or t > low)
        return without + (scale if inside else 1.0) * (with_class - without)

    z = START
    for t, s in pairwise(times[:-1]):
        v = velocity(z, t)
        if heun:
            v = 0.5 * (v + velocity(z + (s - t) * v, s))
        z = z + (s - t) * v
    return z + (times[-1] - times[-2]) * velocity(z, times[-2])


@pytest.mark.parametrize("sampler", [Heun, Euler], ids=["heun", "euler"])
def test_with_t_eps_fifty_steps_are_those_of_released_code(sampler) -> None:
    ours = sampler(steps=50, t_eps=T_EPS).sample(Guess(Linear()), START, LABEL, silent)
    theirs = released(50, heun=sampler is Heun)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    # Ending in the clean estimate is another thing.
    landed = sampler(steps=50).sample(Guess(Linear()), START, LABEL, silent)
    assert float((landed - theirs).abs().max()) > 1e-3


def test_the_last_step_moves_as_far_as_t_eps_lets_it() -> None:
    """Of 50 steps the last goes 0.02 / 0.05 of the way to the clean estimate."""
    path, t = Linear(), 49 / 50
    z = Euler(steps=50, t_eps=T_EPS).integrate(
        Guess(path), START, [i / 50 for i in range(50)], LABEL, silent
    )
    end = Euler(steps=50, t_eps=T_EPS).sample(Guess(path), START, LABEL, silent)
    torch.testing.assert_close(end, z + 0.4 * (clean(z, t, LABEL.label) - z), rtol=0, atol=1e-6)


@pytest.mark.parametrize("sampler", [Euler, Heun, Midpoint, RK4], ids=lambda s: s.__name__)
@pytest.mark.parametrize("path", [Linear(), Cosine()], ids=["linear", "cosine"])
def test_a_t_eps_no_longer_than_the_last_step_changes_no_bit(sampler, path) -> None:
    plain = sampler(steps=10).sample(MixtureDenoiser(path), START, LABEL, silent)
    bounded = sampler(steps=10, t_eps=0.05).sample(MixtureDenoiser(path), START, LABEL, silent)
    assert torch.equal(plain, bounded)


def test_all_forms_of_a_slowed_answer_agree() -> None:
    """What steps by clean estimates, or by scores, is slowed alike."""
    noted = []

    class Noting(Euler):
        def step(self, f, z, t, s, condition, noise):
            noted.append((f, z, t))
            return super().step(f, z, t, s, condition, noise)

    Noting(steps=50, t_eps=T_EPS).sample(Guess(Linear()), START, LABEL, silent)
    f, z, t = noted[-1]
    found, at = f(z, t, LABEL), torch.full((3,), t)
    torch.testing.assert_close(f.path.mix(found.x0, found.eps, at), z, rtol=0, atol=1e-5)
    torch.testing.assert_close(f.path.velocity(found.x0, found.eps, at), found.v)


@pytest.mark.parametrize("t_eps", [-0.01, 1.0])
def test_a_t_eps_outside_of_zero_to_one_is_refused(t_eps) -> None:
    with pytest.raises(ValueError, match="t_eps"):
        Heun(t_eps=t_eps)


def test_a_denoiser_that_depends_on_its_step_is_still_told_of_it() -> None:
    """The bound stands around the step's denoiser, not in its place."""

    ends = []

    class Second(Guess):
        def for_step(self, t, s):
            ends.append((t, s))
            return self

    Euler(steps=2, t_eps=T_EPS).sample(Second(Linear()), START, LABEL, silent)
    assert ends == [(0.0, 0.5), (0.5, 1.0)]


@pytest.mark.parametrize("low", [0.0, 0.1, 0.3])
def test_guided_between_ends_that_are_left_out_it_is_the_released_loop(low) -> None:
    """Times 0.1 and 0.3 are of the grid; the released code reads them as float32 and outside."""
    guidance = ClassifierFree(scale=2.9, t_min=low, t_max=0.8, exclusive=True)
    sampler = Heun(steps=50, t_eps=T_EPS)
    ours = sampler.sample(guidance.wrap(Guess(Linear())), START, LABEL, silent)
    theirs = released(50, heun=True, scale=2.9, low=low, high=0.8)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
    with_ends = attrs.evolve(guidance, exclusive=False).wrap(Guess(Linear()))
    other = sampler.sample(with_ends, START, LABEL, silent)
    assert float((other - theirs).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("exclusive", "guided"), [(False, [0.25, 0.5, 0.75]), (True, [0.5])], ids=["with", "without"]
)
def test_the_ends_of_an_interval_are_guided_unless_it_is_exclusive(exclusive, guided) -> None:
    inner = Guess(Linear())
    f = ClassifierFree(scale=2.0, t_min=0.25, t_max=0.75, exclusive=exclusive).wrap(inner)
    for t in (0.0, 0.2, 0.25, 0.5, 0.75, 0.8):
        f(START, t, LABEL)
    assert [t for t, rows in inner.asked if rows == 6] == guided


def test_an_exclusive_interval_from_zero_begins_at_zero() -> None:
    inner = Guess(Linear())
    ClassifierFree(scale=2.0, exclusive=True).wrap(inner)(START, 0.0, LABEL)
    assert inner.asked == [(0.0, 6)]


def test_grids_of_round_steps_have_round_times_exactly() -> None:
    """Otherwise an end that is left out would be taken by a rounding error."""
    for steps in range(1, 1001):
        assert Euler(steps=steps).grid() == [i / steps for i in range(steps + 1)]
