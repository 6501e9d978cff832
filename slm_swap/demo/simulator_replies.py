"""What the simulator says: the references' replies, spoilt for a share of the rows, as text or as tool calls."""

import hashlib
import json
import random
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

from slm_swap.common.errors import UserError
from slm_swap.demo.mistakes import draw, make_mistake, parse_call
from slm_swap.rows.examples import Example
from slm_swap.rows.prompts import request_of

UNKNOWN_PROMPT = "I am sorry, I do not know: this simulator has no reference for your request."
NO_CALL = "No tool is needed for that."
CALL = re.compile(r'<tool_call name="([^"]*)">(.*?)(?:</tool_call>|\Z)', re.DOTALL)
IN_WORDS = ("mistake:prose", "mistake:code_fence")  # a model that writes its call as text instead of making it


class _Reference(NamedTuple):
    completion: str
    calls: int | None  # how many, of a conversation's row


def conversation_key(messages: Iterable[dict[str, Any]]) -> str:
    """What stands for a conversation: its messages without the system's, by what they say and call."""
    told = [
        [message.get("role"), message.get("content"), [call.get("function") for call in message.get("tool_calls") or ()]]
        for message in messages
        if message.get("role") not in ("system", "developer")
    ]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


class Replies:
    """The references' replies by what is asked: the whole conversation, in text or native form, else the last user message.

    The first reference counts where several are asked the same. Everything drawn depends on the seed and on what is asked alone.
    """

    def __init__(self, references: Iterable[Example], mistake_rate: float, seed: int):
        self._by_prompt: dict[str, _Reference] = {}
        self._by_conversation: dict[str, _Reference] = {}
        self.mistake_rate, self.seed = mistake_rate, seed
        self._names: set[str] = set()
        self.add(references)

    def add(self, references: Iterable[Example]) -> None:
        """More references, behind those that are known."""
        for example in references:
            call = parse_call(example.completion)
            self._names |= {call.name} if call else {found["name"] for found in example.calls or ()}
            reference = _Reference(example.completion, None if example.calls is None else len(example.calls))
            if example.messages is None:
                self._by_prompt.setdefault(example.prompt, reference)
            track = "toolcall" if example.calls is not None or (call and call.frame is None) else "structured"
            for ask in ("native",) if example.messages is None else ("text", "native"):
                try:
                    asked = request_of(track, replace(example, ask=ask))
                except UserError:  # a prompt that is only a text has no native form
                    continue
                self._by_conversation.setdefault(conversation_key(asked.messages), reference)

    def find(self, messages: list[dict[str, Any]]) -> tuple[str, _Reference | None]:
        """(what stands for the conversation in every draw, its reference) of a request's messages."""
        prompt = next(message["content"] for message in reversed(messages) if message.get("role") == "user")
        if prompt in self._by_prompt:
            return prompt, self._by_prompt[prompt]
        key = conversation_key(messages)
        return (key, self._by_conversation[key]) if key in self._by_conversation else (prompt, None)

    def reply(self, subject: str, reference: _Reference | None, offered: str) -> tuple[str, str]:
        """(outcome, text): "answered", "mistake:<kind>" or "unknown_prompt"; `offered` names the tools that the model was shown."""
        if reference is None:
            return "unknown_prompt", UNKNOWN_PROMPT
        if draw(self.seed, "mistake", subject) >= self.mistake_rate:
            return "answered", reference.completion or NO_CALL
        kind, text = self._spoilt(reference, offered, random.Random(draw(self.seed, "kind", subject)))
        return f"mistake:{kind}", text

    def _spoilt(self, reference: _Reference, offered: str, rng: random.Random) -> tuple[str, str]:
        completion, call = reference.completion, parse_call(reference.completion)
        names = sorted(self._names)
        shown = [name for name in names if f'"{name}"' in offered]  # a model confuses tools that it was shown
        if reference.calls == 0 and shown:
            return "unwanted_call", f'<tool_call name="{rng.choice(shown)}">{{}}</tool_call>'
        if (reference.calls or 0) > 1:
            return "missing_call", completion.rpartition("\n")[0]
        others = [name for name in names if call and name != call.name]
        return make_mistake(call, completion, [name for name in others if name in shown] or others, rng)


def as_message(text: str, outcome: str, native: bool) -> dict[str, Any]:
    """The text as an assistant's message: natively its calls become `tool_calls`, with what was written of their arguments."""
    found = CALL.findall(text) if native and outcome not in IN_WORDS else []
    if not found:
        return {"content": text}
    calls = [
        {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for number, (name, arguments) in enumerate(found)
    ]
    return {"content": CALL.sub("", text).strip() or None, "tool_calls": calls}
