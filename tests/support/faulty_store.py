"""A store in memory that fails now and then, as object stores do; what fails follows a seed.

Addresses are `faulty://NAME/...`; a test sets `FAULTS` and restores it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractFileSystem


class Faults:
    """What goes wrong: `rate` of the calls, `slow` seconds a write, a disk full for tensors."""

    def __init__(self) -> None:
        self.rate = self.slow = 0.0
        self.full = False
        self.tagged = False  # whether objects have their MD5 hash as ETag
        self.undeletable = 0.0  # share of deletions that are refused
        self.chance = random.Random(0)
        self.met: dict[str, int] = {}
        self.calls: dict[str, int] = {}

    def hits(self, kind: str) -> bool:
        if self.chance.random() >= self.rate:
            return False
        self.met[kind] = self.met.get(kind, 0) + 1
        return True


FAULTS = Faults()


class ThrottledError(Exception):
    """An error of the driver: neither an OSError nor one of ours."""


class _Objects(MemoryFileSystem):
    """The objects, apart from those of `memory://`."""

    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]


class FaultyFileSystem(AbstractFileSystem):
    """Before, after or during a call it fails; it writes and reads other bytes; it lists late."""

    protocol = "faulty"
    objects = _Objects()
    newest = ""

    @classmethod
    def _strip_protocol(cls, path):
        return _Objects._strip_protocol(path.replace("faulty://", "memory://"))

    def _enter(self, call: str) -> None:
        FAULTS.calls[call] = FAULTS.calls.get(call, 0) + 1
        if FAULTS.hits("fails before"):
            raise ThrottledError("slow down")

    def _leave(self) -> None:
        if FAULTS.hits("fails after"):
            raise OSError(5, "connection reset")

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        self._enter("write")
        time.sleep(FAULTS.slow)
        if FAULTS.full and path.endswith(".safetensors"):
            raise OSError(28, "No space left on device")
        path, value = self._strip_protocol(path), bytes(value)
        if FAULTS.hits("writes a part"):
            value = value[: len(value) // 2]
        elif value and FAULTS.hits("writes other bytes"):
            at = FAULTS.chance.randrange(len(value))
            value = value[:at] + bytes([value[at] ^ 1]) + value[at + 1 :]
        self.objects.pipe_file(path, value, mode=mode)
        FaultyFileSystem.newest = path
        self._leave()

    def put_file(self, lpath, rpath, **kwargs):
        self.pipe_file(rpath, Path(lpath).read_bytes())

    def _open(self, path, mode="rb", **kwargs):
        self._enter("read")
        content = self.objects.cat_file(path)
        if content and FAULTS.hits("reads other bytes"):
            content = content[:-1] + bytes([content[-1] ^ 1])
        elif FAULTS.hits("reads a part"):
            content = content[: len(content) // 2]
        return io.BytesIO(content)

    def info(self, path, **kwargs):
        self._enter("info")
        path = self._strip_protocol(path)
        if path == self.newest and FAULTS.hits("lists late"):
            raise FileNotFoundError(path)
        found = self.objects.info(path)
        if FAULTS.tagged and found["type"] == "file":
            found["ETag"] = f'"{hashlib.md5(self.objects.cat_file(path)).hexdigest()}"'
        return found

    def ls(self, path, detail=True, **kwargs):
        self._enter("list")
        found = self.objects.ls(self._strip_protocol(path), detail=True)
        if FAULTS.hits("lists late"):
            found = [entry for entry in found if entry["name"] != self.newest]
        return found if detail else sorted(entry["name"] for entry in found)

    def makedirs(self, path, exist_ok=False):
        """There are no directories."""

    def rm_file(self, path):
        self._enter("delete")
        if FAULTS.chance.random() < FAULTS.undeletable:
            raise PermissionError(13, "not allowed", path)
        self.objects.rm_file(self._strip_protocol(path))

    def rm(self, path, recursive=False, maxdepth=None):
        for found in self.find(path):
            self.rm_file(found)

    def cp_file(self, path1, path2, **kwargs):
        self._enter("copy")
        self.objects.cp_file(self._strip_protocol(path1), self._strip_protocol(path2))
        self._leave()


@contextlib.contextmanager
def faults(**given: Any) -> Iterator[Faults]:
    """Let these go wrong inside; nothing does outside."""
    fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
    before = dict(vars(FAULTS))
    vars(FAULTS).update(vars(Faults()) | given)
    try:
        yield FAULTS
    finally:
        vars(FAULTS).update(before)


@contextlib.contextmanager
def without_faults() -> Iterator[None]:
    """Let nothing go wrong inside."""
    with_faults = dict(vars(FAULTS))
    vars(FAULTS).update(rate=0.0, slow=0.0, full=False, undeletable=0.0)
    try:
        yield
    finally:
        vars(FAULTS).update(with_faults)
