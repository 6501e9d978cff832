"""Rows of other formats: each importer yields one `Row` or one `Dropped` (with its reason) for every row that it reads.

A file that cannot be read, or is not of its format, is the user's to mend and stops the run with its line; the known faults of
public data (several answers, gold that breaks its own schema, ...) are `Dropped` and counted.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from referencing.exceptions import Unresolvable

from slm_swap.common.errors import UserError
from slm_swap.common.exact_json import EXACT, ExactEncoder
from slm_swap.common.settings import display_path
from slm_swap.rows.examples import Example, parse_example
from slm_swap.rows.json_schema import call_violations, violations
from slm_swap.rows.lines import dump_json, read_jsonl, text_hash
from slm_swap.rows.schema_parts import item_schema, property_schema
from slm_swap.rows.toolschema import bfcl_tool, xlam_tool
from slm_swap.scoring.tracks import TRACKS


@dataclass(frozen=True)
class Row:
    """One source row that can be built: a request, the tools on offer and the one call that answers it.

    `accept` is as in `Example`. A team's own row has its `example` already, and `tool` is None where it does not say.
    """

    id: str
    where: str
    request: str
    source: str
    tools: list[dict]
    tool: str | None
    arguments: dict[str, Any]
    accept: dict[str, list] | None = None
    example: Example | None = None

    @property
    def names(self) -> set[str]:
        """The tools that the row shows: its gold tool and all on offer."""
        return {tool["name"] for tool in self.tools} | ({self.tool} if self.tool else set())


@dataclass(frozen=True)
class Dropped:
    """A source row left out: `reason` is counted, `why` says it of this row."""

    id: str
    where: str
    reason: str
    why: str = ""


# -- Files -----------------------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield ("file:line" or "file: row N", object) for each row of a .jsonl, .json (a list, or lines all the same) or .parquet.

    Raises:
        UserError: the file is missing or unreadable, a row is not an object, or there is no row.
    """
    found = False
    reader = _read_parquet if path.suffix == ".parquet" else _read_list if _is_list(path) else read_jsonl
    for where, row in reader(path):
        if not isinstance(row, dict):
            raise UserError(f"{where}: a row is a JSON object, this is {type(row).__name__}: mend or drop it")
        found = True
        yield where, row
    if not found:
        raise UserError(f"{display_path(path)} has no rows: check that it is the right file")


def _is_list(path: Path) -> bool:
    try:
        with open(path, "rb") as stream:
            return stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
    except OSError as error:
        raise UserError(f"cannot read {display_path(path)} ({error.strerror}): check the path") from None


def _read_list(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"), **EXACT)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{display_path(path)}: not JSON ({error}): one list of objects, or one object a line") from None
    for number, row in enumerate(rows, 1):
        yield f"{display_path(path)}: row {number}", row


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"reading {display_path(path)} needs pyarrow: pip install pyarrow") from None
    try:
        batches = [batch.to_pylist() for batch in ParquetFile(path).iter_batches()]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {display_path(path)} ({error}): is it a Parquet file?") from None
    for number, row in enumerate((row for batch in batches for row in batch), 1):
        yield f"{display_path(path)}: row {number}", row


def _row_id(row: dict, where: str) -> str:
    """The row's `id`, or its hash where it has none."""
    value = row.get("id")
    if value is None:
        return text_hash(json.dumps(row, sort_keys=True, default=str))[:16]
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise UserError(f"{where}: `id` must be a text or a whole number, not {type(value).__name__}: mend or drop it")
    return str(value)


def _list(row: dict, name: str, where: str) -> list:
    """A field that holds a list of objects, as JSON in a string or as it is."""
    value = row.get(name)
    if isinstance(value, str):
        try:
            value = json.loads(value, **EXACT)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: `{name}` is not JSON ({error}): mend or drop that row") from None
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise UserError(f"{where}: `{name}` must be a list of objects: mend or drop that row (is --source right?)")
    return value


# -- xLAM-60k --------------------------------------------------------------------------------------------------------------------


def xlam(paths: Iterable[Path]) -> Iterator[Row | Dropped]:
    """Rows of xLAM-60k: `{"id", "query", "answers", "tools"}`, the last two lists or JSON in strings.

    Drops `several_answers`, `no_answer` and what `_checked` drops.

    Raises:
        UserError: a row without `query`, or `answers` or `tools` are not lists of objects; the line is named.
    """
    for path in paths:
        for where, row in read_rows(path):
            name, query = _row_id(row, where), row.get("query")
            if not isinstance(query, str) or not query.strip():
                raise UserError(f"{where}: no `query`: every row of --source xlam has `query`, `answers` and `tools`")
            answers, tools = _list(row, "answers", where), _list(row, "tools", where)
            if len(answers) != 1:
                yield Dropped(name, where, "several_answers" if answers else "no_answer", f"{len(answers)} answers")
                continue
            try:
                converted = [_xlam_tool(json.dumps(tool, cls=ExactEncoder)) for tool in tools]
            except (ValueError, RecursionError) as error:
                yield Dropped(name, where, "schema_fault", str(error))
                continue
            call = answers[0]
            yield _checked(Row(name, where, query, f"xlam:{name}", converted, call.get("name"), call.get("arguments")))


@cache
def _xlam_tool(text: str) -> dict:
    """One dict for each different tool: 60,000 rows share a few thousand."""
    return xlam_tool(json.loads(text, **EXACT))


# -- BFCL ------------------------------------------------------------------------------------------------------------------------


def bfcl(paths: Iterable[Path], answers: Iterable[Path]) -> Iterator[Row | Dropped]:
    """Rows of the Berkeley leaderboard with the gold that lies in files of its own.

    The request is the messages of the one turn (a system message and the user's), the gold call takes the first acceptable value
    of each argument that fits the schema. Drops `several_turns`, `several_answers`, `no_answer` and what `_checked` drops.

    Raises:
        UserError: a row or an answer is not of the format; the line is named.
    """
    gold = _bfcl_answers(answers)
    for path in paths:
        for where, row in read_rows(path):
            name, request = _row_id(row, where), _bfcl_request(row, where)
            functions = _list(row, "function", where)
            calls = gold.get(name, [])
            if request is None or len(calls) != 1:
                reason = "several_turns" if request is None else "several_answers" if calls else "no_answer"
                yield Dropped(name, where, reason, f"{len(calls)} answers")
                continue
            [(tool, acceptable)] = calls[0].items()
            try:
                tools = [bfcl_tool(tool) for tool in functions]
                schema = next((listed["parameters"] for listed in tools if listed["name"] == tool), {})
                accept = {key: _options(values, property_schema(schema, key)) for key, values in acceptable.items()}
                arguments = _choose_all(accept, schema, schema)
            except (ValueError, RecursionError, Unresolvable) as error:
                yield Dropped(name, where, "schema_fault", str(error))
                continue
            yield _checked(Row(name, where, request, f"bfcl:{name}", tools, tool, arguments, accept))


def _bfcl_request(row: dict, where: str) -> str | None:
    """The messages of a row's one turn; None where there are several turns."""
    turns = row.get("question")
    try:
        texts = [[message["content"] for message in turn] for turn in turns]
        joined = ["\n\n".join(text.strip() for text in turn if text.strip()) for turn in texts]
    except (TypeError, KeyError, AttributeError):
        joined = []
    if not joined or not all(joined):
        raise UserError(
            f"{where}: no `question`: every row of --source bfcl has `question`, [[{{role, content}}, ...]], and `function`"
        )
    return joined[0] if len(joined) == 1 else None


def _bfcl_answers(paths: Iterable[Path]) -> dict[str, list[dict[str, dict]]]:
    """id -> the calls of `ground_truth`, each `{function: {argument: [acceptable values]}}`."""
    gold: dict[str, list] = {}
    for path in paths:
        for where, row in read_rows(path):
            name, calls = _row_id(row, where), _list(row, "ground_truth", where)
            values = [arguments for call in calls for arguments in call.values()]
            if any(len(call) != 1 for call in calls) or not all(
                isinstance(arguments, dict) and all(isinstance(options, list) for options in arguments.values())
                for arguments in values
            ):
                raise UserError(
                    f"{where}: `ground_truth` must be [{{function: {{argument: [acceptable values]}}}}]: mend that line"
                )
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
        may_leave = key not in required and "" in options
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


# -- A team's own rows -----------------------------------------------------------------------------------------------------------


def jsonl(paths: Iterable[Path], track: str) -> Iterator[Row | Dropped]:
    """A team's own rows of one track, `{prompt, completion}` and the optional fields of `Example`, kept as they are.

    Raises:
        UserError: a row is not an Example, or its completion is not a reply of the track; the line is named.
    """
    for path in paths:
        for where, row in read_rows(path):
            example = parse_example(row, where)
            parsed = TRACKS[track].reference(example).parsed
            tool = parsed.name or parsed.value.get("tool_name")
            listed = [offer for offer in example.tools or [] if isinstance(offer, dict) and isinstance(offer.get("name"), str)]
            yield Row(
                id=example.id,
                where=where,
                request=example.request or example.prompt,
                source=example.source or where,
                tools=listed,
                tool=tool if isinstance(tool, str) else None,
                arguments={},
                example=example,
            )


# -- Gold ------------------------------------------------------------------------------------------------------------------------


def _checked(row: Row) -> Row | Dropped:
    """The row, its tools listed once and its arguments in the schema's order; or why it cannot be learned from.

    Drops `schema_fault` (two different tools of one name), `tool_not_listed`, `gold_breaks_schema` and `empty_required_argument`
    (a required text that is empty: the gold does not know it either).
    """

    def dropped(reason: str, why: str) -> Dropped:
        return Dropped(row.id, row.where, reason, why)

    tools = {tool["name"]: tool for tool in row.tools}
    if any(tools[tool["name"]] != tool for tool in row.tools):
        return dropped("schema_fault", "two different tools of one name")
    tool = tools.get(row.tool) if isinstance(row.tool, str) else None
    if tool is None:
        return dropped("tool_not_listed", f"{row.tool} is not among {', '.join(tools) or 'no tools'}")
    try:
        broken = call_violations(row.arguments, tool)
    except (RecursionError, Unresolvable) as error:
        return dropped("schema_fault", f"a $ref that cannot be followed: {error}")
    if not broken:
        try:
            dump_json([row.arguments, row.accept])
        except ValueError as error:
            broken = [f"arguments: {error}"]
    if broken:
        return dropped("gold_breaks_schema", "; ".join(broken))
    parameters = tool["parameters"]
    empty = [key for key in parameters["required"] if row.arguments[key] == ""]
    if empty and not row.accept:
        return dropped("empty_required_argument", ", ".join(empty))
    ordered = {key: row.arguments[key] for key in [*parameters["properties"], *row.arguments] if key in row.arguments}
    return Row(row.id, row.where, row.request, row.source, list(tools.values()), row.tool, ordered, row.accept)
