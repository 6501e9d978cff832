"""What a server's answer to a post counts as, and addresses, keys and proxies with which there is none; over a real socket."""

import json
import uuid

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTracePartialSuccess, ExportTraceServiceResponse

from slm_swap.common.errors import UserError
from slm_swap.tracing.api import LangfuseApi
from slm_swap.tracing.runs import connect, outbox_path
from slm_swap.tracing.wire import NoLangfuse, Server
from tests.support.processes import wait_until
from tests.support.traces import REPLY, found_failing, kept, send_rows, settings_for

SPAN = {"id": "01" * 8, "parent": "", "name": "n", "start": 1, "end": 2, "facts": {}, "trace": "02" * 16, "shared": {}}
SCORE = {"id": "s", "traceId": "02" * 16, "name": "n", "value": 1.0, "dataType": "NUMERIC", "timestamp": "2026-01-01T00:00:00+00:00"}
HTML = (200, "text/html; charset=utf-8", b"<html>We are back soon</html>")
PARTIAL = ExportTraceServiceResponse(partial_success=ExportTracePartialSuccess(rejected_spans=2, error_message="over\x1b the\nquota"))
WARNING = ExportTraceServiceResponse(partial_success=ExportTracePartialSuccess(error_message="sampled soon"))


@pytest.fixture
def client(server):
    return Server(settings_for(server))


TAKEN = [
    (200, "application/json", b"{}"),
    (200, "application/json; charset=utf-8", b'{"message": "OK"}'),
    (201, "application/json", b'{"id": "s"}'),
    (207, "application/json", b'{"successes": [{"id": "s", "status": 201}], "errors": []}'),
    (200, "application/problem+json", b"[null]"),
    (200, "application/json", b""),
    (200, "application/x-protobuf", b""),
    (200, "application/x-protobuf", WARNING.SerializeToString()),
    (204, None, b""),
]
NOT_TAKEN = [
    HTML,
    (200, "text/html", b""),
    (200, None, b"<html>"),
    (200, "application/json", b"<html>"),
    (200, "application/json", b'"\xff"'),
    (200, "application/json", b"[" * 100_000),
    (200, "application/x-protobuf", b"<html>"),
    (200, "text/plain", b"ok"),
    (302, "text/html", b""),
]


@pytest.mark.parametrize("raw", TAKEN)
def test_what_servers_of_any_age_answer_counts_as_taken(server, client, raw):
    server.raw = raw
    for answer in (client.send_spans([SPAN] * 3), client.send_scores([SCORE] * 3)):
        assert (answer.taken, answer.rejected, answer.turned_down) == (True, 0, 0)


@pytest.mark.parametrize("raw", NOT_TAKEN, ids=range(len(NOT_TAKEN)))
def test_what_no_langfuse_answers_counts_as_nothing(server, client, raw):
    server.raw = raw
    for answer in (client.send_spans([SPAN]), client.send_scores([SCORE])):
        assert not answer.taken and not answer.refused and answer.reason and answer.reason.isprintable()
        assert raw[0] != 200 or f"it answers like no Langfuse: HTTP 200, {raw[1].partition(';')[0] if raw[1] else 'no content type'}" == answer.reason


@pytest.mark.parametrize(
    "raw",
    [
        (200, "application/x-protobuf", PARTIAL.SerializeToString()),
        (200, "application/json", b'{"partialSuccess": {"rejectedSpans": "2", "errorMessage": "over the quota"}}'),
        (200, "application/json", b'{"partial_success": {"rejected_spans": 2, "error_message": "over the quota"}}'),
        (207, "application/json", b'{"successes": [], "errors": [{"status": 400, "message": "over the quota"}, "odd"]}'),
    ],
)
def test_spans_that_are_not_taken_are_counted_and_why(server, client, raw):
    server.raw = raw
    answer = client.send_spans([SPAN] * 3)
    assert (answer.taken, answer.rejected, answer.reason) == (True, 2, "rejected: over the quota")
    assert client.send_spans([SPAN]).rejected == 1, "no more than there were"


def test_scores_that_a_server_could_not_store_are_tried_again_and_invalid_ones_counted(server, client):
    def errors(*statuses):
        return (207, "application/json", json.dumps({"successes": [], "errors": [{"id": "s", "status": status} for status in statuses]}).encode())

    server.raw = errors(400, 500)
    answer = client.send_scores([SCORE] * 2)
    assert (answer.taken, answer.refused, answer.reason) == (False, False, "HTTP 500 for some scores")
    server.raw = errors(400)
    assert client.send_scores([SCORE] * 2).turned_down == 1
    server.raw = (207, "application/json", b'{"accepted": 1, "rejected": 1, "errors": []}')
    assert client.send_scores([SCORE] * 2).turned_down == 1
    server.raw = (200, "application/json", b'{"rejected": "odd", "errors": {}}')
    assert client.send_scores([SCORE]).turned_down == 0


def test_the_key_is_not_shown_by_a_server_that_echoes_it(server, client):
    server.raw = (200, "application/json", b'{"partialSuccess": {"rejectedSpans": 1, "errorMessage": "no sk-lf-right here"}}')
    assert client.send_spans([SPAN]).reason == "rejected: no *** here"


def test_a_page_with_200_delivers_nothing_and_loses_nothing(server, traced, impatient, resend, tmp_path, capsys):
    with traced(settings_for(server)) as trace:
        server.raw = HTML
        send_rows(trace, 20)
        wait_until(lambda: found_failing(tmp_path))
    assert "21 spans and 20 scores have not reached Langfuse" in (said := capsys.readouterr().err)
    assert "it answers like no Langfuse: HTTP 200, text/html" in said and said.count("\n") == 1
    code, printed, error = resend(server, tmp_path, "--seconds", 2)
    assert (code, printed) == (1, "") and "21 spans and 20 scores" in error and server.spans == []
    server.raw = None
    assert resend(server, tmp_path)[0] == 0 and kept(tmp_path) is None
    assert len({span.id for span in server.spans}) == len(server.spans) == 21 and len(server.scores) == 20


def test_spans_of_a_partial_success_are_told_kept_and_sent_again_with_their_batch(server, traced, resend, tmp_path, capsys):
    server.rejected_spans = 7
    with traced(settings_for(server)) as trace:
        send_rows(trace, 300)
    said, lost = capsys.readouterr().err, 301 - len(server.spans)
    assert lost >= 7
    assert f"warning: {lost} spans have not reached Langfuse" in said and "(rejected: over the quota)" in said and kept(tmp_path)
    assert len({span.id for span in server.spans}) == len(server.spans), "not sent again in the same run: OTLP forbids it"
    code, printed, error = resend(server, tmp_path)
    assert (code, printed) == (1, "") and f"{lost} spans and 0 scores" in error
    server.rejected_spans = 0
    assert resend(server, tmp_path)[:2] == (0, f"sent: {outbox_path(tmp_path / 'report.json')}\n")
    assert {span.row for span in server.spans} == {"run", *(f"row-{number}" for number in range(300))} and kept(tmp_path) is None


def test_what_was_refused_alone_goes_when_the_server_takes_it(server, traced, resend, tmp_path):
    server.largest = 3_000
    with traced(settings_for(server)) as trace:
        trace.generation("giant", "phi-4-mini", [{"role": "user", "content": "".join(uuid.uuid4().hex for _ in range(300))}], REPLY)
    assert "giant" in kept(tmp_path)[0] and [span.row for span in server.spans] == ["run"]
    server.largest = None
    assert resend(server, tmp_path)[0] == 0 and kept(tmp_path) is None
    assert sorted(span.row for span in server.spans) == ["giant", "run"]


# --- addresses, keys, proxies

PASSWORD = "hunter2-not-to-be-shown"
PROXIES = {
    "HTTPS_PROXY": f"foo://user:{PASSWORD}@proxy",
    "HTTP_PROXY": f"http://user:{PASSWORD}@x\x01y:80",
    "ALL_PROXY": f"socks5://user:{PASSWORD}@proxy:1080",
    "https_proxy": f"socks5h://user:{PASSWORD}@proxy:1080",
    "NO_PROXY": "[::1",
}


@pytest.fixture
def no_proxies(monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.mark.parametrize("name", PROXIES)
def test_a_proxy_that_is_none_is_named_without_its_password(server, name, no_proxies, monkeypatch, traced, capsys, tmp_path, resend):
    monkeypatch.setenv(name, PROXIES[name])
    for use in (connect, LangfuseApi):
        with pytest.raises(NoLangfuse) as caught:
            use(settings_for(server))
        message = str(caught.value)
        assert name.upper() in message and PASSWORD not in message and "\n" not in message and "user" not in message
    with traced(settings_for(server), optional=True) as trace:
        send_rows(trace, 2)
    first, last = capsys.readouterr().err.splitlines()
    assert name.upper() in first and "3 spans and 2 scores have not reached" in last and PASSWORD not in first + last
    monkeypatch.delenv(name)
    assert resend(server, tmp_path)[0] == 0 and len(server.spans) == 3


def test_certificates_that_cannot_be_read_are_said(server, no_proxies, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere.pem")
    with pytest.raises(NoLangfuse, match="SSL_CERT_FILE"):
        connect(settings_for(server))


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:99999", f"http://{'a' * 70}.b:1"])
def test_a_proxy_that_is_not_there_is_one_line(server, no_proxies, monkeypatch, proxy):
    monkeypatch.setenv("HTTP_PROXY", proxy)
    with pytest.raises(NoLangfuse, match="is not there"):
        connect(settings_for(server, langfuse_base_url="http://langfuse.invalid"))


TOKEN = "Zx81qPfJ0aLw93kdTq"


@pytest.mark.parametrize(
    "behind",
    [f"?token={TOKEN}", f"/?{TOKEN}", f"/#{TOKEN}", f"/{TOKEN}", f"/base/{TOKEN}/", f"/token={TOKEN}", "/sk-lf-right", f"/pk-{TOKEN}", "/%73k-lf-right"],
)
def test_a_token_in_the_base_url_is_refused_unseen(server, behind):
    settings = settings_for(server, langfuse_base_url=server.url + behind)
    for use in (connect, LangfuseApi):
        with pytest.raises(UserError) as caught:
            use(settings)
        message = str(caught.value)
        assert TOKEN not in message and "sk-lf" not in message and "LANGFUSE_BASE_URL" in message and "\n" not in message


@pytest.mark.parametrize("path", ["", "/", "/langfuse", "/tools/langfuse-production/", "/team-7/observability"])
def test_a_path_that_a_proxy_serves_langfuse_under_is_an_address(server, path):
    address = Server(settings_for(server, langfuse_base_url=server.url + path)).base_url
    assert address == server.url + path.rstrip("/")


@pytest.mark.parametrize("change", [{"langfuse_secret_key": "sk-lf-é"}, {"langfuse_public_key": "pk-lf-\x07"}, {"langfuse_base_url": "http://a\x7fb"}])
def test_characters_that_cannot_be_there_are_said(server, change):
    with pytest.raises(UserError, match="has characters inside") as caught:
        connect(settings_for(server, **change))
    assert next(iter(change)).upper() in str(caught.value) and str(caught.value).isprintable() and "-lf-" not in str(caught.value)


@pytest.mark.parametrize("host", ["a..b", "a" * 70 + ".b"])
def test_a_host_that_no_name_can_be_is_no_address(server, host):
    with pytest.raises(UserError, match="LANGFUSE_BASE_URL is not an address"):
        connect(settings_for(server, langfuse_base_url=f"http://{host}"))
