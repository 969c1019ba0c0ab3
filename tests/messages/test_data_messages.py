"""What is said of data that do not serve, and what `data check` and `data stats` print."""

from __future__ import annotations

import io
import json
import os
import shlex
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from command_line import e2ediff
from pictures import (
    as_class_tars,
    as_dataset_json,
    as_npz,
    as_parquet,
    as_shards,
    as_zip,
    damage,
    tar_bytes,
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


def block(name: str, path: object, *more: str) -> str:
    key = {"image_folder": "root", "arrays": "images"}.get(name, "path")
    return "{" + ", ".join([f"name: {name}, {key}: {path}, size: 16, classes: 3", *more]) + "}"


# Refusals


@pytest.mark.parametrize("name", ["class_tars", "tar_shards", "parquet", "shards", "arrays"])
def test_missing_data_are_said_with_what_was_expected(name: str) -> None:
    line = refused(block(name, "nowhere/x"))
    option = "data.images" if name == "arrays" else "data.path"
    assert line.startswith((f"{option}: no file", f"{option}: nowhere/x holds no prepared.json"))
    assert "xpected" in line or "It must be" in line


def test_a_missing_shard_of_a_pattern_is_named(place) -> None:
    as_shards(Path("tree"), Path("x"), each=8)
    assert refused(block("tar_shards", "'x/train-{0000..0005}.tar'")).startswith(
        f"data.path: no file {place}/x/train-0003.tar and 2 more. Expected "
    )


def test_empty_class_folders_are_named() -> None:
    Path("tree/empty").mkdir()
    Path("tree/notes").mkdir()
    Path("tree/notes/a.txt").write_text("no image")
    said = (
        "2 of 5 class folders in {} hold no images (empty, notes); put images (.jpg, .jpeg, "
        ".png, .webp, .bmp) there, or remove the folders and `--set data.classes=3`"
    )
    assert refused("classes=5") == "data.root: " + said.format("tree")
    with zipfile.ZipFile("x.zip", "w") as file:
        for path in sorted(Path("tree").rglob("*")):
            file.write(path, path.relative_to("tree"))
    assert refused(block("archive", "x.zip")) == "data.path: " + said.format("x.zip")


def test_images_beside_class_folders_are_named() -> None:
    for name in ("a.png", "b.JPEG"):
        Path("tree", name).write_bytes(Path("tree/n00000000/n00000000_0.JPEG").read_bytes())
    said = (
        "2 of 22 images lie beside the class folders of {} (a.png, b.JPEG); nobody can tell "
        "their class: move them into one or away, or `--set data.classes=0` to take all images "
        "without classes"
    )
    assert refused("workers=0") == "data.root: " + said.format("tree")
    as_zip(Path("tree"), Path("x.zip"))
    assert refused(block("archive", "x.zip")) == "data.path: " + said.format("x.zip")
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


def test_a_dataset_json_that_does_not_match_is_said() -> None:
    as_dataset_json(Path("tree"), Path("x.zip"))
    with zipfile.ZipFile("x.zip") as old, zipfile.ZipFile("y.zip", "w") as new:
        for name in old.namelist():
            told = json.loads(old.read(name)) if name == "dataset.json" else None
            if told:
                told["labels"] = told["labels"][1:]
            new.writestr(name, json.dumps(told) if told else old.read(name))
    assert refused(block("archive", "y.zip")).startswith(
        "data.path: y.zip/dataset.json does not match y.zip: 1 of 20 images have no label "
        "(00000/img00000000.jpg); expected"
    )
    assert refused(block("archive", "x.zip").replace("classes: 3", "classes: 2")) == (
        "data.path: x.zip/00000/img00000010.jpg has label 2, the recipe says data.classes: 2 "
        "(labels 0 to 1); `--set data.classes=3` takes them all"
    )


def test_labels_of_arrays_that_do_not_match_are_said() -> None:
    x = np.zeros((20, 16, 16, 3), np.uint8)
    as_npz(x, np.arange(19) % 3, Path("x.npz"))
    assert refused(block("arrays", "x.npz")) == (
        "data.labels: x.npz!labels holds (19,) of torch.int64, x.npz 20 images; expected one "
        "whole number for each image"
    )
    as_npz(x.astype(np.float32), np.arange(20) % 3, Path("x.npz"))
    assert refused(block("arrays", "x.npz")).startswith(
        "data.images: x.npz holds (20, 16, 16, 3) of torch.float32; expected bytes of shape"
    )
    as_npz(x, np.arange(20), Path("x.npz"))
    assert refused(block("arrays", "x.npz")) == (
        "data.labels: classes 0 to 19, the recipe says data.classes: 3 (labels 0 to 2); "
        "`--set data.classes=20` takes them all"
    )
    assert refused(block("arrays", "x.npz!pictures")).startswith(
        "data.images: x.npz has no array 'pictures', it has images, labels; name one with "
    )
    np.savez("x.npz", images=np.array([{}, 1], dtype=object))
    assert "Object arrays cannot be loaded" in refused(block("arrays", "x.npz"))


def test_samples_without_a_label_are_named(place) -> None:
    members = [("0.jpg", b"x"), ("0.cls", b"1"), ("1.jpg", b"x")]
    Path("x.tar").write_bytes(tar_bytes(members))
    assert refused(block("tar_shards", "x.tar")).startswith(
        "data.path: x.tar/1.jpg has no label, 1 of 2 images have one; expected <key>.cls or "
        "<key>.json beside each image."
    )
    Path("y.tar").write_bytes(tar_bytes([("0.jpg", b"x"), ("0.json", b'{"label": [1]}')]))
    assert refused(block("tar_shards", "y.tar")) == (
        f"data.path: {place}/y.tar/0.json: no label (key 'label' is [1]); expected a class "
        "number or name"
    )


def test_columns_of_parquet_that_are_not_there_are_said() -> None:
    pytest.importorskip("pyarrow")
    as_parquet(Path("tree"), Path("x"))
    line = refused(block("parquet", "x", "image_column: picture"))
    assert "has no column 'picture', it has image, label; name the column of images" in line
    line = refused(block("parquet", "x", "label_column: kind"))
    assert "holds no labels, the recipe says data.classes: 3" in line
    Path("x/train-1.parquet").write_bytes(b"PAR1")
    assert "train-1.parquet cannot be read as Parquet" in refused(block("parquet", "x"))


MEMBERS = {
    "above": ("../../escaped.jpg", None, "lies outside of the archive"),
    "absolute": ("/escaped.jpg", None, "lies outside of the archive"),
    "symbolic link": ("0.jpg", tarfile.SYMTYPE, "is a link"),
    "hard link": ("0.jpg", tarfile.LNKTYPE, "is a link"),
    "device": ("0.jpg", tarfile.CHRTYPE, "is no plain file"),
}


@pytest.mark.parametrize("kind", MEMBERS)
@pytest.mark.parametrize("nested", [False, True])
def test_a_tar_with_a_member_that_leads_out_is_refused(kind: str, nested: bool) -> None:
    name, type_, what = MEMBERS[kind]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = type_ or tarfile.REGTYPE, "/etc/passwd" if type_ else ""
        tar.addfile(info)
    data = tar_bytes([("n01.tar", out.getvalue())]) if nested else out.getvalue()
    Path("x.tar").write_bytes(data)
    line = refused(block("class_tars" if nested else "tar_shards", "x.tar"))
    assert f"member {name!r} {what}; expected plain files below the top" in line


@pytest.mark.parametrize("kind", ["above", "absolute", "symbolic link"])
def test_a_zip_with_a_member_that_leads_out_is_refused(kind: str) -> None:
    name, type_, what = MEMBERS[kind]
    with zipfile.ZipFile("x.zip", "w") as file:
        info = zipfile.ZipInfo(name)
        info.external_attr = 0o120777 << 16 if type_ else 0
        file.writestr(info, b"x")
    assert f"member {name!r} {what}" in refused(block("archive", "x.zip"))


@pytest.mark.parametrize("second", ["0.jpg", "./0.jpg"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_tar_that_holds_a_member_twice_is_refused(second: str, nested: bool) -> None:
    data = tar_bytes([("0.jpg", b"one"), ("1.jpg", b"x"), (second, b"two")])
    Path("x.tar").write_bytes(tar_bytes([("n01.tar", data)]) if nested else data)
    line = refused(block("class_tars" if nested else "tar_shards", "x.tar"))
    assert f"member {second!r} is there twice; expected" in line


def test_a_class_tar_that_is_there_twice_is_refused() -> None:
    data = tar_bytes([("0.jpg", b"one")])
    Path("x.tar").write_bytes(tar_bytes([("n01.tar", data), ("n01.tar", data)]))
    assert "member 'n01.tar' is there twice" in refused(block("class_tars", "x.tar"))


@pytest.mark.parametrize("second", ["cat/0.jpg", "./cat/0.jpg", "cat//0.jpg"])
def test_a_zip_that_holds_a_member_twice_is_refused(second: str) -> None:
    with zipfile.ZipFile("x.zip", "w") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python's own, of the second
        for name in ("cat/0.jpg", "dog/0.jpg", second, ".x/0.jpg", ".x/0.jpg"):
            file.writestr(name, b"x")
    assert refused(block("archive", "x.zip")) == (
        f"data.path: x.zip: member {second!r} is there twice; expected each name once. Pack the "
        "images again without one of them"
    )


def test_a_zip_that_was_packed_from_its_folder_is_read() -> None:
    """Its names begin with `./`, which is neither hidden nor a class."""
    with zipfile.ZipFile("x.zip", "w") as file:
        for path in sorted(Path("tree").rglob("*.JPEG")):
            file.writestr(f"./{path.relative_to('tree')}", path.read_bytes())
    (tree, packed) = (
        source_config(load(entry_points=False), place, ["size=16"]).open()
        for place in ("tree", "x.zip")
    )
    assert packed.class_names == tree.class_names
    assert torch.equal(packed.labels(), tree.labels())
    assert torch.equal(packed.read([0, 5])[0], tree.read([0, 5])[0])


def test_a_compressed_or_damaged_tar_is_said() -> None:
    with tarfile.open("x.tar", "w:gz") as tar:
        tar.add("tree/n00000000")
    assert refused(block("class_tars", "x.tar")).endswith("it is compressed: decompress it")
    Path("x.tar").write_bytes(b"<html>" * 200)
    assert refused(block("class_tars", "x.tar")).endswith("fetch it again")


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


def a_class_without_images() -> None:
    """Labels 0 to 3 of the tree's images, none of them 2, and names of three of the four."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = [path.read_bytes() for path in sorted(Path("tree").rglob("*.JPEG"))]
    names = {"label": {"names": ["cat", "dog", "eel"], "_type": "ClassLabel"}}
    told = {"huggingface": json.dumps({"info": {"features": names}})}
    table = pa.table({"image": images, "label": [0] * 12 + [1] * 7 + [3]})
    pq.write_table(table.replace_schema_metadata(told), "x.parquet")


def test_stats_list_every_class_and_those_without_images() -> None:
    a_class_without_images()
    done = e2ediff("data", "stats", "x.parquet", "--classes", "--workers", "0")
    assert done.code == 0, done
    figures, _, rest = done.out.partition("\n# images, label and name of every class\n")
    assert figures.splitlines()[1:3] == [
        "classes     4, of 0 (eel) to 12 (cat) images, median 1",
        "            1 of 4 classes without an image (eel)",
    ]
    listed = [line.split() for line in rest.partition("\n\n")[0].splitlines()]
    assert listed == [["12", "0", "cat"], ["7", "1", "dog"], ["0", "2", "eel"], ["1", "3", "3"]]


def test_stats_as_json_say_what_the_text_says() -> None:
    a_class_without_images()
    done = e2ediff("data", "stats", "x.parquet", "--json", "--images", "6", "--workers", "0")
    found = json.loads(done.out)
    assert [list(c.values()) for c in found["classes"]] == [
        [0, "cat", 12], [1, "dog", 7], [2, "eel", 0], [3, "3", 1]
    ]  # fmt: skip
    assert (found["images"], found["looked_at"], found["broken"]) == (20, 6, [])
    assert 20 <= found["sizes"]["min"] <= found["sizes"]["median"] <= found["sizes"]["max"] < 28
    assert len(found["mean"]) == len(found["std"]) == 3
    text = e2ediff("data", "stats", "x.parquet", "--images", "6", "--workers", "0").out
    assert yaml.safe_load(text.partition("# proposed\n")[2]) == found["proposed"]
    damage(Path("tree/n00000001/n00000001_3.JPEG"))
    done = e2ediff("data", "stats", "tree", "--json", "--workers", "0")
    (broken,) = json.loads(done.out)["broken"]
    assert broken["image"] == "tree/n00000001/n00000001_3.JPEG"
    done = e2ediff("data", "stats", "tree", "--json", "--workers", "0", "--set", "classes=0")
    assert json.loads(done.out)["classes"] == []


def as_cifar(tree: Path, path: Path) -> Path:
    images = np.zeros((20, 32, 32), np.uint8)
    return as_npz(images, np.arange(20) % 3, path)


KINDS = {
    "image_folder": lambda: "tree",
    "archive": lambda: as_zip(Path("tree"), Path("x.zip")),
    "class_tars": lambda: as_class_tars(Path("tree"), Path("x.tar")),
    "tar_shards": lambda: as_shards(Path("tree"), Path("x"), 8),
    "parquet": lambda: as_parquet(Path("tree"), Path("x")),
    "arrays": lambda: as_cifar(Path("tree"), Path("x.npz")),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_path_is_recognised_with_its_classes(name: str) -> None:
    if name == "parquet":
        pytest.importorskip("pyarrow")
    host, path = load(entry_points=False), str(KINDS[name]())
    config = source_config(host, path, ["size=16"])
    assert host.registries["sources"].name_of(type(config)) == name
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
