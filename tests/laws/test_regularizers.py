"""Regularisers against closed forms and independent references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from e2ediff_testing import make_batch, make_draw
from hypothesis import given
from hypothesis import strategies as st

from e2ediff.parts.regularizers import (
    Dispersive,
    RankFilter,
    SIGReg,
    VarianceExpansion,
    VICReg,
    epps_pulley,
)

DRAW = make_draw(make_batch())


def latents(seed: int = 0, shape=(6, 4, 5), scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def rows(z: torch.Tensor, of: str) -> np.ndarray:
    return (z.flatten(0, 1) if of == "token" else z.flatten(1)).double().numpy()


each_of = pytest.mark.parametrize("of", ["token", "image"])


@each_of
@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_vicreg_is_its_equations_by_numpy(of, scale) -> None:
    z = latents(scale=scale)
    cov = np.cov(rows(z, of), rowvar=False)
    std = np.sqrt(np.diag(cov) + 1e-4)
    variance = np.maximum(0, 1 - std).mean()
    covariance = (np.square(cov).sum() - np.square(np.diag(cov)).sum()) / len(cov)
    loss = VICReg(variance_weight=2.0, covariance_weight=0.5, of=of).loss(z, DRAW)
    assert loss.item() == pytest.approx(2 * variance + 0.5 * covariance, rel=1e-4)


def test_vicreg_is_nothing_for_white_latents_and_the_floor_for_constant_ones() -> None:
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])[:, None] * 2
    assert VICReg().loss(corners, DRAW).item() == 0
    constant = torch.ones(4, 3, 2)
    assert VICReg(floor=2.0).loss(constant, DRAW).item() == pytest.approx(2.0 - 0.01)


def exact_epps_pulley(x: np.ndarray) -> float:
    """The integral over the whole line, by pairs: Gaussian integrals of cosines."""
    n = len(x)
    pairs = math.sqrt(2 * math.pi) * np.exp(-(np.subtract.outer(x, x) ** 2) / 2).mean()
    cross = 2 * math.sqrt(math.pi) * np.exp(-(x**2) / 4).mean()
    return n * (pairs - cross + math.sqrt(2 * math.pi / 3))


@given(seed=st.integers(0, 1000), scale=st.floats(0.05, 2.0), shift=st.floats(-1.0, 1.0))
def test_the_epps_pulley_statistic_is_its_closed_form(seed, scale, shift) -> None:
    """A step of 5/8 repeats itself over differences of 10: those of x in [-2.5, 2.5] are exact."""
    x = (latents(seed, (40, 1)) * scale + shift).clamp(-2.5, 2.5)
    exact = exact_epps_pulley(x[:, 0].double().numpy())
    assert epps_pulley(x).item() == pytest.approx(exact, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("points", [16, 17, 64])
def test_even_and_odd_numbers_of_points_give_the_same_statistic(points) -> None:
    x = latents(3, (40, 1)).clamp(-2.5, 2.5)
    exact = exact_epps_pulley(x[:, 0].double().numpy())
    assert epps_pulley(x, points).item() == pytest.approx(exact, rel=1e-3)


@each_of
def test_sigreg_of_normal_latents_is_its_expectation(of) -> None:
    """n E|phi_n - phi|^2 = 1 - phi^2, integrated: sqrt(2 pi) - sqrt(2 pi / 3)."""
    expected = math.sqrt(2 * math.pi) - math.sqrt(2 * math.pi / 3)
    z = latents(1, (250, 4, 64) if of == "token" else (1000, 4, 16))
    found = SIGReg(directions=400, of=of).loss(z, DRAW).item()
    # 64 dimensions hold 64 independent directions, each with a spread of about 1
    assert found == pytest.approx(expected, abs=0.4)
    for worse in (z * 0.5, z * 2, z + 1):
        assert SIGReg(directions=400, of=of).loss(worse, DRAW).item() > 10 * expected


@each_of
def test_variance_expansion_is_the_inverse_variance(of) -> None:
    z = latents(scale=0.7)
    expected = (1 / (rows(z, of).var(axis=0, ddof=1) + 0.3)).mean()
    found = VarianceExpansion(delta=0.3, of=of).loss(z, DRAW)
    assert found.item() == pytest.approx(expected, rel=1e-5)


@each_of
@pytest.mark.parametrize("power", [-1.0, -0.5])
def test_the_rank_filter_is_its_svd(of, power) -> None:
    z = latents(2)
    a = rows(z, of)
    a = a - a.mean(axis=0)
    u, s, vt = np.linalg.svd(a, full_matrices=False)
    raised = np.where(s > 1e-9, np.maximum(s, 1e-12) ** (1 + power), 0.0)
    raised *= np.linalg.norm(s) / np.linalg.norm(raised)
    expected = np.square(s - raised).sum() / a.size
    part = RankFilter(power=power, of=of)
    assert part.loss(z, DRAW).item() == pytest.approx(expected, rel=1e-3)
    centred = torch.tensor(a).float()
    target = part.target(centred).double().numpy()
    np.testing.assert_allclose(target, u * raised @ vt, atol=1e-3)  # squares keep half the digits


def test_the_rank_filter_leaves_equal_modes_alone_and_raises_the_effective_rank() -> None:
    from e2ediff.parts.diagnostics.latent_health import effective_rank

    q, _ = torch.linalg.qr(latents(4, (24, 5)) - latents(4, (24, 5)).mean(dim=0))
    q = q - q.mean(dim=0)
    even = q.reshape(6, 4, 5)
    assert RankFilter().loss(even, DRAW).item() < 1e-9
    z = (latents(5) * torch.tensor([4.0, 2.0, 1.0, 0.5, 0.25])).requires_grad_()
    before = effective_rank(z.detach().flatten(0, 1))
    (grad,) = torch.autograd.grad(RankFilter().loss(z, DRAW), z)
    assert effective_rank((z - 20 * grad).detach().flatten(0, 1)) > before + 0.3


def test_dispersive_is_its_formula_for_two_images() -> None:
    """Pairs are 1-1, 1-2, 2-1, 2-2: the mean of exp is (1 + exp(-d^2)) / 2."""
    z = torch.zeros(2, 2, 3)
    z[1, 0] = torch.tensor([1.0, 2.0, 2.0])  # squared distance 9 at one position, 0 at the other
    whole = math.log((1 + math.exp(-9 / (6 * 0.5))) / 2)
    assert Dispersive(of="image").loss(z, DRAW).item() == pytest.approx(whole, rel=1e-5)
    token = math.log((1 + math.exp(-9 / (3 * 0.5))) / 2) / 2
    assert Dispersive(of="token").loss(z, DRAW).item() == pytest.approx(token, rel=1e-5)


@each_of
def test_dispersive_lies_between_that_of_far_and_of_equal_latents(of) -> None:
    far = latents(6, (6, 4, 5), scale=1e3)
    assert Dispersive(of=of).loss(far, DRAW).item() == pytest.approx(-math.log(6), rel=1e-5)
    assert Dispersive(of=of).loss(torch.ones(6, 4, 5), DRAW).item() == pytest.approx(0, abs=1e-5)
