"""`--resume auto` continues a run or begins it, so that a job script needs no test of its own."""

from __future__ import annotations

import io
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import Done, e2ediff
from processes import together
from tiny_recipe import tiny

from e2ediff import hookimpl
from e2ediff.cli.run import command
from e2ediff.distributed.world import World
from e2ediff.host.plugins import load
from e2ediff.store.checkpoint import open_checkpoint
from e2ediff.store.storage import Store
from e2ediff.train.progress import Progress
from e2ediff.train.session import train


@pytest.fixture
def auto(tmp_path, monkeypatch):
    """The command that a job script repeats, in a folder with a recipe."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("E2EDIFF_RUNS", str(tmp_path / "runs"))
    Path("tiny.yaml").write_text(tiny(steps="2", cadence="{log: 1, checkpoint: 1}"))

    def give(*words: object) -> Done:
        return e2ediff("run", "tiny.yaml", "--resume", "auto", "--threads", 1, *words)

    return give


@pytest.mark.parametrize(
    ("words", "resume", "recipe", "out"),
    [
        ("runs/x", None, "runs/x", None),
        ("--resume runs/x", "must", "runs/x", None),
        ("runs/x --resume", "must", "runs/x", None),
        ("--resume must runs/x", "must", "runs/x", None),
        ("--resume=must runs/x", "must", "runs/x", None),
        ("--resume auto tiny.yaml", "auto", "tiny.yaml", None),
        ("--resume=auto tiny.yaml", "auto", "tiny.yaml", None),
        ("tiny.yaml --resume --out DIR", "must", "tiny.yaml", "DIR"),
        ("tiny.yaml --resume auto --out DIR", "auto", "tiny.yaml", "DIR"),
        ("tiny.yaml --out DIR --resume auto", "auto", "tiny.yaml", "DIR"),
        ("--resume --out DIR", "must", None, "DIR"),
        ("--resume ./auto", "must", "./auto", None),
        ("--resume -- auto", "must", "auto", None),
    ],
)
def test_the_run_may_follow_resume_with_and_without_a_mode(words, resume, recipe, out) -> None:
    found = command.make_context("run", words.split()).params
    assert (found["resume"], found["recipe"], found["out"]) == (resume, recipe, out)


def test_another_mode_is_refused_with_those_there_are(auto) -> None:
    done = e2ediff("run", "tiny.yaml", "--resume=maybe")
    assert done.code == 2
    assert "'must', 'auto'" in done.err


def test_the_same_command_begins_continues_and_finishes_a_run(auto, tmp_path) -> None:
    """By --out, and as the newest of its name; a finished run ends well and says so."""
    straight = tmp_path / "straight"
    for words in ([], ["--out", "mine"]):
        begun = auto(*words, "--set", "steps=1")
        assert begun.code == 0, begun.err
        assert "resumed" not in begun.err
        out = begun.out
        done = auto(*words)
        assert (done.code, done.out) == (0, out), done.err
        assert "at step 1" in done.err
        again = auto(*words)
        assert (again.code, again.out) == (0, out), again.err
        assert "all 2 steps are done; nothing is left to train" in again.err
        if not straight.exists():
            assert e2ediff("run", "tiny.yaml", "--out", straight, "--threads", 1).code == 0
        ours, theirs = (open_checkpoint(Store(str(p))) for p in (out.strip(), straight))
        assert [ours.sha256(f) for f in ours.files] == [theirs.sha256(f) for f in theirs.files]
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["tiny"]


def test_it_never_begins_anew_where_a_run_lost_something(auto) -> None:
    """Checkpoints, the file that makes it a run, or what a restart cut short has moved."""
    assert auto("--out", "run").code == 0
    shutil.copytree("run", "headless")
    Path("headless/run.json").unlink()
    shutil.copytree("headless", "halfway")
    Path("halfway/attempts/1").mkdir(parents=True)
    shutil.copy("run/run.json", "halfway/attempts/1")
    shutil.rmtree("run/checkpoints")
    for out, why in (
        ("run", "there is no finished checkpoint"),
        ("headless", "exists and is not empty"),
        ("halfway", "If --restart was interrupted here, repeat it"),
    ):
        before = sorted(Path(out).rglob("*"))
        done = auto("--out", out)
        assert done.code == 6, out
        assert why in done.err
        assert {*before} - {*Path(out).rglob("*")} == set()


def test_it_never_begins_where_others_files_are_nor_without_a_recipe(auto) -> None:
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("mine")
    done = auto("--out", "mine")
    assert (done.code, [p.name for p in Path("mine").iterdir()]) == (6, ["notes.txt"])
    done = e2ediff("run", "--resume", "auto", "nowhere")
    assert (done.code, Path("nowhere").exists()) == (6, False)
    done = e2ediff("run", "tiny.yaml", "--resume", "must", "--out", "nowhere")
    assert (done.code, Path("nowhere").exists()) == (6, False)


def test_several_processes_decide_alike(auto, tmp_path) -> None:
    """They begin together, stop together, and go on together."""

    @hookimpl
    def step_ended(run, step):
        if step == 1:
            signal.raise_signal(signal.SIGTERM)

    def act(rank: int) -> list[object]:
        world, said = World.join(), io.StringIO()
        host = load(SimpleNamespace(__name__="stopper", step_ended=step_ended))
        ended = train(
            host, str(tmp_path / "tiny.yaml"), ["microshards=2"], str(tmp_path / "run"),
            resume="auto", progress=Progress(said), world=world,
        )  # fmt: skip
        world.shutdown()
        return [ended.exit_code, "resumed" in said.getvalue()]

    assert together(act) == [[75, False], [75, False]]
    assert together(act) == [[0, True], [0, True]]
