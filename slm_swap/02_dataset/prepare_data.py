"""Make the data of both tracks: train, val, test and calibration splits, and a report that accounts for every row read.

    python 02_dataset/prepare_data.py --source chat --dataset-path ../tests/data/openai_chat.jsonl
    python 02_dataset/prepare_data.py --source xlam --dataset-path 02_dataset/sample/xlam_sample.jsonl --unseen-tools

--source chat reads a team's own logs by looking at them: OpenAI, Azure and Anthropic messages, batch output, TRL, ShareGPT, Hermes,
tau-bench, Langfuse exports and others. --source jsonl reads this program's own rows. Splits share no conversation, no query, no
near-duplicate (Jaccard of their words of 0.7 or more) and no source row. prepare_dropped.jsonl lists each row left out with the reason.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere

from slm_swap.cli import Parser, next_step, not_negative, run, warn
from slm_swap.common.errors import UserError
from slm_swap.common.progress import Progress
from slm_swap.common.reports import SCHEMA_VERSION, code_version, now, sha256_file
from slm_swap.common.settings import display_path, find_path, shown_path
from slm_swap.dataset.build import build
from slm_swap.dataset.readers import importers
from slm_swap.dataset.readers.chat import chat, forms_seen
from slm_swap.dataset.readers.files import read_rows
from slm_swap.dataset.readers.own import jsonl
from slm_swap.dataset.readers.sources import Seen
from slm_swap.dataset.row import Dropped, Row
from slm_swap.dataset.splits import SPLITS, Sizes
from slm_swap.dataset.summary import remarks, summary
from slm_swap.rows.lines import writable
from slm_swap.rows.schema_parts import unread_patterns
from slm_swap.scoring.tracks import TRACKS


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--source", required=True, choices=("chat", "xlam", "bfcl", "jsonl"), help="the format of the rows")
    parser.add_argument(
        "--dataset-path", required=True, nargs="+", type=find_path, metavar="FILE", help=".jsonl, .json, .csv or .parquet, or .gz of one"
    )
    parser.add_argument("--answers", nargs="+", type=find_path, metavar="FILE", help="the gold of --source bfcl")
    parser.add_argument("--track", choices=TRACKS, help="rows of this track alone; prompt and completion rows of --source jsonl need it")
    parser.add_argument("--calls", choices=("any", "one"), default="any", help="one: only rows in which exactly one call is due")
    parser.add_argument("--train-size", type=not_negative, metavar="N", help="rows in train (default: all that are left)")
    parser.add_argument("--val-size", type=not_negative, metavar="N", help="rows in val (default: 10%%)")
    parser.add_argument(
        "--test-size",
        type=not_negative,
        metavar="N",
        help="rows in test (default: 10%%, at least 300 of 1,000 or more rows; the rest with --train-size 0)",
    )
    parser.add_argument("--calibration-size", type=not_negative, default=0, metavar="N", help="rows for 03_compare/calibrate.py alone: 300 to 2,000")
    parser.add_argument("--split-by", choices=("chance", "time"), default="chance", help="time: the newest conversations are the test")
    parser.add_argument("--unseen-tools", action="store_true", help="keep the gold tools of test out of train and val")
    parser.add_argument("--out-dir", type=Path, metavar="DIR", help="where the splits go (default: this script's folder)")
    parser.add_seed()
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.answers and args.source != "bfcl":
        raise UserError("--source bfcl needs --answers FILE, the possible answers to its rows; other sources take none")
    if args.track and args.source in ("xlam", "bfcl"):
        raise UserError(f"--source jsonl needs --track and --source chat takes it; --source {args.source} makes both tracks")
    seen = Seen()
    rows: list[Row | Dropped] = []
    with Progress("rows read") as shown:
        for item in _with_calls(_items(args, seen), args.calls):
            rows.append(item)
            shown.update()
    counts = Counter(item.where.rpartition(":")[0] for item in rows)
    counts.update({display_path(path): sum(1 for _ in read_rows(path)) for path in args.answers or ()})
    tools = {id(tool): tool for item in rows if isinstance(item, Row) for tool in item.tools}.values()
    unread = sum(unread_patterns(tool["parameters"]) for tool in tools)
    if unread:
        seen.notes["patterns that cannot be read: they forbid nothing"] += unread
    head = {
        "schema_version": SCHEMA_VERSION,
        "stage": "prepare_data",
        "created_at": now(),
        "args": {name: _shown(value) for name, value in vars(args).items()},
        "code": code_version(),
        "inputs": [_input(path, counts, seen) for path in (*args.dataset_path, *(args.answers or ()))],
        "unknown_fields": {writable(name): count for name, count in seen.unknown.items()},
        "notes": dict(seen.notes),
    }
    if seen.unknown:
        named = ", ".join(f"{writable(name)} ({count} rows)" for name, count in seen.unknown.most_common(12))
        warn(f"fields that nothing reads: {named}: a misspelt name loses its content")
    sizes = Sizes(args.train_size, args.val_size, args.test_size, args.calibration_size)
    tracks = (args.track,) if args.track else tuple(TRACKS)
    out_dir, by_time = args.out_dir or Path(__file__).parent, args.split_by == "time"
    earlier = splits_at(out_dir, tracks)
    with Progress("duplicates and splits"):
        report = build(rows, out_dir, head, sizes, args.seed, args.unseen_tools, tracks, by_time)
    print(summary(report))
    for line in remarks(report, out_dir):
        print(line)
    now_there = splits_at(out_dir, tracks)
    if replaced := [shown_path(path) for path, sha256 in earlier.items() if now_there.get(path) != sha256]:
        warn(f"splits of an earlier run were replaced: {', '.join(replaced)}: reports and adapters of those rows are not of these")
    print(f"report: {shown_path(out_dir / 'prepare_report.json')}")
    tell_next(args, out_dir, [track for track in tracks if report["splits"][track]["test"]["rows"]])
    return 0


def splits_at(out_dir: Path, tracks: Iterable[str]) -> dict[Path, str]:
    """The hashes of the splits that are there."""
    paths = [out_dir / track / f"{name}.jsonl" for track in tracks for name in SPLITS]
    return {path: sha256_file(path) for path in paths if path.is_file()}


def tell_next(args: argparse.Namespace, out_dir: Path, tracks: list[str]) -> None:
    for track in tracks:
        rows = f" --dataset {shown_path(out_dir / track / 'test.jsonl')}" if args.out_dir else ""
        next_step(f"python 01_eval/eval.py --track {track} --model-kind azure{rows}")


def _items(args: argparse.Namespace, seen: Seen) -> Iterable[Row | Dropped]:
    if args.source == "chat":
        return chat(args.dataset_path, seen)
    if args.source == "bfcl":
        return importers.bfcl(args.dataset_path, args.answers or (), seen)
    return jsonl(args.dataset_path, args.track, seen) if args.source == "jsonl" else importers.xlam(args.dataset_path)


def _with_calls(items: Iterable[Row | Dropped], calls: str) -> Iterator[Row | Dropped]:
    """With --calls one, toolcall rows in which another number of calls is due are dropped."""
    for item in items:
        due = len(item.gold) if isinstance(item, Row) and item.track != "structured" else 1
        if calls == "any" or due == 1:
            yield item
        else:
            yield Dropped(item.id, item.where, "several_answers" if due else "no_call_due", f"{due} calls are due")


def _input(path: Path, counts: Counter, seen: Seen) -> dict[str, object]:
    known = {"path": display_path(path), "sha256": sha256_file(path), "rows": counts[display_path(path)]}
    forms = forms_seen(seen, path)
    return known | ({"forms": forms} if forms else {})


def _shown(value: object) -> object:
    if isinstance(value, list):
        return [_shown(item) for item in value]
    return display_path(value) if isinstance(value, Path) else value


if __name__ == "__main__":
    run(main)
