"""The state folder of an endpoint. Here: the flag `stop.json`; while it exists, no worker answers a request locally."""

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from slm_swap.common.errors import UserError
from slm_swap.common.os_errors import writing
from slm_swap.common.reports import SCHEMA_VERSION, now, read_json, write_json
from slm_swap.common.settings import PACKAGE

STATE = PACKAGE / "05_serve/state"
STOP, AUDITS, MINUTES, ENDPOINT = "stop.json", "audits.jsonl", "minutes.jsonl", "endpoint.json"
ADVICE = "check --state"


def flag(folder: Path) -> dict[str, Any] | None:
    """What the flag says; None where there is none. One that cannot be read, or is empty, is up all the same."""
    path = folder / STOP
    if not os.path.lexists(path):
        return None
    try:
        told = read_json(path, "05_serve/watch.py")
    except UserError:
        told = {}
    return told if isinstance(told.get("why"), str) else told | {"why": "a flag that does not say why"}


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
