"""The coverage of cascades: the rule for many draws is the rule itself, and the true regret of groups is what drawing gives."""

import numpy as np
import pytest

from benchmarks.cascade_coverage import DELTA, DESIGNS, cell, draw_groups, lost_units


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("kind", ["informative", "tied"])
def test_a_cell_follows_the_rule(design, kind):
    """`cell` itself compares its thresholds with `stats.regret`."""
    found = cell(np.random.default_rng(7), design, 40, 400, 0.02, kind)
    assert found["certified"] > 0.5 and 0 < found["share_local"] < 1 and found["missed"] < 0.2
    nothing = cell(np.random.default_rng(7), design, 10, 100, 0.02, kind)
    assert (nothing["certified"], nothing["missed"], nothing["share_local"]) == (0, 0, 0), "100 units certify no 2 points"


def test_the_true_regret_of_groups():
    draws = draw_groups(np.random.default_rng(3), 200, 2000, 0.03, 1.5, False)
    for threshold in (-1.0, 0.0, 1.5):
        seen = float((draws.lost & (draws.values >= threshold)).any(2).mean())
        assert lost_units(np.array([threshold]), 0.03)[0] == pytest.approx(seen, abs=6 * (DELTA / 400_000) ** 0.5)
