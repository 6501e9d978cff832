"""The stages as traces: an evaluation, a comparison and a training run against the recording Langfuse server."""

import json
import os
import subprocess
import sys
import uuid

import pytest
from langfuse_server import LangfuseServer

from slm_swap.examples import Example
from slm_swap.prompts import structured_prompt
from slm_swap.settings import PACKAGE

ROWS = [
    Example(
        prompt=structured_prompt({"type": "object"}, f"Say {number}"), completion=f'{{"number":{number}}}', id=f"row-{number}"
    )
    for number in range(6)
]


@pytest.fixture
def server():
    with LangfuseServer(f"pk-lf-{uuid.uuid4()}") as recorder:
        yield recorder


@pytest.fixture
def files(tmp_path):
    replies = [{"id": row.id, "prediction": "{}" if row.id == "row-3" else row.completion} for row in ROWS]
    for name, lines in (("rows", [row.to_json() for row in ROWS]), ("replies", replies)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def run(server, script: str, *flags: object) -> subprocess.CompletedProcess:
    public_key, secret_key = server.keys.split(":")
    keys = {
        "LANGFUSE_PUBLIC_KEY": public_key,
        "LANGFUSE_SECRET_KEY": secret_key,
        "LANGFUSE_BASE_URL": server.url,
        "LANGFUSE_DISABLED": "0",
    }
    command = [sys.executable, str(PACKAGE / script), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | keys, timeout=240)


def evaluate(server, files) -> dict:
    rows, replies = files / "rows.jsonl", files / "replies.jsonl"
    flags = (
        "--track",
        "structured",
        "--model-kind",
        "replay",
        "--dataset",
        rows,
        "--replies",
        replies,
        "--out",
        files / "report.json",
    )
    done = run(server, "01_eval/eval.py", *flags)
    assert done.returncode == 0, done.stderr
    return json.loads((files / "report.json").read_text())


def test_an_evaluation_is_one_trace_with_a_generation_a_row(server, files):
    report = evaluate(server, files)
    generations = [span for span in server.spans if span.kind == "generation"]
    assert {span.trace for span in server.spans} == {report["trace"]["id"]}
    assert sorted(span.name for span in generations) == [row.id for row in ROWS]
    (missed,) = [span for span in generations if span.attributes["langfuse.observation.level"] == "WARNING"]
    assert missed.name == "row-3" and missed.attributes["langfuse.observation.status_message"] == "missing_argument"
    of_rows = [score for score in server.scores if score.get("observationId")]
    assert len(of_rows) == len(ROWS) * 5
    of_run = {score["name"]: score["value"] for score in server.scores if not score.get("observationId")}
    assert of_run == pytest.approx(report["metrics"])


def test_a_comparison_is_a_trace_with_its_decision(server, files):
    evaluate(server, files)
    before = len(server.spans)
    report, out = files / "report.json", files / "decision.json"
    done = run(server, "03_compare/compare.py", "--track", "structured", "--azure", report, "--slm", report, "--before", report, "--out", out)
    assert done.returncode == 11, done.stderr  # six rows are too few
    decision = json.loads(out.read_text())
    spans = server.spans[before:]
    assert {span.trace for span in spans} == {decision["trace"]["id"]}
    (event,) = [span for span in spans if span.kind == "event"]
    assert event.name == "decision" and decision["verdict"] == "NEED_MORE_DATA"
    assert "6 rows are too few" in json.dumps(event.attributes)
    scores = {score["name"]: score["value"] for score in server.scores if score.get("traceId") == decision["trace"]["id"]}
    assert scores == {"verdict": "NEED_MORE_DATA"} | {f"{name}_difference": 0 for name in decision["metrics"]}


def test_a_training_run_is_a_trace_with_its_losses(server, files):
    flags = (
        "--track", "structured", "--train", files / "rows.jsonl", "--val", files / "rows.jsonl", "--out", files / "adapter", "--precision", "fp32",
        "--model", "models/phi-tiny", "--batch-size", 3, "--gradient-accumulation", 1, "--no-gradient-checkpointing",
    )  # fmt: skip
    done = run(server, "train_unsloth.py", *flags)
    assert done.returncode == 0, done.stderr
    info = json.loads((files / "adapter/training_info.json").read_text())
    scores = {score["name"]: score["value"] for score in server.scores}
    assert scores["eval_loss_before"] == pytest.approx(info["eval_loss"]["before"])
    assert scores["eval_loss_after"] == pytest.approx(info["eval_loss"]["after"])
    assert len({span.trace for span in server.spans}) == 1


def test_a_run_with_wrong_keys_stops_before_any_work(server, files):
    server.keys = "pk-other:sk-other"
    public_key = f"pk-lf-{uuid.uuid4()}"
    keys = {
        "LANGFUSE_PUBLIC_KEY": public_key,
        "LANGFUSE_SECRET_KEY": "sk-lf-not-to-be-shown",
        "LANGFUSE_BASE_URL": server.url,
        "LANGFUSE_DISABLED": "0",
    }
    command = [
        sys.executable, str(PACKAGE / "01_eval/eval.py"), "--track", "structured", "--model-kind", "replay", "--dataset", str(files / "rows.jsonl"),
        "--replies", str(files / "replies.jsonl"), "--out", str(files / "report.json"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | keys, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "sk-lf-not-to-be-shown" not in done.stderr
    assert not (files / "report.json").exists()
