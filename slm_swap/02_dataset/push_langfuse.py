"""Push a split to Langfuse as a dataset, for experiments that compare models row by row (eval.py --langfuse-experiment).

    python 02_dataset/push_langfuse.py --track toolcall --split test
    python 02_dataset/push_langfuse.py --track toolcall --dataset our_rows.jsonl --name our_rows

Pushing again doubles nothing: it updates rows that have changed and archives rows that are gone. The rows go to Langfuse in full,
prompts and completions included.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere

from slm_swap.cli import Parser, load_rows, next_step, run
from slm_swap.common.settings import load_settings
from slm_swap.scoring.tracks import TRACKS
from slm_swap.tracing.api import LangfuseApi
from slm_swap.tracing.datasets import dataset_name, push


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_track()
    rows = parser.add_mutually_exclusive_group()
    rows.add_argument("--split", help="the rows of 02_dataset/<track>/<split>.jsonl (default: test)")
    rows.add_argument("--dataset", metavar="FILE", help="rows from this file instead of a split")
    parser.add_argument("--name", metavar="DATASET", help="the dataset's name (default: slm_swap/<track>/<split or file>)")
    parser.set_defaults(limit=None)  # the dataset is the whole split: rows beyond a limit would count as gone
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with LangfuseApi(load_settings()) as api:
        examples, inputs, split = load_rows(args, [])
        for example in examples:
            TRACKS[args.track].reference(example)
        name = args.name or dataset_name(args.track, split)
        counts = push(api, name, args.track, examples, inputs)
    print(f"{name}: " + ", ".join(f"{count} {what}" for what, count in counts.items()))
    if not args.name:  # eval.py looks for the default one
        rows = f"--dataset {inputs['path']}" if args.dataset else f"--split {split}"
        next_step(f"python 01_eval/eval.py --track {args.track} --model-kind azure {rows} --langfuse-experiment NAME")
    return 0


if __name__ == "__main__":
    run(main)
