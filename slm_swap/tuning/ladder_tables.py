"""What the ladder shows: the plan before it is climbed, and what each rung gained."""

from pathlib import Path
from typing import Any

from slm_swap.clients.pricing import to_float
from slm_swap.common.reports import read_json
from slm_swap.rows.examples import Example
from slm_swap.rows.few_shot import FewShot
from slm_swap.rows.prompts import request_of
from slm_swap.scoring.words import metric_name
from slm_swap.tuning.ladder import MORE_TOKENS, NOT_TRIED, THINKING_TOKENS, Ladder, Setting
from slm_swap.tuning.stages import Stages

PROBED = 8  # rows that a dry run asks, where nothing was measured yet


def outlook(ladder: Ladder, begin: Setting, examples: list[Example], stages: Stages, train: Path | None) -> list[tuple[str, str, float | None, str]]:
    """(rung, what, seconds, how they are estimated) for the base and each rung; seconds are None where they are not known.

    Where the folder holds no measured base, PROBED rows are asked.
    """
    report, rows = ladder.report_path("base", begin), len(examples)
    if not report.is_file():
        report = ladder.report_path("probe", begin)
        if not report.is_file():
            stages.evaluate("probe", begin | {"limit": min(PROBED, rows), "latency_rows": 0}, report)
    told = read_json(report, "04_ft/improve.py")
    load, each = told["seconds"]["load"], told["seconds"]["generate"] / told["counts"]["rows"]
    base, limit = load + rows * each, told["args"]["max_new_tokens"]
    found = [("base", "as it is", base, f"by {told['counts']['rows']} rows")]
    for rung in ladder.plan:
        if rung.preset:
            found.append((rung.name, rung.what, None, "the training's speed is not known before it has run"))
        elif rung.kind in ("few-shot", "combine"):
            times = longer_prompts(ladder.track, examples, train, int(rung.name.rsplit(" ", 1)[1]))
            found.append((rung.name, rung.what, load + rows * each * times, f"prompts are {times:.1f} times as long"))
        elif rung.kind in ("thinking", "tokens"):
            most = MORE_TOKENS * limit if rung.kind == "tokens" else THINKING_TOKENS
            found.append((rung.name, rung.what, load + rows * each * most / limit, f"if every reply takes all {most} tokens"))
        elif rung.name == "retry":
            found.append((rung.name, rung.what, load + 2 * rows * each, "if every reply is made twice"))
        else:
            found.append((rung.name, rung.what, base, "as the base"))
    return found


def longer_prompts(track: str, examples: list[Example], train: Path | None, count: int) -> float:
    """How many times as many characters all prompts have with `count` shots."""
    few_shot = FewShot(train, track, count)
    lengths = [len(str(request_of(track, example).messages)) for example in examples]
    return 1 + sum(len(str(few_shot.turns(example))) for example in examples) / sum(lengths)


def show_outlook(told: list[tuple[str, str, float | None, str]], hour: Any = None) -> None:
    table = _table("what would be done, by estimate", ("rung", "what", "minutes", "cost", "how that is estimated"), (2, 3))
    for name, what, seconds, how in told:
        cost = None if seconds is None else to_float(hour(seconds)) if hour else None
        table.add_row(name, what, "?" if seconds is None else f"{seconds / 60:.1f}", "?" if cost is None else f"{cost:.4g}", how)
    _print(table)


def show(ladder: Ladder) -> None:
    """Each rung: what it gained, at what price, and why it stayed or went."""
    metric = ladder.told[0]["metric"]
    title = f"{ladder.track}: {ladder.inputs['rows']} validation rows; a gain stays where p < {ladder.alpha:g}, its interval holds for all rungs at once"
    table = _table(title, ("rung", metric_name(metric), "gain", "interval", "tokens in + out", "s alone", ""), (1, 2, 3, 4, 5))
    for one in ladder.told:
        if one["outcome"] == NOT_TRIED:
            table.add_row(one["rung"], "", "", "", "", "", f"not tried: {one['why']}")
            continue
        gain, tokens, alone = one["gain"], one["tokens_per_row"].values(), (one["latency"] or {}).get("alone")
        low, high = gain["interval"] if gain else (None, None)
        table.add_row(
            one["rung"], f"{one['value']:.3f}", f"{gain['gain']:+.3f}" if gain else "", f"{low:+.3f} to {high:+.3f}" if gain else "",
            " + ".join("?" if count is None else f"{count:.0f}" for count in tokens), f"{alone['p50']:.3g}" if alone else "?", f"{one['outcome']}: {one['why']}",
        )  # fmt: skip
    _print(table)


def _table(title: str, headings: tuple[str, ...], numbers: tuple[int, ...]) -> Any:
    from rich.table import Table

    table = Table(title=title)
    for at, heading in enumerate(headings):
        table.add_column(heading, justify="right" if at in numbers else "left")
    return table


def _print(table: Any) -> None:
    import sys

    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 140).print(table)
