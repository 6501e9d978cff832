"""The evaluation benchmark runs, on a tiny model; its figures are for GPUs."""

import json
import subprocess
import sys

import pytest

from slm_swap.settings import ROOT

SCRIPT = ROOT / "benchmarks/eval.py"


def measured(tmp_path, *flags: str) -> subprocess.CompletedProcess:
    words = ["--shape", "tiny", "--scratch", tmp_path / "scratch", "--out", tmp_path / "eval.json", *flags]
    return subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def lengths():
    sys.path.insert(0, str(SCRIPT.parent))  # as for a script that is run
    from phi_shape import lengths

    sys.path.remove(str(SCRIPT.parent))
    return lengths


@pytest.mark.parametrize("processes", [1, 2])
def test_every_reply_has_its_own_length_in_one_process_and_in_two_and_what_fails_is_told(tmp_path, lengths, processes):
    broken = [] if processes > 1 else ["vllm-fp8-graphs"]  # there is no GPU
    done = measured(tmp_path, "--only", *broken, "transformers-bf16-auto", "--rows", "4", "--processes", str(processes))
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads((tmp_path / "eval.json").read_text())
    assert all("vllm" in told["settings"][name]["once_started"]["failed"] for name in broken)
    setting = told["settings"]["transformers-bf16-auto"]
    once, command = setting["once_started"], setting["command"]
    assert told["processes"] == processes and once["rows"] == 4 * processes and command["rows"] == 4
    assert once["requests_per_second"] * once["seconds"] == pytest.approx(once["rows"])
    assert once["reply_tokens_per_second"] * once["seconds"] == pytest.approx(sum(lengths(4096 * processes, 7)[1][: once["rows"]]))
    assert command["seconds"] > command["total_seconds"] > command["generate_seconds"] > 0


def test_the_documented_setting_is_one_process(tmp_path):
    done = measured(tmp_path, "--only", "documented", "--processes", "2")
    assert done.returncode == 2 and "one process" in done.stderr
