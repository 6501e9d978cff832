"""Progress of long work: a bar on a terminal, and where nobody looks at one a line every 30 s, with rows, rate and time left."""

import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

EVERY = 30.0  # seconds between two lines
REFRESH = 0.5  # seconds between two looks at a bar: rows that end together are counted at once, not with the next ones
_LINE = re.compile(r".+: [\d,]+( of [\d,]+)? \w+(, | after ).+")


class Progress:
    """`with Progress("toolcall slm", 300) as shown: shown.update()`: what was done, on standard error.

    Args:
        total: how many there are; None: not known.
        earlier: how many of them were done before, and will be counted at once: they say nothing of the rate.
        shown: False keeps quiet, for all processes but the first.
        clock, every: for tests.
    """

    def __init__(
        self,
        title: str,
        total: int | None = None,
        unit: str = "rows",
        earlier: int = 0,
        shown: bool = True,
        clock: Callable[[], float] = time.monotonic,
        every: float = EVERY,
    ):
        self.title, self.total, self.unit, self.earlier, self.shown, self.clock, self.every = title, total, unit, earlier, shown, clock, every
        self.done = 0
        self._bar: Any = None
        self._ended = threading.Event()

    def __enter__(self) -> "Progress":
        self.began = self.clock()
        if self.shown and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar, self.every = tqdm(total=self.total, desc=self.title, unit=f" {self.unit}", leave=False), REFRESH
        if self.shown:
            self._thread = threading.Thread(target=self._beat, name=f"progress of {self.title}", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self.shown:
            self._thread.join()
        if self._bar is not None:
            self._bar.close()

    def update(self, number: int = 1) -> None:
        self.done += number
        if self._bar is not None:
            self._bar.update(number)

    def expect(self, total: int, done: int = 0) -> None:
        """Once it is known: how many there are, and how many were `done` before."""
        self.total, self.done, self.earlier, self.began = total, done, done, self.clock()
        if self._bar is not None:
            self._bar.total, self._bar.n, self._bar.initial = total, done, done
            self._bar.refresh()

    def say(self, text: str) -> None:
        """A line on standard output, past the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        elif self.shown:
            print(text, flush=True)

    def line(self) -> str:
        """`toolcall slm: 120 of 300 rows, 2.1 rows/s, 86 s left`; without a total `prepare: 120 rows, 2.1 rows/s`."""
        spent, new = self.clock() - self.began, max(0, self.done - self.earlier)
        if self.total is None and not self.done:
            return f"{self.title}: at work for {duration(spent)}"
        told = f"{self.title}: {self.done:,}{'' if self.total is None else f' of {self.total:,}'} {self.unit}"
        if not new:
            return f"{told} after {duration(spent)}"
        rate = new / spent if spent > 0 else 0.0
        told += f", {rate:.3g} {self.unit}/s"
        return told if self.total is None or not rate else f"{told}, {duration((self.total - self.done) / rate)} left"

    def _beat(self) -> None:
        while not self._ended.wait(self.every):
            if self._bar is not None:
                self._bar.refresh()
            else:
                print(self.line(), file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.5 h`"""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def last_line(log: Path) -> str | None:
    """The last line of a log if it is one of Progress: how far a process has come whose output goes there."""
    with open(log, "rb") as stream:
        stream.seek(max(0, log.stat().st_size - 1000))
        lines = stream.read().decode(errors="replace").rstrip().splitlines()
    return lines[-1] if lines and _LINE.fullmatch(lines[-1]) else None
