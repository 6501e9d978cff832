"""The stage script: what it writes, bad input, and the real rows of ../shared/data where they are at hand."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from slm_swap.cli import run
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
    assert prepare("--source", "xlam", "--dataset-path", source, "--out-dir", tmp_path / "out") == 0
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
        (["--source", "xlam"], [*GOOD, {"id": 99}], "rows.jsonl:21: no `query`"),
        (["--source", "xlam"], [*GOOD, GOOD[0] | {"answers": "[{"}], "rows.jsonl:21: `answers` is not JSON"),
        (["--source", "xlam"], [*GOOD, GOOD[0] | {"query": "another"}], "rows.jsonl:21: id '0' stands at"),
        (
            ["--source", "xlam"],
            [*GOOD, GOOD[0] | {"id": 99, "query": "\udc00"}],
            "rows.jsonl:21: it holds half of a surrogate pair",
        ),
        (["--source", "xlam"], [], "rows.jsonl has no rows"),
        (["--source", "xlam"], [GOOD[0] | {"answers": "[]"}], "none of 1 rows can be used (no_answer 1)"),
        (["--source", "xlam", "--train-size", "99"], GOOD, "train 99 + val 2 + test 2 rows are wanted, 20 can be used"),
        (
            ["--source", "xlam"],
            [GOOD[0] | {"id": n, "answers": GOOD[n]["answers"]} for n in range(9)],
            "test: 1 rows are wanted, 0",
        ),
        (["--source", "xlam", "--answers", "x.json"], GOOD, "--source bfcl needs --answers FILE"),
        (["--source", "xlam", "--track", "toolcall"], GOOD, "--source jsonl needs --track"),
        (["--source", "bfcl"], GOOD, "--source bfcl needs --answers FILE"),
        (["--source", "jsonl"], TEAM, "--source jsonl needs --track"),
        (["--source", "jsonl", "--track", "structured"], TEAM, "rows.jsonl:1: the completion is not a structured reply"),
        (["--source", "jsonl", "--track", "toolcall"], [*TEAM, {"completion": "x"}], "rows.jsonl:2: no `prompt`"),
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
    assert {name: part["rows"] for name, part in report["splits"][track].items()} == {"train": 240, "val": 30, "test": 30}


@needs_shared
def test_parallel_rows_are_never_cut_to_the_first_call(tmp_path, capsys):
    name = "BFCL_v4_parallel_multiple.json"
    with pytest.raises(SystemExit):
        run(
            lambda: prepare(
                "--source",
                "bfcl",
                "--dataset-path",
                SHARED / "bfcl" / name,
                "--answers",
                SHARED / "bfcl/possible_answer" / name,
                "--out-dir",
                tmp_path,
            )
        )
    assert "none of 200 rows can be used (several_answers 200)" in capsys.readouterr().err
