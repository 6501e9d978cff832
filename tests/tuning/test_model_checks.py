"""The loaded model is looked at before training: whether packed rows are apart, and attended as alone."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from slm_swap.clients.loading import load_model, load_tokenizer, with_adapter
from slm_swap.common.errors import UserError
from slm_swap.tuning import fast_training, model_checks
from slm_swap.tuning.fast_training import VARLEN
from slm_swap.tuning.model_checks import attention_spans, check_packing, rows_before, rows_to_check
from slm_swap.tuning.training import train
from tests.support.tiny_training import some_rows, tiny_config, tiny_family, tiny_gemma3_with_vision
from tests.support.training_rows import BASE, INPUTS, QUICK, ROWS

IDS = [row["input_ids"] for row in some_rows()]  # 6 to 19 tokens: longer than the windows of 8
APART = ["llama", "mistral", "granite", "cohere2", "gemma2", "gemma3", "phi", "gpt_neox", "qwen3_moe"]
SEEN = r"^packed rows see each other in this model \(.*\): use --no-packing, or --preset documented$"
OTHERWISE = r"^the attention of packed rows is not this model's own \(a row of \d+ tokens .*\): use --no-packing, or --preset documented$"


def own(model) -> str:
    return model.config.get_text_config()._attn_implementation


def plain_varlen(query, key, value, starts, _, longest, __, scale=None, window_size=(-1, -1), **options):
    """What torch's kernel does, by plain attention: (tokens, heads, size)."""
    parts = []
    for begin, end in pairwise(starts.tolist()):
        index = torch.arange(end - begin)
        seen = index[:, None] >= index
        if window_size[0] >= 0:
            seen &= index[:, None] - index <= window_size[0]
        inside = (part[begin:end].transpose(0, 1) for part in (query, key, value))
        parts.append(torch.nn.functional.scaled_dot_product_attention(*inside, attn_mask=seen, scale=scale, enable_gqa=True).transpose(0, 1))
    return torch.cat(parts)


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(fast_training, "varlen_attn", plain_varlen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", APART)
def test_models_that_keep_rows_apart_may_be_packed(family, dtype):
    model = tiny_family(family).to(dtype).train()
    check_packing(model, IDS, 128, own(model))
    assert model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["lfm2", "qwen3_5", "falcon_h1", "gpt_oss"])
def test_models_whose_rows_see_each_other_are_not_packed(family, dtype):
    """Convolutions and recurrent states run on across rows; gpt-oss' mask knows no rows on a CPU."""
    model = tiny_family(family, initializer_range=0.05).to(dtype)
    with pytest.raises(UserError, match=SEEN):
        check_packing(model, IDS, 128, own(model))


@pytest.mark.parametrize("family", ["llama", "mistral", "granite", "cohere2", "gemma3", "phi", "qwen3_moe"])
def test_attention_for_packs_is_the_models_own(family, kernel):
    model = tiny_family(family)
    attention = own(model)
    model.set_attn_implementation(VARLEN)
    check_packing(model, IDS, 128, attention)
    assert own(model) == VARLEN


@pytest.mark.parametrize(("family", "named"), [("gpt_oss", "s_aux"), ("gemma2", "softcap")])
def test_attention_for_packs_says_what_it_does_not_know(family, named, kernel):
    model = tiny_family(family)
    attention = own(model)
    model.set_attn_implementation(VARLEN)
    with pytest.raises(UserError, match=rf"^the model's attention has {named}, which packed rows do not get on a GPU: use --no-packing"):
        check_packing(model, IDS, 128, attention)


def test_an_attention_that_leaves_something_out_is_found(monkeypatch):
    """As if the model had its window in its mask alone, and no attention were told of it."""
    model = tiny_family("mistral")
    attention = own(model)
    monkeypatch.setattr(fast_training, "varlen_attn", lambda *given, **options: plain_varlen(*given, **options | {"window_size": (-1, 0)}))
    model.set_attn_implementation(VARLEN)
    check_packing(model, [row[:7] for row in IDS], 128, attention)
    with pytest.raises(UserError, match=OTHERWISE):
        check_packing(model, IDS, 128, attention)


def test_chunks_are_tried_where_one_ends():
    """Llama 4 cuts by the place in the pack: a row is cut wherever a chunk of 24 ends, though rows are shorter than that."""
    model = tiny_family("llama4")
    check_packing(model, IDS, 24, own(model))
    with pytest.raises(UserError, match=OTHERWISE):
        check_packing(model, IDS, 128, own(model))


def test_rows_longer_than_a_window_are_looked_at():
    rows = [[0] * size for size in (9, 5, 30, 7, 12)]
    assert [len(row) for row in rows_to_check(rows, [8])] == [5, 9]
    assert [len(row) for row in rows_to_check(rows, [8, 20, 4096])] == [5, 30]
    assert [len(row) for row in rows_to_check(rows, [])] == [5, 7]
    assert [len(row) for row in rows_to_check(rows[:1], [])] == [9, 9]
    assert [len(row) for row in rows_before([1] * 5, [2] * 8, [])] == [5]
    assert [len(row) for row in rows_before([1] * 5, [2] * 8, [20])] == [5, 5, 5, 1]
    assert attention_spans(tiny_config("mistral")) == {"sliding_window": 8}
    assert attention_spans(tiny_gemma3_with_vision().config)["sliding_window"] == 8


def test_eight_bit_rounding_is_no_leak(monkeypatch):
    """The columns with outliers, which bitsandbytes takes out of a product, hang on all tokens of a pack."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = tiny_family("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[:40, :3] *= 60
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    eight = bitsandbytes.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False, threshold=6.0)
                    eight.load_state_dict(linear.state_dict())
                    setattr(parent, name, eight.to("cpu"))
    monkeypatch.setitem(model_checks.LOSS_APART, torch.float32, 2e-2)  # attention of a pack rounds otherwise, and 8 bits round that up
    check_packing(model, IDS, 128, own(model))
    assert model.model.layers[0].mlp.up_proj.state.threshold == 6.0


def test_what_rounding_moves_is_no_leak(monkeypatch):
    """As on GPUs without grouped products: how an expert's product rounds hangs on how many tokens of the whole pack the expert gets."""
    exact = torch.nn.functional.linear

    def by_size(states, weight, bias=None):
        rounds = states.dim() == 2 and len(states) % 2 and weight.shape[0] != 4  # not the router, or tokens go to other experts
        return exact(states.bfloat16(), weight.bfloat16()).float() if rounds else exact(states, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", by_size)
    monkeypatch.setitem(model_checks.LOSS_APART, torch.float32, 2e-2)
    model = tiny_family("qwen3_moe")
    model.set_experts_implementation("eager")
    check_packing(model, IDS, 128, own(model))
    monkeypatch.setattr(model_checks, "SAME_GRADIENT", -1)
    with pytest.raises(UserError, match=SEEN):
        check_packing(model, IDS, 128, own(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*APART, "lfm2", "qwen3_5", "falcon_h1", "gpt_oss"])
def test_rows_that_are_apart_have_no_gradient_for_each_other(family, dtype):
    model = tiny_family(family).to(dtype).eval()
    share = model_checks._gradient_before(model, IDS[:2])
    assert share == 0 if family in APART else share > 0.01
    assert all(weight.grad is None for weight in model.parameters()) and not model.get_input_embeddings()._forward_hooks


def saved(model, folder):
    """A checkpoint of a model with the embedded model's tokenizer."""
    model.save_pretrained(folder)
    load_tokenizer(BASE).save_pretrained(folder)
    return folder


def family_of_base(family: str, **changed):
    """A tiny model with the embedded tokenizer's vocabulary."""
    return tiny_family(family, **{"vocab_size": 4096, "max_position_embeddings": 2048, "bos_token_id": 0, "eos_token_id": 0} | changed)


PACKED = replace(QUICK, epochs=1, packing=True, pack_length=2048, compile="no")


def test_training_refuses_to_pack_such_a_model_and_leaves_nothing(tmp_path):
    base, out = saved(family_of_base("lfm2"), tmp_path / "base"), tmp_path / "out" / "adapter"
    with pytest.raises(UserError, match=SEEN):
        train("structured", base, ROWS, ROWS[:2], out, PACKED, "trl", INPUTS)
    assert list(out.parent.iterdir()) == []
    assert train("structured", base, ROWS, ROWS[:2], out, replace(QUICK, epochs=1), "trl", INPUTS)["steps"] == 2


def test_experts_are_said_and_replies_are_made_by_the_models_own_attention(tmp_path):
    """gpt-oss has no attention called sdpa."""
    base, said = saved(family_of_base("gpt_oss"), tmp_path / "base"), []
    parameters = replace(QUICK, epochs=1, eval_steps=4, eval_generate=1)
    info = train("structured", base, ROWS, ROWS[:2], tmp_path / "adapter", parameters, "trl", INPUTS, say=said.append)
    assert info["metrics"]["after"] and [line for line in said if "the experts" in line and line.startswith("LoRA reaches k_proj, o_proj, q_proj, v_proj")]
    told = json.loads((tmp_path / "adapter/training_info.json").read_text())["lora"]
    assert told["modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"] and told["experts"] > told["share"] > 0


@pytest.mark.parametrize("family", ["gemma3 with vision", "falcon_h1", "llama4"])
def test_an_adapter_is_loaded_as_it_was_trained(tmp_path, family):
    model = tiny_gemma3_with_vision(vocab_size=4096) if family == "gemma3 with vision" else family_of_base(family)
    base, out = saved(model, tmp_path / "base"), tmp_path / "adapter"
    info = train("structured", base, ROWS, ROWS[:4], out, replace(QUICK, epochs=4, eval_steps=8, learning_rate=1e-2), "trl", INPUTS)
    assert info["eval_loss"]["after"] < info["eval_loss"]["before"]
    from slm_swap.tuning.packing import IGNORED
    from slm_swap.tuning.tokens import tokenize

    rows, *_ = tokenize(load_tokenizer(base), "structured", ROWS[:4], 2048)
    tuned = with_adapter(load_model(base, "fp32", device_map={"": "cpu"}), out, base).eval()
    total = count = 0
    with torch.no_grad():
        for row in rows:
            ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
            logits = tuned(input_ids=ids).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=IGNORED, reduction="sum").item()
            count += (labels[0, 1:] != IGNORED).sum().item()
    assert total / count == pytest.approx(info["eval_loss"]["after"], rel=1e-4)
