"""A month's bills and their crossings: answers worked out by hand, and properties against counting task by task."""

import math
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from slm_swap.clients import bills
from slm_swap.clients.bills import MOST_TASKS, Machines, Monthly

F = Fraction



def monthly(hosted, month, full, training=0, fallback=0, peak=1):
    return Monthly(F(str(hosted)), Machines(F(str(month)), F(str(full)), F(str(peak))), F(0), F(str(training)), F(str(fallback)))


def test_a_bill_by_hand():
    # 25 tasks at 2; three machines of 10 at half of the peak; 4 of training; a tenth falls back
    bill = monthly(2, 10, 20, training=4, fallback=0.1, peak=2).bill(25)
    assert (bill.hosted, bill.machines, bill.utilisation) == (50, 3, F(25, 60))
    assert bill.parts == {"machines": 30, "training": 4, "fallback": 5} and (bill.small, bill.running, bill.saving) == (39, 35, 11)


def test_an_idle_service_keeps_one_machine():
    bill = monthly(2, 10, 20).bill(0)
    assert (bill.machines, bill.small, bill.utilisation, bill.saving) == (1, 10, 0, -10)


@pytest.mark.parametrize(("tasks", "machines"), [(1, 1), (20, 1), (21, 2), (40, 2), (41, 3)])
def test_machines_are_whole(tasks, machines):
    assert monthly(2, 10, 20).bill(tasks).machines == machines


def test_the_last_task_of_a_machine_needs_no_second_one_whatever_floats_say():
    # 0.1 x 3 is more than 0.3 in floats
    assert Machines(F(1), F(3), F("0.1") * 10).needed(3) == 1 and Machines(F(1), F("0.3")).needed(3) == 10


def test_two_machines_are_dearer_again():
    """0.74 rows a second at 0.10 an hour, against 0.05625 per 1,000 hosted tasks."""
    full = F(730 * 3600) / F("1.351352")
    found = Monthly(F("0.00005625"), Machines(F(73), full)).cheaper()
    assert found.intervals == [(1_297_778, 1_944_719), (2_595_556, 3_889_438), (3_893_334, None)] and found.up_to is None
    bill = Monthly(F("0.00005625"), Machines(F(73), full)).bill(1_944_720)
    assert (bill.machines, bill.small, float(bill.hosted)) == (2, 146, 109.3905)


def test_the_peak_decides_how_many_machines():
    full = F(730 * 3600) / F("1.351352")
    found = Monthly(F("0.00005625"), Machines(F(73), full, F(3))).cheaper()
    # a machine for 648,239 tasks replaces 36.46 of hosted replies and costs 73
    assert found.intervals == [] and "it is not cheaper at any volume" in found.why


def test_a_tie_is_not_cheaper():
    # 5 tasks cost 10 on either side; 10 tasks fill the machine
    assert monthly(2, 10, 10).cheaper().intervals[0][0] == 6
    assert monthly(1, 10, 10).cheaper().intervals == []  # equal at each full machine, and dearer everywhere else
    assert monthly(0, 0, 10).cheaper().intervals == []


def test_ranges_that_touch_are_one():
    # full machines save 20 - 1 each: from 1 on at every volume
    assert monthly(2, 1, 10).cheaper().intervals == [(1, None)]


def test_what_falls_back_is_paid_twice():
    # a task saves 2 x (1 - 0.5) = 1, the machine costs 10 and does 15
    assert monthly(2, 10, 15, fallback=0.5).cheaper().intervals[0] == (11, 15)
    assert monthly(2, 10, 15, fallback=1).cheaper().intervals == []


def test_training_that_one_machine_cannot_earn_back_may_be_earned_by_more():
    # a full machine earns 10 more than it costs; training takes 25 a month: three machines, with 2.5 tasks of three full ones to spare
    found = monthly(2, 10, 10, training=25).cheaper()
    assert found.intervals[0] == (28, 30) and found.intervals[-1][1] is None


def test_a_machine_that_needs_longer_than_a_month_for_a_task():
    found = monthly(10, 1, F(1, 3)).cheaper()  # three machines a task
    assert found.intervals == [(1, None)] and monthly(10, 1, F(1, 3)).bill(2).machines == 6
    assert monthly(3, 1, F(1, 3)).cheaper().intervals == []


def test_two_hosted_models_cross_once_or_never():
    assert Monthly(F(3), None, F(1), F(10)).cheaper().intervals == [(6, None)]
    assert Monthly(F(3), None, F(1)).cheaper().intervals == [(1, None)]
    found = Monthly(F(3), None, F(3)).cheaper()
    assert found.intervals == [] and "costs no less than a hosted one" in found.why
    assert Monthly(F(3), None, F(2), fallback=F(1, 3)).cheaper().intervals == []


@pytest.mark.parametrize(
    "costs",
    [
        Monthly(None, Machines(F(1), F(1))),
        Monthly(F(1), Machines(None, F(1))),
        Monthly(F(1), Machines(F(1), None)),
        Monthly(F(1), Machines(F(1), F(1)), training=None),
        Monthly(F(1), None, None),
    ],
)
def test_what_is_not_known_has_no_saving_no_crossing_and_no_curve(costs):
    assert costs.bill(10).saving is None and costs.cheaper() is None and costs.curve(10) == []


def test_an_unknown_hosted_price_does_not_hide_the_small_models_month():
    bill = Monthly(None, Machines(F(7), F(10))).bill(15)
    assert (bill.small, bill.hosted) == (14, None)
    assert Monthly(None, Machines(F(7), F(10)), fallback=F(1, 2)).bill(15).small is None


def test_volumes_that_nobody_has_are_not_looked_at():
    found = Monthly(F(1, 10**13), Machines(F(1), F(10**14))).cheaper()
    assert found.intervals == [] and found.up_to == MOST_TASKS and "not cheaper up to 1,000,000,000,000 tasks" in found.why
    found = Monthly(F(2, 10**12), Machines(F(1), F(10**13))).cheaper()
    assert found.intervals == [(MOST_TASKS // 2 + 1, None)] and found.up_to is None


def test_very_many_ranges_end_where_looking_ended():
    # a full machine earns a thousandth of what it costs: the line and the stairs part only after a thousand machines
    found = monthly("1.0001", 1000, 1000).cheaper()
    assert len(found.intervals) == bills.MOST_STEPS and found.up_to == bills.MOST_STEPS * 1000 == found.intervals[-1][1]
    assert found.intervals[0] == (1000, 1000)


# Properties

amounts = st.integers(0, 400).map(lambda number: F(number, 7))
rates = st.integers(1, 400).map(lambda number: F(number, 9))
shares = st.integers(0, 4).map(lambda number: F(number, 4))
peaks = st.integers(4, 12).map(lambda number: F(number, 4))
small = st.builds(
    lambda hosted, month, full, peak, training, fallback: Monthly(hosted, Machines(month, full, peak), F(0), training, fallback),
    amounts, amounts, rates, peaks, amounts, shares,
)  # fmt: skip
hosted_too = st.builds(lambda hosted, task, training, fallback: Monthly(hosted, None, task, training, fallback), amounts, amounts, amounts, shares)
either = st.one_of(small, hosted_too)


def inside(found, tasks):
    return any(first <= tasks and (last is None or tasks <= last) for first, last in found.intervals)


@given(either)
def test_the_ranges_are_what_counting_finds(costs):
    found = costs.cheaper()
    for tasks in range(1, 150):
        if tasks <= (found.up_to or math.inf):
            assert inside(found, tasks) == (costs.bill(tasks).saving > 0), tasks


@given(either, st.integers(1, 10**6))
def test_ranges_are_in_order_apart_and_end_where_the_sign_does(costs, far):
    found = costs.cheaper()
    assert bool(found.intervals) != bool(found.why)
    for (_, last), (first, _) in pairwise(found.intervals):
        assert last is not None and last + 1 < first
    for first, last in found.intervals:
        assert costs.bill(first).saving > 0 and (first == 1 or costs.bill(first - 1).saving <= 0)
        assert last is None or (first <= last and costs.bill(last).saving > 0)
        if last is not None and last < (found.up_to or math.inf):
            assert costs.bill(last + 1).saving <= 0
        if last is None:
            assert costs.bill(first + far).saving > 0
    if not found.intervals and found.up_to is None:
        assert costs.bill(far).saving <= 0


@given(either, st.integers(0, 10**6), st.integers(0, 10**6))
def test_a_bill_never_falls_with_the_volume(costs, tasks, more):
    less, larger = costs.bill(tasks), costs.bill(tasks + more)
    assert less.small <= larger.small and less.hosted <= larger.hosted
    assert all(less.parts[name] <= larger.parts[name] for name in less.parts)


@given(small, st.integers(0, 10**6))
def test_machines_are_the_fewest_that_carry_the_peak(costs, tasks):
    bill, full, peak = costs.bill(tasks), costs.machines.full, costs.machines.peak
    assert bill.machines * full >= tasks * peak
    assert bill.machines == 1 or (bill.machines - 1) * full < tasks * peak
    assert bill.machines == max(1, math.ceil(tasks * peak / full)) and 0 <= bill.utilisation <= 1 / peak


@given(either, st.one_of(st.none(), st.integers(1, 5000)))
def test_a_curve_holds_every_corner(costs, volume):
    found, curve = costs.cheaper(), costs.curve(volume)
    assert curve[0].tasks == 0 and len(curve) <= 2 * bills.SAMPLES + 2
    assert all(left.tasks < right.tasks for left, right in pairwise(curve))
    if volume and volume <= (found.up_to or math.inf):
        assert curve[-1].tasks >= volume
    assert all(own == costs.bill(own.tasks) for own in curve)
    capacity = None if costs.machines is None else costs.machines.capacity
    if capacity is None or curve[-1].tasks <= bills.MOST_CORNERS * capacity:
        for left, right in pairwise(curve):  # straight in between, or one step up
            middle = (left.tasks + right.tasks) // 2
            share = F(middle - left.tasks, right.tasks - left.tasks)
            if right.tasks > left.tasks + 1:
                assert costs.bill(middle).small == left.small + share * (right.small - left.small)


@given(either, st.integers(2, 1000))
def test_another_unit_of_the_currency_changes_no_crossing(costs, times):
    machines = costs.machines and Machines(costs.machines.month * times, costs.machines.full, costs.machines.peak)
    scaled = Monthly(costs.hosted * times, machines, costs.task * times, costs.training * times, costs.fallback)
    assert scaled.cheaper() == costs.cheaper()


@given(small)
def test_a_crossing_is_shown_where_few_machines_reach_it(costs):
    found = costs.cheaper()
    assume(found.intervals)
    assert costs.curve(None)[-1].tasks >= min(found.intervals[0][0], found.up_to or math.inf)
