"""An engine in a process of its own, behind the same interface.

An endpoint renders a chat template, makes tokens and reads a reply for each request. In the engine's own process the GPU would wait for all of that between two
steps.
"""

import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Container, Generator, Iterable, Iterator
from dataclasses import replace
from multiprocessing.util import Finalize
from typing import Any

from slm_swap.clients.engines import Engine, Generated, Prompt
from slm_swap.common.errors import UserError
from slm_swap.common.processes import Watchdog, end_with
from slm_swap.common.secrets import hide_in_tracebacks, shown_by_hook
from slm_swap.common.settings import load_settings

QUEUED = 1024  # prompts that the engine's process holds at a time
LOOK_SECONDS = 0.001  # how long a reply is waited for before further prompts are looked for
END = object()  # behind the last prompt
FORGET = "forget"
_spawn = multiprocessing.get_context("spawn")  # a forked process could not use a GPU that its parent has looked at


class EngineApart:
    """Behind `engines.Engine`, the engine that `make` gives in another process, which ends with this one.

    `make` and what is in it can be pickled. `generate` is for one caller at a time; who leaves it while prompts are under way closes the engine.

    Raises:
        UserError: as `make`, or that process died.
    """

    def __init__(self, make: Callable[[], Engine]):
        self._link, there = _spawn.Pipe()
        self._process = _spawn.Process(target=_run, args=(make, there, os.getpid()), daemon=True, name="engine")
        self._process.start()
        Finalize(self, self._process.kill, exitpriority=0)  # at this process' end SIGTERM would come, and wait
        there.close()
        self.name, self.context, self.ends, self._told, self._state = self._received()

    def generate(self, prompts: Iterable[Prompt | None], answered: Container[int] = ()) -> Generator[Generated | None]:
        """As of `VllmEngine`: a None among the prompts says that no other one waits now, and is given where nothing is under way.

        Raises:
            UserError: as of the engine, or its process died.
        """
        coming = (prompt for prompt in prompts if prompt is None or prompt.index not in answered)
        asked: dict[int, Prompt] = {}
        again: list[Prompt] = []
        try:
            while True:
                prompt = None
                while len(asked) < QUEUED and (prompt := again.pop() if again else next(coming, END)) not in (None, END):
                    asked[prompt.index] = prompt
                    self._send(replace(prompt, again=None))
                if not asked:
                    if prompt is END:
                        return
                    if self._link.poll():  # no reply is due: it says that it has ended
                        self._received()
                    yield None
                    continue
                while asked and self._link.poll(LOOK_SECONDS):
                    made = self._received()
                    prompt = asked.pop(made.index)
                    if prompt.again and (other := prompt.again(made)):
                        again.append(other)
                        break
                    yield made
        finally:
            if asked:
                self.close()

    def _send(self, told: Any) -> None:
        try:
            self._link.send(told)
        except OSError:
            while True:  # what came before is behind what it may have said last: why it ended
                self._received()

    def _received(self) -> Any:
        try:
            told = self._link.recv()
        except (EOFError, OSError):
            raise self._died() from None
        if isinstance(told, UserError):
            raise told
        return told

    def _died(self) -> UserError:
        self._process.join(1)
        return UserError(f"the model's process died (exit code {self._process.exitcode}): run the same command again, and look at what it said before")

    def describe(self) -> dict[str, Any]:
        return self._told

    def state(self) -> dict[str, Any]:
        return self._state

    def restore(self, state: dict[str, Any]) -> None: ...

    def forget(self) -> None:
        """Between two calls of `generate`."""
        self._send(FORGET)

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._link.close()


def _run(make: Callable[[], Engine], link: Any, parent: int) -> None:
    """The engine's process: prompts in, what is generated out."""
    end_with(parent, signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the parent decides on Ctrl-C, and on what systemd sends to all processes of a service
    hide_in_tracebacks(lambda: load_settings().secrets)
    with shown_by_hook():
        try:
            engine = make()
            link.send((engine.name, engine.context, engine.ends, engine.describe(), engine.state()))
            _answer(engine, link)
        except UserError as error:
            link.send(error)


def _answer(engine: Engine, link: Any) -> None:
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    watchdog, under_way = Watchdog(), 0

    def read() -> None:
        while True:
            try:
                waiting.put(link.recv())
            except (EOFError, OSError):  # the parent has closed it
                os._exit(0)

    def prompts() -> Iterator[Prompt | None]:
        """vLLM takes what waits between any two of its steps."""
        nonlocal under_way
        while True:
            if not under_way:
                watchdog.rest()
            try:
                told = waiting.get(block=not under_way)
            except queue.Empty:
                told = None
            watchdog.work()
            if told == FORGET:
                engine.forget()
                continue
            under_way += told is not None
            yield told

    threading.Thread(target=read, name="prompts", daemon=True).start()
    for made in engine.generate(prompts()):
        if made is not None:
            under_way -= 1
            link.send(made)
