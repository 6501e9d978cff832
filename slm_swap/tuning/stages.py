"""Running the stage scripts for the ladder: each in a process of its own, with a log, within the hours and the money that are left."""

import ctypes
import json
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from slm_swap.clients.pricing import Prices
from slm_swap.common.errors import UserError
from slm_swap.common.progress import last_line
from slm_swap.common.settings import PACKAGE, display_path
from slm_swap.rows.lines import read_jsonl
from slm_swap.tuning.ladder import OutOfBudget, Setting, Unfit, file_name, flags_of

IN_USE = "another process"  # in what a stage says where one that was begun before is still at work: nothing of the model
HEARTBEAT = 30  # seconds between signs of life of a long stage
PR_SET_PDEATHSIG = 1  # of Linux' prctl: a stage ends with the ladder, whose next run would find its journal in use


@dataclass
class Budget:
    """Seconds and money that may be spent (None: no limit), and what is spent; money is None once a part of it is not known."""

    seconds: float | None = None
    money: float | None = None
    spent_seconds: float = 0.0
    spent_money: float | None = 0.0
    started: float = field(default_factory=time.monotonic)

    def left(self, hour: float | None) -> tuple[float | None, str]:
        """(seconds, what ends with them) for a machine with a price of an `hour`.

        Raises:
            OutOfBudget: there are none, or the money is spent.
        """
        found: list[tuple[float, str]] = []
        if self.money is not None:
            if (left := self.money - (self.spent_money or 0.0)) <= 0:
                raise OutOfBudget(f"the {self.money:g} of --spend are spent")
            found += [(3600 * left / hour, "--spend")] if hour else []
        if self.seconds is not None:
            if (left := self.seconds - self.spent_seconds - (time.monotonic() - self.started)) <= 0:
                raise OutOfBudget(f"the {self.seconds / 3600:g} hours are spent")
            found.append((left, "--hours"))
        return min(found, default=(None, ""))

    def pay(self, money: float | None) -> None:
        self.spent_money = None if None in (self.spent_money, money) else self.spent_money + money


@dataclass
class Stages:
    """Args:
    common: flags of every evaluation: the rows, the engine.
    training: flags of every training.
    tracing: flags of both: how they are traced.
    pace: flags of evaluations that no reply hangs on.
    """

    folder: Path
    budget: Budget
    prices: Prices
    common: list[str]
    training: list[str]
    tracing: list[str]
    say: Callable[[str], object]
    pace: list[str] = field(default_factory=list)

    @property
    def ledger(self) -> Path:
        """What each stage took, ended or not, in lines of {"began", "stage", "seconds", "money"}; of one `began` the last line holds."""
        return self.folder / "stages.jsonl"

    def take_up(self, before: tuple[float, float | None]) -> None:
        """Count what earlier runs spent; `before` is (seconds, money) of a folder that has no ledger yet.

        Raises:
            UserError: the ledger cannot be read.
        """
        if not self.ledger.exists():
            self.budget.spent_seconds, self.budget.spent_money = before
            if before[0]:
                self._note("before", "before", *before)
            return
        whole = self.ledger.read_bytes().rpartition(b"\n")
        if whole[2]:  # a full disk's or a power cut's
            self.ledger.write_bytes(whole[0] + whole[1])
        last = {line["began"]: line for _, line in read_jsonl(self.ledger)}
        for line in last.values():
            self.budget.spent_seconds += line["seconds"]
            self.budget.pay(line["money"])

    def _note(self, began: str, stage: str, seconds: float, money: float | None) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.ledger, "a", encoding="utf-8") as file:
            file.write(json.dumps({"began": began, "stage": stage, "seconds": round(seconds, 3), "money": money}) + "\n")

    def evaluate(self, name: str, setting: Setting, report: Path) -> float:
        """Evaluate the small model; gives the seconds.

        Raises:
            Unfit: it cannot be asked so.
            OutOfBudget: before it was done. What it has is kept.
        """
        return self._stage(name, "01_eval/eval.py", ["--model-kind", "slm", *self.common, *self.pace, *flags_of(setting), "--out", str(report)])

    def train(self, preset: str, setting: Setting) -> float:
        """Train the setting's adapter where there is none yet; gives the seconds, 0 where it was there.

        Raises:
            Unfit, OutOfBudget: as `evaluate`.
        """
        adapter, asked = setting["adapter"], flags_of({name: setting[name] for name in ("ask", "few_shot", "shots") if name in setting})
        if (adapter / "training_info.json").is_file():
            return 0.0
        flags = ["--preset", preset, *asked, *self.training, "--out", str(adapter), "--resume"]
        return self._stage(f"training {preset}", "04_ft/train_unsloth.py", flags)

    def _stage(self, name: str, script: str, flags: list[str]) -> float:
        local = self.prices.local
        hour = local.training_hour if "train" in script and local.training_hour is not None else local.hour
        (left, limit), began, flags, key = self.budget.left(hour), time.monotonic(), [*flags, *self.tracing], str(uuid.uuid4())
        log = self.folder / "logs" / f"{file_name(name)}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        self.say(f"{name}: python {script} {shlex.join(flags)}")

        def note() -> tuple[float, float | None]:
            """(seconds, money) that it took until now; kept, as this process may be killed, too."""
            seconds = time.monotonic() - began
            self._note(key, name, seconds, money := None if hour is None else hour * seconds / 3600)
            return seconds, money

        with open(log, "w", encoding="utf-8") as output:
            process = subprocess.Popen(
                [sys.executable, str(PACKAGE / script), *flags], stdout=output, stderr=subprocess.STDOUT, preexec_fn=_end_with_parent
            )
            try:
                code = self._wait(process, name, log, left, limit, note)
            except BaseException:
                process.send_signal(signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(HEARTBEAT)
                process.kill()
                self.budget.pay(note()[1])
                raise
        seconds, money = note()
        self.budget.pay(money)
        if code == 2:
            told = _last_error(log)
            raise (UserError(f"{name}: {told}") if IN_USE in told else Unfit(told))
        if code:
            raise UserError(f"{script} ended with exit code {code}: its log is {display_path(log)}")
        return seconds

    def _wait(self, process: subprocess.Popen, name: str, log: Path, left: float | None, limit: str, note: Callable[[], object]) -> int:
        began = time.monotonic()
        while True:
            rest = None if left is None else left - (time.monotonic() - began)
            if rest is not None and rest <= 0:
                raise OutOfBudget(f"what {limit} allows is spent, after {left:.0f} s of it: the same command with more {limit} goes on")
            try:
                return process.wait(HEARTBEAT if rest is None else min(HEARTBEAT, rest))
            except subprocess.TimeoutExpired:
                note()
                self.say(f"{name}: {last_line(log) or f'at work for {time.monotonic() - began:.0f} s'}")


def _end_with_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's `&` has it ignored, and a stage would not end by it
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGINT)


def _last_error(log: Path) -> str:
    """The line in which a stage says why it ended."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ") or ": see " in line]
    return said[-1] if said else f"it ended with exit code 2: its log is {display_path(log)}"
