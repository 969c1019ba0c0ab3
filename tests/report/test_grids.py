"""Pictures of several images: titles, a caption, enlarged pixels, a shape for a screen."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import e2ediff, trained
from numpy.typing import NDArray
from PIL import Image
from tiny_recipe import tiny
from torch import Tensor

from e2ediff.data import ImageSpec, from_pixels, to_pixels
from e2ediff.monitor.grids import Group, by_class, grid_png, sampling_words

CATS = ImageSpec(3, 32, 32, 2, ("cat", "dog"))


def images(count: int, channels: int = 3, size: int = 32) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return from_pixels(torch.randint(256, (count, channels, size, size), generator=g))


def opened(png: bytes) -> NDArray[np.uint8]:
    return np.array(Image.open(io.BytesIO(png)))


def place_of(x: Tensor, sheet: NDArray[np.uint8], times: int) -> tuple[int, int] | None:
    """Where an image (C, H, W), each pixel repeated, lies in a sheet: row and column."""
    pixels = to_pixels(x).permute(1, 2, 0).numpy().repeat(times, 0).repeat(times, 1)
    sheet = sheet if sheet.ndim == 3 else sheet[..., None]
    height, width = pixels.shape[:2]
    corner = (sheet[: -height + 1, : -width + 1] == pixels[0, 0]).all(-1)
    for row, column in np.argwhere(corner).tolist():
        if (sheet[row : row + height, column : column + width] == pixels).all():
            return row, column
    return None


@pytest.mark.parametrize(
    ("size", "times"), [(16, 4), (28, 3), (32, 2), (48, 2), (64, 1), (100, 1)]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_image_is_there_pixel_for_pixel_and_64_pixels_or_larger(
    size: int, times: int, channels: int
) -> None:
    x = images(14, channels, size)
    sheet = opened(grid_png([Group(x[:7], "a"), Group(x[7:], "b")]))
    places = {place_of(one, sheet, times) for one in x}
    assert None not in places
    assert len(places) == 14
    few = opened(grid_png([Group(x[:1])]))
    assert any(place_of(x[0], few, more) for more in range(1, 9) if more * size >= 128)


@pytest.mark.parametrize("classes", [1, 2, 3, 7, 10, 100])
@pytest.mark.parametrize("each", [1, 2, 8, 25])
def test_no_grid_is_a_strip_or_a_tower(classes: int, each: int) -> None:
    labels = [k % classes for k in range(classes * each)]
    x = images(1, 1, 8).expand(len(labels), -1, -1, -1)
    sheet = opened(grid_png(by_class(x, labels, ImageSpec(1, 8, 8, classes))))
    height, width = sheet.shape[:2]
    if len(labels) > 3:
        assert 0.6 < width / height < 3


def test_samples_of_a_class_stand_together_under_its_title() -> None:
    x = images(6)
    groups = by_class(x, [1, 0, 1, 0, 2, 1], CATS)
    assert [group.title for group in groups] == ["0 cat", "1 dog", "no class"]
    assert torch.equal(groups[1].x, x[[0, 2, 5]])
    (alone,) = by_class(x, [], ImageSpec(3, 32, 32, 0))
    assert (alone.title, len(alone.x)) == ("", 6)
    assert [g.title for g in by_class(x[:1], [1], ImageSpec(3, 32, 32, 3))] == ["class 1"]


def test_titles_and_captions_are_drawn() -> None:
    x = images(4)
    plain, other, titled = (
        opened(grid_png([Group(x[:2], a), Group(x[2:], b)])) for a, b in ("ab", "ac", ("", ""))
    )
    assert plain.shape == other.shape
    assert (plain != other).any()
    assert titled.shape[0] < plain.shape[0]
    said = opened(grid_png([Group(x)], "step 5"))
    assert (said[:30] < 100).any()
    assert said.shape[0] > opened(grid_png([Group(x)])).shape[0]


ODD = (
    "long " * 100,
    "a" * 1000,
    "\u732b \u72ac",  # CJK, which the font lacks
    "\u0642\u0637 \u0643\u0628\u064a\u0631",  # right to left
    "\u202eevil\u202c",
    "new\nline\ttab\0nul\x1b[31m",
    "\ud800\udcff",
    "\U0001f642\u200d\U0001f642",
    "e" + "\u0301" * 300,
    " ",
    "",
)


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_names_with_any_characters_stay_in_their_place(name: str) -> None:
    """No warning (the tests' filter makes it an error), and images where they would be."""
    x = images(4)
    sheet = opened(grid_png([Group(x[:2], f"0 {name}"), Group(x[2:], "1")]))
    usual = opened(grid_png([Group(x[:2], "0"), Group(x[2:], "1")]))
    assert sheet.shape == usual.shape
    for one in x:
        assert place_of(one, sheet, 4) == place_of(one, usual, 4) is not None
    assert opened(grid_png([Group(x)], name)).shape[1] == opened(grid_png([Group(x)])).shape[1]


def test_frames_that_belong_together_stay_in_a_row() -> None:
    x = images(18)
    sheet = opened(grid_png([Group(x[:9], "0"), Group(x[9:], "1")], in_rows=True))
    rows = [place[0] for one in x if (place := place_of(one, sheet, 2))]
    assert len(rows) == 18
    assert len({*rows[:9]}) == len({*rows[9:]}) == 1
    long = opened(grid_png([Group(images(100))], in_rows=True))
    assert long.shape[1] < 3 * long.shape[0]


def test_a_caption_names_weights_sampler_guidance_and_seed() -> None:
    guidance = {"name": "classifier_free", "scale": 1.5}
    said = sampling_words("ema", 3, {"name": "euler", "steps": 25}, guidance)
    assert said == (
        "weights ema, sampler euler (steps 25), guidance classifier_free (scale 1.5), seed 3"
    )
    assert sampling_words("ema", 0, {"name": "x"}, None) == "weights ema, sampler x, seed 0"


def test_all_commands_draw_such_pictures(tmp_path: Path) -> None:
    """Previews, `sample`, `reconstruct` and `interpolate`: each holds a caption on white."""
    run = trained(tmp_path, tiny(steps="2", data="{name: fashion_mnist, size: 28}",
                                 backbone="{name: vit, width: 16, depth: 1, heads: 1, patch: 7, "
                                 "latent_dim: 4}"))  # fmt: skip
    for words in (
        ("sample", run, "--label", "bag", "--label", "0", "--count", "2"),
        ("reconstruct", run, "--count", "4"),
        ("interpolate", run, "--seeds", "0", "1", "--frames", "3"),
    ):
        assert e2ediff(*words).code == 0
    made = sorted(run.glob("samples/**/*.png"))
    pictures = [path for path in made if path.parent.name != "images"]
    assert len(pictures) == 5, made
    for path in pictures:
        sheet = np.array(Image.open(path))
        assert sheet.shape[1] >= 320
        assert sheet[0, 0] == 232
        assert (sheet[8:24] < 100).any()
    one = torch.from_numpy(np.array(Image.open(run / "samples/seed-0/images/000000.png")))
    assert place_of(
        from_pixels(one[None]), np.array(Image.open(run / "samples/seed-0/grid.png")), 5
    )
