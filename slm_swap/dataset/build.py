"""From rows to the files of both tracks: what is left out and why, splits that share nothing, written all at once."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

from slm_swap.common.errors import UserError
from slm_swap.common.os_errors import writing
from slm_swap.common.reports import json_line, sha256_file, write_json, write_jsonl
from slm_swap.common.settings import display_path
from slm_swap.common.temporary import beside, remove_leftovers
from slm_swap.dataset.near import NEAR, components
from slm_swap.dataset.row import BY_CHOICE, NO_REPLIES, Dropped, Row
from slm_swap.dataset.select import select
from slm_swap.dataset.splits import SPLITS, Sizes, split
from slm_swap.rows.examples import Example
from slm_swap.rows.lines import dump_json, writable
from slm_swap.rows.prompts import structured_prompt, structured_schema, toolcall_completion, toolcall_prompt
from slm_swap.scoring.tracks import TRACKS

EXAMPLES = 20  # dropped rows that the report shows for each reason
DROPPED = "prepare_dropped.jsonl"

# -- Rows ------------------------------------------------------------------------------------------------------------------------


def make_example(row: Row, track: str, seed: int) -> Example:
    """One track's row with one call: the toolcall prompt shows every tool in shuffled order, the structured prompt the wanted schema."""
    if row.example:
        return row.example
    shared = {"id": row.id, "accept": row.accept, "source": row.source, "where": row.where}
    if track == "toolcall":
        tools = _shuffled(row, seed)
        return Example(toolcall_prompt(tools, row.request), toolcall_completion(row.tool, row.arguments), tools=tools, **shared)
    schema = structured_schema(next(tool for tool in row.tools if tool["name"] == row.tool))
    completion = dump_json({"tool_name": row.tool, "arguments": row.arguments})
    return Example(structured_prompt(schema, row.request), completion, schema=schema, **shared)


def make_conversation(row: Row, seed: int) -> dict[str, Any]:
    """A toolcall row with any number of calls, as it is written: the request's own messages, every tool in shuffled order."""
    made = {"id": row.id, "messages": row.messages, "tools": _shuffled(row, seed), "calls": row.gold}
    return made | ({"accept": row.accept} if row.accept is not None else {}) | {"source": row.source}


def _shuffled(row: Row, seed: int) -> list[dict]:
    tools = list(row.tools)
    Random(f"{seed}:{row.id}").shuffle(tools)
    return tools


def _written(row: Row, track: str, seed: int, conversations: bool) -> dict[str, Any]:
    if row.record is not None:
        return row.record
    if conversations and track == "toolcall" and row.example is None:
        return make_conversation(row, seed)
    return make_example(row, track, seed).to_json()


def _is_for(row: Row, track: str) -> bool:
    """Whether a row makes one of the track: with several calls or none there is no structured twin."""
    return row.track == track if row.track else track == "toolcall" or row.calls is None


# -- Files -----------------------------------------------------------------------------------------------------------------------


def build(
    items: Iterable[Row | Dropped],
    out_dir: Path,
    head: dict[str, Any],
    sizes: Sizes,
    seed: int,
    unseen_tools: bool = False,
    tracks: Iterable[str] = tuple(TRACKS),
    by_time: bool = False,
) -> dict[str, Any]:
    """Select, split, write each track's splits, `prepare_report.json` and `prepare_dropped.jsonl` (every row that was dropped, with why)
    below `out_dir`; the report is given back.

    `head` is what the report starts with (stage, args, inputs, ...). The same items and seed give the same bytes in every split.
    Rows that are for one track alone are split track by track, those for both once. Where any row for both has several calls or none,
    all toolcall rows are written as conversations. Everything is written to a folder beside its place first: where something fails,
    nothing has changed. A split without rows is not written, and the file that an earlier run left there is removed.

    Raises:
        UserError: as `select` and `split`; or the place cannot be written.
    """
    tracks = list(tracks)
    items = [_other_track(item, tracks) for item in items]
    replies = sum(isinstance(item, Row) or item.reason not in NO_REPLIES for item in items)
    measurable = sum(isinstance(item, Row) or item.reason in BY_CHOICE for item in items)
    rows, dropped, renamed = select(items)
    conversations = any(row.calls is not None for row in rows)
    splits, near, left_out = _split_tracks(rows, tracks, sizes, seed, unseen_tools, by_time)
    dropped += left_out
    kept = {row.id for part in splits.values() for rows in part.values() for row in rows}
    report = head | {
        "counts": {"read": len(items), "kept": len(kept), "dropped": dict(Counter(drop.reason for drop in dropped))},
        "replies": {"read": replies, "measurable": measurable, "share": measurable / replies if replies else None},
        "renamed_ids": renamed,
        "without_structured_twin": sum(row.track is None and row.calls is not None for row in rows),
        "form": "conversation" if conversations or any(row.record for row in rows) else "prompt and completion",
        "dropped_examples": _shown(dropped),
        "near_duplicates": near,
        "splits": {},
    }
    with _staging(out_dir) as staging:
        for track in tracks:
            report["splits"][track] = {
                name: _write_split(
                    staging / track / f"{name}.jsonl", out_dir, track, [row for row in rows if _is_for(row, track)], seed, conversations
                )
                for name, rows in splits[track].items()
            }
        if dropped:
            lines = ({"where": drop.where, "id": drop.id, "reason": drop.reason, "why": drop.why} for drop in dropped)
            _write_lines(staging / DROPPED, lines)
        write_json(staging / "prepare_report.json", report)
        _put_in_place(staging, out_dir, report["splits"], bool(dropped))
    return report


def _put_in_place(staging: Path, out_dir: Path, splits: dict[str, dict[str, dict]], dropped: bool) -> None:
    """What was written beside goes where it belongs; what an earlier run left for a split or a list without rows goes."""
    for track in splits:
        (out_dir / track).mkdir(exist_ok=True)
    for path in sorted(staging.rglob("*.json*")):
        os.replace(path, out_dir / path.relative_to(staging))
    empty = [f"{track}/{name}.jsonl" for track, parts in splits.items() for name, part in parts.items() if not part["rows"]]
    for name in [*empty, *([] if dropped else [DROPPED])]:
        (out_dir / name).unlink(missing_ok=True)


def _other_track(item: Row | Dropped, tracks: list[str]) -> Row | Dropped:
    """A row of a track that was not asked for is dropped."""
    if isinstance(item, Row) and item.track and item.track not in tracks:
        return Dropped(item.id, item.where, "other_track", f"a row of the track {item.track}")
    return item


def _split_tracks(
    rows: list[Row], tracks: list[str], sizes: Sizes, seed: int, unseen_tools: bool, by_time: bool
) -> tuple[dict[str, dict[str, list[Row]]], dict[str, Any], list[Dropped]]:
    """(each track's splits, what the report says of near-duplicates, rows left out).

    Raises:
        UserError: no track can be split; one of several that has too few rows is left out instead.
    """
    both = [row for row in rows if row.track is None]
    parts = [(tracks, both)] if both else []
    parts += [([track], found) for track in tracks if (found := [row for row in rows if row.track == track])]
    splits: dict[str, dict[str, list[Row]]] = {track: {name: [] for name in SPLITS} for track in tracks}
    groups, left_out, failed = [], [], []
    for named, found in parts:
        whole = components(found)
        groups += [len(group) for group in whole]
        try:
            made, unused = split(whole, sizes, seed, unseen_tools, by_time)
        except UserError as error:
            failed.append(error if len(parts) == 1 else UserError(f"{named[0]}: {error}"))
            left_out += [Dropped(row.id, row.where, "too_few", f"{named[0]}: {error}") for row in found]
            continue
        left_out += unused
        for track in named:
            splits[track] = made
    if len(failed) == len(parts):
        raise failed[0]
    near = [size for size in groups if size > 1]
    shown = {"jaccard": NEAR[0] / NEAR[1], "components": len(near), "rows": sum(near), "largest": max(near, default=1)}
    return splits, shown, left_out


def _shown(dropped: list[Dropped]) -> dict[str, list[dict[str, str]]]:
    """The first rows dropped for each reason, with why."""
    shown: dict[str, list] = {}
    for drop in dropped:
        if len(examples := shown.setdefault(drop.reason, [])) < EXAMPLES:
            texts = {"id": drop.id, "where": drop.where, "why": drop.why}
            examples.append({name: writable(text) for name, text in texts.items()})
    return shown


def _write_lines(path: Path, lines: Iterable[dict]) -> None:
    """Lines that may hold half of a surrogate pair: they are about faulty rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as stream:
        stream.writelines(map(json_line, lines))


def _write_split(path: Path, out_dir: Path, track: str, rows: list[Row], seed: int, conversations: bool) -> dict[str, Any]:
    """Write one split of one track to its staging place; what the report says of it."""
    if not rows:
        return {"rows": 0}
    write_jsonl(path, (_written(row, track, seed, conversations) for row in rows))
    return {
        "path": display_path(out_dir / track / path.name),
        "sha256": sha256_file(path),
        "rows": len(rows),
        "gold_tools": len(set().union(*(row.gold_names for row in rows))),
        "tools": len(set().union(*(row.names for row in rows))),
    }


@contextmanager
def _staging(out_dir: Path) -> Iterator[Path]:
    """A folder in `out_dir` that is gone afterwards, whatever happens; one of a killed process goes first."""
    with writing(out_dir, "choose another place with --out-dir"):
        out_dir.mkdir(parents=True, exist_ok=True)
        place = out_dir / "prepare"
        remove_leftovers(place)
        with beside(place, folder=True) as staged:
            yield staged
