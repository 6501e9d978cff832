"""The forms in which teams and public data keep conversations: what each looks like, and how it becomes a `Conversation`."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from slm_swap.dataset.readers.conversations import Conversation, short
from slm_swap.dataset.readers.langfuse import generation_conversation, is_item, is_observation, item_conversation
from slm_swap.dataset.readers.messages import Transcript, decoded, read_turns
from slm_swap.dataset.readers.wrappers import read_reply, request_turns
from slm_swap.dataset.row import Unusable

REFERENCES = ("reference_answer", "reference", "expected_output", "expected", "ground_truth", "answer", "output", "completion")
_TOOLS_TAG = re.compile(r"<tools>(.*?)</tools>", re.DOTALL)
_HERMES_TEXT = re.compile(r"(?:[^.\n]*function signatures within <tools>.*?|\s*)<tools>.*</tools>(?:.*</tool_call>)?", re.DOTALL)
_HERMES_ROLE = re.compile(r"\A\s*You are a function calling AI model\.\s*")

Row = dict[str, Any]


class Form(NamedTuple):
    """`fields` are those that are read: others are named in the report. `seen` says whether a row is of the form."""

    name: str
    seen: Callable[[Row], bool]
    read: Callable[[Row, str, Mapping[str, Row]], Conversation]
    fields: frozenset[str] | None = None


def form_of(row: Row) -> Form | None:
    """The form that a row has; None where it is none of the known ones."""
    return next((form for form in FORMS if form.seen(row)), None)


def other_source(row: Row) -> str | None:
    """The --source that reads a row which is no chat, None where none does."""
    if isinstance(row.get("prompt"), str) and "completion" in row:
        return "jsonl"
    if "query" in row and "answers" in row:
        return "xlam"
    return "bfcl" if "question" in row and ("function" in row or "involved_classes" in row) else None


# -- Fields ----------------------------------------------------------------------------------------------------------------------


def _messages(row: Row, name: str) -> list | None:
    """A field that holds a list of messages, as it is or as JSON text."""
    value = decoded(row.get(name))
    alike = isinstance(value, list) and value and all(isinstance(message, dict) for message in value)
    return value if alike and any(key in value[0] for key in ("role", "from", "type", "kwargs")) else None


def _id(row: Row, *names: str) -> str:
    return next((str(row[name]) for name in names if row.get(name) not in (None, "")), "")


_IDS = ("id", "conversation_id", "session_id", "thread_id", "custom_id", "uuid")
_TIMES = ("created_at", "createdAt", "timestamp", "startTime", "start_time", "created", "time", "date")


def _made(row: Row, where: str, turns: list, **fields: Any) -> Conversation:
    name = _id(row, *_IDS)
    group = _id(row, "group", "conversation_id", "session_id", "thread_id") or name or short(where)
    made = {"id": name, "group": group, "asked": row, "time": _id(row, *_TIMES) or None, "source": str(row.get("source") or "")}
    return Conversation(where, turns, **(made | fields))


# -- OpenAI, Anthropic, TRL ------------------------------------------------------------------------------------------------------


def _chat(row: Row, where: str, beside: Mapping[str, Row]) -> Conversation:
    turns = request_turns(row | {"messages": _messages(row, "messages")})
    if not any(turn.message["role"] == "assistant" for turn in turns) or turns[-1].message["role"] in ("user", "tool"):
        reference = next((decoded(row[name]) for name in REFERENCES if row.get(name) not in (None, "")), None)
        if reference is not None:  # reinforcement fine-tuning: the reference stands beside the messages
            return _answered(row, where, turns, reference)
    return _made(row, where, turns)


def _answered(row: Row, where: str, turns: list, reply: Any, **fields: Any) -> Conversation:
    first = len(turns)
    return _made(row, where, [*turns, read_reply(reply)], first=first, **fields)


def _stored(row: Row, where: str, beside: Mapping[str, Row]) -> Conversation:
    """A chat completion with its request: the answer is the reply, the messages are history."""
    asked = row | {"messages": _messages(row, "messages") or _messages(row, "input")}
    return _answered(asked, where, request_turns(asked), {"choices": decoded(row["choices"])})


def _pair(row: Row, where: str, beside: Mapping[str, Row]) -> Conversation:
    """A request and its response in one row, as gateways log them."""
    request, response = decoded(row["request"]), decoded(row["response"])
    request = decoded(request.get("body", request))
    response = decoded(response.get("body", response))
    asked = {key: value for key, value in row.items() if key not in ("request", "response")} | request
    return _answered(asked, where, request_turns(request), response)


def _batch(row: Row, where: str, beside: Mapping[str, Row]) -> Conversation:
    """A line of a batch's output, with its request from the batch's input."""
    request = beside.get(str(row["custom_id"]))
    if request is None:
        raise Unusable("no_request", "batch output has no request: give the batch's input file beside it to --dataset-path")
    response = row.get("response") or row.get("result") or {}
    if row.get("error") or response.get("type", "succeeded") != "succeeded":
        raise Unusable("failed", str(row.get("error") or response.get("type")))
    reply = response.get("body") or response.get("message") or {}
    return _answered(request | {"id": row["custom_id"]}, where, request_turns(request), reply)


def batch_request(row: Row) -> Row | None:
    """The request of a line of a batch's input; None where it is no such line."""
    body = decoded(row.get("body", row.get("params"))) if "custom_id" in row else None
    return body if isinstance(body, dict) else None


def _prompt_lists(row: Row, where: str, beside: Mapping[str, Row]) -> Conversation:
    """TRL's prompt and completion as lists of messages; of a preference pair the chosen one is the reply."""
    transcript = Transcript()
    first = len(read_turns(_messages(row, "prompt") or [], transcript))
    reply = _messages(row, "completion") or _messages(row, "chosen") or []
    return _made(row, where, read_turns(reply, transcript), first=first)


def _preference(row: Row, where: str, beside: Mapping[str, Row]) -> Conversation:
    """OpenAI's preference rows: `preferred_output` is the reply."""
    asked = row | decoded(row["input"])
    turns = request_turns(asked)
    first = len(turns)
    return _made(asked, where, [*turns, *read_turns(_messages(row, "preferred_output") or [])], first=first)


# -- ShareGPT, Hermes ------------------------------------------------------------------------------------------------------------


def _sharegpt(row: Row, where: str, beside: Mapping[str, Row]) -> Conversation:
    turns = _messages(row, "conversations") or _messages(row, "conversation") or []
    system = row.get("system")
    if isinstance(system, str) and system.strip():
        turns = [{"role": "system", "content": system}, *turns]
    made = _made(row, where, read_turns(turns))
    if not decoded(row.get("tools")):
        _take_tools(made)
    return made


def _take_tools(conversation: Conversation) -> None:
    """Tools that stand in Hermes' system text go where tools are kept; what it says of their form goes too, it is not asked that way."""
    for turn in conversation.turns:
        text = turn.message.get("content") or ""
        if turn.message["role"] != "system" or "<tools>" not in text:
            continue
        listed = [decoded(part.strip()) for part in _TOOLS_TAG.findall(text) if part.strip()]
        flat = [tool for part in listed for tool in (part if isinstance(part, list) else [part])]
        if not flat or not all(isinstance(tool, dict) for tool in flat):
            flat = [tool for part in _TOOLS_TAG.findall(text) for tool in map(decoded, part.strip().splitlines())]
        tools = [tool for tool in flat if isinstance(tool, dict)]
        if tools:
            conversation.offered = tools
            rest = _HERMES_ROLE.sub("", _HERMES_TEXT.sub("", text)).strip()
            turn.message = turn.message | {"content": rest}
    conversation.turns = [turn for turn in conversation.turns if turn.message["role"] != "system" or turn.message["content"]]


# -- Others ----------------------------------------------------------------------------------------------------------------------


def _trajectory(row: Row, where: str, beside: Mapping[str, Row]) -> Conversation:
    """tau-bench: the trials of one task are not independent, so the task is the group."""
    task = _id(row, "task_id")
    made = _made(row, where, read_turns(_messages(row, "traj") or []))
    info = decoded(row.get("info"))
    tools = row.get("tools") or (info.get("tools") if isinstance(info, dict) else None)
    made.asked = {"tools": tools} if tools else {}
    trial = _id(row, "trial")
    if task:
        made.id, made.group = f"task{task}" + (f"-{trial}" if trial else ""), f"task{task}"
    return made


def _alpaca(row: Row, where: str, beside: Mapping[str, Row]) -> Conversation:
    given = row.get("input")
    text = row["instruction"] + (f"\n\n{given}" if isinstance(given, str) and given.strip() else "")
    system = [{"role": "system", "content": row["system"]}] if isinstance(row.get("system"), str) and row["system"].strip() else []
    history = decoded(row.get("history")) or []
    pairs = [{"role": role, "content": said} for pair in history for role, said in zip(("user", "assistant"), pair, strict=False)]
    turns = read_turns([*system, *pairs, {"role": "user", "content": text}])
    return _answered(row, where, turns, decoded(row["output"]))


def _azure_evaluation(row: Row, where: str, beside: Mapping[str, Row]) -> Conversation:
    """Azure's evaluation rows: calls in `ground_truth` go before the `response`."""
    query = decoded(row["query"])
    turns = read_turns(query) if isinstance(query, list) else read_turns([{"role": "user", "content": query}])
    truth = decoded(row.get("ground_truth"))
    calls = truth if isinstance(truth, list) else decoded(row.get("tool_calls"))
    reply = {"role": "assistant", "tool_calls": calls} if isinstance(calls, list) and calls else decoded(row.get("response", truth))
    asked = {key: value for key, value in row.items() if key != "tools"} | {"tools": row.get("tool_definitions") or row.get("tools")}
    return _answered(asked, where, turns, reply)


def _observation(row: Row, where: str, beside: Mapping[str, Row]) -> Conversation:
    return generation_conversation(row, where)


def _dataset_item(row: Row, where: str, beside: Mapping[str, Row]) -> Conversation:
    return item_conversation(row, where)


# -- The list --------------------------------------------------------------------------------------------------------------------


def _is_sharegpt(row: Row) -> bool:
    return bool(_messages(row, "conversations") or _messages(row, "conversation"))


def _is_hermes(row: Row) -> bool:
    turns = (_messages(row, "conversations") or _messages(row, "conversation") or []) if _is_sharegpt(row) else []
    texts = [turn.get("value", turn.get("content")) for turn in turns]
    return any(isinstance(text, str) and ("<tool_call>" in text or "<tools>" in text) for text in texts)


def _is_anthropic(row: Row) -> bool:
    messages = _messages(row, "messages")
    if not messages:
        return False
    tools = decoded(row.get("tools"))
    blocks = [part for message in messages if isinstance(message.get("content"), list) for part in message["content"]]
    marked = any(isinstance(part, dict) and part.get("type") in ("tool_use", "tool_result") for part in blocks)
    return marked or "system" in row or (isinstance(tools, list) and any(isinstance(t, dict) and "input_schema" in t for t in tools))


def _has_body(value: Any) -> bool:
    value = decoded(value)
    return isinstance(value, dict) and isinstance(decoded(value.get("body", value)), dict)


def _is_pair(row: Row) -> bool:
    return _has_body(row.get("request")) and _has_body(row.get("response"))


def _is_rft(row: Row) -> bool:
    messages = _messages(row, "messages")
    return bool(messages) and messages[-1].get("role") != "assistant" and any(row.get(name) not in (None, "") for name in REFERENCES)


_BESIDE = ("id", "group", "source", "conversation_id", "session_id", "thread_id", "uuid", "created_at", "timestamp", "metadata")
_ASKED = ("tools", "functions", "tool_choice", "parallel_tool_calls", "response_format", "function_call", "model", "temperature")


def _fields(*names: str) -> frozenset[str]:
    return frozenset((*names, *_BESIDE, *_ASKED, *_TIMES))


FORMS = (
    Form("Langfuse observations", is_observation, _observation),
    Form("Langfuse dataset items", is_item, _dataset_item),
    Form("batch output", lambda row: "custom_id" in row and ("response" in row or "result" in row), _batch),
    Form("requests with their responses", _is_pair, _pair),
    Form("stored completions", lambda row: isinstance(decoded(row.get("choices")), list) and bool(
        _messages(row, "messages") or _messages(row, "input")), _stored),
    Form("OpenAI preference rows", lambda row: isinstance(decoded(row.get("input")), dict) and bool(
        _messages(row, "preferred_output")), _preference, _fields("input", "preferred_output", "non_preferred_output")),
    Form("reinforcement fine-tuning rows", _is_rft, _chat, _fields("messages", *REFERENCES)),
    Form("Anthropic messages", _is_anthropic, _chat, _fields("messages", "system", "max_tokens")),
    Form("OpenAI chat rows", lambda row: bool(_messages(row, "messages")), _chat, _fields("messages")),
    Form("TRL preference rows", lambda row: bool(_messages(row, "prompt") and _messages(row, "chosen")), _prompt_lists,
         _fields("prompt", "chosen", "rejected")),
    Form("TRL prompt and completion", lambda row: bool(_messages(row, "prompt") and _messages(row, "completion")), _prompt_lists,
         _fields("prompt", "completion")),
    Form("Hermes", _is_hermes, _sharegpt, _fields("conversations", "conversation", "system", "category", "subcategory", "task")),
    Form("ShareGPT", _is_sharegpt, _sharegpt, _fields("conversations", "conversation", "system")),
    Form("tau-bench trajectories", lambda row: bool(_messages(row, "traj")), _trajectory,
         _fields("traj", "task_id", "trial", "reward", "info")),
    Form("Alpaca", lambda row: isinstance(row.get("instruction"), str) and "output" in row, _alpaca,
         _fields("instruction", "input", "output", "system", "history")),
    Form("inputs and outputs", lambda row: row.get("input") is not None and row.get("output") is not None, _observation),
    Form("Azure evaluation rows", lambda row: "query" in row and "answers" not in row and ("ground_truth" in row or "response" in row),
         _azure_evaluation, _fields("query", "response", "ground_truth", "tool_definitions", "tool_calls")),
)  # fmt: skip
