"""Simulate how often the verdict is wrong, and how often it settles what is true, on an application's own few tools: no model is run.

    python benchmarks/tools_error_rates.py
    python benchmarks/tools_error_rates.py --scale 0.1 --out /tmp/tools_error_rates.json

Rows as `tool_rows` makes them; the paired rule on all six metrics at alpha 0.05. `swap` is at a first look as compare.py makes it, which
has a share of alpha (`verdict.looks`), `swap_whole` at a look that has the whole. `level` is azure's args_exact_rate: 0.87 and 0.93 with 5%
wrong references, 0.99 with none (5% would leave 0.95). `gap` is the true difference in args_exact_rate, the largest of the six.

these: the question is about these very tools. Their traffic's gap is exact in each trial; the unit is the row.
others: the question is about tools like these. Each trial draws new ones, whose gap is exact on average; the unit is the tool. Also 300
equally used tools, as benchmark data has.
ties: models that give the same replies.
need: where the first look said NEED_MORE_DATA, as many further rows as `rows_needed` announced (for a power of 80%) are drawn of the same
truth, and all rows are decided again, which is a second look. `announced_for`: the look whose level the number was worked out for.

All trials of a cell are decided at once; one of the rarest verdict is decided again by `decision.paired_decision`, and a verdict that is
not the same ends the run.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere

import numpy as np
from tool_rows import METRICS, WRONG_GOLD, YES_NO, Kinds, four_cases, make_kinds, mixtures, tool_errors, zipf

from slm_swap.cli import Parser, run
from slm_swap.common.reports import code_version, hardware, now, write_json
from slm_swap.common.settings import ROOT, display_path
from slm_swap.verdict.decision import (
    FINE_TUNE,
    MIN_CLUSTERS,
    NEED_MORE_DATA,
    POWER,
    ROUNDING,
    SWAP,
    differences,
    paired_decision,
    rows_needed,
)
from slm_swap.verdict.looks import share
from slm_swap.verdict.stats.score import statistics

ALPHA = 0.05
LOOK = {number: ALPHA * share(number) for number in (1, 2)}  # the level for SWAP at each look
LEVELS = {0.87: WRONG_GOLD, 0.93: WRONG_GOLD, 0.99: 0.0}  # azure's exact rate: share of wrong references
TOOLS, ROWS, MARGINS, GAPS = (3, 8, 40), (100, 300, 1000, 3000), (0.02, 0.05), (0.0, 1.0, 2.0)  # gaps in margins
AT_MARGIN, ELSEWHERE, CASES = (
    {"these": 4000, "others": 2000},
    700,
    200,
)  # standard errors at most 0.004 or 0.0053 (of 0.06), 0.019, 0.035
MANY, NEED_ROWS, NEED_GAPS = 300, (100, 300), (0.0, 0.5, 2.0)
VERDICTS = np.array([NEED_MORE_DATA, SWAP, FINE_TUNE])
AT_ONCE = 20_000  # tools in memory at a time


@dataclass(frozen=True)
class Found:
    """Of each trial, arrays of shape (trials,): the p-value of "good enough on all metrics", and Holm's first of "worse on one".

    `enough` says that there are units enough for a SWAP.
    """

    good: np.ndarray
    worse: np.ndarray
    enough: np.ndarray

    def verdicts(self, swap_alpha: float) -> np.ndarray:
        swap = (self.good <= swap_alpha) & self.enough
        return np.where(self.worse <= ALPHA, FINE_TUNE, np.where(swap, SWAP, NEED_MORE_DATA))


@dataclass(frozen=True)
class World:
    """What a cell simulates."""

    question: str
    tools: int
    level: float
    margin: float
    gap: float
    rows: int

    @property
    def error(self) -> float:
        return 1 - self.level / (1 - LEVELS[self.level])

    def trials(self, scale: float) -> int:
        return max(20, round(scale * (AT_MARGIN[self.question] if self.gap == self.margin else ELSEWHERE)))


def found_by(scores: dict[str, np.ndarray], df: np.ndarray, exact: bool, enough: np.ndarray) -> Found:
    """The rule on each metric's scores (trials,): yes-no metrics are normal where `exact`, the others Student's t."""
    from scipy.special import ndtr, stdtr

    def tail(name: str, score: np.ndarray) -> np.ndarray:
        return ndtr(score) if exact and name in YES_NO else stdtr(df, score)

    good = np.max([tail(name, score) for name, score in scores.items()], axis=0)
    worse = np.min([tail(name, -score) for name, score in scores.items()], axis=0)
    return Found(good, len(scores) * worse, enough)


def by_rows(kinds: Kinds, counts: np.ndarray, margin: float) -> Found:
    """`counts` (trials, kinds) of rows that are each alone."""
    scores, rows = {}, counts.sum(-1)
    for at, name in enumerate(METRICS):
        values, group = np.unique(kinds.differences[:, at], return_inverse=True)
        own = counts @ np.eye(len(values))[group]
        scores[name] = statistics(values - margin, 1.0, own, -1 - margin, 1 - margin, name in YES_NO)
    return found_by(scores, rows - 1, True, rows >= MIN_CLUSTERS)


def by_tools(kinds: Kinds, counts: np.ndarray, margin: float) -> Found:
    """`counts` (trials, tools, kinds) with the tool as the unit."""
    sizes = counts.sum(-1).astype(float)
    typical, effective = (sizes**3).sum(-1) / (sizes**2).sum(-1), sizes.sum(-1) ** 2 / (sizes**2).sum(-1)
    scores = {}
    for at, name in enumerate(METRICS):
        y = counts @ kinds.differences[:, at] - margin * sizes
        low, high = np.minimum((-1 - margin) * typical, y.min(-1)), np.maximum((1 - margin) * typical, y.max(-1))
        scores[name] = statistics(y, sizes, (sizes > 0).astype(float), low, high, False)
    return found_by(scores, np.maximum(effective - 1, 1), False, effective > MIN_CLUSTERS - ROUNDING)


def check(kinds: Kinds, counts: np.ndarray, found: np.ndarray, margin: float) -> None:
    """A trial of the rarest verdict again, by the program: what is not the same is a bug here or there."""
    shares = {verdict: (found == verdict).mean() for verdict in set(found)}
    trial = int(np.argmax(found == min(shares, key=lambda verdict: shares[verdict])))
    units = np.atleast_2d(counts[trial])  # tools, kinds
    rows = np.repeat(np.tile(np.arange(units.shape[1]), len(units)), units.ravel())
    labels = None if counts.ndim == 2 else np.repeat(np.arange(len(units)), units.sum(-1)).tolist()
    azure = {name: np.maximum(kinds.differences[rows, at], 0).tolist() for at, name in enumerate(METRICS)}
    slm = {name: np.maximum(-kinds.differences[rows, at], 0).tolist() for at, name in enumerate(METRICS)}
    said = paired_decision(azure, slm, YES_NO, margin, ALPHA, labels, LOOK[1], brief=True).verdict
    if said != found[trial]:
        raise RuntimeError(f"margin {margin}, {len(rows)} rows: {found[trial]} here, {said} by paired_decision")


def told(world: World, found: Sequence[Found]) -> dict:
    first, whole = (np.concatenate([some.verdicts(level) for some in found]) for level in (LOOK[1], ALPHA))
    shares = {name.lower(): round(float((first == name).mean()), 5) for name in VERDICTS}
    return vars(world) | {"trials": len(first)} | shares | {"swap_whole": round(float((whole == SWAP).mean()), 5)}


def these(rng: np.random.Generator, kinds: Kinds, world: World, shares: np.ndarray) -> dict:
    counts = rng.multinomial(world.rows, shares)
    found = by_rows(kinds, counts, world.margin)
    check(kinds, counts, found.verdicts(LOOK[1]), world.margin)
    return told(world, [found])


def others(rng: np.random.Generator, kinds: Kinds, world: World, trials: int) -> dict:
    """Tools drawn anew in each trial, all counted as units."""
    found, done = [], 0
    traffic = np.full(MANY, 1 / MANY) if world.tools == MANY else zipf(world.tools)
    while done < trials:
        some = min(trials - done, AT_ONCE // world.tools)
        true = world.gap / (1 - LEVELS[world.level])
        shares = four_cases(*tool_errors(rng, (some, world.tools), world.error, true)) @ kinds.shares
        counts = rng.multinomial(rng.multinomial(world.rows, traffic, some), shares / shares.sum(-1, keepdims=True))
        found.append(by_tools(kinds, counts, world.margin))
        if not done:
            check(kinds, counts, found[0].verdicts(LOOK[1]), world.margin)
        done += some
    return told(world, found)


def ties(kinds: Kinds, rows: int, margin: float) -> dict:
    """Models that are always the same: nothing is random."""
    counts = np.zeros((1, len(kinds.differences)), int)
    counts[0, 0] = rows
    found = by_rows(kinds, counts, margin).verdicts(LOOK[1])
    check(kinds, counts, found, margin)
    return {"rows": rows, "margin": margin, "verdict": str(found[0])}


def need(rng: np.random.Generator, kinds: Kinds, world: World, cases: int) -> list[dict]:
    """How often what `rows_needed` announced settled the verdict at the second look, and as it said."""
    shares = mixtures(rng, kinds, 3 * cases, world.tools, world.error, world.gap, LEVELS[world.level])
    counts = rng.multinomial(world.rows, shares)
    first = by_rows(kinds, counts, world.margin).verdicts(LOOK[1])
    unsettled = np.flatnonzero(first == NEED_MORE_DATA)[:cases]
    samples, results = [samples_of(kinds, counts[trial]) for trial in unsettled], []
    for look, level in LOOK.items():
        announced = [rows_needed(sample, world.margin, ALPHA, level) for sample in samples]
        possible = [(trial, said) for trial, said in zip(unsettled, announced, strict=True) if said["rows"] is not None]
        result = vars(world) | {"announced_for": look, "need": round(float((first == NEED_MORE_DATA).mean()), 4)}
        result |= {"cases": len(possible), "no_number": len(announced) - len(possible)}
        results.append(result | dict.fromkeys(("median_rows", "settled", "as_announced")))
        if possible:
            trials, rows = np.array([trial for trial, _ in possible]), np.array([said["rows"] for _, said in possible])
            every = counts[trials] + rng.multinomial(rows, shares[trials])
            second, towards = by_rows(kinds, every, world.margin).verdicts(LOOK[2]), [said["towards"] for _, said in possible]
            results[-1] |= {
                "median_rows": int(np.median(rows)),
                "settled": round(float((second != NEED_MORE_DATA).mean()), 4),
                "as_announced": round(float((second == np.array(towards)).mean()), 4),
            }
    return results


def samples_of(kinds: Kinds, counts: np.ndarray) -> dict:
    rows = kinds.differences[np.repeat(np.arange(len(counts)), counts)].T.tolist()
    nothing = [0.0] * len(rows[0])
    return differences(dict(zip(METRICS, rows, strict=True)), dict.fromkeys(METRICS, nothing), YES_NO)


def summarize(cells: list[dict]) -> dict:
    """The worst cell of each error and the range of the power, for each question and, of power, margin and number of rows."""
    at = [cell for cell in cells if cell["gap"] == cell["margin"]]
    name = "{tools} tools, level {level}, margin {margin}, {rows} rows".format_map

    def worst(some: list[dict], verdict: str) -> dict:
        most = max(some, key=lambda cell: cell[verdict])
        return {"max": most[verdict], "in": name(most), "mean": round(float(np.mean([cell[verdict] for cell in some])), 5)}

    def power(gap: float, verdict: str) -> dict:
        own = [cell for cell in cells if cell["gap"] == gap * cell["margin"]]
        keys = sorted({(cell["margin"], cell["level"], cell["rows"]) for cell in own})
        values = {key: [cell[verdict] for cell in own if (cell["margin"], cell["level"], cell["rows"]) == key] for key in keys}
        return {"margin {}, level {}, {} rows".format(*key): [min(found), max(found)] for key, found in values.items()}

    return {
        "false_swap_at_margin": worst(at, "swap"),
        "false_swap_at_margin_with_the_whole_alpha": worst(at, "swap_whole"),
        "false_swap_beyond_margin": worst([cell for cell in cells if cell["gap"] > cell["margin"]], "swap"),
        "false_fine_tune": worst([cell for cell in cells if cell["gap"] <= cell["margin"]], "fine_tune"),
        "swap_of_equal_models": power(0.0, "swap"),
        "swap_of_equal_models_with_the_whole_alpha": power(0.0, "swap_whole"),
        "fine_tune_at_twice_the_margin": power(2.0, "fine_tune"),
    }


def settled(cells: list[dict], look: int, rows: int) -> dict:
    """How often the announced rows settled the verdict: the range of the cells with a quarter of the cases or more, and of all cases."""
    own = [cell for cell in cells if (cell["announced_for"], cell["rows"]) == (look, rows) and cell["cases"]]
    most, cases = max(cell["cases"] for cell in own), [cell["cases"] for cell in own]
    shares = [cell["settled"] for cell in own if cell["cases"] >= most / 4]
    every = {
        name: round(float(np.average([cell[name] for cell in own], weights=cases)), 4) for name in ("settled", "as_announced")
    }
    return {"announced": POWER, "lowest": min(shares), "highest": max(shares)} | every


def simulate(rng: np.random.Generator, scale: float) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {"these": [], "others": [], "ties": [], "need": []}
    kinds = {level: make_kinds(wrong) for level, wrong in LEVELS.items()}
    for tools, level, margin, gap in product(TOOLS, LEVELS, MARGINS, GAPS):
        make = partial(World, "these", tools, level, margin, gap * margin)
        shares = mixtures(rng, kinds[level], make(0).trials(scale), tools, make(0).error, gap * margin, LEVELS[level])
        found["these"] += [these(rng, kinds[level], make(rows), shares) for rows in ROWS]
        show(found["these"][-len(ROWS) :])
    for tools, level, margin, gap in product((*TOOLS, MANY), LEVELS, MARGINS, GAPS):
        make = partial(World, "others", tools, level, margin, gap * margin)
        own = [others(rng, kinds[level], world, world.trials(scale)) for world in map(make, (300, 3000))]
        found["others"] += own
        show(own)
    found["ties"] = [ties(kinds[0.93], rows, margin) for rows in ROWS for margin in MARGINS]
    for tools, level, margin, gap in product((8,), LEVELS, MARGINS, NEED_GAPS):
        make = partial(World, "these", tools, level, margin, gap * margin)
        for rows in NEED_ROWS:
            found["need"] += need(rng, kinds[level], make(rows), max(5, round(scale * CASES)))
            print("need", *(list(cell.values())[2:] for cell in found["need"][-len(LOOK) :]), flush=True)
    return found


def show(cells: list[dict]) -> None:
    first = cells[0]
    rates = ", ".join(f"{cell['rows']}: {cell['swap']:.3f}/{cell['fine_tune']:.3f}" for cell in cells)
    print(
        "{question} {tools:3} tools, level {level}, margin {margin}, gap {gap:g}: SWAP/FINE_TUNE at".format_map(first),
        rates,
        flush=True,
    )


def lines(cells: list[dict]) -> list[str]:
    """The cells as comma-separated lines, their names first."""
    return [",".join(cells[0])] + [",".join("" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
                                            for value in cell.values()) for cell in cells]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="more or fewer trials in each cell (default: 1)")
    parser.add_argument("--out", type=Path, metavar="FILE", default=ROOT / "benchmarks/results/tools_error_rates.json")
    parser.add_seed()
    args = parser.parse_args(argv)
    started = time.perf_counter()
    found = simulate(np.random.default_rng(args.seed), args.scale)
    summary = {question: summarize(found[question]) for question in ("these",)}
    few = [cell for cell in found["others"] if cell["tools"] != MANY]
    many = [cell for cell in found["others"] if cell["tools"] == MANY]
    summary |= {"others, 3 to 40 tools": summarize(few), f"others, {MANY} equally used tools": summarize(many)}
    summary["need"] = {f"announced for look {look}, from {rows} rows": settled(found["need"], look, rows)
                       for look in LOOK for rows in NEED_ROWS}  # fmt: skip
    report = {
        "simulated": "rows drawn at random; no model was run", "created_at": now(), "code": code_version(), "hardware": hardware(),
        "seed": args.seed, "alpha": ALPHA, "seconds": round(time.perf_counter() - started, 1), "summary": summary,
        **{name: lines(cells) for name, cells in found.items()},
    }  # fmt: skip
    write_json(args.out, report)
    for question, own in summary.items():
        print(question, {name: value for name, value in own.items() if "of_equal" not in name and "twice" not in name})
    print(f"report: {display_path(args.out)}")
    return 0


if __name__ == "__main__":
    run(main)
