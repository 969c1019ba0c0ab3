"""Damaged data end in one message that says where, what and what to do, never in a traceback."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import attrs
import numpy as np
import pytest
from pictures import write_tree
from refusals import idx, refusal

from e2ediff.data import SourceConfig
from e2ediff.errors import DataError
from e2ediff.files.arrays import read_idx
from e2ediff.parts import sources

PIXELS = np.random.default_rng(0).integers(256, size=(20, 16, 16, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a tree of two classes of 3 and 4 images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("E2EDIFF_RUNS", raising=False)
    monkeypatch.setenv("E2EDIFF_CACHE", str(tmp_path / "cache"))
    write_tree(Path("tree"), [3, 4], size=(20, 24))
    return tmp_path


# Files of MNIST's


def gzipped() -> bytes:
    data = bytearray(gzip.compress(idx(50, 16, 16)))
    data[12:20] = b"\xff" * 8
    return bytes(data)


IDX = {
    "gzipped": (gzipped, "damaged gzip file (Error -3 while decompressing data: invalid code "
                         "lengths set); fetch it again"),
    "cut in its header": (
        lambda: b"\0\0\x08\x03\0\0",
        "its header is cut short: 6 bytes, expected 16 for an array of rank 3; fetch it again"),
    "cut in its data": (
        lambda: idx(2, 16, 16)[:-1],
        "511 bytes of data, expected 512 for shape [2, 16, 16]; fetch it again"),
}  # fmt: skip


@pytest.mark.parametrize("kind", IDX)
def test_a_damaged_idx_file_is_said(kind: str) -> None:
    make, said = IDX[kind]
    with pytest.raises(DataError) as caught:
        read_idx(make(), "x-ubyte")
    assert str(caught.value) == f"x-ubyte: {said}"


# Class numbers

LARGE = "9" * 25


NO_CLASS = (
    "; expected a class number from 0, below 100,000,000, or a name. Number the classes 0, 1, 2, "
    "..."
)


def test_a_number_that_no_class_can_have_is_named_with_its_image() -> None:
    said = f" has label {LARGE}{NO_CLASS}"
    images = sorted(str(path.relative_to("tree")) for path in Path("tree").rglob("*.JPEG"))
    rows = [[name, 0] for name in images[1:]] + [[images[0], int(LARGE)]]
    Path("labels.txt").write_text("\n".join(f"{name} {label}" for name, label in rows))
    config = sources.ImageFolder(root="tree", labels="labels.txt", size=16, classes=2)
    assert refusal(config) == f"data.root: {images[0]}{said}"
    Path("tree/dataset.json").write_text(json.dumps({"labels": rows}))
    assert refusal(attrs.evolve(config, labels=None)) == f"data.root: {images[0]}{said}"


def labelled(*labels: str) -> SourceConfig:
    Path("flat").mkdir()
    for i in range(len(labels)):
        Path(f"flat/{i}.jpg").write_bytes(b"x")
    Path("labels.txt").write_text("".join(f"{i}.jpg {one}\n" for i, one in enumerate(labels)))
    return sources.ImageFolder(root="flat", labels="labels.txt", size=16, classes=len(set(labels)))


@pytest.mark.parametrize("odd", ["-1", "+3", "1.0", "3."])
def test_one_odd_number_does_not_make_names_of_all(odd: str) -> None:
    """As names, 0, 10, 2 and -1 would be sorted as text: the classes 1, 2, 3 and 0."""
    line = refusal(labelled("0", "10", "2", odd))
    assert line == f"data.root: 3.jpg has label {odd}{NO_CLASS}"


def test_numbers_among_names_are_refused() -> None:
    assert refusal(labelled("0", "10", "cat")) == (
        "data.root: 0.jpg has a number as label (0), 2.jpg a name (cat); expected numbers or "
        "names for all. Write one kind"
    )


@pytest.mark.parametrize(
    ("labels", "numbers", "names"),
    [
        (["3", "10", "2"], [3, 10, 2], ()),
        (["cat", "3d", "n01"], [1, 0, 2], ("3d", "cat", "n01")),
        (["1e5", "-x", "1e5"], [1, 0, 1], ("-x", "1e5")),
    ],
)
def test_numbers_stay_and_names_are_sorted(labels, numbers, names) -> None:
    source = attrs.evolve(labelled(*labels), classes=len(names) or 11).open()
    assert (source.labels().tolist(), source.class_names) == (numbers, names)
