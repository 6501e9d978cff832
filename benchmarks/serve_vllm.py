"""How much of vLLM's own speed the endpoint hands on: requests a second with 64 at a time, of vLLM alone and through 05_serve/serve.py.

    python benchmarks/serve_vllm.py --shape phi-4-mini --out benchmarks/results/serve_vllm.json

Random weights of a real shape: no reply parses, so that the hosted model, a script that answers at once, is asked besides for each request.
The endpoint does more here than for a reply that it sends. vLLM alone is its engine's own loop over the same prompts' tokens, which are there already, without
and with what the endpoint needs of it: log-probabilities. All replies are equally long, so requests come one by one to begin with: in step, they would leave
the GPU idle each time that all of them end. Needs a GPU, or vLLM built for CPUs (--precision fp32).
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere

from benchmarks.constrained import checkpoint
from benchmarks.serve import TOOLS, Connection, Endpoint, body_of, start_hosted
from benchmarks.shapes import SHAPES
from slm_swap.cli import Parser, positive, run
from slm_swap.common.reports import code_version, hardware, now, package_versions, write_json
from slm_swap.common.settings import PACKAGE, Settings
from slm_swap.rows.prompts import request_of
from slm_swap.serving.chat import read_chat

AT_ONCE = 64
STAGGER = 0.4  # seconds over which the first ones come
HERE = str(Path(__file__).resolve())


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="phi-4-mini", help="random weights of this shape")
    parser.add_argument("--precision", default="bf16", help="weights of the model")
    parser.add_argument("--requests", type=positive, default=2048, help="asked each time")
    parser.add_argument("--tokens", type=positive, default=48, help="of a reply")
    parser.add_argument("--turns", type=positive, default=3, help="how often each way is measured")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/serve_vllm.json", help="the figures")
    parser.add_argument("--alone", metavar="DIR", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def alone(path: Path, precision: str, requests: int, tokens: int, turns: int) -> dict[str, list[float]]:
    """Requests a second of vLLM's engine with AT_ONCE at a time, for each turn; of the product's own settings with log-probabilities, and without."""
    from slm_swap.clients.engines import Workload
    from slm_swap.slm_client import SLMClient

    client = SLMClient(Settings(), path, precision=precision, max_new_tokens=tokens, engine="vllm", workload=Workload(10**9, 2048 + tokens))
    vllm = client.engine._llm.llm_engine
    found: dict[str, list[float]] = {"without": [], "with": []}
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    for turn in range(-1, turns):  # the first is the warm-up
        for way, more in (("without", {}), ("with", {"logprobs": 2, "flat_logprobs": True})):
            wanted = SamplingParams(
                temperature=0.0, max_tokens=tokens, stop_token_ids=client.engine.ends, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, **more
            )
            texts = (f"{turn} {way} {number}" for number in range(requests))
            waiting = client._encode([request_of("toolcall", read_chat("toolcall", json.loads(body_of(text)), "x").example) for text in texts])
            begun, open_now, count = time.perf_counter(), 0, 0
            while waiting or open_now:
                room = min(AT_ONCE, 1 + int((time.perf_counter() - begun) / STAGGER * AT_ONCE))
                while waiting and open_now < room:
                    count, open_now = count + 1, open_now + 1
                    vllm.add_request(f"{turn}-{way}-{count}", {"prompt_token_ids": waiting.pop()}, wanted)
                open_now -= sum(output.finished for output in vllm.step())
            found[way].append(requests / (time.perf_counter() - begun))
    client.close()
    return {way: rates[1:] for way, rates in found.items()}


async def through(port: int, turn: int, requests: int, answered: Counter) -> float:
    """Requests a second of AT_ONCE clients of the endpoint."""
    waiting = iter(range(requests))

    async def client(place: int) -> None:
        connection = Connection(port)
        await asyncio.sleep(place / AT_ONCE * STAGGER)
        for number in waiting:
            status, told, _ = await connection.ask(body_of(f"{turn} {number}"))
            answered[f"{status} {told}"] += 1
        connection.close()

    begun = time.perf_counter()
    await asyncio.gather(*map(client, range(AT_ONCE)))
    return requests / (time.perf_counter() - begun)


def served(path: Path, args: argparse.Namespace) -> tuple[list[float], dict[str, int]]:
    """(requests a second of each turn, how the requests were answered)."""
    hosted, _, environment = start_hosted(0.0)
    answered: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log", "w") as log:
        words = [
            PACKAGE / "05_serve/serve.py", "--track", "toolcall", "--mode", "local", "--engine", "vllm", "--precision", args.precision, "--state", f"{folder}/state",
            "--max-new-tokens", args.tokens, "--max-prompt-tokens", 2048, "--queue", 1000, "--deadline", 60, "--audit-share", 0, "--workers", 2,
        ]  # fmt: skip
        endpoint = Endpoint([str(word) for word in words], environment | {"SLM_MODEL_PATH": str(path)}, log)
        try:
            asyncio.run(through(endpoint.port, -1, args.requests, Counter()))  # connections, what is made once
            rates = [asyncio.run(through(endpoint.port, turn, args.requests, answered)) for turn in range(args.turns)]
        finally:
            endpoint.stop()
            hosted.kill()
            hosted.wait()
    return rates, dict(answered)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.alone:
        print(json.dumps(alone(Path(args.alone), args.precision, args.requests, args.tokens, args.turns)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoint(Path(folder), args.shape)
        words = [sys.executable, HERE, "--alone", str(path), *(f"--{name}={getattr(args, name)}" for name in ("precision", "requests", "tokens", "turns"))]
        made = subprocess.run(words, stdout=subprocess.PIPE, text=True, env=os.environ, check=True)
        own = json.loads(made.stdout.strip().splitlines()[-1])
        rates, answered = served(path, args)
    told: dict[str, Any] = {
        "shape": args.shape, "precision": args.precision, "requests": args.requests, "reply_tokens": args.tokens, "at_once": AT_ONCE, "tools": len(TOOLS),
        "vllm_alone_per_second": {way: [round(rate, 1) for rate in told] for way, told in own.items()}, "endpoint_per_second": [round(rate, 1) for rate in rates],
        "ratio": {way: round(statistics.median(rates) / statistics.median(told), 4) for way, told in own.items()}, "answered": answered,
    }  # fmt: skip
    print(told)
    write_json(args.out, {"created_at": now(), "code": code_version(), "hardware": hardware(), "packages": package_versions(), **told})
    return 0


if __name__ == "__main__":
    run(main)
