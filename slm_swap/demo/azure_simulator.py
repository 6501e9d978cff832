"""A simulator of Azure OpenAI's chat completions on loopback, for the quickstart and the tests. It is not a language model.

    python demo/azure_simulator.py --references 02_dataset/toolcall/test.jsonl --key local --mistake-rate 0.1
    python demo/azure_simulator.py --references FILE --port 8099 --rate-limit 0.2 --unsupported-parameters seed,temperature

The first line of its output is the URL (for AZURE_ENDPOINT); its /v1 is an OpenAI-compatible server (for SLM_BASE_URL).
GET /simulator/stats counts the requests by outcome. A reply is that of the reference whose prompt is the last user message, or whose
conversation is the one that was asked, in text or native form (the first one where several are); a request with `tools` is answered
by `tool_calls`. A share of `mistake_rate` of the replies is spoilt. What has no reference gets the text UNKNOWN_PROMPT. Everything
drawn depends on the seed and on what is asked alone (and, for faults of the transport, on the attempt): not on the order of requests.
A token is estimated as 4 bytes of UTF-8, rounded up; of a prompt, every message counts as its role, its content and two line ends.
"""

import argparse
import asyncio
import hashlib
import json
import math
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere

from slm_swap.cli import Parser, next_step, not_negative, positive, run
from slm_swap.common.errors import UserError
from slm_swap.common.settings import shown_path
from slm_swap.demo.mistakes import draw
from slm_swap.demo.simulator_parts import (
    BYTES_PER_TOKEN,
    Answer,
    Bucket,
    Faults,
    bad_request,
    count_tokens,
    error_answer,
    events_of,
    filter_results,
    logprobs_of,
    too_many,
)  # fmt: skip
from slm_swap.demo.simulator_replies import Replies, as_message
from slm_swap.rows.examples import Example, read_examples
from slm_swap.verdict.evaluations import SIMULATOR

if TYPE_CHECKING:
    from aiohttp import web

MODEL = SIMULATOR
CACHE_FROM, CACHE_STEP = 1024, 128  # tokens: Azure caches prompt prefixes from 1,024 tokens up, in steps of 128


class AzureSimulator:
    """The server, in a thread of its own: `with AzureSimulator(read_examples(path)) as server: server.url`.

    `key` is accepted as `api-key` or as a bearer token. `counts` holds the requests by outcome. The quotas charge one
    request, and the prompt's tokens plus the reply's limit, as Azure does; None is no quota. `window_seconds` of it may be used at
    once: Azure watches requests over 1 or 10 seconds and tokens over a minute.

    Raises:
        UserError: a rate or a quota out of bounds, or (on start) a port that is taken.
    """

    def __init__(
        self,
        references: Iterable[Example],
        *,
        key: str = "simulator-key",
        deployment: str = "simulator",
        mistake_rate: float = 0.0,
        seed: int = 42,
        faults: Faults | None = None,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        window_seconds: float = 60.0,
        port: int = 0,
    ) -> None:
        if not 0 <= mistake_rate <= 1:
            raise UserError(f"mistake_rate={mistake_rate} is not between 0 and 1: choose another")
        quotas = {"requests": requests_per_minute, "tokens": tokens_per_minute}
        for name, quota in quotas.items():
            if quota is not None and quota < 1:
                raise UserError(f"{name}_per_minute={quota} lets nothing through: give 1 or more, or leave it out")
        if not 0 < window_seconds <= 60:
            raise UserError(f"window_seconds={window_seconds} is not a part of a minute: give more than 0 and at most 60")
        self.key, self.deployment, self.mistake_rate, self.seed = key, deployment, mistake_rate, seed
        self.faults = faults or Faults()
        self.port = port
        self.counts: Counter[str] = Counter()
        self.most_in_flight = 0
        self._in_flight = 0
        self.replies = Replies(references, mistake_rate, seed)
        self.buckets = {name: Bucket(quota, window_seconds) for name, quota in quotas.items() if quota is not None}
        self._attempts: Counter[str] = Counter()
        self._cached: set[bytes] = set()

    # What is said

    def reply_text(self, prompt: str) -> tuple[str, str]:
        """(outcome, text) for a prompt: "answered", "mistake:<kind>" or "unknown_prompt". The same on every call."""
        return self.replies.reply(*self.replies.find([{"role": "user", "content": prompt}]), prompt)

    def _cached_tokens(self, text: str) -> int:
        """How much of this prompt was seen before; remembers the prompt."""
        data, prefix, cached, start = text.encode("utf-8", "replace"), hashlib.sha256(), 0, 0
        for tokens in range(CACHE_FROM, len(data) // BYTES_PER_TOKEN + 1, CACHE_STEP):
            prefix.update(data[start : tokens * BYTES_PER_TOKEN])
            start = tokens * BYTES_PER_TOKEN
            cached = tokens if prefix.digest() in self._cached else cached
            self._cached.add(prefix.digest())
        return cached

    def _completion(self, prompt: str, said: tuple[str, str], chat: str, limit: int | None, native: bool, logprobs: bool) -> Answer:
        outcome, text = said
        finish, refusal, filtered = "stop", None, False
        if draw(self.seed, "refusal", prompt) < self.faults.refusal:
            outcome, text, refusal = "refusal", "", "I'm sorry, but I can't help with that."
        elif draw(self.seed, "filtered_completion", prompt) < self.faults.filtered_completion:
            outcome, text, finish, filtered = "filtered_completion", text[: len(text) // 2], "content_filter", True
        elif limit is not None and count_tokens(text) > limit:
            text = text.encode("utf-8", "replace")[: limit * BYTES_PER_TOKEN].decode("utf-8", "ignore")
            outcome, finish = "length", "length"
        message = as_message(text, outcome, native) if refusal is None else {"content": None}
        finish = "tool_calls" if finish == "stop" and "tool_calls" in message else finish
        used, written = count_tokens(chat), count_tokens(text or refusal or "")
        choice = {
            "index": 0,
            "finish_reason": finish,
            "logprobs": logprobs_of(text, -draw(self.seed, "logprob", prompt)) if logprobs else None,
            "message": {"role": "assistant", "refusal": refusal} | message,
            "content_filter_results": filter_results(filtered),
        }
        body = {
            "id": f"chatcmpl-{hashlib.sha256(chat.encode('utf-8', 'replace')).hexdigest()[:24]}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": MODEL,
            "system_fingerprint": f"fp_simulator_{self.seed}",
            "prompt_filter_results": [{"prompt_index": 0, "content_filter_results": filter_results(False)}],
            "choices": [choice],
            "usage": {
                "prompt_tokens": used,
                "completion_tokens": written,
                "total_tokens": used + written,
                "prompt_tokens_details": {"cached_tokens": self._cached_tokens(chat)},
            },
        }
        return Answer(200, body, outcome)

    # What is refused

    def _check_access(self, request: "web.Request") -> Answer | None:
        bearer = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.key not in (request.headers.get("api-key"), bearer):
            text = "Access denied due to invalid subscription key or wrong API endpoint. Make sure to provide a valid key."
            return error_answer(401, "unauthorized", text, "401")
        version, v1 = request.query.get("api-version"), request.path.startswith(("/openai/v1/", "/v1/"))
        if v1 and version and version[0].isdigit():
            return error_answer(400, "bad_request", "api-version query parameter is not allowed when using /v1 path", "BadRequest")
        if "elsewhere" in request.match_info or not (v1 or version):
            return error_answer(404, "not_found", "Resource not found", "404")
        return None

    def _check_body(self, body: Any) -> Answer | None:
        if not isinstance(body, dict):
            return bad_request("We could not parse the JSON body of your request.")
        messages = body.get("messages")
        messages = messages if isinstance(messages, list) else []
        if not all(isinstance(item, dict) and _has_text(item) for item in messages):
            return bad_request("Invalid 'messages': this simulator takes texts only.", "messages")
        if not any(item.get("role") == "user" for item in messages):
            return bad_request("Invalid 'messages': a list with a user message is needed.", "messages")
        tools = body.get("tools", [])
        functions = [tool.get("function") if isinstance(tool, dict) else None for tool in tools] if isinstance(tools, list) else [None]
        if not all(isinstance(function, dict) and isinstance(function.get("name"), str) for function in functions):
            return bad_request("Invalid 'tools': a list of functions is needed.", "tools", "invalid_value")
        for name in body:
            if name in self.faults.unrecognized_parameters:
                return bad_request(f"Unrecognized request argument supplied: {name}", outcome="unsupported_parameter")
            if name in self.faults.unsupported_parameters and not (name == "temperature" and body[name] == 1):
                return self._unsupported(name, body[name])
        for name in ("max_tokens", "max_completion_tokens"):
            value = body.get(name, 1)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                return bad_request(f"Invalid '{name}': an integer of 1 or more is needed.", name, "invalid_value")
        return None

    def _unsupported(self, name: str, value: Any) -> Answer:
        text, code = f"Unsupported parameter: '{name}' is not supported with this model.", "unsupported_parameter"
        if name == "max_tokens":
            text += " Use 'max_completion_tokens' instead."
        elif name == "temperature":
            code = "unsupported_value"
            text = f"Unsupported value: 'temperature' does not support {value} with this model. Only the default (1) value is supported."
        return bad_request(text, name, code, "unsupported_parameter")

    def _check_quota(self, charges: dict[str, float]) -> Answer | None:
        wait = max((bucket.wait(charges[name]) for name, bucket in self.buckets.items()), default=0.0)
        if wait > 0:
            return too_many("quota", wait)
        for name, bucket in self.buckets.items():
            bucket.take(charges[name])
        return None

    def _quota_headers(self) -> dict[str, str]:
        headers = {}
        for name, bucket in self.buckets.items():
            headers[f"x-ratelimit-limit-{name}"] = str(bucket.per_minute)
            headers[f"x-ratelimit-remaining-{name}"] = str(int(bucket.level))
            headers[f"x-ratelimit-reset-{name}"] = str(math.ceil(bucket.wait(bucket.capacity)))
        return headers

    def _check_faults(self, prompt: str) -> Answer | None:
        self._attempts[prompt] += 1
        if draw(self.seed, "content_filter", prompt) < self.faults.content_filter:
            text = "The response was filtered due to the prompt triggering Azure OpenAI's content management policy."
            inner = {"code": "ResponsibleAIPolicyViolation", "content_filter_result": filter_results(True)}
            return error_answer(400, "content_filter", text, "content_filter", param="prompt", type=None, status=400, innererror=inner)
        if self._hit("rate_limit", prompt):
            wait = self.faults.retry_after_seconds
            headers = {"limit": "60", "remaining": "0", "reset": str(math.ceil(wait))}
            limits = {f"x-ratelimit-{key}-{name}": value for key, value in headers.items() for name in ("requests", "tokens")}
            return too_many("rate_limit", wait, limits)
        if self._hit("server_error", prompt):
            text = "The server had an error while processing your request. Sorry about that!"
            return error_answer(500, "server_error", text, None, type="server_error")
        return None

    def _hit(self, fault: str, prompt: str) -> bool:
        return draw(self.seed, fault, prompt, self._attempts[prompt]) < getattr(self.faults, fault)

    def answer(self, request: "web.Request", raw: bytes) -> Answer:
        """Decide on one request; the state of quotas, attempts and cache moves on."""
        refused = self._check_access(request)
        if refused:
            return refused
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError):
            body = None
        refused = self._check_body(body)
        if refused:
            return refused
        model = request.match_info.get("deployment", body.get("model"))
        if model != self.deployment:
            text = "The API deployment for this resource does not exist. If you created it within the last 5 minutes, wait and try again."
            return error_answer(404, "deployment_not_found", text, "DeploymentNotFound")
        subject, reference = self.replies.find(body["messages"])
        offered = json.dumps(body["tools"]) if body.get("tools") else ""
        chat = "".join(f"{item.get('role')}\n{_written(item)}\n" for item in body["messages"]) + offered
        limits = [body[name] for name in ("max_tokens", "max_completion_tokens") if name in body]
        charges = {"requests": 1, "tokens": count_tokens(chat) + min(limits, default=0)}
        refused = self._check_quota(charges) or self._check_faults(subject)
        if refused:
            return refused
        said = self.replies.reply(subject, reference, offered or chat)
        reply = self._completion(subject, said, chat, min(limits, default=None), bool(offered), body.get("logprobs") is True)
        cut_off = self._hit("cut_off", subject)
        delay = self.faults.slow_seconds if self._hit("slow", subject) else 0.0
        outcome = "cut_off" if cut_off else "slow" if delay else reply.outcome
        usage = (body.get("stream_options") or {}).get("include_usage") is True
        events = events_of(reply.body, usage) if body.get("stream") else ()
        return Answer(200, reply.body, outcome, delay=delay, cut_off=cut_off, events=events)

    # How it is served

    async def handle(self, request: "web.Request") -> "web.StreamResponse":
        """Answer one request over HTTP."""
        from aiohttp import web

        self._in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self._in_flight)
        try:
            answer = self.answer(request, await request.read())
            self.counts[answer.outcome] += 1
            headers = {"x-ms-region": "Simulated", **self._quota_headers(), **answer.headers}
            await asyncio.sleep(answer.delay)
            if answer.events:
                return await self._stream(request, answer, headers)
            if not answer.cut_off:
                return web.json_response(answer.body, status=answer.status, headers=headers)
            body = json.dumps(answer.body).encode()
            response = web.StreamResponse(headers={**headers, "Content-Type": "application/json"})
            response.content_length = len(body)
            await response.prepare(request)
            await response.write(body[: len(body) // 2])
            if request.transport is not None:  # the other side may be gone already
                request.transport.close()
            return response
        finally:
            self._in_flight -= 1

    async def _stream(self, request: "web.Request", answer: Answer, headers: dict[str, str]) -> "web.StreamResponse":
        from aiohttp import web

        response = web.StreamResponse(headers={**headers, "Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        for event in answer.events[: len(answer.events) // 2 if answer.cut_off else None]:
            await response.write(event)
        if answer.cut_off and request.transport is not None:
            request.transport.close()
        return response

    async def _stats(self, request: "web.Request") -> "web.Response":
        from aiohttp import web

        quotas = {name: {"used": bucket.used, "permitted": bucket.permitted} for name, bucket in self.buckets.items()}
        return web.json_response({"counts": dict(self.counts), "most_in_flight": self.most_in_flight, "quotas": quotas})

    async def _models(self, request: "web.Request") -> "web.Response":
        from aiohttp import web

        return web.json_response({"object": "list", "data": [{"id": self.deployment, "object": "model"}]})

    async def _serve(self, started: "Future[int]") -> None:
        from aiohttp import web

        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application(client_max_size=64 * 2**20)
        app.router.add_get("/simulator/stats", self._stats)
        app.router.add_get("/v1/models", self._models)
        for path in ("/openai/deployments/{deployment}", "/models", "/openai/v1", "/v1"):
            app.router.add_post(f"{path}/chat/completions", self.handle)
        app.router.add_route("*", "/{elsewhere:.*}", self.handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", self.port).start()
            started.set_result(runner.addresses[0][1])
            await self._stop.wait()
        except (OSError, OverflowError):
            started.set_exception(UserError(f"cannot listen on port {self.port}: choose another --port, or 0 for any free one"))
        finally:
            await runner.cleanup()

    @property
    def url(self) -> str:
        """The resource's URL, to which each of the three forms can be added, and /v1 as of an OpenAI-compatible server."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "AzureSimulator":
        started: Future[int] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(started)), name=MODEL, daemon=True)
        self._thread.start()
        self.port = started.result(timeout=30)
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()


def _has_text(item: dict[str, Any]) -> bool:
    """A message of text, or one of calls, which may have none."""
    content = item.get("content")
    return isinstance(content, str) or (content is None and item.get("role") == "assistant" and bool(item.get("tool_calls")))


def _written(item: dict[str, Any]) -> str:
    return (item.get("content") or "") + (json.dumps(item["tool_calls"]) if item.get("tool_calls") else "")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--references", type=Path, nargs="+", required=True, metavar="FILE", help="rows, such as a split that prepare_data.py wrote")
    add("--port", type=not_negative, default=0, help="0 is any free port")
    add("--key", default="simulator-key", help="the key that is accepted")
    add("--deployment", default="simulator", help="the deployment's name")
    add("--mistake-rate", type=float, default=0.0, help="share of prompts answered wrongly, 0..1")
    add("--requests-per-minute", type=positive, metavar="N", help="quota; none unless given")
    add("--tokens-per-minute", type=positive, metavar="N", help="quota; none unless given")
    add("--window-seconds", type=float, default=60.0, help="how much of a minute's quota may be used at once, in seconds of it")
    parser.add_seed()
    for item in fields(Faults):
        names = item.name.endswith("_parameters")
        kind = (lambda text: frozenset(filter(None, text.split(",")))) if names else float
        add(f"--{item.name.replace('_', '-')}", type=kind, default=None if names else item.default, help=item.metadata["help"])
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    given = {item.name: getattr(args, item.name) for item in fields(Faults)}
    faults = Faults(**{name: value for name, value in given.items() if value is not None})
    examples = [example for path in args.references for example in read_examples(path)]
    names = ("key", "deployment", "mistake_rate", "seed", "requests_per_minute", "tokens_per_minute", "window_seconds", "port")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with AzureSimulator(examples, faults=faults, **{name: getattr(args, name) for name in names}) as server:
        print(server.url, flush=True)
        next_step(
            f"AZURE_ENDPOINT={server.url} AZURE_DEPLOYMENT={server.deployment} AZURE_API_KEY={server.key} AZURE_API_VERSION=2024-10-21 "
            f"python 01_eval/eval.py --track TRACK --model-kind azure --dataset {shown_path(args.references[0])}"
        )
        stop.wait()
    return 0


if __name__ == "__main__":
    run(main)
