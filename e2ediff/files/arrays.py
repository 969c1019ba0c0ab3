"""Images as arrays of pixels: NumPy's files and MNIST's, judged by their headers, and a source.

Shapes: M images of a source, B batch, C H W image.
"""

from __future__ import annotations

import gzip
import io
import math
from collections.abc import Sequence
from typing import IO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from typing_extensions import override

from e2ediff.data import DataSource, HeightWidth, Original
from e2ediff.errors import DataError
from e2ediff.files.damage import DAMAGED
from e2ediff.files.images import MAX_PIXELS, centre_crop, copy_pixels, too_many
from e2ediff.limits import OversizedError, check_array, check_size

_PIECE = 1 << 20


def npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    """Read shape, whether it is in Fortran's order, and type of the array in an npy file.

    Raises:
        ValueError: It has no such header.
    """
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def check_npy(file: IO[bytes], size: int, packed: int, what: str = "") -> None:
    """Judge an npy file by its header, before memory is taken for its array.

    Args:
        file: The file, at its beginning.
        size: Its length, once unpacked.
        packed: The bytes that it is unpacked from; `size` if it is not packed.
        what: What it is, if it has no more than `MAX_BYTES`; empty for an array of images.

    Raises:
        ValueError: It has no header, or one of another array than can lie in it.
        OversizedError: It is too large.
    """
    shape, _, dtype = npy_header(file)
    if large := "" if what else large_images(shape):
        raise OversizedError(f"holds {large}; write smaller ones")
    if min(shape, default=0) < 0:
        raise ValueError(f"its header has the shape {shape}")
    promised = math.prod(shape) * dtype.itemsize
    if what:
        check_size(max(size, promised), what)
    check_array(max(size, promised), packed)
    if file.tell() + promised > size:
        raise ValueError(f"{shape} of {dtype} in {size:,} bytes, its header promises {promised:,}")


def large_images(shape: Sequence[int], size: HeightWidth | None = None) -> str:
    """Return why an array of images (n, height, width, ...) is not read; empty if it may be.

    Args:
        shape: Its shape; one of fewer dimensions holds no images.
        size: What a resize will make them cover; None if they stay as they are.
    """
    large = too_many((shape[2], shape[1]), size) if len(shape) > 2 else ""
    return large and f"images of {large}, more than the {MAX_PIXELS:,} that are ever decoded"


class InMemory(DataSource):
    """Images that fit into memory: x (M, C, H, W), uint8, and labels (M,).

    With `size`, they are resized and cropped to it when they are read, as ADM does.
    """

    def __init__(self, x: Tensor, label: Tensor, size: HeightWidth | None = None) -> None:
        self.x = x
        self.label = label
        self.size = None if size == tuple(x.shape[2:]) else size

    def __len__(self) -> int:
        return len(self.x)

    @override
    def labels(self) -> Tensor:
        return self.label

    @override
    def original(self, index: int) -> Original:
        return Original(self.x.shape[-1], self.x.shape[-2])

    @override
    def read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = torch.as_tensor(indices)
        x = self.x[rows]
        if self.size is not None:
            stored, x = x, x.new_empty((*x.shape[:2], *self.size))
            for one, pixels in zip(stored, x, strict=True):
                copy_pixels(centre_crop(picture(one), self.size), pixels)
        return x, self.label[rows]


def picture(pixels: Tensor) -> Image.Image:
    """Return pixels (C, H, W), uint8, in one channel or three as a picture."""
    bands = [Image.fromarray(plane) for plane in pixels.numpy()]
    return bands[0] if len(bands) == 1 else Image.merge("RGB", bands)


def read_idx(data: bytes, source: str, what: str = "") -> Tensor:
    """Read the uint8 array of an IDX file (MNIST's format), gzipped or plain.

    Args:
        data: The file's content.
        source: Its path, for messages.
        what: What it is, if it has no more than `MAX_BYTES`; empty for an array of images.

    Raises:
        DataError: Not an IDX file of bytes, or not all of it.
    """
    try:
        packed = data[:2] == b"\x1f\x8b"
        with gzip.open(io.BytesIO(data)) if packed else io.BytesIO(data) as file:
            start = file.read(4)
            if len(start) < 4 or start[:3] != b"\x00\x00\x08":
                raise DataError(f"{source}: not an IDX file of bytes (starts with {start.hex()})")
            rank = start[3]
            sizes = file.read(4 * rank)
            if len(sizes) < 4 * rank:
                raise DataError(
                    f"{source}: its header is cut short: {4 + len(sizes)} bytes, expected "
                    f"{4 + 4 * rank} for an array of rank {rank}; fetch it again"
                )
            shape = [int.from_bytes(sizes[4 * i : 4 * i + 4], "big") for i in range(rank)]
            if large := large_images(shape):
                raise DataError(f"{source}: holds {large}; write smaller ones")
            size = math.prod(shape)
            if what:
                check_size(size, what)
            check_array(size, len(data))
            pixels = bytearray()
            while piece := file.read(min(size - len(pixels), _PIECE)):
                pixels += piece
            found = len(pixels) + len(file.read(_PIECE))
    except OversizedError as error:
        raise DataError(f"{source}: {error}; write it otherwise, or fetch it again") from error
    except (*DAMAGED, OSError) as error:
        raise DataError(f"{source}: damaged gzip file ({error}); fetch it again") from error
    if found != size:
        more = " or more" if found > size else ""
        raise DataError(
            f"{source}: {found}{more} bytes of data, expected {size} for shape {shape}; fetch it "
            "again"
        )
    return torch.from_numpy(np.frombuffer(pixels, np.uint8)).reshape(shape)
