"""Fashion-MNIST, bundled or as it is published.

Shapes: B batch, C H W image.
"""

from __future__ import annotations

from functools import partial
from importlib import resources
from typing import ClassVar

import attrs
import torch
from attrs import validators
from attrs.converters import optional
from torch import Tensor
from typing_extensions import override

from e2ediff import addresses
from e2ediff.data import DataSource, ImageSpec, SourceConfig
from e2ediff.errors import DataError
from e2ediff.files.arrays import InMemory, read_idx
from e2ediff.files.location import Location

FASHION_CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle-boot",
)


@attrs.frozen(kw_only=True)
class FashionMNIST(SourceConfig):
    """Fashion-MNIST: grey photos of clothing, 28 pixels, ten balanced classes.

    Without `root`, the 10,000 images bundled with e2ediff; every fifth of them (index 4, 9, 14,
    ...) is held out and 8,000 are trained on.
    With `root` (a folder or fsspec URL of the four `*-ubyte.gz` files), the 60,000 training
    images, and the 10,000 others held out.
    `size` 32 pads with black; 28 leaves the images as they are.

    Source: Xiao, Rasul & Vollgraf 2017 (arXiv 1708.07747), MIT licence.
    """

    movable: ClassVar[tuple[str, ...]] = ("root",)

    size: int = attrs.field(default=32, validator=validators.in_((28, 32)))
    root: str | None = attrs.field(
        default=None, converter=optional(addresses.plain), validator=addresses.allowed
    )

    @property
    @override
    def image(self) -> ImageSpec:
        return ImageSpec(1, self.size, self.size, 10, FASHION_CLASSES)

    @override
    def open(self, *, held_out: bool = False) -> DataSource:
        if self.root is None:
            x, label = self._pair(None, "t10k")
            rows = torch.arange(len(x)) % 5 == 4
            rows = rows if held_out else ~rows
            x, label = x[rows], label[rows]
        else:
            x, label = self._pair(self.root, "t10k" if held_out else "train")
        pad = (self.size - 28) // 2
        return InMemory(torch.nn.functional.pad(x, (pad, pad, pad, pad))[:, None], label.long())

    def _pair(self, root: str | None, split: str) -> tuple[Tensor, Tensor]:
        names = (f"{split}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))
        read = _bundled if root is None else partial(_published, Location(root, "data.root"))
        images, labels = (read_idx(*read(name)) for name in names)
        if images.ndim != 3 or images.shape[1:] != (28, 28) or len(images) != len(labels):
            raise DataError(
                f"{root or 'bundled images'}: images {tuple(images.shape)} and labels "
                f"{tuple(labels.shape)}, expected (n, 28, 28) and (n,)"
            )
        return images, labels


def _bundled(name: str) -> tuple[bytes, str]:
    return (resources.files("e2ediff") / "assets" / "fashion_mnist" / name).read_bytes(), name


def _published(location: Location, name: str) -> tuple[bytes, str]:
    place = f"{location.url.rstrip('/')}/{name}"
    try:
        return location.read(location.below(name)), place
    except (OSError, ValueError) as error:
        raise DataError(
            f"data.root: cannot read {place}: {error}. Expected the four Fashion-MNIST files "
            "there (*-ubyte.gz); leave data.root out to train on the bundled images."
        ) from error
