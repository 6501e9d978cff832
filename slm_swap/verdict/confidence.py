"""How well each signal of a reply's confidence tells right replies from wrong ones."""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from slm_swap.clients.confidence import SIGNALS as OF_REPLIES

SIGNALS = (*OF_REPLIES, "parses", "keeps_schema")  # the larger, the surer


def signals_of(line: Mapping[str, Any]) -> dict[str, float | None]:
    """Each signal's value on a line of a rows file; None where the line does not have it, as an older one."""
    told = line.get("confidence") or {}
    given = {name: told.get(name) for name in OF_REPLIES} | {name: line.get(name) for name in SIGNALS[len(OF_REPLIES) :]}
    return {name: None if value is None else float(value) for name, value in given.items()}


def is_confidence(line: Mapping[str, Any]) -> bool:
    """Whether what a line of a rows file says of its reply's confidence is of the right types."""
    told = line.get("confidence")
    if not isinstance(told, dict | None) or not all(isinstance(line.get(name), bool | None) for name in SIGNALS[len(OF_REPLIES) :]):
        return False
    numbers = [told.get(name) for name in OF_REPLIES] if told else []
    return all(number is None or (isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)) for number in numbers)


def discrimination(
    values: Mapping[str, Sequence[float | None]], right: Sequence[bool], labels: Sequence[Hashable] | None = None, curves: bool = False
) -> dict[str, Any] | None:
    """Of each signal its `auroc` with an `interval` of 95% (both None where all rows are right or all are wrong), the `rows` that have it,
    and how many are `missing` it; with `curves` also its risk-coverage `curve`. None where no row has any signal.

    `labels` are those of each row's cluster: None, every row is its own. Values in an `array` take no further memory a row but numpy's.
    """
    import numpy as np

    from slm_swap.verdict.stats.auroc import auroc, cluster_numbers, risk_coverage

    clusters, whole, found = None if labels is None else cluster_numbers(labels), np.asarray(right, dtype=bool), {}
    for name, told in values.items():
        given = np.asarray(told, dtype=float)  # None is NaN
        has = np.isfinite(given)
        rows = int(has.sum())
        if not rows:
            continue
        own, good = given[has], whole[has]
        area = auroc(own, good, None if clusters is None else clusters[has])
        found[name] = {
            "auroc": area and round(area[0], 6),
            "interval": area and [round(end, 6) for end in area[1]],
            "rows": rows,
            "missing": len(given) - rows,
        } | ({"curve": [list(point) for point in risk_coverage(own, good)]} if curves else {})
    return found or None
