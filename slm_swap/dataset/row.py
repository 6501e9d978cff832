"""What a reader gives for every reply that it sees: a `Row`, or a `Dropped` with its reason."""

from dataclasses import dataclass
from typing import Any

from slm_swap.rows.examples import Example

REASONS = {  # why a reply makes no row, in the order in which it is looked at
    "bad_line": "a line that is no JSON object",
    "bad_row": "a row that is not of its source's form",
    "other_form": "a form that is not read here: Bedrock's, Gemini's or the Vercel AI SDK's, or one that is not known",
    "no_reply": "no reply in it: nothing that a model answered",
    "not_trained": "a turn that its own file leaves out of the training (`weight` 0)",
    "failed": "level ERROR, finish_reason error, or no output",
    "filtered": "stopped by a content filter, or refused",
    "truncated": "cut off at a token limit, or as long as the request's limit where the log does not say why it ended",
    "no_request": "no user message before it, or not in text alone",
    "several_replies": "more than one reply to one request",
    "several_turns": "several turns whose calls depend on the results of earlier ones (BFCL's multi_turn)",
    "several_answers": "more than one call (with --calls one)",
    "no_call_due": "no call is due (with --calls one)",
    "no_call": "a completion without a call",
    "several_calls": "a completion with more than one call",
    "no_answer": "no gold for it",
    "plain_text": "a text without JSON where no tool was on offer: nothing here measures it",
    "not_json": "arguments that are no JSON object, or no JSON where JSON was asked for",
    "bad_completion": "a completion that is no reply of its track",
    "other_track": "a reply of the track that was not asked for",
    "schema_fault": "a tool or JSON Schema that cannot be read",
    "tool_not_listed": "a call of a tool that was not on offer",
    "gold_breaks_schema": "a reply that breaks its own schema",
    "empty_required_argument": "an empty text for a required argument",
    "accept_unknown": "`accept` names an argument that the tool does not have",
    "unusable": "what no row can hold: half of a surrogate pair, NaN, nested too deeply, or an integer of more than 4300 digits",
    "no_score": "no score that --min-score could look at (with --require-score)",
    "low_score": "a score below --min-score",
    "duplicate": "the same request and reply as another one",
    "conflicting": "the same request as a newer or earlier one, with another reply",
    "shares_test_tool": "it shows a tool of the test split (with --unseen-tools)",
    "too_few": "a track with too few rows to split",
    "unused": "no split asked for it",
}
NO_REPLIES = frozenset(("no_reply", "not_trained"))  # these count no reply of production
BY_CHOICE = frozenset(("other_track", "several_answers", "no_call_due"))  # replies that could be measured, and a flag leaves out


class Unusable(Exception):
    """A reply that makes no row: `str()` is one of REASONS, `why` says it of this one."""

    def __init__(self, reason: str, why: str = ""):
        super().__init__(reason)
        self.why = why


@dataclass(frozen=True)
class Row:
    """One reply that can be built.

    The importers of public data give a request, the tools on offer and the call that answers it (`tool` and `arguments`), or `calls`
    where that is not one; `messages` is the request with its roles. `accept` is as in `Example`. A team's own row has its `example`
    already, and `tool` is None where it does not say. A conversation's row is its `record`, the object that is written. `track` is the
    only track that the row is for; None: both. `time` is when it was answered, where that is known.
    `keys` are the row's, where they are known already (see `keys.record_keys`).
    """

    id: str
    where: str
    request: str
    source: str
    tools: list[dict]
    tool: str | None
    arguments: dict[str, Any]
    accept: dict[str, list] | list | None = None
    example: Example | None = None
    calls: list[dict] | None = None
    messages: list[dict] | None = None
    record: dict[str, Any] | None = None
    track: str | None = None
    group: str | None = None
    time: str | None = None
    keys: tuple[str, str] | None = None

    @property
    def gold(self) -> list[dict]:
        """The calls that are due, of a row for both tracks or of a conversation."""
        if self.record is not None:
            return self.record.get("calls") or []
        return [{"name": self.tool, "arguments": self.arguments}] if self.calls is None else self.calls

    @property
    def gold_names(self) -> set[str]:
        """The tools that the gold calls."""
        return {call["name"] for call in self.gold if call["name"]}

    @property
    def names(self) -> set[str]:
        """The tools that the row shows: those of its gold and all on offer."""
        return {tool["name"] for tool in self.tools} | self.gold_names


@dataclass(frozen=True)
class Dropped:
    """A reply left out: `reason` is counted, `why` says it of this one."""

    id: str
    where: str
    reason: str
    why: str = ""
