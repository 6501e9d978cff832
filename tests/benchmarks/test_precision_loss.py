"""What the benchmark of precisions makes of its runs, and that it runs."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks.precision_loss import mean, mean_loss, summary, train_undoubled
from slm_swap.common.settings import PACKAGE, ROOT
from slm_swap.tuning.packing import IGNORED
from tests.support.processes import run_python


def one_run(trained: float, over: float, exact: float) -> dict:
    return {"loss_as_trained": trained, "loss_over_bf16": over, "metrics": {"args_exact_rate": exact}}


def test_differences_are_those_to_the_same_seed():
    runs = {"bf16": {"1": one_run(1.0, 2.0, 0.5), "2": one_run(3.0, 6.0, 0.7)}, "fp8": {"2": one_run(3.4, 6.0, 0.6), "1": one_run(1.2, 2.4, 0.6)}}
    told = summary(runs, "bf16", "args_exact_rate")
    assert told["bf16"]["loss_as_trained"] == {"mean": 2.0, "standard_error": pytest.approx(1.0), "seeds": 2}
    assert all(value["mean"] == value["standard_error"] == 0 for value in told["bf16"]["from_the_reference"].values())
    apart = told["fp8"]["from_the_reference"]
    assert apart["loss_as_trained"] == {"mean": pytest.approx(0.15), "standard_error": pytest.approx(0.05), "seeds": 2}  # 0.4 and 0.2 of 2
    assert apart["loss_over_bf16"]["mean"] == pytest.approx(0.05)  # 0 and 0.4 of 4
    assert apart["args_exact_rate"]["mean"] == pytest.approx(0.0) and apart["args_exact_rate"]["standard_error"] == pytest.approx(0.1)  # -0.1 and 0.1


def test_one_seed_has_no_standard_error():
    assert mean([0.25]) == {"mean": 0.25, "standard_error": None, "seeds": 1}


def test_the_loss_is_the_mean_over_all_targets():
    """Rows count by their targets: three for which all of 8 tokens are as likely, and one that is told with a logit of 2."""

    def model(input_ids, use_cache):
        logits = torch.zeros(1, input_ids.shape[1], 8)
        logits[0, 0, 5] = 2.0 if input_ids[0, 0] == 7 else 0.0
        return SimpleNamespace(logits=logits)

    model.device = torch.device("cpu")
    rows = [{"input_ids": [1, 2, 3, 4, 5], "labels": [IGNORED, IGNORED, 3, 4, 5]}, {"input_ids": [7, 5], "labels": [IGNORED, 5]}]
    assert mean_loss(model, rows) == pytest.approx((3 * math.log(8) + math.log(7 + math.e**2) - 2) / 4)


def test_undoubled_is_the_stage_script_without_such_columns(monkeypatch):
    from slm_swap.tuning import fp8

    ran = []
    monkeypatch.setattr(fp8, "columns_to_double", fp8.columns_to_double)  # put back afterwards
    monkeypatch.setattr("sys.argv", [])
    monkeypatch.setattr("runpy.run_path", lambda path, run_name: ran.append((path, run_name, *sys.argv[1:])))
    train_undoubled(["--seed", "3"])
    assert ran == [(str(PACKAGE / "04_ft/train_unsloth.py"), "__main__", "--seed", "3")]
    layer = torch.nn.Linear(64, 32)
    assert fp8.columns_to_double(None, {"layer": layer}, [{"input_ids": [1]}]) == {}


def test_it_runs_and_a_failure_is_one_line(tmp_path):
    rows = tmp_path / "train.jsonl", tmp_path / "val.jsonl"
    for path, first in zip(rows, (0, 8), strict=True):
        path.write_text("".join(json.dumps({"prompt": f"Say {n}", "completion": f'{{"a": {n}}}'}) + "\n" for n in range(first, first + 8)))
    flags = ["--model", PACKAGE / "models/phi-tiny", "--track", "structured", "--train", rows[0], "--val", rows[1], "--seeds", "3", "--evaluation", "--limit 2 --max-new-tokens 4"]
    flags += ["--scratch", tmp_path / "made", "--out", tmp_path / "loss.json"]
    done = run_python(ROOT / "benchmarks/precision_loss.py", *flags, "--precisions", "fp32", "fp8-undoubled", "--training", "--backend trl --gradient-accumulation 1 --learning-rate 1e-2")
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads((tmp_path / "loss.json").read_text())
    exact, low = told["runs"]["fp32"]["3"], told["runs"]["fp8-undoubled"]["3"]
    assert told["reference"] == "fp32" and told["rows"]["val"]["rows"] == 8 and (exact["products"], low["products"]) == ("fp32", "fp8")
    for run in (exact, low):
        assert run["loss_over_bf16"] < run["loss_before"]  # the adapter is on the base
        assert run["loss_over_bf16"] == pytest.approx(run["loss_as_trained"], rel=0.05)
    assert told["precisions"]["fp8-undoubled"]["from_the_reference"]["loss_as_trained"]["mean"] == pytest.approx(low["loss_as_trained"] / exact["loss_as_trained"] - 1)

    done = run_python(ROOT / "benchmarks/precision_loss.py", *flags, "--precisions", "int8", "--training", "--scheduler none")
    assert done.returncode == 2 and done.stderr.startswith("error: train int8_3 ended with exit code") and len(done.stderr.splitlines()) == 1
