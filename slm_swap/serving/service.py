"""Who answers a request: the small model where its reply may be sent, else the hosted model, to which the request goes as it came."""

import asyncio
import json
import os
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from slm_swap.clients.completions import read_completion
from slm_swap.clients.pricing import HostedPrices
from slm_swap.clients.protocol import Reply
from slm_swap.common.errors import UserError
from slm_swap.common.exact_json import EXACT
from slm_swap.common.reports import now
from slm_swap.common.settings import display_path
from slm_swap.rows.prompts import Request as ModelRequest
from slm_swap.rows.prompts import request_of
from slm_swap.serving import state
from slm_swap.serving.audits import Audits, agree, hosted_price
from slm_swap.serving.chat import Asked, Unsupported, completion, events, may_be_sent, read_chat, tools_of
from slm_swap.serving.hosted import ASKING, CHAT, Hosted, HostedDown, answered_headers, is_decoded, told_down
from slm_swap.serving.link import Link, NotNow
from slm_swap.serving.meters import UNLIKE, Meters
from slm_swap.serving.notices import say
from slm_swap.serving.options import Options
from slm_swap.serving.streams import is_whole, joined, tells_error
from slm_swap.serving.traces import Traces
from slm_swap.tracing.runs import connect
from slm_swap.verdict.cascade import MADE_BY, identity_of, kind_of, schema_hash, tool_hash

if TYPE_CHECKING:
    import httpx2

HEADER = "x-slm-swap"
RETRY_SECONDS = 5  # what a client is told to wait where nobody answers
KEPT = 4 * 2**20  # bytes of a hosted answer that are looked at for its tokens, its reply, and whether a stream holds that to its end
LAST = 2**14  # bytes of a longer stream in which its reply's end is looked for
DRAIN_SECONDS = 10  # that audits under way have when the worker ends


class Refused(Exception):
    """A request that is not taken: its status, code and message."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class Given:
    """An answer on its way: `body` is whole, or a stream whose last part has been sent when it ends."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes | AsyncIterator[bytes]


@dataclass(frozen=True)
class Local:
    """What the small model made of a request: its reply, the class, whether it may be sent, and why or why not."""

    reply: Reply
    kind: str
    tools: tuple[str, ...]
    send: bool
    reason: str


@dataclass
class Incoming:
    """A request as it came, and what is known of it. `body` is None where it is no JSON object; `counted`: as answered, or as failed."""

    method: str
    path: str
    query: str
    headers: list[tuple[str, str]]
    raw: bytes
    body: dict[str, Any] | None
    model: str | None
    id: str
    began: float
    counted: bool = False

    @property
    def stream(self) -> bool:
        return self.body is not None and self.body.get("stream") is True


def incoming(method: str, path: str, query: str, headers: list[tuple[str, str]], raw: bytes) -> Incoming:
    """A request with its body read. One that is compressed is the hosted model's to read, whatever it looks like."""
    plain = dict(headers).get("content-encoding", "identity").strip().lower() in ("", "identity")
    try:
        body = json.loads(raw, **EXACT) if raw and plain else None
    except (ValueError, RecursionError):
        body = None
    body = body if isinstance(body, dict) else None
    found = CHAT.fullmatch(path)
    named = unquote(found["name"]) if found and found["name"] else (body or {}).get("model")
    model = named if isinstance(named, str) else None
    return Incoming(method, path, query, headers, raw, body, model, f"chatcmpl-{uuid.uuid4().hex}", time.perf_counter())


class Service:
    """One worker's endpoint.

    Raises:
        UserError: the hosted model's set-up is wrong.
    """

    def __init__(self, options: Options, worker: int = 0):
        self.options, self.worker = options, worker
        settings, cascade = options.settings, options.cascade
        self.hosted = Hosted(settings, options.timeout) if settings.azure_endpoint or options.mode != "local" else None
        rules = cascade.told["rules"] if cascade else {}
        edges = {kind: (rule["signal"], rule["quantiles"]) for kind, rule in rules.items() if rule.get("quantiles")}
        self.prices = options.prices.deployment(self.hosted.name) if self.hosted else HostedPrices()
        self.meters = Meters(options.state, worker, edges, priced=self.prices.cost(1, 0, 1) is not None)
        self.audits = Audits(options, self.hosted, self.meters, self.prices) if self.hosted else None
        self.stopped = state.Stopped(options.state)
        self.identity: dict[str, Any] | None = None
        self.mismatches: list[str] = []
        self.since = now()
        connection = connect(settings, replace(options.tracing, optional=True)) if options.tracing else None
        facts = {"track": options.track, "mode": options.mode, "worker": worker, "since": self.since}
        self.traces = Traces(connection, options.state, facts) if connection else None
        self._link: Link | None = None
        self._closing = False
        self._background: set[asyncio.Task[Any]] = set()
        self._running: list[asyncio.Task[None]] = []

    # -- Its life ------------------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        if self.hosted:
            self.hosted.open()
        if self.options.small:
            self._link = Link(self.options.state, self._engine_changed)
            self._running.append(asyncio.create_task(self._link.run()))
        else:
            self._tell()
        self._running.append(asyncio.create_task(self._minutes()))

    async def stop(self) -> None:
        """Let what runs in the background end, in DRAIN_SECONDS at most."""
        self._closing = True
        if self._background:
            await asyncio.wait(self._background, timeout=DRAIN_SECONDS)
        for task in (*self._running, *self._background):
            task.cancel()
        self._end_minute()
        if self.traces:
            await asyncio.to_thread(self.traces.close)
        if self.hosted:
            await self.hosted.close()

    async def _minutes(self) -> None:
        while True:
            await asyncio.sleep(self.options.minute)
            self._end_minute()
            if self.traces and (old := self.traces.old()):
                self._do(asyncio.to_thread(old.close))

    def _end_minute(self) -> None:
        try:
            self.meters.end()
        except OSError as error:
            say(f"{state.MINUTES} cannot be written: {error}")

    def _engine_changed(self, identity: dict[str, Any] | None) -> None:
        self.meters.engine(identity is not None)
        self.identity = identity
        if identity is None and self._closing:
            return
        if identity is None:
            say("the small model's process has ended: the hosted model answers until it is back", self.worker)
            return
        cascade, recipe, before = self.options.cascade, self.options.recipe, self.mismatches
        self.mismatches = []
        if cascade:
            options = self.options
            shots = (options.few_shot.sha256, options.few_shot.count) if options.few_shot else (None, None)
            own = identity_of(identity, options.ask or "native", options.constrain, options.max_new_tokens, *shots)
            self.mismatches += cascade.mismatches(own)
            if cascade.prompts:
                self.mismatches.append(f"{cascade.prompts} calibrated rows are prompts, and chat requests are asked otherwise: calibrate on rows of prepare_data.py --source chat")
            if cascade.schemas is None and options.track == "structured":
                self.mismatches.append(f"the cascade does not say which schemas it was calibrated on, as one of an earlier version: make it anew with {MADE_BY}")
        if recipe:
            try:
                recipe.check(identity)
            except UserError as error:
                self.mismatches.append(str(error))
        if self.mismatches and self.mismatches != before:
            say(f"MISMATCH: the hosted model answers everything, as what is loaded is not what was calibrated: {'; '.join(self.mismatches)}", self.worker)
        self._tell()

    def _tell(self) -> None:
        """Write endpoint.json; one worker does."""
        if self.worker == 0:
            try:
                cascade = self.options.cascade  # its file may be made anew while this one is served: whoever watches needs this one
                state.write_endpoint(self.options.state, self.told() | {"rule": cascade and cascade.told})
            except UserError as error:
                say(str(error))

    def told(self) -> dict[str, Any]:
        """What runs."""
        options = self.options
        cascade, recipe = options.cascade, options.recipe
        return {
            "mode": options.mode,
            "answers": "hosted" if self.mismatches or not options.small else options.mode,
            "track": options.track,
            "cascade": cascade and {"path": display_path(cascade.path), "sha256": cascade.sha256},
            "recipe": recipe and {"path": display_path(recipe.path), "sha256": recipe.sha256},
            "identity": self.identity,
            "mismatches": self.mismatches,
            "hosted": self.hosted and {"model": self.hosted.name, "endpoint": self.hosted.endpoint.place},
            "pid": os.getppid(),
            "since": self.since,
            "audit_share": options.audit_share,
            "workers": options.workers,
        }

    def health(self) -> dict[str, Any]:
        small = "off" if not self.options.small else "up" if self.identity else "down"
        up = state.flag(self.options.state)
        return self.told() | {"small_model": small, "stopped": up and up["why"]}

    def _do(self, work: Coroutine[Any, Any, Any]) -> None:
        """Do something that no client waits for."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: "asyncio.Task[Any]") -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()):
            say(f"in the background: {type(error).__name__}: {error}")

    # -- A chat completion -------------------------------------------------------------------------------------------------------------

    async def chat(self, asked: Incoming) -> Given:
        """The answer of whoever gives it."""
        reason, detail, row = self._eligible(asked)
        shadow = self.options.mode == "shadow"
        task = asyncio.create_task(self._local(row)) if row else None
        if task:
            task.add_done_callback(lambda task: task.cancelled() or task.exception())  # of a reply that is not waited for any more
        try:
            if task and not shadow:
                try:
                    local = await asyncio.wait_for(asyncio.shield(task), self.options.deadline)
                    if local.send and not self.stopped:
                        return self._sent(asked, row, local)
                    reason = "stopped" if local.send else local.reason
                except TimeoutError:
                    reason = "deadline"
                except NotNow as why:
                    reason = str(why)
                except Exception as error:  # whatever it is, the hosted model can answer
                    reason = "unfit"
                    say(f"the small model's reply could not be looked at ({type(error).__name__}): the hosted model answers", every=60)
            try:
                return await self._from_hosted(asked, reason, detail, row, task if shadow else None)
            except HostedDown as down:
                if reason == "deadline" and (local := await self._late(task)) and local.send and not self.stopped:
                    return self._sent(asked, row, local)
                self._failed(asked, reason)
                say(f"the hosted model does not answer ({down})", every=10)
                raise
        finally:
            if task and not shadow and not task.done():
                task.cancel()

    async def _late(self, task: "asyncio.Task[Local] | None") -> Local | None:
        """What the small model says behind its deadline, where the hosted model is down."""
        if task is None:
            return None
        try:
            return await asyncio.wait_for(asyncio.shield(task), self.options.deadline)
        except (TimeoutError, NotNow):
            return None

    def _eligible(self, asked: Incoming) -> tuple[str, str, Asked | None]:
        """(why the hosted model is asked, what of the request, its row where the small model can be asked)."""
        options = self.options
        if options.mode == "hosted":
            return "mode", "", None
        if self.mismatches:
            return "mismatch", "", None
        if self.stopped:
            return "stopped", "", None
        if asked.body is None:
            return "unsupported", "body", None
        if self.hosted and asked.model is not None and asked.model != self.hosted.name:
            return "unsupported", "model", None
        try:
            row = read_chat(options.track, asked.body, asked.id, options.plain_json)
        except Unsupported as what:
            return "unsupported", str(what), None
        if cascade := options.cascade:  # one that names no tools, or no schemas, was measured on none
            for tool in row.example.tools or ():
                if (cascade.tools or {}).get(tool["name"]) != tool_hash(tool):
                    return "tools", tool["name"], None
            if options.track == "structured" and schema_hash(row.example.schema) not in (cascade.schemas or ()):
                return "schema", row.schema_name, None
        return "mode", "", row

    async def _local(self, row: Asked) -> Local:
        """
        Raises:
            NotNow: the small model takes no request.
        """
        request = await asyncio.to_thread(self._request, row) if self.options.few_shot else self._request(row)
        began = time.perf_counter()
        reply = await self._link.ask(request)
        reply = replace(reply, seconds=time.perf_counter() - began)
        if reply.finish_reason == "prompt_too_long":
            return Local(reply, "", (), False, "too_long")
        if reply.finish_reason == "error" and reply.transient:
            raise NotNow("engine_down")
        if reply.finish_reason != "stop":
            return Local(reply, "", (), False, "unfit")
        track, cascade = self.options.track, self.options.cascade
        kind, fit = kind_of(track, reply.text, reply.calls), may_be_sent(track, row, reply)
        tools = tools_of(track, reply) if fit else ()
        self.meters.judged(kind, reply, tools)
        send, why = cascade.local(kind, fit, reply.confidence) if cascade and self.options.mode != "local" else (fit, "local" if fit else "unfit")
        return Local(reply, kind, tools, send, why)

    def _request(self, row: Asked) -> ModelRequest:
        example = replace(row.example, ask=self.options.ask)
        if self.options.few_shot:
            example = replace(example, shots=self.options.few_shot.turns(example))
        return request_of(self.options.track, example)

    def _sent(self, asked: Incoming, row: Asked, local: Local) -> Given:
        """The small model's reply, counted; a share of them is audited."""
        reply = local.reply
        whole = completion(self.options.track, reply, asked.id, asked.model or (self.hosted.name if self.hosted else "slm"))
        asked.counted = True
        self.meters.answered("local", "local", time.perf_counter() - asked.began, (reply.input_tokens, reply.output_tokens))
        self.meters.saved(hosted_price(self.prices, reply))
        if self.audits and self.audits.due():
            self._do(self._audit(asked, row, local))
        else:
            self._trace(asked, "local", "local", local.reply, None)
        if self.options.log_content:
            say(json.dumps({"id": asked.id, "request": asked.body, "local": whole}, default=str))
        kind, body = ("text/event-stream", events(whole, row.usage)) if row.stream else ("application/json", json.dumps(whole).encode())
        return Given(200, [("content-type", kind), (HEADER, "local; reason=local"), ("x-request-id", asked.id)], body)

    async def _audit(self, asked: Incoming, row: Asked, local: Local) -> None:
        hosted = await self.audits.audit(asked.id, local.kind, local.tools, asked.path, asked.body, local.reply)
        self._trace(asked, "local", "local", local.reply, hosted)

    def _trace(self, asked: Incoming, by: str, reason: str, local: Reply | None, hosted: Reply | None) -> None:
        """Tell Langfuse of a request, where it is told."""
        if self.traces and (local if by == "local" else hosted):
            same = agree(self.options.track, local, hosted) if local and hosted else None
            model = self.hosted.name if by == "hosted" else str((self.identity or {}).get("path") or "slm")
            self.traces.answered(asked.id, model, asked.body, by, reason, local, hosted, same)

    def _failed(self, asked: Incoming, reason: str) -> None:
        asked.counted = True
        self.meters.failed(reason)

    # -- The hosted model ------------------------------------------------------------------------------------------------------------------

    async def _from_hosted(
        self, asked: Incoming, reason: str, detail: str, row: Asked | None, shadow: "asyncio.Task[Local] | None"
    ) -> Given:
        """
        Raises:
            HostedDown: it does not answer.
            Refused: there is no hosted model.
        """
        if self.hosted is None:
            if reason in ("queue_full", "deadline", "engine_down", "stopped", "mismatch"):
                raise HostedDown(f"no hosted model is set up, and the small one does not answer ({reason})")
            self._failed(asked, reason)
            told = f"{reason}: {detail}" if detail else reason
            raise Refused(400 if reason in UNLIKE else 502, reason, f"the small model cannot answer this ({told}), and no hosted model is set up")
        head = (HEADER, f"hosted; reason={reason}" + (f"; detail={_token(detail)}" if detail else ""))
        stack = AsyncExitStack()
        url, body = self.hosted.url(asked.path, asked.query, asked.model), self.hosted.body(asked.raw, asked.body, asked.model)
        try:
            began = time.perf_counter()
            response = await stack.enter_async_context(self.hosted.send(asked.method, url, asked.headers, body))
            headers = [*answered_headers(response), head]
            stream = "text/event-stream" in response.headers.get("content-type", "")
            if not stream:
                data = await self.hosted.read(response)
                self._hosted_answered(asked, reason, row, response.status_code, data, False, began, shadow)
                await stack.aclose()
                return Given(response.status_code, headers, data)
        except BaseException:
            await stack.aclose()
            if shadow:
                shadow.cancel()
            raise

        parts = self._passed_on(asked, reason, row, response, stack, began, shadow)
        await anext(parts)  # one that has not begun would not close the connection when it is closed itself
        return Given(response.status_code, headers, parts)

    async def _passed_on(
        self, asked: Incoming, reason: str, row: Asked | None, response: "httpx2.Response", stack: AsyncExitStack, began: float,
        shadow: "asyncio.Task[Local] | None",
    ) -> AsyncIterator[bytes]:
        """A hosted stream's parts as they come, behind an empty one. It is counted when it ends: as answered, as failed where it broke off, and not at all
        where the client has gone before.

        Raises:
            HostedDown: it broke off.
        """
        kept, sent, last, whole = bytearray(), 0, b"", False
        async with stack:
            try:
                yield b""
                with told_down():
                    async for part in self.hosted.parts(response):
                        if len(kept) < KEPT:
                            kept += part
                        yield part
                        sent, last = sent + len(part), (last + part)[-LAST:]
                # A connection that ends with its body says nothing of where the reply broke off.
                whole = not _tells_its_end(asked, response) or is_whole(bytes(kept) if sent <= len(kept) else last, _choices(asked))
                if not whole:
                    self._broke_off(asked, reason, "it ended before its reply did", shadow)
            except (GeneratorExit, asyncio.CancelledError):
                said = bytes(kept[:sent]) if sent <= len(kept) else last
                whole = is_whole(said, _choices(asked))  # many clients leave as soon as they have read the end
                if not whole and tells_error(said):  # or an error
                    self._failed(asked, reason)
                if shadow and not whole:
                    shadow.cancel()
                raise
            except Exception as error:
                self._broke_off(asked, reason, str(error) if isinstance(error, HostedDown) else type(error).__name__, shadow)
                raise
            finally:
                if whole:
                    self._hosted_answered(asked, reason, row, response.status_code, bytes(kept), True, began, shadow)

    def _broke_off(self, asked: Incoming, reason: str, why: str, shadow: "asyncio.Task[Local] | None") -> None:
        self._failed(asked, reason)
        say(f"the hosted model's stream broke off ({why})", every=10)
        if shadow:
            self._do(self._beside(asked, shadow, None))  # the small model's reply counts, with nothing to compare it with

    def _hosted_answered(
        self, asked: Incoming, reason: str, row: Asked | None, status: int, data: bytes, stream: bool, began: float, shadow: "asyncio.Task[Local] | None"
    ) -> None:
        """Count a hosted answer; where the small model answers beside it, compare both in the background."""
        reply = None
        if status == 200 and len(data) <= KEPT:
            try:
                reply = read_completion(joined(data) if stream else json.loads(data), self.options.track == "toolcall")
            except (ValueError, RecursionError):
                reply = None
        seconds = time.perf_counter() - asked.began
        tokens = (reply.input_tokens, reply.output_tokens) if reply else (None, None)
        asked.counted = True
        self.meters.answered("hosted", reason, seconds, tokens)
        if reply:
            reply = replace(reply, seconds=time.perf_counter() - began)
        if self.options.log_content:
            say(json.dumps({"id": asked.id, "request": asked.body, "hosted": data.decode("utf-8", "replace")}, default=str))
        if shadow:
            self._do(self._beside(asked, shadow, reply))
        else:
            self._trace(asked, "hosted", reason, None, reply)

    async def _beside(self, asked: Incoming, task: "asyncio.Task[Local]", hosted: Reply | None) -> None:
        """Shadow: the small model's reply beside the hosted one, compared where a cascade would have sent it."""
        try:
            local = await asyncio.wait_for(task, self.options.deadline)
        except (TimeoutError, NotNow):
            local = None
        if local and local.send and hosted and self.audits:
            self.audits.compared(asked.id, local.kind, local.tools, asked.body, local.reply, hosted, hosted.seconds, paid=False)
        self._trace(asked, "hosted", "mode", local.reply if local else None, hosted)

    async def other(self, asked: Incoming) -> Given:
        """Anything that is no chat completion: the hosted model's alone.

        Raises:
            HostedDown, Refused: as of `chat`.
        """
        if self.hosted is None:
            raise Refused(404, "not_found", f"{asked.path} is not here, and no hosted model is set up")
        if self.options.keys and not (asked.method in ("GET", "POST") and ASKING.fullmatch(asked.path)):
            raise Refused(403, "not_passed_on", f"{asked.method} {asked.path} is not passed on to the hosted model: its key is not the clients'")
        return await self._from_hosted(asked, "unsupported", "path", None, None)

    def models(self) -> dict[str, Any]:
        """What is served, as /v1/models tells it."""
        name = self.hosted.name if self.hosted else "slm"
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "slm_swap"}]}


def _tells_its_end(asked: Incoming, response: "httpx2.Response") -> bool:
    """Whether an answer is a stream that says where its reply ends: a chat completion's, which can be read here."""
    return response.status_code == 200 and CHAT.fullmatch(asked.path) is not None and is_decoded(response)


def _choices(asked: Incoming) -> int:
    """How many choices a request asks for."""
    number = (asked.body or {}).get("n")
    return number if isinstance(number, int) and number > 0 else 1


def _token(text: str) -> str:
    """A detail as it may stand in a header."""
    return "".join(letter if letter.isascii() and (letter.isalnum() or letter in "_-.") else "_" for letter in text)[:64]
