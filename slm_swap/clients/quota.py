"""How fast a hosted deployment may be asked: a quota of requests and one of tokens a minute, followed by what its answers tell.

How Azure meters (learn.microsoft.com, unless said otherwise):
- A deployment has a limit of tokens and one of requests per minute. Tokens are charged as a request comes in, by an estimate from the prompt's
  characters plus `max_tokens`, whatever the reply takes; requests are watched over windows of 1 or 10 seconds.
  en-us/azure/ai-services/openai/how-to/quota, en-us/microsoft-cloud/dev/dev-proxy/concepts/azure-openai-429-token-rate-limit
- Answers have x-ratelimit-remaining-requests and -tokens, but not everywhere -limit- (github.com/Azure/azure-rest-api-specs/issues/26884), which
  may be a window's and not a minute's (en-us/answers/questions/2265464); -1 tells nothing (github.com/openai/openai-dotnet/issues/838).
- A 429 tells when to come back in retry-after-ms, Retry-After or, in some versions, x-ratelimit-reset-tokens alone
  (github.com/openai/openai-python/issues/937).

So only what remains is taken on trust. A model of the server's bucket is charged for each request that is sent and set right by each answer; how
fast it refills is measured. A window, other users of the quota, and prompts whose tokens were estimated too high or low all come out as
another refill: the sum of what several requests were charged is known from what remains, that of one among many under way is not.
"""

import math
import re
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

LONGEST_WAIT = 120.0  # seconds; the openai package gives a row up whose server asks for more
RESERVE = 0.03  # of a full bucket, is never spent: requests do not arrive as evenly as they are sent
CARE, FORGIVEN = 0.1, 60.0  # so much of it more after each refusal that was no surprise to the server only; 1/e of that after so many seconds
TOGETHER = 0.1  # seconds: requests that are sent within may arrive in any order
# A bucket of one request: the first pace, requests a second (Azure's longer window); how much faster is tried; a success fades a refusal's pace.
FIRST_PACE, HASTE, FORGIVING = 0.1, 2.0, 1.0005
INTERVAL, MEMORY = 1.0, 10.0  # seconds: the shortest that refill is measured over; the age at which a measurement counts 1/e


@dataclass
class Mark:
    """A request as it was sent: when, its charge, all charges up to it, and what the model then expected to be left.

    `before` and `after` are the charges of requests that were sent so shortly before or after that they may have come in another order.
    """

    at: float
    amount: float
    spent: float
    expected: float
    before: float
    since: float  # seconds since the request before it that was not refused, as far as is known
    after: float = 0.0

    @property
    def unsure(self) -> float:
        """By how much the answer may be off."""
        return self.before + self.after


class Refill:
    """How fast a bucket fills: between two answers, what it has more and what was spent."""

    def __init__(self) -> None:
        self._gained = self._seconds = 0.0
        self._since: Mark | None = None
        self._total = 0.0
        self._full = False

    def rate(self, stated: float) -> float:
        """A second's; the stated one counts as one second of measurement."""
        return max((self._gained + stated) / (self._seconds + 1), stated / 20)

    def measure(self, mark: Mark, remaining: float, full: bool, rate: float) -> None:
        """Take an answer in; a bucket that was full in between may have lost some, so that its gain is only a lower bound. From a request
        that was sent in a crowd on nothing is measured if one can be found that was not."""
        since, total = self._since, remaining + mark.spent
        self._full |= full
        if since is not None:
            seconds, gain = mark.at - since.at, total - self._total
            long_enough = seconds >= max(INTERVAL, 5 * (mark.unsure + since.unsure) / rate)
            if not long_enough and mark.unsure >= since.unsure / 2:
                return
            if long_enough and (not self._full or gain > rate * seconds):
                kept = math.exp(-seconds / MEMORY)
                self._gained, self._seconds = self._gained * kept + gain, self._seconds * kept + seconds
        self._since, self._total, self._full = mark, total, full

    def undo(self, mark: Mark) -> None:
        """A request was not charged after all."""
        if self._since is not None and self._since.at < mark.at:
            self._total += mark.amount

    def restart(self) -> None:
        """What was left last is no longer known."""
        self._since = None


class Pace:
    """How fast a bucket that holds a single request may be asked. It is full whenever a request is let in, so that its refill cannot be
    measured, only tried out: between the fastest pace that went well and the slowest that did not, in requests a second."""

    def __init__(self) -> None:
        self._well, self._badly = FIRST_PACE / HASTE, math.inf

    @property
    def rate(self) -> float:
        close = self._badly <= self._well * (1 + RESERVE)
        return self._well if close else min(HASTE * self._well, (self._well + self._badly) / 2)

    def went(self, well: bool, since: float) -> None:
        """A request that came so many seconds after another was let in or was not."""
        pace = 1 / max(since, TOGETHER)
        if well:
            self._well, self._badly = max(self._well, pace), max(self._badly * FORGIVING, pace)
        elif math.isfinite(since):
            self._well, self._badly = min(self._well, pace * (1 - RESERVE)), pace


class Gauge:
    """What is left of one quota at the server, in requests or tokens; unlimited as long as the server has told nothing of it."""

    def __init__(self) -> None:
        self._capacity = self._limit = self._spent = 0.0
        self._level, self._at = 0.0, -math.inf  # of the model, without corrections
        self._errors: deque[tuple[float, float, float]] = deque()  # sent when; by how much more was left than expected; at least
        self.under_way = 0  # requests that were sent and not heard of
        self._sent: deque[Mark] = deque()
        self._refill, self._pace, self._last, self._single = Refill(), Pace(), -math.inf, False
        self._refused_spent, self._refused_at, self._care = 0.0, -math.inf, 0.0

    @property
    def known(self) -> bool:
        """Whether the server tells of this quota."""
        return bool(self._errors)

    @property
    def _rate(self) -> float:
        if self._single and not self._limit:
            return self._pace.rate * self._capacity
        return self._refill.rate(max(self._limit, self._capacity) / 60)

    @property
    def _correction(self) -> float:
        """By how much more is left than the model has. Of requests sent together one cannot say which came first until all were heard of."""
        if self.under_way:
            return max(least for _, _, least in self._errors)
        return sum(error for _, error, _ in self._errors) / len(self._errors)

    def _reserve(self, now: float) -> float:
        return self._capacity * (RESERVE + self._care * math.exp((self._refused_at - now) / FORGIVEN))

    def _run(self, now: float) -> None:
        """Let the model fill, to above its capacity, so that the reserve is waited for where a request takes a whole bucket."""
        if self.known:
            full = self._capacity + self._reserve(now) - self._correction
            self._level = min(max(full, self._level), self._level + self._rate * (now - self._at))
        self._at = now

    def wait(self, amount: float, now: float) -> float:
        """Seconds until a request may be sent; one larger than the bucket waits for a full one."""
        self._run(now)
        if not self.known:
            return 0.0
        return max(0.0, min(amount, self._capacity) + self._reserve(now) - self._level - self._correction) / self._rate

    def take(self, amount: float, now: float) -> Mark:
        """Charge a request that is sent now."""
        self._run(now)
        if self.known:
            self._level = min(self._level, self._capacity - self._correction)
        self.under_way += 1
        self._spent += amount
        self._level -= amount
        while self._sent and self._sent[0].at < now - TOGETHER:
            self._sent.popleft()
        for mark in self._sent:
            mark.after += amount
        self._sent.append(Mark(now, amount, self._spent, self._level, sum(mark.amount for mark in self._sent), now - self._last))
        self._last = now
        return self._sent[-1]

    def told(self, mark: Mark, remaining: float, limit: float | None) -> None:
        """Take in what was left when a request had come in; answers to much older requests than one answered already tell no more."""
        self._limit, self._capacity = limit or 0.0, max(self._capacity, remaining + mark.amount)
        full = remaining + mark.amount >= self._capacity * (1 - RESERVE)
        self._single = self._capacity == mark.amount
        if self._single:
            self._pace.went(True, mark.since)
        self._refill.measure(mark, remaining, full, self._rate)
        newest = max((at for at, _, _ in self._errors), default=mark.at)
        if mark.spent > self._refused_spent and mark.at >= newest - TOGETHER:
            error = remaining - mark.expected
            self._errors.append((mark.at, error, error - mark.before))
            while self._errors[0][0] < mark.at - TOGETHER:
                self._errors.popleft()

    def refused(self, mark: Mark, wait: float, now: float) -> None:
        """Take in that a request was not let in and may come `wait` seconds later. A refusal of what was sent after another was heard of
        is one more of the model's mistakes: more is kept back for a while."""
        self._refill.undo(mark)
        if self._single:
            self._pace.went(False, mark.since)
            self._last = -math.inf
        if not self.known or mark.spent <= self._refused_spent:
            return
        if mark.at > self._refused_at:
            self._care, self._refused_at = self._care * math.exp((self._refused_at - now) / FORGIVEN) + CARE, now
        self._refused_spent = mark.spent
        error = mark.amount - self._rate * wait - mark.expected
        self._errors = deque([(mark.at, error, error)])

    def forget(self) -> None:
        """The server does not tell of this quota any more."""
        self._errors.clear()
        self._refill.restart()


class Quota:
    """The limiter that all requests to a deployment share: one is sent with `take` once `wait` is 0, and `told` hears its answer.

    Where one is told to wait, all wait, and then one that is no larger goes ahead. `clock` gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._paused_until, self._welcome = clock, -math.inf, 0.0
        self._gauges = {"requests": Gauge(), "tokens": Gauge()}

    def wait(self, tokens: float) -> float:
        """Seconds until a request of so many tokens (prompt and limit of the reply) may be sent, by what is known now."""
        now = self._clock()
        if tokens <= self._welcome:
            return max(0.0, self._paused_until - now)
        waits = (gauge.wait(amount, now) for gauge, amount in zip(self._gauges.values(), (1.0, tokens), strict=True))
        return max(0.0, self._paused_until - now, *waits)

    def take(self, tokens: float) -> list[Mark]:
        """Charge a request that is sent now."""
        now, self._welcome = self._clock(), 0.0
        return [gauge.take(amount, now) for gauge, amount in zip(self._gauges.values(), (1.0, tokens), strict=True)]

    def told(self, marks: list[Mark], status: int, headers: Mapping[str, str]) -> None:
        """Take in the status and the headers (names in lower case) of the answer to a request that `take` gave these marks."""
        now, wait = self._clock(), asked_wait(headers) if status == 429 else None
        if wait is not None and wait <= LONGEST_WAIT:
            self._paused_until, self._welcome = max(self._paused_until, now + wait), marks[-1].amount
        for (name, gauge), mark in zip(self._gauges.items(), marks, strict=True):
            gauge.under_way -= 1
            remaining, limit = (_count(headers.get(f"x-ratelimit-{what}-{name}")) for what in ("remaining", "limit"))
            if status == 429 and (remaining is None or remaining < mark.amount):
                gauge.refused(mark, min(wait or 0.0, LONGEST_WAIT), now)
            elif remaining is not None:
                gauge.told(mark, remaining, limit)
            elif status < 300:
                gauge.forget()

    def lost(self) -> None:
        """No answer will come to a request; whether it was charged, the next answers tell."""
        for gauge in self._gauges.values():
            gauge.under_way -= 1


def _count(text: str | None) -> float | None:
    return float(text) if text and re.fullmatch(r"[0-9]{1,15}", text) else None


def asked_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds after which a refused request may come again; None where the headers do not tell (or tell a date)."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        if re.fullmatch(r"[0-9]{1,9}(\.[0-9]+)?", headers.get(name, "")):
            return float(headers[name]) * unit
    resets = (headers.get(f"x-ratelimit-reset-{name}", "") for name in ("requests", "tokens"))
    return max((seconds for seconds in map(_seconds, resets) if seconds is not None), default=None)


def _seconds(text: str) -> float | None:
    """Azure writes 55, OpenAI 6m0s or 20ms."""
    if not re.fullmatch(r"([0-9]{1,9}(\.[0-9]+)?(h|ms|m|s|$))+", text):
        return None
    units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001, "": 1.0}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([0-9.]+)(h|ms|m|s|)", text))
