"""Stage scripts run in forks of this process, which has everything loaded: a run takes what its work takes, and may be killed at any moment.

A fork does what a new interpreter would do for the script, but for its imports: the script's own `main` under `cli.run`, its output through pipes,
its end by `atexit` and flushing. This process must have no threads.
"""

import gc
import importlib
import logging
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from slm_swap.cli import run
from tests.support import fork_server
from tests.support.scripts import load_script

PATIENCE = 300.0  # seconds that a run may take
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link")
# What the scripts and their packages import only when they are at work.
LAZY = (
    *(f"slm_swap.tuning.{name}" for name in ("training", "loop", "merging", "fast_training", "model_checks")),
    *(f"slm_swap.{name}" for name in ("verdict.html_report.page", "verdict.text_report", "evaluating.reply_cache", "slm_client", "azure_client")),
    "aiohttp.web", "dotenv.main", "deepspeed", "matplotlib.figure", "matplotlib.backends.backend_agg", "mpl_toolkits.mplot3d", "torch.nn.attention.varlen",
    "transformers.models.phi3.modeling_phi3", "transformers.models.auto.modeling_auto", "peft.tuners.lora.bnb", "peft.utils.transformers_weight_conversion",
)  # fmt: skip
_scripts: dict[str, ModuleType] = {}


@dataclass(frozen=True)
class Moment:
    """A signal some seconds after the start."""

    seconds: float
    signal: int


@dataclass(frozen=True)
class Before:
    """A signal right before the script opens a file to write, renames, removes or makes one for the so-manieth time (from 1)."""

    change: int
    signal: int


@dataclass(frozen=True)
class InWrite:
    """No file may have more bytes: the write that would is cut there, and the next one kills (`killed`), or is an error of a full quota."""

    size: int
    killed: bool = True


Fault = Moment | Before | InWrite | None


@dataclass
class Ended:
    """How a run ended. `code` is as subprocess has it; `changes` are those that it made to files, where they were asked for."""

    code: int
    said: str
    error: str
    seconds: float
    hung: bool = False
    changes: list[str] = field(default_factory=list)


def load(*scripts: str) -> None:
    """Import scripts and what they import when they are at work."""
    logging.disable()  # that there is no GPU, and the like
    fork_server.load()
    for name in LAZY:
        with suppress(ImportError):
            importlib.import_module(name)
    logging.disable(logging.NOTSET)
    importlib.import_module("torch").set_num_threads(1)  # two of them in each of several forks would wait for each other
    for script in scripts:
        _scripts[script] = load_script(script)
    gc.freeze()  # or each fork copies all of it as its own collections look at it


def run_script(
    script: str, words: list[object], folder: Path, environment: dict[str, str], fault: Fault = None, changes: bool = False, prepare: Callable[[], object] | None = None
) -> Ended:
    """Run a stage script, with its path below `slm_swap/`, in a fork whose folder is `folder`; `prepare` is called there first."""
    (out, out_end), (err, err_end), (told, told_end) = os.pipe(), os.pipe(), os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        for number, end in enumerate((out_end, err_end), 1):
            os.dup2(end, number)
        for end in (out, err, told, out_end, err_end):
            os.close(end)
        _become(script, [str(word) for word in words], folder, environment, fault, told_end, changes, prepare)
    for end in (out_end, err_end, told_end):
        os.close(end)
    return _watch(child, out, err, told, fault)


def _watch(child: int, out: int, err: int, told: int, fault: Fault) -> Ended:
    """Read what a fork says, send it the signal of a Moment, and wait for its end."""
    texts, open_ends, pidfd, code, hung = {out: b"", err: b"", told: b""}, {out, err, told}, os.pidfd_open(child), None, False
    poll = select.poll()
    for end in (*open_ends, pidfd):
        poll.register(end, select.POLLIN)
    began, kill_at = time.monotonic(), None
    while code is None:
        if kill_at is None and texts[told] and isinstance(fault, Moment):
            kill_at = time.monotonic() + fault.seconds
        next_at = min(filter(None, (kill_at, began + PATIENCE)))
        ready = {end for end, _ in poll.poll(max(0.0, next_at - time.monotonic()) * 1000 + 0.5)}
        if pidfd in ready:
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for end in open_ends & ready:
            if chunk := os.read(end, 1 << 16):
                texts[end] += chunk
            else:
                poll.unregister(end)
                open_ends.discard(end)
        if kill_at is not None and time.monotonic() >= kill_at and code is None:
            os.kill(child, fault.signal)
            kill_at, fault = None, None
        if time.monotonic() > began + PATIENCE and code is None:
            os.kill(child, signal.SIGKILL)
            began, hung = time.monotonic(), True
    for end in open_ends:  # what was said last; a process that the script has started may have the other end yet
        os.set_blocking(end, False)
        with suppress(BlockingIOError):
            while chunk := os.read(end, 1 << 16):
                texts[end] += chunk
    for end in (*texts, pidfd):
        os.close(end)
    said, error, changed = (texts[end].decode("utf-8", "replace") for end in (out, err, told))
    return Ended(code, said, error, time.monotonic() - began, hung, changed.splitlines()[1:])


def _become(
    script: str, words: list[str], folder: Path, environment: dict[str, str], fault: Fault, told: int, changes: bool, prepare: Callable | None
) -> None:
    """Run the script as if this process had been started for it; never comes back."""
    try:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        sys.argv = [script, *words]
        if prepare:
            prepare()
        main = _scripts[script].main

        def started() -> int:
            os.write(told, b"started\n")
            if isinstance(fault, InWrite):
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL if fault.killed else signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (fault.size, resource.RLIM_INFINITY))
            elif changes or isinstance(fault, Before):
                sys.addaudithook(_Changes(folder, fault, told if changes else None))
            code = main()
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # what comes now is too late: the rest is the interpreter's end
            return code

        run(started)
    except BaseException as error:
        fork_server.end(fork_server.exit_code(error))


class _Changes:
    """An audit hook that counts what changes files below a folder, tells of it, and dies before one of them."""

    def __init__(self, folder: Path, fault: Before | None, told: int | None):
        self.folder, self.fault, self.told, self.count = str(folder), fault, told, 0

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if not isinstance(flags, int) or not flags & WRITES:
                return
        elif event in CHANGES:
            path = args[0]
        else:
            return
        if isinstance(path, int) or path is None or not self._is_inside(os.fsdecode(path)):
            return
        self.count += 1
        if self.told is not None:
            os.write(self.told, f"{event} {os.fsdecode(path)}\n".encode("utf-8", "replace"))
        if self.fault and self.count == self.fault.change:
            os.kill(os.getpid(), self.fault.signal)

    def _is_inside(self, path: str) -> bool:
        return path.startswith(self.folder) or not path.startswith("/")
