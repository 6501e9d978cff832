"""watch.py as it is run: exit codes, the flag, starting anew, the export, Langfuse, a terminal."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid

import pytest

from slm_swap.common.reports import read_json
from slm_swap.common.settings import PACKAGE
from slm_swap.dataset.labels import TEACHER
from slm_swap.rows.examples import read_examples
from slm_swap.serving.state import flag
from tests.serving import states
from tests.serving.states import append, audit, minute
from tests.support.langfuse_server import LangfuseServer
from tests.support.processes import PATIENCE
from tests.support.scripts import load_script


@pytest.fixture(scope="module")
def script():
    return load_script("05_serve/watch.py")


@pytest.fixture
def folder(tmp_path):
    return states.state(tmp_path / "state")


@pytest.fixture
def run(run_script, script, folder):
    return lambda *flags: run_script(script, "--state", folder, *flags)


def disagree(folder, first=0, count=60):
    append(folder / "audits.jsonl", *(audit(number, number % 2 > 0) for number in range(first, first + count)))


def test_quiet_is_exit_0(run, folder):
    append(folder / "audits.jsonl", *(audit(number, True) for number in range(100)))
    code, told, error = run("--once")
    assert (code, error) == (0, "") and told == "quiet: 100 audited requests, 0.0% differ, 5.0% allowed\n" and flag(folder) is None


def test_an_alarm_raises_the_flag_until_somebody_resumes(run, folder, tmp_path):
    disagree(folder)
    code, told, error = run("--once", "--html", tmp_path / "page.html")
    assert code == 12 and told.startswith("ALARM, nothing is answered locally: disagreement: ") and "All requests go" in (tmp_path / "page.html").read_text()
    [first, second] = error.splitlines()
    assert {line.split(":")[1].strip() for line in (first, second)} == {"disagreement", "disagreement on order_status"} and "see r0, r2" in first
    up = flag(folder)
    assert up["rows"][0] == "r0" and len(up["rows"]) == len(set(up["rows"])) and [alarm["kind"] for alarm in up["alarms"]] == ["disagreement", "tools"]
    assert run("--once")[0] == 12 and flag(folder) == up  # the first reason stays
    code, told, _ = run("--resume")
    kept = re.search(r"kept as (\S+)", told)[1]
    assert code == 0 and flag(folder) is None and read_json(kept, "") == up
    assert run("--once")[:2] == (0, "quiet: 0 audited requests, – differ, 5.0% allowed\n")
    disagree(folder, 60)
    assert run("--once")[0] == 12
    assert "no flag was up" not in run("--resume")[1] and "no flag was up" in run("--resume")[1]


def test_a_flag_that_is_taken_away_without_resuming_comes_back(run, folder):
    disagree(folder)
    assert run("--once")[0] == 12
    (folder / "stop.json").unlink()
    assert run("--once")[0] == 12 and flag(folder)


def test_what_was_audited_under_another_cascade_does_not_count(run, folder, tmp_path):
    disagree(folder)
    assert run("--once")[0] == 12
    states.serve(folder, states.cascade(tmp_path / "cascade.json", disagreement={"seen": 0.0, "bound": 0.01, "units": 300}))
    assert run("--once")[0] == 12 and flag(folder)  # a flag stays until somebody has looked
    run("--resume")
    disagree(folder, 60, 4)
    states.serve(folder, states.cascade(tmp_path / "cascade.json", disagreement={"seen": 0.0, "bound": 0.02, "units": 300}))
    code, told, error = run("--once")
    assert code == 0 and told == "quiet: 0 audited requests, – differ, 2.0% allowed\n" and "another cascade is served" in error
    append(folder / "audits.jsonl", audit(100, True))
    assert "1 audited requests" in run("--once")[1]


@pytest.mark.parametrize("change", ["made anew", "gone"])
@pytest.mark.parametrize("endpoint", ["this version", "without its rule", "given"])
def test_a_cascade_made_anew_does_not_count_before_the_endpoint_starts_again(script, run, folder, tmp_path, capsys, change, endpoint):
    path, told = tmp_path / "cascade.json", read_json(folder / "endpoint.json", "")
    if endpoint == "without its rule":
        (folder / "endpoint.json").write_text(json.dumps(told | {"rule": None}))
    given = ["--cascade", str(path)] if endpoint == "given" else []
    look = script.Look(script.parse_args(["--state", str(folder), *given]))
    look()
    if change == "gone":
        path.unlink()
    else:
        states.cascade(path, disagreement={"seen": 0.0, "bound": 0.9, "units": 300})
    look()
    disagree(folder)
    look()
    assert flag(folder) and look.watch.allowed.disagreement == 0.05 and look.watch.overall.seen == 60
    error = capsys.readouterr().err
    assert error.count("warning: ") == 1 and "is not as the endpoint read it" in error and "restart" not in error
    assert run("--export", tmp_path / "rows.jsonl")[0] == 0
    if endpoint == "this version":
        code, _, error = run("--once")
        assert code == 12 and "is not as the endpoint read it" in error
    states.serve(folder, states.cascade(path, disagreement={"seen": 0.0, "bound": 0.9, "units": 300}))
    if endpoint != "given":
        look()
        assert look.watch.allowed.disagreement == 0.9 and "another cascade is served" in capsys.readouterr().err


def test_the_export_names_the_model_that_a_given_cascade_names(run, folder, tmp_path):
    append(folder / "audits.jsonl", audit(1, False))
    states.cascade(tmp_path / "cascade.json", hosted="gpt-y")
    for flags, model in (([], "gpt-x"), (["--cascade", tmp_path / "cascade.json"], "gpt-y")):
        assert run("--export", tmp_path / f"{model}.jsonl", *flags)[0] == 0
        assert read_examples(tmp_path / f"{model}.jsonl")[0].source == f"teacher:audit of {model}"


def test_a_flag_that_a_person_put_there_is_an_alarm_too(run, folder):
    (folder / "stop.json").touch()
    assert run("--once")[0] == 12


def test_what_takes_back_is_chosen(run, folder):
    append(folder / "minutes.jsonl", *(minute(number, 10, 90) for number in range(50)))
    code, told, error = run("--once")
    assert code == 0 and flag(folder) is None and error.startswith("warning: handed on")
    assert told.startswith("warning: handed on: 90.0% of the requests were handed on")
    disagree(folder)
    assert run("--once", "--take-back-on")[0] == 0
    code, told, _ = run("--once", "--take-back-on", "handed_on")
    assert code == 12 and "handed on" in flag(folder)["why"] and "differ" not in flag(folder)["why"]


def test_rarer_false_alarms_take_more_evidence(run, folder):
    append(folder / "audits.jsonl", *(audit(number, number % 2 > 0, None) for number in range(10)))
    assert [run("--once", "--alarms-in", n)[0] for n in (10**9, 10)] == [0, 12]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--state", "nowhere"], "error: no state at .*nowhere: start 05_serve/serve.py, or pass --state"),
        (["--cascade", "none.json"], r"error: cannot read .*none\.json .*make it with 03_compare/calibrate\.py"),
        (["--failures", "1"], "--failures must be below 1"),
        (["--take-back-on", "weather"], "invalid choice: 'weather'"),
        (["--alarms-in", "0"], "0 is less than 1"),
        (["--export", "rows.jsonl"], "error: no audits at .*: nothing has been audited, or pass --state"),
        (["--resume", "--html", "x"], "--html goes with a look"),
        (["--resume", "--export", "x"], "not allowed with"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, monkeypatch, flags, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "state/endpoint.json").unlink() if "--cascade" in flags else None
    code, said, error = run("--once", *flags) if flags[0] not in ("--export", "--resume") else run(*flags)
    assert code == 2 and said == "" and re.search(told, error) and len(error.splitlines()) == 1


def test_the_export_is_rows_of_a_teacher_s(run, folder, tmp_path):
    none = audit(7, False, hosted={"text": "None is due."})
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}
    asked = [{"messages": states.body(8)["messages"]}, {"messages": states.body(8)["messages"], "response_format": form}]
    told = [[1.50], {"text": "so"}, {"text": "so"}, {"city": "Porto"}]
    values = [audit(number, False, None, hosted=value, request=asked[number > 9]) for number, value in enumerate(told, 8)]
    values[1]["unreadable"] = ["hosted"]
    bad = [audit(4, False, request={"messages": []}), audit(5, False, hosted=3), audit(6, False, hosted=[{"name": "other", "arguments": {}}])]
    append(folder / "audits.jsonl", audit(1, False), audit(2, True), audit(3, False, content=False), *bad, none, *values)
    with open(folder / "audits.jsonl", "ab") as stream:
        stream.write(b"{}\n" + states.line(audit(20, False))[:50])
    code, told, _ = run("--export", tmp_path / "rows.jsonl")
    assert code == 0 and told.startswith("4 rows; 1 agree; 1 left out: no_content; ") and "1 left out: damaged" in told and "agreement, not accuracy" in told
    assert all(f"1 left out: {reason}" in told for reason in ("no_request", "unusable", "tool_not_listed", "unreadable", "gold_breaks_schema"))
    call, none, bare, value = read_examples(tmp_path / "rows.jsonl")
    assert [row.id for row in (call, none, bare, value)] == ["r1", "r7", "r8", "r11"] and call.calls == [{"name": "order_status", "arguments": {"order": 2}}]
    assert none.calls == [] and none.content == "None is due." and bare.value == [1.5] and value.value == {"city": "Porto"} and value.schema["type"] == "object"
    assert {row.source for row in (call, none, bare, value)} == {"teacher:audit of gpt-x"} and call.source.startswith(TEACHER)
    assert call.tools[0]["name"] == "order_status" and call.options == {"tool_choice": "auto"} and call.messages[0]["content"] == "Where is order 1?"
    assert call.time == "2027-01-15T08:00:01+00:00"


def test_a_reply_that_cannot_be_read_is_no_gold_and_a_value_that_looks_like_it_is(run, folder, tmp_path):
    """No schema: `response_format: json_object`. Audits of earlier versions do not say which of both a text is."""
    request = {"messages": states.body(1)["messages"], "response_format": {"type": "json_object"}}
    sorry, fenced, value = {"text": "I am sorry, I cannot."}, {"text": '```json\n{"a": 1}\n```'}, {"text": "a value"}
    audits = [audit(number, False, None, hosted=told, request=request) for number, told in enumerate([sorry, fenced, value, sorry, {"b": 2}])]
    broken = [audit(5, False, hosted={"text": "I look it up."}, unreadable=["local", "hosted"]), audit(6, False, hosted={"text": "No call."})]
    for one in audits[:2]:
        one["unreadable"] = ["hosted"]
    for one in (*audits[3:], broken[1]):
        del one["unreadable"]
    append(folder / "audits.jsonl", *audits, *broken, audit(7, False, unreadable=["local"]))
    code, told, _ = run("--export", tmp_path / "rows.jsonl")
    assert code == 0 and told.splitlines()[0] == "3 rows; 0 agree; 3 left out: unreadable; 2 left out: may_be_unreadable"
    rows = read_examples(tmp_path / "rows.jsonl")
    assert [row.id for row in rows] == ["r2", "r4", "r7"] and rows[0].value == value and rows[1].value == {"b": 2} and rows[2].calls == states.calls(2)
    assert run("--once", "--html", tmp_path / "page.html")[0] in (0, 12)
    assert (tmp_path / "page.html").read_text().count("unreadable: ") == 5  # three of the hosted model, two of the small one


def test_an_export_of_nothing_writes_nothing(run, folder, tmp_path):
    append(folder / "audits.jsonl", audit(1, True))
    code, _, error = run("--export", tmp_path / "rows.jsonl")
    assert code == 2 and "makes a row: nothing is written" in error and not (tmp_path / "rows.jsonl").exists()


def test_langfuse_is_told_of_the_alarm_and_an_outage_does_not_hold_it_up(run, folder, monkeypatch):
    disagree(folder)
    with LangfuseServer(f"pk-lf-{uuid.uuid4()}") as server:
        public, secret = server.keys.split(":")
        for name, value in {"PUBLIC_KEY": public, "SECRET_KEY": secret, "BASE_URL": server.url, "DISABLED": "0"}.items():
            monkeypatch.setenv(f"LANGFUSE_{name}", value)
        assert run("--once")[0] == 12
        events = [span for span in server.spans if span.name == "alarm"]
        assert len(events) == 2 and any(span.json("metadata.rows")[0] == "r0" for span in events)
        assert run("--once")[0] == 12 and len([span for span in server.spans if span.name == "alarm"]) == 2  # told once
        run("--resume")
        disagree(folder, 60)
        server.refuse()
        code, _, error = run("--once")
        assert code == 12 and flag(folder) and "have not reached Langfuse" in error


def read_on(descriptor: int, shown: bytearray) -> None:
    """Read what a process shows until it ends: a terminal that nobody reads holds it up."""
    with contextlib.suppress(OSError), open(descriptor, "rb", buffering=0) as stream:
        while part := stream.read(10_000):
            shown += part


@pytest.mark.parametrize("terminal", [False, True])
def test_it_watches_until_it_is_interrupted(folder, terminal):
    append(folder / "audits.jsonl", *(audit(number, True) for number in range(50)))
    command = [sys.executable, str(PACKAGE / "05_serve/watch.py"), "--state", str(folder)]
    master, slave = os.openpty()
    out = slave if terminal else subprocess.PIPE
    process = subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, env=os.environ | {"LANGFUSE_DISABLED": "1", "COLUMNS": "120"})
    os.close(slave)
    shown = bytearray()
    threading.Thread(target=read_on, args=(os.dup(master) if terminal else os.dup(process.stdout.fileno()), shown), daemon=True).start()
    try:
        until = time.monotonic() + PATIENCE
        while b"quiet: 50 audited requests" not in shown and time.monotonic() < until:
            time.sleep(0.05)
        disagree(folder, 50)
        until = time.monotonic() + PATIENCE
        while flag(folder) is None and time.monotonic() < until:
            time.sleep(0.05)
        assert flag(folder)["why"].startswith("disagreement: ")
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        os.close(master)
    assert process.returncode == 130 and (terminal or b"alarm: disagreement: " in error)
