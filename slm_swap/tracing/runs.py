"""Langfuse: every run is one trace, every row a generation under it with its usage and scores.

A trace goes into a file beside the run's report and from there to Langfuse (`outbox`): an outage never fails a run and
holds its end up by at most `CLOSE_SECONDS`; what did not arrive stays in the file, and one line on stderr says so.
"""

import hashlib
import math
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_swap.common.settings import Settings, shown_path
from slm_swap.rows.prompts import OWN_RUN
from slm_swap.scoring.tracks import TRACKS
from slm_swap.tracing.outbox import ENVIRONMENT, RESEND, SUFFIX, Outbox, open_outbox
from slm_swap.tracing.wire import NoLangfuse, Server, as_text

if TYPE_CHECKING:
    from slm_swap.clients.protocol import Reply
    from slm_swap.rows.prompts import Messages

CLOSE_SECONDS = 10
ROOT_SPAN = "run"
ROW = "row"  # the name of every row's span, so that filters and dashboards take them together
OF_ROWS = frozenset(name for track in TRACKS.values() for gate, name in track.row_names.items() if gate == name)  # of rows and of runs


@dataclass(frozen=True)
class Tracing:
    """How a run is traced: `optional` goes on without Langfuse, `content` sends prompts and replies, `session` groups runs."""

    optional: bool = False
    content: bool = True
    session: str | None = None


@dataclass(frozen=True)
class Connection:
    """A Langfuse project that runs are traced to; `project` None: it is not there, and traces are kept on the disk."""

    server: Server
    project: str | None
    secrets: list[str]
    tracing: Tracing


def connect(settings: Settings, tracing: Tracing | None = None, seconds: float | None = None) -> Connection | None:
    """Where this run is traced to, None where it is not; called before any model is loaded. `seconds`: what one request may take.

    Raises:
        UserError: tracing is on, and as `wire.address`; or the server gives no answer or rejects the keys (not where tracing is
            optional).
    """
    tracing = tracing or Tracing()
    if settings.langfuse_disabled:
        return None
    server, project = Server(settings, seconds), None
    try:
        project = server.project()
    except NoLangfuse as trouble:
        if not tracing.optional:
            raise
        print(f"warning: {trouble}", file=sys.stderr)
    return Connection(server, project, sorted(settings.secrets, key=len, reverse=True), tracing)


@contextmanager
def trace_run(
    connection: Connection | None,
    name: str,
    beside: Path,
    metadata: dict[str, Any] | None = None,
    tags: list[str] | None = None,
    seed: str | None = None,
    keep: Callable[[], bool] = lambda: False,
    environment: str | None = None,
) -> Iterator["RunTrace | NoTrace"]:
    """One trace around a run, kept on its way in a file beside `beside`, the run's report; none without a connection.

    `metadata` is also the root span's input: what was run on what. `environment` is Langfuse's, for the whole trace (default: `default`).
    `seed` makes the trace's id: a run that was interrupted goes on with its trace under the same seed. The file of a run that ends badly
    stays where `keep()` then says that the run can go on, so that rows are not told twice. Another run's file in its place is put aside
    and sent along (`outbox.open_outbox`). An exception inside marks the trace ERROR and goes on its way after it is delivered.

    Raises:
        UserError: before the body runs: the file is in use by another run or cannot be written.
    """
    if connection is None:
        yield NoTrace()
        return
    trace = RunTrace(connection, name, beside, metadata or {}, tags or [], seed or str(uuid.uuid4()), environment)
    try:
        yield trace
    except BaseException as error:
        trace.fail(f"{type(error).__name__}: {error}")
        trace.close(keep())
        raise
    trace.close()


class NoTrace:
    """What a run with LANGFUSE_DISABLED=1 gets: every call is taken and nothing is sent."""

    id: str | None = None
    url: str | None = None

    def generation(self, *_: Any, **__: Any) -> None: ...

    scores = event = span = update = row_id = generation


class RunTrace:
    """The trace of one run. Calls may come from any thread and never fail for Langfuse's sake."""

    def __init__(
        self, connection: Connection, name: str, beside: Path, metadata: dict[str, Any], tags: list[str], seed: str, environment: str | None = None
    ):
        self._content, session = connection.tracing.content, connection.tracing.session
        server, self._host = connection.server, connection.server.host
        self.id, self.url = trace_of(connection, seed).values()
        shared = {
            "langfuse.trace.name": name,
            "langfuse.trace.tags": [str(tag) for tag in tags],
            **({"session.id": session} if session else {}),
            **({ENVIRONMENT: environment} if environment else {}),
            **{f"langfuse.trace.metadata.{key}": value for key, value in metadata.items()},
        }
        header = {"trace": self.id, "base_url": server.base_url, "attributes": shared, "start": time.time_ns()}
        place, receiver = outbox_path(beside), server if connection.project else None
        self._outbox, self._earlier = open_outbox(place, header, receiver, connection.secrets)
        self._root = _span_id(self.id, ROOT_SPAN)
        self._start = (self._outbox.header or header).get("start", header["start"])  # of the first process, where this one goes on
        self._root_facts: dict[str, Any] = {"type": "chain", "input": dict(metadata), "metadata": dict(metadata)}
        self._name = name

    def generation(
        self,
        row: str,
        model: str,
        asked: "Messages | dict[str, Any]",
        reply: "Reply",
        scores: dict[str, float | str] | None = None,
        error: str | None = None,
        cost: dict[str, float] | None = None,
        metadata: dict[str, Any] | None = None,
        parent: str | None = None,
        attributes: Callable[[str], dict[str, str]] | None = None,
        ended: int | None = None,
        own: bool = True,
        name: str = ROW,
    ) -> None:
        """One row, whose span has the id `row_id(row)`; skipped where the trace has it already. All rows' spans have the same `name`; the
        metadata says which row it is, as `row_id`. `asked` are its messages, or the whole body of a request with tools.

        A failed request (`reply.error`) is level ERROR, a reply that misses (`error`) level WARNING. `cost` has
        `total` and, where they are known, the costs of `input`, `input_cached_tokens` and `output`; without it Langfuse may show a price of
        its own for a model that it knows by name. `attributes` gives, for the span's id, attributes of OpenTelemetry's own, such as an experiment's.
        What is not `own` is production's traffic, which `pull_langfuse.py` makes rows of.
        """
        end = ended or time.time_ns()

        def records() -> list[dict[str, Any]]:
            identity = self.row_id(row)
            if identity in self._outbox.known:
                return []
            facts = {
                "type": "generation",
                "input": asked if self._content else _digest(asked),
                "output": _answer(reply) if self._content else _digest(_answer(reply)),
                "model.name": model,
                "metadata": ({OWN_RUN: True} if own else {}) | {f"{name}_id": row, "finish_reason": reply.finish_reason, "seconds": reply.seconds, "error": error, **(metadata or {})},
                "level": "ERROR" if reply.error else "WARNING" if error else "DEFAULT",
                "status_message": reply.error or error,
                "usage_details": _usage(reply),
                "cost_details": cost,
            }
            start = end - int(reply.seconds * 1e9)
            more = attributes(identity) if attributes else None
            span = self._span(identity, parent or self._root, name, start, end, facts, more)
            return [span, *self._scores(identity, scores or {})]

        self._outbox.add(records)

    def row_id(self, row: str) -> str:
        """The id of a row's span."""
        return _span_id(self.id, f"row:{row}")

    def span(
        self,
        name: str,
        start: int,
        end: int,
        metadata: dict[str, Any] | None = None,
        parent: str | None = None,
        level: str = "DEFAULT",
        attributes: dict[str, str] | None = None,
    ) -> str:
        """A stretch of the run (a batch, a retry) in nanoseconds since 1970, and its id: equal spans are one. `attributes` as of `generation`."""
        identity = _span_id(self.id, f"span:{name}:{start}:{parent}:{as_text(metadata)}")
        facts = {"type": "span", "metadata": metadata or {}, "level": level}
        self._outbox.add(lambda: [self._span(identity, parent or self._root, name, start, end, facts, attributes)])
        return identity

    def scores(self, values: dict[str, float | str]) -> None:
        """Scores of the whole run: numbers are numeric, texts categorical. A mean over rows that would have the name of a row's own score
        is called `<name>_mean`: Langfuse's charts take scores by their names."""
        given = {f"{name}_mean" if name in OF_ROWS else name: value for name, value in values.items()}
        self._outbox.add(lambda: self._scores(None, given))

    def event(self, name: str, metadata: dict[str, Any] | None = None, at: int | None = None, scores: dict[str, float] | None = None) -> None:
        """A point in time under the run: a decision, a point of the loss curve; `at` in nanoseconds since 1970 (default: now). Its `scores`
        have that time, too, so that Langfuse can chart them."""
        at, told = at or time.time_ns(), metadata or {}

        def records() -> list[dict[str, Any]]:
            identity = _span_id(self.id, f"event:{name}:{at}:{as_text(told)}")  # several points may have one time
            return [self._span(identity, self._root, name, at, at, {"type": "event", "metadata": told}), *self._scores(identity, scores or {}, at)]

        self._outbox.add(records)

    def update(self, output: Any = None, metadata: dict[str, Any] | None = None) -> None:
        """The outcome of the run (its metrics), and facts known only later (paths)."""
        self._root_facts |= {} if output is None else {"output": output}
        self._root_facts["metadata"] |= metadata or {}

    def fail(self, message: str) -> None:
        """Mark the run as failed."""
        self._root_facts |= {"level": "ERROR", "status_message": message}

    def close(self, keep: bool = False) -> None:
        """End the trace and wait, at most CLOSE_SECONDS, until it has arrived; say on stderr what has not. `keep` its file anyway."""
        end = time.time_ns()
        self._outbox.add(lambda: [self._span(self._root, "", self._name, self._start, end, self._root_facts)])
        deadline = time.monotonic() + CLOSE_SECONDS
        self._tell_missing(self._outbox, self._outbox.close(CLOSE_SECONDS, keep))
        if self._earlier:
            self._tell_missing(self._earlier, self._earlier.close(max(0.0, deadline - time.monotonic())))

    def _tell_missing(self, outbox: Outbox, missing: dict[str, int]) -> None:
        if outbox.unwritten:
            print(f"warning: {shown_path(outbox.path)} could not take all of the trace ({outbox.unwritten})", file=sys.stderr)
        if outbox.turned_down:
            print(f"warning: Langfuse at {self._host} turned {outbox.turned_down:,} scores down as not valid", file=sys.stderr)
        if told := " and ".join(f"{count:,} {kind}" for kind, count in missing.items() if count):
            why = f" ({outbox.reason})" if outbox.reason else ""
            print(
                f"warning: {told} have not reached Langfuse at {self._host}{why}: they are kept in "
                f"{shown_path(outbox.path)}; send them by {RESEND}",
                file=sys.stderr,
            )

    def _span(
        self,
        identity: str,
        parent: str,
        name: str,
        start: int,
        end: int,
        facts: dict[str, Any],
        attributes: dict[str, str] | None = None,
    ) -> dict[str, Any]:
        """A record of a span, as the outbox keeps it; `wire.encode` makes attributes of the facts."""
        span = {"id": identity, "parent": parent, "name": name, "start": start, "end": end, "facts": facts}
        return {"span": span | ({"attributes": attributes} if attributes else {})}

    def _scores(self, of: str | None, values: dict[str, float | str], at: int | None = None) -> list[dict[str, Any]]:
        """A record of an observation's scores, or of the trace's; without None, NaN and infinity, which Langfuse rejects."""
        good = {
            name: value for name, value in values.items() if isinstance(value, str) or (value is not None and math.isfinite(value))
        }
        return [{"scores": good, "of": of, "at": at or time.time_ns()}] if good else []


def trace_of(connection: Connection | None, seed: str) -> dict[str, str | None]:
    """A report's `trace`, known before its run: the `id` of the trace that `trace_run` makes of a seed, and its `url` where the project is known."""
    found = trace_id(seed) if connection else None
    project = connection.project if connection else None
    return {"id": found, "url": f"{connection.server.base_url}/project/{project}/traces/{found}" if project else None}


def trace_id(seed: str) -> str:
    """As the SDK's create_trace_id."""
    return hashlib.sha256(seed.encode()).digest()[:16].hex()


def _usage(reply: "Reply") -> dict[str, int] | None:
    """The tokens, under keys that do not overlap, as the server adds them up; None where they are not all known."""
    if (counts := reply.counts) is None:
        return None
    given, cached, made = map(int, counts)
    return {"input": given - cached, "input_cached_tokens": cached, "output": made}


def outbox_path(report: Path) -> Path:
    """Where what a run's trace still has to deliver lies: beside its report."""
    return report.with_name(report.name.removesuffix(".json") + SUFFIX)


def _span_id(trace: str, name: str) -> str:
    return hashlib.blake2b(f"{trace}:{name}".encode("utf-8", "replace"), digest_size=8).hexdigest()


def _answer(reply: "Reply") -> Any:
    """A reply's text; with calls of its own the message that an API would have given."""
    if not reply.calls:
        return reply.text
    calls = [{"id": f"call_{at}", "type": "function", "function": call} for at, call in enumerate(reply.calls)]
    return {"role": "assistant", "content": reply.text or None, "tool_calls": calls}


def _digest(value: Any) -> dict[str, Any]:
    """What is sent instead of a text: its length and sha256."""
    text = as_text(value)
    return {"sha256": hashlib.sha256(text.encode("utf-8", "replace")).hexdigest(), "characters": len(text)}
