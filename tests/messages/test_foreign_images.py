"""Images that others made: one opener knows few formats and counts pixels before it decodes."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command_line import Done, e2ediff, trained
from pictures import as_class_tars, as_parquet, as_shards, as_zip, write_tree
from PIL import Image
from tiny_recipe import tiny

from e2ediff.data import SourceConfig
from e2ediff.errors import BadImageError
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
    "eps": "damaged image (no JPEG, PNG, WebP or BMP)",
    "bomb": "pixels",
    "larger bomb": "more pixels than",
    "strip": "1 x 70000 pixels, 32 x 2240000 with a shorter side of 32, more than",
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
    "zip": lambda tree: sources.Archive(
        path=str(as_zip(tree, tree.with_suffix(".zip"))), size=SIZE, classes=2
    ),
    "class tars": lambda tree: sources.ClassTars(
        path=str(as_class_tars(tree, tree.with_suffix(".tar"))), size=SIZE, classes=2
    ),
    "tar shards": lambda tree: sources.TarShards(
        path=as_shards(tree, tree.with_name("shards"), 9), size=SIZE, classes=2
    ),
    "parquet": lambda tree: sources.Parquet(
        path=as_parquet(tree, tree.with_name("parquet")), size=SIZE, classes=2
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
    if form == "parquet":
        pytest.importorskip("pyarrow")
    source = FORMS[form](tree_with(foreign[kind])).open()
    for read in (lambda: source.read([1]), lambda: source.stored(1)):
        with pytest.raises(BadImageError) as caught:
            read()
        assert caught.value.place == source.place(1)
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
        refused(kind, f"{number}.png", "eval", subject, "--reference", reference, *words)


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
    assert SAID[kind] in page
