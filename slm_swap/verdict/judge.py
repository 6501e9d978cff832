"""The gate applied to rows: for either question, by any matcher, on all rows or some, and never on what was not measured."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from slm_swap.scoring.tracks import Track
from slm_swap.verdict.decision import Decision, Values, clusters_if_identical, paired_decision, sequential_decision
from slm_swap.verdict.evaluations import QUESTIONS, require_tools, units, values_of
from slm_swap.verdict.unmeasured import causes, guarded


@dataclass(frozen=True)
class Gate:
    """How a verdict is made. `rule` is paired or sequential, `question` one of QUESTIONS; `swap_share` and `next_share` are the shares of
    alpha that this look and the next have for SWAP (`looks.share`), `max_p95_ms` the slowest that the small model may be at its 95th percentile."""

    rule: str
    delta: float
    alpha: float
    question: str = "these"
    swap_share: float = 1.0
    next_share: float = 1.0
    max_p95_ms: float | None = None


class Judge:
    """Decides on both models' rows, or on some of them, by one gate: for either question and any matcher.

    Raises:
        UserError: the question is about other tools, and the rows have none.
    """

    def __init__(self, track: Track, rows: dict[str, list[dict]], gate: Gate, stopped: dict[str, Any] | None):
        self.track, self.rows, self.gate, self.stopped = track, rows, gate, stopped
        self.missing = {side: causes(rows[side], side) for side in ("azure", "slm")}
        self.units = {question: units(rows["azure"], track, question) for question in QUESTIONS}
        require_tools(self.units[gate.question][1], gate.question)
        self.yes_no = [name for name, key in track.row_names.items() if key in track.yes_no]

    def decide(
        self, matcher: str = "strict", some: Sequence[int] | None = None, question: str | None = None, brief: bool = True
    ) -> Decision:
        """The decision on the rows at the indices `some` (None: all); a verdict that rests on unmeasured rows is withheld. `brief`: see
        `decision.paired_decision`."""
        question, gate = question or self.gate.question, self.gate
        some = range(len(self.rows["azure"])) if some is None else some
        values = {side: values_of([self.rows[side][i] for i in some], self.track, matcher) for side in ("azure", "slm")}
        missing = {side: [self.missing[side][i] for i in some] for side in ("azure", "slm")}
        labels = self.units[question][1]
        labels = labels and [labels[i] for i in some]

        def rule(azure: Values, slm: Values) -> Decision:
            if gate.rule == "paired":
                levels = gate.alpha * gate.swap_share, gate.alpha * gate.next_share
                return paired_decision(azure, slm, self.yes_no, gate.delta, gate.alpha, labels, *levels, brief)
            largest, alpha = (self.stopped or {}).get("largest_cluster"), gate.alpha * gate.swap_share
            return sequential_decision(
                azure, slm, self.yes_no, gate.delta, alpha, labels, bool(self.stopped), largest, brief
            )

        decision = guarded(values, missing, rule)
        return about_tools(decision) if self.units[question][0] == "tool" else decision

    def answer(self, question: str, known: Decision) -> dict[str, Any] | None:
        """What the decision says of one question, of which `known` is the gate's own; None where the rows have no tools to
        ask it of, or were drawn for the other question."""
        by, _ = self.units[question]
        drawn_otherwise = self.stopped and question != self.gate.question
        if drawn_otherwise or (question == "others" and by != "tool"):
            return None
        decision = known if question == self.gate.question else self.decide(question=question)
        return {
            "verdict": decision.verdict,
            "withheld": decision.withheld,
            "clusters": {"by": by} | decision.clusters,
            "need": decision.need,
            "intervals": {name: values["interval"] for name, values in decision.metrics.items()},
        }


def about_tools(decision: Decision) -> Decision:
    """A decision on tools as units, with a `need` in tools: further rows of the same tools do not settle it."""
    if decision.need is None:
        return decision
    least, counted = clusters_if_identical(decision.delta, decision.swap_alpha), decision.clusters
    tools = None
    if least is not None:
        total = math.ceil(least * counted["count"] / counted["effective"])
        tools = max(total - counted["count"], decision.need["clusters"] or 0, 1)
    why = "rows of the same tools do not settle a question about other tools"
    return replace(decision, need=decision.need | {"rows": None, "rows_if_equal": None, "clusters": tools, "why": why})
