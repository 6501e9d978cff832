"""An adapter merged into its base: the same replies, from a checkpoint that stands alone."""

import json
import shutil
from dataclasses import replace

import pytest

from slm_swap.clients.loading import files_hash, load_model, with_adapter
from slm_swap.common.errors import UserError
from slm_swap.common.settings import Settings
from slm_swap.common.temporary import _host
from slm_swap.rows.prompts import text_request
from slm_swap.slm_client import SLMClient
from slm_swap.tuning.merging import merge_adapter
from slm_swap.tuning.training import train
from tests.support.disks import mounted
from tests.support.scripts import load_script
from tests.support.training_rows import BASE, INPUTS, QUICK, ROWS


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    out = tmp_path_factory.mktemp("merge") / "adapter"
    train("structured", BASE, ROWS[:6], [], out, replace(QUICK, epochs=2), "trl", INPUTS)
    return out


@pytest.fixture
def adapter_of(tmp_path_factory):
    """Makes a random LoRA adapter on the query projections of a base: as one that training made, without the time for it."""

    def make(base, infinite=False):
        import torch
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        model = load_model(base, "fp32", {"": "cpu"})
        names = [name for name, _ in model.named_modules() if name.endswith(("q_proj", "qkv_proj")) and "vision" not in name]
        tuned = get_peft_model(model, LoraConfig(r=2, target_modules=names, init_lora_weights=False, task_type="CAUSAL_LM"))
        if infinite:
            next(weight for name, weight in tuned.named_parameters() if "lora_B" in name).data.fill_(torch.inf)
        folder = tmp_path_factory.mktemp("adapter")
        tuned.peft_config["default"].base_model_name_or_path = str(base)
        tuned.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def script():
    return load_script("04_ft/merge_adapter.py")


def test_the_merged_model_replies_as_the_adapter_does(adapter, tmp_path, script, run_script):
    out = tmp_path / "merged"
    code, said, error = run_script(script, "--adapter", adapter, "--out", out, "--dtype", "fp32")
    assert code == 0 and str(out) in said and "not proven" not in error and [path.name for path in tmp_path.iterdir()] == ["merged"]
    settings, messages = Settings(slm_model_path=str(BASE)), [text_request("structured", row.prompt) for row in ROWS]
    options = {"precision": "fp32", "max_new_tokens": 48}
    clients = [SLMClient(settings, **options), SLMClient(settings, adapter=adapter, **options), SLMClient(settings, model=out, **options)]
    plain, adapted, merged = ([reply.text for reply in client.generate(messages)] for client in clients)
    assert merged == adapted != plain
    assert clients[2].training_seconds == clients[1].training_seconds > 0, "costs know the training of a merged model"
    told = json.loads((out / "training_info.json").read_text())
    assert told["merged"]["base_model"] == {"path": "slm_swap/models/phi-tiny", "files_sha256": files_hash(BASE)}
    assert told["hyperparameters"]["epochs"] == 2


def test_a_report_says_which_weights_were_trained_or_that_it_is_not_proven(adapter, adapter_of, tmp_path, eval_script, run_script, monkeypatch):
    merge_adapter(BASE, adapter, tmp_path / "merged", "bf16")
    settings, base = Settings(slm_model_path=str(BASE)), files_hash(BASE)
    for given, known in ({"adapter": adapter}, base), ({"model": tmp_path / "merged"}, base), ({"adapter": adapter_of(BASE)}, None):
        told = SLMClient(settings, precision="fp32", **given).describe()
        assert told["trained_on_sha256"] == known
    assert "trained_on_sha256" not in SLMClient(settings, precision="fp32").describe()
    monkeypatch.setenv("SLM_MODEL_PATH", str(BASE))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": row.prompt, "completion": row.completion}) + "\n" for row in ROWS[:2]))
    for given, lines in ((adapter, 0), (adapter_of(BASE), 1)):
        code, _, error = run_script(
            eval_script, "--track", "structured", "--model-kind", "slm", "--dataset", rows, "--adapter", given, "--precision", "fp32",
            "--max-new-tokens", "8", "--latency-rows", "0", "--out", tmp_path / "report.json", "--overwrite",
        )  # fmt: skip
        assert code == 0 and error.count("not proven") == lines, error
    assert json.loads((tmp_path / "report.json").read_text())["model"]["trained_on_sha256"] is None


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
        assert code == 2 and "config.json/new (File exists): choose another place with --out" in error
    monkeypatch.setattr("slm_swap.tuning.merging.write_json", full)
    code, _, error = run_script(script, "--adapter", adapter, "--out", tmp_path / "new")
    assert code == 2 and "No space left on device" in error and sorted(tmp_path.iterdir()) == before


def test_a_full_disk_takes_nothing_and_the_next_merge_clears_what_a_killed_one_left(adapter, tmp_path, script, run_script):
    with mounted(tmp_path / "big", 48) as disk:
        (left := disk.folder / f".merged.{_host()}~1~0123abcd").mkdir()
        (left / "model.safetensors").write_bytes(b"a part")
        disk.leave(1000)
        code, _, error = run_script(script, "--adapter", adapter, "--out", disk.folder / "merged")
        assert code == 2 and error == f"error: cannot write {disk.folder / 'merged'} (No space left on device): make room and run the same command again\n"
        assert disk.files() == {} and [path.name for path in disk.folder.iterdir()] == ["ballast"]
        disk.make_room()
        assert run_script(script, "--adapter", adapter, "--out", disk.folder / "merged")[0] == 0
        assert [path.name for path in disk.folder.iterdir()] == ["merged"] and "merged/training_info.json" in disk.files()


@pytest.mark.parametrize(
    "given, kept, left_out",
    [
        ({"temperature": 0.7, "top_p": 0.9, "max_length": 99}, {"max_length": 99}, {"temperature": 0.7, "top_p": 0.9}),
        ({"do_sample": True, "temperature": 0.7, "top_k": 7}, {"do_sample": True, "temperature": 0.7, "top_k": 7}, {}),
        ({"do_sample": True, "temperature": 0.7, "early_stopping": True, "pad_token_id": 0}, {"pad_token_id": 0}, {"do_sample": True, "temperature": 0.7, "early_stopping": True}),
    ],
)  # fmt: skip
def test_a_generation_config_is_written_as_transformers_runs_the_base_by_it(adapter_of, tmp_path, script, run_script, given, kept, left_out):
    """Older checkpoints' are refused by transformers once all is computed, or would make the merged model sample where its base does not."""
    from transformers import GenerationConfig

    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, **given}))
    code, said, error = run_script(script, "--adapter", adapter_of(base), "--out", tmp_path / "merged")
    assert code == 0 and error.count("not proven") == error.count("\n") == 1, error
    written = json.loads((tmp_path / "merged/generation_config.json").read_text())
    assert {name: value for name, value in written.items() if name not in ("eos_token_id", "transformers_version", "_from_model_config")} == kept
    assert written["eos_token_id"] == [0, 4]
    GenerationConfig.from_pretrained(tmp_path / "merged").validate(strict=True)
    assert json.loads((tmp_path / "merged/training_info.json").read_text())["merged"]["generation_config_left_out"] == left_out
    assert all(f"{name} {value}" in said for name, value in left_out.items()) and ("is without" in said) == bool(left_out)


def test_files_that_processors_and_other_tokenizers_read_come_along(adapter_of, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    beside = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "tokenizer.model", "tekken.json")
    others = ("README.md", "training_args.bin", "params.json", "quant_config.json")
    for name in (*beside, *others):
        (base / name).write_text(f'"{name}"')
    adapter = adapter_of(base)
    merge_adapter(base, adapter, tmp_path / "merged", "bf16")
    for name in beside:
        assert (tmp_path / "merged" / name).read_text() == f'"{name}"'
    assert not any((tmp_path / "merged" / name).exists() for name in others)
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == "bfloat16"


VISION = {
    "gemma3": {"vision_config": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}},
    "qwen3_5": {"vision_config": {"hidden_size": 32, "intermediate_size": 32, "depth": 1, "num_heads": 2, "out_hidden_size": 64, "deepstack_visual_indexes": []}},
}  # fmt: skip
SIZES = {
    "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
    "layer_types": ["full_attention", "full_attention"], "max_position_embeddings": 512, "eos_token_id": 0, "pad_token_id": 0, "bos_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize("family", VISION)
def test_a_model_that_sees_is_merged_whole(adapter_of, tmp_path, family):
    """In its own class, its images' part to the bit: also where its text part alone is loaded to be trained, as of Qwen3.5."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    base = tmp_path / "base"
    shutil.copytree(BASE, base, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    config = AutoConfig.for_model(family, text_config=SIZES, **VISION[family])
    whole = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    whole.save_pretrained(base)
    adapter = adapter_of(base)
    merge_adapter(base, adapter, tmp_path / "merged", "fp32")
    made = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert type(made) is type(whole) and type(made.config) is type(config)
    before, after = whole.state_dict(), made.state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("q_proj" in name and "vision" not in name and "visual" not in name for name in changed), changed
    ids = torch.tensor([[5, 6, 7, 8]])
    tuned = with_adapter(load_model(base, "fp32", {"": "cpu"}), adapter, base)
    with torch.no_grad():
        assert torch.allclose(made(input_ids=ids).logits, tuned(input_ids=ids).logits, atol=1e-5)


def test_what_packages_say_is_one_line_and_nothing_is_left(adapter, adapter_of, tmp_path, script, run_script, monkeypatch):
    from safetensors import SafetensorError
    from transformers import PreTrainedModel

    torn = tmp_path / "torn"
    shutil.copytree(adapter, torn)
    (torn / "adapter_model.safetensors").write_bytes(b"no weights")
    (torn / "training_info.json").unlink()  # which would tell of the damage first
    broken = adapter_of(BASE, infinite=True)
    for name, given, message in (("torn", torn, "does not fit the model"), ("broken", broken, "cannot merge")):
        code, _, error = run_script(script, "--adapter", given, "--out", tmp_path / "merged")
        assert code == 2 and message in error and error.count("\n") == 1, (name, error)

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)\nand more")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    code, _, error = run_script(script, "--adapter", adapter, "--out", tmp_path / "merged")
    assert code == 2 and error.endswith("/merged (No space left on device): make room and run the same command again\n") and error.count("\n") == 1, error
    assert [path.name for path in tmp_path.iterdir()] == ["torn"]
