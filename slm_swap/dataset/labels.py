"""Labels by a teacher: a hosted model's replies to a row that has none, and whether enough of them agree to be its gold."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from slm_swap.clients.protocol import Reply
from slm_swap.common.errors import UserError
from slm_swap.rows.conversations import call_text, reply_text
from slm_swap.rows.examples import Example, parse_example
from slm_swap.rows.json_schema import call_violations, violations
from slm_swap.scoring.replies import tries_to_call
from slm_swap.scoring.several import answer, answer_json, says_nothing

TEACHER = "teacher:"  # in front of the deployment, in a labelled row's `source`: such a row measures agreement, not accuracy


@dataclass(frozen=True)
class Vote:
    """One answer and how many samples gave it; `gold` holds the row's fields for it, `fault` why it can be no gold."""

    count: int
    gold: dict[str, Any]
    fault: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {"count": self.count, **self.gold} | ({"fault": self.fault} if self.fault else {})


def unlabelled(row: Any, track: str, where: str) -> Example:
    """A row without a reply as an Example that can be asked; its gold means nothing.

    Raises:
        UserError: it has a reply already, or is no row otherwise.
    """
    if isinstance(row, dict) and (given := {"completion", "calls", "object"} & row.keys()):
        raise UserError(f"{where}: it has a `{min(given)}` already: label.py takes rows without a reply, take the field out")
    if isinstance(row, dict):
        row = {name: value for name, value in row.items() if name != "accept"}  # of a reply that is not known yet
    nothing = {"calls": []} if track == "toolcall" else {"object": {}}
    if isinstance(row, dict) and "messages" not in row:
        nothing = {"completion": call_text("none", "{}") if track == "toolcall" else "{}"}
    return parse_example(row | nothing if isinstance(row, dict) else row, where)


def votes_of(track: str, example: Example, replies: list[Reply]) -> list[Vote]:
    """The different answers among replies, the one that most gave first; answers are equal as scoring compares them."""
    found: dict[Any, list[Reply]] = {}
    for reply in replies:
        found.setdefault(_canonical(track, reply), []).append(reply)
    votes = [_vote(track, example, same) for same in found.values()]
    return sorted(votes, key=lambda vote: -vote.count)


def _canonical(track: str, reply: Reply) -> Any:
    if reply.finish_reason != "stop":
        return reply.finish_reason
    try:
        return frozenset(answer(track, reply.text, reply.calls).items())
    except ValueError:
        return ("unreadable", reply.shown)


def _vote(track: str, example: Example, replies: list[Reply]) -> Vote:
    reply = replies[0]
    if reply.finish_reason != "stop":
        return Vote(len(replies), {"reply": reply.shown}, reply.error or reply.finish_reason)
    try:
        wanted = answer_json(track, reply.text, reply.calls)
    except ValueError as error:
        return Vote(len(replies), {"reply": reply.shown}, f"it cannot be read: {error}")
    gold = {"calls": wanted} if track == "toolcall" else {"object": wanted}
    if gold == {"calls": []}:
        gold["content"] = reply.text
    return Vote(len(replies), gold, _fault(track, example, wanted) or (_no_words(reply.text) if not wanted and track == "toolcall" else None))


def _no_words(text: str) -> str | None:
    """Why a reply without calls does not say that none is due; None where it does."""
    if says_nothing(text):
        return "it is empty"
    return "a call stands in its text in a form that is not read" if tries_to_call(text) else None


def _fault(track: str, example: Example, wanted: Any) -> str | None:
    """Why an answer can be no gold; None where it can."""
    if track == "structured":
        broken = violations(wanted, example.schema) if example.schema else []
        return f"it breaks the schema: {'; '.join(broken)}" if broken else None
    if example.messages is None and len(wanted) != 1:
        return f"{len(wanted)} calls, where a row with a `prompt` wants exactly one: write `messages`, `tools`"
    tools = {tool["name"]: tool for tool in example.tools or []}
    for call in wanted:
        if tools and call["name"] not in tools:
            return f"it calls {call['name']!r}, which is not on offer"
        if tools and (broken := call_violations(call["arguments"], tools[call["name"]])):
            return f"its arguments break the schema of {call['name']}: {'; '.join(broken)}"
    return None


def labelled(row: dict[str, Any], track: str, example: Example, votes: list[Vote], needed: int, teacher: str) -> dict[str, Any] | None:
    """The row with the answer that at least `needed` samples gave as its gold; None where there is none, or it can be no gold."""
    if not votes or votes[0].count < needed or votes[0].fault:
        return None
    gold = votes[0].gold
    if example.messages is None:
        gold = {"completion": reply_text(gold.get("calls"), gold.get("object"))}
    kept = {name: value for name, value in row.items() if name != "accept"}
    return {"id": example.id, **kept, **gold, "source": f"{TEACHER}{teacher}"}


def counts_of(votes: list[list[Vote]]) -> dict[str, int]:
    """How many rows have how many different answers."""
    return {str(different): rows for different, rows in sorted(Counter(map(len, votes)).items())}
