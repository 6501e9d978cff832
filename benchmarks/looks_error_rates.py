"""How often a loop of looks at the same rows ends in a false SWAP, with and without the ledger's shares, and what the shares cost.

    python benchmarks/looks_error_rates.py
    python benchmarks/looks_error_rates.py --trials 2000 --out /tmp/looks.json

Nothing is measured on a model: rows are drawn, and decided on by the tests of `verdict.stats.score` (Tango's, one yes-no metric: with more
of them SWAP is rarer) and the shares of `verdict.looks`. Every model that might be a false SWAP lies just at the margin. The loops:

- collect: one model; whoever is told NEED_MORE_DATA collects `need.rows` further rows (at most 5,000 at a time) and looks again;
- double: the same, with twice the rows each time;
- adapters: five models, all at the margin, on one test split;
- documented: a base model far below the margin, then adapters: the first two on the same rows, the second then on more rows, twice.

`rows` compares what 80% power takes for equal models: at a single look with the whole alpha, and at the ledger's first look.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere

from slm_swap.cli import Parser, positive, run
from slm_swap.common.reports import code_version, hardware, now, write_json
from slm_swap.common.settings import ROOT, display_path
from slm_swap.verdict.decision import POWER
from slm_swap.verdict.looks import share
from slm_swap.verdict.stats.score import statistics, tilted_variance

ALPHA, LOOKS, MOST = 0.05, 5, 5000
LOOPS = ("collect", "double", "adapters", "documented")
CELLS = [(delta, miss, n) for delta in (0.02, 0.05) for miss in (0.03, 0.08) for n in (200, 500)]  # margin, hosted misses, rows


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--trials", type=positive, default=10_000, help="loops in each cell")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/looks_error_rates.json", help="where the figures go")
    parser.add_seed()
    return parser.parse_args(argv)


def draw(rng: np.random.Generator, n: np.ndarray, miss: float, gap: float, shared: float = 0.5) -> np.ndarray:
    """Rows on which azure is better, equal and slm better, (trials, 3), for n rows in each trial: azure misses `miss` of them, the small
    model `gap` more, and of azure's misses the small model shares `shared`."""
    both = shared * miss
    better, worse = miss + gap - both, miss - both
    return rng.multinomial(n.astype(int), [better, 1 - better - worse, worse])


def score(counts: np.ndarray, delta: float) -> np.ndarray:
    """Tango's signed statistic against the margin, a trial each."""
    y = np.array([1.0, 0.0, -1.0]) - delta
    return statistics(y, np.ones(3), counts, -1 - delta, 1 - delta, exact=True)


def further(counts: np.ndarray, delta: float, alpha: float) -> np.ndarray:
    """`need.rows` of each trial, as `decision.rows_needed` has it for one metric, at most MOST."""
    from scipy.special import ndtri

    n, mean = counts.sum(1), (counts[:, 0] - counts[:, 2]) / counts.sum(1)
    toward = np.where(mean > delta, ALPHA, alpha)
    spread = (counts[:, 0] + counts[:, 2]) / n - mean**2
    under = tilted_variance(np.array([1.0, 0.0, -1.0]) - delta, counts, -1 - delta, 1 - delta)
    needed = -ndtri(toward) * np.sqrt(under) + ndtri(POWER) * np.sqrt(spread)
    with np.errstate(divide="ignore"):
        total = np.ceil((needed / (delta - mean)) ** 2)
    return np.clip(total - n, 1, MOST)


def loop(name: str, rng: np.random.Generator, trials: int, delta: float, miss: float, n: int, gap: float, ledger: bool) -> dict[str, Any]:
    """Shares of the trials that had ended in SWAP after each look, and the rows that they had collected by then, on average."""
    from scipy.special import ndtri

    open_, swapped, counted = np.ones(trials, bool), np.zeros(trials, bool), np.zeros(trials, int)
    rows = np.full(trials, n)
    if name == "documented":  # its base model is FINE_TUNE in every trial, which does not count: checked here
        assert (score(draw(rng, rows, miss, 0.4), delta) >= -ndtri(ALPHA)).mean() > 0.999
    counts, ends = draw(rng, rows, miss, gap), []
    for look in range(LOOKS if name != "documented" else LOOKS - 1):
        if look and (name == "adapters" or (name == "documented" and look == 1)):
            counts = redraw_small(rng, counts, miss, gap)
        alpha = ALPHA * np.array([share(number + 1) for number in range(LOOKS + 1)])[counted] if ledger else np.full(trials, ALPHA)
        value = score(counts, delta)
        swap = open_ & (value <= ndtri(alpha))
        worse = open_ & ~swap & (value >= -ndtri(ALPHA))
        swapped |= swap
        open_ &= ~swap if name == "adapters" else ~(swap | worse)
        counted += ~worse
        ends.append(float(swapped.mean()))
        if name in ("collect", "double") or (name == "documented" and look >= 1):
            more = rows if name == "double" else further(counts, delta, float(ALPHA * share(2)) if ledger else ALPHA)
            more = np.where(open_, np.minimum(more, MOST), 0).astype(int)
            counts, rows = counts + draw(rng, more, miss, gap), rows + more
    return {"false_swap" if gap >= delta else "swap": ends, "rows": float(rows.mean())}


def redraw_small(rng: np.random.Generator, counts: np.ndarray, miss: float, gap: float) -> np.ndarray:
    """Another small model of the same quality on the same rows: azure's replies stay, the small model's are drawn anew."""
    n = counts.sum(1)
    missed = rng.binomial(n, miss)  # azure's own misses, which the tables do not hold apart
    share_of_missed = 0.5
    slm_better = rng.binomial(missed, 1 - share_of_missed)
    better_rate = (miss + gap - share_of_missed * miss) / (1 - miss)
    azure_better = rng.binomial(n - missed, better_rate)
    return np.stack([azure_better, n - azure_better - slm_better, slm_better], 1)


def rows_for_power(rng: np.random.Generator, trials: int, delta: float, miss: float, alpha: float) -> int:
    """The least number of rows (to 1%) at which equal models are a SWAP with 80% power."""
    from scipy.special import ndtri

    low, high = 20, 20_000
    while high - low > max(1, low // 100):
        n = (low + high) // 2
        power = (score(draw(rng, np.full(trials, n), miss, 0.0), delta) <= ndtri(alpha)).mean()
        low, high = (low, n) if power >= POWER else (n, high)
    return high


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    rng, cells = np.random.default_rng(args.seed), []
    for delta, miss, n in CELLS:
        for name in LOOPS:
            for gap in (delta, 0.0):
                told = {way: loop(name, rng, args.trials, delta, miss, n, gap, ledger=way == "ledger") for way in ("ledger", "without")}
                cells.append({"loop": name, "delta": delta, "azure_misses": miss, "rows": n, "gap": gap} | told)
                print(f"{name:10} margin {delta:.2f} misses {miss:.2f} rows {n:4} gap {gap:.2f}: " + "; ".join(
                    f"{way} {ends[-1]:.4f}, {found['rows']:,.0f} rows" for way, found in told.items() for ends in [next(iter(found.values()))]
                ))
    costs = []
    for delta, miss in sorted({(delta, miss) for delta, miss, _ in CELLS}):
        single, first = (rows_for_power(rng, args.trials, delta, miss, level) for level in (ALPHA, ALPHA * share(1)))
        costs.append({"delta": delta, "azure_misses": miss, "single_look": single, "first_look": first, "ratio": first / single})
        print(f"80% power, margin {delta:.2f}, misses {miss:.2f}: {single} rows at a single look, {first} at the ledger's first")
    worst = max(cell["ledger"]["false_swap"][-1] for cell in cells if cell["gap"] == cell["delta"])
    print(f"worst cell: {worst:.4f} false SWAP with the ledger, standard error {math.sqrt(worst * (1 - worst) / args.trials):.4f}")
    write_json(args.out, {
        "made_by": "benchmarks/looks_error_rates.py", "created_at": now(), "code": code_version(), "hardware": hardware(), "simulated": True,
        "alpha": ALPHA, "trials": args.trials, "seed": args.seed, "shares": [share(number + 1) for number in range(LOOKS)],
        "worst_false_swap": worst, "cells": cells, "rows": costs,
    })  # fmt: skip
    print(f"figures: {display_path(args.out)}")
    return 0


if __name__ == "__main__":
    run(main)
