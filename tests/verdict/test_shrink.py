"""Shrunken means of groups, by hand-computed numbers, limits, and what must hold for any groups."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from slm_swap.verdict.stats.shrink import shrink

pytestmark = pytest.mark.filterwarnings("error")


def test_two_equal_groups_by_hand():
    found = shrink([[0.0, 0.2], [0.6, 0.8]], 0.025)
    # Within: squares 4 * 0.1^2, and the whole variance 0.1 once more, over 4 - 2 + 1. A mean of two has half of it.
    within = (0.04 + 0.1) / 3
    error = within / 2
    between = 2 * 0.3**2 - error  # DerSimonian and Laird with equal weights: the means' variance less their error
    kept = between / (between + error)
    assert found.mean == pytest.approx(0.4) and found.between_sd == pytest.approx(math.sqrt(between))
    reach = 1.959964 * math.sqrt(kept * error + (1 - kept) ** 2 * (between + error) / 2)
    first, second = found.groups
    assert (first.raw, second.raw) == pytest.approx((0.1, 0.7))
    assert (first.shrunk, second.shrunk) == pytest.approx((0.4 - 0.3 * kept, 0.4 + 0.3 * kept))
    assert (first.low, first.high) == pytest.approx((first.shrunk - reach, first.shrunk + reach))


def test_unequal_groups_by_the_published_formula():
    groups = [[0.1, 0.3, 0.2, 0.4], [0.9], [0.0, 0.1], [0.5, 0.7, 0.9]]
    found = shrink(groups, 0.025)
    every = [value for group in groups for value in group]
    squares = sum((value - np.mean(group)) ** 2 for group in groups for value in group)
    v = [(squares + np.var(every)) / (10 - 4 + 1) / len(group) for group in groups]
    w, y = [1 / one for one in v], [np.mean(group) for group in groups]
    common = sum(a * b for a, b in zip(w, y, strict=True)) / sum(w)
    q = sum(a * (b - common) ** 2 for a, b in zip(w, y, strict=True))
    tau2 = (q - 3) / (sum(w) - sum(a * a for a in w) / sum(w))
    assert tau2 > 0 and found.between_sd**2 == pytest.approx(tau2)
    weights = [1 / (tau2 + one) for one in v]
    mean = sum(a * b for a, b in zip(weights, y, strict=True)) / sum(weights)
    assert found.mean == pytest.approx(mean)
    for one, own, error in zip(found.groups, y, v, strict=True):
        assert one.shrunk == pytest.approx((tau2 * own + error * mean) / (tau2 + error))


def test_groups_that_differ_by_no_more_than_chance_are_all_the_common_mean():
    found = shrink([[0, 1, 0, 1], [1, 0, 1, 0], [0, 1]], 0.05)
    assert found.between_sd == 0 and found.mean == 0.5
    assert {(one.shrunk, one.low, one.high) for one in found.groups} == {(0.5, found.groups[0].low, found.groups[0].high)}
    reach = stats.norm.isf(0.05) * math.sqrt((10 * 0.25 + 0.25) / (10 - 3 + 1) / 10)  # the common mean's own error
    assert found.groups[0].high == pytest.approx(0.5 + reach)


def test_one_group_is_itself():
    found = shrink([[0.2, 0.4, 0.6]], 0.05)
    assert (found.mean, found.between_sd) == (pytest.approx(0.4), 0)
    assert found.groups[0].raw == found.groups[0].shrunk == pytest.approx(0.4)
    assert found.groups[0].high - 0.4 == pytest.approx(stats.norm.isf(0.05) * math.sqrt((0.08 + 0.08 / 3) / 3 / 3))


def test_all_alike():
    found = shrink([[0.5, 0.5], [0.5]], 0.05)
    assert (found.mean, found.between_sd) == (0.5, 0)
    assert [(one.raw, one.shrunk, one.low, one.high) for one in found.groups] == [(0.5, 0.5, 0.5, 0.5)] * 2


def test_groups_without_noise_of_their_own_still_have_some():
    found = shrink([[0.0, 0.0], [1.0], [1.0]], 0.05, low=0)
    assert 0 < found.groups[0].shrunk < 0.5 < found.groups[1].shrunk < 1
    assert all(one.low < one.shrunk < one.high for one in found.groups)


def test_cut_at_the_scale_s_ends():
    groups = [[1.0, 0.0, -1.0, 1.0], [1.0, 1.0], [-1.0, -1.0]]
    whole, cut = shrink(groups, 0.01, -9, 9), shrink(groups, 0.01)
    assert whole.groups[1].high > 1 and cut.groups[1].high == 1 and cut.groups[2].low == -1
    assert shrink(groups, 0.01, low=0).groups[2].low == 0
    assert cut.groups[1].low == whole.groups[1].low


@pytest.mark.parametrize("groups", [[], [[]], [[0.5], []]])
def test_no_groups(groups):
    with pytest.raises(ValueError, match="at least one value"):
        shrink(groups, 0.05)


some = st.lists(st.lists(st.integers(-8, 8).map(lambda number: number / 8), min_size=1, max_size=8), min_size=1, max_size=8)


@given(some)
def test_what_holds_for_any_groups(groups):
    found = shrink(groups, 0.05)
    assert found.between_sd >= 0 and len(found.groups) == len(groups)
    for group, one in zip(groups, found.groups, strict=True):
        assert one.raw == pytest.approx(np.mean(group))
        between = sorted((one.raw, found.mean))
        assert between[0] - 1e-9 <= one.shrunk <= between[1] + 1e-9
        assert -1 <= one.low <= one.shrunk + 1e-9 and one.shrunk - 1e-9 <= one.high <= 1


@given(some)
def test_more_rows_keep_more_of_their_own(groups):
    found = shrink(groups, 0.05)
    kept = [(len(group), (one.shrunk - found.mean) / (one.raw - found.mean)) for group, one in zip(groups, found.groups, strict=True)
            if abs(one.raw - found.mean) > 1e-6]  # fmt: skip
    kept.sort()
    assert all(left <= right + 1e-6 for (_, left), (_, right) in pairwise(kept))


@given(some)
def test_the_opposite_sign_and_order(groups):
    found, turned = shrink(groups, 0.05), shrink([[-value for value in group] for group in reversed(groups)], 0.05)
    assert turned.mean == pytest.approx(-found.mean, abs=1e-9) and turned.between_sd == pytest.approx(found.between_sd, abs=1e-6)
    for one, other in zip(found.groups, reversed(turned.groups), strict=True):
        assert (-other.shrunk, -other.high, -other.low) == pytest.approx((one.shrunk, one.low, one.high), abs=1e-6)


def test_coverage_and_error_with_many_groups():
    """True means of standard deviation 0.2, 60 groups of 10 rows with 0.4: where tau is well known, the intervals are right."""
    rng, hits, shrunk, raw = np.random.default_rng(0), [], [], []
    for _ in range(100):
        true = rng.normal(0, 0.2, 60)
        found = shrink(rng.normal(true, 0.4, (10, 60)).T.tolist(), 0.05, -9, 9)
        hits += [one.low <= mean <= one.high for one, mean in zip(found.groups, true, strict=True)]
        shrunk += [(one.shrunk - mean) ** 2 for one, mean in zip(found.groups, true, strict=True)]
        raw += [(one.raw - mean) ** 2 for one, mean in zip(found.groups, true, strict=True)]
    assert 0.87 < np.mean(hits) < 0.92
    kept = 0.2**2 / (0.2**2 + 0.4**2 / 10)
    assert np.mean(raw) == pytest.approx(0.4**2 / 10, rel=0.06) and np.mean(shrunk) == pytest.approx(kept * 0.4**2 / 10, rel=0.1)
