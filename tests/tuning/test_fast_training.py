"""The fast parts of training give what the plain ones give: values and gradients."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from slm_swap.common.errors import UserError
from slm_swap.tuning import fast_training
from slm_swap.tuning.backends import leave_types_to_autocast, linear_names
from slm_swap.tuning.fast_training import CompletionLoss, Head, chunk_loss, compile_layers, give_completion_loss
from slm_swap.tuning.model_checks import check_loss
from slm_swap.tuning.packing import IGNORED, PackCollator, StepPacks, add_targets, packed_rows
from tests.support.tiny_training import VOCABULARY, some_rows, tiny_family, tiny_gemma3_with_vision, tiny_model


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
    loss = CompletionLoss.apply(hidden, None, Head(weight), targets, chunk_loss) * 0.25
    (found,) = torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(found, wanted)


def test_large_logits_give_a_finite_loss():
    hidden, weight = torch.tensor([[100.0, 0.0], [0.0, 100.0]], requires_grad=True), torch.eye(2) * 100
    loss = CompletionLoss.apply(hidden, None, Head(weight), torch.tensor([0, 0]), chunk_loss)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert loss.item() == 10_000 and gradient.tolist() == [[0, 0], [-100, 100]]


def test_a_model_without_labels_works_as_before():
    model, base = tiny_model()
    ids = torch.tensor([[5, 6, 7]])
    wanted = model(input_ids=ids).logits
    give_completion_loss(base)
    torch.testing.assert_close(model(input_ids=ids).logits, wanted)
    assert model.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape == (1, 6)


def with_lora(model, **more):
    """(PEFT model, causal LM inside), with LoRA weights that change something."""
    torch.manual_seed(3)
    lora = LoraConfig(r=4, target_modules=linear_names(model), init_lora_weights=False, task_type="CAUSAL_LM", **more)
    tuned = get_peft_model(model, lora)
    return tuned, tuned.get_base_model()


def compare_losses(tuned, base, rtol: float = 1e-3) -> None:
    """The fast loss and its gradients are those of the cross-entropy of the model's own logits, in a padded batch."""
    rows = some_rows(3)
    batch = DataCollatorForLanguageModeling(0)([dict(row) for row in rows])
    logits = tuned.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    plain = cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")
    wanted = gradients(tuned, plain)
    give_completion_loss(base)
    loss = tuned(**add_targets(batch)).loss
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-5)
    found = gradients(tuned, loss)
    assert sum(gradient.norm() for gradient in wanted.values()) > 0.1
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=rtol, atol=1e-4)


@pytest.mark.parametrize("family", ["granite", "hyperclovax", "cohere2", "gemma2", "falcon_h1", "phi", "gpt_neox", "gpt_neox_japanese", "llama4"])
def test_the_loss_knows_what_a_model_does_to_its_logits(monkeypatch, family):
    monkeypatch.setattr(fast_training, "CHUNK", 7)
    tuned, base = with_lora(tiny_family(family))
    check_loss(base, some_rows()[0]["input_ids"])
    compare_losses(tuned, base)


def test_a_model_that_sees_is_trained_on_its_text_alone():
    tuned, base = with_lora(tiny_gemma3_with_vision())
    assert {name.split(".")[3] for name, weight in tuned.named_parameters() if weight.requires_grad} == {"language_model"}
    compare_losses(tuned, base)
    give_completion_loss(base)
    tuned.train()  # transformers' own loss wants token_type_ids here
    assert tuned(**add_targets(DataCollatorForLanguageModeling(0)([dict(row) for row in some_rows(2)]))).loss.isfinite()


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("llama", True), ("gemma3", True), ("granite", True)])
def test_trained_rows_of_the_head_take_part(monkeypatch, family, tied):
    """An end token that the base never learned: PEFT trains its rows of the embedding and of the head."""
    monkeypatch.setattr(fast_training, "CHUNK", 7)
    ends = [2, 50, 61]
    tuned, base = with_lora(tiny_family(family, tie_word_embeddings=tied), trainable_token_indices=ends if tied else {"embed_tokens": ends, "lm_head": ends})
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "trainable_tokens_delta" in name:
                weight.add_(torch.randn_like(weight))
    check_loss(base, [*some_rows()[0]["input_ids"], *ends])
    compare_losses(tuned, base)
    trained = {name: weight.grad.norm() for name, weight in tuned.named_parameters() if "trainable_tokens_delta" in name}
    assert len(trained) == (1 if tied else 2) and min(trained.values()) > 0


def test_a_head_that_does_more_is_refused():
    model = tiny_family("llama")
    model.config.logits_power = 2.0
    with pytest.raises(UserError, match=r"output head has logits_power, which --backend trl does not know: use --backend unsloth on a GPU"):
        give_completion_loss(model)
    model = tiny_family("llama")
    model.lm_head = torch.nn.Sequential(model.lm_head, torch.nn.Linear(VOCABULARY, VOCABULARY))
    with pytest.raises(UserError, match=r"of a kind \(Sequential\) that --backend trl does not know"):
        give_completion_loss(model)


def test_what_no_configuration_tells_is_found_on_the_loaded_model():
    model = tiny_family("llama")
    row = some_rows()[0]["input_ids"]
    check_loss(model, row)
    model.lm_head.register_forward_hook(lambda module, given, logits: logits * 1.01)
    with pytest.raises(UserError, match=r"the loss of --backend trl is not this model's own .* use --backend unsloth on a GPU, or another model"):
        check_loss(model, row)


def test_a_large_vocabulary_is_no_other_loss():
    """One token far above very many others: torch loses some of their small exponentials in 32 bits."""
    model = tiny_family("phi", vocab_size=262_144, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()[0] = 12.5
    check_loss(model, list(range(5, 40)))


def test_a_bias_that_peft_leaves_out_is_noticed():
    _, base = with_lora(tiny_family("phi", tie_word_embeddings=False), trainable_token_indices={"lm_head": [2, 50]})
    with torch.no_grad():
        base.lm_head.token_adapter.base_layer.bias.normal_()
    with pytest.raises(UserError, match="the loss of --backend trl is not this model's own"):
        check_loss(base, some_rows()[0]["input_ids"])


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


def test_steps_of_all_lengths_share_graphs(monkeypatch):
    """The second length makes the graph of all further ones; 8 graphs of one function are where torch.compile gives up."""
    from functools import partialmethod

    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    model, base = tiny_model()
    give_completion_loss(base)
    compile_layers(base, one_shape=False)
    rows = some_rows(40)
    packs = StepPacks(room=1024, rows=40, longest=20, pad_token=0, multiple=16)
    for count in (3, 8, 15, 22, 30, 40):
        (batch,) = packs(rows[:count])
        loss = model(**batch).loss
        found = gradients(model, loss)
    assert counters["stats"]["unique_graphs"] == 4 and not counters["graph_break"], dict(counters)
    with torch.compiler.set_stance("force_eager"):
        wanted = model(**batch).loss
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-4)
        for name, gradient in gradients(model, wanted).items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("more", [{}, {"scale": 0.5, "cap": 3.0, "bias": torch.randn(VOCABULARY), "places": torch.tensor([4, 50])}])
def test_the_loss_of_a_chunk_is_one_graph(more):
    from torch._dynamo.utils import counters

    torch.manual_seed(4)
    head, rows = Head(torch.randn(VOCABULARY, 16), **more), torch.randn(2, 16) if more else None
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(chunk_loss, dynamic=False, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        given = (torch.randn(12, 16), rows, head, torch.randint(0, VOCABULARY, (12,)), True)
        for found, wanted in zip(compiled(*given), chunk_loss(*given), strict=True):
            torch.testing.assert_close(found, wanted)
    assert counters["stats"]["unique_graphs"] == 1, dict(counters["stats"])


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


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"s_aux": torch.zeros(4)}, "has s_aux,"),
        ({"softcap": 50.0}, "has softcap,"),
        ({"position_bias": torch.zeros(1), "new_option": True}, "has new_option, position_bias,"),
        ({"dropout": 0.1}, "has dropout,"),
        ({"is_causal": False}, "has sight of later tokens,"),
        ({"attention_mask": torch.ones(1)}, "has a mask of its own,"),
        ({"query": torch.zeros(1, 4, 6, 320), "key": torch.zeros(1, 2, 6, 320), "value": torch.zeros(1, 2, 6, 320)}, r"has heads of 320 \(more than 256\),"),
        ({"value": torch.zeros(1, 2, 6, 8)}, "has values of 8 with keys of 16,"),
    ],
)
def test_attention_for_packs_drops_nothing_that_is_asked_of_it(monkeypatch, options, said):
    monkeypatch.setattr(fast_training, "varlen_attn", lambda query, *given, **more: query)
    plain = {"query": torch.zeros(1, 4, 6, 16), "key": torch.zeros(1, 2, 6, 16), "value": torch.zeros(1, 2, 6, 16), "attention_mask": None}
    unset = {"softcap": None, "s_aux": None, "dropout": 0.0, "is_causal": True, "use_cache": False, "position_ids": torch.zeros(1, 6)}
    fast_training.varlen_attention(None, **plain, **unset)
    with pytest.raises(UserError, match=f"the model's attention {said} which packed rows do not get on a GPU: use --no-packing"):
        fast_training.varlen_attention(None, **plain | options)


def test_compiled_layers_drop_what_others_drop():
    """Compiled code would draw other random numbers than torch's own kernels, at three times their cost."""
    torch._dynamo.reset()
    (pack,) = packed_rows(some_rows(), 128, seed=0)
    collate, found = PackCollator.for_packs([pack], 128, pad_token=0), []
    for compiled in (False, True):
        model, base = tiny_model(dropout=0.3)
        model.train()
        give_completion_loss(base)
        if compiled:
            compile_layers(base)
        torch.manual_seed(3)
        loss = model(**collate([pack])).loss
        found.append((loss.detach(), gradients(model, loss)))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-5)
    for name, gradient in found[1][1].items():
        torch.testing.assert_close(gradient, found[0][1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("autocast", [True, False])
def test_lora_takes_its_input_as_autocast_does(autocast):
    """Dropout then works on 16 bits, and not on the 32 bits of LoRA's weights, with the same outcome."""
    given, found = [], []
    for change in (lambda _: None, leave_types_to_autocast):
        model, base = tiny_model(dropout=0.3)
        base.bfloat16()
        for name, weight in model.named_parameters():
            weight.data = weight.data.float() if "lora_" in name else weight.data
        change(model)
        part = base.model.layers[0].mlp.down_proj
        assert part.weight.dtype == torch.bfloat16 and part.lora_A["default"].weight.dtype == torch.float32
        hook = part.lora_dropout["default"].register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].dtype))
        part.lora_dropout["default"].eval()
        x = torch.randn(3, 96, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = part(x)
        found.append((output.detach(), *torch.autograd.grad(output.float().square().sum(), [x, part.lora_A["default"].weight, part.lora_B["default"].weight])))
        hook.remove()
    assert given == [torch.float32, torch.bfloat16 if autocast else torch.float32]
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    assert all(part.norm() > 0 for part in found[0])
