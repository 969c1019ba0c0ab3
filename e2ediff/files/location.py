"""Files through fsspec, from any process: a path, or `s3://`, `gs://`, `hf://`, `zip://`, ..."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import attrs

from e2ediff import addresses
from e2ediff.addresses import Address
from e2ediff.errors import DataError
from e2ediff.files.images import read_file
from e2ediff.files.names import is_hidden
from e2ediff.limits import check_memory

_BRACES = re.compile(r"\{([^{}]*)\}")
_MOST_BRACES = 16
_MOST_BYTES = 1 << 27  # of all texts that a pattern stands for
_TEXT = 50  # bytes that a text needs besides its letters


class Location:
    """One address and its file system, which each process opens for itself.

    `option` is the recipe's key that has the address, for messages.

    Raises:
        DataError: A recipe may not have this address, or no file system for it is installed.
    """

    def __init__(self, url: Address, option: str) -> None:
        self.url = url = addresses.plain(url)
        self.option = option
        self._fs: Any = None
        self._owner = -1
        if what := addresses.refusal(url):
            raise DataError(f"{option}: cannot open {url}: {what}")
        try:
            self._fs, self.path = addresses.file_system(url)
        except ImportError as error:
            raise DataError(f"{option}: cannot open {url}: {error}.{_install(error)}") from error
        except Exception as error:  # drivers of stores raise what they like
            raise DataError(_refused(option, url, error)) from error
        self._owner = os.getpid()
        self.local = addresses.is_local(self._fs)

    @property
    def fs(self) -> Any:
        """The file system; a forked process must not use its parent's connections."""
        if self._owner != os.getpid():
            self._fs, _ = addresses.file_system(self.url)
            self._owner = os.getpid()
        return self._fs

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_fs": None, "_owner": -1}

    def is_folder(self) -> bool:
        """Return whether a folder is there."""
        return self._asks("isdir")

    def is_file(self) -> bool:
        """Return whether a file is there."""
        return self._asks("isfile")

    def visible(self) -> list[str]:
        """Return the names of what lies in this folder, hidden ones left out.

        Raises:
            DataError: It cannot be listed.
        """
        try:
            paths = self.fs.ls(self.path, detail=False)
        except Exception as error:  # drivers of stores raise what they like
            raise DataError(_refused(self.option, self.url, error)) from error
        names = [str(path).rstrip("/").rpartition("/")[2] for path in paths]
        return sorted(name for name in names if not is_hidden(name))

    def is_file_named(self, *suffixes: str) -> bool:
        """Return whether a file is there whose name ends so, perhaps with `.gz` behind it."""
        return self.url.lower().removesuffix(".gz").endswith(suffixes) and self.is_file()

    def _asks(self, question: str) -> bool:
        try:
            if getattr(self.fs, question)(self.path):
                return True
            if not self.local:
                self.fs.info(self.path)  # a store may answer no where it refuses to look
        except FileNotFoundError:
            pass
        except Exception as error:
            raise DataError(_refused(self.option, self.url, error)) from error
        return False

    def below(self, name: str) -> str:
        """Return the file system's path of a file below this folder."""
        folder = self.path.rstrip("/")
        return f"{folder}/{name}" if folder or self.path else name

    def read_labels(self, path: str) -> bytes:
        """Read a file of labels.

        Raises:
            OSError: It is not there, cannot be read, or is too long once unpacked.
        """
        try:
            return read_file(self.fs, path, "a file of labels")
        except (OSError, ValueError):
            raise
        except Exception as error:  # drivers of stores raise what they like
            raise OSError(f"{type(error).__name__}: {error}") from error

    def read(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        """Read a file, or this range of its bytes.

        Raises:
            OSError: It is not there, or cannot be read.
            OversizedError: It does not fit into the memory that is free.
        """
        try:
            if self.local and start is not None and end is not None:
                with open(path, "rb") as file:  # in a third of fsspec's time
                    file.seek(start)
                    return file.read(end - start)
            if end is None:
                check_memory(self._size(path))
            data: bytes = self.fs.cat_file(path, start=start, end=end)
        except (OSError, ValueError):
            raise
        except Exception as error:
            raise OSError(f"{type(error).__name__}: {error}") from error
        return data

    def _size(self, path: str) -> int:
        """Return the bytes of a file, 0 where its store does not tell."""
        found = self.fs.info(path)
        if found["type"] == "other":  # a pipe might never end, nor begin
            raise OSError(f"{path} is a pipe or a device; expected a file")
        return int(found["size"] or 0)

    @contextmanager
    def opened(self, path: str) -> Iterator[BinaryIO]:
        """Open a file to read from; closed afterwards.

        Raises:
            DataError: It cannot be opened, or not be read in the body.
        """
        try:
            file = self.fs.open(path, "rb")
        except Exception as error:
            raise DataError(_refused(self.option, path, error)) from error
        with file:
            try:
                yield file
            except OSError as error:
                raise DataError(_refused(self.option, path, error)) from error

    def is_pattern(self) -> bool:
        """Return whether the address has braces or `*` and is not itself the name of anything."""
        plain = "*" not in self.url and not _BRACES.search(self.url)
        return not (plain or self.is_file() or self.is_folder())

    def matching(self, folder: str, pattern: str) -> list[str]:
        """Return sorted paths below a folder that a pattern stands for.

        `*` is any text within a name and `**` any folders, hidden ones left out; all else is
        itself. In fsspec's own patterns `[1]` and `?` stand for other characters, too.

        Raises:
            DataError: The store refuses to say.
        """
        return sorted(self._matching(folder, re.sub(r"(\*\*/)+", "**/", pattern), {}))

    def _matching(
        self, folder: str, pattern: str, known: dict[tuple[str, str], set[str]]
    ) -> set[str]:
        """Return the paths; those `known` already are not looked for again.

        Else there would be as many ways to a folder as `**` can be divided among those above it.
        """
        if (folder, pattern) not in known:
            known[folder, pattern] = self._looked_up(folder, pattern, known)
        return known[folder, pattern]

    def _looked_up(
        self, folder: str, pattern: str, known: dict[tuple[str, str], set[str]]
    ) -> set[str]:
        here, _, rest = pattern.partition("/")
        entries = self._entries(folder)
        if here in entries:
            entries = {here: entries[here]}
        elif "*" in here:
            entries = {name: entry for name, entry in entries.items() if not is_hidden(name)}
        fits = _pattern(here)
        found = {*self._matching(folder, rest, known)} if here == "**" and rest else set[str]()
        for name, (path, kind) in entries.items():
            if here == "**":
                found |= self._matching(path, pattern, known) if kind == "directory" else set()
            elif fits.fullmatch(name):
                found |= self._matching(path, rest, known) if rest else {path}
        return found

    def _entries(self, folder: str) -> dict[str, tuple[str, str]]:
        """Return path and type, by name, of all that lies in a folder; empty if there is none."""
        try:
            listed = self.fs.ls(folder, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except Exception as error:
            raise DataError(_refused(self.option, self.url, error)) from error
        found = [(str(entry["name"]).rstrip("/"), str(entry["type"])) for entry in listed]
        # Stores list a folder among what is in it, and a file as being in itself.
        return {p.rpartition("/")[2]: (p, kind) for p, kind in found if p != folder.rstrip("/")}


def _refused(option: str, url: str, error: Exception) -> str:
    said = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    return (
        f"{option}: cannot open {url}: {said.rstrip('.')}. Check the address, and for a remote "
        "store its credentials and your connection"
    )


def _install(error: ImportError) -> str:
    """Say how to get the package that fsspec's error names."""
    found = re.search(r"[Ii]nstall (?:the )?[\"'`]?([\w.-]+)", str(error))
    return f" Run: pip install {found[1]}" if found else ""


@attrs.frozen
class File:
    """A file of a location: its path, its size and when it was written, as far as it is known.

    `arrived` changes when a file comes to its place, also by a copy that keeps the time at which
    it was written.
    """

    path: str
    size: int
    written: str
    arrived: str = ""

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.rpartition("/")[2]

    def beside(self, name: str) -> str:
        """Return the path of another file in the same folder."""
        return f"{self.path.rpartition('/')[0]}/{name}"


def _pattern(name: str) -> re.Pattern[str]:
    """Return what a name with `*` fits.

    Each part is looked for once, where it comes first: to try all places would take ages.
    """
    first, *others = map(re.escape, name.split("*"))
    middle = "".join(f"(?>.*?{part})" for part in others[:-1])
    return re.compile(first + middle + (f".*{others[-1]}" if others else ""), re.DOTALL)


def expand(pattern: str) -> list[str]:
    """List the texts that a pattern with braces stands for: `{0000..0003}`, `{a,b}`, in order.

    Raises:
        DataError: They are more than any data set has.
    """
    many = pattern.count("{") > _MOST_BRACES
    texts = [pattern]
    while texts and not many and _BRACES.search(texts[0]):
        before, texts = texts, []
        for text in before:
            head, inner, tail = _BRACES.split(text, maxsplit=1)
            span = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", inner)
            numbers = range(int(span[1]), int(span[2]) + 1) if span else ()
            words = [] if span else inner.split(",")
            count = len(texts) + len(numbers) + len(words)
            if many := count * (len(pattern) + _TEXT) > _MOST_BYTES:
                break
            words += [f"{i:0{len(span[1])}}" for i in numbers] if span else []
            texts += [f"{head}{word}{tail}" for word in words]
    if many:
        short = pattern if len(pattern) <= 80 else f"{pattern[:77]}..."
        raise DataError(f"{short}: these braces stand for more files than any data set has")
    return texts


def find_files(pattern: Address, option: str, suffix: str) -> tuple[Location, list[File]]:
    """Find files of a pattern with braces and `*`, in its order, or those of a folder, sorted.

    Raises:
        DataError: One of them, or any, is not there.
    """
    pattern = addresses.plain(pattern)
    location = Location(pattern, option)
    paths: list[str] = []
    is_pattern = location.is_pattern()
    for text in expand(pattern) if is_pattern else [pattern]:
        one = Location(text, option)
        if is_pattern and "*" in one.path:
            folder, slash, _ = one.path[: one.path.index("*")].rpartition("/")
            paths += one.matching(folder or slash, one.path[len(folder + slash) :])
        elif text.endswith(suffix) or one.is_file():
            paths.append(one.path)
        else:
            paths += one.matching(one.path, f"*{suffix}")
    paths = list(dict.fromkeys(paths))
    known = _listed(location, paths)
    missing = [path for path in paths if path not in known]
    if missing or not paths:
        what = f"no file {missing[0]}" if missing else f"no files {pattern}"
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(
            f"{option}: {what}{more}. Expected a path or URL of *{suffix} files: one file, a "
            f"folder of them, or a pattern such as train-{{0000..0146}}{suffix} or "
            f"train-*{suffix}"
        )
    return location, [known[path] for path in paths]


def _listed(location: Location, paths: Sequence[str]) -> dict[str, File]:
    """Return what is known of files, with one question for each folder that they are in."""
    found: dict[str, File] = {}
    wanted = set(paths)
    for folder in sorted({path.rpartition("/")[0] for path in paths}):
        try:
            entries = location.fs.ls(folder, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except Exception as error:
            raise DataError(_refused(location.option, location.url, error)) from error
        for entry in entries:
            path = str(entry["name"])
            path = path if path in wanted else f"/{path.lstrip('/')}"
            if path in wanted and entry.get("islink"):
                try:
                    entry = location.fs.info(path)  # a list tells of the link, not of the file
                except FileNotFoundError:
                    continue
                except OSError as error:  # a link to itself
                    raise DataError(_refused(location.option, path, error)) from error
            if path in wanted and entry["type"] == "file":
                # Of a local file "created" is the time of its inode, which nobody can set.
                arrived = str(entry.get("created") or "")
                found[path] = File(path, int(entry["size"] or 0), _written(entry), arrived)
    return found


def _written(entry: dict[str, Any]) -> str:
    for key in ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created"):
        if entry.get(key) is not None:
            return str(entry[key])
    return ""


def fingerprint(files: Sequence[File], *settings: object) -> str:
    """Return a digest that changes when one of the files, or a setting, does."""
    said = repr([(f.name, f.size, f.written) for f in files]) + repr(settings)
    return hashlib.sha256(said.encode()).hexdigest()


class SidecarFile:
    """A small file of ours beside the data, or in `cache_folder` where that is read-only."""

    def __init__(self, location: Location, path: str) -> None:
        self.location = location
        self.path = path
        digest = hashlib.sha256(f"{location.url} {path}".encode()).hexdigest()[:16]
        self.cached = os.path.join(addresses.cache_folder(), f"{digest}-{path.rpartition('/')[2]}")

    def read(self) -> list[bytes]:
        """Read what lies beside the data and what lies in the cache, as far as they exist."""
        found = []
        with suppress(OSError, ValueError, NotImplementedError):
            found.append(self.location.read(self.path))
        with suppress(OSError):
            found.append(Path(self.cached).read_bytes())
        return found

    def write(self, data: bytes) -> str:
        """Write beside the data, else into the cache; returns where, empty if neither works."""
        fs = self.location.fs
        try:
            if self.location.local:
                _replace(self.path, data)
            else:
                fs.pipe_file(self.path, data)
        except Exception:
            try:
                os.makedirs(os.path.dirname(self.cached), exist_ok=True)
                _replace(self.cached, data)
            except OSError:
                return ""
            return self.cached
        return self.path


def _replace(path: str, data: bytes) -> None:
    """Write it whole or not at all, also when several processes write the same."""
    temporary = f"{path}.{secrets.token_hex(8)}.tmp"  # nobody can have put a link there
    try:
        with open(temporary, "xb") as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
