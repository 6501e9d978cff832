"""Checkpoints that can be loaded, and the one line that is said of those that cannot: real files of tiny models."""

import json
import os
import re
import shutil
import threading
from concurrent.futures import CancelledError

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from slm_swap.clients import loading
from slm_swap.clients.engines.vllm_engine import lora_rank
from slm_swap.clients.loading import (
    BackgroundHashes,
    files_hash,
    import_bitsandbytes,
    load_config,
    load_model,
    load_tokenizer,
    model_path,
    require_precision,
    weight_bytes,
    with_adapter,
)
from slm_swap.common.errors import UserError
from slm_swap.common.settings import PACKAGE, Launch, Settings
from slm_swap.rows.examples import Example
from slm_swap.rows.prompts import text_request
from slm_swap.slm_client import SLMClient
from slm_swap.tuning.tokens import tokenize

BASE = PACKAGE / "models/phi-tiny"
TEXT = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
VISION = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the embedded model."""
    return shutil.copytree(BASE, tmp_path / "model")


def refused(folder, match: str, precision: str = "fp32", load=load_model) -> str:
    with pytest.raises(UserError, match=match) as error:
        load(folder, precision)
    said = str(error.value)
    assert "\n" not in said and str(folder.name) in said and re.search(r": .*(use|pass|pip|download|install)", said)
    return said


def change(folder, **given) -> None:
    """Other values in its config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | given))


@pytest.mark.parametrize(
    ("config", "given"),
    [
        ("mistral3", dict(text_config=TEXT | {"model_type": "mistral"}, vision_config=VISION | {"model_type": "pixtral", "head_dim": 16})),
        ("gemma3", dict(text_config=TEXT, vision_config=VISION)),
    ],
)  # fmt: skip
def test_composite_checkpoints_are_loaded_whole(config, given, tmp_path):
    """Mistral 3 is none of AutoModelForCausalLM's."""
    torch.manual_seed(1)
    made = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[config](**given)).eval()
    made.save_pretrained(tmp_path)
    loaded, ids = load_model(tmp_path, "fp32"), torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        assert torch.equal(loaded.eval()(input_ids=ids).logits, made(input_ids=ids).logits)


def test_weights_that_are_not_there_are_not_made_up(checkpoint, caplog, capsys):
    file = checkpoint / "model.safetensors"
    whole = load_file(file)
    name = next(name for name in whole if name.endswith("down_proj.weight"))
    save_file({other: weight for other, weight in whole.items() if other != name}, file, {"format": "pt"})
    assert name in refused(checkpoint, r"lacks 1 weights .*, which would be random: download it again")
    save_file(whole | {name: whole[name][:, :4].clone()}, file, {"format": "pt"})
    assert re.search(r"\[\d+, 4\] instead of", refused(checkpoint, "has of other shapes than its config.json says 1 weights"))
    save_file(whole | {name.replace("weight", "bias"): torch.ones(len(whole[name]))}, file, {"format": "pt"})
    assert name.replace("weight", "bias") in refused(checkpoint, r"has 1 weights that its config.json leaves out .*: download it again")
    save_file(whole | {"mtp.weight": torch.zeros(2)}, file, {"format": "pt"})
    assert load_model(checkpoint, "fp32"), "what is left over does no harm"
    assert "LOAD REPORT" not in caplog.text and not capsys.readouterr().err
    save_file({"head": torch.zeros(1)}, file, {"format": "pt"})
    refused(checkpoint, r"lacks \d\d weights \(.*, \.\.\.\), which would be random")


def test_layers_that_the_configuration_does_not_count_are_not_left_out(checkpoint):
    file = checkpoint / "model.safetensors"
    whole = load_file(file)
    more = {name.replace("layers.0.", "layers.9."): tensor.clone() for name, tensor in whole.items() if "layers.0." in name}
    save_file(whole | more, file, {"format": "pt"})
    refused(checkpoint, rf"has {len(more)} weights that its config.json leaves out \(model.layers.9..*: download it again")
    change(checkpoint, num_nextn_predict_layers=9)
    assert load_model(checkpoint, "fp32"), "layers that predict a further token stand behind the decoder's"


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized_weights_without_their_scales_are_refused(checkpoint, dtype):
    file = checkpoint / "model.safetensors"
    whole = load_file(file)
    name = next(name for name in whole if "q_proj" in name or "qkv_proj" in name)
    save_file(whole | {name: whole[name].to(dtype)}, file, {"format": "pt"})
    refused(checkpoint, r"has weights in .* \(.*\), and config.json does not say how they were quantized: download it again")


def test_a_shard_that_is_not_there_is_said(checkpoint):
    whole = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    names = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(whole)}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    save_file({name: whole[name] for name, shard in names.items() if "1-of" in shard}, checkpoint / "model-00001-of-00002.safetensors", {"format": "pt"})
    refused(checkpoint, r"cannot load .*model-00002-of-00002.*: check the checkpoint or download it again")


def test_a_model_that_transformers_does_not_know(checkpoint):
    change(checkpoint, model_type="phi9", auto_map={})
    said = refused(checkpoint, r"has model type `phi9`\): transformers \d+\.\d+\.\d+ does not know it: pip install -U transformers")
    assert said.count("does not") == 1
    change(checkpoint, model_type="vit")
    refused(checkpoint, r"a vit model writes no text\): use an instruct checkpoint")


def test_code_of_a_checkpoints_own_is_run_only_if_asked_for(checkpoint):
    change(checkpoint, model_type="own", auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"})
    (checkpoint / "own.py").write_text(
        "from transformers import PhiConfig, PhiForCausalLM\n"
        "class OwnConfig(PhiConfig):\n    model_type = 'own'\n"
        "class OwnModel(PhiForCausalLM):\n    config_class = OwnConfig\n"
    )
    refused(checkpoint, "brings code of its own: read it, then pass --trust-remote-code to run it")
    (checkpoint / "own.py").write_text("import a_package_that_nobody_has\n")
    refused(checkpoint, r"a_package_that_nobody_has.*: install the package", load=lambda folder, precision: load_model(folder, precision, trust_remote_code=True))
    (checkpoint / "own.py").write_text("from transformers import NothingOfThisName\n")
    refused(checkpoint, r"NothingOfThisName.*: its own code is for another version", load=lambda folder, precision: load_model(folder, precision, trust_remote_code=True))


@pytest.mark.parametrize(
    ("given", "precision", "said"),
    [
        ({"quant_method": "mxfp4"}, "int8", r"quantized already \(mxfp4\): use --precision bf16, which loads its weights as they are"),
        ({"quant_method": "fp8"}, "nf4", r"\(fp8\): use --precision bf16"),
        ({"quant_method": "awq", "bits": 4}, "int8", r"\(awq\): use --precision bf16"),
        ({"quant_method": "gptq", "bits": 4}, "fp8", r"\(gptq\): use --precision bf16"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "int8", "use --precision nf4"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bf16", "use --precision nf4"),
        ({"load_in_8bit": True}, "nf4", "use --precision int8"),
        ({"quant_method": "mxfp4"}, "bf16", None),
        ({"quant_method": "fp8"}, "fp8", None),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "nf4", None),
    ],
)
def test_quantized_weights_are_loaded_as_they_are(given, precision, said, checkpoint):
    change(checkpoint, quantization_config=given)
    if said:
        load = load_model if precision != "fp8" else lambda folder, name: require_precision(folder, load_config(folder), name)
        assert "download" not in refused(checkpoint, said, precision, load)
    else:
        require_precision(checkpoint, load_config(checkpoint), precision)


def test_quantized_weights_are_not_taken_for_plain_ones(checkpoint):
    """8-bit floats that count only with the scale beside them, as FP8 checkpoints have them."""
    file = checkpoint / "model.safetensors"
    whole = load_file(file)
    name = next(name for name in whole if name.endswith("down_proj.weight"))
    scale = whole[name].abs().max().float() / 448
    for key in [key for key in whole if re.search(r"layers.*proj.weight", key)]:
        rows, columns = (-(-size // 128) for size in whole[key].shape)
        whole[key.replace("weight", "weight_scale_inv")] = scale.expand(rows, columns).clone()
        whole[key] = (whole[key].float() / scale).to(torch.float8_e4m3fn)
    save_file(whole, file, {"format": "pt"})
    change(checkpoint, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"})
    loaded = load_model(checkpoint, "fp32").get_parameter(name).float()
    torch.testing.assert_close(loaded, whole[name].float() * scale, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize(("method", "said"), [("gptq", "cannot load .*optimum.*: install the package"), ("fp_quant", "its weights are quantized"), ("odd", "does not know .odd.: pip install -U")])
def test_quantized_weights_that_cannot_be_read_here(method, said, checkpoint):
    change(checkpoint, quantization_config={"quant_method": method, "bits": 4})
    assert "download" not in refused(checkpoint, said, "bf16")


def test_a_broken_tokenizer_is_said(checkpoint):
    (checkpoint / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": {"type": "WordPiece"}}))
    with pytest.raises(UserError, match=r"cannot load the tokenizer of .*: check the checkpoint or download it again") as error:
        load_tokenizer(checkpoint)
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_its_vocabulary(checkpoint):
    """transformers makes an empty one."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).unlink()
    change(checkpoint, model_type="qwen3")
    with pytest.raises(UserError, match=r"the tokenizer of .*model knows no words: its vocabulary .* is missing or empty: download the checkpoint again"):
        load_tokenizer(checkpoint)


def test_a_token_without_an_embedding(checkpoint):
    """A row with it is refused, alone and in training; as padding it does no harm; in the chat template it is another model's."""
    tokenizer, texts = load_tokenizer(checkpoint), ["Red", "Red <image>", "A red wall, please."]
    plain = SLMClient(Settings(slm_model_path=str(checkpoint)), precision="fp32", max_new_tokens=4)
    wanted = plain.generate([text_request("structured", text) for text in texts])
    tokenizer.add_special_tokens({"pad_token": "<padding>", "additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(checkpoint)
    client = SLMClient(Settings(slm_model_path=str(checkpoint)), precision="fp32", max_new_tokens=4)
    red, image, wall = client.generate([text_request("structured", text) for text in texts])
    assert (red.text, wall.text) == (wanted[0].text, wanted[2].text) and red.error is None
    assert image.finish_reason == "error" and "no embedding for the token '<image>'" in image.error
    told = tokenize(load_tokenizer(checkpoint), "structured", [Example(text, '{"a":1}') for text in texts], 1000)
    assert len(told.rows) == 2 and [(reason, count) for reason, count in told.untaught.items() if "<image>" in reason and count == 1]
    (checkpoint / "chat_template.jinja").write_text("<image>" + load_tokenizer(BASE).chat_template)
    with pytest.raises(UserError, match=r"the tokenizer of .*model is another model's \(the model has no embedding for the token '<image>', number \d+ of \d+\): download"):
        load_tokenizer(checkpoint)


def test_a_tokenizer_without_padding_or_end(checkpoint):
    """No token has to be there for padding."""
    file = checkpoint / "tokenizer_config.json"
    file.write_text(json.dumps({name: value for name, value in json.loads(file.read_text()).items() if name not in ("pad_token", "eos_token")}))
    clients = [SLMClient(Settings(slm_model_path=str(path)), precision="fp32", max_new_tokens=4) for path in (checkpoint, BASE)]
    rows = [text_request("structured", text) for text in ("Red", "A wall that is red, please.")]
    assert clients[0].tokenizer.pad_token_id is None
    without, plain = ([reply.text for reply in client.generate(rows)] for client in clients)
    assert without == plain


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ('{"eos_token_id": [1,', "cannot read .*generation_config.json .*: download it again"),
        ("[]", "generation_config.json is no JSON object: download it again"),
    ],
)
def test_a_generation_config_that_cannot_be_read_is_not_left_out(written, said, checkpoint):
    (checkpoint / "generation_config.json").write_text(written)
    refused(checkpoint, said)


def test_a_model_that_gives_no_numbers(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    name = next(name for name in weights if name.endswith("norm.weight"))
    save_file(weights | {name: weights[name] * float("nan")}, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"model gives no numbers \(NaN or infinity\): its weights are damaged"):
        SLMClient(Settings(slm_model_path=str(checkpoint)), precision="fp32")


def test_what_is_no_checkpoint_is_named(tmp_path, adapter):
    with pytest.raises(UserError, match="adapter is an adapter, no model: pass it with --adapter, and its base as SLM_MODEL_PATH"):
        model_path(Settings(slm_model_path=str(adapter)))
    with pytest.raises(UserError, match=r"adapter is an adapter, no model: name its base instead \(check --model\)$"):
        model_path(Settings(), adapter, "check --model")
    (tmp_path / "phi.gguf").write_bytes(b"GGUF")
    for path in (tmp_path, tmp_path / "phi.gguf"):
        with pytest.raises(UserError, match=rf"{path.name} is in GGUF: serve it .* and set SLM_BASE_URL"):
            model_path(Settings(), path)


def test_pickled_code_is_not_run(checkpoint, capfd):
    (checkpoint / "model.safetensors").unlink()
    torch.save({"a": Unwanted()}, checkpoint / "pytorch_model.bin")
    refused(checkpoint, "would run as code.*: use a checkpoint in safetensors")
    assert "it ran" not in capfd.readouterr().out


class Unwanted:
    def __reduce__(self):
        return print, ("it ran",)


@pytest.fixture
def adapter(tmp_path):
    made = get_peft_model(load_model(BASE, "fp32"), LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM"))
    made.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("fault", ["lacks weights", "spare weights", "other shapes", "other layers", "no weights", "cut", "another kind"])
def test_an_adapter_that_does_not_fit_is_said(fault, adapter):
    config, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    told, whole = json.loads(config.read_text()), load_file(weights)
    if fault == "lacks weights":  # PEFT warns, and goes on with half of the adapter
        save_file(dict(list(whole.items())[1:]), weights)
    elif fault == "spare weights":  # PEFT says nothing
        save_file(whole | {name.replace("o_proj", "qkv_proj"): weight.clone() for name, weight in whole.items()}, weights)
    elif fault == "other shapes":
        save_file({name: weight[:, :3].clone() for name, weight in whole.items()}, weights)
    elif fault == "other layers":
        config.write_text(json.dumps(told | {"target_modules": ["query_key_value"]}))
    elif fault == "no weights":
        weights.unlink()
    elif fault == "cut":
        weights.write_bytes(weights.read_bytes()[:100])
    else:
        config.write_text(json.dumps(told | {"peft_type": "NO_SUCH_KIND"}))
    with pytest.raises(UserError, match=r"the adapter .* does not fit the model .*: train it again on this model") as error:
        with_adapter(load_model(BASE, "fp32"), adapter, BASE)
    assert "\n" not in str(error.value)


def test_an_adapter_that_fits(adapter):
    assert with_adapter(load_model(BASE, "fp32"), adapter, BASE).peft_config["default"].r == 2


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"trainable_token_indices": [7, 8]}, "trained tokens"),
        ({"trainable_token_indices": {"embed_tokens": [7]}}, "trained tokens"),
        ({"modules_to_save": ["lm_head"]}, "whole modules that were trained"),
        ({"use_dora": True}, "DoRA"),
        ({"trainable_token_indices": None, "modules_to_save": None, "use_dora": False}, None),
    ],
)
def test_vllm_takes_lora_alone(more, what, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 8} | more))
    if what is None:
        assert lora_rank(tmp_path) == 8
    else:
        with pytest.raises(UserError, match=f"vllm takes no adapters with {what}: merge .* by merge_adapter.py, or use --engine transformers"):
            lora_rank(tmp_path)


def test_the_memory_of_weights_is_that_of_their_kinds(tmp_path):
    """Linear layers are quantized; embeddings, experts, norms and what is packed already are not."""
    tensors = {
        "model.embed_tokens.weight": torch.zeros(10, 10, dtype=torch.bfloat16),
        "model.layers.0.q_proj.weight": torch.zeros(10, 20, dtype=torch.float32),
        "model.layers.0.mlp.experts.3.up_proj.weight": torch.zeros(10, 30, dtype=torch.bfloat16),
        "model.norm.weight": torch.zeros(10, dtype=torch.bfloat16),
    }
    save_file(tensors, tmp_path / "model-1.safetensors")
    full = 2 * (100 + 300 + 10)
    for precision, wanted in (("bf16", full + 400), ("int8", full + 200), ("nf4", full + 120), ("fp32", 2 * full + 800)):
        assert weight_bytes(tmp_path, precision) == wanted
    save_file({"model.layers.0.mlp.blocks": torch.zeros(10, 30, dtype=torch.uint8)}, tmp_path / "model-2.safetensors")
    save_file({"model.layers.0.k_proj.weight": torch.zeros(10, 7).to(torch.float8_e4m3fn)}, tmp_path / "model-3.safetensors")
    assert weight_bytes(tmp_path, "bf16") == full + 400 + 300 + 70
    (tmp_path / "model-3.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"cannot load .*model-3.safetensors .*: download it again"):
        weight_bytes(tmp_path, "bf16")


def test_pickled_shards_count(tmp_path):
    for name, size in (("pytorch_model-00001-of-00002.bin", 600), ("pytorch_model-00002-of-00002.bin", 400), ("training_args.bin", 99)):
        (tmp_path / name).write_bytes(bytes(size))
    assert [weight_bytes(tmp_path, precision) for precision in ("bf16", "int8", "nf4", "fp32")] == [1000, 500, 300, 2000]


# -- In the background -----------------------------------------------------------------------------------------------------------


def test_hashes_in_the_background_are_the_folders_own(checkpoint):
    change(checkpoint, other=1)
    with BackgroundHashes([BASE, checkpoint]) as hashes:
        assert hashes.result() == [files_hash(BASE), files_hash(checkpoint)]
    with BackgroundHashes([checkpoint / "none"]) as hashes, pytest.raises(FileNotFoundError):
        hashes.result()


def test_an_error_ends_the_hashing(checkpoint, monkeypatch):
    hashed, block_hash = [], loading._block_hash
    left = threading.Event()

    def waiting(block, stop):
        hashed.append(block)
        left.wait()
        return block_hash(block, stop)

    monkeypatch.setattr(loading, "HASH_BLOCK", 1 << 10)  # bytes: some ten thousand blocks
    monkeypatch.setattr(loading, "_block_hash", waiting)
    with pytest.raises(UserError), BackgroundHashes([checkpoint]) as hashes:
        raise UserError("no model")
    left.set()
    with pytest.raises(CancelledError):
        hashes.result()
    with pytest.raises(CancelledError):
        block_hash((checkpoint / "config.json", 0), hashes._stop)


@pytest.mark.parametrize("given", [None, "0", "1"])
def test_the_environment_is_as_it_was_once_bitsandbytes_is_imported(given, monkeypatch):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False) if given is None else monkeypatch.setenv("TORCHDYNAMO_DISABLE", given)
    import_bitsandbytes()
    assert os.environ.get("TORCHDYNAMO_DISABLE") == given


def test_a_folder_is_hashed_once_until_a_file_changes(tmp_path, monkeypatch):
    read, block_hash = [], loading._block_hash
    monkeypatch.setattr(loading, "_block_hash", lambda block, stop: read.append(block[0].name) or block_hash(block, stop))
    folder = shutil.copytree(BASE, tmp_path / "model")
    monkeypatch.setattr(loading, "SETTLED", -(10**12))  # nothing is new
    first = files_hash(folder)
    assert "model.safetensors" in read
    read.clear()
    assert files_hash(folder) == first and read == []
    weights = folder / "model.safetensors"
    told, content = weights.stat(), bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(told.st_atime_ns, told.st_mtime_ns))  # as a copy that keeps times does
    changed = files_hash(folder)
    assert changed != first and "model.safetensors" in read
    monkeypatch.setattr(loading, "SETTLED", 10**15)  # all is new
    monkeypatch.setattr(loading, "_HASHES", {})
    for _ in range(2):
        read.clear()
        assert files_hash(folder) == changed and "model.safetensors" in read, "what was just written may be written again"


def test_training_by_a_recipe_reads_the_base_once(tmp_path, monkeypatch):
    from slm_swap.evaluating.recipe import Recipe
    from slm_swap.tuning.hyperparameters import Hyperparameters
    from slm_swap.tuning.training import identity

    folder, read, block_hash = shutil.copytree(BASE, tmp_path / "model"), [], loading._block_hash
    monkeypatch.setattr(loading, "SETTLED", -(10**12))
    monkeypatch.setattr(loading, "_block_hash", lambda block, stop: read.append(block[0].name) or block_hash(block, stop))
    Recipe(tmp_path / "recipe.json", "toolcall", {}, str(folder), [files_hash(BASE)], None).check_base(folder)
    read.clear()
    told = identity("toolcall", folder, Hyperparameters(), "trl", {}, None, Launch())
    assert told["base_model"]["files_sha256"] == files_hash(BASE) and "model.safetensors" not in read
