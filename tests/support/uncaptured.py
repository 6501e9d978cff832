"""A captured decoder on a CPU: all of it but the capturing."""

from types import SimpleNamespace


def uncaptured(self, work, times):
    """In place of `CapturedDecoder._capture`: a replay does the work anew."""
    for _ in range(times):
        work()
    return SimpleNamespace(replay=work)
