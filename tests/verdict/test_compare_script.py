"""compare.py: what it prints, writes, exits with and refuses."""

import json
import os
import random

import pytest

from slm_swap.common.reports import rows_path, sha256_file
from slm_swap.common.settings import ROOT
from slm_swap.evaluating.report import Digests
from slm_swap.scoring.tracks import TRACKS
from slm_swap.scoring.words import metric_name
from tests.support.calibrated import write_pair
from tests.support.evaluated import AZURE, SLM, TUNED, calls, replies, write_report
from tests.support.scripts import load_script

GATE = TRACKS["toolcall"].gate
RECORDED = ROOT.parent / "shared/data/recorded"
GOOD, BAD, UNSURE = ["right"], ["right", "wrong_value"], ["right"] * 29 + ["wrong_value"]
DECISION = {  # the keys of the decision file
    "schema_version", "stage", "created_at", "code", "track", "verdict", "fine_tune", "sentence", "rule", "delta", "alpha", "rows", "clusters",
    "reports", "models", "labels", "inputs", "metrics", "failing", "need", "swap_alpha", "withheld", "question", "questions", "tools",
    "unmeasured", "filtered", "latency", "repeat", "looks", "matchers", "flips", "gap", "groups", "gold_audit", "before", "cost",
    "sequential", "confidence", "cascade", "warnings", "trace",
}  # fmt: skip


@pytest.fixture
def make(tmp_path):
    """A function that writes a report and its rows; `changes` to the report by their dotted names, None: taken out."""

    def write(name, errors=GOOD, model=None, rows=200, groups=(None,), tools=("book",), changes=None):
        model = model or (SLM if name == "slm" else AZURE)
        examples = calls(rows, groups, tools)
        path = write_report(tmp_path / f"{name}.json", examples, replies(examples, errors), model)
        report = read(path)
        for place, value in (changes or {}).items():
            *parents, last = place.split(".")
            target = report
            for parent in parents:
                target = target[parent]
            target[last] = value
            if value is None:
                del target[last]
        path.write_text(json.dumps(report))
        return path

    return write


@pytest.fixture
def compare(run_script, compare_script, tmp_path):
    """A function that compares two reports: (exit code, stdout, stderr)."""

    def run_it(azure, slm, *flags, track="toolcall"):
        return run_script(compare_script, "--track", track, "--azure", azure, "--slm", slm, "--out", tmp_path / "decision.json", *flags)

    return run_it


@pytest.fixture
def refused(compare, tmp_path):
    """A function that sees a comparison refused in one line with nothing written, and gives the line."""

    def run_it(azure, slm, *flags, **more):
        (tmp_path / "decision.json").write_text("an earlier decision")
        code, printed, error = compare(azure, slm, "--markdown", tmp_path / "pr.md", *flags, **more)
        assert (code, printed, error.count("\n")) == (2, "", 1) and error.startswith("error: "), error
        assert (tmp_path / "decision.json").read_text() == "an earlier decision" and not (tmp_path / "pr.md").exists()
        return error

    return run_it


def read(path):
    return json.loads(path.read_text())


@pytest.fixture
def decision(tmp_path):
    return lambda: read(tmp_path / "decision.json")


def edit_rows(report, change):
    """The rows file with its rows, a list, changed."""
    lines = change([json.loads(line) for line in rows_path(report).read_text().splitlines()])
    rows_path(report).write_text("".join(json.dumps(line) + "\n" for line in lines))


# -- Verdicts --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slm", "verdict", "code"), [(GOOD, "SWAP", 0), (BAD, "FINE_TUNE", 10), (UNSURE, "NEED_MORE_DATA", 11)]
)
@pytest.mark.parametrize("flags", [[], ["--table"], ["--sequential"]])
def test_verdicts_and_exit_codes(compare, make, decision, tmp_path, slm, verdict, code, flags):
    rows = 800 if flags == ["--sequential"] and slm is GOOD else 200
    left, printed, error = compare(make("azure", rows=rows), make("slm", slm, rows=rows), *flags)
    assert (left, error) == (code, "")
    assert printed.splitlines()[-3:] == [f"FINE_TUNE={int(code == 10)}", f"VERDICT={verdict}", f"decision: {tmp_path / 'decision.json'}"]
    assert all(metric_name(name) in printed for name in GATE)
    told = decision()
    assert (told["verdict"], told["fine_tune"], told["delta"], told["alpha"]) == (verdict, code == 10, 0.02, 0.05)
    assert told["rule"] == ("sequential" if flags == ["--sequential"] else "paired") and told["track"] == "toolcall"
    assert (told["sequential"] is None) == (flags != ["--sequential"])
    assert " ".join(told["sentence"].split()) in " ".join(printed.split())


def test_the_decision_file_has_the_keys_that_are_promised(compare, make, decision, tmp_path):
    azure, slm, before = make("azure"), make("slm", BAD, TUNED), make("before", ["no_json"], SLM)
    for flags in ([], ["--before", before], ["--sequential"], ["--rule", "point"]):
        assert compare(azure, slm, *flags)[0] == 10
        assert set(decision()) == DECISION, flags
    assert compare(azure, slm, "--before", before)[0] == 10
    told = decision()
    assert told["stage"] == "compare" and told["rows"] == 200 and told["inputs"] == read(azure)["inputs"]
    assert told["clusters"] == {"by": "row", "count": 200, "effective": 200}
    for side, path in (("azure", azure), ("slm", slm), ("before", before)):
        rows = rows_path(path)
        assert told["reports"][side] == {
            "path": str(path), "sha256": sha256_file(path), "rows_path": str(rows), "rows_sha256": sha256_file(rows), "ask": read(path)["ask"], "shots": None,
        }  # fmt: skip
    assert told["models"] == {"azure": AZURE, "slm": TUNED, "before": SLM}
    assert told["labels"] == {"azure": "gpt-4o-mini", "slm": "phi-4-mini + adapter_toolcall", "before": "phi-4-mini"}
    assert set(told["metrics"]) == set(GATE) == set(told["before"]["metrics"])
    assert set(told["metrics"]["args_f1"]) == {
        "azure", "slm", "difference", "interval", "p_value", "p_worse", "p_worse_holm", "azure_interval", "slm_interval", "discordant",
    }  # fmt: skip
    assert told["metrics"]["args_exact_rate"]["discordant"] == {"azure_better": 100, "slm_better": 0, "equal": 100}
    assert set(told["matchers"]) == {"strict", "schema", "lenient"} and told["flips"] is False
    assert told["failing"][0] == "args_exact_rate"


def test_what_is_not_known_is_null(compare, make, decision):
    compare(make("azure"), make("slm"))
    told = decision()
    assert {name for name in told if told[name] is None} == {"withheld", "before", "need", "unmeasured", "filtered", "sequential", "cascade"}
    assert told["reports"]["before"] is told["models"]["before"] is told["labels"]["before"] is None


def test_the_decision_does_not_hang_on_the_order_of_rows(compare, make, decision):
    azure, slm = make("azure", groups=list("abcdefghijkl")), make("slm", UNSURE, groups=list("abcdefghijkl"))
    found = []
    for _ in range(3):
        for flags in ([], ["--sequential"]):
            compare(azure, slm, *flags)
            told = decision()
            assert told["reports"]["slm"].pop("rows_sha256")
            found.append({name: value for name, value in told.items() if name != "created_at"})
        edit_rows(slm, lambda rows: random.sample(rows, len(rows)))
    assert found[0] == found[2] == found[4] and found[1] == found[3] == found[5]


def test_no_decision_is_there_that_was_not_counted(compare, make, tmp_path):
    (tmp_path / "toolcall.looks.jsonl").mkdir()
    code, _, error = compare(make("azure"), make("slm"))
    assert code == 2 and "toolcall.looks.jsonl (Is a directory)" in error and not (tmp_path / "decision.json").exists()


def test_neither_a_pipe_nor_a_device_is_written_over(compare, make, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for flags in (("--out", tmp_path / "pipe"), ("--markdown", tmp_path / "pipe")):
        code, printed, error = compare(make("azure"), make("slm"), *flags)
        assert (code, printed, error.count("\n")) == (2, "", 1) and "cannot write" in error
    assert (tmp_path / "pipe").is_fifo()


def test_the_two_questions(compare, make, decision):
    groups = ["a", "b", None]
    azure, slm = (make(name, groups=groups, tools=["book", "hire"], rows=300) for name in ("azure", "slm"))
    for flags, by, count in (([], "group", 102), (["--tools", "these"], "group", 102), (["--tools", "others"], "tool", 2)):
        assert compare(azure, slm, *flags)[0] == 11
        told = decision()
        assert (told["clusters"]["by"], told["clusters"]["count"]) == (by, count)
        assert {name: own["clusters"]["by"] for name, own in told["questions"].items()} == {"these": "group", "others": "tool"}
    assert compare(azure, slm, "--tools", "others")[1].count("300 rows of 2 tools do not settle it for other tools") == 1


def test_before(compare, make, decision, refused):
    azure, slm, before = make("azure"), make("slm", BAD, TUNED), make("before", ["no_json"], SLM)
    code, printed, error = compare(azure, slm, "--before", before, "--table")
    assert (code, error) == (10, "") and "Before: phi-4-mini" in printed
    told = decision()["before"]
    assert (told["metrics"]["args_exact_rate"]["gain"], len(told["better"]), told["worse"]) == (0.5, 100, [])
    printed = compare(azure, slm, "--before", before)[1]
    assert "Before fine-tuning “Fully right call” was 0.0000: +0.5000 gained (" in printed and "100 rows better and 0 worse." in printed
    assert "different data" in refused(azure, slm, "--before", make("fewer", model=SLM, rows=100))
    assert "no before.rows.jsonl" in refused(azure, slm, "--before", bare(before)).replace(str(before.parent) + "/", "")


@pytest.mark.parametrize(
    ("tuned", "before", "fits"),
    [
        (TUNED | {"files_sha256": ["a", "adapter"]}, SLM | {"files_sha256": ["a"]}, True),
        (TUNED | {"files_sha256": ["a", "adapter"]}, SLM | {"files_sha256": ["b"]}, False),
        (TUNED | {"files_sha256": ["a", "adapter"]}, TUNED | {"files_sha256": ["a", "older"]}, True),
        (TUNED | {"files_sha256": ["a", "adapter"]}, TUNED | {"files_sha256": ["b", "older"]}, False),
        (SLM | {"files_sha256": ["merged"], "trained_on_sha256": "a"}, SLM | {"files_sha256": ["a"]}, True),
        (SLM | {"files_sha256": ["merged"], "trained_on_sha256": "a"}, SLM | {"files_sha256": ["b"]}, False),
        (SLM | {"files_sha256": ["tuned elsewhere"]}, SLM | {"files_sha256": ["b"]}, True),
        (TUNED, SLM | {"files_sha256": ["b"]}, True),
    ],
)
def test_what_was_gained_is_over_the_weights_that_were_trained(compare, refused, make, tuned, before, fits):
    """Over others it would be the difference between two models, and a price would be paid for it."""
    azure, slm, before = make("azure"), make("slm", BAD, tuned), make("before", ["no_json"], before)
    if fits:
        assert compare(azure, slm, "--before", before)[0] == 10
    else:
        assert "is of other weights" in (error := refused(azure, slm, "--before", before)) and "leave --before out" in error
    assert compare(azure, slm)[0] == 10, "without it the verdict is about the tuned model alone"


def bare(report):
    rows_path(report).unlink()
    return report


def test_markdown(compare, make, tmp_path):
    azure, slm = make("azure"), make("slm", BAD)
    code, printed, _ = compare(azure, slm, "--markdown", tmp_path / "deep/pr.md")
    assert code == 10 and printed.splitlines()[-4:] == [
        f"markdown: {tmp_path / 'deep/pr.md'}", "FINE_TUNE=1", "VERDICT=FINE_TUNE", f"decision: {tmp_path / 'decision.json'}",
    ]  # fmt: skip
    assert (tmp_path / "deep/pr.md").read_text().startswith("## toolcall: FINE_TUNE\n")


def test_prices_are_read(compare, make, decision, monkeypatch, tmp_path):
    (tmp_path / "prices.toml").write_text('currency = "EUR"\n[hosted."gpt-4o-mini"]\ninput = 1.0\noutput = 2.0\n')
    monkeypatch.setenv("PRICES_FILE", str(tmp_path / "prices.toml"))
    compare(make("azure"), make("slm"))
    cost = decision()["cost"]
    assert (cost["currency"], cost["azure"]["per_1000"], cost["slm"]["per_1000"]) == ("EUR", pytest.approx(0.14), None)


def test_prices_that_are_wrong_stop_it(refused, make, monkeypatch, tmp_path):
    (tmp_path / "prices.toml").write_text("currency = 1\n")
    monkeypatch.setenv("PRICES_FILE", str(tmp_path / "prices.toml"))
    assert "currency is 1" in refused(make("azure"), make("slm"))


def test_the_name_of_the_decision(make, run_script, compare_script, tmp_path, monkeypatch):
    azure, slm = make("azure"), make("slm")
    monkeypatch.setattr(compare_script, "PACKAGE", tmp_path)
    code, _, _ = run_script(compare_script, "--track", "toolcall", "--azure", azure, "--slm", slm)
    assert code == 0 and (tmp_path / "03_compare/reports/toolcall.json").is_file()


# -- The point rule --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slm", "delta", "code"), [(0.85, "0.05", 0), (0.8499, "0.05", 10), (0.88, "0.02", 0), (0.9, "0", 0), (0.8999, "0", 10), (0.0, "0.9", 0)]
)
def test_a_gap_of_just_the_margin_is_not_more_than_it(compare, make, decision, slm, delta, code):
    azure, slm = (bare(make(name, changes={f"metrics.{metric}": value for metric in GATE})) for name, value in (("azure", 0.9), ("slm", slm)))
    left, printed, error = compare(azure, slm, "--delta", delta, "--rule", "point")  # which needs no rows
    assert (left, error) == (code, "")
    told = decision()
    assert (told["rule"], told["alpha"], told["delta"], told["verdict"]) == ("point", None, float(delta), "FINE_TUNE" if code else "SWAP")
    assert printed.splitlines()[-3:-1] == [f"FINE_TUNE={int(code == 10)}", f"VERDICT={told['verdict']}"]
    assert told["reports"]["slm"]["rows_path"] is None and told["metrics"]["args_f1"]["azure"] == 0.9
    assert set(told["failing"]) == (set(GATE) if code else set())
    nothing = ("clusters", "need", "matchers", "flips", "gap", "groups", "gold_audit", "before", "cost", "sequential", "confidence")
    assert all(told[name] is None for name in nothing) and told["sentence"].startswith("By the means of 200 rows alone")


def test_the_two_rules_may_differ(compare, make):
    azure, slm = make("azure", rows=60), make("slm", UNSURE, rows=60)  # two of 60: 3.3 points
    assert compare(azure, slm, "--rule", "point")[0] == 10 and compare(azure, slm, "--rule", "paired")[0] == 11
    assert compare(azure, slm, "--rule", "point", "--delta", "0.04")[0] == 0 and compare(azure, slm, "--delta", "0.04")[0] == 11


def test_reports_without_what_the_point_rule_does_not_need(compare, make, decision):
    keep = ("track", "metrics", "prompt_sha256")
    paths = []
    for name in ("azure", "slm"):
        path = bare(make(name))
        path.write_text(json.dumps({key: read(path)[key] for key in keep} | {"inputs": {"sha256": "a", "rows": 4}, "stage": (name == "azure" and "eval") or None}))
        paths.append(path)
    code, _, error = compare(*paths, "--rule", "point")
    assert (code, error) == (0, "")
    assert decision()["models"] == {"azure": None, "slm": None, "before": None} and decision()["rows"] == 4


# -- Stopped early ---------------------------------------------------------------------------------------------------------------


STOPPED = {"rows_available": 1000, "rows": 200, "largest_cluster": 1, "delta": 0.02, "alpha": 0.05, "verdict": "FINE_TUNE"}


def test_a_stopped_run_takes_the_sequential_rule(compare, refused, make, decision):
    azure, slm = make("azure", changes={"stopped_early": STOPPED}), make("slm", BAD, changes={"stopped_early": STOPPED})
    for flags in ([], ["--rule", "point"]):
        assert "only --sequential holds for such rows" in refused(azure, slm, *flags)
    assert "for the question --tools these: pass --tools these" in refused(azure, slm, "--sequential", "--tools", "others")
    code, _, error = compare(azure, slm, "--sequential")
    assert (code, error) == (10, "")
    told = decision()["sequential"]
    assert (told["stopped_after_rows"], told["rows_available"], told["calls_saved"], told["azure_cost_saved"]) == (200, 1000, 800, None)
    assert set(told["certain_at"]) == set(GATE)


def test_a_run_that_was_not_stopped_says_null(compare, make):
    sides = [make(name) for name in ("azure", "slm")]
    for path in sides:
        path.write_text(json.dumps(read(path) | {"stopped_early": None}))
    assert compare(*sides)[0] == 0


# -- What is refused -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["paired", "point"])
@pytest.mark.parametrize(
    ("place", "value", "what"),
    [
        ("inputs.rows_sha256", "d" * 64, "different data, 'rows.jsonl' (20 rows) and 'rows.jsonl' (20 rows)"),
        ("prompt_sha256", "d" * 64, "different prompts"),
        ("track", "structured", "is of track 'structured', not toolcall"),
        ("track", "\x1b[31m", "is of track '\\x1b[31m', not toolcall"),
        ("track", None, "is of track None"),
        ("stage", "compare", "is not a report of 01_eval/eval.py"),
        ("metrics", None, "is not a report of 01_eval/eval.py"),
        ("metrics", [1], "is not a report of 01_eval/eval.py"),
        ("metrics.args_f1", None, "no usable args_f1"),
        ("metrics.args_f1", "0.9", "no usable args_f1"),
        ("metrics.args_f1", True, "no usable args_f1"),
        ("metrics.args_f1", float("nan"), "no usable args_f1"),
        ("metrics.args_f1", 90, "no usable args_f1"),
        ("metrics.args_f1", -0.1, "no usable args_f1"),
    ],
)
def test_reports_that_do_not_fit_together(refused, make, rule, place, value, what):
    azure, slm = make("azure", rows=20), make("slm", rows=20)
    changed = {name: make(name, rows=20, model=model, changes={place: value}) for name, model in (("slm", SLM), ("other", AZURE))}
    assert what in refused(azure, changed["slm"], "--rule", rule)
    assert what in refused(changed["other"], make("slm", rows=20), "--rule", rule)
    assert slm == changed["slm"]


@pytest.mark.parametrize(
    ("place", "value", "what"),
    [
        ("inputs", None, "does not say which data"),
        ("inputs", [], "does not say which data"),
        ("inputs.rows", 3, "different data"),
        ("inputs.rows", None, "different data"),
    ],
)
def test_reports_that_do_not_say_what_they_are_of(refused, make, place, value, what):
    azure, slm = make("azure", rows=20), make("slm", rows=20, changes={place: value})
    assert what in refused(azure, slm, "--rule", "point")
    assert "slm.rows.jsonl does not match its report" in refused(azure, slm)


@pytest.mark.parametrize("rows", [1, None])
def test_fewer_than_two_rows(refused, make, rows):
    sides = [make(name, rows=1, changes={"inputs.rows": rows}) for name in ("azure", "slm")]
    told = refused(*sides, "--rule", "point")
    assert f"the reports are of {rows} rows: a comparison needs at least 2" in told
    if rows:
        assert refused(*sides) == told


def test_different_rows(refused, make):
    assert "different data, 'rows.jsonl' (20 rows) and 'rows.jsonl' (21 rows)" in refused(make("azure", rows=20), make("slm", rows=21))
    azure, slm = make("azure", rows=20), make("slm", rows=20)
    edit_rows(slm, lambda rows: [rows[0] | {"id": "another"}, *rows[1:]])
    assert "hold different rows (first: id 'row-0')" in refused(azure, slm)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda rows: rows[1:], "19 rows for 20"),
        (lambda rows: [*rows, rows[0]], "an id occurs twice"),
        (lambda rows: [rows[0] | {"id": "row-1"}, *rows[1:]], "an id occurs twice"),
        (lambda rows: [], "0 rows for 20"),
        (lambda rows: [rows[1] | {"id": "row-0"}, *rows[1:]], "another mean of valid_call_rate (strict)"),
        (lambda rows: ["not a row", *rows[1:]], "rows.jsonl:1: not a row as 01_eval/eval.py writes them"),
        (lambda rows: [*rows[:6], rows[6] | {"error": "?"}, *rows[7:]], "rows.jsonl:7: not a row"),
    ],
)
def test_a_rows_file_that_does_not_match_its_report(refused, make, change, what):
    azure, slm = make("azure", rows=20), make("slm", ["right", "no_json"], rows=20)
    edit_rows(slm, change)
    assert what in refused(azure, slm) and "slm.rows.jsonl" in refused(azure, slm)


def test_no_rows_file(refused, make, compare):
    azure, slm = make("azure"), bare(make("slm"))
    assert "slm.rows.jsonl beside its report: put it there, or decide on the means alone by --rule point" in refused(azure, slm)
    rows_path(slm).write_bytes(b'{"id": \xff}\n')
    assert "slm.rows.jsonl:1: not a line of JSON" in refused(azure, slm)
    assert compare(azure, slm, "--rule", "point")[0] == 0


def test_the_track_asked_for_counts(refused, make):
    assert "not structured" in refused(make("azure"), make("slm"), track="structured")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", None])
def test_what_is_no_report(refused, make, tmp_path, content):
    path = tmp_path / "broken.json"
    if content is not None:
        path.write_bytes(content)
    for pair in ((path, make("slm")), (make("azure"), path)):
        error = refused(*pair)
        assert "broken.json" in error and "01_eval/eval.py" in error


def test_different_files_with_the_same_rows_are_the_same_data(compare, refused, make):
    azure, slm = make("azure"), make("slm", changes={"inputs.sha256": "e" * 64})
    expected = Digests(row.content_hash for row in calls(200)).together()
    assert read(azure)["inputs"]["rows_sha256"] == read(slm)["inputs"]["rows_sha256"] == expected
    assert compare(azure, slm)[0] == 0
    for path in (azure, slm):
        report = read(path)
        del report["inputs"]["rows_sha256"]
        path.write_text(json.dumps(report))
    assert "different data" in refused(azure, slm)  # then the files' own hashes decide


# -- What is warned of -----------------------------------------------------------------------------------------------------------


def test_a_replay_s_prompts_are_not_known_and_said_so(compare, make, decision):
    code, _, error = compare(make("azure"), make("slm", model={"kind": "replay"}))
    assert code == 0 and error.startswith("warning: ") and "prompts" in error and error.count("\n") == 1
    assert decision()["warnings"] == [error.removeprefix("warning: ").rstrip()]


def test_a_local_model_s_report_in_the_hosted_one_s_place(compare, refused, make):
    assert "--azure report is of a local model" in refused(make("a", BAD, SLM), make("b", model=AZURE))  # swapped, it would say SWAP
    replay = {"kind": "replay"}
    assert compare(make("a", model=replay), make("b", BAD, replay))[0] == 10  # recorded replies may be anybody's
    code, _, error = compare(make("a", model=AZURE), make("b", BAD, AZURE))  # a small model may be hosted
    assert code == 10 and error.startswith("warning: the --slm report is of a hosted model (model.kind is azure)\n")
    before = make("c", ["no_json"], AZURE)
    assert "--before report is of a hosted model" in refused(make("a", model=AZURE), make("b", BAD, SLM), "--before", before)


def test_a_report_against_itself_is_refused(refused, make):
    path, other = make("a", model={"kind": "replay"}), make("b", BAD, SLM)
    assert "--azure and --slm are the same report" in refused(path, path)
    assert "--slm and --before are the same report" in refused(path, other, "--before", other)


def test_other_limits_on_new_tokens_are_warned_of(compare, make):
    azure = make("a", model=AZURE | {"parameters": {"max_completion_tokens": 1024}})
    limit = {"parameters": {"max_new_tokens": 256}}
    assert compare(azure, make("a limit that cuts nothing", BAD, SLM | limit))[2] == ""
    error = compare(azure, make("b", ["right", "wrong_value", "truncated"], SLM | limit))[2]
    assert error.startswith("warning: the reports were made with different --max-new-tokens (azure 1024, slm 256)")


def test_looking_again_at_the_same_rows_takes_more_evidence(compare, make, decision, tmp_path):
    azure = make("azure", rows=1500)
    found = []
    for name in ("one", "two", "three"):
        path = make(name, ["right"] * 79 + ["wrong_value"], SLM | {"adapter": name}, rows=1500)
        left, _, error = compare(azure, path)
        found.append((left, decision()["looks"]["number"], "look" in error))
    assert found == [(0, 1, False), (11, 2, True), (11, 3, True)]
    assert compare(azure, tmp_path / "one.json")[0] == 0 and decision()["looks"]["number"] == 1, "deciding again is no further look"
    assert len((tmp_path / "toolcall.looks.jsonl").read_text().splitlines()) == 3


def test_failed_requests_are_warned_of(compare, make, decision):
    code, printed, error = compare(make("azure", ["right"] * 19 + ["failed"]), make("slm", ["right"] * 19 + ["failed"]), "--table")
    assert code == 11 and decision()["withheld"] == "SWAP"
    assert [line.split(":")[1] for line in error.splitlines()] == [f" 10 of 200 {name} requests failed" for name in ("azure", "slm")]
    assert "evaluate again: requests failed" in printed
    assert next(own for own in decision()["gap"]["errors"] if own["kind"] == "failed")["slm_rows"] == 10


def test_a_verdict_that_flips_is_warned_of(compare, make, decision):
    code, _, error = compare(make("azure"), make("slm", ["right", "folded"]))
    assert code == 10 and error.startswith("warning: the verdict depends on how replies are compared") and error.count("\n") == 1
    assert decision()["flips"] is True and decision()["matchers"]["lenient"]["verdict"] == "SWAP"


# -- Where it cannot write, and usage --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["azure.json", "slm.json", "slm.rows.jsonl", "azure.json/decision.json", "."])
@pytest.mark.parametrize("flag", ["--out", "--markdown"])
def test_where_results_cannot_go(compare, make, tmp_path, out, flag):
    azure, slm = make("azure"), make("slm")
    before = [path.read_text() for path in (azure, slm, rows_path(slm))]
    code, printed, error = compare(azure, slm, flag, tmp_path / out)
    assert (code, printed, error.count("\n")) == (2, "", 1) and f"choose another place with {flag}" in error
    assert [path.read_text() for path in (azure, slm, rows_path(slm))] == before and not (tmp_path / "decision.json").exists()


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        ([], "--track"),
        (["--track", "toolcall", "--azure", "a"], "--slm"),
        (["--track", "toolcall", "--slm", "a"], "--azure"),
        (["--track", "poetry", "--azure", "a", "--slm", "b"], "invalid choice: 'poetry'"),
        (["--track", "toolcall", "--azure", "a", "--slm", "b", "--delta", "2"], "between 0 and 1"),
        (["--track", "toolcall", "--azure", "a", "--slm", "b", "--delta", "1"], "below 1"),
        (["--track", "toolcall", "--azure", "a", "--slm", "b", "--delta", "-0.1"], "--delta"),
        (["--track", "toolcall", "--azure", "a", "--slm", "b", "--delta", "nan"], "between 0 and 1"),
        (["--track", "toolcall", "--azure", "a", "--slm", "b", "--delta", "small"], "--delta"),
        (["--track", "toolcall", "--azure", "a", "--slm", "b", "--alpha", "0"], "--alpha"),
        (["--track", "toolcall", "--azure", "a", "--slm", "b", "--alpha", "0.5"], "--alpha"),
        (["--track", "toolcall", "--azure", "a", "--slm", "b", "--rule", "coin"], "invalid choice: 'coin'"),
        (["--track", "toolcall", "--azure", "a", "--slm", "b", "--tools", "moon"], "invalid choice: 'moon'"),
        (["--track", "toolcall", "--azure", "a", "--slm", "b", "--rule", "point", "--sequential"], "leave --rule out"),
        (["--track", "toolcall", "--azure", "a", "--slm", "b", "--rule", "point", "--before", "c"], "--before needs the rows"),
        (["--track", "toolcall", "--azure", "a", "--slm", "b", "--out", "x/../c", "--markdown", "c"], "name the same file"),
    ],
)
def test_usage_errors_are_one_line(run_script, compare_script, flags, what):
    code, printed, error = run_script(compare_script, *flags)
    assert code == 2 and printed == "" and error.count("\n") == 1 and what in error and "--help" in error


# -- Real replies ----------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not RECORDED.is_dir(), reason="../shared/data is not here: real replies are compared where it is")
def test_the_recorded_replies(run_script, eval_script, compare, decision, tmp_path):
    for name in ("azure", "slm"):
        flags = ("--track", "toolcall", "--model-kind", "replay", "--replies", RECORDED / f"toolcall_{name}.jsonl")
        assert run_script(eval_script, *flags, "--out", tmp_path / f"{name}.json")[0] == 0
    code, printed, error = compare(tmp_path / "azure.json", tmp_path / "slm.json", "--table", "--markdown", tmp_path / "pr.md")
    assert code == 10 and "FINE_TUNE=1\nVERDICT=FINE_TUNE\n" in printed and error.count("\n") == 1 and "prompts" in error
    told = decision()
    exact = told["metrics"]["args_exact_rate"]
    assert (exact["azure"], exact["slm"], exact["discordant"]) == (0.64, 0, {"azure_better": 32, "slm_better": 0, "equal": 18})
    assert exact["interval"][0] > 0.5 and set(told["failing"]) == set(GATE)
    assert told["gap"]["difference"] == 0.64 and sum(own["difference"] for own in told["gap"]["errors"]) == pytest.approx(0.64)
    remedies = {own["remedy"]: own["rows"] for own in told["gap"]["remedies"]}
    assert remedies["fine-tuning"] == 50 >= remedies["constrained decoding by the JSON Schema"] > 20
    assert told["groups"]["by"] == "tool" and sum(own["rows"] for own in told["groups"]["all"]) == 50
    assert told["gold_audit"]["count"] == 0 and not told["flips"]
    assert told["cost"]["azure"]["per_1000"] is None and told["cost"]["unknown"]


def test_the_same_rows_may_be_asked_in_two_forms(compare, make):
    """Text against native is a question that teams have; the same form with other prompts is still another version of the code."""
    azure = make("azure", rows=40, changes={"ask": "native", "prompt_sha256": "d" * 64})
    slm = make("slm", rows=40, changes={"ask": "text"})
    code, _, error = compare(azure, slm)
    assert code != 2 and "the same rows were asked in two forms: the hosted model natively (tools, response_format) and the small model as text" in error


# -- With a cascade --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cascade(run_script, tmp_path):
    """A function that calibrates `evaluated.SLM` with more keys, and gives the cascade's path."""

    def make(**model):
        folder = tmp_path / "calibration"
        folder.mkdir(exist_ok=True)
        flags = write_pair(folder, model=SLM | model, first=1000, args={}, ask="text")
        code, _, error = run_script(load_script("03_compare/calibrate.py"), "--track", "toolcall", *flags, "--out", folder / "cascade.json")
        assert code == 0, error
        return folder / "cascade.json"

    return make


@pytest.mark.parametrize(("replies", "code"), [(GOOD, 0), (BAD, 10), (UNSURE, 11)])
def test_what_may_be_answered_now_stands_beside_every_verdict(compare, make, decision, cascade, tmp_path, replies, code):
    path = cascade()
    left, printed, _ = compare(make("azure"), make("slm", replies), "--cascade", path, "--markdown", tmp_path / "pr.md")
    said = "It may answer 100.0% of the traffic now, with the hosted model behind it: wrong where the hosted model is right in at most 2% of all (95% sure"
    assert left == code and printed.count(said) == 1 and (said in decision()["sentence"]) == (code == 10)
    assert (tmp_path / "pr.md").read_text().count("may answer 100.0% of the traffic now") == 1
    assert decision()["cascade"]["sha256"] == sha256_file(path) and decision()["cascade"]["share_local"] == 1.0


def test_a_cascade_of_another_model_is_refused(refused, make, cascade):
    azure, slm = make("azure"), make("slm")
    line = refused(azure, slm, "--cascade", cascade(precision="fp8"))
    assert "is of other models than these reports: precision is 'int8', and 'fp8' was calibrated" in line


def test_the_cascade_at_its_usual_place_is_told_where_it_is_of_these_models(compare, make, decision, cascade, compare_script, monkeypatch, tmp_path):
    monkeypatch.setattr(compare_script, "PACKAGE", tmp_path)
    (tmp_path / "03_compare").mkdir()
    usual, azure, slm = tmp_path / "03_compare/cascade_toolcall.json", make("azure"), make("slm")
    for precision, share in (("fp8", None), ("int8", 1.0)):
        usual.write_bytes(cascade(precision=precision).read_bytes())
        code, printed, error = compare(azure, slm)
        assert (code, error) == (0, "") and (decision()["cascade"] or {}).get("share_local") == share and ("of the traffic now" in printed) == bool(share)
