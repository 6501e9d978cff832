"""Rows to token ids, as evaluation shows them to the model."""

import json
from collections import Counter
from typing import Any, NamedTuple

from slm_swap.clients.endings import Ending, call_ending, require_ending, turn_opening
from slm_swap.clients.loading import prompt_text, require_embedded
from slm_swap.clients.native import CannotShow, native_turn, read_reply
from slm_swap.common.exact_json import EXACT, same
from slm_swap.rows.examples import Example
from slm_swap.rows.prompts import request_of
from slm_swap.scoring.tracks import TRACKS
from slm_swap.tuning.packing import IGNORED

NOTHING_SAID = "no call is due, and the row has no `content` that says what to reply instead"
END_INSIDE = "the token that ends a reply stands inside it"
NOT_READ_BACK = "its calls would not be read back from what the chat template writes"


class Tokenized(NamedTuple):
    """Rows as {"input_ids", "labels"}, the lengths of those that are too long, and how many cannot be taught, by reason."""

    rows: list[dict[str, list[int]]]
    too_long: list[int]
    untaught: Counter[str]


class CannotTeach(Exception):
    """A row without a reply to learn; the message is one of this module's reasons."""


def tokenize(tokenizer: Any, track: str, examples: list[Example], max_length: int) -> Tokenized:
    """Rows to {"input_ids", "labels"}; the prompt's labels are IGNORED, the completion ends with the model's end token.

    The prompt is exactly what evaluation shows, and the completion what it reads: in native form what the chat template writes for
    the reply. Rows longer than `max_length` tokens are left out, as a completion that is cut would teach the model to stop early.

    Raises:
        UserError: a completion is not a reply of the track; the chat template cannot be asked natively, or writes no replies that
            can be taught.
    """
    told = Tokenized([], [], Counter())
    end = require_ending(tokenizer)
    for example in examples:
        if example.messages is None:  # a conversation was checked when it was read
            TRACKS[track].reference(example)
        try:
            prompt, completion = lesson(tokenizer, track, example, end)
        except (CannotTeach, CannotShow) as reason:
            told.untaught[str(reason)] += 1
            continue
        if len(prompt) + len(completion) > max_length:
            told.too_long.append(len(prompt) + len(completion))
            continue
        told.rows.append({"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + completion})
    return told


def lesson(tokenizer: Any, track: str, example: Example, end: Ending) -> tuple[list[int], list[int]]:
    """The token ids of a row's prompt and of its completion, which ends with `end`, white space in front of it included.

    Raises:
        CannotTeach: there is no reply to learn, or not one that would be read as the row's.
        UserError: as `tokenize`.
    """
    if example.calls == [] and not example.content:
        raise CannotTeach(NOTHING_SAID)
    request = request_of(track, example)
    if not request.native:
        reply = turn_opening(tokenizer) + example.completion + end.text
        prompt, completion = _encoded(tokenizer, prompt_text(tokenizer, request), reply)
        if end.id in completion[:-1]:
            raise CannotTeach(END_INSIDE)
        return prompt, completion
    calls = wanted_calls(track, example)
    content = "" if calls else (example.completion if calls is None else example.content)
    prompt, completion = _encoded(tokenizer, *native_turn(tokenizer, request, content, calls or []))
    text, made, _ = read_reply(tokenizer, request, completion[:-1], stopped=True)
    last = (call_ending(tokenizer) or end).id if calls else end.id
    whole = completion[-1] == last and last not in completion[:-1]
    if not whole or not same_calls(made, calls or []) or (not calls and text.strip() != content.strip()):
        raise CannotTeach(NOT_READ_BACK)
    return prompt, completion


def _encoded(tokenizer: Any, prompt: str, reply: str) -> tuple[list[int], list[int]]:
    """The token ids of a prompt, as evaluation gives them, and of its reply as it stands behind that prompt: some tokenizers put a space
    in front of a text of its own."""
    ids, whole = tokenizer([prompt, prompt + reply], add_special_tokens=False)["input_ids"]
    require_embedded(tokenizer, whole)
    if whole[: len(ids)] == ids:
        return ids, whole[len(ids) :]
    return ids, tokenizer(reply, add_special_tokens=False)["input_ids"]  # one token lies across the border, which no reply can begin with


def wanted_calls(track: str, example: Example) -> list[dict[str, Any]] | None:
    """A row's calls, `[{"name", "arguments": object}]`; None where a JSON value is wanted."""
    if example.messages is not None:
        return example.calls
    parsed = TRACKS[track].parse_reference(example.completion)
    return None if parsed.name is None else [{"name": parsed.name, "arguments": parsed.value}]


def same_calls(made: list[dict[str, str]] | None, wanted: list[dict[str, Any]]) -> bool:
    """Whether calls as a reply has them are those wanted, in their order."""
    try:
        pairs = [(call["name"], json.loads(call["arguments"], **EXACT)) for call in made or []]
    except (ValueError, RecursionError):
        return False
    return len(pairs) == len(wanted) and all(
        name == call["name"] and same(arguments, call["arguments"]) for (name, arguments), call in zip(pairs, wanted, strict=True)
    )
