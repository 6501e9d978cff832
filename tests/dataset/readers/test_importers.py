"""Importers: every drop reason, every bad row, and what a good row becomes."""

import json
from decimal import Decimal

import pytest

from slm_swap.common.errors import UserError
from slm_swap.common.exact_json import exact
from slm_swap.common.reports import write_jsonl
from slm_swap.dataset.build import make_conversation, make_example
from slm_swap.dataset.readers.files import Bad, read_rows
from slm_swap.dataset.readers.importers import bfcl, xlam
from slm_swap.dataset.row import Dropped, Row
from slm_swap.rows.examples import Dataset
from slm_swap.scoring.tracks import TRACKS

WEATHER = {
    "name": "weather",
    "description": "The weather.",
    "parameters": {"city": {"type": "str"}, "days": {"type": "int, optional"}, "unit": {"type": "str, optional", "default": "C"}},
}
CALL = {"name": "weather", "arguments": {"days": 2, "city": "Oslo"}}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def xlam_row(answers=(CALL,), tools=(WEATHER,), **fields):
    return {"id": 7, "query": "Oslo?", "answers": json.dumps(list(answers)), "tools": json.dumps(list(tools))} | fields


def read_xlam(tmp_path, *rows):
    return list(xlam([write(tmp_path / "rows.jsonl", rows)]))


# -- xLAM ------------------------------------------------------------------------------------------------------------------------


def test_xlam_row(tmp_path):
    [row] = read_xlam(tmp_path, xlam_row())
    assert isinstance(row, Row)
    assert (row.id, row.source, row.request, row.tool, row.accept) == ("7", "xlam:7", "Oslo?", "weather", None)
    assert list(row.arguments.items()) == [("city", "Oslo"), ("days", 2)]  # in the schema's order
    assert row.where.endswith("rows.jsonl:1")
    assert row.tools[0]["parameters"]["required"] == ["city"]


def test_lists_serve_as_well_as_json_in_strings(tmp_path):
    assert read_xlam(tmp_path, xlam_row(answers=[CALL])) == read_xlam(
        tmp_path, xlam_row() | {"answers": [CALL], "tools": [WEATHER]}
    )


def test_a_tool_listed_twice_is_listed_once(tmp_path):
    [row] = read_xlam(tmp_path, xlam_row(tools=[WEATHER, WEATHER]))
    assert len(row.tools) == 1


@pytest.mark.parametrize(
    "row, reason, why",
    [
        (xlam_row(answers=[{"name": "news", "arguments": {}}]), "tool_not_listed", "news is not among weather"),
        (xlam_row(answers=[{"arguments": {}}]), "tool_not_listed", "None is not among weather"),
        (xlam_row(tools=[]), "tool_not_listed", "no tools"),
        (xlam_row(tools=[WEATHER | {"parameters": {"city": {"type": "strin"}}}]), "schema_fault", "'strin'"),
        (xlam_row(tools=[WEATHER, {"name": "odd", "parameters": {"p": {"type": "List[int"}}}]), "schema_fault", "'List[int'"),
        (xlam_row(tools=[WEATHER, WEATHER | {"parameters": {}}]), "schema_fault", "two different tools of one name"),
        (
            xlam_row(answers=[{"name": "weather", "arguments": {"city": 5}}]),
            "gold_breaks_schema",
            "arguments.city: 5 is not of type",
        ),
        (xlam_row(answers=[{"name": "weather", "arguments": {}}]), "gold_breaks_schema", "'city' is a required property"),
        (
            xlam_row(answers=[{"name": "weather", "arguments": {"city": "x", "more": 1}}]),
            "gold_breaks_schema",
            "does not list it",
        ),
        (
            xlam_row(answers=[{"name": "weather", "arguments": {"city": "x", "days": True}}]),
            "gold_breaks_schema",
            "True is not of type",
        ),
        (xlam_row(answers=[{"name": "weather"}]), "gold_breaks_schema", "None is not of type 'object'"),
        (
            xlam_row(answers='[{"name": "weather", "arguments": []}]') | {"answers": [CALL | {"arguments": []}]},
            "gold_breaks_schema",
            "[]",
        ),
        (xlam_row(answers=[{"name": "weather", "arguments": {"city": ""}}]), "empty_required_argument", "city"),
        (xlam_row(answers=[CALL, {"name": "weather", "arguments": {}}]), "gold_breaks_schema", "'city' is a required property"),
    ],
)
def test_xlam_drops(tmp_path, row, reason, why):
    [dropped] = read_xlam(tmp_path, row)
    assert isinstance(dropped, Dropped)
    assert (dropped.id, dropped.reason) == ("7", reason)
    assert why in dropped.why


def test_gold_with_nan_is_dropped(tmp_path):
    tool = {"name": "f", "parameters": {"x": {"type": "float"}}}
    [dropped] = read_xlam(tmp_path, xlam_row(answers=[{"name": "f", "arguments": {"x": float("nan")}}], tools=[tool]))
    assert dropped.reason == "gold_breaks_schema"


@pytest.mark.parametrize(
    "row, reason, why",
    [
        (xlam_row(query=" "), "bad_row", "no `query`"),
        (xlam_row(query=["x"]), "bad_row", "no `query`"),
        (xlam_row() | {"answers": "[{"}, "bad_row", "`answers` is not JSON"),
        (xlam_row() | {"tools": "nope"}, "bad_row", "`tools` is not JSON"),
        (xlam_row() | {"tools": '{"name": "f"}'}, "bad_row", "`tools` must be a list of objects"),
        (xlam_row() | {"answers": None}, "bad_row", "`answers` must be a list of objects"),
        (xlam_row() | {"answers": '["weather"]'}, "bad_row", "`answers` must be a list of objects"),
        (xlam_row(id=[1]), "bad_row", "`id` must be a text or a number"),
        (["row"], "bad_line", "a row is a JSON object"),
        ({"prompt": "p"}, "bad_row", "no `query`"),
    ],
)
def test_a_bad_row_ends_no_import(tmp_path, row, reason, why):
    first, bad, last = read_xlam(tmp_path, xlam_row(), row, xlam_row(id=8))
    assert isinstance(first, Row) and isinstance(last, Row)
    assert (bad.reason, bad.where.rpartition(":")[2]) == (reason, "2") and why in bad.why


@pytest.mark.parametrize(("answers", "calls"), [([], []), ([CALL, CALL], 2 * [{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}])])
def test_several_calls_and_none(tmp_path, answers, calls):
    [row] = read_xlam(tmp_path, xlam_row(answers=answers))
    assert (row.calls, row.gold, row.tool) == (calls, calls, None)
    assert make_conversation(row, 1) == {
        "id": "7", "messages": [{"role": "user", "content": "Oslo?"}], "tools": row.tools, "calls": calls, "source": "xlam:7",
    }  # fmt: skip


def test_a_file_of_another_form_is_named(tmp_path):
    with pytest.raises(UserError, match=r"looks like OpenAI chat rows, not like rows of --source xlam: python .*--source chat"):
        read_xlam(tmp_path, {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]})


# -- Files -----------------------------------------------------------------------------------------------------------------------


def test_the_same_rows_from_every_kind_of_file(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [xlam_row(), xlam_row(id=8)]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    write(tmp_path / "lines.json", rows)  # BFCL calls its lines .json
    for name in ("list.json", "rows.parquet", "lines.json"):
        assert [row for _, row in read_rows(tmp_path / name)] == rows
    assert [where.rpartition("/")[2] for where, _ in read_rows(tmp_path / "list.json")] == [
        "list.json: row 1",
        "list.json: row 2",
    ]


def test_a_row_without_id_is_named_by_its_hash(tmp_path):
    first, second = (xlam_row(id=None, query=query) for query in ("a", "b"))
    one, two = read_xlam(tmp_path, first, second)
    assert one.id != two.id and len(one.id) == 16
    assert read_xlam(tmp_path, first)[0].id == one.id


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("no.jsonl", None, "cannot read"),
        ("no.parquet", None, "cannot read"),
        ("bad.parquet", b"PAR1 or not", "cannot read"),
        ("empty.jsonl", b"\n", "has no rows"),
        ("empty.json", b" [ ]", "has no rows"),
        ("cut.json", b'[{"id": 1},', "cut.json: not JSON"),
        ("latin.jsonl", b'{"id": "\xe4"}', "latin.jsonl:1: byte 9 of the line is not UTF-8"),
        ("cut.gz", b"\x1f\x8b\x08\x00", "the gzip file is damaged"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as raised:
        list(read_rows(tmp_path / name))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "name, content, why",
    [
        ("cut.jsonl", b'{"id": 1}\n{"id":', "not a line of JSON"),
        ("list.json", b'[{"id": 1}, 1]', "a row is a JSON object, this is int"),
        ("wide.csv", b"a,b\n1,2\n1,2,3\n", "more cells than the first line has names"),
    ],
)
def test_a_bad_line_is_one(tmp_path, name, content, why):
    (tmp_path / name).write_bytes(content)
    (_, good), (_, bad) = read_rows(tmp_path / name)
    assert isinstance(good, dict) and isinstance(bad, Bad) and why in bad.why


def test_an_object_over_several_lines_is_one_row_and_the_one_list_in_it_is_the_rows(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps({"messages": [{"role": "user"}], "id": 1}, indent=1))
    assert [row["id"] for _, row in read_rows(tmp_path / "one.json")] == [1]
    (tmp_path / "many.json").write_text(json.dumps({"meta": {}, "data": [{"id": 1}, {"id": 2}]}, indent=1))
    assert [(where[-5:], row["id"]) for where, row in read_rows(tmp_path / "many.json")] == [("row 1", 1), ("row 2", 2)]


# -- BFCL ------------------------------------------------------------------------------------------------------------------------

RIDE = {
    "name": "uber.ride",
    "description": "A ride.",
    "parameters": {
        "type": "dict",
        "required": ["loc", "time"],
        "properties": {
            "loc": {"type": "string"},
            "time": {"type": "float"},
            "kind": {"type": "string", "enum": ["plus", "black"]},
            "stops": {"type": "array", "items": {"type": "string"}},
            "body": {"type": "dict", "properties": {"n": {"type": "integer"}, "note": {"type": "string"}}, "required": ["n"]},
            "rows": {"type": "array", "items": {"type": "dict", "properties": {"n": {"type": "integer"}}}},
            "at": {"type": "tuple", "items": {"type": "float"}},
            "any": {"type": "any"},
        },
    },
}


def read_bfcl(tmp_path, acceptable=None, calls=None, **fields):
    row = {"id": "simple_1", "question": [[{"role": "user", "content": "A ride."}]], "function": [RIDE]} | fields
    calls = [{"uber.ride": {"loc": ["Home"], "time": [5]} | (acceptable or {})}] if calls is None else calls
    answers = [{"id": "simple_1", "ground_truth": calls}] if calls != "none" else [{"id": "other", "ground_truth": []}]
    return list(bfcl([write(tmp_path / "rows.json", [row])], [write(tmp_path / "gold.json", answers)]))


@pytest.mark.parametrize(
    "acceptable, arguments",
    [
        ({}, {"loc": "Home", "time": 5}),  # an integer where a float is wanted
        ({"loc": ["Work", "Home"]}, {"loc": "Work", "time": 5}),
        ({"kind": ["", "plus"]}, {"loc": "Home", "time": 5}),  # "" first: left out
        ({"kind": ["plus", ""]}, {"loc": "Home", "time": 5, "kind": "plus"}),
        ({"kind": ["pool", "black"]}, {"loc": "Home", "time": 5, "kind": "black"}),  # the first that fits the schema
        ({"kind": ["pool", ""]}, {"loc": "Home", "time": 5}),
        ({"loc": ["", "Home"]}, {"loc": "Home", "time": 5}),  # required: not left out
        ({"stops": []}, {"loc": "Home", "time": 5, "stops": []}),  # no acceptable value: the empty array is meant
        ({"stops": [["a", "b"]]}, {"loc": "Home", "time": 5, "stops": ["a", "b"]}),
        ({"body": [{"n": [3, 4], "note": ["", "x"]}]}, {"loc": "Home", "time": 5, "body": {"n": 3}}),
        ({"body": [{"n": ["", 4], "note": [""]}]}, {"loc": "Home", "time": 5, "body": {"n": 4}}),
        ({"rows": [[{"n": [1]}, {"n": [2]}]]}, {"loc": "Home", "time": 5, "rows": [{"n": 1}, {"n": 2}]}),
        ({"at": [[1.5, 2]]}, {"loc": "Home", "time": 5, "at": [1.5, 2]}),
        ({"any": [{"a": [True]}]}, {"loc": "Home", "time": 5, "any": {"a": True}}),
    ],
)
def test_bfcl_takes_the_first_acceptable_values(tmp_path, acceptable, arguments):
    [row] = read_bfcl(tmp_path, acceptable)
    assert isinstance(row, Row), row
    assert row.arguments == arguments
    expected = {"loc": ["Home"], "time": [5]} | acceptable
    assert row.accept == expected | ({"stops": [[]]} if acceptable.get("stops") == [] else {})
    assert (row.id, row.source, row.tool) == ("simple_1", "bfcl:simple_1", "uber.ride")


def test_bfcl_joins_the_system_message(tmp_path):
    messages = [{"role": "system", "content": "Be kind. "}, {"role": "user", "content": "A ride."}]
    [row] = read_bfcl(tmp_path, question=[messages])
    assert row.request == "Be kind.\n\nA ride."


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"calls": "none"}, "no_answer"),
        ({"calls": []}, "no_answer"),
        ({"calls": [{"uber.ride": {}}, {"uber.ride": {}}]}, "gold_breaks_schema"),
        ({"question": "A ride."}, "bad_row"),
        ({"question": [[]]}, "bad_row"),
        ({"question": [[{"role": "user", "content": None}]]}, "bad_row"),
        ({"function": None}, "bad_row"),
        ({"calls": [{"lyft": {"loc": ["x"]}}]}, "tool_not_listed"),
        ({"calls": [{"uber.ride": {"loc": ["x"]}}]}, "gold_breaks_schema"),
        ({"acceptable": {"kind": ["pool"]}}, "gold_breaks_schema"),
        ({"acceptable": {"price": [3]}}, "gold_breaks_schema"),
        ({"question": [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]}, "several_turns"),
        ({"function": [{"name": "f", "parameters": {"type": "dict", "properties": {"p": {"type": "strin"}}}}]}, "schema_fault"),
    ],
)
def test_bfcl_drops(tmp_path, changes, reason):
    [dropped] = read_bfcl(tmp_path, **changes)
    assert isinstance(dropped, Dropped)
    assert dropped.reason == reason


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"calls": [{"uber.ride": {"loc": "Home"}}]}, "gold.json:1: `ground_truth` must be"),
        ({"calls": [{"a": {}, "b": {}}]}, "gold.json:1: `ground_truth` must be"),
        ({"calls": {"uber.ride": {}}}, "gold.json:1: `ground_truth` must be a list"),
    ],
)
def test_bad_bfcl_rows(tmp_path, changes, message):
    with pytest.raises(UserError) as raised:
        read_bfcl(tmp_path, **changes)
    assert message in str(raised.value)


def test_bfcl_parallel_and_irrelevance(tmp_path):
    several = [{"uber.ride": {"loc": ["Home"], "time": [5]}}, {"uber.ride": {"loc": ["Work", "Office"], "time": [6]}}]
    [row] = read_bfcl(tmp_path, calls=several)
    assert [call["arguments"]["loc"] for call in row.gold] == ["Home", "Work"]
    assert row.accept == [{"loc": ["Home"], "time": [5]}, {"loc": ["Work", "Office"], "time": [6]}]
    rows = [
        {"id": name, "question": [[{"role": "system", "content": "Be kind."}, {"role": "user", "content": "A ride."}]], "function": [RIDE]}
        for name in ("live_irrelevance_1", "live_relevance_2")
    ]
    none, unknown = bfcl([write(tmp_path / "rows.json", rows)])
    assert (none.gold, none.messages[0]["role"]) == ([], "system")
    assert unknown.reason == "no_answer" and "nobody says which" in unknown.why


def test_two_answers_for_one_id(tmp_path):
    gold = write(tmp_path / "gold.json", [{"id": "a", "ground_truth": []}] * 2)
    with pytest.raises(UserError, match=r"gold.json:2: a second answer for id 'a'"):
        list(bfcl([], [gold]))


# -- Numbers and schemas ---------------------------------------------------------------------------------------------------------

NUMBERS = ["52.520006599999998", "12345678901234567.25", "0.1000000000000000055", "1.10", "1e23", "-0.0", "1E5", "9" * 5000]


def given_again(tmp_path, row, number):
    """The error of the number in a reply, against the row as it is written into a dataset and read from it."""
    for track in TRACKS:
        path = tmp_path / f"{track}.jsonl"
        write_jsonl(path, [make_example(row, track, 1).to_json()])
        rows = Dataset(path)
        for example in (*rows, *rows):  # as it is checked, and as it is read again
            text = f'<tool_call name="f">{{"x":{number}}}</tool_call>'
            text = text if track == "toolcall" else f'{{"tool_name":"f","arguments":{{"x":{number}}}}}'
            yield TRACKS[track].score(TRACKS[track].reference(example), text).error


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("as_text", [False, True], ids=["lists", "text"])
def test_xlam_numbers_keep_their_digits(tmp_path, number, as_text):
    tools, answers = '[{"name":"f","parameters":{"x":{"type":"float"}}}]', f'[{{"name":"f","arguments":{{"x":{number}}}}}]'
    if as_text:
        tools, answers = json.dumps(tools), json.dumps(answers)
    line = f'{{"id":1,"query":"How much?","answers":{answers},"tools":{tools}}}'
    for name, content in (("rows.jsonl", line), ("rows.json", f"[{line}]")):
        (tmp_path / name).write_text(content)
        [row] = xlam([tmp_path / name])
        assert isinstance(row, Row) and exact(row.arguments["x"]) == Decimal(number)
        assert set(given_again(tmp_path, row, number)) == {None}


@pytest.mark.parametrize("number", NUMBERS)
def test_bfcl_numbers_keep_their_digits(tmp_path, number):
    tool = {"name": "f", "parameters": {"type": "dict", "properties": {"x": {"type": "float"}}, "required": ["x"]}}
    rows = write(tmp_path / "rows.json", [{"id": "a", "question": [[{"role": "user", "content": "Go."}]], "function": [tool]}])
    for values in (f"[{number}]", f"[0.5, {number}]"):
        (tmp_path / "gold.json").write_text(f'{{"id":"a","ground_truth":[{{"f":{{"x":{values}}}}}]}}')
        [row] = bfcl([rows], [tmp_path / "gold.json"])
        assert set(given_again(tmp_path, row, number)) == {None}


def test_a_schema_s_own_numbers_keep_their_digits(tmp_path):
    number, default = "52.520006599999998", '{"x":{"type":"float, optional","default":52.520006599999998}}'
    line = f'{{"id":1,"query":"q","answers":[{{"name":"f","arguments":{{}}}}],"tools":[{{"name":"f","parameters":{default}}}]}}'
    (tmp_path / "rows.jsonl").write_text(line)
    [row] = xlam([tmp_path / "rows.jsonl"])
    example = make_example(row, "toolcall", 1)
    assert f'"default": {number}' in example.prompt
    reference = TRACKS["toolcall"].reference(example)
    assert TRACKS["toolcall"].score(reference, f'<tool_call name="f">{{"x":{number}}}</tool_call>').schema.exact
    assert not TRACKS["toolcall"].score(reference, '<tool_call name="f">{"x":52.520006599999995}</tool_call>').schema.exact


@pytest.mark.parametrize(
    ("part", "acceptable", "outcome"),
    [
        ({"type": "float", "multipleOf": 0.01}, [19.99], {"x": 19.99}),
        ({"type": "float", "multipleOf": 0.01}, [19.995], "gold_breaks_schema"),
        ({"type": "dict", "$ref": "#/properties/y"}, [{"n": [1]}], {"x": {"n": 1}}),
        ({"type": "dict", "$ref": "#/properties/y"}, [{"n": ["one"]}], "gold_breaks_schema"),
        ({"type": "string", "$ref": "https://example.com/x"}, ["a"], "schema_fault"),
        ({"type": "string", "$ref": "#/properties/x"}, ["a"], "schema_fault"),
        ({"type": "string", "pattern": "^\\p{L}+$"}, ["a"], {"x": "a"}),
        ({"type": "string", "pattern": "^\\p{L}+$"}, ["1"], "gold_breaks_schema"),
        ({"type": "String"}, ["a"], {"x": "a"}),
        ({"type": "HashMap"}, [{"n": ["a"]}], {"x": {"n": "a"}}),
        ({"type": "ArrayList", "items": {"type": "long"}}, [[1]], {"x": [1]}),
    ],
)
def test_bfcl_schemas_of_other_shapes(tmp_path, part, acceptable, outcome):
    inner = {"type": "dict", "properties": {"n": {"type": "integer"}}}
    tool = {"name": "f", "parameters": {"type": "dict", "properties": {"x": part, "y": inner}, "required": ["x"]}}
    [row] = read_bfcl(tmp_path, function=[tool], calls=[{"f": {"x": acceptable}}])
    assert (row.arguments if isinstance(row, Row) else row.reason) == outcome
