"""A track is data: its metrics' names, its parser and its gate."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from slm_swap.common.errors import UserError
from slm_swap.rows.examples import Example
from slm_swap.scoring.metrics import Match, Reference, Scored, score
from slm_swap.scoring.replies import InvalidReply, Parsed, Parser, parse_structured, parse_toolcall

MATCH_PARTS = ("valid", "name", "exact", "precision", "recall", "f1", "matched", "predicted", "expected")


@dataclass(frozen=True)
class Track:
    """One task. `valid`, `name` and `exact` are its yes-no metrics (`name` None where there is no tool to choose);
    precision, recall and F1 over leaves are called `<fields>_precision` and so on."""

    title: str
    valid: str
    name: str | None
    exact: str
    fields: str
    parse: Parser

    @property
    def yes_no(self) -> tuple[str, ...]:
        return tuple(metric for metric in (self.valid, self.name, self.exact) if metric)

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
        yes_no = {self.valid: match.valid, self.name: match.name, self.exact: match.exact}
        named = {name: float(yes_no[name]) for name in self.yes_no}
        return named | {f"{self.fields}_{kind}": getattr(match, kind) for kind in ("precision", "recall", "f1")}

    def gate_values(self, match: Match) -> dict[str, float]:
        """One row's metrics by the names of `gate`."""
        return dict(zip(self.gate, self.row_metrics(match).values(), strict=True))

    def summarize(self, matches: Iterable[Match]) -> dict[str, float]:
        """The report's metrics: means over all rows, and precision, recall and F1 pooled over their leaves (`*_micro`).

        `matches` may be a Counter of them.

        Raises:
            ValueError: there are no rows.
        """
        counts = Counter(matches)
        if not counts:
            raise ValueError("no rows: a mean over nothing is not a number")
        totals = {part: math.fsum(getattr(match, part) * count for match, count in counts.items()) for part in MATCH_PARTS}
        means = SimpleNamespace(**{part: total / counts.total() for part, total in totals.items()})
        pooled = Match(True, True, True, totals["matched"], totals["predicted"], totals["expected"])
        micro = {f"{self.fields}_{kind}_micro": getattr(pooled, kind) for kind in ("precision", "recall", "f1")}
        return self.gate_values(means) | micro

    def parse_reference(self, completion: str) -> Parsed:
        """A gold completion.

        Raises:
            ValueError: it is not one well-formed reply of this track.
        """
        return self.parse(completion)

    def reference(self, example: Example) -> Reference:
        """A row's gold with the schema that its arguments answer to.

        Raises:
            UserError: the completion is not a reply of this track; the line is named.
        """
        try:
            parsed = self.parse_reference(example.completion)
        except InvalidReply as invalid:
            where = example.where or example.id
            raise UserError(
                f"{where}: the completion is not a {self.title} reply ({invalid.error}: {invalid}): mend that line"
            ) from None
        schema: dict[str, Any] | None = example.schema
        if parsed.name is not None:
            tools = [tool for tool in example.tools or [] if isinstance(tool, dict) and tool.get("name") == parsed.name]
            schema = tools[0].get("parameters") if tools else None
        return Reference(parsed, schema, example.accept, example.completion)

    def score(self, reference: Reference, text: str, finish_reason: str = "stop") -> Scored:
        """One reply against its reference: see `metrics.score`."""
        return score(self.parse, reference, text, finish_reason)


TRACKS = {
    "structured": Track("structured", "json_valid", None, "exact_match", "field", parse_structured),
    "toolcall": Track("toolcall", "valid_call", "name_match", "args_exact", "args", parse_toolcall),
}
