"""The protocol that every model speaks."""

from collections.abc import Container, Generator, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from slm_swap.rows.conversations import said
from slm_swap.rows.prompts import Request

MODEL_KINDS = ("slm", "azure", "replay")


@dataclass(frozen=True)
class Reply:
    """What came back for one row; every row gets one, whatever went wrong.

    `finish_reason` is "stop", "length" (our limit on new tokens cut it), "prompt_too_long" (the prompt does not fit in the model's
    context, so that nothing was generated), "content_filter", "refusal" or "error" (an exhausted retry; `error` says which, and
    `transient` whether the same request may be answered later: no connection, a time-out, 408, 409, 429, 5xx).

    `calls` is None where the model was asked in text form: its calls, if any, are in `text`. A native reply has a list, empty where
    it made none, of `{"name", "arguments"}` with the arguments as the model wrote them, a text that should be JSON; `text` is then what
    it said besides.

    A count of tokens that the server did not send is None, never 0. `input_tokens` includes `cached_tokens`, `output_tokens`
    includes `reasoning_tokens`. `limit` is the most new tokens that this request was allowed. `cut` says what is known of a reply
    that the limit cut: see `evaluating.row.cut_of`.

    `seconds` is the wall time from handing the row over to having its reply, tries that failed and the waits after them included; not
    included is how long we held its requests back to keep within the quota, as that says nothing of the model. `load` is how many rows
    were asked at a time (1: this one alone; None: not known, or a local batch). `retries` are the tries before the last one: seconds
    (counted likewise) after the row was handed over, seconds that the try took, and its HTTP status (None: no answer). `batch` names the
    local model's batch that the row was in. `confidence` is how sure a small model was, see `confidence.confidence`; None: not known, as of
    hosted models, of files, and of servers that give no log-probabilities.

    `constrained` is whether the reply was made under a grammar, None where the run has none; `grammar_error` is why a row that was to have
    one was asked freely.
    """

    text: str
    finish_reason: str = "stop"
    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    seconds: float = 0.0
    error: str | None = None
    retries: list[list[float | int | None]] = field(default_factory=list)
    batch: str | None = None
    reasoning_tokens: int | None = None
    limit: int | None = None
    cut: dict[str, Any] | None = None
    load: int | None = None
    transient: bool = False
    calls: list[dict[str, str]] | None = None
    confidence: dict[str, Any] | None = None
    constrained: bool | None = None
    grammar_error: str | None = None

    @property
    def shown(self) -> str:
        """The reply as one text: a native one's calls in the words of the text form, behind what it said besides."""
        return said(self.text, self.calls)

    @property
    def counts(self) -> tuple[int, int, int] | None:
        """(input, cached, output) tokens; None where one of them is not known."""
        found = self.input_tokens, self.cached_tokens, self.output_tokens
        return None if None in found else found


class Client(Protocol):
    """A model. `generate` gives one Reply a row, in the rows' order; `stream` takes and gives rows with their index."""

    kind: str
    load_seconds: float

    def generate(self, batch: list[Request]) -> list[Reply]: ...

    def stream(self, rows: Iterable[tuple[int, Request]], answered: Container[int] = ()) -> Generator[tuple[int, Reply]]:
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

    def count_tokens(self, text: str) -> int | None:
        """How many tokens a reply of this text has; None where the model's tokenizer is not here."""
        ...

    def forget(self) -> None:
        """Drop what was kept of earlier prompts, so that a prompt that is asked again takes as long as a new one."""
        ...

    def describe(self) -> dict[str, Any]:
        """The report's `model`: path or deployment, config hash, precision, engine, adapter. No secret."""
        ...

    def cost(self, input_tokens: int, cached_tokens: int, output_tokens: int, seconds: float) -> float | None:
        """What the work costs by the price table, None where a price is not known."""
        ...

    def close(self) -> None: ...
