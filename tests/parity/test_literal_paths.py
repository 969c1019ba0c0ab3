"""`[1]`, `?` and `*` in a name are letters, not a pattern, wherever a path is taken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from command_line import e2ediff, needs
from pictures import as_class_tars, as_npz, as_parquet, as_shards, as_zip, write_tree
from PIL import Image
from safetensors.torch import save
from source_kinds import part, separate_tars, source_of
from tiny_recipe import tiny

from e2ediff.data import SourceConfig
from e2ediff.errors import DataError
from e2ediff.evaluate.images import FolderImages
from e2ediff.features import read_weights
from e2ediff.files.location import find_files
from e2ediff.parts import sources
from e2ediff.parts.sources.own_images import list_images, read_images
from e2ediff.store.storage import Store

SIZE = 16
ODD = "se?t [1] {a,b} st*r"
"""A folder's name; its parent also holds what it stands for as a pattern, with other content."""
CLASSES = ("cat (2)", "do[g]", "st*r")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with images below odd names, and decoys with names that match them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("E2EDIFF_CACHE", str(tmp_path / "cache"))
    write_tree(Path("plain"), [2, 2, 2], size=(20, 20), suffix="png")
    for path in sorted(Path("plain").rglob("*.png")):
        label, number = int(path.parent.name[1:]), int(path.stem[-1])
        odd = Path(ODD, "tree", CLASSES[label], f"a[{number}]?*.png")
        odd.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, odd)
    for name in ("seat 1 a star", "seat 1 b star", "set [1] a st*r"):
        decoy = Path(name, "tree/cat/0.png")
        decoy.parent.mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(decoy)


def on_store(folder: str, tmp_path: Path) -> str:
    """A folder of the working directory as it is, on a store that is not the disk."""
    fs = fsspec.filesystem("memory")
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
        fs.pipe_file(f"{tmp_path}/{path}", path.read_bytes())
    return f"memory:/{tmp_path}/{folder}"


BLOCK = {"size": SIZE, "classes": 3, "flip": False}
FORMS: dict[str, Callable[[Path], SourceConfig]] = {
    "folder": lambda odd: sources.ImageFolder(root=f"{odd}/tree", **BLOCK),
    "folder in a zip": lambda odd: sources.ImageFolder(
        root=f"zip://::{as_zip(odd / 'tree', odd / 'x[1].zip')}", **BLOCK
    ),
    "zip": lambda odd: source_of(
        "archive", path=str(as_zip(odd / "tree", odd / "x[1].zip")), **BLOCK
    ),
    "class tars": lambda odd: source_of(
        "class_tars", path=str(as_class_tars(odd / "tree", odd / "x[1]?*.tar")), **BLOCK
    ),
    "separate class tars": lambda odd: source_of(
        "class_tars", path=str(separate_tars(odd / "tree", odd / "t[1]*")), **BLOCK
    ),
    "tar shards": lambda odd: source_of(
        "tar_shards", path=str(Path(as_shards(odd / "tree", odd / "s[1]*?", 2)).parent), **BLOCK
    ),
    "braces of tar shards": lambda odd: source_of(
        "tar_shards", path=as_shards(odd / "tree", Path("s[1]?"), 2), **BLOCK
    ),
    "parquet": lambda odd: source_of(
        "parquet", path=str(Path(as_parquet(odd / "tree", odd / "p[1]*?")).parent), **BLOCK
    ),
    "npz": lambda odd: source_of("arrays", images=str(npz(odd)), **BLOCK),
}


def npz(odd: Path) -> Path:
    x, y = sources.ImageFolder(root="plain", **BLOCK).open().read(range(6))
    return as_npz(x.permute(0, 2, 3, 1).numpy(), y.numpy(), odd / "x[1]?*.npz")


@pytest.mark.parametrize("form", FORMS)
def test_every_source_reads_below_odd_names(form: str) -> None:
    plain = sources.ImageFolder(root="plain", **BLOCK).open()
    source = FORMS[form](Path(ODD)).open()
    x, y = source.read(range(len(source)))
    assert torch.equal(x, plain.read(range(6))[0])
    assert torch.equal(y, plain.labels())


@pytest.mark.parametrize("kind", ["folder", "tar shards", "class tars", "parquet", "zip"])
def test_every_source_reads_below_odd_names_of_a_store(kind: str, tmp_path: Path) -> None:
    odd, url = Path(ODD), f"memory:/{tmp_path}/{ODD}"
    made = {
        "folder": lambda: (odd, "tree", sources.ImageFolder, "root"),
        "tar shards": lambda: (
            Path(as_shards(odd / "tree", odd / "s[1]", 2)), "s[1]", part("tar_shards"), "path"),
        "class tars": lambda: (
            separate_tars(odd / "tree", odd / "t[1]"), "t[1]", part("class_tars"), "path"),
        "parquet": lambda: (
            as_parquet(odd / "tree", odd / "p[1]"), "p[1]", part("parquet"), "path"),
        "zip": lambda: (as_zip(odd / "tree", odd / "x?.zip"), "x?.zip", part("archive"), "path"),
    }  # fmt: skip
    _, name, config, option = made[kind]()
    on_store(ODD, tmp_path)
    source = config(**{option: f"{url}/{name}"}, **BLOCK).open()
    plain = sources.ImageFolder(root="plain", **BLOCK).open()
    assert torch.equal(source.read(range(6))[0], plain.read(range(6))[0])
    assert len(source) == 6


def test_labels_lie_below_odd_names() -> None:
    names = sorted(str(p.relative_to(f"{ODD}/tree")) for p in Path(ODD, "tree").rglob("*.png"))
    rows = [f'"{name}",{name.partition("/")[0]}' for name in names]
    Path(ODD, "l[1]*?.csv").write_text("\n".join(rows))
    root, labels = f"{ODD}/tree", f"{ODD}/l[1]*?.csv"
    source = sources.ImageFolder(root=root, labels=labels, **BLOCK).open()
    assert source.labels().tolist() == [0, 0, 1, 1, 2, 2]


# Patterns are left where they are asked for


def test_a_star_in_the_last_name_finds_files_of_a_folder_with_an_odd_name(tmp_path: Path) -> None:
    folder = Path("set [1]")
    folder.mkdir()
    for name in ("a[1].tar", "a1.tar", "b.tar", ".a.tar"):
        (folder / name).write_bytes(b"")
        fsspec.filesystem("memory").pipe_file(f"{tmp_path}/set [1]/{name}", b"")
    for top in (".", f"memory:/{tmp_path}"):

        def found(pattern: str, top: str = top) -> list[str]:
            return [f.name for f in find_files(f"{top}/{pattern}", "data.path", ".tar")[1]]

        assert found("set [1]/a*.tar") == ["a1.tar", "a[1].tar"]
        assert found("set [1]/*") == ["a1.tar", "a[1].tar", "b.tar"]
        assert found("set [1]/a[1].tar") == ["a[1].tar"]
        assert found("set [1]/a[1]*") == ["a[1].tar"]
        assert found("s*[1]/{b,a1,b}.tar") == ["b.tar", "a1.tar"]
        assert found("**/b.tar") == ["b.tar"]
        for nothing in ("set [1]/a?.tar", "set 1/*.tar", "set [1]/c*.tar", "set [1]/[ab]*.tar"):
            with pytest.raises(DataError, match="no file"):
                found(nothing)


@needs("e2ediff-data")
def test_what_is_there_as_it_is_written_is_no_pattern(host) -> None:
    from e2ediff_data.address import recognise

    assert recognise(host, f"{ODD}/tree") == {"name": "image_folder", "root": f"{ODD}/tree"}
    with pytest.raises(DataError, match="nothing is there"):
        recognise(host, "set [1]/tree")


# Commands


@needs("e2ediff-data")
def test_commands_on_data_take_odd_names(tmp_path: Path) -> None:
    done = e2ediff("data", "check", f"{ODD}/tree", "--workers", 0)
    assert (done.code, "all 6 images can be read" in done.err) == (0, True)
    out = f"{ODD}/out[1]*?"
    for dst in (out, f"memory:/{tmp_path}/{ODD}/out"):
        words = ("--size", SIZE, "--workers", 0, "--each", 2)
        done = e2ediff("data", "prepare", f"{ODD}/tree", dst, *words)
        assert done.code == 0, done.err
        config = source_of("shards", path=dst, size=SIZE, classes=3)
        assert len(config.open()) == 6
        done = e2ediff("data", "prepare", f"{ODD}/tree", dst, *words)  # finds all of it
        assert "3 of them made before" in done.err


def test_one_s_own_images_and_scores_take_odd_names(tmp_path: Path) -> None:
    url = on_store(ODD, tmp_path)
    image = sources.ImageFolder(root="plain", **BLOCK).image
    plain = read_images(list_images(["plain"]), image)
    for root in (f"{ODD}/tree", f"{url}/tree"):
        assert torch.equal(read_images(list_images([root]), image), plain)
        assert FolderImages(f"{root}/{CLASSES[0]}").count == 2
        one = f"{root}/{CLASSES[1]}/a[0]?*.png"
        assert len(list_images([one])) == 1
    with pytest.raises(DataError, match="no such file or folder"):
        list_images([f"{ODD}/tree/*/a*.png"])


@pytest.mark.parametrize("remote", [False, True])
def test_a_run_is_made_continued_sampled_and_scored_below_odd_names(
    remote: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = f"memory:/{tmp_path}" if remote else str(tmp_path)
    recipe = f"{where}/{ODD}/r[1]*?.yaml"
    data = f"{{name: image_folder, root: '{ODD}/tree', size: 16, classes: 3, workers: 0}}"
    cadence = "{log: 1, diagnose: 2, preview: 2, checkpoint: 1}"
    text = tiny(steps="5", batch="4", data=data, cadence=cadence)
    with fsspec.open(f"{where}/{ODD}/r[1]*?.yaml", "w") as file:
        file.write(text)
    # A neighbour that the run's name would match as a pattern.
    run, neighbour = f"{where}/{ODD}/run [1]*?", f"{where}/{ODD}/run 1xx"
    Store(neighbour).write("checkpoints/images-x/keep", b"keep")
    done = e2ediff("run", recipe, "--out", run)
    assert done.code == 0, done.err
    saved = Store(run).list("checkpoints")
    assert "images-000000000020" in saved
    assert "images-000000000004" not in saved  # the oldest were removed
    done = e2ediff("run", recipe, "--resume", "--out", run, "--set", "steps=7")
    assert done.code == 0, done.err
    done = e2ediff("sample", run, "--count", 6, "--format", "npz", "--out", f"{run}/s[1]*?")
    assert done.code == 0, done.err
    scored = f"{run}/s[1]*?/samples.npz"
    words = ("--features", "random_projection", "--metrics", "fid", "--count", 6)
    for target in (run, scored):
        out = f"{where}/{ODD}/scores[1]*?"
        done = e2ediff("eval", target, "--reference", scored, *words, "--out", out)
        assert done.code == 0, done.err
        assert len(Store(out).list()) >= 1
    done = e2ediff("reconstruct", run, f"{ODD}/tree", "--out", f"{run}/made[1]")
    assert done.code == 0, done.err
    assert len(json.loads(Store(f"{run}/made[1]").read("psnr.json"))) == 6
    done = e2ediff("report", run, "--out", f"{where}/{ODD}/report[1]*?.html")
    assert done.code == 0, done.err
    assert "report[1]*?.html" in Store(f"{where}/{ODD}").list()
    assert Store(neighbour).read("checkpoints/images-x/keep") == b"keep"


@pytest.mark.parametrize("name", ["run", "run [1]", "r?n", "r*n"])
def test_directories_of_a_store_are_moved_and_removed_by_their_names(
    name: str, tmp_path: Path
) -> None:
    store = Store(f"memory:/{tmp_path}/top")
    names = {"run", "run 1", "ran", "r*n", "r?n", "run [1]"}
    for neighbour in names:
        store.write(f"{neighbour}/deep/file", neighbour.encode())
    assert store.rename_dir(name, "new [2]") is None
    assert store.read("new [2]/deep/file") == name.encode()
    assert store.rename_dir("new [2]", "newer") is None
    left = names - {name}
    assert {*store.list()} == {*left, "newer"}
    store.move("newer", name)
    store.move(f"{name}/deep/file", "new [2]/file")
    store.move("new [2]/file", f"{name}/deep/file")
    assert store.read(f"{name}/deep/file") == name.encode()
    store.move(name, "newer")
    store.write(f"{name}/file", b"")  # as if that move had been cut short
    store.move(name, "newer")
    assert (store.list("newer"), store.list("newer/deep")) == (["deep", "file"], ["file"])
    assert {*store.list()} - {"new [2]"} == {*left, "newer"}
    store.remove_dir("new [2]")
    store.write(f"{name}/file", b"")
    assert store.remove_dir(name) is None
    assert store.remove_dir(name) is None  # gone already
    assert {*store.list()} == {*left, "newer"}
    assert all(store.read(f"{one}/deep/file") == one.encode() for one in left)


def test_a_run_of_a_store_restarts_by_its_name_alone(tmp_path: Path) -> None:
    run, neighbour = f"memory:/{tmp_path}/run [1]", f"memory:/{tmp_path}/run 1"
    Path("r.yaml").write_text(tiny(steps="1"))
    for place in (run, neighbour):
        done = e2ediff("run", "r.yaml", "--out", place)
        assert done.code == 0, done.err
    before = [(name, Store(neighbour).list(name)) for name in Store(neighbour).list()]
    config = Store(run).read("run.json")
    done = e2ediff("run", "r.yaml", "--out", run, "--restart")
    assert done.code == 0, done.err
    assert Store(run).read("attempts/1/run.json") == config
    assert Store(run).list("attempts/1/checkpoints") == Store(run).list("checkpoints")
    assert [(name, Store(neighbour).list(name)) for name in Store(neighbour).list()] == before


def test_weights_below_an_odd_name_are_read(tmp_path: Path) -> None:
    data = save({"x": torch.ones(2)})
    for place in (f"{tmp_path}/{ODD}", f"memory:/{tmp_path}/{ODD}"):
        Store(place).write("w[1]*?.safetensors", data)
        state, _ = read_weights(f"{place}/w[1]*?.safetensors")
        assert torch.equal(state["x"], torch.ones(2))


def test_an_npz_below_an_odd_name_is_a_reference(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(256, size=(6, 16, 16, 3), dtype=np.uint8)
    np.savez(f"{ODD}/x[1]*?.npz", arr_0=array)
    url = f"{on_store(ODD, tmp_path)}/x[1]*?.npz"
    words = ("--features", "random_projection", "--metrics", "fid", "--out", "scores")
    for place in (f"{ODD}/x[1]*?.npz", url):
        done = e2ediff("eval", place, "--reference", place, *words)
        assert done.code == 0, done.err
