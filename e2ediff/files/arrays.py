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
from e2ediff.files.images import MAX_PIXELS, centre_crop, check_unpacked, to_tensor, too_many


def npy_header(
    file: IO[bytes] | io.BufferedIOBase,
) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    """Read shape, whether it is in Fortran's order, and type of the array in an npy file.

    Raises:
        ValueError: It has no such header.
    """
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


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
            x = torch.stack([self._cropped(one, self.size) for one in x])
        return x, self.label[rows]

    @staticmethod
    def _cropped(x: Tensor, size: HeightWidth) -> Tensor:
        pixels = x.permute(1, 2, 0).numpy()
        image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        return to_tensor(np.array(centre_crop(image, size)))


def read_idx(data: bytes, source: str, what: str = "") -> Tensor:
    """Read the uint8 array of an IDX file (MNIST's format), gzipped or plain.

    Args:
        data: The file's content.
        source: Its path, for messages.
        what: What is unpacked to no more than `MAX_BYTES`; empty for images, which have no limit.

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
                check_unpacked(size, what)
            pixels = bytearray(file.read(size))
            found = len(pixels) + sum(map(len, iter(lambda: file.read(1 << 20), b"")))
    except (*DAMAGED, OSError) as error:
        raise DataError(f"{source}: damaged gzip file ({error}); fetch it again") from error
    if found != size:
        raise DataError(
            f"{source}: {found} bytes of data, expected {size} for shape {shape}; fetch it again"
        )
    return torch.from_numpy(np.frombuffer(pixels, np.uint8)).reshape(shape)
