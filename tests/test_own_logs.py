"""A team's own log, from the file to a verdict, by the stage scripts alone: every form that is read, and a shop bot's 600 replies.

The hosted model and the small one that somebody serves are simulators over real sockets, the small one with more mistakes.
"""

import json
from contextlib import ExitStack
from pathlib import Path

import pytest

from slm_swap.demo.azure_simulator import AzureSimulator
from slm_swap.rows.examples import read_examples
from tests.support.scripts import load_script
from tests.support.shop_bot import write_log

DATA = Path(__file__).parent / "data"
FILES = sorted(path for path in DATA.iterdir() if path.suffix in (".json", ".jsonl", ".csv"))
BATCH = [path for path in FILES if path.name.startswith("batch_")]  # a batch's output, and what it was asked
FORMS = {path.stem + path.suffix: [path] for path in FILES if path not in BATCH} | {"batch": BATCH}
KEY = "key-of-the-simulator"


@pytest.fixture(scope="module")
def prepare():
    return load_script("02_dataset/prepare_data.py")


@pytest.fixture
def models(monkeypatch):
    """A function that serves both models for the rows of a file; `small` is the small one's share of mistakes."""
    with ExitStack() as stack:

        def serve(path, small=0.5):
            rows = read_examples(path)
            hosted = stack.enter_context(AzureSimulator(rows, key=KEY))
            served = stack.enter_context(AzureSimulator(rows, key=KEY, mistake_rate=small, seed=7))
            given = {"AZURE_ENDPOINT": f"{hosted.url}/v1", "AZURE_DEPLOYMENT": "simulator", "AZURE_API_KEY": KEY}
            given |= {"SLM_BASE_URL": f"{served.url}/v1", "SLM_MODEL_NAME": "simulator", "SLM_API_KEY": KEY}
            for name, value in given.items():
                monkeypatch.setenv(name, value)
            monkeypatch.delenv("AZURE_API_VERSION", raising=False)

        yield serve


@pytest.fixture
def evaluated(run_script, eval_script, tmp_path):
    """A function that evaluates a kind of model and gives its report's path and the report."""

    def run_it(track, kind, rows, *flags):
        out = tmp_path / f"{track}_{kind}_{len(list(tmp_path.iterdir()))}.json"
        code, _, error = run_script(eval_script, "--track", track, "--model-kind", kind, "--dataset", rows, "--out", out, "--latency-rows", 0, *flags)
        assert code == 0, error
        return out, json.loads(out.read_text())

    return run_it


@pytest.mark.parametrize("name", FORMS)
def test_every_form_from_its_files_to_a_verdict(run_script, prepare, models, evaluated, compare_script, tmp_path, name):
    whole = ("--train-size", 0, "--val-size", 0, "--out-dir", tmp_path / "data")
    code, printed, error = run_script(prepare, "--source", "chat", "--dataset-path", *FORMS[name], *whole)
    assert code == 0, error
    assert json.loads((tmp_path / "data/prepare_report.json").read_text())["replies"]["share"] >= 0.95
    assert "replies that can be measured" in printed
    written = sorted((tmp_path / "data").glob("*/test.jsonl"))
    assert written
    for rows in written:
        track = rows.parent.name
        models(rows)
        (azure, hosted), (slm, small) = evaluated(track, "azure", rows), evaluated(track, "slm", rows)
        exact = "args_exact_rate" if track == "toolcall" else "exact_match_rate"
        assert hosted["ask"] == small["ask"] == "native" and hosted["metrics"][exact] == 1.0, "production's replies are the gold"
        assert hosted["counts"]["failed_requests"] == small["counts"]["failed_requests"] == 0
        out = tmp_path / f"decision_{track}.json"
        code, printed, error = run_script(compare_script, "--track", track, "--azure", azure, "--slm", slm, "--out", out)
        if hosted["counts"]["rows"] > 1:
            assert code in (0, 10, 11) and "VERDICT=" in printed and json.loads(out.read_text())["verdict"], error


def test_a_shop_bots_log_from_the_file_to_a_verdict(run_script, prepare, models, evaluated, compare_script, tmp_path):
    log = write_log(tmp_path / "log.jsonl", 600)
    code, printed, error = run_script(
        prepare, "--source", "chat", "--dataset-path", log, "--train-size", 0, "--val-size", 0, "--out-dir", tmp_path / "data"
    )
    assert code == 0 and "replies that can be measured      100.0% (600 of 600)" in printed, error
    rows = tmp_path / "data/toolcall/test.jsonl"
    examples = read_examples(rows)
    assert {len(example.calls) for example in examples} == {0, 1, 2} and any(len(example.messages) > 2 for example in examples)
    assert {len(example.tools) for example in examples} == {8} and all(example.messages[0]["role"] == "system" for example in examples)
    models(rows, small=0.3)
    azure, hosted = evaluated("toolcall", "azure", rows)
    reports = {ask: evaluated("toolcall", "slm", rows, "--ask", ask) for ask in ("native", "text")}
    assert hosted["metrics"]["decision_match_rate"] == 1.0
    for ask, (slm, small) in reports.items():
        assert small["ask"] == ask and 0.6 < small["metrics"]["args_exact_rate"] < 0.8 and small["metrics"]["decision_match_rate"] < 1
        assert {"unwanted_call", "missing_call"} <= {error for error, count in small["counts"]["errors"].items() if count}
        code, printed, error = run_script(compare_script, "--track", "toolcall", "--azure", azure, "--slm", slm, "--out", tmp_path / f"{ask}.json")
        assert code == 10 and "Call or no call" in printed
        assert ("the same rows were asked in two forms" in error) == (ask == "text")
