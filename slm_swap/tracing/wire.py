"""Langfuse on the wire: records as OpenTelemetry spans and as scores, and what the server made of them.

Facts of the format: https://langfuse.com/integrations/native/opentelemetry; servers of both generations take the spans. Scores go as
the list of newer servers, or, where that is turned down, as the ingestion events of older ones. The SDK's own queues are not used:
they hold what they have in memory and drop it in an outage.
"""

import gzip
import json
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any
from urllib.parse import urlsplit

from slm_swap.common.errors import UserError
from slm_swap.common.settings import Settings

CHECK_SECONDS = 5  # what the start of a run waits for an answer
REQUEST_SECONDS = 5  # what one request may take
UNTRACED = "set LANGFUSE_DISABLED=1 to run untraced, or pass --langfuse-optional to send the trace later"


class NoLangfuse(UserError):
    """Langfuse cannot be reached or does not let us in: said before any work begins."""


@dataclass(frozen=True)
class Answer:
    """What became of a batch. `taken`: it arrived, but for `turned_down` of its scores, which the server says are not valid.
    `refused`: the server will not have it as it is, whenever it is sent. Neither: not now. `reason` says why."""

    taken: bool
    refused: bool = False
    reason: str = ""
    turned_down: int = 0


def address(settings: Settings, what: str, advice: str) -> tuple[str, str]:
    """(base URL, host) of the Langfuse that the settings name, without a password that would be shown and would replace the keys.

    `what` begins the message of an error and `advice` ends it.

    Raises:
        UserError: variables are missing (all are named), or the base URL is no address.
    """
    variables = {
        "LANGFUSE_PUBLIC_KEY": settings.langfuse_public_key,
        "LANGFUSE_SECRET_KEY": settings.langfuse_secret_key,
        "LANGFUSE_BASE_URL": settings.langfuse_base_url,
    }
    missing = [name for name, value in variables.items() if not value]
    if missing:
        raise UserError(f"{what}, and {', '.join(missing)} not set: set what is missing{advice}")
    try:
        parts = urlsplit(settings.langfuse_base_url.rstrip("/"))
        if parts.scheme not in {"http", "https"} or not parts.hostname or parts.port == 0:
            raise ValueError
    except ValueError:
        raise UserError(f"LANGFUSE_BASE_URL is not an address: set it to one such as https://cloud.langfuse.com{advice}") from None
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=host).geturl(), host


class Server:
    """One Langfuse project: its address and keys; the keys are in the header alone.

    Raises:
        UserError: as `address`.
    """

    def __init__(self, settings: Settings, seconds: float | None = None):
        """`seconds`: what one request may take (default: REQUEST_SECONDS)."""
        import httpx

        self.base_url, self.host = address(settings, "runs are traced to Langfuse", f", or {UNTRACED}")
        self.seconds = seconds or REQUEST_SECONDS
        names = ("langfuse_public_key", "langfuse_secret_key", "langfuse_base_url")
        self.account = {name: getattr(settings, name) for name in names}  # for `Settings` in the sender's process
        self.client = httpx.Client(
            auth=httpx.BasicAuth(settings.langfuse_public_key, settings.langfuse_secret_key),
            timeout=self.seconds,
            headers={"x-langfuse-public-key": settings.langfuse_public_key, "x-langfuse-ingestion-version": "4"},
        )
        self._scores_as_events = False

    def project(self) -> str:
        """The id of the keys' project.

        Raises:
            NoLangfuse: no answer, an answer that is not Langfuse's, or rejected keys.
        """
        import httpx

        try:
            response = within(CHECK_SECONDS, lambda: self.client.get(f"{self.base_url}/api/public/projects", timeout=CHECK_SECONDS))
            trouble = f"HTTP {response.status_code}" if response.status_code >= 500 else None
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
            trouble = type(error).__name__
        if trouble:
            raise NoLangfuse(f"Langfuse at {self.host} is not there ({trouble}): start it, mend LANGFUSE_BASE_URL, or {UNTRACED}")
        if response.status_code in {401, 403}:
            raise NoLangfuse(
                f"Langfuse at {self.host} rejects the keys (HTTP {response.status_code}): "
                f"mend LANGFUSE_PUBLIC_KEY and LANGFUSE_SECRET_KEY, or {UNTRACED}"
            )
        try:
            return str(response.raise_for_status().json()["data"][0]["id"])
        except (httpx.HTTPError, ValueError, LookupError, TypeError):
            raise NoLangfuse(
                f"{self.host} does not answer like Langfuse (HTTP {response.status_code}): mend LANGFUSE_BASE_URL, or {UNTRACED}"
            ) from None

    def send_spans(self, spans: Sequence[dict[str, Any]]) -> Answer:
        """Post spans as `RunTrace` records them."""
        headers = {"content-type": "application/x-protobuf", "content-encoding": "gzip"}
        return self._post("/api/public/otel/v1/traces", gzip.compress(encode(spans), 1), headers)[0]

    def send_scores(self, scores: Sequence[dict[str, Any]]) -> Answer:
        """Post scores in the API's own field names; their ids make a second time harmless."""
        if not self._scores_as_events:
            answer, status = self._post_json("/api/public/scores", list(scores))
            if status not in (400, 404, 405):
                return answer
        events = [
            {"id": str(uuid.uuid5(uuid.NAMESPACE_OID, score["id"])), "type": "score-create", "timestamp": score["timestamp"], "body": score}
            for score in scores
        ]  # an older server knows a single score there and no list
        older, status = self._post_json("/api/public/ingestion", {"batch": events, "metadata": None})
        self._scores_as_events = self._scores_as_events or older.taken
        return older

    def _post_json(self, path: str, value: Any) -> tuple[Answer, int | None]:
        return self._post(path, json.dumps(value).encode(), {"content-type": "application/json"})

    def _post(self, path: str, body: bytes, headers: dict[str, str]) -> tuple[Answer, int | None]:
        import httpx

        try:
            response = self.client.post(self.base_url + path, content=body, headers=headers)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            return Answer(False, reason=f"no answer ({type(error).__name__})"), None
        status = response.status_code
        if status in (400, 413, 422):
            return Answer(False, True, f"HTTP {status}"), status
        if status >= 300:
            return Answer(False, reason=f"HTTP {status}"), status
        return Answer(True, turned_down=_turned_down(response) if status == 207 else 0), status


def _turned_down(response: Any) -> int:
    """How many scores an answer of 207 names: a count from newer servers, a list from older ones."""
    try:
        answer = response.json()
        return int(answer.get("rejected", len(answer.get("errors") or []))) if isinstance(answer, dict) else 0
    except (ValueError, TypeError):
        return 0


def encode(spans: Sequence[dict[str, Any]]) -> bytes:
    """Spans of one trace as an ExportTraceServiceRequest."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
    from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, InstrumentationScope, KeyValue
    from opentelemetry.proto.resource.v1.resource_pb2 import Resource
    from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span

    def add(span: Span, attributes: dict[str, Any]) -> None:
        for key, value in attributes.items():
            if key == "langfuse.trace.tags":
                array = ArrayValue(values=[AnyValue(string_value=item) for item in value])
                span.attributes.add(key=key, value=AnyValue(array_value=array))
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
    scope = ScopeSpans(scope=InstrumentationScope(name="slm_swap"), spans=encoded)
    resource = Resource(attributes=[KeyValue(key="service.name", value=AnyValue(string_value="slm_swap"))])
    return ExportTraceServiceRequest(resource_spans=[ResourceSpans(resource=resource, scope_spans=[scope])]).SerializeToString()


def _attributes(facts: dict[str, Any]) -> dict[str, str]:
    """What is told of an observation under Langfuse's names, every metadata key an attribute of its own."""
    told = {f"langfuse.observation.{key}": as_text(value) for key, value in facts.items() if key != "metadata" and value is not None}
    metadata = facts.get("metadata") or {}
    return told | {f"langfuse.observation.metadata.{key}": json.dumps(value, ensure_ascii=False) for key, value in metadata.items()}


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
