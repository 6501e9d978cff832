"""The process that delivers a run's records to Langfuse, from the file that the run writes (`outbox`).

Its standard input says what to do: a line with the task (the file's descriptor, the keys), and, when the run has ended, a line with the
seconds that are left. Where the input ends before, the run was killed: what is on its way is waited for, and the rest stays in the file.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import groupby

from slm_swap.common.settings import Settings
from slm_swap.tracing.outbox import KINDS, Item, TraceFile, parse
from slm_swap.tracing.wire import Answer, Server

BATCH = {"spans": 256, "scores": 128}  # in one request; of each score a server makes an object and a job before it answers
GROW_AFTER = 8  # answers in time in a row: a request that was too large once is likely to be so again
LAST_TRIES = 3  # of what fails while the run ends
REFUSALS = 3  # so many refused alone, one after the other, and nothing taken: it is the server, not they
SEND_EVERY = 0.5  # seconds: less would make more, smaller requests
KILLED_SECONDS = 2  # what a killed run's sender waits for its last answers; less than outbox.LOCK_SECONDS


class Sender:
    """A thread for spans and one for scores, until all is delivered and the run has ended, or there is no use in trying on."""

    def __init__(self, file: TraceFile, server: Server, pauses: Sequence[float]):
        self._file, self._pauses = file, pauses
        self._header = next(value["header"] for _, line in file.lines() if "header" in (value := parse(line)))
        self._mark = file.mark()
        self._noted = json.dumps(self._mark)
        self._change = threading.Condition()
        self._closing = False
        self._deadline = float("inf")
        self._took = dict.fromkeys(KINDS, 0.0)  # seconds of the last request
        self._size, self._in_time_since = dict(BATCH), dict.fromkeys(KINDS, 0)
        self._arrived = server.arrived
        left = file.count("scores", self._delivered("scores"))
        self._doubt = {"spans": False, "scores": left > 0}  # whether the next ones may have arrived: an earlier process was cut off
        posts = {"spans": server.send_spans, "scores": server.send_scores}
        self._threads = [threading.Thread(target=self._send, args=post, daemon=True) for post in posts.items()]
        for thread in self._threads:
            thread.start()

    def end(self, seconds: float) -> None:
        """The run has ended: deliver what is left, and begin no request that `seconds` may be too short for."""
        with self._change:
            self._closing, self._deadline = True, time.monotonic() + seconds
            self._change.notify_all()

    def join(self) -> None:
        for thread in self._threads:
            thread.join()

    def _send(self, kind: str, post: Callable[[list[dict]], Answer]) -> None:
        failures = last = 0
        self._retry_refused(kind, post)
        at = self._delivered(kind)
        while self._in_time(kind):
            closing = self._closing
            items, end, full = self._next(kind, at)
            if not items and closing:
                return
            if not items or self._deliver(kind, post, items):
                at, failures, last = end, 0, 0
                if not full and not closing:
                    self._wait(SEND_EVERY, closing)
                continue
            at = max(at, self._delivered(kind))
            failures, last = failures + 1, last + closing
            if last > LAST_TRIES:
                return
            self._wait(self._pauses[min(last or failures, len(self._pauses)) - 1], closing)

    def _next(self, kind: str, at: int) -> tuple[list[Item], int, bool]:
        """(the next batch, of whole records; where it ends; whether there was enough for a full one)."""
        items, end = self._file.items(kind, at, BATCH[kind], self._header)
        full = len(items) >= BATCH[kind]
        if len(items) > BATCH[kind] and (last := items[-1].at) != items[0].at:
            items, end = [item for item in items if item.at != last], last
        return items, end, full

    def _wait(self, seconds: float, closing: bool) -> None:
        """Wait, until the run ends at most, or where it has ended (`closing`) until the deadline."""
        with self._change:
            self._change.wait_for(lambda: self._closing > closing, min(seconds, max(0.0, self._deadline - time.monotonic())))

    def _in_time(self, kind: str) -> bool:
        """Whether a request that takes as long as the last one would be answered in time: one that is not would be sent twice."""
        return time.monotonic() + self._took[kind] < self._deadline

    def _delivered(self, kind: str) -> int:
        return self._mark["delivered"][kind][0]

    def _deliver(self, kind: str, post: Callable[[list[dict]], Answer], items: list[Item]) -> bool:
        """Post items, in halves where the server refuses them as they are; False where they cannot be delivered now.

        Without an answer the next request is half as large, and what may have arrived is looked up before it is posted again: a slow
        server finishes its work after nobody waits for it, and the same work once more would make it slower.

        If a batch was taken except for some, the server does not say which. The batch is not posted again in this process (OTLP forbids
        it), but in the next one all of it: the ids are the same, so Langfuse keeps one of each.
        """
        parts, alone = deque(_whole_records(items, self._size[kind])), []
        while parts and self._in_time(kind):
            part = parts.popleft()
            begun = time.monotonic()
            left = self._not_there(kind, [item.value for item in part])
            answer = post(left) if left else Answer(True)
            self._took[kind] = time.monotonic() - begun
            self._doubt[kind] |= answer.in_doubt
            if answer.taken:
                self._grow(kind)
                some = [_refused(part, answer.rejected)] if answer.rejected else []
                self._note(kind, parts[0][0].at if parts else items[-1].end, alone + some, answer.reason, answer.turned_down)
                alone = []
            elif answer.refused and len(part) > 1:
                middle = len(part) // 2
                parts.extendleft((part[middle:], part[:middle]))
            else:
                if answer.in_doubt:
                    self._size[kind], self._in_time_since[kind] = max(1, len(part) // 2), 0
                self._note(kind, self._delivered(kind), reason=answer.reason)
                alone.append(_refused(part, 1))
                if not answer.refused or len(alone) >= REFUSALS:
                    return False
        if alone and not parts:
            self._note(kind, items[-1].end, alone)
        return not parts

    def _grow(self, kind: str) -> None:
        """After some answers in time the next request may be larger again, up to BATCH."""
        self._in_time_since[kind] += 1
        if self._size[kind] < BATCH[kind] and self._in_time_since[kind] >= GROW_AFTER:
            self._size[kind], self._in_time_since[kind] = min(BATCH[kind], 2 * self._size[kind]), 0

    def _not_there(self, kind: str, values: list[dict]) -> list[dict]:
        """Those of the values that Langfuse does not have, where it may have some; where it has none, the next ones are in no doubt."""
        if not self._doubt[kind] or kind != "scores":
            return values
        there = self._arrived(values)
        self._doubt[kind] = bool(there)
        return [value for value in values if value["id"] not in there]

    def _retry_refused(self, kind: str, post: Callable[[list[dict]], Answer]) -> None:
        """What the server refused in an earlier process may be to its taste now."""
        for place in list(self._mark["refused"][kind]):
            at, index, count, _ = place
            items, _ = self._file.items(kind, at, index + count, self._header)
            answer = post([item.value for item in items[index : index + count]])
            if answer.taken:
                place[3] = answer.rejected
                self._mark["refused"][kind] = [other for other in self._mark["refused"][kind] if other[3]]
            self._note(kind, self._delivered(kind), reason=answer.reason)
            if not answer.taken and not answer.refused:
                return

    def _note(self, kind: str, at: int, refused: Sequence[list[int]] = (), reason: str = "", turned_down: int = 0) -> None:
        """Write into the file how far it has come, where that is news."""
        with self._change:
            self._mark["delivered"][kind] = [at, self._file.checksum(at, *self._mark["delivered"][kind])]
            self._mark["refused"][kind] += refused
            self._mark["turned_down"] += turned_down
            self._mark["reason"] = reason or self._mark["reason"]
            if (mark := json.dumps(self._mark)) != self._noted:
                with contextlib.suppress(OSError):  # a full disk: what is not noted counts as missing, and is sent again
                    self._file.append([self._mark])
                    self._noted = mark


def _whole_records(items: list[Item], size: int) -> list[list[Item]]:
    """The items in parts of at most `size`; a record's own stay together, as the mark names records."""
    parts: list[list[Item]] = []
    for _, record in groupby(items, key=lambda item: item.at):
        own = list(record)
        if parts and len(parts[-1]) + len(own) <= size:
            parts[-1] += own
        else:
            parts.append(own)
    return parts


def _refused(part: list[Item], count: int) -> list[int]:
    """So many of a part's items, as a mark has them."""
    return [part[0].at, part[0].index, len(part), count]


def main() -> None:
    """Deliver as standard input says, until all is delivered or the run is gone."""
    os.nice(10)  # the run goes first where it needs every core
    task = json.loads(sys.stdin.buffer.readline())
    server = Server(Settings(**task["account"]), task["request_seconds"])
    sender = Sender(TraceFile(task["descriptor"]), server, task["pauses"])

    def leave() -> None:
        sender.join()
        os._exit(0)

    threading.Thread(target=leave).start()
    while seconds := sys.stdin.buffer.readline():
        sender.end(float(seconds))
    sender.end(0)
    time.sleep(KILLED_SECONDS)
    os._exit(0)
