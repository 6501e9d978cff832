"""Langfuse: every run is one trace, every row a generation under it with its usage and scores.

An outage never fails a run and holds its end up by at most `FLUSH_SECONDS`; what did not arrive is said in one line on stderr.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from slm_swap.errors import UserError
from slm_swap.langfuse_delivery import UNTRACED, Link, connect, within
from slm_swap.settings import Settings

if TYPE_CHECKING:
    from slm_swap.clients import Reply
    from slm_swap.prompts import Messages

FLUSH_SECONDS = 10
PROPAGATED_LENGTH = 200  # the SDK carries no longer text on every span


def require_tracing(settings: Settings) -> bool:
    """Whether this run is traced; called before any model is loaded.

    Raises:
        UserError: tracing is on, and variables are missing (all are named) or the base URL is no address.
    """
    if settings.langfuse_disabled:
        return False
    variables = {
        "LANGFUSE_PUBLIC_KEY": settings.langfuse_public_key,
        "LANGFUSE_SECRET_KEY": settings.langfuse_secret_key,
        "LANGFUSE_BASE_URL": settings.langfuse_base_url,
    }
    missing = [name for name, value in variables.items() if not value]
    if missing:
        raise UserError(f"runs are traced to Langfuse, and {', '.join(missing)} not set: set what is missing, or {UNTRACED}")
    try:
        parts = urlsplit(settings.langfuse_base_url)
        good = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise UserError(f"LANGFUSE_BASE_URL is not an address: set it to one such as https://cloud.langfuse.com, or {UNTRACED}")
    return True


@contextmanager
def trace_run(
    settings: Settings,
    name: str,
    metadata: dict[str, Any] | None = None,
    tags: list[str] | None = None,
    session_id: str | None = None,
) -> Iterator["RunTrace | NoTrace"]:
    """One trace around a run. An exception inside marks it ERROR and goes on its way after the trace is delivered.

    Raises:
        UserError: as `require_tracing`; also, before the body runs, where the server gives no answer or rejects the keys.
    """
    if not require_tracing(settings):
        yield NoTrace()
        return
    trace = RunTrace(connect(settings), name, metadata or {}, tags or [], session_id)
    try:
        yield trace
    except BaseException as error:
        trace.fail(f"{type(error).__name__}: {error}")
        raise
    finally:
        trace.close()


class NoTrace:
    """What a run with LANGFUSE_DISABLED=1 gets: every call is taken and nothing is sent."""

    id: str | None = None
    url: str | None = None

    def generation(self, *_: Any, **__: Any) -> None: ...

    scores = event = update = generation


class RunTrace:
    """The trace of one run. Calls may come from any thread and never fail for Langfuse's sake."""

    def __init__(self, link: Link, name: str, metadata: dict, tags: list[str], session_id: str | None):
        from langfuse import LangfuseChain, propagate_attributes
        from opentelemetry import context, trace

        self._link = link
        self._before = [channel.count() for channel in (link.spans, link.scores)]
        name, metadata = link.clean(name), link.clean(metadata)
        plain = {key: value for key, value in metadata.items() if isinstance(value, bool | int | float | str)}
        short = {key: value for key, value in plain.items() if len(json.dumps(value, ensure_ascii=False)) <= PROPAGATED_LENGTH}
        with propagate_attributes(
            trace_name=name, session_id=link.clean(session_id), tags=link.clean(tags) or None, metadata=short or None
        ):
            carried = context.get_current()
        link.spans.admit()
        span = link.tracer.start_span(name, carried)
        self._root = LangfuseChain(otel_span=span, langfuse_client=link.client, metadata=metadata)
        self._context = trace.set_span_in_context(span, carried)
        self.id: str = self._root.trace_id
        self.url = f"{link.base_url}/project/{link.project}/traces/{self.id}"

    def generation(
        self,
        name: str,
        model: str,
        messages: "Messages",
        reply: "Reply",
        scores: dict[str, float] | None = None,
        error: str | None = None,
        cost: float | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """One row. A failed request (`reply.error`) is level ERROR, a reply that misses (`error`) level WARNING. Without `cost`
        Langfuse may show a price of its own for a model that it knows by name."""
        from langfuse import LangfuseGeneration

        link, scores = self._link, _finite(scores or {})
        if not link.spans.admit():
            link.scores.refuse(len(scores))
            return
        end = time.time_ns()
        start = end - int(reply.seconds * 1e9)
        facts = {"finish_reason": reply.finish_reason, "seconds": reply.seconds, "error": error, **(metadata or {})}
        row = LangfuseGeneration(
            otel_span=link.tracer.start_span(link.clean(name), self._context, start_time=start),
            langfuse_client=link.client,
            model=link.clean(model),
            input=link.clean(messages),
            output=link.clean(reply.text),
            metadata=link.clean(facts),
            level="ERROR" if reply.error else "WARNING" if error else "DEFAULT",
            status_message=link.clean(reply.error or error),
            usage_details={  # the keys must not overlap, and the server adds them up
                "input": int(reply.input_tokens) - int(reply.cached_tokens),
                "input_cached_tokens": int(reply.cached_tokens),
                "output": int(reply.output_tokens),
            },
            cost_details=None if cost is None else {"total": cost},
        )
        row.end(end_time=end)
        self._score(row.score, scores)

    def scores(self, values: dict[str, float | str]) -> None:
        """Scores of the whole run: numbers are numeric, texts categorical."""
        self._score(self._root.score_trace, _finite(values))

    def event(self, name: str, metadata: dict[str, Any] | None = None) -> None:
        """A point in time under the run: a decision, a point of the loss curve."""
        from langfuse import LangfuseEvent

        link = self._link
        if link.spans.admit():
            span = link.tracer.start_span(link.clean(name), self._context)
            LangfuseEvent(otel_span=span, langfuse_client=link.client, metadata=link.clean(metadata)).end()

    def update(self, output: Any = None, metadata: dict[str, Any] | None = None) -> None:
        """The outcome of the run (its metrics), and facts known only later (paths)."""
        self._root.update(output=self._link.clean(output), metadata=self._link.clean(metadata))

    def fail(self, message: str) -> None:
        """Mark the run as failed."""
        self._root.update(level="ERROR", status_message=self._link.clean(message))

    def close(self) -> None:
        """End the trace and wait, at most FLUSH_SECONDS, until it has arrived; say on stderr what has not."""
        self._root.end()
        link, missing = self._link, []
        try:
            within(FLUSH_SECONDS, link.client.flush)
        except Exception as error:
            missing.append(link.clean(error))
        for what, channel, before in zip(("spans", "scores"), (link.spans, link.scores), self._before, strict=True):
            sent, lost = (now - then for now, then in zip(channel.count(), before, strict=True))
            if lost > 0:
                missing.append(f"{lost:,} of {sent:,} {what}" + (f" ({channel.reason})" if channel.reason else ""))
        if missing:
            line = f"warning: Langfuse at {link.host} may lack part of trace {self.id}: {', '.join(missing)}; the run is not affected"
            print(line, file=sys.stderr)

    def _score(self, send: Callable[..., None], values: dict[str, float | str]) -> None:
        if values and self._link.scores.admit(len(values)):
            for name, value in values.items():
                kind = "CATEGORICAL" if isinstance(value, str) else "NUMERIC"
                send(name=self._link.clean(name), value=self._link.clean(value), data_type=kind)


def _finite(values: dict[str, float | str]) -> dict[str, float | str]:
    """Without None, NaN and infinity, which the server rejects with their batch."""
    return {
        name: value for name, value in values.items() if isinstance(value, str) or (value is not None and math.isfinite(value))
    }
