"""Images in class folders of a zip."""

from __future__ import annotations

import os
import zipfile
from typing import ClassVar

import attrs
from attrs.converters import optional
from typing_extensions import override

from e2ediff import addresses
from e2ediff.data import Recognised
from e2ediff.errors import DataError
from e2ediff.files.class_folders import DATASET_JSON, class_folders, with_labels
from e2ediff.files.damage import DAMAGED
from e2ediff.files.labels import read_labels
from e2ediff.files.listing import EncodedConfig, Listing, Names
from e2ediff.files.location import Location
from e2ediff.files.members import Members
from e2ediff.files.names import images_of
from e2ediff.limits import check_size


class ZipBytes:
    """Members of a zip, by number; each process opens it for itself."""

    def __init__(self, location: Location, names: Names) -> None:
        self.location = location
        self.names = names
        self._zip: zipfile.ZipFile | None = None
        self._owner = -1

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_zip": None, "_owner": -1}

    def __call__(self, i: int) -> bytes:
        """Content of one member; nothing is ever extracted to disk."""
        if self._zip is None or self._owner != os.getpid():
            self._zip = addresses.open_zip(self.location.fs.open(self.location.path, "rb"))
            self._owner = os.getpid()
        member = self._zip.getinfo(self.names[i])
        check_size(member.file_size)
        return self._zip.read(member)


@attrs.frozen(kw_only=True)
class Archive(EncodedConfig):
    """A zip file with one folder of images for each class, or as StyleGAN and EDM write it.

    `path` is the zip's path or fsspec URL; `inside` the folder in it that holds the class
    folders (empty for the top), `held_out` such a folder for the probe and for scores.
    A `dataset.json` there has the labels instead of folders; `labels` is another file of them.
    The other options are those of `image_folder`.
    """

    movable: ClassVar[tuple[str, ...]] = ("path", "inside", "held_out", "labels")
    word: ClassVar[str] = "class folders"

    path: str = attrs.field(converter=addresses.plain, validator=addresses.allowed)
    inside: str = ""
    labels: str | None = attrs.field(
        default=None, converter=optional(addresses.plain), validator=addresses.allowed
    )

    @classmethod
    @override
    def recognises(cls, address: str) -> Recognised | None:
        zipped = Location(address, "data").is_file_named(".zip")
        return Recognised({"path": address}) if zipped else None

    @override
    def option(self, *, held_out: bool) -> str:
        return "data.path"

    def listing(self, *, held_out: bool) -> Listing:
        """Every image below the folder inside."""
        inside = self.held_out if held_out and self.held_out is not None else self.inside
        place = f"{self.path}!{inside}" if inside else self.path
        location = Location(self.path, "data.path")
        members, folders, dataset = _members(location, inside)
        paths = list(members)
        left_out = images_of(paths, [DATASET_JSON])[1]
        file = None
        if self.labels and not held_out:
            file = read_labels(self.labels)
        elif dataset is not None:
            file = read_labels(f"{place}/{DATASET_JSON}", data=dataset)
        if file is not None:
            names, labels, classes, class_names = with_labels(paths, file, place, "data.path")
        else:
            names, labels, class_names = class_folders(
                paths, folders, place, "data.path", left_out, everything=self.classes == 0
            )
            classes = len(class_names)
        fetch = ZipBytes(location, Names(members[name] for name in names))
        label_file = file.place if file else ""
        return Listing(
            place, names, labels, classes, class_names, fetch,
            left_out=left_out, label_file=label_file,
        )  # fmt: skip


def _members(location: Location, inside: str) -> tuple[dict[str, str], list[str], bytes | None]:
    """Files below a folder of a zip with their members, the folders in it, its dataset.json.

    Hidden members are left out before anything is checked.
    """
    path, where = location.url, f"data.path: {location.url}"
    if not location.is_file():
        raise DataError(f"data.path: no file {path}. Expected the path or URL of a zip")
    with location.opened(location.path) as file:
        try:
            with addresses.open_zip(file) as archive:
                files, folders = dict[str, str](), set[str]()
                seen = Members(where, inside)
                for info in archive.infolist():
                    name = seen.of_zip(info)
                    if name and info.filename.endswith("/"):
                        folders.add(name.partition("/")[0])
                    elif name:
                        files[name] = info.filename
                dataset = None
                if DATASET_JSON in files:
                    member = archive.getinfo(files[DATASET_JSON])
                    check_size(member.file_size, f"a {DATASET_JSON}")
                    dataset = archive.read(member)
                return files, sorted(folders), dataset
        except UnicodeError as error:
            raise DataError(f"{where}: {error}") from error
        except (*DAMAGED, OSError, ValueError) as error:
            raise DataError(
                f"data.path: {path} cannot be read as a zip: {error}; fetch it again"
            ) from error
