"""Simulate how often the gate's paired rule is wrong, and how often it settles what is true: no model is run.

    python benchmarks/decision_error_rates.py
    python benchmarks/decision_error_rates.py --trials 2000 --out /tmp/decision_error_rates.json

Each cell draws pairs of replies to n rows with a known true gap (azure - slm) and discordance (share of rows on which the models
differ), and applies the rule to one metric. Kinds: yes-no metrics on independent rows (Tango's test), fractions on independent rows
(differences of a quarter to one), and yes-no metrics on clusters of 10 rows, or of 1, 2, 5 and 10 (4 on average). Rows of a cluster go
together by a Dirichlet-multinomial of the given intra-cluster correlation; at 1 all rows of a cluster are alike.

false SWAP: SWAP though the true gap is the margin or more. false FINE_TUNE: FINE_TUNE though it is the margin or less. Power:
SWAP at a gap below the margin, FINE_TUNE at one above. All trials of a cell are decided at once; a few are decided again one by one as
`decision.paired_decision` does, and a verdict that is not the same ends the run. An application's own tools, with all six metrics:
tools_error_rates.py.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere

import numpy as np

from slm_swap.cli import Parser, positive, run
from slm_swap.common.reports import code_version, hardware, now, write_json
from slm_swap.common.settings import ROOT, display_path
from slm_swap.verdict.decision import MIN_CLUSTERS, ROUNDING
from slm_swap.verdict.stats.score import make_sample, p_above, p_below, statistics

ALPHA = 0.05
NORMAL = 1.6448536269514722  # its standard normal quantile
ROWS = (30, 50, 100, 200, 500, 1000)
DISCORDANCE = (0.05, 0.1, 0.2, 0.3, 0.4)
MARGINS = (0.02, 0.05)
GAPS = (0.0, 0.5, 1.0, 2.0)  # in margins
COLUMNS = ("kind", "rows", "margin", "gap", "discordance", "swap", "fine_tune")
CHECKED = 3  # trials of a cell that are decided again
KINDS = {  # cluster sizes, intra-cluster correlation, sizes of a difference
    "yes-no": ((1,), 0.0, (1.0,)),
    "fractions": ((1,), 0.0, (0.25, 0.5, 0.75, 1.0)),
    "clusters of 10 correlation 0.3": ((10,), 0.3, (1.0,)),
    "clusters of 10 correlation 1": ((10,), 1.0, (1.0,)),
    "clusters of 1 to 10 correlation 0.3": ((1, 2, 5, 10), 0.3, (1.0,)),
    "clusters of 1 to 10 correlation 1": ((1, 2, 5, 10), 1.0, (1.0,)),
}


def differences(rng: np.random.Generator, trials: int, rows: int, kind: str, gap: float, discordance: float) -> tuple | None:
    """(totals, sizes, counts of shape (trials, totals)): the clusters that there can be, and how often each came up in each trial.

    None where no such pairs exist: a gap cannot be larger than the discordance allows.
    """
    every, correlation, steps = KINDS[kind]
    signed = gap / float(np.mean(steps))
    up, down = (discordance + signed) / 2, (discordance - signed) / 2
    if down < 0:
        return None
    if every == (1,):
        values = np.array([*steps, *(-step for step in steps), 0.0])
        shares = [up / len(steps)] * len(steps) + [down / len(steps)] * len(steps) + [1 - discordance]
        return values, np.ones(len(values)), rng.multinomial(rows, shares, trials)
    units, mean = round(rows / np.mean(every)), np.array([up, down, 1 - discordance])
    sizes = rng.choice(every, (trials, units))
    if correlation == 1:
        drawn = rng.multinomial(1, mean, (trials, units)) * sizes[..., None]
    else:
        weights = rng.gamma(mean * (1 - correlation) / correlation, size=(trials, units, 3))
        drawn = rng.multinomial(sizes, weights / weights.sum(-1, keepdims=True))
    kinds = [(total, size) for size in every for total in range(-size, size + 1)]
    first = {size: next(i for i, kind in enumerate(kinds) if kind[1] == size) for size in every}
    number = np.vectorize(first.get)(sizes) + drawn[..., 0] - drawn[..., 1] + sizes
    counts = np.bincount((number + len(kinds) * np.arange(trials)[:, None]).ravel(), minlength=trials * len(kinds))
    totals, of = np.array(kinds, dtype=float).T
    return totals, of, counts.reshape(trials, -1)


def cell(rng: np.random.Generator, trials: int, rows: int, kind: str, margin: float, gap: float, discordance: float) -> dict | None:
    """Shares of the trials with each verdict: the rule of `decision.paired_decision` on one metric, all trials at once."""
    from scipy.special import stdtrit

    drawn = differences(rng, trials, rows, kind, gap, discordance)
    if drawn is None:
        return None
    totals, sizes, counts = drawn
    y, exact = totals - margin * sizes, kind == "yes-no"
    typical = (counts @ sizes**3) / (counts @ sizes**2)
    effective = (counts @ sizes) ** 2 / (counts @ sizes**2)
    low = np.minimum((-1 - margin) * typical, np.where(counts > 0, y, np.inf).min(-1))
    high = np.maximum((1 - margin) * typical, np.where(counts > 0, y, -np.inf).max(-1))
    score = statistics(y, sizes, counts, low, high, exact)
    limit = NORMAL if exact else -stdtrit(np.maximum(effective - 1, 1), ALPHA)
    not_inferior, worse = score <= -limit, score >= limit
    check(kind, margin, drawn, not_inferior, worse)
    swap = not_inferior & (effective > MIN_CLUSTERS - ROUNDING)
    found = {"swap": float(swap.mean()), "fine_tune": float(worse.mean())}
    return {"kind": kind, "rows": rows, "margin": margin, "gap": gap, "discordance": discordance} | found


def check(kind: str, margin: float, drawn: tuple, not_inferior: np.ndarray, worse: np.ndarray) -> None:
    """The first trials again by the p-values of real rows and labels: what is not the same is a bug here or there."""
    totals, sizes, counts = drawn
    for trial, count in enumerate(counts[:CHECKED]):
        units = np.repeat(np.arange(len(count)), count)
        rows = np.concatenate([np.full(int(sizes[unit]), totals[unit] / sizes[unit]) for unit in units])  # the total is what counts
        labels = np.repeat(np.arange(len(units)), sizes[units].astype(int)).tolist()
        sample = make_sample(rows, labels, yes_no=kind == "yes-no")
        found = (p_below(sample, margin) <= ALPHA, p_above(sample, margin) <= ALPHA)
        if found != (not_inferior[trial], worse[trial]):
            raise RuntimeError(f"{kind}, margin {margin}, {len(rows)} rows, counts {count.tolist()}: the rule says {found}")


def summarize(cells: list[dict]) -> dict:
    """The worst and the mean of each error for each kind; power is in the cells."""
    summary = {}
    for kind in KINDS:
        own = [c for c in cells if c["kind"] == kind]
        at_margin = [c["swap"] for c in own if c["gap"] == c["margin"]]
        beyond = [c["swap"] for c in own if c["gap"] > c["margin"]]
        tuned = [c["fine_tune"] for c in own if c["gap"] <= c["margin"]]
        summary[kind] = {
            "false_swap_at_margin": {"max": max(at_margin), "mean": float(np.mean(at_margin)), "cells": len(at_margin)},
            "false_swap_beyond_margin": {"max": max(beyond), "mean": float(np.mean(beyond)), "cells": len(beyond)},
            "false_fine_tune": {"max": max(tuned), "mean": float(np.mean(tuned)), "cells": len(tuned)},
        }
    return summary


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=positive, default=20_000, help="simulated evaluations in a cell (default: 20000)")
    parser.add_argument("--out", type=Path, metavar="FILE", default=ROOT / "benchmarks/results/decision_error_rates.json")
    parser.add_seed()
    args = parser.parse_args(argv)
    started, rng, cells = time.perf_counter(), np.random.default_rng(args.seed), []
    for kind in KINDS:
        for margin in MARGINS:
            for rows in ROWS:
                row = [cell(rng, args.trials, rows, kind, margin, gap * margin, psi) for gap in GAPS for psi in DISCORDANCE]
                row = [found for found in row if found]
                cells += row
                at = [found for found in row if found["gap"] == margin]
                power = [found["swap"] for found in row if found["gap"] == 0]
                print(
                    f"{kind:36} margin {margin:.2f} {rows:5} rows: false SWAP at the margin at most {max(c['swap'] for c in at):.4f}, "
                    f"false FINE_TUNE at most {max(c['fine_tune'] for c in at):.4f}, SWAP of equal models {min(power):.3f} to {max(power):.3f}",
                    flush=True,
                )
    summary = summarize(cells)
    told = {
        "simulated": "pairs of replies drawn at random; no model was run", "created_at": now(), "code": code_version(), "hardware": hardware(),
        "seed": args.seed, "alpha": ALPHA, "trials": args.trials, "seconds": round(time.perf_counter() - started, 1),
        "summary": summary, "cells": [",".join(COLUMNS)] + [",".join(str(found[name]) for name in COLUMNS) for found in cells],
    }  # fmt: skip
    write_json(args.out, told)
    for kind, found in summary.items():
        rates = ", ".join(f"{name} max {rate['max']:.4f} mean {rate['mean']:.4f}" for name, rate in found.items())
        print(f"{kind}: {rates}")
    print(f"report: {display_path(args.out)}")
    return 0


if __name__ == "__main__":
    run(main)
