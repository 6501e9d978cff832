"""Thinking: switched where a chat template can, cut off whatever mark is around it, and never a part of what is scored."""

import json

import pytest

from slm_swap.clients.endings import call_ending, reply_ends, turn_ending, turn_opening
from slm_swap.clients.loading import encode_prompt, load_tokenizer, prompt_text
from slm_swap.clients.native import read_reply
from slm_swap.clients.thinking import MARKS, cut_served_thinking, cut_thinking, prefilled, thinking, use_thinking
from slm_swap.common.errors import UserError
from slm_swap.common.settings import PACKAGE, Settings
from slm_swap.rows.examples import Example, parse_example
from slm_swap.rows.prompts import Request, request_of, text_request
from slm_swap.slm_client import SLMClient
from slm_swap.tuning.tokens import tokenize
from tests.support.chat_templates import tokenizer_of

ASKED = text_request("structured", "Hello")
GPT_OSS = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>"]
CALL = {"name": "f", "arguments": {"a": "b"}}
TOOLS = [{"name": "f", "description": "", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}]
ROW = {"messages": [{"role": "user", "content": "Hello"}], "tools": TOOLS}


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def gpt_oss():
    tokenizer = tokenizer_of("gptoss", marks=False)
    tokenizer.add_tokens(GPT_OSS, special_tokens=True)
    tokenizer.slm_swap_embeddings = None  # no model is asked
    return tokenizer


def trained(tokenizer, example, track="structured"):
    [row] = tokenize(tokenizer, track, [example], 4000).rows
    parts = ([token for token, label in zip(row["input_ids"], row["labels"], strict=True) if (label < 0) == kind] for kind in (True, False))
    return [tokenizer.decode(part) for part in parts]


@pytest.mark.parametrize(
    ("family", "off", "on"),
    [
        ("qwen3", "<think>\n\n</think>\n\n", "<|im_start|>assistant\n"),
        ("qwen3_5_think", "<think>\n\n</think>\n\n", "<think>\n"),
        ("nemotron_3_nano", "<think></think>", "<think>\n"),
    ],
)
def test_it_is_off_unless_it_is_asked_for(family, off, on):
    tokenizer = tokenizer_of(family)
    for wanted, end, told in ((None, off, "off"), ("off", off, "off"), ("on", on, "on")):
        use_thinking(tokenizer, wanted)
        assert thinking(tokenizer) == told and prompt_text(tokenizer, ASKED).endswith(end)
        assert prefilled(tokenizer) == ("</think>" if end == "<think>\n" else None)


@pytest.mark.parametrize(("family", "wanted", "told"), [("phi", "on", "has no switch"), ("phi", "off", "has no switch"), ("gptoss", "off", "always asks")])
def test_what_a_template_cannot_do_is_refused(family, wanted, told):
    with pytest.raises(UserError, match=told):
        use_thinking(tokenizer_of(family), wanted)


def test_gpt_oss_thinks_always():
    tokenizer = gpt_oss()
    use_thinking(tokenizer, "on")
    assert thinking(tokenizer) == "always" and thinking(load_tokenizer(PACKAGE / "models/phi-tiny")) is None


@pytest.mark.parametrize(
    ("text", "opened", "rest", "thought"),
    [
        ("Yes.", None, "Yes.", ""),
        ("<think>\nhm\n</think>\n\nYes.", None, "Yes.", "<think>\nhm\n</think>"),
        ("\n<think></think>{}", None, "{}", "\n<think></think>"),
        ("hm\n</think>\n\nYes.", "</think>", "Yes.", "hm\n</think>"),
        ("<think>hm", None, "<think>hm", "<think>hm"),
        ("[THINK]hm", None, "<think>hm", "[THINK]hm"),
        ("hm", "</think>", "<think>hm", "hm"),
        ("Yes <think>hm</think>", None, "Yes <think>hm</think>", ""),
        ("<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Yes.", None, "Yes.", ...),
        ("<|channel|>final <|constrain|>json<|message|>{}", None, "{}", ...),
        ("<|channel|>analysis<|message|>hm", None, "<think><|channel|>analysis<|message|>hm", ...),
        ("", None, "", ""),
    ],
)
def test_thinking_at_the_beginning_is_cut_off_and_what_does_not_end_stays(text, opened, rest, thought):
    found = cut_thinking(text, opened)
    assert found == (rest, text.removesuffix(rest) if thought is ... and not rest.startswith("<think>") else text if thought is ... else thought)


@pytest.mark.parametrize(("mark", "close"), MARKS)
def test_every_mark_is_cut(mark, close):
    assert cut_thinking(f'{mark}hm{close}\n{{"a": 1}}')[0] == '{"a": 1}'


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("hm\n</think>\n\nYes.", "Yes."),
        ("<think>hm</think>Yes.", "Yes."),
        ('{"tag": "</think>"}', '{"tag": "</think>"}'),
        ('["</think>"]', '["</think>"]'),
        ("a <think>b</think> c", "a <think>b</think> c"),
    ],
)
def test_a_server_may_have_opened_the_thinking_in_its_prompt(text, rest):
    assert cut_served_thinking(text)[0] == rest


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(("mark", "close"), MARKS)
def test_marks_may_be_special_tokens_and_others_in_the_reply_go(mark, close, special):
    tokenizer = tokenizer_of("qwen3", marks=False)
    tokenizer.add_tokens([mark, close, "<|im_start|>", "<|im_end|>", "<|mark|>"], special_tokens=special)
    tokenizer.add_tokens(["<|mark|>"], special_tokens=True)
    tokens = ids(tokenizer, f'{mark}\nhm, so\n{close}\n\n<|mark|>{{"a": 1}}')
    text, calls, thought = read_reply(tokenizer, ASKED, tokens, stopped=True)
    assert text == '{"a": 1}' and calls is None and thought == f"{mark}\nhm, so\n{close}"
    text, _, thought = read_reply(tokenizer, ASKED, ids(tokenizer, f"{mark}\nhm, so"), stopped=False)
    assert text.startswith("<think>") and "hm" in thought


def test_gpt_oss_is_taught_in_its_channel_and_read_from_it():
    tokenizer = gpt_oss()
    prompt, reply = trained(tokenizer, Example("Hello", '{"a":1}'))
    assert prompt.endswith("<|start|>assistant") and reply == '<|channel|>final<|message|>{"a":1}<|return|>'
    said = reply.removesuffix("<|return|>")
    for text in (said, f"<|channel|>analysis<|message|>hm<|end|><|start|>assistant{said}"):
        rest, _, thought = read_reply(tokenizer, ASKED, ids(tokenizer, text), stopped=True)
        assert rest == '{"a":1}' and ("hm" in thought) == ("hm" in text)


def test_gpt_oss_makes_calls_in_its_own_form():
    """As the template writes them and as the model does, whose headers have the channel first."""
    tokenizer = gpt_oss()
    assert tokenizer.decode([turn_ending(tokenizer).id]) == "<|return|>" and tokenizer.decode([call_ending(tokenizer).id]) == "<|call|>"
    assert {call_ending(tokenizer).id, turn_ending(tokenizer).id} <= reply_ends(tokenizer)
    example = parse_example(ROW | {"calls": [CALL]}, "rows.jsonl:1")
    prompt, reply = trained(tokenizer, example, "toolcall")
    request = request_of("toolcall", example)
    assert ids(tokenizer, prompt) == encode_prompt(tokenizer, request) and reply.endswith('{"a": "b"}<|call|>')
    model = '<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": "b"}'
    for written, thought in ((reply.removesuffix("<|call|>"), ""), (model, "hm")):
        text, calls, found = read_reply(tokenizer, request, ids(tokenizer, written), stopped=True)
        assert (text, found) == ("", thought) and [(call["name"], json.loads(call["arguments"])) for call in calls] == [("f", {"a": "b"})]
    text, calls, _ = read_reply(tokenizer, request, ids(tokenizer, "<|channel|>analysis<|message|>hm"), stopped=False)
    assert (text, calls) == ("<think>hm", [])
    text, calls, _ = read_reply(tokenizer, request, ids(tokenizer, "<|channel|>final<|message|>No tool fits."), stopped=True)
    assert (text, calls) == ("No tool fits.", [])


@pytest.mark.parametrize("family", ["phi", "qwen2_5", "qwen3", "llama3_1"])
def test_calls_of_most_families_end_as_their_texts(family):
    assert call_ending(tokenizer_of(family)) is None


@pytest.mark.parametrize(
    ("family", "opening"), [("qwen3", ""), ("phi", ""), ("deepseek_r1_distill", "\n</think>\n\n"), ("glm4moe", "\n"), ("gptoss", "<|channel|>final<|message|>")]
)
def test_training_begins_a_reply_as_the_template_does(family, opening):
    assert turn_opening(tokenizer_of(family)) == opening


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5_think", "nemotron_3_nano"])
def test_training_shows_the_prompt_that_evaluation_shows(family):
    tokenizer = tokenizer_of(family)
    prompt, reply = trained(tokenizer, Example("Hello", '{"a":1}'))
    assert prompt == prompt_text(tokenizer, ASKED) and reply == '{"a":1}<|im_end|>'


def test_a_template_that_shows_no_text_is_refused(tmp_path):
    import shutil

    shutil.copytree(PACKAGE / "models/phi-tiny", tmp_path / "model")
    template = "{% for m in messages %}<|{{ m.role }}|>{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<|end|>{% endfor %}"
    (tmp_path / "model/chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match="message that is a text"):
        load_tokenizer(tmp_path / "model")


def test_a_report_says_how_the_model_was_asked(tmp_path):
    import shutil

    shutil.copytree(PACKAGE / "models/phi-tiny", tmp_path / "model")
    turns = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    opening = "{% if add_generation_prompt %}<|assistant|>{% if not enable_thinking %}<think></think>{% endif %}{% endif %}"
    (tmp_path / "model/chat_template.jinja").write_text(turns + opening)
    settings, told = Settings(slm_model_path=str(tmp_path / "model")), []
    for wanted in (None, "on"):
        client = SLMClient(settings, precision="fp32", max_new_tokens=2, thinking=wanted)
        (reply,) = client.generate([Request([{"role": "user", "content": "Hello"}])])
        told.append((client.identity["thinking"], reply.input_tokens))
        client.close()
    assert [name for name, _ in told] == ["off", "on"] and told[0][1] > told[1][1]
