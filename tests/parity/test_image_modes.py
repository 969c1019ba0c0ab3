"""However a picture is stored, training, scores and one's own images read the same pixels."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import e2ediff
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from e2ediff.data import ImageSpec
from e2ediff.errors import BadImageError, DataError
from e2ediff.evaluate.images import FolderImages
from e2ediff.evaluate.reference import open_reference
from e2ediff.files.images import Limit, opened, to_mode
from e2ediff.host.plugins import load
from e2ediff.model.image_features import weights_sha256
from e2ediff.parts import sources
from e2ediff.parts.features.networks import RandomProjection
from e2ediff.parts.sources.own_images import read_images

SIDE = 48
RAMP = np.linspace(0, 65535, SIDE * SIDE).round().astype(np.uint16).reshape(SIDE, SIDE)
GREY = (RAMP >> 8).astype(np.uint8)


def colour(k: int) -> np.ndarray:
    return np.random.default_rng(k).integers(256, size=(SIDE, SIDE, 3), dtype=np.uint8)


def read_everywhere(path: Path, channels: int) -> list[Tensor]:
    """The pixels of the one image of a folder, as each reader of files has them."""
    zipped = path.parent.parent / "x.zip"
    with zipfile.ZipFile(zipped, "w") as file:
        file.write(path, path.name)
    block = {"size": SIDE, "classes": 0, "channels": channels}
    folder = sources.ImageFolder(root=str(path.parent), **block)
    archive = sources.ImageFolder(root=f"zip://::{zipped}", **block)
    own = read_images([str(path)], ImageSpec(channels, SIDE, SIDE, 0))
    scored = FolderImages(str(path.parent))
    (first,) = scored.batches(0, 1, 1)
    if channels == 3:
        first = first.expand(-1, 3, -1, -1)
    found = [config.open().read([0])[0] for config in (folder, archive)]
    return [*found, ((own + 1) * 127.5).round().to(torch.uint8), first]


def stored(tmp_path: Path, image: Image.Image, **options: object) -> Path:
    (tmp_path / "one").mkdir()
    image.save(tmp_path / "one/0.png", **options)
    return tmp_path / "one/0.png"


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_grey_of_16_bits_is_read_over_its_full_range(mode: str, channels: int, tmp_path) -> None:
    kinds = {"I;16": "<u2", "I;16B": ">u2"}
    image = Image.fromarray(RAMP.astype(kinds[mode]))
    assert image.mode == mode
    path = stored(tmp_path, image)
    with Image.open(path) as written:
        assert written.mode in ("I;16", "I")  # `I` up to Pillow 10
    for x in read_everywhere(path, channels):
        assert x.shape == (1, channels, SIDE, SIDE)
        assert torch.equal(x[0, 0], torch.from_numpy(GREY))
        assert torch.equal(x[0, -1], x[0, 0])
        assert abs(float(x.double().mean()) - 127) < 0.6


# Mode, whether it is grey, and an image of it that holds GREY or a colour.
BYTES = {
    "L": Image.fromarray(GREY),
    "LA": Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(GREY[::-1].copy())]),
    "P": Image.fromarray(GREY).convert("P"),
    "RGB": Image.fromarray(GREY).convert("RGB"),
    "RGBA": Image.merge("RGBA", [*[Image.fromarray(GREY)] * 3, Image.fromarray(255 - GREY)]),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", BYTES)
def test_one_picture_is_the_same_in_every_mode(mode: str, channels: int, tmp_path) -> None:
    options = {"transparency": bytes(range(256))} if mode == "P" else {}
    path = stored(tmp_path, BYTES[mode], **options)
    with Image.open(path) as written:
        assert written.mode == mode
    for x in read_everywhere(path, channels):
        expected = torch.from_numpy(GREY).expand(channels, -1, -1)
        assert torch.equal(x[0, :channels], expected)


def test_one_bit_is_black_and_white(tmp_path) -> None:
    path = stored(tmp_path, Image.fromarray(GREY > 100))
    for x in read_everywhere(path, 1):
        assert torch.equal(x[0, 0], torch.from_numpy((GREY > 100) * np.uint8(255)))


def test_cmyk_is_read_as_colour_by_all(tmp_path) -> None:
    (tmp_path / "one").mkdir()
    path = tmp_path / "one/0.jpg"
    image = Image.fromarray(colour(0)).convert("CMYK")
    image.save(path, quality=95)
    first, *others = read_everywhere(path, 3)
    with Image.open(path) as written:
        assert written.mode == "CMYK"
        expected = np.array(written.convert("RGB"))
    assert torch.equal(first[0], torch.from_numpy(expected).permute(2, 0, 1))
    assert all(torch.equal(x, first) for x in others)


@pytest.mark.parametrize(
    "mode",
    [
        *("1", "L", "LA", "I", "I;16", "I;16L", "I;16B", "I;16N"),
        *("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"),
    ],
)
def test_modes_that_are_read_end_as_bytes(mode: str) -> None:
    image = Image.new(mode, (4, 4))
    assert to_mode(image, 1).mode == "L"
    assert to_mode(image, 3).mode == "RGB"


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N", "I"])
def test_the_upper_eight_of_16_bits_are_kept(mode: str) -> None:
    dtype = {"I;16B": ">u2", "I": "<i4"}.get(mode, "<u2")
    image = Image.frombytes(mode, (SIDE, SIDE), RAMP.astype(dtype).tobytes())
    assert np.array_equal(np.asarray(to_mode(image, 1)), GREY)
    assert np.array_equal(np.asarray(to_mode(image, 3)), np.repeat(GREY[..., None], 3, 2))


@pytest.mark.parametrize("value", [-1, 65536, 2**31 - 1])
def test_grey_of_32_bits_is_refused_with_its_mode(value: int) -> None:
    with pytest.raises(ValueError, match="mode I with values beyond 16 bits is not read"):
        to_mode(Image.new("I", (4, 4), value), 1)


def planar_tiff(planes: np.ndarray) -> bytes:
    """Planes (C, H, W) of a picture in colour as an uncompressed TIFF, which Pillow only reads."""
    channels, height, width = planes.shape
    ends = 8 + planes.nbytes
    tags = [
        (256, [width]), (257, [height]), (258, [8 * planes.itemsize] * channels), (259, [1]),
        (262, [2]), (273, [8 + k * planes[0].nbytes for k in range(channels)]),
        (277, [channels]), (278, [height]), (279, [planes[0].nbytes] * channels), (284, [2]),
    ]  # fmt: skip
    entries, more = b"", b""
    for tag, values in tags:
        packed = struct.pack(f"<{len(values)}I", *values)
        if len(values) > 1:
            where = ends + 2 + 12 * len(tags) + 4 + len(more)
            more, packed = more + packed, struct.pack("<I", where)
        entries += struct.pack("<HHI", tag, 4, len(values)) + packed
    head = b"II*\0" + struct.pack("<I", ends)
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return head + planes.tobytes() + directory + more


def test_uncompressed_planes_are_read_in_8_bits_and_refused_in_16() -> None:
    planes = np.moveaxis(colour(0), 2, 0)
    with opened(planar_tiff(np.ascontiguousarray(planes)), "x.tif") as image:
        assert np.array_equal(np.array(to_mode(image, 3)), colour(0))
    wide = planes.astype("<u2") * 257
    with (
        pytest.raises(DataError, match=r"x\.tif: colour of 16 bits in uncompressed planes"),
        opened(planar_tiff(wide), "x.tif"),
    ):
        pass


@pytest.mark.parametrize("mode", ["F", "LAB"])
def test_modes_that_are_not_read_are_named(mode: str) -> None:
    """No format that is tried has them; TIFF has."""
    out = io.BytesIO()
    Image.new(mode, (4, 4)).save(out, "TIFF")
    for limit, kind in ((Limit(), DataError), (Limit(100, "data.max_pixels"), BadImageError)):
        with (
            pytest.raises(kind, match=f"x: mode {mode} is not read; expected grey of 8 or 16"),
            opened(out.getvalue(), "x", 0, limit, ("TIFF",)),
        ):
            pass


# Sets


def written(folder: Path, as_stored: dict[int, str], grey: bool = False) -> str:
    """Eight images that are grey where `as_stored` has them, all of them with `grey`."""
    folder.mkdir()
    for k in range(8):
        pixels = colour(k)
        if grey or k in (0, 3, 7):
            pixels = np.repeat(pixels[..., :1], 3, axis=2)
        image = Image.fromarray(pixels)
        mode = as_stored.get(k, "RGB")
        if mode == "I;16":
            image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
        elif mode != "RGB":
            image = image.convert(mode)
        image.save(folder / f"{k:06}.png")
    return str(folder)


SETS = {
    "the first": {0: "L"},
    "one in the middle": {3: "L"},
    "the last": {7: "L"},
    "the first of 16 bits": {0: "I;16"},
    "the first with alpha": {0: "LA"},
    "three of eight": {0: "L", 3: "I;16", 7: "LA"},
    "none": {},
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("which", SETS)
def test_a_set_is_at_no_distance_from_itself_whichever_file_is_grey(
    which: str, zipped: bool, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("E2EDIFF_CACHE", str(tmp_path / "cache"))
    mixed, plain = written(tmp_path / "mixed", SETS[which]), written(tmp_path / "plain", {})
    assert_no_distance(mixed, plain, zipped, tmp_path)


def test_grey_sets_are_at_no_distance_however_they_are_stored(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("E2EDIFF_CACHE", str(tmp_path / "cache"))
    every = {k: ("L", "I;16", "LA")[k % 3] for k in range(8)}
    grey = written(tmp_path / "grey", every, grey=True)
    plain = written(tmp_path / "plain", {}, grey=True)
    assert FolderImages(grey).shape == (1, SIDE, SIDE)
    assert FolderImages(plain).shape == (3, SIDE, SIDE)
    assert_no_distance(grey, plain, False, tmp_path)


def assert_no_distance(one: str, other: str, zipped: bool, tmp_path: Path) -> None:
    if zipped:
        one = f"zip://::{shutil.make_archive(one, 'zip', one)}"
    words = ("--features", "random_projection", "--metrics", "fid")
    for subject, reference in ((one, other), (other, one)):
        out = tmp_path / f"scores-{subject == one}"
        done = e2ediff("eval", subject, "--reference", reference, *words, "--out", out)
        assert done.code == 0, done.err
        assert abs(float(done.out.splitlines()[1].split()[1])) < 1e-6


def test_features_that_an_earlier_version_cached_are_not_taken(tmp_path, monkeypatch) -> None:
    """They may be of white images, and their names say nothing of how the files were read."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("E2EDIFF_CACHE", str(cache))
    mixed, plain = written(tmp_path / "mixed", {0: "L"}), written(tmp_path / "plain", {})
    content = open_reference(mixed, load(), None).sha256
    weights = weights_sha256(RandomProjection().build())

    def name(version: int) -> str:
        what = json.dumps([version, content, weights, "network", ["pool"], []])
        return f"features-{hashlib.sha256(what.encode()).hexdigest()[:32]}.safetensors"

    wrong = {
        "count": torch.tensor([8]),
        "mean/pool": torch.ones(128, dtype=torch.float64),
        "covariance/pool": torch.eye(128, dtype=torch.float64),
    }
    cache.mkdir()
    (cache / name(1)).write_bytes(save(wrong))
    assert_no_distance(plain, mixed, False, tmp_path)
    assert (cache / name(2)).exists()
