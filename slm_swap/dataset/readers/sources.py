"""What all sources share: one bad row ends no import, and a file of another form is named with the command that reads it."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from slm_swap.common.errors import UserError
from slm_swap.dataset.readers.files import Bad, read_rows
from slm_swap.dataset.readers.forms import form_of, other_source
from slm_swap.dataset.row import Dropped, Row, Unusable
from slm_swap.rows.lines import text_hash


@dataclass
class Seen:
    """What an import has seen besides its rows: the rows of each form in each file, fields that nothing reads, other notes."""

    forms: dict[str, Counter] = field(default_factory=lambda: defaultdict(Counter))
    unknown: Counter = field(default_factory=Counter)
    notes: Counter = field(default_factory=Counter)


def read_source(
    paths: Iterable[Path], source: str, read: Callable[[dict, str], Iterable[Row | Dropped]]
) -> Iterator[Row | Dropped]:
    """The items of each row of each file; a row that `read` cannot read (Unusable) is one `Dropped`.

    Raises:
        UserError: as `read_rows`; or a file's first rows are of another source's form.
    """
    for path in paths:
        good = False
        for where, row in read_rows(path):
            if isinstance(row, Bad):
                yield Dropped("", where, "bad_line", row.why)
                continue
            try:
                yield from read(row, where)
                good = True
            except Unusable as reason:
                if not good and str(reason) in ("bad_row", "other_form"):
                    refuse_other_form(row, where, source)
                yield Dropped(_shown_id(row), where, str(reason), reason.why)
            except RecursionError:
                yield Dropped(_shown_id(row), where, "unusable", "nested too deeply")


def refuse_other_form(row: dict, where: str, source: str) -> None:
    """Stop where a row is of a form that another --source reads.

    Raises:
        UserError: it is one; the form and the command are named.
    """
    form, other = form_of(row), other_source(row)
    path = where.rpartition(":")[0]
    command = f"python 02_dataset/prepare_data.py --source {{}} --dataset-path {path}"
    if form and source != "chat" and not {"calls", "object"} & row.keys():
        raise UserError(f"{where}: this looks like {form.name}, not like rows of --source {source}: {command.format('chat')}")
    if other and other != source:
        flags = {"jsonl": "jsonl --track {structured or toolcall}", "bfcl": "bfcl --answers FILE"}.get(other, other)
        raise UserError(f"{where}: this looks like rows of --source {other}, not of --source {source}: {command.format(flags)}")


def _shown_id(row: dict) -> str:
    value = row.get("id")
    return str(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else ""


def row_id(row: dict) -> str:
    """The row's `id` as a text, or its hash where it has none.

    Raises:
        Unusable: an id that is neither text nor number.
    """
    value = row.get("id")
    if value is None or value == "":
        return text_hash(json.dumps(row, sort_keys=True, default=str))[:16]
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise Unusable("bad_row", f"`id` must be a text or a number, not {type(value).__name__}")
    return str(value)
