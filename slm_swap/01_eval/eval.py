"""Evaluate one model on one track: a report and a file of rows beside it.

    python 01_eval/eval.py --track toolcall --model-kind azure
    python 01_eval/eval.py --track toolcall --model-kind slm --adapter 04_ft/adapter_toolcall --out 01_eval/reports/after.json
    python 01_eval/eval.py --track toolcall --model-kind replay --replies recorded.jsonl

slm_swap/README.md says what the report's keys mean.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere

from slm_swap.cli import Parser, check_out, client_options, load_rows, progress, run, run_metadata, warn
from slm_swap.clients import MODEL_KINDS, make_client
from slm_swap.evaluation import Row, Stopwatch, evaluate, make_report, references, trace_rows
from slm_swap.langfuse_helpers import require_tracing, trace_run
from slm_swap.reports import rows_path, write_json, write_jsonl
from slm_swap.seeds import set_seed
from slm_swap.settings import PACKAGE, display_path, load_settings
from slm_swap.tracks import TRACKS

HOSTED_ROWS_AT_ONCE = 128  # the azure client bounds its own concurrency; this only keeps the progress moving


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_track()
    parser.add_argument("--model-kind", required=True, choices=MODEL_KINDS, help="the model to evaluate")
    parser.add_rows()
    parser.add_client()
    parser.add_argument("--out", type=Path, help="the report (default: 01_eval/reports/<track>_<model-kind>_<split>.json)")
    parser.add_seed()
    args = parser.parse_args(argv)
    if (args.model_kind == "replay") != bool(args.replies):
        parser.error("--model-kind replay and --replies FILE go together")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    clock, settings, track = Stopwatch(), load_settings(), TRACKS[args.track]
    require_tracing(settings)
    examples, inputs, name = load_rows(args, [args.model_kind])
    gold = references(track, examples)
    out = args.out or PACKAGE / f"01_eval/reports/{args.track}_{args.model_kind}_{name}.json"
    check_out(out, rows_path(out), inputs=[inputs["path"], args.replies])
    if args.model_kind == "slm":
        set_seed(args.seed)
    metadata = run_metadata(args) | {"dataset": inputs["path"], "dataset_sha256": inputs["sha256"], "report": display_path(out)}
    title, tags = f"eval-{args.track}-{args.model_kind}", ["eval", args.track, args.model_kind]
    with trace_run(settings, title, metadata, tags=tags) as trace:
        client = make_client(args.model_kind, settings, examples, seed=args.seed, **client_options(args))
        try:
            with progress(f"{args.track} {args.model_kind}", len(examples)) as bar:

                def on_rows(rows: list[Row]) -> None:
                    bar.update(len(rows))
                    trace_rows(trace, args.track, client, rows)

                clock.lap()
                size = HOSTED_ROWS_AT_ONCE if args.model_kind == "azure" else args.batch_size
                rows = evaluate(args.track, client, examples, gold, size, on_rows)
                seconds = clock.lap()
            report = make_report(args.track, client, rows, seconds, clock.total, inputs, vars(args) | {"out": display_path(out)})
        finally:
            client.close()
        trace.scores(report["metrics"])
        trace.update(output={"metrics": report["metrics"], "counts": report["counts"]}, metadata={"model": report["model"]})
        report["trace"] = {"id": trace.id, "url": trace.url}
        write_jsonl(rows_path(out), (row.to_json(track) for row in rows))
        write_json(out, report)
    show(report, out)
    return 0


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
    run(main)
