"""How often the same rows were looked at: a ledger beside the decisions, and what each further look may spend.

A verdict of SWAP is wrong with probability alpha at one look. Whoever evaluates, trains, evaluates again and collects more looks
several times, and one lucky look is enough. So each look at the same rows has a share of alpha: the first 0.7, the second 0.2, and each
further one half of the one before. The shares add up to 1.1, so that at alpha 0.05 the error over any number of looks is at most 5.5% (Bonferroni's inequality with unequal weights: Dunn, JASA 56, 1961; spent look by look as in Lan and
DeMets, Biometrika 70, 1983). benchmarks/looks_error_rates.py measures it.

A look that ended in FINE_TUNE does not count: a model that is shown to be worse than the margin had next to no chance of a SWAP, as the
two one-sided tests exclude each other. So the usual way, from a base model that falls short to the first adapter, costs nothing. Nor do
rows that were never looked at.
"""

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from slm_swap.common.errors import UserError
from slm_swap.common.os_errors import writing
from slm_swap.common.reports import json_line, now
from slm_swap.common.settings import display_path
from slm_swap.rows.lines import decode_line, read_jsonl
from slm_swap.verdict.decision import FINE_TUNE

FIRST, SECOND = 0.7, 0.2
# What tells one model from another in a report; parameters such as the limit on new tokens do not: measuring again is no new look.
IDENTITY = ("kind", "deployment", "endpoint", "path", "config_sha256", "files_sha256", "sha256", "adapter", "precision", "engine")


def share(number: int) -> float:
    """The share of alpha that look `number` (from 1) has for SWAP."""
    return FIRST if number == 1 else SECOND / 2 ** (number - 2)


@dataclass(frozen=True)
class Look:
    """One look: its number among those at the same rows that count, and the earlier ones, without their rows."""

    number: int
    earlier: list[dict[str, Any]]
    entry: dict[str, Any]
    verdict: str | None  # that it had, where it stands in the ledger

    @property
    def share(self) -> float:
        return share(self.number)

    @property
    def next_share(self) -> float:
        return share(self.number + 1)

    @property
    def share_of_models(self) -> float:
        """The share for a rule that holds however often one looks: only other small models at the same rows spend of it."""
        others = {look["slm"] for look in self.earlier} - {self.entry["slm"]}
        return share(len(others) + 1) if others else 1.0

    def warning(self, alpha: float) -> list[str]:
        """One line where the rows were looked at before."""
        if self.number == 1:
            return []
        return [
            f"look {self.number} at these rows: SWAP takes p at most {alpha * self.share:.4g} now, {alpha * share(1):.4g} at a first look. "
            "Rows that were never looked at have the whole again"
        ]

    def to_json(self, ledger: Path) -> dict[str, Any]:
        """The decision's `looks`."""
        return {"number": self.number, "share": self.share, "earlier": self.earlier, "ledger": display_path(ledger)}


def ledger_path(decision: Path, track: str) -> Path:
    """The ledger of a track, beside its decisions."""
    return decision.with_name(f"{track}.looks.jsonl")


def row_hash(row: dict[str, Any]) -> str:
    """What a row asks and wants, as 12 hex digits."""
    text = "\n".join(str(row.get(name)) for name in ("id", "reference", "prompt_sha256"))
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:12]


def model_hash(model: dict[str, Any] | None) -> str:
    """A model as its report describes it, as 12 hex digits."""
    told = {name: (model or {}).get(name) for name in IDENTITY}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


def look_at(ledger: Path, rows: Sequence[dict[str, Any]], azure: dict | None, slm: dict | None) -> Look:
    """This look at some rows with two models. The same rows and models again are the same look: deciding anew costs nothing.

    Raises:
        UserError: the ledger cannot be read.
    """
    entry = {"rows": sorted(map(row_hash, rows)), "azure": model_hash(azure), "slm": model_hash(slm)}
    key, there = _key(entry), dict[str, dict[str, Any]]()
    for where, line in read_jsonl(ledger, torn=True) if ledger.exists() else ():
        if not isinstance(line, dict) or not isinstance(line.get("rows"), list) or not {"azure", "slm", "verdict"} <= line.keys():
            raise UserError(f"{where}: not a line of a ledger of looks: restore the file, or move it away and count the looks yourself")
        there.setdefault(_key(line), {}).update(line)  # in the order of the first looks, with the last verdicts
    mine, earlier = set(entry["rows"]), []
    for name, line in there.items():
        if name == key:
            break
        if line["verdict"] != FINE_TUNE and not mine.isdisjoint(line["rows"]):
            earlier.append({name: line.get(name) for name in ("at", "verdict", "delta", "label", "slm")} | {"rows": len(line["rows"])})
    return Look(len(earlier) + 1, earlier, entry, there.get(key, {}).get("verdict"))


def _key(line: dict[str, Any]) -> str:
    return json.dumps([line["rows"], line["azure"], line["slm"]])


def record(ledger: Path, look: Look, verdict: str, delta: float, label: str) -> None:
    """Add a look to the ledger, unless it stands there with the same verdict.

    Raises:
        UserError: the ledger cannot be written.
    """
    if look.verdict == verdict:
        return
    with writing(ledger, "choose another --out"):
        ledger.parent.mkdir(parents=True, exist_ok=True)
        with open(ledger, "a+b", buffering=0) as file:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            _append(file, json_line({"at": now(), "verdict": verdict, "delta": delta, "label": label} | look.entry).encode())


def _append(file: IO[bytes], line: bytes) -> None:
    """Add a line behind the whole ones, all of it or nothing; the beginning of one that an earlier process could not end goes."""
    file.seek(0)
    content = file.read()
    end = content.rfind(b"\n") + 1
    try:
        if content[end:]:
            decode_line(content[end:])
            end, line = len(content), b"\n" + line  # whole, and only without its end
    except (ValueError, RecursionError):
        file.truncate(end)
    if file.write(line) < len(line):
        file.truncate(end)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
