"""Make the data of both tracks: train, val and test splits, and a report that accounts for every row read.

    python 02_dataset/prepare_data.py --source xlam --dataset-path 02_dataset/sample/xlam_sample.jsonl
    python 02_dataset/prepare_data.py --source xlam --dataset-path 02_dataset/sample/xlam_sample.jsonl --unseen-tools

Both tracks are built from the same source rows; a team's own {prompt, completion} rows (--source jsonl) are for one --track.
Splits share no query, no near-duplicate (Jaccard of their words of 0.7 or more) and no source row. The Berkeley leaderboard
(--source bfcl) has its gold in files of its own: name them with --answers.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere

from slm_swap.cli import Parser, not_negative, run
from slm_swap.common.errors import UserError
from slm_swap.common.reports import SCHEMA_VERSION, code_version, now, sha256_file
from slm_swap.common.settings import display_path, find_path
from slm_swap.dataset import importers
from slm_swap.dataset.build import Sizes, build
from slm_swap.scoring.tracks import TRACKS


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--source", required=True, choices=("xlam", "bfcl", "jsonl"), help="the format of the rows")
    parser.add_argument(
        "--dataset-path", required=True, nargs="+", type=find_path, metavar="FILE", help=".jsonl, .json or .parquet"
    )
    parser.add_argument("--answers", nargs="+", type=find_path, metavar="FILE", help="the gold of --source bfcl")
    parser.add_argument("--track", choices=TRACKS, help="the one track that the rows of --source jsonl are for")
    parser.add_argument("--train-size", type=not_negative, metavar="N", help="rows in train (default: all that are left)")
    parser.add_argument("--val-size", type=not_negative, metavar="N", help="rows in val (default: 10%%)")
    parser.add_argument(
        "--test-size", type=not_negative, metavar="N", help="rows in test (default: 10%%; the rest with --train-size 0)"
    )
    parser.add_argument("--unseen-tools", action="store_true", help="keep the gold tools of test out of train and val")
    parser.add_argument("--out-dir", type=Path, metavar="DIR", help="where the splits go (default: this script's folder)")
    parser.add_seed()
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if (args.source == "bfcl") != bool(args.answers):
        raise UserError("--source bfcl needs --answers FILE, the possible answers to its rows; other sources take none")
    if (args.source == "jsonl") != bool(args.track):
        raise UserError("--source jsonl needs --track, the one track that the rows are for; other sources make both tracks")
    if args.source == "bfcl":
        items = importers.bfcl(args.dataset_path, args.answers)
    elif args.source == "jsonl":
        items = importers.jsonl(args.dataset_path, args.track)
    else:
        items = importers.xlam(args.dataset_path)
    rows = list(items)
    counts = Counter(item.where.rpartition(":")[0] for item in rows)
    counts.update({display_path(path): sum(1 for _ in importers.read_rows(path)) for path in args.answers or ()})
    head = {
        "schema_version": SCHEMA_VERSION,
        "stage": "prepare_data",
        "created_at": now(),
        "args": {name: _shown(value) for name, value in vars(args).items()},
        "code": code_version(),
        "inputs": [
            {"path": display_path(path), "sha256": sha256_file(path), "rows": counts[display_path(path)]}
            for path in (*args.dataset_path, *(args.answers or ()))
        ],
    }
    sizes = Sizes(args.train_size, args.val_size, args.test_size)
    tracks = (args.track,) if args.track else tuple(TRACKS)
    print(summary(build(rows, args.out_dir or Path(__file__).parent, head, sizes, args.seed, args.unseen_tools, tracks)))
    return 0


def _shown(value: object) -> object:
    if isinstance(value, list):
        return [_shown(item) for item in value]
    return display_path(value) if isinstance(value, Path) else value


def summary(report: dict) -> str:
    """What was read, kept and dropped, and the splits, as a small table."""
    counts = report["counts"]
    lines = [f"{'read':<24}{counts['read']:>8}", f"{'kept':<24}{counts['kept']:>8}"]
    lines += [f"{'dropped: ' + reason:<24}{count:>8}" for reason, count in sorted(counts["dropped"].items())]
    for track, splits in report["splits"].items():
        lines += [f"{track + '/' + name:<24}{split['rows']:>8}" for name, split in splits.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
