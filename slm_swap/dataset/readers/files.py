"""Any file of rows: JSON Lines, JSON, CSV or Parquet, each perhaps gzipped, in UTF-8 or UTF-16.

What a file is stands in its first bytes, not in its name; CSV alone is known by its name. In Parquet a column of objects has every key
that any of its objects has, null where an object has it not, and nothing tells such a null from one that was written: keys of
objects that are null are left out there.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from slm_swap.common.errors import UserError
from slm_swap.common.exact_json import EXACT
from slm_swap.common.os_errors import reading
from slm_swap.common.settings import display_path
from slm_swap.rows.lines import decode_line

ROW_LISTS = frozenset(
    "messages conversations conversation traj tools functions function choices prompt completion chosen rejected question answers"
    " calls input output preferred_output ground_truth history".split()
)  # a list under one of these is part of a row, not the file's list of rows
_NOT_UTF8 = "is not UTF-8: save the file as UTF-8, for example with: iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW"


@dataclass(frozen=True)
class Bad:
    """A line that holds no object, and why."""

    why: str


def read_rows(path: Path) -> Iterator[tuple[str, dict | Bad]]:
    """Yield ("file:line" or "file: row N", object or `Bad`) for each row of a file.

    Raises:
        UserError: the file is missing or unreadable, in another encoding, or there is no row.
    """
    shown, found = display_path(path), False
    with reading(path):
        try:
            with _opened(path) as stream:
                for where, row in _rows(stream, Path(path), shown):
                    found = True
                    yield where, row if isinstance(row, (dict, Bad)) else Bad(f"a row is a JSON object, this is {type(row).__name__}")
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"cannot read {shown} ({error}): the gzip file is damaged: make it again") from None
        except UnicodeError:
            raise UserError(f"{shown} {_NOT_UTF8}") from None
    if not found:
        raise UserError(f"{shown} has no rows: check that it is the right file")


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    with open(path, "rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        yield gzip.GzipFile(fileobj=raw) if zipped else raw  # type: ignore[misc]


def _rows(stream: IO[bytes], path: Path, shown: str) -> Iterator[tuple[str, Any]]:
    names = path.suffixes[:-1] if path.suffix == ".gz" else path.suffixes
    kind = names[-1].lower() if names else ""
    head = stream.read(4)
    stream.seek(0)
    if head == b"PAR1" or kind == ".parquet":
        return _numbered(_parquet(stream, shown), shown)
    text = io.TextIOWrapper(stream, "utf-16", newline="") if head[:2] in (b"\xff\xfe", b"\xfe\xff") else None
    if kind == ".csv":
        return _numbered(_csv(text or io.TextIOWrapper(stream, "utf-8-sig", newline="")), shown)
    lines = (line.encode("utf-8", "surrogatepass") for line in text) if text else stream
    return _json(iter(lines), shown)


def _numbered(rows: Iterator[Any], shown: str) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(rows, 1):
        yield f"{shown}: row {number}", row


# -- JSON ------------------------------------------------------------------------------------------------------------------------


def _json(lines: Iterator[bytes], shown: str) -> Iterator[tuple[str, Any]]:
    """One object a line; or one document: a list, an object with one list of objects in it, or one row."""
    blank, first = 0, b""
    for first in lines:
        if first.strip():
            break
        blank += 1
    if not first.strip():
        return
    row = None if first.lstrip(b"\xef\xbb\xbf \t")[:1] == b"[" else _line(first, f"{shown}:{blank + 1}")
    whole = row is None or isinstance(row, Bad)
    rest = list(lines) if whole else []
    if whole:
        listed = _document(b"".join([first, *rest]), shown, must=row is None)
        if listed is not None:
            yield from _numbered(iter(listed), shown)
            return
    elif (inner := _list_in(row)) is not None:
        second = next(lines, None)
        if second is None:
            yield from _numbered(iter(inner), shown)
            return
        rest = [second]
    yield f"{shown}:{blank + 1}", row
    for number, line in enumerate([*rest] if whole else _chained(rest, lines), blank + 2):
        if line.strip():
            yield f"{shown}:{number}", _line(line, f"{shown}:{number}")


def _chained(first: list[bytes], rest: Iterator[bytes]) -> Iterator[bytes]:
    yield from first
    yield from rest


def _line(line: bytes, where: str) -> Any:
    try:
        return decode_line(line)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start + 1} of the line {_NOT_UTF8}") from None
    except (ValueError, RecursionError) as error:
        return Bad(f"not a line of JSON ({' '.join(str(error).split())})")


def _document(content: bytes, shown: str, must: bool) -> list | None:
    """The rows of one JSON document; None where it is none and lines may be meant.

    Raises:
        UserError: it is none and nothing else can be meant.
    """
    try:
        value = json.loads(content.decode("utf-8-sig"), **EXACT)
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        if must:
            raise UserError(f"{shown}: not JSON ({error}): one list of objects, or one object a line") from None
        return None
    if isinstance(value, list):
        return value
    inner = _list_in(value)
    return [value] if inner is None else inner


def _list_in(row: Any) -> list | None:
    """The rows in an object that is no row itself but holds the one list of them (`{"data": [...]}`)."""
    if not isinstance(row, dict):
        return None
    lists = [key for key, value in row.items() if isinstance(value, list) and value and all(isinstance(one, dict) for one in value)]
    return row[lists[0]] if len(lists) == 1 and not ROW_LISTS & row.keys() else None


# -- CSV and Parquet -------------------------------------------------------------------------------------------------------------


def _csv(text: IO[str]) -> Iterator[dict | Bad]:
    """Rows by the names in the first line; an empty cell is no value. Cells stay texts."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(text)
    try:
        for row in reader:
            yield Bad("more cells than the first line has names") if None in row else {key: cell for key, cell in row.items() if cell}
    except csv.Error as error:
        yield Bad(f"not a line of CSV ({error})")


def _parquet(stream: IO[bytes], shown: str) -> Iterator[Any]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"reading {shown} needs pyarrow: pip install pyarrow") from None
    content = io.BytesIO(stream.read())
    try:
        for batch in ParquetFile(content).iter_batches():
            yield from map(_without_nulls, batch.to_pylist(maps_as_pydicts="lossy"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {shown} ({error}): is it a Parquet file?") from None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(child) for key, child in value.items() if child is not None}
    return [_without_nulls(child) for child in value] if isinstance(value, list) else value
