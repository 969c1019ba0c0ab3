"""Members of tars and where they lie, without unpacking anything."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import BinaryIO, cast

from e2ediff.addresses import COMPRESSED, TarHeaders
from e2ediff.errors import DataError
from e2ediff.files.members import Members, check_tar_end

RULES = 4
"""Changes with what counts in a tar: an index that was made by other rules is made again."""


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
    """Plain files of an uncompressed tar, by their names without `./` and `//`.

    `offset_data` and `size` say where they lie.

    Hidden members are left out before anything is checked.

    Raises:
        DataError: No tar, a damaged one, one that is cut short, also between two members, or that
            goes on after its end; or it has a member that `Members` refuses.
    """
    where = f"{option}: {place}"
    try:
        with tarfile.open(fileobj=cast(BinaryIO, TarHeaders(file)), mode="r:") as tar:
            seen = Members(where)
            for member in tar:
                name = seen.of_tar(member)
                if name and member.isreg():
                    member.name = name
                    yield member
            check_tar_end(file, tar, where)
    except (tarfile.TarError, ValueError, ArithmeticError, LookupError) as error:
        file.seek(0)
        squeezed = file.read(6).startswith(COMPRESSED)
        advice = "it is compressed: decompress it" if squeezed else "fetch it again"
        raise DataError(f"{where} cannot be read as a plain tar ({error}); {advice}") from error


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
