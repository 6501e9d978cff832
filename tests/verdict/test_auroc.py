"""The area under the ROC curve, its interval, and the risk-coverage curve: by known answers, against scipy, and by simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu, norm, rankdata

from slm_swap.verdict.confidence import discrimination, is_confidence, signals_of
from slm_swap.verdict.stats.auroc import POINTS, auroc, interval, mean_ranks, risk_coverage

ROWS = st.lists(st.tuples(st.sampled_from([-3.5, -1.0, 0.0, 0.25, 7.0]) | st.floats(-50, 0), st.booleans()), min_size=1, max_size=40)


@given(st.lists(st.sampled_from([-3.5, -0.0, 0.0, 7.0]) | st.floats(allow_nan=False), max_size=40))
def test_ranks_are_scipys(values):
    assert mean_ranks(np.array(values)).tolist() == rankdata(values).tolist()


@given(ROWS)
def test_the_area_is_mann_and_whitneys_with_ties(rows):
    values, right = zip(*rows, strict=True)
    found = auroc(values, right)
    if len(set(right)) < 2:
        assert found is None
        return
    good, bad = ([value for value, told in rows if told is kind] for kind in (True, False))
    area, (low, high) = found
    assert area == pytest.approx(mannwhitneyu(good, bad).statistic / len(good) / len(bad))
    assert 0 <= low <= area <= high <= 1 and low < high
    assert auroc([-value for value in values], right)[0] == pytest.approx(1 - area)


@given(ROWS, st.integers(1, 4))
def test_rows_that_are_their_own_clusters_count_as_rows(rows, size):
    values, right = zip(*rows, strict=True)
    alone = auroc(values, right)
    apart = auroc(values, right, list(range(len(rows))))
    assert apart == alone or apart[1] == pytest.approx(alone[1])
    together = auroc(values, right, [at // size for at in range(len(rows))])
    if alone:
        assert together[0] == alone[0] and together[1][0] <= alone[1][0] + 1e-9 and together[1][1] >= alone[1][1] - 1e-9, "clusters never tell more"


def test_known_areas():
    assert auroc([1, 2, 3, 4], [False, False, True, True])[0] == 1.0
    assert auroc([1, 2, 3, 4], [True, False, True, False])[0] == 0.25
    assert auroc([5, 5, 5, 5], [True, False, True, False])[0] == 0.5
    assert auroc([1.0, 2.0], [True, True]) is None and auroc([1.0], [False]) is None


def test_newcombes_interval_holds_his_equation():
    """Its ends are as far from the area as their own standard errors allow."""
    low, high = interval(0.8, 40, 20, 0.05)
    for end in (low, high):
        variance = end * (1 - end) * (1 + 29 * ((1 - end) / (2 - end) + end / (1 + end))) / 800
        assert abs(end - 0.8) == pytest.approx(norm.ppf(0.975) * math.sqrt(variance), abs=1e-9)


def test_where_nothing_overlaps_the_interval_is_no_point():
    area, (low, high) = auroc([*range(50)], [at >= 10 for at in range(50)])
    assert area == 1.0 and high == 1.0 and 0.75 < low < 0.98
    wider = auroc([*range(50)], [at >= 10 for at in range(50)], [at // 5 for at in range(50)])
    assert wider[1][0] < low, "clusters are fewer than rows"
    assert auroc([1, 2, 3, 2.5, 3, 4], [False] * 3 + [True] * 3, "aaabcd")[1] == (0.0, 1.0), "of one cluster's wrong rows little is known"


@pytest.mark.parametrize(("true", "right", "wrong", "levels"), [(0.5, 60, 8, None), (0.75, 90, 10, None), (0.9, 280, 20, 4), (0.75, 100, 100, 2), (0.95, 60, 6, None)])
def test_the_interval_covers_the_true_area(true, right, wrong, levels):
    """In 95% of simulated evaluations or more, also where few rows are wrong and where values are tied."""
    rng, shift, runs = np.random.default_rng(7), math.sqrt(2) * norm.ppf(true), 400
    cuts = None if levels is None else norm.ppf(np.arange(1, levels) / levels)
    if cuts is not None:  # the area of the values as they are cut
        shares = [np.diff(norm.cdf([-np.inf, *cuts, np.inf], loc=loc)) for loc in (shift, 0)]
        true = sum(share * (shares[1][:at].sum() + shares[1][at] / 2) for at, share in enumerate(shares[0]))
    covered = 0
    for _ in range(runs):
        values = np.r_[rng.normal(shift, 1, right), rng.normal(0, 1, wrong)]
        low, high = auroc(values if cuts is None else np.digitize(values, cuts), [True] * right + [False] * wrong)[1]
        covered += low <= true <= high
    assert covered / runs > 0.95 - 2.6 * math.sqrt(0.95 * 0.05 / runs)


def test_the_interval_covers_the_true_area_over_clusters():
    """30 clusters of 8 rows with much in common; as rows they would be covered far more seldom."""
    rng, runs = np.random.default_rng(11), 400
    labels, covered = np.repeat(np.arange(30), 8), np.zeros(2)
    for _ in range(runs):
        shared, right = rng.normal(0, 1, 30)[labels], rng.random(240) < 0.3 + 0.6 * (rng.random(30) < 0.6)[labels]
        values = shared + 0.5 * rng.normal(0, 1, 240)  # they tell nothing: 0.5
        for at, own in enumerate((labels.tolist(), None)):
            low, high = auroc(values, right, own)[1]
            covered[at] += low <= 0.5 <= high
    assert covered[0] / runs > 0.91 and covered[1] / runs < 0.8


def test_a_risk_coverage_curve_by_hand():
    assert risk_coverage([4, 3, 2, 2, 1], [True, False, True, False, False]) == [(0.2, 0.0), (0.4, 0.5), (0.8, 0.5), (1.0, 0.6)]
    assert risk_coverage([1, 1], [True, False]) == [(1.0, 0.5)]


@given(st.lists(st.tuples(st.floats(-9, 0), st.booleans()), min_size=1, max_size=300))
def test_a_curve_ends_where_all_is_answered(rows):
    values, right = zip(*rows, strict=True)
    curve = risk_coverage(values, right)
    assert curve[-1] == (1.0, pytest.approx(right.count(False) / len(rows), abs=1e-6)) and len(curve) <= POINTS
    assert [coverage for coverage, _ in curve] == sorted({coverage for coverage, _ in curve})
    for coverage, risk in curve:
        cut = sorted(values, reverse=True)[round(coverage * len(rows)) - 1]
        answered = [told for value, told in rows if value >= cut]
        assert risk == pytest.approx(answered.count(False) / len(answered), abs=1e-6)


def test_rows_without_a_signal_are_left_out_and_counted():
    given_values = {"min_logprob": [-1.0, None, -0.1, math.nan], "tool_logprob": [None] * 4, "parses": [1.0, 0.0, 1.0, 1.0]}
    found = discrimination(given_values, [False, True, True, True], curves=True)
    assert set(found) == {"min_logprob", "parses"}
    assert (found["min_logprob"]["auroc"], found["min_logprob"]["rows"], found["min_logprob"]["missing"]) == (1.0, 2, 2)
    assert found["min_logprob"]["curve"] == [[0.5, 0.0], [1.0, 0.5]] and "curve" not in discrimination(given_values, [True] * 4)["parses"]
    assert discrimination(given_values, [True] * 4)["parses"] == {"auroc": None, "interval": None, "rows": 4, "missing": 0}
    assert discrimination({"min_logprob": [None]}, [True]) is None


def test_the_signals_of_a_line():
    told = {"min_logprob": -0.5, "sum_logprob": -1, "tokens": 3, "tool_logprob": None, "min_margin": 2.0}
    line = {"confidence": told, "parses": True, "keeps_schema": None}
    assert signals_of(line) == {"min_logprob": -0.5, "sum_logprob": -1.0, "tool_logprob": None, "min_margin": 2.0, "parses": 1.0, "keeps_schema": None}
    assert set(signals_of({}).values()) == {None}, "an older line"
    assert is_confidence({}) and is_confidence(line)
    for bad in ({"confidence": 1}, {"parses": 1}, {"keeps_schema": "yes"}, {"confidence": told | {"min_margin": "2"}}, {"confidence": told | {"min_margin": True}}):
        assert not is_confidence(bad)
