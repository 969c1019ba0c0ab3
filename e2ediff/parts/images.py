"""Encoded images: decoding and ADM's centre crop.

Shapes: B batch, C H W image.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from e2ediff.errors import BadImageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# Only these decoders are tried: Pillow knows dozens, and one of them runs Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")


def is_image(name: str) -> bool:
    """Whether a file's name is that of an image which can be decoded here."""
    return name.lower().endswith(SUFFIXES)


@contextmanager
def opened(data: bytes, place: str, max_pixels: int) -> Iterator[Image.Image]:
    """An image whose header is read and whose pixels are not.

    Raises:
        BadImageError: No image, a damaged one (also when the body decodes it), or one of more
            pixels than the limit.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise BadImageError(
                    place,
                    f"{image.width} x {image.height} pixels, more than "
                    f"data.max_pixels: {max_pixels}",
                )
            yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        what = f"more pixels than data.max_pixels: {max_pixels}, or than Pillow ever decodes"
        raise BadImageError(place, what) from error
    except UnidentifiedImageError as error:
        # Its own text has an address in memory.
        what = "no JPEG, PNG, WebP or BMP" if data else "empty file"
        raise BadImageError(place, f"damaged image ({what})") from error
    except (OSError, SyntaxError, ValueError) as error:
        # Pillow raises SyntaxError for broken PNG, OSError for most other damage.
        raise BadImageError(place, f"damaged image ({error})") from error


def decode(data: bytes, place: str, channels: int, size: int, max_pixels: int) -> Tensor:
    """Pixels (C, size, size), uint8, of an encoded image, cropped as ADM does.

    Raises:
        BadImageError: As `opened`.
    """
    with opened(data, place, max_pixels) as image:
        array = np.array(centre_crop(image.convert("L" if channels == 1 else "RGB"), size))
    return to_tensor(array)


def to_tensor(array: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> Tensor:
    """Pixels (H, W) or (H, W, C) as (C, H, W)."""
    pixels = torch.from_numpy(array)
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The square of `size` pixels at the centre, after ADM's resize.

    Source: `center_crop_arr` of ADM (Dhariwal & Nichol 2021, released code), on which the
    ImageNet scores of DiT and SiT rest.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
    )
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
