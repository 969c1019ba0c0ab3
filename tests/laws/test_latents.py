"""Latent norms, and the figures by which collapse is told."""

from __future__ import annotations

import json
import math

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from e2ediff.diagnostic import Probe
from e2ediff.errors import LatentError
from e2ediff.latent import NORM_KINDS, TIME, LatentContract, LatentNorm
from e2ediff.parts.diagnostics.latent_health import (
    LatentHealth,
    content_std,
    effective_rank,
    participation_ratio,
    positional_fraction,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


RAW = (3 + 5 * random(64, 4, 6)).float()
# eps = 1e-5 inside the root, against a variance of 25; then float32.
NEAR = {"rtol": 1e-4, "atol": 1e-4}


@pytest.mark.parametrize(
    ("kind", "over"), [("layer", (2,)), ("batch", (0, 1)), ("position", (0,))]
)
def test_a_norm_gives_mean_zero_and_variance_one_over_its_dimensions(kind, over) -> None:
    var, mean = torch.var_mean(LatentNorm(kind, 4, 6)(RAW), dim=over, correction=0)
    torch.testing.assert_close(mean, torch.zeros_like(mean), **NEAR)
    torch.testing.assert_close(var, torch.ones_like(var), **NEAR)


@pytest.mark.parametrize("kind", ["layer", "batch", "position"])
@given(scale=st.floats(0.1, 1000.0), shift=st.floats(-10.0, 10.0))
def test_a_norm_undoes_scale_and_shift(kind, scale, shift) -> None:
    """So no loss can be lowered by them."""
    norm = LatentNorm(kind, 4, 6, eps=0.0).double()
    raw = RAW.double()
    # the norms compute in float32: a shift of 10 against a scale of 0.5 costs two digits
    torch.testing.assert_close(norm(scale * raw + shift), norm(raw), rtol=1e-3, atol=1e-3)


def test_the_affine_norm_is_the_layer_norm_with_a_learned_scale_and_shift() -> None:
    norm = LatentNorm("affine", 4, 6)
    assert torch.equal(norm(RAW), LatentNorm("layer", 4, 6)(RAW))
    with torch.no_grad():
        norm.weight.copy_(torch.arange(6.0))
        norm.bias.fill_(-1.0)
    expected = LatentNorm("layer", 4, 6)(RAW) * torch.arange(6.0) - 1
    torch.testing.assert_close(norm(RAW), expected)
    assert [name for name, _ in norm.named_parameters()] == ["weight", "bias"]


def test_no_norm_is_the_identity() -> None:
    assert torch.equal(LatentNorm("none", 4, 6)(RAW), RAW)


def test_constants_of_a_position_satisfy_the_batch_norm_but_not_the_position_norm() -> None:
    """The loophole: latents without any content, of full variance and rank."""
    constant = random(1, 4, 6).float().expand(64, 4, 6)
    batch, position = (LatentNorm(kind, 4, 6)(constant) for kind in ("batch", "position"))
    assert batch.var(dim=(0, 1), correction=0).mean().item() == pytest.approx(1.0, abs=1e-3)
    assert positional_fraction(batch) == pytest.approx(1.0, abs=1e-6)
    assert content_std(batch) < 1e-6
    assert position.abs().max() < 1e-3


@pytest.mark.parametrize("kind", ["batch", "position"])
def test_eval_mode_uses_the_calibrated_statistics(kind) -> None:
    norm = LatentNorm(kind, 4, 6)
    norm.calibrate(RAW)
    trained = norm(RAW)
    norm.eval()
    # one statistic of the same latents, once in float32 and once in float64
    torch.testing.assert_close(norm(RAW), trained, **NEAR)
    torch.testing.assert_close(norm(RAW[:1]), norm(RAW)[:1], rtol=0.0, atol=0.0)
    torch.testing.assert_close(norm(RAW + 1), norm(RAW) + 1 / norm.var.sqrt(), **NEAR)


@pytest.mark.parametrize("kind", NORM_KINDS)
def test_a_training_pass_writes_no_statistics(kind) -> None:
    norm = LatentNorm(kind, 4, 6)
    before = {k: v.clone() for k, v in norm.named_buffers()}
    norm(RAW)
    assert all(torch.equal(v, before[k]) for k, v in norm.named_buffers())


@pytest.mark.parametrize("kind", NORM_KINDS)
def test_statistics_travel_in_the_state_dict_where_there_are_any(kind) -> None:
    norm, other = LatentNorm(kind, 4, 6), LatentNorm(kind, 4, 6).eval()
    norm.calibrate(RAW)
    stored = {"batch": {"mean", "var"}, "position": {"mean", "var"}, "affine": {"weight", "bias"}}
    assert set(norm.state_dict()) == stored.get(kind, set())
    other.load_state_dict(norm.state_dict())
    assert torch.equal(other(RAW), norm.eval()(RAW))


# Figures of collapse


def test_a_latent_that_is_not_learned_has_no_figures_of_collapse() -> None:
    """A constant one would be collapsed by every figure."""
    z = torch.zeros(8, 4, 6)
    probe = Probe(z, torch.zeros(8).long(), z, z, "x0")
    assert LatentHealth().verdict(LatentHealth().measure(probe))
    assert LatentHealth().measure(attrs.evolve(probe, learned=False)) == {}


@given(k=st.integers(1, 8))
def test_the_effective_rank_of_k_equal_directions_is_k(k) -> None:
    rows = torch.zeros(2 * k, 8, dtype=torch.float64)
    for i in range(k):
        rows[2 * i, i], rows[2 * i + 1, i] = 1.0, -1.0
    assert effective_rank(rows) == pytest.approx(k, rel=1e-9)
    assert participation_ratio(rows) == pytest.approx(k, rel=1e-9)


figures = pytest.mark.parametrize("figure", [effective_rank, participation_ratio])


@figures
@given(seed=st.integers(0, 2**31), scale=st.floats(1e-6, 1e6), shift=st.floats(-1e3, 1e3))
def test_a_rank_ignores_scale_shift_rotation_and_order(figure, seed, scale, shift) -> None:
    rows = random(40, 5, seed=seed) * torch.tensor([3.0, 2.0, 1.0, 0.5, 0.1])
    plain = figure(rows)
    rotation = torch.linalg.qr(random(5, 5, seed=seed + 1))[0]
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    assert figure(rows * scale) == pytest.approx(plain, rel=1e-9)
    assert figure(rows + shift) == pytest.approx(plain, rel=1e-9)
    assert figure(rows @ rotation) == pytest.approx(plain, rel=1e-9)
    assert figure(rows[order]) == pytest.approx(plain, rel=1e-9)


@figures
@given(seed=st.integers(0, 2**31), n=st.integers(2, 20), d=st.integers(1, 20))
def test_a_rank_lies_between_one_and_what_fits(figure, seed, n, d) -> None:
    assert 1 - 1e-9 <= figure(random(n, d, seed=seed)) <= min(n - 1, d) + 1e-9


def test_the_effective_rank_is_the_entropy_of_the_singular_values() -> None:
    """By hand: singular values 3 and 1 make p = 3/4, 1/4."""
    rows = torch.zeros(4, 6, dtype=torch.float64)
    rows[0, 0], rows[1, 0] = 3 / math.sqrt(2), -3 / math.sqrt(2)
    rows[2, 1], rows[3, 1] = 1 / math.sqrt(2), -1 / math.sqrt(2)
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert effective_rank(rows) == pytest.approx(expected, rel=1e-9)
    assert participation_ratio(rows) == pytest.approx(100 / 82, rel=1e-9)


@pytest.mark.parametrize("value", [0.0, 1.0, 1e6, -3.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_rows_have_rank_zero(value, dtype) -> None:
    assert effective_rank(torch.full((50, 7), value, dtype=dtype)) == 0.0


def test_content_and_position_split_the_variance() -> None:
    place, content = random(1, 9, 6), random(400, 9, 6, seed=1)
    assert positional_fraction(place.expand(400, 9, 6)) == pytest.approx(1.0)
    alone = content - content.mean(dim=0)
    assert positional_fraction(alone) == pytest.approx(0.0, abs=1e-12)
    assert content_std(place.expand(400, 9, 6)) == pytest.approx(0.0, abs=1e-12)
    assert content_std(2.5 * alone) == pytest.approx(2.5, rel=0.05)  # 21600 numbers
    between = place.var(dim=(0, 1), correction=0).sum()
    within = alone.var(dim=(0, 1), correction=0).sum()
    share = positional_fraction(place + alone)
    assert share == pytest.approx(float(between / (between + within)), rel=1e-9)


def test_latents_that_are_all_equal_count_as_positional() -> None:
    assert positional_fraction(torch.ones(5, 4, 3)) == 1.0


def test_the_verdict_names_each_sign_of_collapse_and_is_silent_for_health() -> None:
    verdict = LatentHealth().verdict
    healthy = {"rank": 12.0, "rank_fraction": 0.8, "positional": 0.2, "latent_std": 0.9}
    assert not verdict(healthy)
    assert not verdict({})
    sick = {"rank_fraction": 0.1, "positional": 0.9, "latent_std": 0.01}
    for name, value in sick.items():
        assert len(verdict({**healthy, name: value})) == 1
    assert len(verdict({**healthy, **sick})) == 3


def test_constant_rows_have_no_rank_and_no_participation():
    for value in (-3.3, 0.1, 7e5):
        for dtype in (torch.float32, torch.float64):
            rows = torch.full((40, 6), value, dtype=dtype)
            assert effective_rank(rows) == 0.0
            assert participation_ratio(rows) == 0.0


# The latent contract


@given(
    tokens=st.integers(1, 64),
    norm=st.sampled_from(NORM_KINDS),
    grid=st.none() | st.tuples(st.integers(1, 8), st.integers(1, 8)),
    scale=st.floats(1e-3, 1e3),
)
def test_a_latent_contract_is_read_back_equal(tokens, norm, grid, scale) -> None:
    contract = LatentContract(tokens=tokens, dim=6, norm=norm, grid=grid, scale=scale)
    assert LatentContract.read(json.loads(json.dumps(contract.as_json()))) == contract


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tokens": 9}, "tokens"),
        ({"dim": 8}, "dim"),
        ({"grid": None}, "grid"),
        ({"norm": "layer"}, "norm"),
        ({"statistics": "ab"}, "statistics"),
        ({"time": "0 is data, 1 is noise"}, "time"),
        ({"tokens": 9, "grid": (3, 3)}, "tokens, grid"),
    ],
)
def test_other_latents_are_refused_with_both_contracts_shown(changes, named) -> None:
    mine = LatentContract(tokens=4, dim=6, norm="batch", grid=(2, 2), statistics="cd")
    theirs = attrs.evolve(mine, **changes)
    with pytest.raises(LatentError) as caught:
        mine.accept(theirs, "the teacher")
    said = str(caught.value)
    assert said.startswith(f"latents of the teacher differ in {named} from what is expected")
    assert f"theirs:   {theirs}\n" in said
    assert f"expected: {mine}\n" in said
    mine.accept(attrs.evolve(mine, scale=1.5), "a measurement of the same")


def test_a_contract_says_its_shape_norm_scale_and_time() -> None:
    contract = LatentContract(tokens=4, dim=6, norm="none", grid=(2, 2), scale=1.25)
    assert str(contract) == (f"4 tokens x 6 on a grid of 2 x 2, norm none, scale 1.25, t: {TIME}")
