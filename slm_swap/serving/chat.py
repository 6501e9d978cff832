"""A chat completion's request as the row that it would be, and a small model's reply as the completion that is sent.

A request becomes a row by the readers that `prepare_data.py --source chat` has, and is asked by `prompts.request_of`: as it was measured.
"""

import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from slm_swap.clients.protocol import Reply
from slm_swap.common.errors import UserError
from slm_swap.dataset.readers.conversations import asked_besides
from slm_swap.dataset.readers.messages import read_turns
from slm_swap.dataset.row import Unusable
from slm_swap.rows.examples import Example, parse_example
from slm_swap.rows.lines import dump_json
from slm_swap.scoring.form import form_of
from slm_swap.scoring.several import answer, answer_json
from slm_swap.verdict.cascade import is_fit

LIMITS = ("max_completion_tokens", "max_tokens")
# What a request may hold besides, and the values with which the small model's reply is not another one than the hosted model's.
TAKEN: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("model", "messages", "tools", "response_format", "stream", "stream_options", *LIMITS), lambda _: True),
    **dict.fromkeys(("temperature", "top_p", "seed", "user", "metadata", "service_tier", "reasoning_effort", "verbosity"), lambda _: True),
    **dict.fromkeys(("safety_identifier", "prompt_cache_key", "prompt_cache_retention"), lambda _: True),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), lambda value: value == 0),
    "n": lambda value: value == 1,
    "tool_choice": lambda value: value == "auto",
    "parallel_tool_calls": lambda value: isinstance(value, bool),
    "logprobs": lambda value: value is False,
    "store": lambda value: value is False,
    "logit_bias": lambda value: value == {},
    "stop": lambda value: value == [],
    "modalities": lambda value: value == ["text"],
}


class Unsupported(Exception):
    """A request that the small model was not measured on; the text says what of it."""


@dataclass(frozen=True)
class Asked:
    """A chat request that the small model can take. `limit` is the most tokens that its reply may have, None where it does not say; `schema_name` is what the
    request calls its schema, "json_object" or "none"."""

    example: Example
    stream: bool
    usage: bool
    limit: int | None
    several: bool
    wants_json: bool
    schema_name: str


def read_chat(track: str, body: dict[str, Any], name: str, plain_json: bool = False) -> Asked:
    """A request's body as a row.

    Args:
        name: the row's id.
        plain_json: requests of the structured track may be without response_format: all of them ask for JSON.

    Raises:
        Unsupported: the small model was not measured on such requests.
    """
    for key, value in body.items():
        if value is not None and not TAKEN.get(key, lambda _: False)(value):
            raise Unsupported(key[:40])
    limits = [body[name] for name in LIMITS if body.get(name) is not None]
    if not all(isinstance(limit, int) and not isinstance(limit, bool) and limit > 0 for limit in limits):
        raise Unsupported("max_tokens")
    try:
        turns = read_turns(body["messages"] if isinstance(body.get("messages"), list) else [])
        tools, schema, options = asked_besides(body)
        record: dict[str, Any] = {"id": name, "messages": [turn.message for turn in turns]}
        if tools:
            record["tools"] = tools
        if track == "toolcall":
            if not tools or schema is not None:
                raise Unsupported("response_format" if tools else "no tools")
            record["calls"] = []
        else:
            if tools or (schema is None and not plain_json):
                raise Unsupported("tools" if tools else "no response_format")
            record |= {"object": {}} | ({"schema": schema} if schema is not None else {})
        if options:
            record["options"] = options
        example = parse_example(record, name)
    except Unusable as reason:
        raise Unsupported(str(reason)) from None
    except (UserError, ValueError, RecursionError, TypeError):
        raise Unsupported("messages") from None
    usage = body.get("stream_options")
    return Asked(
        example, body.get("stream") is True, isinstance(usage, dict) and usage.get("include_usage") is True,
        min(limits, default=None), body.get("parallel_tool_calls") is not False, schema is not None,
        _schema_name(options.get("response_format")),
    )  # fmt: skip


def _schema_name(wanted: dict[str, Any] | None) -> str:
    name = ((wanted or {}).get("json_schema") or {}).get("name")
    return name if isinstance(name, str) and name else (wanted or {}).get("type") or "none"


def may_be_sent(track: str, asked: Asked, reply: Reply) -> bool:
    """Whether a reply may be sent at all: it ended by itself within the client's limit, parses, keeps its schema, and calls only what is on offer."""
    form = form_of(track, asked.example, reply.text, reply.finish_reason, reply.calls)
    if not is_fit(reply.finish_reason, *form) or (asked.limit is not None and (reply.output_tokens or 0) > asked.limit):
        return False
    if track == "structured":
        return asked.wants_json or reply.text.lstrip()[:1] in ("{", "[")
    return asked.several or sum(answer(track, reply.text, reply.calls).values()) < 2


def tools_of(track: str, reply: Reply) -> tuple[str, ...]:
    """The tools that a fit reply calls, each once."""
    if track == "structured":
        return ()
    return tuple(dict.fromkeys(name for name, _ in answer(track, reply.text, reply.calls)))


def message_of(track: str, reply: Reply) -> dict[str, Any]:
    """A fit reply as an assistant's message. Arguments are as the model wrote them; those of a text reply by value."""
    if track == "structured":
        return {"role": "assistant", "content": reply.text, "refusal": None}
    calls = reply.calls
    if calls is None:
        calls = [{"name": call["name"], "arguments": dump_json(call["arguments"])} for call in answer_json(track, reply.text, None)]
    if not calls:
        return {"role": "assistant", "content": reply.text, "refusal": None}
    made = [
        {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": {"name": call["name"], "arguments": call["arguments"] or "{}"}}
        for call in calls
    ]
    content = reply.text if reply.calls is not None and reply.text.strip() else None
    return {"role": "assistant", "content": content, "refusal": None, "tool_calls": made}


def completion(track: str, reply: Reply, name: str, model: str) -> dict[str, Any]:
    """A fit reply as a chat completion."""
    message = message_of(track, reply)
    finish = "tool_calls" if message.get("tool_calls") else "stop"
    whole = {"id": name, "object": "chat.completion", "created": int(time.time()), "model": model, "system_fingerprint": "slm_swap"}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
    return whole | {"choices": [choice], "usage": usage_of(reply)}


def usage_of(reply: Reply) -> dict[str, Any] | None:
    """A completion's `usage`, None where a count is not known."""
    if reply.input_tokens is None or reply.output_tokens is None:
        return None
    details = {} if reply.cached_tokens is None else {"prompt_tokens_details": {"cached_tokens": reply.cached_tokens}}
    total = reply.input_tokens + reply.output_tokens
    return {"prompt_tokens": reply.input_tokens, "completion_tokens": reply.output_tokens, "total_tokens": total} | details


def events(whole: dict[str, Any], usage: bool) -> bytes:
    """A completion as server-sent events: one chunk, the usage where it is asked for, and the end."""
    shared = {name: value for name, value in whole.items() if name not in ("choices", "usage")} | {"object": "chat.completion.chunk"}
    choice = whole["choices"][0]
    delta = {name: value for name, value in choice["message"].items() if name != "refusal"}
    if calls := delta.get("tool_calls"):
        delta["tool_calls"] = [{"index": at} | call for at, call in enumerate(calls)]
    chunks = [{"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": choice["finish_reason"]}]}]
    chunks[0] |= {"usage": None} if usage else {}
    chunks += [{"choices": [], "usage": whole["usage"]}] if usage else []
    return b"".join(b"data: " + json.dumps(shared | chunk).encode() + b"\n\n" for chunk in chunks) + b"data: [DONE]\n\n"
