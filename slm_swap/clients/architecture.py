"""What a checkpoint's configuration says of its text decoder, also where that is a part of a larger one."""

from collections.abc import Iterator
from typing import Any

from slm_swap.common.errors import UserError

LONGEST_CONTEXT = 100_000_000  # tokens; transformers gives tokenizers without a limit one of 10^30
CONTEXTS = ("max_position_embeddings", "max_seq_len", "max_sequence_length", "seq_length", "n_positions", "context_length")


def text_config(config: Any) -> Any:
    """The text decoder's part of a transformers configuration: of Gemma 3 of 4B and more, Qwen3.5 or Mistral 3 it is `text_config`."""
    return config.get_text_config(decoder=True)


def context_length(config: Any) -> int | None:
    """The most tokens that the model was made for; None where no limit is named (state space models, ALiBi)."""
    decoder = text_config(config)
    lengths = (getattr(part, name, None) for part in (decoder, config) for name in CONTEXTS)
    return next((length for length in lengths if isinstance(length, int) and length > 0), None)


def usable_context(config: Any, tokenizer: Any) -> int:
    """`context_length`; of a model that names none, the tokenizer's.

    Raises:
        UserError: the tokenizer names none either.
    """
    length = context_length(config) or min(tokenizer.model_max_length, LONGEST_CONTEXT)
    if length == LONGEST_CONTEXT:
        raise UserError(
            f"neither config.json nor tokenizer_config.json of this {config.model_type} model says how many tokens it may read: "
            'put "max_position_embeddings" into its config.json'
        )
    return length


def config_ends(config: Any) -> Iterator[int | list[int] | None]:
    """What the configuration and its text decoder's part name as tokens that end a reply."""
    for part in (config, text_config(config)):
        yield getattr(part, "eos_token_id", None)


def fixed_length(config: Any) -> int | None:
    """The most tokens up to which each one of a row attends to all before it, by the same rotary embedding; None: no limit.

    Beyond it attention windows or chunks leave some out, LongRoPE takes its long factors, and dynamic RoPE other frequencies.
    """
    decoder = text_config(config)
    limits = [value for name in ("sliding_window", "attention_chunk_size") for value in layer_values(decoder, name)]
    limits.append(longrope_border(config))
    for rope in rope_parameters(decoder):
        if rope.get("rope_type") == "dynamic":
            limits.append(context_length(config))
    return min((limit for limit in limits if limit), default=None)


def longrope_border(config: Any) -> int | None:
    """The most tokens up to which LongRoPE takes its short factors, for a whole batch by its longest row; None where there is no LongRoPE."""
    decoder = text_config(config)
    borders = [
        rope.get("original_max_position_embeddings") or getattr(decoder, "original_max_position_embeddings", None)
        for rope in rope_parameters(decoder)
        if rope.get("rope_type") == "longrope"
    ]
    return min((border for border in borders if border), default=None)


def rope_parameters(decoder: Any) -> list[dict[str, Any]]:
    """A text decoder's rotary embeddings: one, or one for each type of its layers."""
    given = getattr(decoder, "rope_parameters", None) or {}
    return [one for one in given.values() if isinstance(one, dict)] or [given]


def layer_values(decoder: Any, name: str) -> list[Any]:
    """What the layers of a text decoder have as an attribute of their configuration: one value where all have the same."""
    if not getattr(decoder, "is_heterogeneous", False):
        return [getattr(decoder, name, None)]
    return [getattr(layer, name, None) for layer in decoder.per_layer_config]
