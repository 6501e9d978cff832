"""How much a model differs from itself: a sample of the rows is asked again, and the replies are compared."""

import json
from collections.abc import Callable, Container, Generator, Iterable
from typing import Any

from slm_swap.clients.protocol import Client, Reply
from slm_swap.common.progress import Progress
from slm_swap.evaluating.evaluation import Stopwatch
from slm_swap.evaluating.journal import Journal
from slm_swap.evaluating.latency import sample
from slm_swap.evaluating.outage import Outage
from slm_swap.evaluating.row import score_row
from slm_swap.rows.examples import Example
from slm_swap.rows.prompts import request_of
from slm_swap.scoring.tracks import Track


def repeat_rows(
    track: Track,
    client: Client,
    examples: Iterable[Example],
    journal: Journal,
    runs: int,
    size: int,
    seed: int,
    outage: Outage,
) -> tuple[dict[str, Any] | None, float | None]:
    """(the report's `repeat`, what asking again cost): `size` rows drawn by the seed, each asked `runs` times in all; None where once.

    A row counts as different if any of its replies has another text than the first, as changed if one is exactly right and another is
    not; rows with a failed request are left out. What was asked is kept in the journal, so that no reply is paid twice.
    """
    if runs == 1:
        return None, None
    indices = set(sample("repeat", seed, len(journal), size))
    chosen = {index: example for index, example in enumerate(examples) if index in indices}
    for run in range(2, runs + 1):
        names = {index: f"repeat {run} {index}" for index in chosen}
        done = {index for index, name in names.items() if name in journal.kept and not journal.kept[name]["failed"]}
        clock = Stopwatch()
        with Progress(f"{track.title}, asked again", len(chosen) - len(done)) as shown:
            for index, reply in outage.replies(_stream(client, track, chosen), _probe(client, track, chosen), done):
                right = score_row(track, chosen[index], reply).scored.strict.exact
                told = {"text": reply.shown, "exact": right, "failed": reply.finish_reason == "error", "counts": reply.counts, "seconds": clock.lap()}
                journal.keep(names[index], told)
                shown.update()
    again = {index: [journal.kept[f"repeat {run} {index}"] for run in range(2, runs + 1)] for index in chosen}
    different = changed = compared = 0
    for index, replies in again.items():
        first = json.loads(journal.line(index))
        if first["finish_reason"] == "error" or any(reply["failed"] for reply in replies):
            continue
        compared += 1
        different += any(reply["text"] != first["reply"] for reply in replies)
        changed += any(reply["exact"] != bool(first["scores"][track.exact]) for reply in replies)
    share = changed / compared if compared else None
    found = {"runs": runs, "rows": compared, "different_text": different, "exact_changed": changed, "share": share}
    return found, _cost(client, [reply for replies in again.values() for reply in replies])


def _stream(client: Client, track: Track, chosen: dict[int, Example]) -> Callable[[Container[int]], Generator[tuple[int, Reply]]]:
    asked = [(index, request_of(track.title, example)) for index, example in chosen.items()]
    return lambda done: client.stream(iter(asked), done)


def _probe(client: Client, track: Track, chosen: dict[int, Example]) -> Callable[[int], Reply]:
    return lambda index: client.generate([request_of(track.title, chosen[index])])[0]


def _cost(client: Client, replies: list[dict[str, Any]]) -> float | None:
    """Of the replies whose tokens are known; a local model's by their seconds. None where nothing is known."""
    counted = [reply["counts"] for reply in replies if reply["counts"]]
    if getattr(client, "over_http", False) and client.kind == "slm":
        return None  # its rows were asked together: how long the server worked for them is not the sum of their seconds
    if not counted and client.kind != "slm":
        return None
    sums = [sum(counts) for counts in zip(*counted, strict=True)] if counted else [0, 0, 0]
    return client.cost(*sums, sum(reply["seconds"] for reply in replies))
