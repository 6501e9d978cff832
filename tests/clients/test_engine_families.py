"""Families whose caches, configurations or attentions are not Llama's: tiny random models, in fp32 on a CPU.

A reply is right where, fed back behind its prompt in one forward pass without padding, cache or this program's attention, each token is the
most likely one.
"""

import copy
from functools import cache

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from slm_swap.clients.engines import Prompt
from slm_swap.clients.engines import captured as captured_module
from slm_swap.clients.engines.attention import GROUPED
from slm_swap.clients.engines.captured import CapturedDecoder, can_capture
from slm_swap.clients.engines.transformers_engine import TransformersEngine, cache_bytes
from slm_swap.clients.loading import load_tokenizer
from slm_swap.common.errors import UserError
from slm_swap.common.settings import PACKAGE
from tests.support.uncaptured import uncaptured

TINY = dict(vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
TEXT = TINY | dict(max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16, layer_types=["linear_attention"] * 3 + ["full_attention"])
MAMBA = dict(mamba_d_state=16, mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=1, mamba_chunk_size=16)
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=32)
VISION = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
FAMILIES = {
    "lfm2": TEXT | dict(layer_types=["conv", "full_attention"] * 2, block_ff_dim=96, block_auto_adjust_ff_dim=False),
    "qwen3_5_text": TEXT | LINEAR,
    "qwen3_next": TEXT | LINEAR | EXPERTS | dict(num_experts=4, shared_expert_intermediate_size=32),
    "granitemoehybrid": TEXT | MAMBA | dict(layer_types=["mamba", "attention", "mamba", "mamba"], num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=64),
    "falcon_h1": TEXT | MAMBA | dict(mamba_d_ssm=128),
    "nemotron_h": TEXT | EXPERTS | dict(layers_block_type=["mamba", "attention", "mamba", "moe"], mamba_num_heads=8, mamba_head_dim=16, ssm_state_size=16, n_groups=1, chunk_size=16, n_routed_experts=4, moe_shared_expert_intermediate_size=32),
    "gemma2": TEXT | dict(attn_logit_softcapping=2.0, query_pre_attn_scalar=1, sliding_window=64),
    "gemma3": dict(tie_word_embeddings=False, text_config=TEXT | dict(sliding_window=64), vision_config=VISION),
    "gemma4_text": TEXT | dict(global_head_dim=32, num_global_key_value_heads=1, sliding_window=448, num_kv_shared_layers=0, hidden_size_per_layer_input=8, vocab_size_per_layer_input=512, layer_types=["sliding_attention"] * 3 + ["full_attention"]),
    "mistral3": dict(tie_word_embeddings=False, text_config=TEXT | dict(model_type="mistral", sliding_window=None), vision_config=VISION | dict(model_type="pixtral", head_dim=16)),
    "qwen3_vl": dict(tie_word_embeddings=False, text_config=TEXT | dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}), vision_config=dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=64, num_position_embeddings=16, deepstack_visual_indexes=[0])),
    "qwen3_moe": TEXT | EXPERTS | dict(num_experts=4),
    "deepseek_v2": TEXT | dict(num_key_value_heads=4, head_dim=8, kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=24, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=32, n_shared_experts=1),
    "llama": TEXT | dict(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
}  # fmt: skip
MOE = ("qwen3_moe", "deepseek_v2")  # whose experts in fp32 are counted on the host
HYBRID = ("lfm2", "qwen3_5_text", "qwen3_next", "granitemoehybrid", "falcon_h1", "nemotron_h")
LENGTHS, LIMITS = (5, 33, 60, 90, 2, 31, 70, 120), (24, 4, 17, 9, 20, 30, 2, 12)
PROMPTS = [
    Prompt(index, torch.randint(3, 512, (length,), generator=torch.Generator().manual_seed(index)).tolist(), limit)
    for index, (length, limit) in enumerate(zip(LENGTHS, LIMITS, strict=True))
]
ENDS = {2}


def gpu(test):
    """Marked and, without a GPU, skipped."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")(test))


@cache
def tokenizer():
    return load_tokenizer(PACKAGE / "models/phi-tiny")


@cache
def model(family: str):
    """With weights so large that its replies are chaotic, and any numeric error shows."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**FAMILIES[family])
    auto = AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModelForImageTextToText
    made = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if weight.ndim == 2 and "conv" not in name:
                weight.mul_(20 if "embed" in name else 3)
    return made


def engine(family: str, size: int) -> TransformersEngine:
    made = TransformersEngine(model(family), tokenizer(), size)
    made.ends = ENDS
    return made


def replies(made: TransformersEngine) -> dict[int, list[int]]:
    return {one.index: one.tokens + sorted(ENDS) * one.stopped for one in made.generate(PROMPTS)}


def wrong(family: str, found: dict[int, list[int]], attention: str) -> list[int]:
    """The prompts whose reply has a token that is not the most likely one, but for ties."""
    made, bad = model(family), []
    made.set_attn_implementation(attention)
    for prompt in PROMPTS:
        new = found[prompt.index]
        with torch.inference_mode():
            logits = made(input_ids=torch.tensor([prompt.tokens + new]), use_cache=False).logits[0, len(prompt.tokens) - 1 : -1]
        if not torch.allclose(logits.max(-1).values, logits.gather(1, torch.tensor(new)[:, None])[:, 0], atol=1e-3):
            bad.append(prompt.index)
    return bad


@pytest.mark.parametrize("family", FAMILIES)
def test_replies_are_right_in_any_batch(family):
    model(family).set_attn_implementation("sdpa")
    alone = replies(engine(family, 1))
    assert model(family).config._attn_implementation == GROUPED
    together = replies(engine(family, 8))
    assert wrong(family, alone, "eager") == wrong(family, together, "eager") == []
    assert together == alone and len({token for reply in alone.values() for token in reply}) > 40


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in HYBRID])
def test_static_caches_take_any_shape(family, monkeypatch):
    """Gemma 4 has other heads in its global layers; within windows all are captured, beyond them none is."""
    monkeypatch.setattr(CapturedDecoder, "_capture", uncaptured)
    model(family).set_attn_implementation("sdpa")
    made = engine(family, 2)
    made._captured = CapturedDecoder(made.model, ENDS)
    found, fits = replies(made), made._captured.fits
    assert made.capture_error is None and made._captured._steps, "something was decoded so"
    assert fits(64 - 8) and fits(65) == (family not in ("gemma2", "gemma3"))
    assert wrong(family, found, "eager") == []


def test_a_dynamic_rope_is_not_looked_at_while_it_is_captured(monkeypatch):
    """Its factors would be chosen by the longest position, on the host."""
    looked = []
    made = model("llama")
    rotary = made.model.rotary_emb
    monkeypatch.setattr(torch, "max", lambda *given: looked.append(given) or torch.amax(*given))
    inputs = torch.zeros(1, 1, 64), torch.tensor([[7]])
    plain = rotary(*inputs)
    assert looked
    looked.clear()
    with captured_module.fixed_rope(made):
        fixed = rotary(*inputs)
    assert not looked and all(torch.equal(one, other) for one, other in zip(plain, fixed, strict=True))
    rotary(*inputs)
    assert looked, "as before"


def test_a_failed_capture_is_said_once_and_the_run_goes_on(monkeypatch, capsys):
    def broken(self, step):
        raise torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing\nmore")

    model("llama").set_attn_implementation("sdpa")
    wanted = replies(engine("llama", 2))
    monkeypatch.setattr(CapturedDecoder, "_run", broken)
    made = engine("llama", 2)
    made._captured = CapturedDecoder(made.model, ENDS)
    assert replies(made) == wanted
    reason = "AcceleratorError: CUDA error: operation not permitted when stream is capturing"
    assert made.state() == {"batch_size_used": 2, "batches_halved": 0, "capture_error": reason}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the decode step of LlamaForCausalLM cannot be captured (AcceleratorError") and line.endswith("the replies are the same")
    other = engine("llama", 2)
    other._captured = CapturedDecoder(other.model, ENDS)
    other.restore(made.state())
    assert other._captured is None and other.state() == made.state(), "a later process does not try again"
    assert replies(other) == wanted and not capsys.readouterr().err


@pytest.mark.parametrize("over", [None, RuntimeError("CUDA error: operation failed due to a previous error during capture")])
def test_too_little_memory_while_capturing_is_no_failed_capture(over, monkeypatch, capsys):
    def full(self, step):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        except torch.OutOfMemoryError:
            if over:
                raise over  # noqa: B904  as torch.cuda.graph does
            raise

    monkeypatch.setattr(CapturedDecoder, "_run", full)
    made = engine("llama", 2)
    made._captured = CapturedDecoder(made.model, ENDS)
    with pytest.raises(UserError, match="tokens alone does not fit in memory"):
        replies(made)
    assert made.halved and made.capture_error is None and not capsys.readouterr().err


def test_what_a_cache_takes_is_measured():
    """4 layers of 2 heads of 16 in fp32, keys and values; Gemma 4's global layer has one head of 32; LFM2's convolutions have states instead."""
    assert cache_bytes(model("llama")) == (4 * 2 * 2 * 16 * 4, 0)
    assert cache_bytes(model("gemma3")) == (4 * 2 * 2 * 16 * 4, 0)
    heads = 1 if model("gemma4_text").config.attention_k_eq_v else 2
    assert cache_bytes(model("gemma4_text")) == ((3 * 2 * 16 + heads * 32) * 2 * 4, 0)
    assert cache_bytes(model("lfm2")) == (2 * 2 * 2 * 16 * 4, 2 * 64 * 3 * 4)


def test_a_gpu_that_fails_is_said_in_one_line(monkeypatch):
    def failed(batch):
        raise torch.AcceleratorError("CUDA error: device-side assert triggered\nCUDA kernel errors might be reported asynchronously")

    made = engine("llama", 2)
    monkeypatch.setattr(made, "_decode", failed)
    with pytest.raises(UserError, match=r"the device failed .CUDA error: device-side assert triggered.: run the same command again"):
        replies(made)


def test_a_model_without_a_cache_of_transformers_is_refused():
    config = CONFIG_MAPPING["mamba2"](vocab_size=512, hidden_size=64, num_hidden_layers=1, num_heads=8, head_dim=16, state_size=16, n_groups=1, max_position_embeddings=512)  # fmt: skip
    made = TransformersEngine(AutoModelForCausalLM.from_config(config), tokenizer())
    with pytest.raises(UserError, match=r"cannot run mamba2 models, which give no cache of transformers: use --engine vllm"):
        list(made.generate(PROMPTS))


def test_a_row_that_is_done_does_not_change_the_others_frequencies(monkeypatch):
    """It goes on to be computed, beyond the context, where dynamic RoPE would take other ones."""
    model("llama").set_attn_implementation("sdpa")
    monkeypatch.setitem(ROPE_INIT_FUNCTIONS, "dynamic", lambda *_, **__: pytest.fail("other frequencies"))
    long = Prompt(0, (PROMPTS[7].tokens * 5)[:506], 6)
    batch = [long, PROMPTS[0], PROMPTS[5]]
    alone, together = (
        {one.index: one.tokens for one in TransformersEngine(model("llama"), tokenizer(), size).generate(batch)} for size in (1, 3)
    )
    assert together == alone and len(alone[5]) > 12


def test_longropes_factors_hang_on_no_other_row():
    """Rows below the border of 64 tokens, above it, and one that crosses it."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [8.0] * 8, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    config = CONFIG_MAPPING["phi3"](**TEXT, rope_parameters=rope, original_max_position_embeddings=64)
    torch.manual_seed(3)
    made = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    for weight in made.parameters():
        weight.data.mul_(6 if weight.ndim == 2 else 1)
    alone, together = ({one.index: one.tokens for one in TransformersEngine(made, tokenizer(), size).generate(PROMPTS)} for size in (1, 8))
    assert together == alone
    apart = TransformersEngine(made, tokenizer(), 8)
    apart._border = None
    assert {one.index: one.tokens for one in apart.generate(PROMPTS)} != alone, "this model's replies do hang on the factors"


def test_what_has_no_plain_cache_is_not_captured(monkeypatch):
    for family in FAMILIES:
        model(family).set_attn_implementation("sdpa")
        monkeypatch.setattr(type(model(family)), "device", torch.device("cuda"))
        assert can_capture(model(family)) is (family not in HYBRID), family


def on_gpu(family: str) -> TransformersEngine:
    """With its own end tokens instead of the tokenizer's, which the captured step knows too."""
    model(family).set_attn_implementation("sdpa")
    made = TransformersEngine(copy.deepcopy(model(family)).to("cuda"), tokenizer(), 2)
    made.ends = made._captured.ends = ENDS
    return made


@gpu
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in HYBRID])
def test_captured_steps_are_right(family):
    made = on_gpu(family)
    assert wrong(family, replies(made), "eager") == []
    if family in MOE:
        assert made._captured is None and "during CUDA graph capture" in made.capture_error
    else:
        assert made.capture_error is None and any(step.graph for step in made._captured._steps.values())


@gpu
@pytest.mark.parametrize("family", MOE)
def test_experts_in_16_bits_are_captured(family):
    made = on_gpu(family)
    made.model.to(torch.bfloat16)
    assert replies(made) and made.capture_error is None and any(step.graph for step in made._captured._steps.values())


@gpu
@pytest.mark.parametrize("look", [lambda: torch.ones(1, device="cuda").item(), lambda: torch.ones(2, device="cuda").nonzero(), lambda: {}["host"]])
def test_a_failed_capture_leaves_the_gpu_as_it_was(look, monkeypatch, capsys):
    """A step that looks at the device from the host, which CUDA forbids while it captures, or that fails there by itself."""
    step = CapturedDecoder._step

    def looking(self, one):
        step(self, one)
        if torch.cuda.is_current_stream_capturing():
            look()

    monkeypatch.setattr(CapturedDecoder, "_step", looking)
    made, stream = on_gpu("llama"), torch.cuda.current_stream()
    assert wrong("llama", replies(made), "eager") == []
    assert made.capture_error and made._captured is None and capsys.readouterr().err.count("cannot be captured") == 1
    assert torch.cuda.current_stream() == stream
    monkeypatch.undo()
    other = on_gpu("llama")
    assert wrong("llama", replies(other), "eager") == [] and other.capture_error is None, "another model is captured as ever"
