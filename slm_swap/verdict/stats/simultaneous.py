"""Intervals for many groups' mean differences that hold for all groups at once, and a test of "the groups do not differ".

Whoever looks at the group shown worst has selected it. An interval that is right for one group named before is then wrong too often,
one that holds for all groups at once is not. Each group's interval has the level 1 - 2 alpha / K (Bonferroni over K groups).

A row's difference lies in -1..1: its positive part counts for azure, its negative part for the small model. Each part's mean gets
Clopper and Pearson's exact limits (Biometrika 26, 1934), and the two are put together by squares (MOVER: Zou and Donner, Statistics in
Medicine 27, 2008), with the correlation of a multinomial at its upper limits, the largest that the rows leave possible. On yes-no rows
no end was missed more often than its level, by enumeration of every outcome of 1 to 150 rows (benchmarks/results/worst_tools.json). A
fraction is treated as that part of a yes-no row, which varies more. A group of one to three rows gets a wide interval: it says little.
"""

from collections.abc import Sequence

import numpy as np

FLIPS, AT_ONCE = 1000, 2_000_000  # draws of the test, and numbers in memory at a time


def intervals(groups: Sequence[Sequence[float]], alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) of each group's mean difference, arrays of shape (groups,): all are right at once with probability 1 - 2 alpha.

    The rows are independent and -1..1.
    """
    rows = np.array([len(group) for group in groups], dtype=float)
    up = np.array([sum(max(value, 0.0) for value in group) for group in groups])
    down = np.array([sum(max(-value, 0.0) for value in group) for group in groups])
    return difference_limits(up, down, rows, alpha / len(groups))


def difference_limits(up: np.ndarray, down: np.ndarray, rows: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) for the mean of up - down, sums over `rows` rows: each end is missed with a probability of at most `alpha`."""
    up_low, up_high = _exact_limits(up, rows, alpha)
    down_low, down_high = _exact_limits(down, rows, alpha)
    left = (1 - up_high) * (1 - down_high)
    both = up_high * down_high
    correlation = np.where(up_high + down_high >= 1, 1.0, np.sqrt(both / np.where(left > 0, left, 1.0)))
    up, down = up / rows, down / rows

    def reach(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return np.sqrt(one**2 + other**2 + 2 * correlation * one * other)

    low, high = up - down - reach(up - up_low, down_high - down), up - down + reach(up_high - up, down - down_low)
    return np.maximum(low, -1.0), np.minimum(high, 1.0)


def _exact_limits(count: np.ndarray, rows: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    from scipy.special import betaincinv

    none, every = count < 1e-9, count > rows - 1e-9
    low = betaincinv(np.where(none, 1.0, count), rows - count + 1, alpha)
    high = betaincinv(count + 1, np.where(every, 1.0, rows - count), 1 - alpha)
    return np.where(none, 0.0, low), np.where(every, 1.0, high)


def p_same(groups: Sequence[Sequence[float]], seed: int = 0) -> float:
    """p-value of "the mean difference is the same in every group", 1 / (FLIPS + 1) to 1: small where the groups differ.

    The statistic is the sum of (total - rows * mean)^2 / (rows + mean rows of a group). It is compared with what it is when the sign of
    each row's difference is drawn at random (the wild bootstrap: Liu, Annals of Statistics 16, 1988). So hard and easy groups keep their
    own spread: groups that differ only in how hard they are do not pass for groups that differ. Around a mean m of 0 the signs are
    as likely either way, elsewhere the drawn spread is the larger one by m^2: the test errs to the safe side.
    """
    rows = np.array([len(group) for group in groups], dtype=float)
    every = np.concatenate([np.asarray(group, dtype=float) for group in groups])
    number = np.repeat(np.arange(len(groups)), rows.astype(int))
    cells, counts = np.unique(number + 1j * every, return_counts=True)  # alike rows of one group, once
    starts, values = np.searchsorted(cells.real, np.arange(len(groups))), cells.imag

    def measured(sums: np.ndarray) -> np.ndarray:
        totals = np.add.reduceat(sums * values, starts, axis=-1)
        totals -= rows * totals.sum(axis=-1, keepdims=True) / rows.sum()
        return (totals**2 / (rows + rows.mean())).sum(axis=-1)

    found, rng, larger = float(measured(counts.astype(float))), np.random.default_rng(seed), 0
    step = max(1, AT_ONCE // len(cells))
    for start in range(0, FLIPS, step):
        kept = rng.binomial(counts, 0.5, (min(step, FLIPS - start), len(cells)))
        larger += int((measured(2.0 * kept - counts) >= found * (1 - 1e-9) - 1e-12).sum())
    return (1 + larger) / (1 + FLIPS)
