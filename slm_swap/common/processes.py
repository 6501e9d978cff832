"""Which process has a folder, and how one ends: with its parent, and where it hangs."""

import ctypes
import faulthandler
import fcntl
import glob
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from slm_swap.common.errors import UserError

PR_SET_PDEATHSIG = 1  # of Linux' prctl
LOOK_SECONDS = 0.2  # between two looks at whether a folder is free
_LOCK = re.compile(r"^lock:.* FLOCK .* (\d+) \S+ \d+ EOF$", re.MULTILINE)  # of Linux' /proc/PID/fdinfo: who took the lock that the file has there
HUNG_SECONDS = 300  # without any progress after which a process that works for others ends itself, to be started again


def end_with(parent: int, signal: int) -> None:
    """Let this process have a signal when the thread that started it ends. If `parent`, its process, has ended already, it ends at once."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal)
    if os.getppid() != parent:
        os._exit(0)


@contextmanager
def alone_in(folder: Path, refusal: str, go_on: Callable[[list[int]], bool] = lambda left: False) -> Iterator[None]:
    """A folder, made where it is not there, as this process' own. A kill gives it back; a child that is forked, and not one of another program, has it too.

    Where the process that took it has been killed and such children of it are left, `go_on` is asked with their ids, again and again, whether to wait for them.

    Raises:
        UserError: another process has it; `refusal` is what it says, with the ids of those that have it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        unseen = 0
        while not _locked(file):
            taker, having = _having(file)
            unseen = 0 if having else unseen + 1  # they may have ended just now; if they have not, they are not to be seen from here
            if unseen > 1 or (having and (taker is None or taker in having or not go_on(having))):
                raise UserError(refusal + (f" (held by process {', '.join(map(str, having))})" if having else ""))
            time.sleep(LOOK_SECONDS)
        yield


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _having(file: IO[str]) -> tuple[int | None, list[int]]:
    """(the process that took a file's lock, which may have ended; those that have it now), as far as the system tells: of other users' processes it does not."""
    own, taker, having = os.fstat(file.fileno()), None, set()
    for descriptor in glob.iglob("/proc/[0-9]*/fd/*"):
        with suppress(OSError):  # it has ended, or is another user's
            if os.path.samestat(os.stat(descriptor), own) and (told := _LOCK.search(Path(descriptor.replace("/fd/", "/fdinfo/")).read_text())):
                taker = int(told[1])
                having.add(int(descriptor.split("/")[2]))
    return taker or None, sorted(having)


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
