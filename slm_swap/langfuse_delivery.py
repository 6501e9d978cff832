"""The connection to Langfuse under `langfuse_helpers`: checked before work begins, counted, bounded in every wait.

On top of the SDK (4.18 to 5): rows wait for room where the SDK's queue would drop its oldest spans, so nothing is lost while
the server answers; a server that stops answering costs a run one time-out, after which rows without room are dropped and counted.
"""

import atexit
import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from slm_swap.errors import UserError
from slm_swap.settings import Settings

CHECK_SECONDS = 10  # what the start of a run waits for an answer
EXPORT_SECONDS = 10  # what one batch of spans may take, the exporter's own retries included
RETRY_PAUSES = (1, 2)  # seconds before a batch of scores is sent again
BATCH = 256  # spans or scores in one request; the SDK's own 15 would make 2,000 requests of 30,000 scores
SPANS_UNDER_WAY = 1536  # the SDK's queue holds 2,048
SCORES_UNDER_WAY = 4096  # the SDK's queue holds 100,000, more than the last seconds of a run can deliver
UNTRACED = "set LANGFUSE_DISABLED=1 to run untraced"


def within(seconds: float, function: Callable[[], Any]) -> Any:
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


class Channel:
    """Spans or scores on their way: at most `limit` at once, every one counted until its request is done."""

    def __init__(self, limit: int):
        self.limit = limit
        self.reason = ""
        self.answering = True
        self._sent = self._under_way = self._lost = 0
        self._change = threading.Condition()

    def admit(self, count: int = 1) -> bool:
        """Take room, waiting for it while the server answers; False (and counted as lost) where there is none."""
        with self._change:
            if self.answering and not self._room(count):
                self._change.wait_for(lambda: self._room(count) or not self.answering, EXPORT_SECONDS + 1)
                self.answering = self.answering and self._room(count)
            admitted = self._room(count)
            self._sent += count
            self._under_way += count * admitted
            self._lost += count * (not admitted)
            return admitted

    def refuse(self, count: int) -> None:
        """Count what is given up with something else: the scores of a row without room."""
        with self._change:
            self._sent += count
            self._lost += count

    def settle(self, count: int, lost: int, status: int | None, hint: str = "") -> None:
        """A request of `count` is done and `lost` of them were not taken; `status` is HTTP's, None without an answer."""
        with self._change:
            self._under_way -= count
            self._lost += lost
            self.answering = status is not None and status < 500 and status != 429
            if lost:
                self.reason = "no answer" if status is None else f"HTTP {status}{hint}"
            self._change.notify_all()

    def count(self) -> tuple[int, int]:
        """(sent, not known to have arrived), both since the process started."""
        with self._change:
            return self._sent, self._lost + self._under_way

    def _room(self, count: int) -> bool:
        return self._under_way + count <= self.limit or self._under_way == 0


@dataclass
class Link:
    """This process's connection to one Langfuse project: the SDK keeps one client a public key."""

    base_url: str
    host: str
    project: str
    spans: Channel
    scores: Channel
    secrets: list[str] = field(default_factory=list)
    client: Any = None
    tracer: Any = None

    def clean(self, value: Any) -> Any:
        """The value as JSON types, without secrets and without half surrogate pairs (one would cost its whole batch)."""
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, dict):
            return {self.clean(str(key)): self.clean(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.clean(item) for item in value]
        text = str(value)
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text.encode("utf-8", "replace").decode("utf-8")


_links: dict[str, tuple[tuple, Link]] = {}


def connect(settings: Settings) -> Link:
    """The connection for these settings, checked anew; one a public key for the life of the process.

    Raises:
        UserError: no answer, an answer that is not Langfuse's, rejected keys, or this public key with another secret or URL.
    """
    parts = urlsplit(settings.langfuse_base_url.rstrip("/"))
    host = parts.netloc.rpartition("@")[2]
    base_url = parts._replace(netloc=host).geturl()  # a password in it would be shown, and would replace the keys
    project = _check(settings, base_url, host)
    identity = (base_url, settings.langfuse_secret_key)
    known = _links.get(settings.langfuse_public_key)
    if known and known[0] != identity:
        raise UserError(f"this process traces to {known[1].host} with the same public key: start another process for {host}")
    link = known[1] if known else Link(base_url, host, project, Channel(SPANS_UNDER_WAY), Channel(SCORES_UNDER_WAY))
    link.secrets = sorted(settings.secrets, key=len, reverse=True)
    if not known:
        _open(link, settings)
        _links[settings.langfuse_public_key] = (identity, link)
    return link


def _check(settings: Settings, base_url: str, host: str) -> str:
    """Ask for the keys' project and return its id."""
    import httpx

    keys = (settings.langfuse_public_key, settings.langfuse_secret_key)
    try:
        response = within(CHECK_SECONDS, lambda: httpx.get(f"{base_url}/api/public/projects", auth=keys, timeout=CHECK_SECONDS))
        trouble = f"HTTP {response.status_code}" if response.status_code >= 500 else None
    except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
        trouble = type(error).__name__
    if trouble:
        raise UserError(f"Langfuse at {host} is not there ({trouble}): start it, mend LANGFUSE_BASE_URL, or {UNTRACED}")
    if response.status_code in {401, 403}:
        raise UserError(
            f"Langfuse at {host} rejects the keys (HTTP {response.status_code}): "
            f"mend LANGFUSE_PUBLIC_KEY and LANGFUSE_SECRET_KEY, or {UNTRACED}"
        )
    try:
        return str(response.raise_for_status().json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError, TypeError):
        raise UserError(
            f"{host} does not answer like Langfuse (HTTP {response.status_code}): mend LANGFUSE_BASE_URL, or {UNTRACED}"
        ) from None


def _open(link: Link, settings: Settings) -> None:
    """Make the SDK's client and the tracer that feeds it."""
    import langfuse
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.sampling import ALWAYS_ON

    for name in ("langfuse", "opentelemetry"):  # an outage is said once, at the end of the run
        logging.getLogger(name).setLevel(logging.CRITICAL)
    provider = TracerProvider(sampler=ALWAYS_ON, shutdown_on_exit=False)
    link.client = langfuse.Langfuse(
        public_key=settings.langfuse_public_key,
        secret_key=settings.langfuse_secret_key,
        base_url=link.base_url,
        timeout=EXPORT_SECONDS,
        flush_at=BATCH,
        flush_interval=0.5,
        tracer_provider=provider,
        span_exporter=_SpanExporter(link, settings),
        httpx_client=_score_client(link),
    )
    # The SDK flushes at exit without an end. Every run has flushed by then, for as long as it may.
    atexit.unregister(getattr(getattr(link.client, "_resources", None), "shutdown", None))
    scope = {"public_key": settings.langfuse_public_key}
    link.tracer = provider.get_tracer("langfuse-sdk", langfuse.__version__, attributes=scope)


class _SpanExporter:
    """OpenTelemetry's HTTP exporter, counted. A batch too large for the server is halved."""

    def __init__(self, link: Link, settings: Settings):
        import langfuse
        import requests
        from opentelemetry.exporter.otlp.proto.http import Compression
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        headers = {
            "x-langfuse-sdk-name": "python",
            "x-langfuse-sdk-version": langfuse.__version__,
            "x-langfuse-public-key": settings.langfuse_public_key,
        }
        if not langfuse.__version__.startswith("4."):
            headers["x-langfuse-ingestion-version"] = "4"
        session = requests.Session()
        session.auth = (settings.langfuse_public_key, settings.langfuse_secret_key)  # as a header it would yield to ~/.netrc
        session.hooks["response"].append(self._note)
        self._channel = link.spans
        self._status: int | None = None
        self._otlp = OTLPSpanExporter(
            endpoint=f"{link.base_url}/api/public/otel/v1/traces",
            headers=headers,
            timeout=EXPORT_SECONDS,
            compression=Compression.Gzip,
            session=session,
        )

    def _note(self, response: Any, *_: Any, **__: Any) -> None:
        self._status = response.status_code

    def export(self, spans: Any) -> Any:
        self._status, arrived = None, False
        try:
            result = self._otlp.export(spans)
            arrived = result.name == "SUCCESS"
        finally:
            if arrived or self._status != 413 or len(spans) == 1:
                self._channel.settle(len(spans), 0 if arrived else len(spans), self._status)
        if not arrived and self._status == 413 and len(spans) > 1:
            middle = len(spans) // 2
            first, second = self.export(spans[:middle]), self.export(spans[middle:])
            return first if first.name != "SUCCESS" else second
        return result

    def shutdown(self) -> None:
        self._otlp.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._otlp.force_flush(timeout_millis)


def _score_client(link: Link) -> Any:
    """The HTTP client for the SDK's scores: counts what the server took and does the retrying."""
    import httpx

    class ScoreClient(httpx.Client):
        def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
            if not request.url.path.endswith(("/api/public/scores", "/api/public/ingestion")):
                return super().send(request, **options)
            body = json.loads(request.content)
            count = len(body if isinstance(body, list) else body["batch"])  # SDK 5, SDK 4.18
            for pause in (*(RETRY_PAUSES if link.scores.answering else ()), None):
                try:
                    response = super().send(request, **options)
                    status = response.status_code
                except httpx.TransportError:
                    status = None
                if pause is None or (status is not None and status < 500 and status != 429):
                    break
                time.sleep(pause)
            lost = _rejected(response) if status is not None and status < 300 else count
            too_new = status == 400 and isinstance(body, list)
            hint = ": the scores of SDK 5 need server 4.59 or newer, else install 'langfuse<5'" if too_new else ""
            link.scores.settle(count, lost, status, hint)
            # 400 means "not again" to both SDKs, which would otherwise retry on their own, without an end in an outage
            return httpx.Response(400, json={"message": "not taken"}, request=request) if lost else response

    return ScoreClient(timeout=EXPORT_SECONDS)


def _rejected(response: Any) -> int:
    """How many scores of a batch the server names as rejected (HTTP 207: a count in SDK 5's form, a list in 4.18's)."""
    try:
        answer = response.json()
        return int(answer.get("rejected", len(answer.get("errors") or []))) if isinstance(answer, dict) else 0
    except ValueError:
        return 0
