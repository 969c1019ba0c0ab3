"""`recipes/dsd_in256.yaml` on a tree of ImageNet's form: 1,000 class folders, some images broken.

The recipe is the shipped one and the commands are real; its network is made small, because a
step of 205M parameters takes half a minute on a core: `benchmarks/imagenet_tree.py` runs that.
"""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import attrs
import pytest
import torch
from command_line import Done, e2ediff, needs, needs_dsd
from pictures import damage, write_tree

from e2ediff.store.checkpoint import open_checkpoint
from e2ediff.store.storage import Store

RECIPE = Path(__file__).parents[2] / "recipes" / "dsd_in256.yaml"
# What a core cannot do in seconds; everything else is as it is shipped, 256 pixels included.
SMALLER = (
    "batch=8", "microshards=2", "backbone.width=32", "backbone.depth=2", "backbone.heads=1",
    "probe={images: 8, calibration: 8}", "preview={rows: 1, classes: 1}", "sampler.steps=2",
    "cadence={log: 1, diagnose: 1000, preview: 1000, checkpoint: 1000}", "device=cpu",
)  # fmt: skip
STEPS = 6

# A norm of bfloat16 says on a CPU that it has no fused kernel.
pytestmark = [needs_dsd, pytest.mark.filterwarnings("ignore:Mismatch dtype")]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 to 4 images of a class, 2,999 in all; of every eighth class one image is broken."""
    tree = write_tree(
        tmp_path_factory.mktemp("imagenet") / "train", [2 + k % 3 for k in range(1000)]
    )
    for path in broken(tree)[::2]:
        damage(path)
    for path in broken(tree)[1::2]:
        path.write_bytes(b"<html>404</html>")
    return tree


def broken(tree: Path) -> list[Path]:
    return [tree / f"n{k:08}" / f"n{k:08}_1.JPEG" for k in range(0, 1000, 8)]


def run(tree: Path, out: Path, *words: str) -> Done:
    changes = (f"data.root={tree}", "data.on_bad_image=skip", f"steps={STEPS}", *SMALLER)
    sets = [word for change in changes for word in ("--set", change)]
    return e2ediff("run", RECIPE, "--out", out, *sets, *words)


def tensors(out: Path) -> dict[str, torch.Tensor]:
    opened = open_checkpoint(Store(str(out)))
    assert opened.step == STEPS
    return {f"{file}:{k}": t for file in opened.files for k, t in opened.tensors(file).items()}


def figures(out: Path) -> list[dict[str, float]]:
    """What every step logged, without times."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss/denoising" in row]
    return [{k: v for k, v in row.items() if not k.startswith("wall_")} for row in rows]


def stop_after_first_step(out: Path) -> threading.Thread:
    """What a batch system does: SIGTERM, as soon as the run has logged a step."""

    def work() -> None:
        log, deadline = out / "metrics.jsonl", time.monotonic() + 120
        while not (log.exists() and "loss/denoising" in log.read_text()):
            if time.monotonic() > deadline:
                return
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


@attrs.frozen
class Finished:
    out: Path
    said: str


@pytest.fixture(scope="module")
def whole(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = run(tree, out)
    assert done.code == 0, done.err
    return Finished(out, done.err)


def test_a_run_that_is_stopped_and_resumed_is_the_run_that_was_not(
    whole: Finished, tree: Path, tmp_path: Path
) -> None:
    """Every tensor of the last checkpoint, every logged figure, and every skipped image."""
    out = tmp_path / "stopped"
    thread = stop_after_first_step(out)
    stopped = run(tree, out)
    thread.join()
    assert stopped.code == 75, stopped
    assert 0 < json.loads((out / "status.json").read_text())["step"] < STEPS
    resumed = run(tree, out, "--resume")
    assert resumed.code == 0, resumed.err
    ours, theirs = tensors(out), tensors(whole.out)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert figures(out) == figures(whole.out)
    assert len(figures(whole.out)) == STEPS
    assert skipped(out) == skipped(whole.out)


def skipped(out: Path) -> set[str]:
    rows = (out / "bad_images.jsonl").read_text().splitlines()
    return {json.loads(row)["image"] for row in rows}


def test_a_run_counts_the_broken_images_it_met_and_lists_them_by_path(
    whole: Finished, tree: Path
) -> None:
    found = skipped(whole.out)
    assert found
    assert found <= {str(path) for path in broken(tree)}
    assert f"skipped {len(found)} damaged or too large images" in whole.said


def test_a_run_samples_images_of_a_class(whole: Finished, tmp_path: Path) -> None:
    done = e2ediff(
        "sample", whole.out, "--label", 207, "--count", 2, "--out", tmp_path / "samples"
    )
    assert done.code == 0, done.err
    assert len(list((tmp_path / "samples/images").glob("*.png"))) == 2


@needs("e2ediff-data")
def test_check_names_every_broken_image_among_a_thousand_classes(tree: Path) -> None:
    done = e2ediff("data", "check", tree, "--set", "size=32", "--workers", 0)
    assert done.code == 5
    assert [line.partition(": ")[0] for line in done.out.splitlines()] == [
        str(path) for path in broken(tree)
    ]
    assert re.search(r"125 of 2,999 images cannot be used", done.err)
