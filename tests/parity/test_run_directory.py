"""A run directory is unique, locked, and its logs survive crashes and rewinding."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import resource
import signal
import socket
import time
import warnings
from pathlib import Path

import pytest

from e2ediff.errors import ResourceError, RunDirectoryError
from e2ediff.store.environment import describe_environment
from e2ediff.store.known_runs import latest_run
from e2ediff.store.run_directory import RunDirectory
from e2ediff.store.storage import Store


def create(out: str | None, name: str = "flow") -> RunDirectory:
    return RunDirectory.create(out, name, "recipe: 1 # as given\n", "recipe: 1\n", {"seed": 3})


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return create(str(tmp_path / "run"))


@pytest.mark.parametrize("url", ["{}/run", "file://{}/run", "memory://{}/run"])
def test_a_run_directory_reads_back_what_was_put_in(tmp_path: Path, url: str) -> None:
    """On every kind of store."""
    path = url.format(tmp_path)
    with create(path) as run:
        run.set_status("running", images=10, step=1, last_checkpoint="images-000000000010")
        run.log_metrics({"images": 10, "loss": 0.5, "norm": math.inf, "rank": math.nan})
        run.log_metrics({"images": 20, "loss": -math.inf})
        run.event("save", name="images-000000000010", seconds=0.1)
        assert run.write_picture("images-10/grid.png", b"png") == "samples/images-10/grid.png"
        lines = run.store.read("metrics.jsonl").splitlines()
        assert json.loads(lines[0])["norm"] == "inf"
    again = RunDirectory.open(path)
    assert again.recipe() == "recipe: 1 # as given\n"
    assert again.resolved() == "recipe: 1\n"
    assert again.environment()["name"] == "flow"
    assert again.environment()["seed"] == 3
    assert again.status()["state"] == "running"
    assert again.status()["last_checkpoint"] == "images-000000000010"
    first, second = again.read_metrics()
    assert math.isnan(first.pop("rank"))
    assert first == {"images": 10, "loss": 0.5, "norm": math.inf}
    assert second == {"images": 20, "loss": -math.inf}
    assert [e["kind"] for e in again.read_events()] == ["save"]
    assert again.store.read("samples/images-10/grid.png") == b"png"


def test_runs_without_a_place_get_unique_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """name, name-2, name-3; the newest is found by number, and runs of `flow-2` are not `flow`."""
    monkeypatch.setenv("E2EDIFF_RUNS", str(tmp_path))
    assert latest_run("flow") is None
    made = [create(None).path for _ in range(3)]
    assert made == [f"{tmp_path}/flow", f"{tmp_path}/flow-2", f"{tmp_path}/flow-3"]
    other = create(None, "flow-4").path
    assert other == f"{tmp_path}/flow-4"
    (tmp_path / "flow-7").mkdir()
    assert latest_run("flow") == made[2]
    assert latest_run("flow-4") == other
    assert create(None).path == f"{tmp_path}/flow-8"
    monkeypatch.delenv("E2EDIFF_RUNS")
    monkeypatch.chdir(tmp_path)
    assert create(None).path == "runs/flow"
    assert latest_run("flow") == "runs/flow"


def test_a_damaged_newest_run_is_no_reason_to_take_an_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("E2EDIFF_RUNS", str(tmp_path))
    newest = [create(None).path for _ in range(2)][1]
    Path(newest, "resolved.yaml").write_text("name: flow\n")
    for damage in ("", "{", "[]"):
        Path(newest, "run.json").write_text(damage)
        assert latest_run("flow") == newest
        with pytest.raises(RunDirectoryError, match=r"flow-2/run\.json"):
            RunDirectory.open(newest)


def test_processes_that_start_together_never_share_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight at once, by default and with the same --out."""
    monkeypatch.setenv("E2EDIFF_RUNS", str(tmp_path))
    for out, winners in ((None, 8), (str(tmp_path / "one"), 1)):
        pids = []
        for _ in range(8):
            pid = os.fork()
            if pid == 0:
                code = 1
                with contextlib.suppress(RunDirectoryError):
                    create(out)
                    time.sleep(0.3)
                    code = 0
                os._exit(code)
            pids.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        assert codes.count(0) == winners
    assert len(list(tmp_path.glob("flow*/run.json"))) == 8


def test_only_one_process_trains_in_a_run(run: RunDirectory) -> None:
    """The second is told which process it is; after kill -9 the lock is free at once."""
    run.unlock()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            RunDirectory.open(run.path).lock()
            os.write(writer, b"x")
            time.sleep(60)
        os._exit(1)
    os.read(reader, 1)
    with pytest.raises(RunDirectoryError, match=f"process {pid} is training in it"):
        run.lock()
    assert RunDirectory.open(run.path).environment()  # reading needs no lock
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    run.lock()
    run.lock()  # harmless twice
    with pytest.raises(RunDirectoryError, match=f"process {os.getpid()} is training in it"):
        RunDirectory.open(run.path).lock()


def test_a_lock_that_orphans_of_a_dead_process_hold_is_taken_over(run: RunDirectory) -> None:
    """Forked data workers inherit the lock and may outlive a trainer killed by kill -9."""
    run.unlock()
    reader, writer = os.pipe()
    trainer = os.fork()
    if trainer == 0:
        RunDirectory.open(run.path).lock()
        worker = os.fork()
        if worker == 0:
            time.sleep(60)
            os._exit(0)
        os.write(writer, worker.to_bytes(4, "big"))
        time.sleep(60)
        os._exit(0)
    worker = int.from_bytes(os.read(reader, 4), "big")
    try:
        os.kill(trainer, signal.SIGKILL)
        os.waitpid(trainer, 0)
        began = time.monotonic()
        run.lock()
        assert time.monotonic() - began < 10  # not when the orphan ended
        with pytest.raises(RunDirectoryError, match=f"process {os.getpid()} is"):
            RunDirectory.open(run.path).lock()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_only_one_of_many_takes_over_a_stale_lock(run: RunDirectory) -> None:
    """They all see the same dead holder; a later one must not remove the first one's new lock."""
    run.unlock()
    rounds, context = 20, multiprocessing.get_context("fork")
    together, codes = context.Barrier(5), context.SimpleQueue()

    def contend() -> None:
        for _ in range(rounds):
            mine = RunDirectory.open(run.path)
            code = 6
            together.wait(30)
            with contextlib.suppress(RunDirectoryError):
                mine.lock()
                code = 0
            together.wait(30)  # until the others have tried
            mine.unlock()
            codes.put(code)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
        contenders = [context.Process(target=contend, daemon=True) for _ in range(4)]
        for process in contenders:
            process.start()
    reader, writer = os.pipe()
    for _ in range(rounds):
        trainer = os.fork()
        if trainer == 0:
            RunDirectory.open(run.path).lock()
            orphan = os.fork()
            if orphan == 0:
                time.sleep(60)
            os.write(writer, orphan.to_bytes(4, "big"))
            os._exit(0)
        orphan = int.from_bytes(os.read(reader, 4), "big")
        os.waitpid(trainer, 0)
        together.wait(30)
        together.wait(30)
        os.kill(orphan, signal.SIGKILL)
        assert sorted(codes.get() for _ in contenders) == [0, 6, 6, 6]
    for process in contenders:
        process.join()


def test_rewinding_drops_what_comes_after(run: RunDirectory) -> None:
    """And a torn last line, and damaged ones; lines without an images count stay."""
    for images in range(0, 100, 10):
        run.log_metrics({"images": images, "loss": images / 7})
    run.log_metrics({"note": "no count"})
    run.store.write("metrics.jsonl", run.store.read("metrics.jsonl") + b'\xff\n[1]\n{"ima')
    assert run.rewind(50) == 4 + 3
    assert [m.get("images") for m in run.read_metrics()] == [0, 10, 20, 30, 40, 50, None]
    run.log_metrics({"images": 60})
    assert run.rewind(60) == 0
    assert run.read_metrics()[-1] == {"images": 60}


def test_a_torn_last_line_is_dropped(run: RunDirectory) -> None:
    """Readers ignore it; the next process to lock the run removes it before it appends."""
    run.log_metrics({"images": 1})
    run.event("save")
    for log in ("metrics.jsonl", "events.jsonl"):
        run.store.write(log, run.store.read(log) + b'{"images": 2, "lo')
    assert run.read_metrics() == [{"images": 1}]
    assert len(run.read_events()) == 1
    run.unlock()
    run.lock()
    run.log_metrics({"images": 3})
    assert run.read_metrics() == [{"images": 1}, {"images": 3}]


def test_a_line_that_does_not_fit_leaves_the_log_as_it_was(run: RunDirectory) -> None:
    """EFBIG in the middle of a line: half of it would swallow the next line."""
    run.log_metrics({"images": 1})
    before = run.store.read("metrics.jsonl")
    pid = os.fork()
    if pid == 0:
        code = 1
        with contextlib.suppress(BaseException):
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5,) * 2)
            try:
                run.log_metrics({"images": 2})
            except ResourceError:
                code = 8
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 8
    assert run.store.read("metrics.jsonl") == before


def test_status_is_never_half_written(run: RunDirectory) -> None:
    """Read while another process replaces it some hundred times."""
    run.set_status("running", images=0, step=0)
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            for i in range(300):
                run.set_status("running", images=i, step=i, reason="x" * (i * 37 % 5000))
            os._exit(0)
        os._exit(1)
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        assert run.status()["state"] == "running"
    assert run.status()["images"] == 299
    assert [name for name in run.store.list() if name.startswith(".tmp-")] == []


def test_a_copied_run_directory_is_a_run_directory(run: RunDirectory, tmp_path: Path) -> None:
    """Nothing inside it is absolute."""
    assert str(tmp_path) not in "".join(
        path.read_text() for path in (tmp_path / "run").rglob("*") if path.is_file()
    )
    run.unlock()
    os.rename(tmp_path / "run", tmp_path / "elsewhere")
    assert RunDirectory.open(str(tmp_path / "elsewhere")).recipe() == run_text()


def run_text() -> str:
    return "recipe: 1 # as given\n"


def test_the_environment_tells_versions_and_hides_names_and_secrets() -> None:
    """What reproduces a run, and nothing that should not be published."""
    argv = ["e2ediff", "train", "--set", "wandb.api_key=s3cret", "--token", "s3cret",
            "--out", "s3://user:s3cret@bucket/x", "--password=s3cret", "--seed", "3"]  # fmt: skip
    found = describe_environment({"seed": 3}, {"plug": "1.0"}, "cpu", argv)
    text = json.dumps(found)
    assert "s3cret" not in text
    assert socket.gethostname() not in text
    assert found["argv"] == [
        "e2ediff", "train", "--set", "wandb.api_key=***", "--token", "***",
        "--out", "s3://***@bucket/x", "--password=***", "--seed", "3",
    ]  # fmt: skip
    assert {"python", "torch", "e2ediff"} <= set(found["versions"])  # type: ignore[arg-type]
    assert found["plugins"] == {"plug": "1.0"}
    assert found["seeds"] == {"seed": 3}


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a//b", "a/../../x", "a\0b", "."])
def test_no_path_leaves_the_store(tmp_path: Path, path: str) -> None:
    """Names of pictures come from plugins too."""
    store = Store(str(tmp_path / "run"))
    for act in (store.read, store.list, lambda p: store.write(p, b"")):
        with pytest.raises(ValueError, match="not a plain relative path"):
            act(path)


@pytest.mark.parametrize("file", ["run.json", "status.json", "resolved.yaml"])
def test_a_record_that_is_longer_than_any_is_refused_unread(file: str, tmp_path: Path) -> None:
    run = RunDirectory.create(str(tmp_path / "run"), "x", "name: x", "name: x", {})
    (tmp_path / "run" / file).touch()
    os.truncate(tmp_path / "run" / file, 1 << 40)  # takes no space, and more memory than there is
    read = {"run.json": run.environment, "status.json": run.status, "resolved.yaml": run.resolved}
    with pytest.raises(RunDirectoryError, match=rf"{file}: cannot be read"):
        read[file]()
