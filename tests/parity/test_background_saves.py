"""Checkpoints are written beside training, and are what they would be if training waited."""

from __future__ import annotations

import io
import os
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from faulty_store import FAULTS, faults
from pictures import write_tree
from processes import together
from safetensors.torch import save as encode
from tiny_recipe import tiny
from torch.utils._python_dispatch import TorchDispatchMode

from e2ediff import hookimpl
from e2ediff.distributed.background import AbandonedError, Background
from e2ediff.distributed.signals import Stopped
from e2ediff.distributed.world import World
from e2ediff.errors import DivergedError, E2EDiffError, ResourceError
from e2ediff.host.plugins import load
from e2ediff.store.checkpoint import list_checkpoints, open_checkpoint
from e2ediff.store.records import newest_saved
from e2ediff.store.run_directory import RunDirectory
from e2ediff.store.storage import Store
from e2ediff.store.tensor_file import count_not_finite, pieces
from e2ediff.train import staging
from e2ediff.train.progress import Progress
from e2ediff.train.session import train

QUIET = "{log: 1, diagnose: 100, preview: 100, checkpoint: 2}"


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with faults():
        yield


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "tiny.yaml").write_text(tiny(steps="8", cadence=QUIET, checkpoint="{keep: 9}"))
    return str(tmp_path / "tiny.yaml")


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"faulty://{tmp_path.name}"


def run(recipe: str, out: object, *changes: str, said: io.StringIO | None = None, **hooks) -> None:
    made = {name: hookimpl(hook) for name, hook in hooks.items()}
    host = load(SimpleNamespace(__name__="watcher", **made)) if made else load()
    progress = Progress(said or io.StringIO())
    train(host, recipe, changes, str(out), progress=progress)


def events(out: object, *kinds: str) -> list[dict[str, object]]:
    found = RunDirectory.open(str(out)).read_events()
    return [event for event in found if event["kind"] in kinds]


def content(out: object, name: str) -> dict[str, object]:
    found = open_checkpoint(Store(str(out)), name)
    tensors = {f"{file}:{k}": t for file in found.files for k, t in found.tensors(file).items()}
    return {**tensors, "state": found.state}


def assert_same(a: dict[str, object], b: dict[str, object]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        same = torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key]
        assert same, key


def test_what_is_saved_is_the_state_at_the_save_while_training_goes_on(
    recipe, url, tmp_path
) -> None:
    """Each file takes longer to write than a step, and a step later the weights have moved."""
    steps = []

    def step_ended(run, step):
        steps.append(step)
        status = RunDirectory.open(url).status()
        if name := status.get("last_checkpoint"):
            assert open_checkpoint(Store(url), name).name == name, "it is there when it is named"

    def checkpoint_saved(run, path):
        assert open_checkpoint(Store(url), path).name == path
        at.append((len(steps), path))

    at = []
    FAULTS.slow = 0.05
    run(recipe, url, step_ended=step_ended, checkpoint_saved=checkpoint_saved)
    FAULTS.slow = 0.0
    run(recipe, tmp_path / "in_place", "steps=8")
    names = list_checkpoints(Store(url))
    assert names == [f"images-{8 * step:012d}" for step in (2, 4, 6, 8)]
    for name in names:
        assert_same(content(url, name), content(tmp_path / "in_place", name))
    assert any(after * 8 > int(path[-3:]) for after, path in at), "training went on meanwhile"
    assert [path for _, path in at] == names
    found = events(url, "staged", "committed")
    assert [e["kind"] for e in found] == ["staged", "committed"] * 4, "one is in flight at most"
    assert [e["name"] for e in found] == [name for name in names for _ in range(2)]
    for staged, committed in zip(found[::2], found[1::2], strict=True):
        assert 0 < staged["paused"] <= committed["paused"]
        assert staged["paused"] < 0.2 <= committed["seconds"]


def test_where_memory_is_short_training_waits_and_says_so_once(
    recipe, tmp_path, monkeypatch
) -> None:
    run(recipe, tmp_path / "staged")
    monkeypatch.setattr(staging.Staging.__init__, "__defaults__", (lambda: 1000,))
    said = io.StringIO()
    run(recipe, tmp_path / "run", said=said)
    assert said.getvalue().count("checkpoints are written while training waits, as a copy of") == 1
    assert len(events(tmp_path / "run", "saving_in_place")) == 1
    assert events(tmp_path / "run", "staged") == []
    assert len(events(tmp_path / "run", "committed")) == 4
    for name in list_checkpoints(Store(str(tmp_path / "run"))):
        assert_same(content(tmp_path / "run", name), content(tmp_path / "staged", name))


def test_a_failed_save_ends_the_run_at_the_next_step_and_keeps_the_older_one(recipe, url) -> None:
    steps = []

    def checkpoint_saved(run, path):  # of step 2; the next save is that of step 4
        FAULTS.full = True

    def step_ended(run, step):
        steps.append(step)

    with pytest.raises(ResourceError, match=r"cannot write: No space left .*needed: [1-9].*free"):
        run(recipe, url, step_ended=step_ended, checkpoint_saved=checkpoint_saved)
    assert steps[-1] < 8
    assert list_checkpoints(Store(url), finished=True) == ["images-000000000016"]
    status = RunDirectory.open(url).status()
    assert (status["state"], status["exit_code"]) == ("failed", 8)
    assert status["last_checkpoint"] == "images-000000000016"


@pytest.mark.parametrize("step", [3, 7])
def test_a_state_that_is_not_finite_is_refused_with_the_step_of_its_save(
    recipe, tmp_path, step
) -> None:
    """Also by the last save, and where only an average has it, which no loss shows."""

    def spoil(run, step):
        if step == at:
            net = engines[0].parts.averages["target"].net
            next(net.parameters()).data[0] = float("nan")

    at, engines = step, []
    from e2ediff.train import session

    class Kept(session.Engine):
        def __init__(self, *given, **options):
            super().__init__(*given, **options)
            engines.append(self)

    original, session.Engine = session.Engine, Kept
    try:
        with pytest.raises(DivergedError) as caught:
            run(recipe, tmp_path / "run", step_ended=spoil)
    finally:
        session.Engine = original
    assert caught.value.exit_code == 7
    last = f"images-{8 * (step - 1):012d}"
    line = str(caught.value)
    assert line.startswith(f"step {step + 1}: target: ")
    assert f"The last good checkpoint is {last}." in line
    names = list_checkpoints(Store(str(tmp_path / "run")))
    assert names[-1] == last
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == names


def test_a_second_signal_leaves_a_save_that_takes_long(recipe, url) -> None:
    """The older checkpoint is intact, and the run says that it did not save."""
    began = []

    def step_ended(run, step):
        if step == 4:
            FAULTS.slow = 1.5
            signal.raise_signal(signal.SIGTERM)
        if step == 3:
            until = time.monotonic() + 60
            while not list_checkpoints(Store(url), finished=True):  # that of step 2
                assert time.monotonic() < until
                time.sleep(0.01)
            signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGTERM))
            signal.setitimer(signal.ITIMER_REAL, 1.0)
            began.append(time.monotonic())

    with pytest.raises(Stopped) as caught:
        run(recipe, url, step_ended=step_ended)
    assert time.monotonic() - began[0] < 8
    assert caught.value.exit_code == 75
    assert "without saving" in RunDirectory.open(url).status()["reason"]
    FAULTS.slow = 0.0
    assert open_checkpoint(Store(url)).images == 16


def test_processes_that_read_images_and_frequent_saves_do_not_disturb_each_other(
    recipe, tmp_path
) -> None:
    tree = write_tree(tmp_path / "tree", [8, 8])
    data = f"data={{name: image_folder, root: {tree}, size: 16, classes: 2}}"
    always = "cadence={log: 1, diagnose: 100, preview: 100, checkpoint: 1}"
    for name, workers in (("two", 2), ("none", 0)):
        changes = (data, f"data.workers={workers}", always, "alarm.policy=rollback")
        run(recipe, tmp_path / name, *changes)
    for name in list_checkpoints(Store(str(tmp_path / "none"))):
        assert_same(content(tmp_path / "two", name), content(tmp_path / "none", name))


def test_of_several_processes_the_first_one_writes_and_all_end_when_it_cannot(
    recipe, tmp_path
) -> None:
    def act(rank: int) -> list[object]:
        world = World.join()

        @hookimpl
        def checkpoint_saved(run, path):  # in the first process
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))

        host, quiet = (
            load(SimpleNamespace(__name__="full", checkpoint_saved=checkpoint_saved)),
            io.StringIO(),
        )
        try:
            train(host, recipe, ["microshards=2"], place, progress=Progress(quiet), world=world)
        except E2EDiffError as error:
            return [type(error).__name__, error.exit_code, str(error)]
        return []

    place = str(tmp_path / "run")
    first, second = together(act)
    assert first[:2] == ["ResourceError", 8]
    assert second[:2] == ["ElsewhereError", 8]
    assert first[2] == second[2]
    assert "File too large" in first[2]
    assert list_checkpoints(Store(place)) == ["images-000000000016"]


def test_saves_of_runs_from_before_are_known_by_their_former_event(tmp_path) -> None:
    run = RunDirectory.create(str(tmp_path / "run"), "x", "", "", {})
    with run:
        run.event("saved", name="images-000000000016")
        assert newest_saved(run) == "images-000000000016"
        run.event("staged", name="images-000000000032")
        assert newest_saved(run) == "images-000000000016", "it was not complete"
        run.event("committed", name="images-000000000032")
        assert newest_saved(run) == "images-000000000032"


# Its parts


def test_a_file_written_in_pieces_is_the_librarys_byte_for_byte() -> None:
    g = torch.Generator().manual_seed(0)
    big = torch.randn(1100, 1000, generator=g)
    types = [torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.complex64,
             torch.int64, torch.uint8, torch.bool]  # fmt: skip
    tensors = {"big": big, "": torch.ones(()), "empty": torch.empty(0, 3), 'é"': torch.ones(2)}
    tensors |= {f"t{i}": big[0, :7].to(kind) for i, kind in enumerate(types)}
    found = [bytes(piece) for piece in pieces(tensors | {"turned": big.T})]
    assert b"".join(found) == encode(tensors | {"turned": big.T.contiguous()})
    assert max(map(len, found)) <= 1 << 22
    assert b"".join(pieces({})) == encode({})


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float8_e5m2", "float32", "float64",
                                  "complex64"])  # fmt: skip
def test_values_that_are_not_finite_are_counted_and_large_ones_are_not(kind: str) -> None:
    dtype = getattr(torch, kind)
    x = torch.full((70_000,), 5e4).to(dtype)
    whole = {"large": torch.full((70_000,), 3e38), "counts": torch.ones(3, dtype=torch.int64)}
    whole |= {"one": torch.ones(()), "empty": torch.empty(0, 3)}
    assert count_not_finite({"x": x, **whole}) == {}
    for at, value in ((0, "inf"), (1, "-inf"), (69_999, "nan")):
        x[at] = float(value)
    bad = torch.tensor([1.0, float("nan")], dtype=torch.float64)
    assert count_not_finite({"x": x, **whole, "y": bad}) == {"x": 3, "y": 1}


class Reads(TorchDispatchMode):
    """Counts numbers that are read from tensors one by one, for which a GPU would be waited."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_finite_tensors_are_not_waited_for_one_by_one() -> None:
    with Reads() as reads:
        assert count_not_finite({f"t{i}": torch.randn(40_000) for i in range(20)}) == {}
    assert reads.count == 0


def test_a_task_gives_its_result_or_its_error_and_stops_when_it_is_abandoned() -> None:
    work: Background[int] = Background()
    work.start(lambda pulse: 3)
    assert work.result() == 3
    assert work.ended
    work.start(lambda pulse: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        work.result()
    stopped = []

    def long(pulse) -> int:
        try:
            while True:
                pulse()
                time.sleep(0.01)
        except AbandonedError:
            stopped.append(True)
            raise

    work.start(long)
    assert not work.ended
    assert not work.abandon()
    assert stopped == [True]
