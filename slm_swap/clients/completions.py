"""What a server of chat completions answers: a reply, or the parameter that it does not take."""

import re
from typing import Any

from slm_swap.clients.protocol import Reply

REJECTIONS = {"unsupported_parameter", "unsupported_value", "unknown_parameter"}
# Azure's answer where reasoning took the whole limit: no 200 with an empty text, but a 400 without a code.
NO_ROOM = re.compile(r"could not finish the message because max_tokens or model output limit was reached", re.IGNORECASE)
FILTERED = "ResponsibleAIPolicyViolation"  # the inner code of Azure's content filter, which gateways pass on under codes of their own


def rejected_parameter(status: int | None, code: str | None, param: str | None, message: str) -> str | None:
    """The parameter that a deployment does not take, None for any other error. Old API versions say it in the message alone."""
    if status != 400:
        return None
    if code in REJECTIONS:
        return param
    found = re.search(r"Unrecognized request argument supplied: (\w+)", message)
    return found[1] if found else None


def refused_request(status: int | None, code: str | None, message: str, body: str) -> str | None:
    """The finish_reason that a refused request stands for: "content_filter", "prompt_too_long", "length"; None for a failure."""
    if code == "content_filter" or (status in (400, 403) and FILTERED in body):
        return "content_filter"
    if code == "context_length_exceeded":
        return "prompt_too_long"
    return "length" if status == 400 and NO_ROOM.search(message) else None


def read_usage(usage: Any) -> dict[str, int | None]:
    """The counts of a completion's `usage` by their names in Reply; None for each that the server did not send.

    Without `prompt_tokens_details` the server reports no cache: 0 cached tokens, if it counted the prompt's at all. More cached tokens
    than the prompt has are not believed.
    """
    usage = usage if isinstance(usage, dict) else {}
    given, made = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
    details, thought = usage.get("prompt_tokens_details"), usage.get("completion_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    cached = 0 if cached is None else _count(cached)
    believed = cached if given is not None and cached is not None and cached <= given else None
    reasoning = _count(thought.get("reasoning_tokens")) if isinstance(thought, dict) else None
    return {"input_tokens": given, "output_tokens": made, "cached_tokens": believed, "reasoning_tokens": reasoning}


def _count(value: Any) -> int | None:
    """A whole number of at least 0, written as 100 or 100.0; None for anything else."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return int(value) if number and value >= 0 and value == value // 1 else None


def read_completion(body: Any) -> Reply:
    """A chat completion's JSON as a Reply (seconds 0); anything else is an "error". A refusal outranks the finish_reason."""
    try:
        choice = body["choices"][0]
        message = choice["message"]
        refusal, content, reason = message.get("refusal"), message.get("content"), choice.get("finish_reason")
        tokens = read_usage(body.get("usage"))
    except (KeyError, IndexError, TypeError, AttributeError):
        return Reply("", "error", error="the server's reply is not a chat completion")
    if refusal:
        content, reason = refusal, "refusal"
    if not isinstance(content, str | None):
        return Reply("", "error", error="the server's reply holds no text")
    return Reply(content or "", reason if reason in ("length", "content_filter", "refusal") else "stop", **tokens)
