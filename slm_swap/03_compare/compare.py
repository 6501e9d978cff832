"""Decide from two reports whether the small model can take the task over, and show why.

    python 03_compare/compare.py --track toolcall --azure 01_eval/reports/azure.json --slm 01_eval/reports/slm.json --table
    python 03_compare/compare.py --track structured --azure A.json --slm S.json --before OLD.json --delta 0.05 --markdown pr.md

Prints FINE_TUNE=0|1 and VERDICT=..., writes the decision and exits 0 (SWAP), 10 (FINE_TUNE) or 11 (NEED_MORE_DATA).
03_compare/render_report.py makes a readable page of the decision. slm_swap/README.md explains its keys.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere

from slm_swap.cli import Parser, check_out, next_step, positive, run, run_metadata, share, tracing_options, warn
from slm_swap.clients.pricing import Prices, load_prices
from slm_swap.common.reports import SCHEMA_VERSION, code_version, now, rows_path, write_atomically, write_json
from slm_swap.common.settings import PACKAGE, find_path, load_settings, shown_path
from slm_swap.scoring.tracks import TRACKS
from slm_swap.tracing.runs import RunTrace, connect, trace_run
from slm_swap.verdict import cascade_words
from slm_swap.verdict.cascade import beside_verdict
from slm_swap.verdict.comparison import examine, examine_means
from slm_swap.verdict.decision import EXIT_CODES, FINE_TUNE, RULES
from slm_swap.verdict.evaluations import QUESTIONS, Evaluation, fit_together, model_of, read_evaluation
from slm_swap.verdict.judge import Gate
from slm_swap.verdict.looks import Look, ledger_path, look_at, record

MARKDOWN = "choose another place with --markdown"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_track()
    parser.add_argument("--azure", required=True, metavar="REPORT", help="the hosted model's report")
    parser.add_argument("--slm", required=True, metavar="REPORT", help="the small model's report")
    parser.add_argument("--before", metavar="REPORT", help="the small model's report before fine-tuning: what was gained")
    parser.add_argument("--delta", type=share, default=0.02, help="non-inferiority margin: how much worse is still good enough, 0..1")
    parser.add_argument("--alpha", type=share, default=0.05, help="how often a verdict may be wrong at the margin")
    parser.add_argument("--rule", choices=RULES, default="paired", help="paired: tests on the rows; point: the means alone")
    parser.add_argument("--sequential", action="store_true", help="a paired rule that also holds where the rows were looked at while they came")
    parser.add_argument(
        "--tools", choices=QUESTIONS, default="these", help="what the verdict is about: the tools of these rows, or other tools like them"
    )
    parser.add_argument("--max-p95-ms", type=positive, metavar="MS", help="SWAP only where the small model's latency at p95 is at most this")
    parser.add_argument("--cascade", metavar="FILE", help="tell what the small model may answer now (default: 03_compare/cascade_<track>.json if it is of these models)")
    parser.add_argument("--table", action="store_true", help="print the evidence too")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write verdict and evidence as Markdown, for a pull request")
    parser.add_argument("--out", type=Path, help="the decision (default: 03_compare/reports/<track>.json)")
    parser.add_tracing()
    args = parser.parse_args(argv)
    if args.delta >= 1 or not 0 < args.alpha < 0.5:
        parser.error("--delta must be below 1, and --alpha above 0 and below 0.5")
    if args.rule == "point" and args.sequential:
        parser.error("--sequential is a paired rule: leave --rule out")
    if args.rule == "point" and (args.tools == "others" or args.max_p95_ms):
        parser.error("--tools and --max-p95-ms are about the paired rule: leave --rule out")
    if args.rule == "point" and args.before:
        parser.error("--before needs the rows, which --rule point does not read: leave one of them out")
    if args.markdown and args.out and args.markdown.resolve() == args.out.resolve():
        parser.error("--markdown and --out name the same file")
    return args


def read_sides(args: argparse.Namespace) -> tuple[dict[str, Evaluation], list[str]]:
    """The evaluations, of one and the same question, and what to be warned of.

    Raises:
        UserError: they cannot be read, or do not fit together.
    """
    paths = {name: path for name in ("azure", "slm", "before") if (path := getattr(args, name))}
    sides = {name: read_evaluation(path, TRACKS[args.track], with_rows=args.rule != "point") for name, path in paths.items()}
    return sides, fit_together(sides, args.sequential, args.tools)


def decide(args: argparse.Namespace, sides: dict[str, Evaluation], prices: Prices, look: Look | None) -> dict[str, Any]:
    """The decision with its evidence: by the means alone, or by the rows at this look."""
    track = TRACKS[args.track].with_metrics(set.intersection(*(set(side.report["metrics"]) for side in sides.values())))
    if look is None:
        return examine_means(track, sides, args.delta)
    rule = "sequential" if args.sequential else "paired"
    shares = (look.share_of_models, 1.0) if args.sequential else (look.share, look.next_share)
    return examine(track, sides, Gate(rule, args.delta, args.alpha, args.tools, *shares, args.max_p95_ms), prices)


def add_cascade(args: argparse.Namespace, sides: dict[str, Evaluation], found: dict[str, Any]) -> None:
    """What the small model may answer already, by its cascade, beside the verdict; one of FINE_TUNE says it, too.

    Raises:
        UserError: as `beside_verdict`.
    """
    path = find_path(args.cascade) if args.cascade else PACKAGE / f"03_compare/cascade_{args.track}.json"
    found["cascade"] = None
    if args.cascade or path.is_file():
        found["cascade"] = beside_verdict(path, args.track, sides["azure"].label, sides["slm"].report, required=bool(args.cascade))
    if found["cascade"] and found["verdict"] == FINE_TUNE:
        found["sentence"] += f" {cascade_words.brief(found['cascade'])}"


def log(trace: RunTrace, told: dict[str, Any]) -> None:
    """The decision as an event, its verdict and differences as scores."""
    brief = {name: value for name, value in told.items() if name not in ("groups", "gold_audit", "confidence")}
    trace.event("decision", brief)
    trace.scores({"verdict": told["verdict"]} | {f"{name}_azure_minus_slm": values["difference"] for name, values in told["metrics"].items()})
    trace.update(output={"verdict": told["verdict"], "metrics": told["metrics"]})


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    settings = load_settings()
    connection = connect(settings, tracing_options(args, settings))
    sides, warnings = read_sides(args)
    out = args.out or PACKAGE / f"03_compare/reports/{args.track}.json"
    read = [path for side in sides.values() for path in (side.path, rows_path(side.path))] + ([args.cascade] if args.cascade else [])
    check_out(out, inputs=read)
    if args.markdown:
        check_out(args.markdown, inputs=read, advice=MARKDOWN)
    ledger, azure, slm = ledger_path(out, args.track), sides["azure"], sides["slm"]
    look = look_at(ledger, azure.rows, model_of(azure.report), model_of(slm.report)) if args.rule != "point" else None
    found = decide(args, sides, load_prices(settings.prices_file), look)
    add_cascade(args, sides, found)
    if look:
        found["looks"] = look.to_json(ledger)
        warnings += look.warning(args.alpha)
    told = {
        "schema_version": SCHEMA_VERSION,
        "stage": "compare",
        "created_at": now(),
        "code": code_version(),
        "track": args.track,
        "rows": sides["azure"].report["inputs"]["rows"],
        "inputs": sides["azure"].report["inputs"],
        "reports": {"before": None} | {name: side.files() for name, side in sides.items()},
        "models": {"before": None} | {name: side.report.get("model") for name, side in sides.items()},
        "labels": {"before": None} | {name: side.label for name, side in sides.items()},
        **found,
        "warnings": warnings + found["warnings"],
    }
    for text in told["warnings"]:
        warn(text)
    with trace_run(connection, f"compare-{args.track}", out, run_metadata(args), ["compare", args.track]) as trace:
        log(trace, told)
        if look:  # first: a decision that is there was counted
            record(ledger, look, told["verdict"], args.delta, slm.label)
        write_json(out, told | {"trace": {"id": trace.id, "url": trace.url}})
    from slm_swap.verdict.text_report import brief, markdown, table

    (table if args.table else brief)(told)
    next_step(f"python 03_compare/render_report.py --decision {shown_path(out)}")
    if args.markdown:
        write_atomically(args.markdown, lambda stream: stream.write(markdown(told)), MARKDOWN)
        print(f"markdown: {shown_path(args.markdown)}")
    print(f"FINE_TUNE={int(told['fine_tune'])}")
    print(f"VERDICT={told['verdict']}")
    print(f"decision: {shown_path(out)}")
    return EXIT_CODES[told["verdict"]]


if __name__ == "__main__":
    run(main)
