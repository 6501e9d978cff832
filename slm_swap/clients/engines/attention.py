"""Attention of one new token over a cache, for models whose query heads share key-value heads."""

from typing import Any

GROUPED = "slm_swap_grouped_sdpa"


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
    """transformers' attention interface: query [rows, heads, tokens, size], key and value [rows, key-value heads, length, size]."""
    from torch.nn.functional import scaled_dot_product_attention
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    rows, heads, tokens, size = query.shape
    kv_heads = key.shape[1]
    if tokens > 1 or heads == kv_heads:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    grouped = query.view(rows, kv_heads, heads // kv_heads, size)
    mask = None if attention_mask is None else attention_mask.expand(rows, kv_heads, heads // kv_heads, key.shape[2])
    out = scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(rows, 1, heads, size), None
