"""The loop over rows: ask, score, and keep."""

import json
import time
from collections.abc import Callable, Collection, Container, Generator, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from slm_swap.clients.protocol import Client, Reply
from slm_swap.common.errors import UserError
from slm_swap.evaluating.outage import Outage
from slm_swap.evaluating.report import Tally
from slm_swap.evaluating.row import Row, is_of, make_row, read_reply, score_row
from slm_swap.rows.examples import Example
from slm_swap.rows.prompts import Request, request_of
from slm_swap.scoring.metrics import Reference, Scored
from slm_swap.scoring.several import Calls
from slm_swap.scoring.tracks import TRACKS, Track

if TYPE_CHECKING:
    from slm_swap.evaluating.journal import Journal
    from slm_swap.evaluating.reply_cache import ReplyCache


def references(track: Track, examples: list[Example]) -> list[Reference | Calls]:
    """Every row's gold, before a model is asked anything: a bad one stops the run.

    Raises:
        UserError: a completion is not a reply of the track; its line is named.
    """
    return [track.reference(example) for example in examples]


def score_replies(track: Track, gold: list[Reference | Calls], replies: Iterable[Reply]) -> list[Scored]:
    """Score replies against their rows' gold, in order."""
    return [track.score(reference, reply.text, reply.finish_reason, reply.calls) for reference, reply in zip(gold, replies, strict=True)]


def evaluate(
    track_name: str,
    client: Client,
    examples: list[Example],
    gold: list[Reference | Calls],
    batch_size: int,
    on_rows: Callable[[int], object] = lambda _: None,
) -> list[Row]:
    """Ask a client for every row, `batch_size` at a time, and score the replies: for rows that fit in memory. `on_rows` is called with
    the number of rows of each batch when it is answered.

    Raises:
        UserError: the client cannot work as it is set up.
    """
    track = TRACKS[track_name]
    rows: list[Row] = []
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        replies = client.generate([request_of(track_name, example) for example in batch])
        parts = zip(batch, gold[start : start + batch_size], replies, strict=True)
        rows += [make_row(track, example, reference, reply, client) for example, reference, reply in parts]
        on_rows(len(batch))
    return rows


def check_rows(track_name: str, examples: Iterable[Example]) -> Tally:
    """Look at every row's gold before a model is asked anything: the tally that `evaluate_rows` goes on with.

    Raises:
        UserError: as `references`; or rows of two forms that have no metric in common.
    """
    tally, due = Tally(track_name), set()
    for example in examples:
        gold = tally.track.reference(example)
        due.add(gold.due if isinstance(gold, Calls) else None)
        tally.expect(example)
    if due >= {None, False}:
        raise UserError(
            "some rows are `{prompt, completion}`, and in some conversations no call is due: whether a model calls when it should cannot "
            "be measured over both; write all rows as conversations, or evaluate them apart"
        )
    return tally


def evaluate_rows(
    tally: Tally,
    client: Client,
    examples: Iterable[Example],
    journal: "Journal",
    cache: "ReplyCache | None" = None,
    on_row: Callable[[int, Row], None] | None = None,
    alone: Collection[int] = (),
    concurrency: int | None = None,
    outage: Outage | None = None,
) -> None:
    """Get every row into the journal that is not answered there: from the cache, else from the client.

    The rows of the indices `alone` are asked first, one at a time, the others `concurrency` at a time (None: not known, as with a local
    model's batches). All rows are added to the tally, and shown to `on_row` with their index, those that were answered before too.

    Raises:
        UserError: the client cannot work as it is set up, there was no answer for as long as `outage` waits, or the journal cannot be
            written.
    """
    run = _Run(tally, client, examples, journal, cache, on_row)
    if journal.state is not None:
        client.restore(journal.state)
    if journal.answered or cache:
        run.recall()
    clock, outage, first = Stopwatch(), outage or Outage(), frozenset(alone)
    if first:
        run.ask(lambda done: run.one_by_one(first, done), outage, clock, 1)
    load = min(concurrency, max(1, len(tally.contents) - len(first))) if concurrency else None
    run.ask(lambda done: client.stream(run.questions(), done), outage, clock, load)


class _Run:
    """One evaluation under way: see `evaluate_rows`."""

    def __init__(
        self,
        tally: Tally,
        client: Client,
        examples: Iterable[Example],
        journal: "Journal",
        cache: "ReplyCache | None",
        on_row: Callable[[int, Row], None] | None,
    ):
        self.tally, self.client, self.examples = tally, client, examples
        self.journal, self.cache, self.on_row = journal, cache, on_row
        self.track = tally.track
        tally.hosted = client.kind != "slm"
        self.asked: dict[int, Example] = {}
        self.ended: set[int] = set()  # rows of this session whose request failed for good: the journal holds them for not answered

    def request(self, example: Example) -> Request:
        return request_of(self.track.title, example)

    def count(self, index: int, row: Row) -> None:
        self.tally.add(row)
        if self.on_row:
            self.on_row(index, row)

    def finish(self, index: int, example: Example, reply: Reply, spent: float, from_cache: bool = False) -> None:
        row = score_row(self.track, example, reply, self.client)
        self.journal.add(index, row.line(self.track), row.reply, spent, from_cache)
        self.ended.add(index)
        self.count(index, row)

    def recall(self) -> None:
        """Count the rows that are answered already; they are scored again, as the code may have changed since."""
        for index, example in enumerate(self.examples):
            if index in self.journal and not is_of(json.loads(self.journal.line(index)), example):
                self.journal.forget(index)
            if index in self.journal:
                before = self.journal.line(index)
                row = score_row(self.track, example, read_reply(json.loads(before)), self.client)
                if (line := row.line(self.track)) != before:
                    self.journal.add(index, line, row.reply, 0.0, kept=row.reply.finish_reason == "error")
                self.count(index, row)
            elif self.cache and (found := self.cache.get(self.request(example))):
                self.finish(index, example, *found, from_cache=True)

    def questions(self) -> Iterator[tuple[int, Request]]:
        for index, example in enumerate(self.examples):
            if index not in self.journal:
                self.asked[index] = example
            yield index, self.request(example)

    def one_by_one(self, alone: Container[int], done: Container[int]) -> Generator[tuple[int, Reply]]:
        for index, request in self.questions():
            if index in alone and index not in done:
                yield index, self.client.generate([request])[0]

    def ask(
        self, stream: Callable[[Container[int]], Generator[tuple[int, Reply]]], outage: Outage, clock: "Stopwatch", load: int | None
    ) -> None:
        """Get the rows of `stream` that are not answered; pauses count for none of them."""
        done, paused = _Answered(self.journal, self.ended), outage.paused
        for index, reply in outage.replies(stream, lambda index: self.client.generate([self.request(self.asked[index])])[0], done):
            spent, example = clock.lap() - (outage.paused - paused), self.asked.pop(index)
            paused = outage.paused
            self.finish(index, example, replace(reply, load=load) if load else reply, max(0.0, spent))
            self.journal.note(self.client.state())
            if self.cache:  # after the journal: a kill in between costs the cache an entry, not the report its count
                self.cache.put(self.request(example), reply, spent)


class _Answered(Container):
    """The rows that are not asked in this session: those that the journal has, and those that have failed for good."""

    def __init__(self, journal: "Journal", ended: Container[int]):
        self._journal, self._ended = journal, ended

    def __contains__(self, index: object) -> bool:
        return index in self._ended or index in self._journal


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
