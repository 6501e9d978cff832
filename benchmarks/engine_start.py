"""Measure which start of vLLM ends sooner: the whole of `01_eval/eval.py`, eager and with CUDA graphs, over several numbers of rows.

    python benchmarks/engine_start.py
    python benchmarks/engine_start.py --repeats 1 --scratch /tmp/phi --out /tmp/engine_start.json

Model and rows are those of benchmarks/eval.py. The two starts take turns; each command is a process of its own, timed from its start
to its end. vllm_engine.start_for goes by what is found.
"""

import argparse
import sys
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere

import eval as benchmark

from slm_swap.cli import Parser, positive, run
from slm_swap.common.errors import UserError
from slm_swap.common.reports import write_json
from slm_swap.common.settings import ROOT, display_path

ROWS = (32, 512, 4096)
STARTS = ("eager", "graphs")


def fit(commands: list[dict[str, Any]]) -> dict[str, float]:
    """What graphs cost each command and save it for each row, in seconds: least squares through the medians' differences."""
    sooner = [
        median(one["seconds"] for one in commands if (one["start"], one["rows"]) == ("eager", rows))
        - median(one["seconds"] for one in commands if (one["start"], one["rows"]) == ("graphs", rows))
        for rows in ROWS
    ]
    slope, intercept = linear_regression(ROWS, sooner)
    return {"extra_seconds": -intercept, "saved_seconds": slope}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--repeats", type=positive, default=3, help="commands of each start and number of rows (default: 3)")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/slm_swap_benchmark"), metavar="DIR", help="where checkpoint and rows go")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/engine_start.json", metavar="FILE", help="the file to write")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    told = benchmark.prepare(args.scratch, "phi-4-mini", [1])
    commands: list[dict[str, Any]] = []

    def command(start: str, rows: int) -> dict[str, Any]:
        asked = benchmark.parse_args(["--scratch", str(args.scratch), "--rows", str(rows)])
        found = benchmark.child(asked, "command", f"vllm-{start}")
        if "failed" in found:
            raise UserError(f"vLLM's {start} start failed ({found['failed']}): see {args.scratch}/vllm-{start}-1.command.log")
        return {"start": start, **found}

    for start in STARTS:
        command(start, ROWS[0])  # the first start on a machine compiles kernels
    for _ in range(args.repeats):
        for rows in ROWS:
            for start in STARTS:
                commands.append(command(start, rows))
                print(commands[-1], flush=True)
                write_json(args.out, told | {"commands": commands})
    told |= {"commands": commands, **fit(commands)}
    write_json(args.out, told)
    print(f"graphs save {told['saved_seconds'] * 1000:.2f} ms a row and cost {told['extra_seconds']:.1f} s\nreport: {display_path(args.out)}")
    return 0


if __name__ == "__main__":
    run(main)
