"""The small model in a process of its own, which the endpoint's workers share over a Unix socket.

Each line of either direction is one JSON object. To the engine: `{"ask": n, "request": [...]}`, `{"drop": n}`. From it, first of all
`{"hello": {...}}` with the model's identity; then `{"reply": n, ...}` with a Reply's fields, or `{"full": n}` where so many requests wait already that no more
are taken. A worker's interpreter is never held up by the model, and a model that dies takes no request with it.
"""

import asyncio
import dataclasses
import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from slm_swap.clients.engines import DeviceFailed
from slm_swap.clients.protocol import Client, Reply
from slm_swap.common.errors import UserError
from slm_swap.common.exact_json import EXACT
from slm_swap.common.os_errors import os_error
from slm_swap.common.processes import Watchdog
from slm_swap.rows.lines import dump_json
from slm_swap.rows.prompts import Request, Wanted
from slm_swap.serving.state import ADVICE

SOCKET = "engine.sock"
LINE = 64 * 2**20  # bytes of the longest line
GATHER_SECONDS = 0.01  # that a batch of the transformers engine waits for others to join it
IDLE_SECONDS = 1.0  # between two looks, while nothing is asked, at whether vLLM's process still runs
FULL_BATCH = 8  # where the batch's size is not fixed


def read_line(line: bytes) -> dict[str, Any]:
    """A line of the socket: its numbers are exact, however large, as those of a tool's definition may be."""
    return json.loads(line, **EXACT)


def request_json(request: Request) -> list[Any]:
    """A request as it goes over the socket."""
    return list(request)


def read_request(told: list[Any]) -> Request:
    *parts, wanted = told
    if wanted is not None:
        wanted = Wanted(*wanted)
        wanted = wanted._replace(separators=wanted.separators and tuple(wanted.separators))
    return Request(*parts, wanted)


def socket_address(folder: Path, descriptor: int | None = None) -> str:
    """The socket's address by an open descriptor of its folder: a Unix socket's own path may have 107 bytes only."""
    return f"/proc/self/fd/{os.open(folder, os.O_PATH) if descriptor is None else descriptor}/{SOCKET}"


@dataclasses.dataclass(eq=False)
class Job:
    """A request that a worker has sent: `send` takes its answer."""

    number: int
    request: Request
    send: Callable[[dict[str, Any]], None]
    dropped: bool = False


class Jobs:
    """What the workers ask, at most `room` at a time: waiting or being answered. Taken by the thread that runs the model."""

    def __init__(self, room: int):
        self._room, self._open, self._lock = room, 0, threading.Lock()
        self._waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()

    def put(self, job: Job) -> bool:
        """False where there is no room."""
        with self._lock:
            if self._open >= self._room:
                return False
            self._open += 1
        self._waiting.put(job)
        return True

    def take(self, seconds: float | None) -> Job | None:
        """The next job that somebody still waits for; None where none comes in so many seconds (None: wait)."""
        until = None if seconds is None else time.monotonic() + seconds
        while True:
            try:
                left = None if until is None else until - time.monotonic()
                job = self._waiting.get(block=left is None or left > 0, timeout=left if left is None or left > 0 else None)
            except queue.Empty:
                return None
            if not job.dropped:
                return job
            self._ended()

    def answer(self, job: Job, reply: Reply) -> None:
        self._ended()
        if not job.dropped:
            told = {field.name: getattr(reply, field.name) for field in dataclasses.fields(reply)}
            job.send({"reply": job.number} | told)

    def _ended(self) -> None:
        with self._lock:
            self._open -= 1


def run_engine(folder: Path, room: int, make_client: Callable[[], Client], ready: Callable[[], None]) -> None:
    """Load the model, listen, and answer until the process is ended.

    Raises:
        UserError: as `make_client`, or the socket cannot be made. What comes later is a fault of the model's, of which the process ends with another exit code.
    """
    client = make_client()
    jobs, listening = Jobs(room), Future[None]()
    hello = {"hello": client.identity | {"kind": client.kind}}
    threading.Thread(target=_keep_listening, args=(folder, jobs, hello, listening), name="engine-socket", daemon=True).start()
    try:
        listening.result()
    except OSError as error:
        raise os_error(error, "listen at", folder / SOCKET, ADVICE) from None
    ready()
    try:
        if getattr(client, "over_http", False):
            _pass_on(client, jobs)
        elif client.engine.name == "vllm":
            _feed(client, jobs)
        else:
            _in_batches(client, jobs, client.engine.batch_size or FULL_BATCH)
    except UserError as error:  # not of the set-up, which would be of no use a second time
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)


def _pass_on(client: Any, jobs: Jobs) -> None:
    """A served model takes each request as it comes."""

    def told(job: Job, future: Any) -> None:
        error = None if future.cancelled() else future.exception()
        failed = Reply("", "error", error=str(error) or "cancelled", transient=True)
        jobs.answer(job, failed if error or future.cancelled() else future.result())

    while True:
        job = jobs.take(None)
        client.ask(job.request).add_done_callback(lambda future, job=job: told(job, future))


def _feed(client: Any, jobs: Jobs) -> None:
    """vLLM takes what waits between any two of its steps. It has a process of its own, with a watchdog there."""
    asked: dict[int, Job] = {}
    count = 0

    def rows() -> Iterator[tuple[int, Request] | None]:
        nonlocal count
        while True:
            job = jobs.take(0 if asked else IDLE_SECONDS)
            if job is None:
                yield None
                continue
            count += 1
            asked[count] = job
            yield count, job.request

    for index, reply in client.stream(rows()):
        jobs.answer(asked.pop(index), reply)


def _in_batches(client: Any, jobs: Jobs, size: int) -> None:
    """A batch is what comes within GATHER_SECONDS, and at most `size`. One that fails is asked again one by one: a row that does not fit in
    memory is that row's error."""
    watchdog = Watchdog()
    while True:
        watchdog.rest()
        batch = [jobs.take(None)]
        until = time.monotonic() + GATHER_SECONDS
        while len(batch) < size and (job := jobs.take(max(0.0, until - time.monotonic()))):
            batch.append(job)
        for part in [batch, *([job] for job in batch if len(batch) > 1)]:
            watchdog.work()
            try:
                replies = client.generate([job.request for job in part])
            except DeviceFailed:
                raise
            except UserError as error:
                if len(part) == 1:
                    jobs.answer(part[0], Reply("", "error", error=str(error)))
                continue
            for job, reply in zip(part, replies, strict=True):
                jobs.answer(job, reply)
            if part is batch:
                break


def _keep_listening(folder: Path, jobs: Jobs, hello: dict[str, Any], listening: "Future[None]") -> None:
    """The socket's thread. `listening` says that the socket is there, or why not; if it ends later, so does the process, which nobody could ask any more."""
    try:
        asyncio.run(_listen(folder, jobs, hello, listening))
    except BaseException as error:
        if not listening.done():
            listening.set_exception(error)
            return
        traceback.print_exc()
        os._exit(1)


async def _listen(folder: Path, jobs: Jobs, hello: dict[str, Any], listening: "Future[None]") -> None:
    loop = asyncio.get_running_loop()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        own: dict[int, Job] = {}

        def send(told: dict[str, Any]) -> None:
            own.pop(told.get("reply", told.get("full", -1)), None)
            if not writer.is_closing():
                writer.write(dump_json(told).encode("utf-8", "replace") + b"\n")

        writer.write(dump_json(hello).encode() + b"\n")
        try:
            while line := await reader.readline():
                told = read_line(line)
                if "drop" in told:
                    if job := own.pop(told["drop"], None):
                        job.dropped = True
                    continue
                job = Job(told["ask"], read_request(told["request"]), lambda told: loop.call_soon_threadsafe(send, told))
                own[job.number] = job
                if not jobs.put(job):
                    send({"full": job.number})
        except (ConnectionError, ValueError):  # a worker that was killed amid a line
            pass
        finally:
            for job in own.values():
                job.dropped = True
            writer.close()

    address = socket_address(folder)
    (folder / SOCKET).unlink(missing_ok=True)
    before = os.umask(0o077)
    server = await asyncio.start_unix_server(serve, address, limit=LINE)
    os.umask(before)
    listening.set_result(None)
    async with server:
        await server.serve_forever()
