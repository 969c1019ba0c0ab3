"""Why latents collapse, in closed form, through the library's own losses.

Latents z = w s of independent modes with variance w^2, and the exact linear denoiser (Wiener
filter) of each.
Expectations over latents and noise are exact: the losses are quadratic, so four sign points
have the moments of a Gaussian.
Expectations over uniform t are Gauss-Legendre sums.

Source: docs/explanation/collapse.md, derived from DSD (arXiv 2511.14716).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from e2ediff.losses import clean_loss, direct_loss, error_weight
from e2ediff.objective import sg
from e2ediff.parts.interpolants import Cosine, Linear, VarianceExploding

VARIANCES = torch.tensor([0.05, 0.2, 0.5, 1.0, 1.5, 2.0, 4.0, 8.0], dtype=torch.float64)
SIGNS = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)


def quadrature(nodes: int) -> list[tuple[float, float]]:
    """Times and weights of the mean over uniform t."""
    x, w = np.polynomial.legendre.leggauss(nodes)
    return list(zip(((1 + x) / 2).tolist(), (w / 2).tolist(), strict=True))


# The integrands are smooth on [0, 1]; the nearest pole of these variances is 0.2 away, so that
# 40 nodes are exact to rounding. More would come nearer to t = 1, where `clean_loss`, which
# keeps its guess in float32, has an error of 1e-7 / (1 - t)^2.
TIMES = quadrature(40)


def losses_of(variant: str, w: torch.Tensor, t: float, path, space: str = "v") -> torch.Tensor:
    """Exact expectation of a variant's loss at time t, summed over modes; differentiable in w.

    `w` (D,) is what the encoder does; the denoiser is optimal for it and held fixed.
    """
    w = w.double()
    z = (SIGNS[:, :1] * w)[:, None]  # (4, 1, D)
    eps = SIGNS[:, 1:].expand(4, len(w))[:, None]
    times = torch.full((4,), t, dtype=torch.float64)
    a, s = path.alpha(times[0]), path.sigma(times[0])
    gain = (a * w.square() / (a.square() * w.square() + s.square())).detach()
    z_t = path.mix(sg(z) if variant == "both stopped" else z, eps, times)
    target = z if variant in ("naive", "naive x0") else sg(z)
    if variant in ("naive", "stopped v"):  # a network that predicts v
        answer = path.estimate(gain * z_t, z_t, times, "x0").v
        guess = path.estimate(answer, z_t, times, "v")
    else:
        guess = path.estimate(gain * z_t, z_t, times, "x0")
    if variant in ("naive", "stopped v", "wrong form"):
        loss = direct_loss(guess, target, eps, path, times, space, clamp=math.inf)
    else:
        loss = clean_loss(guess, target, path, times, space, clamp=math.inf)
    return loss * len(w)


def pull(variant: str, variances: torch.Tensor, t: float, path=None) -> torch.Tensor:
    """-dL/dw at time t."""
    w = variances.sqrt().requires_grad_()
    loss = losses_of(variant, w, t, path or Linear())
    if not loss.requires_grad:
        return torch.zeros_like(variances)
    return -torch.autograd.grad(loss, w)[0]


def mean_pull(variant: str) -> torch.Tensor:
    """-dL/dw for uniform t."""
    return torch.stack([weight * pull(variant, VARIANCES, t) for t, weight in TIMES]).sum(dim=0)


NEAR = {"rtol": 1e-3, "atol": 1e-3}


def test_the_best_velocity_loss_of_gaussian_latents_is_half_pi_times_the_trace_of_the_root():
    w = VARIANCES.sqrt()
    best = sum(weight * losses_of("naive", w, t, Linear()) for t, weight in TIMES)
    assert best.item() == pytest.approx(math.pi / 2 * w.sum().item(), rel=1e-5)


def test_the_trace_is_that_of_the_whole_covariance_not_of_its_diagonal() -> None:
    """In any basis, with the matrix Wiener filter."""
    path, g = Linear(), torch.Generator().manual_seed(0)
    root = torch.randn(5, 5, generator=g, dtype=torch.float64)
    covariance, one = root @ root.T, torch.eye(5, dtype=torch.float64)
    best = 0.0
    for t, weight in TIMES:
        at = torch.tensor([t], dtype=torch.float64)
        a, s = path.alpha(at).item(), path.sigma(at).item()
        kept = covariance - a**2 * covariance @ torch.linalg.solve(
            a**2 * covariance + s**2 * one, covariance
        )
        best += weight * error_weight(path, at, "v").item() * kept.trace().item()
    nuclear = torch.linalg.eigvalsh(covariance).sqrt().sum().item()
    assert best == pytest.approx(math.pi / 2 * nuclear, rel=1e-6)


@pytest.mark.parametrize("scale", [0.1, 0.5, 3.0])
def test_the_best_velocity_loss_is_homogeneous_of_degree_one(scale) -> None:
    """For a law that is not Gaussian: z = +-a, whose denoiser is a tanh."""
    path = Linear()
    eps = torch.linspace(-10, 10, 2001, dtype=torch.float64)
    density = torch.exp(-eps.square() / 2) / math.sqrt(2 * math.pi) * 0.01

    def best(a: float) -> float:
        total = 0.0
        for t, weight in quadrature(120):
            at = torch.tensor([t], dtype=torch.float64)
            z = torch.full((1, 2001), a, dtype=torch.float64)
            z_t = path.mix(z, eps[None], at)
            guess = a * torch.tanh(a * path.alpha(at) * z_t / path.sigma(at).square())
            error = ((guess - z).square() * density).sum()
            total += weight * error_weight(path, at, "v").item() * error.item()
        return total

    # 120 nodes resolve the kink of the two-point law to about 1e-4
    assert best(scale) == pytest.approx(scale * best(1.0), rel=1e-3)


def test_naive_training_shrinks_every_mode_at_the_same_speed() -> None:
    half_pi = torch.full_like(VARIANCES, math.pi / 2)
    torch.testing.assert_close(mean_pull("naive"), -half_pi, **NEAR)


def test_clean_prediction_without_a_stopped_target_is_no_fix() -> None:
    torch.testing.assert_close(mean_pull("naive x0"), mean_pull("naive"), **NEAR)


def test_stopped_target_and_velocity_kill_modes_below_variance_one_and_inflate_the_rest() -> None:
    root = VARIANCES.sqrt()
    rate = math.pi / (2 * root) - (VARIANCES.log() + math.pi / root) / (1 + VARIANCES)
    found = mean_pull("stopped v")
    torch.testing.assert_close(found / root, rate, **NEAR)
    assert (found[VARIANCES < 1] < -0.01).all()
    assert abs(found[VARIANCES == 1].item()) < 1e-3
    assert (found[VARIANCES > 1] > 0.01).all()


def test_stopped_target_and_clean_prediction_grow_every_mode_at_the_same_speed() -> None:
    half_pi = torch.full_like(VARIANCES, math.pi / 2)
    torch.testing.assert_close(mean_pull("stopped x0"), half_pi, **NEAR)


def test_both_stopped_leave_the_latents_alone() -> None:
    assert torch.equal(mean_pull("both stopped"), torch.zeros_like(VARIANCES))


def test_a_clean_network_compared_by_velocity_falls_into_the_trap() -> None:
    """The wrong form: the loss value of the right one, and the gradient of `stopped v`."""
    w = VARIANCES.sqrt()
    for t, _ in TIMES[::8]:
        right, wrong = (losses_of(v, w, t, Linear()) for v in ("stopped x0", "wrong form"))
        assert wrong.item() == pytest.approx(right.item(), rel=1e-4)
    torch.testing.assert_close(mean_pull("wrong form"), mean_pull("stopped v"), **NEAR)
    assert (mean_pull("wrong form") - mean_pull("stopped x0")).abs().min() > 0.1


@given(t=st.floats(0.02, 0.9), variance=st.floats(0.02, 50.0))
def test_rates_at_one_time_are_those_of_the_closed_forms(t, variance) -> None:
    """d ln w / d tau: naive -2 w_t (1-a)^2, v 2 w_t (a-t)(1-a), x0 2 w_t a (1-a)."""
    a = t**2 * variance / (t**2 * variance + (1 - t) ** 2)
    weight = (1 - t) ** -2
    expected = {
        "naive": -2 * weight * (1 - a) ** 2,
        "naive x0": -2 * weight * (1 - a) ** 2,
        "stopped v": 2 * weight * (a - t) * (1 - a),
        "wrong form": 2 * weight * (a - t) * (1 - a),
        "stopped x0": 2 * weight * a * (1 - a),
        "both stopped": 0.0,
    }
    variances = torch.tensor([variance], dtype=torch.float64)
    for variant, rate in expected.items():
        found = pull(variant, variances, t).item() / math.sqrt(variance)
        # float32 guesses of size 1 against errors of size 1 - a
        assert found == pytest.approx(rate, rel=1e-3, abs=1e-4 * weight), variant


@pytest.mark.parametrize("path", [Linear(), Cosine(), VarianceExploding(sigma_max=10.0)], ids=str)
@given(t=st.floats(0.1, 0.9), variance=st.floats(0.05, 20.0))
def test_the_signs_hold_at_every_time_of_every_path(path, t, variance) -> None:
    """So they hold for every law of times and every clamp."""
    variances = torch.tensor([variance], dtype=torch.float64)
    assert pull("naive", variances, t, path).item() < 0
    assert pull("naive x0", variances, t, path).item() < 0
    assert pull("stopped x0", variances, t, path).item() > 0
