"""The gate's rule on known numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_swap.decision import EXIT_CODES, FINE_TUNE, NEED_MORE_DATA, SWAP, point_decision

GATE = ("valid", "exact", "f1")


def decide(azure, slm, delta=0.05):
    return point_decision(dict(zip(GATE, azure, strict=True)), dict(zip(GATE, slm, strict=True)), GATE, delta)


@pytest.mark.parametrize(
    ("azure", "slm", "verdict", "failing"),
    [
        ((0.9, 0.8, 0.85), (0.9, 0.8, 0.85), SWAP, []),
        ((0.9, 0.8, 0.85), (1.0, 0.9, 0.95), SWAP, []),
        ((0.9, 0.8, 0.85), (0.85, 0.75, 0.8), SWAP, []),  # exactly the margin, though 0.9 - 0.85 is 0.05000000000000004
        ((1.0, 0.3, 0.5), (0.95, 0.25, 0.45), SWAP, []),
        ((0.9, 0.8, 0.85), (0.9, 0.7499, 0.85), FINE_TUNE, ["exact"]),
        ((0.9, 0.8, 0.85), (0.8, 0.5, 0.85), FINE_TUNE, ["exact", "valid"]),  # the worst first
        ((0.9, 0.8, 0.85), (1.0, 1.0, 0.7), FINE_TUNE, ["f1"]),  # better elsewhere does not help
    ],
)
def test_point_rule(azure, slm, verdict, failing):
    decision = decide(azure, slm)
    assert (decision.verdict, decision.failing, decision.fine_tune) == (verdict, failing, verdict == FINE_TUNE)


def test_no_margin():
    assert decide((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), delta=0).verdict == SWAP
    assert decide((0.5, 0.5, 0.5), (0.5, 0.5, 0.4999), delta=0).verdict == FINE_TUNE
    assert decide((1, 1, 1), (0, 0, 0), delta=1).verdict == SWAP


def test_what_is_written():
    assert decide((0.75, 0.5, 1.0), (0.5, 0.5, 1.0)).to_json() == {
        "verdict": "FINE_TUNE",
        "fine_tune": True,
        "rule": "point",
        "delta": 0.05,
        "metrics": {
            "valid": {"azure": 0.75, "slm": 0.5, "difference": 0.25},
            "exact": {"azure": 0.5, "slm": 0.5, "difference": 0.0},
            "f1": {"azure": 1.0, "slm": 1.0, "difference": 0.0},
        },
        "failing": ["valid"],
    }


def test_only_the_gate_s_metrics_count():
    assert point_decision({"a": 0.5, "b": 1}, {"a": 0.5, "b": 0}, ("a",), 0.1).verdict == SWAP
    with pytest.raises(KeyError):
        point_decision({"a": 1}, {}, ("a",), 0.1)


def test_exit_codes():
    assert {"SWAP": 0, "FINE_TUNE": 10, "NEED_MORE_DATA": 11} == EXIT_CODES == {SWAP: 0, FINE_TUNE: 10, NEED_MORE_DATA: 11}


hundredths = st.integers(0, 100)


@given(st.tuples(hundredths, hundredths, hundredths), st.tuples(hundredths, hundredths, hundredths), hundredths)
def test_the_verdict_is_that_of_whole_numbers(azure, slm, delta):
    decision = decide([value / 100 for value in azure], [value / 100 for value in slm], delta / 100)
    worse = {name for name, left, right in zip(GATE, azure, slm, strict=True) if left - right > delta}
    assert set(decision.failing) == worse and decision.fine_tune == bool(worse)
