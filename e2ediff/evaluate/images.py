"""Sets of images to evaluate, or to compare with: folders, npz files, data sources, samples.

Shapes: B batch, n images, C H W image.
"""

from __future__ import annotations

import hashlib
import math
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO

import attrs
import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from e2ediff import addresses
from e2ediff.addresses import Address
from e2ediff.data import DataSource, LeftOut
from e2ediff.distributed.threads import quiet
from e2ediff.errors import DataError
from e2ediff.files.arrays import large_images, npy_header
from e2ediff.files.damage import DAMAGED_ARRAY
from e2ediff.files.images import MAX_PIXELS, copy_pixels, is_grey, opened, to_mode
from e2ediff.files.tree import ImageFile, named_images
from e2ediff.model.inference import Model
from e2ediff.sample.conditions import Conditions
from e2ediff.sample.load import ModelRef

_CHUNK = 1 << 22
_BATCH_PIXELS = 4 * MAX_PIXELS
_ARRAY = "arr_0.npy"
_IMAGES = "uint8 (n, height, width, 1 or 3)"


class ImageSet(ABC):
    """Images that can be read in order, from any index and in any process."""

    place: str
    count: int
    shape: tuple[int, int, int]
    """(C, H, W)."""
    unit: int = 1
    """Images that cost as much together as one: a share of them begins at a multiple."""
    left_out: Sequence[LeftOut] = ()
    """Files among the images that are not read."""

    @abstractmethod
    def batches(self, start: int, stop: int, size: int) -> Iterator[Tensor]:
        """Yield images `start` to `stop`, (B, C, H, W), B at most `size`.

        uint8 where they are stored as bytes, float in [-1, 1] where they are made.
        """

    @abstractmethod
    def sha256(self) -> str:
        """Return the hash of the content; "" for sampled images."""


class _Indexed(ImageSet):
    """Images of which any can be read."""

    @abstractmethod
    def read(self, numbers: range) -> Tensor: ...

    @override
    def batches(self, start: int, stop: int, size: int) -> Iterator[Tensor]:
        size = images_at_once(size, self.shape)
        for first in range(start, stop, size):
            yield self.read(range(first, min(first + size, stop)))


class FolderImages(_Indexed):
    """The image files below a folder or in a zip or tar of one, sorted by path; all of one size.

    They are grey if all files are grey, and otherwise colour.
    """

    def __init__(self, root: Address) -> None:
        self.place = addresses.plain(root)
        found = named_images(root)
        self.files, self.left_out, self.count = found.files, found.left_out, len(found.files)
        # Stop at the first colour image, which in a set of colour images is the first one.
        grey = all(self._is_grey(file) for file in self.files)
        with opened(self.files[0].read(), self.files[0].address) as first:
            self.shape = (1 if grey else 3, first.height, first.width)

    def _is_grey(self, file: ImageFile) -> bool:
        with opened(file.read(), file.address) as image:
            return is_grey(image)

    def _read_into(self, pixels: Tensor, file: ImageFile) -> None:
        with opened(file.read(), file.address) as image:
            if (image.height, image.width) != self.shape[1:]:
                raise DataError(
                    f"{file.address}: {image.width} x {image.height} pixels, the first image has "
                    f"{self.shape[2]} x {self.shape[1]}; scores need one size. Give real photos "
                    "as a data source, which crops: --reference '{name: image_folder, root: ..., "
                    "size: ..., classes: ...}'"
                )
            copy_pixels(to_mode(image, self.shape[0]), pixels)

    @override
    def read(self, numbers: range) -> Tensor:
        x = torch.empty((len(numbers), *self.shape), dtype=torch.uint8)
        for pixels, i in zip(x, numbers, strict=True):
            self._read_into(pixels, self.files[i])
        return x

    def sha256(self) -> str:
        """Hash the content of all files, in order, without their names."""
        content = hashlib.sha256()
        for file in self.files:
            content.update(hashlib.sha256(file.read()).digest())
        return content.hexdigest()


def images_at_once(size: int, shape: tuple[int, int, int]) -> int:
    """Return the batch size for images (C, H, W): `size`, or less for very large images."""
    return max(1, min(size, _BATCH_PIXELS // (shape[1] * shape[2])))


class NpzImages(ImageSet):
    """The array `arr_0` (n, H, W, C) of bytes in an npz, as ADM stores samples; streamed."""

    def __init__(self, place: Address) -> None:
        self.place = place = addresses.plain(place)
        with readable(place, "arr_0", _IMAGES), self._archive() as archive:
            member = archive.getinfo(_ARRAY)
            with archive.open(member) as file:
                shape, order, dtype = npy_header(file)
                promised = file.tell() + math.prod(shape) * dtype.itemsize
            if promised > member.file_size and not large_images(shape):
                raise EOFError(f"it ends {promised - member.file_size} bytes early")
        if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or order:
            raise DataError(f"{place}: arr_0 is {dtype} {shape}, expected {_IMAGES}")
        if min(shape) < 1:
            raise DataError(
                f"{place}: arr_0 holds no images, {shape}; expected {_IMAGES}; write it again"
            )
        self.count = shape[0]
        self.shape = (shape[3], shape[1], shape[2])
        if large := large_images(shape):
            raise DataError(f"{place}: arr_0 holds {large}; write smaller ones")

    def _archive(self) -> zipfile.ZipFile:
        return zipfile.ZipFile(addresses.open_file(self.place, typed=True))

    @override
    def batches(self, start: int, stop: int, size: int) -> Iterator[Tensor]:
        c, h, w = self.shape
        with readable(self.place, "arr_0", _IMAGES), self._archive().open(_ARRAY) as file:
            npy_header(file)
            left = start * c * h * w
            while left:
                left -= len(_exactly(file, min(left, _CHUNK)))
            size = images_at_once(size, self.shape)
            for first in range(start, stop, size):
                n = min(size, stop - first)
                data = bytearray(_exactly(file, n * c * h * w))
                rows = torch.frombuffer(data, dtype=torch.uint8).reshape(n, h, w, c)
                yield rows.permute(0, 3, 1, 2)

    def sha256(self) -> str:
        """Hash the file."""
        return file_sha256(self.place)


def stored_images(place: Address) -> ImageSet:
    """Open images at an address: an npz, a folder of images or a zip or tar of one.

    A folder that `sample --format npz` made has its images in an npz.

    Raises:
        DataError: There are none.
    """
    place = addresses.plain(place)
    if place.endswith(".npz"):
        return NpzImages(place)
    inside = f"{place.rstrip('/')}/samples.npz"
    with suppress(ImportError, ValueError, OSError):  # which the folder's own message says
        fs, path = addresses.file_system(inside, typed=True)
        if fs.isfile(path) and fs.isfile(f"{path.rpartition('/')[0]}/set.json"):
            return NpzImages(inside)
    return FolderImages(place)


@contextmanager
def readable(place: str, array: str, expected: str) -> Iterator[None]:
    """Turn the errors of numpy, zip and zlib for a damaged npz into one message.

    Raises:
        DataError: The array cannot be read.
    """
    try:
        yield
    except DAMAGED_ARRAY as error:
        what = str(error).partition("\n")[0] or type(error).__name__
        raise DataError(
            f"{place}: {array} cannot be read: {what}; expected {expected}. The file is damaged "
            "or of another kind; copy or write it again"
        ) from error


def _exactly(file: IO[bytes], count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise EOFError(f"it ends {count - len(data)} bytes early")
    return data


def file_sha256(place: Address) -> str:
    """Hash a file's bytes."""
    content = hashlib.sha256()
    with addresses.open_file(place, typed=True) as file:
        while chunk := file.read(_CHUNK):
            content.update(chunk)
    return content.hexdigest()


class PixelHash:
    """Hash of images (B, C, H, W), uint8, in order; how they are batched does not matter."""

    def __init__(self) -> None:
        self._content = hashlib.sha256()
        self._begun = False

    def add(self, pixels: Tensor) -> None:
        """Add a batch to the hash."""
        if not self._begun:
            self._content.update(str(tuple(pixels.shape[1:])).encode())
            self._begun = True
        self._content.update(pixels.contiguous().numpy().tobytes())

    @property
    def sha256(self) -> str:
        """Return the hash of all batches so far."""
        return self._content.hexdigest()


class SourceImages(_Indexed):
    """All images of a data source, in its own order."""

    def __init__(self, source: DataSource, place: str) -> None:
        self.place, self.source, self.count = place, source, len(source)
        self.left_out = source.left_out
        channels, height, width = source.read([0])[0].shape[1:]
        self.shape = (channels, height, width)

    @override
    def read(self, numbers: range) -> Tensor:
        return self.source.read(numbers)[0]

    def sha256(self) -> str:
        """Hash the pixels of all images, in order."""
        content = PixelHash()
        for batch in self.batches(0, self.count, 256):
            content.add(batch)
        return content.sha256


def check_finite(x: Tensor, what: str, first: int) -> None:
    """Refuse images (B, C, H, W) with nan or inf, which become black when rounded to bytes.

    Raises:
        DataError: An image is not finite; `first` is the number of the first image of x.
    """
    broken = (~x.isfinite()).flatten(1).any(dim=1)
    if broken.any():
        number = first + int(broken.nonzero()[0])
        raise DataError(
            f"{what} are not finite, the first of them is number {number}: the weights or the "
            "sampling have diverged; choose another --checkpoint, sampler or guidance"
        )


@attrs.define(eq=False, slots=False)
class Samples(ImageSet):
    """Images sampled by a run's model, one for each label; image i depends on (seed, i) alone.

    `labels` are classes, or the numbers that `Conditions` gives to other conditions.
    The model is loaded on first use, so that each process loads its own.
    `guides` are hashes of the networks that guidance uses, the same in all processes.
    """

    ref: ModelRef
    labels: Sequence[int]
    seed: int = 0
    _model: Model | None = None
    guides: tuple[str, ...] | None = None
    _conditions: Conditions | None = None

    def __attrs_post_init__(self) -> None:
        self.place, self.count = self.ref.run, len(self.labels)

    @property
    def model(self) -> Model:
        """Load the run's model, in eval mode."""
        if self._model is None:
            self._model = self.ref.load(warn=quiet)  # `run_subject` has warned
            self._check_guides(self._model)
        return self._model

    def _check_guides(self, model: Model) -> None:
        for i, other in enumerate(model.others):
            if self.guides is not None and self.guides[i] != other.origin.sha256:
                raise DataError(
                    f"{other.origin.run}: it guides these images, and saved a newer checkpoint "
                    "while they were made; choose one: --set guidance.checkpoint="
                    f"{other.origin.checkpoint}"
                )

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_model": None, "_conditions": None}

    @property
    def unit(self) -> int:  # type: ignore[override]
        """Return the rows of the network's tiles."""
        return self.model.rows

    @property
    def shape(self) -> tuple[int, int, int]:  # type: ignore[override]
        """Return the shape of the model's images."""
        image = self.model.recipe.data.image
        return (image.channels, image.height, image.width)

    def batches(self, start: int, stop: int, size: int) -> Iterator[Tensor]:
        """Yield samples, float in [-1, 1], not rounded; computed in whole tiles for any slice.

        Otherwise a sampler that couples images would make different ones for another slice, and
        every slice would cost whole tiles.
        """
        if self._conditions is None:
            self._conditions = Conditions(self.model.recipe, self.labels)
        rows = self.unit
        whole = max(1, size // rows) * rows
        for first in range(start - start % rows, stop, whole):
            last = min(first + whole, -(-stop // rows) * rows, self.count)
            tiles = self.model.tiles(self._conditions[first:last], seed=self.seed, first=first)
            x = torch.cat([tile.x for tile in tiles])
            check_finite(x, f"{self.place}: samples", first)
            yield from torch.split(x[max(start - first, 0) : stop - first], size)

    def sha256(self) -> str:
        """Return "": the images are sampled, not stored."""
        return ""
