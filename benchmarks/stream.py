"""Measure what 200,000 rows cost an evaluation besides the model: memory, and the program's own time a row.

    python benchmarks/stream.py
    python benchmarks/stream.py --rows 20000 --out /tmp/stream.json

The rows are generated as the demo's are, of the toolcall track, with their tools; the model answers at once, a bit more than half of
the replies right. Measured in a process of its own: everything that eval.py does from reading the rows to writing rows and report.
"""

import argparse
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Container, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere

from metrics import make_examples, make_reply

from slm_swap.cli import Parser, positive, run
from slm_swap.clients.protocol import Reply
from slm_swap.common.reports import code_version, hardware, now, rows_path, write_atomically, write_json, write_jsonl
from slm_swap.common.settings import ROOT, display_path
from slm_swap.evaluating.evaluation import Stopwatch, check_rows, evaluate_rows
from slm_swap.evaluating.journal import Journal, journal_path
from slm_swap.evaluating.report import make_report
from slm_swap.rows.examples import Dataset, Example
from slm_swap.rows.prompts import Request

TRACK = "toolcall"
DISTINCT = 4000  # rows that differ in more than their number


class Instant:
    """A client that has its replies at hand: of row i, reply i modulo their number."""

    kind, load_seconds, identity = "azure", 0.0, {"kind": "azure"}

    def __init__(self, replies: list[str]):
        self.replies = replies

    def stream(self, rows: Iterable[tuple[int, Request]], answered: Container[int] = ()) -> Iterator[tuple[int, Reply]]:
        for index, _ in rows:
            yield index, Reply(self.replies[index % len(self.replies)], "stop", 300, 30, 0, 0.5)

    def state(self) -> dict:
        return {}

    def restore(self, state: dict) -> None: ...

    def describe(self) -> dict:
        return self.identity

    def cost(self, *_: float) -> None:
        return None


def peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def measure(path: Path, replies: list[str]) -> dict:
    """Milliseconds a row of each stage, and the peak memory of this process, which does nothing else."""
    client, dataset, out, clock = Instant(replies), Dataset(path), path.with_name("report.json"), Stopwatch()
    before, processor = peak_mib(), time.process_time()
    tally = check_rows(TRACK, dataset)
    rows = len(tally.contents)
    seconds = {"check": clock.lap()}
    with Journal(journal_path(out)) as journal:
        journal.begin({}, rows)
        evaluate_rows(tally, client, dataset, journal)
        seconds["ask"] = clock.lap()
        report = make_report(TRACK, client, tally, journal.seconds, clock.total, {}, {})
        write_atomically(rows_path(out), lambda stream: stream.writelines(journal.lines()))
        write_json(out, report)
        seconds["report"] = clock.lap()
        journal_mib = journal.path.stat().st_size >> 20
        journal.remove()
    return {
        "rows": rows,
        "dataset_mib": path.stat().st_size >> 20,
        "journal_mib": journal_mib,
        "ms_per_row": {stage: round(value / rows * 1000, 4) for stage, value in (seconds | {"total": clock.total}).items()},
        "processor_ms_per_row": round((time.process_time() - processor) / rows * 1000, 4),
        "rss_before_mib": before,
        "peak_rss_mib": peak_mib(),
    }


def make_rows(examples: list[Example], count: int) -> Iterator[dict]:
    for number in range(count):
        row = examples[number % len(examples)].to_json()
        yield row | {"id": f"row-{number}", "prompt": f"{row['prompt']} (number {number})"}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--rows", type=positive, default=200_000, help="how many rows")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the file to write (default: benchmarks/results/stream.json)")
    parser.add_seed()
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    rng, examples = Random(args.seed), make_examples(2 * DISTINCT, args.seed)[TRACK]
    replies = [make_reply(rng, TRACK, example.completion) for example in examples]
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        path = Path(folder, "rows.jsonl")
        write_jsonl(path, make_rows(examples, args.rows))
        results = pool.submit(measure, path, replies).result()
    out = args.out or ROOT / "benchmarks/results/stream.json"
    load = os.getloadavg()[0]  # above the number of cores, the times are too long
    write_json(out, {"created_at": now(), "code": code_version(), "hardware": hardware(), "load_average": load, "seed": args.seed, **results})
    print(json.dumps(results))
    print(f"report: {display_path(out)}")
    return 0


if __name__ == "__main__":
    run(main)
