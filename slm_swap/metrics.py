"""Parse, match, score: pure functions from a reply and a reference to numbers.

Every row stays in the denominator: a bad reply scores 0 with one `error` out of `ERRORS`. JSON is compared by value with JSON's
own types (RFC 8259): `true` is not 1, `1` equals `1.0`, key order is nothing, list order counts, numbers are compared exactly
at any size; duplicate keys and NaN make a reply invalid.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from slm_swap.toolschema import coerce, with_defaults

# In order of precedence: a row with several faults gets the first of them.
ERRORS = (
    "filtered", "refused", "truncated", "no_json", "bad_json", "extra_text", "wrong_shape", "wrong_tool", "missing_argument",
    "extra_argument", "wrong_type", "wrong_value",
)  # fmt: skip
MATCHERS = ("strict", "schema", "lenient")
UNSCORED = {"content_filter": "filtered", "refusal": "refused"}  # such a text is no answer, whatever stands in it


class InvalidReply(ValueError):
    """A text that is not one well-formed reply; `error` is one of ERRORS."""

    def __init__(self, error: str, reason: str):
        super().__init__(reason)
        self.error = error


@dataclass(frozen=True)
class Parsed:
    """A well-formed reply: the structured object, or a call's arguments with the tool's `name`."""

    value: dict[str, Any]
    name: str | None = None


# -- JSON ------------------------------------------------------------------------------------------------------------------------


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("an object with a duplicate key")
    return value


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _integer(digits: str) -> int | Decimal:
    return int(digits) if len(digits) < 4000 else Decimal(digits)  # Python refuses to read longer integers


# Decimal keeps 0.1 and 12345678901234567890.5 as they are written; it equals an int of the same value and hashes like it.
_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=Decimal, parse_int=_integer)


def parse_json(text: str) -> Any:
    """One JSON value, white space around it allowed; numbers that are not integers are Decimal.

    Raises:
        ValueError: not JSON, NaN or Infinity, a duplicate key, nested too deeply.
    """
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _objects_in(text: str) -> list[tuple[dict, int]]:
    """The JSON objects that stand in a text, outermost only, each with the position behind it."""
    found, at = [], text.find("{")
    while at >= 0:
        try:
            value, end = _DECODER.raw_decode(text, at)
            found.append((value, end))
        except (ValueError, RecursionError):
            end = at + 1
        at = text.find("{", end)
    return found


def exact_numbers(value: Any) -> Any:
    """A value read by the standard `json` with its numbers as `parse_json` reads them."""
    return parse_json(json.dumps(value))


def leaves(value: Any) -> frozenset[tuple[tuple, str, Any]]:
    """The fields of a JSON value: (path, JSON type, scalar) of each leaf; an empty object or list is a leaf too.

    Two values are equal as JSON exactly where their leaves are equal.
    """
    found, stack = [], [((), value)]
    while stack:
        path, node = stack.pop()
        if isinstance(node, dict):
            stack.extend((path + (key,), child) for key, child in node.items())
        elif isinstance(node, list):
            stack.extend((path + (index,), child) for index, child in enumerate(node))
        if not isinstance(node, (dict, list)) or not node:
            found.append((path, _json_type(node), node if not isinstance(node, (dict, list)) else None))
    return frozenset(found)


def _json_type(value: Any) -> str:
    if isinstance(value, str):
        return "string"
    if isinstance(value, bool):
        return "boolean"
    if value is None:
        return "null"
    return "object" if isinstance(value, dict) else "array" if isinstance(value, list) else "number"


# -- Replies ---------------------------------------------------------------------------------------------------------------------

_OPEN = re.compile(r'<tool_call name="([^"<>]+)">')
_LOOSE_OPEN = re.compile(r"<tool_call\s+name\s*=\s*[\"']([^\"'<>]+)[\"']\s*>\s*", re.IGNORECASE)
_LOOSE_CLOSE = re.compile(r"\s*</tool_call\s*>", re.IGNORECASE)


def _broken(text: str, reason: str) -> InvalidReply:
    """What is wrong with a text that should have been JSON."""
    if _objects_in(text):
        return InvalidReply("extra_text", "there is text around the JSON object")
    return InvalidReply("bad_json", reason) if re.search(r"[{\[]", text) else InvalidReply("no_json", "there is no JSON")


def parse_structured(text: str, lenient: bool = False) -> Parsed:
    """One JSON object and nothing else; `lenient` looks for the one object in the text around it.

    Raises:
        InvalidReply: no_json, bad_json, extra_text or wrong_shape (JSON, but not an object).
    """
    if lenient:
        objects = _objects_in(text)
        if len(objects) != 1:
            raise InvalidReply("wrong_shape" if objects else "no_json", f"{len(objects)} JSON objects instead of one")
        return Parsed(objects[0][0])
    try:
        value = parse_json(text)
    except ValueError as error:
        raise _broken(text, str(error)) from None
    if not isinstance(value, dict):
        raise InvalidReply("wrong_shape", f"a JSON {_json_type(value)} instead of an object")
    return Parsed(value)


def parse_toolcall(text: str, lenient: bool = False) -> Parsed:
    """Exactly one `<tool_call name="X">{...}</tool_call>`, white space around it allowed.

    `lenient` also takes surrounding text, other quotes, case and white space in the wrapper; a second call is still invalid.

    Raises:
        InvalidReply: no_json, bad_json, extra_text (also a second call) or wrong_shape (another wrapper, not an object).
    """
    if lenient:
        return _lenient_toolcall(text)
    stripped = text.strip()
    opened = _OPEN.match(stripped)
    if not opened or not stripped.endswith("</tool_call>"):
        if _loose_calls(text):
            raise InvalidReply("extra_text" if _OPEN.search(text) else "wrong_shape", "there is more than the one call")
        if _objects_in(text) or _OPEN.search(text):
            broken = _OPEN.search(text) and not _objects_in(text)
            raise InvalidReply("bad_json" if broken else "wrong_shape", "the wrapper is not whole")
        raise _broken(text, "there is no whole JSON object")
    body = stripped[opened.end() : -len("</tool_call>")]
    try:
        value = parse_json(body)
    except ValueError as error:
        raise _broken(body, str(error)) from None
    if not isinstance(value, dict):
        raise InvalidReply("wrong_shape", f"the arguments are a JSON {_json_type(value)} instead of an object")
    return Parsed(value, opened[1])


def _loose_calls(text: str) -> list[Parsed]:
    calls = []
    for opened in _LOOSE_OPEN.finditer(text):
        try:
            value, end = _DECODER.raw_decode(text, opened.end())
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) and _LOOSE_CLOSE.match(text, end):
            calls.append(Parsed(value, opened[1].strip()))
    return calls


def _lenient_toolcall(text: str) -> Parsed:
    calls = _loose_calls(text)
    if len(calls) != 1:
        raise InvalidReply("wrong_shape" if calls else "no_json", f"{len(calls)} calls instead of one")
    return calls[0]


# -- Matching --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Match:
    """How one reply compares with its reference: three yes-no answers and the counts behind precision and recall.

    `predicted` and `expected` count leaves, `matched` those in both; with the wrong tool `matched` is 0.
    """

    valid: bool
    name: bool
    exact: bool
    matched: int
    predicted: int
    expected: int

    @property
    def precision(self) -> float:
        return self.matched / self.predicted if self.predicted else 0.0

    @property
    def recall(self) -> float:
        return self.matched / self.expected if self.expected else 0.0

    @property
    def f1(self) -> float:
        return 2 * self.matched / (self.predicted + self.expected) if self.predicted + self.expected else 0.0


@dataclass(frozen=True)
class Reference:
    """A row's gold, parsed once, with what the schema matcher needs."""

    parsed: Parsed
    leaves: frozenset
    schema: dict | None = None
    accept: dict[str, list] | None = None


@dataclass(frozen=True)
class Scored:
    """One reply under the three matchers, and why it missed under `strict` (None: it did not)."""

    strict: Match
    schema: Match
    lenient: Match
    error: str | None


Parser = Callable[..., Parsed]


def score(parse: Parser, reference: Reference, text: str, finish_reason: str = "stop") -> Scored:
    """Score one reply.

    A filtered or refused reply scores 0 whatever its text; a truncated one is scored as it stands (a reply may be whole when
    the limit cuts it), and its error is `truncated` where it misses.
    """
    if finish_reason in UNSCORED:
        missed = _missed(reference)
        return Scored(missed, missed, missed, UNSCORED[finish_reason])
    try:
        parsed = parse(text)
    except InvalidReply as invalid:
        strict, error, parsed = _missed(reference), invalid.error, None
    else:
        strict = _match(parsed, reference.parsed, reference.leaves)
        if strict.exact:  # equal by value is equal under the looser matchers too
            return Scored(strict, strict, strict, None)
        error = _difference_error(parsed, reference.parsed)
    return Scored(
        strict=strict,
        schema=_schema_match(parsed, reference) if parsed else strict,
        lenient=_lenient_match(parse, parsed, text, reference),
        error="truncated" if finish_reason == "length" else error,
    )


def _missed(reference: Reference) -> Match:
    return Match(False, False, False, 0, 0, len(reference.leaves))


def _match(parsed: Parsed, gold: Parsed, gold_leaves: frozenset | None = None) -> Match:
    expected = leaves(gold.value) if gold_leaves is None else gold_leaves
    predicted = leaves(parsed.value)
    name = parsed.name == gold.name
    matched = len(predicted & expected) if name else 0
    return Match(True, name, name and predicted == expected, matched, len(predicted), len(expected))


def _difference_error(parsed: Parsed, gold: Parsed) -> str:
    """The first of ERRORS that holds for a well-formed reply that is not equal to its reference."""
    if parsed.name != gold.name or ("tool_name" in gold.value and _differs_at(parsed, gold, "tool_name")):
        return "wrong_tool"
    found: set[str] = set()
    _collect(gold.value, parsed.value, found)
    return min(found, key=ERRORS.index)


def _differs_at(parsed: Parsed, gold: Parsed, key: str) -> bool:
    return key in parsed.value and leaves(parsed.value[key]) != leaves(gold.value[key])


def _collect(want: Any, got: Any, found: set[str]) -> None:
    """Add the errors between two JSON values; lists of other lengths are a wrong value, not missing arguments."""
    if _json_type(want) != _json_type(got):
        found.add("wrong_type")
    elif isinstance(want, dict):
        found.update({"missing_argument"} if want.keys() - got.keys() else ())
        found.update({"extra_argument"} if got.keys() - want.keys() else ())
        for key in want.keys() & got.keys():
            _collect(want[key], got[key], found)
    elif isinstance(want, list) and len(want) == len(got):
        for left, right in zip(want, got, strict=True):
            _collect(left, right, found)
    elif want != got:
        found.add("wrong_value")


# -- The looser matchers ---------------------------------------------------------------------------------------------------------


def _schema_match(parsed: Parsed, reference: Reference) -> Match:
    """What the schema allows is the same: types it can convert, its defaults, and the row's acceptable values."""
    if parsed.name != reference.parsed.name:
        return _match(parsed, reference.parsed)
    value, gold = _align(parsed.value, reference.parsed.value, reference, lambda x: x)
    return _match(Parsed(value, parsed.name), Parsed(gold, reference.parsed.name))


def _lenient_match(parse: Parser, parsed: Parsed | None, text: str, reference: Reference) -> Match:
    """As `schema`, and case, white space and the text around the reply are nothing."""
    try:
        parsed = parsed or parse(text, lenient=True)
    except InvalidReply:
        return _missed(reference)
    if _fold(parsed.name) != _fold(reference.parsed.name):
        return _match(Parsed(parsed.value, _fold(parsed.name)), Parsed(reference.parsed.value, _fold(reference.parsed.name)))
    value, gold = _align(parsed.value, reference.parsed.value, reference, _fold)
    return _match(Parsed(_fold(value)), Parsed(_fold(gold)))


def _fold(value: Any) -> Any:
    """Case and white space taken out of every string, values only: the keys are the schema's."""
    if isinstance(value, str):
        return " ".join(value.casefold().split())
    if isinstance(value, dict):
        return {key: _fold(child) for key, child in value.items()}
    return [_fold(child) for child in value] if isinstance(value, list) else value


def _align(value: dict, gold: dict, reference: Reference, form: Callable[[Any], Any]) -> tuple[dict, dict]:
    """Both values with what counts as equal made equal, so that one comparison serves every matcher."""
    schema = exact_numbers(reference.schema) if reference.schema else None
    if schema:
        value, gold = coerce(value, schema), coerce(gold, schema)
    if reference.accept:
        accept = exact_numbers(reference.accept)
        if isinstance(gold.get("arguments"), dict) and "tool_name" in gold:  # a built structured row: the lists are the call's
            if isinstance(value.get("arguments"), dict):
                value = value | {"arguments": _accepted(value["arguments"], gold["arguments"], accept, form)}
        else:
            value = _accepted(value, gold, accept, form)
    return (with_defaults(value, schema), with_defaults(gold, schema)) if schema else (value, gold)


def _accepted(value: dict, gold: dict, accept: dict[str, list], form: Callable[[Any], Any]) -> dict:
    """The arguments with every acceptable value replaced by the gold's own."""
    value = dict(value)
    for key, options in accept.items():
        if key in value and any(_accepts(option, value[key], form) for option in options):
            del value[key]
        elif key in value or "" not in options:
            continue
        if key in gold:
            value[key] = gold[key]
    return value


def _accepts(option: Any, value: Any, form: Callable[[Any], Any]) -> bool:
    """Whether a value is one that the row accepts: equal, or (BFCL) an object whose leaves are lists of acceptable values."""
    if leaves(form(option)) == leaves(form(value)):
        return True
    if isinstance(option, dict) and isinstance(value, dict):
        return value.keys() <= option.keys() and all(
            any(_accepts(choice, value[key], form) for choice in choices) if key in value else "" in choices
            for key, choices in option.items()
            if isinstance(choices, list)
        )
    if isinstance(option, list) and isinstance(value, list) and len(option) == len(value):
        return all(_accepts(left, right, form) for left, right in zip(option, value, strict=True))
    return False
