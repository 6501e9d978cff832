"""Send one prompt to one model and print its reply.

    python 01_eval/infer.py --track toolcall --model-kind slm --prompt-file prompt.txt
    python 01_eval/infer.py --track structured --model-kind azure --dataset 02_dataset/structured/test.jsonl --row 3
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere

from slm_swap.cli import Parser, client_options, few_shot_of, next_step, positive, require_own_model, run
from slm_swap.common.errors import UserError
from slm_swap.common.os_errors import os_error
from slm_swap.common.settings import find_path, load_settings, shown_path
from slm_swap.evaluating.factory import make_client
from slm_swap.rows.examples import Example, read_examples
from slm_swap.rows.prompts import request_of
from slm_swap.scoring.tracks import TRACKS


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_track()
    parser.add_argument("--model-kind", required=True, choices=("slm", "azure"), help="the model to ask")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="the prompt, as a row has it")
    what.add_argument("--prompt-file", metavar="FILE", help="a file with the prompt, or - for standard input")
    what.add_argument("--dataset", metavar="FILE", help="a file of rows: the prompt of one row, and the score of the reply")
    parser.add_argument("--row", type=positive, default=1, help="which row of --dataset, from 1")
    parser.add_ask()
    parser.add_client(replay=False)
    parser.add_seed()
    args = parser.parse_args(argv)
    require_own_model(parser, args, [args.model_kind])
    return args


def read_row(args: argparse.Namespace) -> Example:
    """The row to ask; its completion is empty where only a prompt is given."""
    if args.dataset:
        examples = read_examples(find_path(args.dataset), args.row)
        if len(examples) < args.row:
            raise UserError(f"{shown_path(args.dataset)} has {len(examples)} rows: --row {args.row} is not among them")
        example, few_shot = replace(examples[-1], ask=args.ask), few_shot_of(args)
        return replace(example, shots=few_shot.turns(example)) if few_shot else example
    if args.few_shot:
        raise UserError("--few-shot needs a row, whose tools or schema are known: pass --dataset FILE")
    if args.prompt_file:
        try:
            prompt = sys.stdin.read() if args.prompt_file == "-" else Path(args.prompt_file).read_text(encoding="utf-8")
        except OSError as error:
            raise os_error(error, "read", args.prompt_file, "give a text file in UTF-8") from None
        except UnicodeDecodeError as error:
            raise UserError(f"cannot read {args.prompt_file} ({error}): give a text file in UTF-8") from None
    else:
        prompt = args.prompt
    if not prompt.strip():
        raise UserError("the prompt is empty: say what the model should do")
    if args.ask == "native":
        raise UserError("--ask native needs a row with `messages`, or with `tools` or `schema`: pass --dataset FILE")
    return Example(prompt, "")


def count(tokens: int | None) -> str:
    return "?" if tokens is None else str(tokens)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    settings, track = load_settings(), TRACKS[args.track]
    example = read_row(args)
    gold = track.reference(example) if args.dataset else None
    client = make_client(args.model_kind, settings, args.track, [example], seed=args.seed, **client_options(args))
    try:
        (reply,) = client.generate([request_of(args.track, example)])
    finally:
        client.close()
    if reply.error:
        raise UserError(f"no reply after {reply.seconds:.2f} s ({reply.finish_reason}): {reply.error}")
    print(reply.shown)
    told = f"{reply.finish_reason}, {count(reply.input_tokens)} + {count(reply.output_tokens)} tokens, {reply.seconds:.2f} s"
    if gold:
        scored = track.score(gold, reply.text, reply.finish_reason, reply.calls)
        told += f", {'right' if scored.strict.exact else scored.error}; reference: {example.completion}"
    print(told, file=sys.stderr)
    next_step(f"python 01_eval/eval.py --track {args.track} --model-kind {args.model_kind}", stream=sys.stderr)
    return 0


if __name__ == "__main__":
    run(main)
