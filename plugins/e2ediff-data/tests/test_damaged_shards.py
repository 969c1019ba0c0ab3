"""Damaged shards end in one message that says where, what and what to do, never in a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import pytest
from command_line import e2ediff
from e2ediff_data.shards import Shards
from pictures import write_tree

from e2ediff.data import SourceConfig
from e2ediff.errors import DataError
from e2ediff.files.index import Index


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a tree of two classes of 3 and 4 images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("E2EDIFF_CACHE", str(tmp_path / "cache"))
    write_tree(Path("tree"), [3, 4], size=(20, 24))
    return tmp_path


def refusal(config: SourceConfig) -> str:
    """The one line with which shards are refused when they are opened."""
    with pytest.raises(DataError) as caught:
        config.open()
    assert type(caught.value) is DataError
    (line,) = str(caught.value).splitlines()
    return line


AGAIN = "Run `e2ediff data prepare` again: it rewrites what is damaged or missing."
PREPARE = ("data", "prepare", "tree", "shards", "--size", 16, "--workers", 0)


@pytest.fixture
def shards() -> SourceConfig:
    """Shards of the tree, whose hashes have not been compared yet."""
    assert e2ediff(*PREPARE).code == 0
    return Shards(path="shards", size=16, classes=2)


def test_shards_without_their_index_say_so_and_are_mended(shards) -> None:
    Path("shards/index.safetensors").unlink()
    assert refusal(shards) == f"data.path: shards/index.safetensors is missing. {AGAIN}"
    assert e2ediff(*PREPARE).code == 0
    assert len(shards.open()) == 7


@pytest.mark.parametrize("column", ["file", "start", "size", "labels", "names"])
def test_an_index_that_points_nowhere_is_damaged(shards, column: str) -> None:
    index = Index.loads(Path("shards/index.safetensors").read_bytes())
    assert index is not None
    if column == "names":
        index.names.ends += 1
        moved = index
    else:
        moved = attrs.evolve(index, **{column: getattr(index, column) - 2**40})
    assert Index.loads(moved.dumps("prepared.json")) is None


@pytest.mark.parametrize(
    "change",
    [{"files": {"shard-00000.tar": {}}}, {"files": 3}, {"size": "16"}, {"format": "gif"}],
    ids=["no sizes", "no files", "a size in words", "an unknown format"],
)
def test_a_damaged_prepared_json_is_said(shards, change) -> None:
    told = json.loads(Path("shards/prepared.json").read_text())
    Path("shards/prepared.json").write_text(json.dumps({**told, **change}))
    assert refusal(shards) == f"data.path: shards/prepared.json is damaged. {AGAIN}"


@pytest.mark.parametrize("torn", ["{", "[]"])
def test_torn_notes_of_prepare_are_made_again_or_said(shards, torn: str) -> None:
    Path("shards/parts/shard-00000.json").write_text(torn)
    assert e2ediff(*PREPARE).code == 0
    Path("shards/parts/settings.json").write_text(torn)
    done = e2ediff(*PREPARE)
    assert done.code == 5
    assert done.err.splitlines()[-1] == (
        "error: shards/parts/settings.json: is damaged: the settings of the shards beside it are "
        "not known; remove the folder, or give another one"
    )
