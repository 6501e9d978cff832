"""Langfuse's observations and dataset items, from its API or an export of its page (CSV, JSON, JSONL), as conversations."""

from decimal import Decimal
from typing import Any

from slm_swap.dataset.readers.conversations import Conversation, short
from slm_swap.dataset.readers.messages import decoded
from slm_swap.dataset.readers.wrappers import read_reply, request_turns
from slm_swap.dataset.row import Unusable

MADE = ("output", "completion_tokens", "output_tokens", "completionTokens")  # how tracers name the tokens of a reply
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


def _get(row: dict, camel: str, *others: str) -> Any:
    """A field in the API's spelling or in an export's (`traceId`, `trace_id`)."""
    snake = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in camel)
    return next((row[name] for name in (camel, snake, *others) if row.get(name) is not None), None)


def is_observation(row: dict) -> bool:
    """Whether a row is an observation of Langfuse's."""
    return _get(row, "traceId") is not None and ("input" in row or "output" in row) and "datasetId" not in row


def is_item(row: dict) -> bool:
    """Whether a row is an item of a Langfuse dataset."""
    return "input" in row and any(name in row for name in ("expectedOutput", "expected_output")) and "instruction" not in row


def generation_conversation(generation: dict, where: str) -> Conversation:
    """A generation: its input is history, its output the one reply.

    Raises:
        Unusable: it is no generation, has no request that can be read, or its output is no reply.
    """
    kind = str(generation.get("type") or "GENERATION").upper()
    if kind != "GENERATION":
        raise Unusable("no_reply", f"an observation of the type {kind}")
    metadata = decoded(generation.get("metadata"))
    metadata = {key: decoded(value) for key, value in metadata.items()} if isinstance(metadata, dict) else {}
    failed = generation.get("level") == "ERROR"
    reply = read_reply(generation.get("output"))
    parameters = decoded(_get(generation, "modelParameters"))
    reply.finish = "error" if failed else reply.finish or str(metadata.get("finish_reason") or "").lower() or _suspect(generation, parameters)
    session, trace = _get(generation, "sessionId"), _get(generation, "traceId")
    made = _asked(generation.get("input"), metadata, parameters, where, ends_with=reply)
    made.turns.append(reply)
    made.metadata = metadata
    made.id = str(generation.get("id") or "")
    made.group = str(session or trace or made.id or short(where))
    made.source = f"langfuse:{trace}" if trace else ""
    made.time = str(_get(generation, "startTime") or "") or None
    return made


def _suspect(generation: dict, parameters: Any) -> str:
    """"length" for a reply that is as long as its request allowed, where no tracer has noted why it ended; else "": it is not known."""
    usage = {}
    for name in ("usageDetails", "usage"):
        usage |= found if isinstance(found := decoded(_get(generation, name)), dict) else {}
    made = next((usage[name] for name in MADE if isinstance(usage.get(name), int | Decimal)), None)
    given = parameters if isinstance(parameters, dict) else {}
    limits = [int(given[name]) for name in LIMITS if str(given.get(name)).isdecimal()]
    return "length" if made is not None and limits and made >= min(limits) else ""


def item_conversation(item: dict, where: str) -> Conversation:
    """A dataset item: what is expected is the reply.

    Raises:
        Unusable: as `generation_conversation`.
    """
    metadata = decoded(item.get("metadata"))
    reply = read_reply(_get(item, "expectedOutput"))
    made = _asked(item.get("input"), metadata if isinstance(metadata, dict) else {}, {}, where)
    made.turns.append(reply)
    made.id = str(item.get("id") or "")
    made.group = str(_get(item, "sourceTraceId") or made.id or short(where))
    made.time = str(_get(item, "createdAt") or "") or None
    return made


def _asked(given: Any, metadata: dict, parameters: Any, where: str, ends_with: Any = None) -> Conversation:
    given = decoded(given)
    parameters = parameters if isinstance(parameters, dict) else {}
    options = parameters | metadata | (given if isinstance(given, dict) else {})
    body = given if isinstance(given, (dict, list)) else {"messages": given}
    messages = decoded(body.get("messages", body.get("input"))) if isinstance(body, dict) else body
    # LangChain's tracer writes the tools on offer as messages of the role tool, before any call
    listed = messages if isinstance(messages, list) else []
    offered = [one for one in listed if isinstance(one, dict) and one.get("role") == "tool" and isinstance(one.get("content"), dict)]
    if offered:
        kept = [message for message in listed if message not in offered]
        body = body | {"messages": kept} if isinstance(body, dict) else kept
    turns = request_turns(body)
    if ends_with is not None and len(turns) > 1 and turns[-1].message == ends_with.message:  # the input that grew by its own reply
        turns.pop()
    return Conversation(where, turns, first=len(turns), asked=options, offered=[message["content"] for message in offered])
