"""When a hosted model stops answering: pause, try one request again after growing waits, and end with everything kept."""

import sys
import time
from collections.abc import Callable, Container, Generator, Iterator
from contextlib import closing

from slm_swap.clients.protocol import Reply
from slm_swap.common.errors import UserError

FAILURES = 20  # requests in a row: of a service that fails one in two, a million rows have one such streak
FIRST_WAIT, LONGEST_WAIT = 5.0, 60.0  # seconds before a request is tried again; each wait is twice the one before

Replies = Generator[tuple[int, Reply]]


class Outage:
    """How failures in a row are met. `minutes` without an answer end the run; `paused` are the seconds of all pauses so far.

    `clock` gives seconds, `sleep` takes them, and `say` is given one line.
    """

    def __init__(
        self,
        minutes: float = 5.0,
        failures: int = FAILURES,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    ):
        self.minutes, self.failures, self.paused = minutes, failures, 0.0
        self._clock, self._sleep, self._say = clock, sleep, say

    def replies(
        self, stream: Callable[[Container[int]], Replies], probe: Callable[[int], Reply], answered: Container[int]
    ) -> Iterator[tuple[int, Reply]]:
        """The replies of `stream(rows that need none)`, which is begun anew after a pause. `probe` asks one row alone.

        The failures of an outage are not given: their rows are asked again, in this run or by the next command. Any other answer, a
        refused request too, shows that the service is there.

        Raises:
            UserError: there was no answer for `minutes`.
        """
        given: set[int] = set()
        while True:
            failed: list[tuple[int, Reply]] = []
            with closing(stream(_Either(answered, given))) as replies:
                for index, reply in replies:
                    failed.append((index, reply))
                    if not reply.transient:
                        given.update(index for index, _ in failed)
                        yield from failed
                        failed = []
                    elif len(failed) == self.failures:
                        break
                else:
                    yield from failed
                    return
            index, reply = failed[0]
            reply = self._wait_out(str(reply.error), lambda: probe(index))  # noqa: B023  called before the next turn
            given.add(index)
            yield index, reply

    def _wait_out(self, why: str, probe: Callable[[], Reply]) -> Reply:
        """Pause until `probe` gets an answer, and give it."""
        began, wait = self._clock(), FIRST_WAIT
        self._say(
            f"{self.failures} requests failed in a row ({why}): pausing, and trying one again now and then for up to {self.minutes:g} minutes"
        )
        while True:
            self._sleep(min(wait, max(0.0, began + self.minutes * 60 - self._clock())))
            reply, wait = probe(), min(2 * wait, LONGEST_WAIT)
            spent = self._clock() - began
            if not reply.transient:
                self.paused += spent
                self._say(f"answered again after {spent:.0f} s: going on")
                return reply
            if spent >= self.minutes * 60:
                raise UserError(
                    f"no answer for {self.minutes:g} minutes (last: {reply.error}): check the service and the network, and run the same "
                    "command again; --outage-minutes waits longer"
                )


class _Either(Container):
    """What is in one of two containers."""

    def __init__(self, one: Container[int], other: Container[int]):
        self._both = one, other

    def __contains__(self, index: object) -> bool:
        return any(index in part for part in self._both)
