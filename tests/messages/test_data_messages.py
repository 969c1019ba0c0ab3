"""What is said of data that do not serve, and of damaged images in a run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from command_line import e2ediff, needs
from pictures import damage, write_tree
from refusals import image_tree, refused

from e2ediff.errors import DataError
from e2ediff.host.plugins import load
from e2ediff.host.recipe import load_recipe
from e2ediff.loading.bad_images import BadImages, Skipped
from e2ediff.parts.sources import ImageFolder
from e2ediff.store.run_directory import RunDirectory
from e2ediff.store.storage import Store


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return image_tree(tmp_path, monkeypatch)


# Refusals


@needs("e2ediff-data")
def test_missing_shards_are_said_with_what_was_expected() -> None:
    assert refused("{name: shards, path: nowhere/x, size: 16, classes: 3}").startswith(
        "data.path: nowhere/x holds no prepared.json. It must be a folder that"
    )


def test_empty_class_folders_are_named() -> None:
    Path("tree/empty").mkdir()
    Path("tree/notes").mkdir()
    Path("tree/notes/a.txt").write_text("no image")
    assert refused("classes=5") == (
        "data.root: 2 of 5 class folders in tree hold no images (empty, notes); put images (.jpg, "
        ".jpeg, .jpe, .jfif, .png, .webp, .bmp, .gif, .tif, .tiff) there, or remove the "
        "folders and `--set data.classes=3`"
    )


def test_images_beside_class_folders_are_named() -> None:
    for name in ("a.png", "b.JPEG"):
        Path("tree", name).write_bytes(Path("tree/n00000000/n00000000_0.JPEG").read_bytes())
    assert refused("workers=0") == (
        "data.root: 2 of 22 images lie beside the class folders of tree (a.png, b.JPEG); nobody "
        "can tell their class: move them into one or away, or `--set data.classes=0` to take all "
        "images without classes"
    )
    assert len(load_recipe(load(), "tiny.yaml", ["data.classes=0"]).data.open()) == 22
    # That their number is to be inferred is no reason to leave the classes out.
    done = e2ediff("run", "tiny.yaml", "--set", "data=tree")
    assert (done.code, Path("runs").exists()) == (5, False)
    assert "error: data.root: 2 of 22 images lie beside the class folders of tree" in done.err


def test_a_label_file_that_does_not_match_is_said() -> None:
    paths = sorted(Path("tree").rglob("*.JPEG"))
    rows = [f"{path.name} {path.parent.name}" for path in paths]
    expected = (
        "; expected a line '<image> <class>' for each image, or a dataset.json with "
        '{"labels": [["<image>", <number>], ...]}'
    )
    Path("labels.txt").write_text("\n".join([*rows[2:], "other.JPEG n00000000"]))
    assert refused("labels=labels.txt") == (
        "data.root: labels.txt does not match tree: 2 of 20 images have no label "
        "(n00000000/n00000000_0.JPEG) and 1 of 19 labels no image (other.JPEG, line 19)" + expected
        + ", relative to tree"
    )  # fmt: skip
    Path("labels.txt").write_text("\n".join([*rows[:3], "n00000000_3.JPEG"]))
    line = "data.labels: labels.txt: line 4 is 'n00000000_3.JPEG'"
    assert refused("labels=labels.txt") == line + expected
    assert refused("labels=none.txt").startswith("data.labels: cannot read none.txt: ")
    Path("labels.txt").write_text("\n".join(rows))
    assert len(load_recipe(load(), "tiny.yaml", ["data.labels=labels.txt"]).data.open()) == 20


def test_fewer_images_than_a_batch_are_said() -> None:
    assert refused("workers=0", "batch=32", "probe.images=4") == (
        "data: 20 images are fewer than one batch of 32; lower `batch` or give more images"
    )


# Damaged images in a run


def test_a_run_lists_the_images_that_it_skipped_and_resumes_without_listing_them_again() -> None:
    damage(Path("tree/n00000001/n00000001_3.JPEG"))
    Path("tree/n00000002/n00000002_0.JPEG").write_bytes(b"")
    skip = ("--set", "data.on_bad_image=skip", "--set", "data.workers=1")
    whole = e2ediff("run", "tiny.yaml", *skip, "--out", "whole")
    assert whole.code == 0, whole
    assert "All such images are listed in whole/bad_images.jsonl" in whole.err
    assert "skipped 2 damaged or too large images; see whole/bad_images.jsonl" in whole.err
    listed = [json.loads(line) for line in Path("whole/bad_images.jsonl").read_text().splitlines()]
    assert {(e["image"], e["what"]) for e in listed} == {
        ("tree/n00000001/n00000001_3.JPEG", "damaged image (Truncated File Read)"),
        ("tree/n00000002/n00000002_0.JPEG", "damaged image (empty file)"),
    }
    assert e2ediff("run", "tiny.yaml", *skip, "--set", "steps=3", "--out", "x").code == 0
    assert e2ediff("run", "tiny.yaml", *skip, "--out", "x", "--resume").code == 0
    again = [
        json.loads(line)["image"] for line in Path("x/bad_images.jsonl").read_text().splitlines()
    ]
    assert sorted(again) == sorted(e["image"] for e in listed)
    losses = [
        [m["loss/denoising"] for m in RunDirectory.open(p).read_metrics() if "loss/denoising" in m]
        for p in ("whole", "x")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6


def test_a_run_ends_when_too_large_a_share_of_the_images_is_damaged() -> None:
    """At the same step with workers, without, and after an interruption."""
    write_tree(Path("worn"), [20, 20])
    worn = sorted(Path("worn").glob("*/*.JPEG"))
    for path in worn[::3]:  # 14 of 40
        path.write_bytes(b"")
    rules = ("data.root=worn", "data.classes=2", "data.on_bad_image=skip", "batch=8", "steps=40")
    sets = [word for rule in rules for word in ("--set", rule)]
    sets += ["--set", "probe.calibration=8", "--set", "probe.images=4"]
    said = []
    for out, changes in {"plain": ["data.workers=0"], "workers": ["data.workers=2"]}.items():
        words = [word for one in changes for word in ("--set", one)]
        done = e2ediff("run", "tiny.yaml", *sets, *words, "--out", out)
        assert done.code == 5, done
        said.append(done.err.splitlines()[-1].replace(out, "RUN"))
    step = int(json.loads(Path("plain/status.json").read_text())["step"])
    cut = ["--set", "data.workers=0", "--out", "cut"]
    if step > 1:
        short = [*sets, "--set", f"steps={step - 1}"]
        assert e2ediff("run", "tiny.yaml", *short, *cut).code == 0
        done = e2ediff("run", "tiny.yaml", *sets, *cut, "--resume")
        said.append(done.err.splitlines()[-1].replace("cut", "RUN"))
    assert len(set(said)) == 1, said
    assert re.fullmatch(
        r"error: 1[1-4] of the first [1-4]\d training images are damaged or too large: "
        r"\d+\.\d\d%, and data\.max_bad_fraction accepts 1\.00%\. They are listed in "
        r"RUN/bad_images\.jsonl: repair or remove them, or accept more with a "
        r"larger data\.max_bad_fraction",
        said[0],
    )
    allowed = ["--set", "data.max_bad_fraction=0.5", "--set", "steps=8", "--resume"]
    done = e2ediff("run", "tiny.yaml", *sets, *allowed, "--out", "plain")
    assert done.code == 0, done.err


def test_a_few_damaged_images_end_no_run_and_later_ones_do_not_count_before(
    tmp_path: Path,
) -> None:
    bad = BadImages(Store(str(tmp_path / "run")))
    for i in range(13):
        bad.add([Skipped(i, f"image {i}", "damaged", i + 1)], 100 * (i + 1))
    bad.add([Skipped(99, "of the probe", "damaged", 98)])
    bad.refuse_too_many(0.0, 1000, 5000)  # 10 of them
    bad.refuse_too_many(1.0, 1300, 5000)
    bad.refuse_too_many(0.01, 1200, 5000)
    with pytest.raises(DataError, match=r"^11 of the first 1,100 training images"):
        bad.refuse_too_many(0.0099, 1100, 5000)
    with pytest.raises(DataError, match=r"^13 of the first 500 training images .* 2\.60%"):
        bad.refuse_too_many(0.01, 10_000, 500)


def test_a_run_without_classes_trains_and_samples() -> None:
    words = ("--set", "data.classes=0", "--set", "label_drop=0.0")
    done = e2ediff("run", "tiny.yaml", *words, "--out", "x")
    assert done.code == 0, done
    assert e2ediff("sample", "x", "--count", "2").code == 0


@pytest.mark.parametrize("outer", [("animals",), ("train", "val"), ("Train", "test")])
def test_a_folder_above_those_of_the_classes_is_refused(outer: tuple[str, ...]) -> None:
    """Its one class would be the name of the set, or its classes the splits."""
    for name in outer:
        shutil.copytree("tree", f"above/{name}")
    with pytest.raises(DataError) as caught:
        ImageFolder(root="above", size=8, classes=len(outer)).open()
    said = str(caught.value)
    assert "and the images are in folders below (n00000000, n00000001, n00000002)" in said
    assert f"such as .../{sorted(outer)[0]}, or `--set data.classes=0`" in said
    assert ImageFolder(root="above", size=8, classes=0).open()
    # Frames of films, say, are in folders below their classes.
    shutil.copytree("tree", "above/another")
    assert ImageFolder(root="above", size=8, classes=len(outer) + 1).open()


def test_check_lists_the_data_that_are_here_and_says_where_they_are_not() -> None:
    Path("tree/n00000000/x.heic").touch()
    names = sorted(str(path.relative_to("tree")) for path in Path("tree").rglob("*.JPEG"))
    Path("labels.csv").write_text(
        "".join(f"{name},{2 * (k % 2)}\n" for k, name in enumerate(names))
    )
    done = e2ediff("check", "tiny.yaml", "--set", "data.labels=labels.csv")
    assert done.code == 0, done.err
    said = (
        "data        20 images\n"
        "            1 file is left out: 1 with suffix .heic (n00000000/x.heic)\n"
        "            warning: class 1 has no training images\n"
    )
    assert said in done.out
    shutil.rmtree("tree")
    done = e2ediff("check", "tiny.yaml")
    assert done.code == 0
    assert "data        not listed: data.root: no folder tree." in done.out
    done = e2ediff("check", "tiny.yaml", "--set", "data.root=memory://tree")
    assert "data        in a store, not listed\n" in done.out


@pytest.mark.parametrize("outer", [("animals",), ("train", "val")])
def test_folders_between_it_and_the_classes_make_no_difference(outer: tuple[str, ...]) -> None:
    for name in outer:
        shutil.copytree("tree", f"above/{name}/a/b")
    with pytest.raises(DataError, match=rf"folder that holds them, such as .*/{outer[0]}/a/b, or"):
        ImageFolder(root="above", size=8, classes=len(outer)).open()
    # One class may lie as deep as it likes.
    shutil.copytree("tree/n00000000", "single/deep/er")
    assert ImageFolder(root="single", size=8, classes=1).open().class_names == ("deep",)
