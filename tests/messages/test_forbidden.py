"""Files and folders that the user may not read: one message that names them, nothing changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from command_line import e2ediff, trained
from forbidden import as_any_user
from tiny_recipe import tiny

from e2ediff.errors import CheckpointError
from e2ediff.store.checkpoint import list_checkpoints
from e2ediff.store.run_directory import RunDirectory
from e2ediff.store.storage import Store

COMMANDS = {
    "list": ["ckpt", "list", "run"],
    "verify": ["ckpt", "verify", "run"],
    "info": ["ckpt", "info", "run"],
    "prune": ["ckpt", "prune", "run", "--keep", "1"],
    "export": ["ckpt", "export", "run", "weights.safetensors"],
    "resume": ["run", "--resume", "run"],
    "report": ["report", "run", "--out", "page.html"],
    "compare": ["compare", "run", "run"],
    "sample": ["sample", "run", "--count", "2"],
    "eval": ["eval", "run", "--count", "8", "--features", "random_projection"],
}
READ = {"compare", "export", "info", "list", "report", "sample", "verify"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("run"), tiny(steps="2"))


@pytest.fixture
def run(finished: Path, tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("file", [".", "checkpoints", "samples", "run.json", "events.jsonl"])
def test_what_may_not_be_read_is_named(run: Path, file: str, name: str) -> None:
    before, place = content(run), run / file
    mode = place.stat().st_mode
    place.chmod(0)
    try:
        with as_any_user():
            done = e2ediff(*COMMANDS[name])
    finally:
        place.chmod(mode)
    if done.code == 0:  # one that has no need of it
        assert file != "."
    else:
        assert done.code in (5, 6, 8)
        assert "ermission denied" in done.err
        assert "Traceback" not in done.err
        assert place.name in done.err
    if name in READ - {"sample"}:
        assert content(run) == before


def test_a_checkpoint_that_may_not_be_opened_is_not_taken_for_an_unfinished_one(run: Path) -> None:
    """Of which nothing would be left after a resume from an older one."""
    (place,) = (run / "checkpoints").iterdir()
    place.chmod(0)
    try:
        with as_any_user(), pytest.raises(CheckpointError, match="cannot be read"):
            list_checkpoints(Store(str(run)), finished=True)
        with as_any_user():
            done = e2ediff("run", "--resume", "run")
    finally:
        place.chmod(0o755)
    assert (done.code, "checkpoints: cannot be read" in done.err) == (6, True)
    assert e2ediff("ckpt", "verify", "run").code == 0


def test_a_lock_is_given_back_where_a_log_cannot_be_repaired(run: Path) -> None:
    (run / "events.jsonl").chmod(0)
    directory = RunDirectory.open(str(run))
    with as_any_user(), pytest.raises(Exception, match="ermission denied"):
        directory.lock()
    (run / "events.jsonl").chmod(0o644)
    with RunDirectory.open(str(run)) as other:
        other.lock()
