"""What makes training fast: attention that restarts at each packed row, a loss without logits in memory, compiled layers.

Imports torch and TRL: import it inside functions, and after Unsloth where that is used.
"""

import inspect
from collections.abc import Callable
from functools import cache
from itertools import islice
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.modeling_outputs import CausalLMOutput
from trl import SFTTrainer

from slm_swap.common.errors import UserError
from slm_swap.tuning.backends import decoder_of
from slm_swap.tuning.checks import OTHER_HEAD, UNPACKED, head_options
from slm_swap.tuning.packing import IGNORED, StepPacks, StepRows
from slm_swap.tuning.step_graphs import Gradients, Pack, StepGraphs
from slm_swap.tuning.validation import ExactEvaluation

VARLEN = "slm_swap_varlen"  # the name under which transformers knows varlen_attention
CHUNK = 512  # targets whose logits are in memory at once: 0.4 GiB in fp32 with 200,064 tokens in the vocabulary
GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}  # without the flag it just works
LARGEST_HEAD = 256  # FlashAttention's limit
HARMLESS = {"cu_seq_lens_k", "max_length_k", "position_ids", "use_cache", "output_attentions", "output_hidden_states", "return_dict"}


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int = 0,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row of a pack, by torch's FlashAttention kernels (CUDA, half precision).

    query (1, heads, tokens, size); key and value may have fewer heads. Gives (1, tokens, heads, size). No mask exists: transformers
    builds none for an attention that has no mask function registered.

    Raises:
        UserError: the model asks for something that these kernels do not do. It would be left out without a word.
    """
    asked = sorted(name for name, wanted in options.items() if name not in HARMLESS and is_set(wanted))
    if attention_mask is not None:
        asked.append("a mask of its own")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        asked.append("sight of later tokens")
    if query.shape[-1] > LARGEST_HEAD:
        asked.append(f"heads of {query.shape[-1]} (more than {LARGEST_HEAD})")
    if value.shape[-1] != key.shape[-1]:
        asked.append(f"values of {value.shape[-1]} with keys of {key.shape[-1]}")
    if asked:
        raise UserError(f"the model's attention has {', '.join(asked)}, which packed rows do not get on a GPU: {UNPACKED}")
    query, key, value = (part[0].transpose(0, 1).contiguous() for part in (query, key, value))
    local = sliding_window is not None and sliding_window < max_length_q
    window = (sliding_window - 1, 0) if local else (-1, 0)
    lengths = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    return varlen_attn(query, key, value, *lengths, scale=scaling, window_size=window, **GQA)[None], None


def is_set(option: Any) -> bool:
    """Whether an option of an attention changes something: anything but None, False and 0, tensors included."""
    return option is not None and (torch.is_tensor(option) or bool(option))


AttentionInterface.register(VARLEN, varlen_attention)


class Head(NamedTuple):
    """What a model makes its logits of: cap * tanh(scale * (hidden @ weight.T + bias) / cap), all of it frozen.

    `places` (trained,) are the rows of `weight` in whose place others are trained.
    """

    weight: torch.Tensor  # (vocabulary, size)
    bias: torch.Tensor | None = None  # (vocabulary,)
    scale: float = 1.0
    cap: float | None = None
    places: torch.Tensor | None = None


def chunk_loss(
    hidden: torch.Tensor, rows: torch.Tensor | None, head: Head, targets: torch.Tensor, with_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Sum of the cross-entropy of `targets` (tokens,) after `hidden` (tokens, size), and its gradients for `hidden` and for the
    trained `rows` (trained, size) of the head.
    """
    logits = hidden @ head.weight.t()
    if rows is not None:
        logits = logits.index_copy(1, head.places, hidden @ rows.t())
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits.float()
    if head.scale != 1:
        logits = logits * head.scale
    if head.cap:
        logits = torch.tanh(logits / head.cap) * head.cap
    carries = targets != IGNORED
    token = targets.clamp(min=0)[:, None]
    normalizer = logits.logsumexp(-1, keepdim=True)
    loss = ((normalizer - logits.gather(1, token)).squeeze(1) * carries).sum()
    if not with_gradient:
        return loss, None, None
    hit = torch.arange(logits.shape[1], device=logits.device) == token
    gradient = ((logits - normalizer).exp() - hit.float()) * carries[:, None]
    if head.cap:
        gradient = gradient * (1 - (logits / head.cap) ** 2)
    if head.scale != 1:
        gradient = gradient * head.scale
    gradient = gradient.to(head.weight.dtype)
    if rows is None:
        return loss, (gradient @ head.weight).to(hidden.dtype), None
    trained = gradient.index_select(1, head.places)
    through = gradient.index_fill(1, head.places, 0) @ head.weight + trained @ rows
    return loss, through.to(hidden.dtype), (trained.t() @ hidden).float()


@cache
def compiled_chunk_loss() -> Any:
    return torch.compile(chunk_loss, dynamic=False)


class CompletionLoss(torch.autograd.Function):
    """Sum of the cross-entropy through an output head, CHUNK targets at a time; `rows` of it may be trained, the rest is frozen.

    The gradients are made together with the loss, while a chunk's logits are there; backward only scales them.
    """

    @staticmethod
    def forward(ctx, hidden, rows, head, targets, function):
        total, gradients, of_rows = hidden.new_zeros((), dtype=torch.float32), [], None
        wanted = any(ctx.needs_input_grad[:2])
        if wanted and rows is not None:
            of_rows = torch.zeros_like(rows, dtype=torch.float32)
        for part, following in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
            loss, gradient, of_part = function(part, rows, head, following, wanted)
            total += loss
            gradients.append(gradient)
            if of_rows is not None:
                of_rows += of_part
        if wanted:
            ctx.save_for_backward(torch.cat(gradients), of_rows)
        return total

    @staticmethod
    def backward(ctx, scale):
        gradient, of_rows = ctx.saved_tensors
        rows = None if of_rows is None else of_rows * scale
        return (gradient * scale).to(gradient.dtype), rows, None, None, None


class OutputHead:
    """A model's output head as this loss uses it: frozen, except for rows that PEFT's TrainableTokens trains.

    Raises:
        UserError: it is no linear layer, or the configuration has something about logits that this loss does not know.
    """

    def __init__(self, model: Any, compiled: bool = False):
        module = model.get_output_embeddings()
        self.adapter = getattr(module, "token_adapter", None)  # of PEFT's TrainableTokensWrapper
        module = self.adapter.base_layer if self.adapter else module
        if not isinstance(module, torch.nn.Linear) or not module.weight.is_floating_point():
            raise UserError(f"the model's output head is of a kind ({type(module).__name__}) that --backend trl does not know: {OTHER_HEAD}")
        places = None
        if self.adapter:
            indices = [place for name in self.adapter.active_adapters for place in self.adapter.token_indices[name]]
            places = torch.tensor(indices, device=module.weight.device)
        self.module, self.places, self.options = module, places, head_options(model.config)
        self.function = compiled_chunk_loss() if compiled else chunk_loss

    def loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Sum of the cross-entropy of `targets` (tokens,), IGNORED ones left out, after `hidden` (tokens, size)."""
        head, rows = Head(self.module.weight, self.module.bias, *self.options, self.places), None
        if self.adapter:
            deltas = self.adapter.trainable_tokens_delta
            rows = torch.cat([deltas[name] for name in self.adapter.active_adapters]).to(head.weight.dtype)
        return CompletionLoss.apply(hidden, rows, head, targets, self.function)


def last_hidden(model: Any, input_ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """What a causal language model's head is given, (rows, tokens, size): of the text decoder alone, images or none."""
    return decoder_of(model)(input_ids=input_ids, **inputs | {"use_cache": False}).last_hidden_state


def give_completion_loss(model: Any, compiled: bool = False) -> None:
    """Make a causal language model with a frozen head give the *sum* of its targets' cross-entropy as `loss`, and no logits.

    Its batches come with `labels`, `targets` and `target_index` (see packing.add_targets); without labels it works as before.

    Raises:
        UserError: the model does something to its logits that this loss does not know.
    """
    head, plain = OutputHead(model, compiled), model.forward

    def forward(self, input_ids=None, labels=None, targets=None, target_index=None, **inputs):
        inputs = {name: value for name, value in inputs.items() if value is not None}
        if labels is None:
            return plain(input_ids=input_ids, **inputs)
        hidden = last_hidden(self, input_ids, **inputs)
        return CausalLMOutput(loss=head.loss(hidden.flatten(0, 1).index_select(0, target_index), targets))

    model.forward = MethodType(forward, model)


def compile_layers(model: Any, one_shape: bool = True) -> None:
    """Compile the decoder's layers, one graph for all of them: all of the model at once would take many times as long.

    For batches of `one_shape`, or with a further graph for all other shapes from the second one on.

    Raises:
        UserError: the decoder has no list of layers.
    """
    stacks = [part for part in decoder_of(model).children() if isinstance(part, torch.nn.ModuleList)]
    if not stacks:
        raise UserError(f"the layers of {type(model).__name__} are in no list and cannot be compiled one by one: use --compile no")
    for layer in max(stacks, key=len):
        layer.compile(dynamic=False if one_shape else None, options={"fallback_random": True})


def moved(pack: Pack, device: torch.device) -> Pack:
    """A pack on a device, whose work it does not wait for."""
    fast = {name: part.pin_memory() if device.type == "cuda" and torch.is_tensor(part) and not part.is_cuda else part for name, part in pack.items()}
    return {name: part.to(device, non_blocking=True) if torch.is_tensor(part) else part for name, part in fast.items()}


class CompletionTrainer(ExactEvaluation, SFTTrainer):
    """TRL's trainer for models of `give_completion_loss`: the mean over all targets of a step, and no waiting for the GPU between."""

    own_attention: str  # the name of the attention that the model came with
    step_packs: StepPacks | None = None  # where given, batches are StepRows
    say: Callable[[str], object] = staticmethod(lambda _: None)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # the loss is divided by the targets of the whole step, in compute_loss
        self._passes: tuple[Gradients, StepGraphs] | None = None

    def train(self, *args, **kwargs):
        """On a stream of its own where steps may be captured: all that a graph takes part in has to be on one that is not the default one."""
        if self.step_packs is None or self.args.device.type != "cuda":
            return super().train(*args, **kwargs)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what lies in the default stream's cache is of no use to another one
        with torch.cuda.stream(torch.cuda.Stream()):
            found = super().train(*args, **kwargs)
        torch.cuda.synchronize()
        self._passes = None
        return found

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """A step's micro-batches; with `step_packs` all of their rows, as packs, are in the last one.

        There stay as many micro-batches as without: transformers counts them, and finds its place among them when it resumes.
        """
        if self.step_packs is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = list(islice(epoch_iterator, num_batches))
        if not batches:
            return [], None
        packs = [moved(pack, device) for pack in self.step_packs([row for batch in batches for row in batch.rows])]
        return [*([] for _ in batches[1:]), packs], self._get_num_items_in_batch(packs, device)

    def _get_num_items_in_batch(self, batch_samples, device):
        """The step's targets over all ranks. transformers' own count comes out of ordinary memory, for which the host waits until the GPU has done all before."""
        if not batch_samples:
            return None
        count = moved({"count": sum((batch["targets"] != IGNORED).sum() for batch in batch_samples)}, device)["count"]
        return self.accelerator.gather(count).sum() if self.args.world_size > 1 else count

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Of a micro-batch, or of all of a step's packs. Their gradients are averaged over ranks here: DDP would, pack by pack, and knows no graphs."""
        if self.step_packs is None:
            return super().training_step(model, inputs, num_items_in_batch)
        loss = torch.zeros((), device=self.args.device)
        if not inputs:
            return loss
        model.train()
        gradients, run = self._passes = self._passes or self._make_passes(model)
        gradients.begin()
        for pack in inputs:
            loss += run(pack, torch.as_tensor(num_items_in_batch, device=loss.device))
        if self.args.world_size > 1:
            gradients.average(self.args.world_size)
        return loss

    def _make_passes(self, model) -> tuple[Gradients, StepGraphs]:
        inner = model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model

        def forward(pack: Pack, count: torch.Tensor) -> torch.Tensor:
            with self.compute_loss_context_manager():
                return self.compute_loss(inner, pack, num_items_in_batch=count)

        # Checkpointing asks for the random numbers' state, which it cannot while it is captured.
        on = self.args.device.type == "cuda" and not self.args.gradient_checkpointing
        return Gradients(inner.parameters()), StepGraphs(forward, self.accelerator.backward, self.step_packs.room, on, self.say)

    def _prepare_inputs(self, inputs):
        return inputs if isinstance(inputs, StepRows) else super()._prepare_inputs(inputs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The micro-batch's share of the step's mean; ranks are averaged later, so each counts for all of them."""
        outputs = model(**inputs)
        loss = outputs["loss"] / num_items_in_batch * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def targets_loss(self, batch):
        if isinstance(batch, StepRows):
            found = [self.targets_loss(self._prepare_inputs(pack)) for pack in self.step_packs(batch.rows)]
            return tuple(sum(parts) for parts in zip(*found, strict=True))
        with torch.compiler.set_stance("force_eager"):  # nothing is compiled for it
            return self.model(**batch)["loss"], (batch["targets"] != IGNORED).sum()

    def floating_point_ops(self, inputs):
        return 0  # counted nowhere, and counting takes a walk through all parameters
