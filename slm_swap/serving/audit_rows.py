"""Audited disagreements as rows for the next training: the request as it was asked, the hosted model's reply as its gold."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slm_swap.common.errors import UserError
from slm_swap.dataset.labels import TEACHER
from slm_swap.dataset.readers.conversations import Conversation, rows_of
from slm_swap.dataset.readers.wrappers import read_reply, request_turns
from slm_swap.dataset.row import Dropped, Unusable
from slm_swap.rows.examples import parse_example
from slm_swap.serving.watching import Tail

SOURCE = "audit of"


def rows_of_audits(path: Path, hosted: str, dropped: Counter[str]) -> Iterator[dict[str, Any]]:
    """A row for each audit that disagrees. `dropped` counts the others by reason: "agree", "no_content" (audited with --no-content), "damaged", and those
    of `dataset.row`. The `source` marks a row as a teacher's label, so that a verdict on such rows is called agreement.

    Raises:
        UserError: the file cannot be read.
    """
    audits = Tail(path)
    for audit in audits.new():
        if audit.get("agree") is not False:
            dropped["agree" if audit.get("agree") is True else "damaged"] += 1
            continue
        request, reply, name = audit.get("request"), audit.get("hosted"), audit.get("id")
        if not isinstance(request, dict) or reply is None or not isinstance(name, str):
            dropped["no_content"] += 1
            continue
        try:
            yield _row(request, reply, name, f"{TEACHER}{SOURCE} {hosted}")
        except Unusable as reason:
            dropped[str(reason)] += 1
        except (UserError, TypeError, AttributeError, KeyError, ValueError, RecursionError):
            dropped["unusable"] += 1
    dropped["damaged"] += audits.damaged


def _row(request: dict[str, Any], reply: Any, name: str, source: str) -> dict[str, Any]:
    turns = request_turns(request)
    asked = Conversation(name, [*turns, read_reply(_message(reply))], id=name, group=name, source=source, first=len(turns), asked=request)
    [item] = rows_of(asked)
    if isinstance(item, Dropped):
        raise Unusable(item.reason, item.why)
    row = item.record | {"source": source}
    parse_example(row, name)
    return row


def _message(reply: Any) -> Any:
    """A reply of this program's own (`text`, `calls`) as OpenAI's message; any other as it is."""
    if not isinstance(reply, dict | str):
        raise Unusable("other_form", "no reply")
    if isinstance(reply, str) or not reply.keys() & {"text", "calls"}:
        return reply
    calls = [{"id": f"call_{at}", "type": "function", "function": call} for at, call in enumerate(reply.get("calls") or [])]
    return {"role": "assistant", "content": reply.get("text") or None} | ({"tool_calls": calls} if calls else {})
