"""Recorded replies in the forms in which hosted models give them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_swap.clients.protocol import Reply
from slm_swap.clients.recorded import FINISH_REASONS, read_recorded
from slm_swap.clients.replay_client import ReplayClient
from slm_swap.common.errors import UserError
from slm_swap.rows.examples import Example
from slm_swap.rows.lines import decode_line

ARGUMENTS = '{"city":"Oslo", "nights": 2.50}'
LISTED = [{"id": "call_1", "type": "function", "function": {"name": "book", "arguments": ARGUMENTS}}]
MESSAGE = {"role": "assistant", "content": None, "tool_calls": LISTED}
COMPLETION = {
    "object": "chat.completion", "choices": [{"index": 0, "finish_reason": "tool_calls", "message": MESSAGE}],
    "usage": {"prompt_tokens": 50, "completion_tokens": 9, "prompt_tokens_details": {"cached_tokens": 20}},
}  # fmt: skip
CALLS = [{"name": "book", "arguments": ARGUMENTS}]


def read(line):
    return read_recorded(decode_line(json.dumps(line).encode()), "r.jsonl:1", decode_line)


@pytest.mark.parametrize("name", ["prediction", "reply", "output", "response"])
@pytest.mark.parametrize("value", [LISTED, MESSAGE, {"tool_calls": LISTED}, {"function_call": LISTED[0]["function"], "content": None}])
def test_calls_in_openais_form(name, value):
    """As objects and as JSON text: the arguments stay as the model wrote them."""
    assert read({"id": "a", name: value}) == Reply("", calls=CALLS)
    assert read({"id": "a", name: json.dumps(value, indent=1)}) == Reply("", calls=CALLS)


def test_a_whole_completion_has_its_tokens_and_its_end():
    wanted = Reply("", input_tokens=50, output_tokens=9, cached_tokens=20, calls=CALLS)
    assert read({"id": "a", "output": COMPLETION}) == wanted and read({"id": "a", "output": json.dumps(COMPLETION)}) == wanted
    assert read(COMPLETION | {"id": "a"}) == wanted
    told = {"finish_reason": "length", "tokens": {"input": 1}}  # what the line says itself goes first
    assert read({"id": "a", "output": COMPLETION} | told) == Reply("", "length", input_tokens=1, calls=CALLS)


def test_a_line_that_is_the_message_itself():
    assert read({"id": "a"} | MESSAGE) == Reply("", calls=CALLS)
    assert read({"id": "a", "role": "assistant", "content": "hello"}) == Reply("hello")


def test_arguments_that_are_objects_and_calls_without_arguments():
    for told, written in (({"a": 1}, '{"a":1}'), (None, "{}"), ("", "{}"), (" ", "{}"), ("{", "{")):
        assert read({"prediction": [{"function": {"name": "f", "arguments": told}}]}).calls == [{"name": "f", "arguments": written}]
    digits = b'{"prediction": [{"function": {"name": "f", "arguments": {"x": 12345678901234567.25}}}]}'
    assert read_recorded(decode_line(digits), "w", decode_line).calls[0]["arguments"] == '{"x":12345678901234567.25}'


@pytest.mark.parametrize(
    ("value", "reply"),
    [
        (None, Reply("")),
        ([], Reply("", calls=[])),
        ({"role": "assistant", "content": None}, Reply("", calls=[])),
        ({"content": "no tool needed", "tool_calls": None}, Reply("no tool needed")),
        ({"role": "assistant", "content": '<tool_call name="f">{}</tool_call>'}, Reply('<tool_call name="f">{}</tool_call>')),
        ({"content": "one moment", "tool_calls": LISTED}, Reply("one moment", calls=CALLS)),
        ({"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, Reply("ab")),
        ({"role": "assistant", "content": None, "refusal": "I must not"}, Reply("I must not", "refusal")),
        ([{"name": "f", "arguments": "{}"}], Reply("", calls=[{"name": "f", "arguments": "{}"}])),
    ],
)
def test_replies_without_calls_and_beside_them(value, reply):
    """A message of text alone stays in text form: a model that was asked for text has its call there."""
    assert read({"id": "a", "prediction": value}) == reply


@pytest.mark.parametrize(
    "text",
    [
        "", "plain", "[1, 2]", '{"a": 1}', '{"function": "f"}', '{"role": "admin", "content": "x"}', "[]", '[{"function": 1}]',
        '{"choices": ["red", "blue"]}', '{"tool_calls": 5}', '[{"function": {"name": "f"}', '{"tool_calls": [',
    ],
)  # fmt: skip
def test_any_other_text_is_the_reply_itself(text):
    assert read({"id": "a", "prediction": text}) == Reply(text)


@given(st.text(max_size=30))
def test_every_text_is_a_reply(text):
    assert read_recorded({"prediction": text}, "w").text == text.encode("utf-8", "replace").decode()


@pytest.mark.parametrize("value", [5, True, {"a": 1}, ["x"], [{"function": "f"}], {"tool_calls": "f"}, {"choices": [5]}, {"role": "user"}])
def test_what_is_no_reply_is_refused(value):
    with pytest.raises(UserError, match=r"r\.jsonl:1: `output` must be a text, .* in OpenAI's form"):
        read({"id": "a", "output": value})


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("tool_calls", "stop"), ("function_call", "stop"), ("end_turn", "stop"), ("tool_use", "stop"), ("stop_sequence", "stop"),
        ("eos", "stop"), ("STOP", "stop"), ("COMPLETE", "stop"), (None, "stop"), ("", "stop"), ("max_tokens", "length"),
        ("MAX_TOKENS", "length"), ("model_length", "length"), ("SAFETY", "content_filter"), ("guardrail_intervened", "content_filter"),
        *((name, name) for name in FINISH_REASONS),
    ],
)  # fmt: skip
def test_the_words_of_other_providers_for_an_end(given, meant):
    assert read({"prediction": "x", "finish_reason": given}).finish_reason == meant


def test_a_word_that_nobody_knows_is_refused_with_the_list():
    with pytest.raises(UserError, match=r"finish_reason 'tired' is none of stop, length, .*end_turn.*safety"):
        read({"prediction": "x", "finish_reason": "tired"})


def test_the_calls_of_a_rows_file_are_read_and_those_that_a_row_wants_are_not():
    calls = [{"name": "f", "arguments": '{"a": 1}'}]
    assert read({"reply": 'so\n<tool_call name="f">{"a": 1}</tool_call>', "calls": calls, "reference": "x"}) == Reply("so", calls=calls)
    assert read({"reply": '<tool_call name="f">{"a": 1}</tool_call>', "calls": calls}) == Reply("", calls=calls)
    assert read({"reply": "", "calls": []}) == Reply("", calls=[])
    assert read({"reply": "so", "calls": None}) == Reply("so")
    assert read({"prediction": "so", "calls": [{"name": "f", "arguments": {}}]}) == Reply("so")
    with pytest.raises(UserError, match="`calls` must be a list"):
        read({"reply": "", "calls": [{"name": "f", "arguments": {}}]})


def test_halves_of_surrogate_pairs_in_calls():
    line = {"prediction": [{"function": {"name": "f", "arguments": '{"a":"\ud800"}'}}]}
    assert read_recorded(line, "w").calls == [{"name": "f", "arguments": '{"a":"?"}'}]


def test_empty_replies_are_counted(write_rows):
    examples = [Example(f"p{n}", "{}", id=f"r{n}") for n in range(6)]
    ends = [{"prediction": ""}, {"prediction": None}, {"prediction": " \n"}, {"prediction": "", "finish_reason": "length"}]
    lines = [{"id": f"r{n}"} | line for n, line in enumerate([*ends, {"prediction": "x"}, {"prediction": LISTED}])]
    lines.append({"id": "of no row", "prediction": ""})
    assert ReplayClient(write_rows("r.jsonl", lines), examples).warning == "3 of 6 recorded replies are empty: was the recording complete?"
    assert ReplayClient(write_rows("full.jsonl", [{"id": "r0", "prediction": "x"}]), examples[:1]).warning is None


def test_an_evaluation_warns_of_empty_replies(run_script, eval_script, write_rows, tmp_path):
    rows = [{"id": f"r{n}", "prompt": "p", "completion": "{}"} for n in range(3)]
    replies = write_rows("r.jsonl", [{"id": f"r{n}", "prediction": "{}" if n else ""} for n in range(3)])
    words = ["--track", "structured", "--model-kind", "replay", "--dataset", write_rows("rows.jsonl", rows), "--replies", replies]
    code, _, said = run_script(eval_script, *words, "--out", tmp_path / "out.json")
    assert code == 0 and "warning: 1 of 3 recorded replies are empty: was the recording complete?" in said


@pytest.mark.parametrize("text", ['{"tool_calls": [{"name": "f", "arguments": "{}"}]}', '{"role": "assistant", "content": "hi"}', "a\n", ""])
def test_a_rows_file_gives_back_the_text_that_came(text):
    """A model that wrote what looks like an API's reply was not right, and is not by being replayed."""
    assert read_recorded({"id": "1", "reply": text, "calls": None, "scores": {"valid_call": 0.0}}, "w") == Reply(text)
