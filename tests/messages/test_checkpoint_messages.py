"""What users read when a checkpoint or a run directory does not serve."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from resealing import edit_json

from e2ediff.errors import CheckpointError, DivergedError, ResourceError, RunDirectoryError
from e2ediff.store import checkpoint as ck
from e2ediff.store.run_directory import RunDirectory
from e2ediff.store.storage import Store

A, B = "images-000000000100", "images-000000000200"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def store() -> Store:
    store = Store("runs/x")
    for images in (100, 200):
        ck.save(store, images, 1, {"online": {"w": torch.ones(4)}}, {}, 3)
    return store


def told(store: Store, name: str | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        ck.open_checkpoint(store, name, warn=lambda _: None)
    return str(caught.value)


def test_damage_is_told_with_its_place_and_the_way_out(store: Store) -> None:
    """Size, hash, missing, extra, unfinished, newer."""
    where = f"runs/x/checkpoints/{B}: the checkpoint is damaged: "
    out = f". {A} is intact: use --checkpoint {A}."
    weights = Path(f"runs/x/checkpoints/{B}/online.safetensors")
    good = weights.read_bytes()

    weights.write_bytes(good[:-1] + b"x")
    assert told(store, B) == (
        f"{where}online.safetensors does not match its hash in MANIFEST.json{out}"
    )
    weights.write_bytes(good[:50])
    assert told(store, B) == (
        f"{where}online.safetensors has 50 bytes, it was written with {len(good)}{out}"
    )
    weights.unlink()
    assert told(store, B) == f"{where}missing: online.safetensors{out}"
    weights.write_bytes(good)
    weights.with_name("stale.safetensors").touch()
    assert told(store, B) == f"{where}files that do not belong to it: stale.safetensors{out}"
    weights.with_name("stale.safetensors").unlink()

    manifest = weights.with_name("MANIFEST.json")
    text = manifest.read_text()
    manifest.write_text(text.replace('"images": 200', '"images": 201'))
    assert told(store, B) == f"{where}MANIFEST.json does not match its own hash{out}"
    manifest.write_text(text)
    edit_json(manifest.parent, "MANIFEST.json", lambda body: body.update(format_version=2))
    assert told(store, B) == (
        f"runs/x/checkpoints/{B}: was written by a newer e2ediff (checkpoint format 2, "
        f"this one reads 1). Upgrade e2ediff. {A} is intact: use --checkpoint {A}."
    )
    manifest.unlink()
    assert told(store, B) == (f"{where}MANIFEST.json is missing, so its save never finished{out}")


def test_a_missing_checkpoint_is_told(store: Store) -> None:
    """By name, by a name that leaves the directory, and where there is none at all."""
    for name in ("images-000000000300", "../..", "/etc", ""):
        assert told(store, name) == (
            f"runs/x/checkpoints/{name}: no such checkpoint. {B} is intact: use --checkpoint {B}."
        )
    assert told(Store("runs/y")) == "runs/y/checkpoints: there is no checkpoint yet."
    assert told(Store("runs/y"), A) == (
        f"runs/y/checkpoints/{A}: no such checkpoint. No other checkpoint of this run is intact."
    )


def test_all_reasons_are_told_when_nothing_verifies(store: Store) -> None:
    """One line each, newest first."""
    for name in (A, B):
        Path(f"runs/x/checkpoints/{name}/MANIFEST.json").write_text("{")
    reason = "the checkpoint is damaged: MANIFEST.json is unreadable (Expecting property name"
    lines = told(store).splitlines()
    assert lines[0] == "runs/x/checkpoints: no checkpoint is intact."
    assert lines[1].startswith(f"  runs/x/checkpoints/{B}: {reason}")
    assert lines[2].startswith(f"  runs/x/checkpoints/{A}: {reason}")


def test_a_damaged_checkpoint_is_skipped_with_a_report(store: Store) -> None:
    """The older one opens, and the user knows that it is the older one."""
    Path(f"runs/x/checkpoints/{B}/state.json").unlink()
    reports: list[str] = []
    assert ck.open_checkpoint(store, warn=reports.append).name == A
    assert reports == [
        f"skipped runs/x/checkpoints/{B}: the checkpoint is damaged: missing: state.json."
    ]


def test_weights_that_are_not_finite_are_named(store: Store) -> None:
    """The tensor, and how bad it is."""
    bad = torch.tensor([1.0, float("nan"), float("inf")])
    with pytest.raises(DivergedError) as caught:
        ck.save(store, 300, 1, {"online": {"blocks.0.w": bad}}, {}, 3)
    assert str(caught.value) == (
        "online: blocks.0.w holds nan or inf (2 of 3 values); "
        "this checkpoint was not written, the older ones are intact."
    )


def test_a_number_of_the_state_that_is_not_finite_is_named_and_not_written(store: Store) -> None:
    with pytest.raises(
        DivergedError, match=r"state\.json\.alarm\.best is nan; this checkpoint was"
    ):
        ck.save(store, 300, 1, {}, {"alarm": {"best": float("nan")}}, 3)
    assert len(ck.list_checkpoints(store)) == 2


def test_a_file_that_is_not_in_a_checkpoint_is_told(store: Store) -> None:
    """With those that are."""
    with pytest.raises(CheckpointError) as caught:
        ck.open_checkpoint(store).tensors("target")
    assert str(caught.value) == f"runs/x/checkpoints/{B}: has no 'target'; it has 'online'."


def test_a_disk_that_refuses_is_told_with_needs_and_ways_out() -> None:
    """Full, forbidden, and anything else."""
    store = Store("memory://x")
    for code, reason, advice in (
        (28, "No space left on device", "Free space there, or choose another --out; "
         "what was saved before is intact."),
        (30, "Read-only file system", "Choose another --out, one that you may write to."),
        (5, "Input/output error", "Check that the disk or store is reachable, "
         "or choose another --out."),
    ):  # fmt: skip
        assert str(store.refusal("a/b", 12345, OSError(code, os.strerror(code)))) == (
            f"memory://x/a/b: cannot write: {reason} "
            f"(needed: 12,345 bytes, free: unknown). {advice}"
        )
    Path("file").touch()
    with pytest.raises(ResourceError, match=r"^file/a: cannot write: Not a directory \(needed: 3"):
        Store("file").write("a", b"abc")


def test_run_directories_that_are_none_or_taken_are_told() -> None:
    """What was looked for, and what to do."""
    Path("empty").mkdir()
    Path("full").mkdir()
    Path("full/x").touch()
    Path("file").touch()
    way = "Give the directory that e2ediff printed when the run began."
    for path, what in (
        ("nowhere", "no such directory, or it is empty"),
        ("empty", "no such directory, or it is empty"),
        ("full", "it has no run.json"),
    ):
        with pytest.raises(RunDirectoryError) as caught:
            RunDirectory.open(path)
        assert str(caught.value) == f"{path}: not a run directory: {what}. {way}"
    for path in ("full", "file"):
        with pytest.raises(RunDirectoryError) as caught:
            RunDirectory.create(path, "x", "", "", {})
        assert str(caught.value) == f"{path}: exists and is not empty. Choose another --out."
    RunDirectory.create("empty", "x", "", "", {}).unlock()
    assert RunDirectory.open("empty").status() == {}
    with pytest.raises(RunDirectoryError) as caught:
        RunDirectory.create("empty", "x", "", "", {})
    assert str(caught.value) == (
        "empty: exists and is not empty. "
        "Choose another --out, or continue the run in it: e2ediff run --resume empty"
    )


def test_a_locked_run_is_told_with_the_process() -> None:
    """And what the user can do about it."""
    with RunDirectory.create("runs/x", "x", "", "", {}):
        with pytest.raises(RunDirectoryError) as caught:
            RunDirectory.open("runs/x").lock()
        assert str(caught.value) == (
            f"runs/x: process {os.getpid()} is training in it. "
            "Wait for it to end or stop it, or choose another --out."
        )
        Path("runs/x/.lock").write_text("17 another\n")
        with pytest.raises(RunDirectoryError, match="process 17 on another machine is training"):
            RunDirectory.open("runs/x").lock()


def test_damaged_logs_and_files_of_a_run_are_told() -> None:
    """With file and line."""
    with RunDirectory.create("runs/x", "x", "", "", {}) as run:
        run.store.write("metrics.jsonl", b'{"images": 1}\nnonsense\n{"images": 2}\n')
        with pytest.raises(RunDirectoryError) as caught:
            run.read_metrics()
        assert str(caught.value) == (
            "runs/x/metrics.jsonl:2: not a line of JSON. Delete that line."
        )
        run.store.write("run.json", b"[]")
        with pytest.raises(RunDirectoryError) as caught:
            RunDirectory.open("runs/x")
        assert str(caught.value) == (
            "runs/x/run.json: holds no JSON object. Restore it from a copy."
        )
