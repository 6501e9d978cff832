"""What the simulator is made of: its faults, its quotas and the answers that it sends."""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from slm_swap.common.errors import UserError

BYTES_PER_TOKEN = 4
CHARACTERS = 12  # of a streamed part


def count_tokens(text: str) -> int:
    """The estimate of tokens: 4 bytes of UTF-8 each, rounded up."""
    return math.ceil(len(text.encode("utf-8", "replace")) / BYTES_PER_TOKEN)


def _rate(what: str) -> Any:
    return field(default=0.0, metadata={"help": f"share of {what}"})


@dataclass(frozen=True)
class Faults:
    """What goes wrong. Rates are 0..1: the first four are drawn anew for each attempt at a prompt, the last three once a prompt."""

    rate_limit: float = _rate("attempts answered with 429")
    server_error: float = _rate("attempts answered with 500")
    slow: float = _rate("attempts answered after --slow-seconds")
    cut_off: float = _rate("attempts whose connection closes in the middle of the body")
    content_filter: float = _rate("prompts refused with 400 content_filter")
    filtered_completion: float = _rate("prompts whose reply ends half-way with finish_reason content_filter")
    refusal: float = _rate("prompts answered with message.refusal")
    slow_seconds: float = field(default=2.0, metadata={"help": "how long a slow attempt takes"})
    retry_after_seconds: float = field(default=1.0, metadata={"help": "Retry-After of --rate-limit"})
    unsupported_parameters: frozenset[str] = field(
        default=frozenset(),
        metadata={"help": "comma-separated names answered with 400 unsupported_parameter (temperature: unsupported_value)"},
    )
    unrecognized_parameters: frozenset[str] = field(
        default=frozenset(),
        metadata={"help": "comma-separated names answered as old API versions do: no code, no param, only a message"},
    )

    def __post_init__(self) -> None:
        for item in fields(self):
            value, top = getattr(self, item.name), math.inf if item.name.endswith("_seconds") else 1
            if isinstance(value, int | float) and not 0 <= value <= top:
                raise UserError(f"{item.name}={value} is not between 0 and {top}: choose another")


class Bucket:
    """A token bucket that holds the quota of `window` seconds at most and refills evenly; `clock` gives seconds.

    `used` counts what was taken.
    """

    def __init__(self, per_minute: int, window: float = 60.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute, self.capacity, self._clock = per_minute, max(1.0, per_minute * window / 60), clock
        self._level, self._at = self.capacity, clock()
        self._first: float | None = None
        self.used, self._last = 0.0, 0.0

    @property
    def level(self) -> float:
        """What is left now."""
        now = self._clock()
        self._level = min(self.capacity, self._level + (now - self._at) * self.per_minute / 60)
        self._at = now
        return self._level

    def wait(self, amount: float) -> float:
        """Seconds until `amount` can be taken, 0 if now; a request larger than the bucket waits for a full one."""
        return max(0.0, min(amount, self.capacity) - self.level) * 60 / self.per_minute

    def take(self, amount: float) -> None:
        """Take it (down to an empty bucket)."""
        self._level = max(0.0, self.level - amount)
        self._first, self._last, self.used = self._at if self._first is None else self._first, self._at, self.used + amount

    @property
    def permitted(self) -> float:
        """What could have been used from the first request that was let in to the last: a full bucket and the refill."""
        return self.capacity + (self._last - (self._first or self._last)) * self.per_minute / 60


@dataclass(frozen=True)
class Answer:
    """One HTTP reply; `outcome` is what it counts as, `delay` in seconds."""

    status: int
    body: dict[str, Any]
    outcome: str
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    cut_off: bool = False
    events: tuple[bytes, ...] = ()  # of a reply that is streamed


def events_of(body: dict[str, Any], usage: bool) -> tuple[bytes, ...]:
    """A completion as Azure streams it: the role, the text in parts, each call's head and its arguments in parts, the end, the usage."""
    choice = body["choices"][0]
    message, shared = choice["message"], {key: body[key] for key in ("id", "created", "model", "system_fingerprint")}
    shared["object"] = "chat.completion.chunk"
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": None if message.get("tool_calls") else ""}]
    deltas += [{key: part} for key in ("content", "refusal") for part in _parts(message.get(key) or "")]
    for at, call in enumerate(message.get("tool_calls") or ()):
        deltas.append({"tool_calls": [{"index": at} | call | {"function": call["function"] | {"arguments": ""}}]})
        deltas += [{"tool_calls": [{"index": at, "function": {"arguments": part}}]} for part in _parts(call["function"]["arguments"])]
    chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}]})
    chunks += [{"choices": [], "usage": body["usage"]}] if usage else []
    return (*(b"data: " + json.dumps(shared | chunk).encode() + b"\n\n" for chunk in chunks), b"data: [DONE]\n\n")


def logprobs_of(text: str, sure: float) -> dict[str, Any]:
    """A completion's `logprobs` of the two best tokens: each token has `sure`, and the second one a nat less."""
    data, content = text.encode("utf-8", "replace"), []
    for at in range(0, len(data), BYTES_PER_TOKEN):
        piece = data[at : at + BYTES_PER_TOKEN]
        own = {"token": piece.decode("utf-8", "replace"), "logprob": sure, "bytes": list(piece)}
        content.append(own | {"top_logprobs": [own, {"token": "?", "logprob": sure - 1, "bytes": [63]}]})
    return {"content": content, "refusal": None}


def _parts(text: str) -> list[str]:
    return [text[at : at + CHARACTERS] for at in range(0, len(text), CHARACTERS)]


def error_answer(status: int, outcome: str, message: str, code: str | None, /, **more: Any) -> Answer:
    return Answer(status, {"error": {"code": code, "message": message, **more}}, outcome)


def bad_request(message: str, param: str | None = None, code: str | None = None, outcome: str = "bad_request") -> Answer:
    return error_answer(400, outcome, message, code, type="invalid_request_error", param=param)


def too_many(outcome: str, wait: float, headers: Mapping[str, str] = MappingProxyType({})) -> Answer:
    text = f"Requests have exceeded the rate limit of this deployment. Please retry after {math.ceil(wait)} seconds."
    retry = {"Retry-After": str(math.ceil(wait)), "retry-after-ms": str(math.ceil(wait * 1000))}
    return Answer(429, {"error": {"code": "429", "message": text}}, outcome, {**headers, **retry})


def filter_results(filtered: bool) -> dict[str, Any]:
    results = {name: {"filtered": False, "severity": "safe"} for name in ("hate", "self_harm", "sexual", "violence")}
    return results | ({"violence": {"filtered": True, "severity": "medium"}} if filtered else {})
