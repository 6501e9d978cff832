"""Attention of one new token over a cache, for models whose query heads share key-value heads."""

import sys
from typing import Any

from slm_swap.common.errors import UserError

GROUPED = "slm_swap_grouped_sdpa"
# What some models hand to their attention, by how it is computed then.
EAGER_OPTIONS = ("softcap", "s_aux")  # soft-capping, sinks: transformers' `sdpa` leaves them out without a word
SDPA_OPTIONS = ("position_bias", "indices", "block_indices")  # not of the grouped form: transformers' `sdpa` knows what to do


def use_grouped_attention(model: Any) -> None:
    """Let a model decode without copying its cache once per query head, as transformers' own `sdpa` does where there is a mask.

    The query heads of a group become the rows of one attention over their key-value head: the same numbers, up to rounding.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    if model.config._attn_implementation != "sdpa":
        return
    AttentionInterface.register(GROUPED, grouped_sdpa)
    AttentionMaskInterface.register(GROUPED, sdpa_mask)
    model.set_attn_implementation(GROUPED)


def grouped_sdpa(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float | None = None, **options: Any):
    """transformers' attention interface: query [rows, heads, tokens, size], key and value [rows, key-value heads, length, size].

    Raises:
        UserError: an attention that `sdpa` cannot compute, of a model that has no other.
    """
    from torch.nn.functional import scaled_dot_product_attention
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if any(options.get(name) is not None for name in EAGER_OPTIONS):
        return _eager(module, query, key, value, attention_mask, scaling, options)
    rows, heads, tokens, size = query.shape
    kv_heads = key.shape[1]
    if tokens > 1 or heads == kv_heads or any(options.get(name) is not None for name in SDPA_OPTIONS):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    grouped = query.view(rows, kv_heads, heads // kv_heads, size)
    mask = None if attention_mask is None else attention_mask.expand(rows, kv_heads, heads // kv_heads, key.shape[2])
    out = scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(rows, 1, heads, value.shape[3]), None


def _eager(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float | None, options: dict[str, Any]):
    """The model's own attention; it adds its mask, where `sdpa` takes one of booleans, or none for causal attention."""
    import torch

    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if own is None:
        used = ", ".join(name for name in EAGER_OPTIONS if options.get(name) is not None)
        raise UserError(f"{type(module).__name__} has an attention ({used}) that cannot be computed here: use --engine vllm")
    tokens, length = query.shape[2], key.shape[2]
    if mask is None and tokens > 1:
        mask = torch.ones(tokens, length, dtype=torch.bool, device=query.device).tril(length - tokens)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, torch.finfo(query.dtype).min)
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    return own(module, query, key, value, mask, scaling=scaling, **options)
