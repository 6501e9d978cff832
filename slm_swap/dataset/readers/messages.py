"""Messages as providers, tracers and data sets write them, read into OpenAI's chat messages.

Read are OpenAI's chat and Responses forms, Anthropic's content blocks, ShareGPT's turns, Hermes' tags, LangChain's dumps. A reply's
thinking (`<think>`, `reasoning_content`, thinking blocks) is no part of it.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from slm_swap.common.exact_json import EXACT, number
from slm_swap.dataset.row import Unusable
from slm_swap.rows.lines import dump_json
from slm_swap.scoring.json_values import parse_json

ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "ai": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant", "tool": "tool", "function": "tool",
    "observation": "tool", "tool_response": "tool", "function_response": "tool", "ipython": "tool", "function_call": "assistant",
    "tool_call": "assistant", "SystemMessage": "system", "HumanMessage": "user", "AIMessage": "assistant", "ToolMessage": "tool",
}  # fmt: skip
_THINKING = {"thinking", "redacted_thinking", "reasoning", "reasoning_content", "thought"}
_MEDIA = {"image_url", "input_image", "input_audio", "input_file"}
_MEDIA_IN = {"file": "file", "image": "source", "document": "source"}  # types that mean so with an object of that name only
_CALL_PARTS = ("tool_use", "tool_call", "tool_calls", "function_call")
_THOUGHT = re.compile(r"\A(?:(?!<think).)*?</think(?:ing)?>|<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL)
_CALL_TAG = re.compile(r"<tool_call(?:\s+name=\"([^\"<>]+)\")?\s*>(.*?)</tool_call>", re.DOTALL)
_RESULT_TAG = re.compile(r"<tool_response>\s*(.*?)\s*</tool_response>", re.DOTALL)


@dataclass
class Turn:
    """One message, and what stands beside it in a log: whether it is trained on, and how the reply ended."""

    message: dict[str, Any]
    trained: bool = True
    finish: str = ""


def decoded(value: Any) -> Any:
    """JSON that is given as text: an object or list in a text is read, any other value stays."""
    if isinstance(value, str) and value.lstrip()[:1] in {"{", "["}:
        try:
            return json.loads(value, **EXACT)
        except ValueError:
            return value
    return value


def read_turns(messages: Iterable[Any], into: "Transcript | None" = None) -> list[Turn]:
    """The turns of a list of messages.

    Raises:
        Unusable: it is none that can be read (`no_request`, `other_form`).
    """
    transcript = into or Transcript()
    for message in messages:
        if not isinstance(message, dict):
            raise Unusable("no_request", f"a message is an object, not {type(message).__name__}")
        transcript.add(message)
    return transcript.turns


class Transcript:
    """The turns read so far, and the ids of the calls that have no result yet."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self.pending: list[str] = []
        self.calls = 0

    def add(self, raw: dict) -> None:
        """One message, or one item of the Responses API."""
        kind = raw.get("type")
        if kind in ("function_call", "function_call_output", "reasoning") and "role" not in raw:
            self._item(raw, kind)
            return
        if "kwargs" in raw and isinstance(raw["kwargs"], dict) and isinstance(raw.get("id"), list):  # LangChain's dump
            raw = raw["kwargs"] | {"type": str(raw["id"][-1])}
        named = raw.get("role") or raw.get("from") or raw.get("type")
        role = ROLES.get(named) if isinstance(named, str) else None
        if role is None:
            raise Unusable("other_form", f"a message of the role {named!r}")
        content = raw.get("content", raw.get("value"))
        if role == "assistant":
            self._assistant(raw, content, called=named in ("function_call", "tool_call"))
        elif role == "tool":
            self._results(content, raw)
        else:
            self._asked(role, content)

    def _item(self, raw: dict, kind: str) -> None:
        if kind == "function_call_output":
            self._results(raw.get("output"), raw)
        elif kind == "function_call":
            if self.turns and self.turns[-1].message["role"] == "assistant":  # one reply, item by item
                message = self.turns[-1].message
                message.setdefault("tool_calls", []).append(self._call(raw))
                if message.get("content") == "":
                    del message["content"]
            else:
                self.turns.append(Turn({"role": "assistant", "tool_calls": [self._call(raw)]}))

    # -- What was asked ----------------------------------------------------------------------------------------------------------

    def _asked(self, role: str, content: Any) -> None:
        parts = content if isinstance(content, list) else [content]
        results = [part for part in parts if isinstance(part, dict) and part.get("type") == "tool_result"]
        for part in results:
            self._results(part.get("content"), part)
        text = text_of([part for part in parts if part not in results])
        if text.strip() or (role == "user" and not results):
            self.turns.append(Turn({"role": role, "content": text}))

    def _results(self, content: Any, raw: dict) -> None:
        """A tool's result; one message may hold those of all calls that wait for one."""
        name = raw.get("tool_call_id") or raw.get("tool_use_id") or raw.get("call_id")
        content = _result_text(content)
        texts = _RESULT_TAG.findall(content)
        if not texts and name is None and len(self.pending) > 1:
            listed = decoded(content)
            alike = isinstance(listed, list) and len(listed) == len(self.pending)
            texts = [one if isinstance(one, str) else dump_json(one) for one in listed] if alike else []
        for at, text in enumerate(texts or [content]):
            call = str(name) if name is not None and at == 0 else self._next_id()
            self._join_calls(call)
            if call in self.pending:
                self.pending.remove(call)
            message = {"role": "tool", "tool_call_id": call, "content": text}
            self.turns.append(Turn(message | ({"name": raw["name"]} if isinstance(raw.get("name"), str) else {})))

    def _join_calls(self, call: str) -> None:
        """Calls on turns of their own are one reply where the first of them has its result only behind the last: nobody had it between."""
        run: list[Turn] = []
        for turn in reversed(self.turns):
            if "tool_calls" not in turn.message or (run and "content" in run[0].message):
                break
            run.insert(0, turn)
        known = [any(one["id"] == call for one in turn.message["tool_calls"]) for turn in run]
        if len(run) < 2 or not any(known[:-1]):
            return
        first, *others = run[known.index(True) :]
        first.message["tool_calls"] = [one for turn in (first, *others) for one in turn.message["tool_calls"]]
        first.trained = all(turn.trained for turn in (first, *others))
        first.finish = others[-1].finish or first.finish
        del self.turns[-len(others) :]

    def _next_id(self) -> str:
        if self.pending:
            return self.pending[0]
        self.calls += 1
        return f"call_{self.calls}"

    # -- What was replied --------------------------------------------------------------------------------------------------------

    def _assistant(self, raw: dict, content: Any, called: bool) -> None:
        extra = raw.get("additional_kwargs") if isinstance(raw.get("additional_kwargs"), dict) else {}
        listed = decoded(raw.get("tool_calls") or extra.get("tool_calls") or [])
        legacy = decoded(raw.get("function_call") or extra.get("function_call"))
        calls = [*(listed if isinstance(listed, list) else [listed]), *([legacy] if legacy else [])]
        if called:  # ShareGPT: the turn is the call
            value = decoded(content)
            calls, content = value if isinstance(value, list) else [value], None
        parts = content if isinstance(content, list) else []
        calls += [decoded(part.get("value", part)) for part in parts if isinstance(part, dict) and part.get("type") in _CALL_PARTS]
        text = _reply_text(content)
        made = [self._call(call) for call in calls]
        if not made and "<tool_call" in text:
            made = [self._call(call) for call in tagged_calls(text)]
            text = _CALL_TAG.sub("", text).strip()
        message: dict[str, Any] = {"role": "assistant"}
        if text.strip() or not made:
            message["content"] = text
        if made:
            message["tool_calls"] = made
        refused = raw.get("refusal") or any(isinstance(part, dict) and part.get("type") == "refusal" for part in parts)
        finish = "refusal" if refused else str(raw.get("finish_reason") or raw.get("stop_reason") or "").lower()
        trained = raw.get("weight", raw.get("loss_weight")) not in (0, False)
        before = self.turns[-1] if self.turns else None
        if made and not text.strip() and before and before.message["role"] == "assistant" and "tool_calls" not in before.message:
            before.message["tool_calls"] = made  # a text and then its calls are one reply
            before.finish, before.trained = finish or before.finish, before.trained and trained
        else:
            self.turns.append(Turn(message, trained, finish))

    def _call(self, raw: Any) -> dict[str, Any]:
        """One call of any of the forms, as OpenAI writes it. Its arguments may be no JSON: only where it is a reply does that count."""
        inner = raw.get("function", raw) if isinstance(raw, dict) else {}
        inner = inner if isinstance(inner, dict) else raw
        name = inner.get("name")
        given = next((inner[key] for key in ("arguments", "args", "input", "parameters") if key in inner), None)
        self.calls += 1
        known = raw.get("id") or raw.get("call_id") if isinstance(raw, dict) else None
        call = str(known) if known else f"call_{self.calls}"
        self.pending.append(call)
        name = name if isinstance(name, str) else ""
        return {"id": call, "type": "function", "function": {"name": name, "arguments": arguments_text(given)}}


def tagged_calls(text: str) -> list[dict]:
    """The calls in Hermes' tags or this program's: `<tool_call>{"name", "arguments"}</tool_call>`, `<tool_call name="X">{...}</tool_call>`.

    What is no call of either form stays a call without a name.
    """
    found = []
    for name, body in _CALL_TAG.findall(text):
        value = {"name": name, "arguments": body.strip()} if name else decoded(body.strip())
        found.append(value if isinstance(value, dict) else {"arguments": body})
    return found or [{"arguments": text}]


def arguments_text(given: Any) -> str:
    """A call's arguments as JSON text: nothing and `null` are `{}`, what is encoded twice is decoded once.

    Raises:
        Unusable: no JSON can hold them.
    """
    if not isinstance(given, str):
        return "{}" if given is None else dumped(given)
    text = given.strip()
    for _ in range(2):
        if text[:1] != '"':
            break
        try:
            inner = json.loads(text)
        except ValueError:
            break
        if not isinstance(inner, str) or not inner.strip():
            break
        text = inner.strip()
    return "{}" if text in ("", "null") else text


def dumped(value: Any) -> str:
    """A value that a server has read from JSON, as JSON again.

    Raises:
        Unusable: it holds NaN.
    """
    try:
        return dump_json(value)
    except ValueError:
        raise Unusable("not_json", "NaN or Infinity") from None


def text_of(content: Any) -> str:
    """A message's text, its parts on lines of their own.

    Raises:
        Unusable: there is something other than text in it.
    """
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content if isinstance(content, list) else [content]:
        if part is None or (isinstance(part, dict) and part.get("type") in _THINKING):
            continue
        text = part.get("text", part.get("value")) if isinstance(part, dict) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise Unusable("no_request", f"a message holds {kind}, not text alone")
        texts.append(text)
    return "\n".join(texts)


def _reply_text(content: Any) -> str:
    """An assistant's text without its thinking; a JSON reply that a server has read becomes text again."""
    if isinstance(content, dict) and "text" not in content:
        return dumped(content)
    if isinstance(content, list):
        parts = [part for part in content if not (isinstance(part, dict) and part.get("type") in (*_THINKING, *_CALL_PARTS))]
        content = "".join(str(part.get("text") or part.get("value") or "") if isinstance(part, dict) else str(part) for part in parts)
    text = text_of(content)
    return _THOUGHT.sub("", text).strip() if "</think" in text or text.lstrip().startswith("<think") else text


def _result_text(content: Any) -> str:
    """A tool's result as text: what is no text is a value, as JSON.

    Raises:
        Unusable: there is an image, a sound or a file in it.
    """
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, dict) and _is_media(part):
            raise Unusable("no_request", f"a tool's result holds {part['type']}, not text alone")
    if isinstance(content, list) and all(isinstance(part, dict) and "text" in part for part in content):
        return text_of(content)
    return content if isinstance(content, str) else "" if content is None else dumped(content)


def _is_media(part: dict) -> bool:
    """Whether a part of a content is one that OpenAI or Anthropic has for what is no text; a tool's own value may have a `type`, too."""
    kind = part.get("type")
    return isinstance(kind, str) and (kind in _MEDIA or isinstance(part.get(_MEDIA_IN.get(kind)), dict))


def json_value(text: str) -> Any:
    """One JSON value and nothing else, as replies are read; its numbers keep their digits.

    Raises:
        ValueError: it is no such text.
        Unusable: it holds an integer that Python's `int` does not read.
    """
    parse_json(text)
    try:
        return json.loads(text, parse_float=number)
    except ValueError:
        raise Unusable("unusable", "an integer of more than 4300 digits") from None
