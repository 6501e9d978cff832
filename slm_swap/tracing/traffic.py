"""Read a project's generations page by page, so that a pull that was cut off goes on where it was, and write them as rows.

Beside the result lies a journal, `<out>.part`: a line that says what is read, then a line for each page with its rows and the place
of the next one. A line is there whole or does not count. It holds masked rows only, and is gone when the result is written.
"""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from slm_swap.common.errors import UserError
from slm_swap.common.exact_json import EXACT, ExactEncoder
from slm_swap.common.os_errors import reading, writing
from slm_swap.common.reports import write_jsonl
from slm_swap.common.settings import shown_path
from slm_swap.dataset.keys import record_keys
from slm_swap.dataset.traffic import REASONS, Unusable, convert
from slm_swap.tracing.api import LangfuseApi


@dataclass(frozen=True)
class Query:
    """What is read; all of it decides what the journal holds. `end` is the end that was asked for, None for "until now"."""

    start: str
    end: str | None
    name: str | None
    model: str | None
    tags: list[str]
    limit: int | None
    tracks: list[str]
    regions: list[str] | None  # None: nothing is masked


@dataclass(frozen=True)
class Entry:
    """One generation that makes a row."""

    start: str
    trace: str
    model: str
    own: bool
    track: str
    row: dict[str, Any]
    masked: dict[str, int]
    ended: bool = True


@dataclass(frozen=True)
class Pulled:
    """All that was read: every generation is an entry or counted in `dropped`."""

    read: int
    entries: list[Entry]
    dropped: Counter
    end: str


def read(api: LangfuseApi, query: Query, journal: Path, end: datetime, on_page: Callable[[int], None]) -> Pulled:
    """Read what is left to read; `end` is now, for a query without an end. `on_page` is told how many generations a page held.

    Raises:
        UserError: as `LangfuseApi`; or the journal is of another query, or cannot be written.
    """
    lines = _read_journal(journal)
    if lines and lines[0]["query"] != asdict(query):
        raise UserError(f"{shown_path(journal)} is of a pull with other flags that was cut off: finish that one, or remove the file")
    start = datetime.fromisoformat(query.start)
    if not lines:
        head = {"query": asdict(query), "end": end.isoformat(), "cursors": api.has_cursors(start)}
        _append(journal, head)
        lines = [head]
    head, pages = lines[0], lines[1:]
    end = datetime.fromisoformat(head["end"])
    seen = {name for page in pages for name in page["ids"]}
    on_page(len(seen))
    tagged = api.traces_tagged(start, end, query.tags) if query.tags and not head["cursors"] else None
    cursor, more = (pages[-1]["next"], pages[-1]["next"] is not None) if pages else (None, True)
    while more:
        found, cursor = api.generations(start, end, query.name, bool(query.tags), cursor, head["cursors"])
        wanted = [generation for generation in found if _matches(generation, query, tagged)]
        fresh = list({str(generation["id"]): generation for generation in wanted if str(generation["id"]) not in seen}.values())
        if query.limit is not None and len(seen) + len(fresh) >= query.limit:
            fresh, cursor = fresh[: query.limit - len(seen)], None
        page = _convert_all(fresh, query) | {"next": cursor}
        _append(journal, page)
        pages.append(page)
        seen.update(page["ids"])
        on_page(len(fresh))
        more = cursor is not None
    dropped = sum((Counter(page["dropped"]) for page in pages), Counter())
    entries = [Entry(**entry) for page in pages for entry in page["entries"]]
    return Pulled(len(seen), entries, dropped, head["end"])


def _matches(generation: dict, query: Query, tagged: set[str] | None) -> bool:
    if query.model is not None and generation.get("model") != query.model:
        return False
    if tagged is not None:
        return str(generation.get("traceId")) in tagged
    return set(query.tags) <= set(generation.get("tags") or [])


def _convert_all(generations: list[dict], query: Query) -> dict[str, Any]:
    entries, dropped = [], Counter()
    for generation in generations:
        try:
            taken = convert(generation, query.tracks, query.regions)
        except Unusable as reason:
            dropped[str(reason)] += 1
            continue
        place = {"start": str(generation.get("startTime")), "trace": str(generation.get("traceId"))}
        entries.append(place | {"model": str(generation.get("model") or "")} | asdict(taken))
    return {"ids": [str(generation["id"]) for generation in generations], "entries": entries, "dropped": dict(dropped)}


def _read_journal(path: Path) -> list[dict]:
    """The whole lines of a journal; one that was cut off is taken out of the file."""
    if not path.exists():
        return []
    with reading(path):
        content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with writing(path):
            os.truncate(path, len(whole))
    try:
        return [json.loads(line, **EXACT) for line in whole.splitlines()]
    except ValueError:
        raise UserError(f"{shown_path(path)} is not what a pull leaves: remove it") from None


def _append(path: Path, line: dict) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, cls=ExactEncoder) + "\n")
            stream.flush()
            os.fsync(stream.fileno())


# -- Which rows stay -------------------------------------------------------------------------------------------------------------


def by_score(
    entries: Iterable[Entry], scores: Iterable[tuple[str, str | None, str, float]], least: float, required: bool
) -> tuple[list[Entry], Counter]:
    """Entries of which every score, their own and those of their trace, is at least `least`; and how many were dropped why.

    One without a score stays unless a score is `required`.
    """
    lowest: dict[tuple[str, str | None], float] = defaultdict(lambda: float("inf"))
    for trace, observation, _, value in scores:
        lowest[trace, observation] = min(lowest[trace, observation], value)
    kept, dropped = [], Counter()
    for entry in entries:
        low = min((lowest[key] for key in ((entry.trace, entry.row["id"]), (entry.trace, None)) if key in lowest), default=None)
        if low is None and required:
            dropped["no_score"] += 1
        elif low is not None and low < least:
            dropped["low_score"] += 1
        else:
            kept.append(entry)
    return kept, dropped


def distinct(entries: Iterable[Entry]) -> tuple[list[Entry], Counter]:
    """One entry a request, the newest, oldest first; the others are `duplicate` (the same reply) or `conflicting`."""
    newest: dict[str, tuple[Entry, str]] = {}
    dropped: Counter = Counter()
    for entry in sorted(entries, key=_age, reverse=True):
        asked, wanted = record_keys(entry.track, entry.row)
        stays, reply = newest.setdefault(asked, (entry, wanted))
        if stays is not entry:
            dropped["duplicate" if reply == wanted else "conflicting"] += 1
    return sorted((entry for entry, _ in newest.values()), key=_age), dropped


def _age(entry: Entry) -> tuple[datetime, str]:
    return datetime.fromisoformat(entry.start), entry.row["id"]


def in_order(dropped: Counter) -> dict[str, int]:
    """Counts in the order of REASONS."""
    return {reason: dropped[reason] for reason in REASONS if dropped[reason]}


def write(entries: list[Entry], outs: dict[str, Path]) -> Iterator[tuple[str, Path, int]]:
    """Write each track's rows, and remove what an earlier pull left for a track without any: (track, path, rows)."""
    for track, path in outs.items():
        rows = [entry.row for entry in entries if entry.track == track]
        if rows:
            write_jsonl(path, rows)
        else:
            path.unlink(missing_ok=True)
        yield track, path, len(rows)
