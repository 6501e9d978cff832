"""Score tests and intervals for the mean of bounded values: yes-no answers, fractions, their paired differences, and clusters of them.

One method for all of them: the mean is tested against a value m by its distance from m, over the standard error that holds if m
is true. The variance under m is that of the nonparametric maximum-likelihood distribution with mean m on the values that were
seen and the two ends of the scale (Owen, Empirical Likelihood, 2001, ch. 2; the ends keep it honest where few values differ).

- yes-no values, 0 or 1: this is Wilson's interval (JASA 22, 1927);
- differences of paired yes-no values, -1, 0 or 1: it is Tango's (Statistics in Medicine 17:891-908, 1998), whose restricted
  maximum-likelihood estimate this generalizes;
- fractions, and clusters: the same with Student's t in place of the normal distribution and the larger of the variance under m and
  the sample's own, which keeps the error near or below alpha in small samples (measured: benchmarks/decision_error_rates.py).

Clusters are the units: y_g = sum over the cluster's rows of (value - m), so that rows which go together count once. The mean is
still over rows.
"""

import hashlib
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Sample:
    """Values between `low` and `high` as clusters: `totals` and `sizes` (rows), both of shape (clusters,).

    `exact` says that Wilson's and Tango's own forms hold: values on the ends and in the middle of the scale only, each row a cluster.
    """

    totals: np.ndarray
    sizes: np.ndarray
    low: float
    high: float
    exact: bool

    @property
    def rows(self) -> int:
        return int(self.sizes.sum())

    @property
    def clusters(self) -> int:
        return len(self.sizes)

    @property
    def effective(self) -> float:
        """How many clusters of equal size would say as much: (sum of sizes)^2 / sum of squared sizes (Kish, 1965)."""
        return float(self.sizes.sum() ** 2 / (self.sizes**2).sum())

    @cached_property
    def key(self) -> tuple[bytes, float, float, bool]:
        """Equal for samples of the same clusters in the same order."""
        return hashlib.sha256(self.totals.tobytes() + self.sizes.tobytes()).digest(), self.low, self.high, self.exact

    @cached_property
    def mean(self) -> float:
        return float(self.totals.sum() / self.sizes.sum())

    @cached_property
    def counted(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(totals, sizes, how many): clusters that are alike, once."""
        units, counts = np.unique(self.totals + 1j * self.sizes, return_counts=True)  # far sooner than along an axis
        return units.real, units.imag, counts


def make_sample(
    values: Sequence[float], labels: Sequence[Hashable] | None = None, yes_no: bool = False, paired: bool = True
) -> Sample:
    """Values, one a row, with the label of each row's cluster (None: every row is its own).

    `paired`: differences, -1..1; else 0..1. `yes_no`: nothing but 0 and 1 was measured.

    Raises:
        ValueError: no values, values outside the scale, or as many labels as not.
    """
    given, low = np.asarray(values, dtype=float), -1.0 if paired else 0.0
    if not len(given) or not (np.isfinite(given).all() and given.min() >= low and given.max() <= 1):
        raise ValueError(f"the values must be one or more numbers from {low:g} to 1")
    if labels is None:
        return Sample(given, np.ones(len(given)), low, 1.0, exact=yes_no)
    if len(labels) != len(given):
        raise ValueError(f"{len(given)} values and {len(labels)} labels")
    numbers: dict[Hashable, int] = {}
    index = np.array([numbers.setdefault(label, len(numbers)) for label in labels])
    sizes = np.bincount(index).astype(float)
    return Sample(np.bincount(index, given), sizes, low, 1.0, exact=yes_no and len(sizes) == len(given))


def tilted_variance(
    y: np.ndarray, counts: np.ndarray, low: np.ndarray | float, high: np.ndarray | float
) -> np.ndarray:
    """Variance under the maximum-likelihood distribution of mean 0 on the values y and the two ends low < 0 < high.

    `y` has shape (units,) or (..., units), `counts` (..., units): how often each value was seen, of one sample or of many at once; the
    ends may be one for each sample. By Lagrange the
    weight of a value is its share / (1 + multiplier * y). Where no multiplier gives mean 0, what is missing lies on one end.
    """
    share = counts / counts.sum(-1, keepdims=True)
    inside = 1 - 1e-12  # a value on the very end would divide by zero
    multiplier = _multiplier(y, share, -inside / high, -inside / low)
    weights = share / (1 + multiplier[..., None] * y)
    mean = (weights * y).sum(-1)  # 0 but where the multiplier is a bound
    return (weights * y * y).sum(-1) - mean * np.where(mean < 0, high, low)


def _multiplier(y: np.ndarray, share: np.ndarray, least: np.ndarray | float, most: np.ndarray | float) -> np.ndarray:
    """Where the mean of y under the tilted weights is 0, to the last bits, shape (...); the nearer bound where it is nowhere between them.

    The mean falls as the multiplier rises, from one pole to another. Newton's steps are those of the mean times the distances from the
    poles of the outermost values: of two values that is a line. A step that leaves the bracket, or is more than half of the one before, is
    to the bracket's middle instead.
    """
    least, most = (np.broadcast_to(bound, share.shape[:-1]) for bound in (least, most))
    at_least, at_most = ((share * (y / (1 + bound[..., None] * y))).sum(-1) for bound in (least, most))
    low, high = np.where(at_most >= 0, most, least), np.where(at_least <= 0, least, most)
    here, before = np.clip(0.0, low, high), high - low
    close = 1e-16 * (most - least)
    for _ in range(128):  # some 6 are needed; of halvings alone 64 reach the last bit
        ratios = y / (1 + here[..., None] * y)
        shares = share * ratios
        mean, slope = shares.sum(-1), (shares * ratios).sum(-1)
        above = mean > 0
        low, high = np.where(above, here, low), np.where(above, high, here)
        slope = slope - mean * (ratios.min(-1) + ratios.max(-1))
        step = mean / np.where(slope > 0, slope, np.inf)
        size = np.abs(step)
        still = (slope > 0) & ((size <= close) | (size > before / 2) & (before <= 1000 * close))  # no nearer: what is left is rounding
        found = (np.abs(mean) <= 1e-15 * np.abs(shares).sum(-1)) | (high - low <= close) | still
        if found.all():
            break
        wild = (slope <= 0) | (here + step <= low) | (here + step >= high) | (size > before / 2)
        step = np.where(found, 0.0, np.where(wild, (low + high) / 2 - here, step))
        here, before = here + step, np.abs(step)
    return here


def statistics(
    y: np.ndarray, sizes: np.ndarray | float, counts: np.ndarray, low: float, high: float, exact: bool
) -> np.ndarray:
    """The signed scores of one sample or of many, shapes as `tilted_variance`: below 0 where the mean of y is.

    The sample's own variance is around the mean per row, that of a ratio (Cochran, Sampling Techniques, 1977, ch. 6): the same for
    every m, so that the score falls as m rises. Around the mean of y it would not, where sizes differ, and the interval not be the test's.
    """
    units = counts.sum(-1)
    mean = (counts * y).sum(-1) / units
    variance = tilted_variance(y, counts, low, high)
    if not exact:
        per_row = mean / ((counts * sizes).sum(-1) / units)
        spread = (counts * (y - sizes * per_row[..., None]) ** 2).sum(-1)
        variance = np.maximum(variance * units, spread) / np.maximum(units - 1, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.abs(mean) < 1e-15, 0.0, mean / np.sqrt(variance / units))


def _deviations(sample: Sample, m: float) -> tuple[np.ndarray, np.ndarray, float, float]:
    """What `tilted_variance` takes: each unit's sum of (value - m), how often, and the ends of the scale for it.

    An end is a cluster of nothing but the scale's end, as large as that of two rows drawn at random from one cluster: at the mean
    size rare large clusters would pass too often, at the largest hardly anything (benchmarks/decision_error_rates.py has unequal ones).
    """
    totals, sizes, counts = sample.counted
    y, typical = totals - m * sizes, (counts * sizes**3).sum() / (counts * sizes**2).sum()
    return y, counts, min((sample.low - m) * typical, y.min()), max((sample.high - m) * typical, y.max())


def statistic(sample: Sample, m: float) -> float:
    """The signed score of the mean against m, which is inside the scale. About standard normal, or Student's t, if m is true."""
    y, counts, low, high = _deviations(sample, m)
    return float(statistics(y, sample.counted[1], counts, low, high, sample.exact))


def degrees(sample: Sample) -> float:
    """Degrees of freedom of `statistic`: infinite where it is normal, else effective clusters less one."""
    return math.inf if sample.exact else max(sample.effective - 1, 1.0)


def quantile(sample: Sample, alpha: float) -> float:
    """What the statistic exceeds with probability `alpha` under the null hypothesis, for alpha < 0.5."""
    from scipy.special import ndtri, stdtrit

    df = degrees(sample)
    return float(-ndtri(alpha) if math.isinf(df) else -stdtrit(df, alpha))


def p_below(sample: Sample, m: float) -> float:
    """One-sided p-value of "the mean is m or more": small where the mean is shown to lie below m."""
    from scipy.special import ndtr, stdtr

    if not sample.low < m < sample.high:
        return 0.0 if sample.mean < m else 1.0
    df, value = degrees(sample), statistic(sample, m)
    return float(ndtr(value) if math.isinf(df) else stdtr(df, value))


def p_above(sample: Sample, m: float) -> float:
    """One-sided p-value of "the mean is m or less": small where the mean is shown to lie above m."""
    return p_below(mirrored(sample), -m)


def mirrored(sample: Sample) -> Sample:
    """The same values with the opposite sign: of paired differences, the models exchanged."""
    return Sample(-sample.totals, sample.sizes, -sample.high, -sample.low, sample.exact)


def interval(sample: Sample, alpha: float, high_alpha: float | None = None) -> tuple[float, float]:
    """Two-sided interval of level 1 - 2 alpha: every m that neither one-sided test rejects at `alpha`, the upper end's test at
    `high_alpha` where that is given."""
    return -_upper(mirrored(sample), alpha), _upper(sample, high_alpha or alpha)


_uppers: dict[tuple, float] = {}  # one comparison asks for the same ends again and again: by each matcher, rule and question
MOST_KNOWN = 10_000


def _upper(sample: Sample, alpha: float) -> float:
    key = (*sample.key, alpha)
    if key not in _uppers:
        if len(_uppers) >= MOST_KNOWN:
            _uppers.clear()
        _uppers[key] = _find_upper(sample, alpha)
    return _uppers[key]


def _find_upper(sample: Sample, alpha: float) -> float:
    from scipy.optimize import brentq

    limit, top = quantile(sample, alpha), sample.high - 1e-9

    def above(m: float) -> float:
        return max(statistic(sample, m), -1e6) + limit

    start = max(sample.mean, sample.low + 1e-9)
    if start >= top or above(top) >= 0:
        return sample.high
    if above(start) <= 0:  # every value is the low end, and alpha is nearly 0.5
        return start
    return float(brentq(above, start, top, xtol=1e-13, rtol=1e-13))


def units_needed(sample: Sample, m: float, alpha: float, power: float, even: bool = False) -> float:
    """How many units would show with probability `power` that the mean lies below m, if the truth is as the sample looks.

    `even`: if it is so with the mean at 0, the values turned over evenly (as many rows better as worse). The usual formula for two
    points, with the variance under m and the sample's own: ((z_alpha sigma_0 + z_power sigma_1) / (m - mean))^2. Infinite where the
    mean is not below m. Units are clusters of the sizes that there are. A result below some 150 is more than
    needed (in simulations the power was up to 0.95 where 0.8 was asked for).
    """
    from scipy.special import ndtri

    if even:
        both = np.concatenate([sample.totals, -sample.totals]), np.tile(sample.sizes, 2)
        sample = Sample(*both, sample.low, sample.high, sample.exact)
    if sample.mean >= m:
        return math.inf
    totals, sizes, counts = sample.counted
    spread = float((counts * (totals - sample.mean * sizes) ** 2).sum() / counts.sum())
    under = float(tilted_variance(*_deviations(sample, m)))
    needed = -ndtri(alpha) * math.sqrt(under if sample.exact else max(under, spread)) + ndtri(power) * math.sqrt(spread)
    return float((needed / ((m - sample.mean) * sample.rows / sample.clusters)) ** 2)
