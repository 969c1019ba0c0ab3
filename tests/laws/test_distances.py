"""Distances between sets of features have the values that mathematics gives them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from e2ediff.distances import (
    density_coverage,
    frechet,
    gaussian_mmd,
    inception_score,
    nearest,
    polynomial_mmd,
    precision_recall,
    self_test,
)
from e2ediff.errors import ResourceError
from e2ediff.evaluate.resampling import Resampling
from e2ediff.metric import Accumulator, FeatureSet, Moments, moments_of
from e2ediff.parts.metrics import (
    CMMD,
    FID,
    KID,
    DensityCoverage,
    InceptionScore,
    PrecisionRecall,
    SpatialFID,
)


def normal(n, width, seed=0, shift=0.0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=g, dtype=torch.float64) + shift


def gaussian(mean, covariance):
    return Moments(0, torch.as_tensor(mean).double(), torch.as_tensor(covariance).double())


# Moments


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_moments_do_not_depend_on_how_the_rows_are_cut(sizes) -> None:
    rows = normal(sum(sizes) + 1, 3, shift=1e3)
    whole = Accumulator()
    for part in torch.split(rows, [*sizes, 1]):
        whole.add(part)
    found = whole.moments()
    assert found.count == len(rows)
    torch.testing.assert_close(found.mean, rows.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.covariance, rows.T.cov(), rtol=1e-8, atol=1e-10)


def test_accumulators_of_two_processes_merge_into_that_of_one() -> None:
    rows, one, other = normal(40, 4), Accumulator(), Accumulator()
    one.add(rows[:13])
    other.add(rows[13:])
    one.merge(other)
    one.merge(Accumulator())
    torch.testing.assert_close(one.moments().covariance, rows.T.cov())


# Fréchet


def test_frechet_of_two_gaussians_is_the_closed_form() -> None:
    """For commuting covariances |m1 - m2|^2 + sum (sqrt a - sqrt b)^2."""
    basis = torch.linalg.qr(normal(6, 6)).Q
    a, b = torch.tensor([4.0, 1, 9, 0, 2, 3]), torch.tensor([1.0, 1, 4, 5, 0, 3])
    first = gaussian([1.0] * 6, (basis * a.double()) @ basis.T)
    second = gaussian([0.0] * 6, (basis * b.double()) @ basis.T)
    known = 6 + float((a.double().sqrt() - b.double().sqrt()).square().sum())
    assert frechet(first, second) == pytest.approx(known, rel=1e-7)


def test_directions_that_a_covariance_has_by_rounding_alone_add_nothing_to_frechet() -> None:
    """Two Gaussians in orthogonal spaces, whose roots have no product."""
    basis = torch.linalg.qr(normal(150, 150)).Q
    low, rest = basis[:, :2], basis[:, 2:]
    first, second = (gaussian([0.0] * 150, 5 * (b @ b.T)) for b in (low, rest))
    assert frechet(first, second) == pytest.approx(5 * 150, rel=1e-11)


def test_frechet_of_covariances_that_do_not_commute_is_that_of_the_product_root() -> None:
    a, b = (normal(9, 5, seed).T.cov() for seed in (1, 2))
    trace = torch.linalg.eigvals(a @ b).sqrt().real.sum()
    known = float(a.trace() + b.trace() - 2 * trace)
    assert frechet(gaussian([0.0] * 5, a), gaussian([0.0] * 5, b)) == pytest.approx(known, 1e-9)


def test_frechet_of_identical_sets_is_zero_also_where_the_covariance_is_singular() -> None:
    for n in (8, 200):
        moments = moments_of(normal(n, 32))
        assert frechet(moments, moments) < 1e-6


def test_frechet_of_a_shifted_set_is_the_squared_shift() -> None:
    rows = normal(300, 8)
    assert frechet(moments_of(rows), moments_of(rows + 0.5)) == pytest.approx(2.0, rel=1e-9)


def test_frechet_of_halves_of_one_set_is_above_zero_and_shrinks_as_one_over_n() -> None:
    found = []
    for n in (500, 4000):
        rows = normal(2 * n, 16, seed=3)
        found.append(frechet(moments_of(rows[:n]), moments_of(rows[n:])))
    assert 0 < found[1] < found[0]
    assert found[0] / found[1] == pytest.approx(8, rel=0.3)  # the bias, whose n is 8 times


# Errors


@pytest.mark.parametrize(
    ("metric", "name", "near"),
    [
        (FID(), "FD", 0.3),
        (SpatialFID(), "sFD", 0.3),
        (KID(subsets=1), "KD", 0.3),
        (CMMD(), "CMMD", 0.3),
        (DensityCoverage(), "density", 0.3),
        (DensityCoverage(), "coverage", 0.45),  # of fewer different images: too small by a third
        (PrecisionRecall(), "precision", 0.3),
    ],
)
def test_bootstrap_errors_and_intervals_are_the_spread_of_fresh_sets(metric, name, near) -> None:
    def features(rows):
        moments = moments_of(rows)
        return FeatureSet(
            len(rows), {"pool": moments, "spatial": moments}, {"pool": rows, "spatial": rows}
        )

    real = features(normal(400, 4, seed=1))
    sets = [features(normal(100, 4, seed, shift=0.5)) for seed in range(10, 60)]
    fresh = torch.tensor([metric.measure(made, real)[name].value for made in sets])
    resampling = Resampling(sets=40, say=lambda _: None)
    found = [resampling.measure(metric, made, real)[name] for made in sets[:4]]
    spread = float(fresh.std())
    assert sum(f.error for f in found) / 4 == pytest.approx(spread, rel=near)
    widths = [f.interval[1] - f.interval[0] for f in found]
    assert sum(widths) / 4 == pytest.approx(2 * 1.96 * spread, rel=near + 0.1)
    for f, value in zip(found, fresh.tolist(), strict=False):
        assert f.value == pytest.approx(value)
        assert f.interval[0] < f.value < f.interval[1]


def test_pairs_are_drawn_together() -> None:
    """A set and its copy have distance 0, however both are drawn."""
    rows = normal(60, 4)
    both = FeatureSet(60, {"pool": moments_of(rows)}, {"pool": rows})
    resampling = Resampling(sets=5, say=lambda _: None)
    apart = resampling.measure(FID(), both, both)["FD"]
    together = resampling.measure(FID(), both, both, pairs=True)["FD"]
    assert together.error < 1e-9 < apart.error


def test_without_sets_and_without_a_reference_a_metric_is_measured_as_it_is() -> None:
    logits = FeatureSet(50, rows={"logits": normal(50, 4)})
    for sets, metric in ((9, InceptionScore()), (0, InceptionScore())):
        known = metric.measure(logits, logits)
        assert Resampling(sets=sets, say=lambda _: None).measure(metric, logits, logits) == known


@pytest.mark.parametrize(
    ("n", "m", "metric"),
    [
        (60, 60, KID()),  # every subset is the whole set
        (60, 300, KID(subsets=10)),  # every subset has all made rows
        (90, 90, KID(size=60, subsets=10)),  # no two subsets are disjoint
        (90, 90, KID(size=60, subsets=1)),
    ],
)
def test_the_kernel_distance_of_few_images_has_an_error_that_is_its_spread(n, m, metric) -> None:
    found = []
    for seed in range(60):
        sides = (normal(n, 4, 2 * seed, shift=0.5), normal(m, 4, 2 * seed + 1))
        sets = [FeatureSet(len(rows), rows={"pool": rows}) for rows in sides]
        found.append(metric.measure(*sets)["KD"])
    spread = float(torch.tensor([f.value for f in found]).std())
    assert sum(f.error for f in found) / len(found) == pytest.approx(spread, rel=0.3)


# Kernels


def test_kernel_distance_is_unbiased_over_repetitions() -> None:
    """Sets of 20 images of one law: the mean is 0 within its standard error."""
    found = torch.tensor(
        [polynomial_mmd(normal(20, 8, 2 * i), normal(20, 8, 2 * i + 1)) for i in range(400)]
    )
    error = float(found.std()) / math.sqrt(len(found))
    assert abs(float(found.mean())) < 3 * error
    assert (found < 0).any()


def test_kernel_distance_of_few_and_of_many_images_agrees_within_the_error() -> None:
    many = polynomial_mmd(normal(3000, 8, 0), normal(3000, 8, 1, shift=0.3))
    few = [polynomial_mmd(normal(30, 8, 2 * i), normal(30, 8, 2 * i + 1, 0.3)) for i in range(300)]
    found = torch.tensor(few)
    error = float(found.std()) / math.sqrt(len(found))
    assert abs(float(found.mean()) - many) < 4 * error


def test_kernel_distance_by_subsets_estimates_the_whole() -> None:
    x, y = normal(2000, 8), normal(2000, 8, 1, shift=0.3)
    sets = [FeatureSet(2000, rows={"pool": rows}) for rows in (x, y)]
    estimate = KID(subsets=50, size=200).measure(*sets)["KD"]
    assert estimate.error is not None
    assert abs(estimate.value - polynomial_mmd(x, y)) < 4 * estimate.error


def test_gaussian_kernel_distance_has_its_closed_form() -> None:
    """Of one unit vector against its opposite: 2 (1 - exp(-4 / 2 sigma^2))."""
    x = torch.tensor([[3.0, 0.0]])
    known = 1000 * 2 * (1 - math.exp(-4 / 200))
    assert gaussian_mmd(x, -x) == pytest.approx(known, rel=1e-9)
    assert gaussian_mmd(x, 7 * x) == pytest.approx(0, abs=1e-9)  # length does not count


# Balls


def test_identical_sets_have_full_precision_recall_and_coverage() -> None:
    x = normal(100, 5)
    assert precision_recall(x, x) == (1.0, 1.0)
    density, coverage = density_coverage(x, x, k=5)
    # Each row lies in its own ball and strictly inside those whose k-th neighbour is further.
    assert coverage == 1.0
    assert density == pytest.approx(1.0, abs=1e-12)


def test_distant_sets_have_none() -> None:
    x, y = normal(50, 5), normal(60, 5, 1, shift=100)
    assert precision_recall(x, y) == (0.0, 0.0)
    assert density_coverage(x, y) == (0.0, 0.0)


def test_a_set_that_collapsed_onto_real_rows_is_precise_and_covers_little() -> None:
    real = normal(200, 3)
    made = real[:1].repeat(50, 1)
    precision, recall = precision_recall(made, real, k=3)
    assert precision == 1.0
    assert recall == pytest.approx(1 / 200)
    assert density_coverage(made, real)[1] < 0.1


def test_density_and_coverage_on_a_line_are_those_counted_by_hand() -> None:
    """Real 0, 1, 2, 10; k = 1 gives radii 1, 1, 1, 8; made 0.5 and 1.5 each lie in two balls."""
    real, made = torch.tensor([[0.0], [1.0], [2.0], [10.0]]), torch.tensor([[0.5], [1.5]])
    density, coverage = density_coverage(made, real, k=1)
    assert density == pytest.approx(2.0)
    assert coverage == pytest.approx(0.75)
    assert precision_recall(torch.tensor([[-1.5], [1.5]]), real, k=1)[0] == 0.5


def test_balls_far_from_the_origin_are_as_exact_as_at_it() -> None:
    x, y = normal(80, 5), normal(80, 5, 1)
    assert precision_recall(x + 1e4, y + 1e4) == precision_recall(x, y)


def test_nearest_finds_copies() -> None:
    train = normal(30, 4)
    distance, who = nearest(train[[7, 3]], train)
    assert who.tolist() == [7, 3]
    assert float(distance.max()) < 1e-6


# Inception Score


def test_inception_score_is_one_for_equal_answers_and_the_number_of_classes_for_sure_ones() -> (
    None
):
    assert inception_score(torch.ones(40, 7), 4)[0] == pytest.approx(1.0)
    sure = 1e3 * torch.eye(5).repeat(8, 1)
    assert inception_score(sure, 4) == pytest.approx((5.0, 0.0), abs=1e-9)


def test_inception_score_of_sorted_classes_needs_the_shuffle() -> None:
    sure = (1e3 * torch.eye(5)).repeat_interleave(40, dim=0)
    made = FeatureSet(200, rows={"logits": sure})
    in_order = InceptionScore(splits=5, shuffle=False).measure(made, made)["IS"]
    assert in_order.value == pytest.approx(1.0)
    assert InceptionScore(splits=5).measure(made, made)["IS"].value > 4


# Warnings and the self-test


def test_too_few_images_for_the_features_are_said_and_enough_are_not() -> None:
    def said(n):
        sets = [FeatureSet(n, {"pool": moments_of(normal(n, 10, s))}) for s in (0, 1)]
        return " ".join(FID().measure(*sets)["FD"].warnings)

    assert "10 images do not determine the covariance of 10 features" in said(10)
    assert "bias" in said(30)
    assert said(60) == ""


def test_unequal_sets_are_said_of_precision_and_recall() -> None:
    sets = [FeatureSet(n, rows={"pool": normal(n, 3)}) for n in (20, 30)]
    assert "20 images against 30" in PrecisionRecall().measure(*sets)["recall"].warnings[0]


def test_the_self_test_passes_here_and_hears_a_broken_root(monkeypatch) -> None:
    self_test()
    right = torch.linalg.svdvals
    monkeypatch.setattr(torch.linalg, "svdvals", lambda m: 0.9 * right(m))
    with pytest.raises(ResourceError, match="linear algebra is broken"):
        self_test()
