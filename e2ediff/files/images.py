"""Images from files: the only place where one is opened, and how it becomes pixels.

Every image that the program reads passes here. Pillow is given the formats that it may try, since
one of the dozens that it knows runs Ghostscript, and the pixels are counted from the header: a
file of some kilobytes can hold a picture of many gigabytes. docs/reference/images.md has all that
is decided here in one table.

Shapes: C H W image.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import numpy as np
import torch
from PIL import Image, ImageColor, UnidentifiedImageError
from torch import Tensor

from e2ediff.addresses import is_local
from e2ediff.data import HeightWidth, Original
from e2ediff.errors import BadImageError, DataError
from e2ediff.limits import check_size

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp"),
    *(".bmp", ".gif", ".tif", ".tiff"),
)
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS = 64_000_000
"""Width times height of the largest picture that is decoded, unless a recipe says otherwise."""

_GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N")
_COLOUR = ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")
_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_ORIENTATION = 0x0112  # EXIF's tag, with the transposition that undoes each of its values
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Tags of TIFF: bits of a sample, compression, what the values mean, whether the channels are
# stored one after the other, whether values have a sign.
_BITS, _COMPRESSION, _PHOTOMETRIC, _PLANES, _SAMPLE_FORMAT = 258, 259, 262, 284, 339


@attrs.frozen
class Limit:
    """The most pixels of a picture, and the recipe's key that says so; empty for no recipe."""

    pixels: int = MAX_PIXELS
    option: str = ""

    def __str__(self) -> str:
        if self.option:
            return f"{self.option}: {self.pixels}"
        return f"the {self.pixels:,} that are ever decoded"


@attrs.frozen
class Rendering:
    """What is made of a picture's orientation and transparency; by default neither is applied.

    ADM's data are read so, on which the published statistics of ImageNet rest.

    Args:
        upright: Turn and mirror a picture as its EXIF data ask.
        background: Colour on which a transparent picture is composed, in the words of CSS;
            None leaves transparency out, and so shows what is stored beneath it.
    """

    upright: bool = False
    background: str | None = None


AS_STORED = Rendering()


def colour(value: str) -> tuple[int, int, int]:
    """Return red, green and blue of an opaque colour in the words of CSS.

    Raises:
        ValueError: It is none.
    """
    found = ImageColor.getrgb(value)
    if len(found) != 3:
        raise ValueError(f"{value!r} is not opaque")
    return found


# Pillow raises SyntaxError for broken PNG, TypeError for TIFF's numbers of a wrong kind, and
# OSError for most other damage.
_DAMAGED = (OSError, SyntaxError, TypeError, ValueError, EOFError, struct.error, zlib.error)


def is_image(name: str) -> bool:
    """Return whether a file's name is that of an image which can be decoded here."""
    return name.lower().endswith(SUFFIXES)


def read_file(fs: Any, path: str, what: str = "an image") -> bytes:
    """Read the file of an image, or of labels, on a file system of fsspec.

    Args:
        fs: The file system.
        path: The file's path in it.
        what: What it is, for the message.

    Raises:
        OSError: It is not there, or cannot be read.
        OversizedError: It is longer than any image. Of a remote store nobody asks, since each
            answer would take as long as the image.
    """
    if is_local(fs):
        status = os.stat(path)
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            raise OSError(f"{path} is a pipe or a device; expected a file")
        check_size(status.st_size, what)
        with open(path, "rb") as file:  # in a fraction of fsspec's time
            return file.read()
    own = fs.protocol
    if {"zip", "tar", "libarchive"} & {*((own,) if isinstance(own, str) else own)}:
        found = fs.info(path)
        if found["type"] == "other":  # a pipe might never end, nor begin
            raise OSError(f"{path} is a pipe or a device; expected a file")
        check_size(found["size"], what)
    data: bytes = fs.cat_file(path)
    return data


@contextmanager
def opened(
    data: bytes,
    place: str,
    size: HeightWidth | None = None,
    limit: Limit = Limit(),
    formats: tuple[str, ...] = FORMATS,
    *,
    upright: bool = False,
) -> Iterator[Image.Image]:
    """Open an image so that its header is read and its pixels are not.

    Args:
        data: The file's content.
        place: Its path, for messages.
        size: What a resize will make it cover, which may make a long picture enormous; None if
            it stays as it is.
        limit: Of the pixels as stored, and of those after the resize.
        formats: Those that are tried, in Pillow's words.
        upright: Whether the body turns it as its EXIF data ask.

    Raises:
        BadImageError: No image, a damaged one (also when the body decodes it), one of more
            pixels than the limit, or of a mode that is not read.
        DataError: The same, where the limit is of no recipe.
    """
    try:
        # Pillow warns of damaged metadata, without which the pixels are read all the same.
        with (
            warnings.catch_warnings(action="ignore"),
            Image.open(io.BytesIO(data), formats=formats) as image,
        ):
            if large := too_many(_seen(image, upright=upright), size, limit.pixels):
                raise _refusal(place, f"{large}, more than {limit}", limit)
            if what := _unknown_values(image):
                expected = "expected grey of 8 or 16 bits, or colour"
                raise _refusal(place, f"{what} is not read; {expected}", limit)
            yield image
    except Image.DecompressionBombError as error:
        what = f"more pixels than {limit}, or than Pillow ever decodes"
        raise _refusal(place, what, limit) from error
    except UnidentifiedImageError as error:
        # Its own text has an address in memory.
        what = f"none of {', '.join(formats)}" if data else "empty file"
        raise _refusal(place, f"damaged image ({what})", limit) from error
    except _DAMAGED as error:
        what = str(error) or type(error).__name__
        raise _refusal(place, f"damaged image ({what})", limit) from error


def _unknown_values(image: Image.Image) -> str:
    """Return what of a picture's kind of values has no known range; empty for those that are read.

    Pillow hands on the values of some kinds of TIFF as they are: with a sign, of 12 bits, of 32
    bits, or with white as zero in 16 bits. Of 16 bits in planes that are not compressed, it takes
    the bytes of one pixel for two.
    """
    if image.mode not in (*_GREY, *_COLOUR):
        return f"mode {image.mode}"
    if image.mode == "I" and image.format != "PNG":
        return "mode I, grey of 32 bits,"
    if image.format != "TIFF":
        return ""
    tags = image.tag_v2  # type: ignore[attr-defined]
    bits = tags.get(_BITS, (8,))
    if image.mode.startswith("I") and bits != (16,):
        return f"grey of {bits[0]} bits{' and more' if len(bits) > 1 else ''}"
    if image.mode.startswith("I") and tags.get(_PHOTOMETRIC) == 0:
        return "grey of 16 bits with white as 0"
    planes = tags.get(_PLANES) == 2 and tags.get(_COMPRESSION, 1) == 1
    if planes and {*np.atleast_1d(bits).tolist()} != {8} and image.mode in _COLOUR:
        return f"colour of {bits[0]} bits in uncompressed planes"
    if {2, 3} & {*np.atleast_1d(tags.get(_SAMPLE_FORMAT, 1)).tolist()}:
        return "values with a sign or fractions"
    return ""


def too_many(
    stored: tuple[int, int], size: HeightWidth | None = None, most: int = MAX_PIXELS
) -> str:
    """Return which size of a picture, stored or resized, has too many pixels; or empty.

    Args:
        stored: Width and height.
        size: What a resize will make it cover; None if it stays as it is.
        most: The most pixels.
    """
    width, height = stored
    if width * height > most:
        return f"{width} x {height} pixels"
    wide, high = covering(stored, size) if size else stored
    if size and wide * high > most:
        return (
            f"{width} x {height} pixels, {wide} x {high} when resized to cover "
            f"{size.width} x {size.height}"
        )
    return ""


def _refusal(place: str, what: str, limit: Limit) -> DataError:
    if limit.option:
        return BadImageError(place, what)
    return DataError(f"{place}: {what}; remove or replace it")


def covering(stored: tuple[int, int], size: HeightWidth) -> tuple[int, int]:
    """Return width and height of a picture that is resized until it just covers a size."""
    scale = max(size.width / max(1, stored[0]), size.height / max(1, stored[1]))
    return round(stored[0] * scale), round(stored[1] * scale)


def decode(
    data: bytes,
    place: str,
    channels: int,
    size: HeightWidth,
    limit: Limit = Limit(),
    rendering: Rendering = AS_STORED,
) -> Tensor:
    """Decode an image to pixels (C, H, W), uint8, cropped as ADM does.

    Raises:
        BadImageError, DataError: As `opened`.
    """
    pixels = torch.empty((channels, *size), dtype=torch.uint8)
    decode_into(pixels, data, place, limit, rendering)
    return pixels


def decode_into(
    pixels: Tensor,
    data: bytes,
    place: str,
    limit: Limit = Limit(),
    rendering: Rendering = AS_STORED,
) -> None:
    """Decode an image as `decode` does, into `pixels` (C, H, W), uint8.

    Raises:
        BadImageError, DataError: As `opened`.
    """
    channels, *sides = pixels.shape
    size = HeightWidth(*sides)
    with opened(data, place, size, limit, upright=rendering.upright) as image:
        copy_pixels(centre_crop(to_mode(image, channels, rendering), size), pixels)


def described(
    data: bytes, place: str, size: HeightWidth, limit: Limit = Limit(), *, upright: bool = False
) -> Original:
    """Describe an image by its header; with `upright`, width and height are those once turned.

    Raises:
        BadImageError, DataError: As `opened`.
    """
    with opened(data, place, size, limit, upright=upright) as image:
        seen, turned = _seen(image, upright=upright), _turn(image) is not None
        return Original(*seen, turned, _is_transparent(image), _frames(image))


def is_grey(image: Image.Image) -> bool:
    """Return whether a picture is stored without colour, by its header."""
    return image.mode in _GREY


def _turn(image: Image.Image) -> int | None:
    """Return the value of EXIF that asks to turn or mirror a picture, None if none does.

    Damaged EXIF data ask for nothing. TIFF's own tag is applied by Pillow as it decodes.
    """
    known = {"exif", "Raw profile type exif"} & image.info.keys()
    if image.format == "TIFF" or (image.format == "PNG" and not known):
        return None  # PNG's would be looked for behind the pixels
    try:
        value = image.getexif().get(_ORIENTATION)
    except _DAMAGED:
        return None
    return value if value in _UPRIGHT else None


def _seen(image: Image.Image, *, upright: bool) -> tuple[int, int]:
    """Return width and height, once it is turned if it is to be upright."""
    width, height = image.size
    return (height, width) if upright and _turn(image) in (5, 6, 7, 8) else (width, height)


def _frames(image: Image.Image) -> int:
    """Return the number of images in a file; 1 where those behind the first are damaged."""
    try:
        return int(getattr(image, "n_frames", 1))
    except _DAMAGED:
        return 1


def _is_transparent(image: Image.Image) -> bool:
    palette = image.palette.mode if image.palette else ""
    return image.mode in _ALPHA or "transparency" in image.info or palette.endswith("A")


def to_mode(image: Image.Image, channels: int, rendering: Rendering = AS_STORED) -> Image.Image:
    """Convert a picture to bytes, grey (`L`) for one channel and `RGB` for three.

    Of 16 bits the upper eight are kept, as Pillow does by itself for colour; a palette's colours
    are looked up; transparency is left out unless a background is given.

    A picture that needs none of this is returned as it is.

    Raises:
        ValueError: Grey values of more than 16 bits.
    """
    turn = _turn(image) if rendering.upright else None
    image.load()  # only then are the mode and size of every format final
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"mode {image.mode} with values beyond 16 bits is not read")
        clear = image.info.get("transparency")
        image = Image.fromarray((values >> 8).astype(np.uint8))
        if clear is not None:
            image.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    if turn is not None:
        image = image.transpose(_UPRIGHT[turn])
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    if rendering.background is not None and _is_transparent(image):
        above = image.convert("RGBA")
        image = Image.new("RGBA", above.size, (*colour(rendering.background), 255))
        image.alpha_composite(above)
    image.info.pop("transparency", None)  # Pillow would warn of what is left out
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def copy_pixels(image: Image.Image, pixels: Tensor) -> None:
    """Copy a picture of mode `L` or `RGB` to `pixels` (C, H, W), uint8."""
    # Band by band, as Pillow takes one out faster than anything turns (H, W, C) into (C, H, W).
    for band, plane in zip(image.getbands(), pixels.numpy(), strict=True):
        plane[...] = np.frombuffer(image.tobytes("raw", band), np.uint8).reshape(plane.shape)


def centre_crop(image: Image.Image, size: HeightWidth) -> Image.Image:
    """Crop height and width at the centre, after ADM's resize; ADM's own size is a square.

    A picture of this size is returned as it is.

    Source: `center_crop_arr` of ADM (Dhariwal & Nichol 2021, released code), on which the
    ImageNet scores of DiT and SiT rest.
    """
    while image.width >= 2 * size.width and image.height >= 2 * size.height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    covers = covering(image.size, size)
    if image.size != covers:
        image = image.resize(covers, Image.Resampling.BICUBIC)
    if covers == (size.width, size.height):
        return image
    left, top = (image.width - size.width) // 2, (image.height - size.height) // 2
    return image.crop((left, top, left + size.width, top + size.height))
