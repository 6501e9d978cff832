"""A recording stand-in for Langfuse on a real socket: it speaks the SDKs' wire format and answers with the real server's errors."""

import base64
import gzip
import json
import socket
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from urllib.parse import parse_qs, urlsplit

from slm_swap.common.exact_json import ExactEncoder
from tests.support.langfuse_rest import Rest
from tests.support.processes import PATIENCE

TRACES = "/api/public/otel/v1/traces"


@dataclass(frozen=True)
class Span:
    """One recorded span; ids as hex, times in nanoseconds, `parent` empty for a root."""

    name: str
    trace: str
    id: str
    parent: str
    start: int
    end: int
    attributes: dict
    event_count: int
    scope: tuple[str, dict]

    def json(self, attribute: str):
        """A langfuse.observation attribute that is JSON text, or a boolean of OpenTelemetry's own."""
        value = self.attributes[f"langfuse.observation.{attribute}"]
        return value if isinstance(value, bool) else json.loads(value)

    @property
    def row(self) -> str:
        """The row's id where the span is a row's, else the span's name."""
        return self.json("metadata.row_id") if self.name == "row" else self.name

    @property
    def kind(self) -> str:
        return self.attributes["langfuse.observation.type"]


class LangfuseServer:
    """Use as a context manager. Switches, at any time: `status` (answer this to everything), `hanging` (take requests
    and never answer), `delay` (seconds before a post is answered), `flaky` (share of posts that are answered by 503), `largest` (bytes
    of a body; more is 413), `rejected_score` (the name of a score that is turned down), `rejected_spans` (how many of each batch, its
    last ones, are not taken, as OTLP's partial success says it), `raw` (answer this to every post, and keep nothing of it: status, content
    type or None, body), `answers_lost` (so many posts of scores are taken, and the connection is closed without an answer), `most_scores` (a post
    of more is never answered, and not taken), `busy` (answers that come first: status and headers), `refuse()` and `accept()` (close and reopen the port). `rest` holds datasets and traffic."""

    def __init__(self, public_key: str, secret_key: str = "sk-lf-right"):
        self.keys = f"{public_key}:{secret_key}"
        self.status: int | None = None
        self.hanging = False
        self.delay = 0.0
        self.largest: int | None = None
        self.rejected_score: str | None = None
        self.rejected_spans = 0
        self.raw: tuple[int, str | None, bytes] | None = None
        self.answers_lost = 0
        self.most_scores: int | None = None
        self.flaky = 0.0
        self._random = Random(7)
        self.generation = 5  # of the server: 4 knows no list of scores
        self.busy: list[tuple[int, dict[str, str]]] = []
        self.rest = Rest()
        self.bodies: list[tuple[str, bytes]] = []  # (path, decompressed body) of everything posted with the right keys
        self.accepted: list[tuple[str, bytes]] = []
        self.headers: list[dict] = []
        self.looked_up: list[list[str]] = []  # ids of scores that were asked for
        self._port = 0
        self._server: ThreadingHTTPServer | None = None
        self._released = threading.Event()

    def __enter__(self) -> "LangfuseServer":
        self.accept()
        return self

    def __exit__(self, *_: object) -> None:
        self.refuse()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def accept(self) -> None:
        self._server = _Server(("127.0.0.1", self._port), self)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def refuse(self) -> None:
        self._released.set()
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            for connection in list(self._server.connections):  # kept-alive ones would still be served
                _close(connection)
            self._server = None

    @property
    def spans(self) -> list[Span]:
        """Accepted spans."""
        return spans_of(self.accepted)

    @property
    def scores(self) -> list[dict]:
        """Accepted scores."""
        return scores_of(self.accepted)

    def answer(self, method: str, path: str, headers: dict, body: bytes) -> tuple[int, dict | bytes] | tuple[int, dict | bytes, dict]:
        """(status, JSON or a body as it is) for one request, and headers where the answer has its own."""
        if self.hanging:
            self._released.wait(2 * PATIENCE)
        if method == "POST":
            time.sleep(self.delay)
        if headers.get("authorization") != "Basic " + base64.b64encode(self.keys.encode()).decode():
            return 401, {"message": "Invalid credentials. Confirm that you've configured the correct host."}
        if self.status is not None and method == "GET":
            return self.status, {"message": "switched to fail"}
        if method == "GET" and path == "/api/public/projects":
            return 200, {"data": [{"id": "project-1", "name": "tests", "metadata": {}, "organization": {"id": "o", "name": "o"}}]}
        if self.raw:
            status, kind, content = self.raw
            return status, content, {"content-type": kind} if kind else {}
        if self.busy:
            status, own = self.busy.pop(0)
            return status, {"message": "switched to fail"}, own
        self.headers.append(headers)
        if method == "GET" and (looked_up := self._look_up(path)) is not None:
            return looked_up
        if self.status is None and (answered := self.rest.answer(method, path, body)):
            return answered
        if self.largest is not None and len(body) > self.largest:
            return 413, {"message": "Request body too large"}
        if headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        status = 503 if self._random.random() < self.flaky else self.status
        self.bodies.append((path, body))
        if status is not None:
            return status, {"message": "switched to fail"}
        if path == TRACES:
            if any(not span.id or not span.trace for span in _decode(body)):
                return 400, {"message": "span without an id"}
            if self.rejected_spans:
                return self._take_some(body)
        elif path == "/api/public/scores" and self.generation < 5:
            return 400, {"message": "Invalid request data"}
        elif path in {"/api/public/scores", "/api/public/ingestion"}:
            return self._answer_scores(path, body)
        else:
            return 404, {"message": "Not Found"}
        self.accepted.append((path, body))
        return 200, {}

    def _look_up(self, path: str) -> tuple[int, dict] | None:
        """Scores by their ids, as the endpoint of the server's generation gives them."""
        parts = urlsplit(path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        ids = query.get("id") or query.get("scoreIds")
        if not ids:
            return None
        self.looked_up.append(ids.split(","))
        if parts.path != ("/api/public/v3/scores" if self.generation >= 5 else "/api/public/v2/scores"):
            return 404, {"message": "Not Found"}
        found = {score["id"]: score for score in self.scores if score["id"] in self.looked_up[-1]}
        return 200, {"data": list(found.values())[: int(query["limit"])], "meta": {}}

    def _take_some(self, body: bytes) -> tuple[int, bytes, dict]:
        from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

        request = trace_service_pb2.ExportTraceServiceRequest.FromString(body)
        spans = request.resource_spans[0].scope_spans[0].spans
        count = min(self.rejected_spans, len(spans))
        del spans[len(spans) - count :]
        self.accepted.append((TRACES, request.SerializeToString()))
        partial = trace_service_pb2.ExportTracePartialSuccess(rejected_spans=count, error_message="over the quota")
        answer = trace_service_pb2.ExportTraceServiceResponse(partial_success=partial)
        return 200, answer.SerializeToString(), {"content-type": "application/x-protobuf"}

    def _answer_scores(self, path: str, body: bytes) -> tuple[int, dict]:
        scores = _scores(path, body)
        if self.most_scores is not None and len(scores) > self.most_scores:
            self._released.wait(2 * PATIENCE)
            return 503, {}
        good = [score for score in scores if score["name"] != self.rejected_score]
        self.accepted.append(("good scores", json.dumps(good).encode()))
        if self.answers_lost:
            self.answers_lost -= 1
            raise ConnectionAbortedError
        if path == "/api/public/ingestion":
            errors = [{"id": s["id"], "status": 400, "message": "Invalid request data"} for s in scores if s not in good]
            return 207, {"successes": [{"id": s["id"], "status": 201} for s in good], "errors": errors}
        if len(good) == len(scores):
            return 202, {"message": "Accepted"}
        count = len(scores) - len(good)
        return 207, {"accepted": len(good), "rejected": count, "errors": [{"message": "Invalid request data"}] * count}


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], recorder: LangfuseServer):
        self.recorder = recorder
        self.connections: set[socket.socket] = set()
        super().__init__(address, _Handler)

    def handle_error(self, *_: object) -> None:
        """A connection that a test has cut is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        status, answer, *own = self.server.recorder.answer(self.command, self.path, headers, body)
        content = answer if isinstance(answer, bytes) else json.dumps(answer, cls=ExactEncoder).encode()
        self.send_response(status)
        if not isinstance(answer, bytes):
            self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        for name, value in own[0].items() if own else ():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = _serve

    def log_message(self, *_: object) -> None:
        """Quiet."""


def _close(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return


def spans_of(posts: list[tuple[str, bytes]]) -> list[Span]:
    """The spans in a list of (path, body)."""
    return [span for path, body in list(posts) if path == TRACES for span in _decode(body)]


def scores_of(posts: list[tuple[str, bytes]]) -> list[dict]:
    """The scores, of both SDK forms, in a list of (path, body), in the API's own field names."""
    return [score for path, body in list(posts) if path != TRACES for score in _scores(path, body)]


def _scores(path: str, body: bytes) -> list[dict]:
    sent = json.loads(body)
    if path != "/api/public/ingestion":
        return sent
    if any(entry["type"] != "score-create" for entry in sent["batch"]):
        raise ValueError("something other than a score")
    return [entry["body"] for entry in sent["batch"]]


def _decode(body: bytes) -> list[Span]:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    request = ExportTraceServiceRequest.FromString(body)
    return [
        Span(
            name=span.name,
            trace=span.trace_id.hex(),
            id=span.span_id.hex(),
            parent=span.parent_span_id.hex(),
            start=span.start_time_unix_nano,
            end=span.end_time_unix_nano,
            attributes={pair.key: _value(pair.value) for pair in span.attributes},
            event_count=len(span.events),
            scope=(scope.scope.name, {pair.key: _value(pair.value) for pair in scope.scope.attributes}),
        )
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


def _value(value):
    kind = value.WhichOneof("value")
    return [_value(item) for item in value.array_value.values] if kind == "array_value" else getattr(value, kind)
