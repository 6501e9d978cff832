"""Watch the small model in service: is it still as the calibration found it? If not, the hosted model answers everything again.

    python 05_serve/watch.py --html runs/watch.html
    python 05_serve/watch.py --once --alarms-in 10000
    python 05_serve/watch.py --resume
    python 05_serve/watch.py --export 02_dataset/audits.jsonl

It reads audits.jsonl and minutes.jsonl of the endpoint's state folder. An alarm writes stop.json there. From then on no worker answers
locally, until a person has looked and --resume removes the file. Then the detectors restart. --once looks once: exit 0 quiet,
12 the flag is up, 2 bad input. --export writes the audited disagreements as rows, with the hosted model's replies as gold.
"""

import argparse
import sys
import time
from collections import Counter
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere

from slm_swap.cli import Parser, check_out, next_step, positive, positive_number, run, run_metadata, tracing_options, warn
from slm_swap.common.errors import UserError
from slm_swap.common.reports import write_atomically, write_jsonl
from slm_swap.common.settings import find_path, load_settings, shown_path
from slm_swap.serving.audit_rows import rows_of_audits
from slm_swap.serving.state import AUDITS, STATE, STOP, flag, lower_flag, raise_flag
from slm_swap.serving.watch_page import cautions, terminal, verdict_line, write_page
from slm_swap.serving.watching import KINDS, TAKES_BACK, Watch, audited_by, begin, find_allowed, has_changed, restart
from slm_swap.tracing.runs import Tracing, connect, trace_run

ALARM = 12  # the exit code
LOOK_SECONDS, LINE_SECONDS = 2, 30


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--state", type=find_path, metavar="DIR", help="the endpoint's state folder (default: 05_serve/state)")
    parser.add_argument("--cascade", metavar="FILE", help="the cascade.json that is served (default: the one that the endpoint names)")
    parser.add_argument("--alarms-in", type=positive, default=10_000, metavar="N", help="disagreement: at most one false alarm in N audited requests")
    parser.add_argument("--warnings-in", type=positive, default=43_200, metavar="N", help="every other test: at most one false alarm in N minutes with requests")
    parser.add_argument("--failures", type=positive_number, default=0.01, metavar="SHARE", help="the share of requests that may fail")
    kinds = f"alarms that raise the flag, of {', '.join(KINDS)}; the others only warn (default: {' '.join(TAKES_BACK)})"
    parser.add_argument("--take-back-on", nargs="*", choices=KINDS, metavar="KIND", help=kinds)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--once", action="store_true", help="look once: exit 0 quiet, 12 the flag is up")
    action.add_argument("--resume", action="store_true", help="a person has looked: answer locally again, and restart the detectors")
    action.add_argument("--export", type=Path, metavar="FILE", help="write audited disagreements as rows for the next training")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write the state as one page")
    parser.add_tracing()
    args = parser.parse_args(argv)
    args.state = args.state or STATE
    args.take_back_on = TAKES_BACK if args.take_back_on is None else args.take_back_on
    if args.failures >= 1:
        parser.error("--failures must be below 1")
    if args.html and (args.resume or args.export):
        parser.error("--html goes with a look: leave --resume and --export out")
    return args


def state_flag(folder: Path) -> str:
    """The flag that names the state folder in a command, where it is not the default."""
    return "" if folder == STATE else f" --state {shown_path(folder)}"


def resume(folder: Path) -> int:
    restart(folder)  # first: a watcher that still had the old evidence would raise the flag again
    kept = lower_flag(folder)
    print(f"the flag is lowered, and kept as {shown_path(kept)}" if kept else "no flag was up")
    print("the detectors restart from here")
    next_step(f"python 05_serve/watch.py{state_flag(folder)}")
    return 0


def export(args: argparse.Namespace) -> int:
    audits, dropped = args.state / AUDITS, Counter()
    check_out(args.export, inputs=[audits], advice="choose another place with --export")
    if not audits.exists():
        raise UserError(f"no audits at {shown_path(audits)}: nothing has been audited, or pass --state")
    hosted, track = audited_by(args.state, args.cascade)
    rows = list(rows_of_audits(audits, hosted, dropped))
    agree = dropped.pop("agree", 0)
    print(f"{len(rows)} rows; {agree} agree" + "".join(f"; {n} left out: {reason}" for reason, n in dropped.items() if n))
    if not rows:
        raise UserError(f"no audit of {shown_path(audits)} makes a row: nothing is written")
    write_jsonl(args.export, rows, "choose another place with --export")
    print(f"rows: {shown_path(args.export)}\nagreement, not accuracy: their gold is the hosted model's reply; personal data is not masked")
    next_step(f"python 02_dataset/prepare_data.py --source jsonl --track {track} --dataset-path {shown_path(args.export)}")
    return 0


class Look:
    """One look after the other: read, raise the flag, tell it, show the page."""

    def __init__(self, args: argparse.Namespace):
        settings, tracing = load_settings(), vars(tracing_options(args, load_settings()))
        self.args, self.connection = args, connect(settings, Tracing(**tracing | {"optional": True}))  # an outage must not hold up an alarm
        self.watch: Watch | None = None
        self.told_changed = False

    def __call__(self) -> None:
        args = self.args
        allowed = find_allowed(args.state, args.cascade, self.watch and self.watch.allowed)
        if begin(args.state, allowed):
            print(f"another cascade is served, {allowed.path}: the detectors restart", file=sys.stderr)
        if self.watch is None or self.watch.allowed != allowed:
            self.watch = Watch(args.state, allowed, args.alarms_in, args.warnings_in, args.failures, tuple(args.take_back_on))
            self.told_changed = False
        if not self.told_changed and has_changed(allowed):
            self.told_changed = True
            warn(f"{allowed.path} is not as the endpoint read it: the rule that is served stays watched, and the file counts when 05_serve/serve.py starts again")
        new = self.watch.read(final=self.args.once)
        against = [alarm for alarm in self.watch.alarms if alarm.takes_back]
        why, rows = "; ".join(alarm.why for alarm in against), dict.fromkeys(row for alarm in against for row in alarm.rows)
        raised = bool(against) and raise_flag(self.args.state, why, [alarm.to_json() for alarm in against], rows)
        for alarm in new:
            see = f"; see {', '.join(alarm.rows)}" if alarm.rows else ""
            print(f"{'alarm' if alarm.takes_back else 'warning'}: {alarm.why}{see}", file=sys.stderr)
        if raised or (new and not self.args.once):  # looks of --once would tell the same warning again and again
            self._tell(new, raised)
        if self.args.html:
            write_atomically(self.args.html, lambda stream: stream.writelines(write_page(self.watch)), "choose another place with --html")

    def _tell(self, alarms: list[Any], raised: bool) -> None:
        """Langfuse, after the flag is up; whatever happens there, the watch goes on."""
        try:
            with trace_run(self.connection, "watch", self.args.state / "watch.json", run_metadata(self.args), ["watch"]) as trace:
                for alarm in alarms:
                    trace.event("alarm" if alarm.takes_back else "warning", alarm.to_json() | {"rows": alarm.rows})
                trace.update(output={"flag_raised": raised, "why": [alarm.why for alarm in self.watch.alarms]})
        except UserError as trouble:
            warn(f"the alarm could not be sent to Langfuse: {trouble}")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if not args.state.is_dir():
        raise UserError(f"no state at {shown_path(args.state)}: start 05_serve/serve.py, or pass --state")
    if args.resume or args.export:
        return resume(args.state) if args.resume else export(args)
    if args.html:
        check_out(args.html, inputs=[args.state / STOP, args.state / AUDITS, args.cascade], advice="choose another place with --html")
    look = Look(args)
    look()
    if not args.once:
        follow(look)
    print(verdict_line(look.watch))
    for line in cautions(look.watch):
        warn(line)
    if args.html:
        print(f"page: {shown_path(args.html)}")
    if not flag(args.state):
        return 0
    next_step(f"python 05_serve/watch.py --export 02_dataset/audits.jsonl{state_flag(args.state)}", f"python 05_serve/watch.py --resume{state_flag(args.state)}")
    return ALARM


def follow(look: Look) -> NoReturn:
    """Look until Ctrl-C: a table in a terminal, elsewhere a line now and then."""
    from rich.live import Live

    shown = Live(terminal(look.watch), auto_refresh=False) if sys.stdout.isatty() else nullcontext()
    with shown as live:
        for turn in count():
            if live:
                live.update(terminal(look.watch), refresh=True)
            elif turn % (LINE_SECONDS // LOOK_SECONDS) == 0:
                print(verdict_line(look.watch), flush=True)
            time.sleep(LOOK_SECONDS)
            look()


if __name__ == "__main__":
    run(main)
