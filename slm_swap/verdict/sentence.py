"""A verdict in one sentence."""

from collections.abc import Sequence

from slm_swap.verdict.decision import FINE_TUNE, MIN_CLUSTERS, SWAP, Decision
from slm_swap.verdict.gap import FINE_TUNING


def points(value: float) -> str:
    """A share as percentage points with one decimal."""
    return f"{100 * value:.1f}".replace("-0.0", "0.0")


def sentence(decision: Decision, rows: int, remedies: Sequence[dict] = ()) -> str:
    """The verdict for a person who decides: what was found, how sure it is, and what comes next (of `gap`'s remedies)."""
    margin = f"the margin of {points(decision.delta)} points"
    worst = max(decision.metrics, key=lambda name: decision.metrics[name]["difference"])
    if decision.alpha is None:
        gap = points(decision.metrics[worst]["difference"])
        compared = "more" if decision.fine_tune else "not more"
        return f"By the means of {rows} rows alone the largest gap ({worst}, {gap} points) is {compared} than {margin}."
    sure = f"{100 * (1 - decision.alpha):g}%"
    if decision.verdict == SWAP:
        bound = max(values["interval"][1] for values in decision.metrics.values())
        lost = f"loses at most {points(bound)} points" if bound > 0 else "is better"
        return f"The small model can take over: on {rows} rows it {lost} on every metric ({sure} sure), within {margin}."
    if decision.verdict == FINE_TUNE:
        name = decision.failing[0]
        low, high = decision.metrics[name]["interval"]
        gap = points(decision.metrics[name]["difference"])
        cheaper = [own for own in remedies if own["remedy"] != FINE_TUNING]
        best = max(cheaper, key=lambda own: own["gain_at_most"], default=None)
        first = (
            f"First try what is cheaper: {best['remedy']} (at most {points(best['gain_at_most'])} points). Then fine"
            if best
            else "Fine"
        )
        return (
            f"The small model is worse by more than {margin}: {name} is {gap} points lower "
            f"({points(low)} to {points(high)}) on {rows} rows. {first}-tune it, and measure again."
        )
    if decision.clusters["effective"] < MIN_CLUSTERS and decision.clusters["count"] < rows:
        return (
            f"{rows} rows in {decision.clusters['count']} groups do not settle it: a verdict for other groups than these needs at least "
            f"{MIN_CLUSTERS} (of even size). If these are all that there will ever be, decide by rows: --cluster row."
        )
    need = decision.need
    name = need["metric"]
    low, high = decision.metrics[name]["interval"]
    found = f"{rows} rows do not settle it: in {name} azure - slm is {points(low)} to {points(high)} points, too near {margin}."
    if decision.clusters["effective"] < MIN_CLUSTERS:
        found = f"{rows} rows are too few: SWAP takes at least {MIN_CLUSTERS}."
    if need["rows"] is None:
        return f"{found} No number of rows would: choose another margin, or fine-tune."
    return f"{found} About {need['rows']:,} further rows would settle it (towards {need['towards']}, with 80% power)."
