"""One recorded reply as a Reply: a text, or what a hosted model's API gave, as an object or as its JSON text."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from slm_swap.clients.completions import content_text, read_calls, read_usage
from slm_swap.clients.protocol import Reply
from slm_swap.clients.thinking import cut_served_thinking
from slm_swap.common.errors import UserError
from slm_swap.rows.conversations import unsaid

FINISH_REASONS = ("stop", "length", "prompt_too_long", "content_filter", "refusal", "error")
# The words of others, in any case: OpenAI and Azure, Anthropic, Bedrock, Gemini, Mistral, Cohere, Text Generation Inference.
OTHER_REASONS = {
    "stop": "tool_calls function_call end_turn tool_use stop_sequence eos eos_token complete completed",
    "length": "max_tokens max_output_tokens model_length model_context_window_exceeded",
    "content_filter": "safety content_filtered guardrail_intervened recitation blocklist prohibited_content spii",
}
REASONS = {name: name for name in FINISH_REASONS} | {other: name for name, others in OTHER_REASONS.items() for other in others.split()}
FIELDS = ("prediction", "reply", "output", "response")  # where a reply may stand; the first one that a line has
MARKS = ('"tool_calls"', '"function_call"', '"function"', '"choices"', '"role"')  # a text without one is no JSON of an API's
MESSAGE_MARKS = ("tool_calls", "function_call", "refusal")


class _Said(NamedTuple):
    """What a reply holds; `calls` as in Reply, `reason` as its API gave it."""

    text: str
    calls: list[dict[str, str]] | None = None
    reason: Any = None
    usage: Any = None


def read_recorded(line: Any, where: str, decode: Callable[[bytes], Any] = json.loads) -> Reply:
    """The reply of a line of recorded replies; `decode` reads JSON.

    It stands in one of FIELDS, or the line is a message itself: a text; null, for no text; a message with `content` and `tool_calls` (or
    `function_call`), a whole chat completion, or a list of tool calls, each of them as an object or as JSON text. What has calls becomes
    a native reply (`Reply.calls`); a message with text alone stays in text form, as its calls may stand in the text.

    Thinking in front of a text is cut off.

    Raises:
        UserError: it is none of these, or its finish_reason is not known.
    """
    if not isinstance(line, dict):
        raise UserError(f"{where}: a line is a JSON object with `prediction` and `id` or `prompt`")
    name = next((name for name in FIELDS if name in line), None)
    own = name == "reply" and "scores" in line and isinstance(line["reply"], str)  # a rows file has the text as it came, whatever it says
    said = _Said(line["reply"]) if own else _read(line if name is None else line[name], decode)
    if said is None:
        raise UserError(
            f"{where}: `{name or FIELDS[0]}` must be a text, the model's reply as it came (empty where there was none), or a message, a list "
            "of tool calls or a chat completion in OpenAI's form"
        )
    if name == "reply" and line.get("calls") is not None and isinstance(line["reply"], str):
        # A rows file of 01_eval/eval.py has a native reply's calls beside its text too; in other files, `calls` is what a row wants.
        calls = _own_calls(line["calls"], where)
        said = said._replace(text=unsaid(line["reply"], calls), calls=calls)
    reason = _reason(line.get("finish_reason") or said.reason or "stop", where)
    tokens = line.get("tokens") if isinstance(line.get("tokens"), dict) else {}
    counts = {f"{name}_tokens": tokens[name] for name in ("input", "output", "cached", "reasoning") if type(tokens.get(name)) is int}
    counts = counts or (read_usage(said.usage) if said.usage else {})
    seconds, error, cut = line.get("seconds"), line.get("reply_error"), line.get("cut")
    return Reply(
        _writable(said.text if own else cut_served_thinking(said.text)[0]),
        reason,
        seconds=float(seconds) if isinstance(seconds, (int, float)) else 0.0,
        error=_writable(error) if isinstance(error, str) else None,
        cut=cut if reason == "length" and isinstance(cut, dict) else None,
        calls=said.calls and [{name: _writable(text) for name, text in call.items()} for call in said.calls],
        **counts,
    )


def is_empty(reply: Reply) -> bool:
    """Whether a reply that ended of itself says nothing at all."""
    return reply.finish_reason == "stop" and not reply.calls and not reply.text.strip()


def _read(value: Any, decode: Callable[[bytes], Any]) -> _Said | None:
    """What a recorded value says; None where it is of no known form."""
    if value is None:
        return _Said("")
    if isinstance(value, str):
        return _from_json(value, decode) or _Said(value)
    if isinstance(value, list):
        try:
            calls = read_calls({"tool_calls": value})
        except ValueError:
            return None
        return _Said("", calls or [])
    return _completion(value) if isinstance(value, dict) else None


def _from_json(text: str, decode: Callable[[bytes], Any]) -> _Said | None:
    """What the JSON text of an API's reply says; None for any other text, such as a JSON value that was asked for."""
    if text.lstrip()[:1] not in ("{", "[") or not any(mark in text for mark in MARKS):
        return None
    try:
        value = decode(text.encode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError):
        return None
    return None if value == [] else _read(value, decode)


def _completion(value: dict[str, Any]) -> _Said | None:
    choices = value.get("choices")
    if isinstance(choices, list):
        choice = choices[0] if choices and isinstance(choices[0], dict) else {}
        said = _message(choice.get("message"))
        return said and said._replace(reason=said.reason or choice.get("finish_reason"), usage=value.get("usage"))
    return _message(value)


def _message(value: Any) -> _Said | None:
    if not isinstance(value, dict) or not (value.get("role") == "assistant" or any(name in value for name in MESSAGE_MARKS)):
        return None
    try:
        text, refused = content_text(value.get("content"))
        calls = read_calls(value)
    except ValueError:
        return None
    refusal = value.get("refusal") or refused
    if isinstance(refusal, str):
        return _Said(refusal, reason="refusal")
    return _Said(text, calls if calls or not text else None, value.get("finish_reason") or value.get("stop_reason"))


def _own_calls(calls: Any, where: str) -> list[dict[str, str]]:
    """The `calls` of a rows file of 01_eval/eval.py: their arguments are text already."""
    good = isinstance(calls, list) and all(
        isinstance(call, dict) and isinstance(call.get("name"), str) and isinstance(call.get("arguments"), str) for call in calls
    )
    if not good:
        raise UserError(f'{where}: `calls` must be a list of {{"name", "arguments"}}, the arguments as text, or null')
    return [{"name": call["name"], "arguments": call["arguments"]} for call in calls]


def _reason(given: Any, where: str) -> str:
    found = REASONS.get(given.lower()) if isinstance(given, str) else None
    if found is None:
        raise UserError(f"{where}: finish_reason {given!r} is none of {', '.join(FINISH_REASONS)}, or of other providers' {', '.join(list(REASONS)[6:])}")
    return found


def _writable(text: str) -> str:
    """The text with `?` for each half of a surrogate pair, which no file can hold."""
    return text.encode("utf-8", "replace").decode()
