"""JSON texts and lines: read exactly, written compactly, with a checksum where damage would not be noticed."""

import codecs
import hashlib
import json
import re
import zlib
from collections.abc import Iterator
from math import isinf
from pathlib import Path
from typing import Any

from slm_swap.common.errors import UserError
from slm_swap.common.exact_json import ExactEncoder, integer, number
from slm_swap.common.os_errors import reading
from slm_swap.common.settings import display_path

MAX_DEPTH = 100  # what walks through JSON here recurs, and needs some four of Python's frames a level

_COMPACT = ExactEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def text_hash(text: str) -> str:
    """sha256 of a text, as hex."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def short_hash(text: str) -> int:
    """A number of 128 bits for a text: what an index of a million ids holds in their place."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest())


def dump_json(value: Any) -> str:
    """Compact JSON as in completions: no spaces, no NaN, non-ASCII text as itself, a Decimal by its own digits."""
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


CHECKSUM = len('{"crc": "00000000", ')  # bytes in front of what a line had before it got its checksum
_CHECKED = re.compile(rb'\{"crc": "([0-9a-f]{8})", ')


def with_checksum(line: bytes) -> bytes:
    """A line, one JSON object that is not empty and its newline, with `"crc"` in front: the CRC-32 of what follows in the line."""
    rest = line[1:]
    return b'{"crc": "%08x", %b' % (zlib.crc32(rest), rest)


def is_whole(line: bytes) -> bool:
    """Whether a line is to the byte as `with_checksum` gave it."""
    mark = _CHECKED.match(line)
    return mark is not None and int(mark[1], 16) == zlib.crc32(line[mark.end() :])


def read_jsonl(path: str | Path, torn: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield ("file:line", decoded value) for each line that is not blank: see `read_lines`."""
    for where, _, value in read_lines(path, torn):
        yield where, value


def read_lines(path: str | Path, torn: bool = False) -> Iterator[tuple[str, int, Any]]:
    """Yield ("file:line", the line's first byte in the file, decoded value) for each line that is not blank.

    `torn`: the last line may be the beginning of one, as a kill or a full disk leaves it, and is passed over then.

    Raises:
        UserError: the file is missing or unreadable, or a line is not UTF-8 or not JSON (NaN is not); the line is named.
    """
    shown, start = display_path(path), 0
    with reading(path), open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield f"{shown}:{number}", start, decode_line(line)
                except (ValueError, RecursionError) as error:
                    if torn and not line.endswith(b"\n"):
                        return
                    reason = " ".join(str(error).split())
                    raise UserError(f"{shown}:{number}: not a line of JSON ({reason}): one JSON object a line") from None
            start += len(line)


def writable(text: str) -> str:
    """The text with an escape for each half of a surrogate pair, which no file and no console can hold."""
    return text.encode("utf-8", "backslashreplace").decode()
