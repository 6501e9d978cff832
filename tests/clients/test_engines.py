"""The engines of the local model, as far as a machine without a GPU goes: on the embedded tiny model, in fp32."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_swap.clients import engines
from slm_swap.clients.engines import Generated, Prompt, Workload, choose_engine, vllm_engine
from slm_swap.clients.engines import captured as captured_module
from slm_swap.clients.engines import transformers_engine as module
from slm_swap.clients.engines.attention import GROUPED, grouped_sdpa
from slm_swap.clients.engines.captured import CapturedDecoder, take
from slm_swap.clients.engines.vllm_engine import end_tokens, lora_rank, start_for
from slm_swap.clients.loading import encode_prompt
from slm_swap.common.errors import UserError
from slm_swap.common.settings import PACKAGE, ROOT, Settings
from slm_swap.rows.prompts import Request
from slm_swap.slm_client import SLMClient, measure_workload
from tests.support.tool_requests import BATCH, ask
from tests.support.uncaptured import uncaptured

SETTINGS = Settings(slm_model_path="models/phi-tiny")


@pytest.fixture(scope="module")
def client() -> SLMClient:
    return SLMClient(SETTINGS, precision="fp32", max_new_tokens=24)


@pytest.fixture(scope="module")
def prompts(client) -> list[Prompt]:
    """Of different lengths and limits."""
    asked = [encode_prompt(client.tokenizer, messages) for messages in [*BATCH, ask("Check weather " + "for Rome " * 30), Request(BATCH[0].messages[1:])]]
    return [Prompt(index, tokens, 3 + 5 * index % 22) for index, tokens in enumerate(asked)]


@pytest.fixture(scope="module")
def expected(client, prompts) -> dict[int, list[int]]:
    """What transformers' own `generate` makes of each prompt alone, with its own attention."""
    model, found = client.engine.model, {}
    model.set_attn_implementation("sdpa")
    for prompt in prompts:
        ids = torch.tensor([prompt.tokens])
        made = model.generate(input_ids=ids, max_new_tokens=prompt.limit, do_sample=False, pad_token_id=client.tokenizer.pad_token_id)
        found[prompt.index] = [token for token in made[0, len(prompt.tokens) :].tolist() if token not in client.engine.ends]
    model.set_attn_implementation(GROUPED)
    return found


def generated(engine, prompts, answered=()) -> dict[int, list[int]]:
    return {made.index: made.tokens for made in engine.generate(prompts, answered)}


@pytest.mark.parametrize("size", [1, 3, 4, 16])
def test_replies_are_those_of_transformers(client, prompts, expected, size, monkeypatch):
    monkeypatch.setattr(client.engine, "batch_size", size)
    assert generated(client.engine, prompts) == expected
    assert {len(tokens) for tokens in expected.values()} > {3}, "rows must leave their batch at different times"


def test_rows_leave_a_batch_when_they_are_done(client, prompts, monkeypatch):
    """The model is called with fewer and fewer rows, once half of them are done."""
    sizes, forward = [], client.engine.model.forward

    def counted(*args, **inputs):
        sizes.append(len(inputs["input_ids"]))
        return forward(*args, **inputs)

    monkeypatch.setattr(client.engine, "batch_size", 16)
    monkeypatch.setattr(client.engine.model, "forward", counted)
    generated(client.engine, prompts)
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) >= 3
    assert len(sizes) <= max(prompt.limit for prompt in prompts)


@pytest.fixture
def captured(client, monkeypatch):
    """The decoder that replays CUDA graphs on a GPU, with its steps run as they are: all but the capturing."""
    monkeypatch.setattr(CapturedDecoder, "_capture", uncaptured)
    decoder = CapturedDecoder(client.engine.model, client.engine.ends)
    monkeypatch.setattr(client.engine, "_captured", decoder)
    return decoder


@pytest.mark.parametrize("size", [1, 3, 16])
def test_static_caches_give_the_same_replies(client, captured, prompts, expected, size, monkeypatch):
    monkeypatch.setattr(client.engine, "batch_size", size)
    monkeypatch.setattr(captured_module, "PREFILL_TOKENS", 600)  # a batch's prompts in several parts
    assert generated(client.engine, prompts) == expected
    assert generated(client.engine, prompts) == expected, "caches and masks are used again"
    assert all(rows & (rows - 1) == 0 for rows, _ in captured._steps)
    if size == 16:
        assert {rows for rows, _ in captured._steps} >= {16, 8}, "it goes on with a smaller cache"


def test_what_is_answered_keeps_its_place_in_a_batch(client, prompts, expected, monkeypatch):
    batches, decode = [], client.engine._decode

    def seen(batch):
        batches.append([prompt.index for prompt in batch])
        return decode(batch)

    monkeypatch.setattr(client.engine, "batch_size", 4)
    monkeypatch.setattr(client.engine, "_decode", seen)
    generated(client.engine, prompts)
    whole, left = list(batches), {prompts[2].index, prompts[5].index}
    batches.clear()
    found = generated(client.engine, prompts, answered={prompt.index for prompt in prompts} - left)
    assert found == {index: expected[index] for index in left}
    assert batches == [batch for batch in whole if left & set(batch)] and len(batches) < len(whole)


def test_auto_takes_a_batch_size_and_keeps_it(client, prompts):
    engine = module.TransformersEngine(client.engine.model, client.tokenizer, "auto")
    assert engine.state()["batch_size_used"] is None
    next(engine.generate(prompts))
    assert engine.state() == {"batch_size_used": 8, "batches_halved": 0}
    other = module.TransformersEngine(client.engine.model, client.tokenizer, "auto")
    other.restore({"batch_size_used": 4, "batches_halved": 2})
    assert other.state() == {"batch_size_used": 4, "batches_halved": 2}


@pytest.mark.parametrize(("rows", "fits", "told"), [(9, 64, 64), (8, 64, None), (9, 8, None), (9, 4, None)])
def test_a_larger_batch_that_would_fit_on_a_gpu_is_told(client, prompts, rows, fits, told, monkeypatch):
    """Where there are more rows than one batch has."""
    engine = module.TransformersEngine(client.engine.model, client.tokenizer, 8)
    monkeypatch.setattr(engine, "model", SimpleNamespace(device=torch.device("cuda")))
    monkeypatch.setattr(engine, "_halving", lambda batch, name: [Generated(prompt.index, [], True, 0.0) for prompt in batch])
    monkeypatch.setattr(module, "fitting_batch", lambda model, window: fits)
    asked = [replace(prompts[0], index=index) for index in range(rows)]
    assert len(list(engine.generate(asked))) == rows
    wanted = {"batch_size_used": 8, "batches_halved": 0} | ({"batch_size_fits": told} if told else {})
    assert engine.state() == wanted
    other = module.TransformersEngine(client.engine.model, client.tokenizer, 8)
    other.restore(wanted)
    assert other.state() == wanted


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 9), st.data())
def test_grouped_attention_is_attention(rows, kv_heads, length, data):
    """Against keys and values that are repeated for each query head, with any mask that leaves each row a slot."""
    groups, size = data.draw(st.integers(1, 4)), 8
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    query = torch.randn(rows, kv_heads * groups, 1, size, generator=generator)
    key, value = (torch.randn(rows, kv_heads, length, size, generator=generator) for _ in range(2))
    mask = torch.rand(rows, 1, 1, length, generator=generator) < 0.5
    mask[..., data.draw(st.integers(0, length - 1))] = True
    mask = data.draw(st.sampled_from([None, mask]))
    out, _ = grouped_sdpa(torch.nn.Module(), query, key, value, mask, scaling=0.3)
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key.repeat_interleave(groups, 1)) * 0.3
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    wanted = torch.einsum("bhqk,bhkd->bqhd", scores.softmax(-1), value.repeat_interleave(groups, 1))
    torch.testing.assert_close(out, wanted)


@given(st.lists(st.integers(1, 9), min_size=1), st.lists(st.integers(0, 9)), st.integers(1, 30))
def test_a_row_takes_tokens_up_to_its_end_or_limit(tokens, made, limit):
    tokens = tokens[:limit]
    taken, before = list(tokens), len(tokens)
    take(taken, made, limit, {0})
    assert taken[:before] == tokens and taken[before:] == made[: len(taken) - before] and len(taken) <= limit
    assert 0 not in taken[:-1]
    assert len(taken) == limit or taken[-1] == 0 or len(taken) - before == len(made)


@pytest.mark.parametrize(
    ("wanted", "precision", "fast", "chosen"),
    [
        ("auto", None, True, ("vllm", "bf16")),
        ("auto", "bf16", True, ("vllm", "bf16")),
        ("auto", "fp8", True, ("vllm", "fp8")),
        ("auto", "int8", True, ("transformers", "int8")),
        ("auto", "fp32", True, ("transformers", "fp32")),
        ("auto", None, False, ("transformers", "int8")),
        ("transformers", None, True, ("transformers", "int8")),
        ("vllm", "fp32", True, ("vllm", "fp32")),
        ("vllm", None, False, "the vllm engine cannot run here .no GPU.: pip install -r requirements.txt"),
        ("auto", "fp8", False, "the vllm engine cannot run here"),
        ("vllm", "int8", True, "the vllm engine has no precision int8: choose one of bf16, fp8, fp32"),
        ("vllm", "nf4", False, "the vllm engine has no precision nf4"),
        ("transformers", "fp8", True, "the transformers engine has no precision fp8"),
    ],
)
def test_the_engine_is_chosen(wanted, precision, fast, chosen, monkeypatch):
    monkeypatch.setattr(engines, "why_not_vllm", lambda cpu=False: None if fast else "no GPU")
    if isinstance(chosen, tuple):
        assert choose_engine(wanted, precision) == chosen
    else:
        with pytest.raises(UserError, match=chosen):
            choose_engine(wanted, precision)


def test_the_start_is_chosen_by_what_was_measured():
    told = json.loads((ROOT / "benchmarks/results/engine_start.json").read_text())
    assert told["extra_seconds"] == pytest.approx(vllm_engine.EXTRA_SECONDS, rel=0.01)
    assert told["saved_seconds"] == pytest.approx(vllm_engine.SAVED_SECONDS, rel=0.01)


def test_vllm_starts_for_its_workload(client, tmp_path):
    assert [start_for(rows) for rows in (1, 512, 2_500, 3_000, 200_000)] == ["eager", "eager", "eager", "graphs", "graphs"]
    lengths = [len(encode_prompt(client.tokenizer, messages)) for messages in BATCH]
    assert measure_workload(client.tokenizer, iter(BATCH), 7) == Workload(len(BATCH), max(lengths) + 7)
    assert set(end_tokens(PACKAGE / "models/phi-tiny", client.engine.model.config, client.tokenizer)) == client.engine.ends
    for rank, wanted in ((4, 8), (8, 8), (64, 64), (65, 128)):
        (tmp_path / "adapter_config.json").write_text(f'{{"r": 1, "rank_pattern": {{"q": {rank}}}}}')
        assert lora_rank(tmp_path) == wanted


# -- Chances ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def forward(client, prompts, expected) -> dict[int, list[tuple[float, float]]]:
    """Each prompt's chances by transformers' own pass over prompt and reply at once, the end token included where there is one."""
    model, found = client.engine.model, {}
    model.set_attn_implementation("sdpa")
    for prompt in prompts:
        reply = expected[prompt.index]
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([prompt.tokens + reply])).logits[0, len(prompt.tokens) - 1 :].double()
        best = logits.topk(2).values
        chosen = [*reply, int(logits[-1].argmax())][: prompt.limit]
        logprobs = logits.log_softmax(-1)
        found[prompt.index] = [(float(logprobs[at, token]), float(best[at, 0] - best[at, 1])) for at, token in enumerate(chosen)]
    model.set_attn_implementation(GROUPED)
    return found


def require_chances(made, forward) -> None:
    made = list(made)
    assert sorted(one.index for one in made) == sorted(forward)
    for one in made:
        assert len(one.chances) == len(one.tokens) + one.stopped
        assert one.chances == [pytest.approx(chance, abs=1e-4) for chance in forward[one.index]]


@pytest.mark.parametrize("size", [1, 3, 16])
def test_chances_are_those_of_the_models_distribution(client, prompts, forward, size, monkeypatch):
    """In any batch, and as rows leave it."""
    monkeypatch.setattr(client.engine, "batch_size", size)
    made = list(client.engine.generate(prompts))
    require_chances(made, forward)
    assert {one.stopped for one in made} == {True, False}, "with and without an end token"


@pytest.mark.parametrize("size", [1, 3, 16])
def test_static_caches_give_the_same_chances(client, captured, prompts, forward, size, monkeypatch):
    monkeypatch.setattr(client.engine, "batch_size", size)
    monkeypatch.setattr(captured_module, "PREFILL_TOKENS", 600)
    require_chances(client.engine.generate(prompts), forward)
    require_chances(client.engine.generate(prompts), forward)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(2, 40), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 999))
def test_a_chance_is_of_the_chosen_token_whatever_was_best(rows, vocabulary, dtype, seed):
    """A constrained choice need not be the best token: the margin is still between the two best. In float32 whatever the logits are in."""
    generator = torch.Generator().manual_seed(seed)
    logits = (8 * torch.randn(rows, vocabulary, generator=generator)).to(dtype)
    chosen = torch.randint(vocabulary, (rows,), generator=generator)
    found = captured_module.chances_of(logits, chosen)
    exact = logits.double()
    best = exact.topk(2, -1).values
    assert found.dtype == torch.float32 and found.shape == (rows, 2)
    assert torch.allclose(found[:, 0].double(), exact.log_softmax(-1).gather(-1, chosen[:, None])[:, 0], atol=1e-4)
    assert torch.allclose(found[:, 1].double(), best[:, 0] - best[:, 1], atol=1e-5)


def test_two_best_tokens_alike_have_no_margin():
    assert captured_module.chances_of(torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([1])).tolist() == [[pytest.approx(-math.log(2 + math.exp(-1))), 0.0]]


@pytest.mark.parametrize(
    ("token", "told", "chance"),
    [(7, {7: -0.1, 3: -2.5}, (-0.1, 2.4)), (3, {3: -2.5, 7: -0.1}, (-2.5, 2.4)), (9, {9: -6.0, 7: -0.1, 3: -2.5}, (-6.0, 2.4)), (7, {7: -0.7, 3: -0.7}, (-0.7, 0.0))],
)
def test_vllms_log_probabilities_are_read(token, told, chance):
    """Of the chosen token, which is the best, the second, or neither (under a constraint)."""
    assert vllm_engine.chance_of(token, {one: SimpleNamespace(logprob=logprob) for one, logprob in told.items()}) == pytest.approx(chance)
