"""The evidence behind a verdict: both models' rows side by side, where the gap comes from, for which tools, and what was gained."""

from collections.abc import Sequence
from typing import Any

from slm_swap.clients.pricing import Prices, compare_costs, row_cost
from slm_swap.scoring.metrics import MATCHERS
from slm_swap.scoring.tracks import Track
from slm_swap.verdict.decision import Decision, paired_decision, point_decision, sequential_decision
from slm_swap.verdict.evaluations import Evaluation, aligned, cluster_labels, values_of
from slm_swap.verdict.gap import by_group, gains, gap, gold_audit
from slm_swap.verdict.sentence import sentence

EVIDENCE = ("matchers", "flips", "gap", "groups", "gold_audit", "before", "cost", "sequential")  # what only rows can show


def examine(
    track: Track, sides: dict[str, Evaluation], rule: str, delta: float, alpha: float, cluster: str, prices: Prices
) -> dict[str, Any]:
    """The decision on two evaluations (`azure`, `slm`; perhaps `before`) with all of its evidence, as the decision file holds it.

    `rule` is paired or sequential, `cluster` one of CLUSTERS; slm_swap/README.md describes every key.
    """
    azure, slm = sides["azure"], sides["slm"]
    rows = {name: aligned(side.rows, azure.rows) for name, side in sides.items()}
    labels = cluster_labels(azure.rows, track, cluster)
    yes_no = [name for name, key in track.row_names.items() if key in track.yes_no]
    stopped = azure.report.get("stopped_early") or slm.report.get("stopped_early")

    def decide(matcher: str = "strict", some: Sequence[int] | None = None) -> Decision:
        some = range(len(azure.rows)) if some is None else some
        values = [values_of([rows[name][i] for i in some], track, matcher) for name in ("azure", "slm")]
        own = labels and [labels[i] for i in some]
        if rule == "paired":
            return paired_decision(*values, yes_no, delta, alpha, own)
        return sequential_decision(
            *values, yes_no, delta, alpha, own, in_order=bool(stopped), largest=(stopped or {}).get("largest_cluster")
        )

    by_matcher = {matcher: decide(matcher) for matcher in MATCHERS}
    decision, verdicts = by_matcher["strict"], {matcher: found.verdict for matcher, found in by_matcher.items()}
    flips = len(set(verdicts.values())) > 1
    warnings = []
    if flips:
        told = ", ".join(f"{matcher} {verdict}" for matcher, verdict in verdicts.items())
        warnings.append(
            f"the verdict depends on how replies are compared with references ({told}): look at the rows before you decide"
        )
    if "before" in sides:
        warnings += run_otherwise(sides["before"].report, slm.report)
    if decision.need:
        decision.need.update(
            {f"{name}_cost": _cost_of(decision.need["rows"], row_cost(sides[name].report, prices)) for name in ("azure", "slm")}
        )
    model = slm.report.get("model") if isinstance(slm.report.get("model"), dict) else {}
    costs = compare_costs(azure.report, slm.report, prices, model.get("training_seconds"))
    found, split = decision.to_json(), gap(rows["azure"], rows["slm"], track)
    return found | {
        "sentence": sentence(decision, len(azure.rows), split["remedies"]),
        "clusters": {"by": cluster if labels else "row"} | found["clusters"],
        "matchers": {matcher: {"verdict": own.verdict, "metrics": own.metrics} for matcher, own in by_matcher.items()},
        "flips": flips,
        "gap": split,
        "groups": by_group(
            rows["azure"], rows["slm"], track, ("tool", "group") if cluster == "tool" else ("group", "tool"), alpha
        ),
        "gold_audit": gold_audit(rows["azure"], rows["slm"], track, lambda some: decide(some=some)),
        "before": gains(rows["before"], rows["slm"], track, alpha, labels) if "before" in rows else None,
        "cost": costs,
        "sequential": _saved(decision, stopped, len(azure.rows), row_cost(azure.report, prices))
        if rule == "sequential"
        else None,
        "warnings": warnings,
    }


def run_otherwise(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """A warning where two reports of the small model come from another engine or precision: the gain is not the training's alone."""
    models = [report.get("model") if isinstance(report.get("model"), dict) else {} for report in (before, after)]
    ways = [" in ".join(str(model[name]) for name in ("engine", "precision") if model.get(name)) for model in models]
    if not all(ways) or ways[0] == ways[1]:
        return []
    return [
        f"the small model was run by {ways[0]} before and by {ways[1]} now: a part of the gain may come from that (benchmarks/parity.py)"
    ]


def examine_means(track: Track, sides: dict[str, Evaluation], delta: float) -> dict[str, Any]:
    """The decision by the point rule, as `examine` gives one; what rows would show is None."""
    azure, slm = sides["azure"].report, sides["slm"].report
    decision = point_decision(azure["metrics"], slm["metrics"], track.gate, delta)
    told = {"sentence": sentence(decision, azure["inputs"]["rows"]), "warnings": []}
    return decision.to_json() | dict.fromkeys(EVIDENCE) | told


def _cost_of(rows: int | None, each: float | None) -> float | None:
    return None if rows is None or each is None else rows * each


def _saved(decision: Decision, stopped: dict | None, rows: int, each: float | None) -> dict[str, Any]:
    """What stopping early saved, and after how many rows each metric (`certain_at`) and the verdict were certain."""
    available = stopped["rows_available"] if stopped else rows
    return {
        "stopped_after_rows": rows if stopped else None,
        "rows_available": available,
        "calls_saved": available - rows,
        "azure_cost_saved": _cost_of(available - rows, each),
        "certain_after_rows": decision.certain_after,
        "certain_at": {name: values["certain_at"] for name, values in decision.metrics.items()},
    }
