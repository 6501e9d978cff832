"""The protocol that every model speaks, and the factory."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from slm_swap.errors import UserError
from slm_swap.prompts import Messages

if TYPE_CHECKING:
    from slm_swap.examples import Example
    from slm_swap.settings import Settings

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
        """What the work costs by the price table, None where a price is not known."""
        ...

    def close(self) -> None: ...


def make_client(
    kind: str,
    settings: "Settings",
    examples: "list[Example]",
    *,
    replies: str | Path | None = None,
    precision: str = "int8",
    adapter: str | Path | None = None,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    seed: int = 42,
    trust_remote_code: bool = False,
) -> Client:
    """The client of one of MODEL_KINDS; options that a kind has no use for are ignored.

    Raises:
        UserError: the kind is not set up (a variable, a checkpoint, a file is missing).
    """
    if kind == "azure":
        from slm_swap.azure_client import AzureClient

        return AzureClient(settings, max_new_tokens=max_new_tokens, seed=seed)
    if kind == "replay":
        from slm_swap.replay_client import ReplayClient

        if replies is None:
            raise UserError("--model-kind replay needs --replies FILE: the recorded replies")
        return ReplayClient(replies, examples)
    from slm_swap.slm_client import SLMClient

    return SLMClient(
        settings,
        precision=precision,
        adapter=adapter,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        trust_remote_code=trust_remote_code,
    )
