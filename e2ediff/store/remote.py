"""Work with stores that fail now and then: try again, and read back what was written."""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from random import SystemRandom
from typing import Any, ParamSpec, TypeVar

from e2ediff.errors import E2EDiffError

P = ParamSpec("P")
T = TypeVar("T")

PAUSES = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
"""Seconds between the attempts of an operation, each varied by half."""

PIECE = 1 << 22

_REFUSED = (
    *(FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError),
    *(NotImplementedError, ValueError, TypeError, AttributeError, ImportError),
)
_FINAL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
_chance = SystemRandom()  # draws from no generator that training uses


def retried(act: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `act`, and again after errors that may pass; refusals are raised at once."""
    for pause in PAUSES:
        try:
            return act(*args, **kwargs)
        except Exception as error:  # drivers of stores raise exceptions of any kind
            if _is_final(error):
                raise
        time.sleep(pause * _chance.uniform(0.5, 1.5))
    return act(*args, **kwargs)


def _is_final(error: Exception) -> bool:
    """Return whether a store refused: something is missing or not allowed, or it is full."""
    refused = isinstance(error, OSError) and error.errno in _FINAL
    return refused or isinstance(error, _REFUSED) or "Credential" in type(error).__name__


class Retrying:
    """A file system whose operations are tried again after errors that may pass."""

    def __init__(self, fs: Any) -> None:
        self.fs = fs

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.fs, name)
        return partial(retried, found) if callable(found) else found

    def pieces(self, path: str, size: int) -> Iterator[bytes]:
        """Yield a file's content; where reading fails, the file is opened again and continued."""
        at, file = 0, None

        def piece() -> bytes:
            nonlocal file
            try:
                if file is None:
                    file = self.fs.open(path, "rb")
                    if at:
                        file.seek(at)
                found: bytes = file.read(PIECE)
                if not found and at < size:
                    raise OSError(errno.EIO, f"it ended after {at:,} of {size:,} bytes", path)
            except BaseException:
                file = None
                raise
            return found

        while found := retried(piece):
            at += len(found)
            yield found

    def upload(
        self, path: str, send: Callable[[], object], content: Callable[[], Iterable[bytes]]
    ) -> None:
        """Write a file by `send`, and read its size and content back.

        Where the store reports an MD5 hash, as S3 and GCS do for objects of one part, that is
        compared; elsewhere the file is read again.

        Args:
            path: The file.
            send: Writes it.
            content: Returns what it should hold then, in pieces.

        Raises:
            OSError: It holds something else after several attempts.
        """

        def attempt() -> None:
            self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            send()
            try:
                right = self._holds(path, content)
            except FileNotFoundError:  # it is not listed yet
                right = False
            if not right:
                raise OSError(errno.EIO, "it does not hold the bytes that were written", path)

        retried(attempt)

    def _holds(self, path: str, content: Callable[[], Iterable[bytes]]) -> bool:
        self.fs.invalidate_cache()
        info = self.fs.info(path)
        tag, known = str(info.get("ETag", "")).strip('"'), str(info.get("md5Hash", ""))
        md5, size = hashlib.md5(usedforsecurity=False), 0
        for piece in content():
            size += len(piece)
            if len(tag) == 32 or known:
                md5.update(piece)
        if int(info["size"]) != size:
            return False
        if tag == md5.hexdigest() or known == base64.b64encode(md5.digest()).decode():
            return True
        found, wanted = hashlib.sha256(), hashlib.sha256()  # their pieces may differ in length
        for piece in content():
            wanted.update(piece)
        for piece in self.pieces(path, size):
            found.update(piece)
        return found.digest() == wanted.digest()


class Log:
    """Lines of a file that grows, for a store where it must be written again as a whole.

    Lines are held back for some seconds, and for long enough that writing takes at most a tenth
    of the time.
    """

    HOLD = 10.0

    def __init__(self, content: bytes) -> None:
        self.content = bytearray(content)
        self.pending = False
        self._due = 0.0

    def add(self, line: bytes) -> bool:
        """Add a line; return whether it is time to write."""
        self.content += line
        self.pending = True
        return time.monotonic() >= self._due

    def written(self, seconds: float) -> None:
        """Record that all lines were written, which took these seconds."""
        self.pending = False
        self._due = time.monotonic() + max(self.HOLD, 10 * seconds)


def move_tree(fs: Any, old: str, new: str) -> None:
    """Move a file or directory of a store; an interrupted move copies all files again.

    Works file by file where `mv` would take a name for a pattern, or put `old` into `new`, and
    could not be repeated after an error.
    """
    fs.invalidate_cache()
    for path in fs.find(old):
        target = new + str(path)[len(old) :]
        fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        fs.cp_file(path, target)
    with contextlib.suppress(FileNotFoundError):  # an attempt that seemed to fail
        remove_tree(fs, old)


def remove_tree(fs: Any, path: str) -> None:
    """Delete a directory of a store, file by file where `rm` would take its name for a pattern."""
    if not set("*?[") & {*path}:
        fs.rm(path, recursive=True)
        return
    if not fs.exists(path):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    inside = fs.find(path, withdirs=True, detail=True)
    for found in sorted(inside, key=len, reverse=True):
        if inside[found]["type"] != "directory":
            fs.rm_file(found)
        else:
            with contextlib.suppress(OSError):  # object stores have none, or removed it
                fs.rmdir(found)


@contextlib.contextmanager
def as_oserror() -> Iterator[None]:
    """Turn the exceptions of remote stores, which can be of any kind, into OSError."""
    try:
        yield
    except (OSError, E2EDiffError):
        raise
    except Exception as error:
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error
