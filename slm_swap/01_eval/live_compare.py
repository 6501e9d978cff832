"""Run two models over the same rows and watch their metrics and the difference while they work.

    python 01_eval/live_compare.py --track toolcall --models azure slm --limit 50
    python 01_eval/live_compare.py --track structured --models azure slm --adapter 04_ft/adapter_structured --save
    python 01_eval/live_compare.py --track toolcall --models azure slm --stop-early --delta 0.05 --save

Ctrl-C ends it with what both models have answered so far. With --save that is written as two reports. --stop-early asks in random order
and ends once the verdict is certain at --delta and --alpha, no matter how often you look (stats/betting.py names the method).
"""

import argparse
import sys
import tempfile
import uuid
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere

from slm_swap.cli import (
    Parser,
    check_out,
    client_options,
    load_rows,
    next_step,
    require_own_model,
    run,
    run_metadata,
    share,
    tracing_options,
    warn,
)
from slm_swap.clients.protocol import MODEL_KINDS
from slm_swap.common.errors import UserError
from slm_swap.common.os_errors import without_advice
from slm_swap.common.reports import SCHEMA_VERSION, rows_path, write_json, write_jsonl
from slm_swap.common.settings import PACKAGE, Settings, display_path, load_settings, shown_path
from slm_swap.evaluating.evaluation import Stopwatch, check_rows, references
from slm_swap.evaluating.factory import make_client
from slm_swap.evaluating.finished import finished_report
from slm_swap.evaluating.live import EarlyStop, Side, watch
from slm_swap.evaluating.recipe import CLIENT_FLAGS, Recipe, read_recipe
from slm_swap.evaluating.report import make_report, no_latency, summary
from slm_swap.evaluating.row_traces import trace_rows
from slm_swap.rows.examples import Example
from slm_swap.scoring.tracks import TRACKS
from slm_swap.tracing.runs import Connection, connect, trace_of, trace_run
from slm_swap.verdict.evaluations import QUESTIONS

LIVE_BATCH = 32  # rows between two looks with --batch-size auto
ELSEWHERE = "choose another place with --out-dir"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_track()
    parser.add_argument("--models", nargs=2, required=True, choices=MODEL_KINDS, metavar="KIND", help="two of azure, slm, replay")
    parser.add_rows()
    parser.add_ask()
    parser.add_client()
    parser.add_recipe(())
    parser.add_argument("--stop-early", action="store_true", help="stop calling the hosted model once the verdict is certain")
    parser.add_argument("--delta", type=share, default=0.02, help="non-inferiority margin of --stop-early, 0..1")
    parser.add_argument("--alpha", type=share, default=0.05, help="error rate of --stop-early's verdict, 0..1")
    parser.add_argument(
        "--tools", choices=QUESTIONS, default="these", help="what --stop-early decides on: the tools of these rows, or other tools like them"
    )
    parser.add_argument("--save", action="store_true", help="write both reports, <track>_<kind>_<split>_live.json")
    parser.add_argument("--overwrite", action="store_true", help="with --save: replace reports that are there already")
    parser.add_argument("--out-dir", type=Path, default=PACKAGE / "01_eval/reports", help="where --save writes")
    parser.add_seed()
    parser.add_tracing()
    args = parser.parse_args(argv)
    if args.models[0] == args.models[1]:
        parser.error("--models takes two different models")
    require_own_model(parser, args, args.models, used=["batch_size"])
    if args.stop_early and "azure" not in args.models:
        parser.error("--stop-early saves calls of the hosted model: name azure as one of --models")
    if args.recipe and "slm" not in args.models:
        parser.error("--recipe says how the small model is asked: name slm as one of --models")
    if args.delta == 1 or args.alpha in (0, 1):
        parser.error("--delta must be less than 1, --alpha more than 0 and less than 1")
    return args


def report_path(args: argparse.Namespace, kind: str, name: str, folder: Path | None = None) -> Path:
    return (folder or args.out_dir) / f"{args.track}_{kind}_{name}_live.json"


def what_is_asked(args: argparse.Namespace, inputs: dict, examples: list[Example], recipe: Recipe | None) -> dict[str, Any]:
    """What two reports of one command have in common, the models left out."""
    stop = {"delta": args.delta, "alpha": args.alpha, "seed": args.seed} if args.stop_early else None
    asked = {"schema_version": SCHEMA_VERSION, "track": args.track, "dataset_sha256": inputs["sha256"]}
    asked |= {"rows": len(examples), "prompt_sha256": check_rows(args.track, examples).prompt_sha256}
    asked |= {"recipe_sha256": recipe.sha256 if recipe else None}  # how the small model is asked is not how the hosted one is
    return asked | {"models": args.models, "stop_early": stop}


def is_finished(args: argparse.Namespace, asked: dict[str, Any], name: str, sides: list[Side]) -> bool:
    """Whether both reports of this command are there already; of `sides` the models are known.

    Raises:
        UserError: a report of another command is there.
    """
    found = [finished_report(report_path(args, kind, name), asked, False, args.overwrite) for kind in args.models]
    for report, side in zip(found, sides, strict=False):
        if report:
            report.check(asked | {"model": side.client.identity})
    return all(found)


def save(
    args: argparse.Namespace, folder: Path, sides: list[Side], inputs: dict, name: str, clock: Stopwatch, early: EarlyStop | None, asked: dict[str, Any],
    traces: dict[str, dict],
) -> None:  # fmt: skip
    """Both reports, in a folder; `traces` are where each kind's rows will be told.

    Raises:
        UserError: it cannot be written.
    """
    flags = vars(args) | {"out_dir": display_path(args.out_dir)}
    for side, kind in zip(sides, args.models, strict=True):
        out = report_path(args, kind, name, folder)
        shown = {"few_shot": side.few_shot.report()} if side.few_shot else {}
        report = make_report(args.track, side.client, side.rows, side.seconds, clock.total, inputs | shown, flags)
        report |= {"latency": no_latency("both models were asked at once: eval.py measures it")}
        report |= {"asked": asked | {"model": side.client.identity}, "stopped_early": early and early.to_json(len(side.rows))}
        report |= {"trace": traces[kind]}
        write_jsonl(rows_path(out), (row.to_json(TRACKS[args.track]) for row in side.rows), ELSEWHERE)
        write_json(out, report, ELSEWHERE)
        print(f"report: {shown_path(out)}")


def open_side(kind: str, args: argparse.Namespace, settings: Settings, examples: list[Example], recipe: Recipe | None) -> Side:
    """One of the models; the small one as its recipe says, where there is one."""
    options = client_options(args)
    if recipe is None or kind != "slm":
        return Side(make_client(kind, settings, args.track, examples, seed=args.seed, **options))
    recipe.check_place(settings)
    few_shot = recipe.few_shot()
    form = partial(recipe.as_asked, few_shot=few_shot)
    options |= {name: value for name, value in recipe.flags.items() if name in CLIENT_FLAGS} | {"model": recipe.model}
    side = Side(make_client(kind, settings, args.track, list(map(form, examples)), seed=args.seed, **options), form, few_shot)
    recipe.check(side.client.identity)
    return side


def save_somewhere(args: argparse.Namespace, *told: Any) -> None:
    """`save` in --out-dir, or else in a new folder: the same command would ask, and pay for, every row again.

    Raises:
        UserError: --out-dir cannot be written; where the reports are instead, if that could be.
    """
    try:
        save(args, args.out_dir, *told)
    except UserError as error:
        for place in (Path.cwd(), Path.home(), Path(tempfile.gettempdir())):
            with suppress(OSError, UserError):
                folder = Path(tempfile.mkdtemp(prefix="live_compare-", dir=place))
                save(args, folder, *told)
                break
        else:
            raise
        raise UserError(f"{without_advice(error)}: both reports are in {folder} instead, move them from there: nothing needs to be asked again") from None


def trace_side(connection: Connection | None, args: argparse.Namespace, side: Side, kind: str, out: Path, seed: str) -> None:
    """One model's part as a trace of its own, so that a live run is beside those of eval.py."""
    tags = ["eval", "live", args.track, kind]
    with trace_run(connection, f"live-{args.track}-{kind}", out, run_metadata(args) | {"model_kind": kind}, tags, seed) as trace:
        trace_rows(trace, args.track, side.client, side.rows, seconds=side.seconds / len(side.rows))
        report = summary(TRACKS[args.track], side.rows)
        trace.scores(report["metrics"])
        trace.update(output={"metrics": report["metrics"], "counts": report["counts"]})


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    clock, settings, track = Stopwatch(), load_settings(), TRACKS[args.track]
    connection = connect(settings, tracing_options(args, settings))
    examples, inputs, name = load_rows(args, args.models)
    track = track.for_gold(references(track, examples))
    early = EarlyStop(track, examples, args.delta, args.alpha, args.seed, args.tools) if args.stop_early else None
    examples = early.examples if early else examples
    gold = references(track, examples)
    if early and early.rows_if_equal is None:
        warn(
            f"too few {'tools' if args.tools == 'others' else 'rows'} for a SWAP at --delta {args.delta:g}, unless the small model is the "
            f"better one: {'a tool' if args.tools == 'others' else 'a row or group of rows'} counts as one observation, and there are {len(early.sizes)}, "
            f"the largest of {max(early.sizes)} rows"
        )
    recipe = read_recipe(args.recipe, args.track) if args.recipe else None
    sides, asked = list[Side](), what_is_asked(args, inputs, examples, recipe)
    if args.save:  # before a model is loaded
        outs = [report_path(args, kind, name) for kind in args.models]
        check_out(*outs, *map(rows_path, outs), inputs=[inputs["path"], args.replies], advice=ELSEWHERE)
        is_finished(args, asked, name, [])
    try:
        for kind in args.models:
            sides.append(open_side(kind, args, settings, examples, recipe))
            if told := getattr(sides[-1].client, "warning", None):
                warn(told)
        if args.save and is_finished(args, asked, name, sides):
            places = ", ".join(shown_path(report_path(args, kind, name)) for kind in args.models)
            print(f"nothing to ask: both reports are finished (--overwrite asks again): {places}")
            tell_next(args, name, early)
            return 0
        finished = watch(args.track, sides, examples, gold, LIVE_BATCH if args.batch_size == "auto" else args.batch_size, early)
    finally:
        for side in sides:
            side.client.close()
    done = len(sides[0].rows)
    if not done:  # nothing to show or save
        raise KeyboardInterrupt
    if not finished:
        warn(f"interrupted after {done} of {len(examples)} rows: the numbers cover only these rows")
    if early and finished:
        print(early.saved(sides[args.models.index("azure")]))
    seeds = {kind: str(uuid.uuid4()) for kind in args.models}
    if args.save:
        traces = {kind: trace_of(connection, seed) for kind, seed in seeds.items()}
        save_somewhere(args, sides, inputs, name, clock, early, asked | {"rows": asked["rows"] if finished else done}, traces)
    for side, kind in zip(sides, args.models, strict=True):
        trace_side(connection, args, side, kind, report_path(args, kind, name), seeds[kind])
    if finished or not args.save:
        tell_next(args, name, early)
    return 0 if finished else 130


def tell_next(args: argparse.Namespace, name: str, early: EarlyStop | None) -> None:
    """The comparison of both reports, where they are saved; a replay takes the small model's place."""
    if not args.save:
        return next_step("the same command with --save, which writes both reports for 03_compare/compare.py")
    sides = {("slm" if kind == "replay" and "slm" not in args.models else "azure" if kind == "replay" else kind): kind for kind in args.models}
    told = " ".join(f"--{side} {shown_path(report_path(args, kind, name))}" for side, kind in sides.items())
    return next_step(f"python 03_compare/compare.py --track {args.track} {told}{' --sequential' if early else ''} --delta {args.delta:g}")


if __name__ == "__main__":
    run(main)
