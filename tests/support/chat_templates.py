"""Tokenizers with the chat templates of real families, over the embedded model's vocabulary."""

from pathlib import Path

from slm_swap.clients.loading import load_tokenizer
from slm_swap.common.settings import PACKAGE

MARKS = {
    "phi": ["<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>", "<|tool_response|>"],
    "gemma4": ["<bos>", "<turn|>", "<|turn>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>"],
    "llama": ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
    "qwen": ["<|im_start|>", "<|im_end|>"],
}


def tokenizer_of(family: str, marks: bool = True):
    """The tokenizer of `family`: "phi", a name of TRL's chat templates, or a template's own text; `marks` are tokens of their own."""
    tokenizer = load_tokenizer(PACKAGE / "models/phi-tiny")
    if family != "phi":
        tokenizer.chat_template = family if "{" in family else _template(family)
    if marks:
        known = next((told for name, told in MARKS.items() if family.startswith(name)), MARKS["qwen"])
        tokenizer.add_tokens(known, special_tokens=True)
        tokenizer.add_tokens(["<tool_call>", "</tool_call>", "<think>", "</think>"])  # in Qwen's tokenizer, too, these are not special
        tokenizer.slm_swap_embeddings = None  # no model is asked
    return tokenizer


def _template(family: str) -> str:
    import trl

    return (Path(trl.__file__).parent / "chat_templates" / f"{family}.jinja").read_text(encoding="utf-8")
