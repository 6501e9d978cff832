"""What an evaluation did not measure: cut replies, failed requests, tokens that were not counted; and asking exactly those again."""

import json
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_swap.clients.protocol import Reply
from slm_swap.common.errors import UserError
from slm_swap.common.reports import rows_path, write_json, write_jsonl
from slm_swap.evaluating.evaluation import check_rows
from slm_swap.evaluating.finished import Finished, again_command
from slm_swap.evaluating.journal import Journal, journal_path
from slm_swap.evaluating.row import cut_of, make_row, score_row
from slm_swap.rows.examples import Example, parse_example
from slm_swap.scoring.measured import unmeasured
from slm_swap.scoring.tracks import TRACKS
from tests.evaluating.conftest import ROWS
from tests.support.scripted import DOWN, NO_ROOM, TOO_LONG, plain, reasoned, with_usage

THIRD = {row.prompt for row in ROWS[::3]}  # 8 of 24 rows
PER_1000 = (100 * 2.5 + 20 * 10) / 10**6 * 1000  # of an answer with 100 tokens in and 20 out: 0.45
USAGE = {"prompt_tokens": 100, "completion_tokens": 20}


def third(answer_of):
    """A script that changes the answers to a third of the rows: `answer_of(request, answer)`."""
    return lambda prompt, before, asked, answer: answer_of(asked, answer) if prompt in THIRD else answer


def cut_below(limit):
    """Reasoning takes up to `limit` tokens of the replies to a third of the rows."""
    return third(lambda asked, answer: answer if asked["max_completion_tokens"] >= limit else reasoned(answer, asked["max_completion_tokens"]))


# What is not measured is counted and said


def test_replies_that_reasoning_has_eaten_are_not_measured_and_the_command_says_how_to(hosted):
    hosted.server.script = cut_below(1024)
    code, printed, error = hosted.run()
    report, lines = hosted.report(), hosted.lines()
    assert code == 0 and report["counts"]["unmeasured"] == {"failed": 0, "truncated": 8}
    assert {line["id"] for line in lines if line["cut"]} == {row.id for row in ROWS[::3]}
    assert lines[0]["cut"] == {"limit": 256, "reference_tokens": None, "thinking": True}
    assert lines[0]["tokens"] == {"input": 100, "cached": 0, "output": 256, "reasoning": 256} and lines[1]["cut"] is None
    assert error.startswith("warning: 8 of 24 rows are not measured, and the metrics count them as they stand (8 truncated, cut by --max-new-tokens 256): ask")
    command = shlex.split(error.partition("ask exactly these again: ")[2])
    assert command[:2] == ["python", "01_eval/eval.py"] and command[-4:] == ["--again", "truncated", "--max-new-tokens", "1024"]
    hosted.requests()
    code, printed, error = hosted._run(hosted._script, *command[2:])
    assert code == 0 and "Fully right reply             1.0000" in printed and "warning" not in error
    assert hosted.requests() == 8, "what was measured is not asked again"
    report, after = hosted.report(), hosted.lines()
    assert report["again"] == [{"kinds": ["truncated"], "rows": 8, "max_new_tokens": 1024}] and report["sessions"] == 2
    assert report["counts"]["unmeasured"] == {"failed": 0, "truncated": 0}
    assert [line for line in after if line["id"] not in {row.id for row in ROWS[::3]}] == [line for line in lines if not line["cut"]]
    assert report["args"]["max_new_tokens"] == report["model"]["parameters"]["max_completion_tokens"] == 256
    assert hosted.run()[0] == 0 and hosted.requests() == 0, "the first command finds its report finished"


def test_azures_400_without_room_is_a_cut_reply_and_no_failed_request(hosted):
    hosted.server.script = third(lambda asked, answer: NO_ROOM)
    assert hosted.run()[0] == 0
    counts, lines = hosted.report()["counts"], hosted.lines()
    assert (counts["unmeasured"], counts["failed_requests"]) == ({"failed": 0, "truncated": 8}, 0)
    assert (lines[0]["finish_reason"], lines[0]["reply"], lines[0]["error"]) == ("length", "", "truncated")
    assert lines[0]["tokens"] == dict.fromkeys(("input", "cached", "output", "reasoning"))
    assert lines[0]["cut"] == {"limit": 256, "reference_tokens": None, "thinking": False}


def test_a_prompt_that_is_too_long_is_an_error_of_its_own(hosted):
    hosted.server.script = third(lambda asked, answer: TOO_LONG)
    code, printed, error = hosted.run()
    counts = hosted.report()["counts"]
    assert code == 0 and "missed: prompt too long 8" in printed
    assert (counts["prompt_too_long"], counts["errors"]["prompt_too_long"], counts["errors"]["truncated"]) == (8, 8, 0)
    assert counts["unmeasured"] == {"failed": 0, "truncated": 0}
    assert error.count("\n") == 1 and "8 of 24 prompts do not fit" in error and "a larger --max-new-tokens does not help" in error


def test_one_row_in_a_hundred_is_told_without_a_warning(hosted, write_rows):
    rows = [Example(f"Say {n}", f'{{"number":{n}}}', id=f"r{n}") for n in range(100)]
    hosted.server.replies.add(rows)
    dataset = ("--dataset", write_rows("hundred.jsonl", [row.to_json() for row in rows]))
    hosted.flags = (*hosted.flags[:-2], *dataset)
    hosted.server.script = lambda prompt, before, asked, answer: DOWN if prompt == "Say 7" else answer
    code, printed, error = hosted.run()
    assert (code, error) == (0, "") and "not measured: 1 failed" in printed
    hosted.server.script = lambda prompt, before, asked, answer: DOWN if prompt in ("Say 7", "Say 8") else answer
    code, printed, error = hosted.run("--overwrite")
    assert code == 0 and "2 of 100 rows are not measured" in error and "--again failed" in error


@pytest.mark.parametrize(
    ("usage", "rows", "input_tokens", "per_1000"),
    [
        (lambda n: None, 0, None, None),
        (lambda n: USAGE if n % 2 else None, 12, 1200, PER_1000),
        (lambda n: {"prompt_tokens": 100.0, "completion_tokens": 20.0}, 24, 2400, PER_1000),
        (lambda n: USAGE | {"prompt_tokens_details": {"cached_tokens": 150}}, 0, None, None),
        (lambda n: USAGE | ({"prompt_tokens_details": {"cached_tokens": 150}} if n % 2 else {}), 12, 1200, PER_1000),
        (lambda n: {"completion_tokens": 20}, 0, None, None),
    ],
    ids=["none", "half", "floats", "more cached than asked", "half of them", "no prompt tokens"],
)
def test_a_count_that_was_not_sent_is_not_0(hosted, usage, rows, input_tokens, per_1000):
    hosted.server.script = lambda prompt, before, asked, answer: with_usage(answer, usage(int(prompt.split()[1])))
    code, printed, _ = hosted.run()
    report = hosted.report()
    assert code == 0 and report["tokens"]["rows"] == report["cost"]["rows"] == rows
    assert report["tokens"]["input"] == input_tokens and report["cost"]["per_1000_rows"] == pytest.approx(per_1000)
    assert report["cost"]["total"] == pytest.approx(per_1000 and per_1000 * rows / 1000)
    assert (f"tokens: known of {rows} of 24 rows" in printed) == (rows < 24)


# --again


def broken(hosted):
    """A finished report of which 8 rows are cut and 4 others failed."""
    failing = {row.prompt for row in ROWS[1:12:3]}
    cut = cut_below(512)
    hosted.server.script = lambda prompt, before, asked, answer: DOWN if prompt in failing else cut(prompt, before, asked, answer)
    assert hosted.run()[0] == 0
    assert hosted.report()["counts"]["unmeasured"] == {"failed": 4, "truncated": 8}
    hosted.requests()
    hosted.server.script = cut_below(512)


def test_only_the_kinds_that_are_named_are_asked(hosted):
    broken(hosted)
    assert hosted.run("--again", "failed")[0] == 0 and hosted.requests() == 4
    assert hosted.report()["counts"]["unmeasured"] == {"failed": 0, "truncated": 8}
    assert hosted.run("--again", "truncated,failed", "--max-new-tokens", 512)[0] == 0 and hosted.requests() == 8
    report = hosted.report()
    assert report["metrics"]["exact_match_rate"] == 1 and report["sessions"] == 3
    assert [one["kinds"] for one in report["again"]] == [["failed"], ["failed", "truncated"]]
    assert [one["max_new_tokens"] for one in report["again"]] == [256, 512]
    code, printed, _ = hosted.run("--again", "failed,truncated", "--max-new-tokens", 512)
    assert code == 0 and "nothing to ask" in printed and hosted.requests() == 0 and hosted.report() == report


def test_a_row_that_failed_stays_failed_where_only_cut_ones_are_asked(hosted):
    broken(hosted)
    assert hosted.run("--again", "truncated", "--max-new-tokens", 512)[0] == 0 and hosted.requests() == 8
    assert hosted.report()["counts"]["unmeasured"] == {"failed": 4, "truncated": 0}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--again", "truncated"), "8 replies were cut at --max-new-tokens 256: pass a larger one"),
        (("--again", "failed", "--max-new-tokens", 100), "had --max-new-tokens 256, and 100 is less"),
        (("--again", "failed", "--limit", 5), "rows 24 there, 5 here"),
        (("--again", "failed", "--seed", 7), "model.parameters.seed 42 there, 7 here"),
        (("--again", "failed", "--overwrite"), "give one of them"),
        (("--again", "wrong"), "give failed, truncated or both"),
        (("--max-new-tokens", 512), "model.parameters.max_completion_tokens 256 there, 512 here"),
    ],
)
def test_anything_else_that_differs_is_refused(hosted, flags, said):
    broken(hosted)
    before = hosted.out.read_bytes()
    code, _, error = hosted.run(*flags)
    assert code == 2 and said in error and error.count("\n") == 1
    assert hosted.out.read_bytes() == before and hosted.requests() == 0 and not journal_path(hosted.out).exists()


def test_again_needs_a_report_with_its_rows(hosted, tmp_path):
    code, _, error = hosted.run("--again", "failed")
    assert code == 2 and "no report at" in error and hosted.requests() == 0
    broken(hosted)
    hosted.out.with_suffix(".rows.jsonl").write_text("")
    code, _, error = hosted.run("--again", "failed")
    assert code == 2 and "is not the rows file" in error and hosted.requests() == 0


def test_interrupted_it_keeps_the_old_report_and_goes_on(hosted, monkeypatch):
    broken(hosted)
    before, given = hosted.out.read_bytes(), []

    def withdrawn(prompt, asked_before, asked, answer):
        given.append(prompt)
        hosted.server.key = "simulator-key" if len(given) < 4 else "another"
        return cut_below(512)(prompt, asked_before, asked, answer)

    hosted.server.script = withdrawn
    flags = ("--again", "failed,truncated", "--max-new-tokens", 512, "--concurrency", 1)
    code, _, error = hosted.run(*flags)
    assert code == 2 and "401" in error and "the same command continues" in error and hosted.out.read_bytes() == before
    hosted.server.key, hosted.server.script = "simulator-key", cut_below(512)
    hosted.requests()
    assert hosted.run(*flags)[0] == 0
    assert hosted.requests() == 12 - 4 and hosted.report()["metrics"]["exact_match_rate"] == 1
    assert hosted.report()["again"] == [{"kinds": ["failed", "truncated"], "rows": 12, "max_new_tokens": 512}]


WORDS = st.sampled_from(["--track", "toolcall", "--max-new-tokens=9", "--overwrite", "--out", "a b.json", "--repeat=3"])


@given(st.lists(WORDS, max_size=8), st.sampled_from([["failed"], ["truncated"], ["failed", "truncated"]]), st.integers(1, 5000))
def test_the_command_has_each_flag_once_and_a_larger_limit_for_cut_replies(argv, kinds, limit):
    words = shlex.split(again_command([*argv, "--max-new-tokens", "7", "--again", "failed"], kinds, limit))
    assert words[-4:] == ["--again", ",".join(kinds), "--max-new-tokens", str(limit * 4 if "truncated" in kinds else limit)]
    kept = [word for word in argv if word not in ("--max-new-tokens=9", "--overwrite", "--repeat=3")]
    assert words[:2] == ["python", "01_eval/eval.py"] and words[2:-4] == kept


# A finished report is kept


def test_a_finished_report_is_kept_and_said(hosted):
    assert hosted.run()[0] == 0
    before = hosted.out.read_bytes()
    hosted.requests()
    code, printed, error = hosted.run()
    assert (code, error) == (0, "") and "finished" in printed and str(hosted.out) in printed
    for flags, said in ((("--limit", 5), "rows 24 there, 5 here"), (("--seed", 7), "model.parameters.seed 42 there, 7 here")):
        code, _, error = hosted.run(*flags)
        assert code == 2 and f"is a finished report of another run ({said}" in error and "--overwrite" in error and error.count("\n") == 1
    assert hosted.requests() == 0 and hosted.out.read_bytes() == before
    assert hosted.run("--limit", 5, "--overwrite")[0] == 0 and hosted.requests() == 5
    assert hosted.report()["counts"]["rows"] == 5


@pytest.mark.parametrize("content", ["notes", "[]", '{"stage": "compare"}', '{"stage": "eval"}'])
def test_another_file_at_out_is_kept(hosted, content):
    hosted.out.write_text(content)
    code, _, error = hosted.run()
    assert code == 2 and "--overwrite" in error and error.count("\n") == 1
    assert hosted.out.read_text() == content and hosted.requests() == 0


def test_a_journal_that_outlived_its_report_is_not_taken_for_a_run_under_way(hosted, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        assert hosted.run()[0] == 130
    assert hosted.out.exists() and journal_path(hosted.out).exists()
    hosted.requests()
    assert hosted.run("--overwrite")[0] == 0 and hosted.requests() == len(ROWS), "asked anew, not taken from the journal"
    assert not journal_path(hosted.out).exists()


# A row's line


@pytest.mark.parametrize(
    ("track", "completion", "tool"),
    [
        ("toolcall", '<tool_call name="book">{"tool_name":"x"}</tool_call>', "book"),
        ("structured", '{"tool_name":"book","arguments":{}}', "book"), ("structured", '{"tool_name":7}', None),
        ("structured", '{"a":1}', None),
    ],
)  # fmt: skip
def test_a_line_names_its_golds_tool(track, completion, tool):
    row = score_row(TRACKS[track], Example("p", completion, id="r"), Reply("no"))
    assert row.to_json(TRACKS[track])["tool"] == tool


@pytest.mark.parametrize(
    ("text", "reasoning", "spent", "thinking"),
    [
        ("<think>so", None, 9, True), ("<think>so</think>{", None, 9, False), ("{", None, 9, False), ("", 9, 9, True), ("", 8, 9, False),
        ("", 0, 0, False), ("", 9, None, False), ("<think>a</think><think>b", None, 9, True), ("", None, None, False),
    ],
)  # fmt: skip
def test_thinking_that_was_cut(text, reasoning, spent, thinking):
    reply = Reply(text, "length", 1, spent, 0, reasoning_tokens=reasoning, limit=9)
    assert cut_of(reply, "x", None) == {"limit": 9, "reference_tokens": None, "thinking": thinking}


def test_the_local_models_tokenizer_counts_the_reference():
    class Local:
        def count_tokens(self, text):
            return len(text)

    row = score_row(TRACKS["structured"], Example("p", '{"a":1}', id="r"), Reply("{", "length", limit=3), Local())
    assert row.to_json(TRACKS["structured"])["cut"] == {"limit": 3, "reference_tokens": 7, "thinking": False}
    assert json.loads(row.line(TRACKS["structured"]))["cut"]["limit"] == 3


def test_rows_files_of_before_are_still_replayed(hosted, run_script, eval_script, write_rows, tmp_path):
    """Without `tool`, `cut`, `load` and reasoning tokens; and `cut` is passed on from where it stands."""
    hosted.server.script = cut_below(1024)
    assert hosted.run()[0] == 0
    lines = hosted.lines()
    old = [{name: value for name, value in line.items() if name not in ("tool", "cut", "load")} for line in lines]
    for line in old:
        del line["tokens"]["reasoning"]
    found = {}
    for name, rows in (("old", old), ("new", lines)):
        flags = (*hosted.flags[:3], "replay", *hosted.flags[4:], "--replies", write_rows(f"{name}.jsonl", rows))
        assert run_script(eval_script, *flags, "--out", tmp_path / f"{name}.json")[0] == 0
        found[name] = [json.loads(line) for line in (tmp_path / f"{name}.rows.jsonl").read_text().splitlines()]
    assert [line["cut"] for line in found["new"]] == [line["cut"] for line in lines]
    assert found["old"][0]["cut"] == {"limit": None, "reference_tokens": None, "thinking": False}
    assert [line["reply"] for line in found["old"]] == [line["reply"] for line in lines]


def test_a_reply_that_was_cut_while_it_talked_may_have_called_behind_the_cut():
    """Where no call is due it counts as right, but a verdict must not rest on it: unless the limit left the small model room enough."""
    row = {"messages": [{"role": "user", "content": "Thanks"}], "tools": [{"name": "f", "parameters": {}}], "calls": [], "content": "You are welcome"}
    example, cut = parse_example(row, "rows.jsonl:1"), {"limit": 8, "reference_tokens": 4, "thinking": False}

    def found(text="You are", calls=(), cut=cut, finish="length"):
        told = make_row(TRACKS["toolcall"], example, TRACKS["toolcall"].reference(example), Reply(text, finish, calls=list(calls), cut=cut))
        line = told.to_json(TRACKS["toolcall"])
        assert [unmeasured(line, hosted) for hosted in (True, False)] == [told.unmeasured(hosted) for hosted in (True, False)]
        return told.scored.error, told.unmeasured(True), told.unmeasured(False)

    assert found() == (None, "truncated", "truncated")
    assert found(cut=cut | {"limit": 16}) == (None, "truncated", None)
    assert found(finish="stop") == (None, None, None)
    assert found(text="", cut=cut | {"thinking": True}) == ("truncated", "truncated", "truncated")


def test_prompts_and_conversations_without_a_call_are_not_measured_together():
    talk = {"messages": [{"role": "user", "content": "Thanks"}], "calls": []}
    call = {"messages": [{"role": "user", "content": "Thanks"}], "calls": [{"name": "f", "arguments": {}}]}
    prompt = {"prompt": "p", "completion": '<tool_call name="f">{}</tool_call>'}
    rows = {name: parse_example(row, "rows.jsonl:1") for name, row in (("talk", talk), ("call", call), ("prompt", prompt))}
    with pytest.raises(UserError, match="cannot be measured over both"):
        check_rows("toolcall", [rows["prompt"], rows["call"], rows["talk"]])
    for some in (["talk", "call"], ["prompt", "call"]):
        check_rows("toolcall", [rows[name] for name in some])


def test_plain_answers_are_all_measured(hosted):
    hosted.server.script = plain
    code, printed, error = hosted.run()
    assert (code, error) == (0, "") and hosted.report()["tokens"]["rows"] == 24 and "not measured" not in printed


def test_a_reply_with_a_line_separator_of_unicodes_is_one_line(tmp_path):
    report = tmp_path / "report.json"
    write_json(report, {"stage": "eval", "counts": {"rows": 2}})
    lines = [{"id": "1", "reply": "one\u2028two\u0085three"}, {"id": "2", "reply": "\r\n\x0c"}]
    write_jsonl(rows_path(report), lines)
    assert Finished(report).lines() == lines
