"""Mistakes as a hosted model makes them: changed values, names and forms, drawn by a seed."""

import hashlib
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from slm_swap.common.exact_json import EXACT
from slm_swap.rows.lines import dump_json


def draw(seed: int, *parts: object) -> float:
    """A number in [0, 1) that depends on the arguments alone."""
    digest = hashlib.sha256("\0".join(map(str, (seed, *parts))).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6]) / 2**48


@dataclass(frozen=True)
class Call:
    """A completion taken apart; `frame` is the whole object of the structured form, None for the `<tool_call>` wrapper."""

    name: str
    arguments: dict[str, Any]
    frame: dict[str, Any] | None = None

    def text(self) -> str:
        """The completion in its own form again."""
        if self.frame is None:
            return f'<tool_call name="{self.name}">{dump_json(self.arguments)}</tool_call>'
        return dump_json(self.frame | {"tool_name": self.name, "arguments": self.arguments})


def parse_call(completion: str) -> Call | None:
    """Either form of completion; None for any other text."""
    wrapper = re.fullmatch(r'\s*<tool_call name="([^"]*)">(.*)</tool_call>\s*', completion, re.DOTALL)
    try:
        value = json.loads(wrapper[2] if wrapper else completion, **EXACT)
        dump_json(value)  # what cannot be written back (NaN) is left alone
    except (ValueError, RecursionError):
        return None
    frame = {"tool_name": wrapper[1], "arguments": value} if wrapper else value
    if not isinstance(frame, dict) or not isinstance(frame.get("tool_name"), str) or not isinstance(frame.get("arguments"), dict):
        return None
    return Call(frame["tool_name"], frame["arguments"], None if wrapper else frame)


def _changed(value: Any) -> Any:
    """Another value of the same type."""
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float() | Decimal():
            return value + 1 if value + 1 != value else 0.0
        case str():
            words = value.split(" ")
            return " ".join(words[:-1]) if len(words) > 1 else value[:-1] if len(value) > 1 else value + "x"
        case list():
            return value[:-1] if value else ["unknown"]
        case dict():
            return {} if value else {"value": "unknown"}
    return "unknown"


def make_mistake(call: Call | None, completion: str, others: list[str], rng: random.Random) -> tuple[str, str]:
    """One mistake that a model could make in this completion: (its kind, the spoilt text); `others` are other tools' names.

    A truncated reply is one whose model stopped too early: its finish_reason stays "stop".
    """
    text = completion.strip()
    kinds: dict[str, Callable[[], str]] = {
        "prose": lambda: f"Sure! Here is what you asked for:\n{text}",
        "code_fence": lambda: f"```json\n{text}\n```",
        "truncated": lambda: text[: int(len(text) * rng.uniform(0.3, 0.9))],
    }

    def edited(changes: dict[str, Any], drop: str | None = None, name: str | None = None) -> str:
        arguments = {key: value for key, value in (call.arguments | changes).items() if key != drop}
        return Call(name or call.name, arguments, call.frame).text()

    if call is not None:
        extra = next(key for key in ("limit", "format", "language", f"extra_{len(call.arguments)}") if key not in call.arguments)
        kinds["extra_argument"] = lambda: edited({extra: 10 if extra == "limit" else "default"})
        if others:
            kinds["other_tool"] = lambda: edited({}, name=rng.choice(others))
        if call.arguments:
            key = rng.choice(sorted(call.arguments))
            value = call.arguments[key]
            kinds["changed_value"] = lambda: edited({key: _changed(value)})
            kinds["wrong_type"] = lambda: edited({key: [value] if isinstance(value, str) else dump_json(value)})
            kinds["missing_argument"] = lambda: edited({}, drop=key)
    kind = rng.choice(sorted(kinds))
    return kind, kinds[kind]()
