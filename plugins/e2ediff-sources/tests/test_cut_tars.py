"""A tar is read whole or refused: where it was cut, and who wrote it, makes no difference."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from e2ediff_sources.tar_members import members
from e2ediff_sources.tars import ClassTars, TarShards
from pictures import tar_bytes

from e2ediff.errors import DataError

# One that fills its blocks, one that does not, one with a name that needs a header of its own.
FILES = [("a.jpg", b"x" * 1024), ("b.jpg", b"y" * 700), (f"{'c' * 120}.jpg", b"z")]
BLOCK = 512


def names(data: bytes) -> list[str]:
    return [member.name for member in members(io.BytesIO(data), "x.tar", "data.path")]


def end_of_members(data: bytes) -> int:
    """Of a tar whose last member ends within a block."""
    return len(data.rstrip(b"\0")) // BLOCK * BLOCK + BLOCK


FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def by_python(form: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, data in FILES[: 2 if form == tarfile.USTAR_FORMAT else 3]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.mark.parametrize("form", FORMATS)
def test_a_tar_that_is_cut_before_its_end_is_refused_wherever(form: str) -> None:
    data = by_python(FORMATS[form])
    found = names(data)
    assert len(found) >= 2
    end = end_of_members(data)
    for cut in range(BLOCK, end + 2 * BLOCK, BLOCK // 2):
        with pytest.raises(DataError, match=r"is cut short|cannot be read as a plain tar"):
            names(data[:cut])
    for cut in range(end + 2 * BLOCK, len(data) + 1, BLOCK):
        assert names(data[:cut]) == found


@pytest.mark.parametrize("options", [(), ("-b1",), ("-b2",), ("-b64",), ("--format=v7",),
                                     ("--format=posix",)], ids=" ".join)  # fmt: skip
def test_what_gnu_tar_writes_is_whole(options: tuple[str, ...], tmp_path: Path) -> None:
    """With padding to blocks of 512 to 32,768 bytes."""
    command = shutil.which("tar")
    if command is None or b"GNU" not in subprocess.check_output([command, "--version"]):
        pytest.skip("needs GNU tar")
    for name, data in FILES[:2]:
        (tmp_path / name).write_bytes(data)
    subprocess.run([command, *options, "-cf", "x.tar", "a.jpg", "b.jpg"], cwd=tmp_path, check=True)
    data = (tmp_path / "x.tar").read_bytes()
    assert names(data) == ["a.jpg", "b.jpg"]
    with pytest.raises(DataError, match="is cut short: it ends after 2 members without the two"):
        names(data[: end_of_members(data) + BLOCK])


def test_a_damaged_header_between_members_is_not_taken_for_the_end() -> None:
    data = bytearray(by_python(tarfile.USTAR_FORMAT))
    data[3 * BLOCK + 148] ^= 1  # the second member's checksum
    with pytest.raises(DataError) as caught:
        names(bytes(data))
    assert str(caught.value) == (
        "data.path: x.tar is damaged: after 1 member comes neither another one nor the end; fetch "
        "it again, or pack it again"
    )


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("kind", [TarShards, ClassTars])
def test_a_tar_that_the_disk_does_not_give_is_said(kind: str, tmp_path: Path) -> None:
    (tmp_path / "x.tar").symlink_to("/proc/self/mem")  # opens, and fails to be read
    with pytest.raises(DataError, match=r"data.path: cannot open .*x.tar: \[Errno \d+\]"):
        kind(path=str(tmp_path / "x.tar"), size=8, classes=1).open()


def test_class_tars_without_images_are_named(tmp_path: Path) -> None:
    images = tar_bytes([("a_0.JPEG", b"x")])
    inner = {"n01.tar": images, "n02.tar": tar_bytes([]), "n03.tar": tar_bytes([("x.txt", b"x")])}
    (tmp_path / "x.tar").write_bytes(tar_bytes(list(inner.items())))
    (tmp_path / "folder").mkdir()
    for name, data in inner.items():
        (tmp_path / "folder" / name).write_bytes(data)
    for path in ("x.tar", "folder"):
        with pytest.raises(DataError) as caught:
            ClassTars(path=str(tmp_path / path), size=8, classes=1).open()
        assert str(caught.value) == (
            f"data.path: class tars without images in {tmp_path}/{path}: n02.tar, n03.tar; fetch "
            "them again, or pack without them"
        )


def test_a_shard_and_a_class_tar_that_were_cut_are_named(tmp_path: Path) -> None:
    whole = tar_bytes([("0.jpg", b"x"), ("0.cls", b"0"), ("1.jpg", b"x"), ("1.cls", b"1")])
    (tmp_path / "x.tar").write_bytes(whole[: 4 * BLOCK])
    with pytest.raises(DataError, match=r"x.tar is cut short: it ends after 2 members"):
        TarShards(path=str(tmp_path / "x.tar"), size=8, classes=1).open()
    images = tar_bytes([("n01_0.JPEG", b"x"), ("n01_1.JPEG", b"x")])
    (tmp_path / "x.tar").write_bytes(tar_bytes([("n01.tar", images[: 2 * BLOCK])]))
    with pytest.raises(DataError, match=r"x.tar/n01.tar is cut short: it ends after 1 member "):
        ClassTars(path=str(tmp_path / "x.tar"), size=8, classes=1).open()
    assert not list(tmp_path.glob("*.safetensors")), "no index is kept of what was refused"
