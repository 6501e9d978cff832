"""Rows to token ids, as evaluation shows them to the model."""

from typing import Any

from slm_swap.clients.loading import encode_prompt
from slm_swap.rows.examples import Example
from slm_swap.rows.prompts import request_of
from slm_swap.scoring.tracks import TRACKS
from slm_swap.tuning.packing import IGNORED


def tokenize(
    tokenizer: Any, track: str, examples: list[Example], max_length: int
) -> tuple[list[dict[str, list[int]]], list[int]]:
    """Rows to {"input_ids", "labels"}; the prompt's labels are IGNORED, the completion ends with the model's end token.

    The prompt is exactly what evaluation shows. Rows longer than `max_length` tokens are left out (a completion that is cut would
    teach the model to stop early): the second value is their lengths.

    Raises:
        UserError: a completion is not a reply of the track.
    """
    rows, too_long = [], []
    end = end_token(tokenizer)
    for example in examples:
        TRACKS[track].reference(example)
        prompt = encode_prompt(tokenizer, request_of(track, example))
        completion = [*tokenizer(example.completion, add_special_tokens=False)["input_ids"], end]
        if len(prompt) + len(completion) > max_length:
            too_long.append(len(prompt) + len(completion))
            continue
        rows.append({"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + completion})
    return rows, too_long


def end_token(tokenizer: Any) -> int:
    """The token that ends a turn in the tokenizer's own chat format: what stands behind the last message's text."""
    mark = "\x00"
    text = tokenizer.apply_chat_template([{"role": "assistant", "content": mark}], tokenize=False)
    behind = tokenizer(text.split(mark, 1)[1], add_special_tokens=False)["input_ids"] if mark in text else []
    return behind[0] if behind else tokenizer.eos_token_id
