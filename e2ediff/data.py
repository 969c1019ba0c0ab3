"""What the engine reads: image shapes, batches and data sources.

Shapes: B batch, C H W image.
Images are uint8 in a source and float in [-1, 1] in a batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import attrs
import torch
from attrs import validators
from torch import Tensor

from e2ediff.condition import ClassLabels, Condition, ConditionSpec, class_labels

Sampling = Literal["natural", "class_balanced"]
"""How often each class is shown: as often as it occurs, or all equally often."""

Rounding = Literal["nearest", "half_up", "down"]
"""How values between two bytes become one."""


class HeightWidth(NamedTuple):
    """The sides of images, in pixels; a recipe writes `[height, width]`."""

    height: int
    width: int


Size = int | HeightWidth
"""An option for the shape of images: the side of squares, or height and width."""


def height_width(size: Size) -> HeightWidth:
    """Return the height and width that a size stands for."""
    return HeightWidth(size, size) if isinstance(size, int) else size


def as_size(value: Size | Sequence[int]) -> Size:
    """Convert a side, or height and width, to a size; equal sides become one number.

    A block that holds a `Size` converts it by this, so that 32 and [32, 32] are one recipe.

    Raises:
        ValueError: A sequence does not have two items.
    """
    if isinstance(value, int):
        return value
    if len(value) != 2:
        raise ValueError(f"expected a side or [height, width], got {[*value]}")
    height, width = value
    return height if height == width else HeightWidth(height, width)


def size_text(size: Size) -> str:
    """Return a size as a recipe writes it: `32` or `[32, 48]`."""
    return str(size) if isinstance(size, int) else str([*size])


def positive_size(block: object, option: attrs.Attribute[Any], size: Size) -> None:
    """Validate an attrs field that holds a `Size`.

    Raises:
        ValueError: A side is below 1.
    """
    if min(height_width(size)) < 1:
        raise ValueError(f"expected sides of at least 1 pixel, got {size_text(size)}")


def from_pixels(pixels: Tensor) -> Tensor:
    """Convert pixels 0..255, of any shape, to float32 in [-1, 1]."""
    # In place after the first copy, as fresh memory takes longer than the arithmetic.
    return pixels.to(torch.float32, copy=True).div_(127.5).sub_(1)


def pixel_values(x: Tensor) -> Tensor:
    """Convert images in [-1, 1], of any shape, to the scale 0..255, not rounded."""
    return (x + 1) * 127.5


def to_pixels(x: Tensor, rounding: Rounding = "nearest") -> Tensor:
    """Convert images in [-1, 1], of any shape, to uint8.

    Of `pixel_values` y, clipped to 0..255, `nearest` rounds y (halves to the even number),
    `half_up` takes the floor of y + 0.5, `down` the floor of y.
    """
    y = pixel_values(x)
    if rounding == "half_up":
        y = y + 0.5
    y = y.round() if rounding == "nearest" else y.floor()
    return y.clamp(0, 255).to(torch.uint8)


@attrs.frozen
class ImageSpec:
    """Shape of the images, and the conditions available for them.

    `classes` is 0 for unlabelled data, and for data with conditions of another kind, which
    `conditioning` then names; by default it is that of the classes.
    `empty_classes` are the classes that no training image shows, where a run has recorded them.
    """

    channels: int
    height: int
    width: int
    classes: int
    class_names: tuple[str, ...] = ()
    conditioning: ConditionSpec = attrs.field(
        default=attrs.Factory(lambda self: ClassLabels(self.classes), takes_self=True)
    )
    empty_classes: tuple[int, ...] = ()

    @conditioning.validator
    def _agrees(self, field: attrs.Attribute[ConditionSpec], value: ConditionSpec) -> None:
        classes = value.classes if isinstance(value, ClassLabels) else 0
        if classes != self.classes:
            raise ValueError(f"{self.classes} classes, and conditions are {value.title}")

    @property
    def null_label(self) -> int:
        """The label that means "no class": one past the last class."""
        return self.classes


@attrs.frozen
class Batch:
    """Images x (B, C, H, W), float in [-1, 1], and what is known of them, a condition each."""

    x: Tensor
    condition: Condition

    def rows(self, index: slice) -> Batch:
        """Return some of the images."""
        return Batch(self.x[index], self.condition.rows(index))


@attrs.frozen
class Original:
    """An image as it lies in its source, before any crop, from its header.

    Args:
        width: Pixels.
        height: Pixels.
        turned: Whether its EXIF data ask to turn or mirror it.
        transparent: Whether it has an alpha channel or a transparent colour.
        frames: Images in the file, of which the first is read.
    """

    width: int
    height: int
    turned: bool = False
    transparent: bool = False
    frames: int = 1


@attrs.frozen
class LeftOut:
    """Files that lie among the images and are not read, for one reason.

    Args:
        reason: What they are, as in "3 files with suffix .heic".
        count: Their number.
        first: Path of the first of them.
    """

    reason: str
    count: int
    first: str


def left_out_text(left_out: Sequence[LeftOut]) -> str:
    """Return one text of what is left out; empty for nothing."""
    parts = [f"{one.count:,} {one.reason} ({one.first})" for one in left_out]
    total = sum(one.count for one in left_out)
    what = "file is" if total == 1 else "files are"
    return f"{total:,} {what} left out: {', '.join(parts)}" if parts else ""


class DataSource(ABC):
    """Images that can be read by index, in any order and from any process."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images."""

    @abstractmethod
    def read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor | Condition]:
        """Read images (B, C, H, W), uint8, and labels (B,), int64, or a condition, by index.

        A source of conditions that are no class labels names their kind in its block's `image`.

        Deterministic: the same indices give the same values in every process.

        Raises:
            BadImageError: An image is damaged or too large; the message has its path.
            DataError: The place where it lies cannot be read.
        """

    def labels(self) -> Tensor:
        """Return the labels of all images, (M,), int64; 0 for unlabelled ones.

        A source that knows them without reading the images overrides this.

        Raises:
            DataError: The images have conditions that are no class labels.
        """
        rows = range(len(self))
        parts = [self.read(rows[i : i + 64])[1] for i in range(0, len(self), 64)]
        labels = [p if isinstance(p, Tensor) else class_labels(p) for p in parts]
        return torch.cat(labels) if labels else torch.zeros(0, dtype=torch.int64)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes as the data have them, by label; empty if they have none."""
        return ()

    @property
    def left_out(self) -> Sequence[LeftOut]:
        """Files among the images that are not read; hidden ones are not mentioned."""
        return ()

    def path_of(self, index: int) -> str:
        """Return the path of an image, for messages and lists; nothing is read."""
        return f"image {index}"

    def original(self, index: int) -> Original:
        """Describe an image before any crop, from its header alone where there is one.

        Raises:
            BadImageError: The header is damaged, or promises too many pixels.
            DataError: The place where it lies cannot be read.
        """
        x, _ = self.read([index])
        return Original(x.shape[-1], x.shape[-2])


Certainty = Literal["possible", "likely", "certain"]
"""How sure a source is that it reads what lies at an address."""


@attrs.frozen
class Recognised:
    """How a source would read what lies at an address; the most certain source is taken.

    Args:
        options: Of its data block, the address among them; others keep their defaults.
        certainty: `certain` by a file that no other source has, such as an index; `likely` by the
            kind of the files; `possible` where nothing speaks against it.
    """

    options: Mapping[str, Any]
    certainty: Certainty = attrs.field(
        default="likely", validator=validators.in_(("possible", "likely", "certain"))
    )


class SourceConfig(ABC):
    """The recipe's `data:` block: knows the images' shape before any file is opened.

    `movable` and `harmless` name the options that may be others when a run is resumed; any other
    difference refuses it. A movable option says where the images lie: they must be as many as
    before, with the same labels in the same order. A harmless one changes nothing that is read:
    by default `workers`, `on_bad_image` and `max_bad_fraction`, as a damaged image that ended the
    run under one policy would have ended it under another.
    """

    movable: ClassVar[tuple[str, ...]] = ()
    harmless: ClassVar[tuple[str, ...]] = ("workers", "on_bad_image", "max_bad_fraction")

    @classmethod
    def recognises(cls, address: str) -> Recognised | None:
        """Return how it would read what lies at a path, URL or pattern; None if it would not.

        Every source is asked where a recipe or a command gives an address instead of a data block.
        It looks at names, and at the head of a file at most.

        Raises:
            DataError: The place cannot be read.
        """
        return None

    def with_counted_classes(self) -> SourceConfig:
        """Return this block with the number of classes in the data; itself if it has no count.

        Raises:
            DataError: The data are missing or cannot be understood.
        """
        return self

    @property
    @abstractmethod
    def image(self) -> ImageSpec:
        """Shape and conditions, without touching the data: `check` works on a bare machine."""

    @property
    def flip(self) -> bool:
        """Whether the loader may mirror images left to right."""
        return False

    @property
    def sampling(self) -> Sampling:
        """How often the loader shows each class."""
        return "natural"

    @property
    def on_bad_image(self) -> Literal["stop", "skip"]:
        """Whether a damaged image stops the run or is replaced by another of its class."""
        return "stop"

    @property
    def max_bad_fraction(self) -> float:
        """Share of damaged images that `skip` accepts, of the training images seen so far."""
        return 0.01

    @property
    def workers(self) -> int:
        """Processes that read images; 0 reads in the training process."""
        return 0

    @property
    def has_held_out(self) -> bool:
        """Whether `open(held_out=True)` gives other images than the training ones."""
        return True

    @abstractmethod
    def open(self, *, held_out: bool = False) -> DataSource:
        """Open the images to train on, or with `held_out` those for the probe and for scores.

        A source without a held-out set returns its training images for both.

        Raises:
            DataError: The data are missing or not what this block says.
        """
