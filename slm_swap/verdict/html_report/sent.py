"""What a model was sent for a row, in parts: texts that many rows share (system text, tools) stand on the page once."""

import json
from dataclasses import replace
from typing import Any

from slm_swap.clients.native import with_json_sentence
from slm_swap.common.exact_json import ExactEncoder
from slm_swap.rows.conversations import turn_text
from slm_swap.rows.examples import Example
from slm_swap.rows.prompts import Request, request_of, structured_prompt, toolcall_prompt
from slm_swap.verdict.html_report.text import visible

ROLES = {"system": "System text", "user": "User", "assistant": "Assistant", "tool": "Result of a call"}
Part = tuple[str, str | int]  # title; a text, or the number of one that is shared


class Texts(dict[str, int]):
    """Shared texts, made visible, with their numbers: in the order in which they came."""

    def number(self, text: str) -> int:
        return self.setdefault(visible(text), len(self))


def sent(track: str, example: Example, asked: dict[str, dict[str, Any]], texts: Texts) -> list[tuple[str, list[Part]]]:
    """What each model was sent for a row: (whom, parts). Whom is "azure", "slm" or "both".

    `asked` has `ask` (one of prompts.ASKS, "mixed", or None: not known), `shots` and `local` (a chat template shows the request) of each
    side. A side whose `ask` is not known is left out; if neither's is, the row's own parts come back for "row".
    """
    found = {side: _parts(_request(track, example, how["ask"]), example, how, texts) for side, how in asked.items() if how["ask"]}
    if not found:
        own = Request(example.messages or [{"role": "user", "content": example.prompt}], example.tools if example.messages else None)
        return [("row", _parts(own, example, {"local": False, "shots": None}, texts))]
    if len(found) == 2 and found["azure"] == found["slm"]:
        return [("both", found["azure"])]
    return list(found.items())


def _request(track: str, example: Example, ask: str) -> Request:
    return request_of(track, replace(example, ask=None if ask == "mixed" else ask))


def _parts(request: Request, example: Example, how: dict[str, Any], texts: Texts) -> list[Part]:
    messages, beside = request.messages, []
    if request.native and how["local"]:  # a chat template has no place for the options; a schema stands in the system text
        messages = with_json_sentence(messages, request)
    elif request.schema is not None:
        beside.append(("JSON Schema", texts.number(_json(request.schema))))
    if request.options and not how["local"]:
        beside.append(("Options", texts.number(_json(request.options))))
    if request.tools:
        beside.append((f"Tools ({len(request.tools)})", texts.number("\n".join(map(_json, request.tools)))))
    parts: list[Part] = []
    offered = [] if request.native else _offers(example)
    for message in messages:
        text = turn_text(message)
        if message["role"] == "system":
            parts.append((ROLES["system"], texts.number(text)))
            continue
        if (offer := next((own for own in offered if text.startswith(own[1])), None)) is not None:
            parts.append((f"{offer[0]}, at the head of the user’s message", texts.number(offer[1].strip())))
            text = text.removeprefix(offer[1])
        parts.append((ROLES[message["role"]], visible(text)))
    if how["shots"]:
        parts.insert(1 if messages[0]["role"] == "system" else 0, ("Examples", f"Up to {how['shots']} rows with their replies stood here. Which ones is not kept."))
    return [*beside, *parts]


def _offers(example: Example) -> list[tuple[str, str]]:
    """What the text form writes in front of the first request, with its title."""
    tools = [(f"Tools ({len(example.tools)})", toolcall_prompt(example.tools, ""))] if example.tools else []
    return tools + ([("JSON Schema", structured_prompt(example.schema, ""))] if example.schema else [])


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, cls=ExactEncoder)
