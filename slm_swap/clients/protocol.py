"""The protocol that every model speaks."""

from collections.abc import Container, Generator, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from slm_swap.rows.prompts import Messages

MODEL_KINDS = ("slm", "azure", "replay")


@dataclass(frozen=True)
class Reply:
    """What came back for one row; every row gets one, whatever went wrong.

    `finish_reason` is "stop", "length" (cut off, or a prompt longer than the context), "content_filter", "refusal" or
    "error" (an exhausted retry; `error` says which). `input_tokens` includes `cached_tokens`. `seconds` is the wall time
    from handing the row over to having its reply, tries that failed and the waits after them included; not included is how long
    we held its requests back to keep within the quota, as that says nothing of the model. `retries` are the tries before the last
    one: seconds (counted likewise) after the row was handed over, seconds that the try took, and its HTTP status (None: no answer). `batch`
    names the local model's batch that the row was in.
    """

    text: str
    finish_reason: str = "stop"
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    seconds: float = 0.0
    error: str | None = None
    retries: list[list[float | int | None]] = field(default_factory=list)
    batch: str | None = None


class Client(Protocol):
    """A model. `generate` gives one Reply a row, in the rows' order; `stream` takes and gives rows with their index."""

    kind: str
    load_seconds: float

    def generate(self, batch: list[Messages]) -> list[Reply]: ...

    def stream(self, rows: Iterable[tuple[int, Messages]], answered: Container[int] = ()) -> Generator[tuple[int, Reply]]:
        """One Reply a row as it comes, in any order; rows are taken as they can be asked. Those that are `answered` get none, and
        are there for the sake of the others: a batch is the same whether a part of it was answered before or not."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """What replies depend on besides the messages: two clients of equal identity may stand in for each other. No secret."""
        ...

    def state(self) -> dict[str, Any]:
        """What `describe` says besides that has come up while rows were asked; `restore` takes it, in a later process."""
        ...

    def restore(self, state: dict[str, Any]) -> None: ...

    def describe(self) -> dict[str, Any]:
        """The report's `model`: path or deployment, config hash, precision, engine, adapter. No secret."""
        ...

    def cost(self, input_tokens: int, cached_tokens: int, output_tokens: int, seconds: float) -> float | None:
        """What the work costs by the price table, None where a price is not known."""
        ...

    def close(self) -> None: ...
