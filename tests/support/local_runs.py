"""eval.py on the embedded tiny model: rows, flags, and what comes out but for the times."""

import json
from pathlib import Path

from slm_swap.common.reports import rows_path
from slm_swap.rows.examples import Example

ROWS = [Example(f"Say {number} {'and again ' * (number % 7)}", f'{{"a":{number}}}', id=f"r{number}").to_json() for number in range(64)]
TIMES = ("created_at", "seconds", "args", "sessions", "latency", "run_id")


def flags(rows: Path, out: Path, *more: object) -> list:
    return ["--track", "structured", "--model-kind", "slm", "--dataset", rows, "--precision", "fp32", "--max-new-tokens", 6, "--out", out, *more]


def outcome(out: Path) -> tuple[dict, list[dict]]:
    report = {name: value for name, value in json.loads(out.read_text()).items() if name not in TIMES}
    lines = [json.loads(line) for line in rows_path(out).read_text().splitlines()]
    return report, [{name: value for name, value in line.items() if name != "seconds"} for line in lines]
