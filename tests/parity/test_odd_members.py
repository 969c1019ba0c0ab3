"""A zip or tar that is opened as a folder: what its members must be, and which of them count."""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from odd_members import CAFE, CLEAN, PNG, READ, REFUSED, SIZE, tar_of, zip_of

from e2ediff.errors import DataError
from e2ediff.evaluate.images import stored_images
from e2ediff.parts.sources import ImageFolder
from e2ediff.parts.sources.own_images import list_images, read_images


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def packed(form: str, names: Sequence[str]) -> str:
    write = zip_of if form == "zip" else tar_of
    return str(write(Path(f"x.{form}"), names, PNG))


def training(address: str, classes: int = 0) -> ImageFolder:
    protocol = address.rpartition(".")[2]
    return ImageFolder(root=f"{protocol}://::{address}", size=SIZE, classes=classes)


@pytest.mark.parametrize("form", ["zip", "tar"])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_stands_for_no_file_of_its_own_is_refused_everywhere(kind: str, form: str) -> None:
    """In training, in scores, and among one's own images."""
    names, said = REFUSED[kind]
    address = packed(form, [*CLEAN, *names])
    for read, where in (
        (lambda: training(address).open(), f"data.root: {form}://::{address}: "),
        (lambda: stored_images(address), f"{form}://::{address}: "),
        (lambda: list_images([address]), f"{form}://::{address}: "),
    ):
        with pytest.raises(DataError) as caught:
            read()
        (line,) = str(caught.value).splitlines()
        assert line.startswith(f"{where}member {names[-1]!r} {said}")


@pytest.mark.parametrize("kind", sorted({*READ} - {"a dot before", "two slashes"}))
@pytest.mark.parametrize("form", ["zip", "tar"])
def test_what_is_a_plain_file_counts_everywhere(kind: str, form: str) -> None:
    names, expected = READ[kind]
    address = packed(form, [*CLEAN, *names])
    source = training(address).open()
    names = [name.replace("/./", "/") for name in source.listing.names]
    assert sorted(names) == sorted([*CLEAN, *expected])
    assert len(source.read(range(len(source)))[0]) == len(source)
    assert stored_images(address).count == len(source)
    assert len(read_images(list_images([address]), source.image)) == len(source)


def test_names_in_utf8_that_do_not_say_so_are_the_names_of_classes() -> None:
    address = str(zip_of(Path("x.zip"), [f"{CAFE}/0.png".encode(), b"tea/0.png"], PNG))
    assert training(address, classes=2).open().class_names == (CAFE, "tea")
    assert list_images([address]) == [f"zip://{CAFE}/0.png::x.zip", "zip://tea/0.png::x.zip"]
    assert read_images(list_images([address]), training(address).image).shape[0] == 2
    zip_of(Path("x.zip"), [b"caf\xe9/0.png"], PNG)
    for read in (lambda: training("x.zip").open(), lambda: list_images(["x.zip"])):
        with pytest.raises(DataError, match=r"a member has the name b'caf\\xe9/0.png', which is"):
            read()


@pytest.mark.parametrize("form", ["zip", "tar"])
@pytest.mark.parametrize("entry", [[], ["./"]])
def test_what_was_packed_from_within_its_folder_is_that_folder(
    form: str, entry: list[str]
) -> None:
    """As `tar -cf x.tar .` does: all names begin with `./`."""
    address = packed(form, [*entry, *(f"./{name}" for name in [*CLEAN, ".x/0.png"])])
    source = training(address, classes=2).open()
    assert (list(source.listing.names), source.class_names) == (CLEAN, ("cat", "dog"))
    assert len(read_images(list_images([address]), source.image)) == stored_images(address).count
    address = packed(form, [*CLEAN, "./dog/1.png"])
    with pytest.raises(DataError, match=r"some members begin with '\./' and others do not; exp"):
        stored_images(address)


@pytest.mark.parametrize("form", ["zip", "tar"])
def test_links_and_devices_are_refused(form: str) -> None:
    if form == "zip":
        info = zipfile.ZipInfo("cat/0.png")
        info.create_system, info.external_attr = 3, 0o120777 << 16
        with zipfile.ZipFile("x.zip", "w") as file:
            file.writestr(info, "/etc/passwd")
    else:
        link = tarfile.TarInfo("cat/0.png")
        link.type, link.linkname = tarfile.SYMTYPE, "1.png"
        with tarfile.open("x.tar", "w") as tar:
            tar.addfile(link)
    with pytest.raises(DataError, match=r"member .cat/0.png. is a link; expected plain files"):
        stored_images(f"x.{form}")


def test_a_tar_that_does_not_end_where_its_members_do_is_refused() -> None:
    whole = Path(packed("tar", CLEAN)).read_bytes()
    Path("x.tar").write_bytes(whole * 2)
    with pytest.raises(DataError, match=r"x.tar goes on after 3 members and the end, as tars do"):
        stored_images("x.tar")
    Path("x.tar").write_bytes(whole[:3072])
    with pytest.raises(DataError, match=r"x.tar is cut short: it ends after 3 members without"):
        training("x.tar").open()


def test_members_beside_the_folder_that_is_read_do_not_count() -> None:
    packed("zip", [*CLEAN, "other/0.png", "other/0.png"])
    root = "zip://cat::x.zip"
    assert len(ImageFolder(root=root, size=SIZE, classes=0).open()) == 2


def test_a_zip_of_the_finder_holds_what_was_packed() -> None:
    """With entries of folders, AppleDouble files within, and those of __MACOSX."""
    names = ["cat/", "cat/0.png", "cat/._0.png", "dog/", "dog/0.png", "__MACOSX/",
             "__MACOSX/._cat", "__MACOSX/cat/", "__MACOSX/cat/._0.png"]  # fmt: skip
    address = packed("zip", names)
    source = training(address, classes=2).open()
    assert (source.class_names, source.left_out) == (("cat", "dog"), ())
    assert list(source.listing.names) == ["cat/0.png", "dog/0.png"]
    assert stored_images(address).count == 2
