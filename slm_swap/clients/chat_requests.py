"""A row's request as the body of a chat completion, and how long it is."""

import json
from typing import Any

from slm_swap.rows.lines import dump_json
from slm_swap.rows.prompts import Request

TOOL = ("name", "description", "parameters", "strict")
OPTIONS = ("tool_choice", "parallel_tool_calls", "response_format")  # what a row's production may have sent besides


def request_body(request: Request) -> dict[str, Any]:
    """What is sent of a row besides the model and its parameters: `messages`; natively also `tools`, in OpenAI's nested form, the row's
    `options` as they are, and a `response_format` for the schema of the value that is wanted.
    """
    body: dict[str, Any] = {"messages": request.messages}
    if not request.native:
        return body
    if request.tools:
        body["tools"] = [
            {"type": "function", "function": {name: _sendable(tool[name]) for name in TOOL if name in tool}} for tool in request.tools
        ]
    options = {name: _sendable(value) for name, value in (request.options or {}).items() if name in OPTIONS and value is not None}
    if not request.tools:  # servers refuse both where there is nothing to choose from
        options = {name: value for name, value in options.items() if name == "response_format"}
    if request.schema is not None and "response_format" not in options:
        options["response_format"] = response_format(request.schema)
    return body | options


def _sendable(value: Any) -> Any:
    """A value with floats for Decimals, which no HTTP package writes: of schemas and options, never of what is scored."""
    return json.loads(dump_json(value))


def response_format(schema: dict[str, Any]) -> dict[str, Any]:
    """What asks for a JSON value: not `strict`, as few schemas of production keep to its rules."""
    if schema == {"type": "object"}:
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {"name": "reply", "schema": _sendable(schema)}}


def length(request: Request) -> int:
    """The characters of a request that its server counts tokens of: texts, calls and what is on offer."""
    texts = (message.get("content") for message in request.messages)
    parts = [text if isinstance(text, str) else dump_json(text) for text in texts if text is not None]
    calls = [dump_json(message["tool_calls"]) for message in request.messages if message.get("tool_calls")]
    offered = [dump_json(part) for part in (request.tools, request.schema) if part] if request.native else []
    return sum(map(len, (*parts, *calls, *offered)))
