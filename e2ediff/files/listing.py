"""What a source holds, before any pixel is read: names, labels, and where the bytes are.

Shapes: M images of a source, B batch, C H W image.
"""

from __future__ import annotations

import re
import unicodedata
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, Literal, overload

import attrs
import numpy as np
import torch
from attrs import validators
from attrs.converters import optional
from torch import Tensor
from typing_extensions import override

from e2ediff import addresses
from e2ediff.data import (
    DataSource,
    HeightWidth,
    ImageSpec,
    LeftOut,
    Original,
    Sampling,
    Size,
    SourceConfig,
    as_size,
    height_width,
    left_out_text,
    positive_size,
)
from e2ediff.errors import BadImageError, DataError
from e2ediff.files.damage import DAMAGED
from e2ediff.files.images import (
    AS_STORED,
    MAX_PIXELS,
    Limit,
    Rendering,
    colour,
    decode_into,
    described,
)

MOST_CLASSES = 100_000_000
"""Class numbers are smaller: a larger one is no class, and counting it would fill the memory."""

_NUMBER = re.compile(r"[-+]?\d+([.,]\d*)?")


class Names(Sequence[str]):
    """Many texts in one array: a list of a million strings would be copied to every worker."""

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
        self.ends = torch.tensor([len(e) for e in encoded], dtype=torch.int64).cumsum(0)
        self.letters = torch.frombuffer(bytearray(b"".join(encoded) or b"\0"), dtype=torch.uint8)

    @classmethod
    def of(cls, letters: Tensor, ends: Tensor) -> Names:
        """Make one from the arrays of another one."""
        names = cls([])
        names.letters, names.ends = letters, ends
        return names

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        if not 0 <= i < len(self):
            raise IndexError(i)
        ends = self.ends.numpy()  # whose numbers are read ten times faster than a tensor's
        letters = self.letters.numpy()[ends[i - 1] if i else 0 : ends[i]]
        return letters.tobytes().decode("utf-8", "surrogateescape")


@attrs.frozen(eq=False)
class Listing:
    """Images of a source in order.

    `place` and an entry of `names` together are an image's path in messages.
    `labels` is (M,), int64; `classes` the number of classes that are seen in the data, 0 if
    they have no labels; `class_names` their names, empty if the labels are numbers; `label_file`
    the address of the file that has them, if one has.
    `fetch` gives the stored bytes of an image; with `raw`, its (H, W, C), they are its pixels.
    `left_out` are files among the images that are not read.
    """

    place: str
    names: Sequence[str]
    labels: Tensor
    classes: int
    class_names: tuple[str, ...]
    fetch: Callable[[int], bytes]
    raw: tuple[int, int, int] | None = None
    left_out: tuple[LeftOut, ...] = ()
    label_file: str = ""

    def path(self, i: int) -> str:
        """Return an image's path, for messages."""
        inner, *outer = self.place.split("::")  # as in zip://images::images.zip
        return "::".join([f"{inner.rstrip('/')}/{self.names[i]}", *outer])


def numbered(
    values: Sequence[str], images: Sequence[str], option: str
) -> tuple[Tensor, int, tuple[str, ...]]:
    """Return labels (M,), class count and class names: numbers stay, names are sorted.

    Spaces around a label do not count, nor does the form in which Unicode writes a letter: names
    are in the composed one (NFC).

    Args:
        values: What is written as the label of each image.
        images: Their names, for messages.
        option: The recipe's key of the data, for messages.

    Raises:
        DataError: Some are numbers and others words, a number is that of no class, or one is
            empty.
    """
    values = [unicodedata.normalize("NFC", value.strip()) for value in values]
    numbers = [value.isdecimal() for value in values]
    _refuse_strange(values, numbers, images, option)
    if all(numbers):
        labels = torch.tensor([int(value) for value in values], dtype=torch.int64)
        return labels, int(labels.max()) + 1 if len(labels) else 0, ()
    names = sorted(set(values))
    number = {name: i for i, name in enumerate(names)}
    return torch.tensor([number[value] for value in values]), len(names), tuple(names)


def _refuse_strange(
    values: Sequence[str], numbers: Sequence[bool], images: Sequence[str], option: str
) -> None:
    """Refuse what would be sorted as text although it is a number, and numbers of no class."""
    for i, (value, whole) in enumerate(zip(values, numbers, strict=True)):
        # Of a number with thousands of digits Python refuses to be told the value.
        odd = len(value.lstrip("0")) > 8 if whole else not value or _NUMBER.fullmatch(value)
        if odd:
            raise DataError(
                f"{option}: {images[i]} has label {_short(value)}; expected a class number from "
                f"0, below {MOST_CLASSES:,}, or a name. Number the classes 0, 1, 2, ..."
            )
    if any(numbers) and not all(numbers):
        first, other = numbers.index(True), numbers.index(False)
        raise DataError(
            f"{option}: {images[first]} has a number as label ({values[first]}), {images[other]} "
            f"a name ({_short(values[other])}); expected numbers or names for all. Write one kind"
        )


def _short(value: str) -> str:
    return (value or "''") if len(value) <= 30 else f"{value[:27]}..."


def fitted(listing: Listing, classes: int, option: str, word: str = "classes") -> Listing:
    """Return the listing with labels for so many classes; 0 leaves them out.

    Raises:
        DataError: It has others.
    """
    if classes == 0:
        return attrs.evolve(listing, labels=torch.zeros_like(listing.labels), class_names=())
    says = f"the recipe says data.classes: {classes}"
    if listing.classes == 0:
        raise DataError(
            f"{option}: {listing.place} holds no labels, {says}; give the labels, or "
            "`--set data.classes=0` to train without classes"
            + (f". {left_out_text(listing.left_out)}" if listing.left_out else "")
        )
    if listing.class_names and listing.classes != classes:
        shown = ", ".join(listing.class_names[:5]) + (", ..." if listing.classes > 5 else "")
        where, give = f"{listing.place} holds", "the folder that holds the classes"
        if listing.label_file:
            where, word, give = f"{listing.label_file} has", "classes", "another file of labels"
        raise DataError(
            f"{option}: {where} {listing.classes} {word} ({shown}), {says}; give {give}, or "
            f"`--set data.classes={listing.classes}`"
        )
    if listing.classes > classes:
        worst = int(listing.labels.argmax())
        raise DataError(
            f"{option}: {listing.path(worst)} has label {listing.classes - 1}, {says} (labels "
            f"0 to {classes - 1}); `--set data.classes={listing.classes}` takes them all"
        )
    return listing


class EncodedImages(DataSource):
    """Encoded or raw images, decoded and cropped when they are read."""

    def __init__(
        self,
        listing: Listing,
        image: ImageSpec,
        limit: Limit,
        rendering: Rendering = AS_STORED,
    ) -> None:
        self.listing = listing
        self.image = image
        self.limit = limit
        self.rendering = rendering
        self.size = HeightWidth(image.height, image.width)

    def __len__(self) -> int:
        return len(self.listing.names)

    @override
    def labels(self) -> Tensor:
        return self.listing.labels

    @property
    @override
    def class_names(self) -> tuple[str, ...]:
        return self.listing.class_names

    @override
    def read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        image = self.image
        x = torch.empty((len(indices), image.channels, *self.size), dtype=torch.uint8)
        for pixels, i in zip(x, indices, strict=True):
            self._read_into(pixels, i)
        return x, self.listing.labels[torch.as_tensor(indices)]

    @property
    @override
    def left_out(self) -> Sequence[LeftOut]:
        return self.listing.left_out

    def path_of(self, index: int) -> str:
        """Return path or URL of the file, or of the archive and the member in it."""
        return self.listing.path(index)

    @override
    def original(self, index: int) -> Original:
        place, data = self.listing.path(index), self._bytes(index)
        if self.listing.raw:
            return Original(self.listing.raw[1], self.listing.raw[0])
        upright = self.rendering.upright
        return described(data, place, self.size, self.limit, upright=upright)

    def _bytes(self, i: int) -> bytes:
        try:
            return self.listing.fetch(i)
        except DAMAGED as error:
            raise BadImageError(self.listing.path(i), f"damaged image ({error})") from error
        except (OSError, ValueError) as error:
            raise DataError(f"{self.listing.path(i)}: cannot be read: {error}") from error

    def _read_into(self, pixels: Tensor, i: int) -> None:
        data = self._bytes(i)
        if self.listing.raw is None:
            decode_into(pixels, data, self.listing.path(i), self.limit, self.rendering)
        elif len(data) != pixels.numel():
            raise BadImageError(self.listing.path(i), "damaged image (its file is cut short)")
        else:
            stored = np.frombuffer(data, np.uint8).reshape(self.listing.raw)
            pixels.numpy()[...] = stored.transpose(2, 0, 1)


@attrs.frozen(kw_only=True)
class EncodedConfig(SourceConfig):
    """Options of all sources of encoded images.

    `size`, `classes`, `channels`, `flip`, `sampling`, `on_bad_image`, `max_bad_fraction`,
    `held_out`, `workers`, `max_pixels`, `upright` and `background` are described by
    `image_folder`.
    """

    address: ClassVar[str] = "path"
    word: ClassVar[str] = "classes"

    size: Size = attrs.field(converter=as_size, validator=positive_size)
    classes: int = attrs.field(validator=validators.ge(0))
    channels: int = attrs.field(default=3, validator=validators.in_((1, 3)))
    flip: bool = True
    sampling: Sampling = "natural"
    on_bad_image: Literal["stop", "skip"] = "stop"
    max_bad_fraction: float = attrs.field(
        default=0.01, validator=[validators.ge(0), validators.le(1)]
    )
    held_out: str | None = attrs.field(
        default=None, converter=optional(addresses.plain), validator=addresses.allowed
    )
    workers: int = attrs.field(default=4, validator=validators.ge(0))
    max_pixels: int = attrs.field(default=MAX_PIXELS, validator=validators.gt(0))
    upright: bool = False
    background: str | None = attrs.field(default=None)

    @background.validator
    def _is_colour(self, field: attrs.Attribute[str | None], value: str | None) -> None:
        if value is not None:
            colour(value)

    @property
    def image(self) -> ImageSpec:
        """`channels`, `size` and `classes`, as the recipe says."""
        return ImageSpec(self.channels, *height_width(self.size), self.classes)

    @abstractmethod
    def listing(self, *, held_out: bool) -> Listing:
        """List what the data hold, whatever `classes` says.

        Raises:
            DataError: They are missing or cannot be understood.
        """

    @property
    def has_held_out(self) -> bool:
        """Whether other images are given for the probe and for scores."""
        return self.held_out is not None

    def with_counted_classes(self) -> EncodedConfig:
        """Return it with the number of classes that are listed."""
        return attrs.evolve(self, classes=self.listing(held_out=False).classes)

    def option(self, *, held_out: bool) -> str:
        """Return the recipe's key that has the address, for messages."""
        return "data.held_out" if held_out else f"data.{self.address}"

    def open(self, *, held_out: bool = False) -> DataSource:
        """List the images and check their classes; they are read on demand."""
        other = held_out and self.has_held_out
        listing = self.listing(held_out=other)
        fit = fitted(listing, self.classes, self.option(held_out=other), self.word)
        limit = Limit(self.max_pixels, "data.max_pixels")
        return EncodedImages(fit, self.image, limit, Rendering(self.upright, self.background))
