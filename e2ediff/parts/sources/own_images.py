"""Images of one's own, from any folder or files, as a network takes them.

Shapes: M images, C H W image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from e2ediff import addresses
from e2ediff.addresses import Address
from e2ediff.data import ImageSpec, from_pixels
from e2ediff.errors import DataError
from e2ediff.files.damage import DAMAGED
from e2ediff.files.images import SUFFIXES, decode, is_image, read_file
from e2ediff.files.names import files_below


def list_images(places: Sequence[Address]) -> list[str]:
    """Paths or URLs of all images in these files and, at any depth, in these folders; sorted.

    Hidden files in a folder do not count.

    Raises:
        DataError: A place is missing, or holds no images.
    """
    found: list[str] = []
    for place in map(addresses.plain, places):
        try:
            fs, root = addresses.file_system(place, typed=True)
            folder, there = fs.isdir(root), fs.exists(root)
            inside = files_below(fs, root) if folder else [root]
        except (ImportError, ValueError, OSError) as error:
            raise DataError(f"{place}: cannot be opened: {error}") from error
        images = [p for p in inside if there and is_image(p)]
        if not images:
            what = "holds no images" if there else "no such file or folder"
            raise DataError(f"{place}: {what} (looked for {', '.join(SUFFIXES)})")
        outer, chained, inner = place.partition("::")
        remote = "://" in outer
        found += [fs.unstrip_protocol(p) + chained + inner if remote else p for p in images]
    return found


def read_images(paths: Sequence[Address], image: ImageSpec) -> Tensor:
    """Images, centre-cropped to the size of `image`, (M, C, H, W) in [-1, 1].

    Raises:
        DataError: One is damaged or too large, or the network's images are not square.
    """
    if image.height != image.width:
        raise DataError(
            f"images are cropped to squares, and this network's are {image.height} x {image.width}"
        )
    return torch.stack([_read(addresses.plain(path), image) for path in paths])


def _read(path: str, image: ImageSpec) -> Tensor:
    try:
        data = read_file(*addresses.file_system(path, typed=True))
    except (*DAMAGED, OSError, ValueError, ImportError) as error:
        raise DataError(f"{path}: cannot be read: {error}; replace it") from error
    return from_pixels(decode(data, path, image.channels, image.height))
