"""A campaign of faults: kills, damaged files, full disks and odd Langfuse servers, and whether results survive them or the product says so.

    python benchmarks/faults.py
    python benchmarks/faults.py --minutes 10 --seed 7 --out /tmp/faults.json
    python benchmarks/faults.py --kills 0 --damage 0 --disks 0 --servers 0 --memory-rows 1000000
    python benchmarks/faults.py --only damage-17

The real scripts run on a few rows, in forks with everything loaded, against the simulated hosted endpoint over a real socket. Each trial has its own
seed, made of the campaign's and its name, so that one can be run alone (`--only`). What has to hold:

- kill: a script is killed, up to three times, and then run to its end. It ends in what an undisturbed run gives but for times (an adapter to the bit);
  no row is asked whose answer was kept; nothing is left behind; no traceback.
- damage: a file is damaged, and what reads it gives the same result, having told what it passed over, or refuses with one line and exit 2.
- disk: the disk is full, or the file may not be larger. One line and exit 2, and with room the same command goes on to the same result.
- server: Langfuse gives errors, pages, half answers or none. What is said to be sent is there; everything is, once, when the server is well again.

Not promised to be noticed, so counted apart (`not noticed`): damage to input rows, recorded replies, decisions and training_info.json that leaves them
valid, and a trace file that ends earlier or lacks whole lines. `failed` has the trials that failed; exit code 1 if there is one.
"""

import argparse
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere

from fault_stages import SCRIPTS
from fault_trials import OUTCOMES, TRIALS, Campaign, can_mount, one_trial, scene
from forked import load

from slm_swap.cli import Parser, minutes, not_negative, positive, run
from slm_swap.common.errors import UserError
from slm_swap.common.reports import code_version, hardware, now, package_versions, write_json, write_jsonl
from slm_swap.common.settings import PACKAGE, ROOT, display_path


class Trials:
    """Trials side by side, each in a fork of this process."""

    def __init__(self, campaign: Campaign, jobs: int):
        self.campaign, self.jobs = campaign, jobs
        self.running: dict[Any, int] = {}

    def results(self, trials: Iterator[str]) -> Iterator[dict[str, Any]]:
        """What came of each trial, as they end; `trials` is asked for the next one when there is room."""
        more = True
        try:
            while more or self.running:
                while more and len(self.running) < self.jobs:
                    trial = next(trials, None)
                    if more := trial is not None:
                        self._start(trial)
                for end in multiprocessing.connection.wait(list(self.running)) if self.running else ():
                    result = end.recv()
                    os.waitpid(self.running.pop(end), 0)
                    end.close()
                    yield result
        finally:
            for child in self.running.values():
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)

    def _start(self, trial: str) -> None:
        here, there = multiprocessing.Pipe(duplex=False)
        child = os.fork()
        if not child:
            here.close()
            there.send(one_trial(self.campaign, trial))
            os._exit(0)
        there.close()
        self.running[here] = child


class Counts:
    """What came of all trials, by kind and by what was hit."""

    def __init__(self) -> None:
        self.trials: Counter[str] = Counter()
        self.killed: Counter[str] = Counter()
        self.damaged: Counter[str] = Counter()
        self.disks: Counter[str] = Counter()
        self.outcomes: dict[str, dict[str, Counter[str]]] = {kind: {} for kind in TRIALS}
        self.failed: dict[str, str] = {}

    def add(self, result: dict[str, Any]) -> None:
        kind = result["trial"].partition("-")[0]
        self.trials[kind] += 1
        apart = {"killed": self.killed, "damaged": self.damaged, "tried": self.disks}
        for what, outcome in result["told"]:
            if outcome in apart:
                apart[outcome][what] += 1
            else:
                self.outcomes[kind].setdefault(what, Counter())[outcome] += 1
        if result["why"]:
            self.failed[result["trial"]] = result["why"]

    def to_json(self) -> dict[str, Any]:
        told = {kind: {"trials": self.trials[kind]} | self._sums(kind) for kind in TRIALS}
        told["kill"] |= {"kills": self.killed.total(), "by_signal": dict(self.killed)}
        told["damage"] |= {"by_kind": dict(self.damaged)}
        told["disk"] |= {"by_kind": dict(self.disks)}
        return told | {"failed": dict(sorted(self.failed.items()))}

    def _sums(self, kind: str) -> dict[str, Any]:
        """Every outcome's sum, failures of which there are none too; and by what was hit."""
        sums = sum(self.outcomes[kind].values(), Counter())
        return {"outcomes": {name: sums[name] for name in (*OUTCOMES, *sorted(set(sums) - set(OUTCOMES)))}, "by": {name: dict(found) for name, found in sorted(self.outcomes[kind].items())}}


def planned(args: argparse.Namespace, counts: Counts) -> Iterator[str]:
    """Names of trials, the kinds mixed, until there are as many as asked for or the time is over."""
    deadline = time.monotonic() + args.minutes * 60 if args.minutes else float("inf")
    wanted = {"kill": args.kills, "damage": args.damage, "disk": args.disks, "server": args.servers}
    begun: Counter[str] = Counter()

    def share(kind: str) -> float:
        """How much of a kind is done: kills are counted by those that came."""
        done = counts.killed.total() + begun[kind] - counts.trials[kind] if kind == "kill" else begun[kind]
        return done / wanted[kind] if wanted[kind] else 1.0

    while time.monotonic() < deadline:
        kind = min(wanted, key=share)
        if share(kind) >= 1:
            if not args.minutes or not any(wanted.values()):
                return
            wanted = {name: 2 * number for name, number in wanted.items()}  # the time is not over: on, in the same shares
            continue
        begun[kind] += 1
        yield f"{kind}-{begun[kind]}"


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder that goes with the block; a fork, unlike with tempfile's own, does not take it along at its end."""
    folder = Path(tempfile.mkdtemp(prefix="faults_"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Memory:
    """The most memory that an evaluation of so many recorded replies takes, in a process of its own that works beside the trials."""

    def __init__(self, rows: int, folder: Path):
        folder.mkdir()
        self.rows, self.began = rows, time.monotonic()
        texts = (f"Plan stop number {number} of a long journey through the north, by train wherever there is one, else by bus." for number in range(rows))
        given = ({"id": f"row-{number}", "prompt": text, "completion": f'{{"stop": {number}, "by": "train"}}'} for number, text in enumerate(texts))
        replies = ({"id": f"row-{number}", "prediction": f'{{"stop": {number - number % 7 // 6}, "by": "train"}}'} for number in range(rows))
        write_jsonl(folder / "rows.jsonl", given)
        write_jsonl(folder / "replies.jsonl", replies)
        code = (
            "import atexit, pathlib, runpy, sys; sys.argv = sys.argv[1:]; "
            "atexit.register(lambda: print(pathlib.Path('/proc/self/status').read_text(), flush=True)); runpy.run_path(sys.argv[0], run_name='__main__')"
        )
        words = ["--track", "structured", "--model-kind", "replay", "--dataset", folder / "rows.jsonl", "--replies", folder / "replies.jsonl", "--out", folder / "report.json"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, PACKAGE / "01_eval/eval.py", *words], env=os.environ | {"LANGFUSE_DISABLED": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def end(self) -> None:
        """Nobody waits for it any more."""
        self.process.kill()
        self.process.wait()

    def measured(self) -> dict[str, Any]:
        """What came of it.

        Raises:
            UserError: the evaluation failed.
        """
        said, error = self.process.communicate()
        if self.process.returncode:
            raise UserError(f"the evaluation for --memory-rows ended with {self.process.returncode} ({error[-300:]}): see what it says")
        peak = int(next(line for line in said.splitlines() if line.startswith("VmHWM:")).split()[1])  # KiB; a child's ru_maxrss may be its parent's
        return {"rows": self.rows, "peak_mib": round(peak / 1024, 1), "seconds": round(time.monotonic() - self.began, 1)}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=minutes, metavar="M", help="go on for so long, with the kinds in the shares of their numbers (default: until the numbers are reached)")
    add("--kills", type=not_negative, default=500, metavar="N", help="kills (default: 500)")
    add("--damage", type=not_negative, default=1000, metavar="N", help="damaged files (default: 1000)")
    add("--disks", type=not_negative, default=60, metavar="N", help="full disks and limits on files (default: 60)")
    add("--servers", type=not_negative, default=40, metavar="N", help="runs traced to an odd Langfuse (default: 40)")
    add("--only", metavar="TRIAL", help="one trial, such as kill-17, and what it found")
    add("--memory-rows", type=positive, metavar="N", help="measure the memory of an evaluation of so many rows, too (1,000,000 take some 4 minutes)")
    add("--jobs", type=positive, default=os.cpu_count(), metavar="N", help="trials at a time (default: one a core)")
    parser.add_seed()
    add("--out", type=Path, metavar="FILE", default=ROOT / "benchmarks/results/faults.json")
    args = parser.parse_args(argv)
    if args.only and (args.only.partition("-")[0] not in TRIALS or not args.only.partition("-")[2].isdigit()):
        parser.error(f"--only {args.only}: a trial is {', '.join(TRIALS)} and its number, such as kill-17")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    began, counts = time.monotonic(), Counts()
    about = {"created_at": now(), "code": code_version(), "packages": package_versions(), "hardware": hardware(), "seed": args.seed, "jobs": args.jobs}
    with scratch_folder() as folder, contextlib.ExitStack() as ends:
        memory = Memory(args.memory_rows, folder / "memory") if args.memory_rows else None
        if memory:
            ends.callback(memory.end)

        def write(**more: Any) -> None:
            if not args.only:
                write_json(args.out, about | counts.to_json() | more | {"seconds": round(time.monotonic() - began, 1)})

        if args.only or args.minutes or any((args.kills, args.damage, args.disks, args.servers)):
            if args.disks and not can_mount():
                print("no tmpfs can be mounted here: of disks only limits on a file's size are tried", flush=True)
            load(*SCRIPTS)
            with scene(folder) as made:
                campaign = Campaign(made, args.seed)
                campaign.prepare()
                trials = iter([args.only]) if args.only else planned(args, counts)
                for result in Trials(campaign, args.jobs).results(trials):
                    counts.add(result)
                    if result["why"] or args.only:
                        print(f"{result['trial']}: {result['why'] or result['told']}", flush=True)
                    if counts.trials.total() % 20 == 0:
                        write()  # it may be stopped, or the machine taken away
        write(**({"memory": memory.measured()} if memory else {}))
    print(
        f"{counts.killed.total()} kills, {counts.damaged.total()} damaged files, {counts.disks.total()} disks, {counts.trials['server']} servers: "
        f"{len(counts.failed)} failed"
    )
    if not args.only:
        print(f"report: {display_path(args.out)}")
    return 1 if counts.failed else 0


if __name__ == "__main__":
    run(main)
