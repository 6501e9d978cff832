"""What a hosted model was asked and what it replied, as Langfuse has traced it, as rows: one generation to one row, or the reason why not.

A generation is read as every conversation is (`conversations`); what is added here is that personal data is masked, and that this
program's own evaluations are told apart: they keep the prompt that was sent.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from slm_swap.common.errors import UserError
from slm_swap.common.exact_json import EXACT
from slm_swap.dataset.masking import mask
from slm_swap.dataset.readers.conversations import rows_of
from slm_swap.dataset.readers.langfuse import generation_conversation
from slm_swap.dataset.row import REASONS, Dropped, Unusable
from slm_swap.rows.examples import Example, parse_example
from slm_swap.rows.lines import dump_json
from slm_swap.rows.prompts import CONVERSATION_PROMPTS, OWN_RUN, SYSTEM_PROMPTS, toolcall_completion
from slm_swap.scoring.tracks import TRACKS

__all__ = ["REASONS", "Taken", "Unusable", "convert"]


@dataclass(frozen=True)
class Taken:
    """A generation's row, as it is written; `masked` counts the different values that were masked in it. `ended`: the tracer has noted why
    the reply ended, so that it is known not to be cut off."""

    track: str
    row: dict[str, Any]
    masked: dict[str, int]
    own: bool
    ended: bool = True


def convert(generation: dict[str, Any], tracks: Collection[str], regions: Collection[str] | None) -> Taken:
    """The row of one generation as the API gives it, masked unless `regions` is None.

    Raises:
        Unusable: it makes no row; the reason is one of REASONS.
    """
    try:
        conversation = generation_conversation(generation, str(generation["id"]))
        ended = bool(conversation.turns[-1].finish)
        [item] = rows_of(conversation)
        if isinstance(item, Dropped):
            raise Unusable(item.reason, item.why)
        if item.track not in tracks:
            raise Unusable("other_track", item.track)
        record, masked = _masked(item.record, regions)
        if _is_own_text(record):
            raise Unusable("other_form", "an evaluation of this program's own, in text form: its rows are in its dataset")
        in_words = _is_own(record)
        row = _own_row(record) if in_words else record
        own = in_words or OWN_RUN in conversation.metadata
        parse_example(row, row["id"])
    except (RecursionError, UserError):
        raise Unusable("unusable") from None
    return Taken(item.track, row, masked, own, ended)


# -- Masking ---------------------------------------------------------------------------------------------------------------------


def _masked(record: dict[str, Any], regions: Collection[str] | None) -> tuple[dict[str, Any], dict[str, int]]:
    """The row with placeholders in its messages, tools, gold and schema; names of tools and ids of calls stay."""
    if regions is None:
        return record, {}
    messages, tools = record["messages"], record.get("tools")
    said = [[message.get("content"), [_arguments(call) for call in message.get("tool_calls") or []]] for message in messages]
    offers = [[tool["description"], tool["parameters"]] for tool in tools or []]
    calls = [call["arguments"] for call in record.get("calls") or []]
    rest = {name: record[name] for name in ("object", "content", "schema", "options") if name in record}
    (said, offers, calls, rest), counts = mask([said, offers, calls, rest], tuple(regions))
    made = record | {"messages": [_with(message, *parts) for message, parts in zip(messages, said, strict=True)]} | rest
    if tools:
        pairs = zip(tools, offers, strict=True)
        made["tools"] = [tool | {"description": text, "parameters": parameters} for tool, (text, parameters) in pairs]
    if "calls" in record:
        pairs = zip(record["calls"], calls, strict=True)
        made["calls"] = [{"name": call["name"], "arguments": arguments} for call, arguments in pairs]
    return made, dict(counts)


def _arguments(call: dict) -> Any:
    """A call's arguments as JSON, so that they are JSON when masked; as text where they are none."""
    text = call["function"]["arguments"]
    try:
        return json.loads(text, **EXACT)
    except ValueError:
        return text


def _with(message: dict, content: Any, arguments: list) -> dict:
    made = dict(message)
    if "content" in made:
        made["content"] = content
    if "tool_calls" in made:
        made["tool_calls"] = [
            call if given == _arguments(call) else call | {"function": call["function"] | {"arguments": _text(given)}}
            for call, given in zip(made["tool_calls"], arguments, strict=True)
        ]
    return made


def _text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else dump_json(arguments)


# -- This program's own runs -----------------------------------------------------------------------------------------------------


def _is_own(record: dict[str, Any]) -> bool:
    """Whether one of this program's own system prompts stood in front: an evaluation, no production traffic."""
    return any(message["role"] == "system" and message["content"] in SYSTEM_PROMPTS.values() for message in record["messages"])


def _is_own_text(record: dict[str, Any]) -> bool:
    """Whether a conversation was asked in text form: a message says what was on offer, and there are no tools beside it."""
    texts = [message["content"] for message in record["messages"] if message["role"] == "system"]
    return any(text.startswith(tuple(CONVERSATION_PROMPTS.values())) for text in texts)


def _own_row(record: dict[str, Any]) -> dict[str, Any]:
    """The row that was evaluated, in the form in which it was asked; a conversation stays one, without this program's own prompt."""
    messages = [message for message in record["messages"] if message.get("content") not in SYSTEM_PROMPTS.values()]
    one_call = len(record.get("calls") or []) == 1
    if len(messages) != 1 or not (one_call or isinstance(record.get("object"), dict)):
        return record | {"messages": messages}
    prompt = messages[0]["content"]
    completion = toolcall_completion(**_named(record["calls"][0])) if one_call else dump_json(record["object"])
    example = Example(
        prompt=prompt,
        completion=completion,
        id=record["id"],
        tools=record.get("tools"),
        schema=record.get("schema"),
        group=record.get("group"),
        source=record.get("source"),
        request=prompt.rpartition("\n\nRequest: ")[2] or None,
    )
    TRACKS["toolcall" if one_call else "structured"].reference(example)
    return example.to_json()


def _named(call: dict) -> dict:
    return {"tool": call["name"], "arguments": call["arguments"]}
