"""What a plugin's part raises in a run: diagnostics and metrics are left out, others stop it."""

from __future__ import annotations

import json

import pytest
import torch
from command_line import e2ediff

from e2ediff.errors import PluginError
from e2ediff.monitor.isolation import Isolated

OBSERVERS = """
import attrs
from attrs import validators
from e2ediff import hookimpl
from e2ediff.diagnostic import Diagnostic
from e2ediff.metric import Metric, MetricValue

@attrs.frozen(kw_only=True)
class Raises(Diagnostic):
    "Raises."
    def measure(self, probe):
        raise RuntimeError("boom")

@attrs.frozen(kw_only=True)
class Words(Diagnostic):
    "Its figure is no number."
    def measure(self, probe):
        return {"words": "none"}

@attrs.frozen(kw_only=True)
class Judges(Diagnostic):
    "Its verdict exits."
    def measure(self, probe):
        return {"judged": 1.0}
    def verdict(self, values):
        raise SystemExit("no")

@attrs.frozen(kw_only=True)
class Refuses(Diagnostic):
    "Refuses its default."
    bound: int = attrs.field(default=3, validator=validators.lt(2))
    def measure(self, probe):
        return {}

@attrs.frozen(kw_only=True)
class Asks(Diagnostic):
    "Has an option without a default."
    bound: int
    def measure(self, probe):
        return {"asked": 1.0}

@attrs.frozen(kw_only=True)
class Counts(Diagnostic):
    "Works."
    def measure(self, probe):
        return {"counted": len(probe.x)}

@attrs.frozen(kw_only=True)
class Divides(Metric):
    "Divides by zero."
    better = "low"
    def measure(self, made, real):
        return {"ratio": MetricValue(1 / 0)}

@hookimpl
def register(add):
    for cls in (Raises, Words, Judges, Refuses, Asks, Counts):
        add("diagnostics", cls.__name__.lower(), cls)
    add("metrics", "divides", Divides)
"""
TRAINED = """
import attrs
from e2ediff import hookimpl
from e2ediff.parts.objectives import Detached
from e2ediff.regularizer import Regularizer

@attrs.frozen(kw_only=True)
class Mine(Detached):
    "An objective."
    def terms(self, nets, batch, draw, phase):
        nets.online.encode(batch.x[:, :1])

@attrs.frozen(kw_only=True)
class Pull(Regularizer):
    "A regulariser."
    weight: float = 1.0
    def loss(self, z, draw):
        raise KeyError("pull")

@hookimpl
def register(add):
    add("objectives", "mine", Mine)
    add("regularizers", "pull", Pull)
"""


def test_diagnostics_and_metrics_that_fail_are_said_once_and_the_run_goes_on(
    inside, tiny_text
) -> None:
    inside.install("looks-on", OBSERVERS)
    (inside.cwd / "tiny.yaml").write_text(tiny_text)
    scores = "{every: 8, images: 8, features: random_projection, metrics: [divides, fid]}"
    done = e2ediff(
        "run", "tiny.yaml", "--set", "requires=[looks-on]", "--set", "steps=2",
        "--set", "cadence={log: 1, diagnose: 1, preview: 9, checkpoint: 9}",
        "--set", f"scores={scores}", "--out", "out",
    )  # fmt: skip
    assert done.code == 0, done.err
    failed = {
        "diagnostic looks_on.Raises": "RuntimeError: boom (looks_on.py:12)",
        "diagnostic looks_on.Words": "ValueError: could not convert string to float: 'none'",
        "diagnostic looks_on.Judges": "SystemExit: no (looks_on.py:26)",
        "diagnostic looks_on.Refuses": "ValueError: ",
        "metric looks_on.Divides": "ZeroDivisionError: division by zero (looks_on.py:53)",
    }
    lines = (inside.cwd / "out/events.jsonl").read_text().splitlines()
    events = [e for e in map(json.loads, lines) if e["kind"] in ("diagnostic_off", "metric_off")]
    assert len(events) == len(failed), "once each, at three looks and two scores"
    for part, why in failed.items():
        start = f"{part} failed, and the run goes on without it: {why}"
        assert any(e["text"].startswith(start) for e in events), [e["text"] for e in events]
        assert done.err.count(start) == 1
        assert all(event["kind"] == f"{part.split()[0]}_off" for event in events
                   if event["text"].startswith(part))  # fmt: skip
    rows = [
        json.loads(line) for line in (inside.cwd / "out/metrics.jsonl").read_text().splitlines()
    ]
    seen = {key for row in rows for key in row}
    assert {"counted", "judged", "rank"} <= seen, "figures of those that work"
    assert not {"words", "asked"} & seen
    assert any(key.startswith("gFD") for key in seen)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ("objective=mine", "line 11: "),
        ("regularizers=[pull]", "line 18: KeyError: 'pull'. "),
    ],
)
def test_what_is_part_of_the_loss_stops_the_run_and_names_its_plugin(
    inside, tiny_text, monkeypatch, change, what
) -> None:
    """The error is one of torch's where the plugin called it wrongly; a traceback is asked for."""
    inside.install("takes-part", TRAINED)
    (inside.cwd / "tiny.yaml").write_text(tiny_text)
    done = e2ediff("run", "tiny.yaml", "--set", change, "--out", "out")
    assert done.code == PluginError.exit_code
    (error,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert error.startswith(f"error: plugin 'takes-part' (takes-part 1.2), takes_part.py {what}")
    assert "Traceback" not in done.err
    assert json.loads((inside.cwd / "out/status.json").read_text())["exit_code"] == 4
    monkeypatch.setenv("E2EDIFF_TRACE", "1")
    assert "Traceback" in e2ediff("run", "tiny.yaml", "--set", change, "--out", "more").err


@pytest.mark.usefixtures("forks")
def test_a_traceback_is_printed_by_several_processes_too(site, tiny_text) -> None:
    site.install("takes-part", TRAINED)
    (site.cwd / "tiny.yaml").write_text(tiny_text)
    changes = ("--set", "regularizers=[pull]", "--set", "microshards=2")
    done = site.e2ediff("run", "tiny.yaml", *changes, "--nproc", "2", E2EDIFF_TRACE="1")
    assert done.returncode == PluginError.exit_code, done.stderr
    assert "error: plugin 'takes-part' (takes-part 1.2), takes_part.py line 18" in done.stderr
    assert "Traceback" in done.stderr
    assert "KeyError: 'pull'\n" in done.stderr


def test_no_part_is_blamed_for_memory() -> None:
    def work() -> int:
        raise torch.OutOfMemoryError

    isolated = Isolated()
    with pytest.raises(torch.OutOfMemoryError):
        isolated.call("diagnostic", object(), work, 0)
    assert not isolated.drain()
