"""Streams of the hosted model that do not end well, in front of a hosted model that does as a test says, over real sockets."""

import gzip
import json
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx2
import pytest

from slm_swap.common.settings import ROOT, shown_path
from tests.support.endpoints import CHECK_STOCK, HOSTED_NAME, cascade, known_to, serving
from tests.support.processes import Script, children_of, run_python, wait_until

ASKED = {"model": HOSTED_NAME, "messages": [{"role": "user", "content": "call Porto"}], "tools": [CHECK_STOCK], "stream": True}
FIRST = b'data: {"choices": [{"index": 0, "delta": {"role": "assistant", "content": "a"}, "finish_reason": null}]}\n\n'
LAST = b'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'


class Streams(ThreadingHTTPServer):
    """A hosted model whose `answer` writes a stream's chunks; `left` is set where the endpoint closes its connection."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.answer: Callable[[Handler], None]
        self.left, self.go_on = threading.Event(), threading.Event()
        self.raw, self.headers, self.more = b"", {}, {}  # of the last request; of the answer's head, besides


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.server.raw = self.rfile.read(int(self.headers["content-length"]))
        self.server.headers = {name.lower(): value for name, value in self.headers.items()}
        self.send_response(200)
        for name, value in ({"content-type": "text/event-stream", "transfer-encoding": "chunked"} | self.server.more).items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        self.server.answer(self)

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def silent(self) -> None:
        """Say nothing more until the endpoint closes the connection."""
        assert self.connection.recv(1) == b""
        self.close_connection = True
        self.server.left.set()

    def in_two_parts(self) -> None:
        """A whole reply, whose last part is sent when the test says so."""
        self.chunk(FIRST)
        self.server.go_on.wait()
        self.chunk(LAST)
        self.chunk(b"")

    def break_off(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_):
        pass


@pytest.fixture
def streams():
    with Streams() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def hosted_mode(streams, tmp_path):
    with serving(tmp_path, "--mode", "hosted", hosted=streams) as running:
        yield running


def stream(running):
    return httpx2.stream("POST", f"{running.url}/v1/chat/completions", json=ASKED, timeout=60)


def metrics(running) -> str:
    return httpx2.get(f"{running.url}/metrics").text


def test_a_stream_whose_client_goes_is_closed_and_keeps_no_worker(streams, tmp_path):
    def answer(handler):
        handler.chunk(FIRST)
        handler.silent()

    streams.answer = answer
    with serving(tmp_path, "--mode", "hosted", hosted=streams) as running:
        with stream(running) as reply:
            parts = reply.iter_raw()
            assert next(parts) == FIRST
            assert "slm_swap_under_way 1.0" in metrics(running)
        wait_until(streams.left.is_set)
        wait_until(lambda: "slm_swap_under_way 0.0" in metrics(running))
        told = metrics(running)
        assert "slm_swap_requests_total{" not in told and "slm_swap_failures_total{" not in told
        running.script.send_signal(15)
        assert running.script.wait() == 0
        assert "Traceback" not in running.log.read_text()
    assert running.lines("minutes.jsonl") == []


def test_a_client_that_goes_with_the_streams_last_word_has_been_answered(streams, tmp_path):
    def answer(handler):
        handler.chunk(FIRST)
        handler.chunk(LAST)
        handler.silent()

    streams.answer = answer
    with serving(tmp_path, "--mode", "hosted", hosted=streams) as running:
        with stream(running) as reply:
            said = b""
            for part in reply.iter_raw():
                said += part
                if said == FIRST + LAST:
                    break
        assert said == FIRST + LAST
        wait_until(streams.left.is_set)
        wait_until(lambda: 'slm_swap_requests_total{answered_by="hosted",reason="mode"} 1.0' in metrics(running))


def test_a_stream_is_under_way_until_it_ends(streams, tmp_path):
    streams.answer = Handler.in_two_parts
    with serving(tmp_path, "--mode", "hosted", hosted=streams) as running:
        with stream(running) as reply:
            parts = reply.iter_raw()
            assert next(parts) == FIRST
            assert "slm_swap_under_way 1.0" in metrics(running)
            streams.go_on.set()
            assert b"".join(parts) == LAST
        wait_until(lambda: "slm_swap_under_way 0.0" in metrics(running))
        assert 'slm_swap_requests_total{answered_by="hosted",reason="mode"} 1.0' in metrics(running)


def test_a_stream_that_breaks_off_is_a_failure_that_the_client_sees(streams, tmp_path):
    def answer(handler):
        handler.chunk(FIRST)
        handler.break_off()

    streams.answer = answer
    with serving(tmp_path, "--mode", "shadow", "--cascade", cascade(tmp_path / "c.json"), hosted=streams) as running:
        with stream(running) as reply, pytest.raises(httpx2.RemoteProtocolError):
            reply.read()
        wait_until(lambda: 'slm_swap_failures_total{reason="mode"} 1.0' in metrics(running))
        wait_until(lambda: "slm_swap_under_way 0.0" in metrics(running))
        said = running.log.read_text()
        assert [line for line in said.splitlines() if "broke off" in line] == ["the hosted model's stream broke off (ReadError)"]
        assert "Traceback" not in said and "ASGI" not in said
    [minute] = running.lines("minutes.jsonl")
    assert (minute["requests"], minute["failures"]) == ({}, 1)
    assert minute["tools"] == {"check_stock": 1}  # the small model's reply was judged
    assert running.lines("audits.jsonl") == []


ANSWERED, FAILED = 'slm_swap_requests_total{answered_by="hosted",reason="mode"} 1.0', 'slm_swap_failures_total{reason="mode"} 1.0'
ENDED = LAST.removesuffix(b"data: [DONE]\n\n")
USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}}\n\n'


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize(("told", "counted"), [(FIRST + ENDED, ANSWERED), (FIRST + ENDED + USAGE, ANSWERED), (FIRST, FAILED), (b'data: {"error": {"message": "x"}}\n\n', FAILED)])
def test_a_reply_has_ended_where_it_says_so_and_not_where_its_connection_does(streams, hosted_mode, told, counted, chunked):
    """With [DONE] or without. A body that its connection's end ends may have been cut."""

    def answer(handler):
        if chunked:
            handler.chunk(told)
            handler.chunk(b"")
        else:
            handler.wfile.write(told)
            handler.close_connection = True

    streams.answer, streams.more = answer, {} if chunked else {"transfer-encoding": None, "connection": "close"}
    with stream(hosted_mode) as reply:
        assert reply.read() == told
    wait_until(lambda: "slm_swap_under_way 0.0" in metrics(hosted_mode))
    found = metrics(hosted_mode)
    assert [name in found for name in (ANSWERED, FAILED)] == [counted == ANSWERED, counted == FAILED]
    assert ('kind="input"} 7.0' in found) is (USAGE in told) and "slm_swap_clients_gone_total 0.0" in found
    assert ("broke off (it ended before its reply did)" in hosted_mode.log.read_text()) is (counted == FAILED)


ERROR = b'data: {"error": {"message": "a worker was lost", "type": "server_error"}}\n\n'


def test_an_error_within_a_stream_is_a_failure_though_done_follows(streams, hosted_mode):
    def answer(handler):
        handler.chunk(FIRST + ERROR + b"data: [DONE]\n\n")
        handler.chunk(b"")

    streams.answer = answer
    with stream(hosted_mode) as reply:
        assert reply.read() == FIRST + ERROR + b"data: [DONE]\n\n"
    wait_until(lambda: FAILED in metrics(hosted_mode))
    assert "slm_swap_requests_total{" not in metrics(hosted_mode)


def test_a_client_that_goes_because_of_an_error_has_not_just_gone(streams, hosted_mode):
    """The official client raises as soon as it reads one."""

    def answer(handler):
        handler.chunk(FIRST + ERROR)
        handler.silent()

    streams.answer = answer
    with stream(hosted_mode) as reply:
        assert next(reply.iter_raw()) == FIRST + ERROR
    wait_until(streams.left.is_set)
    wait_until(lambda: FAILED in metrics(hosted_mode))
    assert "slm_swap_clients_gone_total 0.0" in metrics(hosted_mode)


@pytest.mark.parametrize(("end", "counted"), [(ENDED, ANSWERED), (LAST, ANSWERED), (b"", FAILED)])
def test_of_a_long_stream_the_end_is_looked_for_too(streams, hosted_mode, end, counted):
    part = FIRST.replace(b'"a"', b'"%b"' % (b"a" * 2**16))

    def answer(handler):
        for _ in range(70):
            handler.chunk(part)
        handler.chunk(end + b"\n")
        handler.chunk(b"")

    streams.answer = answer
    with stream(hosted_mode) as reply:
        assert reply.read() == part * 70 + end + b"\n"
    wait_until(lambda: counted in metrics(hosted_mode))


RESPONSE = b'event: response.completed\ndata: {"type": "response.completed", "response": {"id": "r"}}\n\n'


@pytest.mark.parametrize(("path", "told"), [("/v1/chat/completions", FIRST + ENDED), ("/v1/responses", RESPONSE)])
def test_a_client_that_goes_with_the_replys_end_has_been_answered(streams, hosted_mode, path, told):
    def answer(handler):
        handler.chunk(told)
        handler.silent()

    streams.answer = answer
    with httpx2.stream("POST", hosted_mode.url + path, json=ASKED, timeout=60) as reply:
        said, parts = b"", reply.iter_raw()
        while said != told:
            said += next(parts)
    wait_until(streams.left.is_set)
    wait_until(lambda: 'slm_swap_requests_total{answered_by="hosted"' in metrics(hosted_mode))
    assert "slm_swap_clients_gone_total 0.0" in metrics(hosted_mode)


@pytest.mark.parametrize("told", [RESPONSE, b'event: other\ndata: {}\n\n'])
def test_of_other_streams_the_end_is_their_connections(streams, hosted_mode, told):
    def answer(handler):
        handler.chunk(told)
        handler.chunk(b"")

    streams.answer = answer
    assert httpx2.post(f"{hosted_mode.url}/v1/responses", json=ASKED, timeout=60).content == told
    wait_until(lambda: 'slm_swap_requests_total{answered_by="hosted",reason="unsupported"} 1.0' in metrics(hosted_mode))
    assert "slm_swap_failures_total{" not in metrics(hosted_mode)


def test_a_compressed_request_goes_to_the_hosted_model_with_its_header(streams, tmp_path):
    def answer(handler):
        handler.chunk(FIRST + LAST)
        handler.chunk(b"")

    streams.answer = answer
    flags = ("--mode", "cascade", "--cascade", cascade(tmp_path / "c.json"))
    with serving(tmp_path, *flags, hosted=streams) as running:
        # The last is plain JSON that calls itself compressed: what it says is not for the small model to guess.
        for raw in (gzip.compress(json.dumps(ASKED).encode()), json.dumps(ASKED).encode()):
            head = {"content-type": "application/json", "content-encoding": "gzip"}
            reply = httpx2.post(f"{running.url}/v1/chat/completions", content=raw, headers=head, timeout=60)
            assert reply.headers["x-slm-swap"] == "hosted; reason=unsupported; detail=body"
            assert (streams.raw, streams.headers["content-encoding"]) == (raw, "gzip")
        assert stream_of(running) == ("local; reason=local", None)


def stream_of(running):
    with stream(running) as reply:
        return reply.headers["x-slm-swap"], reply.headers.get("content-encoding")


@pytest.mark.parametrize(("encoding", "told"), [("gzip", None), ("GZIP", None), ("x-own", "x-own"), ("gzip, x-own", "gzip, x-own")])
@pytest.mark.parametrize("kind", ["text/event-stream", "application/json"])
def test_a_compressed_answer_is_decompressed_or_keeps_its_header(streams, hosted_mode, encoding, told, kind):
    whole = FIRST + LAST
    packed = gzip.compress(whole)

    def answer(handler):
        handler.chunk(packed[:20])
        handler.chunk(packed[20:])
        handler.chunk(b"")

    streams.answer, streams.more = answer, {"content-encoding": encoding, "content-type": kind}
    with stream(hosted_mode) as reply:
        said = b"".join(reply.iter_raw())
    assert reply.headers.get("content-encoding") == told
    assert said == (packed if told else whole)


def test_workers_whose_first_process_is_killed_answer_and_a_restart_waits_for_them(streams, tmp_path):
    """As where the system ends it for its memory, and a supervisor starts the endpoint again at once."""

    streams.answer = Handler.in_two_parts
    with serving(tmp_path, "--mode", "shadow", "--workers", 2, hosted=streams) as running, stream(running) as reply:
        parts = reply.iter_raw()
        assert next(parts) == FIRST
        children = children_of(running.script.pid)
        running.script.kill()
        wait_until(lambda: sum(map(lives, children)) == 1)  # the small model's process and the worker that has nothing to answer end
        [busy] = filter(lives, children)
        port = running.url.rpartition(":")[2]
        again, log = restarted(tmp_path, streams, port)
        wait_until(lambda: "was killed" in log.read_text())
        assert log.read_text().splitlines() == [
            f"the endpoint on {shown_path(running.state)} was killed, and what is left of it (process {busy}) answers what was under way: "
            "this one starts when that has ended, and waits for it 660 s at most"
        ]
        stopped, other = restarted(tmp_path / "other", streams, 0, running.state)
        wait_until(lambda: "was killed" in other.read_text())
        stopped.send_signal(15)
        assert stopped.wait() == 0 and again.poll() is None and lives(busy)
        streams.go_on.set()
        assert b"".join(parts) == LAST
        wait_until(lambda: f"http://127.0.0.1:{port}/v1 (shadow)" in log.read_text())
        assert not lives(busy)
        with stream(running) as later:
            assert later.read() == FIRST + LAST
        again.send_signal(15)
        assert again.wait() == 0 and "Traceback" not in log.read_text()


def test_a_state_folder_that_is_taken_is_refused_with_whose_it_is(streams, tmp_path):
    with serving(tmp_path, "--mode", "hosted", "--workers", 2, hosted=streams) as running:
        holding = ", ".join(map(str, sorted([running.script.pid, *children_of(running.script.pid)])))
        again, log = restarted(tmp_path, streams, 0)
        assert again.wait() == 2
        told = f"error: another endpoint runs on {shown_path(running.state)}: stop it, or give this one its own --state (held by process {holding})\n"
        assert log.read_text() == told


@pytest.mark.parametrize("proxy", ["nonsense://proxy:1", "http://"])
def test_a_proxy_that_is_none_ends_the_endpoint_before_it_says_that_it_is_up(tmp_path, proxy):
    words = (ROOT / "slm_swap/05_serve/serve.py", "--track", "toolcall", "--mode", "hosted", "--port", 0, "--state", tmp_path)
    hosted = {"AZURE_ENDPOINT": "https://hosted.example.com", "AZURE_DEPLOYMENT": HOSTED_NAME, "AZURE_API_KEY": "k", "AZURE_API_VERSION": "2024-10-21"}
    told = run_python(*words, LANGFUSE_DISABLED="1", SLM_BASE_URL="", PRICES_FILE="", HTTPS_PROXY=proxy, **hosted)
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr.startswith("error: HTTPS_PROXY has ") and len(told.stderr.splitlines()) == 1


def lives(process: int) -> bool:
    return Path(f"/proc/{process}/exe").exists()


def restarted(folder, streams, port, state=None):
    """An endpoint started again, whatever it says: (its process, its log)."""
    folder.mkdir(exist_ok=True)
    log = folder / "again"
    words = (ROOT / "tests/support/scripted_endpoint.py", "--track", "toolcall", "--port", port, "--state", state or folder / "state", "--mode", "shadow")
    return Script(*words, log=log, LANGFUSE_DISABLED="1", SLM_BASE_URL="", PRICES_FILE="", **known_to(streams)), log


def test_clients_that_go_before_their_answer_are_counted(streams, tmp_path):
    """Amid their request, before the answer and amid it; who has the whole answer is not, nor who gets an error."""
    started = threading.Event()

    def silent(handler):
        started.set()
        handler.silent()

    def first(handler):
        handler.chunk(FIRST)
        handler.silent()

    def whole(handler):
        handler.chunk(FIRST + LAST)
        handler.silent()

    def broken(handler):
        handler.chunk(FIRST)
        handler.break_off()

    def gone(count: int) -> bool:
        return f"slm_swap_clients_gone_total {count}.0" in metrics(running)

    body = json.dumps(ASKED).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    with serving(tmp_path, "--mode", "hosted", hosted=streams) as running:
        assert gone(0)
        address = ("127.0.0.1", int(running.url.rpartition(":")[2]))
        with socket.create_connection(address) as client:
            client.sendall(head + body[:20])
        wait_until(lambda: gone(1))
        streams.answer = silent
        with socket.create_connection(address) as client:
            client.sendall(head + body)
            started.wait()
        wait_until(lambda: gone(2))
        streams.answer = first
        with stream(running) as reply:
            assert next(reply.iter_raw()) == FIRST
        wait_until(lambda: gone(3))
        streams.answer = whole
        with stream(running) as reply:
            said, parts = b"", reply.iter_raw()
            while said != FIRST + LAST:
                said += next(parts)
        wait_until(lambda: 'slm_swap_requests_total{answered_by="hosted",reason="mode"} 1.0' in metrics(running))
        streams.answer = broken
        with stream(running) as reply, pytest.raises(httpx2.RemoteProtocolError):
            reply.read()
        wait_until(lambda: 'slm_swap_failures_total{reason="mode"} 1.0' in metrics(running))
        assert gone(3) and "slm_swap_under_way 0.0" in metrics(running)
