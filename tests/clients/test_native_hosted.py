"""Rows asked as production asks: tools, options and formats as they are, calls read back; over real sockets."""

import json
from dataclasses import replace
from decimal import Decimal

import pytest

from slm_swap.clients.chat_requests import length, request_body
from slm_swap.clients.completions import read_completion
from slm_swap.clients.protocol import Reply
from slm_swap.common.errors import UserError
from slm_swap.demo.azure_simulator import Answer
from slm_swap.demo.simulator_replies import NO_CALL
from slm_swap.rows.examples import Example, parse_example
from slm_swap.rows.prompts import Request, request_of
from tests.support import scripted
from tests.support.scripted import Scripted

KEY = "0123456789abcdef-of-no-server"
PARAMETERS = {"type": "object", "properties": {"order": {"type": "string"}}, "required": ["order"]}
TOOLS = [
    {"name": "order_status", "description": "Where an order is", "parameters": PARAMETERS},
    {"name": "cancel_order", "description": "Cancel an order", "parameters": PARAMETERS, "strict": True},
]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}


def call(name, order):
    return {"name": name, "arguments": {"order": order}}


def turns(text):
    """A conversation that has called a tool before."""
    made = {"id": "c1", "type": "function", "function": {"name": "order_status", "arguments": '{"order":"A1"}'}}
    return [
        {"role": "system", "content": "You are the shop's bot."}, {"role": "user", "content": "Where is A1?"},
        {"role": "assistant", "content": None, "tool_calls": [made]},
        {"role": "tool", "tool_call_id": "c1", "content": "on its way"}, {"role": "assistant", "content": "On its way."},
        {"role": "user", "content": text},
    ]  # fmt: skip


def row(text, **wanted):
    return parse_example({"id": text, "messages": turns(text), "tools": TOOLS} | wanted, "rows.jsonl:1")


ROWS = [
    row("and B2?", calls=[call("order_status", "B2")]),
    row("cancel both", calls=[call("cancel_order", "A1"), call("cancel_order", "B2")]),
    row("thanks!", calls=[], content="You are welcome."),
    row("bye", calls=[]),
]
WANTED = [
    ("", [{"name": "order_status", "arguments": '{"order":"B2"}'}]),
    ("", [{"name": "cancel_order", "arguments": '{"order":"A1"}'}, {"name": "cancel_order", "arguments": '{"order":"B2"}'}]),
    ("You are welcome.", []),
    (NO_CALL, []),
]


def plain(prompt, before, asked, answer):
    return answer


def served(script=plain, rows=ROWS, **options):
    return scripted.served(rows, script, KEY, **options)


def asked(track="toolcall", rows=ROWS):
    return [request_of(track, example) for example in rows]


def test_conversations_are_asked_as_they_are_and_calls_read_back():
    seen = []
    with served(lambda prompt, before, body, answer: seen.append(body) or answer) as (_, client):
        replies = client.generate(asked())
    assert [(reply.text, reply.calls) for reply in replies] == WANTED
    assert all(reply.finish_reason == "stop" for reply in replies)
    body = next(body for body in seen if body["messages"][-1]["content"] == "and B2?")
    assert body["messages"] == turns("and B2?")
    assert body["tools"] == [{"type": "function", "function": tool} for tool in TOOLS]


def test_a_prompt_with_its_tools_may_be_asked_natively():
    from slm_swap.rows.prompts import toolcall_prompt

    example = Example(toolcall_prompt(TOOLS, "where is C3?"), '<tool_call name="order_status">{"order":"C3"}</tool_call>', tools=TOOLS, ask="native")
    with served(rows=[example]) as (_, client):
        (reply,) = client.generate(asked(rows=[example]))
    assert (reply.text, reply.calls) == ("", [{"name": "order_status", "arguments": '{"order":"C3"}'}])


def test_in_text_form_a_reply_has_no_calls():
    with served() as (_, client):
        replies = client.generate(asked(rows=[replace(example, ask="text") for example in ROWS]))
    assert [(reply.text, reply.calls) for reply in replies[:2]] == [(example.completion, None) for example in ROWS[:2]]


def test_a_value_that_its_schema_describes():
    example = parse_example({"messages": turns("which city?"), "object": {"city": "Oslo"}, "schema": SCHEMA}, "w")
    seen = []
    with served(lambda prompt, before, body, answer: seen.append(body) or answer, rows=[example]) as (_, client):
        (reply,) = client.generate(asked("structured", [example]))
    assert (reply.text, reply.calls) == ('{"city":"Oslo"}', [])
    assert seen[0]["response_format"] == {"type": "json_schema", "json_schema": {"name": "reply", "schema": SCHEMA}}


# The body


MESSAGES = [{"role": "user", "content": "hi"}]
FORMAT = {"type": "json_schema", "json_schema": {"name": "mine", "strict": True, "schema": SCHEMA}}


@pytest.mark.parametrize(
    ("request_", "more"),
    [
        (Request(MESSAGES, TOOLS, SCHEMA, {"tool_choice": "auto"}), {}),
        (Request(MESSAGES, native=True), {}),
        (Request(MESSAGES, schema={"type": "object"}, native=True), {"response_format": {"type": "json_object"}}),
        (Request(MESSAGES, schema=SCHEMA, options={"response_format": FORMAT}, native=True), {"response_format": FORMAT}),
        (Request(MESSAGES, options={"tool_choice": "auto", "parallel_tool_calls": False}, native=True), {}),
        (
            Request(MESSAGES, [TOOLS[0] | {"type": "function"}], None, {"tool_choice": {"type": "none"}, "seed": 1}, True),
            {"tools": [{"type": "function", "function": TOOLS[0]}], "tool_choice": {"type": "none"}},
        ),
    ],
)
def test_what_is_sent(request_, more):
    assert request_body(request_) == {"messages": MESSAGES} | more


def test_exact_numbers_can_be_sent():
    tool = TOOLS[0] | {"parameters": {"type": "number", "multipleOf": Decimal("0.30000000000000004441")}}
    assert json.loads(json.dumps(request_body(Request(MESSAGES, [tool], native=True))))["tools"]


def test_the_length_of_a_request_is_all_that_is_read():
    assert length(Request(MESSAGES)) == 2
    assert length(Request([{"role": "assistant", "content": None}], native=True)) == 0
    tools = length(Request(MESSAGES, TOOLS, native=True))
    assert tools > 200 and length(Request(MESSAGES, TOOLS)) == 2
    assert length(Request(turns("x"))) > sum(len(turn["content"] or "") for turn in turns("x")) + 60


# What a server does not take


def refusing(name, status=400, body=None):
    body = body or {"error": {"code": "unsupported_parameter", "param": name, "message": f"Unsupported parameter: '{name}'"}}
    return lambda prompt, before, asked, answer: Answer(status, body, "refused") if name in asked else answer


def with_options(**options):
    return [request._replace(options=options) for request in asked()]


def test_an_option_that_is_not_taken_is_dropped_recorded_and_said_once(capsys):
    with served(refusing("parallel_tool_calls")) as (server, client):
        replies = client.generate(with_options(parallel_tool_calls=False, tool_choice="auto"))
        assert [(reply.text, reply.calls) for reply in replies] == WANTED
        assert client.describe()["dropped_parameters"] == ["parallel_tool_calls"] and sum(server.asked.values()) == 5
        state = client.state()
    said = capsys.readouterr().err
    assert said.count("warning: ") == 1 and "takes no parallel_tool_calls: rows are asked without it (Unsupported" in said
    with served(refusing("parallel_tool_calls")) as (server, client):
        client.restore(state)
        client.generate(with_options(parallel_tool_calls=False))
        assert sum(server.asked.values()) == 4


def test_a_format_that_is_not_taken_is_never_dropped_silently(capsys):
    example = parse_example({"messages": turns("which city?"), "object": {"city": "Oslo"}, "schema": SCHEMA}, "w")
    body = {"detail": [{"type": "extra_forbidden", "loc": ["body", "response_format", "json_schema"], "msg": "Extra inputs"}]}
    with served(refusing("response_format", 422, body), rows=[example]) as (_, client):
        (reply,) = client.generate(asked("structured", [example]))
        assert reply.text == '{"city":"Oslo"}' and client.describe()["dropped_parameters"] == ["response_format"]
    assert "takes no response_format" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, None),
        (422, {"detail": [{"type": "extra_forbidden", "loc": ["body", "tools", 0, "function"], "msg": "Extra inputs are not permitted"}]}),
        (400, {"error": {"message": "registry/library/tiny:latest does not support tools", "type": "api_error"}}),
        (400, {"object": "error", "message": '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'}),
    ],
)
def test_a_model_without_tools_ends_the_run_in_one_line(status, body):
    with served(refusing("tools", status, body)) as (server, client):
        with pytest.raises(UserError, match=r"deployment 'simulator' at 127\.0\.0\.1 takes no tools \(.*\): evaluate with --ask text") as caught:
            client.generate(asked())
        assert "\n" not in str(caught.value) and sum(server.asked.values()) == 1


# What is read


def completion(message, reason="tool_calls"):
    return {"choices": [{"finish_reason": reason, "message": message}]}


def made(arguments, name="f"):
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    ("message", "reply"),
    [
        ({"content": None, "tool_calls": [made('{"a": 1}')]}, Reply("", calls=[{"name": "f", "arguments": '{"a": 1}'}])),
        ({"content": "so", "tool_calls": [made('{"a":')]}, Reply("so", calls=[{"name": "f", "arguments": '{"a":'}])),
        ({"tool_calls": [made(None), made(" "), made({"a": 1.5})]},
         Reply("", calls=[{"name": "f", "arguments": text} for text in ("{}", "{}", '{"a":1.5}')])),
        ({"content": None, "function_call": {"name": "f", "arguments": "{}"}}, Reply("", calls=[{"name": "f", "arguments": "{}"}])),
        ({"content": "hello"}, Reply("hello", calls=[])),
        ({"content": "hello", "tool_calls": None}, Reply("hello", calls=[])),
        ({"content": [{"type": "text", "text": "a"}], "tool_calls": []}, Reply("a", calls=[])),
        ({"content": "<think>\nhm\n</think>\n\nhello"}, Reply("hello", calls=[])),
        ({"content": "<think>cut"}, Reply("<think>cut", calls=[])),
        ({"content": None, "refusal": "I must not"}, Reply("I must not", "refusal", calls=[])),
    ],
)  # fmt: skip
def test_native_replies(message, reply):
    assert read_completion(completion(message), native=True) == reply


def test_the_reasons_of_calls_are_a_stop_and_others_stay():
    message = {"content": None, "tool_calls": [made("{}")]}
    for reason, meant in (("tool_calls", "stop"), ("function_call", "stop"), ("length", "length"), ("content_filter", "content_filter")):
        assert read_completion(completion(message, reason), native=True).finish_reason == meant


@pytest.mark.parametrize("calls", ["f", [5], [{"function": {"arguments": "{}"}}], [made(5)], [made(["a"])]])
def test_calls_that_cannot_be_read_are_an_error(calls):
    assert read_completion(completion({"tool_calls": calls}), native=True).finish_reason == "error"


def test_text_form_loses_its_thinking_and_reads_no_calls():
    message = {"content": "<think>hm</think>x", "tool_calls": [made("{}")]}
    assert read_completion(completion(message)) == Reply("x")


def test_halves_of_surrogate_pairs_and_the_key_in_calls():
    text = json.dumps({"a": f"x\ud800 {KEY}"}, ensure_ascii=False)

    def script(prompt, before, asked, answer):
        choice = answer.body["choices"][0] | {"message": {"content": None, "tool_calls": [made(text)]}}
        return replace(answer, body=answer.body | {"choices": [choice]})

    with served(script) as (_, client):
        (reply,) = client.generate(asked(rows=ROWS[:1]))
    assert reply.calls == [{"name": "f", "arguments": '{"a": "x\ufffd ***"}'}]


# The whole way


def test_an_evaluation_and_its_replay_score_the_same(run_script, eval_script, write_rows, tmp_path, monkeypatch):
    path = write_rows("rows.jsonl", [example.to_json() for example in ROWS])
    with Scripted(ROWS, plain, key=KEY) as server:
        values = {"ENDPOINT": server.url, "DEPLOYMENT": "simulator", "API_KEY": KEY, "API_VERSION": "2024-10-21"}
        for name, value in values.items():
            monkeypatch.setenv(f"AZURE_{name}", value)
        words = ["--track", "toolcall", "--dataset", path, "--out"]
        code, _, said = run_script(eval_script, *words, tmp_path / "azure.json", "--model-kind", "azure")
        assert code == 0, said
    replies = tmp_path / "azure.rows.jsonl"
    code, _, said = run_script(eval_script, *words, tmp_path / "replay.json", "--model-kind", "replay", "--replies", replies)
    assert code == 0, said
    asked, replayed = (json.loads((tmp_path / name).read_text()) for name in ("azure.json", "replay.json"))
    assert asked["metrics"] == replayed["metrics"] and asked["metrics"]["args_exact_rate"] == asked["metrics"]["decision_match_rate"] == 1.0
    lines = [[json.loads(line)["reply"] for line in (tmp_path / f"{name}.rows.jsonl").read_text().splitlines()] for name in ("azure", "replay")]
    assert lines[0] == lines[1]


def test_replies_recorded_in_openais_form_are_not_scored_0(run_script, eval_script, write_rows, tmp_path):
    """Of a prompt with its completion too, as a team's log has them."""
    rows = [{"id": "a", "prompt": "p", "completion": '<tool_call name="order_status">{"order":"A1"}</tool_call>'}]
    recorded = [{"type": "function", "function": {"name": "order_status", "arguments": '{"order": "A1"}'}}]
    message = {"role": "assistant", "content": None, "tool_calls": recorded}
    for number, prediction in enumerate((recorded, message, json.dumps(recorded), json.dumps(message), {"choices": [{"message": message}]})):
        replies = write_rows(f"{number}.replies.jsonl", [{"id": "a", "prediction": prediction, "finish_reason": "tool_calls"}])
        words = ["--track", "toolcall", "--model-kind", "replay", "--dataset", write_rows("rows.jsonl", rows), "--replies", replies]
        code, _, said = run_script(eval_script, *words, "--out", tmp_path / f"{number}.json")
        assert code == 0, said
        assert json.loads((tmp_path / f"{number}.json").read_text())["metrics"]["args_exact_rate"] == 1.0
