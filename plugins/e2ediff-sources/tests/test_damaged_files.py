"""Damaged zips, arrays and rows end in one message, never in a traceback."""

from __future__ import annotations

import gzip
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_line import e2ediff, needs
from e2ediff_sources import parquet
from e2ediff_sources.archive import Archive
from e2ediff_sources.arrays import Arrays
from e2ediff_sources.arrow import Arrow
from e2ediff_sources.parquet import Parquet
from e2ediff_sources.tars import ClassTars, TarShards
from mutations import outcomes
from pictures import (
    as_arrow,
    as_class_tars,
    as_npz,
    as_parquet,
    as_shards,
    as_zip,
    header,
    promise,
    tar_bytes,
    write_tree,
)
from refusals import idx, overwrite, refusal
from tiny_recipe import tiny

from e2ediff.errors import BadImageError, DataError

PIXELS = np.random.default_rng(0).integers(256, size=(20, 16, 16, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a tree of two classes of 3 and 4 images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("E2EDIFF_RUNS", raising=False)
    monkeypatch.setenv("E2EDIFF_CACHE", str(tmp_path / "cache"))
    write_tree(Path("tree"), [3, 4], size=(20, 24))
    return tmp_path


def a_zip(method: int) -> None:
    with zipfile.ZipFile("x.zip", "w", method) as file:
        for path in sorted(Path("tree").rglob("*.JPEG")):
            file.writestr(str(path.relative_to("tree")), path.read_bytes())


def content_of(name: str) -> int:
    """Where a member's bytes begin."""
    with zipfile.ZipFile("x.zip") as file:
        info = file.getinfo(name)
        return info.header_offset + 30 + len(info.filename)


BROKEN = "n00000001/n00000001_2.JPEG"


def unknown_method() -> None:
    at = content_of(BROKEN) - 30 - len(BROKEN)
    overwrite("x.zip", at + 8, struct.pack("<H", 97))
    directory = Path("x.zip").read_bytes().rindex(BROKEN.encode()) - 46
    overwrite("x.zip", directory + 10, struct.pack("<H", 97))


MEMBERS: dict[str, tuple[int, Callable[[], None], str]] = {
    "deflated": (
        zipfile.ZIP_DEFLATED,
        lambda: overwrite("x.zip", content_of(BROKEN), b"\xff" * 4),
        "Error -3 while decompressing data: invalid block type",
    ),
    "stored": (
        zipfile.ZIP_STORED,
        lambda: overwrite("x.zip", content_of(BROKEN) + 200, b"\xff" * 4),
        f"Bad CRC-32 for file '{BROKEN}'",
    ),
    "of an unknown method": (
        zipfile.ZIP_DEFLATED, unknown_method, "That compression method is not supported"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MEMBERS)
def test_a_damaged_member_of_a_zip_is_one_damaged_image(kind: str) -> None:
    method, harm, what = MEMBERS[kind]
    a_zip(method)
    harm()
    config = Archive(path="x.zip", size=16, classes=2)
    assert refusal(config, BadImageError) == (
        f"x.zip/{BROKEN}: damaged image ({what}); remove or replace it, or set "
        "`data.on_bad_image: skip`"
    )


@needs("e2ediff-data")
@pytest.mark.parametrize("kind", MEMBERS)
def test_data_check_names_a_damaged_member_of_a_zip(kind: str) -> None:
    method, harm, what = MEMBERS[kind]
    a_zip(method)
    harm()
    done = e2ediff("data", "check", "x.zip", "--set", "size=16", "--workers", 0)
    assert (done.code, done.out) == (5, f"x.zip/{BROKEN}: damaged image ({what})\n")


def test_a_run_skips_the_damaged_member_of_a_zip() -> None:
    a_zip(zipfile.ZIP_DEFLATED)
    overwrite("x.zip", content_of(BROKEN), b"\xff" * 4)
    data = "{name: archive, path: x.zip, size: 16, classes: 2, on_bad_image: skip, workers: 1}"
    Path("tiny.yaml").write_text(tiny(steps="4", batch="4", data=data))
    done = e2ediff("run", "tiny.yaml", "--out", "x")
    assert done.code == 0, done.err
    (line,) = Path("x/bad_images.jsonl").read_text().splitlines()
    assert json.loads(line)["image"] == f"x.zip/{BROKEN}"


def test_a_damaged_dataset_json_in_a_zip_is_said() -> None:
    told = json.dumps({"labels": [["0.png", 0]]}) + " " * 3000
    with zipfile.ZipFile("x.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("dataset.json", told)
        file.writestr("0.png", b"")
    overwrite("x.zip", content_of("dataset.json"), b"\xff" * 10)
    assert refusal(Archive(path="x.zip", size=16, classes=1)) == (
        "data.path: x.zip cannot be read as a zip: Error -3 while decompressing data: invalid "
        "block type; fetch it again"
    )


def cut_npz() -> None:
    as_npz(PIXELS, np.arange(20) % 3, Path("x.npz"))
    Path("x.npz").write_bytes(Path("x.npz").read_bytes()[:-40])


def flipped_npz() -> None:
    as_npz(PIXELS, np.arange(20) % 3, Path("x.npz"))
    overwrite("x.npz", 3000, bytes([255 - Path("x.npz").read_bytes()[3000]]))


def compressed_npz() -> None:
    np.savez_compressed("x.npz", images=PIXELS, labels=np.arange(20) % 3)
    overwrite("x.npz", 60, b"\xff" * 10)


def torn_npy() -> None:
    np.save("x.npy", PIXELS)
    overwrite("x.npy", 8, struct.pack("<H", 20))  # ends its header within a bracket


def gzipped() -> None:
    Path("x-ubyte.gz").write_bytes(gzip.compress(idx(50, 16, 16)))
    overwrite("x-ubyte.gz", 12, b"\xff" * 8)


ARRAYS: dict[str, tuple[str, Callable[[], object], str]] = {
    "npz cut short": (
        "x.npz", cut_npz,
        "data.images: x.npz cannot be read as npz: File is not a zip file; fetch it again"),
    "npz of another checksum": (
        "x.npz", flipped_npz,
        "data.images: x.npz: Bad CRC-32 for file 'images.npy'; fetch it again"),
    "compressed npz": (
        "x.npz", compressed_npz,
        "data.images: x.npz: Error -3 while decompressing data: invalid block type; fetch it "
        "again"),
    "npy of a torn header": (
        "x.npy", torn_npy, "data.images: x.npy cannot be read as npy: "),
    "npy larger than any memory": (
        "x.npy",
        lambda: Path("x.npy").write_bytes(
            b"\x93NUMPY\x01\x00\x76\x00"
            + b"{'descr': '|u1', 'fortran_order': False, 'shape': (10000000000000, 16, 16), }"
            .ljust(117) + b"\n"),
        "data.images: x.npy cannot be read as npy: 2,560,000,000,000,000 bytes unpacked from 128"),
    "gzipped idx": (
        "x-ubyte.gz", gzipped,
        "x-ubyte.gz: damaged gzip file (Error -3 while decompressing data: invalid code lengths "
        "set); fetch it again"),
    "idx cut in its header": (
        "x-ubyte", lambda: Path("x-ubyte").write_bytes(b"\0\0\x08\x03\0\0"),
        "x-ubyte: its header is cut short: 6 bytes, expected 16 for an array of rank 3; fetch it "
        "again"),
    "idx cut in its data": (
        "x-ubyte", lambda: Path("x-ubyte").write_bytes(idx(2, 16, 16)[:-1]),
        "x-ubyte: 511 bytes of data, expected 512 for shape [2, 16, 16]; fetch it again"),
    "idx without images": (
        "x-ubyte", lambda: Path("x-ubyte").write_bytes(idx(0, 16, 16)),
        "data.images: x-ubyte holds no images; expected one or more"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ARRAYS)
def test_damaged_arrays_are_said(kind: str) -> None:
    path, make, said = ARRAYS[kind]
    make()
    assert refusal(Arrays(images=path, size=16, classes=0)).startswith(said)


def test_a_row_without_an_image_is_one_damaged_image() -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    good = next(Path("tree").rglob("*.JPEG")).read_bytes()
    pq.write_table(pa.table({"image": [good, None], "label": [0, 1]}), "x.parquet")
    line = refusal(Parquet(path="x.parquet", size=16, classes=2), BadImageError)
    assert "x.parquet#1: damaged image (empty file); remove or replace it" in line


# Class numbers


def test_a_number_that_no_class_can_have_is_named_with_its_image() -> None:
    large = "9" * 25
    Path("x.tar").write_bytes(tar_bytes([("0.jpg", b"x"), ("0.cls", large.encode())]))
    assert refusal(TarShards(path="x.tar", size=16, classes=2)) == (
        f"data.path: x.tar/0.jpg has label {large}; expected a class number from 0, below "
        "100,000,000, or a name. Number the classes 0, 1, 2, ..."
    )
    as_npz(PIXELS, np.full(20, 10**12), Path("x.npz"))
    assert refusal(Arrays(images="x.npz", size=16, classes=2)).startswith(
        "data.labels: x.npz!labels holds label 1000000000000; expected class numbers below"
    )


# What would fill the memory


def test_a_member_of_a_zip_is_not_unpacked_to_more_than_an_image() -> None:
    as_zip(Path("tree"), Path("x.zip"))
    promise("x.zip", b"n00000000/n00000000_1.JPEG", 4_000_000_000)
    what = "4,000,000,000 bytes, more than the 536,870,912 that are read of an image"
    with pytest.raises(BadImageError, match=what):
        Archive(path="x.zip", size=16, classes=2).open().read([1])


def test_a_dataset_json_in_a_zip_is_not_unpacked_without_end() -> None:
    rows = [[str(p.relative_to("tree")), 0] for p in Path("tree").rglob("*.JPEG")]
    Path("tree/dataset.json").write_text(json.dumps({"labels": rows}))
    as_zip(Path("tree"), Path("x.zip"))
    config = Archive(path="x.zip", size=16, classes=1)
    assert len(config.open()) == 7
    promise("x.zip", b"dataset.json", 4_000_000_000)
    said = "4,000,000,000 bytes, more than the 536,870,912 that are read of a dataset.json"
    with pytest.raises(DataError, match=said):
        config.open()


def test_arrays_of_enormous_images_are_refused_by_their_headers() -> None:
    with zipfile.ZipFile("images.npz", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("images.npy", header(1, 13_000, 13_000) + bytes(1000))
    head = b"\0\0\x08\3" + b"".join(n.to_bytes(4, "big") for n in (1, 13_000, 13_000))
    Path("x-ubyte.gz").write_bytes(gzip.compress(head + bytes(1000)))
    said = "images of 13000 x 13000 pixels, more than the 64,000,000 that are ever decoded"
    for address in ("images.npz", "x-ubyte.gz"):
        with pytest.raises(DataError, match=said):
            Arrays(images=address, size=32, classes=0).open()


def test_arrays_of_labels_are_not_unpacked_without_end() -> None:
    images, labels = np.zeros((4, 16, 16), np.uint8), np.arange(4) % 2
    np.savez_compressed("x.npz", images=images, labels=labels)
    promise("x.npz", b"labels.npy", 4_000_000_000)
    np.save("x.npy", images)
    head = b"\0\0\x08\1" + (4_000_000_000).to_bytes(4, "big")
    Path("y-ubyte.gz").write_bytes(gzip.compress(head + bytes(1000)))
    said = "4,000,000,000 bytes, more than the 536,870,912 that are read of an array of labels"
    for images_at, labels_at in (("x.npz", None), ("x.npy", "y-ubyte.gz")):
        config = Arrays(images=images_at, labels=labels_at, size=16, classes=2)
        with pytest.raises(DataError, match=said):
            config.open()


def test_arrays_that_the_crop_would_make_enormous_are_refused() -> None:
    np.savez("x.npz", images=np.zeros((2, 70_000, 1), np.uint8))
    with pytest.raises(
        DataError, match="1 x 70000 pixels, 32 x 2240000 when resized to cover 32 x 32"
    ):
        Arrays(images="x.npz", size=32, classes=0).open()


def test_what_is_no_array_in_an_npz_is_said() -> None:
    with zipfile.ZipFile("x.npz", "w") as file:
        file.writestr("images", b"no npy")
    with pytest.raises(DataError, match=r"x\.npz: .*images"):
        Arrays(images="x.npz", size=32, classes=0).open()


def test_rows_of_a_table_that_all_stand_for_one_image_are_not_all_decoded(monkeypatch) -> None:
    """A dictionary holds their image once."""
    monkeypatch.setattr(parquet, "MAX_BYTES", 1 << 20)
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    image = pa.array([bytes(200_000)], pa.binary())
    for rows, path in ((20, "x.parquet"), (10_000, "y.parquet")):
        table = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), image)
        pq.write_table(pa.table({"image": table}), path, compression="zstd", store_schema=False)
    line = refusal(Parquet(path="x.parquet", size=16, classes=0), BadImageError)
    assert "bytes, more than the 3,20" in line
    line = refusal(Parquet(path="y.parquet", size=16, classes=0))
    assert "y.parquet has 10,000 rows by its footer, and " in line


def test_columns_that_are_compressed_are_refused_before_they_are_unpacked() -> None:
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"image": [bytes(20_000_000)] * 4})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream("x.arrow", table.schema, options=options) as stream:
        stream.write_table(table)
    before = pa.total_allocated_bytes()
    assert "x.arrow is compressed within" in refusal(Arrow(path="x.arrow", size=16, classes=0))
    assert pa.total_allocated_bytes() <= before


def test_json_in_a_tar_that_is_nested_too_deeply_is_said() -> None:
    for text in (b"[" * 100_000, b'{"label":' + b"[" * 100_000, b"[1]"):
        Path("x.tar").write_bytes(tar_bytes([("a.jpg", b"x"), ("a.json", text)]))
        line = refusal(TarShards(path="x.tar", size=16, classes=2))
        assert "x.tar/a.json: no label (it is " in line


# Damage at random


def _first(folder: str, suffix: str) -> bytes:
    return min(Path(folder).glob(f"*{suffix}")).read_bytes()


def _seed(kind: str) -> bytes:
    """A sound file of a kind."""
    tree = Path("tree")
    if kind == "x.npz":
        return as_npz(PIXELS, np.arange(20) % 2, Path(kind)).read_bytes()
    if kind == "x.zip":
        return as_zip(tree, Path(kind)).read_bytes()
    if kind == "x.tar":
        return as_class_tars(tree, Path(kind)).read_bytes()
    if kind == "shard.tar":
        as_shards(tree, Path("shards"), 100, "json")
        return _first("shards", ".tar")
    pytest.importorskip("pyarrow")
    if kind == "x.parquet":
        as_parquet(tree, Path("parquet"))
        return _first("parquet", ".parquet")
    as_arrow(tree, Path("arrow"))
    return _first("arrow", ".arrow")


KINDS = {
    "x.npz": (Arrays, "images"),
    "x.zip": (Archive, "path"),
    "x.tar": (ClassTars, "path"),
    "shard.tar": (TarShards, "path"),
    "x.parquet": (Parquet, "path"),
    "x.arrow": (Arrow, "path"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_refused_with_an_error_of_ours(kind: str) -> None:
    config, option = KINDS[kind]
    seed = _seed(kind)
    Path("damaged").mkdir()

    def read(path: str) -> None:
        source = config(**{option: path}, size=16, classes=2).open()
        source.labels()
        source.read(range(len(source)))

    _, refused = outcomes(seed, Path("damaged", kind), read, 30)
    assert refused > 10


def test_a_parquet_file_at_which_pyarrow_ends_the_process_is_refused() -> None:
    """Damage at random; pyarrow 26 calls `terminate` where the columns of its footer are read."""
    pytest.importorskip("pyarrow.parquet")
    path = Path(__file__).with_name("aborting.parquet")
    line = refusal(Parquet(path=str(path), size=16, classes=0), DataError)
    assert "aborting.parquet" in line
    assert "fetch it again" in line
