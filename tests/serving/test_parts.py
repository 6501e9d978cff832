"""The endpoint's parts without a process: streams put together, what waits for the small model, audits' comparison, keys."""

import asyncio
import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_swap.clients.pricing import HostedPrices
from slm_swap.clients.protocol import Reply
from slm_swap.common.errors import UserError
from slm_swap.common.settings import ROOT, Settings
from slm_swap.demo.simulator_parts import events_of
from slm_swap.rows.lines import dump_json
from slm_swap.rows.prompts import Request, Wanted
from slm_swap.serving import engine as engine_module
from slm_swap.serving import state
from slm_swap.serving.app import Door
from slm_swap.serving.audits import Audits, agree
from slm_swap.serving.chat import completion, events, tools_of
from slm_swap.serving.engine import Job, Jobs, read_line, read_request, request_json
from slm_swap.serving.options import Options, read_keys
from slm_swap.serving.streams import is_whole, joined
from slm_swap.slm_client import taken_at_once
from tests.support.processes import PATIENCE
from tests.support.scripts import load_script

CALLS = st.lists(st.fixed_dictionaries({"name": st.sampled_from(["a", "b"]), "arguments": st.dictionaries(st.text(max_size=3), st.text(max_size=30)).map(json.dumps)}), max_size=3)


@given(st.text(min_size=1, max_size=60), CALLS, st.booleans())
def test_a_stream_put_together_is_its_completion(text, calls, ours):
    whole = completion("toolcall", Reply(text, input_tokens=3, output_tokens=2, calls=calls), "x", "m")
    told = events(whole, True) if ours else b"".join(events_of(whole, True))
    found, wanted = joined(told), whole["choices"][0]
    assert found["choices"][0]["finish_reason"] == wanted["finish_reason"]
    assert found["usage"]["total_tokens"] == 5
    assert (found["choices"][0]["message"]["content"] or "") == (wanted["message"]["content"] or "")
    made = [call["function"] for call in found["choices"][0]["message"].get("tool_calls", ())]
    assert made == [call["function"] for call in wanted["message"].get("tool_calls", ())]


@pytest.mark.parametrize("data", [b"", b"data: [DONE]\n\n", b'data: {"choices": [{"index": 0, "delta": {}}]}\n\n', b'data: {"error": 1}\n\n', b"data: {\n\n"])
def test_a_stream_that_broke_off_is_no_completion(data):
    with pytest.raises(ValueError):
        joined(data)


SAYS = b'data: {"choices": [{"index": 0, "delta": {"content": "\\"finish_reason\\": \\"stop\\" [DONE]"}, "finish_reason": null}]}\n\n'
ENDS = b'data: {"choices": [{"index": %d, "delta": {}, "finish_reason": "stop"}]}\n\n'
USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 1}}\n\n'
RESPONSE = b'event: response.completed\ndata: {"type": "response.completed", "response": {}}\n\n'


@pytest.mark.parametrize(
    ("data", "choices", "whole"),
    [
        (b"", 1, False), (SAYS, 1, False), (SAYS + ENDS % 0, 1, True), (SAYS + ENDS % 0 + USAGE, 1, True), (SAYS + (ENDS % 0)[:-9], 1, False), (SAYS + USAGE, 1, False),
        (SAYS + ENDS % 1, 2, False), (SAYS + ENDS % 1 + ENDS % 1, 2, False), (SAYS + ENDS % 1 + ENDS % 0, 2, True),
        (SAYS + b"data: [DONE]", 1, True), (b"data:[DONE]\r\n\r\n", 2, True), (SAYS + b": data: [DONE]\n\n", 1, False), ((SAYS + ENDS % 0).replace(b"\n", b"\r\n"), 1, True),
        (RESPONSE, 1, True), (RESPONSE.replace(b"completed", b"created"), 1, False), (RESPONSE.replace(b"completed", b"incomplete"), 1, True),
        (b'data: {"error": {"message": "x"}}\n\n', 1, False), (SAYS + b'data: {"error": {"message": "x"}}\n\ndata: [DONE]\n\n', 1, False),
        (SAYS.replace(b"[DONE]", b'\\"error\\": 1') + ENDS % 0, 1, True), ((SAYS + ENDS % 0).replace(b'{"choices"', b'{"error": null, "choices"'), 1, True),
        (b'event: error\ndata: {"type": "error", "error": {"message": "x"}}\n\n', 1, False), (b"data: [1]\n\ndata: {\n\n", 1, False), (b'data: {"choices": [7, {"finish_reason": null}]}\n\n', 1, False),
    ],
)  # fmt: skip
def test_a_stream_is_whole_by_its_last_event(data, choices, whole):
    assert is_whole(data, choices) is whole


def test_a_line_ends_where_bytes_say_so():
    chunk = {"choices": [{"index": 0, "delta": {"content": "a\u2028b\x85c"}, "finish_reason": "stop"}]}
    [choice] = joined(f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode())["choices"]
    assert choice["message"]["content"] == "a\u2028b\x85c"


def test_a_request_crosses_the_socket_as_it_is():
    told = b'[[{"role":"user","content":"caf\xc3\xa9"}],[{"name":"t","parameters":{"maximum":0.10000000000000000000001}}],null,{"n":1e400},true,null]'
    request = Request(*read_line(told))._replace(wanted=Wanted("calls", [], None, "required", False, (", ", ": "), True))
    assert read_request(read_line(dump_json(request_json(request)).encode())) == request


@pytest.mark.parametrize(
    ("rows", "lists"),
    [([1, 2, 3], [[1, 2], [3]]), ([1, None, 2], [[1], None, [2]]), ([None], [None]), ([], []), ([1, 2, None], [[1, 2], None]), ([1, 2], [[1, 2]])],
)
def test_rows_that_came_are_taken_at_once(rows, lists):
    assert list(taken_at_once(rows, 2)) == lists


def test_what_waits_is_bounded_and_what_nobody_waits_for_is_left_out():
    jobs, told = Jobs(2), []
    made = [Job(number, Request([]), told.append) for number in range(3)]
    assert [jobs.put(job) for job in made] == [True, True, False]
    made[0].dropped = True
    assert jobs.take(0) is made[1]
    assert jobs.take(0) is None
    assert jobs.put(made[2])  # the one that nobody waits for has made room
    jobs.answer(made[1], Reply("x"))
    assert told[0]["reply"] == 1 and told[0]["text"] == "x"
    assert jobs.take(None) is made[2]


def test_a_job_is_waited_for():
    jobs, job = Jobs(1), Job(1, Request([]), print)
    threading.Timer(0.05, jobs.put, [job]).start()
    assert jobs.take(60) is job


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ([{"name": "a", "arguments": '{"x": 1.0, "y": 2}'}], [{"name": "a", "arguments": '{"y":2,"x":1}'}], True),
        ([{"name": "a", "arguments": '{"x": true}'}], [{"name": "a", "arguments": '{"x": 1}'}], False),
        ([{"name": "a", "arguments": "{}"}, {"name": "b", "arguments": "{}"}], [{"name": "b", "arguments": "{}"}, {"name": "a", "arguments": "{}"}], True),
        ([], [], True),
        ([], [{"name": "a", "arguments": "{}"}], False),
        ([{"name": "a", "arguments": "{"}], [{"name": "a", "arguments": "{"}], False),
    ],
)
def test_replies_agree_by_value(one, other, same):
    assert agree("toolcall", Reply("", calls=one), Reply("", calls=other)) is same


@pytest.mark.parametrize(
    ("track", "hosted", "unreadable"),
    [
        ("structured", Reply("I am sorry, I cannot."), ["hosted"]),
        ("structured", Reply('```json\n{"a": 1}\n```'), ["hosted"]),
        ("structured", Reply('{"text": "I am sorry, I cannot."}'), []),
        ("toolcall", Reply("I look it up.", calls=[{"name": "a", "arguments": "{"}]), ["hosted"]),
        ("toolcall", Reply("", calls=[]), ["hosted"]),
        ("toolcall", Reply("No call is due.", calls=[]), []),
        ("toolcall", Reply("", calls=[{"name": "a", "arguments": "{}"}]), []),
    ],
)
def test_an_audit_says_which_reply_cannot_be_read(tmp_path, track, hosted, unreadable):
    audits = Audits(Options(Settings(), "cascade", track, tmp_path), None, SimpleNamespace(audited=lambda *_: None), HostedPrices())
    local = Reply('{"b": 2}') if track == "structured" else Reply("", calls=[{"name": "b", "arguments": "{}"}])
    audits.compared("x", "value", (), {}, local, hosted, 0.1, paid=False)
    [line] = state.Tail(tmp_path / state.AUDITS).new()
    assert line["agree"] is False and line["unreadable"] == unreadable


def test_an_audit_names_each_tool_of_its_reply(tmp_path):
    calls = [{"name": name, "arguments": "{}"} for name in ("b", "a, c", "b")]
    assert tools_of("toolcall", Reply("", calls=calls)) == ("b", "a, c") and tools_of("toolcall", Reply("No.", calls=[])) == tools_of("structured", Reply("{}")) == ()
    audits = Audits(Options(Settings(), "cascade", "toolcall", tmp_path), None, SimpleNamespace(audited=lambda *_: None), HostedPrices())
    audits.compared("x", "call", ("b", "a, c"), {}, Reply("", calls=calls), Reply("", calls=calls), 0.1, paid=False)
    [line] = state.Tail(tmp_path / state.AUDITS).new()
    assert (line["tool"], line["tools"], line["agree"]) == ("b, a, c", ["b", "a, c"], True)


def test_a_line_of_the_state_is_read_once_and_a_torn_one_when_it_is_whole(tmp_path):
    lines = state.Tail(tmp_path / state.AUDITS)
    assert list(lines.new()) == []
    state.append(tmp_path, state.AUDITS, {"a": 1})
    whole = (tmp_path / state.AUDITS).read_bytes()
    (tmp_path / state.AUDITS).write_bytes(whole + whole[:10])
    assert [line["a"] for line in lines.new()] == [1]
    assert list(lines.new()) == []
    (tmp_path / state.AUDITS).write_bytes(whole + whole + whole.replace(b"1", b"2"))
    assert [line["a"] for line in lines.new()] == [1] and lines.damaged == 1


def test_what_audits_cost_today_is_kept_to_by_all_workers_whatever_happens_to_their_file(tmp_path):
    options = Options(Settings(), "cascade", "toolcall", tmp_path, audit_share=1.0, audit_budget=1.0)
    audits = Audits(options, None, None, None)

    def spend(cost: float | None) -> None:
        state.append(tmp_path, state.AUDITS, {"time": time.time(), "cost": {"hosted": cost}})

    assert audits.due()
    spend(0.6)
    spend(None)
    assert audits.due()
    (tmp_path / state.AUDITS).unlink()
    assert audits.due()  # 0.4 are left
    spend(0.5)
    assert not audits.due()
    other = Audits(options, None, None, None)  # a worker that has started since
    assert other.due()
    (tmp_path / state.AUDITS).unlink()
    (tmp_path / state.AUDITS).mkdir()
    assert not Audits(options, None, None, None).due(), "what was spent cannot be read"


def test_an_audit_that_cannot_be_written_is_paid_for_all_the_same(tmp_path, monkeypatch):
    options = Options(Settings(), "cascade", "toolcall", tmp_path, audit_share=1.0, audit_budget=1.0)
    audits = Audits(options, None, SimpleNamespace(audited=lambda *_: None), SimpleNamespace(cost=lambda *_: 0.6))
    reply = Reply("", "stop", 20, 10, 0, calls=[])
    monkeypatch.setattr(state, "append", full)
    assert audits.due()
    for due in (True, False):
        with pytest.raises(OSError, match="no room"):
            audits.compared("r", "call", (), {}, reply, reply, 0.1, paid=True)
        assert audits.due() is due


def full(*_: object) -> None:
    raise OSError("no room")


@pytest.mark.parametrize(("keys", "said"), [("short", "fewer than 16"), ("a pass phrase of words", "has spaces"), ("schl\u00fcssel-0123456789", "beyond ASCII"), ("the-hosted-key-itself", "keys that this endpoint uses itself")])
def test_keys_that_are_none_are_refused(keys, said):
    with pytest.raises(UserError, match=said):
        read_keys(Settings(swap_keys=keys, azure_api_key="the-hosted-key-itself"), None)


def test_a_clients_key_is_known(tmp_path):
    (tmp_path / "keys").write_text("# a comment\n0123456789abcdefg\n\n")
    keys = read_keys(Settings(swap_keys="fedcba9876543210, 0123456789abcdef"), tmp_path / "keys")
    options = Options(Settings(), "hosted", "toolcall", tmp_path, keys=keys)
    assert [options.knows(key) for key in ("0123456789abcdef", "0123456789abcdefg", "fedcba9876543210")] == [True] * 3
    assert not any(options.knows(key) for key in (None, "", "0123456789abcde", "# a comment"))


def test_an_answer_of_several_packets_goes_out_at_once():
    listener = load_script("05_serve/serve.py").listen("127.0.0.1", 0)

    async def delayed() -> int:
        asked: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        class Server(asyncio.Protocol):
            def connection_made(self, transport):
                asked.set_result(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
                transport.close()

        server = await asyncio.get_running_loop().create_server(Server, sock=listener)
        async with server:
            socket.create_connection(listener.getsockname()).close()
            return await asked

    assert asyncio.run(delayed()), "without TCP_NODELAY each answer waits 40 ms for an acknowledgement"


@pytest.mark.parametrize("closing", [False, True])
def test_a_worker_that_is_to_end_keeps_no_connection(closing):
    service = SimpleNamespace(options=Options(Settings(), "hosted", "toolcall", Path()), health=dict)
    sent: list[dict] = []

    async def send(message: dict) -> None:
        sent.append(message)

    asyncio.run(Door(service, lambda: closing)({"path": "/healthz", "headers": [], "method": "GET"}, None, send))
    assert sent[0]["status"] == 200 and ((b"connection", b"close") in sent[0]["headers"]) is closing


HUNG = """
import sys, time
from types import SimpleNamespace
from slm_swap.rows.prompts import Request
from slm_swap.common import processes
from slm_swap.serving import engine

class Client:
    engine = SimpleNamespace(name="transformers", batch_size=1)
    def generate(self, batch):
        if batch[0].messages[0]["content"] == "hang":
            time.sleep(60)
        return [engine.Reply("x", "stop")]

processes.HUNG_SECONDS = 2
jobs = engine.Jobs(9)
ask = lambda number, text: jobs.put(engine.Job(number, Request([{"role": "user", "content": text}]), lambda told: print(told["reply"], flush=True)))
import threading
threading.Thread(target=lambda: (ask(1, "a"), time.sleep(3), ask(2, "b"), ask(3, "hang")), daemon=True).start()
engine._in_batches(Client(), jobs, 1)
"""


def test_a_model_that_hangs_ends_its_process_and_one_that_waits_does_not():
    ended = subprocess.run([sys.executable, "-c", HUNG], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert (ended.returncode, ended.stdout) == (1, "1\n2\n") and "generate" in ended.stderr


def test_while_nothing_is_asked_vllm_is_looked_at_now_and_then(monkeypatch):
    """Its process may have ended: else only the next request would find that out, and fail."""
    looked = []
    monkeypatch.setattr(engine_module, "IDLE_SECONDS", 0.01)
    engine_module._feed(SimpleNamespace(stream=lambda rows: looked.extend(next(rows) for _ in range(3)) or ()), Jobs(1))
    assert looked == [None] * 3


SOON_ENDED = """
import os, signal, sys, time
from slm_swap.serving import processes

signal.signal(signal.SIGTERM, lambda *_: None)  # as the first process has it, which writes down that it is to end

def work(ready, parent):
    time.sleep(0.2)  # a machine that is slow just then
    processes._begin(parent, signal.SIGKILL, signal.SIG_DFL)
    time.sleep(600)

worker = processes.Kept("worker 0", work, os.getpid())
worker.start()
worker.process.terminate()
worker.process.join()
print(worker.process.exitcode, signal.pthread_sigmask(signal.SIG_BLOCK, ()))
"""


def test_a_worker_that_has_just_been_started_ends_when_it_is_told_to():
    done = subprocess.run([sys.executable, "-c", SOON_ENDED], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout == "-15 set()\n", done.stderr
