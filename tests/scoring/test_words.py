"""Words for people."""

import pytest

from slm_swap.scoring.words import level


@pytest.mark.parametrize(
    ("error", "told"),
    [(0.05, "95%"), (0.1, "90%"), (0.025, "97.5%"), (0.001, "99.9%"), (0.0001, "99.99%"), (0.00009, "over 99.99%"), (1e-9, "over 99.99%"), (5e-324, "over 99.99%")],
)
def test_nothing_is_a_hundred_percent_sure(error, told):
    assert level(error) == told
