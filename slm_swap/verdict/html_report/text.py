"""Text that others wrote, made safe to show: replies, prompts, labels and names of groups may hold anything."""

import json
import re
from difflib import SequenceMatcher
from typing import Any

SHOWN_AS_THEY_ARE = "\n\t\u3000"  # the last is a Chinese or Japanese text's ordinary space
WORDS = re.compile(r"\w+|\s+|[^\w\s]")
MOST_COMPARISONS = 1_000_000  # words of one text times words of the other, ends that are alike left out: about a second


def visible(text: str) -> str:
    """The text with every character that acts instead of showing written as its escape: U+202E as `\\u202e`.

    These are the characters that are not `str.isprintable`: control and ANSI characters, bidirectional controls, zero-width and
    unusual spaces, line separators, halves of surrogate pairs. New lines, tabs and U+3000 stay.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in SHOWN_AS_THEY_ARE else _escape(ord(char)) for char in text)


def _escape(code: int) -> str:
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def all_visible(value: Any) -> Any:
    """A JSON value with every string in it, keys too, made `visible`."""
    if isinstance(value, dict):
        return {visible(key): all_visible(child) for key, child in value.items()}
    if isinstance(value, list):
        return [all_visible(child) for child in value]
    return visible(value) if isinstance(value, str) else value


def one_line(text: str, most: int) -> str:
    """At most `most` characters in one line, an ellipsis where there were more."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def embedded_json(value: Any) -> str:
    """JSON for a `<script type="application/json">`: nothing in it ends the element or begins a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, _escape(ord(char)))
    return text


def word_diff(reference: str, reply: str) -> list[str]:
    """What a reply has more and less than its reference, word by word (difflib, so the fewest changes are not promised).

    Triples, one after the other: text in both, text only in the reference, text only in the reply; empty ones at the end are left
    out. Both texts can be put together again from it. Texts too long to compare are wholly replaced.
    """
    left, right = WORDS.findall(reference), WORDS.findall(reply)
    start = _alike(left, right)
    end = _alike(left[start:][::-1], right[start:][::-1])
    head, tail = "".join(left[:start]), "".join(left[len(left) - end :])
    left, right = left[start : len(left) - end], right[start : len(right) - end]
    if len(left) * len(right) > MOST_COMPARISONS:
        parts = [head, "".join(left), "".join(right), tail]
    else:
        parts, position = [head], [0, 0]
        for a, b, size in SequenceMatcher(None, left, right, autojunk=False).get_matching_blocks():
            parts += ["".join(left[position[0] : a]), "".join(right[position[1] : b]), "".join(left[a : a + size])]
            position = [a + size, b + size]
        parts[-1] += tail
    while parts and not parts[-1]:
        parts.pop()
    return parts


def _alike(left: list[str], right: list[str]) -> int:
    """How many words at the beginning are the same."""
    return next((at for at, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
