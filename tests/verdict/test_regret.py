"""Exact bounds and the fixed-sequence rule: by known answers, against scipy, by brute force, and valid by exact enumeration."""

import math
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from slm_swap.verdict.stats.regret import (
    LEAST_LOCAL,
    Rung,
    further_units,
    is_shown,
    loosest,
    most_losses,
    rungs,
    told,
    units_needed,
    upper_bound,
    wanted,
)  # fmt: skip

ROWS = st.lists(st.tuples(st.sampled_from([-2.0, -1.0, 0.0]) | st.floats(-50, 0), st.booleans(), st.integers(0, 12)), max_size=40)
RATES, LEVELS = st.floats(0.005, 0.6), st.floats(0.005, 0.45)


def test_known_numbers_of_units():
    assert [units_needed(losses, 0.02, 0.05) for losses in (0, 1, 2)] == [149, 236, 313]
    assert units_needed(0, 0.02, 0.025) == 183 and units_needed(0, 0.05, 0.05) == 59 and units_needed(0, 0, 0.05) is None
    assert (most_losses(148, 0.02, 0.05), most_losses(149, 0.02, 0.05), most_losses(312, 0.02, 0.05), most_losses(313, 0.02, 0.05)) == (-1, 0, 1, 2)


@given(st.integers(1, 400), st.data(), LEVELS)
def test_the_bound_is_clopper_and_pearsons(units, data, alpha):
    losses = data.draw(st.integers(0, units))
    wanted_bound = binomtest(losses, units, alternative="less").proportion_ci(1 - alpha).high
    assert upper_bound(losses, units, alpha) == pytest.approx(wanted_bound, abs=1e-9)


def test_a_bound_without_units_says_nothing():
    assert upper_bound(0, 0, 0.05) == 1.0 and not is_shown(0, 0, 0.5, 0.05)


@given(st.integers(0, 12), RATES, LEVELS)
def test_the_units_needed_are_the_fewest(losses, delta, alpha):
    units = units_needed(losses, delta, alpha)
    assert binom.cdf(losses, units, delta) <= alpha + 1e-12 and binom.cdf(losses, units - 1, delta) > alpha - 1e-12
    assert most_losses(units, delta, alpha) == losses and most_losses(units - 1, delta, alpha) == losses - 1


@given(st.integers(0, 20), st.integers(20, 300), RATES, LEVELS, st.floats(0, 0.5))
@settings(deadline=None, max_examples=60)
def test_further_units_settle_it_at_that_rate(losses, units, delta, alpha, rate):
    further = further_units(losses, units, delta, alpha, rate * delta)
    total = losses + math.ceil(rate * delta * further - 1e-9)
    assert is_shown(total, units + further, delta, alpha)
    assert further_units(losses, units, delta, alpha) <= further, "losses never help"
    assert further_units(losses, units, delta, alpha, delta) is None


# -- Thresholds ------------------------------------------------------------------------------------------------------------------


@given(ROWS)
def test_rungs_are_what_counting_gives(rows):
    found = rungs(*zip(*rows, strict=True)) if rows else rungs([], [], [])
    assert [rung.threshold for rung in found] == sorted({value for value, _, _ in rows}, reverse=True)
    for rung in found:
        local = [row for row in rows if row[0] >= rung.threshold]
        assert rung[1:] == (len(local), len({unit for _, _, unit in local}), len({unit for _, lost, unit in local if lost}))
    for above, below in pairwise(found):
        assert above.rows < below.rows and above.units <= below.units and above.losses <= below.losses, "the regret only grows"


@given(ROWS, RATES, LEVELS, st.integers(0, 30))
def test_the_rule_stops_at_the_first_threshold_that_is_not_shown(rows, delta, alpha, more):
    ladder = rungs(*zip(*rows, strict=True)) if rows else []
    units = len({unit for _, _, unit in rows}) + more
    passed = []
    for rung in ladder:
        if upper_bound(rung.losses, units, alpha) > delta + 1e-12:
            break
        passed.append(rung)
    assert loosest(ladder, units, delta, alpha, least=1) == (passed[-1] if passed else None)


@given(ROWS, RATES, LEVELS)
def test_a_looser_target_never_answers_less(rows, delta, alpha):
    ladder, units = rungs(*zip(*rows, strict=True)) if rows else [], len({unit for _, _, unit in rows})
    strict, loose = (loosest(ladder, units, target, alpha, least=1) if units else None for target in (delta, min(0.9, 1.5 * delta)))
    assert strict is None or loose.rows >= strict.rows


def test_fewer_than_30_local_units_are_no_rule():
    ladder = rungs([-at for at in range(LEAST_LOCAL)], [False] * LEAST_LOCAL, range(LEAST_LOCAL))
    assert loosest(ladder, 149, 0.02, 0.05).units == LEAST_LOCAL and loosest(ladder[:-1], 149, 0.02, 0.05) is None
    assert loosest(ladder, 148, 0.02, 0.05) is None and wanted(ladder, None) == ladder[-1] and wanted(ladder, ladder[-1]) is None


def test_what_further_rows_would_add_ends_before_the_next_loss():
    lost = [False] * 40 + [True] + [False] * 9 + [True] + [False] * 9
    ladder = rungs([-at for at in range(60)], lost, range(60))
    assert wanted(ladder, None).rows == 40
    assert wanted(ladder, ladder[39]).rows == 50 and wanted(ladder, ladder[49]).rows == 60


def test_what_is_told_of_a_threshold():
    found = told(Rung(-0.5, 90, 80, 2), 313, 0.05)
    assert found["bound"] == pytest.approx(0.02, abs=1e-4) and found["bound"] <= 0.02 and found["seen"] == 2 / 313
    assert found["local_only"]["seen"] == 2 / 80 and found["local_only"]["bound"] > found["bound"]


# -- Validity --------------------------------------------------------------------------------------------------------------------


def compositions(total, cells):
    """Every way to put so many rows into cells."""
    for bars in combinations(range(total + cells - 1), cells - 1):
        ends = (-1, *bars, total + cells - 1)
        yield tuple(right - left - 1 for left, right in pairwise(ends))


@given(
    st.lists(st.integers(0, 8), min_size=5, max_size=5).filter(lambda weights: sum(weights) > 0),
    st.sampled_from([0.2, 0.35, 0.5]), st.sampled_from([0.1, 0.25, 0.4]), st.integers(4, 7),
)  # fmt: skip
@settings(deadline=None, max_examples=25)
def test_the_target_is_missed_with_probability_alpha_at_most(weights, delta, alpha, units):
    """Over every sample: two levels of confidence, right or lost at each, and replies that are never local."""
    chances = [weight / sum(weights) for weight in weights]
    missed = 0.0
    for counts in compositions(units, 5):
        chance = math.factorial(units) * math.prod(p**count / math.factorial(count) for p, count in zip(chances, counts, strict=True))
        if not chance:
            continue
        high, high_lost, low, low_lost, _ = counts
        values = [1.0] * (high + high_lost) + [0.0] * (low + low_lost)
        lost = [False] * high + [True] * high_lost + [False] * low + [True] * low_lost
        chosen = loosest(rungs(values, lost, range(len(values))), units, delta, alpha, least=1)
        regret = 0.0 if chosen is None else chances[1] + (chances[3] if chosen.threshold == 0.0 else 0.0)
        missed += chance * (regret > delta + 1e-12)
    assert missed <= alpha + 1e-9
