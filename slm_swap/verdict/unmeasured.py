"""Rows that say nothing of a model, and what a verdict may still rest on: it stands where it holds with each of them against it."""

import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from slm_swap.scoring.measured import unmeasured
from slm_swap.verdict.decision import FINE_TUNE, NEED_MORE_DATA, SWAP, Decision, Values
from slm_swap.verdict.evaluations import Evaluation, model_of

WORST = {SWAP: {"azure": 1.0, "slm": 0.0}, FINE_TUNE: {"azure": 0.0, "slm": 1.0}}  # what each side's unmeasured rows are taken for
REPEATED = ("split", "dataset", "limit", "adapter", "precision", "engine", "batch_size", "seed")  # flags that make the same run
DEFAULTS = {"split": "test", "engine": "auto", "batch_size": 8, "seed": 42}
MORE_TOKENS = 4  # times the limit that cut the replies


def causes(rows: Sequence[dict], side: str) -> list[str | None]:
    """Why each row of a side (azure, slm) is not measured, None where it is: `scoring.measured`."""
    return [unmeasured(row, hosted=side == "azure") for row in rows]


def guarded(
    values: dict[str, Values], missing: dict[str, list[str | None]], decide: Callable[[Values, Values], Decision]
) -> Decision:
    """The decision on both sides' values; a verdict that does not hold with every unmeasured row against it is withheld."""
    decision = decide(values["azure"], values["slm"])
    if decision.verdict == NEED_MORE_DATA or not any(any(why) for why in missing.values()):
        return decision
    worst = {
        side: {
            name: [WORST[decision.verdict][side] if why else value for value, why in zip(row_values, missing[side], strict=True)]
            for name, row_values in values[side].items()
        }
        for side in ("azure", "slm")
    }
    if decide(worst["azure"], worst["slm"]).verdict == decision.verdict:
        return decision
    return replace(decision, verdict=NEED_MORE_DATA, need=None, withheld=decision.verdict)


def account(sides: dict[str, Evaluation], missing: dict[str, list[str | None]]) -> dict[str, Any] | None:
    """The decision's `unmeasured`: counts by side and cause, and the commands that measure exactly those rows; None where all are."""
    counts = {side: dict(Counter(why for why in missing[side] if why)) for side in ("azure", "slm")}
    if not any(counts.values()):
        return None
    return counts | {"measure": [again(sides[side], side, counts[side]) for side in counts if counts[side]]}


def again(evaluation: Evaluation, side: str, counts: dict[str, int]) -> str:
    """The command that asks an evaluation's unmeasured rows again and nothing else."""
    report = evaluation.report
    args = report.get("args") if isinstance(report.get("args"), dict) else {}
    kind = model_of(report).get("kind")
    if kind == "replay":
        return f"record the {side} replies of those rows again: replies from a file cannot be asked again"
    words = ["python", "01_eval/eval.py", "--track", str(report.get("track")), "--model-kind", str(kind or side)]
    for name in REPEATED:
        value = args.get(name)
        if value is not None and value != DEFAULTS.get(name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    words += ["--out", evaluation.files()["path"], "--again", ",".join(sorted(counts))]
    limit = args.get("max_new_tokens")
    if "truncated" in counts and isinstance(limit, int):
        words += ["--max-new-tokens", str(MORE_TOKENS * limit)]
    return shlex.join(words)


def warnings_of(told: dict[str, Any] | None, rows: int) -> list[str]:
    """One line for each side that has unmeasured rows: how many, why, and what measures them."""
    if not told:
        return []
    names = {"failed": "requests failed", "truncated": "replies were cut off by --max-new-tokens"}
    lines, commands = [], iter(told["measure"])
    for side in ("azure", "slm"):
        if counts := told[side]:
            what = " and ".join(f"{count} of {rows} {side} {names[why]}" for why, count in sorted(counts.items()))
            lines.append(f"{what}: these rows say nothing of the model. Measure them: {next(commands)}")
    return lines
