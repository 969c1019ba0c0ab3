"""Laws of training times and of learning rates."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy
import torch
from hypothesis import given
from hypothesis import strategies as st

from e2ediff.parts.optimizers.scheduled import SGD, AdamW, schedule_factor
from e2ediff.parts.time_samplers import LogitNormal, Shifted, Uniform
from e2ediff.times import MARGIN

CPU = torch.device("cpu")


def cdf(law, t: float) -> float:
    """The distribution functions, written down independently."""
    if isinstance(law, Uniform):
        return t
    if isinstance(law, LogitNormal):
        return (1 + math.erf((math.log(t / (1 - t)) - law.mean) / law.std / math.sqrt(2))) / 2
    return cdf(law.inner, t / (law.shift - (law.shift - 1) * t))


LAWS = [
    Uniform(),
    LogitNormal(),
    LogitNormal(mean=-0.8, std=0.8),
    Shifted(),
    Shifted(inner=Uniform(), shift=3.0),
]
each_law = pytest.mark.parametrize("law", LAWS, ids=str)


@each_law
@given(u=st.floats(0.001, 0.999))
def test_the_quantile_inverts_the_distribution_function(law, u) -> None:
    t = law.quantile(torch.tensor([u], dtype=torch.float64)).item()
    assert cdf(law, t) == pytest.approx(u, abs=1e-9)


@each_law
def test_drawn_times_follow_the_distribution(law) -> None:
    t = law.draw(20000, torch.Generator().manual_seed(0), CPU)
    u = np.array([cdf(law, value) for value in t.double().tolist()])
    found = scipy.stats.kstest(u, "uniform")
    assert found.pvalue > 1e-3


@pytest.mark.parametrize(
    "law", [*LAWS, LogitNormal(mean=20.0), LogitNormal(mean=-20.0), LogitNormal(std=50.0)], ids=str
)
def test_drawn_times_keep_clear_of_both_ends(law) -> None:
    t = law.draw(50000, torch.Generator().manual_seed(1), CPU)
    assert t.dtype == torch.float32
    assert t.min() >= MARGIN
    assert t.max() <= 1 - MARGIN


def test_a_shift_of_one_changes_nothing_and_below_one_adds_noise() -> None:
    u = torch.linspace(0.01, 0.99, 99)
    plain = Uniform().quantile(u)
    torch.testing.assert_close(Shifted(inner=Uniform(), shift=1.0).quantile(u), plain)
    assert (Shifted(inner=Uniform(), shift=0.5).quantile(u) < plain).all()


schedules = st.sampled_from(["constant", "cosine", "linear", "wsd"])
TOTAL = 10000


@given(
    schedule=schedules,
    images=st.integers(0, TOTAL),
    warmup=st.integers(0, TOTAL),
    cooldown=st.floats(0.01, 1.0),
)
def test_a_learning_rate_stays_between_zero_and_its_peak(schedule, images, warmup, cooldown):
    assert 0 <= schedule_factor(schedule, images, TOTAL, warmup, cooldown) <= 1


@given(schedule=schedules, warmup=st.integers(0, 5000), cooldown=st.floats(0.01, 0.5))
def test_a_learning_rate_rises_to_its_peak_stays_and_falls(schedule, warmup, cooldown) -> None:
    points = range(0, TOTAL + 1, 50)
    factors = [schedule_factor(schedule, i, TOTAL, warmup, cooldown) for i in points]
    peak = factors.index(max(factors))
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    plateau = [f for i, f in zip(points, factors, strict=True) if warmup <= i <= TOTAL / 2]
    assert all(f == 1 for f in plateau)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_falling_schedule_ends_at_zero_and_is_at_half_in_its_middle(schedule) -> None:
    assert schedule_factor(schedule, TOTAL, TOTAL, 0, 1.0) == 0
    assert schedule_factor(schedule, TOTAL // 2, TOTAL, 0, 1.0) == pytest.approx(0.5)
    assert schedule_factor(schedule, TOTAL * 3 // 4, TOTAL, 0, 0.5) == pytest.approx(0.5)


def test_wsd_holds_the_rate_and_falls_along_one_minus_a_square_root() -> None:
    """Given as a share of training or in images, after a warm-up in images."""
    for given_as in ({"cooldown": 0.2}, {"decay_images": 2000}):
        rate = AdamW(schedule="wsd", warmup_images=100, **given_as)
        assert rate.factor(49, TOTAL) == pytest.approx(0.5)
        assert [rate.factor(i, TOTAL) for i in (100, 5000, 8000)] == [1, 1, 1]
        for share in (0.01, 0.25, 0.81, 1.0):
            found = rate.factor(round(8000 + 2000 * share), TOTAL)
            assert found == pytest.approx(1 - share**0.5, abs=1e-9)


def test_a_fall_longer_than_training_takes_all_of_it() -> None:
    long = AdamW(schedule="cosine", decay_images=3 * TOTAL)
    assert long.factor(TOTAL // 2, TOTAL) == AdamW(schedule="cosine").factor(TOTAL // 2, TOTAL)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"schedule": "wsd"}, "'wsd' holds the rate and then lets it fall: give 'decay_images'"),
        ({"schedule": "cosine", "cooldown": 0.5, "decay_images": 10}, "both are given"),
        ({"schedule": "cosine", "decay_from": 10}, "give 'decay_images' as its length too"),
    ],
)
def test_a_fall_has_one_length(options, what) -> None:
    with pytest.raises(ValueError, match=what):
        AdamW(**options)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_a_fall_may_begin_anywhere_and_end_above_zero_where_the_rate_stays(schedule) -> None:
    """Whatever the length of training, which may be shorter."""
    rate = AdamW(schedule=schedule, decay_from=3000, decay_images=2000, floor=0.4)
    for total in (TOTAL, 2 * TOTAL, 4000):
        assert [rate.factor(i, total) for i in (0, 2999, 3000)] == [1, 1, 1]
        middle = {"cosine": 0.5, "linear": 0.5, "wsd": 1 - 0.5**0.5}[schedule]
        assert rate.factor(4000, total) == pytest.approx(0.4 + 0.6 * middle)
        assert [rate.factor(i, total) for i in (5000, 9000)] == pytest.approx([0.4, 0.4])


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_floor_raises_the_end_of_a_fall_that_fills_training(schedule) -> None:
    rate = AdamW(schedule=schedule, floor=0.1)
    found = [rate.factor(i, TOTAL) for i in (0, TOTAL // 2, TOTAL)]
    assert found == pytest.approx([1, 0.55, 0.1])


@given(images=st.integers(0, 999))
def test_warm_up_is_linear_and_never_zero(images) -> None:
    factor = schedule_factor("constant", images, TOTAL, 1000, 1.0)
    assert factor == pytest.approx((images + 1) / 1000)
    assert factor > 0


@pytest.mark.parametrize("cls", [AdamW, SGD])
def test_weight_decay_spares_vectors_and_embeddings(cls) -> None:
    from e2ediff_testing import make_nets

    table = ("online.embed_label.weight", torch.nn.Parameter(torch.ones(3, 4)))
    named = [*make_nets().online.named_parameters(), table]
    decayed, spared = cls(weight_decay=0.1).build(named).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert any(p is named[-1][1] for p in spared["params"])
