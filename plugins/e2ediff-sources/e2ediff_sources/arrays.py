"""Images as arrays of pixels: NumPy's npz and npy, and MNIST's idx.

Shapes: M images of a source, B batch, C H W image.
"""

from __future__ import annotations

import io
from typing import ClassVar

import attrs
import numpy as np
import torch
from attrs import validators
from attrs.converters import optional
from torch import Tensor
from typing_extensions import override

from e2ediff import addresses
from e2ediff.addresses import Address
from e2ediff.data import (
    DataSource,
    ImageSpec,
    Recognised,
    Sampling,
    Size,
    SourceConfig,
    as_size,
    height_width,
    positive_size,
)
from e2ediff.errors import DataError
from e2ediff.files.arrays import InMemory, check_npy, large_images, read_idx
from e2ediff.files.damage import DAMAGED_ARRAY
from e2ediff.files.listing import MOST_CLASSES
from e2ediff.files.location import Location

_LABELS = "an array of labels"


@attrs.frozen(kw_only=True)
class Arrays(SourceConfig):
    """Arrays of pixels in memory: NumPy's npz or npy, or MNIST's idx, gzipped or plain.

    `images` is a path or URL; in an npz, `file.npz!key` names the array, by default `images`.
    They are bytes of shape (M, H, W) or (M, H, W, C); other sizes than `size` are cropped as
    `image_folder` does.
    `labels` is another such array, (M,), of class numbers; by default the npz's `labels`.
    `held_out_images` and `held_out_labels` are those for the probe and for scores.
    `channels`, `flip` and `sampling` are those of `image_folder`; `classes` 0 reads no labels.
    """

    movable: ClassVar[tuple[str, ...]] = ("images", "labels", "held_out_images", "held_out_labels")

    images: str = attrs.field(converter=addresses.plain, validator=addresses.allowed)
    labels: str | None = attrs.field(
        default=None, converter=optional(addresses.plain), validator=addresses.allowed
    )
    held_out_images: str | None = attrs.field(
        default=None, converter=optional(addresses.plain), validator=addresses.allowed
    )
    held_out_labels: str | None = attrs.field(
        default=None, converter=optional(addresses.plain), validator=addresses.allowed
    )
    size: Size = attrs.field(converter=as_size, validator=positive_size)
    classes: int = attrs.field(validator=validators.ge(0))
    channels: int = attrs.field(default=3, validator=validators.in_((1, 3)))
    flip: bool = True
    sampling: Sampling = "natural"

    @classmethod
    @override
    def recognises(cls, address: str) -> Recognised | None:
        found = Location(address, "data").is_file_named(".npz", ".npy", "-ubyte", ".idx")
        return Recognised({"images": address}) if found else None

    def with_counted_classes(self) -> Arrays:
        """With the classes of the training images' labels, 0 without any."""
        label = self.arrays()[1]
        found = 0 if label is None or not len(label) else int(label.max()) + 1
        return attrs.evolve(self, classes=found)

    @property
    def image(self) -> ImageSpec:
        """`channels`, `size` and `classes`, as the recipe says."""
        return ImageSpec(self.channels, *height_width(self.size), self.classes)

    @property
    @override
    def has_held_out(self) -> bool:
        return self.held_out_images is not None

    @override
    def open(self, *, held_out: bool = False) -> DataSource:
        x, label = self.arrays(held_out=held_out)
        if label is None:
            if self.classes:
                raise DataError(
                    f"data.labels: no labels are given, the recipe says data.classes: "
                    f"{self.classes}; give them, or `--set data.classes=0`"
                )
            label = torch.zeros(len(x), dtype=torch.int64)
        elif self.classes == 0:
            label = torch.zeros_like(label)
        elif len(label) and not 0 <= int(label.min()) <= int(label.max()) < self.classes:
            raise DataError(
                f"data.labels: classes {int(label.min())} to {int(label.max())}, the recipe says "
                f"data.classes: {self.classes} (labels 0 to {self.classes - 1}); "
                f"`--set data.classes={int(label.max()) + 1}` takes them all"
            )
        return InMemory(x, label, height_width(self.size))

    def arrays(self, *, held_out: bool = False) -> tuple[Tensor, Tensor | None]:
        """Images (M, C, H, W), uint8, and labels (M,), int64, whatever `classes` says.

        Raises:
            DataError: They are missing, of other shapes, or do not match.
        """
        images, labels, options = self.images, self.labels, ("data.images", "data.labels")
        if held_out and self.held_out_images:
            images, labels = self.held_out_images, self.held_out_labels
            options = ("data.held_out_images", "data.held_out_labels")
        x = read_array(images, options[0], "images")
        path = images.partition("!")[0]
        if labels is None and path.endswith(".npz"):
            known = _npz(path, options[1]).files
            labels = f"{path}!labels" if "labels" in known else None
        x = x[..., None] if x.ndim == 3 else x
        if x.ndim != 4 or x.shape[-1] not in (1, 3) or x.dtype != torch.uint8:
            raise DataError(
                f"{options[0]}: {images} holds {tuple(x.shape)} of {x.dtype}; expected bytes of "
                "shape (images, height, width) or (images, height, width, 1 or 3)"
            )
        if not x.numel():
            raise DataError(f"{options[0]}: {images} holds no images; expected one or more")
        if large := large_images(x.shape, height_width(self.size)):
            raise DataError(f"{options[0]}: {images} holds {large}; write others")
        x = _with_channels(x.permute(0, 3, 1, 2), self.channels)
        if labels is None:
            return x, None
        y = read_array(labels, options[1], "labels", _LABELS)
        if y.numel() != len(x) or y.is_floating_point() or y.is_complex():
            raise DataError(
                f"{options[1]}: {labels} holds {tuple(y.shape)} of {y.dtype}, {images} "
                f"{len(x)} images; expected one whole number for each image"
            )
        y = y.reshape(-1).long()
        if int(y.max()) >= MOST_CLASSES:
            raise DataError(
                f"{options[1]}: {labels} holds label {int(y.max())}; expected class numbers below "
                f"{MOST_CLASSES:,}. Number the classes 0, 1, 2, ..."
            )
        return x, y


def _with_channels(x: Tensor, channels: int) -> Tensor:
    """Grey to colour by repetition, colour to grey with the weights of ITU-R 601, as Pillow."""
    if x.shape[1] == channels:
        return x
    if channels == 3:
        return x.expand(-1, 3, -1, -1)
    r, g, b = x.int().unbind(1)
    return ((r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16).to(torch.uint8)[:, None]


def read_array(address: Address, option: str, key: str, what: str = "") -> Tensor:
    """The array at `path`, or `path.npz!key`.

    Args:
        address: The path, with the array's name or without.
        option: The recipe's key that has it, for messages.
        key: The array of an npz that is not named.
        what: What it is, if it has no more than `MAX_BYTES`; empty for an array of images.

    Raises:
        DataError: There is none, or it is damaged.
    """
    address = addresses.plain(address)
    path, _, name = address.partition("!")
    if path.endswith(".npz"):
        arrays = _npz(path, option)
        name = name or key
        if name not in arrays.files:
            raise DataError(
                f"{option}: {path} has no array '{name}', it has {', '.join(arrays.files)}; name "
                f"one with `--set '{option}={path}!NAME'`"
            )
        assert arrays.zip is not None  # until it is closed
        try:
            member = arrays.zip.getinfo(f"{name}.npy")
            with arrays.zip.open(member) as file:
                check_npy(file, member.file_size, member.compress_size, what)
                file.seek(0)
                return torch.from_numpy(np.lib.format.read_array(file, allow_pickle=False))
        except DAMAGED_ARRAY as error:
            raise DataError(f"{option}: {address}: {error}; fetch it again") from error
    data = _content(path, option)
    if not path.endswith(".npy"):
        return read_idx(data, path, what)
    try:
        check_npy(io.BytesIO(data), len(data), len(data), what)
        return torch.from_numpy(np.load(io.BytesIO(data), allow_pickle=False))
    except DAMAGED_ARRAY as error:
        raise DataError(
            f"{option}: {path} cannot be read as npy: {error}; fetch it again"
        ) from error


def _npz(path: str, option: str) -> np.lib.npyio.NpzFile:
    try:
        found = np.load(io.BytesIO(_content(path, option)), allow_pickle=False)
    except DAMAGED_ARRAY as error:
        raise DataError(
            f"{option}: {path} cannot be read as npz: {error}; fetch it again"
        ) from error
    if not isinstance(found, np.lib.npyio.NpzFile):
        raise DataError(f"{option}: {path} is no npz; give it the suffix .npy")
    return found


def _content(path: str, option: str) -> bytes:
    location = Location(path, option)
    try:
        return location.read(location.path)
    except (OSError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError)
        what = f"no file {path}" if missing else f"cannot read {path}: {error}".rstrip(".")
        raise DataError(f"{option}: {what}. Expected an npz, npy or idx file.") from error
