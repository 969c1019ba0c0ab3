"""Files below a folder: the only place where one is walked for images."""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from typing import Any

import attrs

from e2ediff import addresses
from e2ediff.addresses import Address
from e2ediff.data import LeftOut, left_out_text
from e2ediff.errors import DataError
from e2ediff.files.damage import DAMAGED
from e2ediff.files.images import SUFFIXES, read_file
from e2ediff.files.members import check_archive
from e2ediff.files.names import Tally, below, images_of, is_hidden, is_readable

SET_RECORDS = frozenset({"set.json", "psnr.json"})
"""What `sample` and `reconstruct` write beside the folder of their images and their grid."""
_GRIDS = ("grid.png", "reconstructions.png")
_MOST_LINKS = 100
"""How often links to one folder are followed.

Two in each of 40 folders, to the next one, make a trillion ways.
"""
_RUN = ("run.json", "resolved.yaml")


@attrs.frozen
class Tree:
    """Files below a folder, hidden ones left out.

    `files` are paths relative to the folder, sorted; `folders` the names of the folders that lie
    directly in it, empty ones too; `left_out` is what cannot be read whatever it is called.
    The grids of sets of images that `sample` and `reconstruct` wrote, at any depth, are not there.
    """

    files: Sequence[str]
    folders: Sequence[str]
    left_out: Sequence[LeftOut] = ()


def tree(fs: Any, root: str, where: str) -> Tree:
    """Walk a folder of a file system of fsspec.

    On this machine links to files and folders are followed, except to a folder that leads back
    to one above it, or that many others have led to.

    Args:
        fs: The file system.
        root: The folder's path in it.
        where: The folder's address, for messages, perhaps after the recipe's key.

    Raises:
        OSError: A folder cannot be listed.
        DataError: It lies in a zip or tar with a member that `Members` refuses.
    """
    check_archive(fs, root, where)
    if addresses.is_local(fs):
        return _local(root)
    tally, files = Tally(), list[str]()
    for path in sorted(below(root, str(found)) for found in fs.find(root)):
        if is_hidden(path):
            continue
        if is_readable(path):
            files.append(path)
        else:
            tally.add("with a name that is no UTF-8", path)
    entries = fs.ls(root, detail=True)
    found = [below(root, e["name"].rstrip("/")) for e in entries if e["type"] == "directory"]
    folders = sorted(name for name in found if name and not is_hidden(name))
    return Tree(_without_grids(files), folders, tally.left_out)


def _without_grids(files: Sequence[str]) -> list[str]:
    """Return the files but for pictures of several images that lie beside the record of a set."""
    sets = {path.rpartition("/")[0] for path in files if path.rpartition("/")[2] in SET_RECORDS}
    return [
        path
        for path in files
        if path.rpartition("/")[2] not in _GRIDS or path.rpartition("/")[0] not in sets
    ]


def _local(root: str) -> Tree:
    """Walk a folder of this machine directly, which is much faster than by fsspec."""
    files, folders, tally = list[str](), list[str](), Tally()
    waiting = [(root, "", _above(root))]
    times = Counter[tuple[int, int]]()
    while waiting:
        folder, inside, above = waiting.pop()
        with os.scandir(folder) as scanned:
            entries = sorted(scanned, key=lambda entry: entry.name)
        for entry in entries:
            path = f"{inside}{entry.name}"
            if is_hidden(entry.name):
                continue
            kind = _kind(entry)
            if not is_readable(entry.name):
                tally.add("with a name that is no UTF-8", path)
            elif kind == "folder":
                place = _place(entry.path)
                if entry.is_symlink() and place in above:
                    tally.add("that link to a folder above them", path)
                    continue
                times[place] += entry.is_symlink()
                if times[place] > _MOST_LINKS:
                    tally.add(f"that link to a folder as {_MOST_LINKS} others do", path)
                    continue
                folders += [] if inside else [entry.name]
                waiting.append((entry.path, f"{path}/", above | {place}))
            elif kind == "file":
                files.append(path)
            else:
                tally.add(kind, path)
    return Tree(_without_grids(sorted(files)), folders, tally.left_out)


def _kind(entry: os.DirEntry[str]) -> str:
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
    except OSError:  # of a link to itself
        return "that link to nothing"
    return "that link to nothing" if entry.is_symlink() else "that are pipes, sockets or devices"


def _above(root: str) -> frozenset[tuple[int, int]]:
    """Return what identifies a folder and all that it lies in."""
    path = os.path.realpath(root)
    found = {_place(path)}
    while path != os.path.dirname(path):
        path = os.path.dirname(path)
        found.add(_place(path))
    return frozenset(found)


def _place(path: str) -> tuple[int, int]:
    """Return what identifies a folder by whichever name it is reached."""
    found = os.stat(path)
    return found.st_dev, found.st_ino


@attrs.frozen
class ImageFile:
    """An image that a person named, or that lies in a folder which they named.

    `fs` is a file system of fsspec, `path` the file's path in it, `address` opens it elsewhere.
    """

    fs: Any
    path: str
    address: str

    def read(self) -> bytes:
        """Return its content.

        Raises:
            DataError: It cannot be read.
        """
        try:
            return read_file(self.fs, self.path)
        except (*DAMAGED, OSError, ValueError, LookupError) as error:
            raise DataError(f"{self.address}: cannot be read: {error}; replace it") from error


@attrs.frozen
class NamedImages:
    """Images at an address that a person named, sorted by path, and what was left out."""

    files: Sequence[ImageFile]
    left_out: Sequence[LeftOut] = ()


def named_images(place: Address) -> NamedImages:
    """Find the images at an address that a person named.

    It is an image, a folder with images at any depth, a zip or tar of such a folder, or what
    `sample` or `reconstruct` printed, in which grids and records are no images of the set.

    Raises:
        DataError: Nothing is there, or it holds no images as files.
    """
    place = addresses.plain(place)
    try:
        fs, root = addresses.file_system(place, typed=True)
        if fs.isfile(root):
            protocol = next((p for p in addresses.ARCHIVES if root.lower().endswith(f".{p}")), "")
            if protocol:
                return _in_folder(f"{protocol}://::{place}")
            return NamedImages([ImageFile(fs, root, place)])
        if not fs.isdir(root):
            raise DataError(
                f"{place}: no such file or folder; give an image, a folder of images, a zip or "
                "tar of one, or an npz"
            )
        return _in_folder(place)
    except (*DAMAGED, tarfile.TarError, ImportError, ValueError, OSError) as error:
        raise DataError(f"{place}: cannot be opened: {error}") from error


def _in_folder(place: str) -> NamedImages:
    fs, root = addresses.file_system(place, typed=True)
    _refuse_run(fs, root, place)
    found, tally = tree(fs, root, place), Tally()
    paths = found.files
    if {*SET_RECORDS} & {*paths}:
        packed = [p for p in paths if p.startswith("shards/") or p == "samples.zip"]
        if packed:
            return _joined([named_images(_address(fs, root, place, p)) for p in packed])
        if "samples.npz" in paths:
            raise DataError(
                f"{place}: its images are in samples.npz; expected images as files, as `sample "
                "--format png` writes them"
            )
        paths = [p for p in paths if p.startswith("images/")] or paths
    # Labels, as StyleGAN and WebDataset write them, which nothing here needs.
    labels = [p for p in paths if p == "dataset.json" or p.endswith(".cls")]
    images, others = images_of(paths, labels)
    tally.include((*found.left_out, *others))
    if not images:
        why = f"; {left_out_text(tally.left_out)}" if tally.left_out else ""
        raise DataError(f"{place}: holds no images (looked for {', '.join(SUFFIXES)}){why}")
    folder = root.rstrip("/")
    files = [
        ImageFile(fs, f"{folder}/{p}" if root else p, _address(fs, root, place, p)) for p in images
    ]
    return NamedImages(files, tally.left_out)


def _refuse_run(fs: Any, root: str, place: str) -> None:
    """Refuse a run's directory and its `samples`, whose pictures show several images each.

    Raises:
        DataError: It is one of them.
    """
    folder = root.rstrip("/")
    above, _, name = folder.rpartition("/")
    for run in (folder, above if name == "samples" else folder):
        if all(fs.isfile(f"{run}/{record}") for record in _RUN):
            raise DataError(
                f"{place}: the pictures of a run show several images each; expected images. Give "
                "a set of them that `sample` printed"
            )


def _address(fs: Any, root: str, place: str, path: str) -> str:
    """Return the address of a file of a folder."""
    outer, chained, inner = place.partition("::")
    whole = f"{root.rstrip('/')}/{path}" if root else path
    return str(fs.unstrip_protocol(whole)) + chained + inner if "://" in outer else whole


def _joined(parts: Sequence[NamedImages]) -> NamedImages:
    tally = Tally()
    for part in parts:
        tally.include(part.left_out)
    return NamedImages([file for part in parts for file in part.files], tally.left_out)
