"""Measure how much of a hosted deployment's quota the client uses, and how many of its requests are refused.

    python benchmarks/quota.py
    python benchmarks/quota.py --seconds 15 --out /tmp/quota.json

Simulated: demo/azure_simulator.py in a process of its own, over real sockets. It meters requests and tokens per minute by token buckets that
hold the quota of a window of 1, 10 or 60 seconds, and takes 0.2 s for a reply. The client has more rows to ask than is permitted. Used is what
the server let in, permitted a full bucket and its refill from the first request to the last, both by the server's count and of the quota that
binds. The second client asks a third of the quota evenly, knows nothing of a limiter, and its requests count as used, too.
"""

import argparse
import json
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count, takewhile
from pathlib import Path
from subprocess import PIPE, Popen

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere

from metrics import make_examples

from slm_swap.azure_client import AzureClient
from slm_swap.cli import Parser, positive, run
from slm_swap.common.reports import code_version, hardware, now, write_json, write_jsonl
from slm_swap.common.settings import PACKAGE, ROOT, Settings, display_path
from slm_swap.rows.examples import Example
from slm_swap.rows.prompts import Messages, text_request

TRACK = "toolcall"
LATENCY = 0.2  # seconds
CASES = [  # per minute: requests, tokens; seconds of the window; whether there is a second client
    (300, None, 10, False),
    (600, None, 1, False),
    (3000, None, 1, False),
    (3000, None, 10, False),
    (None, 100_000, 10, False),
    (None, 1_000_000, 1, False),
    (None, 1_000_000, 10, False),
    (None, 300_000, 60, False),
    (1200, 800_000, 1, False),
    (1200, 800_000, 10, False),
    (3000, None, 1, True),
    (3000, None, 10, True),
    (None, 1_000_000, 10, True),
    (1200, 800_000, 10, True),
]
SETTINGS = Settings(azure_deployment="simulator", azure_api_key="simulator-key", azure_api_version="2024-10-21")


@contextmanager
def simulator(rows: Path, requests: int | None, tokens: int | None, window: int) -> Iterator[str]:
    """The URL of a simulator with these quotas."""
    flags = [f"--window-seconds={window}", "--slow=1", f"--slow-seconds={LATENCY}"]
    flags += [f"--{name}-per-minute={value}" for name, value in (("requests", requests), ("tokens", tokens)) if value]
    words = [sys.executable, str(PACKAGE / "demo/azure_simulator.py"), "--references", str(rows), *flags]
    with Popen(words, stdout=PIPE, text=True) as process:
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def ask_evenly(url: str, messages: Messages, limit: int, seconds: float, stop: threading.Event) -> None:
    """A request each so many seconds, refused or not, until told to stop."""
    path = f"{url}/openai/deployments/{SETTINGS.azure_deployment}/chat/completions?api-version={SETTINGS.azure_api_version}"
    body = json.dumps({"messages": messages, "max_completion_tokens": limit}).encode()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(path, body, {"api-key": SETTINGS.azure_api_key})).close()
        except urllib.error.HTTPError as refusal:
            refusal.close()

    started = time.monotonic()
    for number in count(1):
        threading.Thread(target=ask).start()
        if stop.wait(started + number * seconds - time.monotonic()):
            return


def measure(path: Path, examples: list[Example], case: tuple, seconds: int) -> dict:
    """One case, for so many seconds after the first answer."""
    requests, tokens, window, shared = case
    messages = [text_request(TRACK, example.prompt) for example in examples]
    refused = answered = 0
    with simulator(path, requests, tokens, window) as url:
        client, stop = AzureClient(replace(SETTINGS, azure_endpoint=url), max_new_tokens=256), threading.Event()
        try:
            (first,) = client.generate(messages[:1])
            if shared:
                rate = min(quota for quota in (requests, tokens and tokens / (first.input_tokens + 256)) if quota) / 60
                second = threading.Thread(target=ask_evenly, args=(url, messages[0].messages, 256, 3 / rate, stop))
                second.start()
            started = time.monotonic()
            numbers = takewhile(lambda _: time.monotonic() - started < seconds, count())
            for _, reply in client.stream((number, messages[number % len(messages)]) for number in numbers):
                answered, refused = answered + 1, refused + sum(status == 429 for _, _, status in reply.retries)
            elapsed = time.monotonic() - started
            if shared:
                stop.set()
                second.join()
            with urllib.request.urlopen(f"{url}/simulator/stats") as stats:
                quotas = json.load(stats)["quotas"]
        finally:
            client.close()
    return {
        "requests_per_minute": requests,
        "tokens_per_minute": tokens,
        "window_seconds": window,
        "second_client": shared,
        "used": round(max(quota["used"] / quota["permitted"] for quota in quotas.values()), 4),
        "refused": round(refused / (answered + refused), 4),
        "requests": answered + refused,
        "answered_per_second": round(answered / elapsed, 2),
    }


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--seconds", type=positive, default=20, help="how long each case runs")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the file to write (default: benchmarks/results/quota.json)")
    parser.add_seed()
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    examples = make_examples(1000, args.seed)[TRACK]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        write_jsonl(path, (example.to_json() for example in examples))
        cases = []
        for case in CASES:
            cases.append(measure(path, examples, case, args.seconds))
            print(json.dumps(cases[-1]), flush=True)
    out = args.out or ROOT / "benchmarks/results/quota.json"
    told = {"created_at": now(), "code": code_version(), "hardware": hardware(), "seconds_per_case": args.seconds, "latency_seconds": LATENCY}
    write_json(out, told | {"seed": args.seed, "worst_used": min(case["used"] for case in cases), "worst_refused": max(case["refused"] for case in cases), "cases": cases})
    print(f"report: {display_path(out)}")
    return 0


if __name__ == "__main__":
    run(main)
