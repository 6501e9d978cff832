"""What a local model wrote in its own chat format, read exactly: content, calls with their arguments as written, thinking.

Arguments stay the text that the model wrote wherever the format has JSON: duplicate keys, NaN, the digits of a number and broken JSON
are for scoring to see. A JSON value ends where it ends, so a string argument may hold brackets, quotes and the format's own marks.
"""

import json
import re
from copy import deepcopy
from typing import Any, NamedTuple

from slm_swap.clients.thinking import THINK, channel_messages

_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder(parse_float=str, parse_int=str, parse_constant=str)  # where a value ends is all that is asked
_BEGUN = "{"  # arguments that were due and did not come: "" would be a call without any
_KEPT = re.compile("\x00(\\d+)\x00")
_NAME = re.compile(r'"name"\s*:\s*("(?:[^"\\\n]|\\.)*")')
_ARGUMENTS = re.compile(r'"(?:arguments|parameters)"\s*:\s*')
RECIPIENT = re.compile(r"to=functions\.([^\s<]+)")
PHI_CALLS = re.compile(r"<\|tool_call\|>|functools(?=\s*\[\s*[{\]])"), "<|/tool_call|>"
TAGGED_CALLS = re.compile("<tool_call>"), "</tool_call>"

Call = dict[str, str]


class Spoken(NamedTuple):
    """A reply's parts: `content` is what is neither call nor thinking; `thinking` is empty where there was none."""

    content: str
    calls: list[Call]
    thinking: str = ""


# -- JSON as it is written -------------------------------------------------------------------------------------------------------


def _skip(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()


def end_of_json(text: str, at: int = 0) -> int | None:
    """The position behind the JSON value that begins at `at`; None where no whole one does."""
    try:
        return _DECODER.raw_decode(text, at)[1]
    except (ValueError, RecursionError):
        return None


def is_json(text: str) -> bool:
    text = text.strip(" \t\r\n")
    return end_of_json(text) == len(text) > 0


def _members(text: str) -> list[tuple[str, str]]:
    """(key, value as written) of each member of a whole JSON object, duplicates too."""
    found, at = [], _skip(text, 1)
    while text[at] != "}":
        key, at = _DECODER.raw_decode(text, at)
        at = _skip(text, _skip(text, at) + 1)
        end = _DECODER.raw_decode(text, at)[1]
        found.append((key, text[at:end]))
        at = _skip(text, end)
        if text[at] == ",":
            at = _skip(text, at + 1)
    return found


def _elements(text: str) -> list[str]:
    """The elements, as written, of a whole JSON array."""
    found, at = [], _skip(text, 1)
    while text[at] != "]":
        end = _DECODER.raw_decode(text, at)[1]
        found.append(text[at:end])
        at = _skip(text, end)
        if text[at] == ",":
            at = _skip(text, at + 1)
    return found


# -- Calls -----------------------------------------------------------------------------------------------------------------------


def read_call(text: str, name: str = "name", arguments: tuple[str, ...] = ("arguments", "parameters")) -> Call:
    """One `{"name": ..., "arguments": {...}}`, which may be broken; some models say "parameters".

    A call whose text is no such object keeps that text as its arguments. Arguments that are not there are "".
    """
    text = text.strip(" \t\r\n")
    if not is_json(text) or not text.startswith("{"):
        return _broken(text)
    members = _members(text)
    names = [raw for key, raw in members if key == name]
    found = next((told for want in arguments if (told := [raw for key, raw in members if key == want])), [""])
    if len(names) != 1 or not names[0].startswith('"') or len(found) != 1:
        return {"name": "", "arguments": text}
    return {"name": json.loads(names[0]), "arguments": found[0]}


def _broken(text: str) -> Call:
    """A call of a text that is no JSON object: its arguments are neither whole JSON, as the call is not, nor nothing, which is none."""
    name, start = _NAME.search(text), _ARGUMENTS.search(text)
    rest = text[start.end() :] if start else text
    try:
        said = json.loads(name[1]) if name else ""
    except ValueError:
        said = ""
    return {"name": said, "arguments": text if is_json(rest) or not rest else rest}


def read_marked(text: str, marks: tuple[re.Pattern, str]) -> Spoken:
    """A reply whose calls stand as JSON behind an opening mark, in a list or one by one; the closing mark may be missing."""
    opening, closing = marks
    content, calls, at = [], [], 0
    while mark := opening.search(text, at):
        content.append(text[at : mark.start()])
        found, at = _calls_at(text, mark.end())
        closed = text.startswith(closing, at)
        stop = text.find(closing, at)
        if found is None or (not closed and stop >= 0 and not opening.search(text, at, stop)):  # more than calls up to the mark
            stop = len(text) if stop < 0 else stop
            found, at, closed = [_broken(text[mark.end() : stop].strip())], stop, True
        calls += found
        at += len(closing) if closed else 0
    content.append(text[at:])
    return Spoken("".join(content).strip(), calls)


def _calls_at(text: str, at: int) -> tuple[list[Call] | None, int]:
    """The calls of the whole JSON at a position, and the position behind it; None where it is not whole."""
    found: list[Call] = []
    while True:
        at = _skip(text, at)
        end = end_of_json(text, at)
        if end is None or text[at] not in "[{":
            return None, at
        found += [read_call(one) for one in (_elements(text[at:end]) if text[at] == "[" else [text[at:end]])]
        at = _skip(text, end)
        if not text.startswith(",", at):
            return found, at
        at += 1


def read_channels(text: str) -> Spoken:
    """A reply of gpt-oss: a message for a function is a call, one of the channel `analysis` is thinking, others are content."""
    content, calls, thinking = [], [], []
    for header, body, _ in channel_messages(text):
        if recipient := RECIPIENT.search(header):
            calls.append({"name": recipient[1], "arguments": body.strip() or _BEGUN})
        else:
            (thinking if "analysis" in header else content).append(body)
    if thinking and not content and not calls:
        return Spoken(THINK + thinking[-1], [], "".join(thinking))
    return Spoken("\n".join(content) if content or calls or thinking else text, calls, "".join(thinking))


# -- Response templates ----------------------------------------------------------------------------------------------------------


class TemplateReader:
    """Replies read by transformers' `parse_response`, with the calls' text kept as it was written.

    Args:
        tokenizer: whose `parse_response` is asked.
        template: a response template of transformers 5.13 or later.
        prefix: the end of a prompt, from where the assistant's turn begins.
        end: the text of the token that ends a turn.

    Raises:
        ValueError: the template reads no calls.
    """

    def __init__(self, tokenizer: Any, template: dict, prefix: str, end: str):
        import regex  # what transformers reads templates by

        self.tokenizer, self.prefix, self.end = tokenizer, prefix, end
        self.template = deepcopy(template)
        field = self.template["fields"].get("tool_calls")
        if not field or not isinstance(field.get("transform"), dict):
            raise ValueError("its response template reads no calls")
        self.shape, self.each = field["transform"].get("function", field["transform"]), field.pop("transform_each", False)
        opens = field.get("open_pattern") or [regex.escape(one) for one in _listed(field.get("open"))]
        self.opening = regex.compile(opens if isinstance(opens, str) else "|".join(opens), regex.DOTALL)
        self.named = "name" in self.opening.groupindex
        content = field.get("content", "text")
        self.kind = "dialect" if field.get("content_args") and content != "xml-inline" else content
        if self.kind == "xml-inline":
            field["content_args"].pop("value_parser", None)
        if self.kind in ("json", "text"):
            self.kind = "json"
            field |= {"content": "text", "content_args": {"strip": False}}
        told = {"raw": "{content}"} | ({"name": "{name}"} if self.named else {})
        if self.kind in ("json", "xml-inline"):
            field["transform"] = told
        self.spare = deepcopy(self.template)  # for calls that are broken in a form of JSON of the model's own
        self.spare["fields"]["tool_calls"] |= {"content": "text", "content_args": {}, "transform": told}
        thinking = [told for name, told in self.template["fields"].items() if name in ("reasoning_content", "thinking", "reasoning")]
        closes = [told.get("close_pattern") or "|".join(map(regex.escape, _listed(told.get("close")))) for told in thinking]
        self.closing = regex.compile(closes[0]) if closes and closes[0] else None

    def read(self, text: str, stopped: bool, tools: list[dict] | None) -> Spoken:
        """A reply without its end token; `tools` are those on offer, for formats in which the schema says what is a string."""
        text += self.end if stopped else ""
        masked, kept = self._mask(text) if self.kind == "json" else (text, [])

        def whole(told: Any) -> str:
            return _KEPT.sub(lambda match: kept[int(match[1])], told) if isinstance(told, str) else ""

        try:
            told = self.tokenizer.parse_response(masked, self.template, prefix=self.prefix)
        except (ValueError, KeyError):
            told = self.tokenizer.parse_response(masked, self.spare, prefix=self.prefix)
        found = told.get("tool_calls") or []
        calls = [call for one in (found if isinstance(found, list) else [found]) for call in self._calls(one, whole, tools)]
        content = whole(told.get("content")).removesuffix(self.end)
        thinking = next((whole(told[name]) for name in ("reasoning_content", "thinking", "reasoning") if told.get(name)), "")
        if thinking and not content and not calls and self.closing and not self.closing.search(text):
            return Spoken(THINK + thinking, [], thinking)
        return Spoken(content, calls, thinking)

    def _mask(self, text: str) -> tuple[str, list[str]]:
        """The text with each call's whole JSON as a number between NULs, so that no mark inside of it ends the call."""
        parts, kept, at = [], [], 0
        while "\x00" not in text and (mark := self.opening.search(text, at)):
            start = _skip(text, mark.end())
            end = end_of_json(text, start)
            parts.append(text[at : start if end else mark.end()])
            if end:
                parts.append(f"\x00{len(kept)}\x00")
                kept.append(text[start:end])
            at = end or mark.end()
        return "".join(parts) + text[at:], kept

    def _calls(self, one: Any, whole: Any, tools: list[dict] | None) -> list[Call]:
        """The calls of one region."""
        if self.kind == "xml-inline" and isinstance(one["raw"], dict):
            return [{"name": one.get("name", ""), "arguments": _tagged_arguments(one["raw"], one.get("name"), tools)}]
        if self.kind != "json" and "raw" in one:
            return [{"name": one.get("name", ""), "arguments": one["raw"] or _BEGUN}]
        if self.kind != "json":
            told = one.get("function", one)
            return [{"name": str(told.get("name", "")), "arguments": json.dumps(told.get("arguments"), ensure_ascii=False)}]
        raw = whole(one["raw"]).strip(" \t\r\n")
        if self.shape == "{content}":
            return [read_call(raw)]
        if self.shape["arguments"] == "{content}":
            return [{"name": one.get("name", ""), "arguments": raw or _BEGUN}]
        keys = {key: self.shape[key].strip("{}").removeprefix("content.") for key in ("name", "arguments")}
        listed = _elements(raw) if self.each and is_json(raw) and raw.startswith("[") else [raw]
        calls = [read_call(text, keys["name"], (keys["arguments"],)) for text in listed]
        return [call | ({"name": one["name"]} if self.named else {}) for call in calls]


def _listed(told: Any) -> list[str]:
    return [told] if isinstance(told, str) else list(told or [])


def _tagged_arguments(values: dict[str, str], name: str | None, tools: list[dict] | None) -> str:
    """Arguments that stand between tags, as a JSON object: a value of a string parameter is a string, others are JSON where they can be."""
    parameters = next((tool.get("parameters") or {} for tool in tools or [] if tool.get("name") == name), {})
    schemas = parameters.get("properties") or {}
    told = (f"{json.dumps(key, ensure_ascii=False)}: {_tagged(value, _types(schemas.get(key)))}" for key, value in values.items())
    return "{" + ", ".join(told) + "}"


def _tagged(value: str, types: set[str]) -> str:
    if "null" in types and value in ("null", "None"):
        return "null"
    if "boolean" in types and value.lower() in ("true", "false"):
        return value.lower()
    text = "string" in types and not types & {"number", "integer", "boolean", "object", "array"}
    return value if not text and is_json(value) else json.dumps(value, ensure_ascii=False)


def _types(schema: Any) -> set[str]:
    """The JSON types that a parameter may have, as far as its schema says so itself."""
    if not isinstance(schema, dict):
        return set()
    told = {one for one in _listed(schema.get("type")) if isinstance(one, str)}
    if not told and schema.get("enum") and all(isinstance(one, str) for one in schema["enum"]):
        told = {"string"}
    return told.union(*(_types(choice) for key in ("anyOf", "oneOf") for choice in schema.get(key) or []))
