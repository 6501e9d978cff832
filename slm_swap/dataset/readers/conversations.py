"""A conversation to rows: each reply that production gave is one row, with the gold turns before it and its own reply as gold.

A reply with calls is a toolcall row, one without a call where tools were on offer too (no call is due). Any other reply is a structured
row where it is a JSON value; a text without JSON and without tools on offer is `plain_text`, which nothing here measures.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from slm_swap.common.exact_json import EXACT, ExactEncoder, number
from slm_swap.dataset.keys import Keys, record_keys
from slm_swap.dataset.near import FEW_WORDS
from slm_swap.dataset.readers.checks import check_calls, check_value
from slm_swap.dataset.readers.messages import Turn, decoded, dumped, json_value, read_turns
from slm_swap.dataset.row import Dropped, Row, Unusable
from slm_swap.rows.lines import dump_json, nested_too_deeply, text_hash
from slm_swap.rows.toolschema import json_schema_of, openai_tool
from slm_swap.scoring.replies import tries_to_call

FILTERED, TRUNCATED = {"content_filter", "refusal", "safety"}, {"length", "max_tokens", "max_output_tokens"}
OPTIONS = ("tool_choice", "parallel_tool_calls", "response_format")
_FENCED = re.compile(r"\A\s*```(?:json|JSON)?\s*\n(.*?)\n?\s*```\s*\Z", re.DOTALL)


@dataclass
class Conversation:
    """What one row of a file, or one traced generation, holds.

    Replies stand at or behind `first`: turns before it are history only. `asked` is what was sent besides the messages (tools,
    response_format, ...), `metadata` what a tracer has noted.
    """

    where: str
    turns: list[Turn]
    id: str = ""
    group: str = ""
    source: str = ""
    first: int = 0
    asked: Mapping[str, Any] = field(default_factory=dict)
    offered: list[dict] = field(default_factory=list)  # tools that stand elsewhere
    time: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


def rows_of(conversation: Conversation) -> Iterator[Row | Dropped]:
    """One item for each reply; one `Dropped` (`no_reply`) where there is none."""
    replies = [
        at for at, turn in enumerate(conversation.turns) if at >= conversation.first and turn.message["role"] == "assistant"
    ]
    name = conversation.id or _hash(conversation)
    if not replies:
        yield Dropped(name, conversation.where, "no_reply", "no assistant message")
    history = [turn.message for turn in conversation.turns]
    texts = _texts(history)
    shared: tuple | Unusable | None = None
    for count, at in enumerate(replies, 1):
        own = name if len(replies) == 1 else f"{name}:{count}"
        try:
            if not conversation.turns[at].trained:
                raise Unusable("not_trained")
            if shared is None:
                shared = asked_besides(conversation.asked, conversation.offered)
            if isinstance(shared, Unusable):
                raise shared
            yield _row(conversation, own, history[:at], texts and texts[:at], conversation.turns[at], *shared)
        except Unusable as reason:
            if reason.args[0] == "schema_fault" and shared is None:
                shared = reason
            yield Dropped(own, conversation.where, str(reason), reason.why)
        except RecursionError:
            yield Dropped(own, conversation.where, "unusable", "nested too deeply")


def _hash(conversation: Conversation) -> str:
    try:
        return text_hash(json.dumps([turn.message for turn in conversation.turns], sort_keys=True))[:16]
    except (ValueError, RecursionError):
        return text_hash(conversation.where)[:16]


def asked_besides(asked: Mapping[str, Any], offered: Sequence[dict] = ()) -> tuple[list[dict] | None, dict | None, dict]:
    """(tools, the wanted schema, options) of what was sent besides the messages; `offered` are tools that stand elsewhere.

    Raises:
        Unusable: tools or a schema that cannot be read.
    """
    options = {name: decoded(asked[name]) for name in OPTIONS if asked.get(name) is not None}
    if "tool_choice" in options:
        options["tool_choice"] = _tool_choice(options["tool_choice"])
    schema, wanted = wanted_schema(asked)
    if wanted is not None:
        options["response_format"] = wanted
    return tools_of(asked, offered), schema, options


def _tool_choice(given: Any) -> Any:
    """A choice of tools in the chat API's form, also where Anthropic's or the Responses API's was sent."""
    kind = given.get("type") if isinstance(given, dict) else None
    if kind in ("tool", "function") and isinstance(given.get("name"), str):
        return {"type": "function", "function": {"name": given["name"]}}
    return {"auto": "auto", "any": "required", "none": "none"}.get(kind, given) if isinstance(kind, str) else given


def _texts(messages: list[dict]) -> list[str] | None:
    """The messages as JSON; None where one of them can be no JSON, which its own rows will say."""
    try:
        return [dump_json(message) for message in messages]
    except (ValueError, RecursionError):
        return None


def _row(
    conversation: Conversation,
    name: str,
    messages: list[dict],
    texts: list[str] | None,
    turn: Turn,
    tools: list[dict] | None,
    schema: dict | None,
    options: dict,
) -> Row:
    """The row of one reply.

    Raises:
        Unusable: it makes none.
    """
    check_finish(turn)
    if not any(message["role"] == "user" and message["content"].strip() for message in messages):
        raise Unusable("no_request", "no user message before the reply")
    if messages[-1]["role"] == "assistant":
        raise Unusable("no_request", "the turn before the reply is the assistant's too")
    record: dict[str, Any] = {"id": name, "messages": messages}
    if tools:
        record["tools"] = tools
    calls = calls_of(turn)
    text = turn.message.get("content") or ""
    wants_json = schema is not None
    if tools and not calls and not wants_json and tries_to_call(text):
        calls = _written_calls(text, {tool["name"] for tool in tools})
    if calls or (tools and not wants_json):
        check_calls(calls, tools)
        record["calls"] = calls
        if not calls:
            record["content"] = text
    else:
        record["object"] = _value(text, wants_json)
        if schema is not None:
            check_value(record["object"], schema)
            record["schema"] = schema
    gold = record.get("calls", record.get("object"))
    if gold is None or nested_too_deeply(gold, dump_json(gold)):
        raise Unusable("unusable", "null, or nested too deeply")
    record |= {"options": options} if options else {}
    record |= {"group": conversation.group} if conversation.group else {}
    record |= {"time": conversation.time} if conversation.time else {}
    record["source"] = conversation.source or short(conversation.where)
    track = "toolcall" if "calls" in record else "structured"
    return Row(
        id=name,
        where=conversation.where,
        request=near_text(messages),
        source=conversation.where,
        tools=tools or [],
        tool=calls[0]["name"] if len(calls) == 1 else None,
        arguments={},
        record=record,
        track=track,
        group=conversation.group or None,
        time=conversation.time,
        keys=_keys(track, record, texts),
    )


def short(where: str) -> str:
    """The file's name and the row's place in it, without the folder."""
    return where.replace("\\", "/").rpartition("/")[2]


def check_finish(turn: Turn) -> None:
    """A reply that production itself could not use is no gold.

    Raises:
        Unusable: it failed, was filtered or cut off.
    """
    if turn.finish == "error":
        raise Unusable("failed", "finish_reason error")
    if turn.finish in FILTERED:
        raise Unusable("filtered", turn.finish)
    if turn.finish in TRUNCATED:
        raise Unusable("truncated", turn.finish)
    if not turn.message.get("tool_calls") and not (turn.message.get("content") or "").strip():
        raise Unusable("failed", "an empty reply")


def calls_of(turn: Turn) -> list[dict[str, Any]]:
    """The calls of a reply, `{"name", "arguments"}`.

    Raises:
        Unusable: a call without a name, or arguments that are no JSON object.
    """
    calls = []
    for call in turn.message.get("tool_calls") or []:
        name, text = call["function"]["name"], call["function"]["arguments"]
        if not name:
            raise Unusable("not_json", f"a call without a tool's name: {text[:80]}")
        try:
            arguments = json_value(text)
        except ValueError as error:
            raise Unusable("not_json", f"{name}: its arguments are not JSON ({error})") from None
        if not isinstance(arguments, dict):
            raise Unusable("not_json", f"{name}: its arguments are no JSON object: {text[:80]}")
        calls.append({"name": name, "arguments": arguments})
    return calls


def _written_calls(text: str, offered: set[str]) -> list[dict[str, Any]]:
    """The calls of a reply that is their JSON alone: one of `{"name", "arguments"}`, or a list of such.

    Raises:
        Unusable: it is not. Taken for words, it would say that no call was due.
    """
    given = decoded(text.strip())
    listed = given if isinstance(given, list) else [given]
    named = [one for one in listed if isinstance(one, dict) and one.get("name") in offered and {"arguments", "parameters"} & one.keys()]
    if not named or len(named) < len(listed):
        raise Unusable("other_form", f"a call in the reply's text, in a form that is not read: {text[:80]}")
    return calls_of(read_turns([{"role": "assistant", "tool_calls": named}])[0])


def _value(text: str, wants_json: bool) -> Any:
    """A reply's JSON value; one in a code fence counts as if it stood alone."""
    fenced = _FENCED.match(text)
    try:
        value = json_value(fenced[1] if fenced else text)
    except ValueError as error:
        if wants_json:
            raise Unusable("not_json", f"response_format asks for JSON, this is none ({error})") from None
        if text.lstrip()[:1] in ("{", "["):
            raise Unusable("not_json", f"it begins like JSON and is none ({error})") from None
        raise Unusable("plain_text") from None
    if not wants_json and not isinstance(value, (dict, list)):
        raise Unusable("plain_text")
    return value


def _keys(track: str, record: dict, texts: list[str] | None) -> Keys:
    """As `record_keys`, which also sees whether the row can be written.

    Raises:
        Unusable: it cannot.
    """
    try:
        return record_keys(track, record, texts)
    except UnicodeEncodeError:
        raise Unusable("unusable", "half of a surrogate pair") from None
    except ValueError:
        raise Unusable("unusable", "NaN or Infinity") from None


def near_text(messages: list[dict]) -> str:
    """The text by which near-duplicates are found: the last user message, or all of them where it has fewer than FEW_WORDS words."""
    asked = [message["content"] for message in messages if message["role"] == "user"]
    return asked[-1] if asked and len(re.findall(r"\w+", asked[-1])) >= FEW_WORDS else "\n".join(asked)


# -- What was sent besides -------------------------------------------------------------------------------------------------------


def tools_of(asked: Mapping[str, Any], offered: Sequence[dict]) -> list[dict] | None:
    """The tools on offer in the kept form; None where there were none.

    Raises:
        Unusable: one of them cannot be read, or two different ones have one name.
    """
    listed = [decoded(asked.get(name)) or [] for name in ("tools", "functions")]
    if not all(isinstance(some, list) for some in listed):
        raise Unusable("schema_fault", "`tools` is no list")
    try:
        return _read_tools(json.dumps([*listed[0], *listed[1], *offered], cls=ExactEncoder))
    except (ValueError, RecursionError) as error:
        raise Unusable("schema_fault", str(error)) from None


@lru_cache(maxsize=1024)
def _read_tools(text: str) -> list[dict] | None:
    """One list for each different one: a project's rows share a few."""
    given = json.loads(text, **EXACT)
    if nested_too_deeply(given, text):
        raise ValueError("nested too deeply")
    tools = [_tool(json.dumps(tool, cls=ExactEncoder)) for tool in given]
    named = {tool["name"]: tool for tool in tools}
    if any(named[tool["name"]] != tool for tool in tools):
        raise ValueError("two different tools of one name")
    return list(named.values()) or None


@lru_cache(maxsize=8192)
def _tool(text: str) -> dict:
    return openai_tool(json.loads(text, parse_float=number))


def wanted_schema(asked: Mapping[str, Any]) -> tuple[dict | None, dict | None]:
    """(JSON Schema, response_format in the chat API's form) of what was asked for: `response_format` of the chat API, `text_format`
    and `text.format` of Responses; (None, None) where no JSON was.

    Raises:
        Unusable: the schema cannot be read.
    """
    for name in ("response_format", "text_format", "text"):
        given = decoded(asked.get(name))
        given = given.get("format", given) if isinstance(given, dict) else None
        kind = given.get("type") if isinstance(given, dict) else None
        if kind == "json_object":
            return {"type": "object"}, {"type": "json_object"}
        if kind == "json_schema":
            inner = given.get("json_schema") or {key: value for key, value in given.items() if key != "type"}
            try:
                schema = _schema(dumped(inner.get("schema")))
            except (ValueError, RecursionError, AttributeError) as error:
                raise Unusable("schema_fault", f"response_format: {error}") from None
            return schema, {"type": "json_schema", "json_schema": inner}
    return None, None


@lru_cache(maxsize=1024)
def _schema(text: str) -> dict:
    return json_schema_of(json.loads(text, parse_float=number))
