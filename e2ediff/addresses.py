"""Addresses of files and folders: which are allowed, and the only place where they are opened.

An address is a path, or a URL that fsspec knows, given as text or as a `pathlib.Path`.
Recipes, runs and data sets travel, so a stranger may have written the addresses in them: there,
only protocols are allowed that read or write the bytes at an address and nothing else.
An address that a person typed may have any protocol but `reference` and `generic`, which say what
else is opened, where it is opened as `typed`; data and weights are not.
"""

from __future__ import annotations

import os
import re
import tarfile
import zipfile
from importlib.util import find_spec
from typing import Any, BinaryIO

from fsspec.core import split_protocol, url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.tar import TarFileSystem
from fsspec.implementations.zip import ZipFileSystem
from fsspec.registry import available_protocols, known_implementations, registry

Address = str | os.PathLike[str]

STORES = (
    *("file", "local", "memory", "http", "https", "s3", "s3a", "gs", "gcs"),
    *("az", "abfs", "abfss", "hf"),
)
"""Protocols that are allowed in files; a path has none of them and is allowed too."""

ARCHIVES = ("zip", "tar")
"""Protocols of archives, allowed in files around an address: `zip://inside::s3://bucket/x.zip`."""

NEVER = ("reference", "generic")
"""Protocols whose content, or rest, names further addresses that nobody could check."""


COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")
"""How files of gzip, bzip2, xz and zstd begin."""

_LONGEST_HEADER = 1 << 20


class TarHeaders:
    """A file for `tarfile`, which believes what headers say, while it looks for members in it.

    Names of gigabytes are refused, and members of negative size, after which some versions of
    Python look at the same member for ever.

    Raises:
        tarfile.ReadError: It is compressed.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        start = file.tell()
        if file.read(6).startswith(COMPRESSED):
            raise tarfile.ReadError("not a plain tar")
        file.seek(start)

    def tell(self) -> int:
        """Return the position, as of any file."""
        return self._file.tell()

    def seek(self, place: int, whence: int = 0) -> int:
        """Move to a position, as of any file.

        Raises:
            tarfile.ReadError: It leads back to what was read.
        """
        if place < self._file.tell() - 1:  # tarfile looks at a byte before
            raise tarfile.ReadError("a member has a negative size")
        return self._file.seek(place, whence)

    def read(self, count: int = -1) -> bytes:
        """Read bytes, as of any file.

        Raises:
            tarfile.ReadError: They are more than any header has.
        """
        if not 0 <= count <= _LONGEST_HEADER:
            raise tarfile.ReadError(f"a header of {count:,} bytes")
        return self._file.read(count)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class _PlainTar(TarFileSystem):  # type: ignore[misc]
    """A tar without compression as a file system, whose headers are not believed."""

    cachable = False  # it is of one open file

    def __init__(self, file: BinaryIO) -> None:
        try:
            super().__init__(TarHeaders(file))
        except (ValueError, ArithmeticError, LookupError) as error:
            raise tarfile.ReadError(f"damaged header: {error}") from error
        self.fo = self.tar.fileobj = file


def plain(address: Address) -> str:
    """Return the address as text: what every function begins with that a user may give one.

    Raises:
        TypeError: It is neither text nor a path.
    """
    text = os.fspath(address)
    if not isinstance(text, str):
        raise TypeError(f"an address is text or a path, not {type(text).__name__}: {text!r}")
    return text


def cache_folder() -> str:
    """Return the cache folder: $E2EDIFF_CACHE, or `e2ediff` in the user's own cache.

    Its files can be made again. The user's cache is $XDG_CACHE_HOME, or `~/.cache`.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.environ.get("E2EDIFF_CACHE") or os.path.join(home, "e2ediff")


def refusal(address: Address, *, typed: bool = False) -> str:
    """Return why an address is not opened, and what to do; "" if it may be. Access nothing.

    Args:
        address: The address.
        typed: Whether a person typed it at this command, rather than a file has it.
    """
    *outer, last = plain(address).split("::")
    known = {*available_protocols(), *registry}  # of packages, and of this process
    own = split_protocol(last)[0] or ""
    if outer and (last in known or re.fullmatch("[a-z]+", last)):
        own = last  # so fsspec reads it at the end of a chain
    before = [split_protocol(link)[0] or link for link in outer]
    for protocol in (*before, own):
        if protocol.strip().lower() in NEVER:
            return (
                f"protocol {_short(protocol)} is never opened: what lies there chooses which "
                "other places are read, and could run code. Copy the files to a folder or a "
                "store, and give its address"
            )
    further = {*_further(), *(known if typed else ())}
    chain = f"expected {' or '.join(ARCHIVES)} before '::', or a path without it"
    single = f"expected a path, or {', '.join(STORES)}"
    rules = [*((one, ARCHIVES, chain) for one in before), (own, ("", *STORES), single)]
    for protocol, listed, expected in rules:
        if protocol in listed or protocol in further:
            continue
        if protocol not in known:
            return f"protocol not known: {_short(protocol)}; {expected}"
        more = ",".join([*_further(), protocol])
        return (
            f"protocol {_short(protocol)} is not allowed here; {expected}. Copy the files there, "
            f"or allow it on this machine with E2EDIFF_PROTOCOLS={more}"
        )
    return ""


def _further() -> list[str]:
    """Return protocols that the user allows on this machine, wherever an address is from."""
    names = os.environ.get("E2EDIFF_PROTOCOLS", "").split(",")
    return [name.strip() for name in names if name.strip()]


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")


def allowed(part: object, field: object, value: Any) -> None:
    """Validate a part's option that holds an address, or None.

    `root: str = attrs.field(converter=addresses.plain, validator=addresses.allowed)` refuses a
    recipe before anything is opened, with the line of the address.

    Raises:
        ValueError: Files may not have this address.
    """
    what = "" if value is None else refusal(value)
    if what:
        raise ValueError(f"{what}.")


def file_system(address: Address, *, typed: bool = False) -> tuple[Any, str]:
    """Return the fsspec file system of an address, and the path in it.

    Args:
        address: The address.
        typed: Whether a person typed it at this command, rather than a file has it.

    Raises:
        ValueError: The address is not allowed; nothing was opened.
        ImportError: The package of its protocol is not installed.
    """
    text = plain(address)
    if what := refusal(text, typed=typed):
        raise ValueError(what)
    fs, path = _opened(text, typed=typed)
    packed = archive(fs)
    if isinstance(packed, zipfile.ZipFile) and any(map(_says_no_letters, packed.infolist())):
        fs.zip = open_zip(fs.fo)
    if packed and not path and fs.ls("", detail=False) == ["."]:
        path = "."  # packed from within its folder: `tar -cf x.tar .`
    return fs, str(path)


def _opened(text: str, *, typed: bool) -> tuple[Any, str]:
    """Open a file system as fsspec does, but each tar in its chain as a plain one."""
    first, _, rest = text.partition("::")
    protocols = [link.partition("://")[0] for link in text.split("::")[:-1]]
    if "tar" not in protocols or protocols[0] not in ARCHIVES:
        fs, path = url_to_fs(text)
        return fs, path
    around, place = file_system(rest, typed=typed)
    kind = _PlainTar if protocols[0] == "tar" else ZipFileSystem
    fs = kind(_content(around, place, rest, typed=typed))
    fs.around = around  # it would close its file, were it forgotten
    return fs, first.partition("://")[2].strip("/")


def archive(fs: object) -> zipfile.ZipFile | tarfile.TarFile | None:
    """Return the reader of a zip or tar that is opened as a file system, None for another one."""
    found = getattr(fs, "zip", getattr(fs, "tar", None))
    return found if isinstance(found, zipfile.ZipFile | tarfile.TarFile) else None


def open_zip(file: BinaryIO) -> zipfile.ZipFile:
    """Open a zip whose names are UTF-8, also where they do not say so, as macOS and Linux write.

    Raises:
        UnicodeError: Its names are in the letters of some country, and it does not tell which.
        zipfile.BadZipFile: No zip, or a damaged one.
    """
    try:
        return zipfile.ZipFile(file, metadata_encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UnicodeError(
            f"a member has the name {error.object!r}, which is not UTF-8, and nothing tells which "
            "letters these are. Pack the files again, with names in UTF-8"
        ) from error


def _says_no_letters(info: zipfile.ZipInfo) -> bool:
    """Return whether Python reads a member's name as that of an old PC, for want of a word."""
    return not (info.flag_bits & 0x800 or info.orig_filename.isascii())


def open_file(address: Address, *, typed: bool = False) -> BinaryIO:
    """Open the file at an address, to read from; close it, or use it in `with`.

    Raises:
        ValueError: The address is not allowed; nothing was opened.
        ImportError: The package of its protocol is not installed.
        OSError: It is not there, cannot be read, or is a pipe or a device, which might never
            end; a person may type these.
    """
    fs, path = file_system(address, typed=typed)
    return _content(fs, path, plain(address), typed=typed)


def _content(fs: Any, path: str, address: str, *, typed: bool) -> BinaryIO:
    if not typed and is_local(fs) and fs.exists(path) and fs.info(path)["type"] == "other":
        raise OSError(f"{address} is a pipe or a device; expected a file")
    file: BinaryIO = fs.open(path, "rb")
    return file


def own_file(path: str, flags: int) -> int:
    """Open a file of our own to write, as the `opener` of `open`, and never through a link.

    A folder that somebody else packed may have links to files of this machine under the names
    that are appended to, and pipes, at which writing would wait for ever.

    Raises:
        OSError: It cannot be opened, or is a link or a pipe.
    """
    safe = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # none on Windows
    return os.open(path, flags | safe | getattr(os, "O_CLOEXEC", 0), 0o666)


def readable_stores() -> dict[str, str]:
    """Return the protocols of STORES, each with the package that it lacks here, "" for none."""
    found = {}
    for protocol in STORES:
        path = str(known_implementations.get(protocol, {}).get("class", ""))
        module = path.partition(".")[0]
        lacks = not module or find_spec(module) is None
        found[protocol] = (module or "a package for it") if lacks else ""
    return found


def is_local(fs: object) -> bool:
    """Return whether a file system is that of this machine."""
    return isinstance(fs, LocalFileSystem)
