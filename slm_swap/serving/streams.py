"""A stream of a chat completion, put together again: what its chunks say in one completion; and whether a stream holds its reply to the end."""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

DONE = re.compile(rb"(?:\A|\n|\r)data: ?\[DONE\]\s*\Z")
FINAL = ("response.completed", "response.incomplete", "response.failed", "error")  # of the Responses API, which sends no [DONE]


def is_whole(data: bytes, choices: int = 1) -> bool:
    """Whether server-sent events hold a reply to its end: they tell no error, and close with [DONE], or say why each of so many choices has ended (the usage, which
    may follow, is none of the reply), or hold the last event of the Responses API. Some servers and gateways send no [DONE], and some clients do not wait for it."""
    if tells_error(data):
        return False
    if DONE.search(data):
        return True
    ended = set()
    for chunk in _chunks(data):
        if chunk.get("type") in FINAL:
            return True
        for choice in found if isinstance(found := chunk.get("choices"), list) else ():
            if isinstance(choice, dict) and choice.get("finish_reason") is not None:
                ended.add(str(choice.get("index") or 0))
    return len(ended) >= choices


def tells_error(data: bytes) -> bool:
    """Whether one of the events is an error in the reply's place. Some servers send [DONE] behind it, as behind a reply."""
    return b'"error"' in data and any(chunk.get("error") for chunk in _chunks(data))


def _chunks(data: bytes) -> Iterator[dict[str, Any]]:
    """The JSON objects of the events, without what is none: a line that has not come to its end, too."""
    for line in data.splitlines():
        with suppress(ValueError, RecursionError):
            chunk = json.loads(line.removeprefix(b"data:")) if line.startswith(b"data:") else None
            if isinstance(chunk, dict):
                yield chunk


def joined(data: bytes) -> dict[str, Any]:
    """The completion of one choice that server-sent events hold.

    Raises:
        ValueError: they hold none.
    """
    text: list[str] = []
    refusal: list[str] = []
    calls: dict[int, dict[str, Any]] = {}
    finish, usage, begun = None, None, False
    for raw in data.splitlines():  # of bytes: of a text, U+2028 within a reply would end a line, too
        line = raw.decode("utf-8", "replace")
        payload = line.removeprefix("data:").strip()
        if not line.startswith("data:") or payload == "[DONE]":
            continue
        chunk = json.loads(payload)
        if not isinstance(chunk, dict) or not isinstance(chunk.get("choices"), list):
            raise ValueError("no chunk of a chat completion")
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            if choice.get("index"):
                raise ValueError("several choices")
            begun, finish, delta = True, choice.get("finish_reason") or finish, choice.get("delta") or {}
            text.append(delta.get("content") or "")
            refusal.append(delta.get("refusal") or "")
            for part in delta.get("tool_calls") or ():
                call = calls.setdefault(part.get("index", 0), {"type": "function", "function": {"name": "", "arguments": ""}})
                function = part.get("function") or {}
                call["function"]["name"] += function.get("name") or ""
                call["function"]["arguments"] += function.get("arguments") or ""
    if not begun or finish is None:
        raise ValueError("no whole chat completion")
    message: dict[str, Any] = {"role": "assistant", "content": "".join(text) or None, "refusal": "".join(refusal) or None}
    if calls:
        message["tool_calls"] = [calls[at] for at in sorted(calls)]
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish}], "usage": usage}
