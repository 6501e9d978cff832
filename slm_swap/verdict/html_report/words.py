"""Numbers and names of a decision in plain words. Rates and differences are 0..1; people read per cent and points."""

from slm_swap.scoring.words import ERROR_KINDS, MATCHERS, METRICS, SIGNALS, metric_name
from slm_swap.verdict.decision import FINE_TUNE, NEED_MORE_DATA, SWAP

__all__ = ["ERROR_KINDS", "MATCHERS", "METRICS", "SIGNALS", "metric_name"]  # for the templates of the page, beside its own words

HEADLINES = {
    SWAP: "Swap: the small model can take this task over",
    FINE_TUNE: "Not yet: the small model falls short",
    NEED_MORE_DATA: "Not decided yet: more rows are needed",
}
UNMEASURED = "Not decided yet: not all rows were measured"
TOO_SLOW = "Not yet: good enough, but too slow"
SCOPES = {"these": "for the tools of these rows, at their mix", "others": "for other tools like these"}
VERDICTS = {SWAP: "Swap", FINE_TUNE: "Not yet", NEED_MORE_DATA: "More rows needed"}
COST_PARTS = {  # of the small model's month
    "machines": "machines",
    "tokens": "its own tokens",
    "training": "share of training",
    "fallback": "hosted replies to what falls back",
}
MINUS = "\u2212"


def percent(rate: float) -> str:
    return f"{100 * rate:.1f}%"


def signed(difference: float) -> str:
    """Points with their sign; one that rounds to zero has none."""
    text = f"{100 * difference:+.1f}".replace("-", MINUS)
    return "0.0" if text[1:] == "0.0" else text


def range_of(difference: float, interval: list[float] | None) -> str:
    """`+3.2 (+1.1 to +5.3)`, in points."""
    return signed(difference) if interval is None else f"{signed(difference)} ({signed(interval[0])} to {signed(interval[1])})"


def rate_of(rate: float, interval: list[float] | None) -> str:
    """`91.2% (88.0 to 93.5)`"""
    return percent(rate) if interval is None else f"{percent(rate)} ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"


def points(difference: float) -> str:
    """`3.2 points`, without a sign."""
    return f"{abs(100 * difference):.1f} points"


def standing(difference: float) -> str:
    """How far the small model is behind or ahead, for hosted - small: `3.2 points behind`."""
    if signed(difference) == "0.0":
        return "level"
    return f"{points(difference)} {'behind' if difference > 0 else 'ahead'}"


def stretch(low: float, high: float) -> str:
    """An interval of hosted - small in the words of `standing`: `2.3 to 8.1 points ahead`, `2.1 points ahead to 3.0 points behind`."""
    ends = standing(low), standing(high)
    sides = [end.rpartition(" ")[2] for end in ends]
    if sides[0] == sides[1] == "ahead":  # the smaller one first
        return f"{abs(100 * high):.1f} to {points(low)} ahead"
    if sides[0] == sides[1] == "behind":
        return f"{abs(100 * low):.1f} to {points(high)} behind"
    return " to ".join(ends)


def count(number: float, what: str = "") -> str:
    """`1,234 rows`, `1 row`"""
    text = f"{number:,.0f}"
    return f"{text} {what if text != '1' else what.removesuffix('s')}".strip()


def significant(number: float) -> str:
    """An amount as a person would write it: 1,234, 12.30, 0.042."""
    if number == 0 or number >= 100:
        return f"{number:,.0f}"
    if number >= 1:
        return f"{number:.2f}"
    return f"{number:.2g}" if number >= 1e-4 else f"{number:.1e}"


def short(number: float) -> str:
    """A tick of an axis: 250k, 1.5M, 0.05."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:g}{letter}"
    return f"{number:g}"


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.5 h`"""
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
