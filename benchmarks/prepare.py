"""Measure how long rows take to become both tracks' splits, and in how much memory.

    python benchmarks/prepare.py
    python benchmarks/prepare.py --rows 6000 --chat-rows 10000 --out runs/prepare.json
    python benchmarks/prepare.py --kinds chat

Three kinds of rows, all generated. 60,000 xLAM rows: `templates` are the demo's own (many requests alike: the number of near-duplicate
pairs explodes), `varied` have requests of 8 to 40 words drawn by Zipf's law from 20,000 (2% are near-duplicates of the one before).
100,000 lines of OpenAI's chat form of 3 KB each, `chat`: a system text that all share, eight tools, one to three user messages of 8 to 40
such words, replies with one call, several and none.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import accumulate
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere

from slm_swap.cli import Parser, positive, run
from slm_swap.common.reports import code_version, hardware, now, write_json, write_jsonl
from slm_swap.common.settings import ROOT
from slm_swap.dataset.build import build
from slm_swap.dataset.near import components
from slm_swap.dataset.readers.chat import chat
from slm_swap.dataset.readers.importers import xlam
from slm_swap.dataset.readers.sources import Seen
from slm_swap.dataset.row import Row
from slm_swap.dataset.splits import Sizes
from slm_swap.demo import make_sample_data
from slm_swap.rows.lines import read_jsonl

KINDS = ("templates", "varied", "chat")


def make_rows(kind: str, count: int, seed: int, path: Path) -> None:
    make_sample_data.main(["--rows", str(count), "--seed", str(seed), "--out", str(path)])
    if kind == "varied":
        rng, ranks = Random(seed), list(accumulate(1 / rank for rank in range(1, 20001)))
        rows = [row for _, row in read_jsonl(path)]
        words: list[int] = []
        for row in rows:
            if not words or rng.random() > 0.02:
                words = rng.choices(range(20000), cum_weights=ranks, k=rng.randint(8, 40))
            words[0] = row["id"]
            row["query"] = " ".join(f"w{word}" for word in words)
        write_jsonl(path, rows)


def make_chat(count: int, seed: int, path: Path) -> None:
    """Lines of about 3 KB: conversations of a shop bot with one to three replies."""
    rng, ranks = Random(seed), list(accumulate(1 / rank for rank in range(1, 20001)))
    tools = [_tool(number) for number in range(8)]
    system = {"role": "system", "content": "You are the bot of a shop. " + "Be brief and kind, and never promise what you cannot keep. " * 8}

    def said(least: int = 8, most: int = 40) -> str:
        return " ".join(f"w{word}" for word in rng.choices(range(20000), cum_weights=ranks, k=rng.randint(least, most)))

    def call(number: int) -> dict:
        name = f"tool_{rng.randrange(8)}"
        arguments = {"order": f"A{rng.randrange(10**6)}", "count": rng.randrange(9), "note": said(1, 6)}
        return {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}

    def rows() -> Iterator[dict]:
        for number in range(count):
            messages = [system]
            for turn in range(rng.choice((1, 1, 1, 2, 3))):
                messages.append({"role": "user", "content": said()})
                kind = rng.random()
                if kind < 0.6:
                    messages.append({"role": "assistant", "content": said()})
                    continue
                calls = [call(10 * turn + at) for at in range(1 if kind < 0.9 else 2)]
                messages.append({"role": "assistant", "tool_calls": calls})
                messages += [{"role": "tool", "tool_call_id": each["id"], "content": said()} for each in calls]
            while messages[-1]["role"] == "tool":
                messages.pop()
            yield {"id": f"c{number}", "messages": messages, "tools": tools}

    write_jsonl(path, rows())


def _tool(number: int) -> dict:
    properties = {
        "order": {"type": "string", "description": "The order's number."},
        "count": {"type": "integer", "description": "How many."},
        "note": {"type": "string", "description": "What else."},
    }
    parameters = {"type": "object", "properties": properties, "required": ["order", "count"]}
    return {"type": "function", "function": {"name": f"tool_{number}", "description": f"Does {number}.", "parameters": parameters}}


def measure(kind: str, source: Path, seed: int) -> dict:
    """Seconds of each stage and the peak memory of this process, which does nothing else."""
    start, cpu = time.perf_counter(), time.process_time()
    items = list(chat([source], Seen()) if kind == "chat" else xlam([source]))
    imported = time.perf_counter()
    report = build(items, source.parent, {}, Sizes(), seed)
    built, cpu = time.perf_counter(), time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    components([item for item in items if isinstance(item, Row)])
    again = time.perf_counter()
    return {
        "seconds": {
            "import": round(imported - start, 1),
            "build": round(built - imported, 1),
            "of which near-duplicates": round(again - built, 1),
            "total": round(built - start, 1),
            "of the processor": round(cpu, 1),
        },
        "file_mib": source.stat().st_size // 2**20,
        "peak_rss_mib": peak,
        "counts": report["counts"],
        "near_duplicates": report["near_duplicates"],
    }


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="which kinds of rows")
    parser.add_argument("--rows", type=positive, default=60000, help="xLAM rows of each kind")
    parser.add_argument("--chat-rows", type=positive, default=100000, help="lines of chat")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the file to write (default: benchmarks/results/prepare.json)")
    parser.add_seed()
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    results = {}
    for kind in args.kinds:
        with (
            tempfile.TemporaryDirectory() as folder,
            ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool,
        ):
            source = Path(folder, "rows.jsonl")
            if kind == "chat":
                make_chat(args.chat_rows, args.seed, source)
            else:
                make_rows(kind, args.rows, args.seed, source)
            results[kind] = pool.submit(measure, kind, source, args.seed).result()
        print(kind, json.dumps(results[kind]))
    report = {"created_at": now(), "code": code_version(), "hardware": hardware(), "seed": args.seed, "results": results}
    write_json(args.out or ROOT / "benchmarks/results/prepare.json", report)
    return 0


if __name__ == "__main__":
    run(main)
