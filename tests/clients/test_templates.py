"""Chat templates that refuse a system message, leave it out, or write a date: evaluation and training show the same."""

import json
import shutil

import pytest

from slm_swap.clients.endings import turn_ending
from slm_swap.clients.loading import encode_prompt, load_tokenizer, prompt_text
from slm_swap.clients.native import CannotShow
from slm_swap.clients.templates import fitted, particulars, takes_system
from slm_swap.common.errors import UserError
from slm_swap.common.settings import PACKAGE, Settings
from slm_swap.rows.examples import Example, parse_example
from slm_swap.rows.prompts import Request, build_messages, request_of, text_request
from slm_swap.slm_client import SLMClient
from slm_swap.tuning.tokens import tokenize
from tests.support.chat_templates import tokenizer_of

BASE = PACKAGE / "models/phi-tiny"
TURN = "{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}"
OPEN = "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
REFUSES = "{% if m.role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
ALTERNATES = "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
TEMPLATES = {
    "refuses": f"{{% for m in messages %}}{REFUSES}{TURN}{{% endfor %}}{OPEN}",
    "alternates": f"{{% for m in messages %}}{ALTERNATES}{TURN}{{% endfor %}}{OPEN}",
    "leaves out": f"{{% for m in messages %}}{{% if m.role != 'system' %}}{TURN}{{% endif %}}{{% endfor %}}{OPEN}",
}


@pytest.fixture(params=TEMPLATES)
def tokenizer(request):
    made = load_tokenizer(BASE)
    made.chat_template = TEMPLATES[request.param]
    return made


def test_the_system_text_goes_in_front_of_the_users(tokenizer):
    assert not takes_system(tokenizer) and takes_system(load_tokenizer(BASE))
    system, user = (message["content"] for message in build_messages("toolcall", "Hello"))
    shown = tokenizer.decode(encode_prompt(tokenizer, text_request("toolcall", "Hello")))
    assert shown == f"<|user|>{system}\n\n{user}<|end|><|assistant|>"


def test_a_conversation_keeps_its_turns(tokenizer):
    row = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "One"}, {"role": "assistant", "content": "Two"}]}
    example = parse_example(row | {"messages": [*row["messages"], {"role": "user", "content": "Three"}], "object": {"a": 1}}, "rows.jsonl:1")
    shown = tokenizer.decode(encode_prompt(tokenizer, request_of("structured", example)))
    assert shown == "<|user|>Be brief.\n\nOne<|end|><|assistant|>Two<|end|><|user|>Three<|end|><|assistant|>"


def test_training_shows_what_evaluation_shows(tokenizer):
    [row] = tokenize(tokenizer, "structured", [Example("Hello", '{"a":1}')], 1000).rows
    prompt = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label < 0]
    assert prompt == encode_prompt(tokenizer, text_request("structured", "Hello"))


@pytest.mark.parametrize("wrong", ["1 + m.content", "1 // 0", "m.nothing.at_all", "m.content + None", "raise_exception('no')"])
def test_a_template_may_fail_in_any_way(wrong, tmp_path):
    """At a system message it is taken for one that refuses it; at a reply it has no end of its own; at a user's message it is refused."""
    tokenizer = load_tokenizer(BASE)
    for role in ("system", "assistant"):
        tokenizer.chat_template = f"{{% for m in messages %}}{{% if m.role == '{role}' %}}{{{{ {wrong} }}}}{{% endif %}}{TURN}{{% endfor %}}{OPEN}"
        assert takes_system(tokenizer) == (role != "system") and (turn_ending(tokenizer) is None) == (role == "assistant")
        assert "Hello" in tokenizer.decode(encode_prompt(tokenizer, text_request("structured", "Hello")))
    shutil.copytree(BASE, tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").write_text(f"{{% for m in messages %}}{{{{ {wrong} }}}}{{% endfor %}}")
    with pytest.raises(UserError, match=r"the chat template of .*model cannot show a user's message that is a text \(.+\): use an instruct checkpoint"):
        load_tokenizer(tmp_path / "model")


def test_templates_by_name(tmp_path):
    """Some checkpoints have several: transformers takes `tool_use` where there are tools, and `default` elsewhere."""
    base, several = tokenizer_of("qwen3"), tokenizer_of("qwen3")
    several.chat_template = {"default": base.chat_template, "tool_use": "{{ '<|tool|>' }}" + base.chat_template}
    several.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(json.loads((BASE / "config.json").read_text()) | {"vocab_size": 5000}))
    several, request = load_tokenizer(tmp_path), text_request("toolcall", "Hello")
    assert prompt_text(several, request) == prompt_text(base, request) and turn_ending(several) == turn_ending(base)
    tool = {"name": "look", "description": "", "parameters": {"type": "object", "properties": {}}}
    native = Request([{"role": "user", "content": "Hello"}], tools=[tool], native=True)
    assert prompt_text(several, native) == "<|tool|>" + prompt_text(base, native)
    assert takes_system(several)
    several.chat_template = several.chat_template | {"tool_use": TEMPLATES["refuses"]}
    assert not takes_system(several)


DATED = "{% set today = strftime_now('%d %b %Y') if strftime_now is defined else 'none' %}" + f"{{{{ today }}}}{{% for m in messages %}}{TURN}{{% endfor %}}{OPEN}"


def test_a_prompt_does_not_change_at_midnight():
    """The date is one that stays: for a run that goes on the next day, a cache, and the training before it."""
    tokenizer = load_tokenizer(BASE)
    tokenizer.chat_template = DATED
    request = text_request("structured", "Hello")
    assert tokenizer.decode(encode_prompt(tokenizer, request)).startswith("01 Jan 2026<|system|>")
    [row] = tokenize(tokenizer, "structured", [Example("Hello", '{"a":1}')], 1000).rows
    prompt = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label < 0]
    assert prompt == encode_prompt(tokenizer, request)
    assert particulars(tokenizer) == {"template_date": "2026-01-01"} and particulars(load_tokenizer(BASE)) == {}


def test_messages_that_a_template_takes_stay_as_they_are():
    messages = build_messages("toolcall", "Hello")
    assert fitted(load_tokenizer(BASE), messages) is messages


def test_what_a_template_refuses_all_the_same_is_that_rows_error(tmp_path):
    """Two user messages in a row where roles must alternate: no traceback, and the other row is answered."""
    shutil.copytree(BASE, tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").write_text(TEMPLATES["alternates"])
    client = SLMClient(Settings(slm_model_path=str(tmp_path / "model")), precision="fp32", max_new_tokens=4)
    odd = Request([{"role": "user", "content": "One"}, {"role": "user", "content": "Two"}])
    with pytest.raises(CannotShow, match="roles must alternate"):
        encode_prompt(client.tokenizer, odd)
    refused, answered = client.generate([odd, text_request("structured", "Hello")])
    assert refused.finish_reason == "error" and "roles must alternate" in refused.error and answered.error is None
    assert client.describe()["system_text"] == "in front of the first user message"
    client.close()
