"""What the GPU benchmarks run on: a model of Phi-4-mini's or Qwen3-4B's shape with random weights, and rows of the lengths that such tasks have.

Prompt and reply lengths in tokens are lognormal with fixed seeds, in the order drawn. A word "t<number>" is one token of the
benchmark's tokenizer, so that a row has exactly the tokens that it is meant to have. Random weights end no reply: whoever measures
stops each one at its own length.
"""

import json
from pathlib import Path

PREFIX = 40  # tokens that all prompts share, as a system prompt
PAD = 1  # a token of its own: Unsloth adds one where padding also ends texts, and the odd vocabulary slows it down
PHI_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
SHAPES = {  # the class of each one's configuration, and what it is told
    "phi-4-mini": ("Phi3Config", {
        "vocab_size": 200_064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 24,
        "num_key_value_heads": 8, "rope_parameters": PHI_ROPE, "original_max_position_embeddings": 4096,
    }),
    "qwen3-4b": ("Qwen3Config", {
        "vocab_size": 151_936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    }),
    "tiny": ("Phi3Config", {
        "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "rope_parameters": PHI_ROPE, "original_max_position_embeddings": 4096,
    }),
    "tiny-qwen3": ("Qwen3Config", {
        "vocab_size": 4608, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    }),
}  # fmt: skip


def lengths(rows: int, seed: int) -> tuple[list[int], list[int]]:
    """(prompt lengths, reply lengths) in tokens: means of about 190 and 49. Seed 7 is evaluation's workload, 3 training's."""
    import numpy

    rng = numpy.random.default_rng(seed)
    prompts = numpy.clip(rng.lognormal(5.0, 0.35, rows), 60, 600).astype(int)
    replies = numpy.clip(rng.lognormal(3.8, 0.5, rows), 12, 256).astype(int)
    return prompts.tolist(), replies.tolist()


def make_checkpoint(folder: Path, shape: str = "phi-4-mini", seed: int = 0) -> Path:
    """A checkpoint that transformers and vLLM load, in bfloat16; made once, on the GPU where there is one."""
    if (folder / "model.done").exists():
        return folder
    import torch
    import transformers

    kind, sizes = SHAPES[shape]
    config = getattr(transformers, kind)(
        max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=PAD, **sizes
    )
    torch.manual_seed(seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = 0
    model.generation_config.pad_token_id = PAD
    _tokenizer(config.vocab_size).save_pretrained(folder)
    model.save_pretrained(folder, max_shard_size="4GB")
    (folder / "model.done").touch()
    return folder


def _tokenizer(vocabulary: int):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<|end|>": 0, "<|pad|>": PAD, **{f"t{n}": n for n in range(PAD + 1, vocabulary - 1)}, "probe": vocabulary - 1}  # the last: see loading.py
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|end|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = " ".join(f"t{n}" for n in range(PAD + 1, PAD + PREFIX + 1)) + " {{ messages[-1]['content'] }}{% if add_generation_prompt %}{% endif %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>", chat_template=template, padding_side="left"
    )


def write_rows(path: Path, rows: int, vocabulary: int = SHAPES["phi-4-mini"][1]["vocab_size"], seed: int = 7, copies: int = 1) -> Path:
    """Evaluation's workload as rows of the structured track, the copies of each one after the other."""
    import numpy

    rng, completion = numpy.random.default_rng(seed + 1), json.dumps({"tool_name": "none", "arguments": {}})
    with open(path, "w", encoding="utf-8") as file:
        for number, length in enumerate(lengths(rows, seed)[0]):
            words = " ".join(f"t{token}" for token in rng.integers(PAD + 1, vocabulary - 1, length - PREFIX))
            for copy in range(copies):
                file.write(json.dumps({"id": f"row-{number}.{copy}", "prompt": words, "completion": completion}) + "\n")
    return path
