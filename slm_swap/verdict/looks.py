"""How often the same rows were looked at: a ledger beside the decisions, and what each further look may spend.

A verdict of SWAP is wrong with probability alpha at one look. Whoever evaluates, trains, evaluates again and collects more looks
several times, and one lucky look is enough. So each look at rows that were looked at before has a share of alpha: the first 0.7, then
0.25, 0.12, 0.06, 0.035, and half of the one before from there on. The shares add up to 1.2, so that at alpha 0.05 the error over any
number of looks is at most 6% (Bonferroni's inequality with unequal weights: Dunn, JASA 56, 1961; spent look by look as in Lan and
DeMets, Biometrika 70, 1983). benchmarks/looks_error_rates.py measures it. Rows that were never looked at begin anew.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_swap.common.errors import UserError
from slm_swap.common.reports import json_line, now
from slm_swap.common.settings import display_path
from slm_swap.rows.examples import read_jsonl

SHARES = (0.7, 0.25, 0.12, 0.06, 0.035)
# What tells one model from another in a report; parameters such as the limit on new tokens do not: measuring again is no new look.
IDENTITY = ("kind", "deployment", "endpoint", "path", "config_sha256", "files_sha256", "sha256", "adapter", "precision", "engine")


def share(number: int) -> float:
    """The share of alpha that look `number` (from 1) has for SWAP."""
    if number <= len(SHARES):
        return SHARES[number - 1]
    return SHARES[-1] / 2 ** (number - len(SHARES))


@dataclass(frozen=True)
class Look:
    """One look: its number among those at the same rows, and the earlier ones, without their rows."""

    number: int
    earlier: list[dict[str, Any]]
    entry: dict[str, Any]
    known: bool

    @property
    def share(self) -> float:
        return share(self.number)

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
    mine, earlier = set(entry["rows"]), []
    for where, line in read_jsonl(ledger) if ledger.exists() else ():
        if not isinstance(line, dict) or not isinstance(line.get("rows"), list) or "slm" not in line:
            raise UserError(f"{where}: not a line of a ledger of looks: restore the file, or move it away and count the looks yourself")
        brief = {name: line.get(name) for name in ("at", "verdict", "delta", "label", "slm")} | {"rows": len(line["rows"])}
        if {name: line[name] for name in entry if name in line} == entry:
            return Look(len(earlier) + 1, earlier, entry, known=True)
        if not mine.isdisjoint(line["rows"]):
            earlier.append(brief)
    return Look(len(earlier) + 1, earlier, entry, known=False)


def record(ledger: Path, look: Look, verdict: str, delta: float, label: str) -> None:
    """Add a look to the ledger, unless it stands there.

    Raises:
        UserError: the ledger cannot be written.
    """
    if look.known:
        return
    try:
        ledger.parent.mkdir(parents=True, exist_ok=True)
        with open(ledger, "a", encoding="utf-8") as file:
            file.write(json_line({"at": now(), "verdict": verdict, "delta": delta, "label": label} | look.entry))
    except OSError as error:
        raise UserError(f"cannot write {display_path(ledger)} ({error.strerror}): make room, or choose another --out") from None
