"""Ctrl-C before a script's `main` has begun: while its imports are still on their way, where `cli.run` catches nothing yet."""

import sys
from types import TracebackType

INTERRUPTED = 130  # 128 + SIGINT, as a shell has it


def end_in_one_line() -> None:
    """From now on let a KeyboardInterrupt that nobody catches end this process with one line and INTERRUPTED, in place of a traceback."""
    before = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            return before(kind, error, trace)
        from slm_swap.common.settings import load_launch

        if load_launch().local_rank == 0:
            print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)

    sys.excepthook = show
