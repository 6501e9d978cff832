"""What servers other than Azure's own say, each in its own words over a real socket: to a good client they are all the same model."""

from dataclasses import replace

import pytest

from slm_swap.clients.completions import content_text, read_completion, refusal_reason, rejected_parameter
from slm_swap.common.errors import UserError
from slm_swap.demo.azure_simulator import Answer
from slm_swap.rows.examples import Example
from slm_swap.rows.prompts import Request
from tests.support import scripted

KEY = "abcdef0123456789-of-no-server"
ROWS = [Example(f"row {n}", f'<tool_call name="f">{{"n":{n}}}</tool_call>') for n in range(40)]
NO_RETRY = {"x-should-retry": "false"}


def served(script, **options):
    return scripted.served(ROWS, script, KEY, **options)


def chat(rows):
    return [Request([{"role": "user", "content": row.prompt}]) for row in rows]


def texts(client, rows=ROWS):
    return [reply.text for reply in client.generate(chat(rows))]


RIGHT = [row.completion for row in ROWS]


def refusing(name, status, body):
    """A script that refuses any request with the parameter `name`."""
    return lambda prompt, before, asked, answer: Answer(status, body, "refused") if name in asked else answer


# Parameters that are not taken


@pytest.mark.parametrize(
    ("name", "status", "body", "sent"),
    [
        ("seed", 422, {"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "no such field", "input": 1}]}, {}),
        (
            "max_completion_tokens", 422,
            {"error": {"message": "bad input", "details": [{"type": "extra_forbidden", "loc": ["max_completion_tokens"]}]}},
            {"max_tokens": 256},
        ),
        (
            "max_completion_tokens", 400,
            {"error": {"code": 400, "message": "Validation error at #/max_completion_tokens: Extra inputs are not permitted"}},
            {"max_tokens": 256},
        ),
        ("temperature", 400, {"error": {"code": None, "message": "Unsupported value: 'temperature' does not support 0 here."}}, {}),
        ("temperature", 400, {"error": {"code": "BadRequest", "message": "Unsupported parameter: 'temperature' is not for this."}}, {}),
        ("seed", 400, {"error": {"message": 'Invalid JSON payload received. Unknown name "seed": Cannot find field.'}}, {}),
        ("seed", 400, {"error": {"message": "property 'seed' is unsupported", "type": "invalid_request_error"}}, {}),
        ("seed", 400, {"error": {"message": "UnsupportedParamsError: x does not support parameters: ['seed']"}}, {}),
    ],
)  # fmt: skip
def test_the_parameter_that_a_refusal_names_is_dropped_and_recorded(name, status, body, sent):
    with served(refusing(name, status, body)) as (server, client):
        assert texts(client) == RIGHT
        told, asked = client.describe(), sum(server.asked.values())
    kept = {"temperature": 0.0, "seed": 42, "max_completion_tokens": 256}
    assert told["parameters"] == {key: value for key, value in kept.items() if key != name} | sent
    assert told["dropped_parameters"] == [name] and asked == len(ROWS) + 1


@pytest.mark.parametrize(
    "body",
    [
        {"detail": [{"type": "extra_forbidden", "loc": ["body", "messages", 0, "name"], "msg": "Extra inputs are not permitted"}]},
        {"error": {"message": "'seed' must be an integer"}},
        {"detail": [{"type": "missing", "loc": ["body", "seed"], "msg": "Field required"}]},
        {"error": {"message": "Unsupported parameter: 'something_else'"}},
    ],
)
def test_nothing_is_dropped_that_was_not_sent_or_not_named(body):
    with served(lambda prompt, before, asked, answer: Answer(400, body, "refused")) as (_, client):
        (reply,) = client.generate(chat(ROWS[:1]))
        assert reply.finish_reason == "error" and client.describe()["dropped_parameters"] == []


def test_only_a_refusal_of_the_request_names_a_parameter():
    assert rejected_parameter(500, None, None, "Unsupported parameter: 'seed'") is None
    text = "Invalid parameter: 'response_format' of type 'json_schema' is not supported with this model."
    assert rejected_parameter(400, None, None, text) == "response_format"
    assert rejected_parameter(400, "unsupported_value", "response_format.type", "...") == "response_format"
    assert rejected_parameter(422, None, None, "Unsupported parameter: 'seed'") == "seed"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"detail": [{"loc": ["body", "n"], "msg": "too many"}, {"loc": [], "msg": "odd"}]}, "body.n: too many; : odd"),
        ({"detail": "not here"}, "not here"),
        ({"error": "just text"}, "just text"),
        ({"code": "x", "error": "denied for the prompt"}, "denied for the prompt"),
        ({"error": {"message": "m", "details": [{"loc": ["a"], "msg": "b"}]}}, "m; a: b"),
        ({"message": "top"}, "top"),
        ({"odd": 1}, '{"odd": 1}'),
        ("a page", "a page"),
        (" ", None),
        (None, None),
    ],
)
def test_the_reason_is_read_from_wherever_it_stands(body, reason):
    assert refusal_reason(body) == reason


def test_the_reason_is_shown():
    body = {"detail": [{"type": "too_long", "loc": ["body", "messages"], "msg": "at most 3 messages"}]}
    with served(lambda prompt, before, asked, answer: Answer(422, body, "refused")) as (_, client):
        (reply,) = client.generate(chat(ROWS[:1]))
    assert reply.error == "422 after 1 try: body.messages: at most 3 messages"


# Contents


def saying(**message):
    def script(prompt, before, asked, answer):
        text = answer.body["choices"][0]["message"]["content"]
        made = {name: value(text) if callable(value) else value for name, value in message.items()}
        choice = answer.body["choices"][0] | {"message": {"role": "assistant"} | made}
        return replace(answer, body=answer.body | {"choices": [choice]})

    return script


@pytest.mark.parametrize(
    "message",
    [
        {"content": lambda text: [{"type": "text", "text": text}]},
        {"content": lambda text: [{"type": "text", "text": text[:7]}, {"type": "output_text", "text": text[7:]}]},
        {"content": lambda text: [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": text}]},
        {"content": lambda text: text, "reasoning_content": "hm", "reasoning": "hm"},
    ],
)
def test_parts_of_text_are_joined_and_thinking_is_dropped(message):
    with served(saying(**message)) as (_, client):
        assert texts(client) == RIGHT


def test_odd_contents():
    assert content_text(None) == ("", None) and content_text([]) == ("", None)
    assert content_text([{"type": "thinking", "thinking": "hm"}]) == ("", None)
    assert content_text([{"type": "refusal", "refusal": "no"}]) == ("", "no")
    for odd in (["x"], [{"type": "image_url"}], [{"type": "text", "text": None}], {"type": "text"}, 5):
        with pytest.raises(ValueError):
            content_text(odd)
    body = {"choices": [{"finish_reason": "stop", "message": {"content": [{"type": "refusal", "refusal": "I must not"}]}}]}
    assert (read_completion(body).text, read_completion(body).finish_reason) == ("I must not", "refusal")


@pytest.mark.parametrize("reason", ["length", "max_tokens", "model_length"])
def test_every_word_for_the_limit_is_length(reason):
    assert read_completion({"choices": [{"finish_reason": reason, "message": {"content": "x"}}]}).finish_reason == "length"


# Filters that a gateway passes on, and 403


def on_some(count, status, body):
    """A script that refuses the first `count` rows whenever they are asked."""
    refused = {row.prompt for row in ROWS[:count]}
    return lambda prompt, before, asked, answer: Answer(status, body, "refused", NO_RETRY) if prompt in refused else answer


FILTERS = [
    (400, {"error": {"code": "400", "message": "refused", "provider": {"inner": {"code": "ResponsibleAIPolicyViolation"}}}}),
    (400, {"error": {"code": "400", "message": "ContentPolicyViolationError: the answer was withheld"}}),
    (400, {"error": {"code": None, "message": "The prompt triggered the provider's content management policy."}}),
    (403, {"statusCode": 403, "message": "The request did not pass content safety checks."}),
    (403, {"code": "denied", "error": "This violates usage guidelines. Failed: SAFETY_CHECK_TYPE_X"}),
]


@pytest.mark.parametrize(("status", "body"), FILTERS)
@pytest.mark.parametrize("count", [1, 10])
def test_a_filter_that_is_passed_on_is_that_rows_end(status, body, count):
    with served(on_some(count, status, body)) as (_, client):
        replies = client.generate(chat(ROWS))
    assert [reply.finish_reason for reply in replies] == ["content_filter"] * count + ["stop"] * (len(ROWS) - count)
    assert all(reply.error is None for reply in replies)


DENIED = {"error": {"message": "Access to this is not allowed."}}


@pytest.mark.parametrize("concurrency", [1, 8])
@pytest.mark.parametrize("count", [1, 4])
def test_a_403_is_its_rows_error_where_others_are_answered(count, concurrency):
    """Of the first rows too: the others tell that the key is good."""
    with served(on_some(count, 403, DENIED), concurrency=concurrency) as (_, client):
        replies = client.generate(chat(ROWS))
    assert [reply.text for reply in replies[count:]] == RIGHT[count:]
    assert all(reply.finish_reason == "error" and not reply.transient for reply in replies[:count])
    assert replies[0].error.startswith("403 after 1 try: Access to this is not allowed. (no row was answered before it: check that AZURE_")


def test_a_key_that_is_denied_everything_ends_the_run_after_a_few():
    with served(lambda prompt, before, asked, answer: Answer(403, DENIED, "refused", NO_RETRY)) as (server, client):
        said = r"denied 5 rows in a row, and a harmless request \(403 after 1 try: Access to this is not allowed.*check that AZURE_API_KEY"
        with pytest.raises(UserError, match=said):
            client.generate(chat(ROWS))
        assert sum(server.asked.values()) == 6


def test_many_denied_rows_at_the_start_hide_no_others():
    """As after an interruption, where a command goes on with the rows that have no reply."""
    with served(on_some(30, 403, DENIED)) as (_, client):
        replies = client.generate(chat(ROWS))
    assert [reply.text for reply in replies[30:]] == RIGHT[30:]
    assert all(reply.finish_reason == "error" for reply in replies[:30])


def test_a_key_that_is_denied_from_some_row_on_ends_the_run():
    """Nothing is lost to it but a few rows: what was answered before is asked again, and is denied too."""
    with served(lambda prompt, before, asked, answer: answer) as (server, client):
        assert texts(client, ROWS[:2]) == RIGHT[:2]
        server.script = on_some(40, 403, DENIED)
        with pytest.raises(UserError, match=r"denied 2\d rows in a row, and one that was answered before \(403 after 1 try: [^(]*\): check"):
            client.generate(chat(ROWS[2:] * 2))
        assert sum(server.asked.values()) < 70


def test_many_rows_in_a_row_may_be_denied_for_what_they_say():
    with served(lambda prompt, before, asked, answer: answer, concurrency=4) as (server, client):
        assert texts(client, ROWS[39:]) == RIGHT[39:]
        server.script = on_some(35, 403, DENIED)
        replies = client.generate(chat(ROWS))
        assert [reply.finish_reason for reply in replies] == ["error"] * 35 + ["stop"] * 5
        assert server.asked[ROWS[39].prompt] == 3  # twice as a row, once to see whether the key is still good
