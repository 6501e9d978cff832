"""What all tests of training need: the heavy packages, loaded once."""

import gc

import pytest


@pytest.fixture(scope="session", autouse=True)
def loaded() -> None:
    """Training collects garbage at its end: without the objects of the packages, which take most of a second each time, in each fork too."""
    import slm_swap.tuning.fast_training
    import slm_swap.tuning.trainer  # noqa: F401

    gc.collect()
    gc.freeze()
