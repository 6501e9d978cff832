"""Asking a local checkpoint by its own chat template: what it is shown, what it is refused for, and how its replies are read."""

import json

import pytest

from slm_swap import slm_client
from slm_swap.clients.endings import require_ending
from slm_swap.clients.loading import encode_prompts
from slm_swap.clients.native import SCHEMA_SENTENCE, CannotShow, chat_format, native_prompt, native_turn, read_reply
from slm_swap.clients.native_replies import TemplateReader
from slm_swap.clients.thinking import use_thinking
from slm_swap.common.errors import UserError
from slm_swap.common.settings import Settings
from slm_swap.rows.prompts import Request
from slm_swap.slm_client import SLMClient, local_client, measure_workload
from tests.support.chat_templates import tokenizer_of

CITY = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "now": {"type": "boolean"}}}
TOOLS = [{"name": "get_weather", "description": "The weather.", "parameters": CITY}]
USER = {"role": "user", "content": "Weather in Oslo?"}
TURN = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo", "days": 0.12345678901234567891}'}}],
}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "rain"}
HISTORY = [{"role": "system", "content": "Be brief."}, USER, TURN, RESULT, {"role": "user", "content": "And Rome?"}]
FAMILIES = ("phi",  "qwen2_5", "qwen3", "qwen3_instruct_2507", "llama3_1", "qwen3_5_nothink", "qwen3_5_think")
NASTY = {"city": 'O"s]l}o \\ {"name": "x", "arguments": {}} <|tool_call|> <|/tool_call|>', "days": 3, "now": True}


@pytest.fixture(scope="module", params=FAMILIES)
def tokenizer(request):
    return tokenizer_of(request.param)


def asked(*messages, tools=TOOLS, **options) -> Request:
    return Request(list(messages or [USER]), tools, native=True, **options)


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_prompt_shows_tools_earlier_calls_and_results(tokenizer):
    shown = native_prompt(tokenizer, asked(*HISTORY))
    for part in ("Be brief.", '"get_weather"', "The weather.", "Oslo", "0.12345678901234567891", "rain", "And Rome?"):
        assert part in shown, part
    assert shown.index("The weather.") < shown.index("Oslo") < shown.index("rain") < shown.index("And Rome?")
    assert "number-" not in shown and "None" not in shown


def test_phi_4_minis_prompt_is_that_of_its_model_card():
    shown = native_prompt(tokenizer_of("phi"), asked(*HISTORY))
    assert shown == (
        f"<|system|>Be brief.<|tool|>{json.dumps(TOOLS)}<|/tool|><|end|><|user|>Weather in Oslo?<|end|>"
        '<|assistant|><|tool_call|>[{"name": "get_weather", "arguments": {"city": "Oslo", "days": 0.12345678901234567891}}]<|/tool_call|><|end|>'
        "<|tool_response|>rain<|end|><|user|>And Rome?<|end|><|assistant|>"
    )
    without = native_prompt(tokenizer_of("phi"), asked())
    assert without.startswith("<|system|>You are a helpful assistant with some tools.<|tool|>[")


@pytest.mark.parametrize("calls", [[NASTY], [NASTY, {"city": "Rome"}], [{}]], ids=["one", "two", "empty"])
def test_what_the_template_writes_is_read_back(tokenizer, calls):
    wanted = [{"name": "get_weather", "arguments": arguments} for arguments in calls]
    try:
        prompt, completion = native_turn(tokenizer, asked(), "", wanted)
    except CannotShow as reason:
        assert "single tool-calls" in str(reason) and len(calls) > 1
        return
    tokens = ids(tokenizer, completion)
    assert tokens[-1] == require_ending(tokenizer).id and prompt == native_prompt(tokenizer, asked())
    text, made, _ = read_reply(tokenizer, asked(), tokens[:-1], stopped=True)
    assert text == "" and [(call["name"], json.loads(call["arguments"])) for call in made] == [("get_weather", told) for told in calls]


def test_a_text_is_read_back_as_no_call(tokenizer):
    _, completion = native_turn(tokenizer, asked(), "It is {sunny}.", [])
    assert read_reply(tokenizer, asked(), ids(tokenizer, completion)[:-1], stopped=True)[:2] == ("It is {sunny}.", [])


@pytest.mark.parametrize("family", ["qwen2_5", "llama3_1", "phi"])
@pytest.mark.parametrize("arguments", ['{"a": 1, "a": 2}', '{"a": NaN}', '{"a": 1.10}', '{"a": }'])
def test_arguments_stay_as_the_model_wrote_them(family, arguments):
    tokenizer = tokenizer_of(family)
    _, completion = native_turn(tokenizer, asked(), "", [{"name": "f", "arguments": {"mark": 7}}])
    tokens = ids(tokenizer, completion.replace('{"mark": 7}', arguments))
    (call,) = read_reply(tokenizer, asked(), tokens[:-1], stopped=True)[1]
    assert call["name"] == "f" and call["arguments"].startswith(arguments)
    assert call["arguments"] == arguments or arguments == '{"a": }'


def test_a_response_template_that_the_tokenizer_brings_is_read_by():
    tokenizer = tokenizer_of("qwen2_5")
    tokenizer.response_template = {
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
            "tool_calls": {
                "open": "<tool_call>", "close": "</tool_call>", "repeats": True, "content": "json",
                "transform": {"type": "function", "function": {"name": "{content.name}", "arguments": "{content.arguments}"}},
            },
            "content": {"close": "<|im_end|>", "content": "text"},
        },
    }  # fmt: skip
    assert isinstance(chat_format(tokenizer).read.__self__, TemplateReader)
    nasty = '{"a": "</tool_call>", "a": NaN}'
    text = f'<think>hm <tool_call></think>Well. <tool_call>{{"name": "f", "arguments": {nasty}}}</tool_call><tool_call>{{"name": "g"</tool_call>'
    told = chat_format(tokenizer).read(text, True, TOOLS)
    assert told.content == "Well." and told.thinking == "hm <tool_call>"
    assert told.calls == [{"name": "f", "arguments": nasty}, {"name": "g", "arguments": '{"name": "g"'}]
    cut = chat_format(tokenizer).read("<think>and then", False, TOOLS)
    assert (cut.content, cut.calls, cut.thinking) == ("<think>and then", [], "and then")


def test_a_call_that_is_broken_in_the_models_own_form_of_json_is_still_a_call():
    tokenizer = tokenizer_of("gemma4")
    told = {}
    for arguments in ('{city:<|"|>Os"lo<|"|>,days:3}', "{city:None}"):
        text = f"<|tool_call>call:get_weather{arguments}<tool_call|>"
        ((told[arguments],), content) = (read_reply(tokenizer, asked(), ids(tokenizer, text), stopped=True)[at] for at in (1, 0))
        assert content == ""
    assert [call["arguments"] for call in told.values()] == ['{"city": "Os\\"lo", "days": 3}', "{city:None}"]


@pytest.mark.parametrize(
    ("value", "read"),
    [("007", '"007"'), ("7", '"7"'), ("true", '"true"')],
)
def test_values_between_tags_are_strings_where_the_schema_says_so(value, read):
    text = f"<tool_call>\n<function=get_weather>\n<parameter=city>\n{value}\n</parameter>\n<parameter=days>\n7.50\n</parameter>\n<parameter=now>\nFalse\n</parameter>\n</function>\n</tool_call>"
    tokenizer = tokenizer_of("qwen3_5_nothink")
    (call,) = read_reply(tokenizer, asked(), ids(tokenizer, text), stopped=True)[1]
    assert call["arguments"] == f'{{"city": {read}, "days": 7.50, "now": false}}'


@pytest.mark.parametrize(
    ("written", "stopped"),
    [("", True), ("", False), ('{"a": 1', False), ('{"a": 1}', True), ('{"a": 1}}}', True), ('{"a": 1}}}', False)],
)
def test_a_call_in_llamas_form_that_does_not_end_as_it_should_has_no_arguments_that_are_json(written, stopped):
    tokenizer = tokenizer_of("llama3_1")
    text, (call,), _ = read_reply(tokenizer, asked(), ids(tokenizer, '{"name": "f", "parameters": ' + written), stopped)
    assert text == "" and call["name"] == "f"
    with pytest.raises(ValueError):
        json.loads(call["arguments"])


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5_think", "phi"])
def test_thinking_is_cut_off_and_stays_where_it_does_not_end(family):
    tokenizer = tokenizer_of(family)
    use_thinking(tokenizer, "on" if family.startswith("qwen") else None)
    opening = "" if family == "qwen3_5_think" else "<think>\n"
    for request in (asked(), Request([USER]), Request([USER], native=True)):
        text, _, thinking = read_reply(tokenizer, request, ids(tokenizer, f"{opening}hm\n</think>\n\nYes."), stopped=True)
        assert text == "Yes." and "hm" in thinking
        text, calls, thinking = read_reply(tokenizer, request, ids(tokenizer, f"{opening}hm, <tool"), stopped=False)
        assert text.startswith("<think>") and "hm, <tool" in text and not calls and "hm" in thinking


HEAD = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
TAIL = "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
SHOWN = "{% if tools %}{{ tools | tojson }}{% endif %}"
CALLS = "{% for c in m.tool_calls or [] %}[{{ c.function.name }}: {{ c.function.arguments | tojson }}]{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("phi3_5", "its chat template shows no tools: use --ask text"),
        (HEAD + TAIL, "its chat template shows no tools: use --ask text"),
        (SHOWN + HEAD + TAIL, "its chat template leaves out earlier calls: use --ask text"),
        (SHOWN + HEAD.replace("m.content", "m.content if m.role != 'tool'") + CALLS + TAIL, "leaves out earlier tool results: use --ask text"),
        (SHOWN + HEAD + CALLS + TAIL, "no response template is known for its chat template, to read calls by: use --ask text"),
    ],
)
def test_a_template_that_cannot_be_asked_natively_is_refused_in_one_line(template, message):
    with pytest.raises(UserError, match=message) as refused:
        chat_format(tokenizer_of(template))
    assert "\n" not in str(refused.value)


def test_a_conversation_without_tools_needs_no_form_of_them():
    tokenizer = tokenizer_of("phi3_5")
    request = asked({"role": "system", "content": "Be brief."}, USER, tools=None, schema={"const": 1})
    sentence = SCHEMA_SENTENCE.format(schema='{"const": 1}')
    assert f"Be brief.\n\n{sentence}<|end|>" in native_prompt(tokenizer, request)
    assert read_reply(tokenizer, request, ids(tokenizer, '{"a": 1}'), stopped=True) == ('{"a": 1}', [], "")


def test_the_schema_is_asked_for_where_there_is_no_system_text_and_an_object_where_there_is_no_schema():
    tokenizer = tokenizer_of("phi")
    assert native_prompt(tokenizer, asked(tools=None, schema={"const": 1})).startswith("<|system|>Reply with one JSON value that matches")
    wish = {"response_format": {"type": "json_object"}}
    assert native_prompt(tokenizer, asked(tools=None, options=wish)).startswith("<|system|>Reply with one JSON object and")
    assert native_prompt(tokenizer, asked(tools=None)) == "<|user|>Weather in Oslo?<|end|><|assistant|>"


def test_text_form_is_shown_as_before_the_template_knew_tools():
    before = (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
    )
    now = tokenizer_of("phi", marks=False)
    for messages in ([USER], [{"role": "system", "content": " Be {brief}\n"}, USER, {"role": "assistant", "content": "<|tool|>"}]):
        old = now.apply_chat_template(messages, chat_template=before, add_generation_prompt=True, tokenize=False)
        assert encode_prompts(now, [Request(messages)]) == [ids(now, old)]


@pytest.fixture(scope="module")
def client() -> SLMClient:
    return SLMClient(Settings(slm_model_path="models/phi-tiny"), precision="fp32", max_new_tokens=8)


def test_the_local_client_answers_native_and_text_requests_together(client):
    replies = client.generate([asked(*HISTORY), Request([USER]), asked(tools=None)])
    assert [reply.calls is None for reply in replies] == [False, True, False]
    assert replies[0].input_tokens == len(ids(client.tokenizer, native_prompt(client.tokenizer, asked(*HISTORY))))


def test_a_reply_with_calls_and_thinking_becomes_a_reply(client, monkeypatch):
    text = '<think>hm</think><|tool_call|>[{"name": "f", "arguments": {"a": 1}}]<|/tool_call|>'
    end, made = require_ending(client.tokenizer).id, ids(client.tokenizer, text)

    def decode(batch):
        return [([*made, end], None) for _ in batch]

    monkeypatch.setattr(client.engine, "_decode", decode)
    (reply,) = client.generate([asked()])
    assert (reply.text, reply.finish_reason, reply.calls) == ("", "stop", [{"name": "f", "arguments": '{"a": 1}'}])
    assert reply.reasoning_tokens == len(ids(client.tokenizer, "<think>hm</think>")) and reply.output_tokens == len(made) + 1


def test_a_conversation_that_the_template_cannot_show_is_that_rows_error(client, monkeypatch):
    tokenizer = tokenizer_of("llama3_1")
    two = TURN | {"tool_calls": TURN["tool_calls"] * 2}
    rows = [asked(), asked(USER, two, RESULT, USER), asked(*HISTORY)]
    assert measure_workload(tokenizer, rows, 5).longest == len(ids(tokenizer, native_prompt(tokenizer, rows[2]))) + 5
    monkeypatch.setattr(client, "tokenizer", tokenizer)
    monkeypatch.setattr(client.engine, "context", 4096)
    monkeypatch.setattr(client.engine, "_decode", lambda batch: [([7], None) for _ in batch])
    replies = client.generate(rows)
    assert [reply.finish_reason for reply in replies] == ["length", "error", "length"]
    assert "only supports single tool-calls" in replies[1].error and "\n" not in replies[1].error


def test_a_checkpoint_is_refused_before_its_model_is_loaded(monkeypatch):
    monkeypatch.setattr(slm_client, "load_tokenizer", lambda *_: tokenizer_of("phi3_5"))
    monkeypatch.setattr(slm_client, "SLMClient", lambda *_, **__: pytest.fail("loaded"))
    settings = Settings(slm_model_path="models/phi-tiny")
    with pytest.raises(UserError, match="its chat template shows no tools"):
        local_client(settings, iter([Request([USER]), asked()]), 8, seed=7, engine="transformers")
