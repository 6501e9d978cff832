"""What is said of money: numbers a person reads, and what must not be said."""

import pytest

from slm_swap.verdict import cost_words as words
from slm_swap.verdict.decision import FINE_TUNE, NEED_MORE_DATA, SWAP
from tests.support.decision_files import make_cost


@pytest.mark.parametrize(
    ("amount", "told"),
    [(1606, "1,606.00 X"), (-19, "19.00 X"), (109.3905, "109.39 X"), (0.999, "1.00 X"), (0.0020594, "0.00206 X"), (0.00001234, "1.2e-05 X"), (0, "0 X")],
)
def test_amounts(amount, told):
    assert words.money(amount, "X") == told and words.money(amount) == told[:-2]


@pytest.mark.parametrize(
    ("share", "told"),
    [(1, "100%"), (0.43, "43%"), (0.0957, "9.6%"), (1.28e-5, "0.0013%"), (1e-9, "under 0.0001%"), (0, "0%"), (None, "")],
)
def test_utilisation(share, told):
    assert words.utilised(share) == (f"{told} utilised" if told else "utilisation not known")


def ranges(*ends):
    return {"cheaper": [{"first": first, "last": last} for first, last in ends]}


@pytest.mark.parametrize(
    ("ends", "told"),
    [
        ([], None),
        ([(1, None)], "at every volume"),
        ([(7, None)], "from 7 tasks a month on"),
        ([(7, 9)], "from 7 to 9 tasks a month"),
        ([(7, 7), (1000, 2000)], "at 7, and from 1,000 to 2,000 tasks a month"),
        ([(1, 5), (8, None)], "from 1 to 5, and from 8 tasks a month on"),
        (
            [(10 * n, 10 * n + 1) for n in range(1, 8)] + [(100, None)],
            "from 10 to 11, from 20 to 21, from 30 to 31, from 40 to 41, in 3 further ranges of volume, and from 100 tasks a month on",
        ),
    ],
)
def test_ranges_of_volume(ends, told):
    assert words.volumes(ranges(*ends)) == told


def test_the_headline_has_the_utilisation_beside_the_bill():
    assert words.headline(make_cost(), "USD") == (
        "At 10,000,000 tasks a month the hosted model costs 5,413.00 USD and the small one 4,380.25 USD (3 machines, 43% utilised): "
        "1,032.75 USD less a month."
    )


def test_a_saving_beside_the_errors_that_it_may_buy():
    told = words.margin(make_cost(), 0.02, "USD")
    assert told == (
        "The margin of 2 points allows up to 200,000 more wrong replies a month, worth 2,000.00 USD at 0.01 USD each: "
        "no less than the saving of 1,032.75 USD."
    )
    assert words.margin(make_cost(cost_of_error=0.001), 0.02, "USD").endswith("each: less than the saving of 1,032.75 USD.")
    assert "200,000 more wrong replies a month (not priced" in words.margin(make_cost(cost_of_error=None), 0.02, "USD")
    assert words.margin(make_cost(tasks_per_month=None), 0.02, "USD") == "The margin of 2 points allows up to 20 more wrong replies per 1,000."
    assert words.margin(make_cost(), 0, "USD") is None
    dearer = words.margin(make_cost(tasks_per_month=4_000_000), 0.02, "USD")
    assert dearer.endswith("worth 800.00 USD at 0.01 USD each.") and "saving" not in dearer


@pytest.mark.parametrize("verdict", [SWAP, FINE_TUNE, NEED_MORE_DATA])
@pytest.mark.parametrize("months", [None, 0.01, 0.42, 1.0, 31.4])
def test_paid_back_only_beside_a_swap(verdict, months):
    told = {None: None, 0.01: "less than 0.1 month", 0.42: "0.42 months", 1.0: "1 month", 31.4: "31 months"}[months]
    cost = make_cost() | {"paid_back_months": months}
    assert words.paid_back(cost, verdict) == (told if verdict == SWAP else None)
    assert any("paid back" in text for text in words.sentences(cost, verdict, 0.02, "USD")) == (verdict == SWAP and months is not None)


def test_never_from_the_first_task_where_the_hours_are_not_known():
    told = words.sentences(make_cost(SWAP, local={"hours_per_month": None}), SWAP, 0.02, "USD")
    assert told[0] == "Savings unknown: fill in slm_swap/prices.toml. At 10,000,000 tasks a month the hosted model costs 5,413.00 USD."
    assert not any("costs less" in text or "paid back" in text for text in told)


def test_of_how_many_rows_a_price_is():
    cost = make_cost()
    cost["azure"] |= {"rows": 240, "rows_counted": 120}
    assert "hosted 0.541 USD (token counts of 120 of 240 rows), small" in words.unit_costs(cost, "USD")


def test_where_it_never_pays_the_reason_is_said():
    told = words.crossings(make_cost(peak_factor=40))
    assert told.startswith("The small model never costs less: a machine costs no less than the hosted replies")


def test_volumes_that_were_not_looked_at():
    assert words.crossings(make_cost() | {"looked_up_to": 10**7}).endswith("Volumes above 10,000,000 were not looked at.")
