"""The alarm on synthetic latents: raised within two windows of a collapse, else silent."""

from __future__ import annotations

import math

import pytest
import torch

from e2ediff.condition import ClassLabels
from e2ediff.diagnostic import Probe
from e2ediff.host.recipe import Alarm, load_recipe
from e2ediff.monitor.alarm import CollapseDetector, diagnosis_steps
from e2ediff.monitor.monitor import Monitor
from e2ediff.parts.diagnostics.latent_health import LatentHealth, content_std, effective_rank

P, N, D = 64, 4, 16
EVERY = 25  # steps between two diagnoses
LOOKS = 60
HEALTH = LatentHealth.figures
QUIET = {"loss/reconstruction": 0.1, "loss/denoising": 0.4, "grad_norm": 1.0}


def healthy(i: int, seed: int) -> torch.Tensor:
    """New noise at each look, with a spectrum that breathes, and a constant for each place."""
    g = torch.Generator().manual_seed(1000 * seed + i)
    spectrum = torch.linspace(1, 0.3, D) ** (1 + 0.3 * math.sin(i / 3 + seed))
    early = 0.6 + 0.4 * min(1.0, i / 4)  # fewer axes at first, as in training
    z = torch.randn(P, N, D, generator=g) * spectrum * torch.linspace(1, early, D)
    return z + 0.4 * torch.randn(1, N, D, generator=torch.Generator().manual_seed(seed))


def dead(i: int, seed: int) -> torch.Tensor:
    return healthy(i, seed) if i < 20 else healthy(0, seed).mean(dim=0).expand(P, N, D)


def rank_one(i: int, seed: int) -> torch.Tensor:
    z = healthy(i, seed)
    return z if i < 20 else z[..., :1].expand(P, N, D)


def slow_decay(i: int, seed: int) -> torch.Tensor:
    """All but one axis shrink by e in 200 steps."""
    shrink = torch.full((D,), math.exp(-max(0, i - 10) * EVERY / 200))
    shrink[0] = 1.0
    return healthy(i, seed) * shrink


def fading(i: int, seed: int) -> torch.Tensor:
    """The scale shrinks by e in 200 steps; the rank does not move."""
    return healthy(i, seed) * math.exp(-max(0, i - 10) * EVERY / 200)


def channel_by_channel(i: int, seed: int) -> torch.Tensor:
    alive = torch.arange(D) < D - max(0, i - 20)
    return healthy(i, seed) * alive


def positions_only(i: int, seed: int) -> torch.Tensor:
    """Constants of places take over, as under a batch norm; the rank does not move."""
    share = max(0.0, 1 - max(0, i - 20) / 10)
    g = torch.Generator().manual_seed(seed)
    return share * healthy(i, seed) + (1 - share) * 3 * torch.randn(1, N, D, generator=g)


def gone(z: torch.Tensor, first: torch.Tensor) -> bool:
    """The promise's own measure: rank below a quarter, or std below a tenth, of the first look."""
    centred = [(x - x.mean(dim=0)).flatten(0, 1) for x in (z, first)]
    low = effective_rank(centred[0]) < 0.25 * effective_rank(centred[1])
    return low or content_std(z) < 0.1 * content_std(first)


def follow(
    series, seed: int, alarm: Alarm | None = None, average=None
) -> tuple[int | None, int | None]:
    """The looks at which the latents were gone and at which the alarm went on.

    The averaged encoder's latents are the trained one's, or those of the series `average`.
    """
    detector, health = CollapseDetector(alarm or Alarm(), HEALTH), LatentHealth()
    first, lost, raised = series(1, seed), None, None
    for i in range(1, LOOKS):
        z = series(i, seed)
        probe = probe_of((average or series)(i, seed), z[:16])
        figures = health.measure(probe)
        detector.record(QUIET)
        found = detector.evaluate(figures, health.verdict(figures))
        lost = i if lost is None and gone(z, first) else lost
        raised = i if raised is None and found.change == "collapse" else raised
    return lost, raised


def probe_of(z: torch.Tensor, trained: torch.Tensor) -> Probe:
    x, condition = torch.zeros(len(z), 1, 4, 4), ClassLabels(1).null(len(z))
    return Probe(x, condition, z, z, "x0", z_online=trained)


COLLAPSES = [dead, rank_one, slow_decay, fading, channel_by_channel, positions_only]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("series", COLLAPSES, ids=lambda s: s.__name__)
def test_every_kind_of_collapse_is_heard_within_two_windows(series, seed) -> None:
    lost, raised = follow(series, seed)
    assert lost is not None
    assert raised is not None
    assert raised - lost <= 2


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("series", COLLAPSES, ids=lambda s: s.__name__)
def test_a_collapse_that_a_slow_average_hides_is_heard_within_two_windows(series, seed) -> None:
    lost, raised = follow(series, seed, average=healthy)
    assert lost is not None
    assert raised is not None
    assert raised - lost <= 2


@pytest.mark.parametrize("series", [dead, rank_one])
def test_a_complete_collapse_is_heard_at_its_first_diagnosis(series) -> None:
    lost, raised = follow(series, 0, Alarm(window=5))
    assert raised == lost == 20


@pytest.mark.parametrize("seed", range(20))
def test_healthy_latents_are_never_called_collapsed(seed) -> None:
    assert follow(healthy, seed) == (None, None)


def test_a_fall_is_held_against_the_run_itself_where_no_bound_is_crossed() -> None:
    """A rank of 14 of 16 that falls to 6.5 is above the bound of 0.4."""
    detector = CollapseDetector(Alarm(fall=0.5), HEALTH)
    ranks = [14.0, 13.0, 6.5, 6.4]
    found = [detector.evaluate({"rank": r, "rank_fraction": r / 16}, []) for r in ranks]
    assert [f.change for f in found] == ["", "", "", "collapse"]
    assert found[-1].signs == ["the effective rank fell from 14 to 6.4"]
    off = CollapseDetector(Alarm(fall=0.0), HEALTH)
    assert not any(off.evaluate({"rank": r}, []).signs for r in ranks)


def test_one_bad_look_is_no_alarm_and_the_alarm_goes_off_again() -> None:
    detector = CollapseDetector(Alarm(window=2), HEALTH)
    said = [
        detector.evaluate({}, signs).change for signs in (["x"], [], ["x"], ["x"], ["x"], [], [])
    ]
    assert said == ["", "", "", "collapse", "", "recovered", ""]


def test_losses_that_vanish_are_heard_without_any_figure() -> None:
    detector = CollapseDetector(Alarm(), HEALTH)
    detector.record({"loss/a": 1e-7, "loss/b": 0.0, "grad_norm": 1.0})
    found = detector.evaluate({}, [])
    assert found.change == "collapse"
    assert "every loss is below 1e-06" in found.signs[0]


@pytest.mark.parametrize(
    "record",
    [
        {"loss/a": 1e-7, "loss/b": 0.1, "grad_norm": 1.0},
        {"loss/a": 0.0, "loss/b": 1e-5},
        {"grad_norm": 0.0, "loss/a": 0.5},
        {"lr": 0.0},
        {},
    ],
)
def test_one_loss_at_zero_or_no_gradient_alone_is_no_alarm(record) -> None:
    detector = CollapseDetector(Alarm(), HEALTH)
    detector.record(record)
    assert detector.evaluate({"rank": 9.0, "latent_std": 1.0}, []).signs == []


def test_no_gradient_on_degenerate_latents_is_heard_at_once() -> None:
    detector = CollapseDetector(Alarm(window=3), HEALTH)
    detector.record({"loss/denoising": 0.0, "loss/reconstruction": 0.1, "grad_norm": 1e-9})
    found = detector.evaluate({"rank": 3.0, "rank_fraction": 0.2, "latent_std": 1.0}, ["low rank"])
    assert found.change == "collapse"
    assert any("gradient" in sign for sign in found.signs)


def test_the_state_is_json_and_restores_the_watch() -> None:
    from e2ediff.store.manifest import plain

    detector = CollapseDetector(Alarm(), HEALTH, attempt=2, anchor=64)
    detector.evaluate({"rank": 9.0, "latent_std": 1.0}, ["x"])
    other = CollapseDetector(Alarm(), HEALTH)
    other.restore(plain(detector.state(), "state"))
    assert other == detector
    other.evaluate({"rank": 10.0}, [])
    assert detector.best["rank"] == 9.0


def test_returns_are_bounded_and_only_for_rollback() -> None:
    assert not CollapseDetector(Alarm(), HEALTH, anchor=8).may_return
    assert not CollapseDetector(Alarm(policy="rollback"), HEALTH).may_return
    assert CollapseDetector(Alarm(policy="rollback", attempts=1), HEALTH, anchor=0).may_return
    assert not CollapseDetector(
        Alarm(policy="rollback", attempts=1), HEALTH, anchor=0, attempt=1
    ).may_return


@pytest.mark.parametrize(
    ("cadence", "steps"),
    [
        ("{diagnose: 4}", [4, 8, 12]),
        ("{diagnose: 5}", [5, 10, 12]),
        ("{diagnose: 5, survey: 3}", [3, 5, 6, 9, 10, 12]),
        ("{diagnose: 99}", [12]),
    ],
)
def test_the_looks_that_are_counted_on_are_those_that_are_due(host, tiny_recipe, cadence, steps):
    recipe = load_recipe(host, tiny_recipe, [f"cadence={cadence}"])
    assert sorted(diagnosis_steps(recipe)) == steps
    monitor = Monitor(recipe, None, None, None, None, recipe.data.image, "")
    assert [s for s in range(1, 13) if monitor.due(s)] == steps
