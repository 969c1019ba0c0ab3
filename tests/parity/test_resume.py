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
from pictures import write_tree
from saves import await_checkpoint

from e2ediff import hookimpl
from e2ediff.errors import RecipeError
from e2ediff.host.plugins import load
from e2ediff.host.recipe import dump_recipe, load_recipe
from e2ediff.store.checkpoint import open_checkpoint, save
from e2ediff.store.run_directory import RunDirectory
from e2ediff.store.storage import Store
from e2ediff.train.continuation import refuse_other_recipe
from e2ediff.train.progress import Progress
from e2ediff.train.session import train

STEPS = 12
RECIPES = Path(__file__).parents[2] / "recipes"
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
            await_checkpoint(out, "images-000000000032")
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


# What may differ

FOLDER = "data={{name: image_folder, root: {}, size: 16, classes: 3, workers: 0}}"


@pytest.fixture
def tree(tmp_path) -> Path:
    return write_tree(tmp_path / "tree", [9, 4, 11], size=(16, 20))


@pytest.fixture
def stopped(tree, tiny_recipe, tmp_path) -> Path:
    """A run of class folders, stopped after 5 of 12 steps."""
    out = tmp_path / "run"
    run(tiny_recipe, out, *RUNS["coupled"], FOLDER.format(tree), stop_at=5)
    return out


def test_data_that_were_moved_and_are_read_otherwise_continue_a_run_bit_for_bit(
    stopped, tree, tiny_recipe, tmp_path
) -> None:
    run(tiny_recipe, tmp_path / "whole", *RUNS["coupled"], FOLDER.format(tree))
    moved = tree.rename(tmp_path / "moved")
    changes = ["name=other", "data.workers=1", "data.on_bad_image=skip", f"data.held_out={moved}"]
    run(tiny_recipe, stopped, *RUNS["coupled"], FOLDER.format(moved), *changes, resume=True)
    assert_same_run(tmp_path / "whole", stopped)
    lines = [json.loads(line) for line in (stopped / "events.jsonl").read_text().splitlines()]
    (event,) = [line for line in lines if line["kind"] == "continued"]
    assert event["changes"]["data.root"] == [f'"{tree}"', f'"{moved}"']
    assert event["changes"]["data.workers"] == ["0", "1"]


def other_labels(tree: Path) -> None:
    """As many images, and as many of each class in another order."""
    for old, new in (("n00000000", "x"), ("n00000001", "n00000000"), ("x", "n00000001")):
        (tree / old).rename(tree / new)


def fewer(tree: Path) -> None:
    next(tree.rglob("*.JPEG")).unlink()


@pytest.mark.parametrize(
    ("harm", "said"),
    [(other_labels, ", whose training images have other labels or another order."),
     (fewer, ", which holds 23 training images instead of 24.")],
)  # fmt: skip
def test_other_images_at_another_address_are_refused(
    harm, said, stopped, tree, tiny_recipe, tmp_path
) -> None:
    other = tree.rename(tmp_path / "other")
    harm(other)
    with pytest.raises(RecipeError) as caught:
        run(tiny_recipe, stopped, *RUNS["coupled"], FOLDER.format(other), resume=True)
    assert [str(problem) for problem in caught.value.problems] == [
        f'data.root: was "{tree}" in {stopped}, is "{other}" here{said} Start another run, or '
        f"continue this one as it was: e2ediff run --resume {stopped}"
    ]


@pytest.mark.parametrize(
    ("harm", "said"),
    [(other_labels, ", whose training images have other labels or another order."),
     (fewer, ", which holds 23 training images instead of 24.")],
)  # fmt: skip
def test_other_images_at_the_same_address_are_refused(
    harm, said, stopped, tree, tiny_recipe
) -> None:
    harm(tree)
    with pytest.raises(RecipeError) as caught:
        run(tiny_recipe, stopped, *RUNS["coupled"], FOLDER.format(tree), resume=True)
    assert [str(problem) for problem in caught.value.problems] == [
        f"data: has the same address as in {stopped} but other content{said} Give it the images "
        "that the run began with, or start another run."
    ]


def test_hidden_files_that_came_later_do_not_keep_a_run_from_going_on(
    stopped, tree, tiny_recipe, tmp_path
) -> None:
    run(tiny_recipe, tmp_path / "whole", *RUNS["coupled"], FOLDER.format(tree))
    for path in [*tree.rglob("*.JPEG")]:
        (path.parent / ".thumbnails").mkdir(exist_ok=True)
        (path.parent / ".thumbnails" / path.name).write_bytes(path.read_bytes())
        path.with_name(f"._{path.name}").write_bytes(b"Mac OS X")
    run(tiny_recipe, stopped, *RUNS["coupled"], FOLDER.format(tree), resume=True)
    assert_same_run(tmp_path / "whole", stopped)


def test_other_held_out_images_are_refused(stopped, tree, tiny_recipe, tmp_path) -> None:
    write_tree(tmp_path / "few", [1, 1, 1], size=(16, 20))
    change = f"data.held_out={tmp_path / 'few'}"
    with pytest.raises(RecipeError, match="which holds 3 held-out images instead of 24"):
        run(tiny_recipe, stopped, *RUNS["coupled"], FOLDER.format(tree), change, resume=True)


def test_a_checkpoint_that_does_not_say_of_which_images_it_is_keeps_its_address(
    stopped, tree, tiny_recipe, tmp_path
) -> None:
    """As those do that were written before checkpoints said it."""
    store = Store(str(stopped))
    found = open_checkpoint(store)
    files = {file: found.tensors(file) for file in found.files}
    state = {key: value for key, value in found.state.items() if key != "data"}
    save(store, found.images, found.step, files, state, keep=1)
    moved = tree.rename(tmp_path / "moved")
    with pytest.raises(RecipeError, match=r"does not record which images it was trained on\."):
        run(tiny_recipe, stopped, *RUNS["coupled"], FOLDER.format(moved), resume=True)
    moved.rename(tree)
    done = run(tiny_recipe, stopped, *RUNS["coupled"], FOLDER.format(tree), resume=True)
    assert done.exit_code == 0


@pytest.mark.parametrize(
    "pair", [("dsd_in256", "dsd_in256_8gpu"), ("dsd_in256_8gpu", "dsd_in256")], ids="-".join
)
def test_the_recipes_for_one_and_for_eight_gpus_continue_each_other(pair, tmp_path) -> None:
    needs("dsd")
    host = load()
    first, other = (load_recipe(host, str(RECIPES / f"{name}.yaml")) for name in pair)
    with RunDirectory.create(
        str(tmp_path / "run"), first.name, "", dump_recipe(host, first), {}
    ) as directory:
        changes = refuse_other_recipe(host, other, directory, "other.yaml", ())
    assert set(changes) == {"name", "data.workers"}


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
    how = "interrupted" if number == signal.SIGINT else "terminated"
    assert said.endswith(f"{out}: {how}; saved\ncontinue with: e2ediff run --resume {out}\n")
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == (state, code)
    stopped = fingerprint(out)["step"]
    assert status["step"] == stopped
    goal = max(STEPS, stopped + 3)
    run(tiny_recipe, out, *RUNS["coupled"], f"steps={goal}", resume=True)
    run(tiny_recipe, tmp_path / "straight", *RUNS["coupled"], f"steps={goal}")
    assert_same_run(tmp_path / "straight", out)
