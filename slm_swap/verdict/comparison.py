"""The evidence behind a verdict: both models' rows side by side, where the gap comes from, for which tools, and what was gained."""

from dataclasses import replace
from typing import Any

from slm_swap.clients.pricing import Prices, compare_costs, row_cost
from slm_swap.scoring.metrics import MATCHERS
from slm_swap.scoring.tracks import Track
from slm_swap.verdict.cautions import cautions
from slm_swap.verdict.confidence import SIGNALS, discrimination, signals_of
from slm_swap.verdict.decision import NEED_MORE_DATA, SWAP, Decision, point_decision
from slm_swap.verdict.evaluations import QUESTIONS, Evaluation, aligned, model_of, tools_of
from slm_swap.verdict.gap import by_group, gains, gap, gold_audit
from slm_swap.verdict.judge import Gate, Judge
from slm_swap.verdict.sentence import sentence
from slm_swap.verdict.unmeasured import account

EVIDENCE = (
    "question", "questions", "tools", "unmeasured", "filtered", "latency", "matchers", "flips", "gap", "groups", "gold_audit", "before",
    "cost", "sequential", "repeat", "looks", "confidence",
)  # what only rows can show


def examine(track: Track, sides: dict[str, Evaluation], gate: Gate, prices: Prices) -> dict[str, Any]:
    """The decision on two evaluations (`azure`, `slm`; perhaps `before`) with all of its evidence, as the decision file holds it:
    slm_swap/README.md describes every key."""
    azure, slm = sides["azure"], sides["slm"]
    rows = {name: aligned(side.rows, azure.rows) for name, side in sides.items()}
    stopped = azure.report.get("stopped_early") or slm.report.get("stopped_early")
    judge = Judge(track, rows, gate, stopped)
    by, labels = judge.units[gate.question]
    latency = speed(azure.report, slm.report, gate.max_p95_ms)
    by_matcher = {matcher: judge.decide(matcher, brief=matcher != "strict") for matcher in MATCHERS}
    decision = by_matcher["strict"]
    if decision.verdict == SWAP and latency["passed"] is False:
        decision = replace(decision, verdict=NEED_MORE_DATA, withheld=SWAP)
    flips = len({found.verdict for found in by_matcher.values()}) > 1
    if decision.need:
        decision.need.update(
            {f"{name}_cost": _cost_of(decision.need["rows"], row_cost(sides[name].report, prices)) for name in ("azure", "slm")}
        )
    told = account(sides, judge.missing)
    model = model_of(slm.report)
    found, split = decision.to_json(), gap(rows["azure"], rows["slm"], track)
    found |= {
        "question": gate.question,
        "questions": {question: judge.answer(question, decision) for question in QUESTIONS},
        "tools": len(tools_of(rows["azure"], track)) or None,
        "clusters": {"by": by} | found["clusters"],
        "unmeasured": told,
        "filtered": without_filtered(rows, judge, decision),
        "latency": latency,
        "matchers": {matcher: {"verdict": own.verdict, "metrics": own.metrics} for matcher, own in by_matcher.items()},
        "flips": flips,
        "gap": split,
        "groups": by_group(rows["azure"], rows["slm"], track, ("tool", "group"), gate.alpha),
        "gold_audit": gold_audit(rows["azure"], rows["slm"], track, lambda some: judge.decide(some=some)),
        "confidence": sureness(rows["slm"], track, labels),
        "before": gains(rows["before"], rows["slm"], track, gate.alpha, labels) if "before" in rows else None,
        "cost": compare_costs(
            azure.report, slm.report, prices, model.get("training_seconds"), delta=gate.delta, verdict=decision.verdict
        ),
        "sequential": _saved(decision, stopped, len(azure.rows), row_cost(azure.report, prices))
        if gate.rule == "sequential"
        else None,
        "repeat": {side: sides[side].report.get("repeat") for side in ("azure", "slm")},
        "warnings": cautions(sides, {name: own.verdict for name, own in by_matcher.items()}, told, judge),
    }
    return found | {"sentence": sentence(decision, len(azure.rows), found, tuned=bool(model.get("adapter")))}


def sureness(rows: list[dict[str, Any]], track: Track, labels: list[str] | None) -> dict[str, Any] | None:
    """How well the small model's confidence tells its right replies from its wrong ones: see `confidence.discrimination`."""
    told = [signals_of(row) for row in rows]
    right = [row["scores_by_matcher"]["strict"][track.exact] == 1 for row in rows]
    return discrimination({name: [one[name] for one in told] for name in SIGNALS}, right, labels, curves=True)


def without_filtered(rows: dict[str, list[dict]], judge: Judge, decision: Decision) -> dict[str, Any] | None:
    """How many replies a content filter took (they count as misses: the filter is a part of the deployment), and the verdict without
    the rows whose hosted reply it took; None where there are none."""
    taken = {side: [row.get("error") == "filtered" for row in rows[side]] for side in ("azure", "slm")}
    if not any(map(any, taken.values())):
        return None
    left = [index for index, filtered in enumerate(taken["azure"]) if not filtered]
    verdict = judge.decide(some=left).verdict if 1 < len(left) < len(rows["azure"]) else decision.verdict
    return {side: sum(flags) for side, flags in taken.items()} | {"verdict_without": verdict}


def speed(azure: dict[str, Any], slm: dict[str, Any], max_p95_ms: float | None) -> dict[str, Any]:
    """Both models' latencies as their reports measured them, and whether the small one keeps to the limit: under load where that was
    measured, else alone. `passed` is None without a limit, False where the latency is not known."""
    told = {"azure": azure.get("latency"), "slm": slm.get("latency"), "max_p95_ms": max_p95_ms, "p95_ms": None, "passed": None}
    mine = told["slm"] if isinstance(told["slm"], dict) else {}
    measured = mine.get("loaded") or mine.get("alone")
    if isinstance(measured, dict) and isinstance(measured.get("p95"), (int, float)):
        told["p95_ms"] = 1000 * measured["p95"]
    if max_p95_ms is not None:
        told["passed"] = told["p95_ms"] is not None and told["p95_ms"] <= max_p95_ms
    return told


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
