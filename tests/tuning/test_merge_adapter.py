"""An adapter merged into its base: the same replies, from a checkpoint that stands alone."""

import json
import shutil
from dataclasses import replace

import pytest

from slm_swap.clients.loading import files_hash
from slm_swap.common.errors import UserError
from slm_swap.common.settings import Settings
from slm_swap.rows.prompts import text_request
from slm_swap.slm_client import SLMClient
from slm_swap.tuning.merging import merge_adapter
from slm_swap.tuning.training import train
from tests.support.scripts import load_script
from tests.support.training_rows import BASE, INPUTS, QUICK, ROWS


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    out = tmp_path_factory.mktemp("merge") / "adapter"
    train("structured", BASE, ROWS[:6], [], out, replace(QUICK, epochs=2), "trl", INPUTS)
    return out


@pytest.fixture
def script():
    return load_script("04_ft/merge_adapter.py")


def test_the_merged_model_replies_as_the_adapter_does(adapter, tmp_path, script, run_script):
    out = tmp_path / "merged"
    code, said, _ = run_script(script, "--adapter", adapter, "--out", out, "--dtype", "fp32")
    assert code == 0 and str(out) in said and [path.name for path in tmp_path.iterdir()] == ["merged"]
    settings, messages = Settings(slm_model_path=str(BASE)), [text_request("structured", row.prompt) for row in ROWS]
    options = {"precision": "fp32", "max_new_tokens": 48}
    clients = [SLMClient(settings, **options), SLMClient(settings, adapter=adapter, **options), SLMClient(settings, model=out, **options)]
    plain, adapted, merged = ([reply.text for reply in client.generate(messages)] for client in clients)
    assert merged == adapted != plain
    assert clients[2].training_seconds == clients[1].training_seconds > 0, "costs know the training of a merged model"
    told = json.loads((out / "training_info.json").read_text())
    assert told["merged"]["base_model"] == {"path": "slm_swap/models/phi-tiny", "files_sha256": files_hash(BASE)}
    assert told["hyperparameters"]["epochs"] == 2


def test_it_is_evaluated_only_over_the_weights_that_it_was_trained_on(adapter, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(BASE, other)
    (other / "generation_config.json").write_text((BASE / "generation_config.json").read_text() + "\n")
    with pytest.raises(UserError, match=r"was trained on other weights than .*: set SLM_MODEL_PATH to its base"):
        SLMClient(Settings(slm_model_path=str(other)), adapter=adapter, precision="fp32")


def test_the_default_is_bf16(adapter, tmp_path):
    import torch
    from safetensors.torch import load_file

    merge_adapter(BASE, adapter, tmp_path / "merged", "bf16")
    weights = load_file(tmp_path / "merged/model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert weights.keys() == load_file(BASE / "model.safetensors").keys()


def test_what_does_not_fit_is_one_line_and_writes_nothing(adapter, tmp_path, script, run_script, monkeypatch):
    (tmp_path / "there").mkdir()
    other = tmp_path / "other"
    shutil.copytree(BASE, other)
    (other / "generation_config.json").write_text((BASE / "generation_config.json").read_text() + "\n")
    before = sorted(tmp_path.iterdir())
    cases = {
        "exists already": ("--adapter", adapter, "--out", tmp_path / "there"),
        "was trained on other weights than": ("--adapter", adapter, "--out", tmp_path / "new", "--model", other),
        "no adapter at": ("--adapter", tmp_path, "--out", tmp_path / "new"),
        "no checkpoint at": ("--adapter", adapter, "--out", tmp_path / "new", "--model", tmp_path / "there"),
    }
    for message, flags in cases.items():
        code, _, error = run_script(script, *flags)
        assert code == 2 and message in error and error.count("\n") == 1, error

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:  # before any work
        patched.setattr("slm_swap.tuning.merging.load_model", None)
        code, _, error = run_script(script, "--adapter", adapter, "--out", other / "config.json/new")
        assert code == 2 and "config.json/new (Not a directory): choose another place with --out" in error
    monkeypatch.setattr("slm_swap.tuning.merging.write_json", full)
    code, _, error = run_script(script, "--adapter", adapter, "--out", tmp_path / "new")
    assert code == 2 and "No space left on device" in error and sorted(tmp_path.iterdir()) == before
