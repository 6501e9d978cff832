"""Evaluate one model on one track: a report and a file of rows beside it.

    python 01_eval/eval.py --track toolcall --model-kind azure
    python 01_eval/eval.py --track toolcall --model-kind slm --adapter 04_ft/adapter_toolcall --out 01_eval/reports/after.json
    python 01_eval/eval.py --track toolcall --model-kind replay --replies recorded.jsonl
    ./eval_parallel.sh --track toolcall --model-kind slm

Interrupted in any way, the same command goes on where it stopped: until the report is written, every reply is in the journal
beside it, <report>.rows.jsonl.part. slm_swap/README.md says what the report's keys mean.
"""

import argparse
import sys
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere

from slm_swap.cli import Parser, check_out, client_options, find_rows, progress, run, run_metadata, tracing_options, warn
from slm_swap.clients.protocol import MODEL_KINDS, Client
from slm_swap.clients.replicas import fork_replica, take_one_gpu
from slm_swap.common.errors import UserError
from slm_swap.common.reports import SCHEMA_VERSION, rows_path, write_atomically, write_json
from slm_swap.common.settings import PACKAGE, Settings, display_path, load_settings
from slm_swap.evaluating.evaluation import Row, RowTracer, Stopwatch, Tally, check_rows, evaluate_rows, make_report, model_name
from slm_swap.evaluating.factory import make_client
from slm_swap.evaluating.journal import Journal, journal_path
from slm_swap.evaluating.reply_cache import ReplyCache
from slm_swap.rows.examples import Dataset
from slm_swap.slm_client import serve_rows
from slm_swap.tracing.api import LangfuseApi
from slm_swap.tracing.datasets import Experiment, dataset_name, open_experiment
from slm_swap.tracing.runs import connect, trace_run


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_track()
    parser.add_argument("--model-kind", required=True, choices=MODEL_KINDS, help="the model to evaluate")
    parser.add_rows()
    parser.add_client()
    parser.add_argument("--cache", metavar="DIR", help="take replies that this folder has already, and keep the others there")
    parser.add_argument("--out", type=Path, help="the report (default: 01_eval/reports/<track>_<model-kind>_<split>.json)")
    parser.add_seed()
    parser.add_tracing()
    parser.add_argument("--langfuse-experiment", metavar="NAME", help="record the run as an experiment on the rows' Langfuse dataset")
    args = parser.parse_args(argv)
    if (args.model_kind == "replay") != bool(args.replies):
        parser.error("--model-kind replay and --replies FILE go together")
    if args.replies and args.cache:
        parser.error("--cache is of no use with --replies, where no model is asked")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    clock, settings = Stopwatch(), load_settings()
    if settings.launch.world > 1:
        if args.model_kind != "slm":
            raise UserError("only the local model has use for several processes: start --model-kind azure and replay by python")
        take_one_gpu(settings.launch)
        settings = replace(settings, launch=fork_replica(settings.launch))
    if settings.launch.serves:
        serve_rows(settings, args.seed, **client_options(args))
        return 0
    connection = connect(settings, tracing_options(args, settings))
    dataset, inputs, name = find_rows(args, [args.model_kind])
    tally = check_rows(args.track, dataset)
    rows = len(tally.contents)
    out = args.out or PACKAGE / f"01_eval/reports/{args.track}_{args.model_kind}_{name}.json"
    check_out(out, rows_path(out), journal_path(out), inputs=[inputs["path"], args.replies])
    experiment = find_experiment(args, settings, dataset, inputs, name) if args.langfuse_experiment else None
    with Journal(journal_path(out)) as journal:
        client = make_client(args.model_kind, settings, args.track, dataset, seed=args.seed, **client_options(args))
        try:
            asked = {"track": args.track, "dataset_sha256": inputs["sha256"], "rows": rows, "prompt_sha256": tally.prompt_sha256}
            journal.begin({"schema_version": SCHEMA_VERSION, **asked, "model": client.identity}, rows)
            told, read = client.describe(), {"split": name, "dataset": inputs["path"], "dataset_sha256": inputs["sha256"]}
            model = {"model": model_name(told), "engine": told.get("engine", args.model_kind)}
            metadata = run_metadata(args) | read | model | {"report": display_path(out)}
            title, tags = f"eval-{args.track}-{args.model_kind}", ["eval", args.track, args.model_kind]
            with trace_run(connection, title, out, metadata, tags, seed=journal.header["run_id"], keep=True) as trace:
                earlier = journal.seconds
                tell = RowTracer(trace, args.track, client, experiment)
                ask(args, tally, client, dataset, journal, tell)
                seconds, flags = (journal.seconds, clock.total + earlier), vars(args) | {"out": display_path(out)}
                report = make_report(args.track, client, tally, *seconds, inputs, flags, journal.sessions, journal.cached)
                trace.scores(report["metrics"])
                trace.update(output={"metrics": report["metrics"], "counts": report["counts"]}, metadata={"model": report["model"]})
                report["trace"] = {"id": trace.id, "url": trace.url}
                write_atomically(rows_path(out), lambda stream: stream.writelines(journal.lines()))
                write_json(out, report)
            if experiment:
                link(experiment, settings, dataset, trace)
        except BaseException:
            if journal.answered:
                warn(f"{journal.answered} of {rows} rows are answered and kept: the same command goes on from there")
            raise
        finally:
            client.close()
        journal.remove()
    show(report, out)
    return 0


def find_experiment(args: argparse.Namespace, settings: Settings, dataset: Dataset, inputs: dict, name: str) -> Experiment:
    """The experiment of `--langfuse-experiment` on the dataset that was pushed from these rows."""
    source = f"--dataset {inputs['path']}" if args.dataset or args.replies else f"--split {args.split or 'test'}"
    push = f"python 02_dataset/push_langfuse.py --track {args.track} {source}"
    told = run_metadata(args)
    return open_experiment(settings, args.track, dataset_name(args.track, name), list(dataset), args.langfuse_experiment, push, told)


def link(experiment: Experiment, settings: Settings, dataset: Dataset, trace: Any) -> None:
    """Tell an older server which rows are whose items; newer ones go by the spans. The report is written: what fails is said."""
    try:
        with LangfuseApi(settings) as api:
            experiment.link(api, ((example, trace.id, trace.row_id(example.id)) for example in dataset))
        print(f"experiment: {experiment.url}")
    except UserError as error:
        warn(f"the experiment {experiment.name} may lack rows: {error}")


def ask(args: argparse.Namespace, tally: Tally, client: Client, dataset: Dataset, journal: Journal, tell: RowTracer) -> None:
    """Get the rows that the journal has not, with a progress bar."""
    rows = len(tally.contents)
    if journal.answered:
        print(f"{journal.answered} of {rows} rows are answered already: going on with the others", file=sys.stderr)
    cache = ReplyCache(args.cache, client.identity) if args.cache else None
    with progress(f"{args.track} {args.model_kind}", rows) as bar, closing(cache) if cache else nullcontext():

        def on_row(index: int, row: Row) -> None:
            bar.update()
            tell(index, row)

        evaluate_rows(tally, client, dataset, journal, cache, on_row)
    tell.finish()


def show(report: dict, out: Path) -> None:
    """The report's numbers on standard output."""
    counts, metrics = report["counts"], report["metrics"]
    for name, value in metrics.items():
        print(f"{name:28} {value:7.4f}")
    missed = ", ".join(f"{error} {count}" for error, count in counts["errors"].items() if count)
    print(f"{counts['rows']} rows in {report['seconds']['generate']} s; missed: {missed or 'none'}")
    if counts["failed_requests"]:
        warn(f"{counts['failed_requests']} of {counts['rows']} requests failed and count as misses: reply_error says why")
    print(f"report: {display_path(out)}")


if __name__ == "__main__":
    run(main, launched=True)
