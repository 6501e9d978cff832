"""How a model is asked: the system prompt of each track and the one builder of requests.

Evaluation, training and the dataset all go through this module, so a model is always measured on what it was trained on.
"""

import json
import re
from dataclasses import replace
from typing import Any, NamedTuple

from slm_swap.common.errors import UserError
from slm_swap.common.exact_json import ExactEncoder
from slm_swap.rows.conversations import call_of, call_text, turn_text
from slm_swap.rows.examples import Example
from slm_swap.rows.lines import dump_json

ASKS = ("text", "native")
OWN_RUN = "slm_swap_run"  # in a generation's metadata: this program's own, no production traffic
Messages = list[dict[str, Any]]

SYSTEM_PROMPTS = {
    "structured": (
        "You turn a request into one JSON object that matches the given JSON Schema. Reply with the JSON object and "
        "nothing else. Leave out optional arguments that the request does not ask for."
    ),
    "toolcall": (
        'You answer a request by calling one of the given tools. Reply with exactly one <tool_call name="TOOL">'
        "{arguments as a JSON object}</tool_call> and nothing else. Leave out optional arguments that the request does "
        "not ask for."
    ),
}
CONVERSATION_PROMPTS = {  # where any number of calls may be due, or any JSON value
    "structured": (
        "You reply with one JSON value that matches the JSON Schema, where one is given. Reply with the JSON value and nothing "
        "else. Leave out optional fields that the request does not ask for."
    ),
    "toolcall": (
        'You answer by calling the given tools. For each call that is due, write <tool_call name="TOOL">{arguments as a JSON '
        "object}</tool_call> on a line of its own, and nothing else. If no call is due, reply in plain text. Leave out optional "
        "arguments that the request does not ask for."
    ),
}


class Wanted(NamedTuple):
    """What a reply may be, for those who constrain it: one "call", any number of "calls" or a text, a JSON "object" or any JSON "value".

    `tools` are those on offer (flat; None: not known), `schema` is the value's. `choice` is production's tool_choice, where it was
    "required" or "none", and `several` whether it took several calls. `separators` are those between the items of the row's own JSON and
    behind its keys (None: it has other white space too), `escaped` is whether its strings may have `\\u00e9` for what is not ASCII: rows
    that this program did not make may be written, and taught, so.
    """

    form: str
    tools: list[dict] | None = None
    schema: dict | None = None
    choice: str | None = None
    several: bool = True
    separators: tuple[str, str] | None = (",", ":")
    escaped: bool = False


class Request(NamedTuple):
    """What a model is asked for one row.

    In text form only `messages` is set, plain chat messages. In `native` form `messages` are OpenAI's with their tool_calls and tool
    results, `tools` what is on offer (flat), `schema` the wanted value's, and `options` what production sent besides. `wanted` is no part
    of what is asked.
    """

    messages: Messages
    tools: list[dict] | None = None
    schema: dict | None = None
    options: dict[str, Any] | None = None
    native: bool = False
    wanted: Wanted | None = None

    def key(self) -> Any:
        """What a free reply depends on: a text request's messages alone."""
        return list(self[:-1]) if self.native else self.messages


def request_of(track: str, example: Example) -> Request:
    """What a model is asked for one row: as the row's `ask` says, one of ASKS; None asks conversations natively and others as text.
    The turns of the row's `shots` follow the system text.

    Raises:
        UserError: a row that is only a text cannot be asked natively.
    """
    request = _alone(track, example)._replace(wanted=_wanted(track, example))
    if not example.shots:
        return request
    system = next((at for at, message in enumerate(request.messages) if message["role"] != "system"), 0)
    return request._replace(messages=[*request.messages[:system], *example.shots, *request.messages[system:]])


def _alone(track: str, example: Example) -> Request:
    if asked_natively(example):
        return _native(track, example)
    if example.messages is not None:
        return Request(_as_text(track, example))
    if track == "structured" and example.completion.lstrip()[:1] == "[":  # the documented words speak of an object
        return Request([{"role": "system", "content": CONVERSATION_PROMPTS[track]}, {"role": "user", "content": example.prompt}])
    return text_request(track, example.prompt)


def request_text(example: Example) -> str:
    """The part of a row's prompt that is its own: its `request`, the last thing that the user said, or the prompt without what is on offer."""
    if example.request is not None:
        return example.request
    if example.messages is not None:
        return next(message["content"] for message in reversed(example.messages) if message["role"] == "user")
    offered = [toolcall_prompt(example.tools, "")] if example.tools else []
    offered += [structured_prompt(example.schema, "")] if example.schema else []
    return next((example.prompt.removeprefix(offer) for offer in offered if example.prompt.startswith(offer)), example.prompt)


def shot_turns(track: str, shot: Example, native: bool, number: int) -> Messages:
    """A row with its reply as earlier turns of another row's conversation, in native or in text form; its system text and what it had on
    offer are left out. `number` tells its calls from those of other shots."""
    if not native:
        if shot.messages is None:
            return [{"role": "user", "content": f"Request: {request_text(shot)}"}, {"role": "assistant", "content": shot.completion}]
        turns = _as_text(track, replace(shot, tools=None, schema=None))[1:]
        return [*turns, {"role": "assistant", "content": shot.completion}]
    own = [{"role": "user", "content": request_text(shot)}] if shot.messages is None else shot.messages
    turns = [message for message in own if message["role"] != "system"]
    if shot.calls is None:
        calls = [called] if (called := call_of(shot.completion)) else []
    else:
        calls = [(call["name"], dump_json(call["arguments"])) for call in shot.calls]
    if not calls:
        return [*turns, {"role": "assistant", "content": shot.completion}]
    made = [
        {"id": f"shot{number:02}{at:03}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for at, (name, arguments) in enumerate(calls)
    ]
    # each call has its result, without which servers and some templates refuse a conversation
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "done"} for call in made]
    return [*turns, {"role": "assistant", "content": None, "tool_calls": made}, *results]


_STRINGS, _TAGS = re.compile(r'"(?:[^"\\]|\\.)*"'), re.compile(r"<tool_call name=\"\">|</tool_call>")


def _wanted(track: str, example: Example) -> Wanted:
    """What the row's reply may be. A tool that production named is the one on offer."""
    if example.messages is None:
        form = "call" if track == "toolcall" else "value" if example.completion.lstrip()[:1] == "[" else "object"
        bare = _TAGS.sub("", _STRINGS.sub('""', example.completion)).strip()
        separators = ", " if ", " in bare else ",", ": " if ": " in bare else ":"
        plain = not any(map(str.isspace, bare.replace(separators[0], "").replace(separators[1], "")))
        own = example.tools is None and example.schema is None
        return Wanted(form, example.tools, example.schema, separators=separators if plain else None, escaped=own)
    if track == "structured":
        return Wanted("value", schema=example.schema)
    options = (example.options or {}) if asked_natively(example) else {}
    choice, tools = options.get("tool_choice"), example.tools
    choice = choice.get("type") if isinstance(choice, dict) and choice.get("type") != "function" else choice
    if isinstance(choice, dict):
        named = (choice.get("function") or choice).get("name")
        tools, choice = [tool for tool in tools or [] if tool["name"] == named] or tools, "required"
    return Wanted("calls", tools, None, choice if choice in ("required", "none") else None, options.get("parallel_tool_calls") is not False)


def text_request(track: str, prompt: str) -> Request:
    """What a model is asked for a prompt alone."""
    return Request(build_messages(track, prompt))


def asked_natively(example: Example) -> bool:
    """Whether a row is asked in native form."""
    return example.messages is not None if example.ask is None else example.ask == "native"


def build_messages(track: str, prompt: str) -> Messages:
    """The chat that asks for one row of `{prompt, completion}`: the track's system prompt, then the row's prompt."""
    return [{"role": "system", "content": SYSTEM_PROMPTS[track]}, {"role": "user", "content": prompt}]


def _native(track: str, example: Example) -> Request:
    if example.messages is not None:
        return Request(example.messages, example.tools, example.schema, example.options, True)
    offered = toolcall_prompt(example.tools or [], "") if track == "toolcall" else structured_prompt(example.schema or {}, "")
    known = example.tools if track == "toolcall" else example.schema
    if not known or not example.prompt.startswith(offered):
        what = "tools" if track == "toolcall" else "schema"
        raise UserError(
            f"{example.where or example.id}: its prompt is one text, which does not say what is request and what {what}: "
            f"use --ask text, or write `messages` and `{what}`"
        )
    messages = [{"role": "user", "content": example.prompt[len(offered) :]}]
    return Request(messages, example.tools if track == "toolcall" else None, example.schema if track == "structured" else None, None, True)


def _as_text(track: str, example: Example) -> Messages:
    """A conversation in text form: what is on offer is in front of the first user message, calls and results are texts.

    Messages of one role that follow each other are joined, as many chat templates want roles that alternate.
    """
    system = [CONVERSATION_PROMPTS[track], *(m["content"] for m in example.messages if m["role"] == "system" and m["content"])]
    names = {call["id"]: call["function"]["name"] for m in example.messages for call in m.get("tool_calls", ())}
    turns: Messages = [{"role": "system", "content": "\n\n".join(system)}]
    offered = False
    for message in example.messages:
        role, text = message["role"], turn_text(message)
        if role == "system" or not text:
            continue
        if role == "tool":
            name = message.get("name") or names.get(message["tool_call_id"])
            role, text = "user", f"Result of {name}:\n{text}" if name else f"Result:\n{text}"
        elif role == "user" and not offered:
            offered, text = True, _offer(track, example, text)
        if turns[-1]["role"] == role:
            turns[-1]["content"] += f"\n\n{text}"
        else:
            turns.append({"role": role, "content": text})
    return turns


def _offer(track: str, example: Example, text: str) -> str:
    if track == "toolcall":
        return toolcall_prompt(example.tools, text) if example.tools else text
    return structured_prompt(example.schema, text) if example.schema else text


def toolcall_prompt(tools: list[dict], request: str) -> str:
    """The prompt of a toolcall row: every tool on offer, one a line as JSON, then the request."""
    lines = "\n".join(json.dumps(tool, ensure_ascii=False, cls=ExactEncoder) for tool in tools)
    return f"Tools:\n{lines}\n\nRequest: {request}"


def toolcall_completion(tool: str, arguments: dict[str, Any]) -> str:
    """The one call that answers a toolcall row."""
    return call_text(tool, dump_json(arguments))


def structured_prompt(schema: dict, request: str) -> str:
    """The prompt of a structured row: the wanted object's JSON Schema, then the request."""
    return f"JSON Schema:\n{json.dumps(schema, ensure_ascii=False, cls=ExactEncoder)}\n\nRequest: {request}"


def structured_schema(tool: dict) -> dict:
    """The schema of `{"tool_name": ..., "arguments": {...}}` for one tool."""
    return {
        "type": "object",
        "description": tool.get("description", ""),
        "properties": {"tool_name": {"const": tool["name"]}, "arguments": tool["parameters"]},
        "required": ["tool_name", "arguments"],
    }
