"""Rows in and out: one JSON object a line, a prompt with its completion or a conversation with the reply wanted."""

import json
import marshal
import os
import pickle
import tempfile
import weakref
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

from slm_swap.common.errors import UserError
from slm_swap.common.exact_json import ExactEncoder
from slm_swap.common.os_errors import os_error, writing
from slm_swap.common.settings import shown_path
from slm_swap.rows.conversations import conversation_text, normalized, reply_text
from slm_swap.rows.lines import MAX_DEPTH, nested_too_deeply, read_jsonl, short_hash, text_hash
from slm_swap.rows.toolschema import kept_tool

OPTIONAL_FIELDS = {
    "id": str, "tools": list, "schema": dict, "accept": (dict, list), "group": str, "source": str, "request": str,
    "content": str, "options": dict, "time": str,
}  # fmt: skip
FIELDS = {"prompt", "completion", "messages", "calls", "object", *OPTIONAL_FIELDS}

NO_TMPDIR = "make room there, or set TMPDIR to a folder that can be written"

_CANONICAL = ExactEncoder(ensure_ascii=False, sort_keys=True, check_circular=False)  # of what was read as JSON


@dataclass(frozen=True)
class Example:
    """One row of a dataset: `{"prompt", "completion"}`, or a conversation.

    A conversation has `messages` (OpenAI's chat form, up to the reply) and either `calls`, `[{"name", "arguments"}]` (none: no call
    is due; several: in any order), or `value`, the JSON value wanted (`object` in files). Its `prompt` and `completion` are then the
    same as readable text, for display and to find a row by.

    `tools` are `{"name", "description", "parameters": JSON Schema}`; `schema` is the wanted value's JSON Schema; `accept` maps an
    argument to its acceptable values (`""`: may be left out), for several calls a list of such maps; `content` is what production
    said where no call is due, for training alone; `options` is what production sent besides (tool_choice, parallel_tool_calls,
    response_format), `time` when it was answered. `group` is the one thing that rows come from which are not independent (conversation, session, document), never
    the tool; `request` is the part of the prompt that is this row's own. `ask` is how this run asks the row
    (see `prompts.request_of`), `shots` are the turns of other rows that it is shown (see `few_shot`), `where` is "file:line", for messages
    only; none of them is a part of the row.
    """

    prompt: str
    completion: str
    id: str = ""
    tools: list[dict] | None = None
    schema: dict | None = None
    accept: dict[str, list] | list[dict[str, list]] | None = None
    group: str | None = None
    source: str | None = None
    request: str | None = None
    messages: list[dict[str, Any]] | None = None
    calls: list[dict[str, Any]] | None = None
    value: Any = None
    content: str | None = None
    options: dict[str, Any] | None = None
    time: str | None = None
    ask: str | None = field(default=None, compare=False)
    shots: list[dict[str, Any]] | None = field(default=None, compare=False)
    where: str = field(default="", compare=False)

    def _asked_and_wanted(self) -> dict[str, Any]:
        if self.messages is None:
            return {"prompt": self.prompt, "completion": self.completion}
        wanted = {"calls": self.calls} if self.calls is not None else {"object": self.value}
        return {"messages": self.messages} | wanted

    def to_json(self) -> dict[str, Any]:
        """The row as it is written, empty optional fields left out."""
        row = {"id": self.id} | self._asked_and_wanted()
        optional = {name: getattr(self, name) for name in OPTIONAL_FIELDS if name != "id"}
        return row | {name: value for name, value in optional.items() if value is not None}

    def scored_json(self) -> str:
        """Everything that is asked and scored: equal for equal rows, whatever file they came from."""
        row = self._asked_and_wanted()
        for name in ("tools", "schema", "accept", "options"):
            if (value := getattr(self, name)) is not None:
                row[name] = value
        return _CANONICAL.encode(row)

    @cached_property
    def content_hash(self) -> str:
        """sha256 of `scored_json`."""
        return text_hash(self.scored_json())


def unknown_fields(row: dict[str, Any]) -> list[str]:
    """The fields of a row that nothing here reads: perhaps a slip (`acept`), or a system text that no model would see."""
    return [name for name in row if name not in FIELDS]


def parse_example(row: Any, where: str) -> Example:
    """One decoded line to an Example; without an `id` the hash of the row is its id.

    Raises:
        UserError: not an object; neither a prompt with a completion nor a conversation with the reply wanted; a field of the wrong
            type, a tool in no known form, nested too deeply or with half of a surrogate pair in it.
    """
    if not isinstance(row, dict):
        raise UserError(f'{where}: a row is a JSON object, not {type(row).__name__}: write {{"prompt": ..., "completion": ...}}')
    known = _optional(row, where)
    try:
        fields = _conversation(row, known, where) if "messages" in row else _texts(row, where)
        example = Example(**fields, where=where, **known)
        text = example.scored_json()
        f"{example.id}{example.group}{example.source}{example.content}".encode()
        if nested_too_deeply([example.tools, example.schema, example.accept, example.calls, example.value, example.options], text):
            raise RecursionError
        vars(example)["content_hash"] = text_hash(text)  # as the property would, with the text at hand
    except RecursionError:
        raise UserError(f"{where}: nested deeper than {MAX_DEPTH} objects and lists: shorten or drop the field") from None
    except UnicodeEncodeError:
        raise UserError(f"{where}: half of a surrogate pair, which is no text: correct the escape in that line") from None
    return example if example.id else replace(example, id=text_hash(json.dumps(row, sort_keys=True, cls=ExactEncoder))[:16])


def _texts(row: dict[str, Any], where: str) -> dict[str, Any]:
    for name in ("prompt", "completion"):
        value = row.get(name)
        if not isinstance(value, str) or not value.strip():
            what = f"no `{name}`" if name not in row else f"`{name}` is not a text with something in it"
            raise UserError(f"{where}: {what}: every row needs `prompt` and `completion`, both strings, or `messages`")
    return {"prompt": row["prompt"], "completion": row["completion"]}


def _conversation(row: dict[str, Any], known: dict[str, Any], where: str) -> dict[str, Any]:
    messages, calls, value = normalized(row["messages"], where), row.get("calls"), row.get("object")
    if (calls is None) == (value is None):
        raise UserError(f"{where}: a conversation needs `calls` (a list, [] where no call is due) or `object`, and not both")
    for call in calls if isinstance(calls, list) else [calls] if calls is not None else ():
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not isinstance(call.get("arguments"), dict):
            raise UserError(f'{where}: `calls` must be a list of {{"name": ..., "arguments": {{...}}}}: correct that row')
    if isinstance(known["accept"], list) and (calls is None or len(known["accept"]) != len(calls)):
        raise UserError(f"{where}: `accept` is a list, which needs one entry for each of `calls`: correct that row")
    fields = {"messages": messages, "calls": calls, "value": value}
    return fields | {"prompt": conversation_text(messages), "completion": reply_text(calls, value, known["content"])}


def _optional(row: dict[str, Any], where: str) -> dict[str, Any]:
    known = {}
    for name, kind in OPTIONAL_FIELDS.items():
        value = row.get(name)
        if name == "id" and isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if value is not None and not isinstance(value, kind):
            wanted = "dict" if name == "accept" else kind.__name__
            raise UserError(f"{where}: `{name}` must be a {wanted}, not {type(value).__name__}: correct or drop the field")
        known[name] = value
    accept = known["accept"] or {}
    for options in accept if isinstance(accept, list) else [accept]:
        for argument, values in options.items() if isinstance(options, dict) else [("", None)]:
            if not isinstance(values, list):
                raise UserError(f"{where}: `accept` has no list for {argument!r}: write {{argument: [acceptable values]}}")
    if known["tools"]:
        try:
            known["tools"] = [kept_tool(tool) for tool in known["tools"]]
        except ValueError as error:
            raise UserError(f"{where}: `tools`: {error}: write each as name, description and parameters (JSON Schema)") from None
    return known


def read_examples(path: str | Path, limit: int | None = None) -> list[Example]:
    """All rows of a file, or the first `limit`; ids are unique.

    Raises:
        UserError: as `read_jsonl` and `parse_example`; also where the file has no row or an id stands twice.
    """
    return list(parse_examples(read_jsonl(path), path, limit))


class Dataset:
    """The rows of a file, or the first `limit`, for any number of loops over them with one row in memory at a time.

    The first loop checks them and keeps them in a temporary file, in a form that is fast to read: the later ones do not see it where
    the file is changed meanwhile. `lines` gives ("file:line", decoded row) for each line of `path`. `ask` is each row's, and `few_shot` (a `few_shot.FewShot`) gives each row its `shots`. `unknown` counts
    the rows that have a field which nothing reads, by its name.

    Raises (in the first loop):
        UserError: as `read_examples`; the temporary file cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        limit: int | None = None,
        lines: Callable[..., Iterable[tuple[str, Any]]] = read_jsonl,
        ask: str | None = None,
        few_shot: Any = None,
    ):
        self._path, self._limit, self._lines, self._ask, self.few_shot = path, limit, lines, ask, few_shot
        self.unknown: Counter[str] = Counter()
        self._rows: IO[bytes] | None = None
        self._ends = array("q", [0])  # of the rows in it

    def __iter__(self) -> Iterator[Example]:
        return self._read() if self._rows else self._check()

    def _check(self) -> Iterator[Example]:
        try:
            rows, ends = tempfile.TemporaryFile(), array("q", [0])  # noqa: SIM115
        except OSError as error:
            raise os_error(error, "write", None, NO_TMPDIR) from None
        weakref.finalize(self, _close, rows)
        unknown: Counter[str] = Counter()
        with writing(tempfile.gettempdir(), NO_TMPDIR):
            for example in parse_examples(self._noted(unknown), self._path, self._limit):
                vars(example)["ask"] = self._ask
                vars(example)["shots"] = self.few_shot.turns(example) if self.few_shot else None
                ends.append(ends[-1] + rows.write(_packed(vars(example))))
                yield example
            rows.flush()
        self._rows, self._ends, self.unknown = rows, ends, unknown

    def _noted(self, unknown: Counter) -> Iterator[tuple[str, Any]]:
        for where, row in self._lines(self._path):
            if isinstance(row, dict):
                unknown.update(unknown_fields(row))
            yield where, row

    def _read(self) -> Iterator[Example]:
        for start, end in pairwise(self._ends):
            example = object.__new__(Example)
            packed = os.pread(self._rows.fileno(), end - start, start)
            vars(example).update(pickle.loads(packed) if packed[:1] == pickle.PROTO else marshal.loads(packed))
            yield example


def _close(rows: IO[bytes]) -> None:
    with suppress(OSError):  # a full disk has been told of
        rows.close()


def _packed(row: dict[str, Any]) -> bytes:
    """A row in the form that is read fastest; `marshal` knows no Decimal."""
    try:
        return marshal.dumps(row)
    except ValueError:
        return pickle.dumps(row)


def parse_examples(lines: Iterable[tuple[str, Any]], path: str | Path, limit: int | None = None) -> Iterator[Example]:
    """Decoded lines with their "file:line" as Examples: see `read_examples`."""
    number = 0
    seen: dict[int, int | str] = {}  # by hashes of ids: a million rows are to be read, too
    for where, row in lines:
        example = parse_example(row, where)
        known = short_hash(example.id)
        if known in seen and row.get("id") not in (None, ""):
            first = seen[known]
            place = first if isinstance(first, str) else f"{where.rpartition(':')[0]}:{first}"
            raise UserError(f"{where}: id {example.id!r} is used at {place} already: ids must be unique")
        if known in seen:  # two equal rows without ids: both stay, told apart by their place
            example = replace(example, id=f"{example.id}-{number}")
            known = short_hash(example.id)
        line = where.rpartition(":")[2]
        seen[known] = int(line) if line.isdecimal() else where
        yield example
        number += 1
        if number == limit:
            break
    if not number:
        raise UserError(f"{shown_path(path)} has no rows: write one JSON object a line")
