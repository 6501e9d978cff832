"""The simulator asked natively, over real sockets: conversations, tool calls, mistakes."""

import json
import urllib.request
from collections import Counter

import pytest

from slm_swap.demo.azure_simulator import AzureSimulator, Faults
from slm_swap.demo.simulator_replies import NO_CALL, UNKNOWN_PROMPT, conversation_key
from slm_swap.rows.examples import parse_example
from slm_swap.rows.prompts import toolcall_prompt

KEY = "simulator-key"
TOOLS = [{"name": name, "description": name, "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}}} for name in "fgh"]
NESTED = [{"type": "function", "function": tool} for tool in TOOLS]


def row(text, calls, **more):
    return parse_example({"id": text, "messages": [{"role": "user", "content": text}], "tools": TOOLS, "calls": calls} | more, "w")


def post(server, messages, **more):
    """(status, body) of one request."""
    body = json.dumps({"model": "simulator", "messages": messages} | more).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{server.url}/v1/chat/completions", body, headers), timeout=20) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def said(server, messages, **more):
    """(content, [(name, arguments)], finish_reason) of one request."""
    status, body = post(server, messages, **more)
    assert status == 200, body
    (choice,) = body["choices"]
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in choice["message"].get("tool_calls", ())]
    return choice["message"]["content"], calls, choice["finish_reason"]


def user(text):
    return [{"role": "user", "content": text}]


def test_calls_where_tools_are_on_offer_and_text_where_not():
    rows = [row("one", [{"name": "f", "arguments": {"n": 1}}]), row("none", []), row("why", [], content="Because.")]
    two = [{"name": "f", "arguments": {"n": 1}}, {"name": "g", "arguments": {}}]
    with AzureSimulator([*rows, row("two", two)], key=KEY) as server:
        assert said(server, user("one"), tools=NESTED) == (None, [("f", '{"n":1}')], "tool_calls")
        assert said(server, user("two"), tools=NESTED) == (None, [("f", '{"n":1}'), ("g", "{}")], "tool_calls")
        assert said(server, user("none"), tools=NESTED) == (NO_CALL, [], "stop")
        assert said(server, user("why"), tools=NESTED, tool_choice="auto", parallel_tool_calls=True) == ("Because.", [], "stop")
        assert said(server, user("else"), tools=NESTED) == (UNKNOWN_PROMPT, [], "stop")
        shown = toolcall_prompt(TOOLS, "one")
        assert said(server, [{"role": "system", "content": "s"}, *user(shown)]) == ('<tool_call name="f">{"n":1}</tool_call>', [], "stop")
        assert server.counts == {"answered": 5, "unknown_prompt": 1}


def test_a_conversation_is_told_from_another_by_all_its_turns():
    turns = {}
    for number in range(3):
        made = {"id": f"c{number}", "type": "function", "function": {"name": "f", "arguments": f'{{"n":{number}}}'}}
        turns[number] = [
            {"role": "system", "content": "shop"}, *user("hello"), {"role": "assistant", "content": None, "tool_calls": [made]},
            {"role": "tool", "tool_call_id": f"c{number}", "content": "done"}, *user("and now?"),
        ]  # fmt: skip
    rows = [
        parse_example({"messages": turns[number], "tools": TOOLS, "calls": [{"name": "g", "arguments": {"n": number}}]}, "w")
        for number in range(3)
    ]
    with AzureSimulator(rows, key=KEY) as server:
        for number in range(3):
            assert said(server, turns[number], tools=NESTED)[1] == [("g", f'{{"n":{number}}}')]
            assert said(server, [{"role": "system", "content": "other"}, *turns[number][1:]], tools=NESTED)[1] == [("g", f'{{"n":{number}}}')]
    keys = {conversation_key(turns[number]) for number in range(3)}
    assert len(keys) == 3


def test_a_value_for_a_response_format():
    example = parse_example({"messages": user("which?"), "object": [1, 2], "schema": {"type": "array"}}, "w")
    with AzureSimulator([example], key=KEY) as server:
        asked = {"response_format": {"type": "json_schema", "json_schema": {"name": "reply", "schema": {"type": "array"}}}}
        assert said(server, user("which?"), **asked) == ("[1,2]", [], "stop")


def test_mistakes_of_every_kind_are_the_same_on_every_call():
    rows = [row(f"one {n}", [{"name": "f", "arguments": {"n": n}}]) for n in range(60)]
    rows += [row(f"two {n}", [{"name": "f", "arguments": {"n": n}}, {"name": "g", "arguments": {"n": n}}]) for n in range(10)]
    rows += [row(f"none {n}", []) for n in range(10)]
    with AzureSimulator(rows, key=KEY, mistake_rate=1.0) as server:
        first = {example.id: said(server, user(example.id), tools=NESTED) for example in rows}
        kinds = Counter(server.counts)
        assert first == {example.id: said(server, user(example.id), tools=NESTED) for example in rows}
    assert kinds["mistake:missing_call"] == 10 and kinds["mistake:unwanted_call"] == 10
    assert {"mistake:prose", "mistake:changed_value", "mistake:other_tool", "mistake:truncated", "mistake:wrong_type"} <= set(kinds)
    assert all(len(first[f"two {n}"][1]) == 1 and len(first[f"none {n}"][1]) == 1 for n in range(10))
    assert all(first[f"one {n}"][1] != [("f", f'{{"n":{n}}}')] for n in range(60))
    in_words = [content for content, calls, _ in first.values() if not calls]
    assert in_words and all("<tool_call" in content for content in in_words)


def test_a_limit_cuts_a_call_in_its_arguments():
    with AzureSimulator([row("one", [{"name": "f", "arguments": {"n": 123456789}}])], key=KEY) as server:
        assert said(server, user("one"), tools=NESTED, max_tokens=7) == (None, [("f", '{"n":123')], "length")


@pytest.mark.parametrize(
    ("messages", "more", "about"),
    [
        (user("x"), {"tools": [{"name": "f"}]}, "tools"),
        (user("x"), {"tools": "f"}, "tools"),
        ([*user("x"), {"role": "assistant", "content": None}], {}, "messages"),
        ([{"role": "user", "content": None}], {}, "messages"),
    ],
)
def test_what_no_server_takes(messages, more, about):
    with AzureSimulator([], key=KEY) as server:
        status, body = post(server, messages, **more)
        assert status == 400 and body["error"]["param"] == about


def test_tools_can_be_a_parameter_that_is_not_taken():
    with AzureSimulator([], key=KEY, faults=Faults(unsupported_parameters=frozenset({"tools"}))) as server:
        status, body = post(server, user("x"), tools=NESTED)
        assert status == 400 and body["error"]["code"] == "unsupported_parameter" and body["error"]["param"] == "tools"


def test_tools_count_as_tokens_of_the_prompt():
    with AzureSimulator([], key=KEY) as server:
        bare, more = (post(server, user("x"), **tools)[1]["usage"]["prompt_tokens"] for tools in ({}, {"tools": NESTED}))
    assert more > bare + 50
