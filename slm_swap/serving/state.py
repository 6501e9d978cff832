"""The state folder of an endpoint: the flag that takes everything back, what was audited, what each minute held, and what runs.

While the flag `stop.json` exists, no worker answers a request locally. `audits.jsonl` and `minutes.jsonl` have a line of JSON with its checksum
for each audit and for each worker's minute; each line is appended in one write, so that processes share the files.
"""

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from slm_swap.common.errors import UserError
from slm_swap.common.os_errors import reading, writing
from slm_swap.common.reports import SCHEMA_VERSION, json_line, now, read_json, write_json
from slm_swap.common.settings import PACKAGE
from slm_swap.rows.lines import decode_line, is_whole, with_checksum

STATE = PACKAGE / "05_serve/state"
STOP, AUDITS, MINUTES, ENDPOINT = "stop.json", "audits.jsonl", "minutes.jsonl", "endpoint.json"
ADVICE = "check --state"


def _is_up(path: str | Path) -> bool:
    """Whether a flag is there. Only where it surely is not, it is not up: a folder that cannot be read may hold one."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def flag(folder: Path) -> dict[str, Any] | None:
    """What the flag says; None where there is none. One that cannot be read, or is empty, is up all the same."""
    path = folder / STOP
    if not _is_up(path):
        return None
    try:
        told = read_json(path, "05_serve/watch.py")
    except UserError:
        told = {}
    return told if isinstance(told.get("why"), str) else told | {"why": "a flag that does not say why, or cannot be read"}


def raise_flag(folder: Path, why: str, alarms: list[dict[str, Any]], rows: Iterable[str]) -> bool:
    """Stop all local answers, in every worker; False where the flag is up already, which then stays as it is. `rows` are ids of requests that show why.

    Raises:
        UserError: the folder cannot be written.
    """
    if os.path.lexists(folder / STOP):
        return False
    write_json(folder / STOP, {"schema_version": SCHEMA_VERSION, "created_at": now(), "why": why, "alarms": alarms, "rows": list(rows)}, ADVICE)
    return True


def lower_flag(folder: Path) -> Path | None:
    """Allow local answers again; the flag is kept as `stop-<time>.json`, whose path is given. None where there was none.

    Raises:
        UserError: the folder cannot be written.
    """
    kept = folder / f"stop-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{time.time_ns() % 10**9:09d}.json"
    with writing(folder, ADVICE), contextlib.suppress(FileNotFoundError):
        os.rename(folder / STOP, kept)
        return kept
    return None


class Stopped:
    """Whether an endpoint's flag is up, or may be, as its folder cannot be read: one `stat` a question."""

    def __init__(self, folder: Path):
        self._path = str(folder / STOP)

    def __bool__(self) -> bool:
        return _is_up(self._path)


def append(folder: Path, name: str, value: dict[str, Any]) -> None:
    """One line to `name`, AUDITS or MINUTES, in one write.

    Raises:
        OSError: the disk does not take it. What it took of the line is not left to be joined with the next one.
    """
    data = with_checksum(json_line(value).encode("utf-8", "replace"))
    descriptor = os.open(folder / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        if os.write(descriptor, data) < len(data):
            with contextlib.suppress(OSError):
                os.write(descriptor, b"\n")
            raise OSError(f"{name} has no room for a line")
    finally:
        os.close(descriptor)


class Replaced(Exception):
    """A file of the state is not the one that was read so far."""


class Tail:
    """The whole lines of a growing file behind its first `start` bytes, each once; `damaged` counts those that are not as they were written."""

    def __init__(self, path: Path, start: int = 0):
        self.path, self.damaged, self.lines = path, 0, 0
        self._offset, self._inode = start, None

    def new(self) -> Iterator[dict[str, Any]]:
        """What has come since the last time; a last line without its end is left until it has it.

        Raises:
            Replaced: the file is shorter than it was, gone, or another one.
            UserError: it cannot be read.
        """
        if not os.path.lexists(self.path):
            if self._offset:
                raise Replaced
            return
        with reading(self.path, ADVICE), open(self.path, "rb") as lines:
            stat = os.fstat(lines.fileno())
            if self._inode not in (None, stat.st_ino) or stat.st_size < self._offset:
                raise Replaced
            self._inode = stat.st_ino
            lines.seek(self._offset)
            for line in lines:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                if line.strip():
                    self.lines += 1
                    value = _decoded(line)
                    if value is None:
                        self.damaged += 1
                    else:
                        yield value


def _decoded(line: bytes) -> dict[str, Any] | None:
    try:
        value = decode_line(line) if is_whole(line) else None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def write_endpoint(folder: Path, told: dict[str, Any]) -> None:
    """What runs: mode, cascade and recipe with hash, identity, pid, since when, audit share; `rule`, the whole cascade as it was read."""
    write_json(folder / ENDPOINT, {"schema_version": SCHEMA_VERSION} | told)
