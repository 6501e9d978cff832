"""Langfuse on the wire: records as OpenTelemetry spans and as scores, and what the server made of them.

Facts of the format: https://langfuse.com/integrations/native/opentelemetry; servers of both generations take the spans. Scores go as
the list of newer servers, or, where that is turned down, as the ingestion events of older ones. The SDK's own queues are not used:
they hold what they have in memory and drop it in an outage.
"""

import gzip
import json
import re
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies

from slm_swap.common.errors import UserError
from slm_swap.common.settings import Settings

if TYPE_CHECKING:
    import httpx

CHECK_SECONDS = 5  # what the start of a run waits for an answer
REQUEST_SECONDS = 5  # what one request may take
LOOKED_UP = 64  # scores asked for by their ids at once, in a URL of some 3 KB
GATEWAY = (408, 502, 504)  # a proxy's answers where the server behind it may still be at work
SCOPE = "langfuse-sdk.slm_swap"  # servers repeat every attribute in the metadata of spans whose scope has another beginning
NOT_VALID = (400, 413, 422)  # statuses that will be the same whenever the same is sent
PROTOBUF = ("application/x-protobuf", "application/protobuf")
TOKEN = re.compile(r"[=@;]|(?:^|/)(?:sk|pk)-|(?:^|/)(?=[^/]*\d)(?=[^/]*[A-Za-z])[^/]{16,}")  # in a path: what looks like one
UNTRACED = "set LANGFUSE_DISABLED=1 to run untraced, or pass --langfuse-optional to send the trace later"


class NoLangfuse(UserError):
    """Langfuse cannot be reached or does not let us in: said before any work begins."""


@dataclass(frozen=True)
class Answer:
    """What became of a batch. `taken`: it arrived, except for `turned_down` of its scores, which the server says are not valid, or for
    `rejected` of its spans, of which it does not say which. `refused`: the server will not have it as it is, whenever it is sent. Neither:
    not now. `in_doubt`: there was no answer to a request that was sent, so that it may have arrived. `reason` says why."""

    taken: bool
    refused: bool = False
    reason: str = ""
    turned_down: int = 0
    rejected: int = 0
    in_doubt: bool = False


def address(settings: Settings, what: str, advice: str) -> tuple[str, str]:
    """(base URL, host) of the Langfuse that the settings name, without a password that would be shown and would replace the keys.

    `what` begins the message of an error and `advice` ends it.

    Raises:
        UserError: variables are missing (all are named), a key cannot be one, or the base URL is no address or has a secret inside.
    """
    variables = {
        "LANGFUSE_PUBLIC_KEY": settings.langfuse_public_key,
        "LANGFUSE_SECRET_KEY": settings.langfuse_secret_key,
        "LANGFUSE_BASE_URL": settings.langfuse_base_url,
    }
    missing = [name for name, value in variables.items() if not value]
    if missing:
        raise UserError(f"{what}, and {', '.join(missing)} not set: set what is missing{advice}")
    if odd := [name for name, value in variables.items() if not value.isprintable() or ("KEY" in name and not value.isascii())]:
        raise UserError(f"{', '.join(odd)} has characters inside that cannot be there: copy it again{advice}")
    try:
        parts = urlsplit(settings.langfuse_base_url)
        if parts.scheme not in {"http", "https"} or not parts.hostname or parts.port == 0:
            raise ValueError
        parts.hostname.encode("idna")  # as the system's resolver does
    except ValueError:
        raise UserError(f"LANGFUSE_BASE_URL is not an address: set it to one such as https://cloud.langfuse.com{advice}") from None
    host, path = parts.netloc.rpartition("@")[2], parts.path.rstrip("/")
    if parts.query or parts.fragment:
        raise UserError(f"LANGFUSE_BASE_URL ({host}) has something behind a ? or #, where no address of Langfuse has: take it out{advice}")
    secrets = (*settings.secrets, settings.langfuse_public_key)
    if TOKEN.search(unquote(path)) or any(secret in text for secret in secrets for text in (host, path, unquote(path))):
        raise UserError(f"LANGFUSE_BASE_URL has what looks like a token inside, and would be shown and written down: take it out{advice}")
    return f"{parts.scheme}://{host}{path}", host


def http_client(**options: Any) -> "httpx.Client":
    """A client with these options.

    Raises:
        NoLangfuse: the environment names a proxy or certificates with which there is none; the variable is named, without what it holds.
    """
    import httpx

    try:
        return httpx.Client(**options)
    except (ValueError, ImportError, httpx.InvalidURL, OSError) as error:
        trouble = error
    if isinstance(trouble, OSError):
        raise NoLangfuse(f"SSL_CERT_FILE or SSL_CERT_DIR cannot be read ({trouble.strerror}): correct it, or {UNTRACED}") from None
    for kind, url in getproxies().items():
        try:
            if kind in ("http", "https", "all"):
                httpx.HTTPTransport(proxy=url if "://" in url else f"http://{url}", verify=False).close()
        except ImportError:
            raise NoLangfuse(f"{kind.upper()}_PROXY is a SOCKS proxy: pip install socksio, set another proxy, or {UNTRACED}") from None
        except (ValueError, httpx.InvalidURL):
            raise NoLangfuse(f"{kind.upper()}_PROXY is no address of a proxy: correct or unset it, or {UNTRACED}") from None
    raise NoLangfuse(f"NO_PROXY has what is no host inside: correct or unset it, or {UNTRACED}")


def failures() -> tuple[type[Exception], ...]:
    """What httpx raises where a request has no answer, and what it lets through of the system's resolver."""
    import httpx

    return httpx.HTTPError, httpx.InvalidURL, UnicodeError, OverflowError


def never_sent() -> tuple[type[Exception], ...]:
    """Those of `failures` where nothing has reached the server."""
    import httpx

    return httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.InvalidURL, httpx.UnsupportedProtocol, UnicodeError, OverflowError


class Server:
    """One Langfuse project: its address and keys; the keys are in the header alone.

    Raises:
        UserError: as `address`.
    """

    def __init__(self, settings: Settings, seconds: float | None = None):
        """`seconds`: what one request may take (default: REQUEST_SECONDS)."""
        self.base_url, self.host = address(settings, "runs are traced to Langfuse", f", or {UNTRACED}")
        self.seconds = seconds or REQUEST_SECONDS
        names = ("langfuse_public_key", "langfuse_secret_key", "langfuse_base_url")
        self.account = {name: getattr(settings, name) for name in names}  # for `Settings` in the sender's process
        self._scores_as_events = False

    @cached_property
    def client(self) -> "httpx.Client":
        """Made when it is first asked for: a run whose tracing is optional goes on without one."""
        import httpx

        public_key, secret_key = self.account["langfuse_public_key"], self.account["langfuse_secret_key"]
        headers = {"x-langfuse-public-key": public_key, "x-langfuse-ingestion-version": "4"}
        return http_client(auth=httpx.BasicAuth(public_key, secret_key), timeout=self.seconds, headers=headers)

    def project(self) -> str:
        """The id of the keys' project.

        Raises:
            NoLangfuse: no answer, an answer that is not Langfuse's, rejected keys, or as `http_client`.
        """
        import httpx

        client = self.client
        try:
            response = within(CHECK_SECONDS, lambda: client.get(f"{self.base_url}/api/public/projects", timeout=CHECK_SECONDS))
            trouble = f"HTTP {response.status_code}" if response.status_code >= 500 else None
        except (*failures(), TimeoutError) as error:
            trouble = type(error).__name__
        if trouble:
            raise NoLangfuse(f"Langfuse at {self.host} is not there ({trouble}): start it, correct LANGFUSE_BASE_URL, or {UNTRACED}")
        if response.status_code in {401, 403}:
            raise NoLangfuse(
                f"Langfuse at {self.host} rejects the keys (HTTP {response.status_code}): "
                f"correct LANGFUSE_PUBLIC_KEY and LANGFUSE_SECRET_KEY, or {UNTRACED}"
            )
        try:
            return str(response.raise_for_status().json()["data"][0]["id"])
        except (httpx.HTTPError, ValueError, LookupError, TypeError, RecursionError):
            raise NoLangfuse(
                f"{self.host} does not answer like Langfuse (HTTP {response.status_code}): correct LANGFUSE_BASE_URL, or {UNTRACED}"
            ) from None

    def send_spans(self, spans: Sequence[dict[str, Any]]) -> Answer:
        """Post spans as `RunTrace` records them."""
        headers = {"content-type": "application/x-protobuf", "content-encoding": "gzip"}
        answer, _, said = self._post("/api/public/otel/v1/traces", gzip.compress(encode(spans, self.account["langfuse_public_key"]), 1), headers)
        if not answer.taken:
            return answer
        rejected, why = _rejected_spans(said)
        return replace(answer, rejected=min(rejected, len(spans)), reason=self._shown(f"rejected: {why}") if rejected else "")

    def send_scores(self, scores: Sequence[dict[str, Any]]) -> Answer:
        """Post scores in the API's own field names; their ids make a second time harmless."""
        if not self._scores_as_events:
            answer, status = self._post_scores("/api/public/scores", list(scores), len(scores))
            if status not in (400, 404, 405):
                return answer
        events = [
            {"id": str(uuid.uuid5(uuid.NAMESPACE_OID, score["id"])), "type": "score-create", "timestamp": score["timestamp"], "body": score}
            for score in scores
        ]  # an older server knows a single score there and no list
        older, status = self._post_scores("/api/public/ingestion", {"batch": events, "metadata": None}, len(scores))
        self._scores_as_events = self._scores_as_events or older.taken
        return older

    def arrived(self, scores: Sequence[dict[str, Any]]) -> set[str]:
        """The ids of those scores that Langfuse has already. A server takes some seconds to show what it has taken; where it does not say,
        there are none."""
        ids, found = [score["id"] for score in scores], set[str]()
        for start in range(0, len(ids), LOOKED_UP):
            some = ",".join(ids[start : start + LOOKED_UP])
            there = self._ids("v3/scores", {"id": some})
            found.update(there if there is not None else self._ids("v2/scores", {"scoreIds": some}) or ())
        return found & set(ids)

    def _ids(self, path: str, query: dict[str, str]) -> list[str] | None:
        """The ids that an endpoint of scores finds; None where there is none, as on servers of the other generation."""
        try:
            response = self.client.get(f"{self.base_url}/api/public/{path}", params=query | {"limit": "100"})
            return [str(score["id"]) for score in response.raise_for_status().json()["data"]]
        except (*failures(), ValueError, LookupError, TypeError, RecursionError):
            return None

    def _post_scores(self, path: str, value: Any, count: int) -> tuple[Answer, int | None]:
        answer, status, said = self._post(path, json.dumps(value).encode(), {"content-type": "application/json"})
        if not answer.taken:
            return answer, status
        turned_down, later = _turned_down(said)
        if later:
            return Answer(False, reason=f"HTTP {later} for some scores"), status
        return replace(answer, turned_down=min(turned_down, count)), status

    def _post(self, path: str, body: bytes, headers: dict[str, str]) -> tuple[Answer, int | None, Any]:
        """(what became of it, status, what the server says where it took it: `_read`)."""
        try:
            response = self.client.post(self.base_url + path, content=body, headers=headers)
        except failures() as error:
            sent = not isinstance(error, never_sent())
            return Answer(False, reason=f"no answer ({type(error).__name__})", in_doubt=sent), None, None
        status = response.status_code
        if not 200 <= status < 300:
            return Answer(False, status in NOT_VALID, f"HTTP {status}", in_doubt=status in GATEWAY), status, None
        try:
            return Answer(True), status, _read(response)
        except (ValueError, RecursionError):
            kind = self._shown(_content_type(response) or "no content type")
            return Answer(False, reason=f"it answers like no Langfuse: HTTP {status}, {kind}"), status, None

    def _shown(self, text: str) -> str:
        """What a server says as a piece of a line, without the key if it echoes it."""
        text = "".join(letter if letter.isprintable() else " " for letter in text.replace(self.account["langfuse_secret_key"], "***"))
        return " ".join(text.split())[:120]


def _content_type(response: "httpx.Response") -> str:
    return response.headers.get("content-type", "").partition(";")[0].strip().lower()


def _read(response: "httpx.Response") -> Any:
    """What an answer that takes something says: a JSON value (a message of OTLP's is an object then), None where it is empty.

    Servers differ in what they answer, `{}` or `{"message": "OK"}` or an ExportTraceServiceResponse; a page of a proxy's is none of them.

    Raises:
        ValueError: it is neither JSON nor such a message.
    """
    kind = _content_type(response)
    json_kind = kind == "application/json" or kind.endswith("+json")
    if kind and not json_kind and kind not in PROTOBUF:
        raise ValueError(kind)
    if not response.content:
        return None
    if kind not in PROTOBUF:
        return json.loads(response.content)
    from google.protobuf.json_format import MessageToDict
    from google.protobuf.message import DecodeError
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

    try:
        return MessageToDict(ExportTraceServiceResponse.FromString(response.content))
    except DecodeError as error:
        raise ValueError(kind) from error


def _rejected_spans(said: Any) -> tuple[int, str]:
    """(how many spans an answer rejects, why): OTLP's partial success, or the list of errors of a server that makes events of spans."""
    if not isinstance(said, dict):
        return 0, ""
    partial = said.get("partialSuccess") or said.get("partial_success")
    if isinstance(partial, dict):
        why = partial.get("errorMessage") or partial.get("error_message")
        return _number(partial.get("rejectedSpans") or partial.get("rejected_spans")), str(why or "no reason given")
    errors = _errors(said)
    return len(errors), str(errors[0].get("message") or errors[0].get("error")) if errors else ""


def _turned_down(said: Any) -> tuple[int, int | None]:
    """(how many scores an answer says are not valid, the status of one that may be taken later): newer servers give a count, older ones a
    list with a status each."""
    if not isinstance(said, dict):
        return 0, None
    errors = _errors(said)
    statuses = [error["status"] for error in errors if isinstance(error.get("status"), int)]
    return _number(said.get("rejected")) or len(errors), next((status for status in statuses if status not in NOT_VALID), None)


def _errors(said: dict[str, Any]) -> list[dict[str, Any]]:
    errors = said.get("errors")
    return [error if isinstance(error, dict) else {"message": error} for error in errors] if isinstance(errors, list) else []


def _number(value: Any) -> int:
    """A count of JSON or, as protobuf's JSON writes 64 bits, of its digits; 0 where there is none."""
    return max(0, int(value)) if re.fullmatch(r"-?\d{1,18}", str(value)) else 0


def encode(spans: Sequence[dict[str, Any]], public_key: str) -> bytes:
    """Spans of one trace as an ExportTraceServiceRequest; the key is the one that it is sent with, which servers compare."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
    from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, InstrumentationScope, KeyValue
    from opentelemetry.proto.resource.v1.resource_pb2 import Resource
    from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span

    def add(span: Span, attributes: dict[str, Any]) -> None:
        for key, value in attributes.items():
            if key == "langfuse.trace.tags":
                array = ArrayValue(values=[AnyValue(string_value=item) for item in value])
                span.attributes.add(key=key, value=AnyValue(array_value=array))
            elif isinstance(value, bool):  # as text, Langfuse would show and filter the word
                span.attributes.add(key=key).value.bool_value = value
            else:
                span.attributes.add(key=key).value.string_value = as_text(value)

    shared = Span(trace_id=bytes.fromhex(spans[0]["trace"]))
    add(shared, spans[0]["shared"])
    encoded = []
    for record in spans:
        span = Span()
        span.CopyFrom(shared)  # far sooner than encoding anew what is the same in all
        span.span_id, span.parent_span_id = bytes.fromhex(record["id"]), bytes.fromhex(record["parent"])
        span.name, span.start_time_unix_nano, span.end_time_unix_nano = record["name"], record["start"], record["end"]
        add(span, _attributes(record["facts"]) | record.get("attributes", {}))
        encoded.append(span)
    key = KeyValue(key="public_key", value=AnyValue(string_value=public_key))
    scope = ScopeSpans(scope=InstrumentationScope(name=SCOPE, attributes=[key]), spans=encoded)
    resource = Resource(attributes=[KeyValue(key="service.name", value=AnyValue(string_value="slm_swap"))])
    return ExportTraceServiceRequest(resource_spans=[ResourceSpans(resource=resource, scope_spans=[scope])]).SerializeToString()


def _attributes(facts: dict[str, Any]) -> dict[str, str | bool]:
    """What is told of an observation under Langfuse's names, every metadata key an attribute of its own."""
    told = {f"langfuse.observation.{key}": as_text(value) for key, value in facts.items() if key != "metadata" and value is not None}
    metadata = facts.get("metadata") or {}
    shown = {key: value if isinstance(value, bool) else json.dumps(value, ensure_ascii=False) for key, value in metadata.items()}
    return told | {f"langfuse.observation.metadata.{key}": value for key, value in shown.items()}


def as_text(value: Any) -> str:
    """As Langfuse wants an attribute: a text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def timestamp(nanoseconds: int) -> str:
    """ISO 8601 in UTC, to the millisecond."""
    return datetime.fromtimestamp(nanoseconds / 1e9, timezone.utc).isoformat(timespec="milliseconds")


def within(seconds: float, function: Any) -> Any:
    """Call `function` and wait at most `seconds`; on TimeoutError it goes on in a daemon thread, which holds up no exit."""
    outcome: dict[str, Any] = {}

    def work() -> None:
        try:
            outcome["value"] = function()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no end within {seconds} s")
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]
