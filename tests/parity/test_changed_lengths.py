"""A run that goes on with another length says what its schedule does there, if anything."""

from __future__ import annotations

import io
import json
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_recipe import tiny

from e2ediff import hookimpl
from e2ediff.host.plugins import load
from e2ediff.report.gather import gather_runs
from e2ediff.report.summary import summarize
from e2ediff.report.verdict import verdict
from e2ediff.train.progress import Progress
from e2ediff.train.session import train

FEW = {
    "diagnostics": "[]",
    "cadence": "{log: 1, diagnose: 100, preview: 100, checkpoint: 100}",
    "preview": "{rows: 1, classes: 1}",
}
STAGES = ["objective=two_stage", "backbone.trunks=denoiser_apart"]


def trained(place: Path, changes: list[str], *, stop_at: int = 0, resume: bool = False) -> str:
    """Train, at most up to this step; return what was said."""

    @hookimpl
    def step_ended(run, step):
        if step == stop_at:
            signal.raise_signal(signal.SIGTERM)

    (place / "tiny.yaml").write_text(tiny(**FEW))
    allow = ["optimizer.lr"] * any("optimizer.lr" in change for change in changes)
    said, host = io.StringIO(), load(SimpleNamespace(__name__="stopper", step_ended=step_ended))
    train(
        host,
        place / "tiny.yaml",
        changes,
        place / "run",
        resume=resume,
        progress=Progress(said),
        allow=allow,
    )
    return said.getvalue()


def logged(place: Path, name: str = "lr") -> dict[int, float]:
    """The learning rate of every step that was taken, as it was logged."""
    lines = map(json.loads, (place / "run/metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[name] for line in lines if name in line}


def events(place: Path) -> list[dict]:
    lines = map(json.loads, (place / "run/events.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "schedule"]


def optimizer(**options: object) -> str:
    given = ", ".join(f"{key}: {value}" for key, value in options.items())
    return f"optimizer={{name: adamw, lr: 0.001, {given}}}"


JUMPS = {  # optimizer, steps, the step at which it was stopped, and the new steps
    "cosine": (optimizer(schedule="cosine"), 4, 0, 8, True),
    "linear, in the middle": (optimizer(schedule="linear"), 4, 3, 8, True),
    "wsd, in its fall": (optimizer(schedule="wsd", cooldown=0.5), 4, 0, 8, True),
    "a last part of images": (optimizer(schedule="wsd", decay_images=16), 4, 0, 6, True),
    "shortened": (optimizer(schedule="cosine"), 8, 3, 4, False),
    "another optimizer": ("optimizer={name: muon, schedule: cosine}", 4, 0, 6, True),
}


@pytest.mark.parametrize("name", JUMPS)
def test_rates_before_and_after_are_those_that_the_steps_had(name, tmp_path) -> None:
    block, steps, stop_at, goal, rises = JUMPS[name]
    trained(tmp_path, [block, f"steps={steps}"], stop_at=stop_at)
    said = trained(tmp_path, [block, f"steps={goal}"], resume=True)
    rates, done = logged(tmp_path), stop_at or steps
    words = (
        f"step {done}: with {goal} steps instead of {steps} the learning rate was "
        f"{rates[done]:.4g} in the last step and is {rates[done + 1]:.4g} in the next"
    )
    (line,) = [line for line in said.splitlines() if "learning rate" in line]
    assert line.startswith(words)
    assert (rates[done + 1] > rates[done]) == rises
    hint = "use optimizer.schedule: constant, or wsd and lengthen them before its fall"
    assert line.endswith(hint) == rises
    (event,) = events(tmp_path)
    assert event["rates"] == {"lr": [rates[done], rates[done + 1]]}
    (run,) = (gathered := gather_runs(load(), [tmp_path / "run"])).runs
    told = f"{run.cell} was continued at {words}."
    assert told in verdict(gathered, summarize(gathered))


QUIET = {
    "constant": (optimizer(schedule="constant"), 4, 0, 8),
    "constant in its warm-up": (optimizer(schedule="constant", warmup_images=64), 4, 2, 8),
    "wsd before its fall": (optimizer(schedule="wsd", cooldown=0.25), 8, 3, 12),
    "the same length in images": (optimizer(schedule="cosine"), 4, 2, "images=32"),
    "the same length": (optimizer(schedule="cosine"), 4, 2, 4),
}


@pytest.mark.parametrize("name", QUIET)
def test_where_nothing_moves_nothing_is_said(name, tmp_path) -> None:
    block, steps, stop_at, goal = QUIET[name]
    trained(tmp_path, [block, f"steps={steps}"], stop_at=stop_at)
    changes = [goal if isinstance(goal, str) else f"steps={goal}"]
    changes += ["steps=null"] if isinstance(goal, str) else []
    said = trained(tmp_path, [block, *changes], resume=True)
    assert "learning rate" not in said
    assert events(tmp_path) == []


def test_a_group_with_a_schedule_of_its_own_is_named(tmp_path) -> None:
    """The others' rate stays, so that only the group's is reported."""
    block = optimizer(groups='[{match: "online.*norm*", schedule: linear}]')
    trained(tmp_path, [block, "steps=3"])
    said = trained(tmp_path, [block, "steps=6"], resume=True)
    rates = logged(tmp_path, "lr/online.*norm*")
    assert (
        f"with 6 steps instead of 3 the learning rate (lr/online.*norm*) was {rates[3]:.4g} in "
        f"the last step and is {rates[4]:.4g} in the next"
    ) in said
    assert list(events(tmp_path)[0]["rates"]) == ["lr/online.*norm*"]


def test_a_stage_that_begins_again_is_named(tmp_path) -> None:
    """Stages are shares of the length: the first one comes back where a run is lengthened."""
    trained(tmp_path, [*STAGES, "steps=4"])
    said = trained(tmp_path, [*STAGES, "steps=10"], resume=True)
    (event,) = events(tmp_path)
    before, after = event["phases"]
    assert before != after
    assert (
        f"with 10 steps instead of 4 it is in phase {after[0]} instead of {before[0]}, as phases "
        "are shares of the length"
    ) in said


def test_a_run_that_is_longer_already_trains_nothing_and_says_so(tmp_path) -> None:
    trained(tmp_path, ["steps=4"])
    before = (tmp_path / "run/metrics.jsonl").read_text()
    said = trained(tmp_path, ["steps=2"], resume=True)
    assert "step 4: nothing to train: the recipe now has 2 steps" in said
    assert (tmp_path / "run/metrics.jsonl").read_text() == before


def test_what_the_last_step_had_counts_where_the_recipe_was_changed_since(tmp_path) -> None:
    """A run that is given too few steps, trains nothing, and is lengthened after all."""
    block = optimizer(schedule="linear")
    trained(tmp_path, [block, "steps=6"])
    trained(tmp_path, [block, "steps=3"], resume=True)
    said = trained(tmp_path, [block, "steps=9"], resume=True)
    rates = logged(tmp_path)
    assert (
        f"step 6: with 9 steps instead of 3 the learning rate was {rates[6]:.4g} in the last step "
        f"and is {rates[7]:.4g} in the next. A schedule"
    ) in said


def test_what_the_last_step_had_counts_where_the_rate_itself_is_changed(tmp_path) -> None:
    block = optimizer(schedule="linear")
    trained(tmp_path, [block, "steps=4"])
    trained(tmp_path, [block, "steps=8", "optimizer.lr=0.1"], resume=True)
    rates = logged(tmp_path)
    assert rates[4] == pytest.approx(0.00025)
    (event,) = events(tmp_path)
    assert event["rates"]["lr"] == [rates[4], rates[5]]
