"""The gate's rules on known numbers, what must hold for any rows, and Holm's procedure."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from slm_swap.verdict.decision import (
    EXIT_CODES,
    FINE_TUNE,
    MIN_CLUSTERS,
    NEED_MORE_DATA,
    SWAP,
    differences,
    paired_decision,
    point_decision,
    rows_needed,
    sequential_decision,
)
from slm_swap.verdict.stats.betting import sequential_verdict
from slm_swap.verdict.stats.multiple import holm
from slm_swap.verdict.stats.score import Sample, interval, make_sample, p_above, p_below, quantile, statistics

pytestmark = pytest.mark.filterwarnings("error")
GATE = ("valid", "exact", "f1")

# -- The point rule --------------------------------------------------------------------------------------------------------------


def decide(azure, slm, delta=0.05):
    return point_decision(dict(zip(GATE, azure, strict=True)), dict(zip(GATE, slm, strict=True)), GATE, delta)


@pytest.mark.parametrize(
    ("azure", "slm", "verdict", "failing"),
    [
        ((0.9, 0.8, 0.85), (0.9, 0.8, 0.85), SWAP, []),
        ((0.9, 0.8, 0.85), (1.0, 0.9, 0.95), SWAP, []),
        ((0.9, 0.8, 0.85), (0.85, 0.75, 0.8), SWAP, []),  # exactly the margin, though 0.9 - 0.85 is 0.05000000000000004
        ((1.0, 0.3, 0.5), (0.95, 0.25, 0.45), SWAP, []),
        ((0.9, 0.8, 0.85), (0.9, 0.7499, 0.85), FINE_TUNE, ["exact"]),
        ((0.9, 0.8, 0.85), (0.8, 0.5, 0.85), FINE_TUNE, ["exact", "valid"]),  # the worst first
        ((0.9, 0.8, 0.85), (1.0, 1.0, 0.7), FINE_TUNE, ["f1"]),  # better elsewhere does not help
    ],
)
def test_point_rule(azure, slm, verdict, failing):
    decision = decide(azure, slm)
    assert (decision.verdict, decision.failing, decision.fine_tune) == (verdict, failing, verdict == FINE_TUNE)


def test_no_margin():
    assert decide((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), delta=0).verdict == SWAP
    assert decide((0.5, 0.5, 0.5), (0.5, 0.5, 0.4999), delta=0).verdict == FINE_TUNE
    assert decide((1, 1, 1), (0, 0, 0), delta=1).verdict == SWAP


def test_what_is_written():
    assert decide((0.75, 0.5, 1.0), (0.5, 0.5, 1.0)).to_json() == {
        "verdict": "FINE_TUNE",
        "fine_tune": True,
        "rule": "point",
        "delta": 0.05,
        "metrics": {
            "valid": {"azure": 0.75, "slm": 0.5, "difference": 0.25},
            "exact": {"azure": 0.5, "slm": 0.5, "difference": 0.0},
            "f1": {"azure": 1.0, "slm": 1.0, "difference": 0.0},
        },
        "failing": ["valid"],
        "alpha": None,
        "swap_alpha": None,
        "withheld": None,
        "clusters": None,
        "need": None,
    }


def test_only_the_gate_s_metrics_count():
    assert point_decision({"a": 0.5, "b": 1}, {"a": 0.5, "b": 0}, ("a",), 0.1).verdict == SWAP
    with pytest.raises(KeyError):
        point_decision({"a": 1}, {}, ("a",), 0.1)


def test_exit_codes():
    assert {"SWAP": 0, "FINE_TUNE": 10, "NEED_MORE_DATA": 11} == EXIT_CODES == {SWAP: 0, FINE_TUNE: 10, NEED_MORE_DATA: 11}


hundredths = st.integers(0, 100)


@given(st.tuples(hundredths, hundredths, hundredths), st.tuples(hundredths, hundredths, hundredths), hundredths)
def test_the_verdict_is_that_of_whole_numbers(azure, slm, delta):
    decision = decide([value / 100 for value in azure], [value / 100 for value in slm], delta / 100)
    worse = {name for name, left, right in zip(GATE, azure, slm, strict=True) if left - right > delta}
    assert set(decision.failing) == worse and decision.fine_tune == bool(worse)


# -- Holm's procedure ------------------------------------------------------------------------------------------------------------


def test_holm_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert list(holm({"b": 0.9, "a": 0.5})) == ["b", "a"] and holm({"b": 0.9, "a": 0.6}) == {"b": 1, "a": 1}
    assert holm({"a": 0.2}) == {"a": 0.2} and holm({"a": 0.02, "b": 0.02}) == {"a": 0.04, "b": 0.04} and holm({}) == {}


some_p = st.dictionaries(st.text("abcdef", min_size=1, max_size=2), st.floats(0, 1), min_size=1, max_size=6)


@given(some_p, st.floats(0.001, 0.5))
def test_holm_rejects_as_the_procedure_does_step_by_step(p_values, alpha):
    adjusted = holm(p_values)
    rejected = set()
    for name in sorted(p_values, key=p_values.get):
        if p_values[name] * (len(p_values) - len(rejected)) > alpha:
            break
        rejected.add(name)
    assert {name for name, p in adjusted.items() if p <= alpha} == rejected
    assert all(p_values[name] <= p <= min(1, len(p_values) * p_values[name]) for name, p in adjusted.items())
    order = sorted(p_values, key=p_values.get)
    assert [adjusted[name] for name in order] == sorted(adjusted.values())


# -- The paired rule -------------------------------------------------------------------------------------------------------------


def sides(b: int, c: int, n: int) -> tuple[list[int], list[int]]:
    """(azure, slm): b rows right with azure only, c with the small model only, all others with both."""
    return [1] * b + [0] * c + [1] * (n - b - c), [0] * b + [1] * c + [1] * (n - b - c)


def paired(counts: dict[str, tuple[int, int, int]], delta: float = 0.05, alpha: float = 0.05, clusters=None, rule=paired_decision):
    """The rule on yes-no metrics, each given as (b, c, n)."""
    both = {name: sides(*numbers) for name, numbers in counts.items()}
    azure, slm = ({name: pair[side] for name, pair in both.items()} for side in (0, 1))
    return rule(azure, slm, set(counts), delta, alpha, clusters)


@pytest.mark.parametrize(
    ("counts", "verdict", "failing"),
    [
        ({"a": (0, 0, 400)}, SWAP, []),
        ({"a": (2, 8, 400), "b": (0, 0, 400)}, SWAP, []),
        ({"a": (0, 0, 400), "b": (80, 80, 400)}, NEED_MORE_DATA, []),  # every metric has to be shown
        ({"a": (60, 5, 400)}, FINE_TUNE, ["a"]),
        ({"a": (0, 40, 400), "b": (60, 5, 400)}, FINE_TUNE, ["b"]),  # better elsewhere does not help
        ({"a": (60, 5, 400), "b": (90, 5, 400), "c": (0, 0, 400)}, FINE_TUNE, ["b", "a"]),  # the worst first
        ({"a": (20, 0, 400)}, NEED_MORE_DATA, []),  # just the margin
    ],
)
def test_paired_rule(counts, verdict, failing):
    decision = paired(counts)
    assert (decision.verdict, decision.failing, decision.fine_tune) == (verdict, failing, verdict == FINE_TUNE)
    assert decision.rule == "paired" and (decision.need is None) == (verdict != NEED_MORE_DATA)


@pytest.mark.parametrize(("rows", "delta", "verdict"), [(132, 0.02, NEED_MORE_DATA), (133, 0.02, SWAP), (51, 0.05, NEED_MORE_DATA), (52, 0.05, SWAP)])
def test_models_that_never_differ_need_this_many_rows(rows, delta, verdict):
    """z^2 (1 - delta) / delta: 132.6 and 51.4."""
    decision = paired({"a": (0, 0, rows)}, delta)
    assert decision.verdict == verdict
    if verdict == NEED_MORE_DATA:
        assert decision.need == {"towards": SWAP, "metric": "a", "rows": 1, "clusters": None, "rows_if_equal": 1}


def test_what_one_metric_says():
    azure, slm = {"a": [1] * 8 + [0] * 2}, {"a": [1] * 6 + [0, 0, 1, 0]}
    decision = paired_decision(azure, slm, {"a"}, 0.05, 0.025)
    found, sample = decision.metrics["a"], make_sample([0] * 6 + [1, 1, -1, 0], yes_no=True)
    assert (found["azure"], found["slm"], found["difference"]) == (0.8, 0.7, pytest.approx(0.1))
    assert found["discordant"] == {"azure_better": 2, "slm_better": 1, "equal": 7}
    assert found["azure_interval"] == pytest.approx([0.4902, 0.9433], abs=5e-5)  # Wilson's
    assert found["slm_interval"] == pytest.approx([0.3968, 0.8922], abs=5e-5)
    assert found["interval"] == list(interval(sample, 0.025))
    assert (found["p_value"], found["p_worse"]) == (p_below(sample, 0.05), p_above(sample, 0.05))
    assert found["p_worse_holm"] == found["p_worse"]
    assert decision.clusters == {"count": 10, "effective": 10} and decision.certain_after is None
    told = decision.to_json()
    assert (told["alpha"], told["delta"], told["rule"], told["need"]) == (0.025, 0.05, "paired", decision.need)


def test_only_named_metrics_are_yes_no():
    azure, slm = {"a": [1, 1, 0, 1], "f": [1, 1, 0, 1]}, {"a": [1, 0, 0, 1], "f": [1, 0, 0, 1]}
    metrics = paired_decision(azure, slm, {"a"}, 0.05).metrics
    fractions = make_sample([0, 1, 0, 0])
    assert metrics["f"]["p_value"] == p_below(fractions, 0.05) != metrics["a"]["p_value"]
    assert metrics["f"]["interval"] == list(interval(fractions, 0.05)) != metrics["a"]["interval"]
    assert metrics["f"]["azure_interval"] == list(interval(make_sample([1, 1, 0, 1], paired=False), 0.05))


@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize(("count", "verdict"), [(MIN_CLUSTERS - 1, NEED_MORE_DATA), (MIN_CLUSTERS, SWAP)])
def test_never_swap_on_fewer_than_ten_clusters(count, verdict, clustered):
    each = 3 if clustered else 1
    labels = [number // each for number in range(count * each)] if clustered else None
    decision = paired({"a": (0, count * each, count * each)}, 0.1, clusters=labels)  # the small model is right where azure never is
    assert decision.metrics["a"]["p_value"] < 0.01
    assert decision.verdict == verdict and decision.clusters == {"count": count, "effective": pytest.approx(count)}
    if decision.need:
        assert decision.need["rows"] == each and decision.need["clusters"] == (1 if clustered else None)


def test_unequal_clusters_count_as_fewer():
    labels = [0] * 9 + [*range(1, 21)]  # 21 clusters, 29^2 / (81 + 20) = 8.3 effective
    decision = paired({"a": (0, 29, 29)}, 0.1, clusters=labels)
    assert decision.clusters == {"count": 21, "effective": pytest.approx(841 / 101)}
    assert decision.metrics["a"]["p_value"] < 0.05 and decision.verdict == NEED_MORE_DATA
    assert decision.need["clusters"] == math.ceil(10 * 21 / (841 / 101)) - 21  # as uneven as they are
    assert paired({"a": (0, 29, 29)}, 0.1).verdict == SWAP


def test_fine_tune_needs_no_ten_clusters():
    assert paired({"a": (5, 0, 5)}, 0.02).verdict == FINE_TUNE
    assert paired({"a": (0, 0, 3)}, 0.02).verdict == NEED_MORE_DATA


def test_rows_of_a_cluster_count_once():
    labels = [number % 15 for number in range(150)]  # ten copies of 15 rows, of which two are worse
    copied = paired_decision({"a": [1] * 150}, {"a": [0, 0, *[1] * 13] * 10}, {"a"}, 0.05, clusters=labels)
    alone = paired_decision({"a": [1] * 15}, {"a": [0, 0, *[1] * 13]}, set(), 0.05)  # Student's t, as clusters have it
    assert copied.metrics["a"]["p_worse"] == pytest.approx(alone.metrics["a"]["p_worse"])
    assert copied.metrics["a"]["azure_interval"] == pytest.approx(alone.metrics["a"]["azure_interval"])
    assert paired({"a": (20, 0, 150)}).verdict == FINE_TUNE and copied.verdict == NEED_MORE_DATA


def test_fine_tune_by_holm_s_levels():
    one = {"a": (11, 0, 100)}
    p = p_above(make_sample([1] * 11 + [0] * 89, yes_no=True), 0.05)
    assert 0.05 / 3 > p > 0.05 / 7 and paired(one).verdict == FINE_TUNE
    others = {f"m{number}": (0, 0, 100) for number in range(6)}
    decision = paired(one | others)
    assert decision.metrics["a"]["p_worse_holm"] == pytest.approx(7 * p) and decision.verdict == NEED_MORE_DATA
    assert paired(one | {"m0": (0, 0, 100), "m1": (0, 0, 100)}).verdict == FINE_TUNE
    # Once the worst is shown, the next is held to one fewer.
    both = paired({"a": (11, 0, 100), "b": (30, 0, 100), "c": (0, 0, 100)}, alpha=2.5 * p)
    assert both.failing == ["b", "a"] and both.metrics["a"]["p_worse_holm"] == pytest.approx(2 * p)


def test_just_alpha_is_enough():
    worse, better = p_above(make_sample([1] * 8 + [0] * 92, yes_no=True), 0.05), p_below(make_sample([0] * 100, yes_no=True), 0.05)
    assert paired({"a": (8, 0, 100)}, alpha=worse).verdict == FINE_TUNE
    assert paired({"a": (8, 0, 100)}, alpha=worse - 1e-9).verdict == NEED_MORE_DATA
    assert paired({"a": (0, 0, 100)}, alpha=better).verdict == SWAP
    assert paired({"a": (0, 0, 100)}, alpha=better - 1e-9).verdict == NEED_MORE_DATA


def test_no_margin_at_all():
    never = paired({"a": (0, 0, 10_000)}, 0)
    assert never.verdict == NEED_MORE_DATA and never.metrics["a"]["p_value"] == never.metrics["a"]["p_worse"] == 0.5
    assert never.need["rows"] is None and never.need["rows_if_equal"] is None
    assert paired({"a": (0, 20, 100)}, 0).verdict == SWAP and paired({"a": (20, 0, 100)}, 0).verdict == FINE_TUNE


@pytest.mark.parametrize("rule", [paired_decision, sequential_decision])
@pytest.mark.parametrize(
    ("azure", "slm", "clusters"),
    [
        ({}, {}, None),
        ({"a": []}, {"a": []}, None),
        ({"a": [1, 0]}, {"a": [1]}, None),
        ({"a": [1]}, {"b": [1]}, None),
        ({"a": [1], "b": [1]}, {"a": [1]}, None),
        ({"a": [1], "b": [1, 0]}, {"a": [1], "b": [1, 0]}, ["x"]),
        ({"a": [1, 0]}, {"a": [1, 0]}, ["x"]),
        ({"a": [2, 1]}, {"a": [1.5, 1]}, None),
        ({"a": [math.nan]}, {"a": [1]}, None),
    ],
)
def test_rows_that_are_not_paired(rule, azure, slm, clusters):
    with pytest.raises(ValueError):
        rule(azure, slm, {"a"}, 0.05, clusters=clusters)


fraction = st.integers(0, 4).map(lambda number: number / 4)
some_rows = st.lists(st.tuples(st.booleans(), st.booleans(), fraction, fraction, st.integers(0, 12)), min_size=1, max_size=60)


@settings(max_examples=15, deadline=None)
@given(some_rows, st.sampled_from([0.0, 0.05, 0.3]), st.sampled_from([0.01, 0.05, 0.3]), st.booleans())
@example([(False, False, 0.0, 0.25, 0), (False, False, 0.25, 0.0, 0), (False, False, 0.75, 0.0, 0)], 0.05, 0.3, False)
def test_the_verdict_is_what_the_intervals_say(rows, delta, alpha, clustered):
    a, b, f, g, labels = zip(*rows, strict=True)
    labels = labels if clustered else None
    decision = paired_decision({"a": a, "f": f}, {"a": b, "f": g}, {"a"}, delta, alpha, labels)
    for found in decision.metrics.values():
        low, high = found["interval"]
        for p, beyond, bound in ((found["p_value"], high < delta + 1e-12, high), (found["p_worse"], low > delta - 1e-12, low)):
            if abs(p - alpha) < 1e-9:  # rounding decides then, and the bound is the margin
                assert bound == pytest.approx(delta, abs=1e-9)
            else:
                assert (p <= alpha) == beyond
        assert found["azure"] - found["slm"] == pytest.approx(found["difference"])
        assert sum(found["discordant"].values()) == len(rows)
    below = [found["interval"][1] < delta for found in decision.metrics.values()]
    if decision.verdict == SWAP:
        assert all(below) and decision.clusters["effective"] >= 10 - 1e-9 and not decision.failing
    elif decision.verdict == FINE_TUNE:
        assert decision.failing and all(decision.metrics[name]["difference"] > delta for name in decision.failing)
    else:
        assert not decision.failing and (not all(below) or decision.clusters["effective"] < 10)
        assert decision.need["rows"] is None or decision.need["rows"] >= 1


# -- Rows needed -----------------------------------------------------------------------------------------------------------------


def needed(counts: dict[str, tuple[int, int, int]], delta: float = 0.05, alpha: float = 0.05) -> dict:
    both = {name: sides(*numbers) for name, numbers in counts.items()}
    samples = differences({name: pair[0] for name, pair in both.items()}, {name: pair[1] for name, pair in both.items()}, set(counts), None)
    return rows_needed(samples, delta, alpha)


def share_shown(b: float, c: float, rows: int, delta: float, level: float, worse: bool) -> float:
    """Of 20,000 samples of so many rows, those that show it at `level`: worse than the margin, or not inferior."""
    counts = np.random.default_rng(3).multinomial(rows, [b, c, 1 - b - c], 20_000)
    found = statistics(np.array([1.0, -1.0, 0.0]) - delta, 1.0, counts, -1 - delta, 1 - delta, True)
    return float(((found if worse else -found) >= stats.norm.isf(level)).mean())


def test_rows_needed_to_swap():
    need = needed({"a": (0, 2, 100), "b": (9, 9, 100), "c": (3, 3, 100)})
    assert (need["towards"], need["metric"], need["clusters"]) == (SWAP, "b", None)  # the last that would be shown
    assert 0.77 < share_shown(0.09, 0.09, need["rows"] + 100, 0.05, 0.05, worse=False) < 0.84
    assert need["rows_if_equal"] == need["rows"]
    better = needed({"a": (6, 12, 100)})
    assert better["rows"] < better["rows_if_equal"] == need["rows"]  # 18 of 100 rows differ in both
    assert 0.77 < share_shown(0.06, 0.12, better["rows"] + 100, 0.05, 0.05, worse=False) < 0.84


def test_rows_needed_to_fine_tune():
    need = needed({"a": (15, 7, 50), "b": (10, 7, 50), "c": (0, 0, 50)})
    assert (need["towards"], need["metric"]) == (FINE_TUNE, "a")  # the first that would be shown
    assert 0.77 < share_shown(0.3, 0.14, need["rows"] + 50, 0.05, 0.05 / 3, worse=True) < 0.84
    assert needed({"a": (15, 7, 50)})["rows"] < need["rows"]  # one metric alone is held to less


def test_no_number_of_rows_settles_what_is_at_the_margin():
    assert needed({"a": (5, 0, 100)}) == {"towards": SWAP, "metric": "a", "rows": None, "clusters": None, "rows_if_equal": needed({"a": (5, 0, 100)})["rows_if_equal"]}
    assert needed({"a": (5, 0, 100)})["rows_if_equal"] > 0
    close = needed({"a": (5001, 0, 100_000)})
    assert close["towards"] == FINE_TUNE and close["rows"] is None  # some 3e8


@pytest.mark.parametrize("sizes", [(5, 5), (1, 16)])
def test_power_at_the_rows_needed_by_clusters(sizes):
    """Clusters of rows that are all alike; as many more of them, half of each size, settle it with 80% power."""
    clusters = [(size, value) for size in sizes for value in (1, -1, *[0] * 8)]
    values = [value for size, value in clusters for _ in range(size)]
    labels = [number for number, (size, _) in enumerate(clusters) for _ in range(size)]
    sample = make_sample(values, labels, yes_no=True)
    need = rows_needed({"a": sample}, 0.05, 0.05)
    total = need["clusters"] + sample.clusters
    assert need["rows"] == pytest.approx(need["clusters"] * len(values) / len(clusters), abs=2)
    lengths, totals = np.array([[size, size * value] for size, value in clusters], float).T
    counts = np.random.default_rng(4).multinomial(total, np.full(len(clusters), 1 / len(clusters)), 4000)
    found = statistics(totals - 0.05 * lengths, lengths, counts, -1.05 * max(sizes), 0.95 * max(sizes), False)
    limit = quantile(Sample(sample.totals, np.resize(lengths, total), -1.0, 1.0, False), 0.05)
    assert 0.76 < (found <= -limit).mean() < 0.85


# -- The sequential rule ---------------------------------------------------------------------------------------------------------


def test_sequential_rule_is_that_of_betting():
    azure, slm = sides(20, 1, 60)
    decision = sequential_decision({"a": azure, "b": [1] * 60}, {"a": slm, "b": [1] * 60}, {"a", "b"}, 0.05, in_order=True)
    rows = {"a": np.subtract(azure, slm), "b": np.zeros(60)}
    found = sequential_verdict(rows, [1] * 60, delta=0.05, alpha=0.05, largest=1)
    assert (decision.verdict, decision.rule, decision.certain_after) == (FINE_TUNE, "sequential", found.rows)
    assert decision.failing == ["a"] and decision.need is None and found.rows < 20
    a, b = decision.metrics["a"], decision.metrics["b"]
    assert (a["p_value"], a["p_worse"], a["p_worse_holm"]) == (1, found.metrics["a"].p_worse, found.metrics["a"].p_worse_holm)
    assert a["interval"] == list(found.metrics["a"].interval) and a["certain_at"] == found.metrics["a"].above_at
    assert b["certain_at"] is None and a["discordant"] == {"azure_better": 20, "slm_better": 1, "equal": 39}


def test_rows_that_stand_in_order_are_shuffled_unless_they_came_so():
    azure, slm = sides(30, 0, 300)
    came = sequential_decision({"a": azure}, {"a": slm}, {"a"}, 0.05, in_order=True)
    shuffled = sequential_decision({"a": azure}, {"a": slm}, {"a"}, 0.05)
    assert came.verdict == FINE_TUNE and came.certain_after < 10  # all that is worse came first
    assert shuffled.certain_after is None or shuffled.certain_after > 10
    assert shuffled.metrics["a"]["difference"] == pytest.approx(0.1) == came.metrics["a"]["difference"]


def test_sequential_clusters():
    labels = [number // 4 for number in range(80)]
    whole = sequential_decision({"a": [1] * 80}, {"a": [0] * 80}, {"a"}, 0.05, clusters=labels)
    alone = sequential_decision({"a": [1] * 20}, {"a": [0] * 20}, {"a"}, 0.05)
    assert whole.certain_after == 4 * alone.certain_after and whole.clusters == {"count": 20, "effective": 20}
    longer = sequential_decision({"a": [1] * 80}, {"a": [0] * 80}, {"a"}, 0.05, clusters=labels, largest=16)
    assert longer.certain_after is None or longer.certain_after > whole.certain_after  # a larger one could have come
    assert sequential_decision({"a": [1] * 3}, {"a": [1] * 3}, {"a"}, 0.05).need["towards"] == SWAP


@pytest.mark.parametrize("rule", [paired_decision, sequential_decision])
def test_identical_models(rule):
    assert paired({"a": (0, 0, 9), "b": (0, 0, 9)}, 0.4, rule=rule).verdict == NEED_MORE_DATA
    assert paired({"a": (0, 0, 300), "b": (0, 0, 300)}, 0.05, rule=rule).verdict == SWAP
