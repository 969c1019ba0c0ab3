"""Every kind of source over one tree of images."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from pictures import (
    as_arrow,
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
from e2ediff.host.plugins import Host, load
from e2ediff.parts import sources

PACKED = ("archive", "class_tars", "tar_shards", "parquet", "arrow", "arrays")
PLUGINS = {**dict.fromkeys(PACKED, "e2ediff-sources"), "shards": "e2ediff-data"}
"""The plugin of each source that is not built in."""

COUNTS = [2 + k % 5 for k in range(30)]  # 119 images, up to three times as many in a class
TOTAL = sum(COUNTS)
SIZE = 8


@functools.cache
def installed() -> Host:
    """Core and the plugins that are installed."""
    return load()


def part(name: str) -> type[SourceConfig]:
    """The source of this name; skips the test that needs it where its plugin is not installed."""
    if plugin := PLUGINS.get(name):
        needed = f"needs `pip install plugins/{plugin}`"
        pytest.importorskip(plugin.replace("-", "_"), reason=needed)
    if name in ("parquet", "arrow"):
        pytest.importorskip("pyarrow")
    return installed().registries["sources"].get(name)


def source_of(name: str, **options: object) -> SourceConfig:
    """A source with these options."""
    return part(name)(**options)


def classes_of(place: Path) -> int:
    return len(list((place / "tree").iterdir()))


def folder(place: Path, **options: object) -> SourceConfig:
    root = str(place / "tree")
    return sources.ImageFolder(root=root, size=SIZE, classes=classes_of(place), **options)


def prepared(place: Path, path: Path, form: str) -> Path:
    """Shards of the tree; skips the test where the plugin that writes them is not installed."""
    needed = "needs `pip install plugins/e2ediff-data`"
    writing = pytest.importorskip("e2ediff_data.write", reason=needed)
    images = folder(place).open()
    settings = writing.Settings(
        source="", images=len(images), size=SIZE, channels=3, classes=classes_of(place),
        format=form, quality=95, each=25, skip=False,
    )  # fmt: skip
    writing.prepare(images, settings, str(path), workers=0, progress=lambda line: None)
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
    images = folder(place).open()
    x, y = images.read(range(len(images)))
    x = x.permute(0, 2, 3, 1).numpy()
    if kind == "npz":
        return {"images": str(as_npz(x, y.numpy(), tmp / "all.npz"))}
    pixels, labels = as_idx(x, tmp / "x-ubyte"), as_idx(y.numpy(), tmp / "y-ubyte")
    return {"images": str(pixels), "labels": str(labels)}


# Part, and what gives its options from the folder that holds the tree and a new one.
KINDS: dict[str, tuple[str, Callable[[Path, Path], dict[str, str]]]] = {
    "folder on another file system": (
        "image_folder", lambda p, t: {"root": in_memory(p / "tree", t / "m")}),
    "folder in a zip": (
        "image_folder", lambda p, t: {"root": f"zip://::{as_zip(p / 'tree', t / 'x.zip')}"}),
    "zip": ("archive", lambda p, t: {"path": as_zip(p / "tree", t / "x.zip")}),
    "zip as EDM's": ("archive", lambda p, t: {"path": as_dataset_json(p / "tree", t / "x.zip")}),
    "tar of class tars": (
        "class_tars", lambda p, t: {"path": as_class_tars(p / "tree", t / "x.tar")}),
    "class tars": ("class_tars", lambda p, t: {"path": separate_tars(p / "tree", t / "x")}),
    "shards with cls": ("tar_shards", lambda p, t: {"path": as_shards(p / "tree", t / "x", 50)}),
    "shards with json": (
        "tar_shards", lambda p, t: {"path": as_shards(p / "tree", t / "x", 50, "json")}),
    "parquet": ("parquet", lambda p, t: {"path": as_parquet(p / "tree", t / "x")}),
    "saved by datasets": ("arrow", lambda p, t: {"path": as_arrow(p / "tree", t / "x")}),
    "npz": ("arrays", lambda p, t: arrays(p, t, "npz")),
    "idx": ("arrays", lambda p, t: arrays(p, t, "idx")),
    "prepared as png": ("shards", lambda p, t: {"path": prepared(p, t / "x", "png")}),
    "prepared as raw": ("shards", lambda p, t: {"path": prepared(p, t / "x", "raw")}),
}  # fmt: skip


def make(kind: str, place: Path, tmp: Path, **options: object) -> SourceConfig:
    name, given = KINDS[kind]
    config = part(name)
    paths = {key: str(value) for key, value in given(place, tmp).items()}
    options = {"size": SIZE, "classes": classes_of(place), **options}
    return config(**paths, **options)
