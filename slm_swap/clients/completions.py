"""What a server of chat completions answers: a reply, or the parameter that it does not take."""

import re
from typing import Any

from slm_swap.clients.protocol import Reply

REJECTIONS = {"unsupported_parameter", "unsupported_value", "unknown_parameter"}


def rejected_parameter(status: int | None, code: str | None, param: str | None, message: str) -> str | None:
    """The parameter that a deployment does not take, None for any other error. Old API versions say it in the message alone."""
    if status != 400:
        return None
    if code in REJECTIONS:
        return param
    found = re.search(r"Unrecognized request argument supplied: (\w+)", message)
    return found[1] if found else None


def read_completion(body: Any) -> Reply:
    """A chat completion's JSON as a Reply (seconds 0); anything else is an "error". A refusal outranks the finish_reason."""
    try:
        choice = body["choices"][0]
        message = choice["message"]
        refusal, content, reason = message.get("refusal"), message.get("content"), choice.get("finish_reason")
        usage = body.get("usage") or {}
        tokens = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
        tokens.append((usage.get("prompt_tokens_details") or {}).get("cached_tokens"))
    except (KeyError, IndexError, TypeError, AttributeError):
        return Reply("", "error", error="the server's reply is not a chat completion")
    if refusal:
        content, reason = refusal, "refusal"
    if not isinstance(content, str | None):
        return Reply("", "error", error="the server's reply holds no text")
    numbers = (value if isinstance(value, int) else 0 for value in tokens)
    return Reply(content or "", reason if reason in ("length", "content_filter", "refusal") else "stop", *numbers)
