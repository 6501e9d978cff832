"""What is looked at on the loaded model before training: that the fast loss and the packed attention are the model's own.

Imports torch and transformers: import it inside functions, and after Unsloth where that is used.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from slm_swap.clients.architecture import text_config
from slm_swap.common.errors import UserError
from slm_swap.tuning.backends import attending_by
from slm_swap.tuning.checks import OTHER_HEAD, UNPACKED
from slm_swap.tuning.fast_training import OutputHead, last_hidden
from slm_swap.tuning.packing import PackCollator

SHORT = 64  # tokens of which all logits are made
# How far two right losses may lie apart, in nats a token or as a share of the loss, whichever is more.
LOSS_APART = {torch.float32: 1e-5, "half": 2e-2}
# How far a token's last hidden state may be moved, as a share of its size, without a look at gradients. Measured with random weights: dense
# models and experts by grouped products not at all, experts in fp32 on a CPU by 3e-7. Where each expert makes a product of its own, its size hangs
# on all tokens, and the kernel and its rounding on the size: on an H200 in bf16, 8 layers of Mixtral's size moved by 0.04 (median) to 0.9, since rounding
# also sends tokens to other experts. What convolutions and recurrent states carry over moves some token by 1e-2 (Falcon-H1) to 1.5 (Qwen3.5).
STATES_APART = {torch.float32: 1e-4, "half": 5e-3}

# A row's gradient for others' tokens, as a share of that for its own: 0 where rows are apart, whatever rounds how (Mixtral above, too); 0.08 (Falcon-H1)
# or more where they are not.
SAME_GRADIENT = 1e-6


def check_loss(model: Any, row: Sequence[int]) -> None:
    """Refuse a model whose logits OutputHead does not know: its loss on a row's tokens is not the cross-entropy of the model's own logits.

    `model` is a causal language model with its own `forward`.

    Raises:
        UserError: so.
    """
    ids = torch.tensor([list(row)[:SHORT]], device=model.device)
    with _quietly(model):
        # in 64 bits: over 262,144 tokens, torch's sum in 32 is off by more than what is looked for (Gemma 3 270M on a CPU: 6e-5 nats)
        wanted = cross_entropy(model(input_ids=ids, use_cache=False).logits[0, :-1].double(), ids[0, 1:]).item()
        head = OutputHead(model)
        found = _row_loss(head, last_hidden(model, ids)[0], ids[0])
    if not _same_loss(found, wanted, head):
        raise UserError(
            f"the loss of --backend trl is not this model's own ({found:.4f} for {wanted:.4f} nats a token): it does something to its logits "
            f"that we do not know: {OTHER_HEAD}"
        )


def check_packing(model: Any, rows: Sequence[Sequence[int]], room: int, own_attention: str) -> None:
    """Refuse to pack rows (of token ids) for a model that does not keep them apart or that attends otherwise in a pack.

    `model` is a causal language model with the attention of packed rows; `room` is how many tokens a pack holds, `own_attention` the
    name of the attention that the model came with.

    Raises:
        UserError: so.
    """
    spans, vocabulary = attention_spans(model.config), text_config(model.config).vocab_size
    first, last = rows_to_check(rows, spans.values())
    before = rows_before(first, last, [span for name, span in spans.items() if "chunk" in name and span < room])
    start, head = sum(map(len, before)), OutputHead(model)
    others = [[(token + 1) % vocabulary for token in row] for row in before]
    with _quietly(model):
        states, moved = (_packed_states(model, [*rows, last]) for rows in (before, others))
        apart = ((states - moved)[start:].norm(dim=-1) / states[start:].norm(dim=-1)).max().item()
        rounded = apart <= _tolerance(STATES_APART, head) or _gradient_before(model, [*before, last]) <= SAME_GRADIENT  # NaN is neither
        if not rounded:
            raise UserError(f"packed rows see each other in this model (they move one's hidden states by {apart:.1%}): {UNPACKED}")
        with attending_by(model, own_attention):
            for row, inside in ((before[0], states[: len(before[0])]), (last, states[start:])):
                ids = torch.tensor([list(row)], device=model.device)
                alone, packed = (_row_loss(head, part, ids[0]) for part in (last_hidden(model, ids)[0], inside))
                if not _same_loss(packed, alone, head):
                    raise UserError(
                        f"the attention of packed rows is not this model's own (a row of {len(row)} tokens has a loss of {packed:.4f} in a pack "
                        f"and {alone:.4f} alone): {UNPACKED}"
                    )


def rows_to_check(rows: Sequence[Sequence[int]], spans: Iterable[int]) -> tuple[Sequence[int], Sequence[int]]:
    """The shortest row, and the next that is longer than the longest of the model's `spans` that any row is longer than."""
    ordered = sorted((row for row in rows if len(row) > 1), key=len)
    reached = max((span for span in spans if span < len(ordered[-1])), default=0)
    others = [row for row in ordered[1:] if len(row) > reached]
    return ordered[0], (others or ordered)[0]


def rows_before(first: Sequence[int], last: Sequence[int], chunks: Iterable[int]) -> list[Sequence[int]]:
    """The rows of a pack before `last`: `first`, again and again where its border is to come where one of the `chunks` ends.

    What is cut into chunks may be cut by the place in the pack, not by that in the row.
    """
    border = max(chunks, default=0) - len(last) // 2
    if border <= len(first):
        return [first]
    return [first] * (border // len(first)) + [first[: border % len(first)]] * (border % len(first) > 0)


def attention_spans(config: Any) -> dict[str, int]:
    """The numbers of tokens at which attention changes, by their names in a configuration: windows, chunks, first lengths of rotary
    embeddings.
    """
    settings = text_config(config).to_dict()
    found = {**settings, **(settings.get("rope_parameters") or {})}
    names = re.compile("window|chunk|original_max_position")
    return {name: value for name, value in found.items() if names.search(name) and type(value) is int and value > 1}


@contextmanager
def _quietly(model: Any) -> Iterator[None]:
    """Within it a model has no dropout and no gradients, nothing is compiled, and products are exact or made for each token alone.

    Tensor cores round fp32 to ten bits, otherwise for other shapes (TF32). bitsandbytes makes them in 16 bits for the columns in which any token of the batch has an outlier: each token's rounding hangs on all.
    """
    training, matmul = model.training, torch.get_float32_matmul_precision()
    model.eval()
    torch.set_float32_matmul_precision("highest")
    states = [module.state for module in model.modules() if hasattr(getattr(module, "state", None), "threshold")]
    thresholds = [state.threshold for state in states]
    for state in states:
        state.threshold = 0.0
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for state, threshold in zip(states, thresholds, strict=True):
            state.threshold = threshold
        torch.set_float32_matmul_precision(matmul)
        model.train(training)


def _gradient_before(model: Any, rows: Sequence[Sequence[int]]) -> float:
    """How far the last row of a pack depends on those before it: the largest gradient of its hidden states for one of their tokens'
    embeddings, as a share of the largest for one of its own.

    Raises:
        UserError: the model does not take what packed rows come with.
    """
    embedded: list[torch.Tensor] = []

    def keep(_module: Any, _given: Any, found: torch.Tensor) -> None:
        embedded.append(found if found.requires_grad else found.requires_grad_())

    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad():
            states = _packed_states(model, rows)[-len(rows[-1]) :]
            direction = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).to(states)  # a plain sum is what norms take out
            (gradient,) = torch.autograd.grad(states, embedded[0], direction)
    finally:
        hook.remove()
    sizes = gradient[0].float().norm(dim=-1)
    return (sizes[: -len(rows[-1])].max() / sizes[-len(rows[-1]) :].max()).item()


def _packed_states(model: Any, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """The last hidden states (tokens, size) of a pack of rows.

    Raises:
        UserError: the model does not take what packed rows come with.
    """
    ids, lengths = [token for row in rows for token in row], [len(row) for row in rows]
    pack = {"input_ids": ids, "labels": ids, "seq_lengths": lengths}
    batch = PackCollator.for_packs([pack], len(ids), pad_token=0)([pack])
    for unused in ("labels", "targets", "target_index"):
        del batch[unused]
    inputs = {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in batch.items()}
    try:
        return last_hidden(model, **inputs)[0]
    except TypeError as error:
        raise UserError(f"{type(model).__name__} takes no packed rows ({error}): {UNPACKED}") from None


def _row_loss(head: OutputHead, states: torch.Tensor, ids: torch.Tensor) -> float:
    """The mean loss of all of a row's tokens (tokens,) but the first, by its last hidden states (tokens, size)."""
    return head.loss(states[:-1], ids[1:]).item() / (len(ids) - 1)


def _same_loss(found: float, wanted: float, head: OutputHead) -> bool:
    return abs(found - wanted) <= _tolerance(LOSS_APART, head) * max(1.0, abs(wanted))


def _tolerance(limits: dict[Any, float], head: OutputHead) -> float:
    return limits.get(head.module.weight.dtype, limits["half"])
