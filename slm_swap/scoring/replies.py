"""A reply's text to the value or call that it is."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from slm_swap.scoring.json_values import WHITE_SPACE, arrays_in, decode_at, json_type, objects_in, parse_json


class InvalidReply(ValueError):
    """A text that is not one well-formed reply; `error` is one of ERRORS."""

    def __init__(self, error: str, reason: str):
        super().__init__(reason)
        self.error = error


class Parsed(NamedTuple):
    """A well-formed reply: the structured value, or a call's arguments with the tool's `name`."""

    value: Any
    name: str | None = None


_OPEN, _CLOSE = re.compile(r'<tool_call name="([^"<>]+)">'), "</tool_call>"
_LOOSE_OPEN = re.compile(r"<tool_call\s+name\s*=\s*[\"']([^\"'<>]+)[\"']\s*>\s*(?={)", re.IGNORECASE)
_ANY_OPEN = re.compile(r"<tool_call\b", re.IGNORECASE)
_LOOSE_CLOSE = re.compile(r"\s*</tool_call\s*>", re.IGNORECASE)
# How models write calls where nobody reads them as such: chat formats' own marks, Python's form alone in a text, and JSON.
_CALL_MARKS = re.compile(
    r"<\|?/?tool_calls?\b|<functioncall>|<\|tool_calls|<｜tool▁calls?|<function=|<function_calls?>|functools\s*\[|\[TOOL_CALLS\]|<\|python_tag\|>|<invoke\b|\bto=functions\.",
    re.IGNORECASE,
)
_PYTHON_CALL = re.compile(r"\A\s*\[?\s*[A-Za-z_][\w.]*\(\s*(?:[A-Za-z_]\w*\s*=[^=].*)?\)\s*\]?\s*\Z", re.DOTALL)
_CALL_NAME = re.compile(r'"(?:name|tool|tool_name|function|function_name)"\s*:\s*["{]')
_CALL_ARGUMENTS = re.compile(r'"(?:arguments|parameters|args|tool_input)"\s*:')


def parse_structured(text: str, lenient: bool = False, like: Any = None) -> Parsed:
    """One JSON value and nothing else, JSON's white space around it allowed; `lenient` takes the one out of the text around it.

    The value must be an object, or of the JSON type of `like`, the value wanted.

    Raises:
        InvalidReply: no_json, bad_json, extra_text or wrong_shape, as this module defines them.
    """
    wanted = "object" if like is None else json_type(like)
    found = arrays_in if wanted == "array" else objects_in
    if lenient and wanted in ("object", "array"):
        return _only([Parsed(value) for value, _ in found(text)])
    try:
        value = parse_json(text)
    except ValueError as error:
        if found(text):
            raise InvalidReply("extra_text", f"there is other text beside the JSON {wanted}") from None
        raise _no_object(text, error, "[" if wanted == "array" else "{") from None
    if json_type(value) != wanted:
        raise InvalidReply("wrong_shape", f"a JSON {json_type(value)} instead of an {wanted}")
    return Parsed(value)


def parse_toolcall(text: str, lenient: bool = False, like: Any = None) -> Parsed:
    """Exactly one `<tool_call name="X">{...}</tool_call>`, JSON's white space around it and around its object allowed.

    `lenient` takes the one call out of the text around it, with other quotes, case and white space in the wrapper.

    Raises:
        InvalidReply: no_json, bad_json, extra_text or wrong_shape, as this module defines them.
    """
    if lenient:
        return _only(_loose_calls(text))
    stripped = text.strip(WHITE_SPACE)
    opened = _OPEN.match(stripped)
    if not opened or not stripped.endswith(_CLOSE):
        raise _no_call(text)
    try:
        value = parse_json(stripped[opened.end() : -len(_CLOSE)])
    except ValueError as error:
        raise _no_call(text, error) from None
    if not isinstance(value, dict):
        raise InvalidReply("wrong_shape", f"the arguments are a JSON {json_type(value)} instead of an object")
    return Parsed(value, opened[1])


def _no_call(text: str, reason: object = "no JSON object in it is whole") -> InvalidReply:
    """What is wrong with a text that is not one call: it is extra_text where a tag, a whole object and a closing tag follow."""
    opened = _OPEN.search(text)
    inside = objects_in(text, opened.end()) if opened else []
    if inside and _CLOSE in text[inside[0][1] :]:
        return InvalidReply("extra_text", "there is other text or a second call beside the call")
    if objects_in(text):
        return InvalidReply("wrong_shape", 'there is JSON, but not inside <tool_call name="..."> and </tool_call>')
    return _no_object(text, reason)


def _no_object(text: str, reason: object, opening: str = "{") -> InvalidReply:
    return InvalidReply("bad_json", str(reason)) if opening in text else InvalidReply("no_json", "no JSON object begins in it")


def parse_calls(text: str, lenient: bool = False) -> tuple[Parsed, ...]:
    """Any number of `<tool_call name="X">{...}</tool_call>` and nothing else but JSON's white space; none in a text without such a tag.

    `lenient` takes the calls out of the text around them, with other quotes, case and white space in the wrappers.

    Raises:
        InvalidReply: bad_json, extra_text or wrong_shape: a tag stands in the text, and not only whole calls.
    """
    if not _ANY_OPEN.search(text):
        return ()
    if lenient:
        found = _loose_calls(text)
        if not found:
            raise InvalidReply("wrong_shape", "there is a tag of a call, but no whole call")
        return tuple(found)
    calls, rest = [], text.strip(WHITE_SPACE)
    while rest:
        opened = _OPEN.match(rest)
        if not opened:
            raise _no_call(text) if not calls else InvalidReply("extra_text", "there is other text beside the calls")
        start = opened.end() + len(rest[opened.end() :]) - len(rest[opened.end() :].lstrip(WHITE_SPACE))
        try:
            value, end = decode_at(rest, start)
        except ValueError as error:
            raise InvalidReply("bad_json", str(error)) from None
        behind = rest[end:].lstrip(WHITE_SPACE)
        if not isinstance(value, dict) or not behind.startswith(_CLOSE):
            raise InvalidReply("wrong_shape", "a call is not one JSON object between its tags")
        calls.append(Parsed(value, opened[1]))
        rest = behind[len(_CLOSE) :].lstrip(WHITE_SPACE)
    return tuple(calls)


def tries_to_call(text: str) -> bool:
    """Whether a text without calls holds one in a form that is not read: where none is due, that is no answer in words."""
    if _CALL_MARKS.search(text) or _PYTHON_CALL.match(text):
        return True
    return bool(_CALL_NAME.search(text) and _CALL_ARGUMENTS.search(text))


def native_calls(calls: list[dict[str, str]]) -> tuple[Parsed, ...]:
    """The calls of a native reply, `{"name", "arguments"}` with the arguments as JSON texts; an empty text is no arguments.

    Raises:
        InvalidReply: bad_json or wrong_shape: the arguments are not one JSON object.
    """
    found = []
    for call in calls:
        text = call["arguments"]
        try:
            value = parse_json(text) if text.strip(WHITE_SPACE) else {}
        except ValueError as error:
            raise InvalidReply("bad_json", str(error)) from None
        if not isinstance(value, dict):
            raise InvalidReply("wrong_shape", f"the arguments are a JSON {json_type(value)} instead of an object")
        found.append(Parsed(value, call["name"]))
    return tuple(found)


def _only(found: list[Parsed]) -> Parsed:
    if len(found) != 1:
        raise InvalidReply("wrong_shape" if found else "no_json", f"{len(found)} replies in the text instead of one")
    return found[0]


def _loose_calls(text: str) -> list[Parsed]:
    """The calls in a text, behind each other; what stands inside a call's arguments is no call."""
    calls, opened = [], _LOOSE_OPEN.search(text)
    while opened:
        try:
            value, end = decode_at(text, opened.end())
            if closed := _LOOSE_CLOSE.match(text, end):
                calls.append(Parsed(value, opened[1].strip()))
                end = closed.end()
        except ValueError:
            end = opened.end()
        opened = _LOOSE_OPEN.search(text, end)
    return calls


Parser = Callable[..., Parsed]
