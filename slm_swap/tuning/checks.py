"""What is looked at before training, so that it does not turn out hours later."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from slm_swap.common.errors import UserError
from slm_swap.common.settings import display_path
from slm_swap.rows.examples import Example, read_examples


def check_test_split(train: Path, rows: Iterable[Example], test: Path | None) -> Path | None:
    """Refuse to train on prompts of the test split: `test`, or the test.jsonl beside `train` where there is one. Gives its path.

    Raises:
        UserError: a prompt stands in both, or `test` cannot be read.
    """
    beside = train.parent / "test.jsonl"
    path = test or (beside if beside.is_file() else None)
    if path is None:
        return None
    tested = {example.prompt: example.where for example in read_examples(path)}
    shared = [(example.where, tested[example.prompt]) for example in rows if example.prompt in tested]
    if shared:
        raise UserError(
            f"{len(shared)} prompts of {display_path(train)} stand in the test split too (first {shared[0][0]} and {shared[0][1]}): "
            "split again with prepare_data.py, or name the right file with --test"
        )
    return path


def length_report(lengths: Sequence[int], too_long: Sequence[int], limit: int) -> str:
    """One line about the rows' lengths in tokens; `lengths` are those that are trained on, in order, `too_long` those that are not."""
    told = f"{len(lengths)} rows of {lengths[0]} to {lengths[-1]} tokens, {sum(lengths) / len(lengths):.0f} on average"
    if not too_long:
        return f"{told}; --max-length {limit} cuts none"
    return f"{told}; {len(too_long)} longer than {limit} are left out (--max-length {max(too_long)} keeps them all)"


def memory_needed(config: Any, parameters: Any, longest: int) -> dict[str, float]:
    """An estimate of the GiB of GPU memory that training takes: weights, LoRA with its optimizer, activations, logits, the
    allocator's loss.

    `config` is the base model's (transformers), `parameters` the Hyperparameters, `longest` the tokens of the longest row.
    """
    hidden, inter, layers, vocabulary = config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.vocab_size
    size = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    attention = size * (config.num_attention_heads + 2 * config.num_key_value_heads)
    linear = layers * (hidden * attention + hidden * hidden + 3 * hidden * inter)
    head = vocabulary * hidden * (1 if config.tie_word_embeddings else 2)
    width = {"int8": 1, "nf4": 0.55, "bf16": 2, "fp32": 4}[parameters.precision]
    other = 4 if parameters.precision == "fp32" else 2
    lora = layers * parameters.lora_r * (2 * hidden + attention + 2 * hidden + 3 * inter + hidden)
    tokens = parameters.pack_length if parameters.packing else parameters.batch_size * longest
    # What a layer keeps of a token for its backward pass; compiled, it computes again what is cheap, dropout included.
    if parameters.compiled:
        kept = other * (6 * hidden + 2 * attention + 3 * inter)
    else:
        kept = other * (6 * hidden + 2 * attention + 5 * inter) + (4 * (3 * hidden + inter) if parameters.lora_dropout else 0)
    through = other * hidden * layers + kept if parameters.gradient_checkpointing else kept * layers
    chunk = min(tokens, 1024)  # tokens whose logits are there at once
    parts = {
        "weights": linear * width + head * other,
        "LoRA": lora * 16,  # fp32: weight, gradient and AdamW's two moments
        "activations": tokens * through,
        "logits": chunk * vocabulary * 12,
    }
    parts["allocator"] = 0.05 * sum(parts.values())  # what it holds and cannot use; benchmarks/results/train.json has both figures
    return {name: value / 2**30 for name, value in parts.items()}


def memory_warning(needed: dict[str, float], free: float, parameters: Any) -> str | None:
    """What to say where the estimate is more than the `free` GiB, with the flags that make it less; None where it is not."""
    if sum(needed.values()) <= free:
        return None
    flags = [] if parameters.gradient_checkpointing else ["--gradient-checkpointing"]
    if parameters.packing and parameters.pack_length > parameters.max_length:
        flags.append(f"--pack-length {max(parameters.max_length, parameters.pack_length // 2)}")
    if not parameters.packing and parameters.batch_size > 1:
        flags.append("a smaller --batch-size with more --gradient-accumulation")
    if parameters.precision in ("fp32", "bf16"):
        flags.append("--precision nf4")
    flags.append("a smaller --max-length")
    parts = ", ".join(f"{name} {value:.1f}" for name, value in needed.items())
    return f"training may take {sum(needed.values()):.1f} GiB ({parts}; an estimate) and {free:.1f} are free: try {', '.join(flags)}"
