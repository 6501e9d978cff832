"""Replies read from a file: recorded traffic, another team's run, or the rows file of an earlier evaluation."""

import hashlib
import itertools
from array import array
from collections.abc import Container, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

from slm_swap.clients.protocol import Reply
from slm_swap.clients.recorded import is_empty, read_recorded
from slm_swap.common.errors import UserError
from slm_swap.common.reports import sha256_file
from slm_swap.common.settings import display_path, shown_path
from slm_swap.rows.conversations import conversation_text, normalized
from slm_swap.rows.examples import FIELDS, OPTIONAL_FIELDS, Example
from slm_swap.rows.lines import decode_line, read_jsonl, read_lines, short_hash
from slm_swap.rows.prompts import Request


class ReplayClient:
    """A client whose replies stand in a file: one JSON object a line with `prediction` (or `reply`, `output`, `response`) and `id` or
    `prompt` (or the `messages` of the conversation); `recorded.read_recorded` says in which forms.

    Lines may also hold `finish_reason`, `tokens`, `seconds` and `cut`, as a rows file does. A line belongs to the row of its id, and
    where no row has that id (or the line has none) to a row of its prompt; equal prompts take their lines in order. Only the place of
    each row's line is kept in memory. `warning` is one line about replies that are empty, None where none is.

    Raises:
        UserError: a bad line, a second reply for an id, or rows without a reply.
    """

    kind = "replay"
    load_seconds = 0.0

    def __init__(self, path: str | Path, examples: Iterable[Example]):
        self.path = path
        places = {short_hash(example.id): index for index, example in enumerate(examples)}
        self._starts = array("q", [-1]) * len(places)
        by_prompt: dict[bytes, list[int]] = {}
        empty: set[int] = set()  # where a reply begins that says nothing
        for where, start, line in read_lines(path):
            reply = read_recorded(line, where, decode_line)
            if is_empty(reply):
                empty.add(start)
            name, prompt = line.get("id"), _prompt(line, where)
            name = str(name) if isinstance(name, (str, int)) and name != "" else None
            if name is None and not isinstance(prompt, str):
                raise UserError(f"{where}: neither `id` nor `prompt` or `messages`: say which row the reply belongs to")
            place = None if name is None else places.get(short_hash(name))
            if place is not None and self._starts[place] >= 0:
                raise UserError(f"{where}: a second reply for id {name!r}: keep one")
            if place is not None:
                self._starts[place] = start
            elif isinstance(prompt, str):
                by_prompt.setdefault(_key(prompt), []).append(start)
        self.identity = {"kind": self.kind, "path": display_path(path), "sha256": sha256_file(path)}
        rows, missing = len(places), []
        del places
        for index, example in enumerate(examples if -1 in self._starts else ()):
            if self._starts[index] < 0 and by_prompt.get(key := _key(example.prompt)):
                self._starts[index] = by_prompt[key].pop(0)
            elif self._starts[index] < 0:
                missing.append(example.id)
        if missing:
            raise UserError(
                f"{shown_path(path)} has no reply for {len(missing)} of {rows} rows (first: id {missing[0]!r}): "
                "give the dataset that the replies were recorded on, or --limit"
            )
        silent = sum(start in empty for start in self._starts)
        self.warning = f"{silent} of {rows} recorded replies are empty: was the recording complete?" if silent else None
        self._file = open(path, "rb")  # noqa: SIM115
        self._next = itertools.count()

    def generate(self, batch: list[Request]) -> list[Reply]:
        """The recorded replies of rows that are asked for in the order of `examples`, each once."""
        return [self._reply(next(self._next)) for _ in batch]

    def stream(self, rows: Iterable[tuple[int, Request]], answered: Container[int] = ()) -> Generator[tuple[int, Reply]]:
        """The recorded replies of rows that are asked for by their index in `examples`."""
        return ((index, self._reply(index)) for index, _ in rows if index not in answered)

    def _reply(self, index: int) -> Reply:
        self._file.seek(self._starts[index])
        return read_recorded(decode_line(self._file.readline()), self.identity["path"], decode_line)

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None: ...

    def count_tokens(self, text: str) -> int | None:
        return None  # whose tokens they would be is not known

    def forget(self) -> None: ...

    def describe(self) -> dict[str, Any]:
        return self.identity

    def cost(self, input_tokens: int, cached_tokens: int, output_tokens: int, seconds: float) -> float | None:
        return None  # what the recorded run cost is not in the file

    def close(self) -> None:
        self._file.close()


def _prompt(line: dict[str, Any], where: str) -> Any:
    """What a line's row was asked; of a conversation, the text that `Example.prompt` has for it."""
    if "prompt" in line or not isinstance(line.get("messages"), list):
        return line.get("prompt")
    return conversation_text(normalized(line["messages"], where))


def _key(prompt: str) -> bytes:
    """What stands for a prompt, in less memory."""
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).digest()


def rows_of_replies(path: str | Path) -> Iterator[tuple[str, dict]]:
    """("file:line", row) for each line of a file of replies that holds its own rows: for `examples.Dataset`. A row is a conversation
    with the reply wanted, as in a dataset, or a `prompt` with its `reference`.

    Raises:
        UserError: a line is no conversation and lacks `prompt` or `reference`, or as `examples.read_lines`.
    """
    for where, line in read_jsonl(path):
        if isinstance(line, dict) and "messages" in line and ("calls" in line or "object" in line):
            yield where, {name: line[name] for name in FIELDS if name in line}
            continue
        given = [line.get(name) for name in ("prompt", "reference")] if isinstance(line, dict) else [None]
        if not all(isinstance(text, str) and text.strip() for text in given):
            raise UserError(f"{where}: recorded replies without `prompt` or `reference` need the rows that they answer: pass --dataset or --split")
        fields = {name: line[name] for name in ("prompt", *OPTIONAL_FIELDS) if name in line}
        yield where, fields | {"completion": line["reference"]}
