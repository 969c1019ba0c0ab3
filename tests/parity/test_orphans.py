"""Processes end with the one that started them, also where that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import e2ediff
from long_work import busy
from tiny_recipe import tiny
from torch.utils.data import Dataset

from e2ediff.distributed.children import in_processes
from e2ediff.distributed.parent import follow
from e2ediff.loading.batches import read
from e2ediff.store.checkpoint import open_checkpoint
from e2ediff.store.run_directory import RunDirectory
from e2ediff.store.storage import Store

SECONDS = 20


class Busy(Dataset[int]):
    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __getitem__(self, index: int) -> int:
        return next(busy(self.folder))


def computing(folder: str) -> None:
    with in_processes(busy, [(folder,)] * 2, makes="slept", advice="") as results:
        list(results)


def reading(folder: str) -> None:
    list(read(Busy(folder), range(8), 2, option="--workers"))


def forking(folder: str) -> None:
    """As where the kernel does not tell, and for processes that a thread started."""
    parent = os.getpid()
    if os.fork() == 0:
        follow(parent, by_kernel=False)
        next(busy(folder))
    time.sleep(10 * SECONDS)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("act", [computing, reading, forking])
def test_a_process_does_not_outlive_a_parent_that_is_killed(
    act: Callable[[str], None], tmp_path: Path
) -> None:
    """In the middle of its work, at which it never looks up."""
    count = 1 if act is forking or (len(os.sched_getaffinity(0)) == 1 and act is reading) else 2
    parent = os.fork()
    if parent == 0:
        try:
            act(str(tmp_path))
        finally:
            os._exit(1)
    until = time.monotonic() + 3 * SECONDS
    while len(found := list(tmp_path.iterdir())) < count:
        assert time.monotonic() < until
        time.sleep(0.05)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    until = time.monotonic() + SECONDS
    while left := [p.name for p in found if alive(int(p.name))]:
        assert time.monotonic() < until, left
        time.sleep(0.05)


def test_the_processes_of_a_launcher_that_is_killed_save_and_end(tmp_path) -> None:
    """The run is free at once, and goes on as if nothing had happened."""
    recipe, out = tmp_path / "tiny.yaml", tmp_path / "run"
    recipe.write_text(tiny(steps="100000", microshards="2"))
    words = ["run", recipe, "--threads", 1, "--nproc", 2, "--out", out]
    with subprocess.Popen(
        [sys.executable, "-m", "e2ediff", *map(str, words)], stderr=subprocess.DEVNULL
    ) as launcher:
        until = time.monotonic() + 6 * SECONDS
        while not (out / "metrics.jsonl").exists():
            assert launcher.poll() is None
            assert time.monotonic() < until
            time.sleep(0.1)
        launcher.kill()
    until = time.monotonic() + 2 * SECONDS
    while RunDirectory.open(str(out)).former_status().get("state") != "preempted":
        assert time.monotonic() < until, "still training"
        time.sleep(0.1)
    steps = RunDirectory.open(str(out)).status()["step"] + 1
    more = ("--threads", 1, "--set", f"steps={steps}")
    until = time.monotonic() + SECONDS
    while (done := e2ediff("run", "--resume", out, *more)).code == 6:
        assert time.monotonic() < until, done.err  # it holds the lock until it ends
        time.sleep(0.1)
    assert done.code == 0, done.err
    assert e2ediff("run", recipe, "--out", tmp_path / "straight", *more).code == 0
    ours, theirs = (open_checkpoint(Store(str(p))) for p in (out, tmp_path / "straight"))
    assert ours.step == steps
    assert [ours.sha256(f) for f in ours.files] == [theirs.sha256(f) for f in theirs.files]
