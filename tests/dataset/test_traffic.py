"""One traced generation to one row: every form of input and output, and why some make no row."""

import json

import pytest

from slm_swap.dataset.traffic import REASONS, Unusable, convert
from slm_swap.rows.prompts import SYSTEM_PROMPTS, toolcall_prompt

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
    assert taken.row == {
        "id": "o1",
        "prompt": toolcall_prompt([TOOL], "Rain in Oslo?"),
        "completion": COMPLETION,
        "tools": [TOOL],
        "group": "trace-1",
        "source": "langfuse:t1",
        "request": "Rain in Oslo?",
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
    assert row == {"id": "o1", "prompt": "How many?", "completion": '{"n":1}', "source": "langfuse:t1"}


def test_the_system_text_stands_in_front_and_the_request_is_told_apart():
    messages = [{"role": "system", "content": "Count."}, {"role": "developer", "content": "Be brief."}, USER]
    row = made(messages, '{"n":1}').row
    assert row["prompt"] == "Count.\n\nBe brief.\n\nRequest: Rain in Oslo?" and row["request"] == "Rain in Oslo?"
    row = made({"messages": messages, "tools": [CHAT_TOOL]}, CALLED).row
    assert row["prompt"] == "Count.\n\nBe brief.\n\n" + toolcall_prompt([TOOL], "Rain in Oslo?")


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
    assert row["schema"] == SCHEMA and row["prompt"].startswith("JSON Schema:\n") and row["request"] == "Rain in Oslo?"
    with pytest.raises(Unusable, match="breaks_schema"):
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
        ("multi_turn", [USER, {"role": "assistant", "content": "?"}, USER], '{"n":1}', {}),
        ("multi_turn", [USER, USER], '{"n":1}', {}),
        ("multi_turn", [USER, CALLED, {"role": "tool", "content": "rain"}], '{"n":1}', {}),
        ("several_replies", [USER], {"choices": [{"message": CALLED}, {"message": CALLED}]}, {}),
        ("several_calls", TOOLS, {"role": "assistant", "tool_calls": [CALL, CALL]}, {}),
        ("not_json", [USER], "It rains.", {}),
        ("not_json", [USER], "[1, 2]", {}),
        ("not_json", [USER], '{"n":1,"n":2}', {}),
        ("not_json", [USER], '```json\n{"n":1}\n```', {}),
        ("not_json", TOOLS, {"tool_calls": [{"function": {"name": "weather", "arguments": '{"city":'}}]}, {}),
        ("not_json", TOOLS, {"tool_calls": [{"function": {"name": "weather", "arguments": "[]"}}]}, {}),
        ("other_track", [USER], '{"n":1}', {"tracks": ["toolcall"]}),
        ("schema_fault", {"messages": [USER], "tools": [{"type": "web_search"}]}, CALLED, {}),
        ("schema_fault", {"messages": [USER], "tools": "weather"}, CALLED, {}),
        ("schema_fault", {"messages": [USER], "tools": [TOOL, TOOL | {"description": "Another."}]}, CALLED, {}),
        ("tool_not_listed", {"messages": [USER], "tools": [TOOL | {"name": "other"}]}, CALLED, {}),
        ("breaks_schema", TOOLS, {"tool_calls": [{"function": {"name": "weather", "arguments": '{"city":1}'}}]}, {}),
        ("breaks_schema", TOOLS, {"tool_calls": [{"function": {"name": "weather", "arguments": "{}"}}]}, {}),
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
    assert taken.row["request"] == "Weather for <EMAIL_1>, <PHONE_1>"
    assert taken.row["completion"] == '<tool_call name="weather">{"city":"<EMAIL_1>"}</tool_call>'
    assert taken.masked == {"EMAIL": 1, "PHONE": 1}
    assert made(given, output, regions=None).row["request"] == "Weather for ann@example.com, +1 415 555 2671"
