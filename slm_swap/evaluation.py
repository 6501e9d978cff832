"""The one loop over rows: ask, score, and say what came out."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_swap.clients import Client, Reply
from slm_swap.errors import UserError
from slm_swap.examples import Example, text_hash
from slm_swap.metrics import ERRORS, MATCHERS, Reference, Scored
from slm_swap.prompts import build_messages
from slm_swap.reports import SCHEMA_VERSION, code_version, hardware, now, package_versions
from slm_swap.tracks import TRACKS, Track


@dataclass(frozen=True)
class Row:
    """One row with its reply and scores."""

    example: Example
    reply: Reply
    scored: Scored

    def to_json(self, track: Track) -> dict[str, Any]:
        """The line of the rows file."""
        by_matcher = {matcher: track.row_metrics(getattr(self.scored, matcher)) for matcher in MATCHERS}
        return {
            "id": self.example.id,
            "group": self.example.group,
            "prompt_sha256": text_hash(self.example.prompt),
            "reply": self.reply.text,
            "reference": self.example.completion,
            "scores": by_matcher["strict"],
            "scores_by_matcher": by_matcher,
            "error": self.scored.error,
            "finish_reason": self.reply.finish_reason,
            "reply_error": self.reply.error,
            "tokens": {"input": self.reply.input_tokens, "cached": self.reply.cached_tokens, "output": self.reply.output_tokens},
            "seconds": round(self.reply.seconds, 6),
        }


def references(track: Track, examples: list[Example]) -> list[Reference]:
    """Every row's gold, before a model is asked anything: a bad one stops the run.

    Raises:
        UserError: a completion is not a reply of the track; its line is named.
    """
    return [track.reference(example) for example in examples]


def score_replies(track: Track, gold: list[Reference], replies: Iterable[Reply]) -> list[Scored]:
    """Score replies against their rows' gold, in order."""
    return [track.score(reference, reply.text, reply.finish_reason) for reference, reply in zip(gold, replies, strict=True)]


def evaluate(
    track_name: str,
    client: Client,
    examples: list[Example],
    gold: list[Reference],
    batch_size: int,
    on_rows: Callable[[list[Row]], None] | None = None,
) -> list[Row]:
    """Ask a client for every row, `batch_size` at a time, and score the replies; `on_rows` sees each batch as it is done.

    Raises:
        UserError: the client cannot work as it is set up.
    """
    track = TRACKS[track_name]
    rows: list[Row] = []
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        replies = client.generate([build_messages(track_name, example.prompt) for example in batch])
        scored = score_replies(track, gold[start : start + batch_size], replies)
        done = [Row(*parts) for parts in zip(batch, replies, scored, strict=True)]
        rows += done
        if on_rows:
            on_rows(done)
    return rows


def trace_rows(trace: Any, track_name: str, client: Client, rows: list[Row]) -> None:
    """Each row as a generation of a run's trace (`langfuse_helpers.trace_run`), with usage, scores and what it cost.

    A local row has no cost of its own: rows of a batch share the machine's time, and the report has the sum.
    """
    told = client.describe()
    for row in rows:
        reply = row.reply
        used = (reply.input_tokens, reply.cached_tokens, reply.output_tokens, reply.seconds)
        trace.generation(
            name=row.example.id,
            model=model_name(told),
            messages=build_messages(track_name, row.example.prompt),
            reply=reply,
            scores=TRACKS[track_name].row_metrics(row.scored.strict),
            error=row.scored.error,
            cost=client.cost(*used) if client.kind == "azure" else None,
        )


def model_name(told: dict[str, Any]) -> str:
    """A model's short name, from what its client tells of itself."""
    return str(told.get("deployment") or Path(told["path"]).name)


def summary(track: Track, rows: list[Row]) -> dict[str, Any]:
    """Metrics and counts of some rows: what a report and a running display show."""
    errors = Counter(row.scored.error for row in rows if row.scored.error)
    by_matcher = {matcher: track.summarize(getattr(row.scored, matcher) for row in rows) for matcher in MATCHERS}
    return {
        "metrics": by_matcher["strict"],
        "metrics_by_matcher": by_matcher,
        "counts": {
            "rows": len(rows),
            "errors": {error: errors[error] for error in ERRORS},
            "failed_requests": sum(row.reply.finish_reason == "error" for row in rows),
        },
    }


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def make_report(
    track_name: str, client: Client, rows: list[Row], generate_seconds: float, total_seconds: float, inputs: dict, args: dict
) -> dict[str, Any]:
    """The report of one evaluation; every key of it is documented in slm_swap/README.md.

    Raises:
        UserError: no request was answered: there is nothing to report.
    """
    if all(row.reply.finish_reason == "error" for row in rows):
        raise UserError(f"none of the {len(rows)} requests was answered ({rows[0].reply.error}): nothing to report")
    tokens = {name: sum(getattr(row.reply, f"{name}_tokens") for row in rows) for name in ("input", "cached", "output")}
    cost = client.cost(tokens["input"], tokens["cached"], tokens["output"], generate_seconds)
    latencies = [row.reply.seconds for row in rows]
    prompts = sorted(text_hash(str(build_messages(track_name, row.example.prompt))) for row in rows)
    return {
        "schema_version": SCHEMA_VERSION,
        "stage": "eval",
        "created_at": now(),
        "track": track_name,
        "args": args,
        "code": code_version(),
        "packages": package_versions(),
        "hardware": hardware(),
        "model": client.describe(),
        "inputs": inputs | {"rows": len(rows), "rows_sha256": rows_hash(row.example for row in rows)},
        # What was said to a model whose replies were recorded elsewhere is not known.
        "prompt_sha256": None if client.kind == "replay" else text_hash("\n".join(prompts)),
        **summary(TRACKS[track_name], rows),
        "tokens": tokens,
        "seconds": {
            "load": round(client.load_seconds, 3),
            "generate": round(generate_seconds, 3),
            "total": round(total_seconds, 3),
            "per_row": {"p50": round(percentile(latencies, 0.5), 6), "p95": round(percentile(latencies, 0.95), 6)},
        },
        "cost": {"total": cost, "per_1000_rows": None if cost is None else cost * 1000 / len(rows)},
    }


def rows_hash(examples: Iterable[Example]) -> str:
    """One hash for a set of rows, whatever file and order they came in: two reports compare only where it is equal."""
    return text_hash("\n".join(sorted(example.content_hash for example in examples)))


class Stopwatch:
    """Seconds since it was made, and since `lap` was last called."""

    def __init__(self):
        self.started = self.last = time.perf_counter()

    def lap(self) -> float:
        before, self.last = self.last, time.perf_counter()
        return self.last - before

    @property
    def total(self) -> float:
        return time.perf_counter() - self.started
