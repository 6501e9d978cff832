"""A random model and random rows, small enough to compare training's gradients one by one."""

from typing import Any

import torch

from slm_swap.tuning.packing import IGNORED

VOCABULARY = 97


def tiny_model(dropout: float = 0.0):
    """A random model of Phi-4-mini's architecture with LoRA on all linear layers, in fp32: (PEFT model, causal LM inside)."""
    from peft import LoraConfig, get_peft_model
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}, max_position_embeddings=256,
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2, attn_implementation="sdpa",
    )  # fmt: skip
    targets = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    lora = LoraConfig(r=4, lora_dropout=dropout, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(Phi3ForCausalLM(config), lora)
    return model, model.get_base_model()


def some_rows(count: int = 7) -> list[dict[str, list[int]]]:
    torch.manual_seed(1)
    rows = []
    for _ in range(count):
        size, prompt = int(torch.randint(6, 20, ())), int(torch.randint(1, 5, ()))
        ids = torch.randint(3, VOCABULARY, (size,)).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]})
    return rows



SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2, "tie_word_embeddings": False,
}  # fmt: skip
MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # the configuration's class, and what it has besides SIZES
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": 8}),
    "granite": ("GraniteConfig", {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22}),
    "hyperclovax": ("HyperCLOVAXConfig", {"logits_scaling": 0.25}),
    "cohere2": ("Cohere2Config", {"logit_scale": 0.0625, "sliding_window": 8}),
    "gemma2": ("Gemma2Config", {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 5.0, "sliding_window": 8, "head_dim": 16}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 8, "head_dim": 16}),
    "phi": ("PhiConfig", {}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "gpt_neox_japanese": ("GPTNeoXJapaneseConfig", {}),
    "falcon_h1": ("FalconH1Config", {"lm_head_multiplier": 0.3} | MAMBA),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}),
    "qwen3_5": ("Qwen3_5TextConfig", {"layer_types": ["linear_attention", "full_attention"], "head_dim": 16} | LINEAR),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 8}),
    "llama4": ("Llama4TextConfig", {"num_local_experts": 2, "intermediate_size_mlp": 96, "attention_chunk_size": 24, "head_dim": 16, "no_rope_layers": [1, 0]}),
}  # fmt: skip


def tiny_config(family: str, **changed: Any):
    """A configuration of one of FAMILIES."""
    import transformers

    kind, special = FAMILIES[family]
    return getattr(transformers, kind)(**SIZES | special | changed)


def tiny_family(family: str, **changed: Any):
    """A random causal language model of one of FAMILIES, in fp32."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changed), dtype=torch.float32)
    if (bias := getattr(model.get_output_embeddings(), "bias", None)) is not None:
        torch.nn.init.normal_(bias)
    return model


def tiny_gemma3_with_vision(**changed: Any):
    """Gemma 3 of 4B and more, tiny: a text decoder, whose configuration is `changed`, beside a vision tower with layers of the same names."""
    from transformers import AutoModelForCausalLM, Gemma3Config

    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    images = {"mm_tokens_per_image": 4, "image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92}
    config = Gemma3Config(text_config=tiny_config("gemma3", **changed).to_dict(), vision_config=vision, **images)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
