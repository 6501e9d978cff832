"""Rows of public data: xLAM-60k and the Berkeley leaderboard (BFCL), one `Row` or one `Dropped` (with its reason) for every row.

A file that cannot be read, or is of another form, stops the run with its line; the known faults of public data (gold that breaks its
own schema, types that nobody knows, ...) are `Dropped` and counted.
"""

import json
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from referencing.exceptions import Unresolvable

from slm_swap.common.errors import UserError
from slm_swap.common.exact_json import EXACT, ExactEncoder
from slm_swap.dataset.readers.checks import check_calls
from slm_swap.dataset.readers.files import Bad, read_rows
from slm_swap.dataset.readers.sources import Seen, read_source, row_id
from slm_swap.dataset.row import Dropped, Row, Unusable
from slm_swap.rows.json_schema import violations
from slm_swap.rows.lines import dump_json
from slm_swap.rows.schema_parts import item_schema, property_schema
from slm_swap.rows.toolschema import bfcl_tool, lost_defaults, xlam_tool

__all__ = ["Dropped", "Row", "bfcl", "xlam"]


def _list(row: dict, name: str) -> list:
    """A field that holds a list of objects, as JSON in a string or as it is."""
    value = row.get(name)
    if isinstance(value, str):
        try:
            value = json.loads(value, **EXACT)
        except (ValueError, RecursionError) as error:
            raise Unusable("bad_row", f"`{name}` is not JSON ({error})") from None
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise Unusable("bad_row", f"`{name}` must be a list of objects")
    return value


# -- xLAM-60k --------------------------------------------------------------------------------------------------------------------


def xlam(paths: Iterable[Path]) -> Iterator[Row | Dropped]:
    """Rows of xLAM-60k: `{"id", "query", "answers", "tools"}`, the last two lists or JSON in strings.

    Several answers are several calls, no answer is "no call is due". Drops `bad_row`, `schema_fault` and what `_checked` drops.

    Raises:
        UserError: as `read_source`.
    """
    return read_source(paths, "xlam", _xlam_row)


def _xlam_row(row: dict, where: str) -> Iterator[Row]:
    name, query = row_id(row), row.get("query")
    if not isinstance(query, str) or not query.strip():
        raise Unusable("bad_row", "no `query`: every row of --source xlam has `query`, `answers` and `tools`")
    answers, tools = _list(row, "answers"), _list(row, "tools")
    try:
        converted = [_xlam_tool(json.dumps(tool, cls=ExactEncoder)) for tool in tools]
    except (ValueError, RecursionError) as error:
        raise Unusable("schema_fault", str(error)) from None
    calls = [{"name": call.get("name"), "arguments": call.get("arguments")} for call in answers]
    yield _checked(name, where, query, f"xlam:{name}", converted, calls, [{"role": "user", "content": query}])


@cache
def _xlam_tool(text: str) -> dict:
    """One dict for each different tool: 60,000 rows share a few thousand."""
    return xlam_tool(json.loads(text, **EXACT))


# -- BFCL ------------------------------------------------------------------------------------------------------------------------


def bfcl(paths: Iterable[Path], answers: Iterable[Path] = (), seen: Seen | None = None) -> Iterator[Row | Dropped]:
    """Rows of the Berkeley leaderboard with the gold that lies in files of its own.

    The request is the messages of the one turn (a system message and the user's), a gold call takes the first acceptable value of each
    argument that fits the schema. Rows of the irrelevance files have no gold: no call is due. Those of the relevance files have none
    either: some call is due, nobody says which (`no_answer`). Also drops `several_turns`, `bad_row`, `schema_fault` and what
    `_checked` drops.

    Raises:
        UserError: as `read_source`; or a file of answers is not of the format, its line is named.
    """
    gold, notes = _bfcl_answers(answers), seen or Seen()
    return read_source(paths, "bfcl", lambda row, where: _bfcl_row(row, where, gold, notes))


def _bfcl_row(row: dict, where: str, gold: dict[str, list], seen: Seen) -> Iterator[Row]:
    name, turns = row_id(row), row.get("question")
    if isinstance(turns, list) and len(turns) > 1:
        raise Unusable("several_turns", f"{len(turns)} turns")
    messages, functions = _bfcl_messages(turns), _list(row, "function")
    none_due = "irrelevance" in name.lower()
    if name not in gold and not none_due:
        raise Unusable("no_answer", "some call is due, nobody says which" if "relevance" in name.lower() else "no gold for this id")
    try:
        tools = [_bfcl_tool(tool, seen) for tool in functions]
        named = {tool["name"]: tool["parameters"] for tool in tools}
        calls, accept = [], []
        for call in gold.get(name, []):
            [(tool, acceptable)] = call.items()
            schema = named.get(tool, {})
            accept.append({key: _options(values, property_schema(schema, key)) for key, values in acceptable.items()})
            calls.append({"name": tool, "arguments": _choose_all(accept[-1], schema, schema)})
    except (ValueError, RecursionError, Unresolvable) as error:
        raise Unusable("schema_fault", str(error)) from None
    if not calls and not none_due:
        raise Unusable("no_answer", "its gold is an empty list")
    request = "\n\n".join(message["content"].strip() for message in messages)
    yield _checked(name, where, request, f"bfcl:{name}", tools, calls, messages, accept)


def _bfcl_tool(tool: dict, seen: Seen) -> dict:
    converted = bfcl_tool(tool)
    lost = lost_defaults(tool, converted)
    if lost:
        seen.notes["defaults left out: they do not fit their own type"] += lost
    return converted


def _bfcl_messages(turns: Any) -> list[dict]:
    """The messages of a row's one turn."""
    try:
        [turn] = turns
        messages = [{"role": message["role"], "content": message["content"]} for message in turn]
        if any(message["content"].strip() and message["role"] in ("user", "system", "assistant") for message in messages):
            return [message for message in messages if message["content"].strip()]
    except (TypeError, KeyError, AttributeError, ValueError):
        pass
    raise Unusable("bad_row", "no `question`: every row of --source bfcl has `question`, [[{role, content}, ...]], and `function`")


def _bfcl_answers(paths: Iterable[Path]) -> dict[str, list[dict[str, dict]]]:
    """id -> the calls of `ground_truth`, each `{function: {argument: [acceptable values]}}`.

    Raises:
        UserError: a line is none, or an id stands twice. Gold in another form (multi_turn's) stands for rows that are dropped anyway.
    """
    gold: dict[str, list] = {}
    for path in paths:
        for where, row in read_rows(path):
            try:
                if isinstance(row, Bad):
                    raise Unusable("bad_line", row.why)
                name = row_id(row)
                calls = [] if "multi_turn" in name else _list(row, "ground_truth")
            except Unusable as reason:
                raise UserError(f"{where}: {reason.why}: mend that line of --answers") from None
            values = [arguments for call in calls for arguments in call.values()]
            if any(len(call) != 1 for call in calls) or not all(
                isinstance(arguments, dict) and all(isinstance(options, list) for options in arguments.values())
                for arguments in values
            ):
                raise UserError(f"{where}: `ground_truth` must be [{{function: {{argument: [acceptable values]}}}}]: mend that line")
            if name in gold:
                raise UserError(f"{where}: a second answer for id {name!r}: ids must be unique")
            gold[name] = calls
    return gold


def _options(values: list, schema: Any) -> list:
    """The acceptable values; an empty list beside an array means the empty array (else nothing would be acceptable)."""
    return values or ([[]] if isinstance(schema, dict) and schema.get("type") == "array" else [])


def _choose_all(acceptable: dict[str, Any], schema: Any, root: dict) -> dict[str, Any]:
    """The first acceptable value of every argument; those that may be left out and say so first are left out. `root` is the
    whole schema, of which `schema` is a part."""
    required = schema.get("required", []) if isinstance(schema, dict) else []
    chosen = {}
    for key, options in acceptable.items():
        part = property_schema(schema, key, root)
        if not isinstance(options, list):  # a value where a list of acceptable values should be: it is the value
            chosen[key] = options
            continue
        may_leave = key not in required and ("" in options or None in options)
        values = [_value(option, part, root) for option in options if option != ""]
        fitting = [value for value in values if not isinstance(part, dict) or not violations(value, part, root=root)]
        if may_leave and (options[0] == "" or not fitting):
            continue
        if options:
            chosen[key] = (fitting or values or options)[0]
    return chosen


def _value(option: Any, schema: Any, root: dict) -> Any:
    """One acceptable value: the leaves of its objects are lists of acceptable values again."""
    if isinstance(option, dict):
        return _choose_all(option, schema, root)
    if isinstance(option, list):
        return [_value(child, item_schema(schema, at, root), root) for at, child in enumerate(option)]
    return option


# -- Gold ------------------------------------------------------------------------------------------------------------------------


def _checked(
    name: str, where: str, request: str, source: str, tools: list[dict], calls: list[dict], messages: list[dict], accept: list | None = None
) -> Row:
    """The row, its tools listed once and its arguments in the schema's order.

    Raises:
        Unusable: why it cannot be learned from: `schema_fault` (two different tools of one name, a `$ref` that leads nowhere),
            `tool_not_listed`, `gold_breaks_schema` and `empty_required_argument` (a required text that is empty: the gold does not
            know it either).
    """
    named = {tool["name"]: tool for tool in tools}
    if any(named[tool["name"]] != tool for tool in tools):
        raise Unusable("schema_fault", "two different tools of one name")
    if not named and calls:
        raise Unusable("tool_not_listed", f"{calls[0]['name']} is not among no tools")
    if not all(isinstance(call["name"], str) for call in calls):
        raise Unusable("tool_not_listed", f"{calls[0]['name']} is not among {', '.join(named)}")
    check_calls(calls, list(named.values()))
    try:
        dump_json([calls, accept])
    except ValueError as error:
        raise Unusable("gold_breaks_schema", f"arguments: {error}") from None
    ordered = []
    for call in calls:
        parameters, arguments = named[call["name"]]["parameters"], call["arguments"]
        empty = [key for key in parameters["required"] if arguments[key] == ""]
        if empty and not accept:
            raise Unusable("empty_required_argument", ", ".join(empty))
        keys = [key for key in [*parameters["properties"], *arguments] if key in arguments]
        ordered.append({"name": call["name"], "arguments": {key: arguments[key] for key in keys}})
    tools, shared = list(named.values()), {"messages": messages}
    if len(ordered) == 1:
        accepted = accept[0] if accept else None
        return Row(name, where, request, source, tools, ordered[0]["name"], ordered[0]["arguments"], accepted, **shared)
    return Row(name, where, request, source, tools, None, {}, accept or None, calls=ordered, **shared)
