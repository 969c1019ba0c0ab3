"""What evaluation computes beside distances of features: rounding, pairs, latents, copies."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from e2ediff.data import to_pixels
from e2ediff.evaluate.latents import knn_accuracy, probe_accuracy
from e2ediff.evaluate.memorisation import closest_pairs, memorisation
from e2ediff.evaluate.passes import pil_bicubic
from e2ediff.evaluate.reconstruction import Perceptual, psnr, ssim
from e2ediff.features import FeatureNetwork
from e2ediff.model.labels import lay_out

G = torch.Generator()


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=G.manual_seed(seed))


def pixels(*shape, seed=0):
    return torch.randint(256, shape, generator=G.manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("rounding", "known"),
    [
        # 127.5 (x + 1) = 0, 0.49, 0.51, 1.6, 254.75, 255; ties are a matter of floats anyway
        ("nearest", [0, 0, 1, 2, 255, 255]),
        ("half_up", [0, 0, 1, 2, 255, 255]),
        ("down", [0, 0, 0, 1, 254, 255]),
    ],
)
def test_each_rounding_does_what_its_papers_code_does(rounding, known) -> None:
    y = torch.tensor([0, 0.49, 0.51, 1.6, 254.75, 255], dtype=torch.float64)
    assert to_pixels(y / 127.5 - 1, rounding).tolist() == known
    assert to_pixels(torch.tensor([-2.0, 2.0]), rounding).tolist() == [0, 255]


@pytest.mark.parametrize("rounding", ["nearest", "half_up"])
def test_bytes_survive_the_way_there_and_back(rounding) -> None:
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_pixels(every.float() / 127.5 - 1, rounding), every)


def test_the_clean_resize_is_pillows_on_float_channels_and_is_not_rounded() -> None:
    x = pixels(2, 3, 9, 7)
    found = pil_bicubic(x, 20)
    plane = Image.fromarray(x[1, 2].numpy().astype(np.float32))
    known = np.asarray(plane.resize((20, 20), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(found[1, 2].numpy(), known)
    assert (found != found.round()).any()


def test_balanced_labels_are_the_classes_in_turn_and_uniform_ones_depend_on_the_seed() -> None:
    assert lay_out(range(3), 7, "balanced", 0) == [0, 1, 2, 0, 1, 2, 0]
    one, other = (lay_out(range(10), 1000, "uniform", seed) for seed in (0, 1))
    assert one != other
    assert one == lay_out(range(10), 1000, "uniform", 0)
    counts = np.bincount(one, minlength=10)
    assert counts.min() > 60
    assert counts.max() > counts.min()


def test_psnr_of_a_known_error() -> None:
    x = torch.full((2, 3, 12, 12), 100, dtype=torch.uint8)
    assert psnr(x + 5, x).tolist() == pytest.approx([20 * math.log10(255 / 5)] * 2)


def test_ssim_is_one_for_equal_images_and_known_for_constant_ones() -> None:
    x = pixels(2, 3, 16, 20)
    assert ssim(x, x).tolist() == pytest.approx([1.0, 1.0])
    a, b = (torch.full((1, 1, 11, 11), v, dtype=torch.uint8) for v in (50, 200))
    c = (0.01 * 255) ** 2
    known = (2 * 50 * 200 + c) / (50**2 + 200**2 + c)
    assert float(ssim(a, b)) == pytest.approx(known, rel=1e-6)
    assert float(ssim(255 - x[:1], x[:1])) < 0  # structure is turned over


class _Planes(FeatureNetwork):
    title = "Planes"

    def forward(self, x):
        return [x, 2 * x[:, :, ::2, ::2]]


def test_lpips_sums_weighted_distances_of_unit_length_features() -> None:
    x, y = torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4)
    x[:, 0], y[:, 1] = 3.0, 0.5  # unit vectors e1 and e2 at every place, of any length
    heads = (torch.tensor([0.25, 1.0]), torch.tensor([2.0, 0.0]))
    found = Perceptual(_Planes(), heads)
    assert float(found(x, y)) == pytest.approx(1.25 + 2.0)
    assert float(found(x, x)) == 0
    assert found.name == "LPIPS"
    plain = Perceptual(_Planes())
    assert float(plain(x, y)) == pytest.approx(2.0)
    assert plain.name == "perceptual-Planes"


def test_knn_and_probe_find_separated_classes_and_guess_without_any() -> None:
    label = torch.arange(200) % 4
    rows = 5 * torch.eye(4)[label] + noise(200, 4)
    for judge in (knn_accuracy, probe_accuracy):
        share, count = judge(rows[:100], label[:100], rows[100:], label[100:])
        assert count == 100
        assert share > 0.95
        share, _ = judge(noise(100, 4), label[:100], noise(100, 4, seed=1), label[100:])
        assert share < 0.5


def test_copies_are_found_and_fresh_images_are_not_taken_for_copies() -> None:
    train, held_out = noise(1000, 6).double(), noise(1000, 6, seed=1).double()
    copies = memorisation(train[:100] + 1e-4, held_out, train)
    assert copies["copied"].value == 1.0
    assert copies["nearness"].value < 0.01
    fresh = memorisation(noise(1000, 6, seed=2).double(), held_out, train)
    assert fresh["copied"].value < 0.03
    assert fresh["nearness"].value == pytest.approx(1, abs=0.1)
    made = torch.cat([held_out[:5], train[[42]]])
    assert closest_pairs(made, train, 1)[0] == pytest.approx(
        {"image": 5, "training_image": 42, "distance": 0.0}, abs=1e-6
    )
