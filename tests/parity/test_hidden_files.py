"""Hidden files and folders never count, wherever they lie below what the user has named."""

from __future__ import annotations

import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import attrs
import fsspec
import pytest
import torch
from command_line import e2ediff, needs
from pictures import as_shards, tar_bytes, write_tree
from source_kinds import source_of

from e2ediff.data import SourceConfig
from e2ediff.errors import DataError
from e2ediff.evaluate.images import FolderImages
from e2ediff.files.location import find_files
from e2ediff.files.names import is_hidden
from e2ediff.parts import sources
from e2ediff.parts.sources.own_images import list_images

SIZE, COUNTS = 8, [3, 2]

# Below a root that holds class folders n00000000 and n00000001.
LEFT_BEHIND = (
    "._n00000000",
    ".DS_Store",
    ".hidden.JPEG",
    "Thumbs.db",
    "__MACOSX/n00000000/._n00000000_0.JPEG",
    "__MACOSX/n00000000/n00000000_0.JPEG",
    ".git/a.JPEG",
    "@eaDir/n00000000_0.JPEG",
    "lost+found/a.JPEG",
    "n00000000/._n00000000_0.JPEG",
    "n00000000/.ipynb_checkpoints/n00000000_0-checkpoint.JPEG",
    "n00000000/.thumbnails/deep/n00000000_0.JPEG",
    "n00000001/@eaDir/n00000001_0.JPEG/SYNOPHOTO_THUMB_M.jpg",
    "n00000001/$RECYCLE.BIN/x.png",
    "n00000001/Thumbs.db",
)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a clean tree, and one that people have looked at."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("E2EDIFF_CACHE", str(tmp_path / "cache"))
    write_tree(Path("clean"), COUNTS)
    shutil.copytree("clean", "looked-at")
    for i, name in enumerate(LEFT_BEHIND):
        path = Path("looked-at", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Copies of images, and what no image is.
        path.write_bytes(Path("clean/n00000000/n00000000_0.JPEG").read_bytes() if i % 2 else b"x")
    return tmp_path


def members(root: str) -> list[tuple[str, bytes]]:
    paths = sorted(p for p in Path(root).rglob("*") if p.is_file())
    return [(str(p.relative_to(root)), p.read_bytes()) for p in paths]


def zipped(root: str, top: str = "") -> Path:
    """As the Finder packs: with entries of folders, and those of __MACOSX."""
    with zipfile.ZipFile(f"{root}.zip", "w") as file:
        for folder in sorted(p for p in Path(root).rglob("*") if p.is_dir()):
            file.writestr(f"{top}{folder.relative_to(root)}/", b"")
        for name, data in members(root):
            file.writestr(f"{top}{name}", data)
    return Path(f"{root}.zip")


def tree_of_tars(root: str) -> Path:
    """A tar of class tars, which a Mac has packed: with a `._` beside each and in each."""
    inner = []
    for folder in sorted(p for p in Path(root).iterdir() if p.name.startswith("n0")):
        inside = [(p, d) for p, d in members(str(folder)) if p != "Thumbs.db"]
        inner += [(f"._{folder.name}.tar", b"x"), (f"{folder.name}.tar", tar_bytes(inside))]
    Path(f"{root}.tar").write_bytes(tar_bytes([("__MACOSX/._x.tar", b"x"), *inner]))
    return Path(f"{root}.tar")


def in_memory(root: str, tmp_path: Path) -> str:
    fs = fsspec.filesystem("memory")
    for name, data in members(root):
        fs.pipe_file(f"{tmp_path}/{root}/{name}", data)
    return f"memory:/{tmp_path}/{root}"


def shards(root: str) -> Path:
    """A folder of WebDataset shards; a Mac has left its own files in it and in one of them."""
    pattern = Path(as_shards(Path("clean"), Path(f"{root}-shards"), 2))
    if root != "clean":
        first = pattern.parent / "train-0000.tar"
        for name in ("._train-0000.tar", ".DS_Store", "._zzz.tar"):
            (pattern.parent / name).write_bytes(b"x")
        with tarfile.open(first) as tar:
            kept = [(m.name, tar.extractfile(m).read()) for m in tar.getmembers()]  # type: ignore[union-attr]
        mixed = [(f"._{n}", b"x") for n, _ in kept] + [("__MACOSX/000000.jpg", b"x"), *kept]
        first.write_bytes(tar_bytes(mixed))
    return pattern.parent


BLOCK = {"size": SIZE, "classes": len(COUNTS)}
FORMS: dict[str, Callable[[str, Path], SourceConfig]] = {
    "folder": lambda root, _: sources.ImageFolder(root=root, **BLOCK),
    "folder elsewhere": lambda root, tmp: sources.ImageFolder(root=in_memory(root, tmp), **BLOCK),
    "folder in a zip": lambda root, _: sources.ImageFolder(
        root=f"zip://::{zipped(root)}", **BLOCK
    ),
    "zip": lambda root, _: source_of("archive", path=str(zipped(root)), **BLOCK),
    "folder of a zip": lambda root, _: source_of(
        "archive", path=str(zipped(root, ".top/train/")), inside=".top/train", **BLOCK
    ),
    "class tars": lambda root, _: source_of("class_tars", path=str(tree_of_tars(root)), **BLOCK),
    "tar shards": lambda root, _: source_of("tar_shards", path=str(shards(root)), **BLOCK),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_tree_that_people_looked_at_is_the_clean_one(form: str, tmp_path: Path) -> None:
    """Number, labels, class names, order, pixels."""
    clean, other = (FORMS[form](root, tmp_path).open() for root in ("clean", "looked-at"))
    assert len(other) == sum(COUNTS)
    assert torch.equal(other.labels(), clean.labels())
    assert other.class_names == clean.class_names
    assert torch.equal(other.read(range(len(other)))[0], clean.read(range(len(clean)))[0])


@pytest.mark.parametrize("form", ["folder", "folder elsewhere", "folder in a zip", "zip"])
def test_without_classes_they_do_not_count_either(form: str, tmp_path: Path) -> None:
    config = attrs.evolve(FORMS[form]("looked-at", tmp_path), classes=0)
    assert len(config.open()) == sum(COUNTS)


def test_a_root_may_lie_in_a_hidden_folder(tmp_path: Path) -> None:
    """As ~/.cache/data and ./.data do; what is below it counts as anywhere else."""
    Path(".data/@eaDir").mkdir(parents=True)
    for name in ("clean", "looked-at"):
        Path(name).rename(f".data/@eaDir/{name}")
    root = ".data/@eaDir/looked-at"
    for config in (
        sources.ImageFolder(root=root, **BLOCK),
        sources.ImageFolder(root=in_memory(root, tmp_path), **BLOCK),
    ):
        assert len(config.open()) == sum(COUNTS)
    images = (root, f".data/@eaDir/{'looked-at'}/n00000000", in_memory(root, tmp_path))
    assert [len(list_images([place])) for place in images] == [5, 3, 5]
    assert [FolderImages(place).count for place in images] == [5, 3, 5]


@pytest.mark.parametrize("form", ["zip", "class tars"])
def test_packed_files_may_lie_in_a_hidden_folder(form: str, tmp_path: Path) -> None:
    Path(".data/@eaDir").mkdir(parents=True)
    Path("looked-at").rename(".data/@eaDir/looked-at")
    assert len(FORMS[form](".data/@eaDir/looked-at", tmp_path).open()) == sum(COUNTS)


@pytest.mark.parametrize("form", ["folder", "folder elsewhere", "zip"])
def test_scores_and_one_s_own_images_leave_them_out(form: str, tmp_path: Path) -> None:
    address = {
        "folder": "looked-at",
        "folder elsewhere": in_memory("looked-at", tmp_path),
        "zip": f"zip://::{zipped('looked-at')}",
    }[form]
    assert FolderImages(address).count == sum(COUNTS)
    assert len(list_images([address])) == sum(COUNTS)


def test_an_image_that_is_named_itself_counts() -> None:
    assert list_images(["looked-at/.hidden.JPEG"])[0].endswith("looked-at/.hidden.JPEG")


def test_what_holds_nothing_else_is_empty(tmp_path: Path) -> None:
    Path("only/.x").mkdir(parents=True)
    shutil.copy("clean/n00000000/n00000000_0.JPEG", "only/.x/0.jpg")
    shutil.copy("clean/n00000000/n00000000_0.JPEG", "only/._0.jpg")
    with pytest.raises(DataError, match="only: holds no images"):
        FolderImages("only")
    with pytest.raises(DataError, match="only: holds no images"):
        list_images(["only"])
    with pytest.raises(DataError, match="only holds no images"):
        sources.ImageFolder(root="only", size=SIZE, classes=0).open()


@needs("e2ediff-data")
def test_a_folder_that_holds_nothing_else_is_recognised_as_empty() -> None:
    Path("only/.x").mkdir(parents=True)
    shutil.copy("clean/n00000000/n00000000_0.JPEG", "only/.x/0.jpg")
    shutil.copy("clean/n00000000/n00000000_0.JPEG", "only/._0.jpg")
    done = e2ediff("data", "stats", "only")
    assert done.code == 5
    assert "only: an empty folder" in done.err


def test_a_class_folder_of_hidden_images_is_empty() -> None:
    Path("looked-at/n00000002").mkdir()
    Path("looked-at/n00000002/._a.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match=r"looked-at hold no images \(n00000002\)"):
        sources.ImageFolder(root="looked-at", size=SIZE, classes=3).open()


def test_labels_of_hidden_images_are_passed_over() -> None:
    """A list that was made of all files names them, too."""
    rows = [f"{p.name},{k}" for k in (0, 1) for p in Path(f"clean/n0000000{k}").iterdir()]
    rows += ["._n00000000_0.JPEG,0", "n00000000/.thumbnails/a.JPEG,1", "__MACOSX/x.JPEG,0"]
    Path("labels.csv").write_text("\n".join(rows))
    config = sources.ImageFolder(root="looked-at", labels="labels.csv", **BLOCK)
    assert config.open().labels().tolist() == [0, 0, 0, 1, 1]


@needs("e2ediff-data")
@pytest.mark.parametrize("form", ["folder", "zip", "class tars"])
def test_data_commands_recognise_and_count_without_them(form: str, tmp_path: Path) -> None:
    config = FORMS[form]("looked-at", tmp_path)
    address = config.root if form == "folder" else config.path
    done = e2ediff("data", "check", address, "--workers", 0, "--set", f"size={SIZE}")
    assert done.code == 0, done.err
    assert "all 5 images can be read" in done.err


def test_a_pattern_does_not_find_them_but_a_name_does() -> None:
    folder = shards("looked-at")
    for pattern in (folder, f"{folder}/*.tar", f"{folder}/*"):
        names = [file.name for file in find_files(str(pattern), "data.path", ".tar")[1]]
        assert names == ["train-0000.tar", "train-0001.tar", "train-0002.tar"]
    _, (found,) = find_files(f"{folder}/._zzz.tar", "data.path", ".tar")
    assert found.name == "._zzz.tar"


@pytest.mark.parametrize(
    ("path", "hidden"),
    [
        ("cat/0.jpg", False), ("./cat/0.jpg", False), ("", False), ("cat.d/a..b.jpg", False),
        ("_cat/_0.jpg", False), ("MACOSX/0.jpg", False), ("thumbs/0.jpg", False),
        (".cat/0.jpg", True), ("cat/.0.jpg", True), ("cat/..a.jpg", True), ("a/.b/c/d.jpg", True),
        ("__MACOSX/", True), ("a/__macosx/0.jpg", True), ("a/Thumbs.db", True),
        ("a/@eaDir/0.jpg", True), ("lost+found", True), ("a/System Volume Information/x", True),
    ],
)  # fmt: skip
def test_names_that_never_count(path: str, hidden: bool) -> None:
    assert is_hidden(path) is hidden
