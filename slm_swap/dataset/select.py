"""Which rows stay: those that no other row repeats or contradicts, each with an id of its own."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from slm_swap.common.errors import UserError
from slm_swap.dataset.keys import Keys, record_keys
from slm_swap.dataset.row import Dropped, Row
from slm_swap.dataset.splits import moment
from slm_swap.rows.lines import dump_json, text_hash


def select(items: Iterable[Row | Dropped]) -> tuple[list[Row], list[Dropped], int]:
    """(rows that can be used, those that cannot, how many ids were made unique).

    Of rows with the same request (messages or prompt, tools in any order, schema) the newest stays, where times are known, else the
    first: the others are `duplicate` (the same reply) or `conflicting` (another one). An id that stands twice gets `-2`, `-3`, ...

    Raises:
        UserError: no row is left.
    """
    kept: dict[str, tuple[Row, str]] = {}
    dropped: list[Dropped] = []
    for item in items:
        if isinstance(item, Dropped):
            dropped.append(item)
            continue
        try:
            asked, wanted = _keys(item)
        except ValueError as error:
            why = "half of a surrogate pair" if isinstance(error, UnicodeEncodeError) else "NaN or Infinity"
            dropped.append(Dropped(item.id, item.where, "unusable", why))
            continue
        other = kept.get(asked)
        if other is None:
            kept[asked] = item, wanted
            continue
        stays, goes = (item, other[0]) if _is_newer(item, other[0]) else (other[0], item)
        reason = "duplicate" if other[1] == wanted else "conflicting"
        why = f"the same as {stays.where}" if reason == "duplicate" else f"{stays.where} has another reply to the same request"
        dropped.append(Dropped(goes.id, goes.where, reason, why))
        kept[asked] = stays, wanted if stays is item else other[1]
    rows, renamed = _with_own_ids([row for row, _ in kept.values()])
    if not rows:
        raise UserError(_none_left(dropped))
    return rows, dropped, renamed


def _keys(row: Row) -> Keys:
    """As `record_keys`.

    Raises:
        ValueError: as `record_keys`.
    """
    text_hash(row.source + row.id)
    if row.keys is not None:
        return row.keys
    if row.record is not None or row.example:
        return record_keys(row.track, row.record or row.example.to_json())
    tools = sorted(map(dump_json, row.tools))
    asked = [message for message in row.messages or [] if message["role"] != "user"]
    return text_hash(dump_json([row.request, tools, asked])), text_hash(dump_json([row.gold, row.accept]))


def _is_newer(row: Row, other: Row) -> bool:
    one, two = moment(row.time), moment(other.time)
    return one is not None and two is not None and one > two


def _with_own_ids(rows: list[Row]) -> tuple[list[Row], int]:
    taken, renamed, made = {row.id for row in rows}, 0, []
    seen: Counter = Counter()
    for row in rows:
        seen[row.id] += 1
        if seen[row.id] > 1:
            name, count = row.id, seen[row.id]
            while f"{name}-{count}" in taken:
                count += 1
            taken.add(f"{name}-{count}")
            row, renamed = _named(row, f"{name}-{count}"), renamed + 1
        made.append(row)
    return made, renamed


def _named(row: Row, name: str) -> Row:
    record = row.record and row.record | {"id": name}
    return replace(row, id=name, record=record, example=row.example and replace(row.example, id=name))


def _none_left(dropped: list[Dropped]) -> str:
    if not dropped:  # of all files, a batch's input alone has rows that hold no reply and are no fault
        return "a batch's input has no replies: give the batch's output file beside it to --dataset-path"
    reasons = ", ".join(f"{reason} {count}" for reason, count in Counter(drop.reason for drop in dropped).items())
    first = next(((drop.where, drop.why) for drop in dropped if drop.why), None)
    said = f"none of {len(dropped)} rows can be used ({reasons})" + (f"; {first[0]}: {first[1]}" if first else "")
    return f"{said}: check --source and --answers" if "no_answer" in reasons else said
