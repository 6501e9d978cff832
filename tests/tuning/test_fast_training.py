"""The fast parts of training give what the plain ones give: values and gradients."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from slm_swap.common.errors import UserError
from slm_swap.tuning import fast_training
from slm_swap.tuning.fast_training import CompletionLoss, chunk_loss, compile_layers, give_completion_loss
from slm_swap.tuning.packing import IGNORED, PackCollator, packed_rows
from tests.support.tiny_training import VOCABULARY, some_rows, tiny_model


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}


def as_tensors(row: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([values]) for name, values in row.items()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_row_in_a_pack_has_the_loss_and_gradients_that_it_has_alone(checkpointing):
    model, base = tiny_model()
    rows = some_rows()
    alone = []
    for row in rows:
        loss = model(**as_tensors(row)).loss * sum(label != IGNORED for label in row["labels"])  # transformers' own
        alone.append((loss.detach(), gradients(model, loss)))
    give_completion_loss(base)
    if checkpointing:
        model.train()
        base.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    (pack,) = packed_rows(rows, 128, seed=0)
    starts = [sum(pack["seq_lengths"][:number]) for number in range(len(rows) + 1)]
    collate = PackCollator.for_packs([pack], 128, pad_token=0)
    for number, row in enumerate(rows):
        place = next(n for n in range(len(rows)) if pack["input_ids"][starts[n] : starts[n + 1]] == row["input_ids"])
        inside = range(starts[place], starts[place + 1])
        only = [label if index in inside else IGNORED for index, label in enumerate(pack["labels"])]
        loss = model(**collate([pack | {"labels": only}])).loss
        torch.testing.assert_close(loss, alone[number][0], rtol=1e-5, atol=1e-5)
        for name, gradient in gradients(model, loss).items():
            torch.testing.assert_close(gradient, alone[number][1][name], rtol=1e-3, atol=1e-4)
    whole = model(**collate([pack])).loss
    torch.testing.assert_close(whole, sum(loss for loss, _ in alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 5, 12, 100])
def test_the_chunked_loss_is_the_cross_entropy(monkeypatch, chunk):
    monkeypatch.setattr(fast_training, "CHUNK", chunk)
    torch.manual_seed(2)
    hidden, weight = torch.randn(12, 16, requires_grad=True), torch.randn(VOCABULARY, 16)
    targets = torch.randint(0, VOCABULARY, (12,))
    targets[[3, 11]] = IGNORED
    plain = cross_entropy(hidden @ weight.t(), targets, ignore_index=IGNORED, reduction="sum") * 0.25
    (wanted,) = torch.autograd.grad(plain, hidden)
    loss = CompletionLoss.apply(hidden, weight, targets, chunk_loss) * 0.25
    (found,) = torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(found, wanted)


def test_large_logits_give_a_finite_loss():
    hidden, weight = torch.tensor([[100.0, 0.0], [0.0, 100.0]], requires_grad=True), torch.eye(2) * 100
    loss = CompletionLoss.apply(hidden, weight, torch.tensor([0, 0]), chunk_loss)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert loss.item() == 10_000 and gradient.tolist() == [[0, 0], [-100, 100]]


def test_a_model_without_labels_works_as_before():
    model, base = tiny_model()
    ids = torch.tensor([[5, 6, 7]])
    wanted = model(input_ids=ids).logits
    give_completion_loss(base)
    torch.testing.assert_close(model(input_ids=ids).logits, wanted)
    assert model.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape == (1, 6)


def test_a_head_that_does_more_is_refused():
    _, base = tiny_model()
    base.config.final_logit_softcapping = 30.0
    with pytest.raises(UserError, match="final_logit_softcapping"):
        give_completion_loss(base)


def test_compiled_layers_share_graphs_and_give_the_same_gradients(monkeypatch):
    from functools import partialmethod

    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    (pack,) = packed_rows(some_rows(), 128, seed=0)
    collate = PackCollator.for_packs([pack], 128, pad_token=0)
    found = []
    for compiled in (False, True):
        model, base = tiny_model()
        give_completion_loss(base)
        if compiled:
            compile_layers(base)
        loss = model(**collate([pack])).loss
        found.append((loss.detach(), gradients(model, loss)))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-5)
    for name, gradient in found[1][1].items():
        torch.testing.assert_close(gradient, found[0][1][name], rtol=1e-3, atol=1e-4)
    # One for the first layer, whose input needs no gradient, and one for all others.
    assert counters["stats"]["unique_graphs"] == 2, dict(counters["stats"])
    assert not counters["graph_break"], dict(counters["graph_break"])


def test_attention_for_packs_gets_no_mask():
    from transformers.masking_utils import create_causal_mask

    _, base = tiny_model()
    embedded = torch.zeros(1, 4, 64)
    positions = torch.tensor([[0, 1, 0, 1]])
    arguments = {"inputs_embeds": embedded, "attention_mask": None, "past_key_values": None, "position_ids": positions}
    assert create_causal_mask(config=base.config, **arguments) is not None
    base.set_attn_implementation(fast_training.VARLEN)
    assert create_causal_mask(config=base.config, **arguments) is None


def test_attention_for_packs_gets_rows_and_window(monkeypatch):
    """Shapes and arguments; what the kernel makes of them is tested where there is a GPU."""
    asked = {}

    def kernel(query, key, value, *lengths, **options):
        asked.update(options, shapes=[tuple(part.shape) for part in (query, key, value)], lengths=lengths)
        return query

    monkeypatch.setattr(fast_training, "varlen_attn", kernel)
    starts = torch.tensor([0, 3, 6], dtype=torch.int32)
    query, key = torch.randn(1, 4, 6, 16), torch.randn(1, 2, 6, 16)
    out, weights = fast_training.varlen_attention(
        None, query, key, key, None, scaling=0.5, sliding_window=64, cu_seq_lens_q=starts, max_length_q=3, dropout=0.0
    )
    assert out.shape == (1, 6, 4, 16) and weights is None
    torch.testing.assert_close(out, query.transpose(1, 2))
    assert asked["shapes"] == [(6, 4, 16), (6, 2, 16), (6, 2, 16)] and asked["lengths"][2:] == (3, 3)
    assert asked["scale"] == 0.5 and asked["window_size"] == (-1, 0)
    fast_training.varlen_attention(None, query, key, key, None, sliding_window=2, cu_seq_lens_q=starts, max_length_q=3)
    assert asked["window_size"] == (1, 0)
