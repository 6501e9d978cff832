"""The gate: from both models' values over the same rows to a verdict. Pure functions.

The paired rule. For each gate metric d is the mean of azure - slm over the rows, and delta the non-inferiority margin. Two one-sided
tests at level alpha are made, by the score method of `stats.score` (Tango's for yes-no metrics; fractions and clusters as said there):

- H0: d >= delta. Where it is rejected the small model is non-inferior; equally, the upper end of the interval of level 1 - 2 alpha
  lies below delta.
- H0: d <= delta. Where it is rejected the small model is shown to be worse than the margin.

`SWAP`: non-inferior on every gate metric, each at alpha: an intersection-union test, which needs no correction (Berger, Technometrics
24, 1982), over at least ten effective clusters. Where rows are looked at more than once each look has a share of alpha for SWAP
(`looks`). `FINE_TUNE`: worse on any metric, by Holm's procedure over the metrics (Scandinavian
Journal of Statistics 6, 1979). Otherwise `NEED_MORE_DATA`. How often that is wrong: benchmarks/results/decision_error_rates.json.
"""

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from slm_swap.verdict.stats import MIN_CLUSTERS
from slm_swap.verdict.stats.multiple import holm

SWAP, FINE_TUNE, NEED_MORE_DATA = "SWAP", "FINE_TUNE", "NEED_MORE_DATA"
EXIT_CODES = {SWAP: 0, FINE_TUNE: 10, NEED_MORE_DATA: 11}
RULES = ("paired", "point")
ROUNDING = 1e-9  # 0.90 - 0.85 is 0.05000000000000004: a gap of just the margin is not more than the margin
POWER = 0.8
MOST_ROWS = 10_000_000  # a number of rows beyond this settles nothing

Values = Mapping[str, Sequence[float]]  # a metric's name: its value on each row, 0..1


@dataclass(frozen=True)
class Decision:
    """What the gate says. `metrics` has, for each gate metric, azure's mean, slm's mean and their difference, and by the paired rule
    `interval`, `p_value` (non-inferior), `p_worse`, `p_worse_holm`, `azure_interval`, `slm_interval` and `discordant`.

    `clusters` says how many independent units there were, `need` what would settle the verdict; both None under the point rule.
    `swap_alpha` is this look's level for SWAP, and of the intervals' upper ends.
    `certain_after`: under the sequential rule, the rows after which the verdict was certain, None where it is not. `withheld`: the
    verdict that would stand, were it not for rows that were not measured or for another gate; then the verdict is NEED_MORE_DATA.
    """

    verdict: str
    rule: str
    delta: float
    metrics: dict[str, dict[str, Any]]
    alpha: float | None = None
    swap_alpha: float | None = None
    clusters: dict[str, float] | None = None
    need: dict[str, Any] | None = None
    certain_after: int | None = None
    withheld: str | None = None

    @property
    def fine_tune(self) -> bool:
        return self.verdict == FINE_TUNE

    @property
    def failing(self) -> list[str]:
        """The metrics that the small model is too much worse on, the worst first; none beside a SWAP that was certain before, or a
        verdict that is withheld."""
        if self.verdict == SWAP or self.withheld:
            return []
        worse = [name for name, values in self.metrics.items() if self._is_worse(values)]
        return sorted(worse, key=lambda name: -self.metrics[name]["difference"])

    def _is_worse(self, values: dict[str, Any]) -> bool:
        if self.alpha is None:
            return values["difference"] > self.delta + ROUNDING
        return values["p_worse_holm"] <= self.alpha

    def to_json(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict, "fine_tune": self.fine_tune, "rule": self.rule, "delta": self.delta, "alpha": self.alpha,
            "swap_alpha": self.swap_alpha, "metrics": self.metrics, "failing": self.failing, "clusters": self.clusters, "need": self.need,
            "withheld": self.withheld,
        }  # fmt: skip


def point_decision(azure: Mapping[str, float], slm: Mapping[str, float], gate: Sequence[str], delta: float) -> Decision:
    """The point rule, on two reports' means: FINE_TUNE where azure - slm exceeds `delta` on any gate metric, otherwise SWAP.

    Metrics are 0..1 and higher is better; `delta` is the non-inferiority margin, 0..1. The rule looks at two means and does not
    know how sure they are: on few rows it is often wrong both ways.

    Raises:
        KeyError: a report lacks a gate metric.
    """
    metrics = {name: {"azure": azure[name], "slm": slm[name], "difference": azure[name] - slm[name]} for name in gate}
    verdict = FINE_TUNE if any(values["difference"] > delta + ROUNDING for values in metrics.values()) else SWAP
    return Decision(verdict, "point", delta, metrics)


def paired_decision(
    azure: Values,
    slm: Values,
    yes_no: Collection[str],
    delta: float,
    alpha: float = 0.05,
    clusters: Sequence[Hashable] | None = None,
    swap_alpha: float | None = None,
    next_alpha: float | None = None,
    brief: bool = False,
) -> Decision:
    """The paired rule, as the module says, on both models' values in the same order of rows.

    `yes_no` names the metrics that are 0 or 1 on each row. `clusters` labels the rows that belong together; None: each row is alone.
    `delta` is 0 or more and below 1, `alpha` between 0 and 0.5; `swap_alpha` is this look's level for SWAP (None: alpha),
    `next_alpha` that of the next look, at which `need` aims (None: the same). `brief` leaves out each model's own intervals, which take most of the time.

    Raises:
        ValueError: no metrics, no rows, or rows that are not paired.
    """
    from slm_swap.verdict.stats.score import p_above, p_below

    samples, swap_alpha = differences(azure, slm, yes_no, clusters), swap_alpha or alpha
    measured = {name: (p_below(sample, delta), p_above(sample, delta)) for name, sample in samples.items()}
    adjusted = holm({name: worse for name, (_, worse) in measured.items()})
    first = next(iter(samples.values()))
    enough = first.effective > MIN_CLUSTERS - ROUNDING
    if any(p <= alpha for p in adjusted.values()):
        verdict = FINE_TUNE
    else:
        verdict = SWAP if enough and all(p <= swap_alpha for p, _ in measured.values()) else NEED_MORE_DATA
    metrics = {
        name: _evidence(azure[name], slm[name], samples[name], alpha, swap_alpha)
        | ({} if brief else _side_intervals(azure[name], slm[name], name in yes_no, alpha, clusters))
        | {"p_value": measured[name][0], "p_worse": measured[name][1], "p_worse_holm": adjusted[name]}
        for name in samples
    }
    counted = {"count": first.clusters, "effective": first.effective}
    need = rows_needed(samples, delta, alpha, next_alpha or swap_alpha) if verdict == NEED_MORE_DATA else None
    return Decision(verdict, "paired", delta, metrics, alpha, swap_alpha, counted, need)


def sequential_decision(
    azure: Values,
    slm: Values,
    yes_no: Collection[str],
    delta: float,
    alpha: float = 0.05,
    clusters: Sequence[Hashable] | None = None,
    in_order: bool = False,
    largest: int | None = None,
    brief: bool = False,
) -> Decision:
    """The rule of `stats.betting.sequential_verdict`, which holds at every moment of a run; arguments as `paired_decision`.

    `in_order`: the rows came in random order, the rows of a cluster together, and stay so; otherwise they are put into one. `largest`:
    the rows of the largest cluster that the run could meet, where it was stopped before it had met all.

    Raises:
        ValueError: as `paired_decision`.
    """
    import numpy as np

    from slm_swap.verdict.stats.betting import random_clusters, sequential_verdict

    samples = differences(azure, slm, yes_no, clusters)
    rows = len(next(iter(azure.values())))
    order = random_clusters(clusters or [None] * rows, seed=0)
    if in_order:
        order.sort()
    flat = [index for members in order for index in members]
    sizes = [len(members) for members in order]
    given = {name: np.subtract(azure[name], slm[name])[flat] for name in azure}
    found = sequential_verdict(given, sizes, delta=delta, alpha=alpha, largest=largest or max(sizes))
    metrics = {}
    for name, evidence in found.metrics.items():
        shown = [at for at in (evidence.below_at, evidence.above_at) if at is not None]
        sides = {} if brief else _side_intervals(azure[name], slm[name], name in yes_no, alpha, clusters)
        metrics[name] = _evidence(azure[name], slm[name], samples[name], alpha, alpha) | sides | {
            "interval": list(evidence.interval), "p_value": evidence.p_value, "p_worse": evidence.p_worse,
            "p_worse_holm": evidence.p_worse_holm, "certain_at": min(shown, default=None),
        }  # fmt: skip
    first = next(iter(samples.values()))
    counted = {"count": first.clusters, "effective": first.effective}
    need = rows_needed(samples, delta, alpha) if found.verdict == NEED_MORE_DATA else None
    return Decision(found.verdict, "sequential", delta, metrics, alpha, alpha, counted, need, found.rows)


def differences(azure: Values, slm: Values, yes_no: Collection[str], clusters: Sequence[Hashable] | None = None) -> dict[str, Any]:
    """azure - slm on each row, as a `stats.score.Sample` for each metric.

    Raises:
        ValueError: as `paired_decision`.
    """
    from slm_swap.verdict.stats.score import make_sample

    if not azure or azure.keys() != slm.keys() or any(len(azure[name]) != len(slm[name]) for name in azure):
        raise ValueError("both models need the same metrics on the same rows")
    return {
        name: make_sample(
            [left - right for left, right in zip(azure[name], slm[name], strict=True)], clusters, yes_no=name in yes_no
        )
        for name in azure
    }


def _evidence(
    azure: Sequence[float], slm: Sequence[float], sample: Any, alpha: float, swap_alpha: float
) -> dict[str, Any]:
    """One metric's means, difference and its interval, and on how many rows either model is better.

    The interval has level 1 - 2 alpha. Its upper end is at `swap_alpha`, so that it lies below the margin exactly where the metric is
    shown to be good enough.
    """
    from slm_swap.verdict.stats.score import interval

    better = sum(left > right for left, right in zip(azure, slm, strict=True))
    worse = sum(left < right for left, right in zip(azure, slm, strict=True))
    return {
        "azure": sum(azure) / len(azure),
        "slm": sum(slm) / len(slm),
        "difference": sample.mean,
        "interval": list(interval(sample, alpha, swap_alpha)),
        "discordant": {"azure_better": better, "slm_better": worse, "equal": len(azure) - better - worse},
    }


def _side_intervals(
    azure: Sequence[float], slm: Sequence[float], yes_no: bool, alpha: float, clusters: Sequence[Hashable] | None
) -> dict[str, list[float]]:
    """Each model's own interval of level 1 - 2 alpha."""
    from slm_swap.verdict.stats.score import interval, make_sample

    sides = {"azure": azure, "slm": slm}
    return {f"{name}_interval": list(interval(make_sample(values, clusters, yes_no, paired=False), alpha)) for name, values in sides.items()}


def rows_needed(samples: Mapping[str, Any], delta: float, alpha: float, swap_alpha: float | None = None) -> dict[str, Any]:
    """How many further rows (and clusters) would settle the verdict with 80% power, were the truth what the rows show.

    Towards FINE_TUNE where some metric is more than the margin worse: the metric that would be shown first, at Holm's first level.
    Towards SWAP otherwise: the metric that would be shown last (all have to be: where several are as near, the power is less).
    `rows_if_equal`: towards SWAP, were both models equally good and disagreed as often. None: no number of rows (below ten million)
    settles it.
    """
    from slm_swap.verdict.stats.score import mirrored, units_needed

    first, swap_alpha = next(iter(samples.values())), swap_alpha or alpha
    beyond = [name for name, sample in samples.items() if sample.mean > delta + ROUNDING]
    if beyond:
        level = alpha / len(samples)
        units = {name: units_needed(mirrored(samples[name]), -delta, level, POWER) for name in beyond}
        metric = min(units, key=lambda name: units[name])
    else:
        units = {name: units_needed(sample, delta, swap_alpha, POWER) for name, sample in samples.items()}
        metric = max(units, key=lambda name: units[name])
    equal = max(units_needed(sample, delta, swap_alpha, POWER, even=True) for sample in samples.values())

    def further(total: float) -> tuple[int | None, int | None]:
        """(rows, clusters) beyond those that are there."""
        least = MIN_CLUSTERS * first.clusters / first.effective  # clusters of these sizes that make up enough equal ones
        clusters = math.ceil(max(total, least - ROUNDING)) if math.isfinite(total) else math.inf
        rows = math.ceil(clusters * first.rows / first.clusters) if math.isfinite(clusters) else math.inf
        if rows > MOST_ROWS:
            return None, None
        return max(rows - first.rows, 1), max(clusters - first.clusters, 1)

    rows, clusters = further(units[metric])
    return {
        "towards": FINE_TUNE if beyond else SWAP,
        "metric": metric,
        "rows": rows,
        "clusters": clusters if first.clusters < first.rows else None,
        "rows_if_equal": further(equal)[0],
    }


@cache
def clusters_if_identical(delta: float, alpha: float) -> int | None:
    """How many equally large clusters two models that never differ need for a SWAP, however many rows each has: 55, 136 and 271 at
    margins of 5, 2 and 1 points and alpha 0.05. None at a margin of 0: no number.

    A cluster that was not seen might lie wholly at the end of the scale (`stats.score`), so that rows of the same clusters do not help.
    Of K clusters without a difference the statistic is sqrt((K - 1) delta / (1 - delta)), against Student's t with K - 1 degrees.
    """
    from scipy.special import stdtrit

    if delta == 0:
        return None
    normal = (1 - delta) / delta * stdtrit(1e9, 1 - alpha) ** 2  # Student's t is wider: never fewer
    count = max(MIN_CLUSTERS, math.floor(normal))
    while (count - 1) * delta / (1 - delta) < stdtrit(count - 1, 1 - alpha) ** 2:
        count += 1
    return count
