"""The endpoint over HTTP: OpenAI's and Azure's paths, who may come in, how much they may send, and errors in OpenAI's form."""

import asyncio
import json
import logging
import re
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from slm_swap.common.secrets import scrub
from slm_swap.serving.hosted import CHAT, HostedDown
from slm_swap.serving.notices import say
from slm_swap.serving.service import HEADER, RETRY_SECONDS, Given, Incoming, Refused, Service, incoming

if TYPE_CHECKING:
    from starlette.applications import Starlette

Receive, Send = Callable[[], Awaitable[dict[str, Any]]], Callable[[dict[str, Any]], Awaitable[None]]
MODELS = ("/v1/models", "/openai/v1/models", "/openai/models")
BEARER = re.compile(r"bearer +(\S+) *", re.IGNORECASE)  # RFC 9110, 11.1: a scheme's case says nothing
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]


def make_app(service: Service, closing: Callable[[], bool], started: Callable[[], None]) -> "Starlette":
    """The application of one worker; `closing` says whether it is to end, `started` is called when it can answer."""
    from starlette.applications import Starlette
    from starlette.routing import Route

    @asynccontextmanager
    async def life(_: Any) -> AsyncIterator[None]:
        logging.getLogger("uvicorn.error").addFilter(_not_said_yet)
        await service.start()
        started()
        try:
            yield
        finally:
            await service.stop()

    door = Door(service, closing)
    return Starlette(routes=[Route("/{path:path}", door, methods=METHODS)], lifespan=life)


def _not_said_yet(record: logging.LogRecord) -> bool:
    """Whether the server is to log it: a stream that broke off ends its connection by an exception, and `Service` has said so in one line."""
    return not (record.exc_info and isinstance(record.exc_info[1], HostedDown))


class Door:
    """Every request comes in here, and gets exactly one answer, unless its client has gone before."""

    def __init__(self, service: Service, closing: Callable[[], bool]):
        self._service, self._options, self._closing = service, service.options, closing

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        try:
            given = self._own(scope)
            if given is None:
                asked = await self._read(scope, receive)
                if not await _while_there(self._model(asked, send), receive) and not asked.counted:
                    self._service.meters.gone()
                return
        except _Gone:
            self._service.meters.gone()
            return
        except Refused as refused:
            given = refusal(refused)
        await self._send(given, send)

    async def _model(self, asked: Incoming, send: Send) -> None:
        """Answer what a model answers, to the last part of a stream.

        Raises:
            HostedDown: the hosted model's stream broke off.
        """
        self._service.meters.under_way(1)
        try:
            try:
                given = await self._answer(asked)
            except Refused as refused:
                given = refusal(refused)
            await self._send(given, send)
        finally:
            self._service.meters.under_way(-1)

    async def _send(self, given: Given, send: Send) -> None:
        if self._closing():  # a client that asks on and on over its connection would never let the worker end
            given = replace(given, headers=[*given.headers, ("connection", "close")])
        await _send(given, send)

    def _own(self, scope: dict[str, Any]) -> Given | None:
        """The answer to a request that is for the endpoint itself; None for one that a model answers.

        Raises:
            Refused: it may not come in.
        """
        path, options = scope["path"], self._options
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        bearer = BEARER.fullmatch(headers.get("authorization", ""))
        key = headers.get("api-key") or (bearer[1] if bearer else None)
        known = options.knows(key) if options.keys else True
        if path == "/healthz":
            return json_answer(200, self._service.health() if known else {"status": "ok"})
        if not known:
            raise Refused(401, "invalid_api_key", "Incorrect API key provided: this endpoint takes keys of its own, as api-key or as a bearer token.")
        if not options.keys and "origin" in headers:
            raise Refused(403, "no_keys", "This endpoint has no keys, so that web pages are not served: start it with SLM_SWAP_KEYS.")
        if path == "/metrics" and scope["method"] == "GET":
            return Given(200, [("content-type", "text/plain; version=0.0.4; charset=utf-8")], self._service.meters.text())
        if path in MODELS and scope["method"] == "GET":
            return json_answer(200, self._service.models())
        if not path.startswith(("/v1/", "/openai/", "/models/")) or ".." in path:
            raise Refused(404, "not_found", f"{path} is not here: use /v1 or /openai/deployments/NAME")
        return None

    async def _read(self, scope: dict[str, Any], receive: Receive) -> Incoming:
        """
        Raises:
            Refused: the body is too large, or too slow to come.
            _Gone: the client went before it had sent all of it.
        """
        headers = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in scope["headers"]]
        most, told = self._options.max_body, dict(headers).get("content-length", "")
        if told.isdecimal() and int(told) > most:
            raise too_large(most)
        raw = bytearray()
        try:
            async with asyncio.timeout(self._options.body_seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Gone
                    raw += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(raw) > most:
                        raise too_large(most)
        except TimeoutError:
            raise Refused(408, "request_timeout", f"The body did not come within {self._options.body_seconds:g} seconds.") from None
        path = scope.get("raw_path", scope["path"].encode()).partition(b"?")[0].decode("latin-1")
        return incoming(scope["method"], path, scope.get("query_string", b"").decode("latin-1"), headers, bytes(raw))

    async def _answer(self, asked: Incoming) -> Given:
        """
        Raises:
            Refused: as of `Service`.
        """
        service = self._service
        try:
            if asked.method == "POST" and CHAT.fullmatch(asked.path):
                return await service.chat(asked)
            return await service.other(asked)
        except HostedDown as down:
            text = f"No model answers at the moment ({down}): try again in {RETRY_SECONDS} seconds."
            return error_answer(503, "unavailable", text, [("retry-after", str(down.retry_after or RETRY_SECONDS)), (HEADER, "none")])
        except (Refused, asyncio.CancelledError):
            raise
        except Exception as error:  # a fault of this program: told without what the request holds
            told = "".join(traceback.format_tb(error.__traceback__))
            say(f"{type(error).__name__} in a request:\n{scrub(told, self._options.settings.secrets)}")
            return error_answer(500, "internal_error", f"The endpoint failed ({type(error).__name__}).")


class _Gone(Exception):
    """The client went."""


async def _while_there(answering: Coroutine[Any, Any, None], receive: Receive) -> bool:
    """Answer until that is done, or until the client has gone, which is False: nobody is there to be answered then."""
    work, gone = asyncio.create_task(answering), asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        done = work.done()
        if done:
            work.result()
        return done
    finally:
        left = {task for task in (work, gone) if not task.done()}
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send(given: Given, send: Send) -> None:
    headers = [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in given.headers]
    if isinstance(given.body, bytes):
        headers.append((b"content-length", str(len(given.body)).encode()))
        await send({"type": "http.response.start", "status": given.status, "headers": headers})
        await send({"type": "http.response.body", "body": given.body})
        return
    parts = given.body
    try:
        await send({"type": "http.response.start", "status": given.status, "headers": headers})
        async for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
    finally:
        await parts.aclose()


def json_answer(status: int, value: Any, headers: list[tuple[str, str]] | None = None) -> Given:
    return Given(status, [("content-type", "application/json"), *(headers or [])], json.dumps(value, default=str).encode())


def error_answer(status: int, code: str, message: str, headers: list[tuple[str, str]] | None = None) -> Given:
    """An error in OpenAI's form."""
    kind = "authentication_error" if status == 401 else "server_error" if status >= 500 else "invalid_request_error"
    return json_answer(status, {"error": {"message": message, "type": kind, "param": None, "code": code}}, headers)


def refusal(refused: Refused) -> Given:
    return error_answer(refused.status, refused.code, str(refused))


def too_large(most: int) -> Refused:
    return Refused(413, "request_too_large", f"The body has more than {most} bytes.")
