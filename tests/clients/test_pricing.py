"""The price table, the cost of a row, and break-even volumes: hand-computed answers, and properties checked in exact arithmetic."""

import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_swap.clients import pricing
from slm_swap.clients.pricing import HostedPrices, LocalPrices, Prices, compare_costs, load_prices, row_cost
from slm_swap.common.errors import UserError
from slm_swap.common.settings import PACKAGE
from slm_swap.demo.azure_simulator import AzureSimulator

WHOLE = """
currency = "USD"
[hosted."gpt-4o-mini"]
input = 0.15
cached = 0.075
output = 0.60
[hosted."gpt-4.1"]
input = 2
output = 8
[local]
hour = 2.20
hours_per_month = 730
training_hour = 3
pay_off_months = 12
"""
# A row: 1,000 tokens in of which 400 cached, 50 out: (600 x 2 + 400 x 1 + 50 x 8) / 1,000,000 = 0.002
HOSTED = HostedPrices(input=2.0, cached=1.0, output=8.0)
# A row: 1.8 seconds of an hour at 2.00: 0.001
LOCAL = LocalPrices(hour=2.0, hours_per_month=500, training_hour=4.0, pay_off_months=10)
PRICES = Prices("prices.toml", "EUR", {"gpt": HOSTED}, LOCAL)
HOUR = 3600.0


def azure(rows=100, failed=0, **changes):
    report = {
        "model": {"kind": "azure", "deployment": "gpt"},
        "tokens": {"input": 100_000, "cached": 40_000, "output": 5_000},
        "seconds": {"generate": 9.0},
        "counts": {"rows": rows, "failed_requests": failed},
        "cost": {"total": 99.0, "per_1000_rows": 990.0},  # by the prices of the day it was made
    }
    return report | changes


def slm(adapter=None, seconds=180.0, rows=100, **changes):
    report = {
        "model": {"kind": "slm", "path": "models/phi", "adapter": adapter},
        "tokens": {"input": 90_000, "cached": 0, "output": 5_000},
        "seconds": {"load": 50.0, "generate": seconds, "total": 999.0},
        "counts": {"rows": rows, "failed_requests": 0},
    }
    return report | changes


def replay():
    return azure(model={"kind": "replay", "path": "replies.jsonl"}, tokens={"input": 0, "cached": 0, "output": 0})


def priced(**changes):
    """PRICES with other values under [local]."""
    return Prices("prices.toml", "EUR", {"gpt": HOSTED}, LocalPrices(**vars(LOCAL) | changes))


# The table


@pytest.fixture
def table(tmp_path):
    """A function that writes a price table and reads it."""

    def read(text: str | bytes) -> Prices:
        path = tmp_path / "table.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_prices(path)

    return read


def test_a_whole_table(table, tmp_path):
    assert table(WHOLE) == Prices(
        str(tmp_path / "table.toml"),
        "USD",
        {"gpt-4o-mini": HostedPrices(0.15, 0.075, 0.6), "gpt-4.1": HostedPrices(2, None, 8)},
        LocalPrices(2.2, 730, 3, 12),
    )


@pytest.mark.parametrize("text", ["", "# nothing", "[local]\n[hosted]\n"])
def test_nothing_known(table, text):
    prices = table(text)
    assert (prices.currency, prices.hosted, prices.local) == (None, {}, LocalPrices(None, None, None, None))


def test_a_price_may_be_nothing(table):
    assert table("[local]\nhour = 0\n").local.hour == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("curency = 'USD'", "the file has an unknown key 'curency': it takes currency, hosted, local"),
        ("currency = 7", "currency is 7, not a name"),
        ("currency = ' '", "currency is ' ', not a name"),
        ("hosted = 3", r"\[hosted\] is 3, not a table"),
        ("local = [1]", r"\[local\] is \[1\], not a table"),
        ("[hosted]\ninput = 1", r"\[hosted.\"input\"\] is 1, not a table: prices stand under"),
        ("[hosted.a]\nprompt = 1", r"\[hosted.\"a\"\] has an unknown key 'prompt': it takes input, cached, output"),
        ("[hosted.gpt-4.1]\ninput = 1", r"\[hosted.\"gpt-4\"\] has an unknown key '1' \(a deployment with a dot .* quotes\)"),
        ("[local]\nhours = 1", r"\[local\] has an unknown key 'hours': it takes hour, hours_per_month, training_hour, pay_off_m"),
        ("[hosted.a]\ninput = -0.1", r"input in \[hosted.\"a\"\] is -0.1: set it to a number from 0 up to 1,000,000,000,000, or"),
        ("[hosted.a]\ncached = nan", r"cached in \[hosted.\"a\"\] is nan"),
        ("[hosted.a]\noutput = inf", r"output in \[hosted.\"a\"\] is inf"),
        ("[hosted.a]\noutput = '0.6'", r"output in \[hosted.\"a\"\] is '0.6'"),
        ("[local]\nhour = true", r"hour in \[local\] is True"),
        ("[local]\nhour = 2026-01-01", r"hour in \[local\] is datetime"),
        ("[local]\ntraining_hour = [1]", r"training_hour in \[local\] is \[1\]"),
        ("[local]\nhour = 1" + "0" * 400, r"hour in \[local\] is 10"),
        ("[local]\nhours_per_month = 0", r"hours_per_month in \[local\] is 0: set it to a number above 0 up to 744"),
        ("[local]\nhours_per_month = 8760", r"hours_per_month in \[local\] is 8760: .* up to 744"),
        ("[local]\npay_off_months = 0.0", r"pay_off_months in \[local\] is 0.0: set it to a number above 0"),
        ("[local]\nhour = 1\nhour = 2", "is not TOML"),
        ("[local]\nhour = 2,50", "is not TOML"),
        ("[local]\nhour = " + "9" * 5000, "is not TOML"),
        ("a = " + "[" * 10_000, "is not TOML"),
        (b"currency = '\xff'", "is not TOML"),
    ],
)
def test_what_is_not_a_price_table(table, text, said):
    with pytest.raises(UserError, match=r"table\.toml(:| is not TOML).*") as raised:
        table(text)
    assert raised.match(said) and "\n" not in str(raised.value)


def test_a_table_that_is_named_must_be_there(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the prices in .*none\.toml \(No such file.*PRICES_FILE"):
        load_prices(tmp_path / "none.toml")
    with pytest.raises(UserError, match="cannot read the prices"):
        load_prices(tmp_path)


def test_the_default_table(tmp_path, monkeypatch):
    monkeypatch.setattr(pricing, "PACKAGE", tmp_path)
    assert load_prices() == Prices(str(tmp_path / "prices.toml"))
    (tmp_path / "prices.toml").write_text("[local]\nhour = 1.5\n")
    assert load_prices().local.hour == 1.5
    (tmp_path / "prices.toml").write_text("[local]\nhour = -1\n")
    with pytest.raises(UserError, match="hour"):
        load_prices()
    (tmp_path / "prices.toml").unlink()
    (tmp_path / "prices.toml").mkdir()
    with pytest.raises(UserError, match="cannot read the prices"):
        load_prices()


def test_the_committed_table_explains_itself_and_knows_nothing(table):
    text = (PACKAGE / "prices.toml").read_text()
    assert table("\n".join(line.removeprefix("# ") for line in text.splitlines()[3:])) == Prices(
        table("").path, "USD", {"gpt-4o-mini": HostedPrices(0.15, 0.075, 0.6)}, LocalPrices(2.2, 730, 2.2, 12)
    )
    assert table(text) == table("")


def test_the_quickstarts_table_prices_the_simulator():
    prices = load_prices("demo/prices.toml")
    assert prices.path == "slm_swap/demo/prices.toml"
    assert prices.deployment(AzureSimulator([]).deployment) == HostedPrices(2.5, 1.25, 10.0) and prices.local.hour == 0.1
    assert None not in vars(prices.local).values()


def test_a_deployment_is_found_by_its_name_then_without_regard_to_case():
    low, high = HostedPrices(input=1), HostedPrices(input=2)
    prices = Prices("p", hosted={"gpt-4o": low, "GPT-4o": high, "Other": low})
    assert (prices.deployment("gpt-4o"), prices.deployment("GPT-4o"), prices.deployment("oTHER")) == (low, high, low)
    assert prices.deployment("gpt-4O") == prices.deployment("gpt-4") == HostedPrices()  # two fit, or none


# The cost of a row


def test_cached_tokens_are_part_of_the_input():
    # 600,000 x 2 + 400,000 x 1 + 50,000 x 8, per million
    assert HOSTED.cost(1_000_000, 400_000, 50_000) == 2
    assert HostedPrices(input=2.0, output=8.0).cost(1_000_000, 400_000, 50_000) == Fraction("2.4")
    assert HostedPrices(input=2.0, cached=0, output=8.0).cost(1_000_000, 1_000_000, 0) == 0
    assert HostedPrices(input=2.0, cached=1.0).cost(1, 0, 0) is HostedPrices(output=2.0, cached=1.0).cost(0, 0, 1) is None


def test_a_row_by_todays_prices():
    assert row_cost(azure(), PRICES) == 0.002
    assert row_cost(slm(), PRICES) == 0.001
    assert row_cost(azure(inputs={"rows": 100}, counts={}), PRICES) == 0.002
    assert row_cost(azure(), Prices("p", hosted={"GPT": HOSTED})) == 0.002


def test_requests_that_failed_are_no_tasks():
    assert row_cost(azure(rows=125, failed=25), PRICES) == 0.002
    assert row_cost(azure(rows=100, failed=100), PRICES) is None


@pytest.mark.parametrize(
    "report",
    [
        replay(),
        replay() | {"tokens": {"input": 5000, "cached": 0, "output": 10}},
        azure(tokens={"input": 0, "cached": 0, "output": 0}),
        azure(tokens={"input": 100, "output": 10}),
        azure(tokens={"input": 100, "cached": 101, "output": 10}),
        azure(tokens={"input": -1, "cached": 0, "output": 10}),
        azure(tokens={"input": True, "cached": 0, "output": 10}),
        azure(tokens={"input": 10**400, "cached": 0, "output": 10}),
        azure(tokens=None),
        azure(counts={"rows": 0}),
        azure(counts=[]),
        azure(model={"kind": "azure"}),
        azure(model={"deployment": "gpt"}),
        azure(model={"kind": "azure", "deployment": "another"}),
        azure(model=None),
        slm(seconds=0.0),
        slm(seconds=float("nan")),
        slm(seconds="long"),
        slm(rows=None),
        {},
    ],
)
def test_what_was_not_measured_has_no_cost(report):
    assert row_cost(report, PRICES) is None
    told = compare_costs(report, report, PRICES, None)
    assert told["azure"]["per_1000"] is told["slm"]["per_1000"] is told["on_demand"]["break_even_tasks"] is None
    assert told["unknown"] and (told["always_on"] or {}).get("break_even_tasks_per_month") is None
    json.dumps(told, allow_nan=False)


def test_no_price_no_cost():
    assert row_cost(azure(), Prices("p", local=LOCAL)) is None
    assert row_cost(slm(), Prices("p", hosted={"gpt": HOSTED})) is None


# Both sides


def test_both_costs_and_both_break_evens():
    assert compare_costs(azure(), slm("adapter"), PRICES, 2 * HOUR) == {
        "currency": "EUR",
        "azure": {"per_1000": 2.0, "input_tokens_per_row": 1000.0, "cached_tokens_per_row": 400.0, "output_tokens_per_row": 50.0},
        "slm": {"per_1000": 1.0, "seconds_per_row": 1.8, "hour": 2.0},
        "training": {"seconds": 7200.0, "cost": 8.0},
        "on_demand": {"break_even_tasks": 8000, "why": None},  # 8 / (0.002 - 0.001)
        "always_on": {
            "hours_per_month": 500,
            "per_month": 1000.8,  # 500 x 2 + 8 / 10
            "capacity_tasks_per_month": 1_000_000,  # 500 x 3,600 / 1.8
            "pay_off_months": 10,
            "break_even_tasks_per_month": 500_400,  # 1,000.8 / 0.002
            "why": None,
        },
        "unknown": [],
    }


def test_the_base_model_has_no_training_to_pay_back():
    told = compare_costs(azure(), slm(), priced(training_hour=None, pay_off_months=None), None)
    assert told["training"] is None and told["unknown"] == []
    assert told["on_demand"] == {"break_even_tasks": 0, "why": None}
    assert (told["always_on"]["per_month"], told["always_on"]["break_even_tasks_per_month"]) == (1000.0, 500_000)
    assert told["always_on"]["why"] is None


@pytest.mark.parametrize("seconds", [360.0, 361.0])
def test_a_machine_that_is_no_cheaper_a_task_never_pays_off(seconds):
    for training in (None, HOUR):
        told = compare_costs(azure(), slm("adapter" if training else None, seconds), PRICES, training)["on_demand"]
        assert told["break_even_tasks"] is None and "no volume makes it" in told["why"]


def test_a_break_even_is_rounded_up_and_exact():
    # 0.3 - 0.2 is less than a tenth in floats, which would ask for 31 tasks.
    hosted = Prices("p", hosted={"gpt": HostedPrices(input=0.3, output=0)}, local=LocalPrices(hour=0.2, training_hour=3))
    million = azure(rows=1, tokens={"input": 1_000_000, "cached": 0, "output": 0})
    for training, tasks in ((HOUR, 30), (HOUR + 0.01, 31), (HOUR - 0.01, 30), (HOUR - 120, 29)):
        told = compare_costs(million, slm("adapter", HOUR, rows=1), hosted, training)
        assert told["on_demand"]["break_even_tasks"] == tasks


def test_one_machine_can_do_only_so_many_tasks():
    # A machine's month of 2,000 at 0.002 a hosted task asks for 1,000,000 tasks: all that it can do.
    assert compare_costs(azure(), slm(), priced(hour=4), None)["always_on"]["break_even_tasks_per_month"] == 1_000_000
    told = compare_costs(azure(), slm(), priced(hour=4.01), None)["always_on"]
    assert told["break_even_tasks_per_month"] is None and told["per_month"] == 2005.0
    assert told["why"] == "one machine does at most 1,000,000 tasks a month: hosted stays cheaper whatever the volume"


def test_training_that_one_machine_cannot_earn_back_may_be_earned_by_more():
    told = compare_costs(azure(), slm("adapter"), priced(hour=3.9), 1000 * HOUR)["always_on"]
    assert told["break_even_tasks_per_month"] is None and told["per_month"] == 2350.0  # 1,950 + 400; it saves 2,000 at most
    assert told["why"] == "one machine does at most 1,000,000 tasks a month, too few to pay for it and for training"


def test_a_free_deployment_stays_cheaper():
    free = Prices("p", hosted={"gpt": HostedPrices(0, None, 0)}, local=LOCAL)
    told = compare_costs(azure(), slm(), free, None)
    assert told["azure"]["per_1000"] == 0 and told["unknown"] == []
    assert told["on_demand"]["break_even_tasks"] is told["always_on"]["break_even_tasks_per_month"] is None
    assert "whatever the volume" in told["always_on"]["why"]


def test_without_the_hours_of_a_month_idle_time_is_not_counted_and_that_is_said():
    told = compare_costs(azure(), slm("adapter"), priced(hours_per_month=None), 2 * HOUR)
    assert told["always_on"] is None and told["on_demand"]["break_even_tasks"] == 8000
    assert told["unknown"] == [
        "hours a month that the machine is kept running: hours_per_month in [local] in prices.toml; "
        "without it idle time is not counted"
    ]


def test_training_that_is_not_spread_is_said():
    told = compare_costs(azure(), slm("adapter"), priced(pay_off_months=None), 2 * HOUR)
    assert (told["always_on"]["per_month"], told["always_on"]["break_even_tasks_per_month"]) == (1000.0, 500_000)
    assert told["always_on"]["why"] == "training is not counted" and told["on_demand"]["break_even_tasks"] == 8000
    assert told["unknown"] == [
        "months that training is spread over: pay_off_months in [local] in prices.toml; without it a month's cost leaves training out"
    ]


@pytest.mark.parametrize(
    ("prices", "seconds", "said"),
    [
        (priced(training_hour=None), HOUR, "price of an hour of training: training_hour in [local] in prices.toml"),
        (PRICES, None, "seconds of training of 04_ft/adapter: the report has none; evaluate it again with the training_info.json"),
    ],
)
def test_unknown_training_is_not_free(prices, seconds, said):
    told = compare_costs(azure(), slm("04_ft/adapter"), prices, seconds)
    assert told["training"] == {"seconds": seconds, "cost": None}
    assert told["on_demand"] == {"break_even_tasks": None, "why": "a price or a measurement is not known"}
    assert told["always_on"]["per_month"] == 1000.0 and told["always_on"]["why"] == "training is not counted"
    (text,) = told["unknown"]
    assert text.startswith(said)
    dear = compare_costs(azure(), slm("04_ft/adapter", seconds=720.0), prices, seconds)
    assert "no volume makes it" in dear["on_demand"]["why"], "whatever it cost"


def test_every_price_that_is_missing_is_named():
    told = compare_costs(azure(), slm("adapter"), Prices("slm_swap/prices.toml"), HOUR)
    assert told["unknown"] == [
        'price of deployment gpt: [hosted."gpt"] in slm_swap/prices.toml',
        "price of the machine's hour: hour in [local] in slm_swap/prices.toml",
        "price of an hour of training: training_hour in [local] in slm_swap/prices.toml",
        "hours a month that the machine is kept running: hours_per_month in [local] in slm_swap/prices.toml; "
        "without it idle time is not counted",
    ]
    assert (told["currency"], told["azure"]["per_1000"], told["slm"]["per_1000"], told["slm"]["hour"]) == (None,) * 4
    assert told["azure"]["input_tokens_per_row"] == 1000 and told["slm"]["seconds_per_row"] == 1.8, "measured all the same"
    half = Prices("prices.toml", hosted={"gpt": HostedPrices(cached=1)}, local=LOCAL)
    assert compare_costs(azure(), slm(), half, None)["unknown"] == [
        'input price of deployment gpt: input in [hosted."gpt"] in prices.toml',
        'output price of deployment gpt: output in [hosted."gpt"] in prices.toml',
    ]


def test_the_months_cost_without_the_hours_price():
    told = compare_costs(azure(), slm(), priced(hour=None), None)
    assert told["always_on"]["per_month"] is None and told["always_on"]["capacity_tasks_per_month"] == 1_000_000
    assert told["always_on"]["why"] == told["on_demand"]["why"] == "a price or a measurement is not known"


def test_recorded_replies_are_not_free():
    told = compare_costs(replay(), replay(), Prices("prices.toml"), None)
    assert told["unknown"] == [
        "tokens and seconds of the azure model: its replies are recorded; evaluate it with 01_eval/eval.py --model-kind azure",
        "tokens and seconds of the slm model: its replies are recorded; evaluate it with 01_eval/eval.py --model-kind slm",
        "price of the machine's hour: hour in [local] in prices.toml",
        "hours a month that the machine is kept running: hours_per_month in [local] in prices.toml; "
        "without it idle time is not counted",
    ]
    assert set(told["azure"].values()) == set(told["slm"].values()) == {None}


def test_two_deployments_need_no_machine():
    small = azure(model={"kind": "azure", "deployment": "mini"})
    prices = Prices("prices.toml", hosted={"gpt": HOSTED, "mini": HostedPrices(1, 0.5, 4)})
    told = compare_costs(azure(), small, prices, None)
    assert (told["azure"]["per_1000"], told["slm"]["per_1000"], told["always_on"], told["unknown"]) == (2.0, 1.0, None, [])
    assert told["on_demand"] == {"break_even_tasks": 0, "why": None}
    assert compare_costs(azure(), azure(), Prices("prices.toml"), None)["unknown"] == [
        'price of deployment gpt: [hosted."gpt"] in prices.toml'
    ]


# Properties

cents = st.integers(0, 10**5).map(lambda number: number / 100)
counts = st.integers(0, 10**7)


@st.composite
def measured(draw):
    """(azure report, slm report): any tokens and times."""
    rows = draw(st.integers(1, 500))
    used = draw(st.integers(1, 10**6))
    tokens = {"input": used, "cached": draw(st.integers(0, used)), "output": draw(st.integers(0, 10**6))}
    return azure(rows, tokens=tokens), slm("adapter", draw(st.integers(1, 10**7)) / 1000, rows)


def prices_of(hosted, local, times=1):
    def scaled(values):
        return [value * times for value in values]

    hour, training_hour, hours, months = local
    table = {"gpt": HostedPrices(*scaled(hosted))}
    return Prices("p", None, table, LocalPrices(hour * times, hours, training_hour * times, months))


hosted_prices = st.tuples(*[st.integers(0, 10**5)] * 3)
local_prices = st.tuples(st.integers(0, 500), st.integers(0, 500), st.integers(1, 744), st.integers(1, 36))


@given(st.tuples(cents, cents, cents), counts, counts, counts, counts, counts)
def test_more_tokens_are_never_cheaper(prices, fresh, cached, output, more, which):
    def cost(fresh, cached, output):
        return HostedPrices(*prices).cost(fresh + cached, cached, output)

    tokens = [fresh, cached, output]
    tokens[which % 3] += more
    assert cost(*tokens) >= cost(fresh, cached, output) >= 0


@given(measured(), hosted_prices, local_prices, st.integers(0, 10**6))
def test_a_break_even_is_the_smallest_volume_that_pays(reports, hosted, local, training_seconds):
    hour, training_hour, hours, months = local
    tokens, rows, seconds = reports[0]["tokens"], reports[0]["counts"]["rows"], Fraction(str(reports[1]["seconds"]["generate"]))
    input_price, cached_price, output_price = hosted
    bill = (tokens["input"] - tokens["cached"]) * input_price + tokens["cached"] * cached_price + tokens["output"] * output_price
    hosted_task, local_task = Fraction(bill, 10**6 * rows), hour * seconds / 3600 / rows
    training, machine = Fraction(training_hour * training_seconds, 3600), hour * hours
    told = compare_costs(*reports, prices_of(hosted, local), float(training_seconds))

    def pays(tasks):
        return training + tasks * local_task <= tasks * hosted_task

    def pays_monthly(tasks):
        return machine + training / months <= tasks * hosted_task

    tasks = told["on_demand"]["break_even_tasks"]
    if tasks is None:
        assert local_task >= hosted_task and told["on_demand"]["why"]
    else:
        assert local_task < hosted_task and pays(tasks) and (tasks == 0 or not pays(tasks - 1))
    month = told["always_on"]
    capacity = month["capacity_tasks_per_month"]
    assert capacity * seconds / rows <= hours * 3600 < (capacity + 1) * seconds / rows
    tasks = month["break_even_tasks_per_month"]
    if tasks is None:
        assert hosted_task == 0 or not pays_monthly(capacity)
        assert ("whatever the volume" in month["why"]) == (machine >= capacity * hosted_task)
    else:
        assert tasks <= capacity and pays_monthly(tasks) and (tasks == 0 or not pays_monthly(tasks - 1))


@given(measured(), hosted_prices, local_prices, st.integers(0, 10**6), st.integers(2, 1000))
def test_another_unit_of_the_currency_changes_no_break_even(reports, hosted, local, training_seconds, times):
    one = compare_costs(*reports, prices_of(hosted, local), training_seconds)
    other = compare_costs(*reports, prices_of(hosted, local, times), training_seconds)
    for side, key in (("azure", "per_1000"), ("slm", "per_1000"), ("training", "cost"), ("always_on", "per_month")):
        assert other[side][key] == pytest.approx(one[side][key] * times)
    assert one["on_demand"] == other["on_demand"]
    assert one["always_on"] | {"per_month": 0} == other["always_on"] | {"per_month": 0}
