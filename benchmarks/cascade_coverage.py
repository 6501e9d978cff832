"""How often a calibrated cascade misses its target, and how much it answers locally: simulated, no model is run.

    python benchmarks/cascade_coverage.py
    python benchmarks/cascade_coverage.py --trials 500 --out /tmp/coverage.json

Replies are drawn: 5% are unfit, `rate` are losses if all that is fit is answered locally, and a signal of confidence is normal, `d` standard
deviations higher where there is no loss (informative: 1.5; useless: 0; tied: 1.5, in steps of 0.8). The rule is that of `verdict.calibration`:
its thresholds are worked out here for many draws at once, and in each cell compared with `stats.regret` itself. The true regret of each rule
is known, not drawn. Designs, each with n independent units:

- rows: one class, a unit is a row;
- classes: two classes (70% and 30% of the rows, with 0.8 and 1.47 times the rate, d 1.5 and 0.8), which share alpha; missed where either is;
- groups: units of 1 to 5 rows, losses correlated in a unit (beta-binomial, intra-unit correlation 0.3); `rate` is a row's;
- signals: one class, four signals (d 0, 0.5, 1 and 1.5 times the kind's / 1.5), chosen on n / 2 validation rows.
"""

import argparse
import math
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere

from slm_swap.cli import Parser, positive, run
from slm_swap.common.reports import code_version, hardware, now, write_json
from slm_swap.common.settings import ROOT, display_path
from slm_swap.verdict.stats.regret import LEAST_LOCAL, is_shown, loosest, most_losses, rungs

DELTA, ALPHA, UNFIT, STEP, CORRELATION, MOST_ROWS = 0.02, 0.05, 0.05, 0.8, 0.3, 5
UNITS, RATES, KINDS = (150, 300, 600, 2000), (0.01, 0.03, 0.1), {"informative": 1.5, "useless": 0.0, "tied": 1.5}
DESIGNS = ("rows", "classes", "groups", "signals")
CHUNK, COMPARED = 500, 3  # trials in memory at a time; trials of a cell that are compared with the rule itself


class Draws(NamedTuple):
    """Rows of many trials: `values` of the signal (trials, units, rows in a unit), -inf where a reply is unfit, no reply of the class, or not
    there; `lost`, whether it is a loss if it is answered locally."""

    values: np.ndarray
    lost: np.ndarray


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--trials", type=positive, default=5_000, help="calibrations in each cell")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/cascade_coverage.json", help="where the figures go")
    parser.add_seed()
    return parser.parse_args(argv)


# -- Draws -----------------------------------------------------------------------------------------------------------------------


def draw(rng: np.random.Generator, shape: tuple[int, int, int], rate: float | np.ndarray, d: float, tied: bool) -> Draws:
    """Rows of one class."""
    fate = rng.random(shape)
    lost = fate < rate
    values = rng.standard_normal(shape) + d * ~lost
    values = np.floor(values / STEP) * STEP if tied else values
    return Draws(np.where(fate >= 1 - UNFIT, -np.inf, values), lost)


def draw_groups(rng: np.random.Generator, trials: int, units: int, rate: float, d: float, tied: bool) -> Draws:
    """Units of 1 to MOST_ROWS rows that share a chance of being lost."""
    strength = 1 / CORRELATION - 1
    shared = rng.beta(rate * strength, (1 - rate) * strength, (trials, units, 1))
    found = draw(rng, (trials, units, MOST_ROWS), np.minimum(shared, 1 - UNFIT), d, tied)
    there = np.arange(MOST_ROWS) < rng.integers(1, MOST_ROWS + 1, (trials, units, 1))
    return Draws(np.where(there, found.values, -np.inf), found.lost & there)


def above(threshold: np.ndarray, d: float) -> np.ndarray:
    """The chance that a signal is at least the threshold (in steps of STEP where it is tied, so that the rounding changes nothing)."""
    from scipy.special import ndtr

    return ndtr(d - threshold)


GRID = np.linspace(0, 1, 201)


@cache
def group_regret(rate: float) -> np.ndarray:
    """The chance that a group has a loss, where a lost row is local with a chance of GRID: over the quantiles of the units' own chances."""
    from scipy.stats import beta

    strength = 1 / CORRELATION - 1
    chances = np.minimum(beta.ppf((np.arange(20_000) + 0.5) / 20_000, rate * strength, (1 - rate) * strength), 1 - UNFIT)
    kept = [np.mean((1 - np.outer(GRID, chances)) ** size, axis=1) for size in range(1, MOST_ROWS + 1)]
    return 1 - np.mean(kept, axis=0)


def lost_units(threshold: np.ndarray, rate: float) -> np.ndarray:
    """The true regret of groups at a threshold."""
    return np.interp(above(threshold, 0.0), GRID, group_regret(rate))


# -- The rule, for many trials at once -------------------------------------------------------------------------------------------


@cache
def allowed(units: int, alpha: float) -> int:
    return most_losses(units, DELTA, alpha)


def thresholds(draws: Draws, most: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(threshold, rows and units that are answered locally) of the loosest rule with at most `most` losses, a trial each; inf where there is none."""
    last = np.sort(np.where(draws.lost, draws.values, -np.inf).max(2), axis=1)[:, ::-1]  # the threshold at which each unit is lost
    units = last.shape[1]
    border = np.where(most < 0, np.inf, np.take_along_axis(last, np.clip(most, 0, units - 1)[:, None], 1)[:, 0])
    flat = draws.values.reshape(len(last), -1)
    found = np.where((flat > border[:, None]) & np.isfinite(flat), flat, np.inf).min(1)
    local = draws.values >= found[:, None, None]
    return found, (local & np.isfinite(draws.values)).sum((1, 2)), (local.any(2)).sum(1) * np.isfinite(found)


def rule(draws: Draws, units: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """The threshold of each trial, inf where nothing is certified; `units` of the class and its `alpha`, a trial each."""
    most = np.array([allowed(int(count), float(level)) for count, level in zip(units, alpha, strict=True)])
    found, _, local = thresholds(draws, most)
    return np.where(local >= LEAST_LOCAL, found, np.inf)


def check(draws: Draws, units: np.ndarray, alpha: np.ndarray, found: np.ndarray) -> None:
    """That the thresholds are those of `stats.regret`, in the first trials."""
    for at in range(min(COMPARED, len(found))):
        fit = np.isfinite(draws.values[at])
        unit = np.broadcast_to(np.arange(fit.shape[0])[:, None], fit.shape)
        chosen = loosest(rungs(draws.values[at][fit], draws.lost[at][fit], unit[fit]), int(units[at]), DELTA, float(alpha[at]))
        if (math.inf if chosen is None else chosen.threshold) != found[at]:
            raise AssertionError(f"the thresholds differ: {chosen} and {found[at]}")


def choose(rng: np.random.Generator, validation: list[Draws]) -> np.ndarray:
    """Which signal is chosen in each trial: as `calibration.choose_signal`, the last where several do as well."""
    trials, count = validation[0].values.shape[:2]
    worth = []
    for draws in validation:
        _, certified, local = thresholds(draws, np.full(trials, allowed(count, ALPHA)))
        _, kept, _ = thresholds(draws, np.full(trials, math.floor(DELTA * count)))
        worth.append(np.where(local >= LEAST_LOCAL, certified, 0) * (count + 1) + kept)
    return len(worth) - 1 - np.argmax(np.array(worth)[::-1], axis=0)


# -- Cells -----------------------------------------------------------------------------------------------------------------------


def trial(rng: np.random.Generator, design: str, trials: int, n: int, rate: float, d: float, tied: bool) -> tuple[np.ndarray, np.ndarray]:
    """(whether the true regret is above the target, the true share that is answered locally), a trial each."""
    whole = np.full(trials, ALPHA)
    if design == "classes":
        missed, share = np.zeros(trials, bool), np.zeros(trials)
        first = rng.random((trials, n, 1)) < 0.7
        counts = [first.sum((1, 2)), n - first.sum((1, 2))]
        both = np.array([all(count >= LEAST_LOCAL and is_shown(0, count, DELTA, ALPHA / 2) for count in pair) for pair in zip(*counts, strict=True)])
        for at, (part, times, own) in enumerate(((0.7, 0.8, d), (0.3, 0.44 / 0.3, d * 0.8 / 1.5))):
            drawn = draw(rng, (trials, n, 1), times * rate, own, tied)
            mine = first if at == 0 else ~first
            draws = Draws(np.where(mine, drawn.values, -np.inf), drawn.lost & mine)
            alpha = np.where(both, ALPHA / 2, whole)
            tested = both | (counts[at] >= counts[1 - at])
            found = np.where(tested, rule(draws, counts[at], alpha), np.inf)
            check(draws, counts[at], np.where(tested, alpha, 1e-12), found)
            missed |= times * rate * above(found, 0.0) > DELTA
            share += part * (times * rate * above(found, 0.0) + (1 - UNFIT - times * rate) * above(found, own))
        return missed, share
    if design == "signals":
        ds = [d * part for part in (0, 1 / 3, 2 / 3, 1)]
        chosen = choose(rng, [draw(rng, (trials, n // 2, 1), rate, own, tied) for own in ds])
        found, own = np.full(trials, np.inf), np.array(ds)[chosen]
        for at, one in enumerate(ds):
            draws = draw(rng, (trials, n, 1), rate, one, tied)
            found = np.where(chosen == at, rule(draws, np.full(trials, n), whole), found)
        return rate * above(found, 0.0) > DELTA, rate * above(found, 0.0) + (1 - UNFIT - rate) * above(found, own)
    draws = draw_groups(rng, trials, n, rate, d, tied) if design == "groups" else draw(rng, (trials, n, 1), rate, d, tied)
    found = rule(draws, np.full(trials, n), whole)
    check(draws, np.full(trials, n), whole, found)
    regret = lost_units(found, rate) if design == "groups" else rate * above(found, 0.0)
    return regret > DELTA, rate * above(found, 0.0) + (1 - UNFIT - rate) * above(found, d)


def cell(rng: np.random.Generator, design: str, trials: int, n: int, rate: float, kind: str) -> dict:
    """One cell's figures."""
    parts = [trial(rng, design, min(CHUNK, trials - done), n, rate, KINDS[kind], kind == "tied") for done in range(0, trials, CHUNK)]
    missed, share = (np.concatenate(part) for part in zip(*parts, strict=True))
    rate_missed = float(missed.mean())
    return {
        "design": design, "units": n, "rate": rate, "confidence": kind, "missed": rate_missed,
        "standard_error": math.sqrt(rate_missed * (1 - rate_missed) / trials), "certified": float((share > 0).mean()), "share_local": float(share.mean()),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    rng, cells = np.random.default_rng(args.seed), []
    for design in DESIGNS:
        for n in UNITS:
            for rate in RATES:
                for kind in KINDS:
                    found = cell(rng, design, args.trials, n, rate, kind)
                    cells.append(found)
                    print(f"{design:8} {n:5} units, losses {rate:4.0%}, {kind:11}: missed {found['missed']:.4f}, certified {found['certified']:6.1%}, local {found['share_local']:6.1%}")
    worst = max(cells, key=lambda found: found["missed"])
    above_alpha = [found for found in cells if found["missed"] > ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / args.trials)]
    print(f"worst cell: missed {worst['missed']:.4f} at alpha {ALPHA}, standard error {worst['standard_error']:.4f}; above alpha by 3 of them: {len(above_alpha)} of {len(cells)}")
    write_json(args.out, {
        "made_by": "benchmarks/cascade_coverage.py", "created_at": now(), "code": code_version(), "hardware": hardware(), "simulated": True,
        "delta": DELTA, "alpha": ALPHA, "trials": args.trials, "seed": args.seed, "unfit": UNFIT, "worst": worst, "above_alpha_by_3_standard_errors": len(above_alpha), "cells": cells,
    })  # fmt: skip
    print(f"figures: {display_path(args.out)}")
    return 0


if __name__ == "__main__":
    run(main)
