"""Measure how often the sequential verdict is wrong when it is looked at after every row, and how many calls it saves.

    python benchmarks/sequential_error_rates.py
    python benchmarks/sequential_error_rates.py --trials 500 --out runs/sequential_error_rates.json

Simulated runs of 2,000 rows: `discordance` is the share of rows on which one model is right and the other wrong, `gap` the true mean
difference (azure - slm). Clusters of 10 rows have a correlation of 0.3 between their rows (Dirichlet-multinomial). A verdict is wrong
where it is SWAP at a gap of at least the margin, or FINE_TUNE at a gap of at most the margin. `fixed_rows` is what a paired test that
looks once needs for a power of 80% (normal approximation, times the design effect). With several metrics `gap` has one for each.
"""

import argparse
import itertools
import sys
import time
from pathlib import Path
from statistics import NormalDist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere

import numpy as np

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


def measure(rng: np.random.Generator, size: int, margin: float, discordance: float, gaps: tuple, trials: int) -> dict:
    """One cell: shares of the verdicts and of the saved calls."""
    clusters, sizes = ROWS // size, np.full(ROWS // size, size)
    swap, fine_tune = np.empty(trials), np.empty(trials)
    step = max(1, AT_ONCE // (clusters * len(gaps)))
    for start in range(0, trials, step):
        part = slice(start, min(start + step, trials))
        totals = draw(rng, size, discordance, gaps, part.stop - start, clusters)
        below = crossing(log_wealth_below(totals, sizes, margin, size), ALPHA)
        above = crossing(log_wealth_above(totals, sizes, margin, size), ALPHA / len(gaps))
        swap[part], fine_tune[part] = np.maximum(below.max(axis=1), MIN_CLUSTERS), above.min(axis=1)
    asked = np.minimum(np.minimum(swap, fine_tune), clusters)
    effect = abs(margin - gaps[0])
    z = NormalDist().inv_cdf(1 - ALPHA) + NormalDist().inv_cdf(0.8)
    design = 1 + (size - 1) * CORRELATION if size > 1 else 1
    fixed = z**2 * (discordance - gaps[0] ** 2) / effect**2 * design if effect and len(gaps) == 1 else None
    return {
        "margin": margin,
        "discordance": discordance,
        "gap": list(gaps) if len(gaps) > 1 else gaps[0],
        "cluster_size": size,
        "swap": round(float(np.mean(swap < fine_tune)), 4),
        "fine_tune": round(float(np.mean((fine_tune <= swap) & (fine_tune <= clusters))), 4),
        "swap_is_wrong": max(gaps) >= margin,
        "fine_tune_is_wrong": max(gaps) <= margin,
        "median_calls_saved": round(float(np.median(1 - asked / clusters)), 3),
        "fixed_rows": fixed and round(fixed),
    }


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--trials", type=positive, default=5000, help="runs of each cell")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: benchmarks/results/sequential_error_rates.json")
    parser.add_seed()
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    rng, started = np.random.default_rng(args.seed), time.perf_counter()
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
        cells.append(cell := measure(rng, size, margin, discordance, gaps, args.trials))
        gap = f"{gaps[0]:g}" if len(gaps) == 1 else "6 metrics, " + "/".join(f"{gap:g}" for gap in sorted(set(gaps)))
        swap, fine_tune = (f"{cell[name]:.4f}{'!' * cell[f'{name}_is_wrong']}" for name in ("swap", "fine_tune"))
        print(
            f"{size:14} {margin:6g} {discordance:11g} {gap:>18} {swap:>7} {fine_tune:>9} {cell['median_calls_saved']:6.1%} "
            f"{cell['fixed_rows'] or '-':>10}",
            flush=True,
        )
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
    write_json(args.out or ROOT / "benchmarks/results/sequential_error_rates.json", report)
    return 0


if __name__ == "__main__":
    run(main)
