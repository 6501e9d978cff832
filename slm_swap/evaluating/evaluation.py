"""The loop over rows: ask, score, and say what came out."""

import json
import math
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_swap.clients.protocol import Client, Reply
from slm_swap.common.errors import UserError
from slm_swap.common.reports import SCHEMA_VERSION, code_version, hardware, json_line, json_text, now, package_versions
from slm_swap.rows.examples import Example, text_hash
from slm_swap.rows.prompts import Messages, build_messages
from slm_swap.scoring.metrics import ERRORS, MATCHERS, Match, Reference, Scored
from slm_swap.scoring.tracks import TRACKS, Track

if TYPE_CHECKING:
    from slm_swap.evaluating.journal import Journal
    from slm_swap.evaluating.reply_cache import ReplyCache
    from slm_swap.tracing.datasets import Experiment

PERCENTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}  # of a row's seconds


@dataclass(frozen=True)
class Row:
    """One row with its reply and scores."""

    example: Example
    reply: Reply
    scored: Scored

    def to_json(self, track: Track) -> dict[str, Any]:
        """What the rows file says of it."""
        return json.loads(self.line(track))

    def line(self, track: Track) -> str:
        """Its line of the rows file, put together by hand: rows have few different scores, and they are the most of it."""
        example, reply = self.example, self.reply
        return (
            f'{{"id": {json_text(example.id)}, "group": {json_text(example.group)}, "prompt_sha256": "{text_hash(example.prompt)}", '
            f'"reply": {json_text(reply.text)}, "reference": {json_text(example.completion)}, '
            f'{_scores_json(track.title, self.scored)}, "finish_reason": {json_text(reply.finish_reason)}, '
            f'"reply_error": {json_text(reply.error)}, '
            f'"tokens": {{"input": {reply.input_tokens}, "cached": {reply.cached_tokens}, "output": {reply.output_tokens}}}, '
            f'"seconds": {round(reply.seconds, 6)}}}\n'
        )


@lru_cache(maxsize=4096)
def _scores_json(track_name: str, scored: Scored) -> str:
    """The scores and the error of a line, without the braces around them."""
    by_matcher = {matcher: TRACKS[track_name].row_metrics(getattr(scored, matcher)) for matcher in MATCHERS}
    return json_line({"scores": by_matcher["strict"], "scores_by_matcher": by_matcher, "error": scored.error})[1:-2]


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
) -> list[Row]:
    """Ask a client for every row, `batch_size` at a time, and score the replies: for rows that fit in memory.

    Raises:
        UserError: the client cannot work as it is set up.
    """
    track = TRACKS[track_name]
    rows: list[Row] = []
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        replies = client.generate([build_messages(track_name, example.prompt) for example in batch])
        scored = score_replies(track, gold[start : start + batch_size], replies)
        rows += [Row(*parts) for parts in zip(batch, replies, scored, strict=True)]
    return rows


def check_rows(track_name: str, examples: Iterable[Example]) -> "Tally":
    """Look at every row's gold before a model is asked anything: the tally that `evaluate_rows` goes on with.

    Raises:
        UserError: as `references`.
    """
    tally = Tally(track_name)
    for example in examples:
        tally.track.reference(example)
        tally.expect(example)
    return tally


def evaluate_rows(
    tally: "Tally",
    client: Client,
    examples: Iterable[Example],
    journal: "Journal",
    cache: "ReplyCache | None" = None,
    on_row: Callable[[int, Row], None] | None = None,
) -> None:
    """Get every row into the journal that is not answered there: from the cache, else from the client.

    All rows are added to the tally, and shown to `on_row` with their index, those that were answered before too.

    Raises:
        UserError: the client cannot work as it is set up, or the journal cannot be written.
    """
    track_name, track, asked = tally.track.title, tally.track, dict[int, Example]()

    def finish(index: int, example: Example, reply: Reply, spent: float, from_cache: bool = False) -> None:
        row = score_row(track, example, reply)
        journal.add(index, row.line(track), reply, spent, from_cache)
        tally.add(row)
        if on_row:
            on_row(index, row)

    def recall(index: int, example: Example) -> None:
        """Count a row that is answered already; it is scored again, as the code may have changed since."""
        if index in journal:
            row = score_row(track, example, read_reply(json.loads(journal.line(index))))
            if row.line(track) != journal.line(index):
                journal.add(index, row.line(track), row.reply, 0.0)
            tally.add(row)
            if on_row:
                on_row(index, row)
        elif cache and (found := cache.get(build_messages(track_name, example.prompt))):
            finish(index, example, *found, from_cache=True)

    def questions() -> Iterator[tuple[int, Messages]]:
        for index, example in enumerate(examples):
            if index not in journal:
                asked[index] = example
            yield index, build_messages(track_name, example.prompt)

    if journal.state is not None:
        client.restore(journal.state)
    if journal.answered or cache:
        for index, example in enumerate(examples):
            recall(index, example)
    clock = Stopwatch()
    with closing(client.stream(questions(), journal)) as replies:
        for index, reply in replies:
            spent, example = clock.lap(), asked.pop(index)
            finish(index, example, reply, spent)
            journal.note(client.state())
            if cache:  # after the journal: a kill in between costs the cache an entry, not the report its count
                cache.put(build_messages(track_name, example.prompt), reply, spent)


def score_row(track: Track, example: Example, reply: Reply) -> Row:
    """A row with its reply, scored."""
    return Row(example, reply, track.score(track.reference(example), reply.text, reply.finish_reason))


def read_reply(line: dict[str, Any]) -> Reply:
    """The reply of a line of `Row.to_json`."""
    tokens = line["tokens"]
    counts = tokens["input"], tokens["output"], tokens["cached"]
    return Reply(line["reply"], line["finish_reason"], *counts, line["seconds"], line["reply_error"])


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
        used = (reply.input_tokens, reply.cached_tokens, reply.output_tokens, reply.seconds)
        trace.generation(
            name=row.example.id,
            model=model_name(told),
            messages=build_messages(track_name, row.example.prompt),
            reply=reply,
            scores=TRACKS[track_name].row_metrics(row.scored.strict) | {"error": row.scored.error or "none"},
            error=row.scored.error,
            cost=client.cost(*used) if client.kind == "azure" else None,
            parent=parent,
            ended=ended,
            attributes=partial(experiment.root_attributes, row.example) if experiment else None,
        )
        for begun, seconds, status in reply.retries:
            start = ended - int((reply.seconds - begun) * 1e9)
            trace.span("retry", start, start + int(seconds * 1e9), {"status": status}, parent=trace.row_id(row.example.id), level="WARNING")


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


class Tally:
    """What a report says of rows, without the rows: of each, some 200 bytes are kept."""

    def __init__(self, track_name: str):
        self.track = TRACKS[track_name]
        self.matches: dict[str, Counter[Match]] = {matcher: Counter() for matcher in MATCHERS}
        self.errors: Counter[str | None] = Counter()
        self.failed_requests, self.last_failure = 0, None
        self.tokens = {"input": 0, "cached": 0, "output": 0}
        self.latencies = array("d")
        self.contents: list[bytes] = []
        self.prompts: list[bytes] = []

    def __len__(self) -> int:
        return len(self.latencies)

    def expect(self, example: Example) -> None:
        """Note what a row says and asks; its reply comes with `add`."""
        self.contents.append(bytes.fromhex(example.content_hash))
        self.prompts.append(bytes.fromhex(text_hash(str(build_messages(self.track.title, example.prompt)))))

    @property
    def prompt_sha256(self) -> str:
        """One hash for all messages, in any order."""
        return hash_of_hashes(self.prompts)

    def add(self, row: Row) -> None:
        reply, scored = row.reply, row.scored
        for matcher, counts in self.matches.items():
            counts[getattr(scored, matcher)] += 1
        self.errors[scored.error] += 1
        if reply.finish_reason == "error":
            self.failed_requests, self.last_failure = self.failed_requests + 1, reply.error
        self.tokens["input"] += reply.input_tokens
        self.tokens["cached"] += reply.cached_tokens
        self.tokens["output"] += reply.output_tokens
        self.latencies.append(reply.seconds)

    def summary(self) -> dict[str, Any]:
        """Metrics and counts: what a report and a running display show."""
        by_matcher = {matcher: self.track.summarize(counts) for matcher, counts in self.matches.items()}
        return {
            "metrics": by_matcher["strict"],
            "metrics_by_matcher": by_matcher,
            "counts": {
                "rows": len(self),
                "errors": {error: self.errors[error] for error in ERRORS},
                "failed_requests": self.failed_requests,
            },
        }


def summary(track: Track, rows: Iterable[Row]) -> dict[str, Any]:
    """`Tally.summary` of some rows."""
    tally = Tally(track.title)
    for row in rows:
        tally.add(row)
    return tally.summary()


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def make_report(
    track_name: str,
    client: Client,
    rows: Tally | Iterable[Row],
    generate_seconds: float,
    total_seconds: float,
    inputs: dict,
    args: dict,
    sessions: int = 1,
    cached_replies: int = 0,
) -> dict[str, Any]:
    """The report of one evaluation; every key of it is documented in slm_swap/README.md.

    Raises:
        UserError: no request was answered: there is nothing to report.
    """
    tally = rows if isinstance(rows, Tally) else Tally(track_name)
    for row in rows if tally is not rows else ():
        tally.expect(row.example)
        tally.add(row)
    count, tokens, latencies = len(tally), tally.tokens, sorted(tally.latencies)
    if tally.failed_requests == count:
        raise UserError(f"none of the {count} requests was answered ({tally.last_failure}): nothing to report")
    cost = client.cost(tokens["input"], tokens["cached"], tokens["output"], generate_seconds)
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
        "inputs": inputs | {"rows": count, "rows_sha256": hash_of_hashes(tally.contents)},
        # What was said to a model whose replies were recorded elsewhere is not known.
        "prompt_sha256": None if client.kind == "replay" else tally.prompt_sha256,
        **tally.summary(),
        "tokens": tokens,
        "sessions": sessions,
        "cached_replies": cached_replies,
        "seconds": {
            "load": round(client.load_seconds, 3),
            "generate": round(generate_seconds, 3),
            "total": round(total_seconds, 3),
            "per_row": {name: round(percentile(latencies, share), 6) for name, share in PERCENTILES.items()},
        },
        "cost": {"total": cost, "per_1000_rows": None if cost is None else cost * 1000 / count},
    }


def hash_of_hashes(hashes: Iterable[bytes]) -> str:
    """One hash for a set of hashes, such as the rows' contents, whatever order they came in."""
    return text_hash("\n".join(digest.hex() for digest in sorted(hashes)))


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
