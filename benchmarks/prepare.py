"""Measure how long 60,000 xLAM rows take to become both tracks' splits, and in how much memory.

    python benchmarks/prepare.py
    python benchmarks/prepare.py --rows 6000 --out runs/prepare.json

Two kinds of rows, both generated: `templates` are the demo's own (many requests alike: the number of near-duplicate pairs
explodes), `varied` have requests of 8 to 40 words drawn by Zipf's law from 20,000 (2% are near-duplicates of the one before).
"""

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import accumulate
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere

from slm_swap.cli import Parser, positive, run
from slm_swap.common.reports import code_version, hardware, now, write_json, write_jsonl
from slm_swap.common.settings import ROOT
from slm_swap.dataset.build import Sizes, build, components
from slm_swap.dataset.importers import Row, xlam
from slm_swap.demo import make_sample_data
from slm_swap.rows.lines import read_jsonl


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


def measure(source: Path, seed: int) -> dict:
    """Seconds of each stage and the peak memory of this process, which does nothing else."""
    start = time.perf_counter()
    items = list(xlam([source]))
    imported = time.perf_counter()
    report = build(items, source.parent, {}, Sizes(), seed)
    built = time.perf_counter()
    components([item for item in items if isinstance(item, Row)])
    again = time.perf_counter()
    return {
        "seconds": {
            "import": round(imported - start, 1),
            "build": round(built - imported, 1),
            "of which near-duplicates": round(again - built, 1),
            "total": round(built - start, 1),
        },
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "counts": report["counts"],
        "near_duplicates": report["near_duplicates"],
    }


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--rows", type=positive, default=60000, help="rows of each kind")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the file to write (default: benchmarks/results/prepare.json)")
    parser.add_seed()
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    results = {}
    for kind in ("templates", "varied"):
        with (
            tempfile.TemporaryDirectory() as folder,
            ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool,
        ):
            source = Path(folder, "rows.jsonl")
            make_rows(kind, args.rows, args.seed, source)
            results[kind] = pool.submit(measure, source, args.seed).result()
        print(kind, json.dumps(results[kind]))
    report = {"created_at": now(), "code": code_version(), "hardware": hardware(), "seed": args.seed, "results": results}
    write_json(args.out or ROOT / "benchmarks/results/prepare.json", report)
    return 0


if __name__ == "__main__":
    run(main)
