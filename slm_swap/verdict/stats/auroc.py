"""How well a number tells right rows from wrong ones: the area under the ROC curve with its interval, and the risk-coverage curve.

The area (AUROC) is the chance that a right row has a larger number than a wrong one, ties counted half: Mann and Whitney's U over the
number of pairs. Its interval is Newcombe's (Statistics in Medicine 25:559-573, 2006, method 5): every area that is no further from the
measured one than its own standard error allows, by Hanley and McNeil's variance with the mean of both sample sizes. Unlike DeLong's it
has its level where few rows are wrong, and does not shrink to a point where the two do not overlap. That variance holds for smooth
distributions: it is scaled up where the sample's own is larger, which is DeLong's (Biometrics 44:837-845, 1988), and of rows that belong
together Obuchowski's for clusters (Biometrics 53:567-578, 1997), and Student's t is taken for the normal distribution, with as many degrees
of freedom as the rarer kind has rows or clusters, less one.
"""

import math
from array import array
from collections.abc import Hashable, Sequence

import numpy as np

POINTS = 64  # of a risk-coverage curve, at most


def auroc(
    values: Sequence[float], right: Sequence[bool], labels: Sequence[Hashable] | None = None, alpha: float = 0.05
) -> tuple[float, tuple[float, float]] | None:
    """(area, interval of level 1 - alpha) of finite values, one a row, with the label of each row's cluster (None: every row is its own).

    None where all rows are right or all are wrong.
    """
    given, good = np.asarray(values, dtype=float), np.asarray(right, dtype=bool)
    counts = int(good.sum()), int((~good).sum())
    if 0 in counts:
        return None
    # of each row, the share of the other kind's rows that it is on the right side of; ranks without those among its own kind
    ranks, own = mean_ranks(given), np.empty(len(given))
    own[good], own[~good] = mean_ranks(given[good]), mean_ranks(given[~good])
    placed = np.where(good, (ranks - own) / counts[1], 1 - (ranks - own) / counts[0])
    area = float(placed[good].mean())
    alone = np.arange(len(given))
    cluster = alone if labels is None else cluster_numbers(labels)
    clusters = [_count(cluster[kind]) for kind in (good, ~good)]
    spread = _variance(placed - area, good, alone)
    if labels is not None:
        spread = max(spread, _variance(placed - area, good, cluster))
    if spread == 0:  # nothing overlaps: what the rows of a cluster share is not to be seen, and may be all
        counts = clusters[0], clusters[1]
    return area, interval(area, *counts, alpha, spread, max(1, min(clusters) - 1))


def mean_ranks(values: np.ndarray) -> np.ndarray:
    """The ranks of finite values, from 1 on; equal ones have the mean of theirs. What scipy.stats.rankdata gives: every evaluation would wait
    for scipy.stats, which imports all distributions."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def cluster_numbers(labels: Sequence[Hashable]) -> np.ndarray:
    """A number from 0 on for each label: the same for equal ones, however labels are written."""
    given = labels if isinstance(labels, np.ndarray | array) else [hash(label) for label in labels]
    return np.unique(np.asarray(given), return_inverse=True)[1]


def _count(cluster: np.ndarray) -> int:
    """How many clusters there are."""
    return len(np.unique(cluster))


def _spread(deviations: np.ndarray, cluster: np.ndarray) -> float:
    """The variance of the mean of deviations whose sums by cluster are independent."""
    sums = np.bincount(cluster, deviations)
    count = _count(cluster)
    return float((sums**2).sum() * count / (count - 1) / len(deviations) ** 2) if count > 1 else 0.0


def _variance(deviations: np.ndarray, good: np.ndarray, cluster: np.ndarray) -> float:
    """The sample's own variance: that of both kinds, and twice their covariance, as a cluster may have rows of both.

    Infinite where several rows of a kind are all in one cluster: how clusters differ is not to be seen.
    """
    count = int(cluster.max()) + 1
    if any(kind.sum() > 1 and _count(cluster[kind]) < 2 for kind in (good, ~good)):
        return math.inf
    sums = [np.bincount(cluster[kind], deviations[kind], minlength=count) / kind.sum() for kind in (good, ~good)]
    alone = sum(_spread(deviations[kind], cluster[kind]) for kind in (good, ~good))
    return float(alone + 2 * (sums[0] * sums[1]).sum() * count / max(count - 1, 1))


def interval(area: float, right: int, wrong: int, alpha: float, variance: float = 0.0, df: float = math.inf) -> tuple[float, float]:
    """Newcombe's interval for an area between so many right and wrong rows; the variance at the area itself is at least `variance`, and the
    quantile is Student's with `df` degrees of freedom."""
    from scipy.optimize import brentq
    from scipy.special import ndtri, stdtrit

    if math.isinf(variance):
        return 0.0, 1.0
    z, mean = -float(ndtri(alpha / 2) if math.isinf(df) else stdtrit(df, alpha / 2)), (right + wrong) / 2 - 1

    def smooth(true: float) -> float:
        return true * (1 - true) * (1 + mean * ((1 - true) / (2 - true) + true / (1 + true))) / (right * wrong)

    scale = max(1.0, variance / smooth(area)) if 0 < area < 1 else 1.0

    def reach(true: float) -> float:
        return z * math.sqrt(scale * smooth(true))

    least, most = 1e-12, 1 - 1e-12  # at 0 and 1 themselves the standard error is 0, and they would solve their own equation
    low = brentq(lambda true: area - true - reach(true), least, min(area, most)) if area > 1e-9 else 0.0
    high = brentq(lambda true: true - area - reach(true), max(area, least), most) if area < 1 - 1e-9 else 1.0
    return float(low), float(high)


def risk_coverage(values: Sequence[float], right: Sequence[bool]) -> list[tuple[float, float]]:
    """(coverage, risk) for falling thresholds: the share of rows whose value is at least that, and the share of these that is wrong.

    Rows of one value are answered together. Of more than POINTS thresholds some are left out, never the last, at which all is answered.
    """
    given = np.asarray(values, dtype=float)
    order = np.argsort(-given, kind="stable")
    wrong = np.cumsum(~np.asarray(right, dtype=bool)[order])
    ends = np.flatnonzero(np.append(np.diff(given[order]) != 0, True))
    if len(ends) > POINTS:  # evenly over the coverage: many thresholds may lie in one place
        wanted = np.linspace(0, len(given) - 1, POINTS)
        ends = np.unique(ends[np.searchsorted(ends, wanted)])
    return [(round(float((end + 1) / len(given)), 6), round(float(wrong[end] / (end + 1)), 6)) for end in ends]
