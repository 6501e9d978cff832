"""The one loop over rows: ask, score, and say what came out."""

import hashlib
import math
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from slm_swap.clients import Client, Reply
from slm_swap.errors import UserError
from slm_swap.examples import Example, text_hash
from slm_swap.metrics import ERRORS, MATCHERS, Match, Reference, Scored
from slm_swap.prompts import Messages, build_messages
from slm_swap.reports import SCHEMA_VERSION, code_version, hardware, json_line, now, package_versions
from slm_swap.tracks import TRACKS, Track

if TYPE_CHECKING:
    from slm_swap.journal import Journal
    from slm_swap.langfuse_datasets import Experiment
    from slm_swap.reply_cache import ReplyCache


@dataclass(frozen=True)
class Row:
    """One row with its reply and scores."""

    example: Example
    reply: Reply
    scored: Scored

    def to_json(self, track: Track) -> dict[str, Any]:
        """The line of the rows file."""
        matches = {matcher: getattr(self.scored, matcher) for matcher in MATCHERS}
        metrics = {match: track.row_metrics(match) for match in set(matches.values())}  # mostly one and the same
        by_matcher = {matcher: metrics[match] for matcher, match in matches.items()}
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


def check_rows(track_name: str, examples: Iterable[Example]) -> tuple[int, str]:
    """(how many rows, a hash of all messages in order), every row's gold looked at before a model is asked anything.

    Raises:
        UserError: as `references`.
    """
    count, messages = 0, hashlib.sha256()
    for example in examples:
        TRACKS[track_name].reference(example)
        for message in build_messages(track_name, example.prompt):
            messages.update(f"{message['role']}\0{message['content']}\0".encode())
        count += 1
    return count, messages.hexdigest()


def collect_replies(
    track_name: str,
    client: Client,
    examples: Iterable[Example],
    journal: "Journal",
    cache: "ReplyCache | None" = None,
    on_reply: Callable[[int, Example, Reply], None] | None = None,
) -> None:
    """Get every row's reply into the journal that has none yet: from the cache, else from the client; `on_reply` sees each with its
    row's index.

    Raises:
        UserError: the client cannot work as it is set up, or the journal cannot be written.
    """
    if journal.state is not None:
        client.restore(journal.state)
    if cache:
        for index, example in enumerate(examples):
            if index not in journal and (found := cache.get(build_messages(track_name, example.prompt))):
                journal.add(index, *found, from_cache=True)
                if on_reply:
                    on_reply(index, example, found[0])
    asked: dict[int, Example] = {}

    def questions() -> Iterator[tuple[int, Messages]]:
        for index, example in enumerate(examples):
            if index not in journal:
                asked[index] = example
                yield index, build_messages(track_name, example.prompt)

    clock = Stopwatch()
    for index, reply in client.stream(questions()):
        spent, example = clock.lap(), asked.pop(index)
        journal.add(index, reply, spent)
        journal.note(client.state())
        if cache:
            cache.put(build_messages(track_name, example.prompt), reply, spent)
        if on_reply:
            on_reply(index, example, reply)


def scored_rows(track_name: str, examples: Iterable[Example], replies: Iterable[Reply]) -> Iterator[Row]:
    """Rows, replies and scores put together, in order."""
    track = TRACKS[track_name]
    for example, reply in zip(examples, replies, strict=True):
        yield Row(example, reply, track.score(track.reference(example), reply.text, reply.finish_reason))


def written(track_name: str, rows: Iterable[Row], stream: IO[str]) -> Iterator[Row]:
    """The same rows, each written to the stream as a line of the rows file as it passes."""
    for row in rows:
        stream.write(json_line(row.to_json(TRACKS[track_name])))
        yield row


def trace_rows(
    trace: Any, track_name: str, client: Client, rows: Iterable[Row], parent: str | None = None, experiment: "Experiment | None" = None
) -> None:
    """Each row as a generation of a run's trace (`langfuse_helpers.trace_run`), with usage, scores and what it cost, its retries under
    it; `parent` is the span of the batch that they were asked in, `experiment` the one that they are items of.

    A local row has no cost of its own: rows of a batch share the machine's time, and the report has the sum.
    """
    told = client.describe()
    for row in rows:
        reply, ended = row.reply, time.time_ns()
        used = (reply.input_tokens, reply.cached_tokens, reply.output_tokens, reply.seconds)
        generation = trace.generation(
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
            trace.span("retry", start, start + int(seconds * 1e9), {"status": status}, parent=generation, level="WARNING")


class RowTracer:
    """Tells a trace of each row of an evaluation as its reply comes: local rows under a span of their batch.

    A failed request waits for `finish`: it is asked again where the run is interrupted and goes on.
    """

    def __init__(self, trace: Any, track_name: str, client: Client, batch_size: int, experiment: "Experiment | None" = None):
        self._told, self._experiment = (trace, track_name, client), experiment
        self._trace, self._size = trace, batch_size if client.kind == "slm" else None
        self._batch, self._since, self._parent = -1, time.time_ns(), None

    def __call__(self, index: int, example: Example, reply: Reply) -> None:
        if self._trace.id is None or reply.finish_reason == "error":
            return
        if self._size and self._batch != index // self._size:
            self._batch, now = index // self._size, time.time_ns()
            self._parent = self._trace.span(f"batch {self._batch}", self._since, now, {"batch_size": self._size})
            self._since = now
        self._tell(example, reply, self._parent)

    def earlier(self, examples: Iterable[Example], journal: "Journal") -> None:
        """Tell of the rows that an interrupted run answered: the trace passes over those that it has."""
        if self._trace.id is not None and journal.answered:
            for index, example in enumerate(examples):
                if index in journal:
                    self._tell(example, journal.reply(index))

    def finish(self, examples: Iterable[Example], journal: "Journal") -> None:
        """Tell of the requests that failed for good."""
        if self._trace.id is not None and journal.failed:
            for index, example in enumerate(examples):
                if index in journal.failed:
                    self._tell(example, journal.reply(index))

    def _tell(self, example: Example, reply: Reply, parent: str | None = None) -> None:
        trace, track, client = self._told
        trace_rows(trace, track, client, scored_rows(track, [example], [reply]), parent, self._experiment)


def model_name(told: dict[str, Any]) -> str:
    """A model's short name, from what its client tells of itself."""
    return str(told.get("deployment") or Path(told["path"]).name)


@dataclass
class Tally:
    """What a summary says of rows, without the rows."""

    matches: dict[str, Counter[Match]] = field(default_factory=lambda: {matcher: Counter() for matcher in MATCHERS})
    errors: Counter[str | None] = field(default_factory=Counter)
    failed_requests: int = 0

    def add(self, row: Row) -> None:
        for matcher, counts in self.matches.items():
            counts[getattr(row.scored, matcher)] += 1
        self.errors[row.scored.error] += 1
        self.failed_requests += row.reply.finish_reason == "error"

    def summary(self, track: Track) -> dict[str, Any]:
        """Metrics and counts of the rows: what a report and a running display show."""
        by_matcher = {matcher: track.summarize(counts) for matcher, counts in self.matches.items()}
        return {
            "metrics": by_matcher["strict"],
            "metrics_by_matcher": by_matcher,
            "counts": {
                "rows": self.errors.total(),
                "errors": {error: self.errors[error] for error in ERRORS},
                "failed_requests": self.failed_requests,
            },
        }


def summary(track: Track, rows: Iterable[Row]) -> dict[str, Any]:
    """`Tally.summary` of some rows."""
    tally = Tally()
    for row in rows:
        tally.add(row)
    return tally.summary(track)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def make_report(
    track_name: str,
    client: Client,
    rows: Iterable[Row],
    generate_seconds: float,
    total_seconds: float,
    inputs: dict,
    args: dict,
    sessions: int = 1,
    cached_replies: int = 0,
) -> dict[str, Any]:
    """The report of one evaluation; every key of it is documented in slm_swap/README.md.

    The rows are looped over once, and of each some 150 bytes are kept.

    Raises:
        UserError: no request was answered: there is nothing to report.
    """
    tally, first_error = Tally(), None
    tokens = dict.fromkeys(("input", "cached", "output"), 0)
    latencies, contents, prompts = array("d"), [], []
    for row in rows:
        tally.add(row)
        tokens["input"] += row.reply.input_tokens
        tokens["cached"] += row.reply.cached_tokens
        tokens["output"] += row.reply.output_tokens
        latencies.append(row.reply.seconds)
        contents.append(bytes.fromhex(row.example.content_hash))
        prompts.append(bytes.fromhex(text_hash(str(build_messages(track_name, row.example.prompt)))))
        first_error = first_error or row.reply.error
    count = len(latencies)
    if tally.failed_requests == count:
        raise UserError(f"none of the {count} requests was answered ({first_error}): nothing to report")
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
        "inputs": inputs | {"rows": count, "rows_sha256": hash_of_hashes(contents)},
        # What was said to a model whose replies were recorded elsewhere is not known.
        "prompt_sha256": None if client.kind == "replay" else hash_of_hashes(prompts),
        **tally.summary(TRACKS[track_name]),
        "tokens": tokens,
        "sessions": sessions,
        "cached_replies": cached_replies,
        "seconds": {
            "load": round(client.load_seconds, 3),
            "generate": round(generate_seconds, 3),
            "total": round(total_seconds, 3),
            "per_row": {"p50": round(percentile(latencies, 0.5), 6), "p95": round(percentile(latencies, 0.95), 6)},
        },
        "cost": {"total": cost, "per_1000_rows": None if cost is None else cost * 1000 / count},
    }


def rows_hash(examples: Iterable[Example]) -> str:
    """One hash for a set of rows, whatever file and order they came in: two reports compare only where it is equal."""
    return hash_of_hashes(bytes.fromhex(example.content_hash) for example in examples)


def hash_of_hashes(hashes: Iterable[bytes]) -> str:
    """One hash for hashes in any order."""
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
