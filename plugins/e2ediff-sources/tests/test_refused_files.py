"""What is said of zips, tars, Parquet files and arrays, and which of them are refused."""

from __future__ import annotations

import io
import json
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from command_line import e2ediff, needs
from pictures import (
    as_class_tars,
    as_dataset_json,
    as_npz,
    as_parquet,
    as_shards,
    as_zip,
    tar_bytes,
)
from refusals import image_tree, refused

from e2ediff.host.plugins import load


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return image_tree(tmp_path, monkeypatch)


def block(name: str, path: object, *more: str) -> str:
    key = "images" if name == "arrays" else "path"
    return "{" + ", ".join([f"name: {name}, {key}: {path}, size: 16, classes: 3", *more]) + "}"


@pytest.mark.parametrize(
    "name", ["archive", "class_tars", "tar_shards", "parquet", "arrow", "arrays"]
)
def test_missing_data_are_said_with_what_was_expected(name: str) -> None:
    if name in ("parquet", "arrow"):
        pytest.importorskip("pyarrow")
    line = refused(block(name, "nowhere/x"))
    assert line.startswith(f"{'data.images' if name == 'arrays' else 'data.path'}: no file")
    assert "xpected" in line


def test_a_zip_that_does_not_serve_is_said() -> None:
    """A damaged image in it, none of this name, no zip at all, and a wrong folder inside."""
    damaged = Path("tree/n00000002/n00000002_9.JPEG")
    damaged.write_bytes(damaged.read_bytes()[:300])
    with zipfile.ZipFile("x.zip", "w") as file:
        for path in sorted(Path("tree").rglob("*.JPEG")):
            file.write(path)
    data = block("archive", "x.zip", "inside: tree")
    done = e2ediff("run", "tiny.yaml", "--set", f"data={data}",
                   "--set", "probe={images: 20, calibration: 20}")  # fmt: skip
    assert done.code == 5
    assert done.err == (
        "error: x.zip!tree/n00000002/n00000002_9.JPEG: damaged image (Truncated File Read); "
        "remove or replace it, or set `data.on_bad_image: skip`\n"
    )
    assert not Path("runs").exists()
    assert refused(block("archive", "none.zip")) == (
        "data.path: no file none.zip. Expected the path or URL of a zip"
    )
    assert refused(block("archive", "tiny.yaml")) == (
        "data.path: tiny.yaml cannot be read as a zip: File is not a zip file; fetch it again"
    )
    line = refused(block("archive", "x.zip", "inside: pictures"))
    assert line.startswith("data.path: x.zip!pictures holds no images in class folders")


def test_empty_class_folders_of_a_zip_are_named() -> None:
    Path("tree/empty").mkdir()
    Path("tree/notes").mkdir()
    Path("tree/notes/a.txt").write_text("no image")
    with zipfile.ZipFile("x.zip", "w") as file:
        for path in sorted(Path("tree").rglob("*")):
            file.write(path, path.relative_to("tree"))
    assert refused(block("archive", "x.zip")) == (
        "data.path: 2 of 5 class folders in x.zip hold no images (empty, notes); put images "
        "(.jpg, .jpeg, .jpe, .jfif, .png, .webp, .bmp, .gif, .tif, .tiff) there, or remove "
        "the folders and `--set data.classes=3`"
    )


@pytest.mark.parametrize("above", ["", "a/b/"])
def test_a_tar_of_class_folders_is_no_shard_without_labels(above: str) -> None:
    """Its classes would be left out, as the address alone does not give their number."""
    members = [
        (f"{above}{path.relative_to('tree')}", path.read_bytes())
        for path in sorted(Path("tree").rglob("*.JPEG"))
    ]
    Path("x.tar").write_bytes(tar_bytes(members))
    done = e2ediff("run", "tiny.yaml", "--set", "data=x.tar")
    assert (done.code, Path("runs").exists()) == (5, False)
    assert f"x.tar holds images in folders ({above}n00000000, {above}n00000001, " in done.err
    address = f"tar://{above.rstrip('/')}::x.tar"
    assert f"If the folders are classes, give {address}; `--set data.classes=0`" in done.err
    taken = {
        "data=x.tar": "tar_shards at x.tar: 20 images, no classes,",
        f"data={address}": f"image_folder at {address}: 20 images, 3 classes,",
    }
    for change, said in taken.items():
        more = () if "tar://" in change else ("--set", "data.classes=0")
        assert said in e2ediff("check", "tiny.yaml", "--set", change, *more).err


def test_images_beside_the_class_folders_of_a_zip_are_named() -> None:
    for name in ("a.png", "b.JPEG"):
        Path("tree", name).write_bytes(Path("tree/n00000000/n00000000_0.JPEG").read_bytes())
    as_zip(Path("tree"), Path("x.zip"))
    assert refused(block("archive", "x.zip")).startswith(
        "data.path: 2 of 22 images lie beside the class folders of x.zip (a.png, b.JPEG); nobody"
    )


def test_a_missing_shard_of_a_pattern_is_named(place) -> None:
    as_shards(Path("tree"), Path("x"), each=8)
    assert refused(block("tar_shards", "'x/train-{0000..0005}.tar'")).startswith(
        f"data.path: no file {place}/x/train-0003.tar and 2 more. Expected "
    )


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
    options, registry = {"size": 16, "classes": 3}, load().registries["sources"]
    tree = registry.get("image_folder")(root="tree", **options).open()
    packed = registry.get("archive")(path="x.zip", **options).open()
    assert packed.class_names == tree.class_names
    assert torch.equal(packed.labels(), tree.labels())
    assert torch.equal(packed.read([0, 5])[0], tree.read([0, 5])[0])


def test_a_compressed_or_damaged_tar_is_said() -> None:
    with tarfile.open("x.tar", "w:gz") as tar:
        tar.add("tree/n00000000")
    assert refused(block("class_tars", "x.tar")).endswith("it is compressed: decompress it")
    Path("x.tar").write_bytes(b"<html>" * 200)
    assert refused(block("class_tars", "x.tar")).endswith("fetch it again")


# Recognised by `e2ediff data`


def as_cifar(tree: Path, path: Path) -> Path:
    images = np.zeros((20, 32, 32), np.uint8)
    return as_npz(images, np.arange(20) % 3, path)


KINDS = {
    "archive": lambda: as_zip(Path("tree"), Path("x.zip")),
    "class_tars": lambda: as_class_tars(Path("tree"), Path("x.tar")),
    "tar_shards": lambda: as_shards(Path("tree"), Path("x"), 8),
    "parquet": lambda: as_parquet(Path("tree"), Path("x")),
    "arrays": lambda: as_cifar(Path("tree"), Path("x.npz")),
}


@needs("e2ediff-data")
@pytest.mark.parametrize("name", KINDS)
def test_a_path_is_recognised_with_its_classes(name: str) -> None:
    from e2ediff_data.address import source_config

    if name == "parquet":
        pytest.importorskip("pyarrow")
    host, path = load(), str(KINDS[name]())
    config = source_config(host, path, ["size=16"])
    assert host.registries["sources"].name_of(type(config)) == name
    assert (config.image.height, config.image.classes) == (16, 3)
    assert len(config.open()) == 20


@needs("e2ediff-data")
def test_a_pattern_is_recognised_and_what_is_there_as_it_is_written_is_none() -> None:
    from e2ediff_data.address import recognise

    as_shards(Path("tree"), Path("x*{0,1}"), 8)
    for path in ("x*{0,1}", "x*{0,1}/train-0000.tar", "x*/train-*.tar"):
        assert recognise(load(), path) == {"name": "tar_shards", "path": path}


def a_class_without_images() -> None:
    """Labels 0 to 3 of the tree's images, none of them 2, and names of three of the four."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = [path.read_bytes() for path in sorted(Path("tree").rglob("*.JPEG"))]
    names = {"label": {"names": ["cat", "dog", "eel"], "_type": "ClassLabel"}}
    told = {"huggingface": json.dumps({"info": {"features": names}})}
    table = pa.table({"image": images, "label": [0] * 12 + [1] * 7 + [3]})
    pq.write_table(table.replace_schema_metadata(told), "x.parquet")


@needs("e2ediff-data")
def test_check_warns_of_classes_without_images() -> None:
    a_class_without_images()
    done = e2ediff("data", "check", "x.parquet", "--quick", "--workers", "0")
    assert done.code == 0, done
    assert (
        "warning: x.parquet: training images: 1 of 4 classes without an image (eel)"
    ) in done.err


@needs("e2ediff-data")
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


@needs("e2ediff-data")
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
