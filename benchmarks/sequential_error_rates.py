"""Measure how often the sequential verdict is wrong when it is looked at after every row, and how many calls it saves.

    python benchmarks/sequential_error_rates.py
    python benchmarks/sequential_error_rates.py --trials 500 --out runs/sequential_error_rates.json
    python benchmarks/sequential_error_rates.py --data tools --trials 1500

--data plain: simulated runs of 2,000 rows: `discordance` is the share of rows on which one model is right and the other wrong, `gap` the true mean
difference (azure - slm). Clusters of 10 rows have a correlation of 0.3 between their rows (Dirichlet-multinomial). A verdict is wrong
where it is SWAP at a gap of at least the margin, or FINE_TUNE at a gap of at most the margin. `fixed_rows` is what a paired test that
looks once needs for a power of 80% (normal approximation, times the design effect). With several metrics `gap` has one for each.

--data tools: the question is about an application's own tools, 8 or 40 with Zipf traffic as `tool_rows` makes them, on all six metrics. The
unit is the row. `level` is azure's args_exact_rate, `gap` the true difference in it over the traffic of each run's tools.
"""

import argparse
import itertools
import sys
import time
from pathlib import Path
from statistics import NormalDist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere

import numpy as np
from tool_rows import METRICS, WRONG_GOLD, Kinds, make_kinds, mixtures

from slm_swap.cli import Parser, positive, run
from slm_swap.common.reports import code_version, hardware, now, write_json
from slm_swap.common.settings import ROOT
from slm_swap.verdict.stats.betting import BETS, MIN_CLUSTERS, crossing, log_wealth_above, log_wealth_below

ALPHA, ROWS, CORRELATION = 0.05, 2000, 0.3
AT_ONCE = 200_000  # differences in memory at a time


def draw(rng: np.random.Generator, size: int, discordance: float, gaps: tuple, trials: int, clusters: int) -> np.ndarray:
    """Clusters' totals, (trials, metrics, clusters)."""
    totals = []
    for gap in gaps:
        shares = np.array([(discordance + gap) / 2, 1 - discordance, (discordance - gap) / 2])
        if size > 1:
            drawn = rng.standard_gamma(shares * (1 - CORRELATION) / CORRELATION, (trials, clusters, 3))
            shares = drawn / drawn.sum(axis=-1, keepdims=True)
        counts = rng.multinomial(size, shares, None if size > 1 else (trials, clusters))
        totals.append(counts[..., 0] - counts[..., 2])
    return np.stack(totals, axis=1).astype(float)


def stops(totals: np.ndarray, size: int, margin: float) -> tuple[np.ndarray, np.ndarray]:
    """After how many clusters of `size` rows SWAP and FINE_TUNE were certain, inf for never: (trials, metrics, clusters) to (trials,)."""
    sizes = np.full(totals.shape[-1], size)
    below = crossing(log_wealth_below(totals, sizes, margin, size), ALPHA).max(axis=1)
    above = crossing(log_wealth_above(totals, sizes, margin, size), ALPHA / totals.shape[1]).min(axis=1)
    return np.maximum(below, MIN_CLUSTERS), above


def shares(swap: np.ndarray, fine_tune: np.ndarray, clusters: int, gap: float, margin: float) -> dict:
    """Of runs that were certain after so many of the clusters: the verdicts' shares, and the calls that stopping saved."""
    asked = np.minimum(np.minimum(swap, fine_tune), clusters)
    return {
        "swap": round(float(np.mean(swap < fine_tune)), 4),
        "fine_tune": round(float(np.mean((fine_tune <= swap) & (fine_tune <= clusters))), 4),
        "swap_is_wrong": gap >= margin,
        "fine_tune_is_wrong": gap <= margin,
        "median_calls_saved": round(float(np.median(1 - asked / clusters)), 3),
    }


def measure(rng: np.random.Generator, size: int, margin: float, discordance: float, gaps: tuple, trials: int) -> dict:
    """One cell: shares of the verdicts and of the saved calls."""
    clusters = ROWS // size
    swap, fine_tune = np.empty(trials), np.empty(trials)
    step = max(1, AT_ONCE // (clusters * len(gaps)))
    for start in range(0, trials, step):
        part = slice(start, min(start + step, trials))
        swap[part], fine_tune[part] = stops(draw(rng, size, discordance, gaps, part.stop - start, clusters), size, margin)
    effect = abs(margin - gaps[0])
    z = NormalDist().inv_cdf(1 - ALPHA) + NormalDist().inv_cdf(0.8)
    design = 1 + (size - 1) * CORRELATION if size > 1 else 1
    fixed = z**2 * (discordance - gaps[0] ** 2) / effect**2 * design if effect and len(gaps) == 1 else None
    return {
        "margin": margin,
        "discordance": discordance,
        "gap": list(gaps) if len(gaps) > 1 else gaps[0],
        "cluster_size": size,
        **shares(swap, fine_tune, clusters, max(gaps), margin),
        "fixed_rows": fixed and round(fixed),
    }


def measure_tools(rng: np.random.Generator, kinds: Kinds, tools: int, level: float, margin: float, gap: float, trials: int) -> dict:
    """One cell of an application's own tools, each row its own unit."""
    of_kinds = mixtures(rng, kinds, trials, tools, 1 - level / (1 - WRONG_GOLD), gap)
    swap, fine_tune = np.empty(trials), np.empty(trials)
    step = max(1, AT_ONCE // (ROWS * len(METRICS)))
    for start in range(0, trials, step):
        part = slice(start, min(start + step, trials))
        counts = rng.multinomial(ROWS, of_kinds[part])
        every = np.tile(np.arange(counts.shape[1]), len(counts))
        rows = rng.permuted(np.repeat(every, counts.ravel()).reshape(-1, ROWS), axis=1)
        swap[part], fine_tune[part] = stops(np.moveaxis(kinds.differences[rows], -1, 1), 1, margin)
    cell = {"tools": tools, "level": level, "margin": margin, "gap": gap}
    return cell | shares(swap, fine_tune, ROWS, gap, margin)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--data", choices=("plain", "tools"), default="plain", help="rows alone and clusters, or an application's tools")
    parser.add_argument("--trials", type=positive, default=5000, help="runs of each cell")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: benchmarks/results/sequential_error_rates.json, or _tools.json")
    parser.add_seed()
    return parser.parse_args(argv)


def plain_cells(rng: np.random.Generator, trials: int) -> list[dict]:
    one_metric = itertools.product((1, 10), (0.02, 0.05), (0.05, 0.1, 0.2, 0.4), (0, 0.5, 1, 2))
    plan = [
        (size, margin, discordance, (times * margin,))
        for size, margin, discordance, times in one_metric
        if times * margin <= discordance  # no larger gap without more rows that differ
    ]
    plan += [(1, 0.05, 0.2, gaps) for gaps in ((0.05,) * 6, (0.05, *(0.0,) * 5), (0.0,) * 6)]
    cells = []
    print(f"{'rows a cluster':>14} {'margin':>6} {'discordance':>11} {'gap':>18} {'SWAP':>7} {'FINE_TUNE':>9} {'saved':>6} {'fixed_rows':>10}")
    for size, margin, discordance, gaps in plan:
        cells.append(cell := measure(rng, size, margin, discordance, gaps, trials))
        gap = f"{gaps[0]:g}" if len(gaps) == 1 else "6 metrics, " + "/".join(f"{gap:g}" for gap in sorted(set(gaps)))
        print(f"{size:14} {margin:6g} {discordance:11g} {gap:>18} {rates(cell)} {cell['fixed_rows'] or '-':>10}", flush=True)
    return cells


def tool_cells(rng: np.random.Generator, trials: int) -> list[dict]:
    cells, kinds = [], make_kinds()
    print(f"{'tools':>5} {'level':>5} {'margin':>6} {'gap':>5} {'SWAP':>7} {'FINE_TUNE':>9} {'saved':>6}")
    for tools, level, margin, times in itertools.product((8, 40), (0.87, 0.93), (0.02, 0.05), (0, 1, 2)):
        cells.append(cell := measure_tools(rng, kinds, tools, level, margin, times * margin, trials))
        print(f"{tools:5} {level:5g} {margin:6g} {cell['gap']:5g} {rates(cell)}", flush=True)
    return cells


def rates(cell: dict) -> str:
    swap, fine_tune = (f"{cell[name]:.4f}{'!' * cell[f'{name}_is_wrong']}" for name in ("swap", "fine_tune"))
    return f"{swap:>7} {fine_tune:>9} {cell['median_calls_saved']:6.1%}"


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    rng, started = np.random.default_rng(args.seed), time.perf_counter()
    cells = (plain_cells if args.data == "plain" else tool_cells)(rng, args.trials)
    highest = {name: max(cell[name] for cell in cells if cell[f"{name}_is_wrong"]) for name in ("swap", "fine_tune")}
    print(f"!: wrong there, alpha {ALPHA}; the highest: SWAP {highest['swap']}, FINE_TUNE {highest['fine_tune']}")
    report = {
        "created_at": now(),
        "code": code_version(),
        "hardware": hardware(),
        "seed": args.seed,
        "seconds": round(time.perf_counter() - started, 1),
        "settings": {
            "alpha": ALPHA,
            "rows": ROWS,
            "trials": args.trials,
            "correlation": CORRELATION,
            "bets": [round(float(bet), 4) for bet in BETS],
        },
        "highest_error_rates": highest,
        "cells": cells,
    }
    name = "sequential_error_rates.json" if args.data == "plain" else "sequential_error_rates_tools.json"
    write_json(args.out or ROOT / "benchmarks/results" / name, report)
    return 0


if __name__ == "__main__":
    run(main)
