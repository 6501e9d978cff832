"""What a run has to tell Langfuse: a file beside its report, delivered by a process of its own while the run works.

The file is JSON lines: a header with what all spans of the trace share, then the run's records, `{"span": {...}}` and
`{"scores": {...}}`, and between them the sender's marks (`sender`): up to where either kind has arrived, what the server would
not have, and why the last request failed. So a killed run leaves a file that says what is missing, and `01_eval/resend_traces.py`
delivers that. Where an answer was lost a record is sent again under the same ids, so that Langfuse keeps one. The run itself only
writes lines: the encoding and the requests of a thread in it would hold its own threads up.
"""

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_swap.common.errors import UserError
from slm_swap.common.settings import ROOT, display_path
from slm_swap.tracing.wire import Server, timestamp

SUFFIX = ".traces.jsonl"
PAUSES = (0.2, 0.5, 1.0, 2.0, 5.0)  # seconds before what failed is tried again; the last one from then on
QUEUED = 10_000  # makers of records that may wait in memory
WRITE_EVERY = 0.05  # seconds: many lines at once cost the run a fifth of what single ones do
LOCK_SECONDS = 3  # a killed run's sender ends its last requests by then
CHUNK = 1 << 20  # bytes read at once
KINDS = ("spans", "scores")
BEGINS = {"spans": b'{"span":', "scores": b'{"scores":'}  # how a record's line begins
MARK = b'{"delivered":'
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=str).encode


@dataclass(frozen=True)
class Item:
    """A span or a score in the file: where its record begins, which of its scores, and where the record ends."""

    at: int
    index: int
    end: int
    value: dict[str, Any]


class TraceFile:
    """The file by its descriptor, which the run and its sender share: each only appends whole lines, and reads by position."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor
        self._torn = b""  # what ends a line of which the disk took only a part

    def append(self, values: Sequence[dict[str, Any]], secrets: Sequence[str] = ()) -> None:
        """Write values as lines, without secrets and without half surrogate pairs (one would cost its whole batch)."""
        text = "".join(f"{_encode(value)}\n" for value in values)
        for secret in secrets:
            text = text.replace(secret, "***")
        data = self._torn + text.encode("utf-8", "replace")
        if written := os.write(self.descriptor, data):
            self._torn = b"" if data[:written].endswith(b"\n") else b"\n"
        if written < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def lines(self, at: int = 0) -> Iterator[tuple[int, bytes]]:
        """(where it begins, line) of every whole line from a byte on."""
        rest = b""
        while chunk := os.pread(self.descriptor, CHUNK, at + len(rest)):
            *whole, rest = (rest + chunk).split(b"\n")
            for line in whole:
                yield at, line
                at += len(line) + 1

    def mark(self) -> dict[str, Any]:
        """The last mark: bytes up to which either kind has arrived, (byte, index) of what was refused, scores turned down, and why the
        last request failed."""
        mark = {"delivered": dict.fromkeys(KINDS, 0), "refused": {kind: [] for kind in KINDS}, "turned_down": 0, "reason": ""}
        for _, line in self.lines():
            if line.startswith(MARK):
                mark |= parse(line)
        return mark

    def items(self, kind: str, at: int, count: int, header: dict[str, Any]) -> tuple[list[Item], int]:
        """At least `count` items of a kind from a byte on (whole records, fewer at the end), and where they end."""
        items: list[Item] = []
        for start, line in self.lines(at):
            at = start + len(line) + 1
            if line.startswith(BEGINS[kind]) and (record := parse(line)):
                items += [Item(start, index, at, value) for index, value in enumerate(_expand(kind, record, header))]
            if len(items) >= count:
                break
        return items, at

    def count(self, kind: str, at: int) -> int:
        """How many items of a kind there are from a byte on; the run waits for this at its end, so that no span is parsed for it."""
        lines = (line for _, line in self.lines(at) if line.startswith(BEGINS[kind]))
        return sum(1 if kind == "spans" else len(parse(line).get("scores", ())) for line in lines)


class Outbox:
    """One run's records on their way. `add` may be called from any thread.

    Raises:
        UserError: the file cannot be written, is another process's, or is of another trace.
    """

    def __init__(self, path: Path, header: dict[str, Any] | None, server: Server | None, secrets: Sequence[str] = ()):
        """`server` None: nothing is delivered, all of it is kept. `header` None: whatever trace the file holds. `secrets` stay out."""
        self._secrets = [_encode(secret)[1:-1] for secret in secrets]
        self.path, self.reason, self.unwritten, self.turned_down = path, "", "", 0
        self.known: set[str] = set()  # ids of the spans that the file held already
        self._file = TraceFile(_open_alone(path))
        self.header = self._recover()
        if header and self.header and self.header["trace"] != header["trace"]:
            os.close(self._file.descriptor)
            raise UserError(f"{display_path(path)} holds the trace of another run: deliver it first by 01_eval/resend_traces.py")
        if not self.header:
            self._file.append([{"header": header or {}}], self._secrets)
            self.header = self._recover()  # without secrets, as it is in the file
        self._queue: deque[Callable[[], list[dict[str, Any]]]] = deque()
        self._writing, self._closing = threading.Lock(), threading.Event()
        self._writer = threading.Thread(target=self._write_on, name="langfuse-writer", daemon=True)
        self._writer.start()
        self._sender = _start_sender(self._file.descriptor, server) if server else None

    def add(self, make: Callable[[], list[dict[str, Any]]]) -> None:
        """Take what makes records, for the writer's thread to call; while thousands wait, for this one."""
        self._queue.append(make)
        if len(self._queue) >= QUEUED:
            self._write()

    def _write_on(self) -> None:
        while not self._closing.wait(WRITE_EVERY):
            self._write()

    def _write(self) -> None:
        """From the queue to the file; where the disk takes no more, `unwritten` says why."""
        with self._writing:
            made: list[dict[str, Any]] = []
            for _ in range(len(self._queue)):  # and no more, however fast others come
                made += self._queue.popleft()()
            try:
                self._file.append(made, self._secrets)
            except OSError as error:
                self.unwritten = error.strerror

    def close(self, seconds: float, keep: bool = False) -> dict[str, int]:
        """Wait at most `seconds` for everything to arrive: how many spans and scores have not.

        Where all have, the file is gone (unless `keep`); otherwise it stays.
        """
        self._closing.set()
        self._writer.join()
        self._write()
        if self._sender:
            try:
                self._sender.stdin.write(b"%f\n" % seconds)
                self._sender.wait(seconds)
            except (OSError, subprocess.TimeoutExpired):
                pass  # what it has not marked as delivered is kept
            finally:
                self._sender.kill()
                self._sender.wait()
                self._sender.stdin.close()
        mark = self._file.mark()
        self.reason, self.turned_down = mark["reason"], mark["turned_down"]
        missing = {kind: len(mark["refused"][kind]) for kind in KINDS}
        for kind, at in mark["delivered"].items():
            missing[kind] += self._file.count(kind, at)
        if not any(missing.values()) and not keep:
            self.path.unlink(missing_ok=True)
        os.close(self._file.descriptor)
        return missing

    def _recover(self) -> dict[str, Any] | None:
        """The header of the trace that an earlier process left; a torn last line is cut off."""
        header, end = None, 0
        for start, line in self._file.lines():
            end, value = start + len(line) + 1, parse(line)
            if "header" in value:
                header = value["header"]
            elif "span" in value:
                self.known.add(value["span"]["id"])
        os.ftruncate(self._file.descriptor, end)
        return header


def parse(line: bytes) -> dict[str, Any]:
    """A line's object; an empty one where it is torn."""
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _expand(kind: str, record: dict[str, Any], header: dict[str, Any]) -> list[dict[str, Any]]:
    """A record as `wire.Server` sends it."""
    trace = header["trace"]
    if kind == "spans":
        return [record["span"] | {"trace": trace, "shared": header["attributes"]}]
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


def _start_sender(descriptor: int, server: Server) -> subprocess.Popen | None:
    """The process that delivers: a fresh one, as a fork of one that has threads or a GPU may hang, out of reach of the terminal's
    Ctrl-C. It gets the keys through a pipe, which closes when the run ends in any way; it shares the file's lock."""
    task = {"descriptor": descriptor, "account": server.account, "request_seconds": server.seconds, "pauses": PAUSES}
    try:
        sender = subprocess.Popen(
            [sys.executable, "-c", "from slm_swap.tracing.sender import main; main()"],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, bufsize=0, cwd=ROOT, pass_fds=[descriptor], start_new_session=True,
        )  # fmt: skip
        sender.stdin.write(json.dumps(task).encode() + b"\n")
    except OSError as error:
        print(f"warning: nothing is sent to Langfuse during the run ({error}): its trace is kept", file=sys.stderr)
        return None
    return sender


def _open_alone(path: Path) -> int:
    """A descriptor of the file, open to read and append, for this process and its sender alone.

    Raises:
        UserError: it cannot be written, or another process has it open.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(f"cannot write {display_path(path)} ({error.strerror}): choose another place with --out") from None
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() < deadline:
                time.sleep(0.05)
                continue
            os.close(descriptor)
            raise UserError(f"{display_path(path)} is in use by another run: wait for its end") from None
        return descriptor
