"""Whatever lies among the images is read, never counts, or is counted and named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
import torch
from command_line import e2ediff, needs, trained
from forbidden import as_any_user
from pictures import as_zip, write_tree
from PIL import Image
from tiny_recipe import tiny

from e2ediff.data import LeftOut, left_out_text
from e2ediff.errors import DataError
from e2ediff.evaluate.images import FolderImages, NpzImages, stored_images
from e2ediff.files.images import SUFFIXES, is_image
from e2ediff.files.names import Tally
from e2ediff.parts.sources import ImageFolder
from e2ediff.parts.sources.own_images import list_images

SIZE, COUNTS = 8, [3, 2]
FIRST = Path("tree/n00000000/n00000000_0.JPEG")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("E2EDIFF_CACHE", str(tmp_path / "cache"))
    write_tree(Path("tree"), COUNTS)
    return tmp_path


def block(root: object = "tree", **options: object) -> ImageFolder:
    return ImageFolder(root=str(root), **{"size": SIZE, "classes": len(COUNTS), **options})


def linked(link: str, target: str) -> None:
    os.symlink(target, f"tree/n00000000/{link}")


def unreadable_name() -> None:
    shutil.copy(FIRST, os.fsencode("tree/n00000000/") + b"\xff.png")


# What is put into the first class, and the reason for which it is left out.
CASES: dict[str, tuple[Callable[[], object], LeftOut]] = {
    "another suffix": (
        lambda: [Path(f"tree/n00000000/{k}.HEIC").touch() for k in range(3)],
        LeftOut("with suffix .heic", 3, "n00000000/0.HEIC"),
    ),
    "a text at the top": (
        lambda: Path("tree/README").touch(),
        LeftOut("without suffix", 1, "README"),
    ),
    "a link to nothing": (
        lambda: linked("x.png", "nowhere"),
        LeftOut("that link to nothing", 1, "n00000000/x.png"),
    ),
    "a link to itself": (
        lambda: linked("x.png", "x.png"),
        LeftOut("that link to nothing", 1, "n00000000/x.png"),
    ),
    "a pipe": (
        lambda: os.mkfifo("tree/n00000000/x.png"),
        LeftOut("that are pipes, sockets or devices", 1, "n00000000/x.png"),
    ),
    "a link back to the class": (
        lambda: linked("x", "."),
        LeftOut("that link to a folder above them", 1, "n00000000/x"),
    ),
    "a link back to the root": (
        lambda: linked("x", ".."),
        LeftOut("that link to a folder above them", 1, "n00000000/x"),
    ),
    "a link to what the root lies in": (
        lambda: linked("x", "/"),
        LeftOut("that link to a folder above them", 1, "n00000000/x"),
    ),
    "a name that is no text": (
        unreadable_name,
        LeftOut("with a name that is no UTF-8", 1, "n00000000/\\udcff.png"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_counted_and_named_and_the_set_is_what_it_was(case: str) -> None:
    put, expected = CASES[case]
    before = block().open()
    assert before.left_out == ()
    put()
    source = block().open()
    assert source.left_out == (expected,)
    assert [source.path_of(i) for i in range(len(source))] == [
        before.path_of(i) for i in range(len(before))
    ]
    assert torch.equal(source.labels(), before.labels())
    lines: list[str] = []
    assert len(list_images(["tree"], lines.append)) == sum(COUNTS)
    assert lines == [f"tree: {left_out_text([expected])}"]
    scored = FolderImages("tree")
    assert (scored.count, scored.left_out) == (sum(COUNTS), (expected,))


def test_a_class_of_which_nothing_can_be_read_is_refused_and_said_why() -> None:
    shutil.rmtree("tree")
    Path("tree/cat").mkdir(parents=True)
    Path("tree/cat/a.heic").touch()
    with pytest.raises(DataError, match=r"1 file is left out: 1 with suffix \.heic \(cat/a\.heic"):
        block().open()


def test_folders_that_are_links_are_followed_wherever_they_lie() -> None:
    """To class folders, to folders in them, and by way of another link."""
    plain = block().open()
    Path("linked/n00000000").mkdir(parents=True)
    os.symlink(os.path.abspath("tree/n00000000"), "linked/n00000000/more")
    os.symlink(os.path.abspath("tree/n00000001"), "second")
    os.symlink(os.path.abspath("second"), "linked/n00000001")
    source = block("linked").open()
    assert (len(source), source.left_out) == (len(plain), ())
    assert torch.equal(source.read(range(5))[0], plain.read(range(5))[0])
    assert FolderImages("linked").count == len(list_images(["linked"])) == len(plain)


def test_a_folder_that_is_linked_twice_counts_twice() -> None:
    """No circle: who links a folder into two classes wants its images in both."""
    os.symlink("n00000000", "tree/again")
    assert torch.bincount(block(classes=3).open().labels()).tolist() == [3, 3, 2]


def test_a_folder_that_may_not_be_listed_is_refused() -> None:
    Path("tree/n00000000").chmod(0)
    with as_any_user(), pytest.raises(DataError, match="a folder cannot be listed"):
        block().open()


def test_elsewhere_names_that_are_no_text_and_other_suffixes_are_left_out_too(tmp_path) -> None:
    fs = fsspec.filesystem("memory")
    for name in ("a/0.png", "a/1.txt", "a/\udcff.png"):
        fs.pipe_file(f"{tmp_path}/{name}", FIRST.read_bytes())
    source = block(f"memory:/{tmp_path}", classes=1).open()
    assert len(source) == 1
    assert {one.reason for one in source.left_out} == {
        "with suffix .txt",
        "with a name that is no UTF-8",
    }


def test_files_that_are_read_as_labels_are_not_left_out() -> None:
    names = [str(path.relative_to("tree")) for path in sorted(Path("tree").rglob("*.JPEG"))]
    Path("tree/labels.csv").write_text("".join(f"{name},0\n" for name in names))
    assert block(labels="tree/labels.csv", classes=1).open().left_out == ()
    listed = json.dumps({"labels": [[name, 0] for name in names]})
    Path("tree/dataset.json").write_text(listed)
    left_out = block(classes=1).open().left_out
    assert left_out == (LeftOut("with suffix .csv", 1, "labels.csv"),)


def test_of_many_reasons_the_rarest_are_one() -> None:
    tally = Tally()
    for k in range(20):
        for _ in range(20 - k):
            tally.add_other(f"x.s{k:02}")
    found = tally.left_out
    assert len(found) == 8
    assert sum(one.count for one in found) == 210
    assert found[-1].reason == "with other suffixes"


@needs("e2ediff-data")
def test_commands_on_data_and_the_start_of_a_run_name_it() -> None:
    Path("tree/n00000000/x.heic").touch()
    said = "1 file is left out: 1 with suffix .heic (n00000000/x.heic)"
    done = e2ediff("data", "stats", "tree")
    assert f"left out    {said}\n" in done.out
    (entry,) = json.loads(e2ediff("data", "stats", "tree", "--json").out)["left_out"]
    assert entry == {"reason": "with suffix .heic", "count": 1, "first": "n00000000/x.heic"}
    done = e2ediff("data", "check", "tree")
    assert (done.code, done.err.count(said)) == (0, 1)
    data = f"{{name: image_folder, root: tree, size: {SIZE}, classes: 2}}"
    Path("tiny.yaml").write_text(tiny(steps="1", data=data, batch="4"))
    done = e2ediff("run", "tiny.yaml", "--out", "run")
    assert done.code == 0, done.err
    assert done.err.count(f"data: {said}") == 1
    events = [json.loads(line) for line in Path("run/events.jsonl").read_text().splitlines()]
    (event,) = (event for event in events if event["kind"] == "left_out")
    assert (event["of"], event["files"]) == ("data", [entry])


@needs("e2ediff-data")
def test_stats_count_what_a_reader_may_leave_out() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    folder = Path("tree/n00000000")
    Image.new("RGB", (20, 10)).save(folder / "turned.jpg", exif=exif)
    Image.new("RGBA", (20, 10)).save(folder / "clear.png")
    image = Image.new("L", (20, 10))
    image.save(folder / "film.gif", save_all=True, append_images=[Image.new("L", (20, 10), 9)])
    done = e2ediff("data", "stats", "tree")
    for name, told in (
        ("turned", "1 of 8 images with an EXIF orientation: read as stored (data.upright turns"),
        ("transparent", "1 of 8 images with transparency: read without it (data.background"),
        ("several", "1 of 8 images with several frames: the first frame is read"),
    ):
        assert f"{name:<11} {told}" in done.out
    options = ("--set", "upright=true", "--set", "background=white")
    done = e2ediff("data", "stats", "tree", *options)
    assert "an EXIF orientation: turned upright\n" in done.out
    assert "with transparency: composed on white\n" in done.out


# What our own commands print


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = "{name: synthetic, size: 8, count: 64, classes: 2}"
    return trained(tmp_path_factory.mktemp("trained"), tiny(steps="1", data=data))


@pytest.mark.parametrize("kind", ["png", "npz", "zip", "tar"])
def test_what_sample_prints_is_a_set_for_eval_and_its_grid_is_none_of_it(
    kind: str, run: Path
) -> None:
    words = ("--balanced", 12, "--steps", 2, "--format", kind, "--batch", 5, "--out", "set")
    done = e2ediff("sample", run, *words)
    assert done.code == 0, done.err
    printed = done.out.strip()
    images, folder = stored_images(printed), stored_images("set")
    assert Path("set/grid.png").exists()
    assert images.count == folder.count == 12
    assert images.left_out == ()
    plain = e2ediff("sample", run, *words[:4], "--out", "plain").out.strip()
    (expected,) = stored_images(f"{plain}/images").batches(0, 12, 12)
    for one in (images, folder):
        assert isinstance(one, NpzImages) == (kind == "npz")
        assert torch.equal(torch.cat([*one.batches(0, 12, 12)]).sort(0)[0], expected.sort(0)[0])
    scored = ("--features", "random_projection", "--metrics", "fid", "--out", "scores")
    done = e2ediff("eval", printed, "--reference", f"{plain}", *scored)
    assert done.code == 0, done.err
    assert abs(float(done.out.splitlines()[1].split()[1])) < 1e-6
    # Training and `reconstruct` take images as files, or refuse the set; never its grid.
    data = block("set", classes=0)
    if kind == "png":
        Path("many/deep").mkdir(parents=True)
        Path("set").rename("many/deep/set")
        for several in ("many", "many/deep/set"):
            assert len(block(several, classes=0).open()) == len(list_images([several])) == 12
        return
    with pytest.raises(DataError, match="set holds no images"):
        data.open()
    if kind == "npz":
        with pytest.raises(DataError, match=r"set: its images are in samples\.npz; expected "):
            list_images(["set"])
    else:
        assert len(list_images(["set"])) == 12


def test_the_directory_of_a_run_holds_no_images_of_a_set(run: Path) -> None:
    for place in (run, run / "samples", f"{run}/samples/"):
        with pytest.raises(DataError, match="pictures of a run show several images each"):
            list_images([place])


def test_what_reconstruct_writes_is_a_set_too(run: Path) -> None:
    done = e2ediff("reconstruct", run, "tree", "--out", "made")
    assert done.code == 0, done.err
    assert Path("made/reconstructions.png").exists()
    assert FolderImages("made").count == sum(COUNTS)


def test_a_zip_or_tar_of_a_folder_is_a_set(place: Path) -> None:
    as_zip(Path("tree"), Path("x.zip"))
    shutil.make_archive("y", "tar", "tree")
    for name in ("x.zip", "y.tar"):
        assert FolderImages(name).count == len(list_images([name])) == sum(COUNTS)


def test_a_tar_that_is_compressed_or_damaged_is_refused_by_name(run: Path) -> None:
    Path(shutil.make_archive("z", "gztar", "tree")).rename("z.tar")
    Path("noise.tar").write_bytes(bytes(range(256)) * 40)
    for name in ("z.tar", "noise.tar"):
        features = ("--features", "random_projection", "--metrics", "fid")
        scored = ("eval", name, "--reference", "tree", *features)
        for words in (scored, ("reconstruct", run, name)):
            done = e2ediff(*words, "--out", "made")
            assert done.code == 5
            assert f"error: {name}: cannot be opened: " in done.err


def test_every_suffix_is_that_of_an_image_in_any_case() -> None:
    for suffix in SUFFIXES:
        assert is_image(f"x{suffix}")
        assert is_image(f"x{suffix.upper()}")
    assert not any(map(is_image, ("jpg", "x.svg", "x.heic", "x.png.txt", "x.npz", "")))
