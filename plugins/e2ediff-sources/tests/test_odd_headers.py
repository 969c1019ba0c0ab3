"""Headers of tars that lie end in a message, soon and in little memory."""

from __future__ import annotations

import gzip
import tarfile
from pathlib import Path

import pytest
from e2ediff_sources.tar_members import members

from e2ediff.errors import DataError
from e2ediff.files.location import Location
from e2ediff.files.tree import named_images, tree

HUGE, NEGATIVE = b"\x80" + (1 << 80).to_bytes(11, "big"), b"\xff" * 10 + b"\xfc\x00"
EMPTY = b"00000000000\0"


def header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    block[124:136], block[156:157], block[148:156] = size, kind, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def extended(record: bytes) -> bytes:
    """A member with a header of POSIX's extended format before it."""
    size = b"%011o\0" % len(record)
    return header("x", size, b"x") + record.ljust(512, b"\0") + header("a.png", EMPTY)


TARS = {
    "a name of 2^80 bytes": header("x", HUGE, b"L"),
    "a name of 2^40 bytes": header("x", b"\x80" + (1 << 40).to_bytes(11, "big"), b"L"),
    "an extension of 2^80 bytes": header("x", HUGE, b"x"),
    "a name of negative size": header("x", NEGATIVE, b"L"),
    "an extension of negative size": header("x", NEGATIVE, b"x"),
    "a member of negative size": header("b.png", EMPTY) + header("a.png", NEGATIVE),
    "a member of 0 bytes less than its header": (
        header("b.png", EMPTY) + header("a.png", b"\xff" * 10 + b"\xfe\x00")
    ),
    "a record of 10^22 letters": extended(b"9999999999999999999999 path=a\n"),
    "a size that is negative in an extension": extended(b"13 size=-512\n"),
    "a sparse map of letters": extended(b"27 GNU.sparse.map=0,1,x,y\n"),
    "a sparse map without numbers": extended(b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n"),
}


@pytest.fixture(params=TARS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    (tmp_path / "x.tar").write_bytes(TARS[request.param] + bytes(10240))
    return tmp_path / "x.tar"


def test_members_of_a_tar_are_listed_or_the_tar_is_refused(place: Path) -> None:
    with place.open("rb") as file, pytest.raises(DataError, match=r"x\.tar"):
        list(members(file, str(place), "data.path"))


def test_a_tar_as_a_folder_is_opened_or_refused(place: Path) -> None:
    with pytest.raises(DataError, match=r"x\.tar"):
        tree(Location(f"tar://::{place}", "data.root").fs, "", "data.root: x.tar")


def test_images_in_a_tar_that_a_person_named_are_found_or_refused(place: Path) -> None:
    with pytest.raises(DataError, match=r"x\.tar"):
        named_images(place)


def test_a_compressed_tar_is_not_unpacked_to_find_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(header("x", HUGE, b"L") + bytes(1 << 20)))
    with pytest.raises(DataError, match="not a plain tar"):
        Location(f"tar://::{tmp_path}/x.tar.gz", "data.root")
