"""Ask a hosted model several times for rows that have no reply, within a budget, and nothing twice."""

import json
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from slm_swap.clients.protocol import Client, Reply
from slm_swap.evaluating.finished import SETS
from slm_swap.evaluating.journal import Journal
from slm_swap.evaluating.outage import Outage
from slm_swap.evaluating.row import read_reply, score_row
from slm_swap.rows.examples import Example
from slm_swap.rows.lines import dump_json
from slm_swap.rows.prompts import Request, request_of
from slm_swap.scoring.tracks import TRACKS

CHARACTERS = 3  # a token, for an estimate that is rather too high: English has about four


class Labelling:
    """The samples of each row, all in one journal: sample s of row r is its row s * rows + r.

    `budget` is the most money that all samples together may cost, earlier sessions included; a request is sent only where it is left
    after those under way, each counted with a reply of `max_new_tokens`.
    """

    def __init__(self, track: str, examples: Sequence[Example], samples: int, max_new_tokens: int, budget: float | None):
        self.track, self.examples, self.samples, self.budget = TRACKS[track], examples, samples, budget
        self.max_new_tokens = max_new_tokens
        self.requests = [request_of(track, example) for example in examples]
        self.spent = 0.0
        self.model: dict[str, Any] = {}  # what the client tells of itself
        self.failure: str | None = None  # of a request that may be answered later
        self.unknown = 0  # replies that do not say how many tokens they took: the estimate stands for them

    def estimate(self, client: Client, request: Request) -> float | None:
        """What asking once costs at most, about; None where the prices are not known."""
        characters = len(dump_json(request.key()))
        return client.cost(-(-characters // CHARACTERS), 0, self.max_new_tokens, 0.0)

    def most(self, client: Client) -> float | None:
        """What all samples cost at most, about."""
        each = [self.estimate(client, request) for request in self.requests]
        return None if None in each else self.samples * sum(each)

    def ask(self, make: Callable[[int], Client], journal: Journal, outage: Outage, on_reply: Callable[[], object]) -> bool:
        """Get every sample into the journal that is not there; False where the budget ended first. `make` gives a sample's client.

        Requests that failed and may be answered later are missing, and `failure` says why.
        """
        complete, self.model = True, dict(journal.kept.get("model") or {})
        for sample in range(self.samples):
            client = make(sample)
            with closing(client):
                if not sample:
                    self._count(client, journal)
                complete &= self._sample(client, journal, sample, outage, on_reply)
                told = client.describe()
        if self.model and "seed" in told.get("parameters", ()):  # the last sample's, whichever was asked last
            self.model |= {"parameters": self.model["parameters"] | {"seed": told["parameters"]["seed"]}}
        self.model = self.model or told
        return complete

    def _learn(self, client: Client, journal: Journal) -> None:
        """Write down what is known of the model since its reply, over all sessions: the one that ends the run may ask nothing."""
        told = client.describe()
        told |= {name: sorted({*self.model.get(name, ()), *told.get(name, ())}) for name in SETS}
        if told != self.model:
            self.model = told
            journal.keep("model", told)

    def _count(self, client: Client, journal: Journal) -> None:
        """Count what all samples of earlier sessions cost, before anything is asked."""
        for index in range(self.samples * len(self.requests)):
            if index in journal:
                self._pay(client, self.requests[index % len(self.requests)], read_reply(json.loads(journal.line(index))))

    def _pay(self, client: Client, request: Request, reply: Reply) -> None:
        cost = client.cost(*reply.counts, reply.seconds) if reply.counts else None
        self.unknown += cost is None
        self.spent += (self.estimate(client, request) or 0.0) if cost is None else cost

    def _sample(self, client: Client, journal: Journal, sample: int, outage: Outage, on_reply: Callable[[], object]) -> bool:
        first = sample * len(self.requests)
        done = {row for row in range(len(self.requests)) if first + row in journal}
        under_way: dict[int, float] = {}
        held_back = False

        def rows(answered: Container[int]) -> Iterator[tuple[int, Request]]:
            nonlocal held_back
            for row, request in enumerate(self.requests):
                if row in done or row in answered:
                    continue
                most = self.estimate(client, request) or 0.0
                if self.budget is not None and self.spent + sum(under_way.values()) + most > self.budget:
                    held_back = True
                    return
                under_way[row] = most
                yield row, request

        def replies() -> Iterator[tuple[int, Reply]]:
            """Those that the budget has room for; what they leave of their estimates makes room for others."""
            nonlocal held_back
            probe = lambda row: client.generate([self.requests[row]])[0]  # noqa: E731
            came = True
            while came:
                held_back = came = False
                for answered in outage.replies(lambda given: client.stream(rows(given), given), probe, done):
                    yield answered
                    came = True
                came = came and held_back

        for row, reply in replies():
            under_way.pop(row, None)
            self._pay(client, self.requests[row], reply)
            line = score_row(self.track, self.examples[row], replace(reply, cut=None)).line(self.track)
            journal.add(first + row, line, reply, reply.seconds, kept=reply.finish_reason == "error" and not reply.transient)
            self._learn(client, journal)
            self.failure = reply.error if reply.transient else self.failure
            done.add(row)
            on_reply()
        return not held_back

    def replies(self, journal: Journal, row: int) -> list[Reply]:
        """What the samples of one row are."""
        indices = (sample * len(self.requests) + row for sample in range(self.samples))
        return [read_reply(json.loads(journal.line(index))) for index in indices if index in journal]
