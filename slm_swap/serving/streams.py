"""A stream of a chat completion, put together again: what its chunks say in one completion."""

import json
from typing import Any


def joined(data: bytes) -> dict[str, Any]:
    """The completion of one choice that server-sent events hold.

    Raises:
        ValueError: they hold none.
    """
    text: list[str] = []
    refusal: list[str] = []
    calls: dict[int, dict[str, Any]] = {}
    finish, usage, begun = None, None, False
    for line in data.decode("utf-8", "replace").splitlines():
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
