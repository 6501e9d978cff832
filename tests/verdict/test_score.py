"""Score tests and intervals: published and hand-computed answers, second implementations, and what must hold for any rows."""

import math

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from slm_swap.verdict.stats import score
from slm_swap.verdict.stats.score import (
    Sample,
    degrees,
    interval,
    make_sample,
    mirrored,
    p_above,
    p_below,
    quantile,
    statistic,
    statistics,
    tilted_variance,
    units_needed,
)

pytestmark = pytest.mark.filterwarnings("error")
few = settings(max_examples=25, deadline=None)  # an interval takes some 20 ms


def paired(b: int, c: int, n: int) -> Sample:
    """Paired yes-no answers: b rows right with azure only, c with the small model only, n in all."""
    return make_sample([1] * b + [-1] * c + [0] * (n - b - c), yes_no=True)


def proportion(right: int, n: int) -> Sample:
    return make_sample([1] * right + [0] * (n - right), yes_no=True, paired=False)


# -- Known answers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("b", "c", "n", "alpha", "low", "high", "digits"),
    [
        (1, 7, 21, 0.025, -0.517, -0.026, 3),  # Fagerland, Lydersen, Laake, Statistics in Medicine 33, 2014: airway hyper-responsiveness
        (28, 25, 618, 0.05, -0.0148, 0.0247, 4),  # R, PropCIs::scoreci.mp
        (7, 0, 14, 0.025, 0.177034, 0.732008, 6),  # the same
    ],
)
def test_tango_s_interval_as_published(b, c, n, alpha, low, high, digits):
    found = interval(paired(b, c, n), alpha)
    assert tuple(round(end, digits) for end in found) == (low, high)
    assert interval(paired(c, b, n), alpha) == pytest.approx((-found[1], -found[0]), abs=1e-12)


def test_wilson_s_interval_as_published():
    assert interval(proportion(8, 10), 0.025) == pytest.approx((0.4902, 0.9433), abs=5e-5)


@pytest.mark.parametrize("n", [1, 10, 133, 100_000])
@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.4])
def test_models_that_never_differ(n, alpha):
    z = stats.norm.isf(alpha)
    end = z * z / (n + z * z)
    assert interval(paired(0, 0, n), alpha) == pytest.approx((-end, end), rel=1e-6)
    assert interval(proportion(n, n), alpha) == pytest.approx((1 - end, 1), rel=1e-6)
    assert interval(proportion(0, n), alpha) == pytest.approx((0, end), rel=1e-6)


def test_fractions_by_hand():
    sample = make_sample([0] * 6 + [0.5] * 2)  # mean 1/8, variance 3/64
    # Under m = 0.15 the two values have probabilities 0.7 and 0.3: variance 0.15 * 0.35, larger than the sample's.
    assert statistic(sample, 0.15) == pytest.approx(-0.025 / math.sqrt(0.0525 / 7))
    # Under m = 0.1 they have 0.8 and 0.2: variance 0.04, less than the sample's.
    assert statistic(sample, 0.1) == pytest.approx(0.025 / math.sqrt(3 / 64 / 7))
    assert p_above(sample, 0.1) == pytest.approx(stats.t.sf(statistic(sample, 0.1), 7))
    assert quantile(sample, 0.05) == pytest.approx(1.8946, abs=5e-5)  # Student's t, 7 degrees of freedom
    assert quantile(paired(1, 1, 8), 0.05) == pytest.approx(1.6449, abs=5e-5)


def test_what_is_missing_lies_on_an_end():
    # One value, 0.2 above m: the ends are -1.2 and 0.8. The mean is 0 with 0.2 * (1 / 1.2) on the low end, the rest where it was.
    on_end = 0.2 / (1.2 + 0.2)
    expected = on_end * 1.2**2 + (1 - on_end) * 0.2**2
    assert tilted_variance(np.array([0.2]), np.array([3]), -1.2, 0.8) == pytest.approx(expected)
    assert tilted_variance(np.array([-0.2]), np.array([3]), -0.8, 1.2) == pytest.approx(expected)


def test_many_samples_at_once_are_each_alone():
    y, counts = np.array([-1.05, -0.05, 0.2, 0.95]), np.array([[1, 5, 0, 2], [3, 0, 0, 0], [0, 0, 4, 4]])
    for exact in (True, False):
        found = statistics(y, 1.0, counts, -1.05, 0.95, exact)
        assert found == pytest.approx([float(statistics(y, 1.0, row, -1.05, 0.95, exact)) for row in counts])


def test_clusters_by_hand():
    sample = make_sample([1, 0, 1, 0, 0, -1], ["a", "b", "b", "c", "c", "c"])
    assert (sample.rows, sample.clusters, sample.mean, sample.exact) == (6, 3, pytest.approx(1 / 6), False)
    assert (sorted(sample.sizes), sorted(sample.totals)) == ([1, 2, 3], [-1, 1, 1])
    assert sample.effective == pytest.approx(36 / 14) and degrees(sample) == pytest.approx(36 / 14 - 1)
    # Around 1/6 a row the clusters are 5/6, 2/3 and -3/2: squares add up to 61/18. At m close to the mean that is what counts.
    m = 1 / 6 - 0.01
    assert statistic(sample, m) == pytest.approx(0.02 / math.sqrt(61 / 18 / 2 / 3))
    assert degrees(make_sample([0.5, 0.25], "aa")) == 1  # one cluster: nothing less


def test_degrees_of_freedom():
    assert degrees(paired(1, 2, 9)) == math.inf
    assert degrees(make_sample([0.5] * 9)) == 8 and degrees(make_sample([1, 0, 1, 0], "aabb", yes_no=True)) == 1


@pytest.mark.parametrize(
    ("values", "labels", "flags"),
    [
        ([], None, {}),
        ([0.5, 1.01], None, {}),
        ([-1.01], None, {}),
        ([-0.01], None, {"paired": False}),
        ([math.nan], None, {}),
        ([math.inf], None, {}),
        ([0.5, 0.5], ["a"], {}),
        ([0.5], ["a", "b"], {}),
    ],
)
def test_what_is_no_sample(values, labels, flags):
    with pytest.raises(ValueError, match="value"):
        make_sample(values, labels, **flags)


def test_the_scale_s_ends_need_no_test():
    sample = paired(1, 2, 9)
    assert (p_below(sample, 1), p_below(sample, -1), p_above(sample, -1), p_above(sample, 1)) == (0, 1, 0, 1)
    assert p_below(paired(3, 0, 3), 1) == 1 and p_above(paired(0, 3, 3), -1) == 1


@pytest.mark.parametrize("alpha", [0.001, 0.4, 0.499, 0.49999])
@pytest.mark.parametrize("value", [1, -1, 0, 0.1])
@pytest.mark.parametrize("labels", [None, [number // 1000 for number in range(100_000)]])
def test_a_hundred_thousand_rows_all_alike(value, alpha, labels):
    sample = make_sample(np.full(100_000, value, float), labels)
    low, high = interval(sample, alpha)
    assert -1 <= low <= sample.mean + 1e-9 and sample.mean - 1e-9 <= high <= 1 and high - low < 0.05 * quantile(sample, alpha) ** 2 + 2e-9


def test_five_thousand_different_fractions():
    values = np.random.default_rng(0).uniform(-1, 1, 5000)
    reach = stats.t.isf(0.05, 4999) * stats.sem(values)  # so many rows that the usual interval is nearly this one
    assert interval(make_sample(values), 0.05) == pytest.approx((values.mean() - reach, values.mean() + reach), abs=2e-4)


# -- Second implementations ------------------------------------------------------------------------------------------------------


def tango(b: int, c: int, n: int, d: float) -> float:
    """The closed form (Tango 1998): the restricted estimate of c's probability is a quadratic's root."""
    first, second, third = 2 * n, -b - c + (2 * n - b + c) * d, -c * d * (1 - d)
    q = (math.sqrt(second**2 - 4 * first * third) - second) / (2 * first)
    return (b - c - n * d) / math.sqrt(n * (2 * q + d * (1 - d)))


pairs = st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(0, 200)).filter(any)


@settings(deadline=None)
@given(pairs, st.integers(-95, 95))
@example((0, 0, 200), 2)
@example((5, 0, 0), -2)
def test_tango_s_closed_form(counts, hundredths):
    b, c, equal = counts
    d, n = hundredths / 100, b + c + equal
    assume(d or b or c)
    assert statistic(paired(b, c, n), d) == pytest.approx(tango(b, c, n, d), rel=1e-6, abs=1e-9)


@few
@given(st.integers(0, 50), st.integers(0, 50), st.sampled_from([0.001, 0.025, 0.05, 0.4]))
def test_wilson_s_closed_form(right, wrong, alpha):
    n, z = right + wrong, stats.norm.isf(alpha)
    assume(n)
    middle, reach = (right + z * z / 2) / (n + z * z), z / (n + z * z) * math.sqrt(right * wrong / n + z * z / 4)
    assert interval(proportion(right, n), alpha) == pytest.approx((middle - reach, middle + reach), abs=1e-8)


def by_optimizer(values: list[float], labels: list, m: float) -> float:
    """The score with the multiplier found as the maximum of the dual likelihood, by a general optimizer, and plain loops."""
    groups: dict = {}
    for value, label in zip(values, labels, strict=True):
        groups.setdefault(label, []).append(value)
    y = np.array([sum(value - m for value in group) for group in groups.values()])
    n, sizes = len(groups), np.array([len(group) for group in groups.values()])
    typical = (sizes**3).sum() / (sizes**2).sum()
    low, high = min((-1 - m) * typical, y.min()), max((1 - m) * typical, y.max())
    bounds = (-1 / high * (1 - 1e-9), -1 / low * (1 - 1e-9))
    multiplier = optimize.minimize_scalar(lambda x: -np.log1p(x * y).sum(), bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
    weights = 1 / n / (1 + multiplier * y)
    missing = -(weights @ y)
    under = weights @ y**2 + missing * (high if missing > 0 else low)
    mean = sum(values) / len(values)
    own = sum(sum(value - mean for value in group) ** 2 for group in groups.values())
    return y.mean() / math.sqrt(max(under * n, own) / max(n - 1, 1) / n)


def by_halving(y: np.ndarray, counts: np.ndarray, low: float, high: float) -> float:
    """`tilted_variance` with the multiplier found by nothing but halving."""
    share, least, most = counts / counts.sum(), -(1 - 1e-12) / high, -(1 - 1e-12) / low
    for _ in range(64):
        middle = (least + most) / 2
        least, most = (middle, most) if (share * y / (1 + middle * y)).sum() > 0 else (least, middle)
    weights = share / (1 + middle * y)
    mean = weights @ y
    return weights @ y**2 - mean * (high if mean < 0 else low)


ends = st.floats(0.01, 2)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 1000)), min_size=1, max_size=8), ends, ends)
@example([(0.0, 1), (1.0, 1)], 1.0, 1.0)
@example([(1e-9, 1), (1.0, 1000)], 0.01, 2.0)
def test_newton_s_steps_end_where_halving_does(drawn, below, above):
    y, counts = np.array([place for place, _ in drawn]) * (below + above) - below, np.array([count for _, count in drawn])
    y = y.clip(-below, above)
    assert tilted_variance(y, counts, -below, above) == pytest.approx(by_halving(y, counts, -below, above), rel=1e-9, abs=1e-12)


def test_an_end_that_is_known_is_that_of_the_very_sample():
    """Ends are kept: samples that are nearly alike do not get each other's."""
    samples = [
        make_sample(values, labels and labels[: len(values)], yes_no)
        for values in ([1, 0, 0, -1], [0, 1, 0, -1, 0], [0, 1, 0, 0, 0])
        for labels in (None, "aabbb", "aabcc")
        for yes_no in (True, False)
    ]
    kept = [interval(sample, alpha) for sample in samples for alpha in (0.05, 0.1)]
    for number, (sample, alpha) in enumerate((sample, alpha) for sample in samples for alpha in (0.05, 0.1)):
        score._uppers.clear()
        assert interval(sample, alpha) == kept[number]


eighths = st.integers(-8, 8)
rows = st.lists(st.tuples(eighths, st.integers(0, 9)), min_size=1, max_size=30)
margins = st.integers(-90, 90).map(lambda number: number / 100)
alphas = st.sampled_from([0.001, 0.05, 0.2, 0.4])


def clustered(drawn: list[tuple[int, int]]) -> Sample:
    return make_sample([value / 8 for value, _ in drawn], [label for _, label in drawn])


@settings(deadline=None)
@given(rows, margins)
def test_fractions_and_clusters_by_an_optimizer(drawn, m):
    values, labels = [value / 8 for value, _ in drawn], [label for _, label in drawn]
    sample = make_sample(values, labels)
    assume(abs(sample.mean - m) > 1e-6)
    assert statistic(sample, m) == pytest.approx(by_optimizer(values, labels, m), rel=1e-3)


# -- What holds for any rows -----------------------------------------------------------------------------------------------------


samples = st.one_of(
    rows.map(clustered),
    st.lists(eighths, min_size=1, max_size=30).map(lambda drawn: make_sample([value / 8 for value in drawn])),
    pairs.map(lambda counts: paired(counts[0], counts[1], sum(counts))),
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 9)), min_size=1, max_size=30).map(
        lambda drawn: make_sample([value for value, _ in drawn], [label for _, label in drawn], True, paired=False)
    ),
)
UNEVEN = make_sample([0, 0, 0, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 2, 3, 3, 3, 3, 3, 3, 3, 3], True, paired=False)


@few
@given(samples)
@example(UNEVEN)  # around the mean of y, not of the rows, the score would rise again
def test_the_score_falls_as_the_mean_tested_rises(sample):
    found = [statistic(sample, m) for m in np.linspace(sample.low, sample.high, 41)[1:-1]]
    assert (np.diff(found) <= 1e-9).all()


@few
@given(samples, alphas)
@example(UNEVEN, 0.4)
def test_the_interval_is_what_the_tests_do_not_reject(sample, alpha):
    low, high = interval(sample, alpha)
    assert sample.low <= low <= sample.mean + 1e-9 and sample.mean - 1e-9 <= high <= sample.high
    if high < sample.high:
        assert p_below(sample, high) == pytest.approx(alpha, rel=1e-4)
    else:
        assert p_below(sample, sample.high - 1e-6) >= alpha
    if low > sample.low:
        assert p_above(sample, low) == pytest.approx(alpha, rel=1e-4)
    else:
        assert p_above(sample, sample.low + 1e-6) >= alpha
    assert (p_below(sample, min(high + 0.01, sample.high - 1e-6)) < alpha) == (high + 1e-6 < sample.high)


@few
@given(samples, st.integers(1, 49), st.integers(1, 49))
def test_a_larger_alpha_is_a_narrower_interval(sample, one, other):
    wide, narrow = (interval(sample, alpha / 100) for alpha in sorted((one, other)))
    assert wide[0] <= narrow[0] + 1e-9 and narrow[1] <= wide[1] + 1e-9


@few
@given(samples, margins, alphas)
def test_models_exchanged(sample, m, alpha):
    assert interval(mirrored(sample), alpha) == pytest.approx([-end for end in reversed(interval(sample, alpha))], abs=1e-12)
    if sample.low < m < sample.high:
        assert p_below(sample, m) + p_above(sample, m) == pytest.approx(1)
        assert p_above(sample, m) == pytest.approx(p_below(mirrored(sample), -m))
        assert (p_below(sample, m) < 0.5) == (statistic(sample, m) < 0)


@few
@given(samples, alphas)
def test_every_cluster_twice(sample, alpha):
    low, high = interval(sample, alpha)
    twice = Sample(np.tile(sample.totals, 2), np.tile(sample.sizes, 2), sample.low, sample.high, sample.exact)
    assert (twice.mean, twice.effective) == (pytest.approx(sample.mean), pytest.approx(2 * sample.effective))
    closer = interval(twice, alpha)
    assert low - 1e-9 <= closer[0] and closer[1] <= high + 1e-9
    if sample.clusters > 1 and (low, high) != (sample.low, sample.high):  # of one cluster nothing is known, nor of two alike
        assert closer[1] - closer[0] < high - low


@settings(deadline=None)
@given(rows, st.randoms(use_true_random=False), margins)
def test_neither_order_nor_names_count(drawn, random, m):
    found = statistic(clustered(drawn), m)
    names = random.sample(range(100), 10)
    renamed = [(value, names[label]) for value, label in drawn]
    random.shuffle(renamed)
    assert statistic(clustered(renamed), m) == pytest.approx(found)
    assert p_below(clustered(renamed), m) == pytest.approx(p_below(clustered(drawn), m))


@few
@given(st.lists(st.integers(-1, 1), min_size=1, max_size=30), st.booleans(), alphas)
def test_labels_that_all_differ_are_no_labels(values, yes_no, alpha):
    labelled = make_sample(values, [str(number) for number in range(len(values))], yes_no)
    assert labelled.exact == yes_no and interval(labelled, alpha) == interval(make_sample(values, None, yes_no), alpha)


@few
@given(st.lists(st.integers(-1, 1), min_size=2, max_size=30), st.integers(2, 7), alphas)
def test_copies_of_a_row_say_no_more_than_the_row(values, times, alpha):
    alone = make_sample(values)  # Student's t: clusters never have Tango's own form
    copied = make_sample(np.repeat(values, times), np.repeat(np.arange(len(values)), times).tolist(), yes_no=True)
    assert copied.effective == pytest.approx(len(values)) and not copied.exact
    assert interval(copied, alpha) == pytest.approx(interval(alone, alpha), abs=1e-9)


# -- Error rates and power, simulated --------------------------------------------------------------------------------------------

TRIALS = 20_000


@pytest.mark.parametrize(
    ("y", "sizes", "groups", "exact"),
    [
        ((1, 0, -1), (1, 1, 1), ((300, (0.22, 0.61, 0.17)),), True),
        ((0.75, 0, -0.25), (1, 1, 1), ((200, (0.17, 0.52, 0.31)),), False),
        ((5, 0, -5), (5, 5, 5), ((200, (0.22, 0.61, 0.17)),), False),
        ((1, 0, -1, 2, 0, -2), (1, 1, 1, 2, 2, 2), ((150, (0.22, 0.61, 0.17)), (150, (0.22, 0.61, 0.17))), False),
    ],
    ids=["yes-no", "fractions", "clusters", "unequal clusters"],
)
def test_a_true_hypothesis_is_rejected_at_alpha(y, sizes, groups, exact):
    """20 % more or less variance would give 0.071 or 0.033: the standard error of 20,000 trials is 0.0015."""
    rng, y, sizes = np.random.default_rng(7), np.array(y, float), np.array(sizes, float)
    m = groups[0][1] @ y[:3] / sizes[0]
    assert m == pytest.approx(0.05)
    counts = np.concatenate([rng.multinomial(units, shares, TRIALS) for units, shares in groups], axis=-1)
    found = statistics(y - m * sizes, sizes, counts, (-1 - m) * sizes.max(), (1 - m) * sizes.max(), exact)
    units = np.repeat([sizes[3 * group] for group in range(len(groups))], [units for units, _ in groups])
    limit = quantile(Sample(units, units, -1.0, 1.0, exact), 0.05)
    assert 0.04 < (found <= -limit).mean() < 0.058 and 0.04 < (found >= limit).mean() < 0.058


@pytest.mark.parametrize(("b", "c", "n", "m"), [(10, 10, 100, 0.05), (5, 5, 100, 0.02), (20, 20, 100, 0.05), (2, 4, 100, 0.05), (6, 12, 100, 0)])
def test_power_at_the_units_needed(b, c, n, m):
    needed = math.ceil(units_needed(paired(b, c, n), m, 0.05, 0.8))
    counts = np.random.default_rng(1).multinomial(needed, [b / n, c / n, 1 - (b + c) / n], TRIALS)
    shown = statistics(np.array([1.0, -1.0, 0.0]) - m, 1.0, counts, -1 - m, 1 - m, True) <= -quantile(paired(0, 0, 1), 0.05)
    assert 0.77 < shown.mean() < 0.86


@pytest.mark.parametrize("sizes", [(4,), (1, 16)])
def test_power_at_the_clusters_needed(sizes):
    """Clusters of rows that are all alike, as many of each size; what is needed counts clusters as uneven as there are."""
    units = [(size * value, size) for size in sizes for value in (1, -1, *[0] * 8)]
    totals, lengths = np.array(units, float).T
    sample, m = Sample(totals, lengths, -1.0, 1.0, exact=False), 0.05
    needed = math.ceil(units_needed(sample, m, 0.05, 0.8))
    counts = np.random.default_rng(2).multinomial(needed, np.full(len(units), 1 / len(units)), 4000)
    scores = statistics(totals - m * lengths, lengths, counts, (-1 - m) * max(sizes), (1 - m) * max(sizes), False)
    assert 0.76 < (scores <= -quantile(sample, 0.05) + 0.08).mean() < 0.86  # 1.645 + 0.08: t of 19, of hundreds in truth


def test_units_needed_by_hand():
    z = stats.norm.isf(0.05)
    for margin in (0.02, 0.05):  # never different: the upper end of the interval, z^2 / (n + z^2), is to reach the margin
        assert units_needed(paired(0, 0, 30), margin, 0.05, 0.8) == pytest.approx(z * z * (1 - margin) / margin)
    # 30 of 100 rows turned over evenly: variance 0.3, and under m that of the closed form
    under = ((0 - 100 * 0.05) / tango(15, 15, 100, 0.05)) ** 2 / 100
    expected = ((z * math.sqrt(under) + stats.norm.ppf(0.8) * math.sqrt(0.3)) / 0.05) ** 2
    assert units_needed(paired(15, 15, 100), 0.05, 0.05, 0.8) == pytest.approx(expected)
    for b in (5, 15, 25):
        assert units_needed(paired(b, 30 - b, 100), 0.05, 0.05, 0.8, even=True) == pytest.approx(expected)
    # Fractions whose own variance, 3/64, is larger than the 0.04 under m (test_fractions_by_hand)
    both = z + stats.norm.ppf(0.8)
    assert units_needed(make_sample([0] * 6 + [-0.5] * 2), -0.1, 0.05, 0.8) == pytest.approx((both / 0.025) ** 2 * 3 / 64)


def test_no_number_of_units_shows_what_is_not_so():
    assert units_needed(paired(5, 0, 100), 0.05, 0.05, 0.8) == math.inf
    assert units_needed(paired(6, 0, 100), 0.05, 0.05, 0.8) == math.inf
    assert units_needed(paired(0, 0, 100), 0, 0.05, 0.8) == math.inf
    assert 1e4 < units_needed(paired(49, 0, 1000), 0.05, 0.05, 0.8) < math.inf
