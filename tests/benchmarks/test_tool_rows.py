"""The simulated rows of an application's tools, and the rule on many evaluations at once: known answers and the program itself."""

import importlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from slm_swap.common.settings import ROOT

NAMES = ("tool_rows", "tools_error_rates", "worst_tools")


@pytest.fixture(scope="module")
def benchmarks():
    """The benchmarks' modules, as scripts find them."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    sys.path.remove(str(ROOT / "benchmarks"))


def test_every_case_is_a_distribution_and_equal_replies_come_first(benchmarks):
    kinds = benchmarks.tool_rows.make_kinds()
    assert kinds.shares.sum(axis=1) == pytest.approx(np.ones(4)) and (kinds.shares >= 0).all()
    assert (kinds.differences[0] == 0).all() and kinds.shares[0, 0] == pytest.approx(1)  # both right, or one wrong reference missed by both
    assert len(np.unique(kinds.differences, axis=0)) == len(kinds.differences)


def test_a_model_that_errs_alone_loses_what_its_errors_are(benchmarks):
    rows = benchmarks.tool_rows
    azure_right = rows.make_kinds(wrong_gold=0).shares[2] @ rows.make_kinds(wrong_gold=0).differences
    losses = dict(zip(rows.METRICS, azure_right, strict=True))
    assert losses["valid_call_rate"] == pytest.approx(rows.INVALID)
    assert losses["name_match_rate"] == pytest.approx(rows.INVALID + rows.WRONG_TOOL)
    assert losses["args_exact_rate"] == pytest.approx(1)
    assert rows.INVALID + rows.WRONG_TOOL < losses["args_f1"] < 1


def test_metrics_of_a_reply_are_those_of_the_scoring(benchmarks):
    from slm_swap.scoring.metrics import Match

    for matched, predicted, expected in ((2, 3, 4), (4, 4, 4), (3, 4, 3), (0, 0, 1)):
        match = Match(True, True, matched == predicted == expected, matched, predicted, expected)
        wanted = (1, 1, float(match.exact), match.precision, match.recall, match.f1)
        assert benchmarks.tool_rows.reply(matched, predicted, expected) == pytest.approx(wanted)


def test_errors_of_both_models_by_the_normal_copula(benchmarks):
    rows = benchmarks.tool_rows
    azure, slm = np.array([0.05, 0.3, 0.001]), np.array([0.1, 0.01, 0.6])
    normal = stats.multivariate_normal([0, 0], [[1, rows.ERRORS_TOGETHER], [rows.ERRORS_TOGETHER, 1]])
    both = [normal.cdf(stats.norm.ppf(pair)) for pair in zip(azure, slm, strict=True)]
    found = rows.four_cases(azure, slm)
    assert found[:, 3] == pytest.approx(both, abs=1e-6) and found.sum(axis=1) == pytest.approx(np.ones(3))
    assert found[:, 1] + found[:, 3] == pytest.approx(azure) and found[:, 2] + found[:, 3] == pytest.approx(slm)


def test_tools_have_the_rates_and_the_correlation_asked_for(benchmarks):
    rows = benchmarks.tool_rows
    azure, slm = rows.tool_errors(np.random.default_rng(0), (50_000,), 0.1, 0.05)
    assert (azure.mean(), slm.mean()) == (pytest.approx(0.1, abs=0.001), pytest.approx(0.15, abs=0.001))
    assert azure.var() / (0.1 * 0.9) == pytest.approx(1 / 21, rel=0.03)  # the intra-tool correlation: 1 / (1 + concentration)
    assert stats.spearmanr(azure, slm).statistic == pytest.approx(6 / np.pi * np.arcsin(0.35), abs=0.01)


@pytest.mark.parametrize("gap", [0.0, 0.05, 0.1])
def test_each_trial_s_gap_is_exact(benchmarks, gap):
    rows, kinds = benchmarks.tool_rows, benchmarks.tool_rows.make_kinds()
    shares = rows.mixtures(np.random.default_rng(1), kinds, 50, 8, 0.08, gap)
    means = dict(zip(rows.METRICS, (shares @ kinds.differences).T, strict=True))
    assert means["args_exact_rate"] == pytest.approx(np.full(50, gap), abs=1e-9)
    assert all((own <= means["args_exact_rate"] + 1e-9).all() for own in means.values())  # the largest gap of the six


def test_the_rule_at_once_is_the_program_s_rule(benchmarks):
    """`check` compares the rarest verdict: here each verdict of each cell, by rows and by tools."""
    rates = benchmarks.tools_error_rates
    kinds, rng, seen = rates.make_kinds(), np.random.default_rng(2), set()
    for gap in (0.0, 0.2):
        shares = rates.mixtures(rng, kinds, 30, 8, 0.05, gap)
        rows = rng.multinomial(150, shares)
        tools = rng.multinomial(np.full((30, 60), 8), shares[:, None, :])
        for counts, rule in ((rows, rates.by_rows), (tools, rates.by_tools)):
            found = rule(kinds, counts, 0.05).verdicts(rates.LOOK[1])
            for verdict in set(found):
                trial = int(np.argmax(found == verdict))
                rates.check(kinds, counts[trial : trial + 1], found[trial : trial + 1], 0.05)
                seen.add(str(verdict))
    assert seen == {"SWAP", "FINE_TUNE", "NEED_MORE_DATA"}


def test_a_verdict_that_is_not_the_program_s_ends_the_run(benchmarks):
    rates, kinds = benchmarks.tools_error_rates, benchmarks.tools_error_rates.make_kinds()
    counts = np.zeros((1, len(kinds.differences)), int)
    counts[0, 0] = 300
    with pytest.raises(RuntimeError, match="SWAP by paired_decision"):
        rates.check(kinds, counts, np.array(["FINE_TUNE"]), 0.05)


def test_no_end_of_a_tool_s_interval_is_missed_too_often(benchmarks):
    worst = [benchmarks.worst_tools.missed(rows, 0.05 / tools) for rows in (1, 3, 20) for tools in (1, 8)]
    assert 0.3 < max(cell["one_end"] for cell in worst) <= 1
