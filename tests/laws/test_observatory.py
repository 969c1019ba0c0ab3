"""Figures of the observatory, against closed forms."""

from __future__ import annotations

import math

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from e2ediff.condition import Labels
from e2ediff.diagnostic import Probe
from e2ediff.parts.diagnostics.latent_health import LatentHealth
from e2ediff.parts.diagnostics.observatory import (
    EncoderGradients,
    Neighbours,
    Spectrum,
    Spread,
    Wiener,
    neighbour_accuracy,
    token_variances,
    wiener_error,
)
from e2ediff.parts.interpolants import Cosine, Linear

TIMES = (0.2, 0.5, 0.8)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(label: torch.Tensor) -> Labels:
    return Labels(label, int(label.max()) + 1)


def probe_of(z: torch.Tensor, **changes: object) -> Probe:
    x = torch.zeros(len(z), 1, 4, 4)
    condition = labels(torch.zeros(len(z), dtype=torch.long))
    return attrs.evolve(Probe(x, condition, z, z, "x0", Linear()), **changes)


# Spectrum


@given(k=st.integers(1, 8), scale=st.floats(1e-3, 1e3))
def test_k_equal_axes_need_nearly_all_of_them_for_95_percent(k, scale) -> None:
    z = torch.zeros(2 * k, 1, 8, dtype=torch.float64)
    for i in range(k):
        z[2 * i, 0, i], z[2 * i + 1, 0, i] = scale, -scale
    figures = Spectrum(top=8).measure(probe_of(z))
    assert figures["spectrum_95"] == math.ceil(0.95 * k - 1e-9)
    shares = [figures[f"spectrum/{i}"] for i in range(1, 9)]
    assert shares == pytest.approx([1 / k] * k + [0.0] * (8 - k), abs=1e-9)


def test_the_spectrum_of_dead_latents_is_empty_and_positions_do_not_count() -> None:
    place = normal(1, 5, 4).expand(20, 5, 4)
    for z in (torch.zeros(20, 5, 4), place):
        figures = Spectrum().measure(probe_of(z))
        assert set(figures) == {"spectrum_95", *(f"spectrum/{i}" for i in range(1, 5))}
        assert set(figures.values()) == {0.0}
    content = normal(200, 5, 4, seed=1)
    alone, both = (Spectrum().measure(probe_of(z)) for z in (content, content + 9 * place[:1]))
    assert both == pytest.approx(dict(alone))


def test_the_variances_are_the_eigenvalues_of_the_covariance() -> None:
    z = normal(60, 3, 5) @ normal(5, 5, seed=1)
    rows = (z - z.mean(dim=0)).flatten(0, 1)
    expected = torch.linalg.eigvalsh(rows.T @ rows / len(rows)).flip(0)
    torch.testing.assert_close(token_variances(z), expected)
    few = token_variances(z[:2, :1])  # two rows have one axis
    assert few.shape == (5,)
    assert int((few > 1e-12).sum()) == 1


# Spread


def test_channels_and_positions_are_told_apart() -> None:
    z = normal(4000, 2, 4) * torch.tensor([1.0, 2.0, 0.01, 0.0]) * torch.tensor([[1.0], [3.0]])
    figures = Spread().measure(probe_of(z + torch.tensor([0.0, -5.0, 0.0, 0.0])))
    by_place = math.sqrt((1 + 9) / 2)
    assert figures["channel_std_max"] == pytest.approx(2 * by_place, rel=0.05)  # 8000 numbers
    assert figures["channel_std_min"] == pytest.approx(0.0, abs=1e-9)
    ratio = figures["position_std_max"] / figures["position_std_min"]
    assert ratio == pytest.approx(3.0, rel=0.05)
    assert figures["channel_offset"] == pytest.approx(5.0, rel=0.05)
    assert figures["dead_channels"] == 0.5


def test_all_channels_of_constant_latents_are_dead() -> None:
    assert Spread().measure(probe_of(torch.ones(8, 2, 3)))["dead_channels"] == 1.0


# Wiener


def test_the_wiener_error_of_one_mode_by_hand() -> None:
    """Variance 4 under z/2 + eps/2: the posterior variance is 1 / (1/4 + 1) = 4/5."""
    assert wiener_error(torch.tensor([4.0]), 0.5, 0.5) == pytest.approx(0.8)
    assert wiener_error(torch.tensor([4.0, 0.0]), 0.0, 1.0) == pytest.approx(4.0)


@pytest.mark.parametrize("path", [Linear(), Cosine()], ids=["linear", "cosine"])
def test_the_exact_denoiser_of_a_gaussian_is_exactly_as_good_as_the_filter(path) -> None:
    """Correlated channels, an own mean for each position; half that gain is worse."""
    mix, place = normal(4, 4, seed=1), normal(1, 6, 4, seed=2)
    z = normal(3000, 6, 4) @ mix + place
    covariance, guesses, worse = mix.T @ mix, {}, {}
    for i, t in enumerate(TIMES):
        time = torch.tensor([t], dtype=torch.float64)
        a, s = path.alpha(time), path.sigma(time)
        z_t = a * z + s * normal(*z.shape, seed=3 + i)
        noisy = a**2 * covariance + s**2 * torch.eye(4)
        gain = a * covariance @ torch.linalg.inv(noisy)
        guesses[t] = place + (z_t - a * place) @ gain.T
        worse[t] = place + (z_t - a * place) @ gain.T / 2
    best = Wiener().measure(probe_of(z, denoised=guesses, path=path))
    assert set(best) == {f"beyond_wiener@{t:g}" for t in TIMES}
    # 18000 tokens: the error of a mean square is about 1 %
    assert list(best.values()) == pytest.approx([1.0] * 3, rel=0.03)
    assert min(Wiener().measure(probe_of(z, denoised=worse, path=path)).values()) > 1.05


def test_without_content_or_path_the_wiener_figure_stays_finite_or_away() -> None:
    z = torch.zeros(8, 2, 3)
    assert Wiener().measure(probe_of(z, denoised={0.5: z}))["beyond_wiener@0.5"] == 0.0
    assert math.isfinite(Wiener().measure(probe_of(z, denoised={0.5: z + 9}))["beyond_wiener@0.5"])
    assert Wiener().measure(probe_of(z, denoised={0.5: z}, path=None)) == {}


# Gradients


def test_identical_opposite_orthogonal_and_missing_gradients() -> None:
    g = normal(8, 2, 3)
    orthogonal = torch.zeros_like(g)
    orthogonal[0, 0, 0], orthogonal[0, 0, 1] = g[0, 0, 1], -g[0, 0, 0]
    pulls = {"a": g, "same": 3 * g, "against": -g, "across": orthogonal, "none": 0 * g}
    figures = EncoderGradients().measure(probe_of(g, gradients=pulls))
    assert figures["encoder_cosine/a/same"] == pytest.approx(1.0)
    assert figures["encoder_cosine/a/against"] == pytest.approx(-1.0)
    assert figures["encoder_cosine/a/across"] == pytest.approx(0.0, abs=1e-12)
    assert figures["encoder_cosine/a/none"] == 0.0
    assert figures["encoder_grad/same"] == pytest.approx(3 * figures["encoder_grad/a"])
    assert figures["encoder_grad/a"] == pytest.approx(float(g.square().sum().sqrt()))
    assert figures["encoder_grad/none"] == 0.0
    assert len(figures) == 5 + 10


# Neighbours


def test_separable_clusters_are_always_told_and_shuffled_labels_at_chance() -> None:
    label = torch.arange(400) % 4
    z = torch.eye(4, dtype=torch.float64)[label][:, None] + 0.05 * normal(400, 3, 4)
    assert Neighbours().measure(probe_of(z, condition=labels(label))) == {
        "knn": 1.0,
        "knn_mean": 1.0,
    }
    order = torch.randperm(400, generator=torch.Generator().manual_seed(2))
    chance = Neighbours().measure(probe_of(z, condition=labels(label[order])))["knn"]
    assert chance == pytest.approx(0.25, abs=0.08)  # 400 guesses: 3.7 standard errors


def test_an_image_does_not_vote_for_itself() -> None:
    """Pairs of opposite labels, and each one's nearest is its partner."""
    rows = torch.eye(4, dtype=torch.float64).repeat_interleave(2, dim=0)
    assert neighbour_accuracy(rows, torch.arange(8) % 2, k=1) == 0.0
    assert neighbour_accuracy(rows, torch.arange(8) // 2, k=1) == 1.0


def test_what_only_the_places_hold_is_lost_to_the_mean() -> None:
    """Labels in a difference of two positions, which their mean cancels."""
    label = torch.arange(200) % 2
    signal = (2.0 * label - 1)[:, None] * torch.ones(200, 2, dtype=torch.float64)
    z = torch.stack([signal, -signal], dim=1) + 0.1 * normal(200, 2, 2)
    figures = Neighbours().measure(probe_of(z, condition=labels(label)))
    assert figures["knn"] == 1.0
    assert figures["knn_mean"] < 0.7


def test_more_neighbours_than_images_and_a_single_image_are_no_trouble() -> None:
    assert neighbour_accuracy(normal(3, 2), torch.zeros(3).long(), k=10) == 1.0
    assert neighbour_accuracy(normal(1, 2), torch.zeros(1).long(), k=10) == 0.0


# The three ranks: P images of N tokens, whose strong part decides which of them falls.

P, N, D = 12, 48, 8


def strong_channel() -> torch.Tensor:
    """One channel says everything, and its mean over an image's positions is 0."""
    local = normal(P, N, 1)
    return functional.pad(local - local.mean(dim=1, keepdim=True), (0, D - 1))


def strong_places() -> torch.Tensor:
    """All channels, and nothing that an image's positions share but its brightness."""
    local = normal(P, N, D)
    shared = functional.pad(normal(P, 1, 1, seed=1), (0, D - 1))
    return local - local.mean(dim=1, keepdim=True) + shared


def strong_layout() -> torch.Tensor:
    """Every image is the same layout times a number; over positions the layout's mean is 0."""
    layout = normal(1, N, D)
    return normal(P, 1, 1, seed=1) * (layout - layout.mean(dim=1, keepdim=True))


def shares(z: torch.Tensor) -> dict[str, float]:
    """Each rank over the largest that it can be."""
    figures = LatentHealth().measure(probe_of(z))
    largest = {"rank": D, "rank_channel": min(P - 1, D), "rank_sample": P - 1}
    return {name: figures[name] / most for name, most in largest.items()}


@pytest.mark.parametrize(
    ("strong", "fallen"),
    [
        (strong_channel, "rank"),
        (strong_places, "rank_channel"),
        (strong_layout, "rank_sample"),
    ],
)
def test_each_rank_can_fall_while_the_two_others_stay(strong, fallen) -> None:
    """What is weak, a thousandth, is global content in all channels."""
    healthy = normal(P, 1, D, seed=2) + normal(P, N, D, seed=3)
    assert min(shares(healthy).values()) > 0.8
    found = shares(strong() + 1e-3 * healthy)
    lowest = {"rank": 1 / D, "rank_channel": 1 / min(P - 1, D), "rank_sample": 1 / (P - 1)}
    assert found.pop(fallen) == pytest.approx(lowest[fallen], rel=0.2)
    assert min(found.values()) > 0.8
