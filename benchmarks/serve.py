"""What the endpoint adds: milliseconds and requests a second in front of back ends that cost nothing, and a campaign of faults.

    python benchmarks/serve.py --out benchmarks/results/serve.json
    python benchmarks/serve.py --seconds 0 --requests 20000 --out benchmarks/results/serve.json

Both models are scripts that answer at once, or after a time that is known: what is measured is the endpoint alone, on the machine that the load is
made on, too. The campaign sends requests through kills of the model and of workers, outages of the hosted model, slow replies, clients that go, audits
and restarts of the endpoint: every request that its client waited for has to get one answer of its own or an error that says to try again.
"""

import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere

from slm_swap.cli import Parser, not_negative, run
from slm_swap.clients.protocol import Reply
from slm_swap.common.reports import code_version, hardware, now, package_versions, read_json, write_json
from slm_swap.common.settings import ROOT
from slm_swap.rows.toolschema import openai_tool
from slm_swap.serving.state import AUDITS, lower_flag, raise_flag
from slm_swap.verdict.cascade import identity_of, tool_hash

AT_ONCE, SECONDS = 32, 0.5
NO_AUDITS = ("--audit-share", "0")
SLOW, DEADLINE = 1.5, 1.0  # of the campaign's slow requests, and of the endpoint's wait for them
KINDS = ("a process killed", "a process stopped for a while", "hosted model down", "flag", "endpoint restarted")
PATIENCE = 60  # seconds after which a request that got nothing is lost
IDENTITY = {"kind": "slm", "path": "scripted", "engine": "scripted", "precision": "fp32", "files_sha256": ["0" * 64], "thinking": None}
_TEXT = {"type": "string"}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": f"{name} in the shop", "parameters": {
        "type": "object", "properties": {"item": _TEXT, "city": _TEXT, "count": {"type": "integer"}}, "required": ["item", "city"], "additionalProperties": False,
    }}}
    for name in ("check_stock", "find_item", "reserve", "cancel_order")
]  # fmt: skip


# -- Back ends ---------------------------------------------------------------------------------------------------------------------


class SmallModel:
    """Answers each request with its own text after some seconds."""

    kind, over_http, identity, engine = "slm", True, IDENTITY, SimpleNamespace(name="scripted", batch_size=8)

    def __init__(self, seconds: float):
        import threading

        self._seconds = seconds
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def ask(self, request: Any) -> "Future[Reply]":
        future: Future[Reply] = Future()
        text = request.messages[-1]["content"]
        sure = -9.0 if "unsure" in text else -0.1
        confidence = {"min_logprob": sure, "sum_logprob": sure, "tokens": 3, "tool_logprob": sure, "min_margin": 1.0}
        call = {"name": "check_stock", "arguments": json.dumps({"item": text, "city": "Porto"})}
        reply = Reply("", "stop", 300, 20, 0, calls=[call], confidence=confidence)
        seconds = SLOW if "slow" in text else self._seconds
        if seconds:
            self._loop.call_soon_threadsafe(self._loop.call_later, seconds, future.set_result, reply)
        else:
            future.set_result(reply)
        return future


def serve_endpoint(seconds: float, words: list[str]) -> None:
    """05_serve/serve.py with that small model."""
    from tests.support.scripts import load_script

    script = load_script("05_serve/serve.py")
    script.make_small = lambda settings, args: SmallModel(seconds)
    run(lambda: script.main(words))


async def serve_hosted(seconds: float) -> None:
    """A hosted model that repeats what it was asked, as cheaply as HTTP can be spoken; it prints its port. `down N` on its input stops it for N
    seconds; `twice` has it print how many texts it was asked more than once."""
    down_until = 0.0
    asked: Counter[str] = Counter()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(re.search(rb"content-length: (\d+)", head, re.IGNORECASE)[1])
                body = json.loads(await reader.readexactly(length))
                text = body["messages"][-1]["content"]
                if time.monotonic() < down_until:
                    writer.close()
                    return
                asked[text] += 1
                await asyncio.sleep(seconds)
                call = {"id": "c", "type": "function", "function": {"name": "check_stock", "arguments": json.dumps({"item": text, "city": "Porto"})}}
                message = {"role": "assistant", "content": None, "tool_calls": [call]}
                usage = {"prompt_tokens": 300, "completion_tokens": 20, "total_tokens": 320}
                told = {"id": "h", "object": "chat.completion", "created": 0, "model": "m", "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}], "usage": usage}
                data = json.dumps(told).encode()
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(data) + data)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        if line.startswith("down"):
            down_until = time.monotonic() + float(line.split()[1])
        else:
            print(sum(count > 1 for text, count in asked.items() if text.startswith("#")), flush=True)


class Endpoint:
    """05_serve/serve.py, or a script that runs it, as a process, which can be started again on its port."""

    def __init__(self, words: list[str], environment: dict[str, str], log: Any):
        self.port, self._words, self._environment, self._log = 0, words, environment, log
        self.start()

    def start(self) -> None:
        words = [sys.executable, *self._words, "--port", str(self.port)]
        self._process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=self._log, text=True, env=self._environment, cwd=ROOT)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(Path(self._log.name).read_text())
        self.port = int(re.search(r":(\d+)/v1", line)[1])

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)
        self._process.stdout.close()

    def processes(self) -> list[int]:
        """The small model's and the workers'."""
        pid = self._process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def start_hosted(seconds: float) -> tuple[subprocess.Popen, int, dict[str, str]]:
    """The hosted model as a process, its port, and the environment of an endpoint in front of it."""
    words = [sys.executable, str(Path(__file__).resolve()), "--back-end", "hosted", str(seconds)]
    hosted = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    port = int(hosted.stdout.readline())
    return hosted, port, {name: value for name, value in os.environ.items() if not name.startswith(("AZURE_", "SLM_", "LANGFUSE_"))} | {
        "AZURE_ENDPOINT": f"http://127.0.0.1:{port}/v1", "AZURE_DEPLOYMENT": "m", "AZURE_API_KEY": "key-of-the-hosted-model", "LANGFUSE_DISABLED": "1",
    }  # fmt: skip


@contextmanager
def running(mode: str, hosted_seconds: float, small_seconds: float, workers: int, folder: Path, *flags: str):
    """(the endpoint, the hosted model's port, the hosted model's process)."""
    kept = openai_tool
    tools = {one["name"]: tool_hash(one) for one in map(kept, TOOLS)}
    rule = {"signal": "min_logprob", "threshold": -1.0, "units": 1, "local": 1, "losses": 0, "bound": 0.01, "seen": 0.0, "local_only": {}}
    told = {
        "schema_version": 1, "stage": "cascade", "track": "toolcall", "guarantee": "regret", "prompts": 0, "delta": 0.02, "alpha": 0.05, "rules": {"call": rule, "no_call": rule},
        "share_local": 1.0, "regret": {"seen": 0.0, "bound": 0.01}, "disagreement": {}, "tools": tools, "per_tool": {}, "identity": identity_of(IDENTITY, "native", "off", 256, None),
        "recipe": None, "calibration": {}, "hosted": None, "costs": {},
    }  # fmt: skip
    (folder / "cascade.json").write_text(json.dumps(told))
    here, (hosted, port, environment) = str(Path(__file__).resolve()), start_hosted(hosted_seconds)
    words = ["--track", "toolcall", "--mode", mode, "--cascade", str(folder / "cascade.json"), "--queue", "1000", "--workers", str(workers), "--state", str(folder / "state")]
    with open(folder / "log", "w") as log:
        endpoint = Endpoint([here, "--back-end", "endpoint", str(small_seconds), *words, *flags], environment, log)
        try:
            until = time.monotonic() + 60
            while time.monotonic() < until:
                status, told, _ = asyncio.run(_once(endpoint.port, body_of("warm up")))
                if status == 200 and (mode != "cascade" or told.startswith("local")):
                    break
                time.sleep(0.1)
            yield endpoint, port, hosted
        finally:
            endpoint.stop()
            hosted.kill()
            hosted.wait()


# -- Load ------------------------------------------------------------------------------------------------------------------------------


def body_of(text: str) -> bytes:
    system = {"role": "system", "content": "You are the assistant of a furniture shop. Use the tools."}
    return json.dumps({"model": "m", "messages": [system, {"role": "user", "content": text}], "tools": TOOLS, "temperature": 0}).encode()


class Connection:
    """One keep-alive connection of a client, as cheap as can be: what it costs is no part of what is measured."""

    def __init__(self, port: int):
        self._port, self._writer = port, None

    async def ask(self, body: bytes) -> tuple[int, str, bytes]:
        """(status, the header x-slm-swap, body)."""
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = int(re.search(rb"content-length: (\d+)", head, re.IGNORECASE)[1])
        told = re.search(rb"x-slm-swap: ([^\r]*)", head, re.IGNORECASE)
        return int(head[9:12]), told[1].decode() if told else "", await self._reader.readexactly(length)

    def close(self) -> None:
        if self._writer:
            self._writer.close()
            self._writer = None


async def _once(port: int, body: bytes) -> tuple[int, str, bytes]:
    connection = Connection(port)
    try:
        return await connection.ask(body)
    except (OSError, asyncio.IncompleteReadError):
        return 0, "", b""
    finally:
        connection.close()


async def load(port: int, text: str, seconds: float, at_once: int = AT_ONCE) -> tuple[list[float], float]:
    """(seconds of each request, requests a second) of clients that ask again as soon as they are answered."""
    took: list[float] = []
    began = time.perf_counter()

    async def client() -> None:
        connection, body = Connection(port), body_of(text)
        await asyncio.sleep(random.random() * SECONDS)  # or all would come in step, as each takes as long
        while time.perf_counter() - began < seconds:
            at = time.perf_counter()
            status, _, _ = await connection.ask(body)
            assert status == 200, status
            took.append(time.perf_counter() - at)
        connection.close()

    await asyncio.gather(*(client() for _ in range(at_once)))
    return took, len(took) / (time.perf_counter() - began)


def quantiles(took: list[float]) -> dict[str, float]:
    cut = statistics.quantiles(took, n=100)
    return {"p50": round(1000 * cut[49], 2), "p99": round(1000 * cut[98], 2), "requests": len(took)}


def measure(seconds: float) -> dict[str, Any]:
    """What the endpoint adds to back ends of SECONDS each, and how many requests it passes on or answers a second."""
    told: dict[str, Any] = {"at_once": AT_ONCE, "back_end_ms": 1000 * SECONDS, "load_before": os.getloadavg()[0]}
    for workers in (1, 2):
        for mode, who in (("hosted", "hosted"), ("cascade", "local")):
            with tempfile.TemporaryDirectory() as folder, running(mode, SECONDS, SECONDS, workers, Path(folder), *NO_AUDITS) as (endpoint, port, _):
                direct = quantiles(asyncio.run(load(port, "call", seconds))[0])
                through = quantiles(asyncio.run(load(endpoint.port, "call", seconds))[0])
            with tempfile.TemporaryDirectory() as folder, running(mode, 0.0, 0.0, workers, Path(folder), *NO_AUDITS) as (endpoint, _, _):
                asyncio.run(load(endpoint.port, "call", seconds / 4))  # what is made once
                before, size = cpu_seconds(endpoint.processes()), memory(endpoint.processes())
                took, rate = asyncio.run(load(endpoint.port, "call", seconds))
                spent = 1000 * (cpu_seconds(endpoint.processes()) - before) / len(took)
                sizes = [size, memory(endpoint.processes())]
            added = {name: round(through[name] - direct[name], 2) for name in ("p50", "p99")}
            told[f"{who}_{workers}_workers"] = {
                "direct_ms": direct, "through_ms": through, "added_ms": added, "requests_per_second": round(rate, 1), "cpu_ms_per_request": round(spent, 2),
                "instant_requests": len(took), "memory_mib": sizes,
            }  # fmt: skip
            print(who, workers, added, round(rate, 1), round(spent, 2), sizes, flush=True)
    return told


# -- Faults ----------------------------------------------------------------------------------------------------------------------------


def cpu_seconds(pids: list[int]) -> float:
    """What some processes have spent: of a busy machine it says more than the time that passed."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(one[11]) + int(one[12]) for one in fields) / os.sysconf("SC_CLK_TCK")


def memory(pids: list[int]) -> float:
    """MiB of the largest of some processes."""
    found = [re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text()) for pid in pids if Path(f"/proc/{pid}").exists()]
    return round(max(int(one[1]) for one in found if one) / 1024, 1)


async def campaign(requests: int, rng: random.Random, endpoint: Endpoint, hosted: subprocess.Popen, state: Path) -> dict[str, Any]:
    """Ask so many requests, AT_ONCE at a time, while things fail, each until it is answered as the openai package would: after an error that says so, again."""
    outcome: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    waiting = iter(range(requests))
    over = asyncio.Event()

    async def client() -> None:
        connection = Connection(endpoint.port)
        for number in waiting:
            kind = rng.choices(("sure", "unsure", "slow"), (60, 38, 2))[0]
            for attempt in range(1000):
                text = f"#{number}.{attempt} {kind}"
                if rng.random() < 0.03:  # this client goes; the application asks again on another connection
                    gone = asyncio.create_task(_once(endpoint.port, body_of(f"{text} gone")))
                    await asyncio.sleep(rng.random() * 0.02)
                    gone.cancel()
                    outcome["clients that went"] += 1
                try:
                    status, told, body = await asyncio.wait_for(connection.ask(body_of(text)), PATIENCE)
                except (OSError, asyncio.IncompleteReadError):
                    connection.close()
                    outcome["connections that broke"] += 1
                except TimeoutError:
                    connection.close()
                    outcome["LOST"] += 1
                    break
                else:
                    if status == 200:
                        said = json.loads(body)["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"]
                        outcome["answered" if json.loads(said)["item"] == text else "WRONG"] += 1
                        outcome[told] += 1
                        break
                    outcome[f"status {status}"] += 1
                await asyncio.sleep(min(0.05 * 2**attempt, 1.0))
        connection.close()

    async def trouble() -> None:
        while not over.is_set():
            await asyncio.sleep(rng.uniform(0.5, 1.5))
            processes = endpoint.processes()  # which is whose, chance decides
            kind = rng.choices(KINDS, (3, 3, 3, 3, 1))[0]
            faults[kind] += 1
            try:
                if kind.startswith("a process") and processes:
                    chosen = rng.choice(processes)
                    os.kill(chosen, signal.SIGKILL if kind == "a process killed" else signal.SIGSTOP)
                    if kind != "a process killed":
                        await asyncio.sleep(0.3)
                        os.kill(chosen, signal.SIGCONT)
                elif kind == "hosted model down":
                    hosted.stdin.write("down 0.5\n")
                    hosted.stdin.flush()
                elif kind == "flag":
                    raise_flag(state, "a trial", [], [])
                    await asyncio.sleep(0.3)
                    lower_flag(state)
                elif kind == "endpoint restarted":
                    await asyncio.to_thread(endpoint.stop)
                    await asyncio.to_thread(endpoint.start)
            except (ProcessLookupError, ValueError, OSError):
                pass

    began, troubles = time.monotonic(), asyncio.create_task(trouble())
    await asyncio.gather(*(client() for _ in range(AT_ONCE)))
    over.set()
    await troubles
    hosted.stdin.write("twice\n")
    hosted.stdin.flush()
    return {
        "requests": requests, "seconds": round(time.monotonic() - began, 1), "outcome": dict(outcome), "faults": dict(faults),
        "lost": outcome["LOST"], "answers_of_others": outcome["WRONG"], "asked_of_the_hosted_model_twice": int(hosted.stdout.readline()),
        "audited": len((state / AUDITS).read_bytes().splitlines()), "memory_mib": memory(endpoint.processes()),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--seconds", type=not_negative, default=10, help="of each measurement; 0: none")
    parser.add_argument("--requests", type=not_negative, default=0, metavar="N", help="of the campaign of faults; 0: none")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the figures are written; a part that is not measured stays in it as it is")
    parser.add_seed()
    args = parser.parse_args(argv)
    told = read_json(args.out, "benchmarks/serve.py") if args.out and args.out.exists() else {}
    about = {"created_at": now(), "code": code_version(), "hardware": hardware(), "packages": package_versions()}
    if args.seconds:
        told["added"] = about | measure(args.seconds)
    if args.requests:
        flags = ("--deadline", str(DEADLINE), "--audit-share", "5%")
        with tempfile.TemporaryDirectory() as folder, running("cascade", 0.005, 0.005, 2, Path(folder), *flags) as (endpoint, _, hosted):
            found = asyncio.run(campaign(args.requests, random.Random(args.seed), endpoint, hosted, Path(folder) / "state"))
            told["campaign"] = about | found
        print(json.dumps(found, indent=2))
    if args.out:
        write_json(args.out, told)
    return 0


if __name__ == "__main__":
    if sys.argv[1:3] == ["--back-end", "hosted"]:
        asyncio.run(serve_hosted(float(sys.argv[3])))
    elif sys.argv[1:3] == ["--back-end", "endpoint"]:
        serve_endpoint(float(sys.argv[3]), sys.argv[4:])
    else:
        run(main)
