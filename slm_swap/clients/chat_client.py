"""A model behind a server of chat completions, as a client: async inside, `generate(batch)` outside.

HTTP, retries and back-off are the openai package's: 408, 409, 429, 5xx, time-outs and broken connections are tried again after
`retry-after-ms` or `Retry-After` (up to 120 seconds; a longer wait ends the row), else after 0.5, 1, 2, 4, 8, 8... seconds.
When a request may be sent, a first or a later try, is the quota's to say, where the server tells of one: see `quota`.
"""

import asyncio
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Container, Generator, Iterable
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import replace
from itertools import islice
from typing import Any

from slm_swap.clients.chat_requests import OPTIONS, length, request_body
from slm_swap.clients.completions import REJECTIONS, Refusal, read_completion, refused_request, rejected_parameter, takes_no_tools
from slm_swap.clients.endpoint import Endpoint, Variables, is_loopback, open_client, proxy_secrets
from slm_swap.clients.pricing import load_prices
from slm_swap.clients.protocol import Reply
from slm_swap.clients.quota import Quota
from slm_swap.clients.tries import AskedRow, Try
from slm_swap.common.errors import UserError
from slm_swap.common.secrets import scrub
from slm_swap.common.settings import Settings, load_proxies
from slm_swap.rows.prompts import Request

OTHER_LIMIT = {"max_completion_tokens": "max_tokens", "max_tokens": "max_completion_tokens"}
UNREACHABLE = {"ConnectError", "ConnectTimeout", "ProxyError"}  # what httpx calls a server that was never spoken to
CONNECT_SECONDS = 10.0
LOOK_SECONDS = 0.05  # between two looks at the quota: answers that come meanwhile may allow more
TYPICAL_CHARACTERS, TYPICAL_TOKENS = 4000, 1000  # of English prompts, until the answers tell
DENIED_FIRST, DENIED_LATER = 5, 20  # rows in a row that got a 403, before any and after some were answered, until the key is looked at
HARMLESS = Request([{"role": "user", "content": "Reply with the word yes."}])
PLAIN_HEADERS = re.compile("host|accept|accept-encoding|connection|content-.*|user-agent|x-stainless-.*")


_row: ContextVar[AskedRow] = ContextVar("row")  # of this task


class ChatClient:
    """One model of a server, asked `concurrency` rows at a time; `timeout` in seconds counts per try.

    `named` are the variables that messages speak of, `identity` what the client is besides its parameters. A request carries `key`, or
    the token that `token()` gives, or neither. `template_variables` are for the server's chat template, `more` are further parameters. Parameters that the server does not take are dropped for the whole run (the two names of
    the token limit are swapped first). A row that fails for good is a Reply with its error; a fault of the set-up ends the run.

    Raises:
        UserError: the key, the concurrency or a proxy is none; in `generate`: the key, model or API version is refused, or the host cannot be
            reached and has not answered before.
    """

    kind: str
    over_http = True  # rows are asked `concurrency` at a time, and measured while they are

    def __init__(
        self,
        settings: Settings,
        endpoint: Endpoint,
        named: Variables,
        identity: dict[str, Any],
        key: str | None,
        token: Callable[[], str] | None,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 42,
        concurrency: int = 32,
        timeout: float = 60.0,
        max_retries: int = 6,
        template_variables: dict[str, Any] | None = None,
        more: dict[str, Any] | None = None,
    ) -> None:
        started = time.perf_counter()
        if key and not re.fullmatch(r"[!-~]+", key):
            raise UserError(f"{named.key} has characters that no key has: copy it again")
        if concurrency < 1:
            raise UserError(f"concurrency={concurrency} asks nothing: give 1 or more")
        self.endpoint, self.named, self._key, self._token = endpoint, named, key, token
        self.prices = load_prices(settings.prices_file)
        # Every server knows `max_tokens` but OpenAI's and Azure's newest models; some ignore the newer name, and then nothing limits them.
        limit = "max_tokens" if endpoint.form == "openai" and endpoint.host != "api.openai.com" else "max_completion_tokens"
        self._parameters = {"temperature": temperature, "seed": seed, limit: max_new_tokens} | (more or {})
        self._extra = {"chat_template_kwargs": template_variables} if template_variables else {}  # of vLLM, SGLang and llama.cpp
        self.identity = identity | {"parameters": dict(self._parameters)}
        self._dropped: list[str] = []
        self._served: dict[str, set[str]] = {"model": set(), "system_fingerprint": set()}
        self._secrets = {*settings.secrets, *proxy_secrets()}
        self._answered = self._tried = False
        self._denied = 0  # rows in a row that got a 403
        self._good: Request | None = None  # one that was answered
        self._concurrency = concurrency
        self._quota, self._characters, self._prompt_tokens = Quota(), TYPICAL_CHARACTERS, TYPICAL_TOKENS
        self._first, self._turn, self._token_lock, self._checking = (asyncio.Lock() for _ in range(4))
        self._openai = self._connect(timeout, max_retries)
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._live(ready)), name="chat-client", daemon=True)
        self._thread.start()
        ready.wait()
        self.load_seconds = time.perf_counter() - started

    def _connect(self, timeout: float, max_retries: int) -> Any:
        import openai

        http_client = open_client(
            openai.DefaultAsyncHttpxClient,
            self.endpoint.host,
            timeout=openai.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS)),
            event_hooks={"request": [self._sign, self._wait_for_quota], "response": [self._note_answer]},
        )
        return openai.AsyncOpenAI(
            api_key="set by _sign",
            base_url=self.endpoint.base_url,
            default_query=self.endpoint.query,
            timeout=http_client.timeout,
            max_retries=max_retries,
            http_client=http_client,
        )

    async def _sign(self, request: Any) -> None:
        """Send the one credential, and none of the headers that the openai package takes from OPENAI_* variables."""
        for name in [name for name in request.headers if not PLAIN_HEADERS.fullmatch(name)]:
            del request.headers[name]
        if self._key:
            name, scheme = ("Authorization", "Bearer ") if self.endpoint.bearer else ("api-key", "")
            request.headers[name] = f"{scheme}{self._key}"
        if self._token is None or self._key:
            return
        failure = None
        async with self._token_lock:
            try:
                token = await asyncio.to_thread(self._token)
            except Exception as error:  # the classes belong to an optional package
                failure = self._one_line(error)
        if failure is not None:
            raise UserError(f"Entra ID gave no token ({failure}): run `az login`, or set AZURE_API_KEY")
        self._secrets.add(token)
        request.headers["Authorization"] = f"Bearer {token}"

    async def _wait_for_quota(self, request: Any) -> None:
        """Hold a request back until the quota has room for it; first come, first served."""
        row, since = _row.get(), time.perf_counter()
        self._give_up(row)
        async with self._turn:
            while (wait := self._quota.wait(row.tokens)) > 0:
                await asyncio.sleep(min(wait, LOOK_SECONDS))
            marks = self._quota.take(row.tokens)
        row.held += time.perf_counter() - since
        row.tries.append(Try(marks, row.clock()))

    def _give_up(self, row: AskedRow) -> None:
        """Where a row's last try got no answer, none is waited for any more."""
        if row.tries and row.tries[-1].answered is None:
            self._quota.lost()

    async def _note_answer(self, response: Any) -> None:
        self._answered, this = True, _row.get().tries[-1]
        this.answered, this.status = _row.get().clock(), response.status_code
        self._quota.told(this.marks, response.status_code, response.headers)

    def _charge(self, request: Request) -> float:
        """What Azure will charge for a request when it comes in: the prompt's tokens, by the rate of characters so far, and the limit."""
        characters = length(request)
        limits = (self._parameters.get(name, 0) for name in OTHER_LIMIT)
        return characters * self._prompt_tokens / self._characters + sum(limits)

    async def _live(self, ready: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        ready.set()
        await self._stop.wait()
        await self._openai.close()

    def generate(self, batch: list[Request]) -> list[Reply]:
        """One Reply a row, in order."""
        replies = dict(self.stream(enumerate(batch)))
        return [replies[index] for index in range(len(batch))]

    def stream(self, rows: Iterable[tuple[int, Request]], answered: Container[int] = ()) -> Generator[tuple[int, Reply]]:
        """Each row's Reply as its request ends; the next row is asked in its place.

        Leaving early, Ctrl-C and a fault of the set-up cancel the requests that are under way.
        """
        if not self._thread.is_alive():
            raise RuntimeError("this client is closed")
        rows, under_way = (row for row in rows if row[0] not in answered), 0
        ended: queue.SimpleQueue[tuple[int, asyncio.Task[Reply]]] = queue.SimpleQueue()
        tasks: set[asyncio.Task[Reply]] = set()  # touched in the loop's thread alone

        def start(index: int, request: Request) -> None:
            task = self._loop.create_task(self._ask(request))
            tasks.add(task)
            task.add_done_callback(lambda task: end(index, task))

        def end(index: int, task: "asyncio.Task[Reply]") -> None:
            tasks.discard(task)
            if task.cancelled() or task.exception():
                cancel()
            ended.put((index, task))

        def cancel() -> None:
            for task in tasks:
                task.cancel()

        try:
            while True:
                for row in islice(rows, self._concurrency - under_way):
                    self._loop.call_soon_threadsafe(start, *row)
                    under_way += 1
                if not under_way:
                    return
                index, task = ended.get()
                under_way -= 1
                yield index, task.result()
        finally:
            if under_way:
                self._loop.call_soon_threadsafe(cancel)

    def ask(self, request: Request) -> "Future[Reply]":
        """One row's Reply to come, besides what `stream` asks; cancelling it ends its request."""
        return asyncio.run_coroutine_threadsafe(self._ask(request), self._loop)

    async def _ask(self, request: Request) -> Reply:
        if not self._tried:  # one row goes ahead: a wrong key or a parameter to drop costs one refusal, not `concurrency`
            async with self._first:
                if not self._tried:
                    reply = await self._ask_and_look(request)
                    self._tried = not self._denied  # a row that was denied says nothing of the next one
                    return reply
        return await self._ask_and_look(request)

    async def _ask_and_look(self, request: Request) -> Reply:
        reply = await self._ask_now(request)
        if self._denied >= self._suspicious:
            await self._check_key()
        return reply

    async def _ask_now(self, request: Request) -> Reply:
        import openai

        create = self._openai.chat.completions.with_raw_response.create
        row, reply = AskedRow(self._charge(request)), None
        _row.set(row)
        while reply is None:
            body = {name: value for name, value in request_body(request).items() if name not in self._dropped}
            sent, failure = body | self._parameters, None
            try:
                response = await create(model=self.endpoint.deployment, **sent, extra_body=self._extra or None)
                reply = self._accept(response.http_response.json(), request)
                self._good, self._denied = request, 0
            except openai.OpenAIError as error:
                failure = error
            except (ValueError, RecursionError):
                answered = bool(row.tries and row.tries[-1].answered is not None)  # a gateway's page: the service behind it may be out
                reply = Reply("", "error", error="the request cannot be encoded, or its reply is not JSON", transient=answered)
            if failure and not self._drop_rejected(refusal := Refusal.of(failure), sent):
                reply = self._fail(failure, refusal)
        self._give_up(row)
        if reply.input_tokens:
            self._prompt_tokens += reply.input_tokens
            self._characters += length(request)
        limit = next((sent[name] for name in OTHER_LIMIT if name in sent), None)
        return replace(reply, seconds=row.clock(), retries=row.retries(), limit=limit)

    @property
    def _suspicious(self) -> int:
        return DENIED_LATER if self._good else DENIED_FIRST

    async def _check_key(self) -> None:
        """After some rows in a row that were denied: ask one again that was answered before, or something harmless.

        Raises:
            UserError: it is denied too, so that it is not for what the rows say.
        """
        async with self._checking:
            if self._denied < self._suspicious:
                return
            before, self._denied = self._denied, 0
            reply = await self._ask_now(self._good or HARMLESS)
            if self._denied:
                what = "one that was answered before" if self._good else "a harmless request"
                raise UserError(f"{self._where} denied {before} rows in a row, and {what} ({reply.error}): {self._key_advice}")

    def _accept(self, body: Any, request: Request) -> Reply:
        reply = read_completion(body, request.native)
        for name, seen in self._served.items():
            if isinstance(body, dict) and isinstance(body.get(name), str):
                seen.add(self._scrub(body[name]))
        calls = reply.calls and [{name: self._clean(text) for name, text in call.items()} for call in reply.calls]
        return replace(reply, text=self._clean(reply.text), calls=calls)

    def _clean(self, text: str) -> str:
        """What a model wrote as any file can hold it: through UTF-16, halves of surrogate pairs join or become U+FFFD."""
        return scrub(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), self._secrets, data=True)

    def _drop_rejected(self, refusal: Refusal, sent: dict[str, Any]) -> bool:
        """Drop or swap the parameter that the server did not take: True to ask again. Another row may have done it already.

        Raises:
            UserError: it is the tools, without which no call can be made, or what switches thinking.
        """
        name = rejected_parameter(refusal.status, refusal.code, refusal.param, refusal.message, refusal.body)
        if "tools" in sent and (name == "tools" or takes_no_tools(refusal.status, refusal.message)):
            raise UserError(f"{self._where} takes no tools ({self._one_line(refusal.message)}): evaluate with --ask text, or choose another")
        if name in self._extra:
            raise UserError(f"{self._where} takes no {name} ({self._one_line(refusal.message)}): leave --thinking out, and switch it at the server")
        if name not in sent or name == "messages":
            return False
        if name in OPTIONS and name not in self._dropped:
            self._dropped.append(name)
            reason = self._one_line(refusal.message)
            print(f"warning: {self._where} takes no {name}: rows are asked without it ({reason})", file=sys.stderr, flush=True)
        if name in self._parameters:
            value = self._parameters.pop(name)
            self._dropped.append(name)
            other = OTHER_LIMIT.get(name)
            if other and other not in self._dropped:
                self._parameters[other] = value
        return True

    def _fail(self, failure: Exception, refusal: Refusal) -> Reply:
        """What a failed request means for its row.

        Raises:
            UserError: every row would fail alike.
        """
        status, reason = refusal.status, self._one_line(refusal.message)
        if ended := refused_request(status, refusal.code, refusal.message, refusal.text):
            return Reply("", ended, error=reason if ended == "prompt_too_long" else None)
        cause, advice = failure.__cause__, self._advice(refusal)
        if status is None and type(cause).__name__ in UNREACHABLE and not self._answered:
            proxies = "" if is_loopback(self.endpoint.host) else "".join(f", {name}" for name in load_proxies())
            reason, advice = self._one_line(cause), f"check {self.named.url}{proxies} and the network"
        if status == 403:  # of this row, or of every row: the others tell
            self._denied, advice = self._denied + 1, None
            reason += "" if self._good else f" (no row was answered before it: {self._key_advice})"
        if advice:
            raise UserError(f"{self._where} does not answer ({status or 'no connection'}: {reason}): {advice}")
        request = getattr(failure, "request", None)
        tries = 1 + int(request.headers.get("x-stainless-retry-count", 0)) if request is not None else 1
        kind = status or ("time-out" if "Timeout" in type(failure).__name__ else "connection error")
        detail = reason if status or not cause else self._one_line(cause) or type(cause).__name__
        passing = status is None or status in (408, 409, 429) or status >= 500
        return Reply("", "error", error=f"{kind} after {tries} {'try' if tries == 1 else 'tries'}: {detail}", transient=passing)

    @property
    def _where(self) -> str:
        return f"{'model' if self.endpoint.form == 'openai' else 'deployment'} {self.endpoint.deployment!r} at {self.endpoint.host}"

    @property
    def _key_advice(self) -> str:
        if not self._key and self._token is None:
            return f"set {self.named.key}"
        return f"check that {self.named.key} belongs to the resource of {self.named.url} and may use it{self.endpoint.hint}"

    def _advice(self, refusal: Refusal) -> str | None:
        """What to do about a fault of the set-up; None for an error of one row."""
        status, code, named = refusal.status, refusal.code, self.named
        others = [named.model, named.url, *([named.version] if named.version and self.endpoint.form != "openai" else [])]
        if status in (401, 403):
            return self._key_advice
        if status == 404 or code in ("unknown_model", "OperationNotSupported"):
            return f"check {', '.join(others[:-1])} and {others[-1]}{self.endpoint.hint}"
        if status is not None and 300 <= status < 400:
            return f"the server sends us elsewhere; set {named.url} to the final address"
        if status == 400 and named.version and re.search(r"api[- ]version", refusal.message, re.IGNORECASE):
            return f"check {named.version}"
        if status == 400 and code in REJECTIONS:
            return f"this deployment does not take such requests; choose another {named.model}"
        return None

    def _scrub(self, text: str) -> str:
        return scrub(text, self._secrets)

    def _one_line(self, what: object) -> str:
        return " ".join(self._scrub(str(what)).encode("utf-8", "replace").decode().split())[:300]

    def state(self) -> dict[str, Any]:
        """The parameters that are really sent, and what served them."""
        served = {name: sorted(values) for name, values in self._served.items()}
        return {
            "parameters": dict(self._parameters),
            "dropped_parameters": list(self._dropped),
            "served_model": served["model"],
            "system_fingerprint": served["system_fingerprint"],
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._parameters, self._dropped = dict(state["parameters"]), list(state["dropped_parameters"])
        self._served = {"model": set(state["served_model"]), "system_fingerprint": set(state["system_fingerprint"])}

    def count_tokens(self, text: str) -> int | None:
        return None  # the deployment's tokenizer is not here

    def forget(self) -> None: ...

    def describe(self) -> dict[str, Any]:
        """What was asked and what served it: host only. No secret."""
        return self.identity | self.state()

    def close(self) -> None:
        """End the connections and the thread; may be called twice."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()
