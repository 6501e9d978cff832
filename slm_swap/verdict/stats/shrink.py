"""Means of many small groups, shrunk towards their common mean: an empirical-Bayes random-effects model.

A group's mean is normal around its own true mean with variance s^2 / rows, and the true means are normal around a common mean with
variance tau^2. s^2 is the rows' variance within groups, tau^2 DerSimonian and Laird's moment estimate (Controlled Clinical Trials
7:177-188, 1986). A group's estimate lies between its own mean and the common one, the nearer to the common one the fewer its rows
(Efron and Morris, JASA 70, 1975). Its interval counts the common mean's own error too, but takes s and tau as known: in simulations
(3 to 40 groups of 5 to 20 rows) those of level 0.95 held the true mean in 0.84 to 0.96. They show where to look; no verdict uses them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """One group's own mean, the shrunk one, and the shrunk one's interval."""

    raw: float
    shrunk: float
    low: float
    high: float


@dataclass(frozen=True)
class Shrunk:
    """The common mean, the standard deviation between groups, and each group's estimate in the order given."""

    mean: float
    between_sd: float
    groups: list[Estimate]


def shrink(groups: Sequence[Sequence[float]], alpha: float, low: float = -1.0, high: float = 1.0) -> Shrunk:
    """Shrink the groups' means; intervals of level 1 - 2 alpha, cut at the scale's ends `low` and `high`.

    Raises:
        ValueError: no groups, or an empty one.
    """
    from scipy.special import ndtri

    if not groups or not all(len(group) for group in groups):
        raise ValueError("every group needs at least one value")
    sizes = np.array([len(group) for group in groups], dtype=float)
    means = np.array([sum(group) / len(group) for group in groups])
    every = np.concatenate([np.asarray(group, dtype=float) for group in groups])
    inside = sum(float(((np.asarray(group) - mean) ** 2).sum()) for group, mean in zip(groups, means, strict=True))
    # One value's worth of the whole variance is added: groups of equal values do not make the rows free of noise.
    within = (inside + float(every.var())) / (len(every) - len(groups) + 1)
    if within == 0:
        return Shrunk(float(means[0]), 0.0, [Estimate(*[float(mean)] * 4) for mean in means])
    weights = sizes / within
    spread = float((weights * (means - np.average(means, weights=weights)) ** 2).sum()) - (len(groups) - 1)
    between = max(0.0, spread / float(weights.sum() - (weights**2).sum() / weights.sum())) if len(groups) > 1 else 0.0
    weights = 1 / (between + within / sizes)
    common = float(np.average(means, weights=weights))
    kept = between / (between + within / sizes)  # how much of a group's own deviation is believed
    shrunk = common + kept * (means - common)
    errors = np.sqrt(kept * within / sizes + (1 - kept) ** 2 / weights.sum())
    reach = -float(ndtri(alpha)) * errors
    return Shrunk(
        common,
        math.sqrt(between),
        [
            Estimate(float(mean), float(estimate), max(low, float(estimate - wide)), min(high, float(estimate + wide)))
            for mean, estimate, wide in zip(means, shrunk, reach, strict=True)
        ],
    )
