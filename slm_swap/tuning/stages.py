"""Running the stage scripts for the ladder: each in a process of its own, with a log, within the hours and the money that are left."""

import ctypes
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from slm_swap.clients.pricing import Prices, to_float
from slm_swap.common.errors import UserError
from slm_swap.common.progress import last_line
from slm_swap.common.settings import PACKAGE, display_path
from slm_swap.tuning.ladder import OutOfBudget, Setting, Unfit, file_name, flags_of

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

    def left(self) -> float | None:
        """Seconds.

        Raises:
            OutOfBudget: there are none, or the money is spent.
        """
        if self.money is not None and (self.spent_money or 0.0) >= self.money:
            raise OutOfBudget(f"the {self.money:g} of --spend are spent")
        if self.seconds is None:
            return None
        left = self.seconds - self.spent_seconds - (time.monotonic() - self.started)
        if left <= 0:
            raise OutOfBudget(f"the {self.seconds / 3600:g} hours are spent")
        return left

    def pay(self, money: float | None) -> None:
        self.spent_money = None if None in (self.spent_money, money) else self.spent_money + money


@dataclass
class Stages:
    """Args:
    common: flags of every evaluation: the rows, the engine.
    training: flags of every training.
    tracing: flags of both: how they are traced.
    """

    folder: Path
    budget: Budget
    prices: Prices
    common: list[str]
    training: list[str]
    tracing: list[str]
    say: Callable[[str], object]

    def evaluate(self, name: str, setting: Setting, report: Path) -> float:
        """Evaluate the small model; gives the seconds.

        Raises:
            Unfit: it cannot be asked so.
            OutOfBudget: before it was done. What it has is kept.
        """
        return self._stage(name, "01_eval/eval.py", ["--model-kind", "slm", *self.common, *flags_of(setting), "--out", str(report)])

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
        left, began, flags = self.budget.left(), time.monotonic(), [*flags, *self.tracing]
        log = self.folder / "logs" / f"{file_name(name)}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        self.say(f"{name}: python {script} {' '.join(flags)}")
        with open(log, "w", encoding="utf-8") as output:
            process = subprocess.Popen(
                [sys.executable, str(PACKAGE / script), *flags], stdout=output, stderr=subprocess.STDOUT, preexec_fn=_end_with_parent
            )
            try:
                code = self._wait(process, name, log, left)
            except BaseException:
                process.send_signal(signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(HEARTBEAT)
                process.kill()
                raise
        seconds = time.monotonic() - began
        self.budget.pay(to_float(self.prices.local.cost(seconds)))
        if code == 2:
            raise Unfit(_last_error(log))
        if code:
            raise UserError(f"{script} ended with exit code {code}: its log is {display_path(log)}")
        return seconds

    def _wait(self, process: subprocess.Popen, name: str, log: Path, left: float | None) -> int:
        began = time.monotonic()
        while True:
            rest = None if left is None else left - (time.monotonic() - began)
            if rest is not None and rest <= 0:
                raise OutOfBudget(f"the hours are spent, after {left:.0f} s of it: the same command with more --hours goes on")
            try:
                return process.wait(HEARTBEAT if rest is None else min(HEARTBEAT, rest))
            except subprocess.TimeoutExpired:
                self.say(f"{name}: {last_line(log) or f'at work for {time.monotonic() - began:.0f} s'}")


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGINT)


def _last_error(log: Path) -> str:
    """The line in which a stage says why it ended."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ") or ": see " in line]
    return said[-1] if said else f"it ended with exit code 2: its log is {display_path(log)}"
