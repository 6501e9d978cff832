"""Simulate whether the intervals of the tools hold for the tool that is shown worst, and the test of "the tools differ": no model is run.

    python benchmarks/worst_tools.py
    python benchmarks/worst_tools.py --trials 40 --out /tmp/worst_tools.json

Rows as `tool_rows` makes them, in the shapes of `SHAPES`: number of tools, rows, azure's error rate and the gap before 5% of the references
are wrong, concentration of the tools' error rates (3: strongly unlike, None: all alike). The true gap of a tool is that of its own two
rates, as it is measured. `worst`: the share of trials in which the interval (level 0.9) of the tool with the largest shrunken gap, or
with the largest gap as measured, held its true gap. `all`: in which every tool's did.

The test at level 0.05: `differ` is its power in those shapes. `SAME` has tools that are unequally hard and have the same gap, where it is the error.
`ends` is no simulation: over every outcome of n rows and a grid of truths, the largest probability that an end of one tool's interval
is missed, as a multiple of its level.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere

import numpy as np
from tool_rows import CONCENTRATION, WRONG_GOLD, four_cases, tool_errors, zipf

from slm_swap.cli import Parser, positive, run
from slm_swap.common.reports import code_version, hardware, now, write_json
from slm_swap.common.settings import ROOT, display_path
from slm_swap.verdict.stats.shrink import shrink
from slm_swap.verdict.stats.simultaneous import difference_limits, p_same

ALPHA = 0.05
SHAPES = (  # tools, rows, azure's error rate, gap, concentration
    (8, 200, 0.05, 0.03, CONCENTRATION),
    (8, 1000, 0.05, 0.03, CONCENTRATION),
    (40, 200, 0.05, 0.03, CONCENTRATION),
    (40, 1000, 0.05, 0.03, CONCENTRATION),
    (3, 200, 0.05, 0.03, CONCENTRATION),
    (8, 200, 0.02, 0.0, CONCENTRATION),
    (40, 1000, 0.05, 0.03, 3.0),
    (8, 100, 0.002, 0.03, 3.0),
    (40, 1000, 0.05, 0.03, None),
)
SAME = tuple(  # tools, rows, error rates' mean, gap, concentration
    (tools, rows, 0.08, gap, concentration)
    for tools, rows in ((3, 200), (8, 1000), (40, 200), (40, 1000))
    for gap in (0.0, 0.05)
    for concentration in (CONCENTRATION, 3.0)
)
ROWS = (1, 2, 3, 5, 8, 12, 20, 40, 80, 150)
LEVELS = tuple(ALPHA / tools for tools in (1, 3, 8, 40))
TRUTHS = (1e-4, 1e-3, 0.003, 0.01, 0.02, 0.03, *np.arange(0.05, 1, 0.05).round(2))


def draw(rng: np.random.Generator, rows: int, azure: np.ndarray, slm: np.ndarray) -> tuple[list[list[float]], np.ndarray]:
    """The tools that came up: the differences of each one's rows, and its true gap."""
    cases = four_cases(azure, slm)
    up, down = (1 - WRONG_GOLD) * cases[:, 2], (1 - WRONG_GOLD) * cases[:, 1]  # wrong references: both miss
    sizes = rng.multinomial(rows, zipf(len(azure)))
    counts = rng.multinomial(sizes, np.stack([up, down, 1 - up - down], axis=-1))
    groups = [np.repeat([1.0, -1.0, 0.0], count).tolist() for count in counts[sizes > 0]]
    return groups, (up - down)[sizes > 0]


def coverage(rng: np.random.Generator, shape: tuple, trials: int) -> dict:
    tools, rows, error, gap, concentration = shape
    worst, worst_raw, every, differ, widths, shown = [], [], [], [], [], []
    for _ in range(trials):
        groups, true = draw(rng, rows, *tool_errors(rng, (tools,), error, gap, concentration))
        found = shrink(groups, ALPHA)
        held = [one.low <= gap <= one.high for one, gap in zip(found.groups, true, strict=True)]
        at = max(range(len(held)), key=lambda tool: found.groups[tool].shrunk)
        worst.append(held[at])
        worst_raw.append(held[max(range(len(held)), key=lambda tool: found.groups[tool].raw)])
        every.append(all(held))
        differ.append(found.p_same <= ALPHA)
        widths.append(found.groups[at].high - found.groups[at].low)
        shown.append(len(groups[at]))
    return {
        "tools": tools, "rows": rows, "error": error, "gap": gap, "concentration": concentration,
        "worst": np.mean(worst), "worst_as_measured": np.mean(worst_raw), "all": np.mean(every),
        "median_width_of_worst": np.median(widths), "median_rows_of_worst": np.median(shown), "differ": np.mean(differ),
    }  # fmt: skip


def same_gap(rng: np.random.Generator, shape: tuple, trials: int) -> dict:
    """How often the tools are said to differ where only how hard they are does."""
    tools, rows, error, gap, concentration = shape
    found = []
    for _ in range(trials):
        azure, _ = tool_errors(rng, (tools,), error, gap, concentration)
        azure = np.minimum(azure, 0.9)  # room for the gap
        found.append(p_same(draw(rng, rows, azure, azure + gap)[0]) <= ALPHA)
    return {"tools": tools, "rows": rows, "error": error, "gap": gap, "concentration": concentration, "differ": np.mean(found)}


def missed(rows: int, level: float) -> dict:
    """Over all truths of `TRUTHS`: the largest probabilities that one end, and that either, misses the true gap, over their levels."""
    from scipy.special import gammaln

    up, down = (grid.ravel().astype(float) for grid in np.meshgrid(np.arange(rows + 1), np.arange(rows + 1)))
    up, down = up[up + down <= rows], down[up + down <= rows]
    equal = rows - up - down
    ways = gammaln(rows + 1) - gammaln(up + 1) - gammaln(down + 1) - gammaln(equal + 1)
    low, high = difference_limits(up, down, np.full(len(up), float(rows)), level)
    one, either = 0.0, 0.0
    for p in TRUTHS:
        for q in (q for q in TRUTHS if p + q < 1):
            chance = np.exp(ways + up * np.log(p) + down * np.log(q) + equal * np.log(1 - p - q))
            sides = chance[high < p - q - 1e-12].sum(), chance[low > p - q + 1e-12].sum()
            one, either = max(one, *sides), max(either, sum(sides))
    return {"rows": rows, "level": level, "one_end": one / level, "either_end": either / (2 * level)}


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=positive, default=500, help="simulated evaluations of each shape (default: 500)")
    parser.add_argument("--out", type=Path, metavar="FILE", default=ROOT / "benchmarks/results/worst_tools.json")
    parser.add_seed()
    args = parser.parse_args(argv)
    started, rng, shapes, same = time.perf_counter(), np.random.default_rng(args.seed), [], []
    for shape in SHAPES:
        shapes.append(coverage(rng, shape, args.trials))
        print("coverage", {name: value and round(float(value), 4) for name, value in shapes[-1].items()}, flush=True)
    for shape in SAME:
        same.append(same_gap(rng, shape, args.trials))
        print("same gap", {name: round(float(value), 4) for name, value in same[-1].items()}, flush=True)
    ends = [missed(rows, level) for rows in ROWS for level in LEVELS]
    summary = {
        "worst_tool_covered": {"min": min(cell["worst"] for cell in shapes), "level": 1 - 2 * ALPHA},
        "worst_as_measured_covered": {"min": min(cell["worst_as_measured"] for cell in shapes)},
        "all_tools_covered": {"min": min(cell["all"] for cell in shapes)},
        "said_to_differ_though_the_gap_is_the_same": {"max": max(cell["differ"] for cell in same), "level": ALPHA},
        "end_missed_over_its_level": {"max": max(cell["one_end"] for cell in ends)},
    }
    report = {
        "simulated": "rows drawn at random; no model was run", "created_at": now(), "code": code_version(), "hardware": hardware(),
        "seed": args.seed, "alpha": ALPHA, "trials": args.trials, "seconds": round(time.perf_counter() - started, 1),
        "summary": rounded(summary), "shapes": rounded(shapes), "same": rounded(same), "ends": rounded(ends),
    }  # fmt: skip
    write_json(args.out, report)
    print(rounded(summary))
    print(f"report: {display_path(args.out)}")
    return 0


def rounded(value):
    """The same with numbers of five digits, as JSON can hold them."""
    if isinstance(value, dict):
        return {name: rounded(own) for name, own in value.items()}
    if isinstance(value, list):
        return [rounded(own) for own in value]
    return round(float(value), 5) if isinstance(value, float) else value


if __name__ == "__main__":
    run(main)
