"""The local model's client, on the embedded tiny model, in fp32 on a CPU."""

import gc
import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from slm_swap import slm_client
from slm_swap.clients import engines, loading, replicas
from slm_swap.clients.loading import adapter_path, encode_prompt, encode_prompts, model_path, placement, training_seconds
from slm_swap.clients.pricing import LocalPrices, Prices
from slm_swap.common.errors import UserError
from slm_swap.common.settings import PACKAGE, ROOT, Settings
from slm_swap.evaluating.row import score_row
from slm_swap.rows.examples import Example
from slm_swap.rows.prompts import text_request
from slm_swap.scoring.tracks import TRACKS
from slm_swap.slm_client import SLMClient, local_client, serve_rows
from tests.support.tool_requests import BATCH, ask

SETTINGS = Settings(slm_model_path="models/phi-tiny")


@pytest.fixture(scope="module")
def client() -> SLMClient:
    return SLMClient(SETTINGS, precision="fp32", max_new_tokens=48)


@pytest.fixture(scope="module")
def alone(client) -> list:
    """Each row's reply when it is asked by itself."""
    return [client.generate([messages])[0] for messages in BATCH]


def same(left, right) -> bool:
    """Whether replies are equal, but for times and batches; log-probabilities depend on the batch by rounding."""
    told = [[replace(reply, seconds=0, batch=None, confidence=None) for reply in replies] for replies in (left, right)]
    sure = [[reply.confidence for reply in replies] for replies in (left, right)]
    return told[0] == told[1] and all(one == pytest.approx(other, abs=1e-4) for one, other in zip(*sure, strict=True))


@pytest.mark.parametrize("size", [2, 3, 8])
def test_replies_do_not_depend_on_the_batch_size(client, alone, size, monkeypatch):
    monkeypatch.setattr(client.engine, "batch_size", size)
    lengths = {len(encode_prompt(client.tokenizer, messages)) for messages in BATCH}
    assert len(lengths) > 2, "rows of one length would need no padding"
    assert same(client.generate(BATCH), alone)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=9))
def test_rows_are_encoded_together_as_alone(client, texts):
    rows = [text_request("structured", text) for text in texts]
    assert encode_prompts(client.tokenizer, rows) == [encode_prompt(client.tokenizer, messages) for messages in rows]


@pytest.mark.parametrize("chunk", [1, 3, len(BATCH)])
def test_rows_are_asked_whole_and_in_order_however_many_are_encoded_at_once(client, alone, chunk, monkeypatch):
    monkeypatch.setattr(slm_client, "ENCODED_AT_ONCE", chunk)
    monkeypatch.setattr(client.engine, "batch_size", 1)
    long, answered = ask("Check the weather in Oslo " + "and Rome " * 9999), {2, 5}
    replies = dict(client.stream(enumerate([*BATCH, long]), answered))
    assert set(replies) == set(range(len(BATCH) + 1)) - answered
    assert replies.pop(len(BATCH)).finish_reason == "prompt_too_long"
    assert same(replies.values(), [alone[index] for index in replies])


def test_nothing_is_collected_while_it_is_loaded_and_everything_afterwards(monkeypatch):
    collected = []
    monkeypatch.setattr(slm_client, "SLMClient", lambda *_, **options: collected.append(gc.isenabled()))
    monkeypatch.setattr(replicas, "serve", lambda _, make: make(lambda: None))
    local_client(SETTINGS, [], 8, seed=7, engine="transformers")
    assert gc.isenabled()
    first = torch.rand(1)
    serve_rows(SETTINGS, seed=7)
    assert gc.isenabled() and collected == [False, False]
    assert torch.rand(1) == first, "every process is seeded"
    monkeypatch.setattr(engines, "why_not_vllm", lambda cpu=False: "no GPU")
    with pytest.raises(UserError, match="cannot run here"):
        local_client(SETTINGS, [], 8, seed=7, engine="vllm")
    assert gc.isenabled()


@pytest.mark.parametrize("adapter", [None, "adapter"])
def test_hashing_begins_before_anything_is_imported_and_is_not_begun_twice(adapter, monkeypatch, tmp_path):
    begun: list = []
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    given = {"adapter": tmp_path / adapter} if adapter else {}
    whole = loading.BackgroundHashes

    def begin(folders):
        begun.append(folders)
        return whole(folders)

    monkeypatch.setattr(slm_client, "BackgroundHashes", begin)
    monkeypatch.setattr(slm_client, "set_seed", lambda seed: begun.append(seed))
    monkeypatch.setattr(slm_client, "SLMClient", lambda *_, hashes, **__: hashes.result())
    found = local_client(SETTINGS, [], 8, seed=7, engine="transformers", **given)
    folders = [PACKAGE / "models/phi-tiny", *given.values()]
    assert begun == [folders, 7] and found == [loading.files_hash(folder) for folder in folders]


@pytest.mark.parametrize(
    ("flags", "said"),
    [({"precision": "fp8"}, "the transformers engine has no precision fp8"), ({"adapter": "none"}, "no checkpoint at none"), ({"model": None, "adapter": "none"}, "no adapter at none")],
)
def test_folders_that_are_not_there_are_told_in_their_turn(flags, said):
    with pytest.raises(UserError, match=said):
        local_client(SETTINGS, [], 8, seed=7, **{"engine": "transformers", "model": "none"} | flags)


def test_a_reply_holds_only_the_new_tokens(client, alone):
    for messages, reply in zip(BATCH, alone, strict=True):
        assert messages.messages[-1]["content"] not in reply.text and "<|" not in reply.text
        assert reply.input_tokens == len(encode_prompt(client.tokenizer, messages))
        assert reply.finish_reason == "stop" and 0 < reply.output_tokens <= 48 and reply.seconds > 0
    assert alone[0].text.startswith("<tool_call name=")


def test_the_model_sees_phi_4_minis_chat_format(client):
    shown = client.tokenizer.decode(encode_prompt(client.tokenizer, text_request("toolcall", "Hello")))
    assert shown.startswith("<|system|>You answer") and shown.endswith("<|end|><|user|>Hello<|end|><|assistant|>")


def test_a_reply_that_reaches_the_limit_is_marked(client, monkeypatch):
    monkeypatch.setattr(client, "max_new_tokens", 3)
    (reply,) = client.generate([BATCH[0]])
    assert (reply.finish_reason, reply.output_tokens, reply.limit) == ("length", 3, 3)
    gold = '<tool_call name="get_weather">{"city":"Oslo"}</tool_call>'
    cut = score_row(TRACKS["toolcall"], Example("p", gold, id="r"), reply, client).reply.cut
    whole = client.tokenizer.apply_chat_template([{"role": "assistant", "content": gold}], tokenize=False)
    more = len(client.tokenizer(whole, add_special_tokens=False)["input_ids"])
    assert cut["limit"] == 3 and 3 < cut["reference_tokens"] < more and not cut["thinking"], "the gold without the template around it"


def test_a_prompt_longer_than_the_context_is_not_cut(client, alone, monkeypatch):
    needed = len(encode_prompt(client.tokenizer, BATCH[0]))
    long = ask("Check the weather in Oslo " + "and Rome " * 400)
    monkeypatch.setattr(client.engine, "context", needed + 200)
    replies = client.generate([BATCH[0], long, BATCH[1]])
    assert (replies[1].text, replies[1].finish_reason) == ("", "prompt_too_long") and replies[1].counts is not None
    assert f"the context {needed + 200}" in replies[1].error
    assert same([replies[0], replies[2]], alone[:2])


def test_a_row_with_little_room_does_not_shorten_its_neighbours(client, alone, monkeypatch):
    lengths = [len(encode_prompt(client.tokenizer, messages)) for messages in BATCH]
    longest = lengths.index(max(lengths))
    monkeypatch.setattr(client.engine, "context", max(lengths) + 4)
    monkeypatch.setattr(client, "max_new_tokens", 48)
    roomy = [index for index, length in enumerate(lengths) if max(lengths) + 4 - length >= alone[index].output_tokens]
    replies = client.generate(BATCH)
    assert replies[longest].finish_reason == "length" and replies[longest].output_tokens == replies[longest].limit == 4
    assert roomy and same([replies[index] for index in roomy], [alone[index] for index in roomy])


def run_out_of_memory(client, monkeypatch, rows: int) -> list[int]:
    """Let `generate` run out of memory for more than `rows` rows; gives the sizes that were tried."""
    import torch

    tried, decode = [], client.engine._decode

    def limited(batch):
        tried.append(len(batch))
        if tried[-1] > rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(batch)

    monkeypatch.setattr(client.engine, "_decode", limited)
    return tried


def test_a_batch_that_does_not_fit_is_halved(client, alone, monkeypatch):
    tried = run_out_of_memory(client, monkeypatch, 2)
    monkeypatch.setattr(client.engine, "halved", 0)
    assert same(client.generate(BATCH), alone)
    assert tried == [8, 4, 2, 2, 4, 2, 2] and client.describe()["batches_halved"] == 3


def test_a_single_row_that_does_not_fit_ends_the_run(client, monkeypatch):
    run_out_of_memory(client, monkeypatch, 0)
    with pytest.raises(UserError, match=r"tokens alone does not fit in memory: use --precision"):
        client.generate(BATCH[:2])


def test_other_errors_of_the_model_are_not_hidden(client, monkeypatch):
    def broken(batch):
        raise RuntimeError("a bug")

    monkeypatch.setattr(client.engine, "_decode", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        client.generate(BATCH[:2])


@pytest.mark.parametrize("given", ["models/phi-tiny", "slm_swap/models/phi-tiny", str(PACKAGE / "models/phi-tiny")])
def test_the_checkpoint_is_found_from_both_folders(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert model_path(Settings(slm_model_path=given)).resolve() == (ROOT / "slm_swap/models/phi-tiny").resolve()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(), "SLM_MODEL_PATH is not set: get the model with `hf download"),
        (Settings(slm_model_path="models/none"), "no checkpoint at models/none"),
    ],
)
def test_a_missing_checkpoint_is_said(settings, message):
    with pytest.raises(UserError, match=message):
        model_path(settings)


def test_a_missing_adapter_is_said(tmp_path):
    with pytest.raises(UserError, match=r"no adapter at .*: make it with train_unsloth.py, or check --adapter$"):
        adapter_path(tmp_path)


@pytest.mark.parametrize("broken", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_broken_checkpoint_is_said(broken, tmp_path):
    for path in (PACKAGE / "models/phi-tiny").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[: 100 if path.name == broken else None])
    with pytest.raises(UserError, match=r"cannot load .* again"):
        SLMClient(SETTINGS, model=tmp_path, precision="fp32")


def test_eight_bits_have_products_of_our_own():
    client = SLMClient(SETTINGS, engine="transformers", max_new_tokens=8, batch_size=8)
    told = client.describe()
    kinds = Counter(type(part).__name__ for part in client.engine.model.modules())
    linear = 4 * client.engine.model.config.num_hidden_layers
    assert (told["precision"], told["products"]) == ("int8", "bf16") and kinds["Int8Linear"] == linear and not kinds["Linear8bitLt"]
    alone = [client.generate([request])[0].text for request in BATCH]
    assert [reply.text for reply in client.generate(BATCH)] == alone, "LLM.int8() rounds by what else is in the batch"
    json.dumps(told)


def test_a_model_takes_one_gpu_where_it_fits_and_all_of_them_only_alone(tmp_path, monkeypatch):
    save_file({"model.layers.0.mlp.up_proj.weight": torch.zeros(20, 25, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for free, precision, processes, placed in ((1300, "bf16", 4, {"": 0}), (1100, "bf16", 1, "auto"), (700, "int8", 4, {"": 0}), (0, "nf4", 1, "auto")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 9999))
        assert placement(tmp_path, precision, processes) == placed
    with pytest.raises(UserError, match="GiB free: start one process by python, which spreads it over all GPUs"):
        placement(tmp_path, "bf16", 2)


def test_a_gpu_that_cannot_be_used_is_told(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device, visible, warned in ((tmp_path, None, True), (tmp_path, "", False), (tmp_path / "none", None, False)):
        monkeypatch.setattr(loading, "GPU_DEVICE", device)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible) if visible is not None else monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        assert placement(tmp_path, "bf16") == "auto"
        assert ("cannot use this machine's NVIDIA GPU" in capfd.readouterr().err) is warned

    def full(device):
        raise torch.AcceleratorError("CUDA error: out of memory\nSearch for it.", 2)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", full)
    with pytest.raises(UserError, match=r"cannot be used .*out of memory"):
        placement(tmp_path, "bf16")


def test_the_cost_is_the_machines_price_for_the_time(client, monkeypatch):
    for hour, cost in ((3.0, 1.5), (0, 0.0), (None, None)):
        monkeypatch.setattr(client, "prices", Prices("prices.toml", local=LocalPrices(hour=hour)))
        assert client.cost(1, 0, 1, 1800) == cost


def test_prices_that_cannot_be_read_stop_it_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setattr("slm_swap.slm_client.load_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UserError, match=r"cannot read the prices in none\.toml"):
        SLMClient(replace(SETTINGS, prices_file="none.toml"), precision="fp32")


def test_the_base_model_was_not_trained_by_us(client):
    assert client.describe()["adapter"] is client.describe()["training_seconds"] is None


@pytest.mark.parametrize(
    ("info", "seconds"),
    [
        ('{"seconds": {"train": 5.5, "total": 61.25}}', 61.25),
        ('{"seconds": {"train": 5.5}}', None),
        ('{"seconds": {"total": "long"}}', None),
        ('{"seconds": {"total": NaN}}', None),
        ('{"seconds": 60}', None),
        ("[]", None),
        ("not JSON", None),
        (None, None),
    ],
)
def test_how_long_an_adapter_was_trained(info, seconds, tmp_path):
    if info is not None:
        (tmp_path / "training_info.json").write_text(info)
    assert training_seconds(tmp_path) == seconds
