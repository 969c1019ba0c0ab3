"""Kill a process at the k-th file operation: before it, after it, or in the middle of a write.

Operations of all threads are counted together. Files that are opened for writing get a raw file
below their buffer whose writes are operations, too, so that nothing is written unnoticed.
"""

from __future__ import annotations

import builtins
import fcntl
import io
import itertools
import os
import signal
from collections.abc import Callable
from typing import Any

MOMENTS = ("before", "middle", "after")
NAMES = (
    *("mkdir", "open", "write", "pwrite", "fsync", "fdatasync", "close", "rename", "replace"),
    *("unlink", "remove", "rmdir", "link", "symlink", "ftruncate", "truncate", "sendfile"),
)
"""Functions of `os` that are operations."""


def die() -> None:
    """End this process as kill -9 does, from whichever thread."""
    os.kill(os.getpid(), signal.SIGKILL)
    while True:
        signal.pause()


class Faults:
    """Counts the file operations of a process from `install` on, and ends it at one of them.

    `at` is the operation, from 1 on, and 0 to count only; `writes` are those that have a middle.
    """

    def __init__(self, at: int = 0, moment: str = "before", end: Callable[[], None] = die) -> None:
        self.at, self.moment, self.end = at, moment, end
        self._numbers = itertools.count(1)  # its next() is atomic, whichever thread calls
        self.count = 0
        self.writes: set[int] = set()

    def around(self, act: Callable[..., Any], *given: Any, **options: Any) -> Any:
        """Carry out one operation."""
        mine = self._next()
        if mine and self.moment == "before":
            self.end()
        found = act(*given, **options)
        if mine and self.moment != "before":
            self.end()
        return found

    def write(self, act: Callable[..., int], *before: Any, data: Any, **options: Any) -> int:
        """Write, or half of it."""
        mine = self._next()
        self.writes.add(self.count)
        if mine and self.moment == "before":
            self.end()
        if mine and self.moment == "middle":
            view = memoryview(data).cast("B")
            act(*before, view[: len(view) // 2], **options)
            self.end()
        found = act(*before, data, **options)
        if mine:
            self.end()
        return found

    def _next(self) -> bool:
        self.count = next(self._numbers)
        return self.count == self.at

    def install(self) -> Faults:
        """Replace the functions, for the rest of this process's life."""
        for name in NAMES:
            plain = getattr(os, name)
            if name in ("write", "pwrite"):
                setattr(os, name, self._writing(plain))
            else:
                setattr(os, name, self._wrapped(plain))
        fcntl.flock = self._wrapped(fcntl.flock)
        fcntl.lockf = self._wrapped(fcntl.lockf)
        builtins.open = io.open = self._opener(builtins.open)  # type: ignore[assignment]
        return self

    def _wrapped(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*given: Any, **options: Any) -> Any:
            return self.around(plain, *given, **options)

        return wrapped

    def _writing(self, plain: Callable[..., int]) -> Callable[..., int]:
        def wrapped(file: int, data: Any, *more: Any) -> int:
            if file <= 2:  # what is said to the user is no file operation
                return plain(file, data, *more)
            return self.write(lambda piece: plain(file, piece, *more), data=data)

        return wrapped

    def _opener(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        faults = self

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:
                return faults.write(super().write, data=data)

            def close(self) -> None:
                if self.closed:
                    super().close()
                else:
                    faults.around(super().close)

        def opened(
            file: Any,
            mode: str = "r",
            buffering: int = -1,
            encoding: str | None = None,
            errors: str | None = None,
            newline: str | None = None,
            closefd: bool = True,
            opener: Any = None,
        ) -> Any:
            if not {*mode} & {*"wax+"} or (isinstance(file, int) and file <= 2):
                return plain(file, mode, buffering, encoding, errors, newline, closefd, opener)
            raw = faults.around(Raw, file, mode.replace("b", "").replace("t", ""), closefd, opener)
            if buffering == 0:
                return raw
            size = buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE
            kind = io.BufferedRandom if "+" in mode else io.BufferedWriter
            buffer = kind(raw, size)
            if "b" in mode:
                return buffer
            return io.TextIOWrapper(buffer, encoding, errors, newline, buffering == 1)

        return opened
