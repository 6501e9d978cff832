"""A random model and random rows, small enough to compare training's gradients one by one."""

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
