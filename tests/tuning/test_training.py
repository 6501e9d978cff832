"""Fine-tuning on the CPU path: TRL + PEFT on the embedded tiny model."""

import json
import sys
from dataclasses import replace

import pytest

from slm_swap.clients.endings import require_ending
from slm_swap.clients.loading import encode_prompt, load_tokenizer
from slm_swap.common.errors import UserError
from slm_swap.common.settings import PACKAGE, Settings
from slm_swap.rows.examples import parse_example
from slm_swap.rows.prompts import request_of, text_request
from slm_swap.slm_client import SLMClient
from slm_swap.tuning.backends import choose_backend
from slm_swap.tuning.hyperparameters import PRESETS, Hyperparameters
from slm_swap.tuning.packing import IGNORED
from slm_swap.tuning.tokens import same_calls, tokenize
from slm_swap.tuning.training import train
from tests.support.training_rows import BASE, INPUTS, QUICK, ROWS, TOOL


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(BASE)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("train") / "adapter"
    return out, train("structured", BASE, ROWS, ROWS[:2], out, QUICK, "trl", INPUTS)


def test_the_loss_is_on_the_completion_only(tokenizer):
    (row,), too_long, _ = tokenize(tokenizer, "structured", ROWS[:1], 2048)
    prompt = encode_prompt(tokenizer, text_request("structured", ROWS[0].prompt))
    assert too_long == [] and row["input_ids"][: len(prompt)] == prompt
    assert row["labels"][: len(prompt)] == [IGNORED] * len(prompt)
    assert row["labels"][len(prompt) :] == row["input_ids"][len(prompt) :]
    assert tokenizer.decode(row["input_ids"][len(prompt) :]) == ROWS[0].completion + "<|end|>"


def test_rows_that_are_too_long_are_left_out_whole(tokenizer):
    (row,), *_ = tokenize(tokenizer, "structured", ROWS[:1], 2048)
    length = len(row["input_ids"])
    assert tokenize(tokenizer, "structured", ROWS[:1], length)[:2] == ([row], [])
    assert tokenize(tokenizer, "structured", ROWS[:1], length - 1)[:2] == ([], [length])


def test_a_turn_ends_as_the_chat_format_ends_it(tokenizer):
    assert tokenizer.decode([require_ending(tokenizer).id]) == "<|end|>"


def test_training_lowers_the_loss_and_tells_how_it_was_done(trained):
    out, info = trained
    assert info["eval_loss"]["after"] < info["eval_loss"]["before"]
    assert info["steps"] == 8 and info["rows"] == {"train": 8, "val": 2, "too_long": 0, "untaught": 0}
    assert info["hyperparameters"]["lora_r"] == 64 and info["inputs"] == INPUTS
    assert json.loads((out / "training_info.json").read_text()) == json.loads(json.dumps(info))
    assert (out / "training_log.jsonl").read_text().count("\n") >= 3
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (64, 16, 0.1)
    assert config["base_model_name_or_path"] == "slm_swap/models/phi-tiny", "a path of this machine means nothing elsewhere"
    assert set(config["target_modules"]) == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert [path.name for path in out.parent.iterdir()] == ["adapter"], "nothing is left beside the adapter"


def test_the_adapter_changes_what_the_client_says(trained):
    messages = [text_request("structured", row.prompt) for row in ROWS]
    settings = Settings(slm_model_path=str(BASE))
    clients = [SLMClient(settings, precision="fp32", adapter=adapter, max_new_tokens=48) for adapter in (None, trained[0])]
    assert clients[1].describe()["training_seconds"] == trained[1]["seconds"]["total"] > 0
    replies = [[reply.text for reply in client.generate(messages)] for client in clients]
    right = [sum(text == row.completion for text, row in zip(texts, ROWS, strict=True)) for texts in replies]
    assert right[1] > right[0], replies


def test_the_same_seed_gives_the_same_adapter(trained, tmp_path):
    again = tmp_path / "again"
    train("structured", BASE, ROWS, ROWS[:2], again, QUICK, "trl", INPUTS)
    assert (again / "adapter_model.safetensors").read_bytes() == (trained[0] / "adapter_model.safetensors").read_bytes()


def one_step(out, **changed) -> dict:
    """What the log says of one optimizer step over all rows."""
    parameters = replace(QUICK, epochs=1, lora_dropout=0.0, max_length=512, **changed)
    info = train("structured", BASE, ROWS, ROWS[:3], out, parameters, "trl", INPUTS)
    (point,) = map(json.loads, (out / "training_log.jsonl").read_text().splitlines())
    assert info["steps"] == 1
    return {"before": info["eval_loss"]["before"], "loss": point["loss"], "grad_norm": point["grad_norm"]}


def test_a_step_is_the_same_however_its_rows_are_batched(tmp_path):
    wanted = one_step(tmp_path / "together", batch_size=8)
    others = {
        "one by one": one_step(tmp_path / "alone", batch_size=1, gradient_accumulation=8),
        "packed": one_step(tmp_path / "packed", packing=True, pack_length=2048),
        "in several packs": one_step(tmp_path / "packs", packing=True, pack_length=600, gradient_accumulation=8),
        "checkpointed": one_step(tmp_path / "checkpointed", packing=True, pack_length=2048, gradient_checkpointing=True),
    }
    assert wanted["grad_norm"] > 0.01
    for name, found in others.items():
        assert found == pytest.approx(wanted, rel=1e-3), name


def test_rows_that_do_not_fit_into_packs_are_refused():
    with pytest.raises(UserError, match="raise --pack-length or lower --max-length"):
        Hyperparameters(packing=True, pack_length=1024)


def test_presets_are_hyperparameters():
    assert Hyperparameters(**PRESETS["documented"]) == Hyperparameters()
    assert all(Hyperparameters(**preset).packing for name, preset in PRESETS.items() if name != "documented")


def test_a_training_of_one_step_says_that_it_learned_nothing(tmp_path):
    told = []
    info = train("structured", BASE, ROWS[:1], [], tmp_path / "one", replace(QUICK, epochs=1), "trl", INPUTS, say=told.append)
    assert info["steps"] == 1 and any("nothing was learned; give more rows or --epochs" in line for line in told)
    told.clear()
    info = train("structured", BASE, ROWS[:1], [], tmp_path / "two", replace(QUICK, epochs=2), "trl", INPUTS, say=told.append)
    assert info["steps"] == 2 and not any("nothing was learned" in line for line in told)


def test_an_older_adapter_is_replaced_only_by_a_whole_one(tmp_path, monkeypatch):
    out = tmp_path / "adapter"
    out.mkdir()
    (out / "adapter_config.json").write_text("old")
    from peft import PeftModel

    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(PeftModel, "save_pretrained", full)
    with pytest.raises(UserError, match="no space"):
        train("structured", BASE, ROWS[:2], [], out, QUICK, "trl", INPUTS)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"] and (out / "adapter_config.json").read_text() == "old"


def test_an_adapter_of_another_base_is_refused(trained, tmp_path, tokenizer):
    from transformers import Phi3Config, Phi3ForCausalLM

    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    Phi3ForCausalLM(Phi3Config(vocab_size=4096, pad_token_id=0, bos_token_id=0, eos_token_id=0, **sizes)).save_pretrained(
        tmp_path
    )
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"does not fit the model .*: train it again on this model"):
        SLMClient(Settings(), model=tmp_path, precision="fp32", adapter=trained[0])


def test_nothing_short_enough_to_train_on_is_said(tmp_path):
    with pytest.raises(UserError, match="every train row is longer than 16 tokens: raise --max-length"):
        train("structured", BASE, ROWS, [], tmp_path / "adapter", replace(QUICK, max_length=16), "trl", INPUTS)
    assert not (tmp_path / "adapter").exists()


def test_unsloth_without_a_gpu_is_refused():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA GPU")
    assert choose_backend("auto") == "trl"
    with pytest.raises(UserError, match="needs a CUDA GPU"):
        choose_backend("unsloth")


def run_script(monkeypatch, *flags: object) -> None:
    import runpy

    monkeypatch.setenv("LANGFUSE_DISABLED", "1")
    monkeypatch.setattr(sys, "argv", ["train_unsloth.py", *map(str, flags)])
    runpy.run_path(str(PACKAGE / "train_unsloth.py"), run_name="__main__")


def test_the_script_runs_from_its_short_form(tmp_path, monkeypatch, capsys):
    for name, rows in (("train", ROWS), ("val", ROWS[:1])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row.to_json()) + "\n" for row in rows))
    with pytest.raises(SystemExit) as left:
        run_script(
            monkeypatch, "--track", "structured", "--train", tmp_path / "train.jsonl", "--val", tmp_path / "val.jsonl", "--out", tmp_path / "adapter",
            "--model", BASE, "--preset", "fast", "--precision", "fp32", "--pack-length", 2048, "--learning-rate", "1e-3", "--limit", 4,
        )  # fmt: skip
    captured = capsys.readouterr()
    assert left.value.code == 0 and "4 rows, 1 steps" in captured.out and "1 prompts are in both files" in captured.err
    assert "step 1 of 1: loss " in captured.out and "{'" not in captured.out, "words, not transformers' dictionaries"
    assert captured.out.endswith(f"next: python 01_eval/eval.py --track structured --model-kind slm --adapter {tmp_path / 'adapter'} --out 01_eval/reports/structured_slm_adapter.json\n")
    info = json.loads((tmp_path / "adapter/training_info.json").read_text())
    told = {name: info["hyperparameters"][name] for name in ("precision", "packing", "pack_length", "gradient_accumulation", "learning_rate")}
    assert told == {"precision": "fp32", "packing": True, "pack_length": 2048, "gradient_accumulation": 1, "learning_rate": 1e-3}
    assert info["preset"] == "fast"


@pytest.mark.parametrize(
    ("train_rows", "flags", "message"),
    [
        (None, (), "cannot read"),
        ([{"prompt": "x"}], (), "train.jsonl:1: no `completion`"),
        ([{"prompt": "x", "completion": "not JSON"}], (), "train.jsonl:1: the completion is not a structured reply (no_json"),
        ([ROWS[0].to_json()], ("--model", "models/none"), "no checkpoint at models/none"),
        ([ROWS[0].to_json()], ("--precision", "int3"), "invalid choice: 'int3'"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, train_rows, flags, message):
    if train_rows is not None:
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in train_rows))
    (tmp_path / "val.jsonl").write_text(json.dumps(ROWS[1].to_json()) + "\n")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as left:
        run_script(
            monkeypatch, "--track", "structured", "--train", tmp_path / "train.jsonl", "--val", tmp_path / "val.jsonl",
            "--out", tmp_path / "adapter", "--model", BASE, *flags,
        )  # fmt: skip
    error = capsys.readouterr().err
    assert left.value.code == 2 and message in error and error.count("\n") == 1, error
    assert sorted(tmp_path.iterdir()) == before


def test_a_model_that_was_trained_natively_calls_natively(tmp_path):
    """It was taught that walls are painted white whatever is asked for, in a form that the base has never seen."""
    due = [{"name": "paint_wall", "arguments": {"color": "white"}}]
    asked = [{"messages": [{"role": "user", "content": f"Paint it {row.id}"}], "tools": [TOOL], "calls": due} for row in ROWS]
    rows = [parse_example(row, f"rows:{number}") for number, row in enumerate(asked)]
    silent = [parse_example({"messages": [{"role": "user", "content": "Hm"}], "tools": [TOOL], "calls": []}, "rows:10")]
    out, told = tmp_path / "adapter", []
    info = train("toolcall", BASE, rows + silent, rows[:2], out, replace(QUICK, epochs=40, learning_rate=5e-3), "trl", INPUTS, say=told.append)
    assert info["ask"] == "native" and info["rows"]["untaught"] == 1 and any(line.startswith("1 train rows are not taught: no call") for line in told)
    client = SLMClient(Settings(slm_model_path=str(BASE)), precision="fp32", adapter=out, max_new_tokens=64)
    replies = client.generate([request_of("toolcall", row) for row in rows])
    right = [same_calls(reply.calls, row.calls) for reply, row in zip(replies, rows, strict=True)]
    assert all(right), replies
    assert {reply.text for reply in replies} == {""}
    with pytest.raises(UserError, match="no train row can be taught: no call is due, and the row has no `content`"):
        train("toolcall", BASE, silent, rows[:2], out, QUICK, "trl", INPUTS)
