"""Which process has a folder, and how one ends: with its parent, and where it hangs."""

import ctypes
import faulthandler
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slm_swap.common.errors import UserError

PR_SET_PDEATHSIG = 1  # of Linux' prctl
HUNG_SECONDS = 300  # without any progress after which a process that works for others ends itself, to be started again


def end_with(parent: int, signal: int) -> None:
    """Let this process have a signal when the thread that started it ends. If `parent`, its process, has ended already, it ends at once."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal)
    if os.getppid() != parent:
        os._exit(0)


@contextmanager
def alone_in(folder: Path, refusal: str) -> Iterator[None]:
    """A folder, made where it is not there, as this process' own. A kill gives it back; a child that is forked, and not one of another program, has it too.

    Raises:
        UserError: another process has it; `refusal` is what it says.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(refusal) from None
        yield


class Watchdog:
    """Ends this process, with all threads' tracebacks on standard error, where it makes no progress for HUNG_SECONDS. It needs no GIL for it."""

    def __init__(self) -> None:
        self._set = 0.0

    def work(self) -> None:
        """There was progress, and there is more to do."""
        now = time.monotonic()
        if now - self._set > HUNG_SECONDS / 20:  # each setting starts a thread
            faulthandler.dump_traceback_later(HUNG_SECONDS, exit=True)
            self._set = now

    def rest(self) -> None:
        """There is nothing to do."""
        if self._set:
            faulthandler.cancel_dump_traceback_later()
            self._set = 0.0
