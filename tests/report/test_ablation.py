"""Ablations from end to end: what is trained, what fails, what resuming leaves alone."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import e2ediff
from tiny_recipe import tiny

from e2ediff.ablate.grid import Cell
from e2ediff.ablate.group import Group
from e2ediff.ablate.plan import plan_ablation, plan_cells
from e2ediff.ablate.train import exit_code, train_all
from e2ediff.distributed.signals import Stop
from e2ediff.errors import RunDirectoryError
from e2ediff.store.checkpoint import open_checkpoint
from e2ediff.store.run_directory import RunDirectory
from e2ediff.store.storage import Store
from e2ediff.train.progress import Progress


def runs(group: Path) -> dict[str, str]:
    """State of every run of a group."""
    found = {}
    for path in sorted((group / "runs").iterdir()):
        found[path.name] = RunDirectory.open(str(path)).status()["state"]
    return found


def test_every_cell_is_trained_with_every_seed_and_a_failing_one_stops_nobody(made):
    assert runs(made.path) == {
        f"{cell}-seed{seed}": "done" for cell in ("coupled", "detached") for seed in (0, 1)
    }
    report = json.loads((made.path / "report.json").read_text())
    cells = {cell["name"]: cell for cell in report["cells"]}
    assert [(c["runs"], c["counted"]) for c in cells.values()] == [(2, 2), (2, 2), (2, 0)]
    failed = [run for run in report["runs"] if run["state"] == "failed"]
    assert [run["seed"] for run in failed] == [0, 1]
    assert all(run["error"].startswith("data.root: no folder <script>") for run in failed)
    assert report["command"][:3] == ["e2ediff", "ablate", "tiny.yaml"]


def test_failures_are_printed_and_the_exit_code_is_theirs(made):
    assert made.done.code == 5
    assert made.done.out == "groups/tiny\n"
    lines = [line for line in made.done.err.splitlines() if line.startswith("failed: ")]
    assert len(lines) == 2
    assert lines[0].endswith("`--set data.root=/path/to/train`.")


def test_the_newest_ablation_is_that_of_the_recipe_s_name_even_if_it_is_damaged(group, host):
    """The second ablation of `tiny` and the first of a recipe called `tiny-2` look alike."""

    def latest(name: str) -> str:
        axes, changes = ["objective=coupled,detached"], [f"name={name}"]
        return Group.latest(plan_ablation(host, "tiny.yaml", axes, "0", changes))

    spec = json.loads((group / "spec.json").read_text())
    newer = group.with_name("tiny-2")
    newer.mkdir()
    (newer / "spec.json").write_text(json.dumps({**spec, "name": "tiny-2"}))
    assert latest("tiny") == "groups/tiny"
    assert latest("tiny-2") == "groups/tiny-2"
    (newer / "spec.json").write_text("{")
    assert latest("tiny") == "groups/tiny-2"
    with pytest.raises(RunDirectoryError, match=r"tiny-2/spec\.json: is damaged"):
        Group.open("groups/tiny-2")
    # One that was killed at its beginning has a recipe alone.
    (newer / "spec.json").unlink()
    (newer / "recipe.yaml").write_bytes((group / "recipe.yaml").read_bytes())
    assert latest("tiny") == "groups/tiny-2"
    (newer / "recipe.yaml").write_text("name: tiny-2")
    assert latest("tiny") == "groups/tiny"


def test_cells_start_from_equal_weights_and_see_equal_data(made):
    """The first look, before any step, and the first batch's reconstruction loss."""
    for seed in (0, 1):
        first = [
            RunDirectory.open(str(made.path / "runs" / f"{cell}-seed{seed}")).read_metrics()[:2]
            for cell in ("coupled", "detached")
        ]
        for figure in ("psnr", "rank", "latent_std", "unexplained@0.5"):
            assert first[0][0][figure] == first[1][0][figure]
        loss = "loss/reconstruction"
        assert first[0][1][loss] == pytest.approx(first[1][1][loss], rel=1e-6)


def test_resume_skips_runs_that_are_done_and_continues_the_others(group, made):
    spec = json.loads((group / "spec.json").read_text())
    spec["vary"] = ["objective=coupled,detached"]  # without the cell that would fail again
    (broken,) = [cell for cell in spec["cells"] if "image_folder" in cell]
    del spec["cells"][broken]
    (group / "spec.json").write_text(json.dumps(spec))
    words = [spec["vary"][0] if w.startswith("objective=") else w for w in made.words]
    status = group / "runs" / "coupled-seed1" / "status.json"
    text = json.loads(status.read_text())
    status.write_text(json.dumps({**text, "state": "preempted"}))
    before = {
        p: p.stat().st_mtime_ns
        for run in ("coupled-seed0", "detached-seed0", "detached-seed1")
        for p in (group / "runs" / run).rglob("*")
    }
    done = e2ediff(*words, "--resume")
    assert done.code == 0, done.err
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert done.err.count("done before") == 3
    assert "coupled-seed1: done after" in done.err
    assert set(runs(group).values()) == {"done"}
    kinds = [e["kind"] for e in RunDirectory.open(str(status.parent)).read_events()]
    assert kinds.count("kernels") == 2  # started, and started again


def test_more_seeds_join_an_ablation_that_is_resumed(group, made):
    """Only the new ones train; the report and the command that repeats it have all of them."""
    spec = json.loads((group / "spec.json").read_text())
    spec["vary"] = ["objective=detached"]
    spec["cells"] = {"detached": spec["cells"]["detached"]}
    spec["baseline"] = "detached"
    (group / "spec.json").write_text(json.dumps(spec))
    words = [spec["vary"][0] if w.startswith("objective=") else w for w in made.words]
    words[words.index("0,1")] = "0,1,5"
    done = e2ediff(*words, "--resume")
    assert done.code == 0, done.err
    assert done.err.count("done before") == 2
    report = json.loads((group / "report.json").read_text())
    assert [run["seed"] for run in report["runs"]] == [0, 1, 5]
    assert {run["state"] for run in report["runs"]} == {"done"}
    assert report["command"][report["command"].index("--seeds") + 1] == "0,1,5"


def test_resuming_another_ablation_is_refused_with_both(group, made):
    words = list(made.words)
    words[words.index("0,1")] = "0,2"
    done = e2ediff(*words, "--resume")
    assert done.code == 3
    assert "--seeds: was [0, 1] in groups/tiny, is [0, 2] here." in done.err
    recipe = Path("tiny.yaml")
    recipe.write_text(recipe.read_text().replace("batch: 8", "batch: 4"))
    done = e2ediff(*made.words, "--resume")
    assert done.code == 3
    assert "cells.coupled.batch: was 8 in groups/tiny, is 4 here." in done.err


def test_an_ablation_begun_twice_is_refused(group, made):
    done = e2ediff(*made.words, "--out", "groups/tiny")
    assert done.code == 6
    assert "groups/tiny: exists and is not empty" in done.err
    with Group.open("groups/tiny"):
        done = e2ediff(*made.words, "--resume")
    assert done.code == 6
    assert "is training in it" in done.err


def test_a_damaged_specification_is_refused(group):
    spec = group / "spec.json"
    for text in ("", "[]", "{}", '{"cells": {"../x": {}}}'):
        spec.write_text(text)
        done = e2ediff("report", "groups/tiny")
        assert done.code == 6
        assert "spec.json: is damaged" in done.err


class _StopsOnce(Stop):
    """Asked to stop as soon as a run has logged something."""

    def __init__(self, log: Path) -> None:
        super().__init__()
        self.log = log

    @property
    def asked(self) -> bool:
        """Whether the file is there."""
        if self.log.exists() and self.log.read_text().count("\n") > 3:
            self.signal = signal.SIGTERM
        return self.signal is not None


def test_a_stopped_ablation_saves_what_is_training_and_starts_nothing_more(
    tmp_path, monkeypatch, host, tiny_text, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(tiny_text)
    plan = plan_ablation(host, "tiny.yaml", ["objective=coupled,detached"], "0", ["steps=100000"])
    group = Group.create(None, plan, {})
    with Progress() as progress, _StopsOnce(tmp_path / group.run("coupled-seed0") /
                                            "metrics.jsonl") as stop:  # fmt: skip
        ended = train_all(
            group, plan.jobs, at_once=1, threads=1, share=1, progress=progress, stop=stop
        )
        assert exit_code(ended, stop) == 75
    assert [(e.job.place, e.exit_code) for e in ended] == [("coupled-seed0", 75)]
    assert runs(Path(group.path)) == {"coupled-seed0": "preempted"}
    assert RunDirectory.open(group.run("coupled-seed0")).status()["last_checkpoint"]
    assert "coupled-seed0: saved after" in capsys.readouterr().err


def test_a_cell_is_trained_by_the_recipe_of_its_own(tmp_path, monkeypatch, host, tiny_text):
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(tiny_text)
    Path("other.yaml").write_text(tiny_text.replace("batch: 8", "batch: 4"))
    grid = [Cell("base", ()), Cell("other", (), "other.yaml")]
    plan = plan_cells(host, "tiny.yaml", grid, [0], ["steps=2"], "base", "steps")
    with Group.create("out", plan, {}) as group, Progress() as progress, Stop() as stop:
        ended = train_all(
            group, plan.jobs, at_once=1, threads=1, share=1, progress=progress, stop=stop
        )
    assert [one.exit_code for one in ended] == [0, 0]
    texts = [Path(group.run(job.place), "resolved.yaml").read_text() for job in plan.jobs]
    assert ["batch: 4" in text for text in texts] == [False, True]


def until(ready, seconds: float = 120) -> None:
    """Wait for it, looking often."""
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "nothing came of it"
        time.sleep(0.005)


@pytest.mark.skipif(sys.platform != "linux", reason="the lock names the process on Linux")
def test_an_ablation_killed_in_the_middle_of_a_cell_ends_as_the_undisturbed_one(
    tmp_path, monkeypatch
):
    """SIGKILL to the command and to the run that it has started, as when a machine fails."""
    monkeypatch.chdir(tmp_path)
    often = "{log: 1, diagnose: 20, preview: 1000, checkpoint: 10}"
    Path("tiny.yaml").write_text(tiny(steps="60", cadence=often, diagnostics="[reconstruction]"))
    words = ["ablate", "tiny.yaml", "--vary", "objective=detached", "--seeds", "3"]
    words += ["--threads", "1"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = e2ediff(*words, "--out", whole)
    assert done.code == 0, done.err

    run = broken / "runs" / "detached-seed3"
    command = subprocess.Popen(
        [sys.executable, "-m", "e2ediff", *words, "--out", str(broken)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until(lambda: len([*run.glob("checkpoints/images-*/MANIFEST.json")]) > 1)
    os.kill(int((run / ".lock").read_text().split()[0]), signal.SIGKILL)
    command.kill()
    command.wait()
    steps = len((run / "metrics.jsonl").read_text().splitlines())
    assert 20 <= steps < 60
    assert not RunDirectory.open(str(run)).status().get("exit_code")

    done = e2ediff(*words, "--out", broken, "--resume")
    assert done.code == 0, done.err
    undisturbed, continued = (result(out / "runs" / "detached-seed3") for out in (whole, broken))
    assert len(undisturbed["metrics"]) > 60
    assert continued == undisturbed
    kinds = [e["kind"] for e in RunDirectory.open(str(run)).read_events()]
    assert kinds.count("kernels") == 2, "it was resumed, not begun again"
    figures = []
    for out in (whole, broken):
        (cell,) = json.loads((out / "report.json").read_text())["cells"]
        figures.append({k: v for k, v in cell["figures"].items() if not k.startswith("wall_")})
    assert figures[0] == figures[1]
    assert figures[0]["psnr"]["n"] == 1


def result(run: Path) -> dict[str, object]:
    """What a run computed: its figures but for times of the clock, and all tensors' bytes."""
    lines = RunDirectory.open(str(run)).read_metrics()
    last = open_checkpoint(Store(str(run)))
    return {
        "metrics": [{k: v for k, v in m.items() if not k.startswith("wall_")} for m in lines],
        "step": last.step,
        **{
            f"{file}:{name}": hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest()
            for file in last.files
            for name, t in last.tensors(file).items()
        },
    }


SLOW = '''
import time

import attrs

from e2ediff import hookimpl
from e2ediff.parts.objectives import Detached


@attrs.frozen(kw_only=True)
class Slow(Detached):
    """Detached, with steps that take a minute."""

    def terms(self, nets, batch, draw, phase):
        if not batch.x.is_meta:  # as it is where FLOPs are counted
            print("in a step", flush=True)
            time.sleep(60)
        return super().terms(nets, batch, draw, phase)


@hookimpl
def register(add):
    add("objectives", "slow", Slow)
'''


def test_a_second_interruption_leaves_no_run_that_looks_as_if_it_trained(tmp_path) -> None:
    """Its process ends within the step, and its status and its report say why."""
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "tiny.yaml").write_text(tiny(diagnostics="[]"))
    words = ["ablate", "tiny.yaml", "--vary", "objective=slow,detached", "--seeds", "0"]
    words += ["--plugin", "slow.py", "--threads", "1", "--out", "group"]
    with subprocess.Popen(
        [sys.executable, "-m", "e2ediff", *words], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    ) as process:
        log, deadline = tmp_path / "group/logs/slow-seed0.log", time.monotonic() + 90
        while not (log.exists() and "in a step" in log.read_text()):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        began = time.monotonic()
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)
        _, said = process.communicate(timeout=60)
        assert time.monotonic() - began < 50, "not after the step"
    assert process.returncode == 130
    assert "interrupt again to end them at once without saving" in said
    status = RunDirectory.open(tmp_path / "group/runs/slow-seed0").status()
    assert status["state"] == "preempted"
    assert status["reason"] == "terminated a second time, without saving"
    done = e2ediff("report", tmp_path / "group/runs/slow-seed0")
    assert "Its state is 'preempted' (terminated a second time, without saving)" in done.err
