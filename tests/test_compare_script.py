"""compare.py: what it prints, writes, exits with and refuses."""

import json

import pytest

from slm_swap.tracks import TRACKS

GATE = TRACKS["toolcall"].gate


def a_report(kind="azure", **metrics):
    """A report as eval.py writes it, with every gate metric 0.9 but for those given."""
    return {
        "schema_version": 1,
        "stage": "eval",
        "track": "toolcall",
        "model": {"kind": kind},
        "inputs": {"path": "rows.jsonl", "sha256": "a" * 64, "rows": 4, "rows_sha256": "b" * 64},
        "prompt_sha256": "c" * 64,
        "metrics": dict.fromkeys(GATE, 0.9) | metrics,
        "counts": {"rows": 4, "failed_requests": 0},
    }


@pytest.fixture
def compare(run_script, compare_script, tmp_path):
    """A function that compares two reports (values, or paths): (exit code, stdout, stderr)."""

    def run_it(azure, slm, *flags, track="toolcall"):
        paths = []
        for name, report in (("azure", azure), ("slm", slm)):
            paths.append(tmp_path / f"{name}.json" if isinstance(report, dict) else report)
            if isinstance(report, dict):
                paths[-1].write_text(json.dumps(report))
        return run_script(
            compare_script, "--track", track, "--azure", paths[0], "--slm", paths[1], "--out", tmp_path / "decision.json", *flags
        )

    return run_it


def decision_in(folder):
    return json.loads((folder / "decision.json").read_text())


def test_swap(compare, tmp_path):
    code, printed, error = compare(a_report(), a_report("slm"))
    assert (code, error) == (0, "")
    assert printed.splitlines()[-3:] == ["FINE_TUNE=0", "VERDICT=SWAP", f"decision: {tmp_path / 'decision.json'}"]
    assert all(f"{name} " in printed for name in GATE) and "worse by" not in printed


def test_fine_tune_shows_every_difference(compare, tmp_path):
    code, printed, _ = compare(a_report(), a_report("slm", args_f1=0.5, valid_call_rate=0.8, args_recall=1.0))
    assert code == 10
    lines = printed.splitlines()
    assert lines[-3:-1] == ["FINE_TUNE=1", "VERDICT=FINE_TUNE"]
    shown = {line.split()[0]: line for line in lines[1:-3]}
    assert list(shown) == list(GATE)
    assert shown["args_f1"].split()[1:4] == ["0.9000", "0.5000", "+0.4000"] and shown["args_recall"].split()[3] == "-0.1000"
    assert {name for name, line in shown.items() if "worse by more than 0.02" in line} == {"args_f1", "valid_call_rate"}


def test_the_decision_file(compare, tmp_path):
    assert compare(a_report(), a_report("slm", args_f1=0.4), "--delta", "0.1")[0] == 10
    decision = decision_in(tmp_path)
    assert {"track", "delta", "rule", "verdict", "fine_tune", "metrics"} <= set(decision)
    assert (decision["track"], decision["delta"], decision["rule"]) == ("toolcall", 0.1, "point")
    assert (decision["verdict"], decision["fine_tune"], decision["failing"]) == ("FINE_TUNE", True, ["args_f1"])
    assert set(decision["metrics"]) == set(GATE) and decision["metrics"]["args_f1"] == {
        "azure": 0.9,
        "slm": 0.4,
        "difference": 0.5,
    }
    assert decision["stage"] == "compare" and decision["rows"] == 4
    assert decision["reports"]["slm"]["path"] == str(tmp_path / "slm.json") and len(decision["reports"]["slm"]["sha256"]) == 64
    assert decision["models"] == {"azure": {"kind": "azure"}, "slm": {"kind": "slm"}}


@pytest.mark.parametrize(
    ("slm", "delta", "code"),
    [
        (0.85, "0.05", 0),
        (0.8499, "0.05", 10),
        (0.88, "0.02", 0),
        (0.9, "0", 0),
        (0.8999, "0", 10),
        (0.0, "1", 0),
        (0.0, "0.9", 0),
    ],
)
def test_a_gap_of_just_the_margin_is_not_more_than_it(compare, slm, delta, code):
    assert compare(a_report(), a_report("slm", args_exact_rate=slm), "--delta", delta)[0] == code


def test_the_name_of_the_decision(compare, run_script, compare_script, tmp_path, monkeypatch):
    compare(a_report(), a_report("slm"))
    monkeypatch.setattr(compare_script, "PACKAGE", tmp_path)
    code, _, _ = run_script(
        compare_script, "--track", "toolcall", "--azure", tmp_path / "azure.json", "--slm", tmp_path / "slm.json"
    )
    assert code == 0 and (tmp_path / "03_compare/reports/toolcall.json").is_file()


def changed(part, value, kind="slm"):
    report = a_report(kind)
    *path, last = part.split(".")
    target = report
    for key in path:
        target = target[key]
    if value is None:
        del target[last]
    else:
        target[last] = value
    return report


@pytest.mark.parametrize(
    ("slm", "what"),
    [
        (changed("inputs.rows_sha256", "d" * 64), "different data, rows.jsonl (4 rows) and rows.jsonl (4 rows)"),
        (changed("inputs.rows", 3), "different data"),
        (changed("prompt_sha256", "d" * 64), "different prompts"),
        (changed("track", "structured"), "is of track structured, not toolcall"),
        (changed("track", None), "is of track None"),
        (changed("stage", "compare"), "is not a report of 01_eval/eval.py"),
        (changed("metrics", None), "is not a report of 01_eval/eval.py"),
        (changed("metrics", [1]), "is not a report of 01_eval/eval.py"),
        (changed("metrics.args_f1", None), "no usable args_f1"),
        (changed("metrics.args_f1", "0.9"), "no usable args_f1"),
        (changed("metrics.args_f1", True), "no usable args_f1"),
        (changed("metrics.args_f1", float("nan")), "no usable args_f1"),
        (changed("metrics.args_f1", 90), "no usable args_f1"),
        (changed("metrics.args_f1", -0.1), "no usable args_f1"),
        (changed("inputs", None), "does not say which data"),
        (changed("inputs", []), "does not say which data"),
    ],
)
def test_what_is_refused(compare, tmp_path, slm, what):
    (tmp_path / "decision.json").write_text("an earlier decision")
    for pair in ((a_report(), slm), (slm | {"model": {"kind": "replay"}}, a_report("slm"))):
        code, printed, error = compare(*pair)
        assert code == 2 and printed == "" and error.count("\n") == 1 and error.startswith("error: ") and what in error, error
        assert (tmp_path / "decision.json").read_text() == "an earlier decision"


def test_the_track_asked_for_counts(compare):
    code, _, error = compare(a_report(), a_report("slm"), track="structured")
    assert code == 2 and "not structured" in error


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", None])
def test_what_is_no_report(compare, tmp_path, content):
    path = tmp_path / "broken.json"
    if content is not None:
        path.write_bytes(content)
    for pair in ((path, a_report("slm")), (a_report(), path)):
        code, _, error = compare(*pair)
        assert code == 2 and error.count("\n") == 1 and "broken.json" in error and "01_eval/eval.py" in error
    assert not (tmp_path / "decision.json").exists()


def test_different_files_with_the_same_rows_are_the_same_data(compare):
    slm = changed("inputs.sha256", "e" * 64)
    assert compare(a_report(), slm)[0] == 0
    for report in (azure := a_report(), slm):
        del report["inputs"]["rows_sha256"]
    code, _, error = compare(azure, slm)  # then the files' own hashes decide
    assert code == 2 and "different data" in error
    assert compare(azure, azure | {"model": {"kind": "slm"}})[0] == 0


def test_reports_without_what_compare_does_not_need(compare, tmp_path):
    bare = {key: a_report()[key] for key in ("track", "metrics", "prompt_sha256")} | {"inputs": {"sha256": "a"}}
    assert compare(bare, bare | {"metrics": dict.fromkeys(GATE, 1.0)})[0] == 0
    assert decision_in(tmp_path)["rows"] is None and decision_in(tmp_path)["models"] == {"azure": None, "slm": None}


def test_a_replay_s_prompts_are_not_known_and_said_so(compare):
    code, _, error = compare(a_report(), a_report("replay") | {"prompt_sha256": None})
    assert code == 0 and error.startswith("warning: ") and "prompts" in error and error.count("\n") == 1


def test_a_local_model_s_report_in_the_hosted_one_s_place(compare, tmp_path):
    code, _, error = compare(a_report("slm", args_f1=0.1), a_report("azure"))  # swapped, it would say SWAP
    assert code == 2 and "--azure report is of a local model" in error and not (tmp_path / "decision.json").exists()
    assert compare(a_report("replay"), a_report("replay", args_f1=0.8))[0] == 10  # recorded replies may be anybody's
    code, _, error = compare(a_report("azure"), a_report("azure", args_f1=0.8))  # a small model may be hosted
    assert code == 10 and error == "warning: the --slm report is of a hosted model (model.kind is azure)\n"


def test_a_report_against_itself_is_warned_of(compare):
    code, _, error = compare(a_report("replay"), a_report("replay"))
    assert code == 0 and "the same report" in error


def test_failed_requests_are_warned_of(compare):
    code, _, error = compare(a_report() | {"counts": {"failed_requests": 3}}, a_report("slm"))
    assert code == 0 and error.startswith("warning: 3 requests of the azure report failed") and error.count("\n") == 1


@pytest.mark.parametrize("out", ["azure.json", "slm.json", "azure.json/decision.json", "."])
def test_where_the_decision_cannot_go(compare, tmp_path, out):
    code, _, error = compare(a_report(), a_report("slm"), "--out", tmp_path / out)
    assert code == 2 and error.count("\n") == 1 and "--out" in error
    assert json.loads((tmp_path / "azure.json").read_text()) == a_report()


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        ([], "--track"),
        (["--track", "toolcall", "--azure", "a"], "--slm"),
        (["--track", "toolcall", "--slm", "a"], "--azure"),
        (["--track", "poetry", "--azure", "a", "--slm", "b"], "invalid choice: 'poetry'"),
        (["--track", "toolcall", "--azure", "a", "--slm", "b", "--delta", "2"], "between 0 and 1"),
        (["--track", "toolcall", "--azure", "a", "--slm", "b", "--delta", "-0.1"], "--delta"),
        (["--track", "toolcall", "--azure", "a", "--slm", "b", "--delta", "nan"], "between 0 and 1"),
        (["--track", "toolcall", "--azure", "a", "--slm", "b", "--delta", "small"], "--delta"),
    ],
)
def test_usage_errors_are_one_line(run_script, compare_script, flags, what):
    code, printed, error = run_script(compare_script, *flags)
    assert code == 2 and printed == "" and error.count("\n") == 1 and what in error and "--help" in error
