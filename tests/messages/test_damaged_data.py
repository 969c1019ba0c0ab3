"""Damaged data end in one message that says where, what and what to do, never in a traceback."""

from __future__ import annotations

import gzip
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import attrs
import numpy as np
import pytest
from command_line import e2ediff
from pictures import as_npz, as_zip, tar_bytes, write_tree
from tiny_recipe import tiny

from e2ediff.data import SourceConfig
from e2ediff.errors import BadImageError, DataError
from e2ediff.files.index import Index
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


def overwrite(path: str, at: int, data: bytes) -> None:
    content = bytearray(Path(path).read_bytes())
    content[at : at + len(data)] = data
    Path(path).write_bytes(content)


def whole(config: SourceConfig) -> None:
    source = config.open()
    source.read(range(len(source)))


def refusal(config: SourceConfig, kind: type[DataError] = DataError) -> str:
    """The one line with which all images of a source are refused."""
    with pytest.raises(kind) as caught:
        whole(config)
    assert type(caught.value) is kind
    (line,) = str(caught.value).splitlines()
    return line


# Zips


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
    config = sources.Archive(path="x.zip", size=16, classes=2)
    assert refusal(config, BadImageError) == (
        f"x.zip/{BROKEN}: damaged image ({what}); remove or replace it, or set "
        "`data.on_bad_image: skip`"
    )
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
    assert refusal(sources.Archive(path="x.zip", size=16, classes=1)) == (
        "data.path: x.zip cannot be read as a zip: Error -3 while decompressing data: invalid "
        "block type; fetch it again"
    )


# Arrays


def idx(*shape: int) -> bytes:
    head = bytes([0, 0, 8, len(shape)]) + b"".join(struct.pack(">I", n) for n in shape)
    return head + bytes(range(256)) * (int(np.prod(shape)) // 256)


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
        "data.images: x.npy cannot be read as npy: Unable to allocate"),
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
    assert refusal(sources.Arrays(images=path, size=16, classes=0)).startswith(said)


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
    Path("x.tar").write_bytes(tar_bytes([("0.jpg", b"x"), ("0.cls", LARGE.encode())]))
    config = sources.TarShards(path="x.tar", size=16, classes=2)
    assert refusal(config) == f"data.path: x.tar/0.jpg{said}"
    as_npz(PIXELS, np.full(20, 10**12), Path("x.npz"))
    assert refusal(sources.Arrays(images="x.npz", size=16, classes=2)).startswith(
        "data.labels: x.npz!labels holds label 1000000000000; expected class numbers below"
    )


def shard_with(*labels: str) -> SourceConfig:
    members = []
    for i, label in enumerate(labels):
        members += [(f"{i}.jpg", b"x"), (f"{i}.cls", label.encode())]
    Path("x.tar").write_bytes(tar_bytes(members))
    return sources.TarShards(path="x.tar", size=16, classes=len(set(labels)))


@pytest.mark.parametrize("odd", ["-1", "+3", "1.0", "3."])
def test_one_odd_number_does_not_make_names_of_all(odd: str) -> None:
    """As names, 0, 10, 2 and -1 would be sorted as text: the classes 1, 2, 3 and 0."""
    line = refusal(shard_with("0", "10", "2", odd))
    assert line == f"data.path: x.tar/3.jpg has label {odd}{NO_CLASS}"


def test_numbers_among_names_are_refused() -> None:
    assert refusal(shard_with("0", "10", "cat")) == (
        "data.path: x.tar/0.jpg has a number as label (0), x.tar/2.jpg a name (cat); expected "
        "numbers or names for all. Write one kind"
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
    source = attrs.evolve(shard_with(*labels), classes=len(names) or 11).open()
    assert (source.labels().tolist(), source.class_names) == (numbers, names)


def test_a_row_without_an_image_is_one_damaged_image() -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    good = next(Path("tree").rglob("*.JPEG")).read_bytes()
    pq.write_table(pa.table({"image": [good, None], "label": [0, 1]}), "x.parquet")
    line = refusal(sources.Parquet(path="x.parquet", size=16, classes=2), BadImageError)
    assert "x.parquet#1: damaged image (empty file); remove or replace it" in line


# Prepared shards


AGAIN = "Run `e2ediff data prepare` again: it rewrites what is damaged or missing."
PREPARE = ("data", "prepare", "tree", "shards", "--size", 16, "--workers", 0)


@pytest.fixture
def shards() -> SourceConfig:
    """Shards of the tree, whose hashes have not been compared yet."""
    assert e2ediff(*PREPARE).code == 0
    return sources.Shards(path="shards", size=16, classes=2)


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
        "error: shards/parts/settings.json: is damaged: nobody can tell how the shards beside it "
        "were made; remove the folder, or give another one"
    )


def test_a_whole_block_takes_the_place_of_what_was_recognised() -> None:
    done = e2ediff("data", "stats", "tree", "--workers", 0, "--set", "data=synthetic")
    assert (done.code, "name: synthetic" in done.out) == (0, True)
    as_zip(Path("tree"), Path("x.zip"))
    block = "data={name: archive, path: x.zip, size: 16, classes: 0}"
    done = e2ediff("data", "stats", "tree", "--workers", 0, "--set", block)
    assert (done.code, "classes     0 (unconditional)" in done.out) == (0, True)
