"""Label rows that have no reply: ask the hosted model several times, and take what its replies agree on as the row's gold.

    python 02_dataset/label.py --track toolcall --prompts asked.jsonl --samples 3
    python 02_dataset/label.py --track toolcall --prompts asked.jsonl --samples 3 --budget 5

The first command prints the highest possible cost and asks nothing. --budget is the most that may be spent, and confirms. A row
whose samples all agree (--agree) and match its schema goes to --out, the others with their votes to <out>.review.jsonl. After an interruption,
or when the budget is spent, the same command continues: no reply is paid twice. Such rows measure agreement with that model, not accuracy.
"""

import argparse
import sys
from decimal import ROUND_CEILING, Decimal
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere

from slm_swap.cli import Parser, check_out, next_step, positive, run, warn
from slm_swap.common.errors import UserError
from slm_swap.common.progress import Progress
from slm_swap.common.reports import SCHEMA_VERSION, code_version, now, sha256_file, write_json, write_jsonl
from slm_swap.common.settings import PACKAGE, Settings, display_path, find_path, load_settings, shown_path
from slm_swap.dataset.labels import counts_of, labelled, unlabelled, votes_of
from slm_swap.evaluating.factory import make_client
from slm_swap.evaluating.journal import Journal, elsewhere, journal_path
from slm_swap.evaluating.labelling import Labelling
from slm_swap.evaluating.outage import Outage
from slm_swap.rows.examples import Example
from slm_swap.rows.lines import read_jsonl


def amount(text: str) -> float:
    """A number above 0, for argparse."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_track()
    parser.add_argument("--prompts", required=True, type=find_path, metavar="FILE", help="rows with `messages` or `prompt`, without a reply")
    parser.add_argument("--samples", type=positive, default=3, help="how often each row is asked")
    parser.add_argument("--agree", type=positive, metavar="N", help="samples that must agree (default: all of them)")
    parser.add_argument("--temperature", type=amount, default=1.0, help="of the samples: at 0 they would be alike whatever the model knows")
    parser.add_argument("--budget", type=amount, metavar="MONEY", help="the most that may be spent, in the price table's currency")
    parser.add_argument("--out", type=Path, help="the labelled rows (default: 02_dataset/labels_<track>.jsonl)")
    parser.add_argument("--overwrite", action="store_true", help="replace labels that are there already")
    parser.add_argument("--concurrency", type=positive, default=32, help="rows that the hosted model is asked at a time")
    parser.add_argument("--max-new-tokens", type=positive, default=512, help="longest reply")
    parser.add_ask()
    parser.add_seed()
    args = parser.parse_args(argv)
    if args.agree and not args.samples / 2 < args.agree <= args.samples:
        parser.error("--agree must be more than half of --samples, and not more than all of them")
    return args


def read_prompts(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[Example]]:
    """The rows as they are written, and as they are asked."""
    rows, examples = [], []
    for where, row in read_jsonl(args.prompts):
        example = unlabelled(row, args.track, where)
        vars(example)["ask"] = args.ask
        rows.append(row)
        examples.append(example)
    if not rows:
        raise UserError(f"{shown_path(args.prompts)} has no rows: write one JSON object a line")
    if len({example.id for example in examples}) != len(examples):
        raise UserError(f"{shown_path(args.prompts)}: an id or a whole row occurs twice: keep one")
    return rows, examples


def sampler(args: argparse.Namespace, settings: Settings, sample: int) -> Any:
    """The hosted model's client for one sample: its own seed, so that samples differ."""
    options = {"max_new_tokens": args.max_new_tokens, "concurrency": args.concurrency, "temperature": args.temperature}
    return make_client("azure", settings, args.track, (), seed=args.seed + sample, **options)


def confirm(args: argparse.Namespace, labelling: Labelling, client: Any, answered: int) -> None:
    """Tell what the samples cost at most.

    Raises:
        UserError: the prices are not known, or no --budget confirms it.
    """
    most, currency = labelling.most(client), client.prices.currency or ""
    requests = len(labelling.requests) * args.samples
    if most is None:
        raise UserError(f"{requests} requests, and the deployment's prices are not in {client.prices.path}: write them there, because a budget needs them")
    rounded = f"{Decimal(most).quantize(Decimal(10) ** (Decimal(most).adjusted() - 1), ROUND_CEILING):f}"
    told = f"{requests} requests of {len(labelling.requests)} rows cost at most about {rounded} {currency}".rstrip()
    told += f", {answered} are answered already" if answered else ""
    if args.budget is None:
        raise UserError(f"{told}: pass --budget {rounded}, or less, to ask them")
    print(told)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    out = args.out or PACKAGE / f"02_dataset/labels_{args.track}.jsonl"
    review, report = out.with_suffix(".review.jsonl"), out.with_suffix(".report.json")
    check_out(out, review, report, journal_path(out), inputs=[args.prompts])
    if out.exists() and not args.overwrite and not journal_path(out).exists():  # with a journal, a run was killed while it wrote its results
        raise UserError(f"{shown_path(out)} is there already: pass --overwrite, or choose another --out")
    rows, examples = read_prompts(args)
    settings, make = load_settings(), partial(sampler, args, load_settings())
    labelling = Labelling(args.track, examples, args.samples, args.max_new_tokens, args.budget)
    client = sampler(args, settings, 0)
    client.close()
    asked = {"schema_version": SCHEMA_VERSION, "track": args.track, "prompts_sha256": sha256_file(args.prompts), "samples": args.samples}
    with Journal(journal_path(out)) as journal:
        journal.begin(asked | {"ask": args.ask, "model": client.identity}, len(rows) * args.samples)
        if damage := journal.told_of_damage():
            warn(damage)
        confirm(args, labelling, client, journal.answered)
        with Progress(f"{args.track} labels", len(journal), "replies", journal.answered) as bar:
            bar.update(journal.answered)
            complete = labelling.ask(make, journal, Outage(), bar.update)
        if not complete:
            raise UserError(
                f"the budget is spent: {labelling.spent:.4g} for {journal.answered} of {len(journal)} replies, which are kept; "
                "the same command with a larger --budget continues"
            )
        if missing := len(journal) - journal.answered:
            raise UserError(f"{missing} of {len(journal)} requests failed ({labelling.failure}): the same command asks them again")
        votes = [votes_of(args.track, example, labelling.replies(journal, at)) for at, example in enumerate(examples)]
        teacher, needed = labelling.model["deployment"], args.agree or args.samples
        found = [labelled(row, args.track, example, own, needed, teacher) for row, example, own in zip(rows, examples, votes, strict=True)]
        kept = [row for row in found if row is not None]
        journal.require_place(out)
        left = [(row, own) for row, own, row_found in zip(rows, votes, found, strict=True) if row_found is None]
        write_jsonl(review, (row | {"votes": [vote.to_json() for vote in own]} for row, own in left), elsewhere(out))
        told = {"schema_version": SCHEMA_VERSION, "stage": "label", "created_at": now(), "code": code_version(), "asked": asked, "model": labelling.model}
        told |= {"rows": len(rows), "kept": len(kept), "review": len(left), "different_answers": counts_of(votes)}
        told |= {"cost": round(labelling.spent, 9), "replies_without_usage": labelling.unknown}
        write_json(report, told, elsewhere(out))
        if kept:  # last: once it is there, the same command is refused
            write_jsonl(out, kept, elsewhere(out))
        journal.remove()
    print(f"{len(kept)} of {len(rows)} rows: {needed} of {args.samples} samples agree; they cost {labelling.spent:.4g} {client.prices.currency or ''}".rstrip())
    print(f"{'labelled: ' + display_path(out) if kept else 'nothing is labelled'}\nto review: {shown_path(review)} ({len(left)} rows with their votes)")
    if kept:
        next_step(f"python 02_dataset/prepare_data.py --source jsonl --track {args.track} --dataset-path {shown_path(out)}")
    return 0


if __name__ == "__main__":
    run(main)
