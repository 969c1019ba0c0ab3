"""Members of tars and where they lie, without unpacking anything."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import BinaryIO, cast

from e2ediff.errors import DataError
from e2ediff.files.names import is_hidden

RULES = 2
"""Changes with what counts in a tar: an index that was made by other rules is made again."""

_END = bytes(2 * tarfile.BLOCKSIZE)  # POSIX: two blocks of zeros, then whatever padding


class _Part:
    """A range of an open file, with what `tarfile` asks of one."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self.file, self.start, self.size, self.at = file, start, size, 0

    def tell(self) -> int:
        return self.at

    def seek(self, place: int, whence: int = 0) -> int:
        self.at = place + (0, self.at, self.size)[whence]
        return self.at

    def read(self, count: int = -1) -> bytes:
        left = max(0, self.size - self.at)
        count = left if count < 0 else min(count, left)
        self.file.seek(self.start + self.at)
        data = self.file.read(count)
        self.at += len(data)
        return data


def members(file: BinaryIO, place: str, option: str) -> Iterator[tarfile.TarInfo]:
    """Plain files of an uncompressed tar; `offset_data` and `size` say where they lie.

    Hidden members are left out before anything is checked.

    Raises:
        DataError: No tar, a damaged one, one that is cut short, also between two members, or one
            with a member that is a link or a device, is there twice, or whose name leads out of
            the archive.
    """
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            seen: set[PurePosixPath] = set()
            for member in tar:
                path = PurePosixPath(member.name)
                if is_hidden(member.name):
                    continue
                what = ""
                if member.name.startswith("/") or ".." in path.parts:
                    what = "lies outside of the archive"
                elif member.issym() or member.islnk():
                    what = "is a link"
                elif member.sparse is not None or not (member.isreg() or member.isdir()):
                    what = "is no plain file"
                elif member.isreg() and path in seen:
                    what = "is there twice"
                if what:
                    raise DataError(
                        f"{option}: {place}: member {member.name!r} {what}; expected plain "
                        "files below the top. Pack the images again without it"
                    )
                if member.isreg():
                    seen.add(path)
                    yield member
            _check_end(file, tar, place, option)
    except tarfile.TarError as error:
        file.seek(0)
        head = file.read(6)
        squeezed = head[:2] == b"\x1f\x8b" or head[:3] == b"BZh" or head == b"\xfd7zXZ\0"
        advice = "it is compressed: decompress it" if squeezed else "fetch it again"
        raise DataError(
            f"{option}: {place} cannot be read as a plain tar ({error}); {advice}"
        ) from error


def _check_end(file: BinaryIO, tar: tarfile.TarFile, place: str, option: str) -> None:
    """Refuse a tar without its end: Python's reader takes a missing or bad header for it."""
    file.seek(tar.offset)
    end = file.read(len(_END))
    if end == _END:
        return
    count = len(tar.getmembers())
    after = f"after {count} member{'' if count == 1 else 's'}"
    if len(end) < len(_END):
        what = f"is cut short: it ends {after} without the two blocks of zeros that end a tar"
    else:
        what = f"is damaged: {after} comes neither another one nor the end"
    raise DataError(f"{option}: {place} {what}; fetch it again, or pack it again")


def inside(file: BinaryIO, member: tarfile.TarInfo) -> BinaryIO:
    """A member as a file of its own: a tar inside a tar."""
    return cast(BinaryIO, _Part(file, member.offset_data, member.size))


def read_member(file: BinaryIO, member: tarfile.TarInfo, place: str, option: str) -> bytes:
    """A small member's content, and the file back where the tar reader left it."""
    if member.size > 1_000_000:
        raise DataError(f"{option}: {place}: a label of {member.size} bytes; expected a number")
    at = file.tell()
    file.seek(member.offset_data)
    data = file.read(member.size)
    file.seek(at)
    return data
