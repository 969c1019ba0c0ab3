"""Student's t against SciPy, and paired differences against SciPy's own test."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from e2ediff.report.statistics import (
    incomplete_beta,
    paired,
    spread,
    t_below,
    t_quantile,
)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 7, 10, 29, 30, 100, 1000])
@pytest.mark.parametrize("p", [0.01, 0.5, 0.6, 0.9, 0.975, 0.99, 0.9975, 0.9999])
def test_quantiles_are_scipys(p, freedom):
    assert t_quantile(p, freedom) == pytest.approx(stats.t.ppf(p, freedom), rel=1e-9, abs=1e-9)


@given(st.floats(-50, 50), st.integers(1, 500))
def test_the_distribution_is_scipys(t, freedom):
    assert t_below(t, freedom) == pytest.approx(stats.t.cdf(t, freedom), abs=1e-12)


@given(st.floats(0, 1), st.floats(0.5, 200), st.floats(0.5, 200))
def test_the_incomplete_beta_function_is_scipys(x, a, b):
    assert incomplete_beta(x, a, b) == pytest.approx(special.betainc(a, b, x), abs=1e-11)


@pytest.mark.parametrize(("p", "freedom"), [(0.0, 3), (1.0, 3), (0.5, 0)])
def test_what_has_no_quantile_is_refused(p, freedom):
    with pytest.raises(ValueError, match="no quantile"):
        t_quantile(p, freedom)


numbers = st.lists(
    st.tuples(st.floats(-100, 100), st.floats(-100, 100)), min_size=2, max_size=12
).filter(lambda pairs: len({round(a - b, 3) for a, b in pairs}) > 1)


@given(numbers, st.sampled_from([0.9, 0.95, 0.99]))
def test_the_interval_is_that_of_scipys_paired_test(pairs, confidence):
    values, base = dict(enumerate(a for a, _ in pairs)), dict(enumerate(b for _, b in pairs))
    found = paired(values, base, confidence)
    test = stats.ttest_rel(list(values.values()), list(base.values()))
    low, high = test.confidence_interval(confidence)
    assert found.n == len(pairs)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-7, abs=1e-7)
    if abs(test.pvalue - (1 - confidence)) > 1e-6:
        assert found.excludes_zero == (test.pvalue < 1 - confidence)


def test_pairs_are_made_by_seed():
    found = paired({0: 1.0, 1: 5.0, 7: 9.0}, {1: 4.0, 0: 2.0, 3: 100.0})
    assert (found.n, found.mean) == (2, 0.0)
    assert found.low == pytest.approx(-found.high)
    assert not found.excludes_zero


def test_one_pair_has_a_difference_and_no_interval():
    found = paired({0: 3.0}, {0: 1.0, 1: 2.0})
    assert (found.n, found.mean, found.low, found.high) == (1, 2.0, None, None)
    assert not found.excludes_zero


def test_without_a_shared_seed_there_is_no_difference():
    assert paired({0: 3.0}, {1: 1.0}) is None


def test_spread_is_the_sample_standard_deviation():
    found = spread([1.0, 2.0, 4.0])
    assert (found.n, found.mean) == (3, pytest.approx(7 / 3))
    assert found.std == pytest.approx(stats.tstd([1.0, 2.0, 4.0]))
    assert spread([5.0]).std is None
    with pytest.raises(ValueError, match="no values"):
        spread([])
