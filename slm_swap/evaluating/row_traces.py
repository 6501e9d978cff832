"""Rows as generations of a run's trace."""

import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_swap.clients.chat_requests import request_body
from slm_swap.clients.protocol import Client
from slm_swap.evaluating.row import Row
from slm_swap.rows.prompts import Request, request_of
from slm_swap.scoring.tracks import TRACKS

if TYPE_CHECKING:
    from slm_swap.tracing.datasets import Experiment


def trace_rows(
    trace: Any, track_name: str, client: Client, rows: Iterable[Row], parent: str | None = None, experiment: "Experiment | None" = None
) -> None:
    """Each row as a generation of a run's trace (`tracing.runs.trace_run`), with usage, scores and what it cost, its retries under
    it; `parent` is the span of the batch that they were asked in, `experiment` the one that they are items of.

    A local row has no cost of its own: rows of a batch share the machine's time, and the report has the sum.
    """
    told = client.describe()
    for row in rows:
        reply, ended = row.reply, time.time_ns()
        counts = reply.counts if client.kind == "azure" else None
        trace.generation(
            name=row.example.id,
            model=model_name(told),
            asked=_as_told(request_of(track_name, row.example)),
            reply=reply,
            scores=TRACKS[track_name].row_metrics(row.scored.strict) | {"error": row.scored.error or "none"},
            error=row.scored.error,
            cost=client.cost(*counts, reply.seconds) if counts else None,
            metadata=row.form._asdict() | ({"confidence": reply.confidence} if reply.confidence else {}),
            parent=parent,
            ended=ended,
            attributes=partial(experiment.root_attributes, row.example) if experiment else None,
        )
        for begun, seconds, status in reply.retries:
            start = ended - int((reply.seconds - begun) * 1e9)
            trace.span("retry", start, start + int(seconds * 1e9), {"status": status}, parent=trace.row_id(row.example.id), level="WARNING")


def _as_told(request: Request) -> Any:
    """What a row was asked: the messages, natively with what was sent besides, as an API's request has it."""
    body = request_body(request)
    return request.messages if body.keys() == {"messages"} else body


class RowTracer:
    """Tells a trace of each row of an evaluation: rows that were in a batch under a span of it.

    A failed request waits for `finish`, as it is asked again where the run is interrupted and goes on.
    """

    def __init__(self, trace: Any, track_name: str, client: Client, experiment: "Experiment | None" = None):
        self._told, self._trace, self._experiment = (trace, track_name, client), trace, experiment
        self._batches: dict[str, str] = {}
        self._failed: list[Row] = []

    def __call__(self, index: int, row: Row) -> None:
        if self._trace.id is None:
            return
        if row.reply.finish_reason == "error":
            self._failed.append(row)
            return
        batch, parent = row.reply.batch, None
        if batch is not None:
            if batch not in self._batches:
                now = time.time_ns()
                self._batches[batch] = self._trace.span(f"batch {batch}", now - int(row.reply.seconds * 1e9), now)
            parent = self._batches[batch]
        trace_rows(*self._told, [row], parent, self._experiment)

    def finish(self) -> None:
        """Tell of the requests that failed for good."""
        trace_rows(*self._told, self._failed, experiment=self._experiment)


def model_name(told: dict[str, Any]) -> str:
    """A model's short name, from what its client tells of itself."""
    return str(told.get("deployment") or Path(told["path"]).name)
