"""Simulated rows of tool calls as an application has them, for the benchmarks of the verdict: no model is run.

A few tools with Zipf(1) traffic. Each tool has its own error rate for each model, from a beta distribution of concentration 20 (an
intra-tool correlation of about 0.05), the two models' rates correlated by 0.7 (normal copula). On a row the two models' errors go together by
0.6 (normal copula). A row has 1 + Poisson(2) argument leaves. A reply that errs is invalid, of the wrong tool, or has wrong, missing
or extra leaves, so that its six metrics are correlated as real ones are. Some references are wrong: a right reply has one wrong leaf there.

Arrays only. A row's six differences (azure - slm) take one of `Kinds`' values; what differs between tools is how often the models err.
"""

from collections import defaultdict
from dataclasses import dataclass
from math import factorial

import numpy as np

from slm_swap.scoring.tracks import TRACKS

METRICS = TRACKS["toolcall"].gate
YES_NO = METRICS[:3]
CONCENTRATION, TOOLS_TOGETHER, ERRORS_TOGETHER, WRONG_GOLD = 20.0, 0.7, 0.6, 0.05
LEAVES = range(1, 9)
INVALID, WRONG_TOOL, WRONG_LEAF, MISSING, EXTRA = 0.1, 0.25, 0.4, 0.15, 0.1  # what a reply that errs is

Values = tuple[float, ...]  # a reply's six metrics


@dataclass(frozen=True)
class Kinds:
    """The differences that a row can have, (kinds, 6), the most frequent first, and how often, (4, kinds): where neither model errs,
    azure alone, the small model alone, both."""

    differences: np.ndarray
    shares: np.ndarray


def reply(matched: int, predicted: int, expected: int) -> Values:
    """The metrics of a valid reply of the right tool, as scoring.metrics.Match has them."""
    precision = matched / predicted if predicted else 0.0
    exact = float(matched == predicted == expected)
    return 1.0, 1.0, exact, precision, matched / expected, 2 * matched / (predicted + expected)


def replies(leaves: int, errs: bool, wrong_gold: bool) -> dict[Values, float]:
    """What a reply's metrics can be on a row of so many leaves, each with its probability."""
    if not errs:
        return {reply(leaves - wrong_gold, leaves, leaves): 1.0}
    found: dict[Values, float] = defaultdict(float)
    found[(0.0,) * 6] += INVALID
    found[(1.0, *(0.0,) * 5)] += WRONG_TOOL
    for wrong in range(1, leaves + 1):
        found[reply(leaves - wrong, leaves, leaves)] += WRONG_LEAF * 0.5**wrong / (1 - 0.5**leaves)
    found[reply(leaves - 1, leaves - 1, leaves)] += MISSING
    found[reply(leaves, leaves + 1, leaves)] += EXTRA
    return found


def make_kinds(wrong_gold: float = WRONG_GOLD) -> Kinds:
    """Every difference that there can be, and how often it comes up in each of the four cases."""
    poisson = np.array([2.0 ** (leaves - 1) / factorial(leaves - 1) for leaves in LEAVES])
    found: dict[Values, np.ndarray] = defaultdict(lambda: np.zeros(4))
    for leaves, share in zip(LEAVES, poisson / poisson.sum(), strict=True):
        for case, (azure, slm) in enumerate(((False, False), (True, False), (False, True), (True, True))):
            for wrong, of_gold in ((False, 1 - wrong_gold), (True, wrong_gold)):
                for left, p_left in replies(leaves, azure, wrong).items():
                    for right, p_right in replies(leaves, slm, wrong).items():
                        difference = tuple(round(a - b, 12) + 0.0 for a, b in zip(left, right, strict=True))
                        found[difference][case] += share * of_gold * p_left * p_right
    ordered = sorted(found, key=lambda kind: -found[kind].sum())  # a draw ends as soon as all rows are dealt out
    return Kinds(np.array(ordered), np.array([found[kind] for kind in ordered]).T)


def zipf(tools: int) -> np.ndarray:
    return 1 / np.arange(1, tools + 1) / (1 / np.arange(1, tools + 1)).sum()


def tool_errors(
    rng: np.random.Generator, shape: tuple, error: float, gap: float, concentration: float | None = CONCENTRATION
) -> tuple[np.ndarray, np.ndarray]:
    """Each tool's error rates, azure's with mean `error` and the small model's with mean `error + gap`; None: all tools are alike."""
    from scipy.special import betaincinv, ndtr

    means = error, error + gap
    if concentration is None:
        return np.full(shape, means[0]), np.full(shape, means[1])
    first, second = rng.standard_normal((2, *shape))
    normal = first, TOOLS_TOGETHER * first + np.sqrt(1 - TOOLS_TOGETHER**2) * second
    return tuple(
        betaincinv(max(mean, 1e-3) * concentration, (1 - max(mean, 1e-3)) * concentration, ndtr(z)).clip(1e-9, 1 - 1e-9)
        for mean, z in zip(means, normal, strict=True)
    )


def with_gap(azure: np.ndarray, slm: np.ndarray, traffic: np.ndarray, gap: float) -> np.ndarray:
    """The small model's error rates (trials, tools), their logits shifted so that the traffic's mean is azure's plus `gap`."""
    from scipy.special import expit, logit

    wanted, logits = azure @ traffic + gap, logit(slm)
    least, most = np.full(len(azure), -40.0), np.full(len(azure), 40.0)
    for _ in range(60):
        middle = (least + most) / 2
        above = expit(logits + middle[:, None]) @ traffic > wanted
        least, most = np.where(above, least, middle), np.where(above, middle, most)
    return expit(logits + middle[:, None])


def four_cases(azure: np.ndarray, slm: np.ndarray) -> np.ndarray:
    """(..., 4): how often neither model errs, azure alone, the small model alone, both.

    Both: the bivariate normal distribution function, by its integral over the correlation (Drezner and Wesolowsky, J. Statist. Comput. Simul. 35, 1990).
    """
    from scipy.special import ndtri

    h, k = ndtri(azure), ndtri(slm)
    nodes, weights = np.polynomial.legendre.leggauss(12)
    both = azure * slm
    for node, weight in zip((nodes + 1) / 2 * ERRORS_TOGETHER, weights / 2 * ERRORS_TOGETHER, strict=True):
        left = 1 - node**2
        both = both + weight * np.exp(-(h * h - 2 * node * h * k + k * k) / (2 * left)) / (2 * np.pi * np.sqrt(left))
    both = np.minimum(both, np.minimum(azure, slm))
    return np.stack([1 - azure - slm + both, azure - both, slm - both, both], axis=-1).clip(0)


def mixtures(
    rng: np.random.Generator, kinds: Kinds, trials: int, tools: int, error: float, gap: float, wrong_gold: float = WRONG_GOLD
) -> np.ndarray:
    """(trials, kinds): how often each kind of row comes up. Each trial has tools of its own, and over their traffic just this gap
    (azure - slm) in args_exact_rate as it is measured, with the wrong references."""
    traffic, true = zipf(tools), gap / (1 - wrong_gold)
    azure, slm = tool_errors(rng, (trials, tools), error, true)
    cases = four_cases(azure, with_gap(azure, slm, traffic, true))
    shares = np.einsum("tkc,k->tc", cases, traffic) @ kinds.shares
    return shares / shares.sum(axis=-1, keepdims=True)
