"""Each format, and each kind of values in it, is read as the page of images says, or refused."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, TiffImagePlugin
from source_kinds import source_of
from torch import Tensor

from e2ediff.data import HeightWidth, Original, from_pixels, to_pixels
from e2ediff.errors import BadImageError, DataError
from e2ediff.evaluate.images import FolderImages, NpzImages
from e2ediff.files.images import FORMATS, Limit, Rendering, decode, described, opened, to_mode
from e2ediff.parts.sources import ImageFolder

HEIGHT, WIDTH = 9, 14
SIZE = HeightWidth(HEIGHT, WIDTH)
G = np.random.default_rng(0)
PIXELS = G.integers(256, size=(HEIGHT, WIDTH, 3), dtype=np.uint8)
GREY = G.integers(256, size=(HEIGHT, WIDTH), dtype=np.uint8)
WIDE = G.integers(65536, size=(HEIGHT, WIDTH)).astype(np.uint16)


def stored(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def read(data: bytes, channels: int = 3, **rendering: object) -> np.ndarray:
    x = decode(data, "x", channels, SIZE, rendering=Rendering(**rendering))  # type: ignore[arg-type]
    return x.permute(1, 2, 0).numpy()


LOSSLESS = [
    *("PNG", "BMP", "GIF"),
    *(("TIFF", how) for how in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits")),
    ("WEBP", True),
]


@pytest.mark.parametrize("how", LOSSLESS, ids=str)
def test_a_format_that_keeps_pixels_gives_them_back(how: object) -> None:
    kind, option = how if isinstance(how, tuple) else (how, None)
    options = {"TIFF": {"compression": option}, "WEBP": {"lossless": option}}.get(kind, {})
    colours = Image.fromarray(PIXELS)
    if kind == "GIF":  # of 256 colours
        colours = colours.quantize(64)
    expected = np.array(colours.convert("RGB"))
    assert np.array_equal(read(stored(colours, kind, **options)), expected)
    if kind != "WEBP":
        grey = read(stored(Image.fromarray(GREY), kind, **options), 1)
        assert np.array_equal(grey[..., 0], GREY)


def test_the_formats_are_those_of_the_tests() -> None:
    assert {how if isinstance(how, str) else how[0] for how in LOSSLESS} | {"JPEG"} == {*FORMATS}


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP"])
def test_of_several_frames_the_first_is_read(kind: str) -> None:
    """Two pictures that share no pixel: a mixture would show."""
    first, second = (Image.new("RGB", (WIDTH, HEIGHT), c) for c in ("red", "blue"))
    options = {"lossless": True} if kind == "WEBP" else {}
    data = stored(first, kind, save_all=True, append_images=[second, first], **options)
    assert np.array_equal(read(data), np.array(first))
    assert described(data, "x", SIZE) == Original(WIDTH, HEIGHT, frames=3)


def test_a_jpeg_of_several_pictures_is_the_first() -> None:
    """As telephones and cameras for depth write them."""
    first, second = (Image.new("RGB", (WIDTH, HEIGHT), c) for c in ("red", "blue"))
    data = stored(first, "MPO", save_all=True, append_images=[second])
    assert np.array_equal(read(data), read(stored(first, "JPEG")))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("channels", [1, 3])
def test_grey_of_16_bits_keeps_its_upper_eight(kind: str, channels: int) -> None:
    found = read(stored(Image.fromarray(WIDE), kind), channels)
    assert np.array_equal(found, np.repeat((WIDE >> 8)[..., None], channels, 2))


@pytest.mark.parametrize("mode", ["La", "RGBa"])
def test_premultiplied_alpha_is_divided_out(mode: str) -> None:
    full = "LA" if mode == "La" else "RGBA"
    image = Image.new(full, (4, 4), (200, 128) if mode == "La" else (200, 100, 50, 128))
    grey = np.asarray(to_mode(image.convert(mode), 1)).astype(int)
    assert np.abs(grey - np.asarray(to_mode(image, 1)).astype(int)).max() <= 2


# TIFF: kinds of values that Pillow hands on as they are


def tiff(values: np.ndarray, **tags: object) -> bytes:
    """One strip of raw values, with tags of their meaning."""
    known = {
        "width": (256, values.shape[1]),
        "height": (257, values.shape[0]),
        "bits": (258, values.dtype.itemsize * 8),
        "compression": (259, 1),
        "white_is_zero": (262, 1),
        "strip": (273, 0),
        "samples": (277, 1),
        "rows": (278, values.shape[0]),
        "bytes": (279, values.nbytes),
        "sample_format": (339, 1),
    }
    for name, value in tags.items():
        known[name] = (known[name][0], value)  # type: ignore[assignment]
    ifd = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in known.values():
        ifd[tag] = value
    # Pillow counts the strip's place from the end of the directory.
    return b"II*\0\x08\0\0\0" + ifd.tobytes(8) + values.tobytes()


def test_a_tiff_made_by_hand_is_read() -> None:
    """Else every refusal below would pass on anything."""
    assert np.array_equal(read(tiff(GREY), 1)[..., 0], GREY)
    assert np.array_equal(read(tiff(WIDE), 1)[..., 0], WIDE >> 8)
    inverted = read(tiff(GREY, white_is_zero=0), 1)
    assert np.array_equal(inverted[..., 0], 255 - GREY)


REFUSED = {
    "32 bits": (tiff(WIDE.astype(np.uint32)), "mode I, grey of 32 bits,"),
    "32 bits with a sign": (tiff(WIDE.astype(np.int32), sample_format=2), "mode I, grey of 32"),
    "16 bits with a sign": (tiff(WIDE.astype(np.int16), sample_format=2), "mode I, grey of 32"),
    "8 bits with a sign": (tiff(GREY.astype(np.int8), sample_format=2), "values with a sign"),
    "fractions": (tiff(WIDE.astype(np.float32), sample_format=3), "mode F"),
    "12 bits": (tiff(np.zeros((HEIGHT, WIDTH * 3 // 2), np.uint8), width=WIDTH, bits=12), "12 b"),
    "16 bits, white as 0": (tiff(WIDE, white_is_zero=0), "grey of 16 bits with white as 0"),
    "LAB": (stored(Image.new("LAB", (WIDTH, HEIGHT)), "TIFF"), "mode LAB"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_values_without_a_range_of_bytes_are_refused_by_name(kind: str) -> None:
    """They would be read nearly black, nearly white, inverted or wrapped around."""
    data, said = REFUSED[kind]
    for ask in (lambda: read(data), lambda: described(data, "x", SIZE)):
        with pytest.raises(DataError, match=f"^x: .*{said}.* is not read; expected grey of 8"):
            ask()
    with pytest.raises(BadImageError):  # which a recipe may skip
        decode(data, "x", 1, SIZE, Limit(option="data.max_pixels"))


# Orientation and transparency


@pytest.mark.parametrize("value", range(10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_upright_turns_a_picture_as_its_exif_data_ask(kind: str, value: int) -> None:
    """By default as ADM does, which does not look at them; 0 and 9 are no orientations."""
    image, exif = Image.fromarray(PIXELS), Image.Exif()
    exif[0x0112] = value
    data = stored(image, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    with Image.open(io.BytesIO(data)) as plain:
        as_stored = np.array(plain.convert("RGB"))
        turned = np.array(ImageOps.exif_transpose(plain).convert("RGB"))
    size = HeightWidth(*turned.shape[:2])
    assert np.array_equal(read(data), as_stored)
    x = decode(data, "x", 3, size, rendering=Rendering(upright=True))
    assert np.array_equal(x.permute(1, 2, 0), turned)
    for upright, shape in ((False, as_stored.shape), (True, turned.shape)):
        found = described(data, "x", size, upright=upright)
        assert found == Original(shape[1], shape[0], turned=2 <= value <= 8)


def test_a_tiff_is_upright_always() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    data = stored(Image.fromarray(PIXELS), "TIFF", exif=exif)
    for upright in (False, True):
        assert np.array_equal(read(data, upright=upright), PIXELS[::-1, ::-1])
    assert described(data, "x", SIZE) == Original(WIDTH, HEIGHT)


def test_damaged_exif_data_turn_nothing() -> None:
    image = Image.fromarray(PIXELS)
    data = stored(image, "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert np.array_equal(read(data, upright=True), PIXELS)
    assert described(data, "x", SIZE) == Original(WIDTH, HEIGHT)


ALPHA = G.integers(256, size=(HEIGHT, WIDTH), dtype=np.uint8)
CLEAR = {
    "RGBA": Image.fromarray(np.dstack([PIXELS, ALPHA])),
    "LA": Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)]),
    "PA": Image.fromarray(np.dstack([PIXELS, ALPHA])).convert("PA"),
}


@pytest.mark.parametrize("mode", CLEAR)
@pytest.mark.parametrize("background", ["white", "#204060", "rgb(0, 0, 0)"])
def test_transparency_is_composed_on_the_colour_of_the_recipe(mode: str, background: str) -> None:
    image = CLEAR[mode]
    under = {"white": (255, 255, 255), "#204060": (32, 64, 96)}.get(background, (0, 0, 0))
    seen = np.array(to_mode(image, 3, Rendering(background=background))).astype(float)
    rgba = np.array(image.convert("RGBA")).astype(float)
    share = rgba[..., 3:] / 255
    assert np.abs(seen - (rgba[..., :3] * share + np.array(under) * (1 - share))).max() <= 1
    assert np.array_equal(to_mode(image, 3), rgba[..., :3])


def test_one_colour_may_be_the_transparent_one() -> None:
    """A key of PNG, for bytes, for a palette and for 16 bits, and of GIF."""
    grey = Image.fromarray(np.where(GREY < 100, 7, GREY).astype(np.uint8))
    wide = Image.fromarray(np.where(WIDE < 20000, 7 * 257, WIDE).astype(np.uint16))
    for image, kind, key in (
        (grey, "PNG", 7),
        (wide, "PNG", 7 * 257),
        (grey.convert("P"), "PNG", 7),
        (grey.convert("P"), "GIF", 7),
    ):
        data = stored(image, kind, transparency=key)
        assert described(data, "x", SIZE).transparent
        clear = np.asarray(image) == key
        assert (read(data)[clear] == 7).all()
        assert (read(data, background="white")[clear] == 255).all()
        assert np.array_equal(read(data, background="white")[~clear], read(data)[~clear])


def test_what_is_opaque_is_left_as_it_is() -> None:
    data = stored(Image.fromarray(PIXELS), "PNG")
    assert np.array_equal(read(data, background="red", upright=True), PIXELS)


@pytest.mark.parametrize("value", ["no colour", "#12345678", ""])
def test_a_background_that_is_no_opaque_colour_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match=r"color|opaque"):
        ImageFolder(root="x", size=8, classes=0, background=value)


# Size


@pytest.mark.parametrize("size", [(4, 6), (6, 4), (9, 14), (3, 14), (20, 30), (8, 8)])
@pytest.mark.parametrize("stored_as", [(40, 60), (60, 40), (23, 17), (9, 14)])
def test_a_picture_just_covers_the_size_and_is_cut_at_the_centre(size, stored_as) -> None:
    """Each pixel shows the place from which it comes: red its column, green its row."""
    y, x = np.mgrid[: stored_as[0], : stored_as[1]]
    places = np.dstack([4 * x, 4 * y, 0 * x]).astype(np.uint8)
    data = stored(Image.fromarray(places), "PNG")
    found = decode(data, "x", 3, HeightWidth(*size)).numpy() / 4
    assert found.shape == (3, *size)
    scale = max(size[0] / stored_as[0], size[1] / stored_as[1])
    for place, of, shape in zip((found[1].T, found[0]), size, stored_as, strict=True):
        expected = shape / 2 - 0.5 + (np.arange(of) - of / 2 + 0.5) / scale
        inside = slice(1, -1) if of > 3 else slice(None)  # bicubic filters repeat the edge
        assert np.abs(place - expected)[:, inside].max() <= 0.75 / scale + 0.3


def test_a_picture_that_the_size_makes_enormous_is_refused_before_it_is_decoded() -> None:
    data = stored(Image.new("L", (40_000, 2)), "PNG")
    said = "40000 x 2 pixels, 640000 x 32 when resized to cover 64 x 32, more than the 10,000,000"
    with pytest.raises(DataError, match=said):
        decode(data, "x", 1, HeightWidth(32, 64), Limit(10_000_000))
    exif = Image.Exif()
    exif[0x0112] = 6  # 2 x 40000 once turned: 64 x 1280000
    data = stored(Image.new("L", (40_000, 2)), "PNG", exif=exif)
    with pytest.raises(DataError, match="2 x 40000 pixels, 64 x 1280000 when resized to cover"):
        decode(
            data, "x", 1, HeightWidth(32, 64), Limit(30_000_000), rendering=Rendering(upright=True)
        )


# One statement of rounding and range: pixels are bytes, 0 is -1 and 255 is 1


def test_bytes_are_the_same_from_every_form_and_floats_are_refused(tmp_path: Path) -> None:
    pixels = np.stack([G.integers(256, size=(8, 8, 3), dtype=np.uint8) for _ in range(4)])
    (tmp_path / "png").mkdir()
    for i, one in enumerate(pixels):
        Image.fromarray(one).save(tmp_path / f"png/{i}.png")
    np.savez(tmp_path / "x.npz", arr_0=pixels)
    np.save(tmp_path / "x.npy", pixels)
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    block = {"size": 8, "classes": 0}
    found: list[Tensor] = [
        *FolderImages(tmp_path / "png").batches(0, 4, 4),
        *NpzImages(tmp_path / "x.npz").batches(0, 4, 4),
        ImageFolder(root=str(tmp_path / "png"), **block).open().read(range(4))[0],
        source_of("arrays", images=f"{tmp_path}/x.npz!arr_0", **block).open().read(range(4))[0],
        source_of("arrays", images=f"{tmp_path}/x.npy", **block).open().read(range(4))[0],
    ]
    for x in found:
        assert x.dtype == torch.uint8
        assert torch.equal(x, expected)
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_pixels(from_pixels(every)), every)
    assert (float(from_pixels(every)[0]), float(from_pixels(every)[255])) == (-1.0, 1.0)
    for dtype in (np.float32, np.float64, np.float16, np.int16, np.bool_):
        np.savez(tmp_path / "y.npz", arr_0=pixels.astype(dtype))
        with pytest.raises(DataError, match="expected uint8"):
            NpzImages(tmp_path / "y.npz")
        with pytest.raises(DataError, match="expected bytes of shape"):
            source_of("arrays", images=f"{tmp_path}/y.npz!arr_0", **block).open()


def test_a_truncated_file_is_refused_or_whole() -> None:
    """Never a picture of which a part is missing."""
    for kind in FORMATS:
        data = stored(Image.fromarray(PIXELS), kind)
        whole = read(data)
        for length in range(0, len(data), 3):
            try:
                assert np.array_equal(read(data[:length]), whole)
            except DataError as error:
                assert str(error).startswith("x: damaged image (")  # noqa: PT017


def test_only_the_listed_formats_are_tried() -> None:
    for kind in ("PPM", "TGA", "PCX", "ICO", "JPEG2000"):
        with (
            pytest.raises(DataError, match=f"none of {', '.join(FORMATS)}"),
            opened(stored(Image.fromarray(PIXELS), kind), "x"),
        ):
            pass
