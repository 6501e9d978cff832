"""A team's own rows: `{"prompt", "completion"}` of one track, or conversations (`messages` and `calls` or `object`)."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from slm_swap.common.errors import UserError
from slm_swap.dataset.readers.checks import check_accept, check_calls, check_value
from slm_swap.dataset.readers.conversations import calls_of, near_text, short
from slm_swap.dataset.readers.messages import decoded, read_turns
from slm_swap.dataset.readers.sources import Seen, read_source, row_id
from slm_swap.dataset.readers.wrappers import read_reply
from slm_swap.dataset.row import Dropped, Row, Unusable
from slm_swap.rows.examples import Example, parse_example
from slm_swap.rows.lines import dump_json
from slm_swap.rows.toolschema import json_schema_of, openai_tool
from slm_swap.scoring.replies import InvalidReply
from slm_swap.scoring.tracks import TRACKS

FIELDS = ("id", "tools", "schema", "accept", "group", "source", "request")
ADVICE = "write the row as `messages`, `tools` and `calls`"
_TIMES = ("time", "created_at", "startTime", "timestamp")


def jsonl(paths: Iterable[Path], track: str | None, seen: Seen | None = None) -> Iterator[Row | Dropped]:
    """A team's own rows, kept as they are except for the form of their tools.

    Raises:
        UserError: as `read_source`; or no track is named for rows that do not say theirs.
    """
    seen = seen or Seen()

    def read(row: dict, where: str) -> Iterator[Row | Dropped]:
        row = row | {name: decoded(row[name]) for name in ("accept", "options", "calls") if name in row}  # JSON in a cell
        if is_conversation(row):
            made = own_row(row, where, seen)
            if track and made.track != track:
                raise Unusable("other_track", str(made.track))
            yield made
            return
        if "completion" not in row or "prompt" not in row:
            missing = "prompt" if "prompt" not in row else "completion"
            raise Unusable("bad_row", f"no `{missing}`: every row needs `prompt` and `completion`, or `messages` and `calls` or `object`")
        if isinstance(row["prompt"], list):
            raise Unusable("bad_row", "`prompt` is a list of messages")
        if track is None:
            raise UserError("--source jsonl needs --track, the one track that rows of `prompt` and `completion` are for")
        yield _text_row(row, where, track, seen)

    return read_source(paths, "jsonl", read)


def _tools(row: dict) -> list[dict] | None:
    """The row's tools in the kept form; those that have it already stay as they are."""
    given = decoded(row.get("tools"))
    if given is None:
        return None
    if not isinstance(given, list):
        raise Unusable("schema_fault", "`tools` is no list")
    if any(isinstance(tool, str) for tool in given):
        raise Unusable("schema_fault", 'tools are names alone: write {"name", "description", "parameters": JSON Schema}')
    try:
        tools = [openai_tool(tool) for tool in given]
    except (ValueError, RecursionError) as error:
        raise Unusable("schema_fault", str(error)) from None
    named = {tool["name"]: tool for tool in tools}
    if any(named[tool["name"]] != tool for tool in tools):
        raise Unusable("schema_fault", "two different tools of one name")
    return [old if old == new else new for old, new in zip(given, tools, strict=True)]


def _schema(row: dict) -> dict | None:
    given = decoded(row.get("schema"))
    if given is None:
        return None
    try:
        made = json_schema_of(given, "`schema`")
    except (ValueError, RecursionError) as error:
        raise Unusable("schema_fault", str(error)) from None
    return given if made == given else made


def _known(row: dict, fields: Iterable[str], seen: Seen) -> None:
    known = {*fields, *FIELDS, *_TIMES}
    seen.unknown.update(name for name in row if name not in known)


def _time(row: dict) -> str | None:
    return next((str(row[name]) for name in _TIMES if row.get(name) not in (None, "")), None)


# -- prompt and completion -------------------------------------------------------------------------------------------------------


def _text_row(row: dict, where: str, track: str, seen: Seen) -> Row:
    given, time = row, _time(row)
    if isinstance(row.get("id"), float):
        row = row | {"id": str(row["id"])}
    if track == "structured" and isinstance(row["completion"], (dict, list)):
        row = row | {"completion": dump_json(row["completion"])}
    tools, schema = _tools(row), _schema(row)
    row = {key: value for key, value in row.items() if key not in ("tools", "schema")}
    row |= {name: value for name, value in (("tools", tools), ("schema", schema)) if value is not None}
    try:
        example = parse_example(row, where)
    except UserError as error:
        raise Unusable("bad_row", str(error).removeprefix(f"{where}: ")) from None
    except ValueError as error:
        raise Unusable("unusable", str(error)) from None
    parsed = _parsed(example, track)
    calls = [{"name": parsed.name, "arguments": parsed.value}] if parsed.name is not None else []
    if calls:
        check_calls(calls, tools)
        check_accept(example.accept, calls, tools)
    elif schema is not None:
        check_value(parsed.value, schema)
    if not calls:
        _check_keys(example.accept, parsed.value)
    _known(given, ("prompt", "completion"), seen)
    named = parsed.name or (parsed.value.get("tool_name") if isinstance(parsed.value, dict) else None)
    return Row(
        id=example.id,
        where=where,
        request=example.request or example.prompt,
        source=example.source or where,
        tools=tools or [],
        tool=named if isinstance(named, str) else None,
        arguments={},
        example=example,
        group=example.group,
        time=time,
        track=track,
    )


def _parsed(example: Example, track: str) -> Any:
    try:
        return TRACKS[track].parse_reference(example.completion)
    except InvalidReply as invalid:
        text, why = example.completion, f"not a {track} reply ({invalid.error}: {invalid})"
    if track == "toolcall" and text.count("<tool_call") > 1:
        raise Unusable("several_calls", f"the completion has several calls: {ADVICE}")
    if track == "toolcall" and "<tool_call" in text:
        raise Unusable("bad_completion", f'{why}: a call is <tool_call name="X">{{...}}</tool_call>; or {ADVICE}')
    if track == "toolcall" and text.lstrip()[:1] not in ("{", "[", "<"):
        raise Unusable("no_call", f"the completion is a text: {ADVICE} (`calls`: [] where no call is due)")
    raise Unusable("bad_completion", f"{why}" + (f": {ADVICE}" if track == "toolcall" else ""))


def _check_keys(accept: Any, value: Any) -> None:
    """`accept` of a JSON object names its keys; of `{"tool_name", "arguments"}` those of the arguments."""
    inner = value.get("arguments") if isinstance(value, dict) and "tool_name" in value else value
    for key, options in (accept or {}).items() if isinstance(accept, dict) else ():
        if not (isinstance(inner, dict) and key in inner) and "" not in options:
            raise Unusable("accept_unknown", f"`accept` names {key!r}, which is no key of the completion")


# -- Conversations ---------------------------------------------------------------------------------------------------------------


def is_conversation(row: dict) -> bool:
    """Whether a row is a conversation in this program's own form."""
    return isinstance(decoded(row.get("messages")), list) and ("calls" in row or ("object" in row and "choices" not in row))


def own_row(row: dict, where: str, seen: Seen) -> Row:
    """A row of this program's own conversation form, checked.

    Raises:
        Unusable: it is faulty.
    """
    if ("calls" in row) == ("object" in row):
        raise Unusable("bad_row", "a row has either `calls` or `object`, not both")
    messages = [turn.message for turn in read_turns(decoded(row["messages"]))]
    if not any(message["role"] == "user" and message["content"].strip() for message in messages):
        raise Unusable("no_request", "no user message")
    name, tools, schema = row_id(row), _tools(row), _schema(row)
    record: dict[str, Any] = {"id": name, "messages": messages} | ({"tools": tools} if tools else {})
    if "calls" in row:
        given = decoded(row["calls"])
        if not isinstance(given, list):
            raise Unusable("bad_row", "`calls` is no list")
        record["calls"] = calls_of(read_reply({"role": "assistant", "tool_calls": given})) if given else []
        check_calls(record["calls"], tools)
        check_accept(row.get("accept"), record["calls"], tools)
    else:
        record["object"] = row["object"]
        if schema is not None:
            check_value(row["object"], schema)
        _check_keys(row.get("accept"), row["object"])
    record |= {"schema": schema} if schema is not None else {}
    record |= {key: row[key] for key in ("content", "accept", "options", "group", "request", "source") if row.get(key) is not None}
    _known(row, ("messages", "calls", "object", "content", "options"), seen)
    try:
        dump_json(record).encode()
        parse_example(record, where)
    except UserError as error:
        raise Unusable("bad_row", str(error).removeprefix(f"{where}: ")) from None
    except ValueError as error:
        raise Unusable("unusable", str(error)[:120]) from None
    calls = record.get("calls") or []
    made = Row(
        id=name,
        where=where,
        request=str(row.get("request") or near_text(messages)),
        source=where,
        tools=tools or [],
        tool=calls[0]["name"] if len(calls) == 1 else None,
        arguments={},
        record=record,
        track="toolcall" if "calls" in record else "structured",
        group=str(row["group"]) if row.get("group") else None,
        time=_time(row),
    )
    return made if "source" in record else replace(made, record=record | {"source": short(where)})
