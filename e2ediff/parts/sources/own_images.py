"""Images of one's own, from any folder or files, as a network takes them.

Shapes: M images, C H W image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from e2ediff import addresses
from e2ediff.addresses import Address
from e2ediff.data import HeightWidth, ImageSpec, from_pixels, left_out_text
from e2ediff.errors import DataError
from e2ediff.files.images import decode
from e2ediff.files.tree import ImageFile, named_images


def list_images(
    places: Sequence[Address], warn: Callable[[str], None] = lambda line: None
) -> list[str]:
    """Paths or URLs of all images in these files and, at any depth, in these folders; sorted.

    Hidden files in a folder do not count; `warn` is called with what else is left out.

    Raises:
        DataError: A place is missing, or holds no images.
    """
    found: list[str] = []
    for place in places:
        images = named_images(place)
        if images.left_out:
            warn(f"{place}: {left_out_text(images.left_out)}")
        found += [file.address for file in images.files]
    return found


def read_images(paths: Sequence[Address], image: ImageSpec) -> Tensor:
    """Images, centre-cropped to the size of `image`, (M, C, H, W) in [-1, 1].

    Raises:
        DataError: One is damaged or too large.
    """
    size = HeightWidth(image.height, image.width)
    pixels = [_read(addresses.plain(path), image.channels, size) for path in paths]
    return torch.stack([from_pixels(one) for one in pixels])


def _read(path: str, channels: int, size: HeightWidth) -> Tensor:
    try:
        file = ImageFile(*addresses.file_system(path, typed=True), path)
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"{path}: cannot be opened: {error}") from error
    return decode(file.read(), path, channels, size)
