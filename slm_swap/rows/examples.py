"""Rows in and out: one JSON object a line, `prompt` and `completion` required."""

import codecs
import hashlib
import json
import marshal
import os
import pickle
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from math import isinf
from pathlib import Path
from typing import IO, Any

from slm_swap.common.errors import UserError
from slm_swap.common.exact_json import ExactEncoder, integer, number
from slm_swap.common.settings import display_path

MAX_DEPTH = 100  # what walks through JSON here recurs, and needs some four of Python's frames a level
OPTIONAL_FIELDS = {"id": str, "tools": list, "schema": dict, "accept": dict, "group": str, "source": str, "request": str}

_COMPACT = ExactEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_CANONICAL = ExactEncoder(ensure_ascii=False, sort_keys=True, check_circular=False)  # of what was read as JSON


@dataclass(frozen=True)
class Example:
    """One row of a dataset.

    `tools` are `{"name", "description", "parameters": JSON Schema}`; `schema` is the wanted object's JSON Schema; `accept`
    maps an argument to its acceptable values (`""`: may be left out); `group` is the one thing that rows come from which are not independent (conversation, session, document), never the tool; `request` is
    the part of the prompt that is this row's own, where a preamble that many rows share stands around it.
    `where` is "file:line", for messages only.
    """

    prompt: str
    completion: str
    id: str = ""
    tools: list[dict] | None = None
    schema: dict | None = None
    accept: dict[str, list] | None = None
    group: str | None = None
    source: str | None = None
    request: str | None = None
    where: str = field(default="", compare=False)

    def to_json(self) -> dict[str, Any]:
        """The row as it is written: `where` and empty optional fields left out."""
        row = {"id": self.id, "prompt": self.prompt, "completion": self.completion}
        optional = {name: getattr(self, name) for name in OPTIONAL_FIELDS if name != "id"}
        return row | {name: value for name, value in optional.items() if value is not None}

    def scored_json(self) -> str:
        """Everything that is scored: equal for equal rows, whatever file they came from."""
        row: dict[str, Any] = {"prompt": self.prompt, "completion": self.completion}
        for name, value in (("tools", self.tools), ("schema", self.schema), ("accept", self.accept)):
            if value is not None:
                row[name] = value
        return _CANONICAL.encode(row)

    @cached_property
    def content_hash(self) -> str:
        """sha256 of `scored_json`."""
        return text_hash(self.scored_json())


def text_hash(text: str) -> str:
    """sha256 of a text, as hex."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def dump_json(value: Any) -> str:
    """Compact JSON as it stands in completions: no spaces, no NaN, non-ASCII text as itself, a Decimal by its own digits."""
    return _COMPACT.encode(value)


def nested_too_deeply(value: Any, text: str) -> bool:
    """Whether more than MAX_DEPTH objects and lists stand inside each other; a look at `text`, its JSON, mostly suffices."""
    if text.count("{") + text.count("[") <= MAX_DEPTH:
        return False
    depth, level = 0, [value]
    while level := [node for node in level if isinstance(node, (dict, list))]:
        level = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]
        depth += 1
    return depth > MAX_DEPTH


def parse_example(row: Any, where: str) -> Example:
    """One decoded line to an Example; without an `id` the hash of the row is its id.

    Raises:
        UserError: not an object, `prompt` or `completion` missing or empty, a field of the wrong type, nested too deeply or with
            half of a surrogate pair in it.
    """
    if not isinstance(row, dict):
        raise UserError(f'{where}: a row is a JSON object, not {type(row).__name__}: write {{"prompt": ..., "completion": ...}}')
    for name in ("prompt", "completion"):
        value = row.get(name)
        if not isinstance(value, str) or not value.strip():
            what = f"no `{name}`" if name not in row else f"`{name}` is not a text with something in it"
            raise UserError(f"{where}: {what}: every row needs `prompt` and `completion`, both strings")
    known = {}
    for name, kind in OPTIONAL_FIELDS.items():
        value = row.get(name)
        if name == "id" and isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if value is not None and not isinstance(value, kind):
            raise UserError(f"{where}: `{name}` must be a {kind.__name__}, not {type(value).__name__}: mend or drop the field")
        known[name] = value
    for name, options in (known["accept"] or {}).items():
        if not isinstance(options, list):
            raise UserError(f"{where}: `accept` has no list for {name!r}: write {{argument: [acceptable values]}}")
    try:
        example = Example(prompt=row["prompt"], completion=row["completion"], where=where, **known)
        text = example.scored_json()
        f"{example.id}{example.group}{example.source}".encode()
        if nested_too_deeply(known, text):
            raise RecursionError
        vars(example)["content_hash"] = text_hash(text)  # as the property would, with the text at hand
    except RecursionError:
        raise UserError(f"{where}: nested deeper than {MAX_DEPTH} objects and lists: mend or drop the field") from None
    except UnicodeEncodeError:
        raise UserError(f"{where}: half of a surrogate pair, which is no text: mend the escape in that line") from None
    return example if example.id else replace(example, id=text_hash(json.dumps(row, sort_keys=True, cls=ExactEncoder))[:16])


def _number(digits: str) -> Any:
    if isinf(float(digits)):
        raise ValueError(f"{digits[:40]} is larger than any number here")
    return number(digits)


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_float=_number, parse_int=integer, parse_constant=_constant)


def decode_line(line: bytes) -> Any:
    """The JSON value of one line, its numbers as `exact_json` reads them; a byte-order mark is passed over.

    Raises:
        ValueError: the line is not UTF-8 or not JSON (NaN is not).
        RecursionError: it is nested too deeply.
    """
    return _DECODER.decode(line.removeprefix(codecs.BOM_UTF8).decode("utf-8"))


def read_jsonl(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Yield ("file:line", decoded value) for each line that is not blank: see `read_lines`."""
    for where, _, value in read_lines(path):
        yield where, value


def read_lines(path: str | Path) -> Iterator[tuple[str, int, Any]]:
    """Yield ("file:line", the line's first byte in the file, decoded value) for each line that is not blank.

    Raises:
        UserError: the file is missing or unreadable, or a line is not UTF-8 or not JSON (NaN is not); the line is named.
    """
    shown, start = display_path(path), 0
    try:
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        yield f"{shown}:{number}", start, decode_line(line)
                    except (ValueError, RecursionError) as error:
                        reason = " ".join(str(error).split())
                        raise UserError(f"{shown}:{number}: not a line of JSON ({reason}): one JSON object a line") from None
                start += len(line)
    except OSError as error:
        raise UserError(f"cannot read {shown} ({error.strerror}): check the path") from None


def read_examples(path: str | Path, limit: int | None = None) -> list[Example]:
    """All rows of a file, or the first `limit`; ids are unique.

    Raises:
        UserError: as `read_jsonl` and `parse_example`; also where the file has no row or an id stands twice.
    """
    return list(parse_examples(read_jsonl(path), path, limit))


class Dataset:
    """The rows of a file, or the first `limit`, for any number of loops over them with one row in memory at a time.

    The first loop checks them and keeps them in a temporary file, in a form that is fast to read: the later ones do not see it where
    the file is changed meanwhile. `lines` gives ("file:line", decoded row) for each line of `path`.

    Raises (in the first loop):
        UserError: as `read_examples`.
    """

    def __init__(self, path: str | Path, limit: int | None = None, lines: Callable[..., Iterable[tuple[str, Any]]] = read_jsonl):
        self._path, self._limit, self._lines = path, limit, lines
        self._rows: IO[bytes] | None = None
        self._ends = array("q", [0])  # of the rows in it

    def __iter__(self) -> Iterator[Example]:
        return self._read() if self._rows else self._check()

    def _check(self) -> Iterator[Example]:
        rows, ends = tempfile.TemporaryFile(), array("q", [0])  # noqa: SIM115
        weakref.finalize(self, rows.close)
        for example in parse_examples(self._lines(self._path), self._path, self._limit):
            ends.append(ends[-1] + rows.write(_packed(vars(example))))
            yield example
        rows.flush()
        self._rows, self._ends = rows, ends

    def _read(self) -> Iterator[Example]:
        for start, end in pairwise(self._ends):
            example = object.__new__(Example)
            packed = os.pread(self._rows.fileno(), end - start, start)
            vars(example).update(pickle.loads(packed) if packed[:1] == pickle.PROTO else marshal.loads(packed))
            yield example


def _packed(row: dict[str, Any]) -> bytes:
    """A row in the form that is read fastest; `marshal` knows no Decimal."""
    try:
        return marshal.dumps(row)
    except ValueError:
        return pickle.dumps(row)


def parse_examples(lines: Iterable[tuple[str, Any]], path: str | Path, limit: int | None = None) -> Iterator[Example]:
    """Decoded lines with their "file:line" as Examples: see `read_examples`."""
    number = 0
    seen: dict[str, str] = {}
    for where, row in lines:
        example = parse_example(row, where)
        if example.id in seen and row.get("id") not in (None, ""):
            raise UserError(f"{where}: id {example.id!r} stands at {seen[example.id]} already: ids must be unique")
        if example.id in seen:  # two equal rows without ids: both stay, told apart by their place
            example = replace(example, id=f"{example.id}-{number}")
        seen[example.id] = where
        yield example
        number += 1
        if number == limit:
            break
    if not number:
        raise UserError(f"{display_path(path)} has no rows: write one JSON object a line")
