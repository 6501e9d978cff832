"""A verdict in one or two sentences, for a person who decides."""

from collections.abc import Mapping
from typing import Any

from slm_swap.scoring.words import level, metric_name
from slm_swap.verdict.decision import FINE_TUNE, MIN_CLUSTERS, SWAP, Decision
from slm_swap.verdict.gap import FINE_TUNING
from slm_swap.verdict.html_report.words import stretch

FEW = 300  # rows from which `need.rows` was right in about as many cases as announced (benchmarks/results/tools_error_rates.json)


def points(value: float) -> str:
    """A share as percentage points with one decimal."""
    return f"{100 * value:.1f}".replace("-0.0", "0.0")


def sentence(decision: Decision, rows: int, evidence: Mapping[str, Any] | None = None, tuned: bool = False) -> str:
    """The verdict: what was found, for which tools, how sure it is, and what comes next.

    `evidence` is the rest of the decision (`question`, `tools`, `gap`, `unmeasured`, `latency`), None by the point rule; `tuned` says
    that the small model is fine-tuned already.
    """
    margin = f"the margin of {points(decision.delta)} points"
    if decision.alpha is None:
        worst = max(decision.metrics, key=lambda name: decision.metrics[name]["difference"])
        gap = points(decision.metrics[worst]["difference"])
        compared = "more" if decision.fine_tune else "not more"
        return f"By the means of {rows} rows alone the largest gap (“{metric_name(worst)}”, {gap} points) is {compared} than {margin}."
    evidence = evidence or {}
    if decision.withheld:
        return _withheld(decision, rows, evidence)
    if decision.verdict == SWAP:
        sure = level(decision.alpha)
        bound = max(values["interval"][1] for values in decision.metrics.values())
        lost = f"loses at most {points(bound)} points" if bound > 0 else "is better"
        return f"The small model can take over{_scope(evidence)}: on {rows} rows it {lost} on every metric ({sure} sure), within {margin}."
    if decision.verdict == FINE_TUNE:
        return _worse(decision, rows, margin, evidence, tuned)
    return _open(decision, rows, margin, evidence)


def _scope(evidence: Mapping[str, Any]) -> str:
    """` these 8 tools`: what the verdict is about, where the rows have tools."""
    tools = evidence.get("tools")
    if not tools:
        return ""
    if evidence.get("question") == "others":
        return f" tools like these {tools}"
    return f" these {tools} tools" if tools > 1 else " this tool"


def _withheld(decision: Decision, rows: int, evidence: Mapping[str, Any]) -> str:
    latency = evidence.get("latency") or {}
    if latency.get("passed") is False and not _missing(evidence):
        found = "is not known" if latency["p95_ms"] is None else f"is {latency['p95_ms']:,.0f} ms"
        return (
            f"The small model is good enough on {rows} rows, but its latency at the 95th percentile {found}, and the limit is "
            f"{latency['max_p95_ms']:,.0f} ms: serve it faster, and measure again."
        )
    return (
        f"Not all of the {rows} rows were measured: {_missing(evidence)}. {decision.withheld} does not hold with each of these rows against "
        f"it. Measure exactly these rows, then compare again."
    )


def _missing(evidence: Mapping[str, Any]) -> str:
    """`80 hosted replies were cut off by --max-new-tokens, 3 small requests failed`"""
    names = {"failed": "requests failed", "truncated": "replies were cut off by --max-new-tokens"}
    told = evidence.get("unmeasured") or {}
    sides = (("azure", "hosted"), ("slm", "small"))
    return ", ".join(f"{count} {name} {names[why]}" for side, name in sides for why, count in sorted((told.get(side) or {}).items()))


def _worse(decision: Decision, rows: int, margin: str, evidence: Mapping[str, Any], tuned: bool) -> str:
    name = decision.failing[0]
    low, high = decision.metrics[name]["interval"]
    gap = points(decision.metrics[name]["difference"])
    found = f"The small model is worse by more than {margin}: “{metric_name(name)}” is {gap} points lower ({points(low)} to {points(high)}) on {rows} rows."
    split = evidence.get("gap") or {}
    first = next((own for own in split.get("remedies", ()) if own["remedy"] == split.get("first")), None)
    train = "train it on more rows, or on better ones," if tuned else "fine-tune it,"
    if first is None or first["remedy"] == FINE_TUNING:
        return f"{found} {train[0].upper()}{train[1:]} and measure again."
    return f"{found} First try {first['remedy']} (at most {points(first['gain_at_most'])} points). Then {train} and measure again."


def _open(decision: Decision, rows: int, margin: str, evidence: Mapping[str, Any]) -> str:
    need, clusters = decision.need, decision.clusters
    if need.get("why") and evidence.get("question") == "others":
        tools = f"at least {need['clusters']:,} further tools" if need["clusters"] else "no number of tools at this margin"
        return (
            f"{rows} rows of {clusters['count']} tools do not settle it for other tools: it takes {tools}, and further rows of the same "
            "tools do not help. If these are the tools of your application, decide for them: --tools these."
        )
    name = need["metric"]
    low, high = decision.metrics[name]["interval"]
    found = f"{rows} rows do not settle it: in “{metric_name(name)}” the small model is {stretch(low, high)}, too near {margin}."
    if clusters["effective"] < MIN_CLUSTERS:
        groups = "" if clusters["count"] == rows else f" in {clusters['count']} groups"
        found = f"{rows} rows{groups} are too few: {SWAP} takes at least {MIN_CLUSTERS}{' of even size' if groups else ''}."
    if need["rows"] is None:
        return f"{found} No number of rows would: choose another margin, or fine-tune."
    rough = " So few rows say little of the gap: the number is rough." if rows < FEW else ""
    return f"{found} About {need['rows']:,} further rows would settle it (towards {need['towards']}, with 80% power).{rough}"
