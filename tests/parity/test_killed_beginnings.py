"""What is killed before it has begun is taken up by the same command, with and without --resume.

A kill at any moment leaves what lies there at that moment: so it is copied before and after every
file operation of a beginning, and in the middle of each write.
"""

from __future__ import annotations

import builtins
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from command_line import e2ediff
from tiny_recipe import tiny

from e2ediff.errors import CheckpointError, RunDirectoryError
from e2ediff.host.plugins import Host
from e2ediff.host.recipe import dump_recipe, parse_recipe
from e2ediff.sample.set_record import prepare
from e2ediff.store.checkpoint import list_checkpoints, open_checkpoint, save
from e2ediff.store.run_directory import RunDirectory
from e2ediff.store.storage import Store

OPERATIONS = ("mkdir", "open", "write", "fsync", "close", "rename", "replace", "unlink")
TEXT = tiny(
    steps="1",
    diagnostics="[]",
    cadence="{log: 1, diagnose: 1000, preview: 1000, checkpoint: 1}",
)


@contextmanager
def kept_at_every_operation(folder: Path, kept: Path) -> Iterator[None]:
    """Copy a folder to `kept` around each file operation, and in the middle of a write."""
    count, copying = [0], [False]

    def keep(number: int, moment: str) -> None:
        copying[0] = True
        shutil.copytree(folder, kept / f"{number}-{moment}", symlinks=True)
        copying[0] = False

    def wrap(act: Callable[..., object], name: str) -> Callable[..., object]:
        def wrapped(*given: object, **options: object) -> object:
            if copying[0]:
                return act(*given, **options)
            count[0] += 1
            number, written = count[0], 0
            keep(number, "before")
            if name == "write":
                data = bytes(given[1])  # type: ignore[call-overload]
                written = act(given[0], data[: len(data) // 2])  # type: ignore[assignment]
                keep(number, "middle")
                given = (given[0], data[written:])
            try:
                found = act(*given, **options)
                return found + written if name == "write" else found  # type: ignore[operator]
            finally:  # also after one that failed, as to make a folder that is there
                keep(number, "after")

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATIONS:
            patch.setattr(os, name, wrap(getattr(os, name), name))
        patch.setattr(builtins, "open", wrap(builtins.open, "open"))
        yield


def every_kill(act: Callable[[Path], object], place: Path) -> Iterator[tuple[str, Path]]:
    """The directory as it is at each moment at which a process that does `act` may be killed.

    It holds what lay there at that moment, and the process that wrote it is gone.
    """
    folder, kept = place / "acting", place / "kept"
    act(place / "whole")
    folder.mkdir()
    kept.mkdir()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with kept_at_every_operation(folder, kept):
                act(folder / "run")
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    moments = sorted(kept.iterdir(), key=lambda path: int(path.name.partition("-")[0]))
    assert len(moments) > 20
    for moment in moments:
        shutil.rmtree(folder)
        moment.rename(folder)
        yield moment.name, folder / "run"


def state(out: Path) -> str:
    """The names of what lies there, whatever numbers temporary files have."""
    return re.sub(r"-[0-9a-f]{8}\b", "", repr(sorted(p.name for p in out.rglob("*"))))


def figures(out: Path) -> list[dict[str, object]]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if not k.startswith("wall_")} for line in lines]


def weights(out: Path) -> dict[str, bytes]:
    (newest,) = sorted((out / "checkpoints").glob("images-*"))[-1:]
    return {p.name: p.read_bytes() for p in newest.iterdir() if p.name != "MANIFEST.json"}


@pytest.fixture
def begin(host: Host) -> Callable[[Path], None]:
    """What `e2ediff run` does before it trains."""
    resolved = dump_recipe(host, parse_recipe(host, TEXT, "tiny.yaml"))

    def act(out: Path) -> None:
        RunDirectory.create(str(out), "tiny", TEXT, resolved, {"seed": 0}).unlock()

    return act


def test_a_run_killed_at_any_file_operation_of_its_beginning_is_taken_up(begin, tmp_path) -> None:
    """By both commands; of those that leave the same files, one is trained to its end."""
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(TEXT)
    assert e2ediff("run", recipe, "--out", tmp_path / "straight").code == 0
    seen = set[str]()
    for moment, out in every_kill(begin, tmp_path):
        assert not out.exists() or any(out.iterdir()), f"{moment}: empty, as any directory may be"
        if not out.exists() or (out / "run.json").exists():
            continue
        assert RunDirectory.never_began(str(out)), moment
        copies = [shutil.copytree(out, out.parent / name) for name in ("run0", "run1")]
        begin(out)
        ours = {".lock", "recipe.yaml", "resolved.yaml", "run.json", "seal"}
        assert {*os.listdir(out)} == ours
        if (found := state(copies[0])) in seen:
            continue
        seen.add(found)
        for copy, words in zip(copies, ([], ["--resume"]), strict=True):
            done = e2ediff("run", recipe, "--out", copy, *words)
            assert done.code == 0, (moment, found, done.err)
            assert ("killed here before it began" in done.err) == bool(words)
            assert figures(copy) == figures(tmp_path / "straight")
            assert weights(copy) == weights(tmp_path / "straight")
            assert sorted(os.listdir(copy)) == sorted(os.listdir(tmp_path / "straight"))
    assert len(seen) > 5, "the kills missed the beginning"


def test_what_is_left_beside_the_directory_goes_with_the_next_beginning(begin, tmp_path) -> None:
    left = 0
    for _, out in every_kill(begin, tmp_path):
        left += bool(list(out.parent.glob(".tmp-run-*")))
        if not out.exists():
            begin(out)
        assert not list(out.parent.glob(".tmp-run-*"))
    assert left > 0


def test_a_killed_beginning_on_an_object_store_is_taken_up(begin, tmp_path: Path) -> None:
    """There a write is whole or absent, and nothing is locked."""
    (tmp_path / "tiny.yaml").write_text(TEXT)
    begin(tmp_path / "run")
    for names in (["recipe.yaml"], ["recipe.yaml", "resolved.yaml"]):
        store = Store(f"memory://beginnings/{len(names)}")
        for name in names:
            store.write(name, (tmp_path / "run" / name).read_bytes())
        words = ["--resume"] if len(names) == 2 else []
        done = e2ediff("run", tmp_path / "tiny.yaml", "--out", store.url, *words)
        assert (done.code, done.out) == (0, f"{store.url}\n"), done.err
        assert not store.exists("attempts")


@pytest.mark.parametrize("kind", ["{}", "dir::file://{}"])
def test_a_first_save_killed_at_any_file_operation_is_whole_or_absent(kind, tmp_path) -> None:
    """What it left is no checkpoint to anyone, and the next save goes through."""

    def first_save(out: Path) -> None:
        save(Store(kind.format(out)), 8, 1, {"online": {"w": torch.ones(2)}}, {}, keep=1)

    seen: dict[str, int] = {"whole": 0, "absent": 0}
    for moment, out in every_kill(first_save, tmp_path):
        if kind != "{}" and any(p.is_file() and not p.stat().st_size for p in out.rglob("*")):
            continue  # a store shows no half objects
        store = Store(kind.format(out))
        if not list_checkpoints(store, finished=True):
            with pytest.raises(CheckpointError, match="there is no checkpoint yet"):
                open_checkpoint(store, warn=lambda text: None)
            seen["absent"] += 1
            first_save(out)
        else:
            seen["whole"] += 1
        assert open_checkpoint(store).images == 8, moment
        assert list_checkpoints(store) == ["images-000000000008"], moment
    assert seen["absent"] > 3, seen
    assert seen["whole"] > 3 or kind != "{}", seen


@pytest.mark.parametrize("older", [False, True])
def test_without_out_the_newest_killed_beginning_is_taken_up(
    older, begin, tmp_path, monkeypatch
) -> None:
    """Not an older run, and not what another recipe's name began."""
    monkeypatch.setenv("E2EDIFF_RUNS", str(tmp_path / "runs"))
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(TEXT)
    killed = tmp_path / "runs" / ("tiny-2" if older else "tiny")
    if older:
        assert e2ediff("run", recipe).code == 0
        before = state(tmp_path / "runs/tiny")
    begin(tmp_path / "begun")
    (tmp_path / "begun/run.json").unlink()
    other = tmp_path / "runs/tiny-7"
    other.mkdir(parents=True)
    (other / "resolved.yaml").write_text("name: tiny-7\n")
    whole = [".lock", "recipe.yaml", "resolved.yaml"]
    for names, word in ((whole[:1], "--resume"), (whole, "--resume"), (whole, "--restart")):
        killed.mkdir()
        for name in names:
            shutil.copy(tmp_path / "begun" / name, killed)
        done = e2ediff("run", recipe, word)
        assert (done.code, done.out) == (0, f"{killed}\n"), done.err
        assert json.loads((killed / "status.json").read_text())["state"] == "done"
        assert not (killed / "attempts").exists()
        assert os.listdir(other) == ["resolved.yaml"]
        shutil.rmtree(killed)
    assert not older or state(tmp_path / "runs/tiny") == before


def test_without_out_a_restart_cut_short_is_finished_by_another(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("E2EDIFF_RUNS", str(tmp_path / "runs"))
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(TEXT)
    for _ in range(2):
        assert e2ediff("run", recipe).code == 0
    old, cut = tmp_path / "runs/tiny", tmp_path / "runs/tiny-2"
    before = state(old)
    (cut / "attempts/1").mkdir(parents=True)
    for name in ("run.json", "recipe.yaml", "resolved.yaml"):
        (cut / name).rename(cut / "attempts/1" / name)
    done = e2ediff("run", recipe, "--resume")
    assert done.code == 6
    assert "If --restart was interrupted here, repeat it" in done.err
    done = e2ediff("run", recipe, "--restart")
    assert (done.code, done.out) == (0, f"{cut}\n"), done.err
    assert sorted(os.listdir(cut / "attempts")) == ["1"]
    assert {"run.json", "metrics.jsonl", "checkpoints"} <= {*os.listdir(cut / "attempts/1")}
    assert state(old) == before


@pytest.mark.parametrize("file", ["notes.txt", "recipe.yaml", "samples/mine.png", ".hidden"])
def test_a_directory_with_files_of_the_user_s_is_refused_and_left_alone(file, tmp_path) -> None:
    """Also a recipe of another text; and not even a lock is left there."""
    mine = tmp_path / "run" / file
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    (tmp_path / "tiny.yaml").write_text(TEXT)
    for words in ([], ["--resume"], ["--restart"]):
        done = e2ediff("run", tmp_path / "tiny.yaml", "--out", tmp_path / "run", *words)
        assert done.code == 6
        assert "continue the run in it" not in done.err
    assert [str(p) for p in (tmp_path / "run").rglob("*") if p.is_file()] == [str(mine)]
    assert mine.read_text() == "mine"


def test_the_recipe_of_a_killed_beginning_is_kept_where_another_comes(begin, tmp_path) -> None:
    out = tmp_path / "run"
    begin(out)
    (out / "run.json").unlink()
    (out / "recipe.yaml").write_text("another")
    (tmp_path / "tiny.yaml").write_text(TEXT)
    done = e2ediff("run", tmp_path / "tiny.yaml", "--out", out)
    assert done.code == 0
    assert f"the former content of {out} is kept in {out}/attempts/1" in done.err
    assert (out / "attempts/1/recipe.yaml").read_text() == "another"
    assert (out / "recipe.yaml").read_text() == TEXT


def test_an_empty_directory_is_no_run_that_was_killed(tmp_path) -> None:
    """It may be where a disk is not mounted: `--resume` must not begin there."""
    (tmp_path / "tiny.yaml").write_text(TEXT)
    (tmp_path / "mount").mkdir()
    for out in (tmp_path / "mount", tmp_path / "nowhere"):
        done = e2ediff("run", tmp_path / "tiny.yaml", "--out", out, "--resume")
        assert done.code == 6
        assert "no such directory, or it is empty" in done.err
    assert not any((tmp_path / "mount").iterdir())


@pytest.mark.usefixtures("forks")
def test_an_ablation_killed_at_its_beginning_is_taken_up(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(TEXT)
    words = ("ablate", "tiny.yaml", "--vary", "optimizer.lr=0.001", "--seeds", "0", "--out", "g")
    for more in ([], ["--resume"]):
        Path("g").mkdir()
        Path("g/.tmp-spec.json-0123abcd").write_text("{")
        Path("g/recipe.yaml").write_text(TEXT)
        assert e2ediff(*words, *more).code == 0
        shutil.rmtree("g")
    assert e2ediff(*words[:-2]).code == 0
    before = state(Path("groups/tiny"))
    for place in (Path("groups/tiny-2"), Path("groups/tiny")):
        place.mkdir(parents=True)
        (place / ".lock").touch()
        (place / "recipe.yaml").write_text(TEXT)
        assert e2ediff(*words[:-2], "--resume").code == 0
        assert (place / "spec.json").exists()
        if place.name == "tiny-2":
            assert state(Path("groups/tiny")) == before
            shutil.rmtree("groups")
    Path("g").mkdir()
    Path("g/recipe.yaml").write_text("mine")
    done = e2ediff(*words)
    assert (done.code, done.err) == (
        6,
        "error: g: exists and is not empty. Choose another --out.\n",
    )


def test_a_set_of_images_killed_at_its_beginning_is_taken_up(tmp_path) -> None:
    """What it writes first is whole or a temporary file."""
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / ".tmp-x.json-0123abcd").write_text("{")
    prepare(Store(str(folder)), {"images": 1}, overwrite=False)
    assert json.loads((folder / "set.json").read_text()) == {"images": 1}
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(RunDirectoryError, match=r"is not empty(.|\n)*Choose another --out\.$"):
        prepare(Store(str(folder)), {"images": 1}, overwrite=False)
