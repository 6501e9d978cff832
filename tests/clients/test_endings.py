"""Where a reply ends, for chat templates of well-known shapes and for checkpoints that name other ends."""

import json
import shutil

import pytest

from slm_swap.clients.endings import Ending, reply_ends, require_ending, turn_ending
from slm_swap.clients.loading import load_tokenizer
from slm_swap.common.errors import UserError
from slm_swap.common.settings import PACKAGE, Settings
from slm_swap.rows.examples import Example
from slm_swap.slm_client import SLMClient
from slm_swap.tuning.tokens import tokenize
from tests.support.tool_requests import BATCH

BASE = PACKAGE / "models/phi-tiny"
OPEN = "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
END = 4  # <|end|>
SHAPES = {  # a turn's text with what stands around it, and what is written behind a reply
    "phi": ("{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}", "<|end|>"),
    "a space in front": ("{{ '<|' + m.role + '|>' + m.content + ' <|end|>' }}", " <|end|>"),
    "a line end in front": ("{{ '<|' + m.role + '|>' + m.content + '\n<|end|>\n' }}", "\n<|end|>"),
    "between turns alone": ("{{ '<|' + m.role + '|>' + m.content }}{% if not loop.last %}{{ '<|end|>' }}{% endif %}", "<|end|>"),
    "trimmed": ("{{ '<|' + m.role + '|>' + m.content.strip() + '<|end|>' }}", "<|end|>"),
    "one end for all": ("{% if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% else %}{{ '<|user|>' + m.content }}{% endif %}", "<|endoftext|>"),
}
ALTERNATE = "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"


def template(turn: str, opening: str = "") -> str:
    return f"{opening}{{% for m in messages %}}{turn}{{% endfor %}}{OPEN}"


@pytest.fixture
def tokenizer():
    return load_tokenizer(BASE)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_template_tells_its_end_with_the_white_space_in_front(tokenizer, shape):
    turn, text = SHAPES[shape]
    tokenizer.chat_template = template(turn)
    assert turn_ending(tokenizer) == Ending(text, tokenizer.convert_tokens_to_ids(text.strip()))


def test_templates_that_demand_alternation_or_begin_a_text_are_asked_all_the_same(tokenizer):
    tokenizer.chat_template = template(ALTERNATE + SHAPES["phi"][0])
    assert turn_ending(tokenizer) == Ending("<|end|>", END)
    tokenizer.chat_template = template(SHAPES["phi"][0], "{{ bos_token }}")
    assert turn_ending(tokenizer) == Ending("<|end|>", END)


def test_a_template_without_an_end_is_refused_for_training(tokenizer):
    """What opens the next turn is no end of this one."""
    tokenizer.chat_template = template("{{ '<|' + m.role + '|>' + m.content }}")
    assert turn_ending(tokenizer) is None
    with pytest.raises(UserError, match="could not learn to stop"):
        require_ending(tokenizer)
    with pytest.raises(UserError, match="could not learn to stop"):
        tokenize(tokenizer, "structured", [Example("p", "{}")], 100)
    assert reply_ends(tokenizer) == {tokenizer.eos_token_id}


@pytest.mark.parametrize("written", ["<|user|>{{ messages[-1].content }}", "{{ raise_exception('one message alone') }}", "{{ messages[0].content }}<|end|>"])
def test_a_template_that_shows_no_answer_ends_by_what_else_is_named(tokenizer, written):
    tokenizer.chat_template = written
    assert turn_ending(tokenizer) is None and reply_ends(tokenizer, 7) == {tokenizer.eos_token_id, 7}
    with pytest.raises(UserError, match="could not learn to stop"):
        require_ending(tokenizer)


def test_all_that_name_an_end_are_heard(tokenizer):
    eos = tokenizer.eos_token_id
    assert reply_ends(tokenizer) == {END, eos}
    assert reply_ends(tokenizer, [7, 8], None, 9) == {END, eos, 7, 8, 9}
    tokenizer.chat_template, tokenizer.eos_token = template("{{ m.content }}"), None
    with pytest.raises(UserError, match="nothing ends a reply"):
        reply_ends(tokenizer, None, [])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_tokens_up_to_and_with_the_end_are_trained(tokenizer, shape):
    turn, text = SHAPES[shape]
    tokenizer.chat_template = template(turn)
    [row] = tokenize(tokenizer, "structured", [Example("p", '{"a":1}')], 1000).rows
    taught = [token for token in row["labels"] if token >= 0]
    assert tokenizer.decode(taught) == '{"a":1}' + text and taught[-1] == require_ending(tokenizer).id


def test_an_end_inside_a_reply_is_not_taught(tokenizer):
    told = tokenize(tokenizer, "structured", [Example("p", '{"a":"<|end|>"}'), Example("q", '{"a":1}')], 1000)
    assert len(told.rows) == 1 and sum(told.untaught.values()) == 1


@pytest.mark.parametrize("lacks", ["generation_config without the template's end", "no end but the template's"])
def test_a_checkpoint_that_names_other_ends_replies_as_before(tmp_path, lacks):
    """Evaluation once went by generation_config alone: every reply ran to the limit."""
    shutil.copytree(BASE, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    named = {"bos_token_id": 0, "pad_token_id": 0} | ({"eos_token_id": 0} if lacks.startswith("gen") else {})
    (tmp_path / "model/generation_config.json").write_text(json.dumps(named))
    if not lacks.startswith("gen"):
        (tmp_path / "model/config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    replies = []
    for path in (BASE, tmp_path / "model"):
        client = SLMClient(Settings(slm_model_path=str(path)), precision="fp32", max_new_tokens=64)
        replies.append([(reply.text, reply.finish_reason) for reply in client.generate(BATCH[:3])])
        client.close()
    assert replies[0] == replies[1] and {reason for _, reason in replies[0]} == {"stop"}


@pytest.mark.parametrize("named", ["<|end|>", ["<|end|>"], [1.5], True])
def test_an_end_that_is_no_number_is_refused(named):
    with pytest.raises(UserError, match=r"names .* as eos_token_id, which takes numbers of tokens: correct it there"):
        reply_ends(load_tokenizer(BASE), named)
