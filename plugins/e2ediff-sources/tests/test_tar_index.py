"""Where each image of a tar lies is read once, and kept beside the data or in the cache."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import torch
from e2ediff_sources.tars import ClassTars
from pictures import as_class_tars, tar_bytes, write_tree
from PIL import Image

from e2ediff.errors import DataError
from e2ediff.files.index import Index, column
from e2ediff.files.listing import Names
from e2ediff.files.location import find_files, fingerprint

SIZE = 8


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory, and an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("E2EDIFF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_an_index_is_kept_beside_the_data_and_made_again_when_they_change(tmp_path) -> None:
    tree = write_tree(tmp_path / "tree", [3, 2])
    path = as_class_tars(tree, tmp_path / "x.tar")
    config = ClassTars(path=str(path), size=SIZE, classes=2)
    first = config.open().read(range(5))[0]
    assert (tmp_path / "x.tar.index.safetensors").exists()
    write_tree(tmp_path / "more", [4, 4])
    as_class_tars(tmp_path / "more", path)
    assert len(config.open()) == 8
    (tmp_path / "x.tar.index.safetensors").write_bytes(b"damaged")
    assert len(config.open()) == 8
    as_class_tars(tree, path)
    assert torch.equal(config.open().read(range(5))[0], first)


def test_an_index_lies_in_the_cache_where_the_data_cannot_be_written(tmp_path, cache) -> None:
    path = as_class_tars(write_tree(tmp_path / "tree", [3, 2]), tmp_path / "x.tar")
    (tmp_path / "x.tar.index.safetensors").mkdir()  # also root may not replace a folder
    config = ClassTars(path=str(path), size=SIZE, classes=2)
    whole = config.open().read(range(5))[0]
    (kept,) = cache.iterdir()
    # From now on nobody could scan the tar, whose images are where they were.
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[257:262] = b"wrong"
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert torch.equal(config.open().read(range(5))[0], whole)
    kept.unlink()
    with pytest.raises(DataError, match="cannot be read as a plain tar"):
        config.open()


def test_a_flat_validation_tar_takes_its_labels_from_a_file(tmp_path) -> None:
    tree = write_tree(tmp_path / "tree", [3, 2])
    path = as_class_tars(tree, tmp_path / "train.tar")
    images = sorted(tree.rglob("*.JPEG"))
    flat = [(f"val_{i}.JPEG", p.read_bytes()) for i, p in enumerate(images)]
    (tmp_path / "val.tar").write_bytes(tar_bytes(flat))
    rows = [f"val_{i},{p.parent.name} 1 2 3 4" for i, p in enumerate(images)]
    (tmp_path / "val.csv").write_text("\n".join(["ImageId,PredictionString", *rows[::-1]]))
    config = ClassTars(
        path=str(path), held_out=str(tmp_path / "val.tar"), size=SIZE, classes=2,
        held_out_labels=str(tmp_path / "val.csv"),
    )  # fmt: skip
    training, held_out = config.open(), config.open(held_out=True)
    assert torch.equal(training.labels(), held_out.labels())
    assert torch.equal(training.read(range(5))[0], held_out.read(range(5))[0])


def test_an_index_that_counted_hidden_files_is_made_again() -> None:
    """It lies beside the data, as an earlier version left it."""
    path = as_class_tars(write_tree(Path("tree"), [3, 2]), Path("x.tar"))
    _, files = find_files(str(path), "data.path", ".tar")
    wrong = Index(
        (path.name,), Names(["a/._0.jpg"]), *(column([0]) for _ in range(4)), 1, ("a",)
    ).dumps(fingerprint(files, "class tars"))  # fmt: skip
    Path(f"{path}.index.safetensors").write_bytes(wrong)
    assert len(ClassTars(path=str(path), size=SIZE, classes=2).open()) == 5


def test_a_flat_tar_refuses_a_name_that_two_images_have() -> None:
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    named = [(name, out.getvalue()) for name in ("a/0.png", "b/0.png")]
    Path("val.tar").write_bytes(tar_bytes(named))
    inner = tar_bytes([("0.png", out.getvalue())])
    Path("train.tar").write_bytes(tar_bytes([("a.tar", inner), ("b.tar", inner)]))
    Path("val.txt").write_text("0.png a")
    config = ClassTars(
        path="train.tar", held_out="val.tar", held_out_labels="val.txt", size=8, classes=2
    )
    with pytest.raises(DataError, match=r"'0\.png' may be"):
        config.open(held_out=True)
