"""The gate: from two reports' metrics to a verdict. Pure functions."""

from dataclasses import dataclass
from typing import Any

SWAP, FINE_TUNE, NEED_MORE_DATA = "SWAP", "FINE_TUNE", "NEED_MORE_DATA"
EXIT_CODES = {SWAP: 0, FINE_TUNE: 10, NEED_MORE_DATA: 11}
ROUNDING = 1e-9  # 0.90 - 0.85 is 0.05000000000000004: a gap of just the margin is not more than the margin


@dataclass(frozen=True)
class Decision:
    """What the gate says. `metrics` has, for each gate metric, azure's value, slm's value and their difference."""

    verdict: str
    rule: str
    delta: float
    metrics: dict[str, dict[str, float]]

    @property
    def fine_tune(self) -> bool:
        return self.verdict == FINE_TUNE

    @property
    def failing(self) -> list[str]:
        """The metrics that the small model is too much worse on, the worst first."""
        worse = [name for name, values in self.metrics.items() if values["difference"] > self.delta + ROUNDING]
        return sorted(worse, key=lambda name: -self.metrics[name]["difference"])

    def to_json(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict, "fine_tune": self.fine_tune, "rule": self.rule, "delta": self.delta,
            "metrics": self.metrics, "failing": self.failing,
        }  # fmt: skip


def point_decision(azure: dict[str, float], slm: dict[str, float], gate: tuple[str, ...], delta: float) -> Decision:
    """The point rule: FINE_TUNE where azure - slm exceeds `delta` on any gate metric, otherwise SWAP.

    Metrics are 0..1 and higher is better; `delta` is the non-inferiority margin, 0..1. The rule looks at two means and does not
    know how sure they are: on few rows it is often wrong both ways.

    Raises:
        KeyError: a report lacks a gate metric.
    """
    metrics = {name: {"azure": azure[name], "slm": slm[name], "difference": azure[name] - slm[name]} for name in gate}
    verdict = FINE_TUNE if any(values["difference"] > delta + ROUNDING for values in metrics.values()) else SWAP
    return Decision(verdict, "point", delta, metrics)
