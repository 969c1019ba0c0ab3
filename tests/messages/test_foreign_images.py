"""Images that others made: one opener knows few formats and counts pixels before it decodes."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from command_line import Done, e2ediff, needs, trained
from pictures import (
    as_class_tars,
    as_parquet,
    as_shards,
    as_zip,
    header,
    promise,
    write_tree,
)
from PIL import Image
from source_kinds import source_of
from tiny_recipe import tiny

from e2ediff.data import SourceConfig
from e2ediff.errors import BadImageError, DataError
from e2ediff.files.arrays import read_idx
from e2ediff.parts import sources

SIZE = 32
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n"


def png(mode: str, width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.new(mode, (width, height)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def foreign() -> dict[str, bytes]:
    """Small files: a program for Ghostscript, 169 and 400 million pixels, and a long line."""
    return {
        "eps": EPS,
        "bomb": png("1", 13_000, 13_000),
        "larger bomb": png("1", 20_000, 20_000),
        "strip": png("L", 1, 70_000),
    }


SAID = {
    "eps": "damaged image (none of JPEG, PNG, WEBP, BMP, GIF, TIFF)",
    "bomb": "pixels",
    "larger bomb": "more pixels than",
    "strip": "1 x 70000 pixels, 32 x 2240000 when resized to cover 32 x 32, more than",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = f"{{name: synthetic, size: {SIZE}, count: 64}}"
    return trained(tmp_path_factory.mktemp("trained"), tiny(steps="1", data=data))


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A working directory, a program `gs` that leaves a trace, and an eye on what is decoded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("E2EDIFF_CACHE", str(tmp_path / "cache"))
    gs = tmp_path / "bin/gs"
    gs.parent.mkdir()
    gs.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", str(gs.parent), prepend=":")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # Pillow remembers where it is
    longest = 0
    load = Image.Image.load

    def watched(image, *arguments):
        nonlocal longest
        longest = max(longest, *image.size)
        return load(image, *arguments)

    monkeypatch.setattr(Image.Image, "load", watched)
    yield
    assert longest < 10_000
    assert not Path("started").exists()


def test_the_trap_works() -> None:
    """Else everything below would pass on anything."""
    with Image.open(io.BytesIO(EPS)) as image, pytest.raises(OSError):
        image.load()
    assert Path("started").exists()
    Path("started").unlink()


FORMS: dict[str, Callable[[Path], SourceConfig]] = {
    "folder": lambda tree: sources.ImageFolder(root=str(tree), size=SIZE, classes=2),
    "zip": lambda tree: source_of(
        "archive", path=str(as_zip(tree, tree.with_suffix(".zip"))), size=SIZE, classes=2
    ),
    "class tars": lambda tree: source_of(
        "class_tars", path=str(as_class_tars(tree, tree.with_suffix(".tar"))), size=SIZE, classes=2
    ),
    "tar shards": lambda tree: source_of(
        "tar_shards", path=as_shards(tree, tree.with_name("shards"), 9), size=SIZE, classes=2
    ),
    "parquet": lambda tree: source_of(
        "parquet", path=as_parquet(tree, tree.with_name("parquet")), size=SIZE, classes=2
    ),
}


def tree_with(data: bytes) -> Path:
    """Two classes, whose second image is this one."""
    tree = write_tree(Path("tree"), [3, 3], size=(40, 40))
    (tree / "n00000000/n00000000_1.JPEG").write_bytes(data)
    return tree


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", SAID)
def test_training_refuses_it_by_name(kind: str, form: str, foreign: dict[str, bytes]) -> None:
    source = FORMS[form](tree_with(foreign[kind])).open()
    for read in (lambda: source.read([1]), lambda: source.original(1)):
        with pytest.raises(BadImageError) as caught:
            read()
        assert caught.value.place == source.path_of(1)
        assert SAID[kind] in caught.value.what
    source.read([0, 2, 3])


@pytest.mark.parametrize("kind", SAID)
def test_a_run_stops_at_it_or_skips_it(kind: str, foreign: dict[str, bytes]) -> None:
    tree = tree_with(foreign[kind])
    data = f"name: image_folder, root: {tree}, size: {SIZE}, classes: 2, workers: 0"
    for policy, code in (("stop", 5), ("skip", 0)):
        recipe = tiny(steps="2", batch="6", data=f"{{{data}, on_bad_image: {policy}}}")
        Path("tiny.yaml").write_text(recipe)
        done = e2ediff("run", "tiny.yaml", "--out", policy)
        assert done.code == code, done.err
    assert "n00000000_1.JPEG" in done.err or Path("skip/bad_images.jsonl").exists()


@needs("e2ediff-data")
@pytest.mark.parametrize("kind", SAID)
def test_commands_on_data_name_it(kind: str, foreign: dict[str, bytes]) -> None:
    tree = tree_with(foreign[kind])
    options = ("--workers", 0, "--set", f"size={SIZE}")
    for quick in ((), ("--quick",)):
        done = e2ediff("data", "check", tree, *quick, *options)
        assert (done.code, done.out.count("\n")) == (5, 1)
        assert done.out.startswith("tree/n00000000/n00000000_1.JPEG: ")
        assert SAID[kind] in done.out
    done = e2ediff("data", "stats", tree, *options)
    assert done.code == 0
    assert "tree/n00000000/n00000000_1.JPEG: " in done.out
    done = e2ediff("data", "prepare", tree, "shards", "--size", SIZE, "--workers", 0)
    assert done.code == 5
    assert "tree/n00000000/n00000000_1.JPEG: " in done.err


def refused(kind: str, file: str, *words: object) -> None:
    done: Done = e2ediff(*words)
    assert done.code == 5, done.err
    (line,) = done.err[done.err.index("error: ") :].splitlines()
    assert f"{file}: " in line
    assert SAID[kind] in line
    assert "remove or replace it" in line
    assert "on_bad_image" not in line  # there is no recipe


@pytest.mark.parametrize("kind", ["eps", "bomb", "larger bomb"])
@pytest.mark.parametrize("number", [0, 3])
def test_eval_refuses_it_as_subject_and_as_reference(
    kind: str, number: int, foreign: dict[str, bytes]
) -> None:
    for folder in ("good", "bad"):
        Path(folder).mkdir()
        for i in range(6):
            Image.effect_noise((32, 32), 60).convert("RGB").save(f"{folder}/{i}.png")
    Path(f"bad/{number}.png").write_bytes(foreign[kind])
    zipped = f"zip://::{as_zip(Path('bad'), Path('bad.zip'))}"
    words = ("--features", "random_projection", "--metrics", "fid")
    for subject, reference in (("bad", "good"), ("good", "bad"), (zipped, "good")):
        inside = "::bad.zip" if subject == zipped else ""
        refused(kind, f"{number}.png{inside}", "eval", subject, "--reference", reference, *words)


@pytest.mark.parametrize("kind", SAID)
def test_commands_on_one_s_own_images_refuse_it(
    kind: str, finished: Path, foreign: dict[str, bytes]
) -> None:
    Path("own").mkdir()
    Image.new("RGB", (40, 40)).save("own/a.png")
    Path("own/b.png").write_bytes(foreign[kind])
    refused(kind, "own/b.png", "reconstruct", finished, "own", "--out", "made")
    words = (finished, "own/a.png", "own/b.png", "--out", "strip.png")
    refused(kind, "own/b.png", "interpolate", *words)
    assert not Path("strip.png").exists()
    assert not Path("made").exists()


@pytest.mark.parametrize("kind", ["eps", "bomb", "larger bomb"])
def test_a_report_says_that_it_cannot_be_shown(
    kind: str, tmp_path: Path, foreign: dict[str, bytes]
) -> None:
    data = f"{{name: synthetic, size: {SIZE}, count: 64}}"
    run = trained(tmp_path, tiny(steps="2", data=data))
    (shown,) = (run / "samples").glob("step-*2.png")
    shown.write_bytes(foreign[kind])
    done = e2ediff("report", run)
    assert done.code == 0, done.err
    page = (run / "report.html").read_text()
    assert f"{shown.name} cannot be shown: " in page
    assert SAID[kind].replace("JPEG, PNG, WEBP, BMP, GIF, TIFF", "PNG") in page


# What is packed


def promising(path: str, size: int) -> None:
    """A zip whose second member says that it has so many bytes once unpacked."""
    tree = write_tree(Path("tree"), [2, 2], size=(40, 40))
    as_zip(tree, Path(path))
    promise(path, b"n00000000/n00000000_1.JPEG", size)


def test_a_member_of_an_archive_is_not_unpacked_to_more_than_an_image(finished: Path) -> None:
    promising("x.zip", 4_000_000_000)
    what = "4,000,000,000 bytes, more than the 536,870,912 that are read of an image"
    config = sources.ImageFolder(root="zip://::x.zip", size=SIZE, classes=2)
    with pytest.raises(BadImageError, match=what):
        config.open().read([1])
    address, features = "zip://::x.zip", ("--features", "random_projection")
    for words in (
        ("eval", address, "--reference", address, *features),
        ("reconstruct", finished, address, "--out", "made"),
    ):
        done = e2ediff(*words)
        assert done.code == 5, done.err
        assert "n00000000_1.JPEG" in done.err
        assert f": cannot be read: {what}" in done.err


def test_a_file_of_labels_in_an_archive_is_not_unpacked_without_end() -> None:
    tree = write_tree(Path("tree"), [2, 2], size=(40, 40))
    rows = [[str(p.relative_to(tree)), int(p.parent.name[1:])] for p in tree.rglob("*.JPEG")]
    (tree / "dataset.json").write_text(json.dumps({"labels": rows}))
    (tree / "labels.csv").write_text("".join(f"{path} {label}\n" for path, label in rows))
    for path in ("whole.zip", "x.zip"):
        as_zip(tree, Path(path))
    for name in (b"dataset.json", b"labels.csv"):
        promise("x.zip", name, 4_000_000_000)

    def configs(path: str) -> list[SourceConfig]:
        block = {"size": SIZE, "classes": 2}
        labels = f"zip://labels.csv::{path}"
        return [
            sources.ImageFolder(root=f"zip://::{path}", **block),
            sources.ImageFolder(root="tree", labels=labels, **block),
        ]

    for config in configs("whole.zip"):
        assert config.open().labels().tolist() == [0, 0, 1, 1]
    said = "4,000,000,000 bytes, more than the 536,870,912 that are read of a file of labels"
    for config in configs("x.zip"):
        with pytest.raises(DataError, match=said):
            config.open()


def test_images_in_a_zip_are_one_s_own_too(finished: Path) -> None:
    as_zip(write_tree(Path("tree"), [2, 2], size=(40, 40)), Path("x.zip"))
    found = []
    for out, place in (("a", "tree"), ("b", "zip://::x.zip")):
        done = e2ediff("reconstruct", finished, place, "--out", out)
        assert done.code == 0, done.err
        found.append([row["psnr"] for row in json.loads(Path(out, "psnr.json").read_text())])
    assert found[0] == found[1]


def test_arrays_of_enormous_images_are_refused_by_their_headers() -> None:
    with zipfile.ZipFile("arr_0.npz", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("arr_0.npy", header(4, 13_000, 13_000, 3) + bytes(1000))
    idx = b"\0\0\x08\3" + b"".join(n.to_bytes(4, "big") for n in (1, 13_000, 13_000))
    said = "images of 13000 x 13000 pixels, more than the 64,000,000 that are ever decoded"
    with pytest.raises(DataError, match=said):
        read_idx(gzip.compress(idx + bytes(1000)), "x-ubyte.gz")
    words = ("arr_0.npz", "--reference", "arr_0.npz", "--features", "random_projection")
    done = e2ediff("eval", *words)
    assert (done.code, said in done.err) == (5, True)


def test_statistics_are_not_unpacked_without_end() -> None:
    with zipfile.ZipFile("x.npz", "w") as file:
        file.writestr("mu.npy", header(3) + bytes(3))
        file.writestr("sigma.npy", header(3, 3) + bytes(9))
    promise("x.npz", b"sigma.npy", 4_000_000_000)
    np.savez("made.npz", arr_0=np.zeros((8, 16, 16, 3), np.uint8))
    done = e2ediff("eval", "made.npz", "--reference", "x.npz", "--features", "random_projection")
    assert done.code == 5
    assert "4,000,000,000 bytes, more than the 2,147,483,648 that are read of sigma" in done.err
