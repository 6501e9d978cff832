"""The stages as traces: an evaluation, a comparison and a training run against the recording Langfuse server."""

import json
import subprocess
import uuid
from collections import Counter

import pytest

from slm_swap.common.errors import UserError
from slm_swap.common.reports import code_version, rows_path, sha256_file
from slm_swap.common.settings import PACKAGE
from slm_swap.demo.azure_simulator import AzureSimulator, Faults
from slm_swap.rows.examples import Example
from slm_swap.rows.prompts import structured_prompt
from slm_swap.tracing.outbox import Outbox
from slm_swap.tracing.runs import outbox_path, trace_id
from slm_swap.tuning.checkpoints import Checkpoints
from tests.support.langfuse_server import LangfuseServer
from tests.support.processes import Script, run_python, wait_until

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


def keys(server) -> dict[str, str]:
    public_key, secret_key = server.keys.split(":")
    return {
        "LANGFUSE_PUBLIC_KEY": public_key,
        "LANGFUSE_SECRET_KEY": secret_key,
        "LANGFUSE_BASE_URL": server.url,
        "LANGFUSE_DISABLED": "0",
    }


def begin(server, script: str, *flags: object, **environment: str) -> Script:
    return Script(PACKAGE / script, *flags, **keys(server), **environment)


def run(server, script: str, *flags: object) -> subprocess.CompletedProcess:
    return run_python(PACKAGE / script, *flags, **keys(server))


def evaluate(server, files, *more: object) -> dict:
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
    done = run(server, "01_eval/eval.py", *flags, *more)
    assert done.returncode == 0, done.stderr
    return json.loads((files / "report.json").read_text())


def test_an_evaluation_is_one_trace_with_a_generation_a_row(server, files):
    report = evaluate(server, files)
    generations = [span for span in server.spans if span.kind == "generation"]
    assert {span.trace for span in server.spans} == {report["trace"]["id"]}
    assert sorted(span.row for span in generations) == [row.id for row in ROWS]
    (missed,) = [span for span in generations if span.attributes["langfuse.observation.level"] == "WARNING"]
    assert missed.row == "row-3" and missed.attributes["langfuse.observation.status_message"] == "missing_argument"
    of_rows = [score for score in server.scores if score.get("observationId")]
    assert len(of_rows) == len(ROWS) * 6  # five metrics, and the error as a category
    errors = {score["observationId"]: score["value"] for score in of_rows if score["name"] == "error"}
    assert {span.row: errors[span.id] for span in generations} == {row.id: "none" for row in ROWS} | {"row-3": "missing_argument"}
    of_run = {score["name"]: score["value"] for score in server.scores if not score.get("observationId")}
    means = ("field_precision", "field_recall", "field_f1")  # which rows have under these names
    assert of_run == pytest.approx({f"{name}_mean" if name in means else name: value for name, value in report["metrics"].items()})
    assert not {score["name"] for score in of_rows} & of_run.keys()


def test_a_trace_tells_what_was_run_on_what(server, files):
    evaluate(server, files, "--session", "pipeline-7")
    told = {
        "track": "structured", "split": "rows", "model_kind": "replay", "model": "replies.jsonl", "engine": "replay",
        "dataset_sha256": sha256_file(files / "rows.jsonl"), "commit": code_version()["commit"] or "",
    }  # fmt: skip
    for span in server.spans:
        assert {name: span.attributes[f"langfuse.trace.metadata.{name}"] for name in told} == told
        assert span.attributes["session.id"] == "pipeline-7" and span.attributes["langfuse.trace.tags"] == ["eval", "structured", "replay"]


def test_local_rows_are_under_their_batch_and_the_trace_names_model_and_engine(server, files, monkeypatch):
    monkeypatch.setenv("SLM_MODEL_PATH", "models/phi-tiny")
    (files / "prices.toml").write_text('currency = "USD"\n[local]\nhour = 2.2\n')
    monkeypatch.setenv("PRICES_FILE", str(files / "prices.toml"))
    flags = ("--track", "structured", "--model-kind", "slm", "--dataset", files / "rows.jsonl", "--out", files / "report.json")
    done = run(server, "01_eval/eval.py", *flags, "--batch-size", 4, "--precision", "fp32", "--max-new-tokens", 4)
    assert done.returncode == 0, done.stderr
    batches = {span.id: span for span in server.spans if span.kind == "span"}
    rows = [span for span in server.spans if span.kind == "generation"]
    assert {batch.name for batch in batches.values()} == {"batch"} and len(batches) == 2
    assert Counter(batches[row.parent].json("metadata.batch") for row in rows) == {"0": 4, "1": 2}
    report = json.loads((files / "report.json").read_text())
    costs = [row.json("cost_details")["total"] for row in rows]
    assert sum(costs) == pytest.approx(report["cost"]["total"], rel=1e-3) and report["cost"]["total"] > 0
    assert len(set(costs)) == 2, "rows of a batch share its time"
    assert {row.attributes["langfuse.trace.metadata.model"] for row in rows} == {"phi-tiny"}
    assert {row.attributes["langfuse.trace.metadata.engine"] for row in rows} == {"transformers"}
    lines = {line["id"]: line for line in map(json.loads, (files / "report.rows.jsonl").read_text().splitlines())}
    for row in rows:
        told = {name: row.json(f"metadata.{name}") for name in ("confidence", "parses")}
        assert told == {name: lines[row.row][name] for name in told} and told["confidence"]["tokens"] > 0


def test_reports_of_a_live_comparison_name_their_traces(server, files):
    with AzureSimulator(ROWS) as azure:
        names = {"AZURE_ENDPOINT": azure.url, "AZURE_DEPLOYMENT": azure.deployment, "AZURE_API_VERSION": "2024-10-21", "AZURE_API_KEY": azure.key}
        flags = ("--track", "structured", "--models", "azure", "replay", "--dataset", files / "rows.jsonl", "--replies", files / "replies.jsonl")
        done = run_python(PACKAGE / "01_eval/live_compare.py", *flags, "--save", "--out-dir", files, **keys(server), **names)
    assert done.returncode == 0, done.stderr
    for kind in ("azure", "replay"):
        report = json.loads((files / f"structured_{kind}_rows_live.json").read_text())
        spans = [span for span in server.spans if span.trace == report["trace"]["id"]]
        assert report["trace"]["url"].endswith(report["trace"]["id"]) and {span.row for span in spans} == {f"live-structured-{kind}", *(row.id for row in ROWS)}
        assert spans[0].attributes["langfuse.trace.metadata.model_kind"] == kind


def test_flags_of_the_local_model_are_not_told_of_a_hosted_one(server, files):
    evaluate(server, files, "--no-trace-content")
    told = {name.rpartition(".")[2]: value for span in server.spans for name, value in span.attributes.items() if ".metadata." in name}
    assert told["no_trace_content"] is True and told["overwrite"] is False
    assert not {"batch_size", "engine_start", "precision", "trust_remote_code"} & told.keys()


def test_without_content_nothing_of_a_row_leaves_an_evaluation(server, files):
    evaluate(server, files, "--no-trace-content")
    assert len([span for span in server.spans if span.kind == "generation"]) == len(ROWS)
    assert not [path for path, body in server.bodies if b"Say " in body or b"{\"number" in body or b'{\\"number' in body]


def test_an_experiment_is_items_of_a_pushed_dataset(server, files):
    flags = ("--track", "structured", "--model-kind", "replay", "--dataset", files / "rows.jsonl", "--replies", files / "replies.jsonl")
    out = ("--out", files / "report.json", "--langfuse-experiment", "tiny-1")
    done = run(server, "01_eval/eval.py", *flags, *out)
    assert done.returncode == 2 and "push it first with python 02_dataset/push_langfuse.py --track structured --dataset" in done.stderr
    assert run(server, "02_dataset/push_langfuse.py", *flags[:2], *flags[4:6]).returncode == 0
    done = run(server, "01_eval/eval.py", *flags, *out)
    assert done.returncode == 0 and "experiment: " in done.stdout, done.stderr
    generations = [span for span in server.spans if span.kind == "generation"]
    assert {span.attributes["langfuse.experiment.name"] for span in generations} == {"tiny-1"}
    assert len({span.attributes["langfuse.experiment.item.id"] for span in generations}) == len(ROWS)
    assert all(span.attributes["langfuse.experiment.item.root_observation_id"] == span.id for span in generations)
    refused = run(server, "01_eval/eval.py", *flags, *out[:-1], "tiny-2")
    assert refused.returncode == 2 and "an experiment is recorded as rows are asked" in refused.stderr
    assert run(server, "01_eval/eval.py", *flags, "--overwrite", *out[:-1], "tiny-2").returncode == 0  # the other model, to be seen beside it
    items = {span.attributes["langfuse.experiment.item.id"] for span in generations}
    others = [span for span in server.spans if span.attributes.get("langfuse.experiment.name") == "tiny-2"]
    assert {span.attributes["langfuse.experiment.item.id"] for span in others} == items and len(others) == len(ROWS)
    assert not {span.attributes["langfuse.experiment.id"] for span in others} & {
        span.attributes["langfuse.experiment.id"] for span in generations
    }


def test_a_killed_and_resumed_evaluation_is_one_trace_with_a_generation_a_row(server, files):
    rows = [Example(prompt=f"Say {number}", completion=f'{{"number":{number}}}', id=f"row-{number}") for number in range(60)]
    (files / "rows.jsonl").write_text("".join(json.dumps(row.to_json()) + "\n" for row in rows))
    with AzureSimulator(rows, faults=Faults(slow=1.0, slow_seconds=0.4, rate_limit=0.2)) as azure:
        environment = {
            "AZURE_ENDPOINT": azure.url, "AZURE_DEPLOYMENT": azure.deployment, "AZURE_API_KEY": azure.key, "AZURE_API_VERSION": "2024-10-21",
        }  # fmt: skip
        flags = ("--track", "structured", "--model-kind", "azure", "--dataset", files / "rows.jsonl", "--out", files / "report.json")
        for answered in (15, 35, 61):  # the last one ends by itself
            process = begin(server, "01_eval/eval.py", *flags, **environment)
            wait_until(lambda process=process, answered=answered: process.poll() is not None or journaled(files) >= answered)
            process.kill()
            _, error = process.communicate()
        assert process.returncode == 0, error
    report = json.loads((files / "report.json").read_text())
    generations = [span for span in server.spans if span.kind == "generation"]
    assert report["counts"]["rows"] == 60 and report["sessions"] == 3
    assert {span.trace for span in server.spans} == {report["trace"]["id"]}
    # a killed run's sender may have no time to note what has arrived: it comes again, as the same span
    assert len({span.id for span in generations}) == len({span.row for span in generations}) == len({(span.id, span.row) for span in generations}) == 60
    of_rows = [score["id"] for score in server.scores if score.get("observationId")]
    assert len(of_rows) == len(set(of_rows)) == 60 * 6
    assert not list(files.glob("*.traces.jsonl")) and not list(files.glob("*.part"))
    [root] = [span for span in server.spans if span.kind == "chain"]
    assert root.start < min(span.start for span in server.spans if span.id != root.id)
    retries = [span for span in server.spans if span.name == "retry"]
    assert retries and {span.parent for span in retries} <= {span.id for span in generations}
    assert {span.json("metadata.status") for span in retries} == {429}


@pytest.mark.parametrize("langfuse", ["well", "away in between"])
def test_a_run_that_ended_before_its_first_answer_does_not_block_its_own_command(server, files, langfuse):
    with AzureSimulator(ROWS) as azure:
        names = {"AZURE_ENDPOINT": azure.url, "AZURE_DEPLOYMENT": azure.deployment, "AZURE_API_VERSION": "2024-10-21"}
        flags = ("--track", "structured", "--model-kind", "azure", "--dataset", files / "rows.jsonl", "--out", files / "report.json", "--latency-rows", 0)
        script = PACKAGE / "01_eval/eval.py"
        more = ()
        if langfuse != "well":
            server.refuse()
            more = ("--langfuse-optional",)
        done = run_python(script, *flags, *more, **keys(server), **names, AZURE_API_KEY="wrong-key-of-azure")
        assert done.returncode == 2 and not list(files.glob("*.part")), done.stderr
        assert [path.name for path in files.glob("*.traces.jsonl")] == ([] if langfuse == "well" else ["report.traces.jsonl"])
        if langfuse != "well":
            server.accept()
        done = run_python(script, *flags, **keys(server), **names, AZURE_API_KEY=azure.key)
    assert done.returncode == 0 and done.stderr.count("could not send") == (langfuse != "well"), done.stderr
    report = json.loads((files / "report.json").read_text())
    roots = [span for span in server.spans if span.kind == "chain"]
    assert len(roots) == 2 and roots[0].trace != roots[1].trace and report["trace"]["id"] in {root.trace for root in roots}
    assert not list(files.glob("*.traces.jsonl"))


def journaled(folder) -> int:
    """How many replies the journal holds."""
    path = folder / "report.rows.jsonl.part"
    return path.read_text(errors="replace").count('"row":') if path.exists() else 0


def test_a_comparison_is_a_trace_with_its_decision(server, files):
    evaluate(server, files)
    before = len(server.spans)
    reports, out = [files / name for name in ("report.json", "slm.json", "before.json")], files / "decision.json"
    for at, path in enumerate(reports[1:], 1):  # the same rows, evaluated at other times
        path.write_text(json.dumps(json.loads(reports[0].read_text()) | {"created_at": f"2026-01-0{at}T00:00:00+00:00"}))
        rows_path(path).write_bytes(rows_path(reports[0]).read_bytes())
    sides = [word for pair in zip(("--azure", "--slm", "--before"), reports, strict=True) for word in pair]
    done = run(server, "03_compare/compare.py", "--track", "structured", *sides, "--out", out)
    assert done.returncode == 11, done.stderr  # six rows are too few
    decision = json.loads(out.read_text())
    spans = server.spans[before:]
    assert {span.trace for span in spans} == {decision["trace"]["id"]}
    (event,) = [span for span in spans if span.kind == "event"]
    assert event.name == "decision" and decision["verdict"] == "NEED_MORE_DATA"
    assert "6 rows are too few" in json.dumps(event.attributes)
    told = event.json("metadata.metrics")
    assert {name: told[name]["difference"] for name in told} == dict.fromkeys(decision["metrics"], 0)
    scores = {score["name"]: score["value"] for score in server.scores if score.get("traceId") == decision["trace"]["id"]}
    assert scores == {"verdict": "NEED_MORE_DATA"} | {f"{name}_azure_minus_slm": 0 for name in decision["metrics"]}


def training(files) -> tuple:
    return (
        "--track", "structured", "--train", files / "rows.jsonl", "--val", files / "rows.jsonl", "--out", files / "adapter", "--precision", "fp32",
        "--model", "models/phi-tiny", "--batch-size", 3, "--gradient-accumulation", 1, "--no-gradient-checkpointing",
    )  # fmt: skip


def test_a_training_run_is_a_trace_with_its_losses(server, files):
    done = run(server, "train_unsloth.py", *training(files))
    assert done.returncode == 0, done.stderr
    info = json.loads((files / "adapter/training_info.json").read_text())
    scores = {score["name"]: score["value"] for score in server.scores}
    assert scores["eval_loss_before"] == pytest.approx(info["eval_loss"]["before"])
    assert scores["eval_loss_after"] == pytest.approx(info["eval_loss"]["after"])
    assert len({span.trace for span in server.spans}) == 1
    curve = [json.loads(line) for line in (files / "adapter/training_log.jsonl").read_text().splitlines()]
    points = [span for span in server.spans if span.name == "loss"]
    assert sorted(point.json("metadata.loss") for point in points) == sorted(entry["loss"] for entry in curve) and curve
    root = next(span for span in server.spans if span.kind == "chain")
    curve_of = {score["observationId"]: score for score in server.scores if score["name"] == "step_loss"}
    drawn = sorted((curve_of[point.id]["timestamp"], point.json("metadata.step"), curve_of[point.id]["value"]) for point in points)
    assert [(step, loss) for _, step, loss in drawn] == [(entry["step"], entry["loss"]) for entry in curve], "in time, as charts are"
    assert root.json("metadata.adapter_sha256") == sha256_file(files / "adapter/adapter_model.safetensors")


def test_a_training_that_is_killed_and_resumed_is_one_trace(server, files):
    flags, checkpoints = (*training(files), "--epochs", 16, "--save-steps", 2), Checkpoints(files / "adapter")
    process = begin(server, "train_unsloth.py", *flags)
    wait_until(lambda: checkpoints.steps() or process.poll() is not None)
    assert process.poll() is None, process.communicate()
    with pytest.raises(UserError, match=r"another process trains with .*adapter.checkpoints: wait for its end"):
        Checkpoints(files / "adapter").open({}, resume=True)
    process.kill()
    process.wait()
    assert checkpoints.steps() and outbox_path(files / "adapter").exists() and not (files / "adapter").exists()
    done = run(server, "train_unsloth.py", *flags, "--resume")
    assert done.returncode == 0, done.stderr
    info = json.loads((files / "adapter/training_info.json").read_text())
    assert info["sessions"] == 2 and info["steps"] == 32
    (root,) = [span for span in server.spans if span.kind == "chain"]
    assert {span.trace for span in server.spans} == {root.trace} and root.trace == trace_id(info["run_id"])
    assert len([span for span in server.spans if span.name == "loss"]) == sum(1 for _ in (files / "adapter/training_log.jsonl").open())
    assert sorted(path.name for path in files.iterdir()) == ["adapter", "replies.jsonl", "rows.jsonl"], "nothing of the killed run is left"


def test_a_training_that_fails_gives_its_trace_away_and_may_begin_again(server, files):
    flags = training(files)
    (files / "adapter.checkpoints").write_text("in the way")
    assert run(server, "train_unsloth.py", *flags).returncode == 2
    (root,) = server.spans
    assert root.attributes["langfuse.observation.level"] == "ERROR" and not outbox_path(files / "adapter").exists()
    (files / "adapter.checkpoints").unlink()
    done = run(server, "train_unsloth.py", *flags)
    assert done.returncode == 0, done.stderr
    assert len({span.trace for span in server.spans}) == 2, "another run, another trace"


def test_a_training_that_was_killed_before_its_first_checkpoint_does_not_block_the_next(server, files):
    flags = training(files)
    process = begin(server, "train_unsloth.py", *flags)
    wait_until(lambda: outbox_path(files / "adapter").exists() or process.poll() is not None)
    process.kill()
    process.wait()
    (first,) = {path.name for path in files.glob("*.traces.jsonl")}
    outbox = Outbox(files / first)
    outbox.begin({"trace": trace_id("killed"), "base_url": server.url, "attributes": {}})  # if it died before it had written that
    outbox.close(0, keep=True)
    done = run(server, "train_unsloth.py", *flags)
    assert done.returncode == 0 and "error" not in done.stderr, done.stderr
    assert (files / "adapter/training_info.json").exists() and not list(files.glob("*.traces.jsonl"))


def test_a_run_with_wrong_keys_stops_before_any_work(server, files):
    wrong = keys(server) | {"LANGFUSE_PUBLIC_KEY": f"pk-lf-{uuid.uuid4()}", "LANGFUSE_SECRET_KEY": "sk-lf-not-to-be-shown"}
    flags = ("--track", "structured", "--model-kind", "replay", "--dataset", files / "rows.jsonl", "--replies", files / "replies.jsonl")
    done = run_python(PACKAGE / "01_eval/eval.py", *flags, "--out", files / "report.json", **wrong)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "sk-lf-not-to-be-shown" not in done.stderr
    assert not (files / "report.json").exists()
