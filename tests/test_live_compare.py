"""live_compare.py: two clients side by side, Ctrl-C included; over a real socket."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from slm_swap.demo.azure_simulator import AzureSimulator, Faults
from slm_swap.examples import Example, read_examples
from slm_swap.settings import PACKAGE

ROWS = [Example(prompt=f"Say {number}", completion=f'{{"number":{number}}}', id=str(number)) for number in range(12)]


@pytest.fixture
def files(tmp_path):
    """A dataset, and replies of another model that has two of the twelve wrong."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row.to_json()) + "\n" for row in ROWS))
    replies = [{"id": row.id, "prediction": "{}" if row.id in "34" else row.completion} for row in ROWS]
    (tmp_path / "replies.jsonl").write_text("".join(json.dumps(reply) + "\n" for reply in replies))
    return tmp_path


def start(files, server, *flags: str) -> subprocess.Popen:
    known = {name: value for name, value in os.environ.items() if not name.startswith(("AZURE_", "LANGFUSE_"))}
    azure = {
        "AZURE_ENDPOINT": server.url,
        "AZURE_DEPLOYMENT": server.deployment,
        "AZURE_API_KEY": server.key,
        "AZURE_API_VERSION": "2024-10-21",
    }
    command = [
        sys.executable, str(PACKAGE / "01_eval/live_compare.py"), "--track", "structured", "--models", "azure", "replay",
        "--dataset", str(files / "rows.jsonl"), "--replies", str(files / "replies.jsonl"), "--batch-size", "2", "--out-dir", str(files / "out"), *flags,
    ]  # fmt: skip
    environment = known | azure | {"LANGFUSE_DISABLED": "1", "COLUMNS": "100"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_both_models_and_their_difference_are_shown_and_saved(files):
    with AzureSimulator(read_examples(files / "rows.jsonl")) as server:
        out, error = (process := start(files, server, "--save")).communicate(timeout=120)
    assert process.returncode == 0, error
    assert "12 of 12 rows" in out and "exact_match_rate" in out and "+0.167" in out
    reports = {kind: json.loads((files / f"out/structured_{kind}_rows_live.json").read_text()) for kind in ("azure", "replay")}
    assert reports["azure"]["metrics"]["exact_match_rate"] == 1 and reports["replay"]["metrics"]["exact_match_rate"] == 10 / 12
    assert reports["azure"]["inputs"]["rows_sha256"] == reports["replay"]["inputs"]["rows_sha256"]


def test_ctrl_c_keeps_what_both_have_answered(files):
    with AzureSimulator(read_examples(files / "rows.jsonl"), faults=Faults(slow=1.0, slow_seconds=0.7)) as server:
        process = start(files, server, "--save")
        for _ in range(600):  # until two batches are through
            if server.counts.total() >= 4:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert "interrupted after" in error and "Traceback" not in error
    azure, replay = (json.loads((files / f"out/structured_{kind}_rows_live.json").read_text()) for kind in ("azure", "replay"))
    assert 0 < azure["counts"]["rows"] == replay["counts"]["rows"] < 12
    assert azure["inputs"]["rows_sha256"] == replay["inputs"]["rows_sha256"]


def test_the_same_model_twice_is_a_mistake(files):
    command = [sys.executable, str(PACKAGE / "01_eval/live_compare.py"), "--track", "structured", "--models", "slm", "slm"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "two different models" in done.stderr and done.stderr.count("\n") == 1
