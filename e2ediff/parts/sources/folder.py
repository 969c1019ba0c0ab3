"""Images in class folders, through fsspec."""

from __future__ import annotations

import os
from typing import ClassVar

import attrs
from attrs.converters import optional
from typing_extensions import override

from e2ediff import addresses
from e2ediff.data import Recognised
from e2ediff.errors import DataError
from e2ediff.files.class_folders import DATASET_JSON, class_folders, with_labels
from e2ediff.files.damage import DAMAGED
from e2ediff.files.images import read_file
from e2ediff.files.labels import read_labels
from e2ediff.files.listing import EncodedConfig, Listing, Names
from e2ediff.files.location import Location
from e2ediff.files.names import below, files_below, is_hidden


class FolderBytes:
    """Files below a folder, by number."""

    def __init__(self, location: Location, names: Names) -> None:
        self.location = location
        self.names = names

    def __call__(self, i: int) -> bytes:
        """Content of one file."""
        try:
            return read_file(self.location.fs, self.location.below(self.names[i]))
        except (*DAMAGED, OSError, ValueError):
            raise
        except Exception as error:  # drivers of stores raise what they like
            raise OSError(f"{type(error).__name__}: {error}") from error


def walk(location: Location) -> tuple[list[str], list[str]]:
    """Paths of all files below a folder, and the names of the folders in it, no hidden ones.

    Local folders are walked directly, which is much faster, and may be links.
    """
    root = location.path
    if not location.local:
        paths = [below(root, path) for path in files_below(location.fs, root)]
        entries = location.fs.ls(root, detail=True)
        found = [below(root, e["name"].rstrip("/")) for e in entries if e["type"] == "directory"]
        return paths, sorted(name for name in found if name and not is_hidden(name))
    paths, folders = list[str](), list[str]()
    with os.scandir(root) as scanned:
        for entry in scanned:
            if not is_hidden(entry.name):
                (folders if entry.is_dir() else paths).append(entry.name)
    for folder in folders:
        for place, inner, names in os.walk(os.path.join(root, folder)):
            inner[:] = [name for name in inner if not is_hidden(name)]  # not walked, either
            here = below(root, place)
            paths += [f"{here}/{name}" for name in names if not is_hidden(name)]
    return paths, sorted(folders)


@attrs.frozen(kw_only=True)
class ImageFolder(EncodedConfig):
    """A folder with one folder of images for each class, as ImageNet's own layout.

    `root` is a path or fsspec URL (`s3://`, `gs://`, `hf://`, `zip://`, ...).
    Classes are the folders' names in sorted order; their number must be `classes`.
    `classes` 0 leaves classes out and takes images anywhere below the root.
    `labels` is a file that has them instead: a line `<image> <class>` for each image, or a
    `dataset.json` as StyleGAN and EDM write it, which is also found by itself in the root.
    Images are cropped as ADM does: halved by box filters while twice `size` or larger, resized
    with bicubic filter so that the shorter side is `size`, and cut in the centre.
    `flip` mirrors half of the training images.
    `sampling` `class_balanced` shows all classes equally often, `natural` as often as they occur.
    `on_bad_image` is what follows from an image that is damaged or has more than `max_pixels`
    pixels (width times height, as stored or resized; it is never decoded): `stop` ends the run
    and names it, `skip` takes the next readable image of its class instead, and lists it in the
    run's directory.
    `channels` is 3 for colour, 1 for grey.
    `held_out` is a second such folder for the probe and for scores.
    `workers` processes read and decode.
    """

    movable: ClassVar[tuple[str, ...]] = ("root", "held_out", "labels")
    address: ClassVar[str] = "root"
    word: ClassVar[str] = "class folders"

    root: str = attrs.field(converter=addresses.plain, validator=addresses.allowed)
    labels: str | None = attrs.field(
        default=None, converter=optional(addresses.plain), validator=addresses.allowed
    )

    @classmethod
    def recognises(cls, address: str) -> Recognised | None:
        """Any folder that is not empty, unless another source knows better."""
        location = Location(address, "data")
        folder = location.is_folder() and location.visible()
        return Recognised({"root": address}, "possible") if folder else None

    @override
    def listing(self, *, held_out: bool) -> Listing:
        option = self.option(held_out=held_out)
        root = self.held_out if held_out and self.held_out else self.root
        location = Location(root, option)
        if not location.is_folder():
            raise DataError(
                f"{option}: no folder {root}. It must hold one folder of images for each class "
                "(for ImageNet: train/n01440764/*.JPEG, ...). Give its path or URL with "
                f"`--set {option}=/path/to/train`."
            )
        paths, folders = walk(location)
        values, source = None, self.labels or ""
        if self.labels and not held_out:
            values = read_labels(self.labels)
        elif DATASET_JSON in paths:
            source = location.below(DATASET_JSON)
            values = read_labels(source, location)
        if values is not None:
            names, labels, classes, class_names = with_labels(paths, values, root, option, source)
        else:
            names, labels, class_names = class_folders(
                paths, folders, root, option, everything=self.classes == 0
            )
            classes = len(class_names)
        fetch = FolderBytes(location, names)
        return Listing(root, names, labels, classes, class_names, fetch)
