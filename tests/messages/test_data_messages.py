"""What is said of data that do not serve, and what `data check` and `data stats` print."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import pytest
import yaml
from command_line import e2ediff
from pictures import (
    damage,
    write_tree,
)
from tiny_recipe import tiny

from e2ediff.host.plugins import load
from e2ediff.host.recipe import load_recipe
from e2ediff.prepare.address import source_config
from e2ediff.store.run_directory import RunDirectory

RECIPE = tiny(
    steps="6",
    data="{name: image_folder, root: tree, size: 16, classes: 3, workers: 0}",
    cadence="{log: 1, diagnose: 3, preview: 6, checkpoint: 3}",
)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a tree of three classes of 4, 6 and 10, and a recipe of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("E2EDIFF_RUNS", raising=False)
    monkeypatch.setenv("E2EDIFF_CACHE", str(tmp_path / "cache"))
    write_tree(Path("tree"), [4, 6, 10], size=(20, 24))
    Path("tiny.yaml").write_text(RECIPE)
    return tmp_path


def refused(data: str, *more: str) -> str:
    """The one line with which a run of a data block is refused, before anything is made."""
    changes = [f"data={data}" if data.startswith("{") else f"data.{data}", *more]
    done = e2ediff("run", "tiny.yaml", *(w for one in changes for w in ("--set", one)))
    assert done.code == 5, done
    assert not Path("runs").exists()
    (line,) = done.err.removeprefix("error: ").splitlines()
    return line


# Refusals


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
        ".jpeg, .png, .webp, .bmp) there, or remove the folders and `--set data.classes=3`"
    )


def test_images_beside_class_folders_are_named() -> None:
    for name in ("a.png", "b.JPEG"):
        Path("tree", name).write_bytes(Path("tree/n00000000/n00000000_0.JPEG").read_bytes())
    assert refused("workers=0") == (
        "data.root: 2 of 22 images lie beside the class folders of tree (a.png, b.JPEG); nobody "
        "can tell their class: move them into one or away, or `--set data.classes=0` to take all "
        "images without classes"
    )
    assert (
        len(source_config(load(entry_points=False), "tiny.yaml", ["data.classes=0"]).open()) == 22
    )


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
        "(n00000000/n00000000_0.JPEG) and 1 of 19 labels no image (other.JPEG)" + expected
        + ", relative to tree"
    )  # fmt: skip
    Path("labels.txt").write_text("\n".join([*rows[:3], "n00000000_3.JPEG"]))
    line = "data.labels: labels.txt: line 4 is 'n00000000_3.JPEG'"
    assert refused("labels=labels.txt") == line + expected
    assert refused("labels=none.txt").startswith("data.labels: cannot read none.txt: ")
    Path("labels.txt").write_text("\n".join(rows))
    assert e2ediff("data", "check", "tiny.yaml", "--set", "data.labels=labels.txt").code == 0


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


def test_a_run_without_classes_trains_and_samples() -> None:
    words = ("--set", "data.classes=0", "--set", "label_drop=0.0")
    done = e2ediff("run", "tiny.yaml", *words, "--out", "x")
    assert done.code == 0, done
    assert e2ediff("sample", "x", "--count", "2").code == 0


# data check, data stats, data prepare


def test_check_names_every_broken_image_and_fails() -> None:
    done = e2ediff("data", "check", "tiny.yaml", "--workers", "0")
    assert (done.code, done.out) == (0, "")
    assert done.err.endswith("tiny.yaml: all 20 images can be read\n")
    cut = Path("tree/n00000001/n00000001_3.JPEG")
    cut.write_bytes(cut.read_bytes()[:-60])  # behind its header
    Path("tree/n00000002/n00000002_0.JPEG").write_bytes(b"<html>")
    done = e2ediff("data", "check", "tree", "--workers", "1")
    assert done.code == 5
    assert done.out.splitlines() == [
        "tree/n00000001/n00000001_3.JPEG: damaged image (image file is truncated (43 bytes not "
        "processed))",
        "tree/n00000002/n00000002_0.JPEG: damaged image (no JPEG, PNG, WebP or BMP)",
    ]
    assert "error: tree: 2 of 20 images cannot be used; remove or replace them" in done.err
    quick = e2ediff("data", "check", "tree", "--quick", "--workers", "0")
    assert quick.code == 5
    assert quick.out.splitlines() == done.out.splitlines()[1:]


def test_stats_count_measure_and_propose_a_block_that_reads_the_data() -> None:
    write_tree(Path("wide"), [1, 12, 3], size=(40, 60))
    damage(Path("wide/n00000001/n00000001_3.JPEG"))
    done = e2ediff("data", "stats", "wide", "--workers", "0")
    assert done.code == 0, done
    figures, _, proposed = done.out.partition("\n# proposed\n")
    assert figures.splitlines()[:3] == [
        "images      16",
        "classes     3, of 1 (n00000000) to 12 (n00000001) images, median 3",
        "imbalance   12.0 times as many in the largest as in the smallest",
    ]
    assert "shorter side 40 to 43 pixels" in figures
    assert "broken      1 of 16 images looked at" in figures
    Path("block.yaml").write_text(proposed)
    config = source_config(load(entry_points=False), "block.yaml")
    assert (config.image.height, config.image.classes, config.image.channels) == (32, 3, 3)
    assert (config.sampling, config.on_bad_image) == ("class_balanced", "skip")


def test_stats_as_json_say_what_the_text_says() -> None:
    done = e2ediff("data", "stats", "tree", "--json", "--images", "6", "--workers", "0")
    found = json.loads(done.out)
    assert [list(c.values()) for c in found["classes"]] == [
        [0, "n00000000", 4], [1, "n00000001", 6], [2, "n00000002", 10]
    ]  # fmt: skip
    assert (found["images"], found["looked_at"], found["broken"]) == (20, 6, [])
    assert 20 <= found["sizes"]["min"] <= found["sizes"]["median"] <= found["sizes"]["max"] < 28
    assert len(found["mean"]) == len(found["std"]) == 3
    text = e2ediff("data", "stats", "tree", "--images", "6", "--workers", "0").out
    assert yaml.safe_load(text.partition("# proposed\n")[2]) == found["proposed"]
    damage(Path("tree/n00000001/n00000001_3.JPEG"))
    done = e2ediff("data", "stats", "tree", "--json", "--workers", "0")
    (broken,) = json.loads(done.out)["broken"]
    assert broken["image"] == "tree/n00000001/n00000001_3.JPEG"
    done = e2ediff("data", "stats", "tree", "--json", "--workers", "0", "--set", "classes=0")
    assert json.loads(done.out)["classes"] == []


def test_a_path_is_recognised_with_its_classes() -> None:
    host = load(entry_points=False)
    config = source_config(host, "tree", ["size=16"])
    assert host.registries["sources"].name_of(type(config)) == "image_folder"
    assert (config.image.height, config.image.classes) == (16, 3)
    assert len(config.open()) == 20


def test_a_path_that_is_nothing_known_is_said() -> None:
    done = e2ediff("data", "check", "nowhere")
    assert done.code == 5
    assert done.err.startswith("error: nowhere: nothing is there. Expected a folder of class")
    assert e2ediff("data", "check", "tiny.txt").code == 5
    done = e2ediff("data", "check", "tree", "--set", "sise=3")
    assert done.code == 3
    assert "unknown option 'sise'. Did you mean 'size'?" in done.err


def test_a_size_that_a_source_cannot_have_is_said() -> None:
    Path("b.yaml").write_text("name: fashion_mnist\n")
    done = e2ediff("data", "prepare", "b.yaml", "out", "--size", 20, "--workers", 0)
    assert (done.code, done.err) == (
        5, "error: b.yaml: cannot be cropped to 20 pixels: 'size' must be in (28, 32) (got 20)\n"
    )  # fmt: skip


@pytest.mark.parametrize("workers", [0, 1])
def test_a_place_that_cannot_be_written_is_called_what_the_command_calls_it(workers) -> None:
    Path("file").touch()
    done = e2ediff("data", "prepare", "tree", "file", "--size", 16, "--workers", workers)
    assert done.code == 8
    assert done.err.startswith("error: file/parts/settings.json: cannot write: Not a directory (")
    assert done.err.endswith("is reachable, or choose another DST.\n")
    words = ("data", "prepare", "tree", "out", "--size", 16, "--each", 6, "--workers", workers)
    assert e2ediff(*words).code == 0
    Path("out/shard-00001.tar").unlink()
    Path("out/shard-00001.tar/x").mkdir(parents=True)
    done = e2ediff(*words)
    assert done.code == 8
    (line,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: out/shard-00001.tar: cannot write: Is a directory (")
    assert done.err.splitlines()[-1] == line


@pytest.mark.parametrize("name", ["12", "it's, my: #1"])
def test_prepare_prints_what_a_shell_and_a_recipe_take_for_any_folder(name) -> None:
    words = ("prepare", "tree", name, "--size", "16", "--workers", "0", "--each", "6")
    done = e2ediff("data", *words)
    option, told = shlex.split(done.err.splitlines()[-1].removeprefix("read them with: "))
    assert e2ediff("check", "tiny.yaml", option, told).code == 0
    assert load_recipe(load(), "tiny.yaml", [told]).data.path == name


def test_prepare_prints_how_to_read_what_it_wrote() -> None:
    """And a run of it computes what a run of the folder computes."""
    words = ("prepare", "tree", "shards", "--size", "16", "--workers", "1", "--each", "6")
    done = e2ediff("data", *words)
    assert (done.code, done.out) == (0, "shards\n")
    assert "20 images in 4 shards; 0 left out" in done.err
    told = done.err.splitlines()[-1].removeprefix("read them with: --set '").removesuffix("'")
    assert "4 of them made before" in e2ediff("data", *words).err
    assert e2ediff("run", "tiny.yaml", "--out", "a").code == 0
    assert e2ediff("run", "tiny.yaml", "--set", told, "--out", "b").code == 0
    losses = [
        [m["loss/denoising"] for m in RunDirectory.open(p).read_metrics() if "loss/denoising" in m]
        for p in ("a", "b")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6
    assert e2ediff("data", "check", "shards").code == 0
    # A flipped bit that neither size nor time shows, in the padding behind the last image.
    shard = Path("shards/shard-00000.tar")
    data, stat = bytearray(shard.read_bytes()), shard.stat()
    data[-1] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    done = e2ediff("data", "check", "shards")
    assert done.code == 5
    assert (
        "1 of 5 files have another SHA-256 than prepared.json says (shard-00000.tar)" in done.err
    )
