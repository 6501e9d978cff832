"""Traces as they arrive at a recording server over a real socket, and what stays on disk where they do not."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import uuid
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import langfuse
import pytest

from slm_swap.clients.protocol import Reply
from slm_swap.common.errors import UserError
from slm_swap.common.settings import ROOT
from slm_swap.dataset.traffic import Unusable, convert
from slm_swap.evaluating.row import score_row
from slm_swap.evaluating.row_traces import _as_told, trace_rows
from slm_swap.rows.examples import parse_example
from slm_swap.rows.prompts import OWN_RUN, request_of
from slm_swap.scoring.tracks import TRACKS
from slm_swap.tracing import outbox, runs, wire
from slm_swap.tracing.datasets import ENVIRONMENT, Experiment
from slm_swap.tracing.outbox import parse
from slm_swap.tracing.runs import _answer, connect, outbox_path, trace_run
from tests.support.langfuse_server import scores_of, spans_of
from tests.support.processes import PATIENCE, wait_until
from tests.support.traces import MESSAGES, REPLY, found_failing, kept, outage, send_rows, settings_for


def plain(value):
    """A metadata value: JSON, or a text as it is."""
    try:
        return json.loads(str(value))
    except ValueError:
        return value


def by_name(server):
    spans = server.spans
    assert len({span.row for span in spans}) == len(spans)
    return {span.row: span for span in spans}


# --- what arrives


def test_a_run_is_one_trace_with_its_rows_scores_and_event(server, traced):
    metadata = {"dataset": "test.jsonl", "limit": 5, "optional": False, "args": {"seed": 42}, "note": "n" * 300}
    with traced(settings_for(server), "eval-toolcall-slm", metadata, ["toolcall", "slm"], session="pipeline-7") as trace:
        trace.generation(
            "right",
            "phi-4-mini",
            MESSAGES,
            REPLY,
            {"args_exact": 1.0, "args_f1": 0.5},
            cost={"total": 0.003},
            metadata={"matcher": "strict"},
        )
        trace.generation("miss", "phi-4-mini", MESSAGES, REPLY, {"args_exact": 0}, error="wrong_value")
        trace.generation("failed", "phi-4-mini", MESSAGES, Reply("", "error", error="HTTP 429 five times"), {"args_exact": 0.0})
        trace.event("decision", {"verdict": "SWAP"})
        trace.scores({"args_exact_rate": 0.5, "verdict": "SWAP"})
        trace.update(output={"args_exact_rate": 0.5}, metadata={"report": "01_eval/reports/x.json"})
    spans = by_name(server)
    assert set(spans) == {"eval-toolcall-slm", "right", "miss", "failed", "decision"}
    root = spans.pop("eval-toolcall-slm")
    assert (root.trace, root.parent, root.kind) == (trace.id, "", "chain")
    assert {span.parent for span in spans.values()} == {root.id}
    assert {name: span.kind for name, span in spans.items()} == {
        "right": "generation",
        "miss": "generation",
        "failed": "generation",
        "decision": "event",
    }
    for span in (root, *spans.values()):
        assert span.trace == trace.id
        assert span.attributes["langfuse.trace.name"] == "eval-toolcall-slm"
        assert span.attributes["langfuse.trace.tags"] == ["toolcall", "slm"]
        assert span.attributes["session.id"] == "pipeline-7"
        assert plain(span.attributes["langfuse.trace.metadata.dataset"]) == "test.jsonl"
        assert plain(span.attributes["langfuse.trace.metadata.limit"]) == 5
    assert plain(root.attributes["langfuse.observation.metadata.note"]) == "n" * 300
    assert plain(root.attributes["langfuse.observation.metadata.args"]) == {"seed": 42}
    assert plain(root.attributes["langfuse.observation.metadata.report"]) == "01_eval/reports/x.json"
    assert root.json("output") == {"args_exact_rate": 0.5} and root.json("input") == metadata
    assert root.attributes["langfuse.observation.metadata.optional"] is False is root.attributes["langfuse.trace.metadata.optional"]
    assert {span.name for span in server.spans if span.kind == "generation"} == {"row"}
    assert root.scope == ("langfuse-sdk.slm_swap", {"public_key": server.keys.split(":")[0]})
    assert plain(spans["decision"].attributes["langfuse.observation.metadata.verdict"]) == "SWAP"
    assert trace.url == f"{server.url}/project/project-1/traces/{trace.id}"


def test_a_native_row_carries_its_tools_and_calls_and_is_known_as_this_programs_own(server, traced):
    tools = [{"name": "book", "description": "Book a table", "parameters": {"type": "object", "properties": {"day": {"type": "string"}}, "required": []}}]
    row = {"id": "r", "messages": [{"role": "user", "content": "A table for Monday, please"}], "tools": tools, "calls": []}
    example = parse_example(row, "rows.jsonl:1")
    reply = Reply("", calls=[{"name": "book", "arguments": '{"day": "Monday"}'}])
    with traced(settings_for(server)) as trace:
        trace_rows(trace, "toolcall", SimpleNamespace(kind="slm", describe=lambda: {"path": "phi"}), [score_row(TRACKS["toolcall"], example, reply)])
    span = by_name(server)["r"]
    asked, answer = span.json("input"), span.json("output")
    assert asked["messages"] == example.messages and asked["tools"] == [{"type": "function", "function": tools[0]}]
    assert answer["tool_calls"][0]["function"] == reply.calls[0] and answer["content"] is None
    generation = {"id": "r", "traceId": "t", "input": asked, "output": answer, "metadata": {OWN_RUN: span.json(f"metadata.{OWN_RUN}")}}
    taken = convert(generation, ("toolcall",), None)
    assert taken.own and taken.row["calls"] == [{"name": "book", "arguments": {"day": "Monday"}}] and taken.row["tools"] == tools
    assert not convert(generation | {"metadata": {}}, ("toolcall",), None).own


def test_a_row_carries_messages_reply_usage_cost_level_and_duration(server, traced):
    with traced(settings_for(server)) as trace:
        trace.generation("right", "phi-4-mini", MESSAGES, REPLY, cost={"input": 0.001, "output": 0.002, "total": 0.003}, metadata={"matcher": "strict"})
        trace.generation("miss", "phi-4-mini", MESSAGES, REPLY, error="wrong_value")
        trace.generation("failed", "phi-4-mini", MESSAGES, Reply("", "error", error="HTTP 429 five times"))
    spans = by_name(server)
    right, miss, failed = spans["right"], spans["miss"], spans["failed"]
    assert right.json("input") == MESSAGES
    assert right.attributes["langfuse.observation.output"] == REPLY.text
    assert right.attributes["langfuse.observation.model.name"] == "phi-4-mini"
    assert right.end - right.start == 250_000_000
    usage = right.json("usage_details")
    assert usage == {"input": 45, "input_cached_tokens": 15, "output": 20}
    assert all(type(count) is int for count in usage.values())
    assert "langfuse.observation.usage_details" not in failed.attributes, "what was not counted is not 0"
    assert right.json("cost_details") == {"input": 0.001, "output": 0.002, "total": 0.003}
    assert "langfuse.observation.cost_details" not in miss.attributes
    assert plain(right.attributes["langfuse.observation.metadata.matcher"]) == "strict"
    assert plain(right.attributes["langfuse.observation.metadata.finish_reason"]) == "stop"
    levels = {span.row: span.attributes["langfuse.observation.level"] for span in (right, miss, failed)}
    assert levels == {"right": "DEFAULT", "miss": "WARNING", "failed": "ERROR"}
    assert miss.attributes["langfuse.observation.status_message"] == "wrong_value"
    assert failed.attributes["langfuse.observation.status_message"] == "HTTP 429 five times"


def test_scores_belong_to_their_row_or_to_the_trace(server, traced):
    with traced(settings_for(server)) as trace:
        send_rows(trace, 1, scores={"args_exact": 1.0, "args_f1": 0.5, "broken": float("nan"), "unknown": None})
        trace.scores({"args_exact_rate": 0.5, "verdict": "SWAP", "endless": float("inf")})
    row = by_name(server)["row-0"].id
    found = {(s["name"], s["value"], s["dataType"], s["traceId"], s.get("observationId")) for s in server.scores}
    assert found == {
        ("args_exact", 1.0, "NUMERIC", trace.id, row),
        ("args_f1", 0.5, "NUMERIC", trace.id, row),
        ("args_exact_rate", 0.5, "NUMERIC", trace.id, None),
        ("verdict", "SWAP", "CATEGORICAL", trace.id, None),
    }
    assert len(server.scores) == 4


def test_points_of_one_time_are_two(server, traced):
    """The training log has a line for the loss and one for the validation loss of the same step."""
    with traced(settings_for(server), "train") as trace:
        for point in ({"step": 5, "loss": 0.5}, {"step": 5, "eval_loss": 0.75}):
            trace.event("loss", point, 10**18, {name: value for name, value in point.items() if name != "step"})
    points = {span.id: span for span in server.spans if span.name == "loss"}
    assert sorted(span.json("metadata.step") for span in points.values()) == [5, 5] and {span.start for span in points.values()} == {10**18}
    assert {score["name"]: (score["value"], points[score["observationId"]].name) for score in server.scores} == {"loss": (0.5, "loss"), "eval_loss": (0.75, "loss")}


def test_five_thousand_rows_arrive_each_once_though_the_server_is_slow(server, capfd, traced):
    server.delay = 0.1  # slower than the rows come, so that they must wait: the SDK's queue would drop the oldest
    with traced(settings_for(server)) as trace:
        send_rows(trace, 5000)
    rows = {span.id: span.row for span in server.spans if span.kind == "generation"}
    assert len(server.spans) == 5001
    assert sorted(rows.values()) == sorted(f"row-{number}" for number in range(5000))
    assert sorted(score["observationId"] for score in server.scores) == sorted(rows)
    assert len({score["id"] for score in server.scores}) == 5000
    assert capfd.readouterr().err == ""


def test_rows_from_other_threads_are_rows_of_the_trace(server, traced):
    with traced(settings_for(server), tags=["t"]) as trace:
        threads = [threading.Thread(target=send_rows, args=(trace, 25, 25 * number)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    root = by_name(server)["run"]
    rows = [span for span in server.spans if span.kind == "generation"]
    assert len(rows) == 100
    assert {(span.trace, span.parent, *span.attributes["langfuse.trace.tags"]) for span in rows} == {(trace.id, root.id, "t")}


def test_two_runs_in_one_process_are_two_traces(server, traced):
    settings = settings_for(server)
    with traced(settings, "first") as first:
        send_rows(first, 3)
    with traced(settings, "second", tags=["again"]) as second:
        send_rows(second, 4)
    assert first.id != second.id
    traces = [(span.trace, span.attributes["langfuse.trace.name"]) for span in server.spans]
    assert {trace: traces.count(trace) for trace in traces} == {(first.id, "first"): 4, (second.id, "second"): 5}
    assert [score["traceId"] for score in server.scores].count(second.id) == 4


def test_two_traces_open_at_once_keep_apart(server, traced):
    settings = settings_for(server)
    with traced(settings, "azure", report="a.json") as azure, traced(settings, "slm", report="b.json") as slm:
        send_rows(azure, 2)
        send_rows(slm, 3, first=2)
    assert sorted(span.trace for span in server.spans) == sorted([azure.id] * 3 + [slm.id] * 4)


def test_half_a_surrogate_pair_costs_no_row(server, capfd, traced):
    with traced(settings_for(server)) as trace:
        send_rows(trace, 5)
        trace.generation("half", "phi-4-mini", MESSAGES, Reply("a\ud83db"), metadata={"b\ud83d": "c\ud83d"})
    spans = by_name(server)
    assert len(spans) == 7
    assert spans["half"].attributes["langfuse.observation.output"] == "a?b"
    assert capfd.readouterr().err == ""


def test_batches_too_large_for_the_server_are_halved(server, capfd, tmp_path, traced):
    server.largest = 6_000
    noise = [{"role": "user", "content": "".join(uuid.uuid4().hex for _ in range(20))} for _ in range(100)]
    with traced(settings_for(server)) as trace:
        for number, message in enumerate(noise):
            trace.generation(f"row-{number}", "phi-4-mini", [message], REPLY)
        giant = "".join(uuid.uuid4().hex for _ in range(600))
        trace.generation("giant", "phi-4-mini", [{"role": "user", "content": giant}], REPLY)
    assert {span.row for span in server.spans} == {"run", *(f"row-{number}" for number in range(100))}
    assert len(server.spans) == 101
    assert "1 spans have not reached" in capfd.readouterr().err and "giant" in kept(tmp_path)[0]


# --- failing runs and secrets


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_a_failing_run_is_marked_delivered_and_goes_on_failing(server, kind, traced):
    with pytest.raises(kind, match="broke"), traced(settings_for(server)) as trace:
        send_rows(trace, 2)
        raise kind("it broke with sk-lf-right inside")
    root = by_name(server)["run"]
    assert len(server.spans) == 3
    assert root.attributes["langfuse.observation.level"] == "ERROR"
    assert root.attributes["langfuse.observation.status_message"] == f"{kind.__name__}: it broke with *** inside"


def test_secrets_are_in_no_body(server, traced):
    secret = 'az"ü\\key'
    says = f"say {secret} and sk-lf-right"
    settings = settings_for(server, azure_api_key=secret)
    deep = {says: [says, (says, {"path": Path(says)}), ValueError(says)]}
    with pytest.raises(RuntimeError), traced(settings, says, {"note": says, **deep}, [says], session=says) as trace:
        trace.generation(
            says, says, [{"role": says, "content": says}], Reply(says, says, error=says), {says: 1.0}, says, {"total": 1.0}, deep
        )
        trace.event(says, deep)
        trace.scores({says: 1.0, "text": says})
        trace.update(deep, deep)
        raise RuntimeError(says)
    assert len(server.spans) == 3 and len(server.scores) == 3
    forms = {
        secret.encode(),
        json.dumps(secret)[1:-1].encode(),
        json.dumps(secret, ensure_ascii=False)[1:-1].encode(),
        b"sk-lf-right",
    }
    for path, body in server.bodies:
        assert not [form for form in forms if form in body], path
        assert b"***" in body
    for headers in server.headers:
        assert not [name for name, value in headers.items() if "sk-lf-right" in value or secret in value]


# --- switched off, not set up, not there


def test_disabled_needs_nothing_and_sends_nothing(server, traced):
    settings = settings_for(server, langfuse_disabled=True, langfuse_secret_key=None)
    assert connect(settings) is None
    with traced(settings) as trace:
        send_rows(trace, 3)
        trace.scores({"rate": 1.0})
        trace.event("decision", {"verdict": "SWAP"})
        trace.update(output={}, metadata={})
    assert (trace.id, trace.url, server.bodies) == (None, None, [])


@pytest.mark.parametrize("missing", [("PUBLIC_KEY",), ("SECRET_KEY", "BASE_URL"), ("PUBLIC_KEY", "SECRET_KEY", "BASE_URL")])
def test_missing_variables_are_named_all_at_once(server, missing):
    settings = settings_for(server, **{f"langfuse_{name.lower()}": None for name in missing})
    with pytest.raises(UserError) as caught:
        connect(settings)
    message = str(caught.value)
    assert {name for name in ("PUBLIC_KEY", "SECRET_KEY", "BASE_URL") if f"LANGFUSE_{name}" in message} == set(missing)
    assert "LANGFUSE_DISABLED=1" in message and "\n" not in message and "sk-lf-right" not in message


@pytest.mark.parametrize("url", ["langfuse.example", "ftp://langfuse.example", "https://", "http://host:port", "http://[::1"])
def test_a_base_url_that_is_no_address_is_said_at_once(server, url):
    with pytest.raises(UserError, match="LANGFUSE_BASE_URL is not an address"):
        connect(settings_for(server, langfuse_base_url=url))


def start(settings):
    with pytest.raises(UserError) as caught:
        connect(settings)
    message = str(caught.value)
    assert "sk-lf-" not in message and "pk-lf-" not in message and "\n" not in message and "LANGFUSE_DISABLED=1" in message
    return message


def test_wrong_keys_stop_the_run_before_it_begins(server):
    message = start(settings_for(server, langfuse_secret_key="sk-lf-wrong"))
    assert server.url.removeprefix("http://") in message and "401" in message and "LANGFUSE_SECRET_KEY" in message
    assert server.bodies == []


def test_a_server_that_is_not_there_stops_the_run_before_it_begins(server):
    server.refuse()
    assert server.url.removeprefix("http://") in start(settings_for(server))


def test_a_server_that_hangs_stops_the_run_before_it_begins(server, impatient):
    server.hanging = True
    assert "Timeout" in start(settings_for(server))


def test_a_server_that_fails_stops_the_run_before_it_begins(server):
    server.status = 503
    assert "is not there (HTTP 503)" in start(settings_for(server))


def test_a_server_that_is_not_langfuse_stops_the_run_before_it_begins(server):
    address = server.url.replace("http://", "http://user:sk-lf-password@") + "/elsewhere"
    message = start(settings_for(server, langfuse_base_url=address))
    assert "does not answer like Langfuse (HTTP 404)" in message and "user" not in message


def test_neither_a_password_in_the_url_nor_a_netrc_replaces_the_keys(server, monkeypatch, tmp_path, traced):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login someone password else")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    with traced(settings_for(server, langfuse_base_url=server.url.replace("http://", "http://user:password@"))) as trace:
        send_rows(trace, 2)
    assert len(server.spans) == 3 and len(server.scores) == 2
    assert trace.url.startswith(server.url)


def test_a_start_that_failed_does_not_spoil_the_next(server, traced):
    server.refuse()
    start(settings_for(server))
    server.accept()
    with traced(settings_for(server)) as trace:
        send_rows(trace, 2)
    assert len(server.spans) == 3


# --- outages in mid-run


@pytest.mark.parametrize("trouble", ["refusing", "hanging", 500, 503, 429, 401])
def test_an_outage_fails_no_run_and_is_said_in_one_line_with_exact_counts(server, impatient, capfd, tmp_path, trouble, traced):
    with traced(settings_for(server)) as trace:
        send_rows(trace, 5)
        wait_until(lambda: len(server.spans) == 5 and len(server.scores) == 5)
        outage(server, trouble)
        send_rows(trace, 7, first=5)
        assert len(server.spans) == 5, "the run does not wait for what does not arrive"
        wait_until(lambda: found_failing(tmp_path))
    assert len(server.spans) == 5 and len(server.scores) == 5
    lines = capfd.readouterr().err.splitlines()
    reason = f"HTTP {trouble}" if isinstance(trouble, int) else "no answer"
    assert len(lines) == 1
    assert "8 spans and 7 scores have not reached Langfuse" in lines[0] and f"({reason}" in lines[0]
    assert server.url.removeprefix("http://") in lines[0] and "sk-lf" not in lines[0] and "resend_traces.py" in lines[0]
    names, scores = kept(tmp_path)
    assert len(names) == 13 and len(scores) == 12


def test_an_older_server_gets_scores_in_its_own_form(server, traced, capfd):
    server.generation = 4
    with traced(settings_for(server)) as trace:
        send_rows(trace, 3)
    assert len(server.scores) == 3 and {path for path, _ in server.bodies} >= {"/api/public/scores", "/api/public/ingestion"}
    assert capfd.readouterr().err == ""


def test_a_fast_run_without_a_server_ends_and_keeps_every_row(server, traced, impatient, capfd, tmp_path):
    with traced(settings_for(server)) as trace:
        outage(server, 503)
        send_rows(trace, 600)
    assert server.spans == [] and server.scores == []
    assert "601 spans and 600 scores have not reached" in capfd.readouterr().err
    names, scores = kept(tmp_path)
    assert names == [*(f"row-{number}" for number in range(600)), "run"] and len(scores) == 600


def test_what_an_outage_held_up_arrives_after_it(server, traced, impatient, capfd, tmp_path, monkeypatch):
    with traced(settings_for(server)) as trace:
        server.status = 500
        send_rows(trace, 3)
        wait_until(lambda: spans_of(server.bodies) and scores_of(server.bodies))
        server.status = None
        monkeypatch.setattr(runs, "CLOSE_SECONDS", PATIENCE)  # it is well again
        send_rows(trace, 6, first=3)
    assert sorted(span.row for span in server.spans) == ["row-" + str(number) for number in range(9)] + ["run"]
    assert len(server.scores) == 9 and capfd.readouterr().err == "" and kept(tmp_path) is None


def test_a_score_that_the_server_turns_down_is_counted_and_costs_no_other(server, capfd, traced):
    server.rejected_score = "odd"
    with traced(settings_for(server)) as trace:
        send_rows(trace, 3, scores={"args_exact": 1.0, "odd": 2.0})
    assert [score["name"] for score in server.scores] == ["args_exact"] * 3
    assert "turned 3 scores down" in capfd.readouterr().err


SCRIPT = """
import sys
from pathlib import Path
from slm_swap.tracing import runs, wire
from slm_swap.clients.protocol import Reply
from slm_swap.common.settings import Settings
runs.CLOSE_SECONDS = 1
wire.REQUEST_SECONDS = wire.CHECK_SECONDS = 10_000  # so that nothing but the run's own end ends a request
public_key, secret_key, url, report = sys.argv[1:]
settings = Settings(langfuse_public_key=public_key, langfuse_secret_key=secret_key, langfuse_base_url=url)
with runs.trace_run(runs.connect(settings), "run", Path(report)) as trace:
    print("begun", flush=True)
    sys.stdin.readline()
    for number in range(1500):
        trace.generation(f"row-{number}", "phi-4-mini", [], Reply("x"), {"args_exact": 1.0})
print("report written", flush=True)
"""


def begin(server, tmp_path, script=SCRIPT):
    """The script in a process (and session) of its own, its trace begun."""
    command = [sys.executable, "-c", script, *server.keys.split(":"), server.url, str(tmp_path / "report.json")]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    )


@pytest.mark.parametrize("trouble", ["hanging", "refusing"])
def test_a_process_ends_though_the_server_is_gone(server, tmp_path, trouble):
    process = begin(server, tmp_path)
    try:
        assert process.stdout.readline() == "begun\n"
        outage(server, trouble)
        output, errors = process.communicate("go\n", timeout=PATIENCE)  # a run that waited for an answer would go on for hours
    finally:
        process.kill()
    assert (process.returncode, output) == (0, "report written\n")
    assert len(errors.splitlines()) == 1
    assert "1,501 spans and 1,500 scores" in errors and len(kept(tmp_path)[0]) == 1501


WAITING = SCRIPT.replace('print("report written", flush=True)', "    print('told', flush=True)\n    sys.stdin.readline()")


def sender_of(process):
    """The id of a run's sender."""
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())


def alive(process):
    try:
        return "State:	Z" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("hanging", [False, True])
def test_a_killed_run_leaves_no_sender_and_its_file_to_the_next(server, tmp_path, hanging, traced):
    process = begin(server, tmp_path, WAITING.replace("Path(report))", 'Path(report), seed="s")'))
    process.stdin.write("go\n")
    process.stdin.flush()
    assert (process.stdout.readline(), process.stdout.readline()) == ("begun\n", "told\n")
    wait_until(lambda: server.spans)
    server.hanging = hanging
    sender = sender_of(process)
    process.kill()
    assert process.communicate()[1] == ""
    wait_until(lambda: not alive(sender))
    server.hanging = False
    with traced(settings_for(server), seed="s") as trace:
        send_rows(trace, 1501)
    assert {span.row for span in server.spans} == {"run", *(f"row-{number}" for number in range(1501))}
    if not hanging:  # where no answer came, Langfuse makes one of what comes twice
        assert len(server.spans) == 1502 and len(server.scores) == 1501


def test_an_interrupt_from_the_terminal_stops_the_run_and_not_the_sending(server, tmp_path):
    process = begin(server, tmp_path, WAITING.replace("CLOSE_SECONDS = 1", f"CLOSE_SECONDS = {PATIENCE}"))
    process.stdin.write("go\n")
    process.stdin.flush()
    assert (process.stdout.readline(), process.stdout.readline()) == ("begun\n", "told\n")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: to everything in the foreground
    errors = process.communicate(timeout=2 * PATIENCE)[1]
    assert process.returncode != 0 and errors.count("Traceback") == 1 and errors.endswith("KeyboardInterrupt\n")
    root = by_name(server)["run"]
    assert root.attributes["langfuse.observation.level"] == "ERROR" and len(server.spans) == 1501 and len(server.scores) == 1500
    assert kept(tmp_path) is None


def test_the_keys_are_on_no_command_line(server, tmp_path):
    process = begin(server, tmp_path)
    assert process.stdout.readline() == "begun\n"
    line = Path(f"/proc/{sender_of(process)}/cmdline")
    wait_until(line.read_text)  # empty for a moment while the program is being loaded
    command = line.read_text()
    assert "slm_swap.tracing.sender" in command and "-lf-" not in command
    process.communicate("go\n")


def test_a_full_disk_fails_no_run_and_is_said(server, tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
    process = begin(server, tmp_path, SCRIPT.replace("    sys.stdin.readline()", f"    sys.stdin.readline(); {limit}"))
    output, errors = process.communicate("go\n", timeout=PATIENCE)
    assert (process.returncode, output) == (0, "begun\nreport written\n")
    assert "report.traces.jsonl could not take all of the trace (" in errors


def test_an_answer_that_would_come_too_late_is_not_asked_for(server, traced, impatient, monkeypatch, capsys, resend, tmp_path):
    monkeypatch.setattr(runs, "CLOSE_SECONDS", 5.5)
    server.delay = 2.0  # so that a third request of 256 would be cut off; the second has a second and a half for a busy machine
    with traced(settings_for(server)) as trace:
        send_rows(trace, 1)
        wait_until(lambda: server.spans)
        send_rows(trace, 2000, first=1)
    assert "have not reached Langfuse" in capsys.readouterr().err
    server.delay = 0
    assert resend(server, tmp_path)[0] == 0
    assert len({span.id for span in server.spans}) == len(server.spans) == 2002


def test_nothing_heavy_is_imported_before_a_run():
    code = "import sys, slm_swap.tracing.runs; print(sorted({'langfuse', 'opentelemetry', 'httpx', 'requests'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n"


def test_the_trace_id_is_the_sdks_for_the_same_seed(server, traced):
    with traced(settings_for(server), seed="run-7") as trace:
        pass
    assert trace.id == langfuse.Langfuse.create_trace_id(seed="run-7")


# --- what was kept, and sent later


@pytest.mark.parametrize("trouble", ["refusing", "hanging", 500, 429, 401, 400])
def test_what_an_outage_kept_is_sent_later_nothing_doubled_nothing_lost(server, traced, impatient, resend, tmp_path, trouble, capsys):
    with traced(settings_for(server)) as trace:
        send_rows(trace, 5)
        wait_until(lambda: len(server.spans) == 5 and len(server.scores) == 5)
        outage(server, trouble)
        send_rows(trace, 700, first=5)
        trace.scores({"verdict": "SWAP"})
    capsys.readouterr()
    server.status, server.hanging = None, False
    if trouble == "refusing":
        server.accept()
    code, printed, _ = resend(server, tmp_path)
    assert code == 0 and printed.startswith("sent: ") and kept(tmp_path) is None
    assert sorted(span.row for span in server.spans) == sorted(["run", *(f"row-{number}" for number in range(705))])
    assert len(server.scores) == len({score["id"] for score in server.scores}) == 706
    assert resend(server, tmp_path)[:2] == (0, "nothing to send: every trace has arrived\n")


def test_a_server_that_fails_half_of_the_time_gets_everything_once_or_keeps_it(server, traced, resend, tmp_path):
    server.flaky = 0.5
    with traced(settings_for(server)) as trace:
        send_rows(trace, 1500)
    server.flaky = 0.0
    resend(server, tmp_path)
    assert kept(tmp_path) is None and {span.row for span in server.spans} >= {f"row-{number}" for number in range(1500)}
    assert len({span.id for span in server.spans}) == len(server.spans) == 1501
    assert len({score["id"] for score in server.scores}) == len(server.scores) == 1500


def test_a_run_that_goes_on_after_a_kill_sends_every_row_once(server, traced, tmp_path):
    killed = SCRIPT.replace('Path(report))', 'Path(report), seed="s")').replace("range(1500)", "range(40)")
    killed = killed.replace('print("report written", flush=True)', "    import os, time; time.sleep(1.5); os._exit(9)")
    command = [sys.executable, "-c", killed, *server.keys.split(":"), server.url, str(tmp_path / "report.json")]
    process = subprocess.run(command, input="go\n", capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE)
    assert process.returncode == 9, process.stderr
    names, _ = kept(tmp_path)
    assert names == [f"row-{number}" for number in range(40)]
    with open(outbox_path(tmp_path / "report.json"), "ab") as stream:
        stream.write(b'{"span":{"id":"torn')
    with traced(settings_for(server), seed="s") as trace:
        send_rows(trace, 60)  # the first 40 again, as a resumed run tells them
    rows = [span.row for span in server.spans if span.kind == "generation"]
    assert sorted(rows) == sorted(f"row-{number}" for number in range(60)) and kept(tmp_path) is None
    assert len({span.trace for span in server.spans}) == 1 and len({score["id"] for score in server.scores}) == 60
    root = by_name(server)["run"]
    assert root.start < min(span.start for span in server.spans if span is not root and span.id != root.id), "it began with the first process"


def test_scores_whose_answer_was_lost_are_looked_up_and_not_sent_again(server, traced, capfd, tmp_path):
    """A slow server does the work for which nobody waits any more: the same once more would make it slower still."""
    server.answers_lost = 2
    with traced(settings_for(server)) as trace:
        send_rows(trace, 400, scores={"args_exact": 1.0, "args_f1": 0.5})
    assert capfd.readouterr().err == "" and kept(tmp_path) is None
    ids = [score["id"] for score in server.scores]
    assert len(ids) == len(set(ids)) == 800 and server.answers_lost == 0
    assert server.looked_up and max(len(scores_of([post])) for post in server.bodies if scores_of([post])) <= 128


@pytest.mark.parametrize("generation", [4, 5])
def test_what_an_interrupted_run_may_have_sent_is_looked_up_by_the_next_one(server, traced, impatient, resend, tmp_path, generation):
    server.generation = generation
    with traced(settings_for(server)) as trace:
        send_rows(trace, 200)
        wait_until(lambda: len(server.scores) == 200)
        server.answers_lost = 10**6
        send_rows(trace, 100, first=200)
        wait_until(lambda: len(server.scores) >= 300 and found_failing(tmp_path))
        server.status = 503  # nor can it be asked what it has
    server.status, server.answers_lost = None, 0
    before = len(server.scores)
    assert resend(server, tmp_path)[0] == 0 and kept(tmp_path) is None
    assert len(server.scores) == before and len({score["id"] for score in server.scores}) == 300, "all of them were there"


def test_requests_become_smaller_until_they_are_answered_in_time(server, traced, monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(wire, "REQUEST_SECONDS", 1)
    server.most_scores = 40
    with traced(settings_for(server)) as trace:
        send_rows(trace, 60, scores={name: 1.0 for name in ("a", "b", "c", "d", "e", "f", "g")})
    assert capfd.readouterr().err == "" and kept(tmp_path) is None
    sizes = [len(scores) for post in server.bodies if (scores := scores_of([post]))]
    assert len({score["id"] for score in server.scores}) == 420 and max(sizes) <= 128 and all(size % 7 == 0 for size in sizes), "whole rows"


def test_seconds_of_resend_traces_are_for_each_answer_too(server, traced, impatient, resend, tmp_path, monkeypatch):
    monkeypatch.setattr(wire, "REQUEST_SECONDS", 0.2)
    monkeypatch.setattr(wire, "CHECK_SECONDS", PATIENCE)
    with traced(settings_for(server)) as trace:
        server.status = 503
        send_rows(trace, 3)
    server.status, server.delay = None, 1.0
    assert resend(server, tmp_path, "--seconds", 5)[0] == 1 and kept(tmp_path), "0.5 s for an answer that takes 1 s"
    assert resend(server, tmp_path, "--seconds", 10 * PATIENCE)[0] == 0 and kept(tmp_path) is None


def test_the_parts_of_an_experiments_row_are_of_the_experiment_and_all_of_the_trace_is_in_its_environment(server, tmp_path):
    experiment = Experiment("tiny-1", "e1", "slm_swap/structured/test", "d1", "url")
    row = parse_example({"id": "r", "prompt": "Say 1", "completion": '{"a": 1}'}, "rows.jsonl:1")
    reply = Reply('{"a": 1}', "stop", 10, 2, 4, 2.0, retries=[[0.0, 0.5, 429]])
    client = SimpleNamespace(kind="azure", describe=lambda: {"deployment": "gpt"}, cost_parts=lambda *counts: {"total": 1.0})
    with trace_run(connect(settings_for(server)), "run", tmp_path / "report.json", environment=ENVIRONMENT) as trace:
        batch = trace.span("batch", 10**18, 10**18 + 5, {"batch": "0"})
        trace_rows(trace, "structured", client, [score_row(TRACKS["structured"], row, reply)], batch, experiment)
    spans = by_name(server)
    assert {span.attributes["langfuse.environment"] for span in server.spans} == {"sdk-experiment"} == {score["environment"] for score in server.scores}
    assert spans["r"].attributes.items() >= experiment.root_attributes(row, spans["r"].id).items()
    assert spans["retry"].attributes.items() >= experiment.attributes(row, spans["r"].id).items()
    assert "langfuse.experiment.item.expected_output" not in spans["retry"].attributes
    assert not [key for name in ("run", "batch") for key in spans[name].attributes if "experiment." in key]


def test_a_line_of_which_the_disk_took_a_part_spoils_no_other(tmp_path, monkeypatch):
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_APPEND | os.O_CREAT)
    file, write = outbox.TraceFile(descriptor), os.write
    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr(outbox.os, "write", lambda descriptor, data: write(descriptor, data[:50]))
        file.append([{"span": {"id": "1"}}, {"span": {"id": "torn"}}])
    file.append([{"span": {"id": "2"}}, {"span": {"id": "3"}}])
    file.append([{"span": {"id": "4"}}])
    assert [parse(line)["span"]["id"] for _, line in file.lines()] == ["1", "2", "3", "4"]
    os.close(descriptor)


def test_two_runs_do_not_share_a_file(server, traced, monkeypatch):
    monkeypatch.setattr(outbox, "LOCK_SECONDS", 0.2)
    with (
        traced(settings_for(server), seed="one"),
        pytest.raises(UserError, match="in use by another run"),
        traced(settings_for(server), seed="one"),
    ):
        pytest.fail("the run began")


@pytest.mark.parametrize("trouble", ["refusing", 503, "wrong keys"])
def test_optional_tracing_goes_on_and_keeps_the_trace(server, traced, impatient, resend, tmp_path, capsys, trouble):
    changes = {"langfuse_secret_key": "sk-lf-wrong"} if trouble == "wrong keys" else {}
    if trouble != "wrong keys":
        outage(server, trouble)
    with traced(settings_for(server, **changes), optional=True) as trace:
        send_rows(trace, 3)
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("warning: Langfuse at") and "4 spans and 3 scores" in last and trace.url is None
    server.status = None
    if trouble == "refusing":
        server.accept()
    assert resend(server, tmp_path)[0] == 0 and len(server.spans) == 4 and len(server.scores) == 3


def test_without_content_no_text_of_a_row_leaves(server, traced):
    with traced(settings_for(server), content=False) as trace:
        send_rows(trace, 2)
    row = by_name(server)["row-0"]
    assert row.json("output") == {"sha256": hashlib.sha256(REPLY.text.encode()).hexdigest(), "characters": len(REPLY.text)}
    assert set(row.json("input")) == {"sha256", "characters"} and row.json("usage_details")["output"] == 20
    assert len(server.scores) == 2
    for _, body in server.bodies:
        assert "東京".encode() not in body and b"Call a tool" not in body and b"<tool_call" not in body


def test_batches_and_retries_are_spans_with_the_rows_under_them(server, traced):
    with traced(settings_for(server)) as trace:
        batch = trace.span("batch", 10**18, 10**18 + 5, {"batch": "1"})
        trace.generation("row", "m", MESSAGES, REPLY, parent=batch)
        trace.span("retry", 10**18 + 1, 10**18 + 2, {"status": 429}, parent=trace.row_id("row"), level="WARNING")
    spans = by_name(server)
    assert spans["row"].parent == spans["batch"].id and spans["retry"].parent == spans["row"].id
    assert (spans["batch"].kind, spans["batch"].start, spans["batch"].end) == ("span", 10**18, 10**18 + 5)
    assert spans["retry"].attributes["langfuse.observation.level"] == "WARNING" and spans["retry"].json("metadata.status") == 429


def test_a_native_row_is_told_with_its_tools_and_calls_and_known_as_our_own():
    """Without them the trace would show an empty reply, and a pull would take it for production's."""
    tools = [{"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": []}}]
    row = {"messages": [{"role": "user", "content": "do it"}], "tools": tools, "calls": []}
    native = parse_example(row, "x")
    reply = Reply("", calls=[{"name": "f", "arguments": '{"a": 1}'}])
    told = {"id": "g", "traceId": "t", "type": "GENERATION", "startTime": "2026-01-01T00:00:00Z", "metadata": {OWN_RUN: True}}
    told |= {"input": _as_told(request_of("toolcall", native)), "output": _answer(reply)}
    taken = convert(json.loads(json.dumps(told)), ("toolcall",), None)
    assert taken.own and taken.row["tools"] == tools and taken.row["calls"] == [{"name": "f", "arguments": {"a": 1}}]
    text = _as_told(request_of("toolcall", replace(native, ask="text")))
    with pytest.raises(Unusable, match="other_form"):
        convert(told | {"input": text, "output": '<tool_call name="f">{"a": 1}</tool_call>'}, ("toolcall",), None)
    assert _answer(Reply("Hello", calls=[])) == "Hello"
