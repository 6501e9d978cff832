"""Decide from two reports whether the small model can take the task over.

    python 03_compare/compare.py --track toolcall --azure 01_eval/reports/azure.json --slm 01_eval/reports/slm.json
    python 03_compare/compare.py --track structured --azure A.json --slm S.json --delta 0.05 --out decision.json

Prints FINE_TUNE=0|1 and VERDICT=..., writes the decision and exits 0 (SWAP), 10 (FINE_TUNE) or 11 (NEED_MORE_DATA).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere

from slm_swap.cli import Parser, check_out, run, run_metadata, share, warn
from slm_swap.decision import EXIT_CODES, Decision, point_decision
from slm_swap.errors import UserError
from slm_swap.langfuse_helpers import require_tracing, trace_run
from slm_swap.reports import SCHEMA_VERSION, code_version, now, read_json, sha256_file, write_json
from slm_swap.settings import PACKAGE, display_path, find_path, load_settings
from slm_swap.tracks import TRACKS


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_track()
    parser.add_argument("--azure", required=True, metavar="REPORT", help="the hosted model's report")
    parser.add_argument("--slm", required=True, metavar="REPORT", help="the small model's report")
    parser.add_argument("--delta", type=share, default=0.02, help="non-inferiority margin: how much worse is good enough, 0..1")
    parser.add_argument("--out", type=Path, help="the decision (default: 03_compare/reports/<track>.json)")
    return parser.parse_args(argv)


def read_report(path: str, track: str) -> dict:
    """A report of `eval.py` with every gate metric.

    Raises:
        UserError: not such a report, or of another track.
    """
    found = find_path(path)
    report = read_json(found, "01_eval/eval.py")
    shown = display_path(found)
    if report.get("stage") not in (None, "eval") or not isinstance(report.get("metrics"), dict):
        raise UserError(f"{shown} is not a report of 01_eval/eval.py: make one with it")
    if report.get("track") != track:
        raise UserError(f"{shown} is of track {report.get('track')}, not {track}: give reports of the same track as --track")
    missing = [
        name for name in TRACKS[track].gate
        if not isinstance(value := report["metrics"].get(name), (int, float)) or isinstance(value, bool) or not 0 <= value <= 1
    ]  # fmt: skip
    if missing:
        raise UserError(f"{shown} has no usable {', '.join(missing)} among its metrics: make it again with 01_eval/eval.py")
    return report


def require_same(azure: dict, slm: dict) -> None:
    """Refuse reports that do not answer the same question.

    Raises:
        UserError: other rows or other prompts.
    """
    inputs = [report.get("inputs") if isinstance(report.get("inputs"), dict) else {} for report in (azure, slm)]
    # The rows' own hash where both have it: two files of recorded replies hold the same rows and differ all the same.
    key = "rows_sha256" if all(given.get("rows_sha256") for given in inputs) else "sha256"
    if any(not given.get(key) for given in inputs):
        raise UserError("a report does not say which data it is of (inputs.sha256): make it again with 01_eval/eval.py")
    if inputs[0][key] != inputs[1][key] or inputs[0].get("rows") != inputs[1].get("rows"):
        told = " and ".join(f"{given.get('path')} ({given.get('rows')} rows)" for given in inputs)
        raise UserError(f"the reports are of different data, {told}: evaluate both models on the same rows")
    prompts = [report.get("prompt_sha256") for report in (azure, slm)]
    if None in prompts:
        warn("what a replayed model was asked is not recorded: whether both got the same prompts is not known")
    elif prompts[0] != prompts[1]:
        raise UserError("the reports are of different prompts: evaluate both models with the same version of the code")


def require_sides(azure: dict, slm: dict) -> None:
    """Refuse a local model's report in the hosted one's place: the difference, and so the verdict, would be the wrong way round.

    Raises:
        UserError: `--azure` is of a local model.
    """
    kinds = [report["model"].get("kind") if isinstance(report.get("model"), dict) else None for report in (azure, slm)]
    if kinds[0] == "slm":
        raise UserError("the --azure report is of a local model (model.kind is slm): give it as --slm, and the hosted one here")
    if kinds[1] == "azure":
        warn("the --slm report is of a hosted model (model.kind is azure)")
    if azure == slm:
        warn("--azure and --slm are the same report: a model is never worse than itself")


def show(decision: Decision) -> None:
    """All differences, and the two lines that scripts read."""
    print(f"{'metric':24} {'azure':>8} {'slm':>8} {'azure - slm':>12}")
    for name, values in decision.metrics.items():
        mark = f"  worse by more than {decision.delta:g}" if name in decision.failing else ""
        print(f"{name:24} {values['azure']:8.4f} {values['slm']:8.4f} {values['difference']:+12.4f}{mark}")
    print(f"FINE_TUNE={int(decision.fine_tune)}")
    print(f"VERDICT={decision.verdict}")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    settings = load_settings()
    require_tracing(settings)
    azure, slm = read_report(args.azure, args.track), read_report(args.slm, args.track)
    require_same(azure, slm)
    require_sides(azure, slm)
    out = args.out or PACKAGE / f"03_compare/reports/{args.track}.json"
    check_out(out, inputs=[args.azure, args.slm])
    for name, report in (("azure", azure), ("slm", slm)):
        counts = report.get("counts") if isinstance(report.get("counts"), dict) else {}
        if counts.get("failed_requests"):
            warn(f"{counts['failed_requests']} requests of the {name} report failed and count as misses: evaluate it again")
    decision = point_decision(azure["metrics"], slm["metrics"], TRACKS[args.track].gate, args.delta)
    paths = {"azure": find_path(args.azure), "slm": find_path(args.slm)}
    told = {
        "schema_version": SCHEMA_VERSION,
        "stage": "compare",
        "created_at": now(),
        "track": args.track,
        "rows": azure["inputs"].get("rows"),
        "reports": {name: {"path": display_path(path), "sha256": sha256_file(path)} for name, path in paths.items()},
        "models": {"azure": azure.get("model"), "slm": slm.get("model")},
        "code": code_version(),
        **decision.to_json(),
    }
    with trace_run(settings, f"compare-{args.track}", run_metadata(args), tags=["compare", args.track]) as trace:
        trace.event("decision", told)
        differences = {f"{name}_difference": values["difference"] for name, values in decision.metrics.items()}
        trace.scores({"verdict": decision.verdict} | differences)
        trace.update(output={"verdict": decision.verdict, "metrics": decision.metrics})
        write_json(out, told | {"trace": {"id": trace.id, "url": trace.url}})
    show(decision)
    print(f"decision: {display_path(out)}")
    return EXIT_CODES[decision.verdict]


if __name__ == "__main__":
    run(main)
