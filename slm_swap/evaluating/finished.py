"""A report that stands at --out already: it is kept, added to, or named in what is refused."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slm_swap.common.errors import UserError
from slm_swap.common.os_errors import reading
from slm_swap.common.reports import json_line, rows_path
from slm_swap.common.settings import shown_path
from slm_swap.evaluating.journal import Journal, differences
from slm_swap.evaluating.row import read_reply
from slm_swap.scoring.measured import unmeasured

KINDS = ("failed", "truncated")  # of scoring.measured
LIMITS = ("max_new_tokens", "max_completion_tokens", "max_tokens")  # names of the limit on new tokens in a model's parameters
RAISE = 4  # times the limit that cut replies: what the command to ask them again proposes
SETS = ("served_model", "system_fingerprint")  # of a report's model: what answered, over all runs


def finished_report(out: Path, asked: dict[str, Any], again: bool, overwrite: bool) -> "Finished | None":
    """The report that a run goes on with; None where it makes a new one, as there is none or it is to be overwritten.

    Raises:
        UserError: there is none to ask rows `again` of, or it is another run's.
    """
    if again and not out.exists():
        raise UserError(f"no report at {shown_path(out)}: evaluate without --again first, or name the report with --out")
    if overwrite or not out.exists():
        return None
    finished = Finished(out)
    finished.check(asked)
    return finished


def run_id_at(out: Path) -> str | None:
    """The run that wrote the report at a place, None where there is none that says so."""
    try:
        found = json.loads(out.read_text(encoding="utf-8"))["run_id"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


class Finished:
    """The report at `out`. `asked` is what was asked of which model, as its journal's header had it.

    Raises:
        UserError: the file is no report of an evaluation.
    """

    def __init__(self, out: Path):
        self.out, self._shown = out, shown_path(out)
        try:
            with reading(out, "choose another --out"):
                self.report = json.loads(out.read_text(encoding="utf-8"))
            if self.report["stage"] != "eval":
                raise ValueError
        except (ValueError, RecursionError, KeyError, TypeError):
            raise UserError(f"{self._shown} is there and is no report of an evaluation: choose another --out, or pass --overwrite") from None

    @property
    def run_id(self) -> str | None:
        return self.report.get("run_id")

    def check(self, asked: dict[str, Any], another_limit: bool = False) -> None:
        """Refuse anything but the same rows, prompts and model as far as `asked` tells; `another_limit` on new tokens may be allowed.

        Raises:
            UserError: what differs is named.
        """
        advice = "it is kept: choose another --out, or pass --overwrite to ask all rows again"
        there = self.report.get("asked")
        if not isinstance(there, dict):
            raise UserError(f"{self._shown} is a finished report of an older version, which does not say what was asked: {advice}")
        there = {name: there.get(name) for name in asked}
        if another_limit and "model" in asked:
            there, asked = _without_limit(there), _without_limit(asked)
        if differ := differences(there, json.loads(json.dumps(asked))):
            raise UserError(f"{self._shown} is a finished report of another run ({differ}): {advice}")

    def has_repeat(self, runs: int) -> bool:
        """Whether its rows were compared over so many runs."""
        return runs == 1 or (self.report.get("repeat") or {}).get("runs") == runs

    def rows_to_ask(self, kinds: Sequence[str], hosted: bool, limit: int) -> list[int]:
        """The indices of the rows that are not measured, of those kinds.

        Raises:
            UserError: the rows file is missing or of another length, or the limit is less than before, or no more than what cut replies.
        """
        reasons = [unmeasured(row, hosted) for row in self.lines()]
        before = self.limit
        if before is not None and limit < before:
            raise UserError(f"the other replies had --max-new-tokens {before}, and {limit} is less: pass that much, or more")
        if "truncated" in kinds and "truncated" in reasons and before is not None and limit <= before:
            count = reasons.count("truncated")
            raise UserError(f"{count} replies were cut at --max-new-tokens {before}: pass a larger one to ask them again, or only --again failed")
        return [index for index, reason in enumerate(reasons) if reason in kinds]

    @property
    def limit(self) -> int | None:
        """The largest limit on new tokens that a row of the report had."""
        first = (self.report.get("args") or {}).get("max_new_tokens")
        limits = [first, *(one.get("max_new_tokens") for one in self.report.get("again") or [])]
        return max((limit for limit in limits if isinstance(limit, int)), default=None)

    def lines(self) -> list[dict[str, Any]]:
        """The lines of its rows file.

        Raises:
            UserError: as `rows_to_ask`.
        """
        path = rows_path(self.out)
        try:
            # not splitlines(): a reply may hold a line separator of Unicode's, which JSON leaves as it is
            with reading(path, "put it back, or remove what is in its way"):
                rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        except (ValueError, RecursionError):
            rows = []
        if len(rows) != self.report["counts"]["rows"]:
            raise UserError(f"{shown_path(path)} is not the rows file of {self._shown}: put it back, or pass --overwrite to ask all rows again")
        return rows

    def keep_rows(self, journal: Journal, to_ask: Sequence[int]) -> None:
        """Put the lines of all other rows into the journal, so that they are not asked."""
        if "to ask" not in journal.kept:
            journal.keep("to ask", list(to_ask))
        chosen = set(journal.kept["to ask"])
        for index, row in enumerate(self.lines()):
            if index not in chosen and index not in journal:
                journal.add(index, json_line(row), read_reply(row), 0.0, kept=True)

    def begin(self, journal: Journal, asked: dict[str, Any], kinds: Sequence[str], limit: int, hosted: bool, runs: int) -> bool:
        """Begin a run that asks the unmeasured rows of those kinds again, or a sample of all for a comparison over so many runs; False
        where the report has all that already.

        Raises:
            UserError: as `check`, `rows_to_ask` and `Journal.begin`.
        """
        self.check(asked, another_limit=bool(kinds))
        to_ask = self.rows_to_ask(kinds, hosted, limit) if kinds else []
        if not to_ask and self.has_repeat(runs):
            return False
        journal.begin(asked | {"again": {"kinds": list(kinds), "repeat": runs, "of": self.run_id}}, asked["rows"])
        self.keep_rows(journal, to_ask)
        return True

    def extend(self, report: dict[str, Any], kinds: Sequence[str], rows: int) -> dict[str, Any]:
        """The new report with what is the old one's: what was asked of which model, the sessions and seconds before, and in `again` what
        was asked anew. The latency of a local model and the comparison of runs stay where they were not measured anew."""
        old, again = self.report, list(self.report.get("again") or [])
        if kinds:
            again.append({"kinds": list(kinds), "rows": rows, "max_new_tokens": report["args"]["max_new_tokens"]})
        model = report["model"] | {"parameters": old["model"].get("parameters")}
        model |= {name: sorted({*old["model"].get(name, []), *model[name]}) for name in SETS if name in model}
        seconds = {name: round(report["seconds"][name] + old["seconds"][name], 3) for name in ("generate", "total")}
        kept = {name: old.get(name) for name in ("repeat", "latency") if report[name] is None}
        return report | kept | {
            "asked": old["asked"],
            "model": model,
            "args": report["args"] | {"max_new_tokens": old["args"].get("max_new_tokens")},
            "sessions": report["sessions"] + old["sessions"],
            "cached_replies": report["cached_replies"] + old["cached_replies"],
            "seconds": report["seconds"] | seconds,
            "again": again,
        }  # fmt: skip


def _without_limit(asked: dict[str, Any]) -> dict[str, Any]:
    model = asked.get("model") or {}
    parameters = {name: value for name, value in (model.get("parameters") or {}).items() if name not in LIMITS}
    return asked | {"model": model | {"parameters": parameters}}


def again_command(argv: Sequence[str], kinds: Sequence[str], limit: int) -> str:
    """The command that asks the unmeasured rows of those kinds again, from the command line of the run that left them."""
    words, skip = [], False
    for word in argv:
        name, _, value = word.partition("=")
        skip_this, skip = skip, name in ("--max-new-tokens", "--again", "--repeat", "--repeat-rows") and not value
        if not skip_this and name not in ("--max-new-tokens", "--again", "--overwrite", "--repeat", "--repeat-rows"):
            words.append(word)
    words += ["--again", ",".join(kinds), "--max-new-tokens", str(limit * RAISE if "truncated" in kinds else limit)]
    return shlex.join(["python", "01_eval/eval.py", *words])
