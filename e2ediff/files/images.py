"""Images from files: the only place where one is opened, and ADM's centre crop.

Every image that the program reads passes here. Pillow is given the formats that it may try, since
one of the dozens that it knows runs Ghostscript, and the pixels are counted from the header: a
file of some kilobytes can hold a picture of many gigabytes.

Shapes: C H W image.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from e2ediff.errors import BadImageError, DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
MAX_PIXELS = 64_000_000
"""Width times height of the largest picture that is decoded, unless a recipe says otherwise."""
MAX_BYTES = 1 << 29
"""Length to which a member of an archive is unpacked, for one image or for a file of labels.

For an image it is 8 bytes for each pixel.
"""

_GREY = ("1", "L", "LA", "I", "I;16", "I;16L", "I;16B", "I;16N")
_COLOUR = ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")


@attrs.frozen
class Limit:
    """The most pixels of a picture, and the recipe's key that says so; empty for no recipe."""

    pixels: int = MAX_PIXELS
    option: str = ""

    def __str__(self) -> str:
        if self.option:
            return f"{self.option}: {self.pixels}"
        return f"the {self.pixels:,} that are ever decoded"


# Pillow raises SyntaxError for broken PNG, OSError for most other damage.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)


def is_image(name: str) -> bool:
    """Return whether a file's name is that of an image which can be decoded here."""
    return name.lower().endswith(SUFFIXES)


def check_unpacked(size: int, what: str = "an image") -> None:
    """Refuse a member of an archive that would be longer than any image, before it is unpacked.

    Args:
        size: Its length, as the archive has it.
        what: What it is, for the message.

    Raises:
        zipfile.BadZipFile: It would.
    """
    if size > MAX_BYTES:
        raise zipfile.BadZipFile(f"{size:,} bytes once unpacked, {what} has {MAX_BYTES:,}")


def read_file(fs: Any, path: str, what: str = "an image") -> bytes:
    """Read the file of an image, or of labels, on a file system of fsspec.

    Args:
        fs: The file system.
        path: The file's path in it.
        what: What it is, for the message.

    Raises:
        OSError: It is not there, or cannot be read.
        zipfile.BadZipFile: It lies in an archive, and would be longer than any image.
    """
    own = fs.protocol
    if {"zip", "tar", "libarchive"} & {*((own,) if isinstance(own, str) else own)}:
        check_unpacked(fs.info(path)["size"], what)
    data: bytes = fs.cat_file(path)
    return data


@contextmanager
def opened(
    data: bytes,
    place: str,
    size: int = 0,
    limit: Limit = Limit(),
    formats: tuple[str, ...] = FORMATS,
) -> Iterator[Image.Image]:
    """Open an image so that its header is read and its pixels are not.

    Args:
        data: The file's content.
        place: Its path, for messages.
        size: Length to which the shorter side will be brought, which may make a long picture
            enormous; 0 if it stays as it is.
        limit: Of the pixels as stored, and of those after the resize.
        formats: Those that are tried, in Pillow's words.

    Raises:
        BadImageError: No image, a damaged one (also when the body decodes it), one of more
            pixels than the limit, or of a mode that is not read.
        DataError: The same, where the limit is of no recipe.
    """
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            if large := too_many(image.size, size, limit.pixels):
                raise _refusal(place, f"{large}, more than {limit}", limit)
            if image.mode not in (*_GREY, *_COLOUR):
                what = f"mode {image.mode} is not read; expected grey of 8 or 16 bits, or colour"
                raise _refusal(place, what, limit)
            yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        what = f"more pixels than {limit}, or than Pillow ever decodes"
        raise _refusal(place, what, limit) from error
    except UnidentifiedImageError as error:
        # Its own text has an address in memory.
        what = "no JPEG, PNG, WebP or BMP" if data else "empty file"
        raise _refusal(place, f"damaged image ({what})", limit) from error
    except _DAMAGED as error:
        raise _refusal(place, f"damaged image ({error})", limit) from error


def too_many(stored: tuple[int, int], size: int = 0, most: int = MAX_PIXELS) -> str:
    """Return which size of a picture, stored or resized, has too many pixels; or empty.

    Args:
        stored: Width and height.
        size: Length to which the shorter side will be brought; 0 if it stays as it is.
        most: The most pixels.
    """
    width, height = stored
    if width * height > most:
        return f"{width} x {height} pixels"
    wide, high = resized(stored, size)
    if wide * high > most:
        return f"{width} x {height} pixels, {wide} x {high} with a shorter side of {size}"
    return ""


def _refusal(place: str, what: str, limit: Limit) -> DataError:
    if limit.option:
        return BadImageError(place, what)
    return DataError(f"{place}: {what}; remove or replace it")


def resized(stored: tuple[int, int], size: int) -> tuple[int, int]:
    """Return width and height once the shorter side is `size`; as stored for 0."""
    scale = size / min(stored) if size and min(stored) else 1.0
    return round(stored[0] * scale), round(stored[1] * scale)


def decode(
    data: bytes,
    place: str,
    channels: int,
    size: int,
    limit: Limit = Limit(),
) -> Tensor:
    """Decode an image to pixels (C, size, size), uint8, cropped as ADM does.

    Raises:
        BadImageError, DataError: As `opened`.
    """
    with opened(data, place, size, limit) as image:
        array = np.array(centre_crop(to_mode(image, channels), size))
    return to_tensor(array)


def is_grey(image: Image.Image) -> bool:
    """Return whether a picture is stored without colour, by its header."""
    return image.mode in _GREY


def to_mode(image: Image.Image, channels: int) -> Image.Image:
    """Convert a picture to bytes, grey (`L`) for one channel and `RGB` for three.

    Of 16 bits the upper eight are kept, as Pillow does by itself for colour; a palette's colours
    are looked up; transparency is left out, and so shows what is stored beneath it.

    Raises:
        ValueError: Grey values of more than 16 bits.
    """
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"mode {image.mode} with values beyond 16 bits is not read")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    image.info.pop("transparency", None)  # Pillow would warn of what is left out
    return image.convert("L" if channels == 1 else "RGB")


def to_tensor(array: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> Tensor:
    """Return pixels (H, W) or (H, W, C) as (C, H, W)."""
    pixels = torch.from_numpy(array)
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Crop the square of `size` pixels at the centre, after ADM's resize.

    Source: `center_crop_arr` of ADM (Dhariwal & Nichol 2021, released code), on which the
    ImageNet scores of DiT and SiT rest.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    image = image.resize(resized(image.size, size), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
