"""What an endpoint says on standard error. A disk that takes no more of a log costs no request and no process."""

import contextlib
import sys
import time

_said: dict[str, float] = {}


def say(message: str, worker: int = 0, every: float = 0.0) -> None:
    """A line to standard error; one worker says what all know, and the same thing not again within `every` seconds."""
    at = time.monotonic()
    if worker == 0 and at - _said.get(message, -every - 1) > every:
        if every:
            _said[message] = at
        with contextlib.suppress(OSError):
            print(message, file=sys.stderr, flush=True)
