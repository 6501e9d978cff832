"""What makes training fast: attention that restarts at each packed row, a loss without logits in memory, compiled layers.

Imports torch and TRL: import it inside functions, and after Unsloth where that is used.
"""

import inspect
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.modeling_outputs import CausalLMOutput
from trl import SFTTrainer

from slm_swap.common.errors import UserError
from slm_swap.tuning.packing import IGNORED
from slm_swap.tuning.validation import ExactEvaluation

VARLEN = "slm_swap_varlen"  # the name under which transformers knows varlen_attention
CHUNK = 1024  # targets whose logits are in memory at once: 0.8 GiB in fp32 with 200,064 tokens in the vocabulary
GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}  # without the flag it just works


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int = 0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row of a pack, by torch's FlashAttention kernels (CUDA, half precision).

    query (1, heads, tokens, size); key and value may have fewer heads. Gives (1, tokens, heads, size). No mask exists: transformers
    builds none for an attention that has no mask function registered.
    """
    query, key, value = (part[0].transpose(0, 1).contiguous() for part in (query, key, value))
    local = sliding_window is not None and sliding_window < max_length_q
    window = (sliding_window - 1, 0) if local else (-1, 0)
    lengths = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    return varlen_attn(query, key, value, *lengths, scale=scaling, window_size=window, **GQA)[None], None


AttentionInterface.register(VARLEN, varlen_attention)


def chunk_loss(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, with_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sum of the cross-entropy of `targets` (tokens,) after `hidden` (tokens, size), and its gradient for `hidden`."""
    logits = (hidden @ weight.t()).float()
    carries = targets != IGNORED
    token = targets.clamp(min=0)[:, None]
    normalizer = logits.logsumexp(-1, keepdim=True)
    loss = ((normalizer - logits.gather(1, token)).squeeze(1) * carries).sum()
    if not with_gradient:
        return loss, None
    hit = torch.arange(logits.shape[1], device=logits.device) == token
    gradient = ((logits - normalizer).exp() - hit.float()) * carries[:, None]
    return loss, (gradient.to(weight.dtype) @ weight).to(hidden.dtype)


@cache
def compiled_chunk_loss() -> Any:
    return torch.compile(chunk_loss, dynamic=False)


class CompletionLoss(torch.autograd.Function):
    """Sum of the cross-entropy through a frozen output head, CHUNK targets at a time.

    The gradient is made together with the loss, while a chunk's logits are there; backward only scales it.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, function):
        total, gradients = hidden.new_zeros((), dtype=torch.float32), []
        for part, wanted in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
            loss, gradient = function(part, weight, wanted, ctx.needs_input_grad[0])
            total += loss
            gradients.append(gradient)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(torch.cat(gradients))
        return total

    @staticmethod
    def backward(ctx, scale):
        (gradient,) = ctx.saved_tensors
        return (gradient * scale).to(gradient.dtype), None, None, None


def give_completion_loss(model: Any, compiled: bool = False) -> None:
    """Make a causal language model with a frozen head give the *sum* of its targets' cross-entropy as `loss`, and no logits.

    Its batches come with `labels`, `targets` and `target_index` (see packing.add_targets); without labels it works as before.

    Raises:
        UserError: the model does something to its logits that this loss does not know.
    """
    settings, head, plain = model.config.get_text_config(), model.get_output_embeddings(), model.forward
    changed = [name for name in ("final_logit_softcapping", "logit_scale", "logits_scaling") if getattr(settings, name, None)]
    if changed or head.bias is not None:
        raise UserError(f"the model's output head has {', '.join(changed) or 'a bias'}, which --backend trl does not know: use another model")
    function = compiled_chunk_loss() if compiled else chunk_loss

    def forward(self, input_ids=None, labels=None, targets=None, target_index=None, **inputs):
        inputs = {name: value for name, value in inputs.items() if value is not None}
        if labels is None:
            return plain(input_ids=input_ids, **inputs)
        hidden = self.base_model(input_ids=input_ids, **inputs | {"use_cache": False}).last_hidden_state
        picked = hidden.flatten(0, 1).index_select(0, target_index)
        return CausalLMOutput(loss=CompletionLoss.apply(picked, head.weight, targets, function))

    model.forward = MethodType(forward, model)


def compile_layers(model: Any) -> None:
    """Compile the decoder's layers, one graph for all of them: all of the model at once would take many times as long."""
    for layer in model.get_decoder().layers:
        layer.compile(dynamic=False)


class CompletionTrainer(ExactEvaluation, SFTTrainer):
    """TRL's trainer for models of `give_completion_loss`: the mean over all targets of a step, and no waiting for the GPU between."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # the loss is divided by the targets of the whole step, in compute_loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The micro-batch's share of the step's mean; ranks are averaged later, so each counts for all of them."""
        outputs = model(**inputs)
        loss = outputs["loss"] / num_items_in_batch * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def targets_loss(self, batch):
        with torch.compiler.set_stance("force_eager"):  # nothing is compiled for it
            return self.model(**batch)["loss"], (batch["targets"] != IGNORED).sum()

    def floating_point_ops(self, inputs):
        return 0  # counted nowhere, and counting takes a walk through all parameters
