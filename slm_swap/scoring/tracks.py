"""A track is data: its metrics' names, its parser and its gate."""

import math
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from slm_swap.common.errors import UserError
from slm_swap.rows.examples import Example
from slm_swap.rows.lines import dump_json
from slm_swap.scoring.json_values import parse_json
from slm_swap.scoring.metrics import Match, Reference, Scored, score
from slm_swap.scoring.replies import InvalidReply, Parsed, Parser, parse_structured, parse_toolcall
from slm_swap.scoring.several import Calls, score_calls

DECIDED = "decision_match"
MATCH_PARTS = ("valid", "name", "exact", "precision", "recall", "f1", "matched", "predicted", "expected")


@dataclass(frozen=True)
class Track:
    """One task. `valid`, `name` and `exact` are its yes-no metrics (`name` None where there is no tool to choose);
    precision, recall and F1 over leaves are called `<fields>_precision` and so on. `decided` is the metric of rows some of which want
    a call and some none; None where that is not asked."""

    title: str
    valid: str
    name: str | None
    exact: str
    fields: str
    parse: Parser
    decided: str | None = None

    def with_metrics(self, names: Collection[str]) -> "Track":
        """This track for reports with these metrics: `decision_match` joins where they have it."""
        return replace(self, decided=DECIDED if f"{DECIDED}_rate" in names else None)

    def for_gold(self, gold: Iterable[Reference | Calls]) -> "Track":
        """This track for rows with that gold: `decision_match` joins where a call is due in some and in others none."""
        kinds = {reference.due if isinstance(reference, Calls) else None for reference in gold}
        return replace(self, decided=DECIDED if kinds == {True, False} else None)

    @property
    def yes_no(self) -> tuple[str, ...]:
        return tuple(metric for metric in (self.valid, self.decided, self.name, self.exact) if metric)

    @property
    def gate(self) -> tuple[str, ...]:
        """The report's keys that the small model must hold up on."""
        return (*(f"{name}_rate" for name in self.yes_no), *(f"{self.fields}_{kind}" for kind in ("precision", "recall", "f1")))

    @property
    def row_names(self) -> dict[str, str]:
        """The gate's metrics, each with its name on a row."""
        return {name: name.removesuffix("_rate") for name in self.gate}

    @property
    def exact_gate(self) -> str:
        """The gate's metric that says whether a row is right."""
        return f"{self.exact}_rate"

    def row_metrics(self, match: Match) -> dict[str, float]:
        """One row's metrics by their names, each 0..1."""
        yes_no = {self.valid: match.valid, DECIDED: match.decided, self.name: match.name, self.exact: match.exact}
        names = self.yes_no if self.decided or match.decided is None else (self.valid, DECIDED, *self.yes_no[1:])
        named = {name: float(yes_no[name]) for name in names}
        return named | {f"{self.fields}_{kind}": getattr(match, kind) for kind in ("precision", "recall", "f1")}

    def gate_values(self, match: Match) -> dict[str, float]:
        """One row's metrics by the names of `gate`."""
        values = self.row_metrics(match)
        return {name: values[key] for name, key in self.row_names.items()}

    def summarize(self, matches: Iterable[Match]) -> dict[str, float]:
        """The report's metrics: means over all rows, and precision, recall and F1 pooled over their leaves (`*_micro`).

        `decision_match_rate` is among them where a call is due in some rows and in others none. `matches` may be a Counter of them.

        Raises:
            ValueError: there are no rows.
        """
        counts = Counter(matches)
        if not counts:
            raise ValueError("no rows: a mean over nothing is not a number")
        totals = {part: math.fsum(getattr(match, part) * count for match, count in counts.items()) for part in MATCH_PARTS}
        track = replace(self, decided=DECIDED) if {match.due for match in counts} == {True, False} else self
        if track.decided:
            totals["decided"] = sum(match.decided * count for match, count in counts.items())
        means = SimpleNamespace(**{"decided": None} | {part: total / counts.total() for part, total in totals.items()})
        pooled = Match(True, True, True, totals["matched"], totals["predicted"], totals["expected"])
        micro = {f"{self.fields}_{kind}_micro": getattr(pooled, kind) for kind in ("precision", "recall", "f1")}
        return track.gate_values(means) | micro

    def parse_reference(self, completion: str) -> Parsed:
        """A gold completion.

        Raises:
            ValueError: it is not one well-formed reply of this track.
        """
        opening = completion.strip()[:1]
        return self.parse(completion, like=[] if opening == "[" else None)

    def reference(self, example: Example) -> Reference | Calls:
        """A row's gold with the schema that its arguments answer to.

        Raises:
            UserError: the completion is not a reply of this track; the line is named.
        """
        if example.messages is not None:
            return self._wanted(example)
        try:
            parsed = self.parse_reference(example.completion)
        except InvalidReply as invalid:
            where = example.where or example.id
            raise UserError(
                f"{where}: the completion is not a {self.title} reply ({invalid.error}: {invalid}): correct that line"
            ) from None
        schema = example.schema if parsed.name is None else _parameters(example, parsed.name)
        return Reference(parsed, schema, example.accept, example.completion)

    def _wanted(self, example: Example) -> Reference | Calls:
        """A conversation's gold: the calls that are due, or the JSON value."""
        calls = example.calls is not None
        if calls != (self.name is not None):
            other = "toolcall" if calls else "structured"
            raise UserError(f"{example.where or example.id}: the row wants {'calls' if calls else 'a JSON value'}: it is for --track {other}")
        try:
            if not calls:
                return Reference(Parsed(parse_json(example.completion)), example.schema, example.accept, example.completion)
            accepted = example.accept if isinstance(example.accept, list) else [example.accept] * len(example.calls)
            parts = [
                Reference(Parsed(parse_json(dump_json(call["arguments"])), call["name"]), _parameters(example, call["name"]), accept)
                for call, accept in zip(example.calls, accepted, strict=True)
            ]
        except ValueError as error:
            raise UserError(f"{example.where or example.id}: what is wanted cannot be read ({error}): correct that row") from None
        return Calls(tuple(parts))

    def score(
        self, reference: Reference | Calls, text: str, finish_reason: str = "stop", calls: list[dict[str, str]] | None = None
    ) -> Scored:
        """One reply against its reference: see `metrics.score` and `several.score_calls`; `calls` are a native reply's."""
        if isinstance(reference, Calls):
            return score_calls(reference, text, finish_reason, calls)
        return score(self.parse, reference, text, finish_reason, calls)


def _parameters(example: Example, name: str) -> dict[str, Any] | None:
    """The schema of a tool's arguments, where the row has it."""
    tools = [tool for tool in example.tools or [] if isinstance(tool, dict) and tool.get("name") == name]
    return tools[0].get("parameters") if tools else None


TRACKS = {
    "structured": Track("structured", "json_valid", None, "exact_match", "field", parse_structured),
    "toolcall": Track("toolcall", "valid_call", "name_match", "args_exact", "args", parse_toolcall),
}
