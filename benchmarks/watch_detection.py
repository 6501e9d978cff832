"""How often the watch raises a false alarm, and after how many audited requests it finds that the small model has become worse.

    python benchmarks/watch_detection.py
    python benchmarks/watch_detection.py --trials 50 --out /tmp/watch.json

Simulated: no model runs. Audited requests are drawn, each on a tool (Zipf traffic), each with a disagreement or not, and go through the detectors
of `verdict.stats.e_detector` as `serving.watching` sets them up: one of all requests, and one of each tool.

- `false_alarms`: the true rate is just the one that is allowed, overall and on each tool: the worst that is no change. `mean_run` is how many requests came
  before the alarm, on average (runs are cut after `most`, so it is a lower bound of the mean); at least N is promised.
- `detection`: the calibration saw a rate on 500 replies, which is the true one; allowed is its 95% bound. After 500 audited requests the rate rises by `drop`.
  `median` is how many audited requests after that the alarm came, None where most runs had none after `most`. `fixed` is what a binomial test of the same bound
  needs at level 5% and power 50% that looks once and knows when the change came, None where the new rate is within the bound: then there is nothing to find,
  and alarms are false ones.
- `tools`: the rate of one tool alone rises. Each tool's bound is that of its own replies among 1,000 of the calibration, where it is higher than the
  bound of all.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere

from slm_swap.cli import Parser, positive, run
from slm_swap.common.reports import code_version, hardware, now, write_json
from slm_swap.common.settings import ROOT, display_path
from slm_swap.serving.watching import ALPHA
from slm_swap.verdict.stats.e_detector import bets
from slm_swap.verdict.stats.regret import upper_bound

ALLOWED, TOOLS, ALARMS_IN = (0.02, 0.05, 0.1), (0, 8, 40), (1_000, 10_000)
SEEN, DROPS, UNITS, BEFORE, MOST = (0.0, 0.02, 0.06), (0.02, 0.05, 0.1, 0.2), 500, 500, 10_000

Draw = Callable[[int, np.ndarray], tuple[np.ndarray, np.ndarray]]


def run_lengths(draw: Draw, allowed: np.ndarray, alarm_at: float, trials: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Many runs at once: after how many observations each raised its first alarm (`most` where it had not by then), and which detector did.

    Args:
        draw: of t (0, 1, ...) and the numbers of the trials still running: (what each observes, 0 or 1; its part, 0 ... parts - 1).
        allowed: of the detector that sees everything, then of each part.
        alarm_at: the evidence of every detector's alarm.

    Returns:
        Two arrays (trials,): run lengths; 0 for the detector of everything, 1 + part for a part's, -1 for none.
    """
    every = [np.array(bets(one)) for one in allowed]
    wide = max(map(len, every))
    bet = np.array([np.pad(one, (0, wide - len(one))) for one in every])
    weight = np.array([np.pad(np.full(len(one), 1 / len(one)), (0, wide - len(one))) for one in every])  # 0 for what is padded
    money, running = np.zeros((trials, len(every), wide)), np.arange(trials)
    lengths, raised = np.full(trials, most), np.full(trials, -1)
    for t in range(most):
        x, part = draw(t, running)
        rows, rung = np.arange(len(running)), np.full(len(running), -1)
        for at in (part + 1, np.zeros(len(running), int))[len(every) == 1 :]:  # the detector of everything has the last word
            stake = (money[rows, at] + 1) * (1 + bet[at] * (x - allowed[at])[:, None])
            money[rows, at] = stake
            rung = np.where((stake * weight[at]).sum(axis=1) >= alarm_at, at, rung)
        done = rung >= 0
        if done.any():
            lengths[running[done]], raised[running[done]] = t + 1, rung[done]
            money, running = money[~done], running[~done]
            if not len(running):
                break
    return lengths, raised


def zipf(tools: int) -> np.ndarray:
    """The tools' shares of the traffic; without tools one that is everything."""
    shares = 1 / np.arange(1, max(tools, 1) + 1)
    return shares / shares.sum()


def drawer(rng: np.random.Generator, tools: int, rates: Callable[[int], np.ndarray]) -> Draw:
    """Observations whose rate on each tool is `rates(t)`."""
    ends = np.cumsum(zipf(tools))[:-1]

    def draw(t: int, running: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        part = np.searchsorted(ends, rng.random(len(running)), side="right")
        return (rng.random(len(running)) < rates(t)[part]).astype(float), part

    return draw


def false_alarms(rng: np.random.Generator, trials: int, alarms_in: int, allowed: float, tools: int) -> dict[str, Any]:
    every = np.full(1 + tools, allowed)
    most, alarm_at = 10 * alarms_in, (2 if tools else 1) * alarms_in
    lengths, _ = run_lengths(drawer(rng, tools, lambda t: np.full(max(tools, 1), allowed)), every, alarm_at, trials, most)
    return {
        "alarms_in": alarms_in, "allowed": allowed, "tools": tools, "most": most,
        "mean_run": float(lengths.mean()), "times_promised": float(lengths.mean() / alarms_in),
        "standard_error": float(lengths.std() / np.sqrt(trials)), "cut": float((lengths == most).mean()), "within_n": float((lengths <= alarms_in).mean()),
    }  # fmt: skip


def detection(rng: np.random.Generator, trials: int, alarms_in: int, seen: float, drop: float, tools: int, only: int | None = None) -> dict[str, Any]:
    """One cell: the rate rises by `drop` on every tool, or on the one of rank `only` (0 is the most used)."""
    shares, units = zipf(tools), UNITS if only is None else 2 * UNITS
    bound = upper_bound(round(seen * units), units, ALPHA)
    own = [max(bound, upper_bound(round(seen * n), n, ALPHA / tools)) for n in np.round(shares * units).astype(int)] if tools else []
    before = np.full(len(shares), seen)
    after = before + drop * (np.arange(len(shares)) == only if only is not None else 1.0)
    most = BEFORE + MOST
    allowed = np.array([bound, *own])
    lengths, raised = run_lengths(drawer(rng, tools, lambda t: before if t < BEFORE else after), allowed, (2 if tools else 1) * alarms_in, trials, most)
    early, late = lengths <= BEFORE, lengths[lengths > BEFORE] - BEFORE
    found = raised[lengths > BEFORE] >= 0
    median = float(np.median(np.where(found, late, np.inf)))
    told = {
        "alarms_in": alarms_in, "seen": seen, "bound": bound, "drop": drop, "tools": tools, "early": float(early.mean()), "found": float(found.mean()),
        "median": median if np.isfinite(median) else None,
    }  # fmt: skip
    if only is None:
        return told | {"fixed": fixed_sample(bound, seen + drop)}
    by = raised[raised >= 0]
    share = float(shares[only])
    return told | {
        "rank": only + 1, "share": share, "own_bound": own[only], "median_of_the_tool": None if not np.isfinite(median) else median * share,
        "named_rightly": float((by == only + 1).mean()) if len(by) else None, "fixed": fixed_sample(own[only], seen + drop),
    }  # fmt: skip


def fixed_sample(bound: float, rate: float) -> int | None:
    """The least number from which on a one-sided binomial test against `bound` finds `rate` half of the time; None where that takes more than 20,000."""
    from scipy.stats import binom

    if rate <= bound:
        return None
    n = np.arange(1, 20_001)
    weak = np.flatnonzero(binom.sf(binom.isf(ALPHA, n, bound), n, rate) < 0.5)
    last = int(n[weak[-1]]) if len(weak) else 0
    return last + 1 if last < len(n) else None


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--trials", type=positive, default=300, help="runs in each cell")
    parser.add_argument("--alarms-in", type=positive, nargs="*", default=ALARMS_IN, metavar="N", help="the N of the cells")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/watch_detection.json", help="where the figures go")
    parser.add_seed()
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    rng, start = np.random.default_rng(args.seed), time.process_time()
    false, found, by_tool = [], [], []
    for alarms_in in args.alarms_in:
        for tools in TOOLS:
            for allowed in ALLOWED:
                false.append(cell := false_alarms(rng, args.trials, alarms_in, allowed, tools))
                print("false alarms", {name: round(value, 3) for name, value in cell.items()}, flush=True)
            for seen in SEEN:
                for drop in DROPS:
                    found.append(cell := detection(rng, args.trials, alarms_in, seen, drop, tools))
                    print("detection", {name: value and round(value, 3) for name, value in cell.items()}, flush=True)
        for tools in TOOLS[1:]:
            for only in (0, 2, 7):
                for drop in DROPS[1:]:
                    by_tool.append(cell := detection(rng, args.trials, alarms_in, 0.02, drop, tools, only))
                    print("one tool", {name: value and round(value, 3) for name, value in cell.items()}, flush=True)
    worst = min(cell["times_promised"] for cell in false)
    print(f"false alarms: the worst cell has a mean run of {worst:.2f} times N, {time.process_time() - start:.0f} s of one core")
    write_json(args.out, {
        "made_by": "benchmarks/watch_detection.py", "created_at": now(), "code": code_version(), "hardware": hardware(), "simulated": True, "seed": args.seed,
        "trials": args.trials, "seconds": time.process_time() - start, "worst_times_promised": worst,
        "false_alarms": false, "detection": found, "tools": by_tool,
    })  # fmt: skip
    print(f"figures: {display_path(args.out)}")
    return 0


if __name__ == "__main__":
    run(main)
