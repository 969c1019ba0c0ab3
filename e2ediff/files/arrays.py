"""NumPy's files, judged by their headers before an array is made."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import IO

import numpy as np

from e2ediff.files.images import MAX_PIXELS, too_many


def npy_header(
    file: IO[bytes] | io.BufferedIOBase,
) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    """Shape, whether it is in Fortran's order, and type of the array in an npy file.

    Raises:
        ValueError: It has no such header.
    """
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def large_images(shape: Sequence[int], size: int = 0) -> str:
    """Why an array of images (n, height, width, ...) is not read; empty if it may be.

    Args:
        shape: Its shape; one of fewer dimensions holds no images.
        size: Length to which their shorter sides will be brought, 0 if they stay as they are.
    """
    large = too_many((shape[2], shape[1]), size) if len(shape) > 2 else ""
    return large and f"images of {large}, more than the {MAX_PIXELS:,} that are ever decoded"
