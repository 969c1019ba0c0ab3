"""Sources of images: bundled Fashion-MNIST, class folders, a zip of class folders, synthetic.

Shapes: B batch, C H W image.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from importlib import resources
from pathlib import PurePosixPath

import attrs
import fsspec
import torch
from attrs import validators
from torch import Tensor

from e2ediff.data import DataSource, ImageSpec, SourceConfig
from e2ediff.errors import DataError
from e2ediff.parts.images import EncodedImages, FolderReader, ZipReader

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


class Arrays(DataSource):
    """Images that fit into memory: x (M, C, H, W), uint8, and labels (M,)."""

    def __init__(self, x: Tensor, label: Tensor) -> None:
        self.x = x
        self.label = label

    def __len__(self) -> int:
        return len(self.x)

    def read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Rows of the arrays."""
        rows = torch.as_tensor(indices)
        return self.x[rows], self.label[rows]


def read_idx(data: bytes, source: str) -> Tensor:
    """The uint8 array of an IDX file (MNIST's format), gzipped or plain.

    Raises:
        DataError: Not an IDX file of bytes, or not all of it.
    """
    try:
        raw = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError) as error:
        raise DataError(f"{source}: damaged gzip file ({error}); fetch it again") from error
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise DataError(f"{source}: not an IDX file of bytes (starts with {raw[:4].hex()})")
    rank = raw[3]
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank)]
    start, size = 4 + 4 * rank, int(torch.tensor(shape).prod())
    if len(raw) - start != size:
        raise DataError(
            f"{source}: {len(raw) - start} bytes of data, expected {size} for shape {shape}; "
            "fetch it again"
        )
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=start).reshape(shape)


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

    size: int = attrs.field(default=32, validator=validators.in_((28, 32)))
    root: str | None = None

    @property
    def image(self) -> ImageSpec:
        """One channel, ten classes."""
        return ImageSpec(1, self.size, self.size, 10, FASHION_CLASSES)

    def open(self, *, held_out: bool = False) -> DataSource:
        """The images in memory."""
        if self.root is None:
            x, label = self._pair(None, "t10k")
            rows = torch.arange(len(x)) % 5 == 4
            rows = rows if held_out else ~rows
            x, label = x[rows], label[rows]
        else:
            x, label = self._pair(self.root, "t10k" if held_out else "train")
        pad = (self.size - 28) // 2
        return Arrays(torch.nn.functional.pad(x, (pad, pad, pad, pad))[:, None], label.long())

    def _pair(self, root: str | None, split: str) -> tuple[Tensor, Tensor]:
        arrays = []
        for kind in ("images-idx3", "labels-idx1"):
            name = f"{split}-{kind}-ubyte.gz"
            if root is None:
                place = name
                data = (
                    resources.files("e2ediff") / "assets" / "fashion_mnist" / name
                ).read_bytes()
            else:
                place = f"{root.rstrip('/')}/{name}"
                try:
                    with fsspec.open(place, "rb") as file:
                        data = file.read()
                except (OSError, ValueError, ImportError) as error:
                    raise DataError(
                        f"data.root: cannot read {place}: {error}. Expected the four "
                        "Fashion-MNIST files there (*-ubyte.gz); leave data.root out to train "
                        "on the bundled images."
                    ) from error
            arrays.append(read_idx(data, place))
        images, labels = arrays
        if images.ndim != 3 or images.shape[1:] != (28, 28) or len(images) != len(labels):
            raise DataError(
                f"{root or 'bundled images'}: images {tuple(images.shape)} and labels "
                f"{tuple(labels.shape)}, expected (n, 28, 28) and (n,)"
            )
        return images, labels


@attrs.frozen(kw_only=True)
class ImageFolder(SourceConfig):
    """A folder with one folder of images for each class, as ImageNet's own layout.

    `root` is a path or fsspec URL (`s3://`, `gs://`, ...).
    Classes are the folders' names in sorted order; their number must be `classes`.
    Images are cropped as ADM does: halved by box filters while twice `size` or larger, resized
    with bicubic filter so that the shorter side is `size`, and cut in the centre.
    `flip` mirrors half of the training images.
    `channels` is 3 for colour, 1 for grey.
    `held_out` is a second such folder for the probe and for scores.
    `workers` processes read and decode.
    Images above `max_pixels` (width times height) are refused before they are decoded.
    """

    root: str
    size: int = attrs.field(validator=validators.gt(0))
    classes: int = attrs.field(validator=validators.ge(1))
    channels: int = attrs.field(default=3, validator=validators.in_((1, 3)))
    flip: bool = True
    held_out: str | None = None
    workers: int = attrs.field(default=4, validator=validators.ge(0))
    max_pixels: int = attrs.field(default=64_000_000, validator=validators.gt(0))

    @property
    def image(self) -> ImageSpec:
        """`channels`, `size` and `classes`, as the recipe says."""
        return ImageSpec(self.channels, self.size, self.size, self.classes)

    @property
    def has_held_out(self) -> bool:
        """Whether a second folder is given."""
        return self.held_out is not None

    def open(self, *, held_out: bool = False) -> DataSource:
        """List the folder and check its classes; images are read on demand."""
        root = self.held_out if held_out and self.held_out else self.root
        reader = FolderReader(root)
        return EncodedImages(reader, self.image, "data.root", self.max_pixels)


@attrs.frozen(kw_only=True)
class Archive(SourceConfig):
    """A zip file with one folder of images for each class.

    `path` is the zip's path or fsspec URL; `inside` the folder in it that holds the class
    folders (empty for the top), `held_out` such a folder for the probe and for scores.
    `size`, `classes`, `channels`, `flip`, `workers` and `max_pixels` are those of `image_folder`.
    """

    path: str
    size: int = attrs.field(validator=validators.gt(0))
    classes: int = attrs.field(validator=validators.ge(1))
    inside: str = ""
    held_out: str | None = None
    channels: int = attrs.field(default=3, validator=validators.in_((1, 3)))
    flip: bool = True
    workers: int = attrs.field(default=2, validator=validators.ge(0))
    max_pixels: int = attrs.field(default=64_000_000, validator=validators.gt(0))

    @property
    def image(self) -> ImageSpec:
        """`channels`, `size` and `classes`, as the recipe says."""
        return ImageSpec(self.channels, self.size, self.size, self.classes)

    @property
    def has_held_out(self) -> bool:
        """Whether a second folder is given."""
        return self.held_out is not None

    def open(self, *, held_out: bool = False) -> DataSource:
        """List the zip and check its classes; images are read on demand."""
        inside = self.held_out if held_out and self.held_out is not None else self.inside
        reader = ZipReader(self.path, str(PurePosixPath(inside)) if inside else "")
        return EncodedImages(reader, self.image, "data.path", self.max_pixels)


@attrs.frozen(kw_only=True)
class Synthetic(SourceConfig):
    """Smooth random images with a class-dependent pattern, made from the index alone.

    For tests and benchmarks that need no real data.
    `count` images of `size` pixels in `channels` channels, of `classes` classes (0: unlabelled);
    `flip` lets the loader mirror them.
    """

    size: int = attrs.field(default=32, validator=validators.gt(0))
    classes: int = attrs.field(default=10, validator=validators.ge(0))
    channels: int = attrs.field(default=3, validator=validators.in_((1, 3)))
    count: int = attrs.field(default=1024, validator=validators.gt(0))
    flip: bool = False

    @property
    def image(self) -> ImageSpec:
        """As the options say."""
        return ImageSpec(self.channels, self.size, self.size, self.classes)

    def open(self, *, held_out: bool = False) -> DataSource:
        """Images that are computed when read; the held-out ones have other indices."""
        return _Patterns(self, self.count if held_out else 0)


class _Patterns(DataSource):
    def __init__(self, config: Synthetic, first: int) -> None:
        self.config = config
        self.first = first

    def __len__(self) -> int:
        return self.config.count

    def read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A wave whose direction is the class and whose phase and colour are the index's."""
        c = self.config
        index = torch.as_tensor(indices) + self.first
        label = index % max(1, c.classes)
        angle = label * torch.pi / max(1, c.classes)  # (B,)
        place = torch.linspace(-1, 1, c.size)
        along = (
            angle.cos()[:, None, None] * place[None, None, :]
            + angle.sin()[:, None, None] * place[None, :, None]
        )  # (B, H, W)
        phase = (index * 0.618034) % 1 * 2 * torch.pi
        shade = torch.stack([(index * k) % 1 for k in (0.7548777, 0.5698403, 0.8191725)])
        wave = torch.sin(6 * along + phase[:, None, None])[:, None]
        colour = (0.3 + 0.7 * shade.T)[:, : c.channels, None, None]
        x = ((wave * colour + 1) * 127.5).to(torch.uint8)
        return x, label.long() if c.classes else torch.zeros_like(label)
