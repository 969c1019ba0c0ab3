"""Folders that a stranger packed lead to no other file of this machine, and to no endless work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import fsspec
import pytest
from command_line import e2ediff, trained
from PIL import Image
from tiny_recipe import tiny

from e2ediff.ablate.group import Group
from e2ediff.errors import DataError, ResourceError, RunDirectoryError
from e2ediff.files.location import Location, expand, find_files
from e2ediff.files.tree import tree
from e2ediff.parts.trackers import CSV
from e2ediff.store.environment import describe_environment
from e2ediff.store.run_directory import RunDirectory
from e2ediff.store.storage import Store

PRECIOUS = "something of mine\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        run = trained(tmp_path_factory.mktemp("run"), tiny(steps="2"))
        yield run


@pytest.fixture
def strange(finished: Path, tmp_path: Path) -> Path:
    """A run without a seal of this user's."""
    run = tmp_path / "strange"
    shutil.copytree(finished, run)
    (run / "seal").unlink()
    return run


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    path = tmp_path / "precious"
    path.write_text(PRECIOUS)
    return path


def as_link(path: Path, target: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def test_a_lock_that_is_a_link_empties_no_other_file(strange, precious):
    as_link(strange / ".lock", precious)
    done = e2ediff("ckpt", "prune", strange, "--keep", "1")
    assert (done.code, precious.read_text()) == (8, PRECIOUS)
    assert "strange/.lock: cannot write: it is a link" in done.err


@pytest.mark.parametrize("log", ["events.jsonl", "metrics.jsonl"])
def test_a_log_that_is_a_link_extends_no_other_file(strange, precious, log):
    as_link(strange / log, precious)
    with pytest.raises(ResourceError, match=f"{log}: cannot write: it is a link"):
        Store(strange).append(log, "{}")
    assert precious.read_text() == PRECIOUS


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_figures_are_not_added_to_what_is_no_file_of_the_run(tmp_path, precious, kind):
    place = tmp_path / "figures.csv"
    os.mkfifo(place) if kind == "pipe" else as_link(place, precious)
    with pytest.raises(OSError, match=r"symbolic links|No such device"):
        CSV().open(str(tmp_path))
    assert precious.read_text() == PRECIOUS


def test_no_checkpoints_are_deleted_behind_a_link(finished, strange, tmp_path):
    theirs, mine = strange / "checkpoints", tmp_path / "mine"
    shutil.copytree(finished / "checkpoints", mine)
    shutil.copytree(next(mine.iterdir()), mine / ".trash-x")
    shutil.rmtree(theirs)
    theirs.symlink_to(mine)
    before = sorted(mine.rglob("*"))
    done = e2ediff("ckpt", "prune", strange, "--keep", "1")
    assert (done.code, sorted(mine.rglob("*"))) == (6, before)
    assert f"{theirs}: is a link to {mine}, and this run was not made here by you" in done.err


def test_checkpoints_of_an_own_run_may_lie_behind_a_link(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "own")
    shutil.move(tmp_path / "own/checkpoints", tmp_path / "scratch")
    (tmp_path / "own/checkpoints").symlink_to(tmp_path / "scratch")
    assert e2ediff("ckpt", "prune", tmp_path / "own", "--keep", "1").code == 0


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("samples", ["sample", "--count", "2"]),
        ("samples/seed-0", ["sample", "--count", "2"]),
        ("samples/seed-0/images", ["sample", "--count", "2"]),
        ("samples", ["interpolate", "--seeds", "0", "1"]),
        ("samples", ["reconstruct", "--count", "2"]),
        ("reconstructions", ["reconstruct", "mine"]),
        ("reconstructions/images", ["reconstruct", "mine"]),
        ("scores", ["eval", "--count", "8", "--features", "random_projection"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_no_results_are_written_behind_a_link(
    strange, finished, tmp_path, monkeypatch, folder, words
):
    """Where a picture of the user could have the name of a reconstruction of it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    Image.new("RGB", (16, 16), "red").save(tmp_path / "mine/photo.png")
    before = (tmp_path / "mine/photo.png").read_bytes()
    shutil.rmtree(strange / folder, ignore_errors=True)
    (strange / folder).parent.mkdir(parents=True, exist_ok=True)
    (strange / folder).symlink_to(tmp_path / "mine")
    done = e2ediff(words[0], "strange", *words[1:])
    assert (done.code, os.listdir("mine")) == (6, ["photo.png"]), done.err
    assert f"strange/{folder}: is a link to {tmp_path}/mine, and this run was not made" in done.err
    assert (tmp_path / "mine/photo.png").read_bytes() == before


def test_images_of_a_set_are_not_written_behind_a_link(finished, tmp_path):
    """Of a set that a stranger began, though the run is the user's own."""
    place, mine = tmp_path / "set", tmp_path / "mine"
    words = ("sample", finished, "--count", "2", "--out", place)
    assert e2ediff(*words).code == 0
    shutil.rmtree(place / "images")
    mine.mkdir()
    (place / "images").symlink_to(mine)
    for more in ((), ("--overwrite", "--seed", "1")):
        done = e2ediff(*words, *more)
        assert (done.code, os.listdir(mine)) == (6, []), done.err
        assert f"{place}/images: is a link to {mine}. Put the folder itself" in done.err


@pytest.mark.parametrize("file", ["run.json", "status.json", "figures.json", "resolved.yaml"])
def test_a_record_of_gigabytes_is_not_read(strange, file):
    os.truncate(strange / file, 1 << 40)  # a file with a hole, which takes no space
    done = e2ediff("report", strange, "--out", strange / "page.html")
    assert done.code == 6
    assert f"strange/{file}: cannot be read: 1,099,511,627,776 bytes" in done.err


def test_an_ablation_of_billions_of_runs_is_refused(tmp_path):
    cells = {f"c{i}": {"resolved": "", "overrides": []} for i in range(1000)}
    spec = dict.fromkeys(("vary", "set", "match", "command", "name", "created"), "")
    spec |= {"cells": cells, "seeds": [*range(1000)], "baseline": "c0", "environment": {}}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    with pytest.raises(RunDirectoryError, match="it describes no ablation"):
        Group.open(tmp_path)


def test_links_that_lead_to_a_folder_in_a_trillion_ways_are_left_out(tmp_path):
    for i in range(40):
        (tmp_path / f"d{i}").mkdir()
        for name in ("a", "b"):
            (tmp_path / f"d{i}" / name).symlink_to(f"../d{i + 1}")
    (tmp_path / "d1/x.png").touch()
    found = tree(fsspec.filesystem("file"), str(tmp_path), "here")
    assert sorted(found.files) == ["d0/a/x.png", "d0/b/x.png", "d1/x.png"]
    assert "that link to a folder as 100 others do" in {left.reason for left in found.left_out}


@pytest.mark.parametrize(
    "pattern",
    ["{0..99999999999}", "{0..9999}{0..9999}", "{a,b}" * 40, "{a}" * 100_000, "{" * 1_000_000],
)
def test_braces_that_stand_for_more_files_than_there_can_be_are_refused(pattern):
    with pytest.raises(DataError, match="stand for more files than any data set has"):
        expand(pattern)


def test_patterns_of_many_parts_are_soon_found_not_to_fit(tmp_path):
    deep = tmp_path / Path(*["a"] * 40)
    deep.mkdir(parents=True)
    (deep / "x.tar").touch()
    (tmp_path / ("a" * 200)).touch()
    began = time.monotonic()
    assert find_files(f"{tmp_path}/" + "**/a/" * 20 + "x.tar", "o", ".tar")[1][0].name == "x.tar"
    assert Location(tmp_path, "o").matching(str(tmp_path), "*a" * 60 + "b") == []
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("setting", ["core.fsmonitor", "filter.x.clean"])
def test_the_git_folder_of_a_stranger_starts_no_program(tmp_path, monkeypatch, setting):
    def git(*words: str) -> None:
        who = ("-c", "user.name=x", "-c", "user.email=x@y")
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "file").write_text("1")
    (tmp_path / ".gitattributes").write_text("* filter=x\n")
    git("add", ".")
    git("commit", "-m", "one")
    git("config", setting, f"touch {tmp_path}/started; cat")
    (tmp_path / "file").write_text("2")
    monkeypatch.chdir(tmp_path)
    found = describe_environment()["git"]
    assert isinstance(found, dict)
    assert found["dirty"] is (None if setting.startswith("filter") else True)
    assert len(str(found["commit"])) == 40
    assert not (tmp_path / "started").exists()


def test_what_is_written_beside_the_data_follows_no_link(tmp_path, precious):
    from e2ediff.files.location import SidecarFile

    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("index", f"index.{os.getpid()}.tmp"):
        as_link(folder / name, precious)
    SidecarFile(Location(folder, "o"), f"{folder}/index").write(b"ours")
    assert (precious.read_text(), (folder / "index").read_bytes()) == (PRECIOUS, b"ours")


def test_a_report_of_a_bug_reads_a_log_without_lines_in_little_time(strange):
    (strange / "events.jsonl").write_bytes(b"x" * (1 << 26))
    began = time.monotonic()
    done = e2ediff("doctor", strange, "--bundle", strange.parent / "bundle.zip")
    assert (strange.parent / "bundle.zip").exists(), done.err
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("name", ["loop", "x" * 5000])
def test_a_folder_that_is_a_link_to_itself_holds_nothing(tmp_path, name):
    (tmp_path / "loop").symlink_to("loop")
    assert Store(tmp_path).list(name) == []


def test_the_run_of_these_tests_was_made_here(finished):
    assert RunDirectory.open(finished).is_made_here()
