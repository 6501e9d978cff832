"""Turn what a hosted model was asked, as Langfuse has traced it, into rows for prepare_data.py --source jsonl.

    python 02_dataset/pull_langfuse.py --from 2026-01-01 --to 2026-02-01 --name support-bot --out 02_dataset/traffic.jsonl
    python 02_dataset/pull_langfuse.py --from 2026-01-01 --track toolcall --tags production --min-score helpful=0.5

Each generation becomes a conversation row: with calls or without one where tools were on offer (toolcall), or with a JSON value
(structured). The hosted model's own reply is the reference. Personal data is masked. If a pull is interrupted, the same command
continues it.
"""

import argparse
import sys
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere

from slm_swap.cli import Parser, check_out, next_step, positive, run, warn
from slm_swap.common.errors import UserError
from slm_swap.common.progress import Progress
from slm_swap.common.reports import SCHEMA_VERSION, code_version, now, sha256_file, write_json
from slm_swap.common.settings import PACKAGE, display_path, load_settings
from slm_swap.scoring.tracks import TRACKS
from slm_swap.tracing.api import LangfuseApi
from slm_swap.tracing.traffic import Query, by_score, distinct, in_order, read, write


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--from", dest="start", required=True, type=moment, metavar="TIME", help="ISO 8601; UTC unless it says so")
    parser.add_argument("--to", dest="end", type=moment, metavar="TIME", help="up to here, not included (default: now)")
    parser.add_argument("--name", help="only generations of this name")
    parser.add_argument("--model", help="only generations of this model, spelled as Langfuse shows it")
    parser.add_argument("--tags", nargs="+", default=[], metavar="TAG", help="only traces that have all of these tags")
    parser.add_argument("--min-score", type=score, metavar="[NAME=]X", help="drop what has a score (of that name) below X")
    parser.add_argument("--require-score", action="store_true", help="with --min-score: drop what has no such score")
    parser.add_argument("--limit", type=positive, metavar="N", help="read only the newest N generations")
    parser.add_argument("--track", choices=TRACKS, help="only rows of this track (default: both, each in a file of its own)")
    parser.add_argument("--no-mask", action="store_true", help="keep e-mail addresses, telephone and card numbers and keys")
    parser.add_argument(
        "--phone-regions", nargs="+", type=region, default=["US"], metavar="CC", help="countries whose national numbers count"
    )
    parser.add_argument(
        "--out", type=Path, help="the rows; without --track, _<track> is put into the name (default: 02_dataset/traffic.jsonl)"
    )
    args = parser.parse_args(argv)
    if args.require_score and not args.min_score:
        parser.error("--require-score goes with --min-score")
    if args.end and args.end <= args.start:
        parser.error("--to is not after --from")
    return args


def moment(text: str) -> datetime:
    """An ISO 8601 date or time, for argparse."""
    time = datetime.fromisoformat(text)
    return time if time.tzinfo else time.replace(tzinfo=timezone.utc)


def score(text: str) -> tuple[str | None, float]:
    """`X` or `NAME=X`, for argparse."""
    name, _, least = text.rpartition("=")
    return name or None, float(least)


def region(text: str) -> str:
    """A country's two letters, for argparse."""
    from phonenumbers import SUPPORTED_REGIONS

    if text.upper() not in SUPPORTED_REGIONS:
        raise argparse.ArgumentTypeError(f"{text} is not a country's two letters (ISO 3166), such as US or GB")
    return text.upper()


def query_of(args: argparse.Namespace, tracks: list[str]) -> Query:
    """Which generations are asked for."""
    return Query(
        start=args.start.isoformat(),
        end=args.end and args.end.isoformat(),
        name=args.name,
        model=args.model,
        tags=sorted(set(args.tags)),
        limit=args.limit,
        tracks=tracks,
        regions=None if args.no_mask else args.phone_regions,
    )


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    tracks = [args.track] if args.track else list(TRACKS)
    out = args.out or PACKAGE / "02_dataset/traffic.jsonl"
    outs = {track: out if args.track else out.with_stem(f"{out.stem}_{track}") for track in tracks}
    report_path, journal = out.with_suffix(".report.json"), out.with_suffix(".part")
    check_out(*outs.values(), report_path, journal)
    query = query_of(args, tracks)
    with LangfuseApi(load_settings()) as api, Progress("pull", args.limit) as bar:
        pulled = read(api, query, journal, args.end or datetime.now(timezone.utc), bar.update)
        entries, dropped = pulled.entries, pulled.dropped
        if args.min_score:
            name, least = args.min_score
            cursors = api.has_cursors(args.start)
            entries, low = by_score(entries, api.scores(args.start, name, cursors), least, args.require_score)
            dropped += low
    entries, repeated = distinct(entries)
    dropped = in_order(dropped + repeated)
    if not entries:
        journal.unlink(missing_ok=True)
        why = ", ".join(f"{reason} {count}" for reason, count in dropped.items()) or "none was found"
        raise UserError(f"none of {pulled.read} generations makes a row ({why}): check --from, --to and the filters")
    own, unknown = sum(entry.own for entry in entries), sum(not entry.ended for entry in entries)
    report = {
        "schema_version": SCHEMA_VERSION,
        "stage": "pull_langfuse",
        "created_at": now(),
        "code": code_version(),
        "host": api.host,
        "window": {"from": query.start, "to": pulled.end},
        "filters": {
            "name": args.name,
            "model": args.model,
            "tags": query.tags,
            "min_score": args.min_score and {"name": args.min_score[0], "least": args.min_score[1]},
            "require_score": args.require_score,
            "limit": args.limit,
        },
        "reference": "the hosted model's reply",
        "models": dict(Counter(entry.model for entry in entries)),
        "own_runs": own,
        "end_unknown": unknown,
        "counts": {"read": pulled.read, "kept": len(entries), "dropped": dropped},
        "masked": None if args.no_mask else dict(sum((Counter(entry.masked) for entry in entries), Counter())),
        "outputs": {
            track: {"path": display_path(path), "rows": rows, "sha256": sha256_file(path) if rows else None}
            for track, path, rows in write(entries, outs)
        },
    }
    write_json(report_path, report)
    journal.unlink(missing_ok=True)
    show(report)
    if unknown:
        warn(
            f"{unknown} of {len(entries)} replies have no finish_reason in Langfuse (langfuse.openai records none): one that was cut off is "
            "known there only by its length or its broken JSON"
        )
    if own:
        warn(f"{own} of {len(entries)} rows are this program's own runs, test rows among them perhaps: give --name or --tags")
    return 0


def show(report: dict) -> None:
    """What was read, kept and dropped, as a small table."""
    counts = report["counts"]
    print(f"{'read':<26}{counts['read']:>8}\n{'kept':<26}{counts['kept']:>8}")
    for reason, count in counts["dropped"].items():
        print(f"{'dropped: ' + reason:<26}{count:>8}")
    for kind, count in sorted((report["masked"] or {}).items()):
        print(f"{'masked: ' + kind:<26}{count:>8}")
    for track, output in report["outputs"].items():
        print(f"{track + ' rows':<26}{output['rows']:>8}" + (f"  {output['path']}" if output["rows"] else ""))
    print(f"reference: {report['reference']}")
    next_step(*(f"python 02_dataset/prepare_data.py --source jsonl --dataset-path {output['path']} --track {track}" for track, output in report["outputs"].items() if output["rows"]))


if __name__ == "__main__":
    run(main)
