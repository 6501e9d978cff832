"""How long a model takes for one row: asked alone, and with as many others as --concurrency says.

A hosted model's rows are measured while they are asked for their replies: a seeded sample one at a time, then the others under load. A
local engine works in batches, so that a row's seconds there are the batch's: rows of the sample are asked again, which costs no money.
"""

import random
import time
from collections.abc import Collection, Iterable
from typing import Any

from slm_swap.clients.protocol import Client
from slm_swap.common.progress import Progress
from slm_swap.evaluating.journal import Journal
from slm_swap.evaluating.report import ANSWERED, Tally, hosted_latency, no_latency, spread
from slm_swap.rows.examples import Example
from slm_swap.rows.prompts import Request, request_of

MOST = 10  # at most one row in so many is asked alone: one at a time is slow


def sample(purpose: str, seed: int, rows: int, size: int) -> list[int]:
    """`size` of the indices of `rows` rows, drawn by the seed, another draw for each purpose, in the rows' order."""
    return sorted(random.Random(f"{purpose} {seed}").sample(range(rows), min(size, rows)))


def alone_rows(rows: int, wanted: int, seed: int) -> list[int]:
    """The rows that are asked alone: `wanted`, but at most a tenth of all, and at least one unless none is wanted."""
    return sample("alone", seed, rows, min(wanted, max(1, rows // MOST)))


def requests_of(track: str, examples: Iterable[Example], indices: Collection[int]) -> dict[int, Request]:
    """What the rows of those indices are asked, by their index."""
    chosen = set(indices)
    return {index: request_of(track, example) for index, example in enumerate(examples) if index in chosen}


def latency_of(
    client: Client, tally: Tally, examples: Iterable[Example], journal: Journal, wanted: int, seed: int, concurrency: int
) -> dict[str, Any]:
    """The report's `latency` of the model whose replies are in the journal; measured once, however often the run is begun."""
    if client.kind == "azure":
        return hosted_latency(tally)
    if client.kind == "replay":
        return no_latency("the replies are recorded")
    if "latency" not in journal.kept:
        if journal.cached == len(tally):
            return no_latency("every reply came from --cache")
        journal.keep("latency", local_latency(client, tally.track.title, examples, len(tally), wanted, seed, concurrency))
    return journal.kept["latency"]


def local_latency(
    client: Client, track: str, examples: Iterable[Example], rows: int, wanted: int, seed: int, concurrency: int
) -> dict[str, Any]:
    """The report's `latency` of a local model, in seconds by the wall clock: the sample one row at a time, then one burst.

    Before each of the two, what the engine keeps of earlier prompts is dropped, as these prompts were all asked before. The first row
    alone is asked once more than it counts, so that no shape is met for the first time.
    """
    alone = alone_rows(rows, wanted, seed)
    if not alone:
        return no_latency("--latency-rows 0")
    burst = sample("burst", seed, rows, concurrency)
    asked = requests_of(track, examples, {*alone, *burst})
    with Progress(f"{track} latency", len(alone) + len(burst)) as shown:
        client.generate([asked[alone[0]]])
        client.forget()
        single = [seconds for index in alone for seconds in _arrivals(client, [asked[index]], shown)]
        client.forget()
        together = spread(list(_arrivals(client, [asked[index] for index in burst], shown)))
    loaded = {"concurrency": len(burst)} | together if together else None
    why = None if single and loaded else "every prompt of the sample is longer than the context"
    return {"alone": spread(single), "loaded": loaded, "why": why}


def _arrivals(client: Client, batch: list[Request], shown: Progress) -> Iterable[float]:
    """When each answer came, in seconds after all rows were handed over at once."""
    began = time.perf_counter()
    for _, reply in client.stream(enumerate(batch)):
        shown.update()
        if reply.finish_reason in ANSWERED:
            yield time.perf_counter() - began
