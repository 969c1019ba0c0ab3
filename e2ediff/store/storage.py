"""Access the files of a run: a `Store` over a local directory or any address fsspec knows.

Local writes are atomic and durable: temporary file, fsync, rename, fsync of the directory.
Other stores get each object whole. Failed writes raise `ResourceError`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeAlias, TypeVar

from e2ediff import addresses
from e2ediff.addresses import Address
from e2ediff.errors import ResourceError, RunDirectoryError, is_refusal
from e2ediff.limits import OversizedError, check_memory, check_size
from e2ediff.store.local import make_dirs, pieces_of, replacing, sync_dir, write_all
from e2ediff.store.remote import PIECE, Log, Retrying, as_oserror, move_tree, remove_tree

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EROFS, errno.EACCES, errno.EPERM}
_NOTHING = {errno.ELOOP, errno.ENAMETOOLONG}  # a link to itself; a name that none can have
_LONGEST = 1 << 20  # bytes of a line in a log
_T = TypeVar("_T")

_BATCH = 1 << 17  # bytes of lines that are looked at together
_TEMPORARY = re.compile(r"\.tmp-(.+)-[0-9a-f]{8}")


class Store:
    """The files below one address; every path is relative to it, with forward slashes.

    Reading raises OSError, as the caller knows what a missing file means; writing raises
    ResourceError; `rename_dir`, `remove_dir` and `remove_file` return the error instead.
    `option` is the command-line option of the address, for messages.

    Raises:
        RunDirectoryError: the address is not allowed, or no file system for it is installed.
    """

    def __init__(self, url: Address, option: str = "--out") -> None:
        url = addresses.plain(url)
        self.url = url.rstrip("/") or url
        self.option = option
        if what := addresses.refusal(url, typed=True):
            raise RunDirectoryError(f"{url}: cannot be used: {what}.")
        try:
            self._fs, root = addresses.file_system(url, typed=True)
        except ImportError as error:
            raise RunDirectoryError(
                f"{url}: cannot be used: {error}. Give a local path, or install the package "
                "that fsspec needs for this kind of address."
            ) from error
        except Exception as error:  # drivers of stores raise exceptions of any kind
            raise RunDirectoryError(
                f"{url}: cannot be used: {type(error).__name__}: {error}. Check the address, and "
                "for a remote store its credentials and your connection."
            ) from error
        self._root = root.rstrip("/")
        self.local = addresses.is_local(self._fs)
        self.guard: Callable[[], None] | None = None  # called before anything is changed
        self.holds_back = False  # whether appended lines may wait for `flush`, if not local
        self._logs: dict[str, Log] = {}
        if not self.local:
            self._fs = Retrying(self._fs)

    def inside(self, path: str) -> Store:
        """Return the store of a directory in this one, with the same guard."""
        store = Store(self.where(path), self.option)
        store.guard = self.guard
        return store

    def where(self, path: str = "") -> str:
        """Return the address of a path for messages, spelled as the user spelled the store's."""
        return f"{self.url.rstrip('/')}/{path}" if path else self.url

    def local_path(self, path: str = "") -> str | None:
        """Return the path in the local file system; None on any other store."""
        return self._full(path) if self.local else None

    def read(self, path: str, limit: int | None = None) -> bytes:
        """Read the whole content; OSError if it is missing, or longer than `limit` bytes.

        Without a limit it must fit into the memory that is free.
        """
        try:
            size = self.size(path)
            check_memory(size) if limit is None else check_size(size, "such a file", limit)
        except OversizedError as error:
            raise OSError(errno.EFBIG, str(error), self.where(path)) from error
        return b"".join(self.chunks(path))

    def chunks(self, path: str) -> Iterator[bytes]:
        """Yield the content in pieces of some megabytes, for hashing without holding all of it."""
        size = self.size(path)  # refuses pipes and devices, which could block when opened
        if not self.local:
            with as_oserror():
                yield from self._fs.pieces(self._full(path), size)
            return
        with self._fs.open(self._full(path), "rb") as file:
            while chunk := file.read(PIECE):
                yield chunk

    def lines(self, path: str, *, torn: bool = False) -> Iterator[tuple[int, bytes]]:
        """Yield each line without its newline, and where it ends, in little memory.

        A line of more than a megabyte, which no log has, is yielded empty.

        Args:
            path: The file.
            torn: Whether a last line without a newline is yielded, too.
        """
        end, line, length = 0, bytearray(), 0  # of the line so far; its bytes, unless too long
        for chunk in self.chunks(path):
            for start in range(0, len(chunk), _BATCH):
                first, *others = chunk[start : start + _BATCH].split(b"\n")
                length += len(first)
                if length <= _LONGEST:
                    line += first
                else:
                    line.clear()
                if not others:
                    continue
                end += length + 1
                yield end, bytes(line)
                *whole, last = others
                for content in whole:
                    end += len(content) + 1
                    yield end, content
                line, length = bytearray(last), len(last)
        if torn and length:
            yield end + length, bytes(line)

    def json_lines(self, path: str) -> Iterator[dict[str, Any]]:
        """Yield the objects of a file of JSON lines, without damaged lines; none if it is missing.

        Lines that a crash cut short are among the damaged ones.
        """
        for _, line in self.lines(path, torn=True) if self.exists(path) else ():
            with contextlib.suppress(ValueError, RecursionError):
                if isinstance(values := json.loads(line), dict):
                    yield values

    def size(self, path: str) -> int:
        """Return the bytes of a file; OSError if it is missing or not a regular file."""
        if self.local:
            found = os.stat(self._full(path))
            if not stat.S_ISREG(found.st_mode):
                raise OSError(errno.EINVAL, "not a regular file", self.where(path))
            return found.st_size
        self._settle(path)
        with as_oserror():
            info = self._fs.info(self._full(path))
        if info.get("type") != "file":
            raise OSError(errno.EINVAL, "not a regular file", self.where(path))
        return int(info["size"])

    def exists(self, path: str) -> bool:
        """Return whether there is a file or directory of this name.

        OSError where that cannot be told, as in a folder that may not be searched.
        """
        if self.local:
            try:
                os.lstat(self._full(path))
            except (OSError, ValueError) as error:
                if is_refusal(error) and getattr(error, "errno", None) not in _NOTHING:
                    raise
                return False
            return True
        self._settle(path)
        self._fs.invalidate_cache()
        with as_oserror():
            return bool(self._fs.exists(self._full(path)))

    def list(self, path: str = "") -> list[str]:
        """Return the sorted names inside a directory, hidden ones too; empty if it is missing."""
        full = self._full(path)
        try:
            if self.local:
                return sorted(os.listdir(full))
            self._fs.invalidate_cache()
            with as_oserror():
                found = self._fs.ls(full, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            if error.errno in _NOTHING:
                return []
            raise
        # Some object stores list the prefix itself as an empty object.
        inside = [str(name).rstrip("/") for name in found]
        return sorted({n.rpartition("/")[2] for n in inside if n.strip("/") != full.strip("/")})

    def is_vacant(self, besides: Collection[str] = ()) -> bool:
        """Return whether the store holds no files except leftovers of killed writes.

        `besides` are names at the top that are ignored.
        """
        return all(
            name in besides or name.startswith(".tmp-") or self._is_hollow(name)
            for name in self.list()
        )

    def _is_hollow(self, path: str) -> bool:
        full = self._full(path)
        if self.local:
            if os.path.islink(full) or not os.path.isdir(full):
                return False
            files = [name for _, _, found in os.walk(full) for name in found]
        else:
            with as_oserror():
                if not self._fs.isdir(full):
                    return False
                files = [name.rpartition("/")[2] for name in self._fs.find(full)]
        return all(name.startswith(".tmp-") for name in files)

    def sweep(self, path: str, ours: Callable[[str], bool], before: float = math.inf) -> None:
        """Remove leftovers of killed writes of the files in a directory whose names are `ours`.

        Only files written before `before`, in seconds since 1970, are removed.
        """
        for name in self.list(path) if self.local else ():
            full = self._full(f"{path}/{name}" if path else name)
            if (match := _TEMPORARY.fullmatch(name)) and ours(match[1]):
                with contextlib.suppress(OSError):
                    if os.lstat(full).st_mtime < before:
                        os.unlink(full)

    def write(
        self, path: str, data: bytes | Iterable[bytes | memoryview], needed: int = 0
    ) -> None:
        """Replace a file: readers and crashes see the old content or the new, never a part.

        `data` may be pieces of `needed` bytes together, which are written as they come; other
        stores than the local one get them joined.

        Raises:
            ResourceError: no space, no permission, or the remote store refused.
        """
        pieces = [data] if isinstance(data, bytes) else data
        with self._refusals(path, needed or (len(data) if isinstance(data, bytes) else 0)):
            if self.local:
                with replacing(self._full(path)) as file:
                    for piece in pieces:
                        write_all(file, piece)
            else:
                self._logs.pop(path, None)
                self.upload(path, b"".join(pieces))

    def create(self, path: str, data: bytes) -> bool:
        """Write a file unless there is one, in a store that is not local.

        Returns:
            Whether that was atomic: otherwise read it, to see whose content it has.

        Raises:
            ResourceError: the store refused.
        """
        full = self._full(path)
        with self._refusals(path, len(data)):
            self._fs.makedirs(full.rpartition("/")[0], exist_ok=True)
            try:
                self._fs.pipe_file(full, data, mode="create")
            except FileExistsError:
                pass  # by an earlier attempt of this one, or by another process
            except (NotImplementedError, TypeError, ValueError):
                if not self.exists(path):
                    self.upload(path, data)
                return False
        return True

    def upload(self, path: str, data: bytes) -> None:
        """Write a file of a store that is not local, without a look at `guard`.

        Raises:
            OSError: the store refused.
        """
        full = self._full(path)
        self._fs.upload(full, partial(self._fs.fs.pipe_file, full, data), lambda: [data])

    @contextlib.contextmanager
    def writing(self, path: str, needed: int = 0) -> Iterator[IO[bytes]]:
        """Open a file that replaces `path` when the block ends without error.

        For stores that are not local it is collected in the local directory for temporary files.
        `needed` is its expected size in bytes, for the message of a full disk.

        Raises:
            ResourceError: no space, no permission, or the remote store refused.
        """
        full = self._full(path)
        with self._refusals(path, needed):
            if not self.local:
                self._logs.pop(path, None)
                with tempfile.NamedTemporaryFile(prefix="e2ediff-") as scratch:
                    yield scratch
                    scratch.flush()
                    self._fs.upload(
                        full,
                        partial(self._fs.fs.put_file, scratch.name, full),
                        lambda: pieces_of(scratch.name),
                    )
            else:
                with replacing(full) as number, os.fdopen(number, "wb", closefd=False) as file:
                    yield file

    def append(self, path: str, line: str) -> None:
        """Append one line and a newline; flushed to the system, not fsynced.

        Other stores than the local one cannot append: the file is written again, at once or, if
        the store `holds_back`, together with later lines.

        Raises:
            ResourceError: the line could not be written; locally the file is as it was before.
        """
        data = line.encode() + b"\n"
        with self._refusals(path, len(data)):
            if not self.local:
                if path not in self._logs:
                    self._logs[path] = Log(self.read(path) if self.exists(path) else b"")
                if self._logs[path].add(data) or not self.holds_back:
                    self._write_log(path)
                return
            full = self._full(path)
            make_dirs(os.path.dirname(full))
            file = addresses.own_file(full, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            try:
                before = os.fstat(file).st_size
                try:
                    write_all(file, data)
                except OSError:
                    # Remove an incomplete line, which would merge with the next one.
                    with contextlib.suppress(OSError):
                        os.ftruncate(file, before)
                    raise
            finally:
                os.close(file)

    def flush(self) -> None:
        """Write appended lines that were held back.

        Raises:
            ResourceError: the store refused.
        """
        for path, log in self._logs.items():
            if log.pending:
                with self._refusals(path, len(log.content)):
                    self._write_log(path)

    def _write_log(self, path: str) -> None:
        log, began = self._logs[path], time.monotonic()
        self.upload(path, bytes(log.content))
        log.written(time.monotonic() - began)

    def _settle(self, path: str) -> None:
        """Write lines of this file that were held back, before it is read."""
        log = self._logs.get(path)
        if log and log.pending:
            with self._refusals(path, len(log.content)):
                self._write_log(path)

    def truncate_lines(
        self,
        path: str,
        keep: Callable[[bytes], bool] | None = None,
        keep_all: Callable[[Sequence[bytes]], bool] = lambda lines: False,
    ) -> int:
        """Drop an incomplete last line, and all lines that `keep` refuses; return their number.

        The file is copied in chunks, if anything is dropped. Without `keep` only its end is read.
        `keep_all` is asked first, of many lines at once.

        Raises:
            ResourceError: the shortened file could not be written; the old one stays.
        """
        if not self.exists(path):
            return 0
        if not self.local:  # its logs are in memory anyway, to be written as a whole
            with self._refusals(path, 0):
                *lines, torn = self.read(path).split(b"\n")
            whole = [line for line in lines if keep is None or keep(line)]
            if torn or len(whole) < len(lines):
                self.write(path, b"".join(line + b"\n" for line in whole))
            return len(lines) - len(whole) + bool(torn)
        kept, dropped = array("q", (0, 0)), 0  # start and end of each range that stays
        with self._refusals(path, 0):
            size = self.size(path)
            if keep is None:
                kept[1] = self._whole_lines(path, size)
            else:
                start, all_stay = 0, True
                for batch in batches(self.lines(path), lambda found: len(found[1])):
                    # After the first line that goes, most do: they need not be parsed twice.
                    all_stay = all_stay and keep_all([line for _, line in batch])
                    for end, line in batch[-1:] if all_stay else batch:
                        if not all_stay and not keep(line):
                            dropped += 1
                        elif kept[-1] == start:
                            kept[-1] = end
                        else:
                            kept.extend((start, end))
                        start = end
                dropped += size > start
        if keep is None:
            dropped = int(size > kept[1])
        if dropped:
            self._keep_ranges(path, kept)
        return dropped

    def _whole_lines(self, path: str, size: int) -> int:
        """Return where the last whole line of a file ends, reading from the end."""
        with self._fs.open(self._full(path), "rb") as file:
            stop = size
            while stop:
                start = max(0, stop - PIECE)
                file.seek(start)
                found: int = file.read(stop - start).rfind(b"\n")
                if found >= 0:
                    return start + found + 1
                stop = start
        return 0

    def _keep_ranges(self, path: str, kept: Sequence[int]) -> None:
        """Replace a file by these ranges of its bytes, given as start, end, start, end, ..."""
        with (
            self._fs.open(self._full(path), "rb") as old,
            self.writing(path, sum(kept[1::2]) - sum(kept[::2])) as new,
        ):
            for start, end in zip(kept[::2], kept[1::2], strict=True):
                old.seek(start)
                while start < end and (chunk := old.read(min(PIECE, end - start))):
                    new.write(chunk)
                    start += len(chunk)

    def copy(self, old: str, new: str) -> None:
        """Copy a file in chunks; the copy is there as a whole or not at all.

        Raises:
            OSError: The file cannot be read.
            ResourceError: The copy could not be written.
        """
        with self.writing(new, self.size(old)) as file:
            for chunk in self.chunks(old):
                file.write(chunk)

    def rename_dir(self, old: str, new: str) -> OSError | None:
        """Rename a directory: atomic and durable locally, by copying and deleting elsewhere."""
        return self._error_of(self._move, old, new)

    def move(self, old: str, new: str) -> None:
        """Move a file or directory; repeating an interrupted move completes it.

        Raises:
            ResourceError: the disk or store refused; nothing is lost.
        """
        source, target = self._full(old), self._full(new)
        self.flush()
        self._logs.clear()
        with self._refusals(new, 0):
            self._move(source, target)

    def _move(self, source: str, target: str) -> None:
        if not self.local:
            move_tree(self._fs, source, target)
            return
        before, after = os.path.dirname(source), os.path.dirname(target)
        make_dirs(after)
        os.rename(source, target)
        for folder in dict.fromkeys((after, before)):
            sync_dir(folder)

    def remove_dir(self, path: str) -> OSError | None:
        """Delete a directory and its content; a missing one is no error."""
        remove = shutil.rmtree if self.local else partial(remove_tree, self._fs)
        return self._error_of(remove, path, missing_ok=True)

    def remove_file(self, path: str) -> OSError | None:
        """Delete one file; a missing one is no error."""
        return self._error_of(os.unlink if self.local else self._fs.rm_file, path, missing_ok=True)

    def _error_of(
        self, act: Callable[..., object], *paths: str, missing_ok: bool = False
    ) -> OSError | None:
        """Call `act` with full paths, and return the error with which it failed."""
        try:
            with self._system_errors():
                if self.guard:
                    self.guard()
                act(*map(self._full, paths))
        except OSError as error:
            return None if missing_ok and isinstance(error, FileNotFoundError) else error
        return None

    def create_dir(self, path: str, holding: str) -> bool:
        """Create a local directory with an empty file in it, atomically; False if it exists.

        So a kill leaves no empty directory, which could not be told from one of the user.

        Raises:
            ResourceError: the directory could not be made.
        """
        full = self._full(path)
        if os.path.lexists(full):
            return False
        folder, name = os.path.split(full)
        hidden = os.path.join(folder, f".tmp-{name}-{secrets.token_hex(4)}")
        with self._refusals(path, 0):
            make_dirs(folder)
            try:
                os.mkdir(hidden)
                with open(os.path.join(hidden, holding), "xb"):
                    pass
                os.rename(hidden, full)
            except OSError:
                shutil.rmtree(hidden, ignore_errors=True)
                if not os.path.isdir(full):  # another process was faster
                    raise
                return False
            sync_dir(folder)
        with contextlib.suppress(OSError):  # a folder may not be listable
            for found in os.listdir(folder):  # left by creations that were killed or came too late
                if (match := _TEMPORARY.fullmatch(found)) and match[1] == name:
                    shutil.rmtree(os.path.join(folder, found), ignore_errors=True)
        return True

    def create_unique_dir(self, base: str, holding: str) -> str:
        """Create directory `base`, or `base-2`, `base-3`, ..., and return its path.

        Locally it has an empty file `holding`, and only one process gets it. The number is above
        all existing ones, so that the highest is the newest.

        Raises:
            ResourceError: the directory could not be made.
        """
        parent, _, name = base.rpartition("/")
        pattern = re.compile(re.escape(name) + r"(?:-(\d{1,4}))?")
        with self._refusals(base, 0):
            matches = [pattern.fullmatch(found) for found in self.list(parent)]
            number = max((int(match[1] or 1) for match in matches if match), default=0) + 1
            while True:
                path = base if number == 1 else f"{base}-{number}"
                if self.local:
                    if self.create_dir(path, holding):
                        return path
                elif not self.list(path):
                    self._fs.makedirs(self._full(path), exist_ok=True)
                    return path
                number += 1

    def free_bytes(self) -> int | None:
        """Return the bytes that may still be written here; None if unknown."""
        if not self.local:
            return None
        place = Path(self._root or "/")
        with contextlib.suppress(OSError):
            return shutil.disk_usage(next(p for p in (place, *place.parents) if p.exists())).free
        return None

    def refusal(self, path: str, needed: int, error: Exception) -> ResourceError:
        """Return the user error for a failed write of `needed` bytes at a path."""
        code = error.errno if isinstance(error, OSError) else None
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        free = self.free_bytes()
        space = "unknown" if free is None else f"{free:,} bytes"
        if code in _FULL:
            advice = (
                f"Free space there, or choose another {self.option}; what was saved before is "
                "intact."
            )
        elif code in _DENIED:
            advice = f"Choose another {self.option}, one that you may write to."
        elif code == errno.ELOOP:
            reason = "it is a link, and nothing is written through one"
            advice = "Put a copy of the file that it leads to in its place, or remove it."
        else:
            advice = f"Check that the disk or store is reachable, or choose another {self.option}."
        return ResourceError(
            f"{self.where(path)}: cannot write: {reason} "
            f"(needed: {needed:,} bytes, free: {space}). {advice}"
        )

    @contextlib.contextmanager
    def _refusals(self, path: str, needed: int) -> Iterator[None]:
        try:
            with self._system_errors():
                if self.guard:
                    self.guard()
                yield
        except OSError as error:
            raise self.refusal(path, needed, error) from error

    def _system_errors(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.local else as_oserror()

    def _full(self, path: str) -> str:
        parts = path.split("/") if path else []
        if any(part in {"", ".", ".."} or "\0" in part for part in parts):
            raise ValueError(f"not a plain relative path: {path!r}")
        return "/".join([self._root, *parts]) or "/"


def batches(lines: Iterable[_T], size: Callable[[_T], int]) -> Iterator[list[_T]]:
    """Yield lines, whose sizes in bytes `size` gives, in batches of some hundred."""
    batch: list[_T] = []
    held = 0
    for line in lines:
        batch.append(line)
        held += size(line)
        if held >= _BATCH:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch
