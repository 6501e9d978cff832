"""A change at an unknown time, found while it happens, with false alarms at a stated rate: an e-detector.

Shin, Ramdas and Rinaldo, "E-detectors: a nonparametric framework for sequential change detection" (New England Journal of Statistics in
Data Science 2, 2024), their e-SR (Shiryaev-Roberts) with a mixture of bets. Observations x_1, x_2, ... lie in 0..1. Before the change,
the null, each one's mean given all earlier ones is at most `allowed`. For each alternative mean q of `alternatives`

    M_0(q) = 0,   M_t(q) = (M_{t-1}(q) + 1) (1 + b (x_t - allowed)),   b = (q - allowed) / (allowed (1 - allowed))

and the evidence M_t is their mean. For yes-no observations the factor is the likelihood ratio of q against `allowed`; for others it is a bet
on the mean, whatever their distribution. The "+ 1" is a new unit of money at each observation, as the change may come just then.

What holds: tau, the first t with M_t >= N, has E[tau] >= N as long as there is no change: one false alarm in N observations on average, at most.
Proof. b (x - allowed) >= -b allowed = -(q - allowed) / (1 - allowed) > -1, so no factor is negative, and under the null its mean given the
past is at most 1. So E[M_t | past] <= M_{t-1} + 1: M_t - t is a supermartingale that begins at 0, and E[M_s] <= E[s] for s = min(tau, n), at
each n (optional stopping). If tau may be infinite, E[tau] is infinite. If not, M_s tends to M_tau >= N as n grows, M is not negative, and Fatou's lemma
gives N <= E[M_tau] <= lim E[min(tau, n)] = E[tau]. Nothing is assumed of the distribution besides the bound on the mean, one may look at every moment, and
M depends on nothing but the observations in their order, so that a detector is resumed by reading them again.

Several detectors share one N. Weigh detector i by a_i and let it raise the alarm at N / a_i; n_i of the first t observations are its own. At the
first alarm the sum of a_i M_i is at least N, and that sum less the sum of a_i n_i(t) is a supermartingale. So E[tau] >= N holds where the
weights of the detectors that see an observation add up to at most 1, at each observation. One detector that sees every observation and one for each of
any number of disjoint parts (tools) may therefore each have a weight of 1/2: the parts' rates need not be divided by their number, as each
part counts its own observations only, and a part may be added at any time. Where an observation is of k parts at once (a reply that calls k tools), each of
them gets 1 / k of the new money (`add(x, money=1 / k)`), k being known before x is: M_t = (M_{t-1} + 1 / k) (1 + b (x_t - allowed)). The weights of what is added then
still are 1 at most, 1/2 + k (1/2) (1/k), and the proof holds as it stands. The parts need not be independent of each other.
"""

from math import inf

FIRST, RATIO, LARGEST = 1.25, 1.6, 0.95  # odds of the alternatives over those of `allowed`: the first, each over the one before; the last mean


def alternatives(allowed: float) -> list[float]:
    """The means that are betted on: odds 1.25 times those of `allowed`, and 1.6 times more each, up to a mean of 0.95.

    A bet on odds within a factor of 1.27 of the true ones grows nearly as fast as the best; more of them leave each with less money.

    Raises:
        ValueError: `allowed` is not above 0 and below 1: nothing can be found then.
    """
    if not 0 < allowed < 1:
        raise ValueError(f"allowed {allowed} must be above 0 and below 1")
    odds, most = FIRST * allowed / (1 - allowed), LARGEST / (1 - LARGEST)
    found = []
    while odds <= most:
        found.append(odds / (1 + odds))
        odds *= RATIO
    return found or [(1 + allowed) / 2]


def bets(allowed: float) -> list[float]:
    """The b of each alternative, above 0 and below 1 / `allowed`."""
    return [(q - allowed) / (allowed * (1 - allowed)) for q in alternatives(allowed)]


class EDetector:
    """One detector: `add` an observation; `alarm` is after how many of them the evidence reached `alarm_at`, None where it did not.

    The evidence stays as it was at the alarm; `seen` and `total` (observations, their sum) go on. `since`: the change most likely began where the
    bet that has won the most was last without winnings (Page's CUSUM, of the same bets).
    """

    def __init__(self, allowed: float, alarm_at: float):
        self.allowed, self.alarm_at = allowed, alarm_at
        self.seen, self.total, self.alarm = 0, 0.0, None
        self._bets = bets(allowed)
        self._money, self._won = [0.0] * len(self._bets), [1.0] * len(self._bets)
        self._start = [(1, 0.0)] * len(self._bets)

    def add(self, x: float, money: float = 1.0) -> bool:
        """Take one observation, 0..1; whether this one raises the alarm. `money`, above 0 to 1, is what comes in with it, less than 1 where other detectors share it."""
        if not 0 <= x <= 1:
            raise ValueError(f"observation {x} must be from 0 to 1")
        if not 0 < money <= 1:
            raise ValueError(f"money {money} must be above 0, and 1 at most")
        before = self.total
        self.seen += 1
        self.total += x
        if self.alarm is not None:
            return False
        held, won, more = self._money, self._won, x - self.allowed
        for at, bet in enumerate(self._bets):
            factor = 1 + bet * more
            held[at] = (held[at] + money) * factor
            if won[at] > 1:
                won[at] *= factor
            else:
                self._start[at], won[at] = (self.seen, before), factor
        if self.evidence >= self.alarm_at:
            self.alarm = self.seen
        return self.alarm is not None

    @property
    def evidence(self) -> float:
        return sum(self._money) / len(self._money)

    @property
    def since(self) -> tuple[int, float]:
        """The observation (from 1) at which the change most likely began, and the sum of all before it."""
        return self._start[self._money.index(max(self._money))]


class Mixture:
    """Detectors of the same observations' parts, such as several thresholds of one distribution, with one alarm: the mean of their evidence.

    Each part sees every observation (its own number of it), so the mean is an e-detector as each of them is.
    """

    def __init__(self, allowed: list[float], alarm_at: float):
        self.parts = [EDetector(one, inf) for one in allowed]
        self.alarm_at, self.alarm = alarm_at, None

    def add(self, xs: list[float], money: float = 1.0) -> bool:
        """Take one observation, a number for each part; whether this one raises the alarm."""
        if self.alarm is not None:
            return False
        for part, x in zip(self.parts, xs, strict=True):
            part.add(x, money)
        if self.evidence >= self.alarm_at:
            self.alarm = self.seen
        return self.alarm is not None

    @property
    def seen(self) -> int:
        return self.parts[0].seen

    @property
    def evidence(self) -> float:
        return sum(part.evidence for part in self.parts) / len(self.parts)
