"""A run that was interrupted and resumed is the run that never stopped, bit for bit.

On a CPU with one thread; every tensor of the last checkpoint and every logged figure is compared.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from e2ediff import hookimpl
from e2ediff.errors import RecipeError
from e2ediff.host.plugins import load
from e2ediff.run.checkpoint import open_checkpoint
from e2ediff.run.progress import Progress
from e2ediff.run.session import train
from e2ediff.run.storage import Store

STEPS = 12
DSD = "objective={name: dsd, augmentation: {jitter: 0.2}, decode_noise: {probability: 1.0}}"
EXTRAS = ["microshards=2", "ema=[{name: slow, decay: 0.99}]", "optimizer.warmup_images=40"]
EXTRAS += ["post_hoc={every: 4}"]
RUNS = {
    "coupled": ["optimizer.schedule=constant"],
    "detached": ["objective={name: detached, draws: 2}", "backbone.latent_norm=layer", *EXTRAS],
    "two_stage": [
        "objective=two_stage",
        "backbone.trunks=denoiser_apart",
        "optimizers={denoiser: {name: sgd, lr: 0.01, schedule: linear}}",
    ],
    "muon": ["optimizer={name: muon, schedule: wsd, cooldown: 0.5, adamw: {weight_decay: 0.1}}"],
    "dsd": [DSD, "optimizer.schedule=cosine", "backbone.latent_norm=position"],
}


def needs(objective: str) -> None:
    if objective == "dsd":
        pytest.importorskip("e2ediff_dsd", reason="the plugin e2ediff-dsd is not installed")


def run(recipe: str, out: Path, *overrides: str, stop_at: int = 0, resume: bool = False, by=None):
    """Train in this process; with `stop_at` a plugin sends the signal after that step."""

    @hookimpl
    def step_ended(run, step):
        if step == stop_at:
            signal.raise_signal(by or signal.SIGINT)

    host = load(SimpleNamespace(__name__="stopper", step_ended=step_ended))
    progress = Progress(io.StringIO())
    return train(host, recipe, overrides, str(out), resume=resume, progress=progress)


def fingerprint(out: Path) -> dict[str, object]:
    """Hash of every tensor and the state of the newest checkpoint, and all figures but times."""
    found = open_checkpoint(Store(str(out)))
    tensors = {
        f"{file}:{name}": hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest()
        for file in found.files
        for name, t in found.tensors(file).items()
    }
    assert len(tensors) > 50
    return {"step": found.step, "state": found.state, **tensors}


def figures(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("wall_")} for line in lines]


def assert_same_run(one: Path, other: Path) -> None:
    a, b = fingerprint(one), fingerprint(other)
    assert [k for k in a if a[k] != b[k]] == []
    assert a.keys() == b.keys()
    assert figures(one) == figures(other)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_text):
    """The uninterrupted run of each objective, made once."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            place = tmp_path_factory.mktemp(name)
            (place / "tiny.yaml").write_text(tiny_text)
            assert run(str(place / "tiny.yaml"), place / "run", *RUNS[name]).exit_code == 0
            made[name] = place / "run"
        return made[name]

    return of


@pytest.mark.parametrize("name", RUNS)
def test_a_run_repeats_itself(name, whole, tiny_recipe, tmp_path) -> None:
    needs(name)
    run(tiny_recipe, tmp_path / "again", *RUNS[name])
    assert_same_run(whole(name), tmp_path / "again")


@pytest.mark.parametrize("cut", [5, 6, 8])
@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_the_uninterrupted_one(name, cut, whole, tiny_recipe, tmp_path) -> None:
    """Cut in the first epoch and later (60 images, batches of 8), before and after a stage."""
    needs(name)
    out = tmp_path / "run"
    stopped = run(tiny_recipe, out, *RUNS[name], stop_at=cut)
    assert (stopped.exit_code, fingerprint(out)["step"]) == (130, cut)
    assert run(tiny_recipe, out, *RUNS[name], resume=True).exit_code == 0
    assert_same_run(whole(name), out)


def test_a_run_cut_again_and_again_is_still_the_same(whole, tiny_recipe, tmp_path) -> None:
    out = tmp_path / "run"
    for cut in (1, 2, 7, 11):
        run(tiny_recipe, out, *RUNS["coupled"], stop_at=cut, resume=cut > 1)
    run(tiny_recipe, out, *RUNS["coupled"], resume=True)
    assert_same_run(whole("coupled"), out)


def test_a_crash_loses_only_what_came_after_the_last_checkpoint(
    whole, tiny_recipe, tmp_path
) -> None:
    """The directory is copied while the run writes: what a power cut would leave."""
    out, copy = tmp_path / "run", tmp_path / "copy"

    @hookimpl
    def step_ended(run, step):
        if step == 7:
            shutil.copytree(out, copy, ignore=shutil.ignore_patterns(".lock"))

    changes = RUNS["coupled"]
    host = load(SimpleNamespace(__name__="copier", step_ended=step_ended))
    train(host, tiny_recipe, [*changes, "cadence.checkpoint=4"], str(out))
    assert fingerprint(copy)["step"] == 4
    assert figures(copy)[-1]["step"] == 7
    run(tiny_recipe, copy, *changes, resume=True)
    assert_same_run(whole("coupled"), copy)


def test_a_finished_run_goes_on_where_more_steps_are_asked_for(
    whole, tiny_recipe, tmp_path
) -> None:
    """With a schedule that does not depend on the length; step 8 was a last one, and surveyed."""
    run(tiny_recipe, tmp_path / "run", *RUNS["coupled"], "steps=8")
    run(tiny_recipe, tmp_path / "run", *RUNS["coupled"], resume=True)
    expected = figures(whole("coupled"))
    found = figures(tmp_path / "run")
    assert [m["step"] for m in found if "psnr" in m] == [0, 8, 12]
    assert [
        {k: b[k] for k in a if k in b} for a, b in zip(expected, found, strict=True)
    ] == expected
    assert fingerprint(whole("coupled")) == fingerprint(tmp_path / "run")


def test_resuming_a_finished_run_leaves_its_weights_alone(whole, tiny_recipe, tmp_path) -> None:
    shutil.copytree(whole("coupled"), tmp_path / "run")
    before = fingerprint(tmp_path / "run")
    assert run(tiny_recipe, tmp_path / "run", *RUNS["coupled"], resume=True).exit_code == 0
    assert fingerprint(tmp_path / "run") == before


@pytest.mark.parametrize("change", ["seed=1", "batch=4", "optimizer.lr=0.1", "label_drop=0.5"])
def test_a_continuation_that_would_compute_something_else_is_refused(
    change, whole, tiny_recipe, tmp_path
) -> None:
    shutil.copytree(whole("coupled"), tmp_path / "run")
    with pytest.raises(RecipeError, match=change.partition("=")[0].partition(".")[0]):
        run(tiny_recipe, tmp_path / "run", *RUNS["coupled"], change, resume=True)


def test_observing_more_or_less_often_moves_no_weight(whole, tiny_recipe, tmp_path) -> None:
    rarely = ["cadence={log: 100, diagnose: 100, preview: 3, checkpoint: 2}", "diagnostics=[]"]
    run(tiny_recipe, tmp_path / "run", *RUNS["coupled"], *rarely, "preview.rows=2")
    a, b = fingerprint(whole("coupled")), fingerprint(tmp_path / "run")
    assert a.pop("state")["averages"] == b.pop("state")["averages"]
    assert a == b


@pytest.mark.parametrize(
    ("number", "code", "state"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 75, "preempted")],
    ids=["SIGINT", "SIGTERM"],
)
def test_a_signal_ends_the_command_with_a_checkpoint_and_its_code(
    number, code, state, whole, tiny_recipe, tmp_path
) -> None:
    """In a process of its own, as a person or a cluster sends it; the rest is done by resuming."""
    out = tmp_path / "run"
    # Long enough to be hit in the middle; the length may differ between run and continuation.
    command = [sys.executable, "-m", "e2ediff", "run", tiny_recipe, "--threads", "1"]
    command += ["--out", str(out), "--set", "cadence.checkpoint=2"]
    for change in RUNS["coupled"]:
        command += ["--set", change]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command, "--set", "steps=100000"], env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 60
        log = out / "metrics.jsonl"
        while not (log.exists() and log.read_text().count("\n") > 3):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in said
    assert "continue with --resume" in said
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == (state, code)
    stopped = fingerprint(out)["step"]
    assert status["step"] == stopped
    goal = max(STEPS, stopped + 3)
    run(tiny_recipe, out, *RUNS["coupled"], f"steps={goal}", resume=True)
    run(tiny_recipe, tmp_path / "straight", *RUNS["coupled"], f"steps={goal}")
    assert_same_run(tmp_path / "straight", out)
