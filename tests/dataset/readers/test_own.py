"""A team's own rows: kept as they are, checked like all others."""

import json

import pytest

from slm_swap.common.errors import UserError
from slm_swap.dataset.readers.own import jsonl
from slm_swap.dataset.readers.sources import Seen
from slm_swap.dataset.row import Dropped, Row
from slm_swap.rows.examples import parse_example

PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": []}
TOOL = {"name": "f", "description": "", "parameters": PARAMETERS}
CALL = '<tool_call name="f">{"a":1}</tool_call>'
ASKED = {"messages": [{"role": "user", "content": "Please do it now"}], "tools": [TOOL]}


def read(tmp_path, track, *rows, seen=None):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return list(jsonl([path], track, seen))


def test_jsonl_keeps_the_row(tmp_path):
    row = {"id": "r1", "prompt": "p", "completion": CALL, "tools": [TOOL, TOOL | {"name": "g"}], "source": "log:1"}
    [made] = read(tmp_path, "toolcall", row)
    assert made.example.to_json() == row
    assert (made.request, made.tool, made.names, made.source) == ("p", "f", {"f", "g"}, "log:1")


@pytest.mark.parametrize("tool", [{"type": "function", "function": TOOL}, {"name": "f", "description": "", "input_schema": PARAMETERS}])
def test_tools_of_other_forms_are_kept_in_one(tmp_path, tool):
    [made] = read(tmp_path, "toolcall", {"prompt": "p", "completion": CALL, "tools": [tool]})
    assert made.example.tools == [TOOL]


@pytest.mark.parametrize(
    ("track", "row", "reason", "why"),
    [
        ("toolcall", {"completion": '{"a": 1}'}, "bad_completion", "not a toolcall reply (wrong_shape"),
        ("toolcall", {"completion": '<tool_call name="f">[1]</tool_call>'}, "bad_completion", "wrong_shape"),
        ("toolcall", {"completion": '<tool_call>{"name": "f"}</tool_call>'}, "bad_completion", '<tool_call name="X">'),
        ("toolcall", {"completion": CALL + CALL}, "several_calls", "write the row as `messages`, `tools` and `calls`"),
        ("toolcall", {"completion": "Which one?"}, "no_call", "`calls`: [] where no call is due"),
        ("structured", {"completion": '{"a": 1} and more'}, "bad_completion", "extra_text"),
        ("structured", {"completion": '{"a": NaN}'}, "bad_completion", "not a structured reply"),
        ("structured", {"completion": ""}, "bad_row", "`completion` is not a text with something in it"),
        ("structured", {}, "bad_row", "no `completion`"),
        ("structured", {"completion": '{"a": "x"}', "schema": PARAMETERS}, "gold_breaks_schema", "a: 'x' is not of type"),
        ("toolcall", {"completion": CALL, "tools": [TOOL | {"name": "g"}]}, "tool_not_listed", "f is not among g"),
        ("toolcall", {"completion": CALL.replace("1", '"x"'), "tools": [TOOL]}, "gold_breaks_schema", "arguments.a"),
        ("toolcall", {"completion": CALL, "tools": ["f"]}, "schema_fault", "names alone"),
        ("toolcall", {"completion": CALL, "tools": [TOOL], "accept": {"b": [1]}}, "accept_unknown", "'b', which f does not have"),
        ("structured", {"completion": '{"a": {"b": 1}}', "accept": {"a.b": [2]}}, "accept_unknown", "'a.b'"),
        ("structured", {"completion": "{}", "accept": {"a": 1}}, "bad_row", "`accept` has no list"),
    ],
)
def test_a_faulty_row_is_counted(tmp_path, track, row, reason, why):
    good = {"prompt": "p", "completion": CALL if track == "toolcall" else "{}"}
    first, dropped = read(tmp_path, track, good, {"prompt": "p"} | row)
    assert isinstance(first, Row) and isinstance(dropped, Dropped)
    assert dropped.reason == reason and why in dropped.why


def test_unknown_fields_are_named(tmp_path):
    seen = Seen()
    read(tmp_path, "toolcall", {"prompt": "p", "completion": CALL, "acept": {}, "system": "x"}, ASKED | {"calls": [], "Tools": 1}, seen=seen)
    assert seen.unknown == {"acept": 1, "system": 1, "Tools": 1}


def test_a_float_is_an_id(tmp_path):
    [made] = read(tmp_path, "toolcall", {"id": 1.5, "prompt": "p", "completion": CALL})
    assert made.id == "1.5"


def test_a_row_needs_its_track(tmp_path):
    with pytest.raises(UserError, match="--source jsonl needs --track"):
        read(tmp_path, None, {"prompt": "p", "completion": CALL})


@pytest.mark.parametrize(
    "wanted",
    [
        {"calls": [{"name": "f", "arguments": {"a": 1}}]},
        {"calls": [{"name": "f", "arguments": {"a": 1}}, {"name": "f", "arguments": {}}], "accept": [{"a": [1, 2]}, {}]},
        {"calls": [], "content": "No."},
        {"object": [1, 2]},
        {"object": {"a": 1}, "schema": PARAMETERS},
    ],
)
def test_a_conversation(tmp_path, wanted):
    row = {"id": "c1", "group": "g"} | ASKED | wanted
    [made] = read(tmp_path, None, row)
    assert made.record == row | {"source": "rows.jsonl:1"}
    assert made.track == ("toolcall" if "calls" in wanted else "structured") and made.group == "g"
    assert parse_example(made.record, made.where).messages == ASKED["messages"]


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ({"calls": [], "object": 1}, "bad_row"),
        ({"calls": [{"name": "g", "arguments": {}}]}, "tool_not_listed"),
        ({"calls": [{"name": "f", "arguments": {"a": "x"}}]}, "gold_breaks_schema"),
        ({"calls": [{"name": "f", "arguments": {}}], "accept": {"b": [1]}}, "accept_unknown"),
        ({"calls": [], "accept": [{}]}, "accept_unknown"),
        ({"object": {"a": "x"}, "schema": PARAMETERS}, "gold_breaks_schema"),
        ({"calls": [], "messages": [{"role": "system", "content": "x"}]}, "no_request"),
    ],
)
def test_a_faulty_conversation_is_counted(tmp_path, wanted, reason):
    [dropped] = read(tmp_path, None, ASKED | wanted)
    assert dropped.reason == reason


def test_a_conversation_of_the_other_track(tmp_path):
    [dropped] = read(tmp_path, "structured", ASKED | {"calls": []})
    assert dropped.reason == "other_track"
