"""Where the gap between two models comes from, for which tools, which references are doubtful, and what was gained."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from slm_swap.scoring.measured import unmeasured
from slm_swap.scoring.several import answer
from slm_swap.scoring.tracks import Track
from slm_swap.verdict.decision import Decision
from slm_swap.verdict.evaluations import cluster_labels, shown_tool, values_of

KINDS = {  # what went wrong, and the errors of metrics.ERRORS that say so
    "format": ("no_json", "bad_json", "extra_text", "wrong_shape"),
    "calls": ("unwanted_call", "no_call", "missing_call", "extra_call"),
    "wrong_tool": ("wrong_tool",),
    "missing": ("missing_argument",),
    "extra": ("extra_argument",),
    "type": ("wrong_type",),
    "value": ("wrong_value",),
    "truncated": ("truncated",),
    "too_long": ("prompt_too_long",),
    "filtered": ("filtered", "refused"),
    "failed": (),  # a request that was never answered, whatever its error
}
FORM = ("no_json", "bad_json", "extra_text", "wrong_shape")
COUNT = ("unwanted_call", "no_call", "missing_call", "extra_call")
CALL = ("wrong_tool", "missing_argument", "extra_argument", "wrong_type")
FINE_TUNING = "fine-tuning"
# The cheapest first: what, every error that it could close, and the matcher that says what is right already without it. The errors
# bound the gain from above: examples and training may set anything right that a model wrote, a grammar everything but the values.
REMEDIES = (
    ("evaluate again: requests failed", ("failed",), None),
    ("a larger --max-new-tokens", ("limit",), None),
    ("a shorter prompt, or a model with a longer context", ("prompt_too_long",), None),
    ("how the model is asked: the prompt's wording, --ask text or native", FORM, "lenient"),
    ("a few examples in the prompt (few-shot)", (*FORM, *COUNT, *CALL, "wrong_value"), "schema"),
    ("constrained decoding by the JSON Schema", (*FORM, *CALL, "truncated"), "schema"),
    ("the content filter's settings, or those rows to the other model", ("filtered", "refused"), None),
    (FINE_TUNING, (*FORM, *COUNT, *CALL, "wrong_value", "truncated"), "schema"),
)
FEW_MISSES = 10  # of so many rows or fewer none may be near to right by chance
ANSWERS = {*COUNT, *CALL, "wrong_value"}  # whole replies that miss the reference


def gap(azure: Sequence[dict], slm: Sequence[dict], track: Track) -> dict[str, Any]:
    """The difference in the exact metric split by what went wrong: each row has one error or none, so the parts add up to it.

    A remedy could gain at most the rows that miss in a way that it could close, were all of them right afterwards. `gain_measured` is
    what a looser matcher finds right already: rows that only the format or a convertible type keeps from being exact. `first` is the
    remedy to begin with: of those cheaper than fine-tuning the one that could gain the most, and of equal ones the cheapest.
    """
    counts = {"azure": Counter(map(_kind, azure)), "slm": Counter(map(_kind, slm))}
    n = len(azure)
    rates = {side: {kind: count[kind] / n for kind in KINDS} for side, count in counts.items()}
    exact = {side: (n - sum(count[kind] for kind in KINDS)) / n for side, count in counts.items()}
    remedies = []
    for remedy, errors, matcher in REMEDIES:
        rows = [row for row in slm if _error(row) in errors or ("limit" in errors and row["error"] and unmeasured(row, hosted=False) == "truncated")]
        if rows:
            already = matcher and sum(row["scores_by_matcher"][matcher][track.exact] for row in rows) / n
            kinds = list(filter({_kind(row) for row in rows}.__contains__, KINDS))
            remedies.append(
                {"remedy": remedy, "kinds": kinds, "rows": len(rows), "gain_at_most": len(rows) / n, "gain_measured": already}
            )
    difference = exact["azure"] - exact["slm"]
    cheaper = [own for own in remedies if own["remedy"] != FINE_TUNING]
    first = max(cheaper or remedies, key=lambda own: own["rows"], default=None)
    return {
        "metric": track.exact_gate,
        **exact,
        "difference": difference,
        "errors": [
            {
                "kind": kind, "azure": rates["azure"][kind], "slm": rates["slm"][kind],
                "difference": rates["slm"][kind] - rates["azure"][kind],
                "azure_rows": counts["azure"][kind], "slm_rows": counts["slm"][kind],
            }
            for kind in KINDS
        ],
        "remedies": remedies,
        "first": first and first["remedy"],
    }  # fmt: skip


def measured_gain(remedy: dict[str, Any], shown: Callable[[float], str]) -> str:
    """What a remedy's `gain_measured` says to a person; `shown` writes a share as points."""
    if remedy["gain_measured"] is None:
        return "not measured"
    if remedy["gain_measured"] == 0:
        return "too few rows to tell" if remedy["rows"] < FEW_MISSES else "none of these rows"
    return shown(remedy["gain_measured"])


def _error(row: dict) -> str | None:
    return "failed" if row.get("finish_reason") == "error" else row["error"]


def _kind(row: dict) -> str | None:
    error = _error(row)
    return error and next((kind for kind, errors in KINDS.items() if error in errors), error)


def by_group(azure: Sequence[dict], slm: Sequence[dict], track: Track, by: Sequence[str], alpha: float) -> dict[str, Any] | None:
    """Each group's or tool's difference in the exact metric, shrunk towards the mean where its rows are few; the worst first.

    `by` is group or tool, the first of them that the rows have; None where they have none. Rows of no tool are one group.
    """
    from slm_swap.verdict.stats.shrink import shrink

    by, labels = next(((own, labels) for own in by if (labels := cluster_labels(azure, track, own))), (None, None))
    if not labels:
        return None
    if by == "tool":
        labels = [f"={shown_tool(row, track)}" for row in azure]
    members: dict[str, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        members[label].append(index)
    values = [[row["scores_by_matcher"]["strict"][track.exact] for row in rows] for rows in (azure, slm)]
    found = shrink([[values[0][i] - values[1][i] for i in indices] for indices in members.values()], alpha)
    groups = [
        {
            "group": label[1:],
            "rows": len(indices),
            "azure": sum(values[0][i] for i in indices) / len(indices),
            "slm": sum(values[1][i] for i in indices) / len(indices),
            "difference": estimate.raw,
            "shrunk": estimate.shrunk,
            "interval": [estimate.low, estimate.high],
        }
        for (label, indices), estimate in zip(members.items(), found.groups, strict=True)
    ]
    groups.sort(key=lambda group: (-group["shrunk"], group["group"]))
    told = {"by": by, "metric": track.exact_gate, "mean": found.mean, "between_sd": found.between_sd, "p_value": found.p_same}
    return told | {"all": groups}


def gold_audit(
    azure: Sequence[dict], slm: Sequence[dict], track: Track, decide: Callable[[list[int]], Decision | None]
) -> dict[str, Any]:
    """Rows on which both models agree with each other and not with the reference: perhaps the reference is wrong.

    `decide` gives the decision on the rows at some indices, None where they are too few. Leaving such rows out hides
    misses that both models share, so the verdict on all rows stays the verdict.
    """
    doubtful = [index for index, pair in enumerate(zip(azure, slm, strict=True)) if _agree(track, *pair)]
    left = sorted(set(range(len(azure))) - set(doubtful))
    without = decide(left) if doubtful and len(left) > 1 else None
    return {
        "rows": [{name: azure[index][name] for name in ("id", "group", "reference", "reply")} for index in doubtful],
        "count": len(doubtful),
        "verdict_without": without and without.verdict,
        "metrics_without": without and without.metrics,
    }


def _agree(track: Track, left: dict, right: dict) -> bool:
    if not {left["error"], right["error"]} <= ANSWERS:
        return False
    try:
        first, second = (answer(track.title, row["reply"], row.get("calls")) for row in (left, right))
    except ValueError:
        return False
    return first == second


def gains(
    before: Sequence[dict], slm: Sequence[dict], track: Track, alpha: float, labels: Sequence[str] | None
) -> dict[str, Any]:
    """What fine-tuning changed: each gate metric's gain (slm - before) with its interval of level 1 - 2 alpha, and a one-sided
    p-value of "no gain"; the rows that were right before and are not now, and the other way round."""
    from slm_swap.verdict.decision import differences
    from slm_swap.verdict.stats.score import interval, p_above

    old, new = values_of(before, track), values_of(slm, track)
    yes_no = [name for name, key in track.row_names.items() if key in track.yes_no]
    metrics = {
        name: {
            "before": sum(old[name]) / len(before), "slm": sum(new[name]) / len(slm), "gain": sample.mean,
            "interval": list(interval(sample, alpha)), "p_value": p_above(sample, 0.0),
        }
        for name, sample in differences(new, old, yes_no, labels).items()
    }  # fmt: skip
    was, now = old[track.exact_gate], new[track.exact_gate]
    ids = [row["id"] for row in slm]
    return {
        "metrics": metrics,
        "metric": track.exact_gate,
        "worse": [name for name, left, right in zip(ids, was, now, strict=True) if left > right],
        "better": [name for name, left, right in zip(ids, was, now, strict=True) if left < right],
    }
