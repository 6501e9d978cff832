"""Thinking in front of a reply: switched by the chat template's own variables, and cut off before the reply is scored.

Templates have a variable for it (`enable_thinking` of Qwen3, SmolLM3, GLM 4.5 and Gemma 4; `thinking` of Granite 3.2 and DeepSeek V3.1),
or none, and then the model thinks always or never. Which, is found by rendering. gpt-oss thinks always: in a channel of its own.
"""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from slm_swap.clients.templates import SWITCHES, apply, rendered, template_key
from slm_swap.common.errors import UserError

THINKING = ("off", "on")
THINK = "<think>"  # what stands before thinking that was cut, whatever mark the model has for it: scoring goes by it
# What stands around thinking: Qwen3 and most others, Magistral, Seed-OSS, Gemma 4.
MARKS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"), ("<|channel>thought", "<channel|>"))
# A message of gpt-oss: its header (channel, recipient, kind of content), and its body. What is meant for the user is in the channel `final`.
CHANNEL = "<|channel|>"
_MESSAGE = re.compile(r"\s*(?:<\|start\|>assistant)?(?P<header>(?:[^<]|<\|channel\|>|<\|constrain\|>)*)<\|message\|>")
_MESSAGE_END = re.compile(r"<\|(?:end|call|return)\|>")
_PROBE = [{"role": "user", "content": "probe user 7d1f"}]


def use_thinking(tokenizer: Any, wanted: str | None) -> None:
    """Have every prompt of this tokenizer ask for thinking or not, one of THINKING; None switches it off where there is a switch.

    Raises:
        UserError: the chat template has no switch, and does otherwise than is wanted.
    """
    tokenizer.slm_swap_variables = dict.fromkeys(SWITCHES, wanted == "on")
    told = thinking(tokenizer)
    if wanted and wanted != told and (told, wanted) != ("always", "on"):
        what = "always asks for thinking" if told == "always" else "has no switch for thinking"
        raise UserError(f"--thinking {wanted}: the chat template {what}: leave the flag out, or take another checkpoint")


def thinking(tokenizer: Any) -> str | None:
    """"on" or "off" as prompts ask where the chat template has a switch, "always" where it has none, None where it never mentions thinking."""
    if _has_switch(tokenizer, template_key(tokenizer)):
        return "on" if _asked_for(tokenizer) else "off"
    return "always" if prefilled(tokenizer) or has_channels(tokenizer) else None


def has_channels(tokenizer: Any) -> bool:
    """Whether replies come in gpt-oss' channels."""
    return "<|channel|>final" in template_key(tokenizer)


def prefilled(tokenizer: Any) -> str | None:
    """What closes the thinking that a prompt of the chat template opens, so that a reply begins inside of it; None where it opens none."""
    return _prefilled(tokenizer, template_key(tokenizer), _asked_for(tokenizer))


def _asked_for(tokenizer: Any) -> bool:
    return any(getattr(tokenizer, "slm_swap_variables", {}).values())


@lru_cache(maxsize=8)
def _prefilled(tokenizer: Any, template: str, on: bool) -> str | None:
    shown = (_shown(lambda: apply(tokenizer, _PROBE, open_turn=True)) or "").rstrip()
    return next((close for mark, close in MARKS if shown.endswith(mark)), None)


@lru_cache(maxsize=8)
def _has_switch(tokenizer: Any, template: str) -> bool:
    """Whether a prompt depends on the variables."""
    messages = [{"role": "system", "content": "probe system 7d1f"}, *_PROBE]
    found = [
        _shown(lambda told=told, on=on: rendered(tokenizer, told, add_generation_prompt=True, **dict.fromkeys(SWITCHES, on)))
        for told in (messages, _PROBE)
        for on in (False, True)
    ]
    return found[0] != found[1] or found[2] != found[3]


def _shown(render: Callable[[], str]) -> str | None:
    from jinja2 import TemplateError

    try:
        return render()
    except TemplateError:  # each template has its own way to refuse
        return None


# -- Replies ---------------------------------------------------------------------------------------------------------------------


def cut_thinking(text: str, opened: str | None = None) -> tuple[str, str]:
    """(a reply without the thinking that it begins with, that thinking). `opened`: what closes the thinking that the prompt has opened.

    Thinking that does not end is a reply that was cut: it stays in the text, behind THINK.
    """
    if text.lstrip().startswith(CHANNEL):
        return _cut_channels(text)
    begun = text.lstrip()
    mark, close = next(((mark, close) for mark, close in MARKS if begun.startswith(mark) or close == opened), (None, None))
    if close is None:
        return text, ""
    end = text.find(close)
    if end < 0:
        return THINK + begun.removeprefix(mark), text
    end += len(close)
    return text[end:].lstrip(), text[:end]


def cut_served_thinking(text: str) -> tuple[str, str]:
    """`cut_thinking` of what a server gave, whose prompt is not known: thinking may have been opened there."""
    if text.lstrip()[:1] not in ("{", "[", '"'):
        for mark, close in MARKS[:2]:
            before, found, _ = text.partition(close)
            if found and mark not in before:
                return cut_thinking(text, close)
    return cut_thinking(text)


class Message(NamedTuple):
    """One of the messages that a reply of gpt-oss consists of; `end` is where its body ends in the text."""

    header: str
    body: str
    end: int


def channel_messages(text: str) -> list[Message]:
    """The messages of a reply of gpt-oss, as far as they are whole or have at least begun."""
    found, at = [], 0
    while mark := _MESSAGE.match(text, at):
        close = _MESSAGE_END.search(text, mark.end())
        end = close.start() if close else len(text)
        found.append(Message(mark["header"], text[mark.end() : end], end))
        at = close.end() if close else end
    return found


def _cut_channels(text: str) -> tuple[str, str]:
    messages = channel_messages(text)
    if not messages or "analysis" in messages[-1].header:
        return THINK + text, text
    start = messages[-1].end - len(messages[-1].body)
    return messages[-1].body, text[:start]
