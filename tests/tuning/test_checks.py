"""What is looked at before training, and what an adapter's folder tells."""

import json
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, FalconConfig, Gemma3Config, GPT2Config, Mamba2Config, Phi3Config, Qwen3Config

from slm_swap.common.errors import UserError
from slm_swap.common.settings import ROOT
from slm_swap.rows.examples import read_examples
from slm_swap.scoring.tracks import TRACKS
from slm_swap.tuning.backends import linear_names
from slm_swap.tuning.checks import (
    check_test_split,
    head_options,
    length_report,
    lora_reach,
    memory_needed,
    memory_warning,
    reach_report,
)  # fmt: skip
from slm_swap.tuning.hyperparameters import PRESETS, Hyperparameters
from slm_swap.tuning.presets import choose_preset
from slm_swap.tuning.record import plot
from slm_swap.tuning.step_graphs import SPARE, SPARE_BYTES
from slm_swap.tuning.training import packages_refuse, train, warn_of_memory
from tests.support.tiny_training import SIZES, VOCABULARY, tiny_config, tiny_family, tiny_gemma3_with_vision
from tests.support.training_rows import BASE, INPUTS, QUICK, ROWS

PHI4_MINI = Phi3Config(
    hidden_size=3072, intermediate_size=8192, num_hidden_layers=32, num_attention_heads=24, num_key_value_heads=8, vocab_size=200_064,
    tie_word_embeddings=True, pad_token_id=0,
)  # fmt: skip
QWEN3_4B = Qwen3Config(
    hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=151_936,
    tie_word_embeddings=True,
)  # fmt: skip
SHAPES = {"phi-4-mini": PHI4_MINI, "qwen3-4b": QWEN3_4B}
FAST = Hyperparameters(**PRESETS["fast"])


def test_a_prompt_of_the_test_split_is_not_trained_on(write_rows, tmp_path):
    train = write_rows("train.jsonl", [row.to_json() for row in ROWS[:4]])
    rows = read_examples(train)
    assert check_test_split(train, rows, None) is None, "no test split is known"
    clean = write_rows("clean.jsonl", [row.to_json() for row in ROWS[4:]])
    assert check_test_split(train, rows, clean) == clean
    beside = write_rows("test.jsonl", [{"prompt": ROWS[5].prompt, "completion": "x"}, {"prompt": ROWS[2].prompt, "completion": "x"}])
    with pytest.raises(UserError, match=r"1 prompts of .*train.jsonl stand in the test split too \(first .*train.jsonl:3 and .*test.jsonl:2\)"):
        check_test_split(train, rows, None)
    assert check_test_split(train, rows, clean) == clean, "--test goes before what lies beside"
    beside.unlink()
    with pytest.raises(UserError, match="cannot read"):
        check_test_split(train, rows, tmp_path / "none.jsonl")


def test_lengths_are_told_with_the_limit_that_keeps_all():
    assert length_report([10, 20, 30], [], 64) == "3 rows of 10 to 30 tokens, 20 on average; --max-length 64 cuts none"
    assert length_report([10], [90, 70], 64).endswith("; 2 longer than 64 are left out (--max-length 90 keeps them all)")


def test_the_estimate_counts_phi4_minis_weights():
    needed = memory_needed(PHI4_MINI, FAST, 600)
    assert needed["weights"] == pytest.approx(3.836e9 * 2 / 2**30, rel=0.01)
    assert needed["LoRA"] == pytest.approx(92.27e6 * 16 / 2**30, rel=0.01)
    assert memory_needed(PHI4_MINI, replace(FAST, precision="int8"), 600)["weights"] < 0.7 * needed["weights"]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "gemma3", "gpt_neox", "qwen3_5", "lfm2"])
def test_the_estimate_counts_the_weights_of_other_families(family):
    """Sizes at which what the estimate leaves out (norms, biases, convolutions, routers) is little; experts stay in 16 bits."""
    config = tiny_config(family, hidden_size=512, intermediate_size=1024, head_dim=128)
    with torch.device("meta"):
        real = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    needed = memory_needed(config, FAST, 600)
    assert needed["weights"] * 2**30 / 2 == pytest.approx(real, rel=0.2)


def test_experts_are_not_quantized():
    config = tiny_config("qwen3_moe", num_experts=64)
    halved = memory_needed(config, replace(FAST, precision="int8"), 600)["weights"] / memory_needed(config, FAST, 600)["weights"]
    assert 0.9 < halved < 1


def test_the_estimate_looks_into_a_larger_configuration():
    text = tiny_config("gemma3")
    whole = Gemma3Config(text_config=text.to_dict())
    assert memory_needed(whole, FAST, 600) == memory_needed(text, FAST, 600)


def test_no_estimate_is_said(monkeypatch, tmp_path):
    Mamba2Config(hidden_size=64, num_heads=8, head_dim=16).save_pretrained(tmp_path)
    said = []
    warn_of_memory(tmp_path, FAST, 600, torch.device("cuda"), said.append)
    assert said == ["no estimate of the memory that training takes: the model's configuration lacks intermediate_size"]


@pytest.mark.parametrize(
    ("family", "changed", "wanted"),
    [
        ("llama", {}, (1.0, None)),
        ("granite", {"logits_scaling": 4.0}, (0.25, None)),
        ("hyperclovax", {"logits_scaling": 4.0}, (4.0, None)),
        ("cohere2", {}, (0.0625, None)),
        ("falcon_h1", {}, (0.3, None)),
        ("gemma2", {}, (1.0, 5.0)),
        ("gpt_oss", {"output_router_logits": True}, (1.0, None)),
    ],
)
def test_a_configuration_tells_what_becomes_of_logits(family, changed, wanted):
    assert head_options(tiny_config(family, **changed)) == wanted


def test_an_unknown_head_is_refused_before_the_model_is_loaded(tmp_path):
    """There are no weights that could be loaded."""
    tiny_config("llama", final_logits_power=2.0, num_logits_to_keep=5).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^the model's output head has final_logits_power, which --backend trl does not know: use --backend unsloth"):
        train("structured", tmp_path, ROWS, ROWS[:1], tmp_path / "adapter", QUICK, "trl", INPUTS)


def test_a_package_that_refuses_is_one_line():
    from peft import LoraConfig, get_peft_model

    with pytest.raises(UserError, match=r"^peft does not train this model \(Target modules .* not found in the base model"), packages_refuse():
        get_peft_model(tiny_family("llama"), LoraConfig(target_modules=["nothing"]))
    with pytest.raises(ValueError, match="our own"), packages_refuse():
        raise ValueError("our own")


def lora_on(model):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, target_modules=linear_names(model), task_type="CAUSAL_LM"))


def test_what_lora_reaches_is_said():
    dense = lora_reach(lora_on(tiny_family("llama")))
    layers = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96)
    assert dense == {
        "modules": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"], "left_out": [], "experts": 0.0,
        "share": round(layers / (layers + 2 * VOCABULARY * 64 + 5 * 64), 4),
    }  # fmt: skip
    assert reach_report(dense) == []
    reach = lora_reach(lora_on(tiny_family("qwen3_moe")))
    experts, attention = 2 * 4 * 3 * 64 * 32, 2 * 2 * (64 * 64 + 64 * 32)
    total = experts + attention + 2 * VOCABULARY * 64 + 5 * 64 + 2 * 4 * 64 + 2 * 2 * 16
    assert reach["experts"] == round(experts / total, 4) and reach["share"] == round(attention / total, 4)
    (line,) = reach_report(reach)
    assert line == (
        f"LoRA reaches k_proj, o_proj, q_proj, v_proj, {attention / total:.1%} of the weights: the experts, {experts / total:.1%} of them, are no "
        "linear layers and stay as they are"
    )


def test_lora_goes_on_the_text_decoder_without_its_head():
    assert linear_names(tiny_family("gpt_neox_japanese")) == ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"], "no embed_out"
    assert linear_names(AutoModelForCausalLM.from_config(FalconConfig(**SIZES))) == ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"], (
        "linear layers of Falcon's own making"
    )
    with pytest.raises(UserError, match=r"^GPT2LMHeadModel has no linear layers for LoRA to go onto: use another model"):
        linear_names(AutoModelForCausalLM.from_config(GPT2Config(n_embd=64, n_layer=1, n_head=4)))
    model = tiny_gemma3_with_vision()
    wanted = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "language_model" in name}
    names = linear_names(model)
    assert {name for name, _ in model.named_modules() if re.fullmatch(names, name)} == wanted and len(wanted) == 14
    assert "vision" not in names and "lm_head" not in names


@pytest.mark.parametrize(("family", "left"), [("falcon_h1", "out_proj"), ("llama4", "router")])
def test_layers_that_lora_does_not_fit_are_left_out_and_said(family, left):
    model = tiny_family(family)
    assert left not in linear_names(model)
    reach = lora_reach(lora_on(model))
    assert reach["left_out"] == [left]
    assert reach_report(reach)[-1].startswith(f"LoRA leaves {left} as they are")


MEASURED = {
    f"{path.stem} {name}": (report["shape"], told)
    for path in (ROOT / "benchmarks/results").glob("train*.json")
    for report in [json.loads(path.read_text())]
    for name, told in report["configurations"].items()
    if "peak_gib" in told
}


@pytest.mark.parametrize("name", MEASURED)
def test_the_estimate_is_what_was_measured_on_a_gpu(name):
    """The longest of the benchmark's rows has 599 tokens. Too little would be found out late; Unsloth offloads, and takes less."""
    shape, measured = MEASURED[name]
    told, peak = measured["hyperparameters"], measured["peak_gib"]
    step_packs = measured.get("step_packs", False)
    changed = {"compile": "yes" if told["packing"] or step_packs else "no", "step_packs": "yes" if step_packs else "no"}
    changed |= {"gradient_checkpointing": measured.get("gradient_checkpointing", told["gradient_checkpointing"])}
    if step_packs:  # no step of the benchmark's rows, in 200 random orders of them, had more than 2,721 tokens; eight of the longest would have 4,792
        changed |= {"pack_length": 2816, "max_length": 599}
    parameters = Hyperparameters(**told | changed)
    needed = sum(memory_needed(SHAPES[shape], parameters, 599).values())
    if step_packs and not name.startswith("train_8bit "):  # since then, where memory is free, graphs take that of the longest pack that there could be once more
        needed += SPARE * memory_needed(SHAPES[shape], replace(parameters, pack_length=told["pack_length"]), 599)["activations"] + SPARE_BYTES / 2**30
    # That process met its longest packs late, and its allocator still kept the pieces of shorter ones, which are given back since.
    kept = 0.0 if name == "train_documented documented:processes=2" else 0.95 * peak["reserved"]
    assert max(peak["allocated"], kept) < needed < 1.4 * peak["reserved"]


@given(st.sampled_from(["fast", "rtx3090", "documented"]), st.integers(16, 2048))
def test_the_flags_that_are_named_make_it_less(preset, longest):
    parameters = Hyperparameters(**PRESETS[preset])
    needed = sum(memory_needed(PHI4_MINI, parameters, longest).values())
    assert memory_warning({"weights": 5.0, "LoRA": 1.0}, 6.0, parameters) is None
    warning = memory_warning(memory_needed(PHI4_MINI, parameters, longest), 1.0, parameters)
    assert f"{needed:.1f} GiB" in warning and "1.0 are free" in warning
    changes = {
        "--gradient-checkpointing": {"gradient_checkpointing": True},
        "--pack-length 4096": {"pack_length": 4096},
        "--precision nf4": {"precision": "nf4"},
    }
    named = [change for flag, change in changes.items() if flag in warning]
    assert named or preset == "documented"
    for change in named:
        assert sum(memory_needed(PHI4_MINI, replace(parameters, **change), longest).values()) < needed, change


def test_a_preset_is_chosen_by_the_memory_of_the_smallest_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # where layers are compiled
    PHI4_MINI.save_pretrained(tmp_path)
    chosen = {gib: choose_preset(tmp_path, {}, [80.0, gib])[0] for gib in (12.0, 23.6, 31.8, 44.5, 79.2, 139.8)}
    assert chosen == {12.0: "documented", 23.6: "rtx3090", 31.8: "rtx3090", 44.5: "fast", 79.2: "fast", 139.8: "fast"}
    assert choose_preset(tmp_path, {}, []) == ("documented", "there is no CUDA GPU")
    assert "of a GPU's 23.6 GiB" in choose_preset(tmp_path, {}, [23.6])[1]
    assert choose_preset(tmp_path, {"pack_length": 4096}, [79.2])[0] == "fast"
    assert choose_preset(tmp_path, {"max_length": 4096}, [23.6])[0] == "documented", "such rows do not fit into packs of 2,048"


def test_hyperparameters_of_evaluations_need_evaluations():
    for wrong in ({"eval_generate": 4}, {"early_stopping": 2}, {"best_by": "exact_match_rate"}):
        with pytest.raises(UserError, match="add --eval-steps N"):
            Hyperparameters(**wrong)
    with pytest.raises(UserError, match="add --eval-generate N"):
        Hyperparameters(eval_steps=5, best_by="exact_match_rate")
    chosen = Hyperparameters(eval_steps=5, eval_generate=5, best_by="exact_match_rate")
    chosen.check_metric(TRACKS["structured"])
    with pytest.raises(UserError, match="no metric of these toolcall rows: choose one of loss, valid_call_rate"):
        chosen.check_metric(TRACKS["toolcall"])
    decided = Hyperparameters(eval_steps=5, eval_generate=5, best_by="decision_match_rate")
    decided.check_metric(TRACKS["toolcall"].with_metrics(["decision_match_rate"]))  # rows with a call due and rows without
    with pytest.raises(UserError, match="no metric of these toolcall rows"):
        decided.check_metric(TRACKS["toolcall"])


def test_the_plot_shows_losses_and_metrics(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = {}

    def remember(figure, path, **_):
        axes = figure.axes
        drawn[path.name] = [{line.get_label(): line.get_xydata().tolist() for line in axis.lines} for axis in axes]

    monkeypatch.setattr(Figure, "savefig", remember)
    log = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 1.5}]
    plot(log, tmp_path / "losses")
    plot([*log[:2], log[2] | {"eval_exact_match_rate": 0.5, "eval_field_f1": 0.75, "eval_field_f1_micro": 0.8}], tmp_path / "metrics")
    losses = {"train": [[1, 2.0], [2, 1.0]], "validation": [[2, 1.5]]}
    assert drawn == {"losses": [losses], "metrics": [losses, {"exact_match_rate": [[2, 0.5]], "field_f1": [[2, 0.75]]}]}


def test_an_adapters_folder_tells_how_it_was_made(tmp_path):
    from slm_swap.clients.loading import files_hash

    said = []
    out = tmp_path / "adapter"
    train("structured", BASE, ROWS[:4], ROWS[4:6], out, replace(QUICK, epochs=2, max_length=170), "trl", INPUTS, say=said.append)
    told = json.loads((out / "training_info.json").read_text())
    assert told["base_model"]["files_sha256"] == files_hash(BASE) and len(told["code"]["commit"]) == 40
    assert {"torch", "peft", "trl"} <= told["packages"].keys() and told["hardware"]["cores"]
    assert told["peak_memory_gib"]["process"] > 0.1 and set(told["seconds"]) == {"train", "evaluate", "total"}
    assert told["seconds"]["train"] <= told["seconds"]["total"]
    wanted = told["tokens"]["train"] * 2 / told["seconds"]["train"]
    assert told["tokens_per_second"] == pytest.approx(wanted, rel=0.01)
    assert (out / "training_log.png").read_bytes().startswith(b"\x89PNG")
    assert said and said[0].startswith(f"{told['rows']['train']} rows of ")
