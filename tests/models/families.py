"""Tiny checkpoints of many model families: real configuration classes, random weights, and each family's quirks.

    from tests.models.families import FAMILIES, build
    build(FAMILIES["Qwen3"], folder)

A folder has what a published checkpoint has: weights, config, generation_config, tokenizer, chat template. The templates are our own
and bear the published ones' quirks. Weights are random and large, so that greedy replies are chaotic and any numeric error shows, and
one token in ten is a further end in generation_config, so that replies end at different times as in life.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from tests.models.rows import TEXTS

TEMPLATES = Path(__file__).parent / "templates"
VOCABULARY = 640  # tokens besides a family's own marks
EVERY = 10  # one token of so many is a further end
SPREAD = 0.2  # standard deviation of the weights: more than 1 / sqrt(hidden size)
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": SPREAD,
}
FAINT = 0.1  # the embeddings' share of that: what a layer adds is to count for more than the last token, or replies repeat it
WINDOW = 32  # of sliding attention: a fraction of every prompt
MAMBA = {"mamba_n_heads": 4, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_chunk_size": 32}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
DELTA = {  # Qwen's linear attention
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
IMAGES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
# What is not kept apart in a pack: states of convolutions and recurrences; gpt-oss' masks go without position ids.
TOGETHER = {"packed": "packed rows see each other in this model (they move one's hidden states by ...%): use --no-packing, or --preset documented"}
SAMPLED = {"do_sample": True, "temperature": 0.6, "top_p": 0.95}


@dataclass(frozen=True)
class Family:
    """One family; tokens are named by their text, and become ids when a checkpoint is built."""

    name: str
    config: str  # a configuration class of transformers
    template: str  # a file of templates/
    marks: str  # the special tokens
    eos: str
    ends: str  # what generation_config lists, besides one token in EVERY; "": it names none
    taught: str  # what training teaches for the reply {}
    bos: str | None = None
    pad: str | None = None
    plain_marks: str = ""  # further tokens of its own that are not special
    adds_bos: bool = False  # the tokenizer puts bos in front of a text
    spelling: str = "bytes"  # of spaces: see `spellings`
    sizes: dict[str, Any] = field(default_factory=dict)  # of the configuration, besides SIZES
    vision: dict[str, Any] = field(default_factory=dict)  # of a model with images, whose `sizes` are in text_config
    tokens: dict[str, str] = field(default_factory=dict)  # further fields of the configuration that name a token
    generation: dict[str, Any] = field(default_factory=dict)  # of generation_config, besides tokens
    refused: dict[str, str] = field(default_factory=dict)  # what the program says in columns of the table; several with spaces between

    def cells(self, columns: Iterable[str]) -> dict[str, str]:
        """What stands in those columns of the table: "ok", or "refused: " and a line."""
        lines = {column: line for named, line in self.refused.items() for column in named.split()}
        return {column: f"refused: {lines[column]}" if column in lines else "ok" for column in columns}


CHATML = "<|endoftext|> <|im_start|> <|im_end|>"
THINK = "<think> </think> <tool_call> </tool_call>"  # in Qwen's tokenizers these are not special
QWEN = {"marks": CHATML, "eos": "<|im_end|>", "pad": "<|endoftext|>", "ends": "<|im_end|> <|endoftext|>", "taught": "{}<|im_end|>", "generation": SAMPLED}
GEMMA = {
    "marks": "<pad> <eos> <bos> <start_of_turn> <end_of_turn>",
    "bos": "<bos>", "eos": "<eos>", "pad": "<pad>", "adds_bos": True, "spelling": "spaces",
    "ends": "<eos> <end_of_turn>", "taught": "{}<end_of_turn>",
}  # fmt: skip
GEMMA_SIZES = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
MISTRAL = {"marks": "<unk> <s> </s>", "bos": "<s>", "eos": "</s>", "ends": "</s>", "adds_bos": True, "spelling": "words"}
PHI = "<|endoftext|> <|system|> <|user|> <|assistant|> <|end|>"
GRANITE = {
    "template": "granite", "marks": "<|end_of_text|> <|start_of_role|> <|end_of_role|>", "eos": "<|end_of_text|>", "bos": "<|end_of_text|>",
    "pad": "<|end_of_text|>", "ends": "<|end_of_text|>", "taught": "{}<|end_of_text|>",
}  # fmt: skip
GRANITE_SIZES = {"embedding_multiplier": 4.0, "residual_multiplier": 0.4, "attention_multiplier": 0.1, "logits_scaling": 3.0}

_ALL = [
    Family(
        "Phi-4-mini", "Phi3Config", "phi4", PHI, "<|endoftext|>", "<|end|> <|endoftext|>", "{}<|end|>", "<|endoftext|>", "<|endoftext|>",
        sizes={"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}, "tie_word_embeddings": True},
    ),
    Family(
        "Phi-3.5", "Phi3Config", "phi3", PHI.replace("<|endoftext|>", "<s> <|endoftext|>"), "<|endoftext|>", "<|end|> <|assistant|> <|endoftext|>",
        "{}<|end|>", "<s>", "<|endoftext|>", spelling="words",
        sizes={
            "original_max_position_embeddings": 512,
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 512, "factor": 2.0,
                "short_factor": [1.0 + at / 20 for at in range(8)], "long_factor": [1.5 + at for at in range(8)],
            },
        },
    ),
    Family("Qwen2.5", "Qwen2Config", "chatml_default_system", **QWEN | {"generation": SAMPLED | {"repetition_penalty": 1.05}}, sizes={"tie_word_embeddings": True}),
    Family("Qwen3", "Qwen3Config", "chatml_thinking", **QWEN, plain_marks=THINK, sizes={"head_dim": 32, "tie_word_embeddings": True}),
    Family(
        "Qwen3 base", "Qwen3Config", "chatml_thinking", plain_marks=THINK, sizes={"head_dim": 32},
        **QWEN | {"eos": "<|endoftext|>", "ends": "<|endoftext|>", "generation": {"max_new_tokens": 2048}},
    ),
    Family("Qwen3 MoE", "Qwen3MoeConfig", "chatml", **QWEN, plain_marks=THINK, sizes=EXPERTS | {"head_dim": 16, "num_experts": 4}),
    Family(
        "Qwen3-Next", "Qwen3NextConfig", "chatml", **QWEN, plain_marks=THINK,
        refused=TOGETHER, sizes=DELTA | EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 32},
    ),
    Family(
        "Qwen3.5, with images", "Qwen3_5Config", "chatml_prefilled", **QWEN | {"marks": f"{CHATML} <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>"},
        plain_marks=THINK,
        refused=TOGETHER, sizes=DELTA | {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1], "mrope_interleaved": True,
            },
        },
        vision={"hidden_size": 32, "intermediate_size": 32, "depth": 1, "num_heads": 2, "out_hidden_size": 64, "num_position_embeddings": 16},
        tokens={
            "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>",
        },
    ),
    Family(
        "Llama 3.2", "LlamaConfig", "llama3", "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eom_id|> <|eot_id|>",
        "<|eot_id|>", "<|end_of_text|> <|eom_id|> <|eot_id|>", "{}<|eot_id|>", "<|begin_of_text|>", adds_bos=True, generation=SAMPLED,
        sizes={
            "head_dim": 16, "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    Family("Llama 2", "LlamaConfig", "llama2", **MISTRAL, taught=" {} </s>", generation={"temperature": 0.9, "top_p": 0.6}),
    Family("Gemma 2", "Gemma2Config", "gemma2", **GEMMA, sizes=GEMMA_SIZES | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0}),
    Family("Gemma 3 1B", "Gemma3TextConfig", "gemma3", **GEMMA, generation={"do_sample": True, "top_k": 64, "top_p": 0.95}, sizes=GEMMA_SIZES),
    Family(
        "Gemma 3 4B, with images", "Gemma3Config", "gemma3", **GEMMA | {"marks": f"{GEMMA['marks']} <start_of_image> <end_of_image> <image_soft_token>"},
        generation={"do_sample": True, "top_k": 64, "top_p": 0.95}, sizes=GEMMA_SIZES, vision=IMAGES | {"model_type": "siglip_vision_model"},
        tokens={"boi_token_index": "<start_of_image>", "eoi_token_index": "<end_of_image>", "image_token_index": "<image_soft_token>"},
    ),
    Family("Mistral v0.1", "MistralConfig", "mistral1", **MISTRAL, taught="{}</s>", sizes={"sliding_window": WINDOW}),
    Family(
        "Mistral v0.3", "MistralConfig", "mistral3", **MISTRAL | {"marks": "<unk> <s> </s> [INST] [/INST]"}, taught=" {} </s>",
        sizes={"sliding_window": None, "head_dim": 32},
    ),
    Family(
        "Mistral Small 3, with images", "Mistral3Config", "mistral_small", "<unk> <s> </s> [INST] [/INST] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [IMG] <pad>",
        "</s>", "</s>", "{}</s>", "<s>", "<pad>", adds_bos=True, sizes={"model_type": "mistral", "sliding_window": None, "head_dim": 32},
        vision=IMAGES | {"model_type": "pixtral", "head_dim": 16}, tokens={"image_token_index": "[IMG]"},
    ),
    Family(
        "SmolLM3", "SmolLM3Config", "smollm3", "<|begin_of_text|> <|end_of_text|> <|im_start|> <|im_end|>", "<|im_end|>", "<|im_end|>", "{}<|im_end|>",
        bos="<|begin_of_text|>", pad="<|im_end|>", plain_marks="<think> </think>", generation=SAMPLED, sizes={"no_rope_layers": [1, 0]},
    ),
    Family("Granite 3", "GraniteConfig", **GRANITE, sizes=GRANITE_SIZES | {"tie_word_embeddings": True}),
    Family(
        "Granite 4 hybrid", "GraniteMoeHybridConfig", **GRANITE,
        refused=TOGETHER, sizes=GRANITE_SIZES | MAMBA | {
            "layer_types": ["mamba", "attention"], "mamba_d_head": 32, "mamba_expand": 2, "position_embedding_type": "nope",
            "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 64, "tie_word_embeddings": True,
        },
    ),
    Family(
        "OLMo 2", "Olmo2Config", "olmo2", "<|endoftext|> <|pad|>", "<|endoftext|>", "<|endoftext|>", "{}<|endoftext|>", "<|endoftext|>", "<|pad|>",
    ),
    Family(
        "OLMo 3", "Olmo3Config", "olmo3", f"{CHATML} <|pad|>", "<|endoftext|>", "<|im_end|> <|endoftext|>", "{}<|endoftext|>",
        "<|endoftext|>", "<|pad|>", generation=SAMPLED, sizes={"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    Family(
        "Cohere 2", "Cohere2Config", "cohere2",
        "<PAD> <BOS_TOKEN> <EOS_TOKEN> <|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|SYSTEM_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> "
        "<|START_RESPONSE|> <|END_RESPONSE|>",
        "<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "{}<|END_RESPONSE|>", "<BOS_TOKEN>", "<PAD>", adds_bos=True,
        sizes={"logit_scale": 0.25, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    Family(
        "LFM2", "Lfm2Config", "chatml", f"<|pad|> <|startoftext|> {CHATML}", "<|im_end|>", "<|im_end|>", "{}<|im_end|>", "<|startoftext|>", "<|pad|>",
        adds_bos=True, refused=TOGETHER, sizes={"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    Family(
        "Falcon-H1", "FalconH1Config", "chatml", "<|pad|> <|end_of_text|> <|im_start|> <|im_end|>", "<|end_of_text|>", "<|end_of_text|> <|im_end|>",
        "{}<|im_end|>", pad="<|pad|>",
        refused=TOGETHER, sizes=MAMBA | {
            "mamba_d_ssm": 64, "mamba_d_head": 16, "lm_head_multiplier": 0.5, "embedding_multiplier": 2.0, "key_multiplier": 0.5,
            "attention_out_multiplier": 0.8, "ssm_multipliers": [0.5, 1.0, 1.5, 1.0, 0.8], "mlp_multipliers": [0.8, 0.6],
        },
    ),
    Family(
        "Nemotron-H", "NemotronHConfig", "nemotron_h", "<unk> <s> </s> <SPECIAL_10> <SPECIAL_11> <SPECIAL_12>", "<SPECIAL_12>",
        "</s> <SPECIAL_11> <SPECIAL_12>", "{}\n<SPECIAL_12>", "<s>", generation=SAMPLED,
        refused=TOGETHER, sizes={
            "layers_block_type": ["linear_attention", "full_attention", "mlp"], "num_hidden_layers": 3, "head_dim": 16, "mamba_num_heads": 4,
            "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 1, "chunk_size": 32,
        },
    ),
    Family(
        "gpt-oss", "GptOssConfig", "gpt_oss", "<|startoftext|> <|endoftext|> <|return|> <|channel|> <|start|> <|end|> <|message|> <|call|>",
        "<|return|>", "<|return|> <|endoftext|> <|call|>", "<|channel|>final<|message|>{}<|return|>", "<|startoftext|>", "<|endoftext|>",
        generation={"do_sample": True},
        refused=TOGETHER, sizes={
            "head_dim": 16, "sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                "original_max_position_embeddings": 256,
            },
        },
    ),
]  # fmt: skip
FAMILIES = {family.name: family for family in _ALL}


def build(family: Family, folder: Path) -> Path:
    """Write a checkpoint of `family` into `folder`, which is made; a family's checkpoint is always the same. Gives the folder."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(family)
    tokenizer.save_pretrained(folder)
    ids = tokenizer.get_vocab()
    named = [ids[end] for end in family.ends.split()]
    ordinary = sorted(set(ids.values()) - set(tokenizer.get_added_vocab().values()))
    further = Random(family.name).sample(ordinary, len(ids) // EVERY) if named else []
    special = {f"{name}_token_id": ids[token] for name, token in (("bos", family.bos), ("pad", family.pad)) if token}
    with torch.random.fork_rng():
        torch.manual_seed(sum(family.name.encode()))
        model = make_model(make_config(family, len(tokenizer), ids, special | {"eos_token_id": ids[family.eos]}))
    model.save_pretrained(folder)
    told = special | ({"eos_token_id": [*named, *sorted(further)]} if named else {}) | family.generation
    (folder / "generation_config.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")  # transformers would not write all of them
    if family.vision:
        (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 28, "width": 28}}) + "\n", encoding="utf-8")
    return folder


def make_config(family: Family, vocabulary: int, ids: dict[str, int], special: dict[str, int]) -> Any:
    """A family's configuration; where it has images, what is the text's stands in text_config."""
    import transformers

    text = SIZES | {"vocab_size": vocabulary} | special | family.sizes
    kind = getattr(transformers, family.config)
    if not family.vision:
        return kind(**text)
    tokens = {name: ids[token] for name, token in family.tokens.items()}
    shared = {"tie_word_embeddings": text["tie_word_embeddings"]} if "tie_word_embeddings" in text else {}
    return kind(text_config=text, vision_config=family.vision, **tokens, **shared)


def make_model(config: Any) -> Any:
    """A causal model, or for a configuration with images the model with images, with large random weights in fp32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    kind = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    model = kind.from_config(config, dtype=torch.float32)
    recurrence = ("A_log", "dt_bias", ".D")  # its own initial values keep it stable
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, SPREAD)
            elif not name.endswith(recurrence):  # norms, biases, sinks: else all 0 or 1
                parameter.add_(SPREAD * torch.randn_like(parameter))
        model.get_input_embeddings().weight.mul_(FAINT)
    return model


def make_tokenizer(family: Family) -> Any:
    """A family's tokenizer, with its marks, flags and chat template."""
    from tokenizers import AddedToken, Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_str(spellings(family.spelling))
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in family.marks.split()])
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in family.plain_marks.split()])
    if family.adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", pair=f"{family.bos} $A {family.bos} $B", special_tokens=[(family.bos, tokenizer.token_to_id(family.bos))]
        )
    named = {"bos_token": family.bos, "eos_token": family.eos, "pad_token": family.pad}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=(TEMPLATES / f"{family.template}.jinja").read_text(encoding="utf-8"),
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in named.items() if token},
    )


@cache
def spellings(kind: str) -> str:
    """A BPE trained on the rows' texts, as JSON. "bytes": GPT-2's byte level. "spaces": Gemma's, a space is a letter of its own. "words":
    Llama 2's, which also puts a space in front of every text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    if kind == "bytes":
        tokenizer, alphabet, bytes_ = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet(), []
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        bytes_, alphabet = [f"<0x{number:02X}>" for number in range(256)], []
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True))
        spaced = [normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *spaced] if kind == "words" else spaced)
        # no token holds more than a line's end, as in theirs
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Split("\n", "isolated")])
        stripped = [decoders.Strip(" ", 1, 0)] if kind == "words" else []
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *stripped])
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=bytes_, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    plain = json.loads(tokenizer.to_str())
    plain["added_tokens"] = []  # bytes are no special tokens
    return json.dumps(plain)
