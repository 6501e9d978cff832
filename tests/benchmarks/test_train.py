"""The training benchmark runs, on a tiny model; its figures are for GPUs."""

import importlib.util
import json
import sys

import pytest

from slm_swap.common.errors import UserError
from slm_swap.common.settings import ROOT
from slm_swap.tuning.hyperparameters import Hyperparameters
from slm_swap.tuning.packing import IGNORED
from tests.support.processes import run_python

SCRIPT = ROOT / "benchmarks/train.py"
BROKEN = "fast:precision=fp32,pack_length=2048,scheduler=none"


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(SCRIPT.parent))  # as for a script that is run
    spec = importlib.util.spec_from_file_location("train_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(SCRIPT.parent))
    return module


def test_a_tiny_model_is_measured_and_a_failure_is_told(tmp_path):
    flags = ["--shape", "tiny", "--configs", "fast:precision=fp32,pack_length=2048", BROKEN, "--rows", "24", "--seconds", "0.2"]
    done = run_python(SCRIPT, *flags, "--scratch", tmp_path, "--out", tmp_path / "train.json")
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads((tmp_path / "train.json").read_text())
    fast = told["configurations"]["fast:precision=fp32,pack_length=2048"]
    assert fast["tokens_per_second"] > fast["rows_per_second"] > 0 and fast["steps"] > 0
    assert 12 * 60 < fast["tokens_per_micro_batch"] <= 2048 and 0 < fast["mean_loss"] < 20
    assert fast["hyperparameters"]["packing"] is True and told["hardware"]["cores"]
    assert "ValueError" in told["configurations"][BROKEN]["error"] and "failed" in done.stdout


def test_the_workload_is_the_documented_one(benchmark):
    rows = benchmark.make_rows(2000, 200_064)
    lengths = [len(row["input_ids"]) for row in rows]
    completions = [sum(label != IGNORED for label in row["labels"]) for row in rows]
    assert 200 < sum(lengths) / len(rows) < 215 and 46 < sum(completions) / len(rows) < 52
    assert min(completions) >= 12 and max(completions) <= 256 and max(lengths) <= 856
    assert rows == benchmark.make_rows(2000, 200_064)


def test_a_configuration_may_be_changed(benchmark):
    assert benchmark.parse_config("documented") == benchmark.Configuration("trl", Hyperparameters(epochs=1000.0))
    told = benchmark.parse_config("fast:pack_length=4096,gradient_checkpointing=true,compile=no,processes=2,zero2=yes")
    assert told.backend == "trl" and told.parameters.packing and told.parameters.gradient_checkpointing
    assert (told.parameters.pack_length, told.parameters.compile, told.processes, told.zero2) == (4096, "no", 2, True)
    for wrong, said in (("slow", "choose among"), ("fast:speed=9", "choose among"), ("fast:seed=x", "no int"), ("fast:zero2=yes", "2 or more")):
        with pytest.raises(UserError, match=said):
            benchmark.parse_config(wrong)


def measured(tmp_path, config: str, rows: int) -> dict:
    """What is told of one configuration of the tiny model."""
    flags = ["--shape", "tiny", "--configs", config, "--rows", str(rows), "--seconds", "0.2", "--scratch", tmp_path, "--out", tmp_path / "train.json"]
    done = run_python(SCRIPT, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((tmp_path / "train.json").read_text())["configurations"][config]


def test_two_processes_are_measured_together(tmp_path):
    told = measured(tmp_path, "fast:precision=fp32,pack_length=2048,processes=2", rows=480)
    assert (told["processes"], told["zero2"]) == (2, False) and told["steps"] > 0
    tokens = told["tokens_per_second"] * told["seconds"]["measured"]  # with two decimals of a second
    assert tokens == pytest.approx(told["steps"] * 2 * told["tokens_per_micro_batch"], rel=0.1)


def test_an_epochs_last_step_may_have_fewer_micro_batches(tmp_path):
    """24 rows are 3 packs, so that every step, meant to be of 8, is an epoch."""
    told = measured(tmp_path, "fast:precision=fp32,pack_length=2048,gradient_accumulation=8", rows=24)
    assert told["rows_per_second"] * told["seconds"]["measured"] == pytest.approx(24 * told["steps"], rel=0.1)
