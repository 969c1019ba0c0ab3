"""Images of one's own, from any folder or files, as a network takes them.

Shapes: M images, C H W image.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import fsspec
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from e2ediff.data import ImageSpec
from e2ediff.errors import DataError
from e2ediff.parts.images import SUFFIXES, centre_crop

MAX_PIXELS = 200_000_000
"""Largest image that is decoded: a small file can hold a picture of many gigabytes."""


def list_images(places: Sequence[str]) -> list[str]:
    """Paths or URLs of all images in these files and, at any depth, in these folders; sorted.

    Raises:
        DataError: A place is missing, or holds no images.
    """
    found: list[str] = []
    for place in places:
        try:
            fs, root = fsspec.core.url_to_fs(place)
            folder = fs.isdir(root)
            inside = fs.find(root) if folder else [root] if fs.exists(root) else []
        except (ImportError, ValueError, OSError) as error:
            raise DataError(f"{place}: cannot be opened: {error}") from error
        images = sorted(p for p in inside if p.lower().endswith(SUFFIXES))
        if not images:
            what = "holds no images" if inside else "no such file or folder"
            raise DataError(f"{place}: {what} (looked for {', '.join(SUFFIXES)})")
        found += [fs.unstrip_protocol(p) if "://" in place else p for p in images]
    return found


def read_images(paths: Sequence[str], image: ImageSpec) -> Tensor:
    """Images, centre-cropped to the size of `image`, (M, C, H, W) in [-1, 1].

    Raises:
        DataError: One is damaged or too large, or the network's images are not square.
    """
    if image.height != image.width:
        raise DataError(
            f"images are cropped to squares, and this network's are {image.height} x {image.width}"
        )
    return torch.stack([_read(path, image) for path in paths])


def _read(path: str, image: ImageSpec) -> Tensor:
    try:
        with fsspec.open(path, "rb") as file:
            data = file.read()
        with Image.open(io.BytesIO(data)) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise DataError(f"{path}: more than {MAX_PIXELS:,} pixels")
            mode = "L" if image.channels == 1 else "RGB"
            pixels = np.array(centre_crop(picture.convert(mode), image.height))
    except DataError:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        # Pillow raises SyntaxError for broken PNG, OSError for most other damage.
        raise DataError(f"{path}: damaged image ({error}); remove or replace it") from error
    x = torch.from_numpy(pixels)
    x = x[None] if x.ndim == 2 else x.permute(2, 0, 1)
    return x.float() / 127.5 - 1
