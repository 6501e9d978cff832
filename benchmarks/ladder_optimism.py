"""How often the ladder keeps what does not help, finds what does, and promises more than the test split will show.

    python benchmarks/ladder_optimism.py
    python benchmarks/ladder_optimism.py --trials 500 --out /tmp/ladder.json

Nothing is measured on a model: the rows of each rung are drawn, and climbed by `tuning.ladder` itself. A row is right where a hidden
difficulty, shared by all settings (correlation RHO; rows of a group share a part of it), lies below the setting's accuracy. The scenarios:

- useless: no rung changes anything;
- some: of eight rungs one gains 10 points, one 5, one 3, one loses 5, and four change nothing;
- harm: every rung loses 3 points.

`kept_useless`: how often a rung that gains nothing (or loses) stays, on average over such rungs. `power`: how often each true gain stays. `bound_holds`: how often the
true gain of every rung of a ladder, over the setting that held then, is at least the lower end of its interval. `promised`, `true`: the
gain of the ladder's last setting over its first, as seen on the validation rows and in truth.
"""

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere

from slm_swap.cli import Parser, positive, run
from slm_swap.clients.pricing import Prices
from slm_swap.common.reports import code_version, hardware, now, write_json
from slm_swap.common.settings import ROOT, display_path
from slm_swap.scoring.tracks import TRACKS
from slm_swap.tuning.ladder import STAYS, Ladder, Measured, Rung, Setting
from slm_swap.verdict.evaluations import Evaluation

ALPHA, BASE, RHO, SHARED = 0.05, 0.6, 0.8, 0.3  # error rate, first accuracy, correlations between settings and within a group
SCENARIOS = {
    "useless": [0.0] * 8,
    "some": [0.0, 0.03, 0.0, 0.1, 0.0, 0.05, -0.05, 0.0],
    "harm": [-0.03] * 8,
}
CELLS = [(name, rows, size) for name in SCENARIOS for rows in (100, 200, 500) for size in (1, 4)]  # rows of validation, rows a group
TRACK = TRACKS["structured"]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--trials", type=positive, default=2000, help="ladders in each cell")
    parser.add_argument("--processes", type=positive, default=1, help="cells at a time")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/ladder_optimism.json", help="where the figures go")
    parser.add_seed()
    return parser.parse_args(argv)


class Drawn(Ladder):
    """A ladder whose evaluations are drawn: settings are the numbers of the rungs that stayed."""

    def __init__(self, rng: np.random.Generator, gains: list[float], rows: int, size: int):
        plan = [Rung(str(number), "drawn", "", lambda setting, _, number=number: setting | {str(number): True}) for number in range(len(gains))]
        super().__init__(Path(), "structured", {}, plan, [], None, None, 0.05, ALPHA, Prices("none"), str)
        self.rng, self.gains, self.groups, self.found = rng, gains, np.arange(rows) // size, []
        shared = rng.standard_normal(self.groups[-1] + 1)[self.groups] if size > 1 else rng.standard_normal(rows)
        self.hidden = np.sqrt(SHARED) * shared + np.sqrt(1 - SHARED) * rng.standard_normal(rows)

    def accuracy(self, setting: Setting) -> float:
        return BASE + sum(self.gains[int(name)] for name in setting)

    def _measure(self, name: str, setting: Setting, preset: str | None, kept: dict[str, Any]) -> Measured:
        from scipy.special import ndtri

        noise = np.sqrt(RHO) * self.hidden + np.sqrt(1 - RHO) * self.rng.standard_normal(len(self.hidden))
        right = noise < ndtri(self.accuracy(setting))
        rows = [
            {"id": at, "group": f"g{group}", "tool": "", "reference": "", "scores_by_matcher": {"strict": dict.fromkeys(TRACK.row_names.values(), float(one))}}
            for at, (one, group) in enumerate(zip(right, self.groups, strict=True))
        ]  # fmt: skip
        return Measured(name, setting, Evaluation(Path(), {"metrics": dict.fromkeys(TRACK.gate, float(right.mean()))}, rows), 0.0)

    def _kept(self) -> dict[str, Any]:
        return {}

    def _tell(self, one: Measured, gain: dict[str, Any] | None, outcome: str, why: str, what: str = "") -> None:
        self.found.append((one, gain, outcome))


def cell(rng: np.random.Generator, trials: int, scenario: str, rows: int, size: int) -> dict[str, Any]:
    gains = SCENARIOS[scenario]
    stays, holds, promised, true = np.zeros((trials, len(gains)), bool), np.zeros(trials, bool), np.zeros(trials), np.zeros(trials)
    for trial in range(trials):
        ladder = Drawn(rng, gains, rows, size)
        best = ladder.climb({})
        first = ladder.found[0][0]
        for one, _, outcome in ladder.found[1:]:
            stays[trial, int(one.name)] = outcome == STAYS
        holds[trial] = all(gain["interval"][0] <= gains[int(one.name)] for one, gain, _ in ladder.found[1:])
        promised[trial] = best.evaluation.report["metrics"][TRACK.exact_gate] - first.evaluation.report["metrics"][TRACK.exact_gate]
        true[trial] = ladder.accuracy(best.setting) - BASE
    useless = [at for at, gain in enumerate(gains) if gain <= 0]
    return {
        "scenario": scenario, "rows": rows, "rows_a_group": size, "kept_useless": float(stays[:, useless].mean()),
        "power": {f"{gain:g}": float(stays[:, at].mean()) for at, gain in enumerate(gains) if gain > 0},
        "bound_holds": float(holds.mean()), "promised": float(promised.mean()), "true": float(true.mean()),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    seeds, cells = np.random.SeedSequence(args.seed).spawn(len(CELLS)), []
    with ProcessPoolExecutor(args.processes) as pool:
        made = pool.map(cell, map(np.random.default_rng, seeds), [args.trials] * len(CELLS), *zip(*CELLS, strict=True))
        for told in made:
            cells.append(told)
            print(
                f"{told['scenario']:8} {told['rows']:4} rows, {told['rows_a_group']} a group: keeps a useless rung {told['kept_useless']:.3f}, "
                f"power {told['power']}, all bounds hold {told['bound_holds']:.3f}, promised {told['promised']:+.3f}, true {told['true']:+.3f}", flush=True
            )  # fmt: skip
    write_json(args.out, {
        "made_by": "benchmarks/ladder_optimism.py", "created_at": now(), "code": code_version(), "hardware": hardware(), "simulated": True,
        "alpha": ALPHA, "base": BASE, "trials": args.trials, "seed": args.seed, "scenarios": SCENARIOS, "cells": cells,
        "worst_kept_useless": max(told["kept_useless"] for told in cells), "worst_bound_holds": min(told["bound_holds"] for told in cells),
    })  # fmt: skip
    print(f"figures: {display_path(args.out)}")
    return 0


if __name__ == "__main__":
    run(main)
