"""What to be warned of before one acts on a verdict."""

from typing import Any

from slm_swap.verdict.evaluations import Evaluation, groups_are_tools, model_of
from slm_swap.verdict.judge import Judge
from slm_swap.verdict.unmeasured import warnings_of


def cautions(
    sides: dict[str, Evaluation], verdicts: dict[str, str], told: dict[str, Any] | None, judge: Judge
) -> list[str]:
    """What to be warned of before one acts on the verdict."""
    rows = judge.rows["azure"]
    found = warnings_of(told, len(rows))
    if len(set(verdicts.values())) > 1:
        shown = ", ".join(f"{matcher} {verdict}" for matcher, verdict in verdicts.items())
        found.append(
            f"the verdict depends on how replies are compared with references ({shown}): look at the rows before you decide"
        )
    if judge.gate.question == "these" and groups_are_tools(rows, judge.track):
        found.append("every row's `group` is its tool's name, as earlier versions wrote it: rows are counted one by one")
    if isinstance(teachers := sides["azure"].report.get("references_by_teacher"), dict) and teachers:
        found.append(
            f"{sum(teachers.values())} of {len(rows)} references are replies of {', '.join(map(str, teachers))} (02_dataset/label.py): the "
            "numbers are agreement with it, not accuracy, and favour it"
        )
    if "before" in sides:
        found += run_otherwise(sides["before"].report, sides["slm"].report)
    return found + steadiness(sides)


def steadiness(sides: dict[str, Evaluation]) -> list[str]:
    """Warnings where a model differs from itself, or was more than one model."""
    found = []
    for side in ("azure", "slm"):
        report = sides[side].report
        prints = model_of(report).get("system_fingerprint")
        if isinstance(prints, list) and len(prints) > 1:
            found.append(f"the {side} report mixes {len(prints)} versions of the model (system_fingerprint): evaluate it again in one go")
        repeat = report.get("repeat")
        if isinstance(repeat, dict) and repeat.get("exact_changed"):
            share = repeat["exact_changed"] / repeat["rows"]
            found.append(
                f"asked twice, the {side} model was right once and wrong once on {share:.1%} of {repeat['rows']} rows: "
                "a verdict that is near the margin may change with the next run"
            )
    return found


def run_otherwise(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """A warning where two reports of the small model come from another engine or precision: the gain is not the training's alone."""
    models = [model_of(report) for report in (before, after)]
    ways = [" in ".join(str(model[name]) for name in ("engine", "precision") if model.get(name)) for model in models]
    if not all(ways) or ways[0] == ways[1]:
        return []
    return [
        f"the small model was run by {ways[0]} before and by {ways[1]} now: a part of the gain may come from that (benchmarks/parity.py)"
    ]
