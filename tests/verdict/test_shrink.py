"""Shrunken means of groups and their intervals, by hand-computed numbers, limits, and what must hold for any groups."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from slm_swap.verdict.stats.shrink import shrink
from slm_swap.verdict.stats.simultaneous import difference_limits, p_same

pytestmark = pytest.mark.filterwarnings("error")


def test_two_equal_groups_by_hand():
    found = shrink([[0.0, 0.2], [0.6, 0.8]], 0.025)
    # Within: squares 4 * 0.1^2, and the whole variance 0.1 once more, over 4 - 2 + 1. A mean of two has half of it.
    within = (0.04 + 0.1) / 3
    error = within / 2
    between = 2 * 0.3**2 - error  # DerSimonian and Laird with equal weights: the means' variance less their error
    kept = between / (between + error)
    assert found.mean == pytest.approx(0.4) and found.between_sd == pytest.approx(math.sqrt(between))
    first, second = found.groups
    assert (first.raw, second.raw) == pytest.approx((0.1, 0.7))
    assert (first.shrunk, second.shrunk) == pytest.approx((0.4 - 0.3 * kept, 0.4 + 0.3 * kept))


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


def test_groups_that_are_no_more_unlike_than_their_rows_are_all_the_common_mean():
    found = shrink([[0, 1, 0, 1], [1, 0, 1, 0], [0, 1]], 0.05)
    assert found.between_sd == 0 and found.mean == 0.5 and found.p_same > 0.9
    assert [one.shrunk for one in found.groups] == [0.5] * 3
    assert found.groups[0].high - found.groups[0].low < found.groups[2].high - found.groups[2].low  # still of their own rows


def test_one_group_is_itself():
    found = shrink([[0.2, 0.4, 0.6]], 0.05)
    assert (found.mean, found.between_sd, found.p_same) == (pytest.approx(0.4), 0, 1)
    assert found.groups[0].raw == found.groups[0].shrunk == pytest.approx(0.4)


def test_all_alike():
    found = shrink([[0.5, 0.5], [0.5]], 0.05)
    assert (found.mean, found.between_sd, found.p_same) == (0.5, 0, 1)
    assert [(one.raw, one.shrunk) for one in found.groups] == [(0.5, 0.5)] * 2
    assert all(one.low < 0.5 < one.high for one in found.groups)  # three equal rows do not make a certainty


def test_groups_without_noise_of_their_own_still_have_some():
    found = shrink([[0.0, 0.0], [1.0], [1.0]], 0.05)
    assert 0 < found.groups[0].shrunk < 0.5 < found.groups[1].shrunk < 1
    assert all(one.low < one.shrunk < one.high for one in found.groups)


# -- Intervals that hold for all groups at once ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3, 40])
@pytest.mark.parametrize("others", [0, 7])
def test_only_one_model_errs(n, others):
    """Clopper and Pearson's limits of 0 of n, by hand: 1 - a^(1/n), where a is alpha shared by the groups."""
    found = shrink([[0.0] * n] * (1 + others), 0.05).groups[0]
    limit = 1 - (0.05 / (1 + others)) ** (1 / n)
    reach = limit if limit < 0.5 else 1  # each end adds the other side's nothing
    assert found.high == pytest.approx(min(limit, reach)) and found.low == pytest.approx(-found.high)


def test_limits_against_a_second_implementation():
    up, down, n, alpha = 9, 4, 120, 0.01
    first, second = (stats.binomtest(count, n).proportion_ci(1 - 2 * alpha, method="exact") for count in (up, down))
    odds = math.sqrt(first.high * second.high / (1 - first.high) / (1 - second.high))
    over, under = first.high - up / n, down / n - second.low
    assert difference_limits(np.array([up]), np.array([down]), np.array([n]), alpha)[1][0] == pytest.approx(
        (up - down) / n + math.sqrt(over**2 + under**2 + 2 * odds * over * under)
    )


def test_each_end_is_missed_no_more_often_than_its_level():
    """Every outcome of 12 rows under a grid of truths: the exact probability."""
    n, alpha = 12, 0.02
    outcomes = np.array([(up, down) for up in range(n + 1) for down in range(n + 1 - up)])
    low, high = difference_limits(outcomes[:, 0], outcomes[:, 1], np.full(len(outcomes), n), alpha)
    most = 0.0
    for p, q in ((left / 20, right / 20) for left in range(1, 20) for right in range(1, 20 - left)):
        chance = stats.multinomial.pmf(np.column_stack([outcomes, n - outcomes.sum(1)]), n, [p, q, 1 - p - q])
        most = max(most, chance[high < p - q - 1e-12].sum(), chance[low > p - q + 1e-12].sum())
    assert alpha / 4 < most <= alpha


def test_the_tool_shown_worst_is_covered():
    """40 tools with Zipf traffic and strongly unlike error rates, where shrunken intervals of this level cover 0.60."""
    rng, traffic = np.random.default_rng(3), 1 / np.arange(1, 41)
    held = []
    for _ in range(100):
        azure, slm = rng.beta(0.15, 2.85, 40), rng.beta(0.24, 2.76, 40)
        sizes = rng.multinomial(1000, traffic / traffic.sum())
        true = [slm[tool] - azure[tool] for tool in range(40) if sizes[tool]]
        groups = [
            ((rng.random(n) < slm[tool]).astype(float) - (rng.random(n) < azure[tool])).tolist() for tool, n in enumerate(sizes) if n
        ]
        found = shrink(groups, 0.05).groups
        worst = max(range(len(found)), key=lambda tool: found[tool].shrunk)
        held.append(found[worst].low <= true[worst] <= found[worst].high)
    assert np.mean(held) >= 0.95


# -- Do the groups differ? -------------------------------------------------------------------------------------------------------


def test_groups_that_clearly_differ():
    same, other = [[0.0] * 30 + [1.0] * 5, [0.0] * 30 + [1.0] * 25]
    assert p_same([same, same, same]) == 1
    assert p_same([same, same, other]) < 0.01


@pytest.mark.parametrize("n", [1, 4, 1000])
def test_a_single_row_that_differs_shows_nothing(n):
    assert p_same([[0.0] * n, [1.0]]) == 1
    assert p_same([[0.0] * n, [1.0] + [0.0] * n]) == 1


def test_three_rows_that_differ_by_hand():
    """Two azure wins in one group, one loss in the other: two of the eight sign patterns are as unlike as these."""
    assert p_same([[1.0, 1.0], [-1.0]]) == pytest.approx(0.25, abs=0.05)


def test_hard_and_easy_groups_with_the_same_gap_do_not_differ():
    """A hard group of 20 rows beside an easy one of 400, no gap in either. Rows shuffled between them would say "differ" in a third of the runs."""
    rng, found = np.random.default_rng(4), []
    for _ in range(300):
        hard = rng.choice([-1.0, 0.0, 1.0], 20, p=[0.4, 0.2, 0.4])
        easy = rng.choice([-1.0, 0.0, 1.0], 400, p=[0.01, 0.98, 0.01])
        found.append(p_same([hard.tolist(), easy.tolist()]) <= 0.05)
    assert 0.01 <= np.mean(found) <= 0.09


@pytest.mark.parametrize("groups", [[], [[]], [[0.5], []]])
def test_no_groups(groups):
    with pytest.raises(ValueError, match="at least one value"):
        shrink(groups, 0.05)


@pytest.mark.parametrize("value", [1.01, -2, math.nan, math.inf])
def test_values_outside_of_the_scale(value):
    with pytest.raises(ValueError, match="from -1 to 1"):
        shrink([[0.5], [value, 0.0]], 0.05)


some = st.lists(st.lists(st.integers(-8, 8).map(lambda number: number / 8), min_size=1, max_size=8), min_size=1, max_size=8)


@given(some)
def test_what_holds_for_any_groups(groups):
    found = shrink(groups, 0.05)
    assert found.between_sd >= 0 and len(found.groups) == len(groups)
    for group, one in zip(groups, found.groups, strict=True):
        assert one.raw == pytest.approx(np.mean(group))
        between = sorted((one.raw, found.mean))
        assert between[0] - 1e-9 <= one.shrunk <= between[1] + 1e-9
        assert -1 <= one.low <= min(one.raw, one.shrunk) + 1e-9 and max(one.raw, one.shrunk) - 1e-9 <= one.high <= 1
    assert 0 < found.p_same <= 1


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


def test_shrunken_means_are_nearer_the_truth():
    """True means of standard deviation 0.1, 60 groups of 10 rows with 0.2: the error that the model says."""
    rng, shrunk, raw = np.random.default_rng(0), [], []
    for _ in range(40):
        true = rng.normal(0, 0.1, 60)
        found = shrink(rng.normal(true, 0.2, (10, 60)).clip(-1, 1).T.tolist(), 0.05)
        shrunk += [(one.shrunk - mean) ** 2 for one, mean in zip(found.groups, true, strict=True)]
        raw += [(one.raw - mean) ** 2 for one, mean in zip(found.groups, true, strict=True)]
    kept = 0.1**2 / (0.1**2 + 0.2**2 / 10)
    assert np.mean(raw) == pytest.approx(0.2**2 / 10, rel=0.08) and np.mean(shrunk) == pytest.approx(kept * 0.2**2 / 10, rel=0.12)
