"""What a run has to tell Langfuse: a file beside its report, delivered by threads while the run works, gone when all has arrived.

The file is JSON lines: a header with what all spans of the trace share, then records, `{"span": {...}}` and `{"scores": {...}}`, and
between them marks, `{"delivered": {"spans": byte, "scores": byte}, "refused": {...}}`: up to where either kind has arrived and what the
server would not have. So a killed run leaves a file that says what is missing, and `01_eval/resend_traces.py` delivers that. Where an answer was lost
a record is sent again under the same ids, so that Langfuse keeps one. Nothing here holds a run up or fails it.
"""

import fcntl
import json
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from slm_swap.errors import UserError
from slm_swap.langfuse_wire import Answer, Server, timestamp
from slm_swap.settings import display_path

SUFFIX = ".traces.jsonl"
BATCH = {"spans": 256, "scores": 1024}  # in one request: a quarter of a megabyte or so
PAUSES = (0.2, 0.5, 1.0, 2.0, 5.0)  # seconds before what failed is tried again; the last one from then on
LAST_TRIES = 3  # of what fails while the run ends
REFUSALS = 3  # so many refused alone, one after the other, and nothing taken: it is the server, not they
QUEUED = 10_000  # records that may wait in memory to be written
WRITE_EVERY, SEND_EVERY = 0.05, 0.5  # seconds: a thread that woke for every record would cost the run more than the work does
KINDS = ("spans", "scores")
BEGINS = {"spans": b'{"span":', "scores": b'{"scores":'}  # how a record's line begins


@dataclass(frozen=True)
class Item:
    """A span or a score in the file: where its record begins, which of its scores, and where the record ends."""

    at: int
    index: int
    end: int
    value: dict[str, Any]


class Outbox:
    """One run's records on their way. `add` may be called from any thread.

    Raises:
        UserError: the file cannot be written, is another process's, or is of another trace.
    """

    def __init__(self, path: Path, header: dict[str, Any] | None, server: Server | None, secrets: Sequence[str] = ()):
        """`server` None: nothing is delivered, all of it is kept. `header` None: whatever trace the file holds. `secrets` stay out."""
        self._secrets = [json.dumps(secret, ensure_ascii=False)[1:-1] for secret in secrets]
        self.path, self.reason, self.turned_down = path, "", 0
        self.known: set[str] = set()  # ids of the spans that the file held already
        self._at = dict.fromkeys(KINDS, 0)
        self._refused: dict[str, list[list[int]]] = {kind: [] for kind in KINDS}
        self._file = _open_alone(path)
        self.header, self._end = self._recover()
        if header and self.header and self.header["trace"] != header["trace"]:
            self._file.close()
            raise UserError(f"{display_path(path)} holds the trace of another run: deliver it first by 01_eval/resend_traces.py")
        self._change = threading.Condition()
        self._queue: deque[Callable[[], list[dict[str, Any]]]] = deque()
        self._closing = self._written = self._failing = False
        if not self.header:
            self.header = json.loads(self._line(header or {}))  # without secrets, as it is in the file
            self._append({"header": self.header})
            self._at = dict.fromkeys(KINDS, self._end)
        self._writer = threading.Thread(target=self._write, name="langfuse-writer", daemon=True)
        posts = {"spans": server.send_spans, "scores": server.send_scores} if server else {}
        self._senders = [threading.Thread(target=self._send, args=post, name=f"langfuse-{post[0]}", daemon=True) for post in posts.items()]
        # A run that waits for replies wakes up hundreds of times a second, each time behind these threads for up to this interval.
        sys.setswitchinterval(min(sys.getswitchinterval(), 0.0005))
        for thread in (self._writer, *self._senders):
            thread.start()

    def add(self, make: Callable[[], list[dict[str, Any]]]) -> None:
        """Take what makes records, for the writer's thread to call; waits only while thousands wait to be written to the disk."""
        with self._change:
            if len(self._queue) >= QUEUED:
                self._change.notify_all()
                self._change.wait_for(lambda: len(self._queue) < QUEUED, 10)
            self._queue.append(make)

    def close(self, seconds: float, keep: bool = False) -> dict[str, int]:
        """Write what is queued and wait at most `seconds` for it to arrive: how many spans and scores have not.

        Where all have, the file is gone (unless `keep`); otherwise it stays.
        """
        deadline = time.monotonic() + seconds
        with self._change:
            self._closing = True
            self._change.notify_all()
        self._writer.join()
        for thread in self._senders:
            thread.join(max(0.0, deadline - time.monotonic()))
        with self._change:
            missing = self._missing()
            if not any(missing.values()) and not keep:
                self.path.unlink(missing_ok=True)
            self._file.close()
        return missing

    # -- The file

    def _recover(self) -> tuple[dict[str, Any] | None, int]:
        """What an earlier process left: (its header, where the file ends); a torn last line is cut off."""
        header, end = None, 0
        self._file.seek(0)
        for line in self._file:
            value = _parse(line)
            if value is None:
                break
            end += len(line)
            if "header" in value:
                header, self._at = value["header"], dict.fromkeys(KINDS, end)
            elif "span" in value:
                self.known.add(value["span"]["id"])
            self._at |= value.get("delivered", {})
            self._refused |= value.get("refused", {})
        self._file.truncate(end)
        return header, end

    def _append(self, value: dict[str, Any]) -> None:
        line = self._line(value)
        self._file.seek(self._end)
        self._file.write(line)
        self._end += len(line)

    def _line(self, value: dict[str, Any]) -> bytes:
        """A record as a line, without secrets and without half surrogate pairs (one would cost its whole batch)."""
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text.encode("utf-8", "replace") + b"\n"

    def _write(self) -> None:
        """The writer's thread: from the queue to the file."""
        while True:
            with self._change:
                self._change.wait_for(lambda: self._closing or len(self._queue) >= QUEUED, WRITE_EVERY)
                if not self._queue and not self._closing:
                    continue
                waiting = list(self._queue)
                if not waiting:
                    self._written = True
                    self._change.notify_all()
                    return
            made = []
            for make in waiting:
                made += [self._line(record) for record in make()]
                time.sleep(0)  # lets the run's own thread go first
            lines = b"".join(made)
            with self._change:
                self._file.seek(self._end)
                self._file.write(lines)
                self._end += len(lines)
                for _ in waiting:
                    self._queue.popleft()
                self._change.notify_all()

    def _mark(self, kind: str, at: int, refused: list[Item]) -> None:
        with self._change:
            self._at[kind] = at
            self._refused[kind] += [[item.at, item.index] for item in refused]
            if not self._file.closed:
                self._append({"delivered": self._at, "refused": self._refused})

    def _missing(self) -> dict[str, int]:
        missing = {kind: len(self._refused[kind]) for kind in KINDS}
        for kind in KINDS:
            at = self._at[kind]
            while items := self._read(kind, at, 10 * BATCH[kind])[0]:
                missing[kind] += len(items)
                at = items[-1].end
        return missing

    def _read(self, kind: str, at: int, count: int) -> tuple[list[Item], int]:
        """At least `count` items of a kind from a byte on (whole records, fewer at the end), and where they end."""
        items: list[Item] = []
        with open(self.path, "rb") as stream:
            stream.seek(at)
            while at < self._end and len(items) < count:
                line = stream.readline()
                start, at = at, at + len(line)
                if line.startswith(BEGINS[kind]):
                    values = self._expand(kind, json.loads(line))
                    items += [Item(start, index, at, value) for index, value in enumerate(values)]
                    time.sleep(0)  # lets the run's own thread go first
        return items, at

    def _expand(self, kind: str, record: dict[str, Any]) -> list[dict[str, Any]]:
        """A record as `langfuse_wire.Server` sends it."""
        trace = self.header["trace"]
        if kind == "spans":
            return [record["span"] | {"trace": trace, "shared": self.header["attributes"]}]
        of, at = record["of"], timestamp(record["at"])
        return [
            {
                "id": f"{of or trace}-{name}",  # the same when it is sent again, so that it is one score
                "traceId": trace,
                **({"observationId": of} if of else {}),
                "name": name,
                "value": value,
                "dataType": "CATEGORICAL" if isinstance(value, str) else "NUMERIC",
                "timestamp": at,
            }
            for name, value in record["scores"].items()
        ]

    # -- Delivery

    def _send(self, kind: str, post: Callable[[list[dict]], Answer]) -> None:
        """A sender's thread: until all is delivered and the run has ended, or there is no use in trying on."""
        failures = last = more = 0
        self._retry_refused(kind, post)
        while True:
            with self._change:
                if not more:
                    self._change.wait_for(lambda: self._written, SEND_EVERY)
                at, over = self._at[kind], self._written and self._at[kind] >= self._end
            if over or self._file.closed:
                return
            items, end = self._read(kind, at, BATCH[kind])
            more = len(items) >= BATCH[kind]
            if not items:
                with self._change:
                    self._at[kind] = end
                continue
            if self._deliver(kind, post, items):
                failures = last = 0
                continue
            with self._change:
                closing = self._closing
                failures, last = failures + 1, last + closing
                if last > LAST_TRIES:
                    return
                pause = PAUSES[min(last or failures, len(PAUSES)) - 1]
                self._change.wait_for(lambda: self._closing > closing, pause)  # noqa: B023  it is called at once

    def _deliver(self, kind: str, post: Callable[[list[dict]], Answer], items: list[Item]) -> bool:
        """Post items, in halves where the server refuses them as they are; False where they cannot be delivered now."""
        parts, alone = deque([items]), []
        while parts and not self._file.closed:  # closed: the run has ended without
            part = parts.popleft()
            answer = post([item.value for item in part])
            if answer.taken:
                self.turned_down += answer.turned_down
                self._mark(kind, parts[0][0].at if parts else items[-1].end, alone)
                alone = []
            elif answer.refused and len(part) > 1:
                middle = len(part) // 2
                parts.extendleft((part[middle:], part[:middle]))
            else:
                self.reason = answer.reason
                alone.append(part[0])
                if not answer.refused or len(alone) >= REFUSALS:
                    return False
        if alone:
            self._mark(kind, items[-1].end, alone)
        return not parts

    def _retry_refused(self, kind: str, post: Callable[[list[dict]], Answer]) -> None:
        """What the server refused in an earlier process may be to its taste now."""
        for place in list(self._refused[kind]):
            items = [item for item in self._read(kind, place[0], 1)[0] if item.index == place[1]]
            if post([item.value for item in items]).taken:
                self._refused[kind].remove(place)
                self._mark(kind, self._at[kind], [])


def _parse(line: bytes) -> dict[str, Any] | None:
    """A line's object; None where it is torn."""
    try:
        value = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _open_alone(path: Path) -> IO[bytes]:
    """The file, open to read and append, for this process alone.

    Raises:
        UserError: it cannot be written, or another process has it open.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+b", buffering=0)  # noqa: SIM115  it stays open, and locked
    except OSError as error:
        raise UserError(f"cannot write {display_path(path)} ({error.strerror}): choose another place with --out") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UserError(f"{display_path(path)} is in use by another run: wait for its end") from None
    return file
