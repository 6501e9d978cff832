"""setup_env.sh: what is installed where, with a Python in its place that notes what pip is told."""

import os
import shutil
import subprocess

import pytest

from slm_swap.common.settings import ROOT

PYTHON = """#!/bin/sh
case "$1 $2" in
  "-m venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python;;
  "-m pip") echo "pip $*" >>told; for word; do case "$word" in *.txt) cat "$word" >>told;; esac; done;;
esac
"""
SCRIPT = 'set -euo pipefail\n. ./setup_env.sh\nprintf "flags"; for flag; do printf " <%s>" "$flag"; done; echo\n'


@pytest.fixture
def checkout(tmp_path):
    """A checkout's setup, and what stands for Python and for a GPU's tool."""
    for path in (ROOT / "setup_env.sh", *ROOT.glob("requirements*.txt")):
        shutil.copy(path, tmp_path)
    (tmp_path / "script.sh").write_text(SCRIPT)
    (tmp_path / "tools").mkdir()
    for name, text in (("python", PYTHON), ("nvidia-smi", '#!/bin/sh\necho "$GPUS"\n')):
        (tmp_path / "tools" / name).write_text(text)
        (tmp_path / "tools" / name).chmod(0o755)
    return tmp_path


def set_up(checkout, *flags: str, gpu: bool = True) -> tuple[str, str]:
    """(the flags that the script has left, what was installed)."""
    (checkout / "told").unlink(missing_ok=True)
    tools = checkout / "tools"
    known = os.environ | {"GPUS": "GPU 0: NVIDIA H200" if gpu else "", "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON_BASE": str(tools / "python")}
    done = subprocess.run(["bash", "script.sh", *flags], cwd=checkout, env=known, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = checkout / "told"
    return done.stdout.splitlines()[-1], told.read_text() if told.exists() else ""


def change_requirements(checkout) -> None:
    with open(checkout / "requirements-cpu.txt", "a") as file:
        file.write("another==1.0\n")


def test_a_gpu_has_vllm_by_default_and_once(checkout):
    flags, told = set_up(checkout, "--short", "a b")
    assert flags == "flags <--short> <a b>" and "\nvllm==" in told and "\nunsloth==" in told
    assert set_up(checkout)[1] == ""
    change_requirements(checkout)
    assert "\nvllm==" in set_up(checkout)[1]


def test_vllm_stays_left_out(checkout):
    flags, told = set_up(checkout, "--short", "--no-vllm", "a b")
    assert flags == "flags <--short> <a b>" and "\nvllm==" not in told
    assert all(f"\n{name}==" in told for name in ("unsloth", "deepspeed", "transformers", "torch"))
    assert set_up(checkout) == ("flags", "")
    change_requirements(checkout)
    told = set_up(checkout)[1]
    assert "\nanother==" in told and "\nvllm==" not in told and "\nunsloth==" in told


def test_a_machine_without_a_gpu_has_neither(checkout):
    for flags in ((), ("--no-vllm",)):
        told = set_up(checkout, *flags, gpu=False)[1]
        assert bool(told) is not bool(flags), "what is there is kept"
        assert "\nvllm==" not in told and "\nunsloth==" not in told
