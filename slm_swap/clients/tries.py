"""The tries of a row that is being asked: when each was sent and answered."""

import time
from dataclasses import dataclass, field
from itertools import pairwise

from slm_swap.clients.quota import Mark


@dataclass
class Try:
    """One HTTP request: when it was sent, when its answer's head came (both by the row's clock), and with which status."""

    marks: list[Mark]
    sent: float
    answered: float | None = None
    status: int | None = None


@dataclass
class AskedRow:
    """What a task is asking: its charge in tokens, its tries, and how long the quota held them back."""

    tokens: float
    started: float = field(default_factory=time.perf_counter)
    held: float = 0.0
    tries: list[Try] = field(default_factory=list)

    def clock(self) -> float:
        """Seconds since the row was begun, those left out in which it was held back."""
        return time.perf_counter() - self.started - self.held

    def retries(self) -> list[list[float | int | None]]:
        """The tries before the last one, as `Reply` has them."""
        return [
            [round(this.sent, 6), round((this.answered or later.sent) - this.sent, 6), this.status]
            for this, later in pairwise(self.tries)
        ]
