"""Rows as generations of a run's trace."""

import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_swap.clients.chat_requests import request_body
from slm_swap.clients.protocol import Client, Reply
from slm_swap.evaluating.row import Row
from slm_swap.rows.prompts import Request, request_of
from slm_swap.scoring.tracks import TRACKS

if TYPE_CHECKING:
    from slm_swap.tracing.datasets import Experiment

HELD = 32  # local rows without a batch that share what the machine took for them


def trace_rows(
    trace: Any,
    track_name: str,
    client: Client,
    rows: Iterable[Row],
    parent: str | None = None,
    experiment: "Experiment | None" = None,
    seconds: float | None = None,
    ended: int | None = None,
) -> None:
    """Each row as a generation of a run's trace (`tracing.runs.trace_run`), with usage, scores and what it cost, its retries under
    it; `parent` is the span of the batch that they were asked in, `experiment` the one that they are items of.

    A hosted row costs what its tokens cost. Local rows share the machine's time: `seconds` is what each of them took of it.
    `ended` is when they were answered, in nanoseconds since 1970 (default: now).
    """
    told = client.describe()
    for row in rows:
        reply, end = row.reply, ended or time.time_ns()
        trace.generation(
            row=row.example.id,
            model=model_name(told),
            asked=_as_told(request_of(track_name, row.example)),
            reply=reply,
            scores=TRACKS[track_name].row_metrics(row.scored.strict) | {"error": row.scored.error or "none"},
            error=row.scored.error,
            cost=_cost(client, reply, seconds),
            metadata=row.form._asdict() | ({"confidence": reply.confidence} if reply.confidence else {}),
            parent=parent,
            ended=end,
            attributes=partial(experiment.root_attributes, row.example) if experiment else None,
        )
        for begun, lasted, status in reply.retries:
            span = trace.row_id(row.example.id)
            below = experiment.attributes(row.example, span) if experiment else None
            start = end - int((reply.seconds - begun) * 1e9)
            trace.span("retry", start, start + int(lasted * 1e9), {"status": status}, parent=span, level="WARNING", attributes=below)


def _cost(client: Client, reply: Reply, seconds: float | None) -> dict[str, float] | None:
    """A row's cost as Langfuse takes it; None where a price or a measurement is not known."""
    if client.kind == "azure":
        return client.cost_parts(*reply.counts) if reply.counts else None
    cost = client.cost(0, 0, 0, seconds) if client.kind == "slm" and seconds is not None else None
    return None if cost is None else {"total": cost}


def _as_told(request: Request) -> Any:
    """What a row was asked: the messages, natively with what was sent besides, as an API's request has it."""
    body = request_body(request)
    return request.messages if body.keys() == {"messages"} else body


class RowTracer:
    """Tells a trace of each row of an evaluation: rows that were in a batch under a span of it.

    A failed request waits for `finish`, as it is asked again where the run is interrupted and goes on. Local rows wait for the end of
    their batch, or of HELD rows where there are no batches: then it is known how much of the machine's time was theirs. `spent` gives
    the seconds that all replies together took so far; `earlier` of them were answered in sessions before this one.
    """

    def __init__(
        self, trace: Any, track_name: str, client: Client, experiment: "Experiment | None" = None, spent: Callable[[], float] = lambda: 0.0, earlier: int = 0
    ):
        self._told, self._trace, self._experiment, self._local = (trace, track_name, client), trace, experiment, client.kind == "slm"
        self._spent, self._answered_before = spent, earlier > 0
        self._start = self._told_until = self._last = spent()
        self._earlier = self._start / earlier if earlier and self._start else None  # seconds of each row of the sessions before
        self._batches: dict[str, str] = {}
        self._held: list[tuple[Row, int]] = []  # with the time of its reply, in nanoseconds since 1970
        self._failed: list[Row] = []

    def __call__(self, index: int, row: Row) -> None:
        if self._trace.id is None:
            return
        if row.reply.finish_reason == "error":
            self._failed.append(row)
        elif not self._local:
            trace_rows(*self._told, [row], experiment=self._experiment)
        elif self._answered_before and self._spent() == self._start:
            trace_rows(*self._told, [row], experiment=self._experiment, seconds=self._earlier)
        else:
            if self._held and (row.reply.batch != self._held[-1][0].reply.batch or (row.reply.batch is None and len(self._held) >= HELD)):
                self.tell_held()
            self._held.append((row, time.time_ns()))
        self._last = self._spent()

    def tell_held(self) -> None:
        """Tell of the rows that wait for the end of their batch."""
        if not self._held:
            return
        seconds, self._told_until = (self._last - self._told_until) / len(self._held), self._last
        first, ended = self._held[0]
        batch = first.reply.batch
        if batch is not None and batch not in self._batches:
            self._batches[batch] = self._trace.span("batch", ended - int(first.reply.seconds * 1e9), ended, {"batch": batch})
        for row, ended in self._held:
            trace_rows(*self._told, [row], self._batches.get(batch), self._experiment, seconds, ended)
        self._held = []

    def finish(self) -> None:
        """Tell of the last rows, and of the requests that failed for good."""
        self.tell_held()
        trace_rows(*self._told, self._failed, experiment=self._experiment)


def model_name(told: dict[str, Any]) -> str:
    """A model's short name, from what its client tells of itself."""
    return str(told.get("deployment") or Path(told["path"]).name)
