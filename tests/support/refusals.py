"""Damage files of data, and the one line with which what lies there is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from command_line import e2ediff
from pictures import write_tree
from tiny_recipe import tiny

from e2ediff.data import SourceConfig
from e2ediff.errors import DataError


def image_tree(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder with a tree of three classes of 4, 6 and 10, and a recipe of it."""
    monkeypatch.chdir(place)
    monkeypatch.delenv("E2EDIFF_RUNS", raising=False)
    monkeypatch.setenv("E2EDIFF_CACHE", str(place / "cache"))
    write_tree(Path("tree"), [4, 6, 10], size=(20, 24))
    data = "{name: image_folder, root: tree, size: 16, classes: 3, workers: 0}"
    cadence = "{log: 1, diagnose: 3, preview: 6, checkpoint: 3}"
    Path("tiny.yaml").write_text(tiny(steps="6", data=data, cadence=cadence))
    return place


def refused(data: str, *more: str) -> str:
    """The one line with which a run of a data block is refused, before anything is made."""
    changes = [f"data={data}" if data.startswith("{") else f"data.{data}", *more]
    done = e2ediff("run", "tiny.yaml", *(w for one in changes for w in ("--set", one)))
    assert done.code == 5, done
    assert not Path("runs").exists()
    (line,) = done.err.removeprefix("error: ").splitlines()
    return line


def refusal(config: SourceConfig, kind: type[DataError] = DataError) -> str:
    """The one line with which all images of a source are refused."""
    with pytest.raises(kind) as caught:
        whole(config)
    assert type(caught.value) is kind
    (line,) = str(caught.value).splitlines()
    return line


def whole(config: SourceConfig) -> None:
    source = config.open()
    source.read(range(len(source)))


def overwrite(path: str, at: int, data: bytes) -> None:
    content = bytearray(Path(path).read_bytes())
    content[at : at + len(data)] = data
    Path(path).write_bytes(content)


def idx(*shape: int) -> bytes:
    """A file of MNIST's form with values that count up."""
    head = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
    return head + bytes(range(256)) * (int(np.prod(shape)) // 256)
