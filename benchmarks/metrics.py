"""Measure how long 60,000 replies take to be scored, all three matchers included: metrics only, one core.

    python benchmarks/metrics.py
    python benchmarks/metrics.py --rows 6000 --out /tmp/metrics.json

Rows of both tracks in turn, generated as the demo's are; a bit more than half of the replies are right (some in another key
order or with spaces), the others miss in the ways that real replies do. Timed: parsing the gold, scoring, and the means.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere

from slm_swap.cli import Parser, positive, run
from slm_swap.common.reports import code_version, hardware, now, write_json
from slm_swap.common.settings import ROOT, display_path
from slm_swap.dataset.build import make_example
from slm_swap.dataset.readers.importers import Row, xlam
from slm_swap.demo import make_sample_data
from slm_swap.evaluating.evaluation import references
from slm_swap.rows.examples import Example
from slm_swap.rows.lines import dump_json
from slm_swap.scoring.metrics import MATCHERS
from slm_swap.scoring.tracks import TRACKS

KINDS = {  # a reply's kind and its weight
    "as_gold": 25, "other_order": 20, "spaces": 10, "wrong_value": 10, "wrong_type": 5, "missing": 6, "extra": 8, "wrong_tool": 4,
    "prose": 4, "fence": 2, "twice": 1, "quotes": 2, "cut": 1, "nothing": 1, "unwrapped": 1,
}  # fmt: skip
ONE_CALL = 0.85  # the share of generated rows that one call answers, less a margin


def make_examples(count: int, seed: int) -> dict[str, list[Example]]:
    """`count` rows, half of each track."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "rows.jsonl")
        make_sample_data.main(["--rows", str(int(count / 2 / ONE_CALL) + 10), "--seed", str(seed), "--out", str(source)])
        rows = [row for row in xlam([source]) if isinstance(row, Row) and len(row.gold) == 1]
    return {track: [make_example(row, track, seed) for row in rows[: count // 2]] for track in TRACKS}


def make_reply(rng: Random, track: str, completion: str) -> str:
    """A reply to a row with this gold, of a kind drawn by its weight."""
    kind = rng.choices(list(KINDS), KINDS.values())[0]
    gold = json.loads(completion[completion.index("{") : completion.rindex("}") + 1])
    arguments = gold if track == "toolcall" else gold["arguments"]
    name = completion.split('"')[1] if track == "toolcall" else gold["tool_name"]
    key = rng.choice(list(arguments))
    if kind == "other_order":
        arguments = dict(reversed(arguments.items()))
    elif kind == "wrong_value":
        arguments = arguments | {key: "Another Value"}
    elif kind == "wrong_type":
        arguments = {name: value if isinstance(value, (list, str)) else str(value) for name, value in arguments.items()}
    elif kind == "missing":
        arguments = {name: value for name, value in arguments.items() if name != key}
    elif kind == "extra":
        arguments = arguments | {"limit": 10}
    elif kind == "wrong_tool":
        name = "another_tool"
    value = arguments if track == "toolcall" else {"tool_name": name, "arguments": arguments}
    body = json.dumps(value) if kind == "spaces" else dump_json(value)
    text = f'<tool_call name="{name}">{body}</tool_call>' if track == "toolcall" else body
    shapes = {
        "prose": f"Here is what you asked for.\n{text}", "fence": f"```json\n{text}\n```", "twice": f"{text}\n{text}",
        "quotes": text.replace('"', "'"), "cut": text[: len(text) * 2 // 3], "nothing": "I cannot help with that.",
        "unwrapped": f"[{body}]",
    }  # fmt: skip
    return shapes.get(kind, text)


def measure(examples: dict[str, list[Example]], replies: dict[str, list[str]]) -> dict:
    """Seconds of each stage over both tracks."""
    seconds, errors = Counter(), Counter()
    for name, track in TRACKS.items():
        started = time.perf_counter()
        gold = references(track, examples[name])
        parsed = time.perf_counter()
        scored = [track.score(reference, text) for reference, text in zip(gold, replies[name], strict=True)]
        done = time.perf_counter()
        for matcher in MATCHERS:
            track.summarize(getattr(row, matcher) for row in scored)
        ended = time.perf_counter()
        seconds.update(
            {"references": parsed - started, "score": done - parsed, "summarize": ended - done, "total": ended - started}
        )
        errors.update(row.error or "none" for row in scored)
    return {"seconds": {stage: round(value, 3) for stage, value in seconds.items()}, "errors": dict(errors.most_common())}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--rows", type=positive, default=60000, help="rows, half of each track")
    parser.add_argument("--repeat", type=positive, default=3, help="measure this often and report the median")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the file to write (default: benchmarks/results/metrics.json)")
    parser.add_seed()
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    rng, examples = Random(args.seed), make_examples(args.rows, args.seed)
    replies = {track: [make_reply(rng, track, row.completion) for row in rows] for track, rows in examples.items()}
    count = sum(map(len, examples.values()))
    runs = sorted((measure(examples, replies) for _ in range(args.repeat)), key=lambda run: run["seconds"]["total"])
    median = runs[len(runs) // 2]
    total = median["seconds"]["total"]
    report = {
        "created_at": now(),
        "code": code_version(),
        "hardware": hardware(),
        "load_average": os.getloadavg()[0],  # above the number of cores, the times are too long
        "seed": args.seed,
        "rows": count,
        "microseconds_per_row": round(total / count * 1e6, 1),
        "totals_of_all_runs": [run["seconds"]["total"] for run in runs],
        **median,
    }
    out = args.out or ROOT / "benchmarks/results/metrics.json"
    write_json(out, report)
    print(f"{count} rows in {total:.2f} s, {report['microseconds_per_row']} microseconds a row: {json.dumps(median)}")
    print(f"report: {display_path(out)}")
    return 0


if __name__ == "__main__":
    run(main)
