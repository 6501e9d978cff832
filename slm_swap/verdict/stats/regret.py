"""How often a cascade is wrong where the hosted model would have been right: exact bounds, and the loosest threshold that keeps to one.

A *unit* is what is independent: a row, or all rows of one group. A unit is lost where one of its rows is answered locally and is a loss. All
units of a class are the denominator, whether they are answered locally or not, so that the regret can only grow as the threshold falls.
Testing thresholds from the strictest one down, and stopping at the first whose bound is above the target, keeps the regret at the threshold
chosen within the target with probability 1 - alpha, without any correction for their number, and also where the thresholds are the
calibration's own values (Bates, Angelopoulos, Lei, Malik and Jordan, Journal of the ACM 68, 2021, theorem 1; with exact binomial bounds:
Angelopoulos, Bates, Candès, Jordan and Lei, Annals of Applied Statistics 19, 2025).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

LEAST_LOCAL = 30  # units above a threshold: below, what is local is too little to be told anything of
MOST_UNITS = 1_000_000  # no more are ever asked for


class Rung(NamedTuple):
    """What is answered locally at a threshold: the value itself, `rows` and `units` with a value of at least it, and how many of these
    units are lost."""

    threshold: float
    rows: int
    units: int
    losses: int


def upper_bound(losses: int, units: int, alpha: float) -> float:
    """The one-sided upper bound on a rate at level 1 - alpha, exact (Clopper and Pearson, Biometrika 26, 1934); 1 where there are no units."""
    from scipy.special import betaincinv

    return 1.0 if losses >= units else float(betaincinv(losses + 1, units - losses, 1 - alpha))


def is_shown(losses: int, units: int, delta: float, alpha: float) -> bool:
    """Whether so few losses show a rate of at most `delta`: `upper_bound` is at most it, without its rounding."""
    from scipy.special import bdtr

    return losses < units and bool(bdtr(losses, units, delta) <= alpha)


def most_losses(units: int, delta: float, alpha: float) -> int:
    """The largest number of losses that still shows a rate of at most `delta`; -1 where not even none does."""
    low, high = -1, units
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_shown(middle, units, delta, alpha) else (low, middle)
    return low


def units_needed(losses: int, delta: float, alpha: float) -> int | None:
    """The smallest number of units of which so many may be lost: 149 with none, 313 with two at 0.02 and 0.05. None above MOST_UNITS."""
    low, high = losses, MOST_UNITS
    if not is_shown(losses, high, delta, alpha):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_shown(losses, middle, delta, alpha) else (middle, high)
    return high


def further_units(losses: int, units: int, delta: float, alpha: float, rate: float = 0.0) -> int | None:
    """How many further units would show that a threshold keeps to `delta` if they are lost at `rate`: about, as chance has its part where
    the rate is not 0. None where no number up to MOST_UNITS would."""
    if rate >= delta:
        return None
    for more in range(MOST_UNITS):
        needed = units_needed(losses + more, delta, alpha)
        if needed is None:
            return None
        if rate * max(0, needed - units) <= more:
            return max(0, needed - units)
    return None


def rungs(values: Sequence[float], lost: Sequence[bool], units: Sequence[int]) -> list[Rung]:
    """What each threshold answers locally, the strictest first: one for each distinct value, as equal values are answered together.

    Args:
        values: the signal of each row that may be answered locally; the larger, the surer. None is NaN.
        lost: whether the row is a loss if it is answered locally.
        units: a number for each row, the same one for rows of one unit.
    """
    import numpy as np

    values, lost, units = np.asarray(values, dtype=float), np.asarray(lost, dtype=bool), np.asarray(units)
    if not len(values):
        return []
    order = np.argsort(-values, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(values[order]) != 0, True))
    ordered, bad = units[order], np.flatnonzero(lost[order])
    first, first_lost = np.zeros((2, len(order)), dtype=int)
    first[np.unique(ordered, return_index=True)[1]] = 1
    first_lost[bad[np.unique(ordered[bad], return_index=True)[1]]] = 1
    counts = (values[order][ends].tolist(), (ends + 1).tolist(), first.cumsum()[ends].tolist(), first_lost.cumsum()[ends].tolist())
    return [Rung(*found) for found in zip(*counts, strict=True)]


def loosest(ladder: Sequence[Rung], units: int, delta: float, alpha: float, least: int = LEAST_LOCAL) -> Rung | None:
    """The last threshold, from the strictest down, up to which each shows a regret of at most `delta` among all `units` of the class.

    None where the first one does not, or where fewer than `least` units would be answered locally.
    """
    found, most = None, most_losses(units, delta, alpha)  # a bound is at most delta just where there are no more losses than that
    for rung in ladder:
        if rung.losses > most:
            break
        found = rung
    return found if found and found.units >= least else None


def wanted(ladder: Sequence[Rung], chosen: Rung | None, least: int = LEAST_LOCAL) -> Rung | None:
    """The loosest threshold with as few losses as the next one below what is certified: what a few further units would add. None where all
    that may be answered locally is, or where that is fewer than `least` units."""
    below = [rung for rung in ladder if rung.units >= least and (chosen is None or rung.rows > chosen.rows)]
    return max((rung for rung in below if rung.losses == below[0].losses), key=lambda rung: rung.rows) if below else None


def told(rung: Rung, units: int, alpha: float) -> dict[str, Any]:
    """A threshold's counts with its bound, as cascade.json has them; `local_only` is among the units that are answered locally."""
    return {
        "threshold": rung.threshold,
        "units": units,
        "local": rung.units,
        "losses": rung.losses,
        "seen": rung.losses / units,
        "bound": upper_bound(rung.losses, units, alpha),
        "local_only": {"seen": rung.losses / rung.units, "bound": upper_bound(rung.losses, rung.units, alpha)},
    }
