"""Audited disagreements as rows for the next training: the request as it was asked, the hosted model's reply as its gold."""

from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from slm_swap.common.errors import UserError
from slm_swap.dataset.labels import TEACHER
from slm_swap.dataset.readers.conversations import Conversation, rows_of
from slm_swap.dataset.readers.messages import Turn
from slm_swap.dataset.readers.wrappers import request_turns
from slm_swap.dataset.row import Dropped, Unusable
from slm_swap.rows.examples import parse_example
from slm_swap.rows.lines import dump_json
from slm_swap.serving.watching import Tail

SOURCE = "audit of"


def rows_of_audits(path: Path, hosted: str, dropped: Counter[str]) -> Iterator[dict[str, Any]]:
    """A row for each audit that disagrees. `dropped` counts the others by reason: "agree", "no_content" (audited with --no-audit-content), "damaged",
    "unreadable" (the hosted reply is no JSON, or tries to call and does not), "may_be_unreadable" (a text in an audit of an earlier version, which did not
    say), and those of `dataset.row`. The `source` marks a row as a teacher's label, so that a verdict on such rows is called agreement.

    Raises:
        UserError: the file cannot be read.
    """
    audits = Tail(path)
    for audit in audits.new():
        if audit.get("agree") is not False:
            dropped["agree" if audit.get("agree") is True else "damaged"] += 1
            continue
        request, reply = audit.get("request"), audit.get("hosted")
        if not isinstance(request, dict) or reply is None:
            dropped["no_content"] += 1
            continue
        if not_gold := _not_gold(audit, reply):
            dropped[not_gold] += 1
            continue
        try:
            yield _row(audit, request, reply, f"{TEACHER}{SOURCE} {hosted}")
        except Unusable as reason:
            dropped[str(reason)] += 1
        except (UserError, TypeError, AttributeError, KeyError, ValueError, RecursionError):
            dropped["unusable"] += 1
    dropped["damaged"] += audits.damaged


def _row(audit: dict[str, Any], request: dict[str, Any], reply: Any, source: str) -> dict[str, Any]:
    turns, name = request_turns(request), audit["id"]
    when = datetime.fromtimestamp(float(audit["time"]), timezone.utc).isoformat(timespec="seconds")
    asked = Conversation(name, [*turns, Turn(_message(audit["kind"], reply))], name, name, source, len(turns), request, time=when)
    [item] = rows_of(asked)
    if isinstance(item, Dropped):
        raise Unusable(item.reason, item.why)
    parse_example(item.record, name)
    return item.record


def _not_gold(audit: dict[str, Any], reply: Any) -> str | None:
    """Why a hosted reply cannot be gold, None where it can. Only an audit's own `unreadable` tells a text that says nothing from a value like it."""
    unreadable = audit.get("unreadable")
    if not isinstance(unreadable, list):
        return "may_be_unreadable" if _is_text(reply) else None
    return "unreadable" if "hosted" in unreadable else None


def _is_text(reply: Any) -> bool:
    """Whether a reply stands as its text, as an audit keeps one without calls, and one that cannot be read."""
    return isinstance(reply, dict) and reply.keys() == {"text"} and isinstance(reply["text"], str)


def _message(kind: str, reply: Any) -> dict[str, Any]:
    """A reply as an audit keeps it, its calls, its value or its text, as OpenAI's message."""
    if kind == "value":
        return {"role": "assistant", "content": dump_json(reply)}
    if _is_text(reply):
        return {"role": "assistant", "content": reply["text"]}
    calls = [{"name": call["name"], "arguments": dump_json(call["arguments"])} for call in reply]
    made = [{"id": f"call_{at}", "type": "function", "function": call} for at, call in enumerate(calls)]
    return {"role": "assistant", "content": None, "tool_calls": made}
