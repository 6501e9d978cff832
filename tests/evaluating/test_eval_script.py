"""eval.py from the command line to its files, on recorded replies; and the real replies of ../shared/data, miss by miss."""

import json
import os

import pytest

from slm_swap.common.settings import ROOT
from slm_swap.evaluating.console import show
from slm_swap.rows.examples import read_examples
from slm_swap.scoring.metrics import ERRORS, MATCHERS
from slm_swap.scoring.tracks import TRACKS

RECORDED = ROOT.parent / "shared/data/recorded"
needs_recorded = pytest.mark.skipif(
    not RECORDED.is_dir(), reason="../shared/data is not here: real replies are tested where it is"
)

ROWS = [{"id": f"r{number}", "prompt": f"p{number}", "completion": f'{{"a":{number}}}'} for number in range(4)]
REPLIES = [
    {"id": "r0", "prediction": '{"a":0.0}', "tokens": {"input": 10, "cached": 4, "output": 3}, "seconds": 0.25},
    {"id": "r1", "prediction": 'Sure: {"a":1}', "finish_reason": "stop"},
    {"id": "r2", "prediction": '{"a":', "finish_reason": "length", "tokens": {"input": 7, "output": 9}},
    {"id": "r3", "prediction": "", "finish_reason": "content_filter"},
]
ERRORS_OF_ROWS = [None, "extra_text", "truncated", "filtered"]


@pytest.fixture
def evaluate(run_script, eval_script, tmp_path):
    """A function that runs a structured replay to `out.json`: (exit code, stdout, stderr)."""

    def run_it(*flags, track="structured", out="out.json"):
        return run_script(eval_script, "--track", track, "--model-kind", "replay", *flags, "--out", tmp_path / out)

    return run_it


@pytest.fixture
def files(write_rows):
    return write_rows("rows.jsonl", ROWS), write_rows("replies.jsonl", REPLIES)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_replay_from_files_to_files(evaluate, files, tmp_path):
    rows, replies = files
    code, printed, error = evaluate("--dataset", rows, "--replies", replies)
    assert code == 0 and error.startswith("warning: 1 of 4 rows are not measured, and the metrics count them as they stand (1 truncated, cut by")
    assert "record those replies again" in error and error.count("\n") == 1
    assert "Fully right reply             0.2500" in printed and "missed: filtered or refused 1, cut off 1, other text around it 1" in printed
    shown = f"report: {tmp_path / 'out.json'}\nnext: python 01_eval/eval.py --track structured --model-kind azure --dataset {rows}\n"
    assert printed.endswith(shown)
    report, lines = read(tmp_path / "out.json"), read_lines(tmp_path / "out.rows.jsonl")
    assert set(report) == {
        "schema_version", "stage", "created_at", "track", "args", "code", "packages", "hardware", "model", "inputs",
        "prompt_sha256", "ask", "references_by_teacher", "metrics", "metrics_by_matcher", "counts", "tokens", "sessions", "cached_replies", "seconds", "cost",
        "trace", "latency", "repeat", "again", "asked", "run_id", "confidence",
    }  # fmt: skip
    assert report["metrics"] == {
        "json_valid_rate": 1 / 4, "exact_match_rate": 1 / 4, "field_precision": 1 / 4, "field_recall": 1 / 4, "field_f1": 1 / 4,
        "field_precision_micro": 1.0, "field_recall_micro": 1 / 4, "field_f1_micro": 2 / 5,
    }  # fmt: skip
    assert report["metrics_by_matcher"]["lenient"]["exact_match_rate"] == 2 / 4
    assert set(report["metrics_by_matcher"]) == set(MATCHERS) and report["metrics_by_matcher"]["strict"] == report["metrics"]
    assert report["counts"]["errors"] == dict.fromkeys(ERRORS, 0) | {"filtered": 1, "truncated": 1, "extra_text": 1}
    assert report["inputs"]["path"] == str(rows) and report["inputs"]["rows"] == 4 and len(report["inputs"]["sha256"]) == 64
    assert report["model"]["kind"] == "replay" and report["tokens"] == {"input": 10, "cached": 4, "output": 3, "rows": 1}
    assert report["counts"]["unmeasured"] == {"failed": 0, "truncated": 1} and report["latency"]["why"] == "the replies are recorded"
    assert report["args"]["track"] == "structured" and report["args"]["seed"] == 42 and report["args"]["batch_size"] == 8
    assert report["trace"] == {"id": None, "url": None} and report["cost"]["total"] is None
    text = (tmp_path / "out.json").read_text()
    assert "NaN" not in text and text == json.dumps(report, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    assert [line["error"] for line in lines] == ERRORS_OF_ROWS
    assert [(line["id"], line["reply"], line["reference"]) for line in lines] == [
        (row["id"], reply["prediction"], row["completion"]) for row, reply in zip(ROWS, REPLIES, strict=True)
    ]


def test_a_larger_batch_that_would_fit_is_told_once(evaluate, files, tmp_path, capsys):
    rows, replies = files
    evaluate("--dataset", rows, "--replies", replies)
    report = read(tmp_path / "out.json")
    show(report, tmp_path / "out.json", [], lambda message: None)
    assert "--batch-size" not in capsys.readouterr().out
    report["model"] |= {"batch_size_used": 8, "batch_size_fits": 128}
    show(report, tmp_path / "out.json", [], lambda message: None)
    [line] = [line for line in capsys.readouterr().out.splitlines() if "--batch-size" in line]
    assert line == "batches of 8 rows: --batch-size auto takes 128 at a time on this GPU, which is faster"


def test_its_own_rows_file_gives_the_same_report(evaluate, files, tmp_path):
    rows, replies = files
    assert evaluate("--dataset", rows, "--replies", replies)[0] == 0
    assert evaluate("--dataset", rows, "--replies", tmp_path / "out.rows.jsonl", out="again.json")[0] == 0
    first, second = read(tmp_path / "out.json"), read(tmp_path / "again.json")
    for key in ("metrics", "metrics_by_matcher", "counts", "tokens", "inputs", "prompt_sha256"):
        assert first[key] == second[key]
    assert read_lines(tmp_path / "out.rows.jsonl") == read_lines(tmp_path / "again.rows.jsonl")


def test_a_file_of_replies_as_its_own_dataset(evaluate, write_rows, tmp_path):
    lines = [
        {"prompt": f"p{number}", "reference": '{"a":1}', "prediction": text} for number, text in enumerate(['{"a":1}', "no"])
    ]
    path = write_rows("recorded.jsonl", lines)
    assert evaluate("--replies", path)[0] == 0
    report = read(tmp_path / "out.json")
    assert report["metrics"]["exact_match_rate"] == 0.5 and report["inputs"]["path"] == str(path)
    assert evaluate("--replies", path, "--limit", 1, out="one.json")[0] == 0
    assert read(tmp_path / "one.json")["inputs"]["rows"] == 1


def test_the_name_of_the_report(run_script, eval_script, files, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_script, "PACKAGE", tmp_path)
    rows, replies = files
    code, _, error = run_script(
        eval_script, "--track", "structured", "--model-kind", "replay", "--dataset", rows, "--replies", replies
    )
    assert code == 0, error
    assert sorted(path.name for path in (tmp_path / "01_eval/reports").iterdir()) == [
        "structured_replay_rows.json", "structured_replay_rows.rows.jsonl",
    ]  # fmt: skip


def test_a_split_is_looked_for_in_the_dataset_s_folder(evaluate, files):
    code, _, error = evaluate("--split", "holdout", "--replies", files[1])
    assert code == 2 and "02_dataset/structured/holdout.jsonl" in error and "prepare_data.py" in error


def test_a_failed_request_is_warned_of(evaluate, files, write_rows, tmp_path):
    lines = [
        REPLIES[0],
        *({"id": f"r{number}", "prediction": "", "finish_reason": "error", "reply_error": "HTTP 500"} for number in (1, 2, 3)),
    ]
    code, printed, error = evaluate("--dataset", files[0], "--replies", write_rows("failed.jsonl", lines))
    assert code == 0 and error.startswith("warning: 3 of 4 rows are not measured, and the metrics count them as they stand (3 failed") and "no JSON 3" in printed
    assert read(tmp_path / "out.json")["counts"]["failed_requests"] == 3
    assert [line["reply_error"] for line in read_lines(tmp_path / "out.rows.jsonl")] == [None, "HTTP 500", "HTTP 500", "HTTP 500"]


def test_a_tool_call_with_its_tools(evaluate, write_rows, tmp_path):
    tools = [{"name": "f", "parameters": {"type": "object", "properties": {"n": {"type": "integer", "default": 1}}}}]
    rows = [{"id": "a", "prompt": "p", "completion": '<tool_call name="f">{}</tool_call>', "tools": tools}]
    replies = write_rows("replies.jsonl", [{"id": "a", "prediction": '<tool_call name="f">{"n":"1"}</tool_call>'}])
    assert evaluate("--dataset", write_rows("rows.jsonl", rows), "--replies", replies, track="toolcall")[0] == 0
    report = read(tmp_path / "out.json")
    assert report["counts"]["errors"]["extra_argument"] == 1 and set(TRACKS["toolcall"].gate) <= set(report["metrics"])
    assert [report["metrics_by_matcher"][matcher]["args_exact_rate"] for matcher in MATCHERS] == [0, 1, 1]


BAD = {  # the rows file and the replies file of a run that must stop, and what it says
    "no rows": ([], None, "rows.jsonl has no rows"),
    "bad line": ([ROWS[0], b"{"], None, "rows.jsonl:2: not a line of JSON"),
    "not UTF-8": ([b'{"prompt": "\xff"}'], None, "rows.jsonl:1: not a line of JSON"),
    "no prompt": ([{"completion": "{}"}], None, "rows.jsonl:1: no `prompt`"),
    "half a pair": ([b'{"prompt": "\\ud800", "completion": "{}"}'], None, "rows.jsonl:1: half of a surrogate pair"),
    "bad gold": (
        [ROWS[0], {"prompt": "p", "completion": '{"a":'}],
        None,
        "rows.jsonl:2: the completion is not a structured reply (bad_json",
    ),
    "ids twice": ([ROWS[0], ROWS[0]], None, "rows.jsonl:2: id 'r0' is used at"),
    "a missing reply": (None, REPLIES[:2], "no reply for 2 of 4 rows (first: id 'r2')"),
    "a bad reply line": (None, [*REPLIES, b"oops"], "replies.jsonl:5: not a line of JSON"),
    "no answer at all": (
        None,
        [{"id": row["id"], "prediction": "", "finish_reason": "error"} for row in ROWS],
        "none of the 4 requests",
    ),
}


@pytest.mark.parametrize(("rows", "replies", "what"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_changes_nothing(evaluate, write_rows, tmp_path, rows, replies, what):
    (tmp_path / "out.json").write_text("an earlier report")
    paths = (
        write_rows("rows.jsonl", ROWS if rows is None else rows),
        write_rows("replies.jsonl", REPLIES if replies is None else replies),
    )
    code, printed, error = evaluate("--dataset", paths[0], "--replies", paths[1], "--overwrite")
    assert code == 2 and printed == "" and error.count("\n") == 1 and error.startswith("error: ") and what in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "replies.jsonl", "rows.jsonl"]
    assert (tmp_path / "out.json").read_text() == "an earlier report"


def test_missing_files(evaluate, files, tmp_path):
    for flags, what in (
        (("--dataset", tmp_path / "none.jsonl", "--replies", files[1]), "no rows at"),
        (("--dataset", files[0], "--replies", tmp_path / "none.jsonl"), "cannot read"),
        (("--replies", tmp_path / "none.jsonl"), "no replies at"),
        (("--dataset", tmp_path, "--replies", files[1]), "(Is a directory)"),
        (("--replies", files[1]), "without `prompt` or `reference`"),
    ):
        code, _, error = evaluate(*flags)
        assert code == 2 and what in error and error.count("\n") == 1
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--track", "poetry", "--model-kind", "slm"], "invalid choice: 'poetry'"),
        (["--track", "toolcall"], "--model-kind"),
        (["--model-kind", "slm"], "--track"),
        (["--track", "toolcall", "--model-kind", "gpt"], "invalid choice: 'gpt'"),
        (["--track", "toolcall", "--model-kind", "replay"], "--replies FILE go together"),
        (["--track", "toolcall", "--model-kind", "azure", "--replies", "x.jsonl"], "--replies FILE go together"),
        (["--track", "toolcall", "--model-kind", "replay", "--replies", "x.jsonl", "--cache", "c"], "--cache has no effect"),
        (["--track", "toolcall", "--model-kind", "slm", "--split", "val", "--dataset", "x"], "not allowed with"),
        (["--track", "toolcall", "--model-kind", "slm", "--limit", "0"], "--limit"),
        (["--track", "toolcall", "--model-kind", "slm", "--batch-size", "x"], "--batch-size"),
        (["--track", "toolcall", "--model-kind", "slm", "--precision", "int2"], "int2"),
        (["--track", "toolcall", "--model", "slm"], "--model"),
        (["--track", "toolcall", "--model-kind", "slm", "a\nb"], "unrecognized arguments: a b"),
    ],
)
def test_usage_errors_are_one_line(run_script, eval_script, flags, what):
    code, printed, error = run_script(eval_script, *flags)
    assert code == 2 and printed == "" and error.count("\n") == 1 and what in error and "--help" in error


def test_a_report_that_cannot_be_written_is_noticed_before_the_work(evaluate, files, tmp_path, monkeypatch, eval_script):
    monkeypatch.setattr(eval_script, "make_client", lambda *_, **__: pytest.fail("a model was loaded"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "taken.rows.jsonl").mkdir()
    for out in ("folder", "rows.jsonl/out.json", "taken.json"):
        code, _, error = evaluate("--dataset", files[0], "--replies", files[1], out=out)
        assert code == 2 and error.startswith("error: cannot write") and error.count("\n") == 1
    os.mkfifo(tmp_path / "pipe")
    for flags in (("--dataset", tmp_path / "pipe", "--replies", files[1]), ("--replies", tmp_path / "pipe")):
        code, _, error = evaluate(*flags)
        assert code == 2 and "is no file but a pipe or a device: write what it gives to a file" in error and error.count("\n") == 1
    code, _, error = evaluate("--dataset", files[0], "--replies", files[1], out="pipe")
    assert code == 2 and "cannot write" in error and (tmp_path / "pipe").is_fifo()
    os.symlink("loop", tmp_path / "loop")
    code, _, error = evaluate("--dataset", tmp_path / "loop", "--replies", files[1])
    assert code == 2 and "its symbolic links lead round in a circle" in error and error.count("\n") == 1


@pytest.mark.parametrize("kib", [0, 4, 40, 400, 800])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(run_script, eval_script, write_rows, disk, monkeypatch, kib):
    rows = [{"id": f"r{number}", "prompt": f"p{number}", "completion": '{"a":1}'} for number in range(400)]
    replies = [{"id": row["id"], "prediction": '{"a":1}' + " " * 500} for row in rows]
    flags = ("--track", "structured", "--model-kind", "replay", "--dataset", write_rows("rows.jsonl", rows), "--replies", write_rows("replies.jsonl", replies))
    disk.leave(kib)
    code, printed, error = run_script(eval_script, *flags, "--out", disk.folder / "out.json")
    told = error.splitlines()[-1]
    assert (code, printed) == (2, "") and "Traceback" not in error, error
    assert told.startswith(f"error: cannot write {disk.folder}/out.") and told.endswith("(No space left on device): make room and run the same command again")
    assert set(disk.files()) <= {"out.rows.jsonl.part"}, "nothing half written, nothing hidden"
    disk.make_room()
    code, _, error = run_script(eval_script, *flags, "--out", disk.folder / "out.json")
    assert code == 0 and set(disk.files()) == {"out.json", "out.rows.jsonl"}, error
    assert ("rows are answered already" in error) == (kib > 0) and read(disk.folder / "out.json")["metrics"]["exact_match_rate"] == 1


def test_no_report_overwrites_what_it_is_made_from(evaluate, files, write_rows, tmp_path):
    rows, replies = files
    assert evaluate("--dataset", rows, "--replies", replies)[0] == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for flags, out in (
        (("--dataset", rows, "--replies", replies), "rows.jsonl"),
        (("--dataset", rows, "--replies", replies), "replies.jsonl"),
        (("--dataset", rows, "--replies", tmp_path / "out.rows.jsonl"), "out.json"),
    ):
        code, _, error = evaluate(*flags, out=out)
        assert code == 2 and "would be overwritten" in error
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_without_langfuse_s_variables_a_run_stops_at_once(evaluate, files, monkeypatch, tmp_path):
    monkeypatch.setenv("LANGFUSE_DISABLED", "0")
    for name in ("LANGFUSE_PUBLIC_KEY", "LANGFUSE_SECRET_KEY", "LANGFUSE_BASE_URL", "LANGFUSE_HOST"):
        monkeypatch.setenv(name, "")
    code, _, error = evaluate("--dataset", files[0], "--replies", files[1])
    assert code == 2 and "LANGFUSE_PUBLIC_KEY" in error and not (tmp_path / "out.json").exists()


# -- Real replies ----------------------------------------------------------------------------------------------------------------

# Read by eye, line by line: what each of the 100 replies misses by. Lines that are in no list are right.
AZURE_MISSES = {
    "no_json": {1, 15, 19, 25, 29, 34},  # nothing came back
    "extra_text": {6, 11, 23, 39},  # 6, 11, 39: thinking aloud; 23: a stray quote behind the object
    "extra_argument": {5, 10, 22, 46, 50},
    "wrong_value": {2, 7, 20},
}
SLM_MISSES = {
    "no_json": {1, 8, 20, 21, 22, 23, 31, 36, 42, 47, 50},
    # Python's quotes, HTML's or escaped ones in an attribute; 11: `optional` twice in each object; 49: `{...}`
    "bad_json": {9, 11, 12, 13, 14, 15, 16, 24, 28, 34, 39, 49},
    "extra_text": {18, 19, 30, 32, 33, 35, 41, 43, 48},  # 18, 19, 32: a second call
    # Attributes instead of a body, no wrapper, a list, or the arguments beside an empty body (4)
    "wrong_shape": {2, 3, 4, 5, 6, 7, 10, 17, 25, 26, 27, 29, 37, 38, 40, 44, 45, 46},
}
LENIENTLY_RIGHT = {"azure": {6, 11, 20, 39}, "slm": {30, 33, 41, 43, 48}}


@needs_recorded
@pytest.mark.parametrize(("name", "misses"), [("azure", AZURE_MISSES), ("slm", SLM_MISSES)])
def test_real_replies_miss_by_miss(evaluate, tmp_path, name, misses):
    assert evaluate("--replies", RECORDED / f"toolcall_{name}.jsonl", track="toolcall")[0] == 0
    report, lines = read(tmp_path / "out.json"), read_lines(tmp_path / "out.rows.jsonl")
    found = {error: {number for number, line in enumerate(lines, 1) if line["error"] == error} for error in ERRORS}
    assert {error: numbers for error, numbers in found.items() if numbers} == misses
    right = 50 - sum(map(len, misses.values()))
    metrics = report["metrics"]
    assert len(lines) == 50 and metrics["args_exact_rate"] == right / 50
    invalid = sum(len(misses.get(error, ())) for error in ("no_json", "bad_json", "extra_text", "wrong_shape"))
    assert metrics["valid_call_rate"] == metrics["name_match_rate"] == (50 - invalid) / 50
    lenient = {number for number, line in enumerate(lines, 1) if line["scores_by_matcher"]["lenient"]["args_exact"]}
    assert (
        lenient - LENIENTLY_RIGHT[name] == set(range(1, 51)) - set().union(*misses.values()) and LENIENTLY_RIGHT[name] <= lenient
    )


@needs_recorded
def test_the_real_gate(evaluate, run_script, compare_script, tmp_path):
    for name in ("azure", "slm"):
        assert evaluate("--replies", RECORDED / f"toolcall_{name}.jsonl", track="toolcall", out=f"{name}.json")[0] == 0
    azure, slm = read(tmp_path / "azure.json"), read(tmp_path / "slm.json")
    assert azure["inputs"]["rows_sha256"] == slm["inputs"]["rows_sha256"]  # the same rows, told by what is in them
    flags = (
        "--track",
        "toolcall",
        "--azure",
        tmp_path / "azure.json",
        "--slm",
        tmp_path / "slm.json",
        "--out",
        tmp_path / "decision.json",
    )
    code, printed, _ = run_script(compare_script, *flags)
    assert code == 10 and "FINE_TUNE=1\nVERDICT=FINE_TUNE\n" in printed
    metrics = read(tmp_path / "decision.json")["metrics"]
    assert (metrics["args_exact_rate"]["azure"], metrics["args_exact_rate"]["slm"]) == (32 / 50, 0)
    assert (metrics["valid_call_rate"]["azure"], metrics["valid_call_rate"]["slm"]) == (40 / 50, 0)


@needs_recorded
@pytest.mark.parametrize("track", TRACKS)
def test_every_recorded_completion_is_gold_and_right_against_itself(track):
    examples = read_examples(RECORDED / f"xlam_{track}_rows.jsonl")
    for example in examples:
        scored = TRACKS[track].score(TRACKS[track].reference(example), example.completion)
        assert scored.error is None and scored.strict.f1 == scored.schema.f1 == scored.lenient.f1 == 1
    assert len(examples) == 300


def test_flags_of_the_local_model_say_that_they_have_no_effect(evaluate, files):
    rows, replies = files
    code, _, error = evaluate("--dataset", rows, "--replies", replies, "--adapter", "adapter", "--precision", "bf16", "--batch-size", 4)
    told = "warning: no effect: --batch-size, --precision, --adapter (for the local model, and replay is asked): leave it out, or give --model-kind slm"
    assert code == 0 and error.splitlines()[0] == told
    assert "no effect" not in evaluate("--dataset", rows, "--replies", replies, out="other.json")[2]
