"""What a hosted model was asked and what it replied, as rows of the tracks: one traced generation to one row, or the reason why not.

What is read: the input and output that Langfuse keeps, as the tracers for OpenAI (chat and Responses), LangChain and this project
write them: messages, a dict with `messages` or `input`, or a plain text; a message, a list of output items, or a text.

One tool call is a toolcall row, a JSON object a structured one. A row is one request: a system text (its wording is kept, in front
of the prompt), one user message and the reply to it. Conversations are left out (`multi_turn`): a reply inside one hangs on turns
that a row does not hold, and to cut them off would make the reply wrong for what is left.
"""

import json
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from slm_swap.common.errors import UserError
from slm_swap.common.exact_json import EXACT, number
from slm_swap.dataset.masking import mask
from slm_swap.rows.examples import Example, parse_example
from slm_swap.rows.json_schema import call_violations, violations
from slm_swap.rows.lines import dump_json
from slm_swap.rows.prompts import SYSTEM_PROMPTS, structured_prompt, toolcall_completion, toolcall_prompt
from slm_swap.rows.toolschema import openai_tool
from slm_swap.scoring.replies import InvalidReply
from slm_swap.scoring.tracks import TRACKS

REASONS = {  # why a generation makes no row, in the order in which it is looked at
    "failed": "level ERROR, finish_reason error, or no output",
    "filtered": "stopped by a content filter, or refused",
    "truncated": "cut off at a token limit",
    "no_request": "no user message, or not in text alone",
    "multi_turn": "more than one user message, or replies and tool results among them",
    "several_replies": "more than one reply",
    "several_calls": "more than one tool call",
    "other_form": "a reply in a form that is not read here: Anthropic's, Bedrock's, Gemini's or the Vercel AI SDK's",
    "not_json": "neither a tool call nor one JSON object, or arguments that are no JSON object",
    "other_track": "a reply of the track that was not asked for",
    "schema_fault": "a tool or JSON Schema that cannot be read",
    "tool_not_listed": "a call of a tool that was not on offer",
    "breaks_schema": "a reply that breaks its own schema",
    "unusable": "what no row can hold: half of a surrogate pair, nested too deeply, or an integer of more than 4300 digits",
    "no_score": "no score that --min-score could look at (with --require-score)",
    "low_score": "a score below --min-score",
    "duplicate": "the same prompt and completion as a newer one",
    "conflicting": "the same prompt as a newer one, with another completion",
}
FILTERED, TRUNCATED = {"content_filter", "refusal", "safety"}, {"length", "max_tokens", "max_output_tokens"}
MESSAGE_MARKS = {"tool_calls", "function_call", "refusal"}  # a message without a role has one of these


class Unusable(Exception):
    """A generation that makes no row; its one argument is one of REASONS."""


@dataclass
class Request:
    """What was asked."""

    text: str
    instructions: str = ""
    tools: list[dict] | None = None
    schema: dict | None = None
    own: bool = False  # this program's own system prompt stood in front: an evaluation, no production traffic


@dataclass
class Reply:
    """What came back: a text, or calls of (tool, arguments)."""

    text: str = ""
    calls: list[tuple[Any, Any]] = field(default_factory=list)
    finish_reason: str = ""


@dataclass(frozen=True)
class Taken:
    """A generation's row, as it is written; `masked` counts the different values that were masked in it."""

    track: str
    row: dict[str, Any]
    masked: dict[str, int]
    own: bool


def convert(generation: dict[str, Any], tracks: Collection[str], regions: Collection[str] | None) -> Taken:
    """The row of one generation as the API gives it, masked unless `regions` is None.

    Raises:
        Unusable: it makes no row; the reason is one of REASONS.
    """
    try:
        metadata = generation.get("metadata")
        metadata = {key: _decoded(value) for key, value in metadata.items()} if isinstance(metadata, dict) else {}
        reply = _reply(generation.get("output"))
        finish = str(reply.finish_reason or metadata.get("finish_reason") or "").lower()
        if generation.get("level") == "ERROR" or finish == "error":
            raise Unusable("failed")
        if finish in FILTERED:
            raise Unusable("filtered")
        if finish in TRUNCATED:
            raise Unusable("truncated")
        if not reply.text.strip() and not reply.calls:
            raise Unusable("failed")
        request = _request(_decoded(generation.get("input")), metadata, _decoded(generation.get("modelParameters")))
        tool, value = _answer(reply)
        track = "structured" if tool is None else "toolcall"
        if track not in tracks:
            raise Unusable("other_track")
        _check(request, tool, value)
        return _taken(generation, track, request, tool, value, regions)
    except RecursionError:
        raise Unusable("unusable") from None


def _check(request: Request, tool: str | None, value: dict) -> None:
    """Hold a reply against its own schema, where one is known."""
    from referencing.exceptions import Unresolvable

    offered = [offer for offer in request.tools or [] if offer["name"] == tool]
    if tool is not None and request.tools and not offered:
        raise Unusable("tool_not_listed")
    try:
        if offered:
            broken = call_violations(value, offered[0])
        else:
            broken = violations(value, request.schema) if tool is None and request.schema else []
    except Unresolvable:
        raise Unusable("schema_fault") from None
    if broken:
        raise Unusable("breaks_schema")


def _taken(
    generation: dict, track: str, request: Request, tool: str | None, value: dict, regions: Collection[str] | None
) -> Taken:
    """Mask the parts and put them together as the importers do."""
    listed = request.tools if tool is not None else None
    offers = [[offer["description"], offer["parameters"]] for offer in listed or []]
    parts = [request.instructions, request.text, value, offers, request.schema if tool is None else None]
    counts: Counter = Counter()
    if regions is not None:
        parts, counts = mask(parts, tuple(regions))
    instructions, text, value, offers, schema = parts
    tools = None
    prompt = f"Request: {text}" if instructions else text
    if listed:
        named = zip(listed, offers, strict=True)
        tools = [{"name": offer["name"], "description": said, "parameters": parameters} for offer, (said, parameters) in named]
        prompt = toolcall_prompt(tools, text)
    elif schema is not None:
        prompt = structured_prompt(schema, text)
    prompt = f"{instructions}\n\n{prompt}" if instructions else prompt
    if request.own:
        text = text.rpartition("\n\nRequest: ")[2]
    try:
        row = Example(
            prompt=prompt,
            completion=dump_json(value) if tool is None else toolcall_completion(tool, value),
            id=str(generation["id"]),
            tools=tools,
            schema=schema,
            group=generation.get("sessionId") or generation.get("traceId"),
            source=f"langfuse:{generation.get('traceId')}",
            request=text if text != prompt else None,
        ).to_json()
        TRACKS[track].reference(parse_example(row, row["id"]))
    except (UserError, ValueError):
        raise Unusable("unusable") from None
    return Taken(track, row, dict(counts), request.own)


# -- What was asked --------------------------------------------------------------------------------------------------------------


def _decoded(value: Any) -> Any:
    """v4 servers give JSON as text: an object or list in a text is read, any other text stays."""
    if isinstance(value, str) and value.lstrip()[:1] in {"{", "["}:
        try:
            return json.loads(value, **EXACT)
        except ValueError:
            return value
    return value


def _request(given: Any, metadata: dict, parameters: Any) -> Request:
    parameters = parameters if isinstance(parameters, dict) else {}
    options = parameters | metadata | (given if isinstance(given, dict) else {})
    messages = given
    if isinstance(given, dict):
        messages = given.get("messages", given.get("input", [given] if "role" in given else None))
        if given.get("instructions") and isinstance(messages, str | list):
            turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
            messages = [{"role": "system", "content": given["instructions"]}, *turns]
    if isinstance(messages, str) and messages.strip():
        return Request(messages, tools=_tools(options, []), schema=_schema(options))
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise Unusable("no_request")
    # LangChain's tracer writes the tools on offer as messages of the role tool, before any call
    offered = [message for message in messages if message.get("role") == "tool" and isinstance(message.get("content"), dict)]
    turns = [message for message in messages if message not in offered]
    system = [_text(message.get("content")) for message in turns if message.get("role") in {"system", "developer"}]
    others = [message for message in turns if message.get("role") not in {"system", "developer"}]
    if len(others) > 1:
        raise Unusable("multi_turn")
    if not others or others[0].get("role") != "user" or not _text(others[0].get("content")).strip():
        raise Unusable("no_request")
    tools = _tools(options, [message["content"] for message in offered])
    own = [text for text in system if text in SYSTEM_PROMPTS.values()]
    instructions = "\n\n".join(text.strip() for text in system if text.strip() and text not in own)
    return Request(_text(others[0]["content"]), instructions, tools, _schema(options), bool(own))


def _text(content: Any) -> str:
    """A message's text.

    Raises:
        Unusable: there is something other than text in it.
    """
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise Unusable("no_request")
    return "\n".join(texts)


def _tools(options: dict, offered: list[dict]) -> list[dict] | None:
    listed = [_decoded(options.get(name)) or [] for name in ("tools", "functions")]
    if not all(isinstance(some, list) for some in listed):
        raise Unusable("schema_fault")
    given = [*listed[0], *listed[1], *offered]
    try:
        tools = [_tool(dump_json(tool)) for tool in given]
    except ValueError:
        raise Unusable("schema_fault") from None
    named = {tool["name"]: tool for tool in tools}
    if any(named[tool["name"]] != tool for tool in tools):
        raise Unusable("schema_fault")
    return list(named.values()) or None


@lru_cache(maxsize=4096)
def _tool(text: str) -> dict:
    """One dict for each different tool: a project's generations share a few."""
    return openai_tool(json.loads(text, parse_float=number))


def _schema(options: dict) -> dict | None:
    """The JSON Schema that was asked for: `response_format` of the chat API, `text_format` and `text.format` of Responses."""
    for name in ("response_format", "text_format", "text"):
        asked = _decoded(options.get(name))
        asked = asked.get("format", asked) if isinstance(asked, dict) else None
        if isinstance(asked, dict) and asked.get("type") == "json_schema":
            schema = (asked.get("json_schema") or asked).get("schema")
            try:
                _tool(dump_json({"name": "reply", "parameters": schema}))
            except ValueError:
                raise Unusable("schema_fault") from None
            return schema
    return None


# -- What came back --------------------------------------------------------------------------------------------------------------


def _reply(given: Any) -> Reply:
    output = _decoded(given)
    if isinstance(output, dict) and isinstance(output.get("choices"), list):  # a whole chat completion
        if len(output["choices"]) != 1:
            raise Unusable("several_replies" if output["choices"] else "failed")
        choice = output["choices"][0]
        reply = _reply(choice.get("message"))
        reply.finish_reason = choice.get("finish_reason") or reply.finish_reason
        return reply
    if isinstance(output, dict) and isinstance(output.get("output"), list):  # a whole Responses answer
        reply = _reply(output["output"])
        reply.finish_reason = (output.get("incomplete_details") or {}).get("reason") or reply.finish_reason
        return reply
    if isinstance(output, dict) and (output.get("role") == "assistant" or MESSAGE_MARKS & output.keys()):
        return _message(output)
    if isinstance(output, list) and any(isinstance(item, dict) and _is_item(item) for item in output):
        return _items([item for item in output if isinstance(item, dict)])
    if isinstance(output, dict):
        _refuse_wrapper(output)
    if given is None or isinstance(given, str):
        return Reply(given or "")
    return Reply(_text_of(output))  # the reply was JSON, and the server has read it


def _refuse_wrapper(output: dict) -> None:
    """Another API's wrapper around a reply, or an error, is no JSON reply of the model's.

    Raises:
        Unusable: it is one.
    """
    error, message = output.get("error"), output.get("message")
    if output.keys() == {"error"} and isinstance(error, dict) and "message" in error:
        raise Unusable("failed")
    bedrock = isinstance(message, dict) and "role" in message and isinstance(message.get("content"), list)
    gemini = isinstance(output.get("candidates"), list) or (output.get("role") == "model" and "parts" in output)
    if bedrock or gemini or isinstance(output.get("toolCalls"), list):
        raise Unusable("other_form")


def _is_item(item: dict) -> bool:
    return item.get("role") == "assistant" or item.get("type") == "function_call"


def _message(message: dict) -> Reply:
    extra = message.get("additional_kwargs") or {}
    calls = message.get("tool_calls") or extra.get("tool_calls") or []
    legacy = message.get("function_call") or extra.get("function_call")
    calls = calls if isinstance(calls, list) else [calls]
    if message.get("refusal"):
        return Reply(finish_reason="refusal")
    content = message.get("content")
    if isinstance(content, dict):  # a JSON reply that the server has read
        text = _text_of(content)
    else:
        parts = content if isinstance(content, list) else [{"text": content or ""}]
        if any(isinstance(part, dict) and part.get("type") == "tool_use" for part in parts):
            raise Unusable("other_form")
        text = "".join(str(part.get("text") or "") for part in parts if isinstance(part, dict))
    return Reply(text, [_call(call) for call in [*calls, *([legacy] if legacy else [])]], message.get("finish_reason") or "")


def _items(items: list[dict]) -> Reply:
    """The output items of the Responses API, or a list of one message."""
    calls = [_call(item) for item in items if item.get("type") == "function_call"]
    messages = [_message(item) for item in items if item.get("role") == "assistant"]
    if len(messages) > 1:
        raise Unusable("several_replies")
    reply = messages[0] if messages else Reply()
    return Reply(reply.text, [*reply.calls, *calls], reply.finish_reason)


def _call(call: Any) -> tuple[Any, Any]:
    """(tool, arguments) as they stand, of any of the forms."""
    inner = call.get("function", call) if isinstance(call, dict) else {}
    return inner.get("name"), inner.get("arguments", inner.get("args"))


def _answer(reply: Reply) -> tuple[str | None, dict]:
    """(tool, arguments), or (None, object)."""
    if len(reply.calls) > 1:
        raise Unusable("several_calls")
    if reply.calls:
        [(tool, arguments)] = reply.calls
        text = arguments if isinstance(arguments, str) else _text_of(arguments)
        text = "{}" if text.strip() in {"", "null"} else text  # how servers write "no arguments"
        return (tool, _object(text)) if isinstance(tool, str) and tool else _no_json()
    try:
        parsed = TRACKS["toolcall"].parse_reference(reply.text)  # a model that calls in the words of this project's prompts
        return parsed.name, _object(reply.text.partition(">")[2].rpartition("<")[0])
    except InvalidReply:
        return None, _object(reply.text)


def _object(text: str) -> dict:
    """One JSON object and nothing else, as `metrics` reads it; its numbers keep their digits.

    Raises:
        Unusable: it is no such text, or holds an integer that Python's `int` does not read.
    """
    try:
        TRACKS["structured"].parse_reference(text)
    except InvalidReply:
        _no_json()
    try:
        return json.loads(text, parse_float=number)
    except ValueError:
        raise Unusable("unusable") from None


def _text_of(value: Any) -> str:
    """The text of a reply that was JSON and that a server has read."""
    try:
        return dump_json(value)
    except ValueError:
        return _no_json()  # NaN


def _no_json() -> Any:
    raise Unusable("not_json")
