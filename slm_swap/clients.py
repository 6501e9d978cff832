"""The protocol that every model speaks, and the factory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from slm_swap.prompts import Messages

MODEL_KINDS = ("slm", "azure", "replay")


@dataclass(frozen=True)
class Reply:
    """What came back for one row; every row gets one, whatever went wrong.

    `finish_reason` is "stop", "length" (cut off, or a prompt longer than the context), "content_filter", "refusal" or
    "error" (an exhausted retry; `error` says which). `input_tokens` includes `cached_tokens`. `seconds` is the wall time
    from handing the row over to having its reply.
    """

    text: str
    finish_reason: str = "stop"
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    seconds: float = 0.0
    error: str | None = None


class Client(Protocol):
    """A model. `generate` gives one Reply a row, in the rows' order."""

    kind: str
    load_seconds: float

    def generate(self, batch: list[Messages]) -> list[Reply]: ...

    def describe(self) -> dict[str, Any]:
        """The report's `model`: path or deployment, config hash, precision, engine, adapter. No secret."""
        ...

    def cost(self, input_tokens: int, cached_tokens: int, output_tokens: int, seconds: float) -> float | None:
        """What the work costs by the prices in the settings, None where they are not set."""
        ...

    def close(self) -> None: ...
