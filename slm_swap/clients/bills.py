"""A month's bill of either model, and the volumes at which the small one is the cheaper: exact, in whole tasks and whole machines.

A hosted model is paid by the task. A small one runs on machines that are paid for every hour that they are kept running, idle hours
included. Their number is whole, so its bill over the volume is a staircase, and the two bills may cross many times. All amounts are
fractions in one currency, all volumes are tasks a month; None is not known, and whatever rests on it is None.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

MOST_TASKS = 10**12  # a month; volumes above it are not looked at
MOST_STEPS = 1000  # numbers of machines that are looked at for crossings, from the first number that can pay
MOST_CORNERS = 60  # machines up to which a curve has the corners of all its steps
SAMPLES = 120  # volumes of a curve with more machines than that
NARROW = 12  # machines up to which a curve reaches to the last crossing

Interval = tuple[int, int | None]  # first and last volume; None: without end


@dataclass(frozen=True)
class Machines:
    """Machines of one kind. `month`: what one costs a month. `full`: the tasks that one does a month if it is never idle (above 0).
    `peak`: the peak rate of tasks over the mean rate, at least 1; machines are bought for the peak."""

    month: Fraction | None
    full: Fraction | None
    peak: Fraction = Fraction(1)

    @property
    def capacity(self) -> Fraction | None:
        """The tasks a month that one machine can serve."""
        return None if self.full is None else self.full / self.peak

    def needed(self, tasks: int) -> int | None:
        """The machines that so many tasks a month take: at least one, as an idle service runs too."""
        return None if self.capacity is None else max(1, math.ceil(tasks / self.capacity))


@dataclass(frozen=True)
class Bill:
    """What `tasks` a month cost. `parts` add up to the small model's month: machines (or its own tokens), training, fallback.

    `utilisation` is the share of the paid hours in which the machines work."""

    tasks: int
    hosted: Fraction | None
    parts: dict[str, Fraction | None]
    machines: int | None = None
    utilisation: Fraction | None = None

    @property
    def small(self) -> Fraction | None:
        return _sum(self.parts.values())

    @property
    def running(self) -> Fraction | None:
        """The small model's month without its training."""
        return _sum(amount for name, amount in self.parts.items() if name != "training")

    @property
    def saving(self) -> Fraction | None:
        """By how much the small model is cheaper; negative where it is dearer."""
        return None if self.hosted is None or self.small is None else self.hosted - self.small


def _sum(amounts) -> Fraction | None:
    known = list(amounts)
    return None if None in known else sum(known, Fraction(0))


@dataclass(frozen=True)
class Cheaper:
    """The volumes (1 or more) at which the small model costs less, in order and apart from each other. `up_to`: the last volume that was
    looked at, None for all. `why`: the reason where there are none."""

    intervals: list[Interval]
    up_to: int | None = None
    why: str | None = None


@dataclass(frozen=True)
class Monthly:
    """What makes up the two bills: `hosted` a task of the hosted model; the small model's `machines`, or where it is hosted too, None and its
    price by `task`; `training` a month's share of it; `fallback` the share of tasks (0..1) that the hosted model answers again."""

    hosted: Fraction | None
    machines: Machines | None
    task: Fraction | None = Fraction(0)
    training: Fraction | None = Fraction(0)
    fallback: Fraction = Fraction(0)

    def bill(self, tasks: int) -> Bill:
        """Both bills at a volume of 0 or more."""
        hosted = None if self.hosted is None else tasks * self.hosted
        again = Fraction(0) if self.fallback == 0 else None if hosted is None else self.fallback * hosted
        shared = {"training": self.training, "fallback": again}
        if self.machines is None:
            return Bill(tasks, hosted, {"tokens": None if self.task is None else tasks * self.task} | shared)
        needed, month, full = self.machines.needed(tasks), self.machines.month, self.machines.full
        paid = None if needed is None or month is None else needed * month
        return Bill(tasks, hosted, {"machines": paid} | shared, needed, None if needed is None else tasks / (needed * full))

    def cheaper(self) -> Cheaper | None:
        """All volumes at which the small model costs less; None where a price or a measurement is not known.

        With m machines of M a month and a capacity of C tasks, it costs less at n tasks where n g > m M + T: g is what a task saves and T is
        training. That can hold at all only if C g > M, begins only at m > T / (C g - M), and holds for all n from m >= (T + C g) / (C g - M) on.
        """
        if self.bill(1).saving is None:
            return None
        saving = self.hosted * (1 - self.fallback) - self.task
        if saving <= 0:
            return Cheaper([], why="a task of the small model costs no less than a hosted one: it is not cheaper at any volume")
        if self.machines is None:
            return _within([(_above(self.training / saving), None)], None)
        month, capacity = self.machines.month, self.machines.capacity
        gain = capacity * saving - month
        if gain <= 0:
            why = "a machine costs no less than the hosted replies to all the tasks that it can do: it is not cheaper at any volume"
            return Cheaper([], why=why)
        begin, always = _above(self.training / gain), math.ceil((self.training + capacity * saving) / gain)
        end, found = min(always, begin + MOST_STEPS), []
        for machines in range(begin, end):
            step = max(_above((machines - 1) * capacity), _above((machines * month + self.training) / saving))
            _join(found, step, math.floor(machines * capacity))
        last = math.floor((end - 1) * capacity)
        if end == always:
            _join(found, last + 1, None)
        return _within(found, None if end == always else last)

    def curve(self, volume: int | None) -> list[Bill]:
        """Bills from volume 0 to beyond what matters (`volume`, the crossings), enough to draw both lines; [] where one is not known.

        Between two neighbours both bills are straight lines, or climb one machine; with very many machines they are samples."""
        found = self.cheaper()
        if found is None:
            return []
        capacity = None if self.machines is None else self.machines.capacity
        most = max(2 * (volume or 0), self._reach(found), 2)
        most = min(most, MOST_TASKS, found.up_to or MOST_TASKS)
        at = {0, most}
        if capacity is not None and most <= MOST_CORNERS * capacity:
            steps = (math.floor(step * capacity) for step in range(1, math.ceil(most / capacity)))
            at |= {tasks for end in steps for tasks in (end, end + 1) if tasks <= most}
        elif capacity is not None:
            at |= {most * sample // SAMPLES for sample in range(SAMPLES)}
        return [self.bill(tasks) for tasks in sorted(at)]

    def _reach(self, found: Cheaper) -> int:
        """Up to which volume a curve shows the crossings: beyond the last one if that takes few machines, else the first one."""
        capacity = None if self.machines is None else self.machines.capacity
        if not found.intervals:
            return 1_000_000 if capacity is None else math.ceil(2 * capacity)
        first, last = found.intervals[0][0], found.intervals[-1][0]
        near = capacity is None or last <= NARROW * capacity
        return max(2 * first, math.ceil(last * Fraction(5, 4)) if near else 0)


def _above(number: Fraction) -> int:
    """The smallest whole number above it."""
    return math.floor(number) + 1


def _join(found: list[Interval], first: int, last: int | None) -> None:
    """Add an interval behind the others, as one with the last where nothing is between; an empty one is not added."""
    if last is not None and first > last:
        return
    if found and found[-1][1] is not None and first <= found[-1][1] + 1:
        first = found.pop()[0]
    found.append((first, last))


def _within(found: list[Interval], up_to: int | None) -> Cheaper:
    """The intervals as far as MOST_TASKS."""
    kept = [(first, last) for first, last in found if first <= MOST_TASKS]
    if len(kept) < len(found) or (up_to or 0) > MOST_TASKS:
        up_to = MOST_TASKS
    if kept and (kept[-1][1] or 0) > MOST_TASKS:
        kept[-1], up_to = (kept[-1][0], MOST_TASKS), MOST_TASKS
    return Cheaper(kept, up_to, None if kept else f"the small model is not cheaper up to {up_to:,} tasks a month")
