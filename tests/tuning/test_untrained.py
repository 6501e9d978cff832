"""Tokens that a base model never learned to write: noticed, trained, kept, merged."""

import json
import re
import sys
from dataclasses import replace
from functools import partial

import pytest

from slm_swap.clients.loading import load_model, load_tokenizer, with_adapter
from slm_swap.common.errors import UserError
from slm_swap.common.settings import Settings
from slm_swap.rows.prompts import text_request
from slm_swap.slm_client import SLMClient
from slm_swap.tuning.backends import load_trainable
from slm_swap.tuning.checkpoints import Checkpoints
from slm_swap.tuning.merging import merge_adapter
from slm_swap.tuning.tokens import tokenize
from slm_swap.tuning.training import train
from slm_swap.tuning.untrained import near_unused, token_indices, untrained_tokens, unused_tokens
from tests.support.training_rows import BASE, INPUTS, QUICK, ROWS
from tests.support.untaught_end import END, UNUSED, untaught_end

PARAMETERS = replace(QUICK, epochs=6, lora_r=8)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(BASE)


@pytest.fixture(scope="module")
def rows(tokenizer):
    return tokenize(tokenizer, "structured", ROWS, 2048).rows


@pytest.fixture(scope="module", params=["tied", "untied"])
def base(request, tmp_path_factory):
    return untaught_end(tmp_path_factory.mktemp("base") / request.param, tied=request.param == "tied")


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    said, out = [], tmp_path_factory.mktemp("trained") / "adapter"
    return out, train("structured", base, ROWS, [], out, PARAMETERS, "trl", INPUTS, say=said.append), said


def found(folder, tokenizer, rows):
    return untrained_tokens(load_model(folder, "fp32", {"": "cpu"}), tokenizer, rows)


def replies(base, adapter=None, **options):
    client = SLMClient(Settings(slm_model_path=str(base)), adapter=adapter, precision="fp32", max_new_tokens=64, **options)
    return [(reply.text, reply.finish_reason) for reply in client.generate([text_request("structured", row.prompt) for row in ROWS])]


# -- Noticed --------------------------------------------------------------------------------------------------------------------


def test_an_end_among_unused_tokens_is_found_with_what_it_may_begin_as(base, tokenizer, rows):
    assert found(base, tokenizer, rows) == {END: tokenizer.eos_token_id}


def test_rows_that_are_all_equal_are_unused_too(tmp_path, tokenizer, rows):
    assert list(found(untaught_end(tmp_path / "base", spread=0.0), tokenizer, rows)) == [END]


def test_an_end_that_was_learned_is_none(tmp_path, tokenizer, rows):
    assert found(untaught_end(tmp_path / "base", learned=True), tokenizer, rows) == {}
    assert found(BASE, tokenizer, rows) == {}, "nothing is known to be unused"


def test_too_few_unused_tokens_say_nothing(tmp_path, tokenizer, rows):
    assert found(untaught_end(tmp_path / "base", unused=7), tokenizer, rows) == {}
    assert list(found(untaught_end(tmp_path / "more", unused=8), tokenizer, rows)) == [END]


def test_unused_rows_that_lie_apart_say_nothing(tmp_path, tokenizer, rows):
    assert found(untaught_end(tmp_path / "base", spread=30.0), tokenizer, rows) == {}


def test_a_row_that_moved_little_and_wins_all_the_same_was_learned(tmp_path, tokenizer, rows):
    """As after a short fine-tuning of all weights: what the model says at the end of replies counts."""
    import torch

    folder = untaught_end(tmp_path / "base")
    model = load_model(folder, "fp32", {"": "cpu"})
    weight = model.get_output_embeddings().weight.detach()
    unused = unused_tokens(tokenizer, len(weight))
    row = rows[0]
    before = torch.tensor([row["input_ids"][: row["labels"].index(END)]])
    with torch.no_grad():
        hidden = model.model(input_ids=before).last_hidden_state[0, -1]
    distance = (weight[:4096] - weight[unused].median(0).values).norm(dim=1).median()
    weight[END] += 0.2 * distance * hidden / hidden.norm()
    assert near_unused(weight, [END], unused)[0] == [END], "it is near"
    assert untrained_tokens(model, tokenizer, rows) == {}


@pytest.mark.parametrize("tied", [True, False])
def test_random_weights_say_nothing(tied, tokenizer, rows):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(BASE)
    config.update({"vocab_size": 4096 + UNUSED, "tie_word_embeddings": tied, "num_hidden_layers": 1, "initializer_range": 0.2})
    assert untrained_tokens(AutoModelForCausalLM.from_config(config), tokenizer, rows) == {}


NAMED = (
    "<unused7>", "<|unused_7|>", "<|reserved_special_token_7|>", "<|reserved_200013|>", "<|extra_7|>", "<|placeholder7|>", "[control_7]",
    "<SPECIAL_7>", "<extra_id_7>", "<｜place▁holder▁no▁7｜>", "<|dummy_7|>", "[unused7]", "[PAD7]",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_names_of_unused_tokens(name):
    from slm_swap.tuning.untrained import UNUSED as names

    assert names.fullmatch(name)
    assert not names.fullmatch(re.sub(r"\d", "", name)) and not names.fullmatch(name[1:-1])


@pytest.mark.parametrize("name", ["<|im_end|>", "<end_of_turn>", "<tool_call>", "<0x07>", "<|user7|>", "unused", "<h1>", "[INST]", "<|fim_pad|>"])
def test_names_of_others(name):
    from slm_swap.tuning.untrained import UNUSED as names

    assert not names.fullmatch(name)


# -- Trained --------------------------------------------------------------------------------------------------------------------


def test_it_is_trained_said_and_written_down(trained, tokenizer):
    out, info, said = trained
    assert [line for line in said if "<|end|>" in line and "trained too" in line and "\n" not in line]
    assert info["trained_tokens"] == [{"id": END, "token": "<|end|>"}] == json.loads((out / "training_info.json").read_text())["trained_tokens"]


def test_nothing_is_trained_besides_lora_where_all_is_learned(tmp_path):
    said = []
    info = train("structured", BASE, ROWS[:2], [], tmp_path / "adapter", replace(QUICK, epochs=1), "trl", INPUTS, say=said.append)
    assert info["trained_tokens"] == [] and not any("trained too" in line for line in said)
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["trainable_token_indices"] is None


def test_only_the_row_is_kept(trained, base):
    from safetensors.torch import load_file

    weights = load_file(trained[0] / "adapter_model.safetensors")
    (row,) = (weight for name, weight in weights.items() if "lora" not in name)
    assert row.shape == (1, 256)
    assert (trained[0] / "adapter_model.safetensors").stat().st_size < 4e6 < (base / "model.safetensors").stat().st_size


def test_tuned_replies_stop(trained, base):
    """What the base model's do not, however long."""
    assert {reason for _, reason in replies(base)} == {"length"}
    tuned = replies(base, trained[0])
    assert {reason for _, reason in tuned} == {"stop"}
    assert sum(text == row.completion for (text, _), row in zip(tuned, ROWS, strict=True)) >= 6


def test_the_rows_are_in_place_as_peft_would_have_them(trained, base):
    """In the head, and where weights are tied in the embedding: the logits are those of PEFT's own way, without its copies."""
    import torch
    from peft import PeftModel

    own = PeftModel.from_pretrained(load_model(base, "fp32", {"": "cpu"}), str(trained[0])).eval()
    placed = with_adapter(load_model(base, "fp32", {"": "cpu"}), trained[0], base).eval()
    ids = torch.tensor([[5, END, 6, 7]])
    with torch.no_grad():
        logits = [model(input_ids=ids).logits for model in (placed, own)]
    assert torch.equal(logits[0], logits[1])
    row = placed.get_base_model().get_output_embeddings().original_module.weight[END]
    assert torch.equal(row, own.get_base_model().get_output_embeddings().token_adapter.trainable_tokens_delta["default"][0])


def test_batches_give_what_rows_alone_give(trained, base):
    assert replies(base, trained[0], batch_size=1) == replies(base, trained[0], batch_size=8)


def test_the_merged_checkpoint_has_the_row(trained, base, tmp_path):
    merge_adapter(base, trained[0], tmp_path / "merged", "fp32")
    assert replies(tmp_path / "merged") == replies(base, trained[0])
    model = load_model(tmp_path / "merged", "fp32", {"": "cpu"})
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings == ("tied" in base.name and "un" not in base.name)


def test_unsloth_is_refused(base, tokenizer, rows, monkeypatch):
    """Its loader stands in by ours, as it needs a GPU."""
    import types

    loader = types.SimpleNamespace(from_pretrained=lambda **given: (load_model(base, "fp32", {"": "cpu"}), None), get_peft_model=None)
    unsloth = types.ModuleType("unsloth")
    unsloth.FastLanguageModel = loader
    monkeypatch.setitem(sys.modules, "unsloth", unsloth)
    monkeypatch.setenv("UNSLOTH_BLOCK_COMPILE", "0")
    with pytest.raises(UserError, match="never learned to end a reply, and Unsloth does not train its end token: use --backend trl"):
        load_trainable(base, PARAMETERS, "unsloth", "cpu", partial(untrained_tokens, tokenizer=tokenizer, rows=rows))


def test_a_head_with_a_bias_is_refused():
    from types import SimpleNamespace

    from torch import nn

    head, embeddings = nn.Linear(4, 9), nn.Embedding(9, 4)
    model = SimpleNamespace(get_output_embeddings=lambda: head, get_input_embeddings=lambda: embeddings)
    with pytest.raises(UserError, match="a bias, with which PEFT does not train it: use an instruct checkpoint"):
        token_indices(model, [3])
    assert token_indices(model, []) is None


# -- Said where it is not enough ------------------------------------------------------------------------------------------------


def test_tuned_replies_that_do_not_end_are_said_once_at_the_first_evaluation(tmp_path, monkeypatch):
    """As where nobody noticed; a learning rate of next to nothing teaches no end."""
    monkeypatch.setattr("slm_swap.tuning.training.untrained_tokens", lambda *_, **__: {})
    monkeypatch.setattr("slm_swap.tuning.validation.MAX_NEW_TOKENS", 40)
    base, parameters = untaught_end(tmp_path / "base"), replace(QUICK, epochs=2, learning_rate=1e-9, eval_steps=2, eval_generate=2)
    said = []
    train("structured", base, ROWS, ROWS[:2], tmp_path / "adapter", parameters, "trl", INPUTS, say=said.append)
    (line,) = [line for line in said if "ran to the limit" in line]
    assert line.startswith("warning: after step 2, 2 of 2 replies ran to the limit of 40 tokens") and "\n" not in line


@pytest.mark.parametrize("cut, said", [(9, True), (8, False), (0, False)])
def test_nearly_all_is_nine_in_ten(cut, said):
    from slm_swap.tuning.validation import endless

    assert bool(endless({"rows": 10, "errors": {"truncated": cut}}, 5)) == said


# -- Resumed and in several processes -------------------------------------------------------------------------------------------


def test_a_killed_run_ends_in_the_same_rows(base, tmp_path):
    """To the bit: the row is in the checkpoints, its optimizer's state too."""
    import multiprocessing
    import os

    parameters = replace(PARAMETERS, epochs=3, lora_dropout=0.1)

    def run(out, resume=False):
        train("structured", base, ROWS, ROWS[:2], out, parameters, "trl", INPUTS, save_steps=2, resume=resume)

    def killed():
        complete = Checkpoints.complete

        def then_die(self, step, *given):
            complete(self, step, *given)
            os._exit(9)

        Checkpoints.complete = then_die
        run(tmp_path / "again")

    run(tmp_path / "whole")
    child = multiprocessing.get_context("fork").Process(target=killed)
    child.start()
    child.join(120)
    assert child.exitcode == 9 and Checkpoints(tmp_path / "again").steps() == [2]
    run(tmp_path / "again", resume=True)
    assert (tmp_path / "again/adapter_model.safetensors").read_bytes() == (tmp_path / "whole/adapter_model.safetensors").read_bytes()
