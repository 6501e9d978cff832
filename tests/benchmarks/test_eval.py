"""The evaluation benchmark runs, on a tiny model; its figures are for GPUs."""

import importlib
import json
import subprocess
import sys

import pytest

from slm_swap.common.settings import ROOT
from tests.support.processes import run_python

SCRIPT = ROOT / "benchmarks/eval.py"


def measured(tmp_path, *flags: str) -> subprocess.CompletedProcess:
    words = ["--shape", "tiny", "--scratch", tmp_path / "scratch", "--out", tmp_path / "eval.json", *flags]
    return run_python(SCRIPT, *words)


@pytest.fixture(scope="module")
def modules():
    """The benchmarks' modules of these names, as scripts find them."""
    sys.path.insert(0, str(SCRIPT.parent))
    yield {name: importlib.import_module(name) for name in ("shapes", "engine_start")}
    sys.path.remove(str(SCRIPT.parent))


@pytest.fixture(scope="module")
def lengths(modules):
    return modules["shapes"].lengths


def test_every_reply_has_its_own_length_in_one_process_and_in_two_and_what_fails_is_told(tmp_path, lengths):
    done = measured(tmp_path, "--only", "vllm-fp8-graphs", "transformers-bf16-auto", "--rows", "4", "--processes", "2", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    settings = json.loads((tmp_path / "eval.json").read_text())["settings"]
    assert "vllm" in settings["vllm-fp8-graphs"]["once_started"]["failed"], "there is no GPU"
    for processes, name in ((1, "transformers-bf16-auto"), (2, "transformers-bf16-auto, 2 processes")):
        once, command = settings[name]["once_started"], settings[name]["command"]
        assert settings[name]["processes"] == processes and once["rows"] == 4 * processes and command["rows"] == 4
        assert once["requests_per_second"] * once["seconds"] == pytest.approx(once["rows"])
        assert once["reply_tokens_per_second"] * once["seconds"] == pytest.approx(processes * sum(lengths(4096, 7)[1][:4]))
        assert command["seconds"] > command["total_seconds"] > command["generate_seconds"] > 0
        assert once["later_reply_tokens_per_second"] * once["later_seconds"] == pytest.approx(processes * sum(lengths(4096, 7)[1][4:8]))
        assert once["reply_tokens_per_second"] == min(settings[name]["speeds"]["reply_tokens_per_second"])
    one, two = (settings[name]["speeds"] for name in ("transformers-bf16-auto", "transformers-bf16-auto, 2 processes"))
    times = settings["transformers-bf16-auto, 2 processes"]["times_one_process"]
    for name, [speed] in one.items():
        assert times[name] == pytest.approx(two[name][0] / speed)


def test_the_run_of_median_speed_is_told_and_a_ratio_is_one_of_the_same_turn(modules):
    def runs(*speeds: float, **more: float) -> list[dict]:
        return [{"reply_tokens_per_second": speed, **more} for speed in speeds]

    summary, failed = modules["engine_start"].benchmark.summary, {"failed": "no GPU"}
    one, two = runs(100, 50, 80), runs(190, 100, 120)
    told = {"once_started": two[2], "speeds": {"reply_tokens_per_second": [190, 100, 120]}}
    assert summary(two, one) == told | {"times_one_process": {"reply_tokens_per_second": 1.9}}
    assert summary(two, []) == told and summary([failed], one) == {"once_started": failed}
    assert summary(two, [*one[:1], failed])["times_one_process"] == summary([two[0], failed], one)["times_one_process"]
    assert summary([*two, failed], one)["once_started"] == two[2] and summary([*two, failed], one)["failed"] == "no GPU"
    later = [runs(speed, later_reply_tokens_per_second=10 * speed)[0] for speed in (1, 3)]
    assert summary(later[1:], later[:1])["times_one_process"] == {"reply_tokens_per_second": 3, "later_reply_tokens_per_second": 3}


def test_each_process_is_warmed_and_timed_by_the_rows_of_one(modules):
    spans = modules["engine_start"].benchmark.spans
    assert spans(2048, 1) == {"warm": range(4032, 4096), "first": range(2048), "later": range(2048, 4032)}
    assert spans(2048, 2) == {"warm": range(8064, 8192), "first": range(4096), "later": range(4096, 8064)}
    assert spans(16, 1) == {"warm": range(4092, 4096), "first": range(16), "later": range(16, 32)}
    for rows in (1, 2049, 4050, 4096):
        taken = spans(rows, 3)
        places = [place for span in taken.values() for place in span]
        assert len(set(places)) == len(places) and set(places) <= set(range(3 * 4096)) and len(taken["first"]) == 3 * rows


def test_settings_and_processes_are_measured_once_and_no_more_rows_than_there_are(modules, capsys):
    parse = modules["engine_start"].benchmark.parse_args
    args = parse(["--only", "vllm-graphs", "vllm-eager", "vllm-graphs", "--processes", "2", "1", "2", "--rows", "4096"])
    assert args.only == ["vllm-graphs", "vllm-eager"] and args.processes == [1, 2]
    with pytest.raises(SystemExit):
        parse(["--rows", "4097"])
    assert "the workload has 4096 rows" in capsys.readouterr().err


def test_the_documented_setting_is_one_process(tmp_path):
    done = measured(tmp_path, "--only", "documented", "--processes", "2")
    assert done.returncode == 2 and "one process" in done.stderr


def test_what_a_start_costs_and_saves_is_fitted_to_the_medians(modules):
    rows, fit = modules["engine_start"].ROWS, modules["engine_start"].fit
    lines = {"eager": lambda count: 10 + 0.003 * count, "graphs": lambda count: 12.5 + 0.002 * count}
    commands = [
        {"start": start, "rows": count, "seconds": line(count) + late} for start, line in lines.items() for count in rows for late in (0, -1, 60)
    ]
    assert fit(commands) == pytest.approx({"extra_seconds": 2.5, "saved_seconds": 0.001})
    told = json.loads((ROOT / "benchmarks/results/engine_start.json").read_text())
    assert fit(told["commands"]) == pytest.approx({name: told[name] for name in ("extra_seconds", "saved_seconds")})
