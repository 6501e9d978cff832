"""What is looked at before training, so that it does not turn out hours later."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from slm_swap.clients.architecture import text_config
from slm_swap.common.errors import UserError
from slm_swap.common.settings import display_path
from slm_swap.rows.examples import Example, read_examples

UNPACKED = "use --no-packing, or --preset documented"
OTHER_HEAD = "use --backend unsloth on a GPU, or another model"
# What a configuration says of the way from the output head to the logits.
MULTIPLIES = ("logit_scale", "lm_head_multiplier", "output_multiplier")
DIVIDES = ("logits_scaling", "logits_mup_width_multiplier")
CAPS = ("final_logit_softcapping", "logits_soft_cap")
MULTIPLIES_BY_SCALING = ("hyperclovax",)  # multiplies by `logits_scaling`
OF_OTHER_LOGITS = re.compile("router|attn|attention|keep")  # those of experts and of attention


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


def head_options(config: Any) -> tuple[float, float | None]:
    """(scale, cap) of a model's logits, cap * tanh(scale * head(hidden) / cap), by its configuration (transformers'); no cap: None.

    Raises:
        UserError: the configuration says something else about logits.
    """
    settings = text_config(config)
    divides = () if settings.model_type in MULTIPLIES_BY_SCALING else DIVIDES
    scale, cap = 1.0, None
    for name in (*MULTIPLIES, *DIVIDES, *CAPS):
        value = getattr(settings, name, None)
        if not isinstance(value, (int, float)) or not value:
            continue
        if name in CAPS:
            cap = float(value)
        else:
            scale *= 1 / value if name in divides else value
    told = {name: value for name, value in settings.to_dict().items() if re.search("logit|lm_head", name) and not OF_OTHER_LOGITS.search(name)}
    known = (*MULTIPLIES, *DIVIDES, *CAPS)
    # None, False, 0 and 1 leave logits as they are, or say no more than yes. Whatever the configuration hides shows in check_loss.
    unknown = [name for name, value in told.items() if isinstance(value, str) or (name not in known and value not in (None, 0, 1))]
    if unknown:
        raise UserError(f"the model's output head has {', '.join(sorted(unknown))}, which --backend trl does not know: {OTHER_HEAD}")
    return scale, cap


def lora_reach(model: Any) -> dict[str, Any]:
    """How much of a PEFT model LoRA is on: `modules`, the names of its layers; `left_out`, of the decoder's other linear layers; and the
    `share` of all weights that these layers hold, with the share of `experts`, which are stacked and no linear layers.
    """
    from peft.tuners.lora import LoraLayer
    from torch import nn

    from slm_swap.tuning.backends import decoder_of

    base = model.get_base_model()
    layers = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    inside = {id(part) for module in layers.values() for part in module.modules()}
    decoder = {id(module) for module in decoder_of(base).modules()} - {id(base.get_output_embeddings())}
    left = {name for name, part in base.named_modules() if isinstance(part, nn.Linear) and id(part) in decoder - inside}
    total = reached = experts = 0
    for module in base.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.requires_grad:  # the adapter's own
                continue
            packed = type(weight).__name__ == "Params4bit"  # two weights in a byte
            count = module.in_features * module.out_features if packed and name == "weight" else weight.numel()
            total += count
            reached += count * (id(module) in inside)
            experts += count * (weight.dim() > 2 and not isinstance(module, nn.modules.conv._ConvNd))
    ends = [sorted({name.rsplit(".", 1)[-1] for name in names}) for names in (layers, left)]
    return {"modules": ends[0], "left_out": ends[1], "share": round(reached / total, 4), "experts": round(experts / total, 4)}


def reach_report(reach: dict[str, Any]) -> list[str]:
    """What is to be said before training of a `lora_reach` that is not all linear layers; a line each."""
    lines = []
    if reach["experts"]:
        lines.append(
            f"LoRA reaches {', '.join(reach['modules'])}, {reach['share']:.1%} of the weights: the experts, {reach['experts']:.1%} of them, are no "
            "linear layers and stay as they are"
        )
    if reach["left_out"]:
        lines.append(f"LoRA leaves {', '.join(reach['left_out'])} as they are: it does not fit how this model uses or names them")
    return lines


FUSED = ("phi3", "phi4_multimodal")  # one linear layer makes queries, keys and values, and one gate and up


def memory_needed(config: Any, parameters: Any, longest: int) -> dict[str, float]:
    """An estimate of the GiB of GPU memory that training takes: weights, LoRA with its optimizer, activations, logits, the
    allocator's loss.

    `config` is the base model's (transformers), `parameters` the Hyperparameters, `longest` the tokens of the longest row.

    Raises:
        AttributeError: the configuration lacks what the estimate needs, as those of models without attention do.
    """
    config = text_config(config)
    hidden, inter, layers, vocabulary = config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.vocab_size
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or hidden // heads
    query, keys = size * heads, size * (getattr(config, "num_key_value_heads", None) or heads)
    attention = query + 2 * keys
    linear = layers * (hidden * (attention + query) + 3 * hidden * inter)
    experts = 0
    if count := expert_count(config):
        inter = getattr(config, "moe_intermediate_size", None) or inter
        experts = layers * count * 3 * hidden * inter
        linear = layers * hidden * (attention + query)
        inter *= getattr(config, "num_experts_per_tok", None) or 1  # what a token's way leads through
    head = vocabulary * hidden * (1 if config.tie_word_embeddings else 2)
    width = {"int8": 1, "nf4": 0.55, "bf16": 2, "fp8": 2.13, "fp32": 4}[parameters.precision]
    other = 4 if parameters.precision == "fp32" else 2
    fused = config.model_type in FUSED
    readers = 2 if fused else 5  # linear layers with LoRA that read the hidden states
    lora = layers * parameters.lora_r * ((2 if fused else 4) * hidden + query + attention + (0 if experts else (2 if fused else 3) * hidden + 3 * inter))
    tokens = parameters.pack_length if parameters.packing else parameters.batch_size * longest
    if parameters.step_packed:
        tokens = parameters.step_room(longest)
    # What a layer keeps of a token for its backward pass, counted in what torch.compile saves for Phi-4-mini's layers and Qwen3-4B's: compiled, it
    # computes again what is cheap. LoRA's dropout leaves each of its layers an input and a mask of its own.
    dropped = readers * hidden + query + inter
    if parameters.compiled:
        kept = other * (2 * hidden + 3 * query + 3 * keys + 2 * inter)
        kept += (other + 1) * dropped if parameters.lora_dropout else other * (2 * hidden + inter)
    else:
        kept = other * (4 * hidden + 2 * query + 2 * attention + 5 * inter) + (4 * dropped if parameters.lora_dropout else 0)
    through = other * hidden * layers + kept if parameters.gradient_checkpointing else kept * layers
    chunk = min(tokens, 512)  # tokens whose logits are there at once
    parts = {
        "weights": linear * width + (experts + head) * other,  # experts are no linear layers, and not quantized
        "LoRA": lora * 16,  # fp32: weight, gradient and AdamW's two moments
        "activations": tokens * through,
        "logits": chunk * vocabulary * 12,
    }
    parts["allocator"] = 0.05 * sum(parts.values())  # what it holds and cannot use; benchmarks/results/train.json has both figures
    return {name: value / 2**30 for name, value in parts.items()}


def without_needless_checkpointing(config: Any, parameters: Any, longest: int, free: float) -> Any:
    """Hyperparameters without gradient checkpointing where a step's rows are packs and, by the estimate, four fifths of the `free` GiB suffice.

    Checkpointing makes the same gradients in less memory and a third more time.

    Raises:
        AttributeError: as `memory_needed`.
    """
    if not (parameters.gradient_checkpointing and parameters.step_packed):
        return parameters
    without = replace(parameters, gradient_checkpointing=False)
    return without if sum(memory_needed(config, without, longest).values()) <= 0.8 * free else parameters


def expert_count(config: Any) -> int:
    """How many experts a layer has, by a text decoder's configuration; 0 where it is no mixture of experts."""
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), 0)


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
