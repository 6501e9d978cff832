"""Replies in the chat formats of local models: what is a call, and that its arguments stay as they were written."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_swap.clients.native_replies import PHI_CALLS, TAGGED_CALLS, read_call, read_marked

NASTY = 'a ] } " \\ <|/tool_call|> <|tool_call|> </tool_call> functools[{ [1'
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text() | st.just(NASTY),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=8,
)
CALLS = st.lists(st.tuples(st.text(min_size=1), st.dictionaries(st.text(), JSON, max_size=3)), min_size=1, max_size=3)


def phi(text: str) -> tuple[str, list[tuple[str, str]]]:
    return parts(read_marked(text, PHI_CALLS))


def tagged(text: str) -> tuple[str, list[tuple[str, str]]]:
    return parts(read_marked(text, TAGGED_CALLS))


def parts(spoken) -> tuple[str, list[tuple[str, str]]]:
    return spoken.content, [(call["name"], call["arguments"]) for call in spoken.calls]


def one(name: str, arguments: str) -> str:
    return f'{{"name": "{name}", "arguments": {arguments}}}'


@pytest.mark.parametrize("form", ["<|tool_call|>[{}]<|/tool_call|>", "<|tool_call|>[{}]", "<|tool_call|>{}<|/tool_call|>", "<|tool_call|>\n{}", "functools[{}]"])
@given(calls=CALLS)
def test_phi_4_minis_calls_are_read_whatever_stands_in_their_arguments(form, calls):
    texts = [json.dumps(arguments, ensure_ascii=False) for _, arguments in calls]
    written = ", ".join(
        f'{{"name": {json.dumps(name)}, "arguments": {text}}}' for (name, _), text in zip(calls, texts, strict=True)
    )
    want = [(name, text) for (name, _), text in zip(calls, texts, strict=True)]
    assert phi(form.replace("{}", written)) == ("", want)
    assert phi("Let me look. " + form.replace("{}", written)) == ("Let me look.", want)


@given(calls=CALLS)
def test_calls_between_tags_are_read_whatever_stands_in_their_arguments(calls):
    texts = [json.dumps(arguments) for _, arguments in calls]
    written = [f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": {text}}}\n</tool_call>' for (name, _), text in zip(calls, texts, strict=True)]
    assert tagged("I will.\n" + "\n".join(written)) == ("I will.", [(name, text) for (name, _), text in zip(calls, texts, strict=True)])


@pytest.mark.parametrize(
    "arguments",
    ['{"a": 1, "a": 2}', '{"a": NaN}', '{"a": 0.10000000000000000001}', f'{{"a": {"9" * 5000}}}', "{}", "[1]", '"{\\"a\\": 1}"', '{ "a" :1}', "null"],
)
def test_arguments_stay_as_they_were_written(arguments):
    assert phi(f"<|tool_call|>[{one('f', arguments)}]<|/tool_call|>") == ("", [("f", arguments)])
    assert tagged(f"<tool_call>{one('f', arguments)}</tool_call>") == ("", [("f", arguments)])


@pytest.mark.parametrize(
    ("text", "name", "arguments"),
    [
        ('<|tool_call|>[{"name": "f", "arguments": {"a": }}]<|/tool_call|>', "f", '{"a": }}]'),
        ('<|tool_call|>[{"name": "f", "arguments": {"a": 1', "f", '{"a": 1'),
        ('<|tool_call|>{"name": "f", "arguments": {"a": 1}<|/tool_call|>', "f", '{"name": "f", "arguments": {"a": 1}'),
        ('<|tool_call|>[{"name": "f", "arguments": {"a": 1}}<|/tool_call|>', "f", '{"a": 1}}'),
        ('<|tool_call|>[{"name": "f", "arguments": {}}] and so on<|/tool_call|>', "f", "{}}] and so on"),
        ('<|tool_call|>[{"name": "f", "arguments": ', "f", '[{"name": "f", "arguments":'),
        ("<|tool_call|>f(a=1)<|/tool_call|>", "", "f(a=1)"),
        ("<|tool_call|>", "", ""),
        ('functools[{"name": "f", "arguments": {"a": 1}', "f", '[{"name": "f", "arguments": {"a": 1}'),
    ],
)
def test_a_broken_call_is_a_call_whose_arguments_are_no_json(text, name, arguments):
    assert phi(text) == ("", [(name, arguments)])
    with pytest.raises(ValueError):
        json.loads(arguments)


def test_a_broken_call_ends_at_its_mark():
    text = f"One <tool_call>{{broken</tool_call> two <tool_call>{one('g', '{}')}</tool_call> three"
    assert tagged(text) == ("One  two  three", [("", "{broken"), ("g", "{}")])


@pytest.mark.parametrize("text", ["Hello.", "", '{"name": "f", "arguments": {}}', "Use functools[reduce] or functools.", "[1, 2]", "a <|/tool_call|> b"])
def test_a_plain_text_is_no_call(text):
    assert phi(text) == (text, [])


def test_an_empty_list_is_no_call():
    assert phi("<|tool_call|>[]<|/tool_call|>") == ("", [])


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ('{"name": "f", "parameters": {"a": 1}}', ("f", '{"a": 1}')),
        ('{"name": "f", "description": "d", "parameters": {"b": 1}, "arguments": {"a": 1}}', ("f", '{"a": 1}')),
        ('{"name": "f"}', ("f", "")),
        ('{"name": 7, "arguments": {}}', ("", '{"name": 7, "arguments": {}}')),
        ('{"name": "f", "arguments": {}, "arguments": {"a": 1}}', ("", '{"name": "f", "arguments": {}, "arguments": {"a": 1}}')),
        ('"f"', ("", '"f"')),
        ("{" * 9 + '"name": "f\\', ("", "{" * 9 + '"name": "f\\')),
        ("[" * 100_000, ("", "[" * 100_000)),
    ],
)
def test_one_call(text, call):
    told = read_call(text)
    assert (told["name"], told["arguments"]) == call


