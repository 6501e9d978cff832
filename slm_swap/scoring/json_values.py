"""JSON as replies hold it: read exactly, and compared by value."""

import json
import re
from decimal import Decimal, InvalidOperation
from typing import Any

from slm_swap.rows.lines import nested_too_deeply


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("an object with a duplicate key")
    return value


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _number(digits: str) -> Decimal:
    """A number as it is written: 0.1, 12345678901234567890.5, and integers of more digits than Python's int() reads."""
    try:
        return Decimal(digits)
    except InvalidOperation:
        raise ValueError("an exponent that no number has") from None


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_number, parse_int=_number)
WHITE_SPACE = " \t\r\n"  # all that JSON knows (RFC 8259, section 2); Python's strip() takes more
_TOKENS = re.compile(r'"(?:[^"\\\n]|\\.)*"?|[{}]')  # strings, also those that do not end, and braces


def parse_json(text: str) -> Any:
    """One JSON value, JSON's white space around it allowed; numbers are Decimal.

    Raises:
        ValueError: not JSON, NaN or Infinity, a duplicate key, nested too deeply.
    """
    text = text.strip(WHITE_SPACE)
    value, end = decode_at(text, 0)
    if end != len(text):
        raise ValueError("there is more than one JSON value")
    return value


def decode_at(text: str, at: int) -> tuple[Any, int]:
    """The JSON value that begins at a position, and the position behind it."""
    try:
        value, end = _DECODER.raw_decode(text, at)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if nested_too_deeply(value, text[at:end]):
        raise ValueError("nested too deeply")
    return value, end


def arrays_in(text: str) -> list[tuple[list, int]]:
    """The whole JSON arrays that stand in a text, outermost only, each with the position behind it."""
    found, at = [], text.find("[")
    while at >= 0:
        try:
            value, end = decode_at(text, at)
            found.append((value, end))
        except ValueError:
            end = at + 1
        at = text.find("[", end)
    return found


def objects_in(text: str, start: int = 0) -> list[tuple[dict, int]]:
    """The whole JSON objects that stand in a text behind `start`, outermost only, each with the position behind it.

    A `{` that begins no JSON is passed over up to its closing brace: what stands inside a broken object is no object of its own.
    """
    found, at = [], text.find("{", start)
    while at >= 0:
        try:
            value, end = decode_at(text, at)
            found.append((value, end))
        except ValueError:
            end = _closing(text, at)
        at = text.find("{", end)
    return found


def _closing(text: str, at: int) -> int:
    """The position behind the brace that closes the one at `at`; the text's end where none does."""
    depth = 0
    for token in _TOKENS.finditer(text, at):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if not depth:
            return token.end()
    return len(text)


_JSON_TYPES = {str: "string", bool: "boolean", type(None): "null", dict: "object", list: "array"}
Leaf = tuple[tuple[str | int, ...], str, Any]


def json_type(value: Any) -> str:
    return _JSON_TYPES.get(type(value), "number")


def leaves(value: Any) -> frozenset[Leaf]:
    """The fields of a JSON value: (path, JSON type, scalar) of each leaf; an empty object or list is a leaf too.

    Two values are equal as JSON exactly where their leaves are equal. A float (out of a schema) is the number that it is
    written as: 0.1 is Decimal("0.1").
    """
    found, stack = [], [((), value)]
    while stack:
        path, node = stack.pop()
        kind = type(node)
        if kind is dict and node:
            stack += [((*path, key), child) for key, child in node.items()]
        elif kind is list and node:
            stack += [((*path, index), child) for index, child in enumerate(node)]
        elif kind is dict or kind is list:
            found.append((path, _JSON_TYPES[kind], None))
        else:
            found.append((path, json_type(node), Decimal(repr(node)) if kind is float else node))
    return frozenset(found)


def same(left: Any, right: Any) -> bool:
    """Whether two values of `parse_json` are equal as JSON: as equal leaves say, but sooner. Their Python types are JSON's."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(child, right[key]) for key, child in left.items())
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def size(value: Any) -> int:
    """How many leaves a value has."""
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(size, children)) or 1
