"""Run two models over the same rows and watch their metrics and the difference while they work.

    python 01_eval/live_compare.py --track toolcall --models azure slm --limit 50
    python 01_eval/live_compare.py --track structured --models azure slm --adapter 04_ft/adapter_structured --save

Ctrl-C ends it with what both have answered so far; with --save that is written as two reports.
"""

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere

from slm_swap.cli import Parser, client_options, load_rows, run, run_metadata, warn
from slm_swap.clients import MODEL_KINDS, Client, make_client
from slm_swap.errors import UserError
from slm_swap.evaluation import Row, Stopwatch, evaluate, make_report, model_name, references, summary, trace_rows
from slm_swap.langfuse_helpers import require_tracing, trace_run
from slm_swap.reports import rows_path, write_json, write_jsonl
from slm_swap.seeds import set_seed
from slm_swap.settings import PACKAGE, Settings, display_path, load_settings
from slm_swap.tracks import TRACKS, Track


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_track()
    parser.add_argument("--models", nargs=2, required=True, choices=MODEL_KINDS, metavar="KIND", help="two of azure, slm, replay")
    parser.add_rows()
    parser.add_client()
    parser.add_argument("--save", action="store_true", help="write both reports, <track>_<kind>_<split>_live.json")
    parser.add_argument("--out-dir", type=Path, default=PACKAGE / "01_eval/reports", help="where --save writes")
    parser.add_seed()
    args = parser.parse_args(argv)
    if args.models[0] == args.models[1]:
        parser.error("--models takes two different models")
    return args


class Side:
    """One of the two models: what it has answered and how long it took."""

    def __init__(self, client: Client):
        self.client, self.rows, self.seconds = client, [], 0.0

    def work(self, track: str, batch: list, gold: list) -> tuple[list[Row], float]:
        clock = Stopwatch()
        return evaluate(track, self.client, batch, gold, len(batch)), clock.lap()


def table(track: Track, sides: list[Side], total: int):
    """The running metrics of both models, as a rich table."""
    from rich.table import Table

    done = len(sides[0].rows)
    shown = Table(title=f"{track.title}: {done} of {total} rows")
    names = [model_name(side.client.describe()) for side in sides]
    for heading in ("metric", *names, f"{names[0]} - {names[1]}"):
        shown.add_column(heading, justify="left" if heading == "metric" else "right")
    if done:
        left, right = (summary(track, side.rows)["metrics"] for side in sides)
        for name in left:
            shown.add_row(name, f"{left[name]:.3f}", f"{right[name]:.3f}", f"{left[name] - right[name]:+.3f}")
        shown.add_row("seconds", *(f"{side.seconds:.1f}" for side in sides), "")
    return shown


def compare(args: argparse.Namespace, sides: list[Side], examples: list, gold: list) -> bool:
    """Both models over all rows, batch by batch and at the same time; False when Ctrl-C ended it early."""
    from rich.live import Live

    track, size = TRACKS[args.track], args.batch_size
    pool = ThreadPoolExecutor(len(sides))
    try:
        with Live(table(track, sides, len(examples)), refresh_per_second=4) as live:
            for start in range(0, len(examples), size):
                part = slice(start, start + size)
                running = [pool.submit(side.work, args.track, examples[part], gold[part]) for side in sides]
                # Both or none: a batch counts only when both models have answered it.
                for side, (rows, seconds) in zip(sides, [future.result() for future in running], strict=True):
                    side.rows += rows
                    side.seconds += seconds
                live.update(table(track, sides, len(examples)))
    except KeyboardInterrupt:
        return False
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return True


def save(args: argparse.Namespace, sides: list[Side], inputs: dict, name: str, clock: Stopwatch) -> None:
    for side, kind in zip(sides, args.models, strict=True):
        out = args.out_dir / f"{args.track}_{kind}_{name}_live.json"
        report = make_report(
            args.track,
            side.client,
            side.rows,
            side.seconds,
            clock.total,
            inputs,
            vars(args) | {"out_dir": display_path(args.out_dir)},
        )
        write_jsonl(rows_path(out), (row.to_json(TRACKS[args.track]) for row in side.rows))
        write_json(out, report)
        print(f"report: {display_path(out)}")


def trace_side(settings: Settings, args: argparse.Namespace, side: Side, kind: str) -> None:
    """One model's part as a trace of its own, so that a live run stands beside those of eval.py."""
    with trace_run(settings, f"live-{args.track}-{kind}", run_metadata(args), tags=["eval", "live", args.track, kind]) as trace:
        trace_rows(trace, args.track, side.client, side.rows)
        trace.scores(summary(TRACKS[args.track], side.rows)["metrics"])


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    clock, settings = Stopwatch(), load_settings()
    require_tracing(settings)
    examples, inputs, name = load_rows(args, args.models)
    gold = references(TRACKS[args.track], examples)
    if "slm" in args.models:
        set_seed(args.seed)
    sides: list[Side] = []
    try:
        for kind in args.models:
            sides.append(Side(make_client(kind, settings, examples, seed=args.seed, **client_options(args))))
        finished = compare(args, sides, examples, gold)
    finally:
        for side in sides:
            side.client.close()
    done = len(sides[0].rows)
    if not finished:
        warn(f"interrupted after {done} of {len(examples)} rows: the numbers are of those alone")
    if not done:
        raise UserError("no batch was answered by both models: nothing to show or save")
    if args.save:
        save(args, sides, inputs, name, clock)
    for side, kind in zip(sides, args.models, strict=True):
        trace_side(settings, args, side, kind)
    return 0 if finished else 130


if __name__ == "__main__":
    run(main)
