"""Paired differences against SciPy's own test and the printed table of Student's t."""

from __future__ import annotations

import pytest
import scipy
from hypothesis import given
from hypothesis import strategies as st

from e2ediff.report.statistics import paired, spread

numbers = st.lists(
    st.tuples(st.floats(-100, 100), st.floats(-100, 100)), min_size=2, max_size=12
).filter(lambda pairs: len({round(a - b, 3) for a, b in pairs}) > 1)


@given(numbers, st.sampled_from([0.9, 0.95, 0.99]))
def test_the_interval_is_that_of_scipys_paired_test(pairs, confidence):
    values, base = dict(enumerate(a for a, _ in pairs)), dict(enumerate(b for _, b in pairs))
    found = paired(values, base, confidence)
    test = scipy.stats.ttest_rel(list(values.values()), list(base.values()))
    low, high = test.confidence_interval(confidence)
    assert found.n == len(pairs)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-7, abs=1e-7)
    if abs(test.pvalue - (1 - confidence)) > 1e-6:
        assert found.excludes_zero == (test.pvalue < 1 - confidence)


@pytest.mark.parametrize(("n", "t"), [(2, 12.706), (3, 4.303), (5, 2.776), (31, 2.042)])
def test_the_interval_is_that_of_the_printed_table(n, t):
    """Critical values of the two-sided test at 5 %, n - 1 degrees of freedom."""
    found = paired({seed: float(seed) for seed in range(n)}, dict.fromkeys(range(n), 0.0))
    half = t * spread([float(seed) for seed in range(n)]).std / n**0.5
    assert found.high - found.mean == pytest.approx(half, rel=2e-4)
    assert found.mean - found.low == pytest.approx(half, rel=2e-4)


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
    assert found.std == pytest.approx(scipy.stats.tstd([1.0, 2.0, 4.0]))
    assert spread([5.0]).std is None
    with pytest.raises(ValueError, match="no values"):
        spread([])
