"""One traced generation to one row: every form of input and output, and why some make no row."""

import json
from decimal import Decimal

import pytest
from hypothesis import given as for_any
from hypothesis import settings
from hypothesis import strategies as st

from slm_swap.common.exact_json import EXACT, exact
from slm_swap.dataset.traffic import REASONS, Unusable, convert
from slm_swap.rows.examples import parse_example
from slm_swap.rows.lines import dump_json
from slm_swap.rows.prompts import SYSTEM_PROMPTS, toolcall_prompt
from slm_swap.scoring.tracks import TRACKS

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"name": "weather", "description": "The weather.", "parameters": PARAMETERS}
CHAT_TOOL = {"type": "function", "function": TOOL}
USER = {"role": "user", "content": "Rain in Oslo?"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
COMPLETION = '<tool_call name="weather">{"city":"Oslo"}</tool_call>'
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}


def made(given, output, tracks=("structured", "toolcall"), regions=("US",), **fields):
    return convert({"id": "o1", "traceId": "t1", "input": given, "output": output} | fields, tracks, regions)


def reason(given, output, **fields) -> str:
    with pytest.raises(Unusable) as why:
        made(given, output, **fields)
    assert str(why.value) in REASONS
    return str(why.value)


@pytest.mark.parametrize("as_text", [False, True], ids=["v3", "v4"])
@pytest.mark.parametrize(
    "given",
    [
        {"messages": [USER], "tools": [CHAT_TOOL]},
        {"messages": [USER], "functions": [TOOL]},
        {"input": "Rain in Oslo?", "tools": [{"type": "function", **TOOL, "strict": True}]},
        {"input": [USER], "tools": [{"type": "function", **TOOL}]},
        [{"role": "tool", "content": CHAT_TOOL}, USER],
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Rain in Oslo?"}]}], "tools": [CHAT_TOOL]},
    ],
)
@pytest.mark.parametrize(
    "output",
    [
        CALLED,
        {"content": "", "tool_calls": [{"name": "weather", "args": {"city": "Oslo"}, "id": "1"}]},
        {"role": "assistant", "function_call": {"name": "weather", "arguments": '{"city":"Oslo"}'}},
        {"choices": [{"message": CALLED, "finish_reason": "tool_calls"}]},
        [CALLED],
        [{"type": "reasoning"}, {"type": "function_call", "name": "weather", "arguments": '{"city":"Oslo"}'}],
        {"role": "assistant", "content": "", "additional_kwargs": {"tool_calls": [CALL]}},
        COMPLETION,
    ],
)
def test_a_tool_call_in_every_form(given, output, as_text):
    if as_text:
        given, output = (value if isinstance(value, str) else json.dumps(value) for value in (given, output))
    taken = made(given, output)
    assert taken.track == "toolcall" and taken.masked == {} and not taken.own
    tool = TOOL | ({"strict": True} if "strict" in str(given) else {})
    assert taken.row == {
        "id": "o1",
        "messages": [USER],
        "tools": [tool],
        "calls": [{"name": "weather", "arguments": {"city": "Oslo"}}],
        "group": "t1",
        "source": "langfuse:t1",
    }


@pytest.mark.parametrize(
    "output",
    [
        '{"n": 1}',
        {"n": 1},
        {"role": "assistant", "content": '{"n": 1}'},
        {"role": "assistant", "content": {"n": 1}},
        {"role": "assistant", "content": [{"type": "output_text", "text": '{"n": 1}'}]},
        [{"role": "assistant", "type": "message", "content": [{"type": "output_text", "text": '{"n": 1}'}]}],
    ],
)
def test_a_json_reply_in_every_form(output):
    row = made("How many?", output).row
    messages = [{"role": "user", "content": "How many?"}]
    assert row == {"id": "o1", "messages": messages, "object": {"n": 1}, "group": "t1", "source": "langfuse:t1"}


def test_the_system_text_stays_a_message():
    messages = [{"role": "system", "content": "Count."}, {"role": "developer", "content": "Be brief."}, USER]
    kept = [{"role": "system", "content": "Count."}, {"role": "system", "content": "Be brief."}, USER]
    assert made(messages, '{"n":1}').row["messages"] == kept
    assert made({"messages": messages, "tools": [CHAT_TOOL]}, CALLED).row["messages"] == kept


def test_the_earlier_turns_stay_messages():
    result = {"role": "tool", "tool_call_id": "call_1", "content": "rain"}
    messages = [USER, CALLED, result, {"role": "assistant", "content": "Rain."}, {"role": "user", "content": "And in Bergen?"}]
    row = made({"messages": messages, "tools": [CHAT_TOOL]}, {"role": "assistant", "tool_calls": [CALL, CALL]}).row
    called = {"role": "assistant", "tool_calls": [CALL]}
    assert row["messages"] == [USER, called, *messages[2:]]
    assert row["calls"] == [{"name": "weather", "arguments": {"city": "Oslo"}}] * 2
    row = made({"messages": messages, "tools": [CHAT_TOOL]}, "Which Bergen?").row
    assert (row["calls"], row["content"]) == ([], "Which Bergen?")


@pytest.mark.parametrize(
    "where",
    [
        {"input": {"messages": [USER], "response_format": FORMAT}},
        {"metadata": {"response_format": FORMAT}},
        {"metadata": {"response_format": json.dumps(FORMAT)}},
        {"modelParameters": {"response_format": FORMAT}},
        {"metadata": {"text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}}}},
    ],
)
def test_a_wanted_schema_is_kept_and_replies_are_held_against_it(where):
    fields = {"input": [USER]} | where
    row = convert({"id": "o1", "traceId": "t1", "output": '{"n":1}'} | fields, ["structured"], None).row
    assert row["schema"] == SCHEMA and row["messages"] == [USER] and row["object"] == {"n": 1}
    assert row["options"]["response_format"]["json_schema"]["schema"] == SCHEMA
    with pytest.raises(Unusable, match="gold_breaks_schema"):
        convert({"id": "o1", "traceId": "t1", "output": '{"n":"one"}'} | fields, ["structured"], None)


def test_this_programs_own_runs_are_told_apart_and_keep_their_prompt():
    prompt = toolcall_prompt([TOOL], "Rain in Oslo?")
    messages = [{"role": "system", "content": SYSTEM_PROMPTS["toolcall"]}, {"role": "user", "content": prompt}]
    taken = made(messages, COMPLETION)
    assert taken.own and taken.row["prompt"] == prompt and taken.row["request"] == "Rain in Oslo?"


TOOLS = {"messages": [USER], "tools": [CHAT_TOOL]}


@pytest.mark.parametrize(
    ("expected", "given", "output", "fields"),
    [
        ("failed", [USER], '{"n":1}', {"level": "ERROR"}),
        ("failed", [USER], '{"n":1}', {"metadata": {"finish_reason": "error"}}),
        ("failed", [USER], None, {}),
        ("failed", [USER], " ", {}),
        ("failed", [USER], {"choices": []}, {}),
        ("filtered", [USER], None, {"metadata": {"finish_reason": "content_filter"}}),
        ("filtered", [USER], {"role": "assistant", "content": None, "refusal": "No."}, {}),
        ("truncated", [USER], '{"n":1}', {"metadata": {"finish_reason": "length"}}),
        ("truncated", [USER], {"choices": [{"message": {"role": "assistant", "content": "{"}, "finish_reason": "length"}]}, {}),
        ("no_request", None, '{"n":1}', {}),
        ("no_request", {"question": "How many?"}, '{"n":1}', {}),
        ("no_request", [{"role": "system", "content": "x"}], '{"n":1}', {}),
        ("no_request", [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], '{"n":1}', {}),
        ("several_replies", [USER], {"choices": [{"message": CALLED}, {"message": CALLED}]}, {}),
        ("plain_text", [USER], "It rains.", {}),
        ("plain_text", [USER], "5", {}),
        ("not_json", {"messages": [USER], "response_format": {"type": "json_object"}}, "It rains.", {}),
        ("not_json", [USER], '{"n":1,"n":2}', {}),
        ("not_json", TOOLS, {"tool_calls": [{"function": {"name": "weather", "arguments": '{"city":'}}]}, {}),
        ("not_json", TOOLS, {"tool_calls": [{"function": {"name": "weather", "arguments": "[]"}}]}, {}),
        ("other_track", [USER], '{"n":1}', {"tracks": ["toolcall"]}),
        ("schema_fault", {"messages": [USER], "tools": [{"type": "web_search"}]}, CALLED, {}),
        ("schema_fault", {"messages": [USER], "tools": "weather"}, CALLED, {}),
        ("schema_fault", {"messages": [USER], "tools": [TOOL, TOOL | {"description": "Another."}]}, CALLED, {}),
        ("tool_not_listed", {"messages": [USER], "tools": [TOOL | {"name": "other"}]}, CALLED, {}),
        ("gold_breaks_schema", TOOLS, {"tool_calls": [{"function": {"name": "weather", "arguments": '{"city":1}'}}]}, {}),
        ("gold_breaks_schema", TOOLS, {"tool_calls": [{"function": {"name": "weather", "arguments": "{}"}}]}, {}),
        ("unusable", [{"role": "user", "content": "\ud800"}], '{"n":1}', {}),
    ],
)
def test_why_a_generation_makes_no_row(expected, given, output, fields):
    assert reason(given, output, **fields) == expected


def test_a_schema_that_points_elsewhere_is_not_fetched():
    tool = TOOL | {"parameters": {"type": "object", "properties": {"city": {"$ref": "https://example.com/schema"}}}}
    assert reason({"messages": [USER], "tools": [tool]}, CALLED) == "schema_fault"


def test_what_is_masked_stays_the_same_in_prompt_and_completion():
    given = {"messages": [{"role": "user", "content": "Weather for ann@example.com, +1 415 555 2671"}], "tools": [CHAT_TOOL]}
    output = {"tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "ann@example.com"}'}}]}
    taken = made(given, output)
    assert taken.row["messages"][0]["content"] == "Weather for <EMAIL_1>, <PHONE_1>"
    assert taken.row["calls"] == [{"name": "weather", "arguments": {"city": "<EMAIL_1>"}}]
    assert taken.masked == {"EMAIL": 1, "PHONE": 1}
    assert made(given, output, regions=None).row["messages"][0]["content"] == "Weather for ann@example.com, +1 415 555 2671"


# -- Numbers keep their digits ---------------------------------------------------------------------------------------------------


def outputs(body):
    """A reply in every form in which a server hands its numbers out: as text, and read from JSON."""
    value = json.loads(body, **EXACT)
    yield body, "structured"
    yield value, "structured"
    yield {"role": "assistant", "content": body}, "structured"
    yield {"role": "assistant", "content": value}, "structured"
    yield {"tool_calls": [{"function": {"name": "f", "arguments": body}}]}, "toolcall"
    yield {"tool_calls": [{"name": "f", "args": value}]}, "toolcall"
    yield f'<tool_call name="f">{body}</tool_call>', "toolcall"


def again(track, row, body):
    """The score of the very same reply, given again."""
    reference = TRACKS[track].reference(parse_example(row, "rows.jsonl:1"))
    return TRACKS[track].score(reference, body if track == "structured" else f'<tool_call name="f">{body}</tool_call>')


NUMBERS = ["52.520006599999998", "12345678901234567.25", "0.1000000000000000055", "1.10", "1" + "0" * 22 + "1", "1e23", "-0.0", "1E5", "1e400"]


@pytest.mark.parametrize("number", NUMBERS)
def test_the_same_reply_given_again_is_exact(number):
    body = f'{{"x":{number},"l":[{number}]}}'
    for output, track in outputs(body):
        row = made("How much?", output).row
        assert again(track, row, body).error is None
        row = made({"messages": [USER], "tools": [TOOL | {"name": "f", "parameters": {"properties": {"x": {}, "l": {}}}}]}, output).row
        if track == "structured":  # a text where tools were on offer: no call is due
            assert row["calls"] == []
        else:
            assert again(track, row, body).error is None


@settings(max_examples=100, deadline=None)
@for_any(st.from_regex(r"-?(0|[1-9][0-9]{0,24})(\.[0-9]{1,24})?([eE][+-]?[0-9]{1,3})?", fullmatch=True))
def test_any_number_given_again_is_exact(number):
    body = f'{{"x":{number}}}'
    for output, track in outputs(body):
        row = made("How much?", output, regions=None).row
        assert again(track, row, body).error is None
        value = row["object"] if track == "structured" else row["calls"][0]["arguments"]
        assert exact(value["x"]) == Decimal(number)


@pytest.mark.parametrize("of", ["output", "input", "schema"])
def test_an_integer_of_5000_digits_is_no_crash(of):
    long = "9" * 5000
    if of == "output":
        for output, _ in outputs(f'{{"x":{long}}}'):
            assert reason("How many?", output) == "unusable"
        assert reason("How many?", f'{{"role":"assistant","content":{{"x":{long}}}}}') == "unusable"
    elif of == "input":
        given = f'{{"messages":[{json.dumps(USER)}],"seed":{long}}}'
        assert made(given, '{"n":1}').row["messages"] == [USER]
    else:
        given = f'{{"messages":[{json.dumps(USER)}],"tools":[{{"name":"f","parameters":{{"maximum":{long}}}}}]}}'
        assert reason(given, '{"n":1}') == "schema_fault"


def test_the_digits_of_a_schema_are_kept():
    number = Decimal("52.520006599999998")
    schema = {"type": "object", "properties": {"x": {"enum": [number]}}}
    fields = {"input": [USER], "metadata": {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}}
    row = convert({"id": "o1", "traceId": "t1", "output": '{"x":52.520006599999998}'} | fields, ["structured"], None).row
    assert row["schema"] == schema
    with pytest.raises(Unusable, match="gold_breaks_schema"):
        convert({"id": "o1", "traceId": "t1", "output": '{"x":52.520006599999995}'} | fields, ["structured"], None)


# -- Schemas however they are written --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "right", "wrong"),
    [
        ({"$ref": "#/definitions/B", "definitions": {"B": PARAMETERS}}, '{"city":"Bonn"}', '{"city":1}'),
        ({"type": "object", "allOf": [PARAMETERS]}, '{"city":"Bonn"}', "{}"),
        (
            {"type": "object", "anyOf": [PARAMETERS, {"properties": {"id": {"type": "integer"}}, "required": ["id"]}]},
            '{"id":4}',
            '{"id":"four"}',
        ),
        ({"type": "object", "patternProperties": {"^X_": {"type": "string"}}}, '{"X_A":"1"}', '{"Y":"1"}'),
        ({"$id": "my.json", "$defs": {"A": {"type": "integer"}}, "properties": {"a": {"$ref": "#/$defs/A"}}}, '{"a":1}', '{"a":"x"}'),
        ({"properties": {"t": {"$ref": "#/$defs/T"}}, "$defs": {"T": {"properties": {"kids": {"items": {"$ref": "#/$defs/T"}}}}}},
         '{"t":{"kids":[{"kids":[]}]}}', '{"kids":[]}'),
        ({"properties": {"price": {"type": "number", "multipleOf": 0.01}}}, '{"price":4.94}', '{"price":4.945}'),
        ({"properties": {"p": {"type": "string", "nullable": True}}}, '{"p":null}', '{"p":1}'),
        ({"properties": {"p": {"type": "string", "pattern": "^\\p{L}+$"}}}, '{"p":"Zoë"}', '{"p":"1"}'),
        ({"properties": {"p": {"type": "string", "pattern": "^(?<y>\\d{4})$"}}}, '{"p":"2026"}', '{"p":"26"}'),
        ({"properties": {"p": {"type": "array", "items": [{"type": "number"}, {"type": "string"}]}}}, '{"p":[1,"a"]}', '{"p":["a"]}'),
        ({"type": "HashMap", "properties": {"p": {"type": "ArrayList", "items": {"type": "long"}}}}, '{"p":[1]}', '{"p":["a"]}'),
    ],
)  # fmt: skip
def test_a_valid_call_is_kept_however_its_tool_is_written(parameters, right, wrong):
    given = {"messages": [USER], "tools": [{"name": "f", "parameters": parameters}]}

    def called(arguments):
        return {"tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}

    row = made(given, called(right)).row
    assert row["calls"] == [{"name": "f", "arguments": json.loads(right)}]
    assert reason(given, called(wrong)) == "gold_breaks_schema"


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"$ref": "http://[bad"}, "schema_fault"),
        ({"$ref": "#/$defs/none"}, "schema_fault"),
        ({"type": "strin"}, "schema_fault"),
        ({"anyOf": [{"type": "null"}, {"allOf": [{"$ref": "#/properties/city"}]}]}, "schema_fault"),
        ({"$ref": "#/properties/city"}, "schema_fault"),
    ],
)
def test_a_schema_that_cannot_be_read_is_counted(schema, expected):
    tool = TOOL | {"parameters": {"type": "object", "properties": {"city": schema}}}
    assert reason({"messages": [USER], "tools": [tool]}, CALLED) == expected


@pytest.mark.parametrize("depth", [5, 98])
def test_a_deep_reply_of_a_recursive_schema_ends_no_pull(depth):
    tree = {"type": "object", "properties": {"kid": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "additionalProperties": False}
    given = {"messages": [USER], "response_format": {"type": "json_schema", "json_schema": {"schema": tree}}}
    body = '{"kid":' * depth + "null" + "}" * depth
    try:
        assert dump_json(made(given, body).row["object"]) == body
    except Unusable as why:
        assert str(why) == "unusable" and depth > 5  # jsonschema's own stack is used up


# -- Calls without arguments, and the forms of others ----------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", ["{}", "", " ", None, {}, "null", " null ", "{ }"])
def test_a_call_without_arguments(arguments):
    given = {"messages": [USER], "tools": [{"type": "function", "function": {"name": "now"}}]}
    for inner in ({"name": "now", "arguments": arguments}, {"name": "now", "args": arguments}):
        assert made(given, {"tool_calls": [{"function": inner}]}).row["calls"] == [{"name": "now", "arguments": {}}]


@pytest.mark.parametrize("arguments", ["[]", "0", "false", '""', "nul"])
def test_arguments_that_are_no_object(arguments):
    assert reason([USER], {"tool_calls": [{"function": {"name": "now", "arguments": arguments}}]}) == "not_json"


@pytest.mark.parametrize("as_text", [False, True], ids=["v3", "v4"])
@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ({"toolCalls": [{"toolCallType": "function", "toolCallId": "1", "toolName": "now", "args": "{}"}]}, "other_form"),
        ({"role": "model", "parts": [{"functionCall": {"name": "now", "args": {}}}]}, "other_form"),
        ({"candidates": [{"content": {"role": "model", "parts": []}}]}, "other_form"),
        ({"message": {"role": "assistant", "content": [{"toolUse": {"name": "now", "input": {}}}]}}, "other_form"),
        ({"error": {"message": "boom"}}, "failed"),
    ],
)
def test_a_wrapper_is_no_reply(output, expected, as_text):
    assert reason([USER], json.dumps(output) if as_text else output) == expected


@pytest.mark.parametrize("value", [{"error": "none"}, {"error": {"code": 5}}, {"message": "hi"}, {"role": "admin"}, {"parts": [1]}])
def test_a_json_reply_that_looks_a_little_like_a_wrapper_is_kept(value):
    assert made([USER], value).row["object"] == value


def test_anthropic_s_form():
    output = {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm."}, {"type": "tool_use", "id": "1", "name": "weather", "input": {"city": "Oslo"}}]}
    given = {"system": "Be brief.", "messages": [USER], "tools": [{"name": "weather", "description": "The weather.", "input_schema": PARAMETERS}]}
    row = made(given, output).row
    assert row["calls"] == [{"name": "weather", "arguments": {"city": "Oslo"}}] and row["tools"] == [TOOL]
    assert row["messages"] == [{"role": "system", "content": "Be brief."}, USER]
    assert reason([USER], {"role": "assistant", "content": "", "stop_reason": "max_tokens"}) == "truncated"


def test_everything_of_a_conversation_is_masked():
    tool = TOOL | {"description": "Ask ann@example.com."}
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city": "ann@example.com", "card": 4111111111111111}'}}
    messages = [
        {"role": "system", "content": "Write to ann@example.com."}, USER, {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "bob@example.com"}, USER,
    ]  # fmt: skip
    row = made({"messages": messages, "tools": [{"type": "function", "function": tool}]}, "Ask bob@example.com.").row
    assert "example.com" not in json.dumps(row) and "4111" not in json.dumps(row)
    assert json.loads(row["messages"][2]["tool_calls"][0]["function"]["arguments"]) == {"city": "<EMAIL_1>", "card": "<CARD_1>"}
    assert (row["messages"][3]["content"], row["content"], row["tools"][0]["description"]) == ("<EMAIL_2>", "Ask <EMAIL_2>.", "Ask <EMAIL_1>.")
    card = made([USER], '{"card": 4111111111111111.0}').row
    assert card["object"] == {"card": "<CARD_1>"}
