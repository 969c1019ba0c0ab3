"""The algebra of noised latents: coefficients, conversions, weights of losses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from e2ediff.interpolant import KINDS
from e2ediff.losses import SPACES, clean_loss, direct_loss, error_weight
from e2ediff.parts.interpolants import Cosine, Linear, VarianceExploding

PATHS = [Linear(), Cosine(), VarianceExploding(), VarianceExploding(sigma_max=10.0)]
each_path = pytest.mark.parametrize("path", PATHS, ids=str)
# Away from the ends, where some conversions divide by zero and say so.
inner_times = st.floats(0.01, 0.99)
seeds = st.integers(0, 2**31)

# float64 keeps 1e-16; the conversions lose up to sigma_max^2 / (1 - t)^2, about 1e8, of it.
EXACT = {"rtol": 1e-7, "atol": 1e-7}


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def latents(seed: int, path, t: float):
    """Clean latents, noise and their mixture at time t, (3, 2, 4), float64."""
    g = torch.Generator().manual_seed(seed)
    x0, eps = (torch.randn(3, 2, 4, generator=g, dtype=torch.float64) for _ in range(2))
    times = double(t, t, t)
    return x0, eps, path.mix(x0, eps, times), times


def exact(path, x0, eps, t) -> dict[str, torch.Tensor]:
    """The four kinds from their definitions."""
    sigma = path.sigma(t)[:, None, None]
    return {"x0": x0, "eps": eps, "v": path.velocity(x0, eps, t), "score": -eps / sigma}


@each_path
@given(t=st.floats(0.0, 1.0))
def test_derivatives_are_those_of_autograd(path, t) -> None:
    for f, dot in ((path.alpha, path.alpha_dot), (path.sigma, path.sigma_dot)):
        at = double(t).requires_grad_()
        value, slope = f(at), double(0.0)
        if value.requires_grad:
            (slope,) = torch.autograd.grad(value.sum(), at)
        torch.testing.assert_close(dot(at.detach()), slope, rtol=1e-12, atol=1e-12)


@each_path
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changed", ["z_t", "guess"])
def test_an_estimate_whose_latent_was_changed_in_place_is_no_wrong_number(
    path, kind, changed
) -> None:
    x0, eps, z_t, t = latents(0, path, 0.4)
    guess = exact(path, x0, eps, t)[kind].clone()
    found = path.estimate(guess, z_t, 0.4, kind)
    (z_t if changed == "z_t" else guess).mul_(2)
    for other in set(KINDS) - {kind}:
        with pytest.raises(RuntimeError, match="was changed in place"):
            getattr(found, other)


@each_path
@given(a=inner_times, b=inner_times)
def test_the_signal_to_noise_ratio_rises(path, a, b) -> None:
    a, b = sorted((a, b))
    low, high = path.logsnr(double(a, b))
    assert low <= high
    if b - a > 1e-9:
        assert low < high


@each_path
def test_the_data_end_is_clean_and_the_noise_end_is_noise(path) -> None:
    one, zero = double(1.0), double(0.0)
    assert path.alpha(one).item() == pytest.approx(1.0, abs=1e-15)
    assert path.sigma(one).item() == 0.0
    at_noise = path.alpha(zero) / path.sigma(zero)
    bound = 1 / path.sigma_max if isinstance(path, VarianceExploding) else 0.0
    assert at_noise.item() <= bound
    assert path.logsnr(torch.linspace(0, 1, 11)).isfinite().all()


@given(t=st.floats(0.0, 1.0))
def test_the_cosine_path_keeps_unit_variance(t) -> None:
    path = Cosine()
    total = path.alpha(double(t)).square() + path.sigma(double(t)).square()
    assert total.item() == pytest.approx(1.0, abs=1e-14)


@each_path
@pytest.mark.parametrize("known", KINDS)
@pytest.mark.parametrize("wanted", KINDS)
@settings(max_examples=20)  # for each of 64 cases
@given(seed=seeds, t=inner_times)
def test_every_kind_converts_to_every_kind_and_back(path, known, wanted, seed, t) -> None:
    x0, eps, z_t, times = latents(seed, path, t)
    truth = exact(path, x0, eps, times)
    there = getattr(path.estimate(truth[known], z_t, times, known), wanted)
    torch.testing.assert_close(there, truth[wanted], **EXACT)
    back = getattr(path.estimate(there, z_t, times, wanted), known)
    torch.testing.assert_close(back, truth[known], **EXACT)


@each_path
@pytest.mark.parametrize("kind", KINDS)
@given(seed=seeds, t=inner_times)
def test_an_estimate_is_consistent_for_any_answer(path, kind, seed, t) -> None:
    """Also for a wrong one, as a network's is."""
    x0, _, z_t, times = latents(seed, path, t)
    wrong = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1), dtype=x0.dtype)
    e = path.estimate(wrong, z_t, times, kind)
    # an answer of size 1 read as a score is an eps of size sigma, up to 80
    scale = 1 + e.x0.abs().max().item()
    torch.testing.assert_close(path.mix(e.x0, e.eps, times) / scale, z_t / scale, **EXACT)
    torch.testing.assert_close(path.velocity(e.x0, e.eps, times) / scale, e.v / scale, **EXACT)
    sigma = path.sigma(times)[:, None, None]
    torch.testing.assert_close(-e.score * sigma, e.eps, **EXACT)
    assert torch.equal(getattr(e, kind), wrong)


@each_path
@given(seed=seeds, t=inner_times)
def test_velocity_is_the_slope_of_the_mixture(path, seed, t) -> None:
    x0, eps, _, times = latents(seed, path, t)
    at = times.requires_grad_()
    z_t, v = path.mix(x0, eps, at), path.velocity(x0, eps, at)
    for weights in (x0, eps):  # autograd gives slopes of scalars only
        (slope,) = torch.autograd.grad((weights * z_t).sum(), at, retain_graph=True)
        torch.testing.assert_close(slope, (weights * v).sum(dim=(1, 2)), **EXACT)


@each_path
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [0.0, 1.0])
def test_estimates_at_the_ends_are_finite(path, kind, t) -> None:
    """In float32, where the samplers begin and could end."""
    g = torch.Generator().manual_seed(0)
    z_t, value = torch.randn(2, 3, 4, generator=g), torch.randn(2, 3, 4, generator=g)
    e = path.estimate(value, z_t, torch.full((2,), t), kind)
    assert all(getattr(e, k).isfinite().all() for k in KINDS)


@each_path
@pytest.mark.parametrize("space", SPACES)
@given(seed=seeds, t=inner_times)
def test_an_error_in_any_space_is_the_weighted_clean_error(path, space, seed, t) -> None:
    """||v_hat - v||^2 = w_t ||x0_hat - x0||^2, and the same for eps."""
    x0, eps, z_t, times = latents(seed, path, t)
    guess = path.estimate(x0 + torch.sin(7 * eps), z_t, times, "x0")
    error = getattr(guess, space) - exact(path, x0, eps, times)[space]
    w = error_weight(path, times, space)[:, None, None]
    torch.testing.assert_close(error.square(), w * (guess.x0 - x0).square(), rtol=1e-6, atol=1e-8)


@given(t=st.floats(0.0, 0.999))
def test_on_the_linear_path_the_velocity_weight_is_one_over_one_minus_t_squared(t) -> None:
    weight = error_weight(Linear(), double(t), "v").item()
    assert weight == pytest.approx((1 - t) ** -2, rel=1e-9)
    assert error_weight(Linear(), double(t), "eps").item() == pytest.approx(
        (t / (1 - t)) ** 2, rel=1e-9, abs=1e-300
    )


@each_path
@pytest.mark.parametrize("space", ["v", "eps"])
@pytest.mark.parametrize("clamp", [math.inf, 400.0, 4.0])
@given(seed=seeds, t=st.floats(0.05, 0.99))
def test_direct_and_clean_loss_have_one_value(path, space, clamp, seed, t) -> None:
    x0, eps, z_t, times = latents(seed, path, t)
    guess = path.estimate(x0 + 0.3 * torch.sin(5 * z_t), z_t, times, "x0")
    # the losses compute in float32
    guess = path.estimate(guess.x0.float(), z_t.float(), times.float(), "x0")
    arguments = (path, times.float())
    clean = clean_loss(guess, x0.float(), *arguments, space, clamp)
    direct = direct_loss(guess, x0.float(), eps.float(), *arguments, space, clamp)
    # float32: v is a difference of numbers up to 1 / (1 - t) = 100 times its error
    torch.testing.assert_close(clean, direct, rtol=2e-2, atol=1e-4)


@each_path
@pytest.mark.parametrize("space", ["v", "eps"])
def test_direct_and_clean_loss_differ_in_what_the_noised_latent_hears(path, space) -> None:
    """With the target stopped, v_hat carries z_t outside of the network and x0_hat does not."""
    x0, eps, z_t, times = latents(3, path, 0.6)
    z_t.requires_grad_()
    answer = torch.full_like(x0, 0.5)  # a network that does not look at z_t
    guess = path.estimate(answer, z_t, times, "x0")
    clean = clean_loss(guess, x0, path, times, space)
    direct = direct_loss(guess, x0, eps, path, times, space)
    torch.testing.assert_close(clean, direct, rtol=1e-5, atol=0.0)
    assert not clean.requires_grad
    (grad,) = torch.autograd.grad(direct, z_t)
    assert grad.abs().max() > 1e-6


@each_path
def test_in_clean_space_both_losses_are_the_plain_squared_error(path) -> None:
    x0, eps, z_t, times = latents(4, path, 0.7)
    guess = path.estimate(x0 + 0.5, z_t, times, "x0")
    for loss in (
        clean_loss(guess, x0, path, times),
        direct_loss(guess, x0, eps, path, times, "x0"),
    ):
        assert loss.item() == pytest.approx(0.25, rel=1e-6)


@each_path
@given(t=st.floats(0.3, 0.9))
def test_the_mixture_has_the_moments_of_its_coefficients(path, t) -> None:
    g = torch.Generator().manual_seed(0)
    x0 = 2 + 3 * torch.randn(20000, 1, 1, generator=g, dtype=torch.float64)
    eps = torch.randn(20000, 1, 1, generator=g, dtype=torch.float64)
    times = torch.full((20000,), t, dtype=torch.float64)
    z_t = path.mix(x0, eps, times)
    alpha, sigma = path.alpha(times[0]).item(), path.sigma(times[0]).item()
    std = math.sqrt(9 * alpha**2 + sigma**2)
    # five standard errors of 20000 numbers
    assert z_t.mean().item() == pytest.approx(2 * alpha, abs=5 * std / math.sqrt(20000))
    assert z_t.std().item() == pytest.approx(std, rel=5 / math.sqrt(40000))
