"""Tests and intervals that hold at every moment of a run: look after every row, stop whenever it suits, and the error rate stays.

Testing by betting, after Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting" (JRSS B 86, 2024),
their diversified Kelly bets (dKelly). A row's difference D is azure's score less the small model's, -1..1. Against the hypothesis
that the mean difference is at least m, one unit of money is spread evenly over the BETS g, and each part is multiplied by

    1 + g y / (M (1 - m)),    y = sum of (m - D) over the rows of a cluster,    M = the rows of the largest cluster

at every cluster. Rows of one cluster are not independent, so a whole cluster is one bet. y is at least -M (1 - m), so no part is
ever below nothing; where the hypothesis is true, no bet is expected to win, and by Ville's inequality the wealth ever reaches
1 / alpha with a probability of at most alpha. Wealth grows with m, so the values of m that are not rejected are an interval.

It takes clusters that come in random order (`random_clusters`), one sample of the work that the models are to do. Arrays only;
totals (..., clusters) are the sums of D over each cluster's rows, sizes (clusters,) how many rows it has.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Literal

import numpy as np

from slm_swap.verdict.stats import MIN_CLUSTERS
from slm_swap.verdict.stats.multiple import holm

# The best bet is about the mean of y / M over its variance. Powers of two from near 1 (few rows differ) to 0.03 (margin 0.02 and
# more than 40% of rows differ): one of them is within a factor of 1.4 of the best and grows at least 0.8 times as fast. More of
# them would leave each with less money.
BETS = 0.96 * 0.5 ** np.arange(6)
STEPS_PER_UNIT = 10_000  # an interval's ends are multiples of 0.0001


def random_clusters(groups: Sequence[str | None], seed: int) -> list[list[int]]:
    """The rows' indices, cluster by cluster in random order; a row without a group is a cluster of its own."""
    members: dict[str | int, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(index if group is None else group, []).append(index)
    clusters = list(members.values())
    Random(seed).shuffle(clusters)
    return clusters


def log_wealth(deviations: np.ndarray, bound: float) -> np.ndarray:
    """The running logarithm of the wealth, of the shape of `deviations` (..., clusters), each at least -bound."""
    parts = np.multiply.outer(BETS, deviations / bound)
    np.cumsum(np.log1p(parts, out=parts), axis=-1, out=parts)
    most = parts.max(axis=0)
    return most + np.log(np.exp(parts - most).mean(axis=0))


def log_wealth_below(totals: np.ndarray, sizes: np.ndarray, m: float, largest: int) -> np.ndarray:
    """The evidence that the mean difference is below m: the running log wealth against "at least m", -1 < m < 1."""
    return log_wealth(sizes * m - totals, largest * (1 - m))


def log_wealth_above(totals: np.ndarray, sizes: np.ndarray, m: float, largest: int) -> np.ndarray:
    """The evidence that the mean difference is above m: the same with the models swapped."""
    return log_wealth_below(-totals, sizes, -m, largest)


def crossing(running: np.ndarray, alpha: float) -> np.ndarray:
    """After how many clusters the wealth first reached 1 / alpha, inf where it never did: (..., clusters) to (...)."""
    reached = running >= -math.log(alpha)
    return np.where(reached.any(axis=-1), reached.argmax(axis=-1) + 1, math.inf)


def confidence_sequence(
    totals: np.ndarray, sizes: np.ndarray, alpha: float, largest: int, looks: Sequence[int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) for the mean difference after each cluster, or after `looks` clusters: two arrays that never widen.

    Each end is right at all times at once except with a probability of alpha, both for 2 alpha. An end is the value nearest to the
    middle (of those 0.0001 apart) that has ever been rejected; -1 and 1 where none has. Where low > high no value is left: the
    clusters did not come in random order, or this is one of those 2 alpha.
    """
    looks = range(1, len(sizes) + 1) if looks is None else looks
    high = _rejected_above(totals, sizes, alpha, largest, looks)
    return 0.0 - _rejected_above(-totals, sizes, alpha, largest, looks), high  # no -0.0


def _rejected_above(totals: np.ndarray, sizes: np.ndarray, alpha: float, largest: int, looks: Sequence[int]) -> np.ndarray:
    steps = range(1 - STEPS_PER_UNIT, STEPS_PER_UNIT)

    @cache
    def rejected_at(step: int) -> float:  # never later for a larger step
        return float(crossing(log_wealth_below(totals, sizes, step / STEPS_PER_UNIT, largest), alpha))

    found = [bisect_left(steps, True, key=lambda step: rejected_at(step) <= look) for look in looks]
    return (np.array(found) + steps.start) / STEPS_PER_UNIT


@dataclass(frozen=True)
class Evidence:
    """What the rows so far say of one metric's mean difference (azure - slm).

    `interval` has the level 1 - 2 alpha. The p-values are 1 / the largest wealth so far, at most 1, and hold at any time:
    `p_value` against "at least delta" (small: not inferior), `p_worse` against "at most delta" (small: worse), `p_worse_holm` adjusted
    for the number of metrics. `below_at` and `above_at`: the rows after which that was shown, None where it was not.
    """

    interval: tuple[float, float]
    p_value: float
    p_worse: float
    p_worse_holm: float
    below_at: int | None
    above_at: int | None


@dataclass(frozen=True)
class SequentialVerdict:
    """The verdict and the rows and clusters after which it was certain, None where it is not."""

    verdict: Literal["SWAP", "FINE_TUNE", "NEED_MORE_DATA"]
    rows: int | None
    clusters: int | None
    metrics: dict[str, Evidence]


def sequential_verdict(
    differences: dict[str, np.ndarray], sizes: Sequence[int], *, delta: float, alpha: float, largest: int
) -> SequentialVerdict:
    """The first verdict that a run came to when it was looked at after every cluster.

    SWAP once every metric has been shown, each at level alpha, to be below `delta` (an intersection-union test), on at least
    MIN_CLUSTERS clusters; FINE_TUNE once one of k metrics has been shown, at level alpha / k, to be above it. Each is wrong with a
    probability of at most alpha, however often and whenever one looks. What comes first stays; at the same cluster, FINE_TUNE.

    Args:
        differences: for each metric azure's score less the small model's, (rows,), -1..1, in the order in which the rows were
            answered, the rows of a cluster together.
        sizes: the rows of each cluster, in that order.
        delta: the non-inferiority margin, 0 <= delta < 1.
        alpha: 0 < alpha < 1.
        largest: the rows of the largest cluster that the run could meet, known before it began.

    Raises:
        ValueError: no rows, or something is outside of what is said here.
    """
    sizes = np.asarray(sizes)
    if not (0 <= delta < 1 and 0 < alpha < 1):
        raise ValueError(f"delta {delta} must be in [0, 1) and alpha {alpha} in (0, 1)")
    if not len(sizes) or sizes.min() < 1 or sizes.max() > largest:
        raise ValueError(f"clusters must have 1 to {largest} rows, and there must be some")
    values = {name: np.asarray(rows, float) for name, rows in differences.items()}
    if not values or any(rows.shape != (sizes.sum(),) or not (abs(rows) <= 1).all() for rows in values.values()):
        raise ValueError(f"differences must be {sizes.sum()} numbers from -1 to 1 for each metric")
    ends, looks = np.cumsum(sizes), [len(sizes)]
    below, above, evidence = {}, {}, {}
    for name, rows in values.items():
        totals = np.add.reduceat(rows, ends - sizes)
        against, towards = (side(totals, sizes, delta, largest) for side in (log_wealth_below, log_wealth_above))
        below[name], above[name] = float(crossing(against, alpha)), float(crossing(towards, alpha / len(values)))
        low, high = confidence_sequence(totals, sizes, alpha, largest, looks)
        evidence[name] = (low[0], high[0]), _p_value(against), _p_value(towards)
    adjusted = holm({name: p_worse for name, (_, _, p_worse) in evidence.items()})

    def rows_at(clusters: float) -> int | None:
        return None if math.isinf(clusters) else int(ends[int(clusters) - 1])

    metrics = {
        name: Evidence((float(low), float(high)), p_value, p_worse, adjusted[name], rows_at(below[name]), rows_at(above[name]))
        for name, ((low, high), p_value, p_worse) in evidence.items()
    }
    swap, fine_tune = max(*below.values(), MIN_CLUSTERS), min(above.values())
    if swap > len(sizes):
        swap = math.inf
    certain = min(swap, fine_tune)
    if math.isinf(certain):
        return SequentialVerdict("NEED_MORE_DATA", None, None, metrics)
    return SequentialVerdict("FINE_TUNE" if fine_tune <= swap else "SWAP", rows_at(certain), int(certain), metrics)


def _p_value(running: np.ndarray) -> float:
    return math.exp(-max(0.0, float(running.max())))
