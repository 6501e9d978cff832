"""Whether a reply is of the form that was asked for, whatever its reference says."""

import pytest

from slm_swap.rows.examples import Example
from slm_swap.scoring.form import Form, form_of

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "nights": {"type": "integer", "minimum": 1}}, "required": ["city"]}
TOOLS = [{"name": "book", "description": "", "parameters": SCHEMA}]
PROMPT = Example("p", "c", "r", tools=TOOLS)
CHAT = Example("", "c", "r", tools=TOOLS, messages=[{"role": "user", "content": "hi"}], calls=[])
BARE = Example("p", "c", "r")
STRUCTURED = Example("p", "c", "r", schema=SCHEMA)
GOOD, BAD, UNKNOWN = Form(True, True), Form(False, False), Form(None, None)


def call(arguments: str, name: str = "book") -> str:
    return f'<tool_call name="{name}">{arguments}</tool_call>'


@pytest.mark.parametrize(
    ("example", "text", "form"),
    [
        (PROMPT, call('{"city":"Oslo","nights":2}'), GOOD),
        (PROMPT, call('{"city":"Oslo","nights":0}'), Form(True, False)),
        (PROMPT, call('{"nights":2}'), Form(True, False)),
        (PROMPT, call('{"city":"Oslo","pets":1}'), Form(True, False)),  # an argument that the tool does not list
        (PROMPT, call('{"city":"Oslo"}', "cancel"), BAD),  # not on offer
        (PROMPT, call('{"city":"Oslo"'), BAD),
        (PROMPT, call('{"city":"Oslo"}') * 2, BAD),  # one call is wanted
        (CHAT, call('{"city":"Oslo"}') * 2, GOOD),
        (PROMPT, "Which city?", BAD),
        (CHAT, "Which city?", GOOD),
        (CHAT, "", BAD),
        (CHAT, "<think>hm", BAD),
        (CHAT, '{"name": "book", "arguments": {"city": "Oslo"}}', BAD),  # a call in a form that nobody reads
        (BARE, call('{"anything":1}', "any"), Form(True, None)),
        (BARE, "no", Form(False, None)),
    ],
)
def test_calls(example, text, form):
    assert form_of("toolcall", example, text) == form


def test_native_calls():
    assert form_of("toolcall", CHAT, "", calls=[{"name": "book", "arguments": '{"city":"Oslo"}'}]) == GOOD
    assert form_of("toolcall", CHAT, "", calls=[{"name": "book", "arguments": '{"city":7}'}]) == Form(True, False)
    assert form_of("toolcall", CHAT, "", calls=[{"name": "book", "arguments": '{"city":'}]) == BAD
    assert form_of("toolcall", CHAT, "Which city?", calls=[]) == GOOD


@pytest.mark.parametrize(
    ("example", "text", "form"),
    [
        (STRUCTURED, ' {"city":"Oslo"}\n', GOOD),
        (STRUCTURED, '{"city":1}', Form(True, False)),
        (STRUCTURED, "[]", Form(True, False)),
        (STRUCTURED, '{"city":"a","city":"b"}', BAD),
        (STRUCTURED, 'Here: {"city":"Oslo"}', BAD),
        (BARE, "[1]", Form(True, None)),
        (Example("p", "c", "r", schema={"$ref": "https://example.com/x"}), "{}", Form(True, None)),  # nothing is fetched
    ],
)
def test_values(example, text, form):
    assert form_of("structured", example, text) == form


@pytest.mark.parametrize("reason", ["error", "content_filter", "refusal", "prompt_too_long"])
def test_of_no_reply_nothing_is_said(reason):
    assert form_of("toolcall", PROMPT, call('{"city":"Oslo"}'), reason) == UNKNOWN


def test_a_cut_reply_is_what_it_is():
    assert form_of("structured", STRUCTURED, '{"city":"Os', "length") == BAD and form_of("structured", STRUCTURED, '{"city":"Oslo"}', "length") == GOOD
