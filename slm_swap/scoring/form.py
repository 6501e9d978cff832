"""Whether a reply is of the form that was asked for: what can be known of it without its reference."""

from typing import Any, NamedTuple

from referencing.exceptions import Unresolvable

from slm_swap.rows.examples import Example
from slm_swap.rows.json_schema import call_violations, violations
from slm_swap.scoring.json_values import parse_json
from slm_swap.scoring.metrics import UNSCORED
from slm_swap.scoring.replies import InvalidReply, native_calls, parse_calls, tries_to_call
from slm_swap.scoring.several import says_nothing


class Form(NamedTuple):
    """`parses`: the reply is one JSON value, or consists of calls of tools on offer, or is a text where it may be one. `keeps_schema`: it
    parses, and keeps to the schema. None: not known, as there is no reply, or no schema that can be followed."""

    parses: bool | None = None
    keeps_schema: bool | None = None


UNKNOWN = Form()


def form_of(track: str, example: Example, text: str, finish_reason: str = "stop", calls: list[dict[str, str]] | None = None) -> Form:
    """The form of a reply to a row; `calls` are a native reply's. An argument that a tool does not list breaks its schema.

    A row of a prompt and a completion wants exactly one call: a text or a second call does not parse there.
    """
    if finish_reason in UNSCORED:
        return UNKNOWN
    told: list[tuple[Any, dict]] = []  # values with what they are held against
    known, check = bool(example.schema), violations
    if track == "toolcall":
        tools = {tool["name"]: tool for tool in example.tools or [] if isinstance(tool, dict) and tool.get("parameters") is not None and "name" in tool}
        known, check = bool(tools), call_violations
    try:
        if track == "structured":
            told = [(parse_json(text), example.schema)] if known else [(parse_json(text), {})]
        else:
            made = parse_calls(text) if calls is None else native_calls(calls)
            broken = not made and (says_nothing(text) or tries_to_call(text))
            if broken or (example.messages is None and len(made) != 1) or (known and any(call.name not in tools for call in made)):
                return Form(False, False if known else None)
            told = [(call.value, tools[call.name]) for call in made] if known else []
    except (InvalidReply, ValueError):
        return Form(False, False if known else None)
    try:
        return Form(True, not any(check(value, against) for value, against in told) if known else None)
    except (Unresolvable, RecursionError):
        return Form(True)
