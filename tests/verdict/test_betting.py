"""Betting tests and confidence sequences: wealth by hand, what must hold for any rows, and error rates under continuous looking."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_swap.verdict.stats.betting import (
    BETS,
    MIN_CLUSTERS,
    confidence_sequence,
    crossing,
    log_wealth,
    log_wealth_above,
    log_wealth_below,
    random_clusters,
    sequential_verdict,
)

ONE = np.ones(1, int)


def wealth_by_hand(factors_of_bet, rows: int) -> float:
    return np.mean([math.prod(factors_of_bet(bet, row) for row in range(rows)) for bet in (0.96, 0.48, 0.24, 0.12, 0.06, 0.03)])


# -- Known answers ---------------------------------------------------------------------------------------------------------------


def test_wealth_by_hand():
    mean = (0.96 + 0.48 + 0.24 + 0.12 + 0.06 + 0.03) / 6
    # margin 0.2 and one row without a difference: y / M (1 - m) = 0.2 / 0.8
    assert np.exp(log_wealth_below(np.zeros(1), ONE, 0.2, 1)) == pytest.approx([1 + mean / 4])
    # against "at most 0.2" the same row loses 0.2 / 1.2
    assert np.exp(log_wealth_above(np.zeros(1), ONE, 0.2, 1)) == pytest.approx([1 - mean / 6])
    # azure better, then the small model better: 1 - g, then 1 + g 1.2 / 0.8
    pair = np.exp(log_wealth_below(np.array([1.0, -1.0]), np.ones(2), 0.2, 1))
    assert pair == pytest.approx([1 - mean, np.mean((1 - BETS) * (1 + 1.5 * BETS))])
    # a cluster of 2 rows with differences 1 and 0, the largest has 4: y = (0.2 - 1) + 0.2, over 4 * 0.8
    assert np.exp(log_wealth_below(np.array([1.0]), np.array([2]), 0.2, 4)) == pytest.approx([1 - mean * 0.6 / 3.2])


def test_wealth_is_the_mean_of_the_bets_not_the_best_of_them():
    twenty = np.exp(log_wealth_below(np.zeros(20), np.ones(20), 0.05, 1)[-1])
    assert twenty == pytest.approx(wealth_by_hand(lambda bet, _: 1 + bet * 0.05 / 0.95, 20))


def test_crossing():
    running = np.log([[1, 19, 20.01, 5], [1, 2, 3, 4], [25, 1, 1, 1]])
    assert crossing(running, 0.05).tolist() == [3, math.inf, 1]
    assert crossing(running[0], 0.01) == math.inf and crossing(running[0], 1 / 19.5) == 3 and crossing(running[0], 1 / 18.5) == 2


def test_a_single_row_settles_nothing():
    low, high = confidence_sequence(np.array([1.0]), ONE, 0.05, 1)
    ratio = 19 / np.mean(BETS)  # mean(BETS) (1 - m) / (1 + m) is 19 at the end
    assert high == [1] and low == pytest.approx([(1 - ratio) / (1 + ratio)], abs=1e-4)
    found = sequential_verdict({"a": [1.0]}, [1], delta=0.02, alpha=0.05, largest=1)
    assert (found.verdict, found.rows, found.clusters) == ("NEED_MORE_DATA", None, None)


def test_no_difference_at_all_ends_in_swap_when_the_wealth_says_so():
    # every row multiplies the bets by 1 + g 0.05 / 0.95
    grown = [wealth_by_hand(lambda bet, _: 1 + bet * 0.05 / 0.95, rows) for rows in range(1, 201)]
    needed = next(rows for rows, wealth in enumerate(grown, 1) if wealth >= 20)
    assert 60 < needed < 120
    found = sequential_verdict({"a": np.zeros(200), "b": np.zeros(200)}, [1] * 200, delta=0.05, alpha=0.05, largest=1)
    assert (found.verdict, found.rows, found.clusters) == ("SWAP", needed, needed)
    a = found.metrics["a"]
    assert (a.below_at, a.above_at, a.p_worse, a.p_worse_holm) == (needed, None, 1, 1)
    assert a.p_value == pytest.approx(1 / grown[-1]) and a.interval[0] == -a.interval[1] and 0 < a.interval[1] < 0.05


def test_a_small_model_that_is_always_wrong_is_found_out_at_once():
    rows = {"good": np.zeros(50), "bad": np.ones(50)}
    grown = [wealth_by_hand(lambda bet, _: 1 + bet * 0.98 / 1.02, count) for count in range(1, 51)]
    needed = next(count for count, wealth in enumerate(grown, 1) if wealth >= 40)  # 2 metrics: half of alpha each
    found = sequential_verdict(rows, [1] * 50, delta=0.02, alpha=0.05, largest=1)
    assert (found.verdict, found.rows) == ("FINE_TUNE", needed) and needed < 10
    bad = found.metrics["bad"]
    assert bad.p_worse_holm == pytest.approx(2 * bad.p_worse) and bad.p_worse == pytest.approx(1 / grown[-1])
    assert bad.interval[0] > 0.8 and bad.interval[1] == 1 and bad.p_value == 1


def test_clusters_are_counted_as_clusters():
    found = sequential_verdict({"a": np.ones(60)}, [6] * 10, delta=0.02, alpha=0.05, largest=6)
    alone = sequential_verdict({"a": np.ones(10)}, [1] * 10, delta=0.02, alpha=0.05, largest=1)
    assert (found.clusters, found.rows) == (alone.clusters, 6 * alone.clusters)
    assert found.metrics["a"].interval == alone.metrics["a"].interval
    uneven = sequential_verdict({"a": np.ones(20)}, [3, 1, 6, 2, 3, 1, 1, 3], delta=0.02, alpha=0.05, largest=6)
    assert uneven.clusters is None or uneven.rows == np.cumsum([3, 1, 6, 2, 3, 1, 1, 3])[uneven.clusters - 1]


def test_no_swap_on_few_clusters():
    better = {"a": -np.ones(40)}
    few = sequential_verdict({"a": better["a"][:9]}, [1] * 9, delta=0.02, alpha=0.05, largest=1)
    assert few.metrics["a"].below_at < 9 and few.verdict == "NEED_MORE_DATA"
    enough = sequential_verdict(better, [1] * 40, delta=0.02, alpha=0.05, largest=1)
    assert (enough.verdict, enough.rows, enough.clusters) == ("SWAP", MIN_CLUSTERS, MIN_CLUSTERS)


def test_what_was_certain_first_stays():
    turned = np.concatenate([np.ones(50), -np.ones(500)])
    found = sequential_verdict({"a": turned}, [1] * 550, delta=0.02, alpha=0.05, largest=1)
    assert found.verdict == "FINE_TUNE" and found.rows < 10 and found.metrics["a"].below_at > 50
    assert sequential_verdict({"a": -turned}, [1] * 550, delta=0.02, alpha=0.05, largest=1).verdict == "SWAP"


def test_at_the_same_cluster_it_is_fine_tune():
    """a is shown to be below the margin at just the row at which b, below it before, is shown to be above."""
    b = np.concatenate([-np.ones(8), np.ones(100)])
    at = sequential_verdict({"a": np.zeros(108), "b": b}, [1] * 108, delta=0.02, alpha=0.05, largest=1).rows
    for better in range(1, 10):
        a = np.concatenate([np.zeros(at - better), -np.ones(better)])
        found = sequential_verdict({"a": a, "b": b[:at]}, [1] * at, delta=0.02, alpha=0.05, largest=1)
        if found.metrics["a"].below_at == at:
            break
    assert found.metrics["b"].below_at <= 8 < found.metrics["b"].above_at == at
    assert (found.verdict, found.rows, found.metrics["a"].below_at) == ("FINE_TUNE", at, at)


def test_one_metric_that_is_not_settled_holds_the_swap_back():
    rows = {"a": np.zeros(400), "b": np.resize([1.0, -1.0], 400)}
    found = sequential_verdict(rows, [1] * 400, delta=0.02, alpha=0.05, largest=1)
    assert found.metrics["a"].below_at and found.metrics["b"].below_at is None and found.verdict == "NEED_MORE_DATA"


def test_holm_by_hand():
    rows = {"a": np.ones(6), "b": np.array([1, 1, 1, 1, 1, 0]), "c": np.zeros(6)}
    metrics = sequential_verdict(rows, [1] * 6, delta=0.02, alpha=0.05, largest=1).metrics
    a, b = metrics["a"].p_worse, metrics["b"].p_worse
    assert a < b < 0.2 and metrics["c"].p_worse == 1
    assert [metrics[name].p_worse_holm for name in "abc"] == pytest.approx([3 * a, 2 * b, 1])
    alike = sequential_verdict(rows | {"b": rows["a"]}, [1] * 6, delta=0.02, alpha=0.05, largest=1).metrics
    assert [alike[name].p_worse_holm for name in "abc"] == pytest.approx([3 * a, 3 * a, 1])  # never less than the one before


def test_a_hundred_thousand_rows():
    for value in (-1.0, 0.0, 1.0):
        found = sequential_verdict({"a": np.full(100_000, value)}, [1] * 100_000, delta=0.02, alpha=0.05, largest=1)
        assert np.isfinite(found.metrics["a"].interval).all() and found.verdict == ("FINE_TUNE" if value > 0 else "SWAP")
        assert found.metrics["a"].p_value == (1 if value > 0 else 0)  # too small for a float


@pytest.mark.parametrize(
    "wrong",
    [
        {"sizes": []},
        {"sizes": [1, 1]},
        {"sizes": [3]},
        {"sizes": [0, 3]},
        {"differences": {}},
        {"differences": {"a": [0.0, 1.5, 0.0]}},
        {"differences": {"a": [0.0, math.nan, 0.0]}},
        {"delta": 1.0},
        {"delta": -0.01},
        {"alpha": 0.0},
    ],
)
def test_what_is_no_run(wrong):
    good = {"differences": {"a": [0.0, 1.0, 0.0]}, "sizes": [1, 2], "delta": 0.02, "alpha": 0.05, "largest": 2}
    assert sequential_verdict(**good).verdict == "NEED_MORE_DATA"
    with pytest.raises(ValueError, match="must"):
        sequential_verdict(**(good | wrong))


def test_random_clusters():
    groups = ["x", None, "y", "x", None, "y", "x", "z"]
    clusters = random_clusters(groups, 1)
    assert sorted(clusters) == [[0, 3, 6], [1], [2, 5], [4], [7]]
    assert clusters == random_clusters(groups, 1) != sorted(clusters)
    assert len({tuple(map(tuple, random_clusters(groups, seed))) for seed in range(50)}) > 25


# -- What holds for any rows -----------------------------------------------------------------------------------------------------


@st.composite
def runs(draw):
    """(totals, sizes, largest): clusters of 1 to 4 rows with differences that are yes-no or fractions."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=25))
    rows = st.one_of(st.sampled_from([-1.0, 0.0, 1.0]), st.floats(-1, 1))
    totals = [sum(draw(rows) for _ in range(size)) for size in sizes]
    return np.array(totals), np.array(sizes), max(sizes) + draw(st.integers(0, 2))


margins = st.integers(-9900, 9900).map(lambda step: step / 10_000)
levels = st.sampled_from([0.5, 0.1, 0.05, 0.01])


@settings(deadline=None)
@given(runs(), margins, st.randoms(use_true_random=False))
def test_the_order_of_the_clusters_does_not_change_the_final_wealth(run, m, rng):
    totals, sizes, largest = run
    order = rng.sample(range(len(sizes)), len(sizes))
    straight = log_wealth_below(totals, sizes, m, largest)[-1]
    assert log_wealth_below(totals[order], sizes[order], m, largest)[-1] == pytest.approx(straight, abs=1e-9)


@settings(deadline=None)
@given(runs(), margins, margins)
def test_wealth_grows_with_the_margin(run, m, other):
    totals, sizes, largest = run
    smaller, larger = sorted((m, other))
    assert (log_wealth_below(totals, sizes, smaller, largest) <= log_wealth_below(totals, sizes, larger, largest) + 1e-9).all()


@settings(deadline=None)
@given(runs(), margins)
def test_a_bet_never_loses_more_than_its_stake(run, m):
    totals, sizes, largest = run
    assert (log_wealth_below(totals, sizes, m, largest) >= len(sizes) * math.log(1 - BETS[0]) - 1e-6).all()


@settings(max_examples=30, deadline=None)
@given(runs(), levels)
def test_the_interval_never_widens(run, alpha):
    low, high = confidence_sequence(*run[:2], alpha, run[2])
    assert (np.diff(low) >= 0).all() and (np.diff(high) <= 0).all() and (low >= -1).all() and (high <= 1).all()
    last = confidence_sequence(*run[:2], alpha, run[2], looks=[len(run[0])])
    assert (last[0][0], last[1][0]) == (low[-1], high[-1])


@settings(max_examples=50, deadline=None)
@given(runs(), margins, levels)
def test_the_interval_is_the_test_turned_around(run, m, alpha):
    totals, sizes, largest = run
    low, high = confidence_sequence(totals, sizes, alpha, largest)
    below, above = (side(totals, sizes, m, largest) for side in (log_wealth_below, log_wealth_above))
    for now in range(1, len(sizes) + 1):
        assert (high[now - 1] <= m) == (crossing(below[:now], alpha) < math.inf)
        assert (low[now - 1] >= m) == (crossing(above[:now], alpha) < math.inf)


@settings(max_examples=30, deadline=None)
@given(runs(), levels)
def test_swapping_the_models_mirrors_the_interval(run, alpha):
    totals, sizes, largest = run
    low, high = confidence_sequence(totals, sizes, alpha, largest)
    mirrored = confidence_sequence(-totals, sizes, alpha, largest)
    assert (mirrored[0] == -high).all() and (mirrored[1] == -low).all()


@settings(max_examples=50, deadline=None)
@given(runs(), st.floats(0, 0.5), levels)
def test_a_verdict_never_changes_when_more_rows_come(run, delta, alpha):
    totals, sizes, largest = run
    rows = np.repeat(totals / sizes, sizes)
    verdicts = []
    for clusters in range(1, len(sizes) + 1):
        so_far = {"a": rows[: sizes[:clusters].sum()], "b": np.zeros(sizes[:clusters].sum())}
        found = sequential_verdict(so_far, sizes[:clusters], delta=delta, alpha=alpha, largest=largest)
        for one in found.metrics.values():
            assert 0 <= one.p_value <= 1 and 0 <= one.p_worse <= one.p_worse_holm <= 1
            assert (one.below_at is None) == (one.p_value > alpha + 1e-12)
        if found.verdict != "NEED_MORE_DATA":
            assert found.verdict == "FINE_TUNE" or found.clusters >= MIN_CLUSTERS
            verdicts.append((found.verdict, found.clusters, found.rows))
            assert found.clusters <= clusters
    assert len(set(verdicts)) <= 1 and all(first[1] == len(sizes) - len(verdicts) + 1 for first in verdicts[:1])


# -- Error rates -----------------------------------------------------------------------------------------------------------------


def ever_reached(running: np.ndarray, alpha: float = 0.05) -> float:
    return float((crossing(running, alpha) < math.inf).mean())


def test_error_rates_under_continuous_looking():
    """At the margin itself, where they are highest, in 4,000 runs of 400 rows (three standard errors are below 0.02)."""
    rng = np.random.default_rng(5)
    totals = rng.choice([1.0, 0.0, -1.0], p=[0.125, 0.8, 0.075], size=(4000, 400))
    for side in (log_wealth_below, log_wealth_above):
        running = side(totals, np.ones(400), 0.05, 1)
        assert ever_reached(running, 0.05) < 0.05
        assert 0.06 < ever_reached(running, 0.2) < 0.13  # with half the wealth 0.04, with twice the wealth 0.22


def test_error_rates_with_clusters():
    """40 clusters of 10 rows that are all alike: as rows they would be taken for ten times as many."""
    rng = np.random.default_rng(6)
    totals = 10 * rng.choice([1.0, 0.0, -1.0], p=[0.125, 0.8, 0.075], size=(4000, 40))
    as_clusters = log_wealth_below(totals, np.full(40, 10), 0.05, 10)
    as_rows = log_wealth(np.repeat(0.05 - totals / 10, 10, axis=1), 0.95)
    assert ever_reached(as_clusters) <= 0.05 < ever_reached(as_rows)


def test_error_rates_of_the_verdict():
    """Six metrics at the margin, independent of each other: any one that is found worse is a false FINE_TUNE."""
    rng = np.random.default_rng(7)
    found = []
    for _ in range(300):
        rows = rng.choice([1.0, 0.0, -1.0], p=[0.2, 0.7, 0.1], size=(6, 100))
        run = dict(zip("abcdef", rows, strict=True))
        found.append(sequential_verdict(run, [1] * 100, delta=0.1, alpha=0.05, largest=1).verdict)
    assert 0 < found.count("FINE_TUNE") / 300 <= 0.05 and found.count("SWAP") / 300 <= 0.05
