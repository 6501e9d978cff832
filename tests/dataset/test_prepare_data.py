"""The stage script: what it writes, bad input, and the real rows of ../shared/data where they are at hand."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from slm_swap.cli import run
from slm_swap.common.errors import UserError
from slm_swap.common.settings import ROOT
from slm_swap.rows.examples import read_examples
from slm_swap.rows.json_schema import call_violations
from slm_swap.scoring.metrics import _accepts
from slm_swap.scoring.tracks import TRACKS

SCRIPT = ROOT / "slm_swap/02_dataset/prepare_data.py"
SHARED = ROOT.parent / "shared/data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here: real rows are tested where it is")

spec = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
prepare_data = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare_data)


def prepare(*argv):
    return prepare_data.main([str(word) for word in argv])


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def xlam_rows(count):
    tool = {"name": "weather", "description": "", "parameters": {"city": {"type": "str"}, "days": {"type": "int, optional"}}}
    other = {"name": "news", "description": "", "parameters": {"topic": {"type": "str, default='all'"}}}
    return [
        {
            "id": number,
            "query": f"word{number} other{number} more{number}",
            "answers": json.dumps([{"name": "weather", "arguments": {"city": f"City {number}"}}]),
            "tools": json.dumps([tool, other]),
        }
        for number in range(count)
    ]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def report_of(folder):
    return json.loads((folder / "prepare_report.json").read_text())


def test_xlam_end_to_end(tmp_path, capsys):
    rows = xlam_rows(40)
    rows[3]["answers"] = json.dumps(json.loads(rows[3]["answers"]) * 2)
    source = write(tmp_path / "rows.jsonl", rows)
    assert prepare("--source", "xlam", "--calls", "one", "--dataset-path", source, "--out-dir", tmp_path / "out") == 0
    printed = capsys.readouterr().out.split()
    assert printed[:8] == ["read", "40", "kept", "39", "dropped:", "several_answers", "1", "structured/train"]
    report = report_of(tmp_path / "out")
    assert report["stage"] == "prepare_data" and report["args"]["seed"] == 42 and "commit" in report["code"]
    assert [(entry["rows"], len(entry["sha256"])) for entry in report["inputs"]] == [(40, 64)]
    for track in TRACKS:
        examples = [e for name in ("train", "val", "test") for e in read_examples(tmp_path / "out" / track / f"{name}.jsonl")]
        assert {e.id for e in examples} == {str(number) for number in range(40) if number != 3}
        assert all(TRACKS[track].reference(e) for e in examples)


def test_the_same_bytes_whatever_the_hash_seed(tmp_path):
    source = write(tmp_path / "rows.jsonl", xlam_rows(60))
    written = []
    for hash_seed in ("0", "1"):
        out = tmp_path / hash_seed
        command = [
            sys.executable,
            SCRIPT,
            "--source",
            "xlam",
            "--dataset-path",
            source,
            "--out-dir",
            out,
            "--unseen-tools",
            "--val-size",
            "0",
        ]
        command += ["--test-size", "60", "--train-size", "0"]
        done = subprocess.run(
            command, env=os.environ | {"PYTHONHASHSEED": hash_seed}, capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        written.append({name: text for name, text in files(out).items() if name != "prepare_report.json"})
    assert written[0] == written[1] and list(written[0])


def test_several_files_and_a_json_list(tmp_path):
    rows = xlam_rows(30)
    first = write(tmp_path / "a.jsonl", rows[:20])
    (tmp_path / "b.json").write_text(json.dumps(rows[20:]))
    prepare("--source", "xlam", "--dataset-path", first, tmp_path / "b.json", "--out-dir", tmp_path / "out")
    report = report_of(tmp_path / "out")
    assert [entry["rows"] for entry in report["inputs"]] == [20, 10]
    assert report["counts"] == {"read": 30, "kept": 30, "dropped": {}}


def test_jsonl_writes_one_track_and_keeps_the_other(tmp_path):
    rows = [{"prompt": f"one{n} two{n} three{n}", "completion": f'{{"n": {n}}}', "group": f"g{n % 3}"} for n in range(20)]
    rows.append(rows[0])
    source = write(tmp_path / "rows.jsonl", rows)
    (tmp_path / "out/toolcall").mkdir(parents=True)
    (tmp_path / "out/toolcall/train.jsonl").write_text("theirs")
    prepare("--source", "jsonl", "--track", "structured", "--dataset-path", source, "--out-dir", tmp_path / "out")
    assert report_of(tmp_path / "out")["counts"] == {"read": 21, "kept": 20, "dropped": {"duplicate": 1}}
    made = [e for name in ("train", "val", "test") for e in read_examples(tmp_path / f"out/structured/{name}.jsonl")]
    assert {(e.prompt, e.completion, e.group) for e in made} == {(r["prompt"], r["completion"], r["group"]) for r in rows}
    assert (tmp_path / "out/toolcall/train.jsonl").read_text() == "theirs"


# -- Bad input: one line, exit 2, nothing changed --------------------------------------------------------------------------------

GOOD = xlam_rows(20)
TEAM = [{"prompt": "p", "completion": '<tool_call name="f">{}</tool_call>'}]


@pytest.mark.parametrize(
    "words, rows, message",
    [
        (["--source", "xlam"], [], "rows.jsonl has no rows"),
        (["--source", "xlam", "--calls", "one"], [GOOD[0] | {"answers": "[]"}], "none of 1 rows can be used (no_call_due 1)"),
        (["--source", "xlam", "--train-size", "99"], GOOD, "train 99 + val 2 + test 2 rows are wanted, 20 can be used"),
        (
            ["--source", "xlam"],
            [GOOD[n] | {"query": f"one two three four five six seven eight {n}"} for n in range(9)],
            "test: 1 rows are wanted, 0",
        ),
        (["--source", "xlam", "--answers", "x.json"], GOOD, "--source bfcl needs --answers FILE"),
        (["--source", "xlam", "--track", "toolcall"], GOOD, "--source jsonl needs --track"),
        (["--source", "bfcl"], GOOD, "looks like rows of --source xlam, not of --source bfcl"),
        (["--source", "jsonl"], TEAM, "--source jsonl needs --track"),
        (["--source", "jsonl", "--track", "structured"], TEAM, "none of 1 rows can be used (bad_completion 1)"),
        (["--source", "chat"], TEAM, "looks like rows of --source jsonl, not of --source chat"),
        (["--source", "chat"], [{"what": 1}], "none of 1 rows can be used (other_form 1)"),
        (["--source", "xlam", "--split-by", "time"], GOOD, "--split-by time needs a time in every row, 20 have none"),
        (["--source", "csv"], GOOD, "invalid choice: 'csv'"),
        (["--source", "xlam", "--test-size", "-1"], GOOD, "-1 is less than 0"),
    ],
)
def test_bad_input(tmp_path, capsys, words, rows, message):
    out = tmp_path / "out"
    prepare("--source", "xlam", "--dataset-path", write(tmp_path / "good.jsonl", GOOD), "--out-dir", out)
    before = files(out)
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        run(lambda: prepare(*words, "--dataset-path", write(tmp_path / "rows.jsonl", rows), "--out-dir", out))
    assert left.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
    assert files(out) == before


def test_bad_input_makes_no_folder(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(lambda: prepare("--source", "xlam", "--dataset-path", tmp_path / "missing.jsonl", "--out-dir", tmp_path / "out"))
    assert "missing.jsonl (No such file or directory): check the path" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# -- Bad rows: counted, and the rest goes on ---------------------------------------------------------------------------------------


def test_bad_rows_are_counted_and_written_beside(tmp_path, capsys):
    rows = [*GOOD, {"id": 99}, GOOD[0] | {"answers": "[{"}, GOOD[0] | {"query": "another"}, GOOD[1] | {"id": 98, "query": "\udc00"}, ["x"]]
    assert prepare("--source", "xlam", "--dataset-path", write(tmp_path / "rows.jsonl", rows), "--out-dir", tmp_path / "out") == 0
    report = report_of(tmp_path / "out")
    assert report["counts"] == {"read": 25, "kept": 21, "dropped": {"bad_row": 2, "bad_line": 1, "unusable": 1}}
    assert report["renamed_ids"] == 1
    lines = [json.loads(line) for line in (tmp_path / "out/prepare_dropped.jsonl").read_text().splitlines()]
    assert [(line["where"].rpartition(":")[2], line["reason"]) for line in lines] == [
        ("21", "bad_row"), ("22", "bad_row"), ("24", "unusable"), ("25", "bad_line"),
    ]  # fmt: skip
    out = capsys.readouterr().out
    assert out.count("dropped: ") - len(report["counts"]["dropped"]) == 3, "the first three are named"
    assert "1 ids stood twice" in out and "prepare_dropped.jsonl" in out
    prepare("--source", "xlam", "--dataset-path", write(tmp_path / "good.jsonl", GOOD), "--out-dir", tmp_path / "out")
    assert not (tmp_path / "out/prepare_dropped.jsonl").exists()


def test_unknown_fields_are_one_warning(tmp_path, capsys):
    rows = [{"prompt": f"one{n} two{n} three{n}", "completion": "{}", "acept": {}} for n in range(20)]
    source = write(tmp_path / "rows.jsonl", rows)
    prepare("--source", "jsonl", "--track", "structured", "--dataset-path", source, "--out-dir", tmp_path / "out")
    [line] = capsys.readouterr().err.splitlines()
    assert "fields that nothing reads: acept (20 rows)" in line and report_of(tmp_path / "out")["unknown_fields"] == {"acept": 20}


# -- Chat ------------------------------------------------------------------------------------------------------------------------


def chat_rows(count):
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {"item": {"type": "string"}}}}}
    rows = []
    for number in range(count):
        asked = {"role": "user", "content": f"item{number} word{number} thing{number} place{number}"}
        call = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": json.dumps({"item": f"i{number}"})}}
        messages = [{"role": "system", "content": "A preamble that all rows share, and that is long."}, asked]
        messages += [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "1", "content": "found"}]
        messages += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "thanks"}, {"role": "assistant", "content": "Bye."}]
        rows.append({"messages": messages, "tools": [tool], "created_at": f"2026-01-01T00:{number:02}:00Z"})
    extraction = [
        {"messages": [{"role": "user", "content": f"city{n} town{n} name{n} street{n}"}, {"role": "assistant", "content": f'{{"n": {n}}}'}]}
        for n in range(30)
    ]
    return rows, extraction


def test_chat_end_to_end(tmp_path, capsys):
    rows, extraction = chat_rows(40)
    rows[7]["messages"][2]["tool_calls"][0]["function"]["name"] = "other"
    source = write(tmp_path / "rows.jsonl", [*rows, *extraction, {"messages": [{"role": "user", "content": "x"}]}])
    assert prepare("--source", "chat", "--dataset-path", source, "--out-dir", tmp_path / "out") == 0
    report, out = report_of(tmp_path / "out"), capsys.readouterr().out
    assert report["counts"] == {"read": 151, "kept": 149, "dropped": {"tool_not_listed": 1, "no_reply": 1}}
    assert report["replies"] == {"read": 150, "measurable": 149, "share": 149 / 150} and "99.3% (149 of 150)" in out
    assert "rows.jsonl: OpenAI chat rows, 71 rows" in out and report["inputs"][0]["forms"] == {"OpenAI chat rows": 71}
    assert {name: part["rows"] for name, part in report["splits"]["structured"].items()} == {"train": 24, "val": 3, "test": 3, "calibration": 0}
    groups = {}
    for name in ("train", "val", "test"):
        for example in read_examples(tmp_path / f"out/toolcall/{name}.jsonl"):
            groups.setdefault(example.group, set()).add(name)
            assert example.messages[0]["role"] == "system"
    assert len(groups) == 40 and all(len(names) == 1 for names in groups.values()), "a conversation stays on one side"
    assert report["near_duplicates"]["largest"] == 3, "a preamble and short last words join no conversations"
    test = report["splits"]["toolcall"]["test"]["rows"]
    assert f"toolcall/test has {test} rows, which seldom suffice for a SWAP at a margin of 5 points; 300 mostly do: --test-size 59 puts more" in out
    assert prepare("--source", "chat", "--dataset-path", source, "--out-dir", tmp_path / "out", "--track", "toolcall", "--test-size", "59") == 0
    assert "seldom suffice" not in capsys.readouterr().out and report_of(tmp_path / "out")["splits"]["toolcall"]["test"]["rows"] > 4 * test


def test_a_calibration_split_shares_no_conversation_and_goes_when_it_is_no_longer_asked_for(tmp_path, capsys):
    source = write(tmp_path / "rows.jsonl", chat_rows(40)[0])
    flags = ("--source", "chat", "--track", "toolcall", "--dataset-path", source, "--out-dir", tmp_path / "out")
    assert prepare(*flags, "--calibration-size", "30") == 0
    assert re.search(r"toolcall/calibration +30\n", capsys.readouterr().out)
    groups = {name: {example.group for example in read_examples(tmp_path / f"out/toolcall/{name}.jsonl")} for name in ("train", "val", "test", "calibration")}
    assert len(groups["calibration"]) == 10 and sum(map(len, groups.values())) == len(set().union(*groups.values())) == 40
    assert prepare(*flags) == 0
    assert not (tmp_path / "out/toolcall/calibration.jsonl").exists() and "toolcall/calibration" not in capsys.readouterr().out


def test_half_of_a_surrogate_pair_in_a_dropped_row_ends_no_import(tmp_path, capsys):
    rows, _ = chat_rows(20)
    rows[0]["messages"][1]["content"] = rows[0]["\ud800"] = rows[1]["id"] = "cut \ud83d"
    rows[2]["messages"][2]["tool_calls"][0]["function"]["arguments"] = '{"item": "\ud83d'
    source = write(tmp_path / "rows.jsonl", rows)
    assert prepare("--source", "chat", "--dataset-path", source, "--out-dir", tmp_path / "out") == 0
    capsys.readouterr().out.encode()
    assert report_of(tmp_path / "out")["counts"]["dropped"] == {"unusable": 8, "not_json": 1}


def test_chat_of_one_track_and_by_time(tmp_path):
    rows, extraction = chat_rows(40)
    source = write(tmp_path / "rows.jsonl", [*rows, *extraction])
    flags = ("--source", "chat", "--track", "toolcall", "--calls", "one", "--split-by", "time", "--dataset-path", source)
    assert prepare(*flags, "--out-dir", tmp_path / "out") == 0
    assert report_of(tmp_path / "out")["counts"] == {"read": 150, "kept": 40, "dropped": {"other_track": 30, "no_call_due": 80}}
    assert report_of(tmp_path / "out")["replies"]["share"] == 1.0, "what a flag leaves out could be measured"
    ids = [int(e.group.rpartition(":")[2]) for e in read_examples(tmp_path / "out/toolcall/test.jsonl")]
    assert sorted(ids) == [37, 38, 39, 40] and not (tmp_path / "out/structured").exists()


def test_a_track_with_too_few_rows_ends_no_import(tmp_path, capsys):
    rows, extraction = chat_rows(40)
    source = write(tmp_path / "rows.jsonl", [*rows, *extraction[:1]])
    assert prepare("--source", "chat", "--dataset-path", source, "--out-dir", tmp_path / "out") == 0
    assert report_of(tmp_path / "out")["counts"]["dropped"] == {"too_few": 1} and "no splits of structured" in capsys.readouterr().out


def test_a_batchs_input_alone_names_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="has no replies: give the batch's output file"):
        prepare("--source", "chat", "--dataset-path", ROOT / "tests/data/batch_input.jsonl", "--out-dir", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "tests/data").glob("*.[jc]s*") if path.name != "batch_input.jsonl"))
def test_the_share_of_replies_that_can_be_measured(tmp_path, capsys, name):
    paths = [ROOT / "tests/data" / part for part in (["batch_input.jsonl"] if name == "batch_output.jsonl" else []) + [name]]
    flags = ("--train-size", "0", "--val-size", "0", "--out-dir", tmp_path)
    assert prepare("--source", "chat", "--dataset-path", *paths, *flags) == 0
    report = report_of(tmp_path)
    assert report["replies"]["share"] >= 0.95 and "100.0%" in capsys.readouterr().out
    assert report["replies"]["read"] == (4 if name in ("alpaca.json", "rft.jsonl", "extraction.jsonl") else 11)
    for track, splits in report["splits"].items():
        if splits["test"]["rows"]:
            assert len(read_examples(tmp_path / track / "test.jsonl")) == splits["test"]["rows"]


# -- Real rows -------------------------------------------------------------------------------------------------------------------


@needs_shared
def test_real_bfcl_rows_are_accounted_for(tmp_path):
    names = ("BFCL_v4_live_simple.json", "BFCL_v4_multiple.json")
    questions, answers = ([SHARED / folder / name for name in names] for folder in ("bfcl", "bfcl/possible_answer"))
    sizes = ("--train-size", "0", "--val-size", "0")
    assert prepare("--source", "bfcl", "--dataset-path", *questions, "--answers", *answers, "--out-dir", tmp_path, *sizes) == 0
    counts = report_of(tmp_path)["counts"]
    assert counts["read"] == 458 == counts["kept"] + sum(counts["dropped"].values())
    assert counts["dropped"] == {}  # all can be answered within their own schemas
    for track in TRACKS:
        examples = read_examples(tmp_path / track / "test.jsonl")
        assert len(examples) == 458 and not (tmp_path / track / "train.jsonl").exists()
        for example in examples:
            reference = TRACKS[track].reference(example)
            scored = TRACKS[track].score(reference, example.completion)
            assert scored.strict.exact and scored.schema.exact and scored.lenient.exact
    for example in examples:  # toolcall, the last
        arguments = TRACKS["toolcall"].reference(example).parsed.value
        [tool] = [tool for tool in example.tools if tool["name"] == example.completion.split('"')[1]]
        assert call_violations(arguments, tool) == []
        accept = example.accept
        assert all(any(_accepts(option, value, folded=False) for option in accept[key]) for key, value in arguments.items())
        assert all("" in options for key, options in accept.items() if key not in arguments)


@needs_shared
@pytest.mark.parametrize("track", TRACKS)
def test_recorded_rows_as_a_teams_own(tmp_path, track):
    source = SHARED / f"recorded/xlam_{track}_rows.jsonl"
    assert prepare("--source", "jsonl", "--track", track, "--dataset-path", source, "--out-dir", tmp_path) == 0
    report = report_of(tmp_path)
    assert report["counts"] == {"read": 300, "kept": 300, "dropped": {}}
    assert {name: part["rows"] for name, part in report["splits"][track].items()} == {"train": 240, "val": 30, "test": 30, "calibration": 0}


@needs_shared
def test_parallel_and_irrelevance_rows_are_conversations(tmp_path):
    name = "BFCL_v4_parallel_multiple.json"
    paths = (SHARED / "bfcl" / name, SHARED / "bfcl/BFCL_v4_irrelevance.json")
    flags = ("--answers", SHARED / "bfcl/possible_answer" / name, "--out-dir", tmp_path, "--train-size", "0", "--val-size", "0")
    assert prepare("--source", "bfcl", "--dataset-path", *paths, *flags) == 0
    report = report_of(tmp_path)
    assert report["counts"] == {"read": 440, "kept": 437, "dropped": {"gold_breaks_schema": 3}} and report["form"] == "conversation"
    rows = read_examples(tmp_path / "toolcall/test.jsonl")
    assert sum(row.calls == [] for row in rows) == 240 and all(len(row.calls) > 1 for row in rows if row.calls)
    assert all(len(row.accept) == len(row.calls) for row in rows if row.calls)
    assert not (tmp_path / "structured/test.jsonl").exists(), "there is no structured twin of several calls or none"


def test_splits_of_an_earlier_run_are_not_replaced_without_a_word(tmp_path, capsys):
    flags = ("--source", "xlam", "--dataset-path", write(tmp_path / "rows.jsonl", xlam_rows(40)), "--out-dir", tmp_path / "out")
    assert prepare(*flags) == 0
    first = capsys.readouterr()
    assert first.err == "" and f"next: python 01_eval/eval.py --track toolcall --model-kind azure --dataset {tmp_path / 'out/toolcall/test.jsonl'}\n" in first.out
    assert prepare(*flags) == 0 and capsys.readouterr().err == "", "the same splits again"
    assert prepare(*flags, "--seed", 7) == 0
    error = capsys.readouterr().err
    assert error.startswith("warning: splits of an earlier run were replaced: ") and error.count("\n") == 1
    assert all(str(tmp_path / f"out/{track}/{name}.jsonl") in error for track in TRACKS for name in ("train", "val", "test"))
