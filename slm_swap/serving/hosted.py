"""The hosted model behind the endpoint: a client's request goes there as it came, and its answer comes back as it is.

Only what a server needs of a request's head is passed on. The hosted model's key is put in here, and a client's own key stays here.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote, unquote, urlencode

from slm_swap.azure_client import entra_token
from slm_swap.clients.chat_client import CONNECT_SECONDS
from slm_swap.clients.endpoint import Endpoint, is_loopback, open_client, parse_endpoint, require_proxies
from slm_swap.common.errors import UserError
from slm_swap.common.settings import Settings, load_proxies

if TYPE_CHECKING:
    import httpx2

PASSED_ON = re.compile(r"content-type|content-encoding|accept|user-agent|x-request-id|x-ms-client-request-id|traceparent|tracestate|openai-beta|idempotency-key|x-stainless-.*")
KEPT_BACK = re.compile(r"connection|keep-alive|transfer-encoding|content-length|set-cookie|server|date|authorization|api-key|www-authenticate|proxy-.*|upgrade|trailer|te")
DECODED = {"identity", "gzip", "deflate"}  # what an answer may be compressed by, though it is asked for as it is, and is read
CHAT = re.compile(r"/(?:openai/deployments/(?P<name>[^/]+)|openai/v1|v1|models)/chat/completions")
# What clients with keys of their own may ask of the hosted model besides: its key may be good for more (files, deletions), which is not theirs.
ASKING = re.compile(r"/(?:openai/deployments/[^/]+|openai/v1|openai|v1|models)/(?:completions|embeddings|responses|moderations)|/(?:openai/v1|openai|v1)/models/[^/]+")
OWN_PATH = re.compile(r"/(?:openai/deployments/(?P<name>[^/]+)|openai/v1|v1|models|openai)(?P<rest>/.*)")


class HostedDown(Exception):
    """No answer, or one of 5xx; the text says which, without anything of the request. `retry_after` is what the server said of it."""

    retry_after: str | None = None


class Hosted:
    """The model of AZURE_ENDPOINT; `timeout` in seconds is the longest that a stream may be silent.

    Raises:
        UserError: as `endpoint.parse_endpoint`, and as `endpoint.require_proxies`: the client, which refuses the same, is made later, in each worker.
    """

    def __init__(self, settings: Settings, timeout: float):
        self._key = settings.azure_api_key
        self._token: Callable[[], str] | None = None if self._key else entra_token()
        missing = () if self._key or self._token else ("AZURE_API_KEY (or pip install azure-identity)",)
        names = settings.azure_endpoint, settings.azure_deployment, settings.azure_api_version
        self.endpoint: Endpoint = parse_endpoint(*names, missing, bool(self._key), settings.secrets)
        if not is_loopback(self.endpoint.host):
            require_proxies()
        if self.endpoint.form == "openai":
            self._token = None
        if self._key and not re.fullmatch(r"[!-~]+", self._key):
            raise UserError("AZURE_API_KEY has characters that no key has: copy it again")
        self._timeout = timeout
        self._client: httpx2.AsyncClient | None = None

    def open(self) -> None:
        """Make the connections' pool, in the loop that uses it."""
        import openai

        timeout = openai.Timeout(self._timeout, connect=min(self._timeout, CONNECT_SECONDS), pool=None)
        # Of the package's two, aiohttp's takes a fourth of the time and does not slow down with the number of connections, but speaks no SOCKS.
        socks = any(value.startswith("socks") for value in load_proxies().values()) and not is_loopback(self.endpoint.host)
        kind = openai.DefaultAsyncHttpxClient if socks else openai.DefaultAioHttpClient
        self._client = open_client(kind, self.endpoint.host, timeout=timeout)

    async def close(self) -> None:
        if self._client:
            await self._client.aclose()

    @property
    def name(self) -> str:
        return self.endpoint.deployment

    def url(self, path: str, query: str, model: str | None) -> str:
        """Where a request goes that came by this path: the same thing in the form of the hosted model's URL. `model` is the one it names."""
        base, form = self.endpoint.base_url, self.endpoint.form
        found, chat = OWN_PATH.fullmatch(path), CHAT.fullmatch(path)
        own = urlencode(self.endpoint.query)
        if form == "deployments":
            resource = base.rpartition("/openai/deployments/")[0]
            if not chat and not (found and found["name"]):  # a path of the resource, in the client's own version
                return f"{resource}{path if path.startswith('/openai/') else f'/openai{path}'}" + (f"?{query}" if query else "")
            named = unquote(found["name"]) if found and found["name"] else model or self.name
            base, query = f"{resource}/openai/deployments/{quote(named, safe='')}", query if "api-version=" in query else own
        else:
            kept = [(name, value) for name, value in parse_qsl(query, keep_blank_values=True) if name != "api-version"]
            query = "&".join(filter(None, (urlencode(kept), own)))
        return f"{base}{found['rest'] if found else path}" + (f"?{query}" if query else "")

    def body(self, raw: bytes, parsed: dict[str, Any] | None, model: str | None) -> bytes:
        """A request's body as it came; with its `model` where only the client's URL named it, and the hosted model's URL does not."""
        if not parsed or self.endpoint.form == "deployments" or isinstance(parsed.get("model"), str) or model is None:
            return raw
        return b'{"model": %b, %b' % (json.dumps(model).encode(), raw.lstrip(b" \t\r\n\xef\xbb\xbf")[1:])

    @asynccontextmanager
    async def send(self, method: str, url: str, headers: list[tuple[str, str]], body: bytes) -> AsyncIterator["httpx2.Response"]:
        """The answer, whose body is still to be read.

        Raises:
            HostedDown: there is none, or it is of 5xx.
        """
        kept = [(name, value) for name, value in headers if PASSED_ON.fullmatch(name)]
        kept += [("accept-encoding", "identity"), *(await self._credential())]
        request = self._client.build_request(method, url, headers=kept, content=body)
        with told_down():
            response = await self._client.send(request, stream=True)
        try:
            if response.status_code >= 500:
                down = HostedDown(f"status {response.status_code}")
                down.retry_after = response.headers.get("retry-after")
                raise down
            yield response
        finally:
            await response.aclose()

    async def read(self, response: "httpx2.Response") -> bytes:
        """An answer's whole body.

        Raises:
            HostedDown: it broke off.
        """
        with told_down():
            return b"".join([part async for part in self.parts(response)])

    def parts(self, response: "httpx2.Response") -> AsyncIterator[bytes]:
        """An answer's body as it comes, decompressed; of what is not read here, the bytes that `answered_headers` says the encoding of."""
        return response.aiter_bytes() if is_decoded(response) else response.aiter_raw()

    async def _credential(self) -> list[tuple[str, str]]:
        if self._key:
            return [("authorization", f"Bearer {self._key}") if self.endpoint.bearer else ("api-key", self._key)]
        if self._token is None:
            return []
        try:
            return [("authorization", f"Bearer {await asyncio.to_thread(self._token)}")]
        except Exception as error:  # of an optional package
            raise HostedDown(f"Entra ID gave no token ({type(error).__name__})") from None


@contextmanager
def told_down() -> Iterator[None]:
    """
    Raises:
        HostedDown: the HTTP package raised anything of its own, or the system did.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and not type(error).__module__.startswith(("httpx", "httpcore", "aiohttp")):
            raise
        raise HostedDown(type(error).__name__) from None


def answered_headers(response: "httpx2.Response") -> list[tuple[str, str]]:
    """What of an answer's head goes to the client."""
    decoded = is_decoded(response)
    kept = [(name, value) for name, value in response.headers.multi_items() if not KEPT_BACK.fullmatch(name.lower())]
    return [(name, value) for name, value in kept if not (decoded and name.lower() == "content-encoding")]


def is_decoded(response: "httpx2.Response") -> bool:
    """Whether an answer's body is decompressed here."""
    return {name.strip().lower() for name in response.headers.get("content-encoding", "identity").split(",")} <= DECODED
