"""Decide from two reports whether the small model can take the task over, and show why.

    python 03_compare/compare.py --track toolcall --azure 01_eval/reports/azure.json --slm 01_eval/reports/slm.json --table
    python 03_compare/compare.py --track structured --azure A.json --slm S.json --before OLD.json --delta 0.05 --markdown pr.md

Prints FINE_TUNE=0|1 and VERDICT=..., writes the decision and exits 0 (SWAP), 10 (FINE_TUNE) or 11 (NEED_MORE_DATA).
03_compare/render_report.py makes a page to read of the decision; slm_swap/README.md says what its keys mean.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere

from slm_swap.cli import Parser, check_out, run, run_metadata, share, tracing_options, warn
from slm_swap.clients.pricing import load_prices
from slm_swap.common.errors import UserError
from slm_swap.common.reports import SCHEMA_VERSION, code_version, now, rows_path, write_atomically, write_json
from slm_swap.common.settings import PACKAGE, display_path, load_settings
from slm_swap.scoring.tracks import TRACKS
from slm_swap.tracing.runs import RunTrace, connect, trace_run
from slm_swap.verdict.comparison import examine, examine_means
from slm_swap.verdict.decision import EXIT_CODES, RULES
from slm_swap.verdict.evaluations import CLUSTERS, Evaluation, read_evaluation, require_same


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_track()
    parser.add_argument("--azure", required=True, metavar="REPORT", help="the hosted model's report")
    parser.add_argument("--slm", required=True, metavar="REPORT", help="the small model's report")
    parser.add_argument("--before", metavar="REPORT", help="the small model's report before fine-tuning: what was gained")
    parser.add_argument("--delta", type=share, default=0.02, help="non-inferiority margin: how much worse is good enough, 0..1")
    parser.add_argument("--alpha", type=share, default=0.05, help="how often a verdict may be wrong at the margin")
    parser.add_argument("--rule", choices=RULES, default="paired", help="paired: tests on the rows; point: the means alone")
    parser.add_argument("--sequential", action="store_true", help="a paired rule that also holds where the rows were looked at while they came")
    parser.add_argument("--cluster", choices=CLUSTERS, default="group", help="rows that belong together: same group, same tool, or none")
    parser.add_argument("--table", action="store_true", help="print the evidence too")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write verdict and evidence as Markdown, for a pull request")
    parser.add_argument("--out", type=Path, help="the decision (default: 03_compare/reports/<track>.json)")
    parser.add_tracing()
    args = parser.parse_args(argv)
    if args.delta >= 1 or not 0 < args.alpha < 0.5:
        parser.error("--delta must be below 1, and --alpha above 0 and below 0.5")
    if args.rule == "point" and args.sequential:
        parser.error("--sequential is a paired rule: leave --rule out")
    if args.rule == "point" and args.before:
        parser.error("--before needs the rows, which --rule point does not read: leave one of them out")
    if args.markdown and args.out and args.markdown.resolve() == args.out.resolve():
        parser.error("--markdown and --out name the same file")
    return args


def read_sides(args: argparse.Namespace) -> tuple[dict[str, Evaluation], list[str]]:
    """The evaluations, of one and the same question, and what to be warned of.

    Raises:
        UserError: they do not fit together.
    """
    track, with_rows = TRACKS[args.track], args.rule != "point"
    paths = {name: path for name in ("azure", "slm", "before") if (path := getattr(args, name))}
    sides = {name: read_evaluation(path, track, with_rows) for name, path in paths.items()}
    warnings = []
    for side in list(sides.values())[1:]:
        warnings += [text for text in require_same(sides["azure"], side) if text not in warnings]
    kinds = {name: given.get("kind") if isinstance(given := side.report.get("model"), dict) else None for name, side in sides.items()}
    if kinds["azure"] == "slm":  # the difference, and so the verdict, would be the wrong way round
        raise UserError("the --azure report is of a local model (model.kind is slm): give it as --slm, and the hosted one here")
    if kinds["slm"] == "azure":
        warnings.append("the --slm report is of a hosted model (model.kind is azure)")
    if sides["azure"].report == sides["slm"].report:
        warnings.append("--azure and --slm are the same report: a model is never worse than itself")
    for name, side in sides.items():
        counts = side.report.get("counts") if isinstance(side.report.get("counts"), dict) else {}
        if counts.get("failed_requests"):
            warnings.append(f"{counts['failed_requests']} requests of the {name} report failed and count as misses: evaluate it again")
        if side.report.get("stopped_early") and not args.sequential:
            raise UserError(
                f"{display_path(side.path)} was stopped as soon as its verdict was certain (live_compare.py --stop-early): "
                "only --sequential holds for such rows"
            )
        if side.report.get("stopped_early") and args.cluster != "group":
            raise UserError(f"{display_path(side.path)} was stopped early, its rows drawn group by group: leave --cluster out")
    return sides, warnings


def log(trace: RunTrace, told: dict[str, Any]) -> None:
    """The decision as an event, its verdict and differences as scores."""
    brief = {name: value for name, value in told.items() if name not in ("groups", "gold_audit")}
    trace.event("decision", brief)
    trace.scores({"verdict": told["verdict"]} | {f"{name}_difference": values["difference"] for name, values in told["metrics"].items()})
    trace.update(output={"verdict": told["verdict"], "metrics": told["metrics"]})


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    settings = load_settings()
    connection = connect(settings, tracing_options(args, settings))
    sides, warnings = read_sides(args)
    out = args.out or PACKAGE / f"03_compare/reports/{args.track}.json"
    read = [path for side in sides.values() for path in (side.path, rows_path(side.path))]
    check_out(out, *([args.markdown] if args.markdown else []), inputs=read)
    if args.rule == "point":
        found = examine_means(TRACKS[args.track], sides, args.delta)
    else:
        rule = "sequential" if args.sequential else "paired"
        found = examine(TRACKS[args.track], sides, rule, args.delta, args.alpha, args.cluster, load_prices(settings.prices_file))
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
        write_json(out, told | {"trace": {"id": trace.id, "url": trace.url}})
    from slm_swap.verdict.text_report import brief, markdown, table

    (table if args.table else brief)(told)
    if args.markdown:
        write_atomically(args.markdown, lambda stream: stream.write(markdown(told)))
        print(f"markdown: {display_path(args.markdown)}")
    print(f"FINE_TUNE={int(told['fine_tune'])}")
    print(f"VERDICT={told['verdict']}")
    print(f"decision: {display_path(out)}")
    return EXIT_CODES[told["verdict"]]


if __name__ == "__main__":
    run(main)
