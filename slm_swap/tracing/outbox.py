"""What a run has to tell Langfuse: a file beside its report, delivered by a process of its own while the run works.

The file is JSON lines: a header with what all spans of the trace share and when it began, then the run's records, `{"span": {...}}` and
`{"scores": {...}}`, and between them the sender's marks (`sender`): up to where either kind has arrived, what the server would
not have, and why the last request failed. So a killed run leaves a file that says what is missing, and `01_eval/resend_traces.py`
delivers that. Where an answer was lost a record is sent again under the same ids, so that Langfuse keeps one. The run itself only
writes lines: the encoding and the requests of a thread in it would hold its own threads up.

Damage is noticed. Each line has its checksum, and a line that does not match it is passed over and counted; the header stands there
twice. A mark counts only while the bytes before its places are those that it was written behind, so what a damaged file says to have
arrived has arrived. A file with damage is delivered as far as it can be read, and stays.

What an earlier run left in a run's place (`open_outbox`) is put aside as `<report>.<trace>.traces.jsonl` and delivered beside the run's own.
"""

import contextlib
import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from slm_swap.common.errors import UserError
from slm_swap.common.os_errors import os_error
from slm_swap.common.settings import ROOT, shown_path
from slm_swap.rows.lines import CHECKSUM, is_whole, with_checksum
from slm_swap.tracing.wire import Server, timestamp

SUFFIX = ".traces.jsonl"
PAUSES = (0.2, 0.5, 1.0, 2.0, 5.0)  # seconds before what failed is tried again; the last one from then on
QUEUED = 10_000  # makers of records that may wait in memory
WRITE_EVERY = 0.05  # seconds: many lines at once cost the run a fifth of what single ones do
LOCK_SECONDS = 15  # a killed run's sender ends its last requests by then, on a busy machine too
CHUNK = 1 << 20  # bytes read at once
ENVIRONMENT = "langfuse.environment"  # the attribute, of a trace that lies elsewhere than in `default`
KINDS = ("spans", "scores")
BEGINS = {"spans": b'"span":', "scores": b'"scores":'}  # how a record's line goes on after its checksum
MARK = b'"delivered":'
HEADERS = 2  # copies, so that no damaged byte costs the whole file
NO_PLACE = "it takes what Langfuse is told: let it be written, or move away what is in its place"  # another --out might ask all rows again
RESEND = "python 01_eval/resend_traces.py"
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

    @property
    def size(self) -> int:
        """Its bytes."""
        return os.fstat(self.descriptor).st_size

    def append(self, values: Sequence[dict[str, Any]], secrets: Sequence[str] = ()) -> None:
        """Write values as lines, without secrets and without half surrogate pairs (one would cost its whole batch).

        Raises:
            OSError: the disk does not take all of them. The whole lines that it took stay, and nothing of another.
        """
        text = "".join(f"{_encode(value)}\n" for value in values)
        for secret in secrets:
            text = text.replace(secret, "***")
        data = b"".join(map(with_checksum, text.encode("utf-8", "replace").splitlines(keepends=True)))
        before, written = self.size, os.write(self.descriptor, data)
        if written < len(data):
            if self.size == before + written:  # nobody has written behind it
                os.ftruncate(self.descriptor, before + data.rfind(b"\n", 0, written) + 1)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def lines(self, at: int = 0) -> Iterator[tuple[int, bytes]]:
        """(where it begins, line with its end) of every line from a byte on; without a torn last one."""
        rest = b""
        while chunk := os.pread(self.descriptor, CHUNK, at + len(rest)):
            *whole, rest = (rest + chunk).split(b"\n")
            for line in whole:
                yield at, line + b"\n"
                at += len(line) + 1

    def checksum(self, end: int, start: int = 0, crc: int = 0) -> int:
        """CRC-32 of the bytes up to `end`, made from `crc`, the one of those up to `start`."""
        while start < end and (chunk := os.pread(self.descriptor, min(CHUNK, end - start), start)):
            start, crc = start + len(chunk), zlib.crc32(chunk, crc)
        return crc

    def mark(self) -> dict[str, Any]:
        """The last mark that the bytes before its places bear out.

        `delivered`: for either kind the byte up to which all has arrived, and the checksum up to there. `refused`: for either kind what the
        server would not have, as [the first item's record, its index in there, items, how many of them]; `turned_down`: how many scores it
        called not valid; `reason`: why the last request failed.
        """
        mark = {"delivered": {kind: [0, 0] for kind in KINDS}, "refused": {kind: [] for kind in KINDS}, "turned_down": 0, "reason": ""}
        sums = {kind: (0, 0) for kind in KINDS}
        for _, line in self.lines():
            if line.startswith(MARK, CHECKSUM) and (told := parse(line)):
                for kind, (end, _) in told["delivered"].items():
                    known = sums[kind] if sums[kind][0] <= end else (0, 0)
                    sums[kind] = (end, self.checksum(end, *known))
                if all(sums[kind] == (end, crc) for kind, (end, crc) in told["delivered"].items()):
                    mark |= told
        return mark

    def items(self, kind: str, at: int, count: int, header: dict[str, Any]) -> tuple[list[Item], int]:
        """At least `count` items of a kind from a byte on (whole records, fewer at the end), and where they end."""
        items: list[Item] = []
        for start, line in self.lines(at):
            at = start + len(line)
            if line.startswith(BEGINS[kind], CHECKSUM) and (record := parse(line)):
                items += [Item(start, index, at, value) for index, value in enumerate(_expand(kind, record, header))]
            if len(items) >= count:
                break
        return items, at

    def count(self, kind: str, at: int) -> int:
        """How many items of a kind there are from a byte on; the run waits for this at its end, so that no span is parsed for it."""
        lines = (line for _, line in self.lines(at) if line.startswith(BEGINS[kind], CHECKSUM) and is_whole(line))
        return sum(1 if kind == "spans" else len(parse(line).get("scores", ())) for line in lines)


class Outbox:
    """One trace's records on their way. `add` may be called from any thread.

    `header` is the file's, None where none can be read; `known` are the ids of the spans that it held; `damaged` counts its lines that are
    not as they were written, among them a `torn` last one (of a killed process, or the file was cut). Until `begin` or `deliver` is called nothing is changed.

    Raises:
        UserError: the file cannot be read and written, or is another process's. `begin` and `put_aside` too: it cannot be written.
    """

    def __init__(self, path: Path, secrets: Sequence[str] = ()):
        """`secrets` stay out of the file."""
        self._secrets = [_encode(secret)[1:-1] for secret in secrets]
        self.path, self.reason, self.unwritten, self.turned_down = path, "", "", 0
        self.header: dict[str, Any] | None = None
        self.known: set[str] = set()
        self._queue: deque[Callable[[], list[dict[str, Any]]]] = deque()
        self._writing, self._closing = threading.Lock(), threading.Event()
        self._writer: threading.Thread | None = None
        self._sender: subprocess.Popen | None = None
        self._file = TraceFile(_open_alone(path))
        with self._access():
            self._read()

    @contextlib.contextmanager
    def _access(self) -> Iterator[None]:
        """What the system refuses as one line; the file is closed then, and is gone if nothing stands in it."""
        try:
            yield
        except OSError as error:
            with contextlib.suppress(OSError):
                if not self._file.size:
                    self.path.unlink()
            os.close(self._file.descriptor)
            raise os_error(error, "write", self.path, NO_PLACE) from None

    def _read(self) -> None:
        self._end = self.damaged = 0  # where the last line that has an end ends
        for start, line in self._file.lines():
            self._end, record = start + len(line), parse(line)
            self.damaged += not record
            self.header = record.get("header", self.header)
            if "span" in record:
                self.known.add(record["span"]["id"])
        self.torn = self._file.size > self._end
        self.damaged += self.torn

    def goes_on(self, header: dict[str, Any]) -> bool:
        """Whether a run with this header can go on with the file: it is its trace, or empty."""
        return not self._file.size or bool(self.header and self.header["trace"] == header["trace"] and self.damaged == self.torn)

    def begin(self, header: dict[str, Any]) -> None:
        """Take records, under this header where there is none yet. What is torn goes: the run that was killed there tells it again."""
        with self._access():
            if self.torn:
                os.ftruncate(self._file.descriptor, self._end)
            if not self.header:
                self._file.append([{"header": header}] * HEADERS, self._secrets)
            self._read()  # without secrets, as it is in the file
        self._writer = threading.Thread(target=self._write_on, name="langfuse-writer", daemon=True)
        self._writer.start()

    def deliver(self, server: Server) -> None:
        """Begin to send what is in the file and what comes."""
        if self.torn:
            with contextlib.suppress(OSError):  # a full disk takes no marks either
                os.write(self._file.descriptor, b"\n")
        self._sender = _start_sender(self._file.descriptor, server)

    def put_aside(self) -> bool:
        """Make room for another trace: False where nothing is missing, and the file is gone."""
        if self.header and not self.damaged and not any(self.missing().values()):
            self.close(0)
            return False
        with self._access():
            self.path = self.path.rename(_aside(self.path, self.header["trace"][:8] if self.header else "damaged"))
        return True

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

    def missing(self) -> dict[str, int]:
        """How many spans and scores have not arrived, as far as the file can be read; sets `reason` and `turned_down`."""
        mark = self._file.mark()
        self.reason, self.turned_down = mark["reason"], mark["turned_down"]
        missing = {kind: sum(refused for *_, refused in mark["refused"][kind]) for kind in KINDS}
        for kind, (at, _) in mark["delivered"].items():
            missing[kind] += self._file.count(kind, at)
        return missing

    def close(self, seconds: float, keep: bool = False) -> dict[str, int]:
        """Wait at most `seconds` for everything to arrive: how many spans and scores have not.

        Where all have, and no line was damaged, the file is gone (unless `keep`); otherwise it stays.
        """
        self._closing.set()
        if self._writer:
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
        missing = self.missing()
        if self.header and not any(missing.values()) and not self.damaged and not keep:
            with contextlib.suppress(OSError):  # a folder that has become read-only: the file says itself that all has arrived
                self.path.unlink(missing_ok=True)
        os.close(self._file.descriptor)
        return missing


def open_outbox(
    path: Path, header: dict[str, Any], server: Server | None, secrets: Sequence[str] = ()
) -> tuple[Outbox, Outbox | None]:
    """(a run's outbox, the one of what an earlier run left in its place). `server` None: nothing is delivered, all of it is kept.

    A run goes on with the file of its own trace. Another trace's file, and a damaged one, is put aside, which is said in one line on standard
    error, and what it still has to deliver is sent along.

    Raises:
        UserError: as `Outbox`.
    """
    outbox, earlier = Outbox(path, secrets), None
    if not outbox.goes_on(header):
        if outbox.put_aside():
            earlier = outbox
            print(f"warning: {shown_path(path)} {_told_aside(earlier, server)}", file=sys.stderr)
        outbox = Outbox(path, secrets)
    outbox.begin(header)
    if earlier and not earlier.header:
        earlier.close(0)
        earlier = None
    if server:
        for box in filter(None, (outbox, earlier)):
            box.deliver(server)
    return outbox, earlier


def _told_aside(earlier: Outbox, server: Server | None) -> str:
    aside = shown_path(earlier.path)
    if not earlier.header:
        return f"is damaged, and nothing in it can be sent: it is {aside} now"
    damage = f" ({earlier.damaged} damaged lines in it cannot be sent)" if earlier.damaged else ""
    return f"holds what an earlier run could not send{damage}: it is {aside} now, {'and is sent along' if server else f'send it by {RESEND}'}"


def _aside(path: Path, name: str) -> Path:
    """A place beside the file that is free, and where `resend_traces.py` looks."""
    stem = path.name.removesuffix(SUFFIX)
    places = (path.with_name(f"{stem}.{name}{f'-{number}' if number > 1 else ''}{SUFFIX}") for number in count(1))
    return next(place for place in places if not os.path.lexists(place))


def parse(line: bytes) -> dict[str, Any]:
    """A line's object; an empty one where the line is not as it was written."""
    return json.loads(line) if is_whole(line) else {}


def _expand(kind: str, record: dict[str, Any], header: dict[str, Any]) -> list[dict[str, Any]]:
    """A record as `wire.Server` sends it."""
    trace = header["trace"]
    if kind == "spans":
        return [record["span"] | {"trace": trace, "shared": header["attributes"]}]
    of, at, environment = record["of"], timestamp(record["at"]), header["attributes"].get(ENVIRONMENT)
    return [
        {
            "id": f"{of or trace}-{name}",  # the same when it is sent again, so that it is one score
            "traceId": trace,
            **({"observationId": of} if of else {}),
            **({"environment": environment} if environment else {}),
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
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise os_error(error, "write", path, NO_PLACE) from None
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), path.stat()):  # else the process that had it has finished, and it is elsewhere or gone
                return descriptor
        os.close(descriptor)
        if time.monotonic() > deadline:
            raise UserError(f"{shown_path(path)} is in use by another run: wait for its end") from None
        time.sleep(0.05)
