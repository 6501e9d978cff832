"""The endpoint's processes: workers that share one socket, and the small model's, which comes back where it dies."""

import asyncio
import contextlib
import gc
import mmap
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NoReturn

from slm_swap.clients.protocol import Client
from slm_swap.common.errors import UserError
from slm_swap.common.os_errors import mendable
from slm_swap.common.processes import alone_in, end_with
from slm_swap.common.secrets import hide_in_tracebacks, shown_by_hook
from slm_swap.common.settings import shown_path
from slm_swap.serving.engine import run_engine
from slm_swap.serving.meters import FILE_BYTES, FILES, forget_gauges, make_room
from slm_swap.serving.notices import say
from slm_swap.serving.options import Options

PAUSES = (0.5, 1, 2, 5, 10, 30, 60)  # seconds before a process that died is started again; the last one from then on
WELL_SECONDS = 300  # after so long a life the first pause holds again
LOOK_SECONDS = 0.2
START_SECONDS = 0.02  # between two looks at whether the model is loaded and the workers are there
DRAIN_SECONDS = 660  # that requests under way have after SIGTERM: beyond the hosted model's own time
KEEP_ALIVE = 75  # seconds that an idle connection of a client stays open
MEMORY = Path("/dev/shm")
SIGNALS = {signal.SIGTERM, signal.SIGINT}
_fork = multiprocessing.get_context("fork")


class Kept:
    """A process that is started again where it ends; `ended` is called before."""

    def __init__(self, name: str, target: Callable[..., None], *args: Any, ended: Callable[[], None] = lambda: None):
        self.name, self._target, self._args, self._ended = name, target, args, ended
        self._died = 0
        self._ready = mmap.mmap(-1, 1)  # shared with the process
        self.process: Any = None
        self.again: float | None = 0.0  # when it is started; None: it runs

    @property
    def was_ready(self) -> bool:
        """Whether it has been ready once. That it cannot start again is then no fault of the set-up: its memory on the GPU may not be free yet, or a file of
        the start is gone, and the others still answer."""
        return self._ready[0] == 1

    def _say_ready(self) -> None:
        """In the process: its set-up is right."""
        self._ready[0] = 1

    def start(self) -> None:
        self.process = _fork.Process(target=self._target, args=(self._say_ready, *self._args), name=self.name)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # till its `_begin`: one that comes sooner would go to what the parent does with it
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._since, self.again = time.monotonic(), None

    def look(self) -> None:
        """Start it where it has ended and its pause is over."""
        if self.again is None and self.process.exitcode is not None:
            self._ended()
            lived = time.monotonic() - self._since
            self._died = 0 if lived > WELL_SECONDS else self._died
            pause = PAUSES[min(self._died, len(PAUSES) - 1)]
            say(f"{self.name} ended ({self.process.exitcode}) and is started again in {pause:g} s")
            self._died, self.again = self._died + 1, time.monotonic() + pause
        if self.again is not None and time.monotonic() >= self.again:
            self.start()


def serve(options: Options, listen: Callable[[], socket.socket], make_client: Callable[[], Client] | None, up: Callable[[socket.socket], None]) -> int:
    """Run until SIGTERM or Ctrl-C, then answer what is under way; the exit code. `up` is called once, with what `listen` has made: the small model is loaded and
    each worker's set-up is right.

    Raises:
        UserError: another endpoint has the state folder; as `listen`.
    """
    stopping: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: stopping.append(number))
    gc.collect()
    gc.freeze()  # a collection that goes over all that is loaded would hold a worker's requests up by some 60 ms
    try:
        with _own(options.state, stopping), metrics_folder(options.state, options.workers) as metrics:
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(metrics)
            return _serve(options, listen(), make_client, up, stopping, metrics)
    except _Stopped:
        return 0


def _serve(
    options: Options, listener: socket.socket, make_client: Callable[[], Client] | None, up: Callable[[socket.socket], None], stopping: list[int], metrics: Path
) -> int:
    kept: list[Kept] = []
    told = False
    try:
        if make_client is not None:
            engine = Kept("the small model's process", _engine, options, listener, make_client, os.getpid())
            engine.start()
            kept.append(engine)
            if not _came_up(engine, stopping):
                return 2 if not stopping else 0
        for number in range(options.workers):
            worker = Kept(f"worker {number}", _worker, options, listener, number, os.getpid(), ended=partial(_forget, metrics, number))
            worker.start()
            kept.append(worker)
        while not stopping:
            wait([one.process.sentinel for one in kept if one.again is None], timeout=LOOK_SECONDS if told else START_SECONDS)
            failed = [one for one in kept if one.process.exitcode == 2 and not one.was_ready]
            if failed:
                return 2  # it has said why
            if not told and all(one.was_ready for one in kept):
                up(listener)
                told = True
            for one in kept:
                one.look()
        return 0
    finally:
        listener.close()
        _end(kept)


def _own(state: Path, stopping: list[int]) -> AbstractContextManager[None]:
    """The state folder as this endpoint's own. Workers of one whose first process was killed have it until they have answered what is under way: they are waited for."""
    until, told = time.monotonic() + DRAIN_SECONDS, False

    def go_on(left: list[int]) -> bool:
        nonlocal told
        if not told:
            say(
                f"the endpoint on {shown_path(state)} was killed, and what is left of it (process {', '.join(map(str, left))}) answers what was under way: "
                f"this one starts when that has ended, and waits for it {DRAIN_SECONDS} s at most"
            )
            told = True
        if stopping:
            raise _Stopped
        return time.monotonic() < until

    return alone_in(state, f"another endpoint runs on {shown_path(state)}: stop it, or give this one its own --state", go_on)


class _Stopped(Exception):
    """It is to end before it has begun."""


def _forget(metrics: Path, worker: int) -> None:
    with contextlib.suppress(OSError):
        forget_gauges(metrics, worker)


def _came_up(engine: Kept, stopping: list[int]) -> bool:
    """Wait until the model is loaded; False where it cannot be, which its process has said."""
    while not stopping and not engine.was_ready:
        if wait([engine.process.sentinel], timeout=START_SECONDS):
            return engine.was_ready
    return not stopping


def _end(kept: list[Kept]) -> None:
    """Workers first, which still need the model for what is under way."""
    workers = [one.process for one in kept if one.process and one.name.startswith("worker")]
    others = [one.process for one in kept if one.process and not one.name.startswith("worker")]
    for process in workers:
        process.terminate()
    until = time.monotonic() + DRAIN_SECONDS
    for process in workers:
        process.join(max(0.0, until - time.monotonic()))
    for process in (*workers, *others):
        process.kill()
        process.join()


@contextlib.contextmanager
def metrics_folder(state: Path, workers: int) -> Iterator[Path]:
    """A folder for Prometheus' values of so many workers, with all the room that they take (`meters.make_room`). It lies in memory, where that has the room, else in
    the state folder. It is removed at the end. One that an endpoint of this state folder left, which was killed, is removed at once: the caller has the folder's lock.

    Raises:
        UserError: neither has room.
    """
    own, told = state / "metrics", os.stat(state)
    prefix = f"slm_swap-{told.st_dev:x}-{told.st_ino:x}-"
    for left in (own, *MEMORY.glob(f"{prefix}*")):
        shutil.rmtree(left, ignore_errors=True)
    folder = _with_room(lambda: Path(tempfile.mkdtemp(prefix=prefix, dir=MEMORY)), workers)
    if isinstance(folder, OSError):
        folder = _with_room(lambda: own.mkdir() or own, workers)
    if isinstance(folder, OSError):
        kib = workers * len(FILES) * FILE_BYTES // 1024
        raise UserError(f"no room for the {kib} KiB of what {workers} workers count, in {MEMORY} or {shown_path(own)} ({folder.strerror}): make room in one of them")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _with_room(make: Callable[[], Path], workers: int) -> Path | OSError:
    """The folder that is made, with room for what so many workers count; or why not, with nothing left of it."""
    folder = None
    try:
        folder = make()
        make_room(folder, workers)
    except OSError as error:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
        return error
    return folder


def _begin(parent: int, when_orphaned: int, on_sigterm: signal.Handlers) -> None:
    """What a child does first: it ends with its parent, and decides on signals itself."""
    end_with(parent, when_orphaned)
    signal.signal(signal.SIGTERM, on_sigterm)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides on Ctrl-C
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _engine(ready: Callable[[], None], options: Options, listener: socket.socket, make_client: Callable[[], Client], parent: int) -> None:
    _begin(parent, signal.SIGKILL, signal.SIG_IGN)  # systemd sends SIGTERM to all processes of a service: the workers still need this one
    listener.close()  # or clients could still connect where no worker is left to answer
    hide_in_tracebacks(lambda: options.settings.secrets)
    with shown_by_hook(), _said_in_one_line():
        run_engine(options.state, options.queue, make_client, ready)


def _worker(ready: Callable[[], None], options: Options, listener: socket.socket, number: int, parent: int) -> None:
    _begin(parent, signal.SIGTERM, signal.SIG_DFL)
    hide_in_tracebacks(lambda: options.settings.secrets)
    with shown_by_hook(), _said_in_one_line():
        import uvicorn

        from slm_swap.serving.app import make_app
        from slm_swap.serving.service import Service

        app = make_app(Service(options, number), lambda: server.should_exit, ready)
        config = uvicorn.Config(
            app, log_level="error", access_log=False, server_header=False, timeout_keep_alive=KEEP_ALIVE, ws="none", lifespan="on",
            timeout_graceful_shutdown=DRAIN_SECONDS - 30,
        )  # fmt: skip
        server = uvicorn.Server(config)
        asyncio.run(server.serve(sockets=[listener]))


@contextlib.contextmanager
def _said_in_one_line() -> Iterator[None]:
    """The user's mistake ends the process with 2; a bug keeps its traceback."""
    try:
        yield
    except Exception as error:
        told = error if isinstance(error, UserError) else mendable(error)
        if told is None:
            raise
        _leave(str(told))


def _leave(message: str) -> NoReturn:
    say(f"error: {' '.join(message.split())}")
    sys.exit(2)
