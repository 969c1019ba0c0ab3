"""Members of zips and tars at odd names: read as they are, refused by name, or hidden."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from e2ediff_sources.archive import Archive
from e2ediff_sources.tars import ClassTars, TarShards
from odd_members import CAFE, CLEAN, PNG, READ, REFUSED, SIZE, tar_of, zip_of
from pictures import tar_bytes
from refusals import refusal

from e2ediff.data import LeftOut, SourceConfig
from e2ediff.files.listing import EncodedConfig


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory, and an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("E2EDIFF_CACHE", str(tmp_path / "cache"))
    return tmp_path


def archive(names: Sequence[str | bytes]) -> EncodedConfig:
    return Archive(path=str(zip_of(Path("x.zip"), names, PNG)), size=SIZE, classes=0)


def tar_shards(names: Sequence[str]) -> EncodedConfig:
    return TarShards(path=str(tar_of(Path("x.tar"), names, PNG)), size=SIZE, classes=0)


def class_tars(names: Sequence[str]) -> EncodedConfig:
    """All in the tar of one class, in a tar."""
    inner = tar_of(Path("n01.tar"), names, PNG).read_bytes()
    Path("x.tar").write_bytes(tar_bytes([("n01.tar", inner)]))
    return ClassTars(path="x.tar", size=SIZE, classes=0)


FORMS = {"zip": archive, "tar shards": tar_shards, "class tar": class_tars}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", REFUSED)
def test_a_member_that_stands_for_no_file_of_its_own_is_refused(kind: str, form: str) -> None:
    names, said = REFUSED[kind]
    line = refusal(FORMS[form]([*CLEAN, *names]))
    assert f"member {names[-1]!r} {said}" in line
    assert "Pack the images again without " in line


def known_paths(config: SourceConfig, form: str) -> list[str]:
    listing = config.listing(held_out=False)
    assert len(config.open().read(range(len(listing.names)))[0]) == len(listing.names)
    if form == "class tar":  # which names images by their class
        return sorted(name.removeprefix("n01/") for name in listing.names)
    return sorted(name.removeprefix("x.tar/") for name in listing.names)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", READ)
def test_a_member_that_is_a_plain_file_is_read_by_its_name(kind: str, form: str) -> None:
    names, expected = READ[kind]
    paths = sorted([*CLEAN, *expected])
    if form == "tar shards":  # where these are a second image of a sample, and a compound suffix
        other = {"cat/0.PNG", "cat/2..png"}
        names, paths = sorted({*names} - other), sorted({*paths} - other)
    assert known_paths(FORMS[form]([*CLEAN, *names]), form) == paths


def test_a_zip_whose_names_are_utf8_without_saying_so_is_read() -> None:
    """As the Finder, ditto and Info-ZIP write it; Python alone would read other letters."""
    names = [f"{CAFE}/0.png", "\u732b/0.png"]
    config = archive([name.encode() for name in names])
    assert known_paths(config, "zip") == names
    classed = Archive(path="x.zip", size=SIZE, classes=2).open()
    assert classed.class_names == (CAFE, "\u732b")
    command = shutil.which("zip")
    if command is not None:
        for name in names:
            Path(name).parent.mkdir()
            Path(name).write_bytes(PNG)
        subprocess.run([command, "-q", "-r", "y.zip", CAFE, "\u732b"], check=True)
        assert known_paths(Archive(path="y.zip", size=SIZE, classes=0), "zip") == names


def test_names_in_unknown_letters_are_refused() -> None:
    assert refusal(archive([b"caf\xe9/0.png"])) == (
        "data.path: x.zip: a member has the name b'caf\\xe9/0.png', which is not UTF-8, and "
        "nothing tells which letters these are. Pack the files again, with names in UTF-8"
    )
    tar_of(Path("x.tar"), ["caf\udce9.png"], PNG, tarfile.GNU_FORMAT)
    line = refusal(TarShards(path="x.tar", size=SIZE, classes=0))
    assert "member 'caf\\udce9.png' has a name that is not UTF-8; expected plain files" in line


def test_a_name_that_ends_within_is_refused() -> None:
    """What comes after a zero is left out by Python's reader, and shown by others."""
    assert "member 'cat/2.png\\x00.exe' has a control character" in refusal(
        archive([*CLEAN, "cat/2.png\0.exe"])
    )


@pytest.mark.parametrize("form", FORMS)
def test_a_file_without_a_name_is_refused(form: str) -> None:
    name = "" if form != "zip" else "."
    assert f"member {name!r} has no name; expected" in refusal(FORMS[form]([*CLEAN, name]))


def test_a_zip_counts_what_it_leaves_out() -> None:
    """But for hidden members, and members of another folder than the one that is read."""
    names = [*CLEAN, "cat/a.heic", "cat/b.HEIC", "README", "cat/._x", "Thumbs.db", "cat/"]
    found = (
        LeftOut("with suffix .heic", 2, "cat/a.heic"), LeftOut("without suffix", 1, "README")
    )  # fmt: skip
    assert archive(names).open().left_out == found
    config = Archive(path="x.zip", inside="dog", size=SIZE, classes=0)
    assert config.open().left_out == ()
    line = refusal(archive(["cat/a.heic"]))
    assert line.endswith("; 1 file is left out: 1 with suffix .heic (cat/a.heic)")


def test_a_zip_with_a_device_is_refused() -> None:
    with zipfile.ZipFile("x.zip", "w") as file:
        info = zipfile.ZipInfo("cat/0.png")
        info.create_system, info.external_attr = 3, 0o020666 << 16
        file.writestr(info, b"")
    line = refusal(Archive(path="x.zip", size=SIZE, classes=1))
    assert "member 'cat/0.png' is no plain file; expected" in line


class _Forward(io.RawIOBase):
    """A file that cannot go back, so that sizes come after the members."""

    def __init__(self, file: io.BufferedIOBase) -> None:
        self.file = file

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        return self.file.write(data)


@pytest.mark.parametrize("kind", ["sizes after members", "sizes of 64 bits", "bytes before it"])
def test_zips_of_other_writers_are_read(kind: str) -> None:
    out = io.BytesIO()
    out.write(b"#!/bin/sh\n" if kind == "bytes before it" else b"")
    target = _Forward(out) if kind == "sizes after members" else out
    with zipfile.ZipFile(target, "w" if out.tell() == 0 else "a") as file:  # type: ignore[arg-type]
        for name in CLEAN:
            with file.open(name, "w", force_zip64=kind == "sizes of 64 bits") as member:
                member.write(PNG)
    Path("x.zip").write_bytes(out.getvalue())
    assert known_paths(Archive(path="x.zip", size=SIZE, classes=0), "zip") == CLEAN


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["GNU", "pax"])
def test_the_long_names_of_a_tar_are_its_members_names(format: int) -> None:
    name = f"{'d' * 120}/{'f' * 120}.png"
    tar_of(Path("x.tar"), [name], PNG, format)
    assert known_paths(TarShards(path="x.tar", size=SIZE, classes=0), "tar") == [name]
    tar_of(Path("x.tar"), [f"../{name}"], PNG, format)
    line = refusal(TarShards(path="x.tar", size=SIZE, classes=0))
    assert f"member '../{name}' lies outside of the archive" in line


def test_a_name_that_a_pax_header_replaces_is_the_one_that_counts() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("cat/0.png")
        info.size, info.pax_headers = len(PNG), {"path": "/etc/0.png"}
        tar.addfile(info, io.BytesIO(PNG))
    Path("x.tar").write_bytes(out.getvalue())
    line = refusal(TarShards(path="x.tar", size=SIZE, classes=0))
    assert "member '/etc/0.png' lies outside of the archive" in line


def test_a_file_with_holes_is_refused() -> None:
    command = shutil.which("tar")
    if command is None or b"GNU" not in subprocess.check_output([command, "--version"]):
        pytest.skip("needs GNU tar")
    with open("0.png", "wb") as file:
        file.write(PNG)
        file.truncate(1 << 20)
    for options in ("--format=gnu", "--format=posix"):
        subprocess.run([command, "--sparse", options, "-cf", "x.tar", "0.png"], check=True)
        line = refusal(TarShards(path="x.tar", size=SIZE, classes=0))
        assert "member '0.png' is no plain file; expected" in line


@pytest.mark.parametrize("kind", [TarShards, ClassTars])
def test_tars_that_were_put_together_as_files_are_refused(kind: type[EncodedConfig]) -> None:
    """A reader of tars sees the first one alone."""
    whole = tar_of(Path("a.tar"), ["n_0.png"], PNG).read_bytes()
    Path("x.tar").write_bytes(whole + tar_of(Path("b.tar"), ["n_1.png"], PNG).read_bytes())
    assert refusal(kind(path="x.tar", size=SIZE, classes=0)).endswith(
        "x.tar goes on after 1 member and the end, as tars do that were put together as files; "
        "expected one tar. Give each by itself, or join them with `tar -A`"
    )
    Path("x.tar").write_bytes(whole + bytes(1 << 21))
    assert len(kind(path="x.tar", size=SIZE, classes=0).open()) == 1


@pytest.mark.parametrize(
    ("form", "said"), [("gz", True), ("bz2", True), ("xz", True), ("zst", True), ("html", False)]
)
def test_a_compressed_tar_is_told_from_a_damaged_one(form: str, said: bool) -> None:
    if form in ("gz", "bz2", "xz"):
        with tarfile.open("x.tar", f"w:{form}") as tar:
            tar.addfile(tarfile.TarInfo("0.png"))
    else:
        head = b"\x28\xb5\x2f\xfd" if form == "zst" else b"<html>"
        Path("x.tar").write_bytes(head + bytes(range(256)) * 4)
    line = refusal(TarShards(path="x.tar", size=SIZE, classes=0))
    assert line.endswith("it is compressed: decompress it" if said else "fetch it again")


def test_a_class_of_two_tars_is_refused() -> None:
    """As of a tar of training images beside one of held-out images."""
    inner = tar_of(Path("i.tar"), ["0.png"], PNG).read_bytes()
    Path("x.tar").write_bytes(tar_bytes([("train/n01.tar", inner), ("val/n01.tar", inner)]))
    said = "class 'n01' has two tars, train/n01.tar and val/n01.tar; expected one for each class"
    assert said in refusal(ClassTars(path="x.tar", size=SIZE, classes=1))
    Path("both").mkdir()
    for name in ("train", "val"):
        Path(f"both/{name}.tar").write_bytes(tar_bytes([("n01.tar", inner)]))
    said = "class 'n01' has two tars, train.tar/n01.tar and val.tar/n01.tar; expected one for"
    assert said in refusal(ClassTars(path="both", size=SIZE, classes=1))


def test_images_beside_class_tars_are_refused() -> None:
    inner = tar_of(Path("i.tar"), ["0.png"], PNG).read_bytes()
    Path("x.tar").write_bytes(tar_bytes([("n01.tar", inner), ("a.png", PNG)]))
    for classes in (0, 1):
        assert "x.tar: 1 of 2 images lie beside the class tars (a.png); nobody can tell" in (
            refusal(ClassTars(path="x.tar", size=SIZE, classes=classes))
        )
