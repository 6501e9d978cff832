"""label.py from prompts to labelled rows, against a hosted model over a real socket."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from slm_swap.clients.protocol import Reply
from slm_swap.common.reports import read_json
from slm_swap.dataset.labels import labelled, unlabelled, votes_of
from slm_swap.evaluating.journal import Journal
from slm_swap.evaluating.labelling import Labelling
from slm_swap.evaluating.outage import Outage
from slm_swap.evaluating.row import score_row
from slm_swap.rows.examples import Example, parse_example
from slm_swap.rows.lines import read_jsonl
from slm_swap.scoring.tracks import TRACKS
from tests.support.scripted import DOWN, Scripted, plain
from tests.support.scripts import load_script

KEY = "key-of-the-simulator"
TOOLS = [
    {"name": "order_status", "description": "Where an order is", "parameters": {"type": "object", "properties": {"order": {"type": "integer"}}, "required": ["order"]}}
]
PRICES = '[hosted.simulator]\ninput = 1.0\noutput = 2.0\n'


def row(number: int, **wanted: object) -> dict:
    return {"id": f"r{number}", "messages": [{"role": "user", "content": f"Where is order {number}?"}], "tools": TOOLS, **wanted}


def known(number: int) -> Example:
    calls = [] if number % 5 == 0 else [{"name": "order_status", "arguments": {"order": number}}]
    return parse_example(row(number, calls=calls), "rows.jsonl")


@pytest.fixture(scope="module")
def script():
    return load_script("02_dataset/label.py")


@pytest.fixture
def served(monkeypatch, tmp_path):
    """A function that starts a hosted model with a script; its prices are known."""
    (tmp_path / "prices.toml").write_text(PRICES)
    monkeypatch.setenv("PRICES_FILE", str(tmp_path / "prices.toml"))
    with Scripted([known(number) for number in range(1, 13)], plain, key=KEY) as server:
        for name, value in {"ENDPOINT": server.url, "DEPLOYMENT": "simulator", "API_KEY": KEY, "API_VERSION": "2024-10-21"}.items():
            monkeypatch.setenv(f"AZURE_{name}", value)
        yield server


def said(answer, **message):
    choice = answer.body["choices"][0]
    return replace(answer, body=answer.body | {"choices": [choice | {"message": {"role": "assistant", "content": None} | message}]})


def calling(answer, name, arguments):
    return said(answer, tool_calls=[{"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}}])


@pytest.fixture
def label(run_script, script, write_rows, tmp_path):
    """A function that labels the rows of some numbers: (exit code, stdout, stderr)."""

    def run_it(*flags, numbers=range(1, 13), **fields):
        prompts = write_rows("prompts.jsonl", [row(number, **fields) for number in numbers])
        return run_script(script, "--track", "toolcall", "--prompts", prompts, "--out", tmp_path / "labels.jsonl", *flags)

    return run_it


def lines(path):
    return [value for _, value in read_jsonl(path)]


def test_nothing_is_asked_before_a_budget_confirms_it(label, served, tmp_path):
    code, _, error = label()
    assert code == 2 and "36 requests of 12 rows cost at most about" in error and "pass --budget" in error
    assert not served.asked and not list(tmp_path.glob("labels*"))


def test_rows_on_which_the_samples_agree_are_labelled(label, served, tmp_path):
    code, printed, error = label("--budget", 1)
    assert code == 0 and "12 of 12 rows: 3 of 3 samples agree" in printed, error
    assert set(served.asked.values()) == {3}
    for number, found in enumerate(lines(tmp_path / "labels.jsonl"), 1):
        example = parse_example(found, "labels.jsonl")
        assert example.calls == known(number).calls and example.source == "teacher:simulator" and example.messages and example.tools == TOOLS
        assert (example.content is not None) == (example.calls == [])
    report = read_json(tmp_path / "labels.report.json", "label.py")
    assert (report["rows"], report["kept"], report["review"], report["different_answers"]) == (12, 12, 0, {"1": 12})
    assert 0 < report["cost"] < 1 and report["replies_without_usage"] == 0
    code, _, error = label("--budget", 1)
    assert code == 2 and "is there already" in error and set(served.asked.values()) == {3}


@pytest.mark.parametrize("name", ["labels.review.jsonl", "labels.report.json", "labels.jsonl"])
def test_whatever_cannot_be_written_the_same_command_goes_on(label, served, tmp_path, monkeypatch, name):
    def refuse(source, place, replace=os.replace):
        if Path(place).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, place)

    with monkeypatch.context() as full:
        full.setattr(os, "replace", refuse)
        code, _, error = label("--budget", 1)
    assert code == 2 and error.endswith(f"{name} (No space left on device): make room and run the same command again\n")
    code, _, error = label("--budget", 1)
    assert code == 0 and set(served.asked.values()) == {3} and len(lines(tmp_path / "labels.jsonl")) == 12, error


def test_equal_values_agree_and_others_go_to_review_with_their_votes(label, served, tmp_path):
    def answers(prompt, before, asked, answer):
        number = int("".join(filter(str.isdigit, prompt)))
        if number == 1:  # the same value, written otherwise
            return calling(answer, "order_status", ['{"order": 1}', '{"order":1.0}', '{ "order": 1 }'][before])
        if number == 2 and before == 1:
            return calling(answer, "order_status", '{"order": 22}')
        if number == 3:
            return calling(answer, "order_status", '{"order": "three"}')
        if number == 4:
            return calling(answer, "cancel", "{}")
        return answer

    served.script = answers
    code, printed, error = label("--budget", 1, numbers=range(1, 5))
    assert code == 0 and "1 of 4 rows" in printed, error
    assert [found["id"] for found in lines(tmp_path / "labels.jsonl")] == ["r1"]
    review = {found["id"]: found["votes"] for found in lines(tmp_path / "labels.review.jsonl")}
    assert [(vote["count"], vote["calls"][0]["arguments"]) for vote in review["r2"]] == [(2, {"order": 2}), (1, {"order": 22})]
    assert review["r3"][0]["count"] == 3 and "break the schema of order_status" in review["r3"][0]["fault"]
    assert "not on offer" in review["r4"][0]["fault"]


def test_two_of_three_may_be_enough(label, served, tmp_path):
    served.script = lambda prompt, before, asked, answer: calling(answer, "order_status", '{"order": 9}') if before == 1 else answer
    code, printed, _ = label("--budget", 1, "--agree", 2, numbers=[1, 2])
    assert code == 0 and "2 of 2 rows: 2 of 3 samples agree" in printed
    assert [found["calls"][0]["arguments"]["order"] for found in lines(tmp_path / "labels.jsonl")] == [1, 2]


def test_a_spent_budget_ends_the_run_and_a_larger_one_goes_on(label, served, tmp_path):
    whole = label("--max-new-tokens", 20, numbers=range(1, 13))[2]
    most = float(whole.partition("cost at most about ")[2].split()[0].rstrip(":"))
    code, _, error = label("--budget", most / 6, "--max-new-tokens", 20)
    assert code == 2 and "the budget is spent" in error and not (tmp_path / "labels.jsonl").exists()
    first = sum(served.asked.values())
    assert 0 < first < 36
    code, printed, error = label("--budget", most, "--max-new-tokens", 20)
    assert code == 0 and f"{first} are answered already" in printed, error
    assert sum(served.asked.values()) == 36, "no reply is paid twice"
    assert read_json(tmp_path / "labels.report.json", "label.py")["cost"] <= most


def test_a_request_that_failed_is_asked_again_by_the_same_command(label, served, tmp_path):
    served.script = lambda prompt, before, asked, answer: DOWN if prompt.endswith(" 2?") and before == 0 else answer
    code, _, error = label("--budget", 1, numbers=[1, 2, 3])
    assert code == 2 and "1 of 9 requests failed" in error and "asks them again" in error
    assert label("--budget", 1, numbers=[1, 2, 3])[0] == 0
    assert sum(served.asked.values()) == 10


@pytest.mark.parametrize("written", range(4))
def test_a_run_that_is_killed_at_its_end_goes_on_by_the_same_command_to_the_same_results(label, served, script, monkeypatch, tmp_path, written):
    """After so many of the files that it writes: labels, review, report."""
    served.script = lambda prompt, before, asked, answer: calling(answer, "order_status", '{"order": 9}') if prompt.endswith(" 2?") and before else answer

    def results() -> list:
        report = read_json(tmp_path / "labels.report.json", "label.py")
        return [lines(tmp_path / "labels.jsonl"), lines(tmp_path / "labels.review.jsonl"), {**report, "created_at": None}]

    assert label("--budget", 1, numbers=[1, 2, 3])[0] == 0
    whole, asked = results(), served.asked.copy()
    assert whole[2]["model"]["system_fingerprint"] and whole[2]["kept"] == 2
    for path in tmp_path.glob("labels*"):
        path.unlink()
    served.asked.clear()
    calls = []

    def interrupted(write):
        def wrapped(*args):
            if len(calls) == written:
                raise KeyboardInterrupt
            calls.append(1)
            return write(*args)

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(script, "write_jsonl", interrupted(script.write_jsonl))
        patch.setattr(script, "write_json", interrupted(script.write_json))
        patch.setattr(script.Journal, "remove", interrupted(script.Journal.remove))
        assert label("--budget", 1, numbers=[1, 2, 3])[0] == 130
    assert label("--budget", 1, numbers=[1, 2, 3])[0] == 0
    assert results() == whole and served.asked == asked and not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("fields", "what"),
    [({"calls": []}, "has a `calls` already"), ({"messages": "no"}, "`messages` must be a list"), ({"tools": ["order_status"]}, "is not an object")],
)
def test_prompts_that_cannot_be_asked(label, served, fields, what):
    code, _, error = label("--budget", 1, **fields)
    assert code == 2 and what in error and error.count("\n") == 1 and not served.asked


def test_without_prices_no_budget_can_be_kept(label, served, tmp_path):
    (tmp_path / "prices.toml").write_text("")
    code, _, error = label("--budget", 1)
    assert code == 2 and "prices are not in" in error and not served.asked


def test_a_report_on_such_rows_says_agreement(run_script, eval_script, label, served, tmp_path):
    assert label("--budget", 1)[0] == 0
    out = tmp_path / "report.json"
    code, printed, error = run_script(
        eval_script, "--track", "toolcall", "--model-kind", "azure", "--dataset", tmp_path / "labels.jsonl", "--out", out
    )
    assert code == 0 and printed.startswith("agreement, not accuracy: 12 of 12 references are replies of simulator"), error
    assert json.loads(out.read_text())["references_by_teacher"] == {"simulator": 12}


@pytest.mark.parametrize(
    "text", ["", " \n", '{"name": "order_status", "arguments": {"order": 1}}', '<tool_call>\n{"name": "order_status"}\n</tool_call>', "<think>Hm"]
)
def test_neither_silence_nor_an_unread_call_says_that_no_call_is_due(text):
    example = unlabelled(row(1), "toolcall", "rows.jsonl:1")
    votes = votes_of("toolcall", example, [Reply(text, calls=[])] * 3)
    assert votes[0].count == 3 and votes[0].fault and labelled(row(1), "toolcall", example, votes, 3, "t") is None
    votes = votes_of("toolcall", example, [Reply("Which order?", calls=[])] * 3)
    assert labelled(row(1), "toolcall", example, votes, 3, "t")["calls"] == []


def test_what_later_samples_cost_counts_before_the_first_is_asked(tmp_path):
    """A hole in the first sample is filled within what the others have left of the budget."""
    examples = [unlabelled(row(number), "toolcall", "rows.jsonl") for number in (1, 2)]
    asked = []

    class Client:
        def cost(self, *counts):
            return 1.0

        def stream(self, rows, answered=()):
            for at, _ in rows:
                asked.append(at)
                yield at, Reply("ok", "stop", 1, 1, 0, calls=[])

        def describe(self):
            return {}

        def close(self): ...

    with Journal(tmp_path / "labels.rows.jsonl.part") as journal:
        journal.begin({"run": 1}, 4)
        for index in (1, 2, 3):
            reply = Reply("ok", "stop", 1, 1, 0, calls=[])
            journal.add(index, score_row(TRACKS["toolcall"], examples[index % 2], reply).line(TRACKS["toolcall"]), reply, 0.0)
        labelling = Labelling("toolcall", examples, 2, 8, 3.5)
        assert not labelling.ask(lambda sample: Client(), journal, Outage(), lambda: None)
        assert asked == [] and labelling.spent == 3.0
