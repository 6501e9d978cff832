"""The simulation of the watch: its many runs at once are the detectors' own, and the program itself."""

import importlib
import sys

import numpy as np
import pytest

from slm_swap.common.reports import read_json
from slm_swap.common.settings import ROOT
from slm_swap.verdict.stats.e_detector import EDetector


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("watch_detection")
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.mark.parametrize("parts", [0, 3])
def test_many_runs_at_once_are_the_detectors_own(benchmark, parts):
    rng, trials, most = np.random.default_rng(1), 30, 400
    x, part = (rng.random((most, trials)) < 0.15).astype(float), rng.integers(0, max(parts, 1), (most, trials))
    allowed = np.array([0.1, 0.12, 0.3, 0.05][: 1 + parts])
    lengths, raised = benchmark.run_lengths(lambda t, running: (x[t, running], part[t, running]), allowed, 60, trials, most)
    assert (raised >= 0).any()
    for trial in range(trials):
        whole, own = EDetector(allowed[0], 60), [EDetector(one, 60) for one in allowed[1:]]
        for t in range(most):
            rung = own[part[t, trial]].add(x[t, trial]) if parts else False
            if whole.add(x[t, trial]) or rung:
                break
        assert lengths[trial] == whole.seen
        if raised[trial] >= 0:
            assert [whole, *own][raised[trial]].alarm is not None


def test_the_fixed_sample(benchmark):
    assert benchmark.fixed_sample(0.05, 0.05) is None and benchmark.fixed_sample(0.05, 0.04) is None
    assert benchmark.fixed_sample(0.03, 1.0) == 1  # one disagreement has a probability of 3%
    assert benchmark.fixed_sample(0.05, 0.2) < benchmark.fixed_sample(0.05, 0.1) < benchmark.fixed_sample(0.05, 0.07)


def test_the_program(benchmark, tmp_path, capsys, monkeypatch):
    for name, value in {"ALLOWED": (0.1,), "TOOLS": (0, 8), "SEEN": (0.02,), "DROPS": (0.1, 0.3), "BEFORE": 50, "MOST": 300}.items():
        monkeypatch.setattr(benchmark, name, value)
    assert benchmark.main(["--trials", "8", "--alarms-in", "100", "--out", str(tmp_path / "out.json")]) == 0
    told = read_json(tmp_path / "out.json", "")
    assert told["simulated"] is True and len(told["false_alarms"]) == 2 and len(told["detection"]) == 4 and len(told["tools"]) == 3
    assert all(cell["found"] == 1 for cell in told["detection"] if cell["drop"] == 0.3)
