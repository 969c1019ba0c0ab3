"""A process that hangs is named, with its last step and stacks, and ends the run; work is not."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from processes import environment, free_port, together
from tiny_recipe import tiny

from e2ediff import hookimpl
from e2ediff.distributed.launch import launch
from e2ediff.distributed.signals import exit_code_of
from e2ediff.distributed.world import World
from e2ediff.errors import E2EDiffError, ResourceError
from e2ediff.host.plugins import load
from e2ediff.parts.sources import Synthetic
from e2ediff.train.progress import Progress
from e2ediff.train.session import train

LIMIT = 3.0


@pytest.fixture(autouse=True)
def soon(monkeypatch) -> None:
    monkeypatch.setenv("_E2EDIFF_LIMIT", str(LIMIT))
    monkeypatch.setenv("_E2EDIFF_JOIN", "2")


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny(steps="1000", microshards="2"))
    return str(path)


def run(recipe: str, out: Path, world: World, *changes: str, **hooks: object) -> int:
    plugin = SimpleNamespace(__name__="hangs", **{k: hookimpl(v) for k, v in hooks.items()})
    host = load(*[plugin] * bool(hooks))
    progress = Progress(io.StringIO())
    try:
        code = train(host, recipe, changes, str(out), progress=progress, world=world).exit_code
    except E2EDiffError as caught:  # the other one left first
        return exit_code_of(world.attribute_error(caught))
    world.shutdown()
    return code


def reason(out: Path) -> str:
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 8)
    return str(status["reason"])


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_process_is_named_and_ended_by_the_other(
    stopped, recipe, tmp_path, capfd
) -> None:
    """By SIGSTOP: it can write no stacks itself, and the first one holds the store of both."""
    out = tmp_path / "run"

    def act(rank: int) -> int:
        world = World.join()
        Path(tmp_path, str(rank)).write_text(str(os.getpid()))

        def stop() -> None:
            while not (out / "metrics.jsonl").exists():
                time.sleep(0.05)
            os.kill(int(Path(tmp_path, str(stopped)).read_text()), signal.SIGSTOP)

        if rank != stopped:
            threading.Thread(target=stop, daemon=True).start()
        return run(recipe, out, world)

    expected = [8, 8]
    expected[stopped] = -signal.SIGKILL
    assert together(act) == expected
    why = reason(out)
    assert why.startswith(f"process {stopped} of 2 (pid ")
    assert "hangs: it is stopped or its machine is gone, last seen at " in why
    assert f"Stacks of the processes are in {out}/stacks. What was saved is intact" in why
    assert capfd.readouterr().err.count(f"error: {why}") == 1
    assert "train/engine.py" in (out / f"stacks/rank-{1 - stopped}.txt").read_text()


def test_a_process_that_hangs_in_its_work_is_named_with_the_place(recipe, tmp_path) -> None:
    """Its other threads live on; both write their stacks."""
    out = tmp_path / "run"

    def act(rank: int) -> int:
        source = type(Synthetic(size=16, count=60).open())
        plain, reads = source.read, 0

        def read(self, indices):
            nonlocal reads
            reads += 1
            while rank == 1 and reads > 8:
                time.sleep(100)
            return plain(self, indices)

        source.read = read  # in this process, which ends with the test
        return run(recipe, out, World.join())

    assert together(act) == [8, 8]
    assert "process 1 of 2" in (why := reason(out))
    assert "process 0 of 2" not in why
    assert "hangs: it does nothing" in why
    assert "parity/test_hangs.py:" in why
    assert "in read" in (out / "stacks/rank-1.txt").read_text()
    assert "train/engine.py" in (out / "stacks/rank-0.txt").read_text()


def test_long_work_of_one_process_is_no_hang(recipe, tmp_path) -> None:
    """An observer of the first process takes longer than the limit, while the second waits."""

    def checkpoint_saved(run, path):
        time.sleep(1.7 * LIMIT)

    def act(rank: int) -> int:
        world = World.join()
        changes = ["steps=2", "cadence.checkpoint=100", "cadence.preview=100"]
        return run(recipe, tmp_path / "run", world, *changes, checkpoint_saved=checkpoint_saved)

    assert together(act) == [0, 0]
    assert not (tmp_path / "run/stacks").exists()


@contextlib.contextmanager
def alone(rank: int, size: int = 3) -> Iterator[int]:
    """The environment of one of several processes, of which no other comes."""
    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(rank, size, port).items():
            patch.setenv(name, value)
        yield port


def test_who_does_not_come_is_named_within_the_limit_of_the_join() -> None:
    """The first process tells whom it waited for; without it the others tell where they looked."""
    began = time.monotonic()
    with (
        alone(0),
        pytest.raises(
            ResourceError, match="of 3 processes 0 came within 2 seconds, and 1, 2 did not"
        ),
    ):
        World.join()
    with (
        alone(2) as port,
        pytest.raises(ResourceError, match=f"process 2 of 3 cannot .*:{port}: "),
    ):
        World.join()
    assert time.monotonic() - began < 20


def test_a_first_process_that_dies_before_the_others_came_ends_them(tmp_path) -> None:
    def act(rank: int) -> str:
        if rank == 0:
            threading.Timer(1, os._exit, [9]).start()
        os.environ["WORLD_SIZE"] = "3"
        with pytest.raises(ResourceError) as caught:
            World.join()
        return str(caught.value)

    os.environ["_E2EDIFF_JOIN"] = "60"
    first, second = together(act)
    assert first == 9
    assert "cannot join the others" in second


def test_machines_that_do_not_meet_are_told_what_to_check() -> None:
    with pytest.raises(ResourceError) as caught:
        launch(["--version"], 1, 2, f"127.0.0.1:{free_port()}")
    assert "cannot meet the other 1 at 127.0.0.1:" in str(caught.value)
    assert "within 2 seconds" in str(caught.value)
