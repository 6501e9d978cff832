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


def test_every_reply_has_its_own_length_in_one_process_and_in_two_and_what_fails_is_told(tmp_path, lengths):
    done = measured(tmp_path, "--only", "vllm-fp8-graphs", "transformers-bf16-auto", "--rows", "4", "--processes", "1", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    settings = json.loads((tmp_path / "eval.json").read_text())["settings"]
    assert "vllm" in settings["vllm-fp8-graphs"]["once_started"]["failed"], "there is no GPU"
    for processes, name in ((1, "transformers-bf16-auto"), (2, "transformers-bf16-auto, 2 processes")):
        once, command = settings[name]["once_started"], settings[name]["command"]
        assert settings[name]["processes"] == processes and once["rows"] == 4 * processes and command["rows"] == 4
        assert once["requests_per_second"] * once["seconds"] == pytest.approx(once["rows"])
        assert once["reply_tokens_per_second"] * once["seconds"] == pytest.approx(processes * sum(lengths(4096, 7)[1][:4]))
        assert command["seconds"] > command["total_seconds"] > command["generate_seconds"] > 0
