"""The rows of an optimizer step as packs: the same steps, gradients and weights as one by one."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from slm_swap.common.errors import UserError
from slm_swap.tuning import model_checks
from slm_swap.tuning.checks import UNPACKED, memory_needed, without_needless_checkpointing
from slm_swap.tuning.hyperparameters import PRESETS, Hyperparameters
from slm_swap.tuning.packing import IGNORED, StepPacks
from slm_swap.tuning.training import read_config, train
from tests.support.training_rows import BASE, INPUTS, QUICK, ROWS
from tests.tuning.test_launches import on_two_ranks, train_rank

SHAPED = [replace(row, prompt=row.prompt + " please" * more, id=f"{row.id}-{more}") for more in (0, 3, 90) for row in ROWS][:19]
ONE_BY_ONE = replace(QUICK, batch_size=1, gradient_accumulation=8, epochs=2, lora_dropout=0.0, learning_rate=1e-3, step_packs="no")


def trained(out, parameters, rows=SHAPED, **options) -> tuple[torch.Tensor, dict, list[dict]]:
    """The adapter's weights, what is told of it, and its log."""
    info = train("structured", BASE, rows, rows[:3], out, parameters, "trl", INPUTS, **options)
    weights = load_file(out / "adapter_model.safetensors")
    return torch.cat([weights[name].flatten() for name in sorted(weights)]), info, [json.loads(line) for line in (out / "training_log.jsonl").open()]


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("one") / "adapter", ONE_BY_ONE)


@pytest.mark.parametrize(
    "changed",
    [{}, {"gradient_checkpointing": True}, {"pack_length": 600}, {"batch_size": 4, "gradient_accumulation": 2}, {"batch_size": 8, "gradient_accumulation": 1}],
)
def test_steps_in_packs_are_the_steps_one_by_one(one_by_one, tmp_path, changed):
    """Of 19 rows the third step of an epoch has 3, of which one alone is long; packs of 600 tokens are several a step."""
    wanted, told, log = one_by_one
    found, info, points = trained(tmp_path / "adapter", replace(ONE_BY_ONE, step_packs="yes", **changed))
    assert info["computed"] == {"step_packs": True, "gradient_checkpointing": "gradient_checkpointing" in changed} and not told["computed"]["step_packs"]
    assert info["steps"] == told["steps"] == 6 and info["tokens"] == told["tokens"]
    for point, other in zip(points, log, strict=True):
        for name in ("step", "loss", "grad_norm", "learning_rate"):
            assert point[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6)
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


def test_all_rows_of_a_step_are_in_its_packs():
    rows = [{"input_ids": [number] * size, "labels": [IGNORED] + [number] * (size - 1)} for number, size in enumerate((5, 9, 3, 7, 8), 1)]
    packs = StepPacks(room=16, rows=6, longest=9, pad_token=0, multiple=8, targets=4)(rows)
    assert len(packs) == 3 and all(pack["input_ids"].shape[1] % 8 == 0 and pack["input_ids"].shape[1] <= 16 for pack in packs)
    assert sorted(token for pack in packs for token in pack["input_ids"][0].tolist() if token) == sorted(token for row in rows for token in row["input_ids"])
    assert {pack["cu_seq_lens_q"].shape for pack in packs} == {(8,)} and {pack["max_length_q"] for pack in packs} == {9}
    assert sum((pack["targets"] != IGNORED).sum() for pack in packs) == sum(len(row["labels"]) - 1 for row in rows)
    (exact,) = StepPacks(room=40, rows=6, longest=9, pad_token=0)(rows)
    assert exact["input_ids"].shape == (1, 32)


@pytest.mark.parametrize(("precision", "near"), [("fp32", 1e-4), ("int8", 2e-2)])  # 8-bit weights come with 16-bit activations
def test_two_processes_pack_each_their_own_rows(tmp_path, precision, near):
    parameters = replace(ONE_BY_ONE, gradient_accumulation=2, epochs=1, step_packs="yes", pack_length=200, precision=precision)
    found = on_two_ranks(train_rank, tmp_path / "two", parameters)
    alone, info, _ = trained(tmp_path / "one", replace(parameters, gradient_accumulation=4, step_packs="no"), ROWS)
    weights = load_file(tmp_path / "two/adapter_model.safetensors")
    two = torch.cat([weights[name].flatten() for name in sorted(weights)])
    assert (two - alone).norm() < near * alone.norm()
    for _, told, _ in found:
        assert told["eval_loss"] == pytest.approx(info["eval_loss"], rel=near)


def test_a_model_whose_packed_rows_see_each_other_is_trained_one_by_one(one_by_one, tmp_path, monkeypatch):

    def refuse(*_):
        raise UserError(f"packed rows see each other in this model: {UNPACKED}")

    monkeypatch.setattr(model_checks, "check_packing", refuse)
    with pytest.raises(UserError, match=r"a step cannot be packed \(packed rows see each other in this model\): use --step-packs no"):
        trained(tmp_path / "asked", replace(ONE_BY_ONE, step_packs="yes"))
    monkeypatch.setattr(Hyperparameters, "step_packed", True)
    # By the estimate for packs, memory suffices without checkpointing.
    monkeypatch.setattr("slm_swap.tuning.training.lean_or_fast", lambda base, parameters, longest, arguments, say: setattr(arguments, "gradient_checkpointing", False))
    said = []
    found, info, _ = trained(tmp_path / "adapter", replace(ONE_BY_ONE, step_packs="auto", gradient_checkpointing=True), say=said.append)
    assert "a step's rows are computed 1 at a time, not as packs: packed rows see each other in this model" in said
    assert "gradient checkpointing stays: memory sufficed for packs without it" in said
    assert torch.equal(found, one_by_one[0]) and info["computed"] == {"step_packs": False, "gradient_checkpointing": True}


def test_a_killed_run_in_packs_goes_on_to_the_same_adapter(tmp_path, monkeypatch):
    from slm_swap.tuning.checkpoints import Checkpoints

    parameters, complete = replace(ONE_BY_ONE, step_packs="yes", lora_dropout=0.1, gradient_accumulation=3, pack_length=600, eval_steps=4), Checkpoints.complete
    whole, info, _ = trained(tmp_path / "whole", parameters, save_steps=5)

    def complete_and_die(*args):
        complete(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "complete", complete_and_die)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "killed", parameters, save_steps=5)
    monkeypatch.undo()
    again, told, _ = trained(tmp_path / "killed", parameters, save_steps=5, resume=True)
    assert torch.equal(again, whole) and told["sessions"] == 2 and told["steps"] == info["steps"] == 14


def test_the_setting_decides_where_steps_are_packed(monkeypatch):
    assert not Hyperparameters().step_packed and Hyperparameters(step_packs="yes").step_packed
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for parameters in (Hyperparameters(), Hyperparameters(precision="bf16")):
        assert parameters.step_packed and parameters.compiled
    assert Hyperparameters(precision="nf4").step_packed and not Hyperparameters(precision="nf4").compiled
    for parameters in (Hyperparameters(precision="fp32"), Hyperparameters(step_packs="no"), Hyperparameters(**PRESETS["fast"])):
        assert not parameters.step_packed


def test_checkpointing_is_left_out_only_where_memory_suffices():
    config, parameters = read_config(BASE), Hyperparameters(step_packs="yes")
    needed = sum(memory_needed(config, replace(parameters, gradient_checkpointing=False), 500).values())
    assert needed > sum(memory_needed(config, parameters, 500).values())
    assert not without_needless_checkpointing(config, parameters, 500, needed / 0.79).gradient_checkpointing
    assert without_needless_checkpointing(config, parameters, 500, needed / 0.81) == parameters
    alone = replace(parameters, step_packs="no")
    assert without_needless_checkpointing(config, alone, 500, 1e9) == alone
