"""Images that are not square keep their shape, and every pixel its place, in every command."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import e2ediff, trained
from PIL import Image
from tiny_recipe import tiny
from torch.nn import functional

import e2ediff as package
from e2ediff.data import ImageSpec
from e2ediff.evaluate.images import FolderImages, NpzImages
from e2ediff.evaluate.passes import pil_bicubic
from e2ediff.host.plugins import load
from e2ediff.host.recipe import parse_recipe
from e2ediff.monitor.grids import Group, grid_png
from e2ediff.nn.layers import patchify, rotary_angles, sincos_positions, unpatchify
from e2ediff.parts.backbones import ViTConfig
from e2ediff.parts.features.inception import SIZE, resize_tf1
from e2ediff.sample.outputs import open_output
from e2ediff.sample.pipeline import Pipeline
from e2ediff.step.count import count
from e2ediff.store.storage import Store

SHAPES = [(16, 24), (24, 16)]


def recipe(shape: tuple[int, int], **lines: str) -> str:
    lines = {
        "data": f"{{name: synthetic, size: [{shape[0]}, {shape[1]}], classes: 2, count: 64}}",
        "objective": "coupled",
        "scores": "{every: 4, features: random_projection, metrics: [kid], images: 16}",
        "cadence": "{log: 4, diagnose: 4, preview: 4, checkpoint: 4}",
        **lines,
    }
    return tiny(**lines)


def done(*words: object) -> str:
    ended = e2ediff(*words)
    assert ended.code == 0, ended.err
    return ended.out


def opened(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.fixture(scope="module", params=SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def shape(request) -> tuple[int, int]:
    return request.param


@pytest.fixture(scope="module")
def run(shape, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("shapes"), recipe(shape))


@pytest.fixture(scope="module")
def sampled(run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same four images in every format."""
    folder = tmp_path_factory.mktemp("sampled")
    for kind in ("png", "npz", "zip", "tar"):
        done("sample", run, "--count", 2, "--format", kind, "--out", folder / kind)
    return {kind: folder / kind for kind in ("png", "npz", "zip", "tar")}


# From the recipe to samples and scores


def test_a_check_says_which_side_is_which(shape, tmp_path) -> None:
    (tmp_path / "tiny.yaml").write_text(recipe(shape))
    out = done("check", tmp_path / "tiny.yaml")
    assert f"3 x {shape[0]} x {shape[1]} (channels x height x width)" in out
    assert f"grid {shape[0] // 8} x {shape[1] // 8}" in out


def test_either_orientation_costs_what_its_patches_cost() -> None:
    def flops(shape):
        return count(parse_recipe(load(entry_points=False), recipe(shape), "r.yaml")).flops

    square, wide, high = flops((16, 16)), flops((16, 24)), flops((24, 16))
    assert wide == high
    assert wide["joint"] > square["joint"]


def test_every_format_holds_the_same_samples_in_their_shape(shape, sampled) -> None:
    pngs = [p.read_bytes() for p in sorted((sampled["png"] / "images").iterdir())]
    images = np.stack([opened(png) for png in pngs])
    assert images.shape == (4, *shape, 3)
    assert np.array_equal(np.load(sampled["npz"] / "samples.npz")["arr_0"], images)
    with zipfile.ZipFile(sampled["zip"] / "samples.zip") as file:
        names = [name for name in file.namelist() if name.endswith(".png")]
        names.sort(key=lambda name: name.rpartition("/")[2])  # they lie in folders of classes
        assert np.array_equal(np.stack([opened(file.read(name)) for name in names]), images)
    (shard,) = (sampled["tar"] / "shards").iterdir()
    with tarfile.open(shard) as file:
        names = sorted(name for name in file.getnames() if name.endswith(".png"))
        found = np.stack([opened(file.extractfile(name).read()) for name in names])
    assert np.array_equal(found, images)


def test_the_pipeline_returns_images_of_that_width_and_height(shape, run) -> None:
    pipeline = Pipeline.from_run(run)
    (image,) = pipeline([1]).images
    assert image.size == (shape[1], shape[0])
    assert pipeline([1], output_type="pt").images.shape == (1, 3, *shape)


def test_latents_and_their_decoding_have_the_grid_of_the_images(shape, run) -> None:
    model = package.load(str(run))
    grid = (shape[0] // 8, shape[1] // 8)
    assert model.contract.grid == grid
    x = torch.zeros(2, 3, *shape)
    latents = model.latents(x)
    assert latents.z.shape == (2, grid[0] * grid[1], 4)
    assert model.decode(latents).shape == x.shape


@pytest.mark.parametrize("kind", ["png", "npz"])
def test_samples_are_scored_against_images_of_that_shape_alone(shape, sampled, kind) -> None:
    made = sampled["png"] / "images" if kind == "png" else sampled["npz"] / "samples.npz"
    words = ("eval", made, "--features", "random_projection", "--metrics", "fid", "--reference")
    source = "{{name: synthetic, size: [{}, {}], classes: 2, count: 64}}"
    assert "FD-RandomProjection128" in done(*words, source.format(*shape))
    refused = e2ediff(*words, source.format(*shape[::-1]))
    assert refused.code == 5
    theirs, ours = (f"{a} x {b}" for a, b in (shape[::-1], shape))
    assert f"its images have {theirs} pixels (height x width), those of" in refused.err
    assert f" {ours}; a score needs one resolution" in refused.err


def test_a_run_is_scored_on_its_own_data_with_every_section(shape, run, tmp_path) -> None:
    sections = "kid,reconstruction,latents,memorisation"
    words = ("--features", "random_projection", "--count", 16, "--cache", tmp_path)
    out = done("eval", run, "--metrics", sections, *words)
    card = json.loads(Path(out.strip().splitlines()[-1]).read_text())
    protocol = card["passport"]["protocol"]
    assert protocol["resolution"] == f"{shape[1]} x {shape[0]} x 3"


def test_reconstructions_and_interpolations_keep_the_shape(shape, run, tmp_path) -> None:
    own = [tmp_path / name for name in ("0.png", "1.png")]
    for seed, path in enumerate(own):
        pixels = np.random.default_rng(seed).integers(256, size=(*shape, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    done("reconstruct", run, *own, "--out", tmp_path / "again")
    done("interpolate", run, *own, "--frames", 3, "--out", tmp_path / "strip.png")
    for name in ("again/reconstructions.png", "strip.png"):
        grid = opened((tmp_path / name).read_bytes()).astype(int)
        for file in sorted((tmp_path / "again/images").iterdir()):
            image = opened(file.read_bytes())
            assert image.shape == (*shape, 3)
            assert is_shown(image.astype(int), grid)


def is_shown(image: np.ndarray, grid: np.ndarray) -> bool:
    """Whether an image (H, W, 3) is in a grid, enlarged alike in both directions."""
    for times in range(2, 17):
        large = image.repeat(times, axis=0).repeat(times, axis=1)
        high, wide = large.shape[:2]
        rows, columns = len(grid) - high + 1, len(grid[0]) - wide + 1
        if min(rows, columns) < 1:
            return False
        near = np.full((rows, columns), fill_value=True)  # where a few pixels are the image's
        for y, x in ((0, 0), (0, wide - 1), (high - 1, 0), (high - 1, wide - 1), (high // 2, 0)):
            place = grid[y : y + rows, x : x + columns]
            near &= np.abs(place - large[y, x]).max(axis=2) <= 1  # rounding, at another batch size
        for y, x in np.argwhere(near):
            if np.abs(grid[y : y + high, x : x + wide] - large).max() <= 1:
                return True
    return False


def test_a_run_is_not_continued_with_its_sides_swapped(shape, run, tmp_path) -> None:
    (tmp_path / "other.yaml").write_text(recipe(shape[::-1]))
    refused = e2ediff("run", tmp_path / "other.yaml", "--resume", "--out", run)
    assert refused.code == 3
    was, now = [*shape], [*shape[::-1]]
    assert f"data.size: was {was} in {run}, is {now} here." in refused.err


def test_a_patch_that_does_not_divide_both_sides_is_refused_with_those_that_do(tmp_path) -> None:
    (tmp_path / "tiny.yaml").write_text(recipe((16, 20)))
    refused = e2ediff("check", tmp_path / "tiny.yaml")
    assert refused.code == 3
    assert (
        "backbone.patch: 8 does not divide the image, 16 x 20 (height x width); expected a "
        "divisor of both: 1, 2, 4" in refused.err
    )


# A pixel stays where it is

ROW, COLUMN = 9, 21
"""Of the marked pixel in images of 16 x 24, which lies in patch 5 of 2 x 3 patches of 8."""


def marked() -> torch.Tensor:
    x = torch.zeros(1, 3, 16, 24)
    x[:, :, ROW, COLUMN] = 1
    return x


def test_patches_are_numbered_row_by_row_and_put_together_again() -> None:
    tokens = patchify(marked(), 8)
    assert tokens.shape == (1, 6, 192)
    assert tokens.flatten(2).abs().sum(2).nonzero().tolist() == [[0, 5]]
    assert torch.equal(unpatchify(tokens, 8, (2, 3)), marked())


@pytest.mark.parametrize("positions", [sincos_positions, rotary_angles])
def test_positions_of_a_token_are_those_of_its_row_and_column(positions) -> None:
    small, large = positions((2, 3), 16), positions((5, 5), 16)
    for row, column in itertools.product(range(2), range(3)):
        assert torch.equal(small[row * 3 + column], large[row * 5 + column])


def test_a_fresh_vit_encodes_and_decodes_each_patch_in_its_place() -> None:
    """Its blocks begin as the identity, so that no patch sees another."""
    torch.manual_seed(0)
    config = ViTConfig(width=16, depth=2, heads=2, patch=8, latent_dim=4, refine=4)
    net = config.build(ImageSpec(3, 16, 24, 0)).eval()
    z = net.encode(torch.cat([torch.zeros_like(marked()), marked()]))
    changed = (z[1] - z[0]).abs().sum(1).nonzero()
    assert changed.tolist() == [[5]]
    latents = torch.zeros(2, 6, 4)
    latents[1, 5] = 1
    x = net.decode(latents)
    moved = (x[1] - x[0]).abs().sum(0).nonzero()
    # Two convolutions of 3 x 3 reach two pixels past the patch.
    assert (moved.min(0).values >= torch.tensor([8 - 2, 16 - 2])).all()
    assert moved.max(0).values.tolist() == [15, 23]


@pytest.mark.parametrize("kind", ["png", "npz", "zip", "tar"])
def test_a_stored_pixel_is_read_at_its_place(tmp_path, kind) -> None:
    pixels = (255 * marked()).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    output = open_output(kind, Store(str(tmp_path)), (16, 24, 3), [0])
    output.put(range(1), pixels)
    assert np.array_equal(output.first(1), pixels)
    output.close()
    if kind in ("png", "npz"):
        place = tmp_path / ("images" if kind == "png" else "samples.npz")
        images = (FolderImages if kind == "png" else NpzImages)(str(place))
        assert images.shape == (3, 16, 24)
        (x,) = images.batches(0, 1, 1)
        assert np.array_equal(x.permute(0, 2, 3, 1).numpy(), pixels)


def test_a_grid_has_cells_of_the_images_shape() -> None:
    red = marked() * 2 - 1
    red[:, 1:] = -1
    grid = opened(grid_png([Group(red)]))
    (top, left), (bottom, right) = ends((grid[..., 1:] == 0).all(axis=2))
    times = (bottom - top) // 16
    assert times > 1
    assert (bottom - top, right - left) == (16 * times, 24 * times)
    (first, start), (last, end) = ends((grid == (255, 0, 0)).all(axis=2))
    assert (first - top, start - left) == (ROW * times, COLUMN * times)
    assert (last - first, end - start) == (times, times)


def ends(chosen: np.ndarray) -> tuple[list[int], list[int]]:
    """The first row and column of what is chosen, and those behind the last."""
    places = np.argwhere(chosen)
    return places.min(0).tolist(), (places.max(0) + 1).tolist()


# Networks of scores bring images to squares, each axis by its own factor


def test_the_inception_resize_reads_row_i_at_i_h_and_column_j_at_j_w() -> None:
    down, across = torch.meshgrid(torch.arange(16.0), torch.arange(24.0), indexing="ij")
    resized = resize_tf1(torch.stack([down, across])[None])
    assert resized.shape == (1, 2, SIZE, SIZE)
    place = torch.arange(SIZE, dtype=torch.float32)
    rows, columns = ((place * side / SIZE).clamp_max(side - 1) for side in (16, 24))
    torch.testing.assert_close(resized[0, 0], rows[:, None].expand(-1, SIZE), rtol=0, atol=1e-4)
    torch.testing.assert_close(resized[0, 1], columns.expand(SIZE, -1), rtol=0, atol=1e-4)


def test_the_clean_resize_maps_rows_to_rows() -> None:
    lines = torch.zeros(1, 1, 16, 24)
    lines[..., 12:, :] = 255
    found = pil_bicubic(lines.to(torch.uint8), 32)
    assert found.shape == (1, 1, 32, 32)
    pooled = functional.avg_pool2d(found, 8)
    assert pooled[0, 0, 0].abs().max() < 1
    assert (pooled[0, 0, 3] - 255).abs().max() < 16
