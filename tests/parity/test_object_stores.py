"""Object stores: what was written is there whole, whatever fails; two writers are kept apart."""

from __future__ import annotations

import io
import json
import re
import signal
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
import torch
from faulty_store import FAULTS, faults, without_faults
from saves import await_checkpoint
from tiny_recipe import tiny

from e2ediff import hookimpl
from e2ediff.errors import CheckpointError, ResourceError, RunDirectoryError
from e2ediff.host.plugins import load
from e2ediff.store import checkpoint as ck
from e2ediff.store import lease, remote
from e2ediff.store.run_directory import RunDirectory
from e2ediff.store.storage import Store
from e2ediff.train.progress import Progress
from e2ediff.train.session import train


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(remote, "PAUSES", (0.0,) * 7)
    monkeypatch.setattr(lease, "_SETTLED", 0.05)
    with faults():
        yield


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"faulty://{tmp_path.name}"


def content(images: int) -> dict[str, dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(images)
    return {"online": {"w": torch.randn(40, generator=g)}, "optimizer": {"m": torch.ones(3)}}


def put(store: Store, images: int, keep: int = 2, warn=lambda text: None) -> str:
    return ck.save(store, images, images, content(images), {"images": images}, keep, warn)


def assert_whole(found: ck.Checkpoint) -> None:
    assert found.state == {"images": found.images}
    assert torch.equal(found.tensors("online")["w"], content(found.images)["online"]["w"])


# Faults


def test_no_save_is_lost_or_committed_in_part_where_calls_fail_at_random(url: str) -> None:
    """A twentieth of all calls: before, after and in the middle, with other bytes, listed late."""
    store, saved = Store(url), []
    FAULTS.rate = 0.05
    for images in range(1, 61):
        try:
            put(store, images)
            saved.append(images)
        except (ResourceError, CheckpointError):
            pass
        with without_faults():
            if saved:
                newest = ck.open_checkpoint(store)
                assert newest.images >= saved[-1]
                assert_whole(newest)
    assert len(saved) > 55
    assert len(FAULTS.met) == 7, "each kind of fault was met"
    with without_faults():
        assert len(ck.list_checkpoints(store, finished=True)) <= 4


def figures(run: RunDirectory) -> list[dict[str, object]]:
    lines = run.read_metrics()
    return [{k: v for k, v in line.items() if not k.startswith("wall_")} for line in lines]


def test_a_run_on_a_store_that_fails_is_the_run_on_the_disk(url: str, tmp_path: Path) -> None:
    """With every figure, also of a part of the run that was killed, and the same weights."""
    (tmp_path / "tiny.yaml").write_text(tiny(steps="6"))

    @hookimpl
    def step_ended(run, step):
        if step == 5 and run.directory == url and FAULTS.rate:
            signal.raise_signal(signal.SIGTERM)

    host = load(SimpleNamespace(__name__="stopper", step_ended=step_ended))
    disk, recipe = str(tmp_path / "run"), str(tmp_path / "tiny.yaml")
    for place, rate, resume in ((disk, 0, False), (url, 0.03, False), (url, 0, True)):
        FAULTS.rate, progress = rate, Progress(io.StringIO())
        train(host, recipe, [], place, resume=resume, progress=progress)
    a, b = RunDirectory.open(disk), RunDirectory.open(url)
    assert figures(a) == figures(b)
    one, other = (ck.open_checkpoint(x.store) for x in (a, b))
    assert one.state == other.state
    for file in one.files:
        theirs = other.tensors(file)
        for name, tensor in one.tensors(file).items():
            assert torch.equal(tensor, theirs[name])


def test_refusals_are_not_tried_again_and_older_checkpoints_stay(url: str) -> None:
    store = Store(url)
    put(store, 1)
    FAULTS.full, FAULTS.calls = True, {}
    with pytest.raises(ResourceError, match=r"online.safetensors: cannot write: .*needed: 160 "):
        put(store, 2)
    assert FAULTS.calls["write"] == 1
    FAULTS.full = False
    assert_whole(ck.open_checkpoint(store))


def test_an_error_that_stays_is_reported_after_some_attempts(url: str) -> None:
    FAULTS.rate = 1.0
    with pytest.raises(ResourceError, match="slow down"):
        Store(url).write("x", b"1")
    assert FAULTS.calls["write"] == 8


def test_content_is_read_back_unless_the_store_reports_its_hash(url: str) -> None:
    store = Store(url)
    store.write("x", b"abc")
    assert FAULTS.calls["read"] == 1
    FAULTS.tagged = True
    store.write("x", b"abcd")
    assert FAULTS.calls["read"] == 1
    with store.writing("y") as file:
        file.write(b"123")
    assert store.read("y") == b"123"


# Retention


@pytest.mark.parametrize("where", ["faulty", "disk"])
def test_a_reader_finds_a_whole_checkpoint_at_any_time_while_old_ones_are_deleted(
    where: str, url: str, tmp_path: Path
) -> None:
    """Where half of the deletions are refused, too: with `keep` 1 there is always one."""
    place = url if where == "faulty" else str(tmp_path)
    store, told, found, errors = Store(place), [], [], []
    put(store, 1)
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            try:
                found.append(ck.open_checkpoint(Store(place), warn=lambda text: None).images)
            except CheckpointError as error:
                errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    FAULTS.undeletable = 0.5
    for images in range(2, 60 if where == "faulty" else 12):
        put(store, images, 1, told.append)
    done.set()
    reader.join()
    assert errors == []
    assert found == sorted(found) or where == "faulty", "old ones that stay are whole too"
    assert len(set(found)) > 3
    assert bool(told) == (where == "faulty")
    assert_whole(ck.open_checkpoint(store))


# Two writers


def run_at(url: str) -> RunDirectory:
    return RunDirectory.create(url, "x", "name: x", "name: x", {})


def test_a_second_writer_is_refused_with_who_and_until_when(url: str) -> None:
    with run_at(url) as run:
        other = RunDirectory.open(url)
        with pytest.raises(RunDirectoryError) as caught:
            other.lock()
        assert re.search(r"process \d+ is training in it; its lease ends at 20", str(caught.value))
        run.event("goes_on")
    other.lock()
    other.unlock()
    assert ".lock" not in other.store.list()
    assert [event["kind"] for event in other.read_events()] == ["goes_on"]


def leased(url: str, **changes: object) -> None:
    """Write the lease of another process."""
    now = {"owner": "other", "process": 1, "machine": "elsewhere"}
    text = json.dumps({**now, "until": datetime.now(UTC).isoformat(), **changes})
    fs, path = fsspec.core.url_to_fs(f"{url}/.lock")
    fs.pipe_file(path, text.encode())


def test_a_lease_that_has_ended_or_of_a_process_that_is_gone_is_taken_over(url: str) -> None:
    run_at(url).unlock()
    later = (datetime.now(UTC) + timedelta(seconds=60)).isoformat()
    leased(url, until=later)
    run = RunDirectory.open(url)
    with pytest.raises(RunDirectoryError, match="process 1 on another machine"):
        run.lock()
    leased(url, until=later, machine=lease._here(), process=2**22 + 1)
    with run:
        run.lock()
    leased(url)
    time.sleep(0.01)
    with run:
        run.lock()
    leased(url, until="soon")
    with run:
        run.lock()


def test_a_writer_whose_lease_was_taken_stops_before_it_writes_anything(url: str) -> None:
    run = run_at(url)
    run.set_status("running", images=1)
    run.event("held_back")
    run.event("held_back")
    leased(url)
    before, names = run.status(), run.store.list()
    for change in (
        lambda: run.set_status("running", images=2),
        lambda: put(run.store, 1),
        lambda: run.store.inside("post_hoc").write("x", b""),
        lambda: run.store.remove_file("run.json"),
        run.unlock,
    ):
        with pytest.raises(RunDirectoryError, match="has taken over the lease"):
            change()
    assert (run.status(), run.store.list()) == (before, names)
    assert "other" in Store(url).read(".lock").decode(), "it does not remove the other's lease"


def test_a_run_whose_lease_was_taken_ends_with_6_and_leaves_its_files_to_the_other(
    url: str, tmp_path: Path
) -> None:
    (tmp_path / "tiny.yaml").write_text(tiny())

    @hookimpl
    def step_ended(run, step):
        if step == 3:
            await_checkpoint(url, "images-000000000016")
            leased(url)

    host = load(SimpleNamespace(__name__="other", step_ended=step_ended))
    with pytest.raises(RunDirectoryError, match="taken over") as caught:
        train(host, str(tmp_path / "tiny.yaml"), [], url, progress=Progress(io.StringIO()))
    assert caught.value.exit_code == 6
    assert RunDirectory.open(url).status()["state"] == "running"
    assert [n[-2:] for n in ck.list_checkpoints(Store(url))] == ["16"]


def test_a_lease_is_renewed_while_nothing_is_written(url: str, monkeypatch) -> None:
    monkeypatch.setattr(lease, "LEASE", 1.0)
    began = datetime.now(UTC)
    with run_at(url):
        time.sleep(0.9)
        fs, path = fsspec.core.url_to_fs(f"{url}/.lock")
        until = json.loads(fs.cat_file(path))["until"]
        with pytest.raises(RunDirectoryError, match="is training in it"):
            RunDirectory.open(url).lock()
    assert datetime.fromisoformat(until) > began + timedelta(seconds=1.1)


# Figures


def test_figures_are_written_together_and_none_is_missing_at_the_end(url: str) -> None:
    with run_at(url) as run:
        FAULTS.calls = {}
        for step in range(300):
            run.log_metrics({"step": step, "images": step})
        assert FAULTS.calls["write"] <= 2
        assert len(run.read_metrics()) == 300, "what is read in between has all"
        for step in range(300, 310):
            run.log_metrics({"step": step, "images": step})
        run.set_status("running", images=310)
        assert len(RunDirectory.open(url).read_metrics()) == 310
        run.rewind(4)
        run.log_metrics({"step": 5, "images": 5})
    assert [line["step"] for line in RunDirectory.open(url).read_metrics()] == [*range(6)]
