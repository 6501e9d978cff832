"""Evaluate one model on one track: a report and a file of rows beside it.

    python 01_eval/eval.py --track toolcall --model-kind azure
    python 01_eval/eval.py --track toolcall --model-kind slm --adapter 04_ft/adapter_toolcall --out 01_eval/reports/after.json
    python 01_eval/eval.py --track toolcall --model-kind replay --replies recorded.jsonl
    ./eval_parallel.sh --track toolcall --model-kind slm
    python 01_eval/eval.py --track toolcall --model-kind slm --recipe 04_ft/improve_toolcall/recipe.json
    python 01_eval/eval.py --track toolcall --model-kind azure --again failed,truncated --max-new-tokens 1024

After an interruption the same command continues where it stopped: until the report is written, every reply is in the journal
beside it, <report>.rows.jsonl.part. A finished report is never replaced without --overwrite. slm_swap/README.md explains its keys.
"""

import argparse
import sys
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere

from slm_swap.cli import (
    Parser,
    check_out,
    client_options,
    few_shot_report,
    find_rows,
    minutes,
    next_step,
    not_negative,
    positive,
    require_own_model,
    run,
    run_metadata,
    tracing_options,
    warn,
    warn_of_unknown_fields,
)
from slm_swap.clients.protocol import MODEL_KINDS, Client
from slm_swap.clients.replicas import fork_replica, take_one_gpu
from slm_swap.common.errors import UserError
from slm_swap.common.progress import Progress
from slm_swap.common.reports import SCHEMA_VERSION, rows_path, write_atomically, write_json
from slm_swap.common.settings import PACKAGE, display_path, load_settings, shown_path
from slm_swap.evaluating.console import show, warn_of_training
from slm_swap.evaluating.evaluation import Stopwatch, check_rows, evaluate_rows
from slm_swap.evaluating.experiments import find_experiment, link
from slm_swap.evaluating.factory import make_client
from slm_swap.evaluating.finished import KINDS, Finished, finished_report, run_id_at
from slm_swap.evaluating.journal import Journal, elsewhere, journal_path
from slm_swap.evaluating.latency import alone_rows, latency_of
from slm_swap.evaluating.outage import Outage
from slm_swap.evaluating.recipe import read_recipe
from slm_swap.evaluating.repeat import repeat_rows
from slm_swap.evaluating.reply_cache import ReplyCache
from slm_swap.evaluating.report import Tally, make_report
from slm_swap.evaluating.row import Row
from slm_swap.evaluating.row_traces import RowTracer, model_name
from slm_swap.rows.examples import Dataset
from slm_swap.slm_client import serve_rows
from slm_swap.tracing.datasets import ENVIRONMENT
from slm_swap.tracing.runs import connect, trace_run


def kinds(text: str) -> list[str]:
    """Some of finished.KINDS with commas between, for argparse."""
    chosen = [word.strip() for word in text.split(",")]
    if not set(chosen) <= set(KINDS):
        raise argparse.ArgumentTypeError(f"{text}: give {', '.join(KINDS)} or both with a comma between")
    return [kind for kind in KINDS if kind in chosen]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_track()
    parser.add_argument("--model-kind", required=True, choices=MODEL_KINDS, help="the model to evaluate")
    parser.add_rows()
    parser.add_ask()
    parser.add_client()
    parser.add_recipe()
    parser.add_argument("--cache", metavar="DIR", help="a folder of replies: take what it has, and keep new replies there")
    parser.add_argument("--out", type=Path, help="the report (default: 01_eval/reports/<track>_<model-kind>_<split>.json)")
    parser.add_argument("--overwrite", action="store_true", help="ask all rows again and replace an existing report")
    parser.add_argument("--again", type=kinds, default=[], metavar="KINDS", help="of a finished report ask only unmeasured rows again: failed, truncated, or both with a comma")
    parser.add_argument("--latency-rows", type=not_negative, default=20, help="rows asked one at a time to measure latency, at most a tenth of all; 0: none")
    parser.add_argument("--repeat", type=positive, default=1, metavar="RUNS", help="ask a sample of the rows this many times, to measure how much replies differ")
    parser.add_argument("--repeat-rows", type=positive, default=100, metavar="N", help="rows in that sample")
    parser.add_argument("--outage-minutes", type=minutes, default=5.0, help="end the run after this many minutes without an answer of the hosted model")
    parser.add_seed()
    parser.add_tracing()
    parser.add_argument("--langfuse-experiment", metavar="NAME", help="record the run as an experiment on the rows' Langfuse dataset")
    args = parser.parse_args(argv)
    if (args.model_kind == "replay") != bool(args.replies):
        parser.error("--model-kind replay and --replies FILE go together")
    for flag, given in (("--cache", args.cache), ("--again", args.again), ("--few-shot", args.few_shot), ("--repeat", args.repeat > 1)):
        if args.replies and given:
            parser.error(f"{flag} has no effect with --replies, because no model is asked: leave it out")
    if args.recipe and args.model_kind != "slm":
        parser.error("--recipe says how the small model is asked: leave it out, or give --model-kind slm")
    require_own_model(parser, args, [args.model_kind])
    if args.again and args.overwrite:
        parser.error("--again keeps the report's other rows and --overwrite keeps none: give one of them")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    clock, settings = Stopwatch(), load_settings()
    if settings.launch.world > 1:
        if args.model_kind != "slm" or settings.slm_base_url:
            raise UserError("only the local model uses several processes: start --model-kind azure, replay and a model of SLM_BASE_URL with python")
        take_one_gpu(settings.launch)
        settings = replace(settings, launch=fork_replica(settings.launch))
    if settings.launch.serves:
        serve_rows(settings, args.seed, **client_options(args))
        return 0
    recipe = read_recipe(args.recipe, args.track) if args.recipe else None
    if recipe:
        recipe.check_place(settings)
    connection = connect(settings, tracing_options(args, settings))
    dataset, inputs, name = find_rows(args, [args.model_kind])
    tally = check_rows(args.track, dataset)
    warn_of_unknown_fields(dataset)
    inputs |= few_shot_report(dataset.few_shot)
    if args.model_kind == "slm" and not recipe:  # which was measured as it is
        warn_of_training(args.adapter or settings.slm_model_path, tally.ask, args.thinking, dataset.few_shot.count if dataset.few_shot else 0, warn)
    out = args.out = args.out or PACKAGE / f"01_eval/reports/{args.track}_{args.model_kind}_{name}.json"
    check_out(out, rows_path(out), journal_path(out), inputs=[inputs["path"], args.replies])
    asked = {"schema_version": SCHEMA_VERSION, "track": args.track, "dataset_sha256": inputs["sha256"]}
    asked |= {"rows": len(tally.contents), "prompt_sha256": tally.prompt_sha256}
    old = finished_report(out, asked, bool(args.again), args.overwrite)
    experiment = find_experiment(args, settings, dataset, inputs, name, run_metadata(args)) if args.langfuse_experiment else None
    with Journal(journal_path(out)) as journal:
        client = make_client(args.model_kind, settings, args.track, dataset, seed=args.seed, **client_options(args))
        try:
            asked |= {"model": client.identity}
            if recipe:
                recipe.check(client.identity)
            journal.discard(run_id_at(out))
            if old is None:
                journal.begin(asked, asked["rows"])
            elif not old.begin(journal, asked, args.again, args.max_new_tokens, client.kind != "slm", args.repeat):
                if args.langfuse_experiment:
                    raise UserError(f"{shown_path(out)} is finished, and an experiment is recorded as rows are asked: pass --overwrite or another --out")
                print(f"nothing to ask: the report of these rows is finished (--overwrite asks them again)\nreport: {shown_path(out)}")
                tell_next(args, name)
                return 0
            if empty := getattr(client, "warning", None):
                warn(empty)
            told, read = client.describe(), {"split": name, "dataset": inputs["path"], "dataset_sha256": inputs["sha256"]}
            model = {"model": model_name(told), "engine": told.get("engine", args.model_kind)}
            metadata = run_metadata(args) | read | model | {"report": display_path(out)}
            title, tags = f"eval-{args.track}-{args.model_kind}", ["eval", args.track, args.model_kind]
            environment = ENVIRONMENT if experiment else None
            with trace_run(connection, title, out, metadata, tags, journal.header["run_id"], lambda: journal.answered > 0, environment) as trace:
                tell = RowTracer(trace, args.track, client, experiment, lambda: journal.seconds, journal.answered)
                report = measure(args, tally, client, dataset, journal, tell, clock, inputs, old)
                trace.scores(report["metrics"])
                trace.update(output={"metrics": report["metrics"], "counts": report["counts"]}, metadata={"model": report["model"]})
                report |= {"trace": {"id": trace.id, "url": trace.url}, "asked": old.report["asked"] if old else asked}
                journal.require_place(out)
                write_atomically(rows_path(out), lambda stream: stream.writelines(journal.lines()), elsewhere(out))
                write_json(out, report, elsewhere(out))
            if experiment:
                link(experiment, settings, dataset, trace, warn)
        except BaseException:
            if journal.answered:
                warn(f"{journal.answered} of {len(journal)} rows are answered and kept: the same command continues from there")
            raise
        finally:
            client.close()
        journal.remove()
    show(report, out, sys.argv[1:] if argv is None else argv, warn)
    tell_next(args, name)
    return 0


def tell_next(args: argparse.Namespace, name: str) -> None:
    """The comparison, where both models' reports are there; else the evaluation of the other model on the same rows."""
    other = "slm" if args.model_kind == "azure" else "azure"
    report = PACKAGE / f"01_eval/reports/{args.track}_{other}_{name}.json"
    if report.is_file():
        sides = {"azure" if other == "slm" else "slm": args.out, other: report}
        told = " ".join(f"--{side} {shown_path(path)}" for side, path in sorted(sides.items()))
        return next_step(f"python 03_compare/compare.py --track {args.track} {told} --table")
    rows = f" --dataset {args.dataset}" if args.dataset else f" --split {args.split}" if args.split else ""
    rows += f" --limit {args.limit}" if args.limit else ""
    return next_step(f"python 01_eval/eval.py --track {args.track} --model-kind {other}{rows}")


def measure(
    args: argparse.Namespace, tally: Tally, client: Client, dataset: Dataset, journal: Journal, tell: RowTracer, clock: Stopwatch,
    inputs: dict[str, Any], old: Finished | None,
) -> dict[str, Any]:  # fmt: skip
    """Get the rows that the journal has not, with a progress bar, and what is measured besides: the report."""
    rows, earlier, outage = len(journal), journal.seconds, Outage(args.outage_minutes)
    to_ask = journal.kept.get("to ask")  # of a report that is finished except for these
    alone = alone_rows(rows, args.latency_rows, args.seed) if client.kind == "azure" and old is None else []
    concurrency = min(args.concurrency, rows if to_ask is None else len(to_ask)) if client.kind == "azure" else None
    if journal.answered:
        print(f"{journal.answered} of {rows} rows are answered already: continuing with the others", file=sys.stderr)
    cache = ReplyCache(args.cache, client.identity) if args.cache else None
    with Progress(f"{args.track} {args.model_kind}", rows, earlier=journal.answered) as bar, closing(cache) if cache else nullcontext():

        def on_row(index: int, row: Row) -> None:
            bar.update()
            tell(index, row)

        try:
            evaluate_rows(tally, client, dataset, journal, cache, on_row, alone, concurrency, outage)
        finally:
            tell.tell_held()
    tell.finish()
    if damage := journal.told_of_damage():
        warn(damage)
    if cache and cache.damaged:
        warn(f"{cache.damaged} replies of {shown_path(cache.path)} were damaged: they were asked again")
    repeat, cost = repeat_rows(tally.track, client, dataset, journal, args.repeat, args.repeat_rows, args.seed, outage)
    measured = client.kind == "slm" and old and old.report.get("latency")
    latency = None if measured else latency_of(client, tally, dataset, journal, args.latency_rows, args.seed, args.concurrency)
    seconds, flags = (journal.seconds, clock.total + earlier), vars(args) | {"out": display_path(args.out)}
    report = make_report(args.track, client, tally, *seconds, inputs, flags, journal.sessions, journal.cached, cost)
    report |= {"run_id": journal.header["run_id"], "repeat": repeat, "latency": latency, "again": []}
    return old.extend(report, args.again, len(to_ask)) if old else report


if __name__ == "__main__":
    run(main, launched=True)
