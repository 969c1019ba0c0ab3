"""Limits on what is read from files that others made, and JSON within them.

A file of some kilobytes can unpack to many gigabytes, and a header can promise what no memory
holds. So a size is judged before anything of that size is allocated, and what is unpacked ends
where the size that was judged ends. docs/reference/foreign-files.md lists every format.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

MAX_BYTES = 1 << 29
"""Length of the longest file that is read for one image, or for one file of labels.

For an image it is 8 bytes for each pixel.
"""

MAX_RATIO = 200
"""How many times its packed size an array of more than `MAX_BYTES` may have.

dSprites, 3 GB of masks in 27 MB, has 113; zeros reach 1,030 with zlib, more than any images.
"""

MAX_GRAPH = 1 << 24
"""Length of the longest JSON that describes a program, a checkpoint or a file of scores."""

_SMALL = 1 << 24  # bytes that fit on any machine, so that nobody needs to ask
_JSON_OBJECTS = 24  # bytes of memory for one byte of JSON, which is worst in '{},{},...'


class OversizedError(ValueError):
    """Something is larger than what is ever read of its kind."""


def check_size(size: int, what: str = "an image", most: int = MAX_BYTES) -> None:
    """Refuse what is longer than anything of its kind, before it is read or unpacked.

    Args:
        size: Its length, as a header or a directory has it.
        what: What it is, for the message.
        most: The longest that is read.

    Raises:
        OversizedError: It is longer.
    """
    if size > most:
        raise OversizedError(f"{size:,} bytes, more than the {most:,} that are read of {what}")


def check_memory(size: int) -> None:
    """Refuse what does not fit into the memory that is free.

    Raises:
        OversizedError: It does not.
    """
    free = free_memory() if size > _SMALL else None
    if free is not None and size > free:
        raise OversizedError(f"{size:,} bytes, and {free:,} bytes of memory are free")


def check_array(size: int, packed: int) -> None:
    """Refuse an array, perhaps of a whole data set, that is too large to unpack into memory.

    Args:
        size: Its bytes once it is unpacked.
        packed: The bytes that it is unpacked from.

    Raises:
        OversizedError: It does not fit, or is a little file that becomes enormous.
    """
    if size > max(MAX_BYTES, MAX_RATIO * packed):
        raise OversizedError(
            f"{size:,} bytes unpacked from {packed:,}, and of arrays above {MAX_BYTES:,} bytes "
            f"none has more than {MAX_RATIO} times what it is packed in; if it is your own, write "
            "it without compression"
        )
    check_memory(size)


def check_unpacked(archive: zipfile.ZipFile, size: int) -> None:
    """Refuse an archive of torch whose members have more bytes than its file.

    torch packs nothing, so that this archive was made to become larger than it looks.

    Args:
        archive: The archive.
        size: The length of its file.

    Raises:
        OversizedError: They have.
    """
    total = sum(member.file_size for member in archive.infolist())
    if total > size:
        raise OversizedError(
            f"{total:,} bytes unpacked from {size:,}, and torch writes its files without packing"
        )


def read_whole(file: BinaryIO) -> bytes:
    """Read an opened file to its end, as much as there is memory for.

    Raises:
        OversizedError: It does not fit into the memory that is free.
        OSError: It cannot be read.
    """
    if file.seekable():
        size = file.seek(0, os.SEEK_END)
        check_memory(size)
        file.seek(0)
        return file.read(size)
    pieces, size = list[bytes](), 0
    while piece := file.read(1 << 22):
        pieces.append(piece)
        size += len(piece)
        check_memory(len(piece))
    check_memory(size)  # once more, to join them
    return b"".join(pieces)


def json_object(
    data: bytes | str,
    most: int | None = None,
    pairs: Callable[[list[tuple[str, Any]]], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Parse JSON that somebody else wrote, whose outermost value is an object.

    Args:
        data: The text, if bytes in UTF-8, UTF-16 or UTF-32.
        most: The most bytes; None for what there is memory for.
        pairs: Makes an object of its keys and values; by default as `dict` does.

    Raises:
        ValueError: It is too long, no JSON, no object, or nested too deeply.
    """
    if most is not None:
        check_size(len(data), "such JSON", most)
    check_memory(_JSON_OBJECTS * len(data))
    try:
        value = json.loads(data, object_pairs_hook=pairs)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"it is {type(value).__name__}, expected an object of JSON")  # noqa: TRY004
    return value


def free_memory() -> int | None:
    """Return the bytes of memory that this process may still take; None where nobody tells.

    On Linux these are what the kernel can give away, and what the control groups of a container
    or of a job leave; elsewhere all that the machine has.
    """
    found = [_left_in(group) for group in _groups()]
    for line in _text("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    if not found and hasattr(os, "sysconf"):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min((one for one in found if one is not None), default=None)


def _groups() -> list[Path]:
    """Return the control group of this process and those above it, of version 2."""
    lines = _text("/proc/self/cgroup").splitlines()
    own = next((line[3:] for line in lines if line.startswith("0::")), "/")
    path = PurePosixPath(own.lstrip("/"))
    return [Path("/sys/fs/cgroup") / one for one in (path, *path.parents)]


def _left_in(group: Path) -> int | None:
    """Return what a control group leaves of its limit; files in its cache can be dropped."""
    limit, used = _text(group / "memory.max"), _text(group / "memory.current")
    if not limit.strip().isdecimal() or not used.strip().isdecimal():
        return None
    stat = dict(line.split() for line in _text(group / "memory.stat").splitlines())
    return max(0, int(limit) - int(used) + int(stat.get("inactive_file", 0)))


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
