"""Measure what tracing adds to a run of 10,000 rows at 500 rows a second: seconds, CPU and memory.

    python benchmarks/tracing.py
    python benchmarks/tracing.py --rows 2000 --out /tmp/tracing.json

The rows come from an instant client, one every 2 ms, each traced as eval.py traces it, to the tests' recording server in a process of
its own over a real socket; or to nothing. Runs take turns, so that a busy machine is busy for both.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "tests")]  # run from anywhere

from slm_swap.cli import Parser, positive, run
from slm_swap.clients import Reply
from slm_swap.langfuse_helpers import connect, trace_run
from slm_swap.prompts import build_messages
from slm_swap.reports import code_version, hardware, now, write_json
from slm_swap.settings import ROOT, Settings, display_path

RATE = 500  # rows a second
SERVER = """
import os, sys
os.nice(19)  # a real server has a machine of its own
sys.path[:0] = [{root!r}, {tests!r}]
from langfuse_server import LangfuseServer
with LangfuseServer("pk-lf-benchmark") as server:
    print(server.url, flush=True)
    sys.stdin.readline()
    spans = server.spans
    print(len(spans), len({{span.id for span in spans}}), len(server.scores), flush=True)
"""


def rows_at_rate(rows: int, trace) -> tuple[float, float]:
    """(seconds, CPU seconds of this process) of a run that asks one row every 2 ms at the earliest."""
    messages = build_messages("toolcall", "Book a table for two in Lisbon on Friday at eight, near the river if possible. " * 4)
    reply = Reply('<tool_call name="book_table">{"city":"Lisbon","people":2,"day":"Friday","hour":20}</tool_call>', "stop", 190, 49, 40, 0.25)
    scores = dict.fromkeys(("valid_call", "name_match", "args_exact", "args_precision", "args_recall", "args_f1"), 1.0) | {"error": "none"}
    started, cpu = time.perf_counter(), time.process_time()
    for number in range(rows):
        if trace:
            trace.generation(f"row-{number}", "phi-4-mini", messages, reply, scores)
        time.sleep(1 / RATE)
    return time.perf_counter() - started, time.process_time() - cpu


def traced(rows: int) -> dict:
    """One traced run, and what arrived."""
    code = SERVER.format(root=str(ROOT), tests=str(ROOT / "tests"))
    with (
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server,
        tempfile.TemporaryDirectory() as folder,
    ):
        settings = Settings(
            langfuse_public_key="pk-lf-benchmark", langfuse_secret_key="sk-lf-right", langfuse_base_url=server.stdout.readline().strip()
        )
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with trace_run(connect(settings), "benchmark", Path(folder, "report.json")) as trace:
            seconds, cpu = rows_at_rate(rows, trace)
            ended = time.perf_counter()
        closing = time.perf_counter() - ended
        server.stdin.write("\n")
        server.stdin.flush()
        spans, different, scores = map(int, server.stdout.readline().split())
    if (spans, different, scores) != (rows + 1, rows + 1, rows * 7):
        raise RuntimeError(f"{spans} spans ({different} different) and {scores} scores arrived of {rows} rows")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"seconds": seconds, "cpu_seconds": cpu, "closing_seconds": closing, "grown_mib": grown}


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=positive, default=10_000, help="rows of a run (default: 10000)")
    parser.add_argument("--repeat", type=positive, default=3, help="pairs of runs, of which the medians are reported (default: 3)")
    parser.add_argument("--out", type=Path, metavar="FILE", default=ROOT / "benchmarks/results/tracing.json")
    args = parser.parse_args(argv)
    pairs = []
    for _ in range(args.repeat):
        plain, cpu = rows_at_rate(args.rows, None)
        pairs.append({"untraced_seconds": plain, "untraced_cpu_seconds": cpu} | traced(args.rows))
        pairs[-1]["ratio"] = (pairs[-1]["seconds"] + pairs[-1]["closing_seconds"]) / plain
        print({name: round(value, 3) for name, value in pairs[-1].items()}, flush=True)
    middle = sorted(pairs, key=lambda pair: pair["ratio"])[len(pairs) // 2]
    told = {"created_at": now(), "code": code_version(), "hardware": hardware(), "rows": args.rows, "rows_per_second": RATE}
    write_json(args.out, told | {"median": {name: round(value, 3) for name, value in middle.items()}, "ratios": [round(p["ratio"], 3) for p in pairs]})
    print(f"tracing takes {100 * (middle['ratio'] - 1):+.1f}% of the run, closing included")
    print(f"report: {display_path(args.out)}")
    return 0


if __name__ == "__main__":
    run(main)
