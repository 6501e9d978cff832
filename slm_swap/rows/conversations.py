"""Conversations: OpenAI's chat messages in one form, and as readable text."""

import re
from typing import Any

from slm_swap.common.errors import UserError
from slm_swap.rows.lines import dump_json

_CALL = re.compile(r'<tool_call name="([^"]*)">(.*)</tool_call>', re.DOTALL)
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}


def normalized(messages: Any, where: str) -> list[dict[str, Any]]:
    """Chat messages up to a reply, in the one form that is kept: text contents, arguments of calls as JSON texts, an id on each call
    and on its result.

    Raises:
        UserError: no such list: a role, content or call that cannot be read, no user message, or the reply itself stands at the end.
    """
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: `messages` must be a list of chat messages up to the reply: correct that row")
    kept: list[dict[str, Any]] = []
    waiting: list[str] = []  # ids of calls without a result
    for at, message in enumerate(messages):
        place = f"{where}: message {at + 1}"
        role = ROLES.get(message.get("role")) if isinstance(message, dict) and isinstance(message.get("role"), str) else None
        if role is None:
            raise UserError(f"{place}: its role is none of {', '.join(ROLES)}: correct that row")
        text, calls = _text(message.get("content"), place), _calls(message.get("tool_calls"), len(kept), place)
        if calls and role != "assistant":
            raise UserError(f"{place}: only an assistant makes tool_calls: correct that row")
        if text is None and not calls:
            raise UserError(f"{place}: no content and no tool_calls: correct that row")
        told: dict[str, Any] = {"role": role, "content": text}
        if calls:
            told["tool_calls"] = calls
            waiting += [call["id"] for call in calls]
        if role == "tool":
            name = message.get("tool_call_id")
            name = name if isinstance(name, str) and name else waiting[0] if waiting else f"call_{len(kept)}"
            waiting = [other for other in waiting if other != name]
            told = {"role": role, "tool_call_id": name, "content": text}
            if isinstance(message.get("name"), str):
                told["name"] = message["name"]
        kept.append(told)
    if kept[-1]["role"] == "assistant":
        raise UserError(f"{where}: the last of `messages` is the assistant's: write the reply as `calls` or `object` instead")
    if not any(message["role"] == "user" for message in kept):
        raise UserError(f"{where}: `messages` has no user message: correct that row")
    return kept


def _text(content: Any, place: str) -> str | None:
    """A message's text; None where it has none."""
    if content is None or isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [None]
    texts = [part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{place}: its content is not text alone: images and other parts cannot be used, drop that row")
    return "\n".join(texts)


def _calls(given: Any, at: int, place: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as JSON texts."""
    if given is None:
        return []
    calls = []
    for number, call in enumerate(given if isinstance(given, list) else [None]):
        inner = call.get("function", call) if isinstance(call, dict) else None
        name, arguments = (inner.get("name"), inner.get("arguments")) if isinstance(inner, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(arguments, str | dict | None):
            raise UserError(f"{place}: its tool_calls are not a list of {{function: {{name, arguments}}}}: correct that row")
        text = arguments if isinstance(arguments, str) else dump_json(arguments or {})
        given_id = call.get("id")
        known = given_id if isinstance(given_id, str) and given_id else f"call_{at}_{number}"
        calls.append({"id": known, "type": "function", "function": {"name": name, "arguments": text}})
    return calls


def call_text(name: str, arguments: str) -> str:
    """One call in the words of the text form; `arguments` is JSON."""
    return f'<tool_call name="{name}">{arguments}</tool_call>'


def call_of(text: str) -> tuple[str, str] | None:
    """The name and the arguments, as written, of the one call that a text is in the words of the text form; None for any other text."""
    found = _CALL.fullmatch(text.strip())
    return (found[1], found[2]) if found else None


def reply_text(calls: list[dict[str, Any]] | None, value: Any = None, content: str | None = None) -> str:
    """The reply wanted, in the words of the text form: the calls one a line, what was said instead, or the JSON value."""
    if calls is None:
        return dump_json(value)
    return "\n".join(call_text(call["name"], dump_json(call["arguments"])) for call in calls) or content or ""


def said(text: str | None, calls: list[dict[str, str]] | None) -> str:
    """A text, then calls of `{"name", "arguments": JSON}` one a line."""
    lines = [call_text(call["name"], call["arguments"]) for call in calls or ()]
    return "\n".join([*([text] if text else []), *lines])


def unsaid(shown: str, calls: list[dict[str, str]] | None) -> str:
    """The text that `said` was given, with the same calls."""
    return shown.removesuffix(said(None, calls)).removesuffix("\n") if calls else shown


def turn_text(message: dict[str, Any]) -> str:
    """What an assistant's message says: its content, then its calls one a line."""
    return said(message["content"], [call["function"] for call in message.get("tool_calls", ())])


def conversation_text(messages: list[dict[str, Any]]) -> str:
    """A conversation as readable text: the user's message alone where there is no other, else each with its role in front."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"[{message['role']}] {turn_text(message)}" for message in messages)
