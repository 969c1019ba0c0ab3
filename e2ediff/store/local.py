"""Write files of a local disk so that what is there survives a kill or a loss of power."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator

from e2ediff.store.remote import PIECE


@contextlib.contextmanager
def replacing(full: str) -> Iterator[int]:
    """Open a new local file, which durably replaces `full` when the block ends without error."""
    folder, name = os.path.split(full)
    make_dirs(folder)
    temporary = os.path.join(folder, f".tmp-{name}-{secrets.token_hex(4)}")
    try:
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            yield file
            os.fsync(file)
        finally:
            os.close(file)
        os.replace(temporary, full)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_dir(folder)


def pieces_of(path: str) -> Iterator[bytes]:
    """Yield a local file's content."""
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            yield piece


def write_all(file: int, data: bytes | memoryview) -> None:
    """Write all bytes, however many the system takes at once."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest) :]


def make_dirs(folder: str) -> None:
    """Make a local directory and what it lies in, durably.

    Raises:
        NotADirectoryError: something else has the name of one.
    """
    missing = []
    while folder and not os.path.isdir(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):
            os.mkdir(path)
        if not os.path.isdir(path):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        sync_dir(os.path.dirname(path))


def sync_dir(folder: str) -> None:
    """Wait until the names in a local directory are on the disk."""
    file = os.open(folder or "/", os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        # Some network file systems cannot fsync a directory.
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:
            raise
    finally:
        os.close(file)
