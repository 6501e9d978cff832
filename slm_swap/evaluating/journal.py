"""The journal of an evaluation under way: every row is in a file as soon as it is answered, so that nothing is asked twice.

The file, `<report>.rows.jsonl.part`, has one JSON object a line. The first is the header, `{"run": {...}}`: what is asked of which model, when
the run began, and its `run_id`. Then, as they come: `{"session": when, "run": {...}}` each time that the program starts, `{"row": index,
"spent": seconds, "line": {...}}` with a line of the rows file (`"kept": true` where it is an earlier report's), `{"keep": name, "value": ...}`
with what is measured besides, and `{"state": ...}` whenever the client has learned something (see `protocol.Client`). A line is with the
operating system at once, so that it outlives the process; a power cut costs the lines of a second at most.

Each line begins with `"crc"`, the CRC-32 of what follows in it. One that does not match it was damaged: it is passed over and counted.
"""

import contextlib
import fcntl
import json
import os
import shlex
import tempfile
import time
import uuid
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from slm_swap.clients.protocol import Reply
from slm_swap.common.errors import UserError
from slm_swap.common.os_errors import ELSEWHERE, os_error, reading, writing
from slm_swap.common.reports import json_line, now, rows_path
from slm_swap.common.settings import shown_path
from slm_swap.rows.lines import CHECKSUM, decode_line, dump_json, is_whole, with_checksum

ROW = b'"row": '  # how a reply's line goes on after its checksum
SYNC_SECONDS = 1.0  # between two fsyncs: one a row would cost more than all else that a row costs
RUN_KEYS = ("started_at", "run_id")  # of the header: what differs between two runs of the same command


def journal_path(report: str | Path) -> Path:
    """The journal that lies beside a report until it is written."""
    return rows_path(report).with_suffix(".jsonl.part")


def elsewhere(out: Path) -> str:
    """What to do where a report cannot be written: how to take along the replies that its journal has, if it is there."""
    journal = journal_path(out).absolute()
    if not _has_replies(journal):
        return ELSEWHERE
    folders = (Path.cwd(), Path.home(), Path(tempfile.gettempdir()))
    free = (place for place in folders if os.access(place, os.W_OK) and not any(map(os.path.lexists, (place / journal.name, place / out.name))))
    place = next(free, Path("DIR"))
    copy, there = shlex.join(["cp", str(journal), f"{place}/"]), shlex.quote(str(place / out.name))
    return f"its replies are kept, so copy them by `{copy}` and run the same command with --out {there}: nothing is asked twice"


def _has_replies(journal: Path) -> bool:
    """Whether a journal is there, and is more than its beginning; one that cannot be read may be."""
    try:
        with open(journal, "rb") as lines:
            return any(line.startswith(ROW, CHECKSUM) for line in lines)
    except FileNotFoundError:
        return False
    except OSError:
        return journal.is_file()


class Journal:
    """One run's journal, opened for this process alone; `begin` comes before everything else.

    `answered` counts the rows that are not asked again, which are those with a reply other than a failed request, and those kept of an
    earlier report; `cached` those whose reply came from a reply cache; `damaged` the lines that were passed over. `kept` is what `keep` was
    given, by its name. `seconds` is the time that all sessions together spent on replies. As a context manager it closes the file in the
    end, and removes it where nothing was answered.

    Raises:
        UserError: another process has the journal open, or the file cannot be written; in `begin`: it is of another run.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.header: dict[str, Any] = {}
        self.kept: dict[str, Any] = {}
        self.state: dict[str, Any] | None = None
        self.answered = self.cached = self.sessions = self.damaged = 0
        self.seconds = 0.0
        self._synced = time.monotonic()
        with writing(self.path):
            self._file = self._open()

    @property
    def _shown(self) -> str:
        return shown_path(self.path)

    def _open(self) -> IO[bytes]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = open(self.path, "a+b")  # noqa: SIM115
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                    return file
            except BlockingIOError:
                file.close()
                raise UserError(f"{self._shown} is another process's: wait until it is done or choose another --out") from None
            except FileNotFoundError:
                pass
            file.close()  # the process that had it has finished and removed it: it is not this run's any more

    def begin(self, identity: dict[str, Any], rows: int) -> None:
        """Start a run over `rows` rows, or go on with the one in the file.

        A torn last line is cut off. A damaged one is passed over, and its row asked again; the header stands in every session's line too.

        Raises:
            UserError: the file is of another run, by its `identity`, or no journal at all; it cannot be read or written.
        """
        self._offsets, self._failed = array("q", [-1]) * rows, set[int]()
        with reading(self.path):
            self._check(json.loads(dump_json(identity)))
            self._read()
        if not self.header:
            self.header = identity | {"started_at": now(), "run_id": uuid.uuid4().hex}
            self._append({"run": self.header})
        self._append({"session": now(), "run": self.header})
        self.sync()

    def _read(self) -> None:
        self._end = 0
        self._file.seek(0)
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            record = _decode(line)
            if record is None:
                self.damaged += 1
            else:
                self._take(record)
            self._end += len(line)
        self._file.truncate(self._end)

    def _check(self, identity: dict[str, Any]) -> None:
        """Find the header, which is missing in an empty file and in one whose only line is torn."""
        self._file.seek(0)
        whole = (line for line in self._file if line.endswith(b"\n"))
        header, first = None, None
        for first in whole:
            header = _header(_decode(first))
            if header:
                break
        if first is None:
            return
        if header is None:
            raise UserError(f"{self._shown} is not a journal of an evaluation: move it away or choose another --out")
        if differ := differences({key: value for key, value in header.items() if key not in RUN_KEYS}, identity):
            advice = "finish that run with its own command, delete the file, or choose another --out"
            raise UserError(f"{self._shown} is of another run ({differ}): {advice}")
        self.header = header

    def _take(self, record: dict[str, Any]) -> None:
        """What one line of the file says; it begins at `_end`."""
        match record:
            case {"session": str()}:
                self.sessions += 1
            case {"state": dict(state)}:
                self.state = state
            case {"keep": str(name), "value": value}:
                self.kept[name] = value
            case {"row": int(index), "spent": float(spent), "line": {"finish_reason": str(reason)}} if 0 <= index < len(self._offsets):
                self._note_row(index, spent, reason == "error" and "kept" not in record, "from_cache" in record)

    def _note_row(self, index: int, spent: float, failed: bool, from_cache: bool) -> None:
        self.answered += index not in self and not failed
        self._offsets[index] = self._end
        (self._failed.add if failed else self._failed.discard)(index)
        self.seconds += spent
        self.cached += from_cache

    def __len__(self) -> int:
        """How many rows the run has."""
        return len(self._offsets)

    def __contains__(self, index: int) -> bool:
        """Whether a row is answered."""
        return self._offsets[index] >= 0 and index not in self._failed

    def add(self, index: int, line: str, reply: Reply, spent: float, from_cache: bool = False, kept: bool = False) -> None:
        """Write a row's line down; `spent` are the seconds since the row before it, their sum is what the run took. A row that is `kept`
        is not asked again even if its request failed.

        Raises:
            UserError: the file cannot be written.
        """
        spent = round(float(spent), 6)
        marks = (', "from_cache": true' if from_cache else "") + (', "kept": true' if kept else "")
        size = self._write(f'{{"row": {index}, "spent": {spent}{marks}, "line": {line[:-1]}}}\n'.encode())
        self._note_row(index, spent, reply.finish_reason == "error" and not kept, from_cache)
        self._end += size

    def keep(self, name: str, value: Any) -> None:
        """Write down what was measured besides the rows, so that a later session need not measure it again.

        Raises:
            UserError: the file cannot be written.
        """
        self._append({"keep": name, "value": value})

    def discard(self, run_id: str | None) -> None:
        """Empty the file where it is the journal of a run whose report is written, and the process ended before it was removed."""
        self._file.seek(0)
        header = _header(_decode(self._file.readline()))
        if run_id and header and header["run_id"] == run_id:
            self._file.truncate(0)

    def note(self, state: dict[str, Any]) -> None:
        """Write the client's state down where it is a new one.

        Raises:
            UserError: the file cannot be written.
        """
        if state != self.state:
            self._append({"state": state})

    def _append(self, record: dict[str, Any]) -> None:
        size = self._write(json_line(record).encode())
        self._take(record)
        self._end += size

    def _write(self, line: bytes) -> int:
        """Append a line, one JSON object, with its checksum; gives its length."""
        try:
            size = self._file.write(with_checksum(line))
            self._file.flush()
            if time.monotonic() - self._synced > SYNC_SECONDS:
                self.sync()
        except OSError as error:
            raise os_error(error, "write", self.path, "run the same command again when it can be written") from None
        return size

    def sync(self) -> None:
        """Wait until everything is on the disk.

        Raises:
            UserError: it cannot be written.
        """
        with writing(self.path):
            os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def line(self, index: int) -> str:
        """The line that was written down for a row."""
        self._file.seek(self._offsets[index])
        _, _, line = self._file.readline().partition(b'"line": ')
        return line[:-2].decode() + "\n"

    def told_of_damage(self) -> str | None:
        """One line about the lines that were passed over; None where there were none."""
        if not self.damaged:
            return None
        return f"{self.damaged} lines of {self._shown} were damaged and are passed over: what was lost with them is asked again"

    def forget(self, index: int) -> None:
        """Ask a row again, whose line turned out to be of another one."""
        self.answered -= index in self
        self.damaged += 1
        self._offsets[index] = -1

    def lines(self) -> Iterator[str]:
        """The lines of the rows file, in the dataset's order."""
        return map(self.line, range(len(self._offsets)))

    def require_place(self, out: Path) -> None:
        """Look whether the journal is still where it was made, before the report `out` is written beside it.

        Raises:
            UserError: its folder was moved, and the journal with it. One that was removed has left it in this process's hands alone.
        """
        mine = os.fstat(self._file.fileno())
        with contextlib.suppress(OSError):
            if os.path.samestat(mine, self.path.stat()):
                return
        if mine.st_nlink:
            place = "DIR"
            with contextlib.suppress(OSError):  # where there is no such thing as /proc
                place = os.path.dirname(os.readlink(f"/proc/self/fd/{self._file.fileno()}"))
            command = f"the same command with --out {shlex.quote(os.path.join(place, out.name))} goes on from there"
            raise UserError(f"the folder of {self._shown} was moved meanwhile, and the replies with it: {command}")

    def remove(self) -> None:
        """The report is written, and the journal has done its work."""
        with writing(self.path, "delete it"):
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):  # of a disk that is full or read-only has been told
            if not self.answered and (self.header or self._file.seek(0, os.SEEK_END) == 0):
                self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._file.close()


def _decode(line: bytes) -> dict[str, Any] | None:
    """A line's object; None where the line is not as it was written."""
    if not is_whole(line):
        return None
    try:
        value = decode_line(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _header(record: dict[str, Any] | None) -> dict[str, Any] | None:
    run = record.get("run") if record else None
    return run if isinstance(run, dict) and "run_id" in run else None


def differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    """What differs between two runs, by the dotted names of nested keys; "" where nothing does."""
    there, here = _flat(there), _flat(here)
    differ = [name for name in here | there if here.get(name) != there.get(name)]
    return "; ".join(f"{name} {_brief(there.get(name))} there, {_brief(here.get(name))} here" for name in differ)


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """The leaves of nested objects by their dotted names."""
    if not isinstance(value, dict):
        return {name: value}
    return {path: leaf for key, child in value.items() for path, leaf in _flat(child, f"{name}.{key}" if name else key).items()}


def _brief(value: Any) -> str:
    text = dump_json(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
