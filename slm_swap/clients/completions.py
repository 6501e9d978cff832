"""What a server of chat completions answers: a reply, the parameter that it does not take, or why it refuses a request.

Servers say the same in many dialects. Each one that is read here stands in a public report; `slm_swap/README.md` names the servers.
"""

import json
import re
from typing import Any, NamedTuple

from slm_swap.clients.protocol import Reply
from slm_swap.clients.thinking import cut_served_thinking
from slm_swap.rows.lines import dump_json

REJECTIONS = {"unsupported_parameter", "unsupported_value", "unknown_parameter"}
EXTRA = re.compile(r"extra_forbidden|extra inputs are not permitted", re.IGNORECASE)  # Pydantic's, of Mistral and of gateways
# How a message alone names the parameter that is not taken: OpenAI (also without its codes), old API versions, Pydantic behind a
# gateway, Gemini, Groq, LiteLLM.
NAMED = re.compile(
    r"""Unsupported\ (?:parameter|value):\ ['"`](\w+)['"`]
      | Invalid\ parameter:\ ['"`](\w+)['"`]\ of\ type\ \S+\ is\ not\ supported
      | Unrecognized\ request\ arguments?\ supplied:\ (\w+)
      | (?:Unknown|Unrecognized)\ (?:parameter|name|field)s?:?\ ['"`](\w+)['"`]
      | \#/(\w+)[\w/]*:\ Extra\ inputs\ are\ not\ permitted
      | ['"`](\w+)['"`]\ is\ (?:not\ supported|unsupported)
      | (?:does\ not|doesn't)\ support\ parameters:\ [\[{]['"](\w+)['"]""",
    re.IGNORECASE | re.VERBOSE,
)
# Azure's answer where reasoning took the whole limit: no 200 with an empty text, but a 400 without a code.
NO_ROOM = re.compile(r"could not finish the message because max_tokens or model output limit was reached", re.IGNORECASE)
# What a filter says of itself: Azure's inner code, which gateways pass on under codes of their own, and words of theirs.
FILTERED = re.compile(
    r"ResponsibleAIPolicyViolation|ContentPolicyViolation|content management policy|content safety|SAFETY_CHECK|violates usage guidelines",
    re.IGNORECASE,
)
TOOLLESS = re.compile(r"does not support tools|tools? (?:use |calling )?(?:is|are) not supported|--enable-auto-tool-choice", re.IGNORECASE)
TEXT_PARTS, THINKING_PARTS = ("text", "output_text"), ("thinking", "reasoning", "redacted_thinking")
CUT = ("length", "max_tokens", "model_length")  # finish reasons that mean a limit: OpenAI's, other servers', Mistral's


class Refusal(NamedTuple):
    """What a server said when it refused a request, or when none could be reached (status None)."""

    status: int | None
    code: str | None
    param: str | None
    message: str
    body: Any  # its JSON, or its text
    text: str

    @classmethod
    def of(cls, failure: Exception) -> "Refusal":
        """An exception of the openai package."""
        response, code = getattr(failure, "response", None), getattr(failure, "code", None)
        text = response.text if response is not None else ""
        try:
            body = json.loads(text)
        except (ValueError, RecursionError):
            body = text
        message = (refusal_reason(body) if text else None) or str(failure)
        param = getattr(failure, "param", None)
        told = [value if isinstance(value, str) else None for value in (code, param)]
        return cls(getattr(failure, "status_code", None), *told, message, body, text)


def rejected_parameter(status: int | None, code: str | None, param: str | None, message: str, body: Any = None) -> str | None:
    """The parameter that a deployment does not take, None for any other error; `body` is the refusal's JSON."""
    if status not in (400, 422):
        return None
    if code in REJECTIONS and status == 400 and param:
        return "response_format" if param.startswith("response_format.") else param
    for item in _details(body):
        place = item.get("loc")
        if EXTRA.search(f"{item.get('type')} {item.get('msg')}") and isinstance(place, list) and place:
            return str(place[1] if place[0] == "body" and len(place) > 1 else place[0])
    found = NAMED.search(message)
    return next(filter(None, found.groups())) if found else None


def takes_no_tools(status: int | None, message: str) -> bool:
    """Whether a server says that it cannot be asked for calls: Ollama's words, and vLLM's without its flags."""
    return status in (400, 404, 422, 501) and bool(TOOLLESS.search(message))


def refused_request(status: int | None, code: str | None, message: str, body: str) -> str | None:
    """The finish_reason that a refused request stands for: "content_filter", "prompt_too_long", "length"; None for a failure."""
    if code == "content_filter" or (status in (400, 403) and FILTERED.search(body)):
        return "content_filter"
    if code == "context_length_exceeded":
        return "prompt_too_long"
    return "length" if status == 400 and NO_ROOM.search(message) else None


def refusal_reason(body: Any) -> str | None:
    """What a refusal's JSON says, in whatever key it says it; None where it says nothing."""
    if not isinstance(body, dict):
        return body.strip() or None if isinstance(body, str) else None
    error = body.get("error")
    told = [inner.get(name) for inner in (error, body) if isinstance(inner, dict) for name in ("message", "detail", "error")]
    texts = [text for text in (*told, error) if isinstance(text, str) and text.strip()]
    details = [f"{'.'.join(map(str, item.get('loc') or []))}: {item.get('msg')}" for item in _details(body) if item.get("msg")]
    return "; ".join([*texts[:1], *details]) or json.dumps(body)


def _details(body: Any) -> list[dict[str, Any]]:
    """Pydantic's list of what is wrong with a request: as `detail`, or as `details` of the error."""
    inner = body.get("error") if isinstance(body, dict) else None
    lists = [part.get(name) for part in (body, inner) if isinstance(part, dict) for name in ("detail", "details")]
    return [item for items in lists if isinstance(items, list) for item in items if isinstance(item, dict)]


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


def read_completion(body: Any, native: bool = False) -> Reply:
    """A chat completion's JSON as a Reply (seconds 0); anything else is an "error". A refusal outranks the finish_reason.

    Its text is without the thinking in front. If it was asked for natively, it has its calls.
    """
    try:
        choice = body["choices"][0]
        message = choice["message"]
        refusal, reason = message.get("refusal"), choice.get("finish_reason")
        tokens = read_usage(body.get("usage"))
        content, refused = content_text(message.get("content"))
        calls = read_calls(message) if native else None
        content, _ = cut_served_thinking(content)
    except (KeyError, IndexError, TypeError, AttributeError):
        return Reply("", "error", error="the server's reply is not a chat completion")
    except ValueError:
        return Reply("", "error", error="the server's reply holds no text and no calls that can be read")
    if refusal or refused:
        content, reason = refusal or refused, "refusal"
    reason = "length" if reason in CUT else reason
    return Reply(content, reason if reason in ("length", "content_filter", "refusal") else "stop", calls=calls, **tokens)


def read_calls(message: dict[str, Any]) -> list[dict[str, str]]:
    """The calls of a message in OpenAI's form, from `tool_calls` or the older `function_call`: their names, and their arguments as the
    model wrote them. Arguments that are an object already become JSON, null and blanks the empty object.

    Raises:
        ValueError: they are of another form.
    """
    listed = message.get("tool_calls")
    listed = [] if listed is None else listed
    if not isinstance(listed, list):
        raise ValueError
    old = message.get("function_call")
    return [_call(item) for item in (listed or ([old] if isinstance(old, dict) else []))]


def _call(item: Any) -> dict[str, str]:
    if not isinstance(item, dict):
        raise ValueError
    function = next((item[name] for name in ("function", "custom") if isinstance(item.get(name), dict)), item)
    name, arguments = function.get("name"), function.get("arguments", function.get("input"))
    if not isinstance(name, str) or not isinstance(arguments, str | dict | None):
        raise ValueError
    if isinstance(arguments, dict):
        return {"name": name, "arguments": dump_json(arguments)}
    return {"name": name, "arguments": arguments if arguments and arguments.strip() else "{}"}


def content_text(content: Any) -> tuple[str, str | None]:
    """(text, refusal) of a message's `content`: the text parts of a list joined; thinking is dropped. A null content is no text.

    Raises:
        ValueError: it is neither a text, nor null, nor a list of parts that are known.
    """
    if not isinstance(content, list):
        if not isinstance(content, str | None):
            raise ValueError
        return content or "", None
    texts, refusal = [], None
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "refusal" and isinstance(part.get("refusal"), str):
            refusal = part["refusal"]
        elif kind not in THINKING_PARTS:
            raise ValueError
    return "".join(texts), refusal
