"""Images in class folders, through fsspec."""

from __future__ import annotations

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
from e2ediff.files.names import Tally, below, images_of
from e2ediff.files.tree import SET_RECORDS, tree


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


@attrs.frozen(kw_only=True)
class ImageFolder(EncodedConfig):
    """A folder with one folder of images for each class, as ImageNet's own layout.

    `root` is a path or fsspec URL (`s3://`, `gs://`, `hf://`, `zip://`, ...).
    Classes are the folders' names in sorted order; their number must be `classes`.
    `classes` 0 leaves classes out and takes images anywhere below the root.
    `labels` is a file that has them instead: a line `<image> <class>` for each image, or a
    `dataset.json` as StyleGAN and EDM write it, which is also found by itself in the root.
    Images are cropped as ADM does: halved by box filters while twice `size` or larger, resized
    with bicubic filter so that the shorter side is `size`, and cut in the centre. `size` is the
    side of a square, or `[height, width]`, which a resized image just covers.
    With `upright`, an image is turned as its EXIF data ask; `background`, a colour in the words
    of CSS such as `white` or `"#808080"`, is what a transparent image is composed on. By default
    both are left out, as ADM does.
    `flip` mirrors half of the training images.
    `sampling` `class_balanced` shows all classes equally often, `natural` as often as they occur.
    `on_bad_image` is what follows from an image that is damaged or has more than `max_pixels`
    pixels (width times height, as stored or resized; it is never decoded): `stop` ends the run
    and names it, `skip` takes the next readable image of its class instead, and lists it in the
    run's directory.
    `max_bad_fraction` is the largest share of damaged ones that `skip` accepts, among the
    training images seen so far; up to 10 of them never end a run.
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
        """Any folder that is not empty, unless another source knows better.

        Of what `sample` and `reconstruct` write, it is the folder of the images.
        """
        location = Location(address, "data")
        names = location.visible() if location.is_folder() else []
        if "images" in names and not SET_RECORDS.isdisjoint(names) and "::" not in address:
            address = f"{address.rstrip('/')}/images"
        return Recognised({"root": address}, "possible") if names else None

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
        try:
            found = tree(location.fs, location.path, f"{option}: {root}")
        except OSError as error:
            raise DataError(f"{option}: {root}: a folder cannot be listed: {error}") from error
        paths, folders = found.files, found.folders
        file, also_read = None, [DATASET_JSON]
        if self.labels and not held_out:
            file = read_labels(self.labels)
            also_read.append(below(location.path, Location(self.labels, "data.labels").path))
        elif DATASET_JSON in paths:
            file = read_labels(location.below(DATASET_JSON), location)
        tally = Tally()
        tally.include((*found.left_out, *images_of(paths, also_read)[1]))
        if file is not None:
            names, labels, classes, class_names = with_labels(paths, file, root, option)
        else:
            names, labels, class_names = class_folders(
                paths, folders, root, option, tally.left_out, everything=self.classes == 0
            )
            classes = len(class_names)
        fetch = FolderBytes(location, names)
        label_file = file.place if file else ""
        return Listing(
            root, names, labels, classes, class_names, fetch,
            left_out=tally.left_out, label_file=label_file,
        )  # fmt: skip
