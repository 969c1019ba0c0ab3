"""Members of zips and tars: which are plain files at plain relative paths, each there once.

A folder on a disk cannot hold two files of one name, or a file whose name leads elsewhere; an
archive can, and readers differ in what they make of it. Such archives are refused by name.
"""

from __future__ import annotations

import re
import stat
import tarfile
import unicodedata
import zipfile
from typing import Any, BinaryIO

from e2ediff import addresses
from e2ediff.errors import DataError
from e2ediff.files.names import is_hidden

_END = bytes(2 * tarfile.BLOCKSIZE)  # POSIX: two blocks of zeros, then whatever padding
_CHUNK = 1 << 20


class Members:
    """Members of an archive, as they come: each is named, checked, and compared with the others.

    Args:
        where: The recipe's key and the archive's path, for messages.
        root: The folder in the archive below which members count; empty for the top.
    """

    def __init__(self, where: str, root: str = "") -> None:
        self.where = where
        self.prefix = f"{_tidy(root)}/" if _tidy(root) else ""
        self._files = set[str]()
        self._folders = {""}
        self._forms = dict[str, str]()  # names that are not ASCII, by their composed form

    def of_zip(self, info: zipfile.ZipInfo) -> str | None:
        """Return a member's path below the root, without `./` and `//`; "" for the root.

        It is None for one that does not count: it is hidden, or not below the root.

        Raises:
            DataError: It is no plain file or folder, or its name is no plain relative path, or
                that of another member.
        """
        kind, what = stat.S_IFMT(info.external_attr >> 16), ""
        if kind == stat.S_IFLNK:
            what = "is a link"
        elif info.create_system == 3 and kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            what = "is no plain file"  # a device, by the modes of Unix
        elif info.flag_bits & 1:
            what = "is encrypted"
        # Not by `is_dir`, which fails for an empty name.
        return self._named(info.orig_filename, what, folder=info.filename.endswith("/"))

    def of_tar(self, info: tarfile.TarInfo) -> str | None:
        """Return a member's path, as `of_zip` does.

        Raises:
            DataError: As `of_zip`.
        """
        what = ""
        if info.issym() or info.islnk():
            what = "is a link"
        elif info.sparse is not None or not (info.isreg() or info.isdir()):
            what = "is no plain file"
        return self._named(info.name, what, folder=info.isdir())

    def _named(self, name: str, what: str, *, folder: bool) -> str | None:
        whole = f"{_tidy(name)}/"
        path = whole.removeprefix(self.prefix)[:-1]
        if not whole.startswith(self.prefix) or is_hidden(path.replace("\\", "/")):
            return None
        what = _strange(name) or what or ("" if path or folder else "has no name")
        if what:
            raise self._refused(name, what)
        if path and not folder and path in self._files:
            raise self._refused(name, "is there twice", "each name once", "one of them")
        self._place(name, path, folder=folder)
        return path

    def _place(self, name: str, path: str, *, folder: bool) -> None:
        """Add a path and the folders that it lies in."""
        if path in (self._files if folder else self._folders):
            raise self._refused(name, "is a file and a folder", "each name once", "one of them")
        if folder and path in self._folders:
            return
        if not path.isascii():
            other = self._forms.setdefault(unicodedata.normalize("NFC", path), path)
            if other != path:
                what = f"has the letters of {other!a}, written {path!a}"
                raise self._refused(name, what, "each name once", "one of them")
        (self._folders if folder else self._files).add(path)
        self._place(name, path.rpartition("/")[0], folder=True)

    def _refused(
        self, name: str, what: str, expected: str = "plain files below the top", less: str = "it"
    ) -> DataError:
        return DataError(
            f"{self.where}: member {name!r} {what}; expected {expected}. Pack the images again "
            f"without {less}"
        )


def _tidy(name: str) -> str:
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _strange(name: str) -> str:
    """Return why a name is no plain relative path; "" if it is one."""
    if name.startswith("/") or ".." in name.split("/"):
        return "lies outside of the archive"
    if re.match("[A-Za-z]:", name):
        return "begins with a drive"
    if "\\" in name:
        return "has a backslash in its name, which divides folders on some systems alone"
    kinds = set() if name.isprintable() else {unicodedata.category(letter) for letter in name}
    if "Cs" in kinds:
        return "has a name that is not UTF-8"
    if "Cc" in kinds:
        return "has a control character in its name"
    return ""


def check_archive(fs: Any, root: str, where: str) -> None:
    """Refuse a zip or tar that fsspec has opened as a file system, by what its members are.

    fsspec itself takes the last of several members of one name, and follows links.

    Args:
        fs: The file system; of other kinds nothing is checked.
        root: The folder in it below which members count.
        where: Its address, for messages.

    Raises:
        DataError: A member is one that `Members` refuses, or a tar does not end as it should.
    """
    members, packed = Members(where, root), addresses.archive(fs)
    if isinstance(packed, zipfile.ZipFile):
        for info in packed.infolist():
            members.of_zip(info)
    if isinstance(packed, tarfile.TarFile):
        for member in packed.getmembers():
            members.of_tar(member)
        check_tar_end(fs.fo, packed, where)
    if packed and not root and fs.find("."):
        raise DataError(
            f"{where}: some members begin with './' and others do not; expected one kind. Pack "
            "the images again"
        )


def check_tar_end(file: BinaryIO, tar: tarfile.TarFile, where: str) -> None:
    """Refuse a tar that does not end where its last member does.

    Python's reader takes a missing or damaged header for the end, and never sees what comes after
    the end, such as a second tar.

    Args:
        file: The tar as a file, from which all members have been read.
        tar: Its reader.
        where: The recipe's key and the tar's path, for the message.

    Raises:
        DataError: It is cut short, damaged, or goes on after its end.
    """
    file.seek(tar.offset)
    end = file.read(len(_END))
    count = len(tar.getmembers())
    after = f"after {count} member{'' if count == 1 else 's'}"
    if len(end) < len(_END):
        what = f"is cut short: it ends {after} without the two blocks of zeros that end a tar"
    elif end != _END:
        what = f"is damaged: {after} comes neither another one nor the end"
    else:
        while (more := file.read(_CHUNK)) and not more.strip(b"\0"):
            pass
        if not more:
            return
        raise DataError(
            f"{where} goes on {after} and the end, as tars do that were put together as files; "
            "expected one tar. Give each by itself, or join them with `tar -A`"
        )
    raise DataError(f"{where} {what}; fetch it again, or pack it again")
