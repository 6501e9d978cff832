"""One seed for every source of randomness."""

import random


def set_seed(seed: int) -> None:
    """Seed `random`, and numpy and torch where they are installed and already worth loading."""
    random.seed(seed)
    import numpy
    import torch

    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # every CUDA device too
