"""Every kind of source over one tree of images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from pictures import (
    as_class_tars,
    as_dataset_json,
    as_idx,
    as_npz,
    as_parquet,
    as_shards,
    as_zip,
    tar_bytes,
)

from e2ediff.data import SourceConfig
from e2ediff.parts import sources
from e2ediff.prepare.write import Settings, prepare

COUNTS = [2 + k % 5 for k in range(30)]  # 119 images, up to three times as many in a class
TOTAL = sum(COUNTS)
SIZE = 8


def classes_of(place: Path) -> int:
    return len(list((place / "tree").iterdir()))


def folder(place: Path, **options: object) -> SourceConfig:
    root = str(place / "tree")
    return sources.ImageFolder(root=root, size=SIZE, classes=classes_of(place), **options)


def prepared(place: Path, path: Path, form: str) -> Path:
    source = folder(place).open()
    settings = Settings(
        source="", images=len(source), size=SIZE, channels=3, classes=classes_of(place),
        format=form, quality=95, each=25, skip=False,
    )  # fmt: skip
    prepare(source, settings, str(path), workers=0, progress=lambda line: None)
    return path


def in_memory(tree: Path, out: Path) -> str:
    """A copy of the tree on a file system that is not the disk."""
    url = f"memory:/{out}"
    for path in tree.rglob("*.JPEG"):
        with fsspec.open(f"{url}/{path.relative_to(tree)}", "wb") as file:
            file.write(path.read_bytes())
    return url


def separate_tars(tree: Path, out: Path) -> Path:
    out.mkdir()
    for inner in sorted(tree.iterdir()):
        members = [(path.name, path.read_bytes()) for path in inner.iterdir()]
        (out / f"{inner.name}.tar").write_bytes(tar_bytes(members))
    return out


def arrays(place: Path, tmp: Path, kind: str) -> dict[str, str]:
    source = folder(place).open()
    x, y = source.read(range(len(source)))
    x = x.permute(0, 2, 3, 1).numpy()
    if kind == "npz":
        return {"images": str(as_npz(x, y.numpy(), tmp / "all.npz"))}
    images, labels = as_idx(x, tmp / "x-ubyte"), as_idx(y.numpy(), tmp / "y-ubyte")
    return {"images": str(images), "labels": str(labels)}


# Part, and what gives its options from the folder that holds the tree and a new one.
KINDS: dict[str, tuple[str, Callable[[Path, Path], dict[str, str]]]] = {
    "folder on another file system": (
        "ImageFolder", lambda p, t: {"root": in_memory(p / "tree", t / "m")}),
    "folder in a zip": (
        "ImageFolder", lambda p, t: {"root": f"zip://::{as_zip(p / 'tree', t / 'x.zip')}"}),
    "zip": ("Archive", lambda p, t: {"path": as_zip(p / "tree", t / "x.zip")}),
    "zip as EDM's": ("Archive", lambda p, t: {"path": as_dataset_json(p / "tree", t / "x.zip")}),
    "tar of class tars": (
        "ClassTars", lambda p, t: {"path": as_class_tars(p / "tree", t / "x.tar")}),
    "class tars": ("ClassTars", lambda p, t: {"path": separate_tars(p / "tree", t / "x")}),
    "shards with cls": ("TarShards", lambda p, t: {"path": as_shards(p / "tree", t / "x", 50)}),
    "shards with json": (
        "TarShards", lambda p, t: {"path": as_shards(p / "tree", t / "x", 50, "json")}),
    "parquet": ("Parquet", lambda p, t: {"path": as_parquet(p / "tree", t / "x")}),
    "npz": ("Arrays", lambda p, t: arrays(p, t, "npz")),
    "idx": ("Arrays", lambda p, t: arrays(p, t, "idx")),
    "prepared as png": ("Shards", lambda p, t: {"path": prepared(p, t / "x", "png")}),
    "prepared as raw": ("Shards", lambda p, t: {"path": prepared(p, t / "x", "raw")}),
}  # fmt: skip


def make(kind: str, place: Path, tmp: Path, **options: object) -> SourceConfig:
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    name, given = KINDS[kind]
    paths = {key: str(value) for key, value in given(place, tmp).items()}
    options = {"size": SIZE, "classes": classes_of(place), **options}
    return getattr(sources, name)(**paths, **options)
