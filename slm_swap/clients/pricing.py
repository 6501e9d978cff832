"""Money: the price table, what measured work costs by it, and by `clients.bills` a month's bill of both models.

Sums are exact: every number counts as the decimal that it is written as, and is rounded once, when it is told. So a volume is the
first or the last one that pays off, never one task beside it. A task is a row: one request and its reply.
"""

import os
import tomllib
from dataclasses import dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

from slm_swap.clients.bills import Bill, Cheaper, Machines, Monthly
from slm_swap.common.errors import UserError
from slm_swap.common.os_errors import reading
from slm_swap.common.settings import PACKAGE, display_path, find_path

HIGHEST = 10**12  # above it a number is a slip, not a price, a count or a time
LONGEST_MONTH = 744  # hours
VOLUMES = (10_000, 100_000, 1_000_000)  # tasks a month whose bills are told where the price table gives no volume


@dataclass(frozen=True)
class HostedPrices:
    """A deployment's prices per million tokens, None where not known; cached tokens without a price cost as much as others."""

    input: float | None = None
    cached: float | None = None
    output: float | None = None

    def cost(self, input_tokens: Any, cached_tokens: Any, output_tokens: Any) -> Fraction | None:
        """What the tokens cost; `input_tokens` includes the cached ones. None where a price or a count is not known, or where
        more tokens are cached than there are."""
        parts = self.parts(input_tokens, cached_tokens, output_tokens)
        return None if parts is None else sum(parts.values(), Fraction())

    def parts(self, input_tokens: Any, cached_tokens: Any, output_tokens: Any) -> dict[str, Fraction] | None:
        """`cost` by what it is for: `input` (not cached), `input_cached_tokens` and `output`, as Langfuse names them."""
        if None in (self.input, self.output, input_tokens, cached_tokens, output_tokens) or cached_tokens > input_tokens:
            return None
        cached = self.input if self.cached is None else self.cached
        priced = {
            "input": (_exact(input_tokens) - _exact(cached_tokens), self.input),
            "input_cached_tokens": (_exact(cached_tokens), cached),
            "output": (_exact(output_tokens), self.output),
        }
        return {name: count * _exact(price) / 10**6 for name, (count, price) in priced.items()}


@dataclass(frozen=True)
class LocalPrices:
    """The price of an hour of the serving and of the training machine, the hours a month that the serving one is kept running, and the
    months that training is spread over; None where not known."""

    hour: float | None = None
    hours_per_month: float | None = None
    training_hour: float | None = None
    pay_off_months: float | None = None

    def cost(self, seconds: Any) -> Fraction | None:
        """What the machine costs while it works."""
        return None if self.hour is None else _exact(self.hour) * _exact(seconds) / 3600


@dataclass(frozen=True)
class Traffic:
    """How much is asked: tasks a month (whole), the peak rate of tasks over the mean rate (at least 1), and what a wrong reply costs
    its user; None where not known."""

    tasks_per_month: int | None = None
    peak_factor: float | None = None
    cost_of_error: float | None = None


@dataclass(frozen=True)
class Prices:
    """A price table; `path` is where it says, or would say, what things cost."""

    path: str
    currency: str | None = None
    hosted: dict[str, HostedPrices] = field(default_factory=dict)
    local: LocalPrices = field(default_factory=LocalPrices)
    traffic: Traffic = field(default_factory=Traffic)

    def deployment(self, name: str) -> HostedPrices:
        """The prices of a deployment: of its exact name, else of the one name that differs from it in case alone."""
        alike = [own for key, own in self.hosted.items() if key.casefold() == name.casefold()]
        return self.hosted.get(name) or (alike[0] if len(alike) == 1 else HostedPrices())


def load_prices(path: str | Path | None = None) -> Prices:
    """The price table of a TOML file, or of slm_swap/prices.toml, which may be missing: then no price is known.

    Raises:
        UserError: the file is missing, is not TOML, or has a key or a value that is not as slm_swap/prices.toml explains.
    """
    found = PACKAGE / "prices.toml" if path is None else find_path(path)
    shown = display_path(found)
    if path is None and not os.path.lexists(found):
        return Prices(shown)
    try:
        with reading(found, "set PRICES_FILE, or leave it out", "read the prices in"):
            table = tomllib.loads(found.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{shown} is not TOML ({error}): write it as slm_swap/prices.toml explains") from None
    _check_table(table, "the file", ("currency", "hosted", "local", "traffic"), shown)
    currency, hosted = table.get("currency"), table.get("hosted", {})
    if currency is not None and not (isinstance(currency, str) and currency.strip()):
        raise UserError(f'{shown}: currency is {currency!r}, not a name: write it as currency = "USD"')
    _check_table(hosted, "[hosted]", None, shown)
    return Prices(
        shown,
        currency,
        {name: _read_prices(HostedPrices, values, _hosted_table(name), shown) for name, values in hosted.items()},
        _read_prices(LocalPrices, table.get("local", {}), "[local]", shown),
        _read_prices(Traffic, table.get("traffic", {}), "[traffic]", shown),
    )


def _check_table(value: Any, name: str, keys: tuple[str, ...] | None, shown: str) -> None:
    if not isinstance(value, dict):
        raise UserError(f'{shown}: {name} is {value!r}, not a table: prices go under [hosted."DEPLOYMENT"], [local] or [traffic]')
    for key in value:
        if keys is not None and key not in keys:
            hint = " (a deployment with a dot in its name takes quotes)" if isinstance(value[key], dict) else ""
            raise UserError(f"{shown}: {name} has an unknown key {key!r}{hint}: it takes {', '.join(keys)}")


def _read_prices(kind: type, values: Any, name: str, shown: str) -> Any:
    _check_table(values, name, tuple(item.name for item in fields(kind)), shown)
    for key, value in values.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not _allowed(key, value):
            raise UserError(f"{shown}: {key} in {name} is {value!r}: set it to {_wanted(key)}, or leave it out")
    return kind(**values)


def _allowed(key: str, value: int | float) -> bool:
    match key:
        case "hours_per_month":
            return 0 < value <= LONGEST_MONTH
        case "pay_off_months":
            return 0 < value <= HIGHEST
        case "tasks_per_month":
            return 1 <= value <= HIGHEST and value == int(value)
        case "peak_factor":
            return 1 <= value <= HIGHEST
    return 0 <= value <= HIGHEST


def _wanted(key: str) -> str:
    start = {"hours_per_month": "above 0", "pay_off_months": "above 0", "tasks_per_month": "from 1", "peak_factor": "from 1"}
    what = "whole number" if key == "tasks_per_month" else "number"
    return f"a {what} {start.get(key, 'from 0')} up to {LONGEST_MONTH if key == 'hours_per_month' else HIGHEST:,}"


def _hosted_table(deployment: str) -> str:
    return f'[hosted."{deployment}"]'


def _exact(number: int | float | Fraction) -> Fraction:
    """A number as the decimal that it is written as: 0.1 is a tenth, not the float beside it."""
    return Fraction(str(number))


def to_float(number: Fraction | None, times: int | Fraction = 1) -> float | None:
    """The float nearest to so many times the number; None stays None."""
    return None if number is None else float(times * number)


def row_cost(report: dict, prices: Prices) -> float | None:
    """What a row of an evaluation costs by the prices, None where a price or a measurement is not known."""
    return to_float(_Measured(report).cost(prices))


class _Measured:
    """What a report measured of its model for each row that was answered; None where it did not.

    Recorded replies carry no measurement of ours, and a server that counts no tokens is not free. `tokens.rows` says how many rows have
    token counts; a report that is older than this key has them for every row that was answered.
    """

    def __init__(self, report: dict):
        def part(name: str) -> dict:
            return report.get(name) if isinstance(report.get(name), dict) else {}

        def read(name: str, *keys: str) -> list[Fraction | None]:
            return [_measurement(part(name).get(key)) for key in keys]

        self.model = part("model")
        kind = self.model.get("kind")
        self.name = self.model.get("deployment" if kind == "azure" else "path")
        self.kind = kind if isinstance(self.name, str) else None
        rows, failed = read("counts", "rows", "failed_requests")
        self.rows = rows or read("inputs", "rows")[0] or Fraction(0)
        answered = self.rows - (failed or 0)
        measured = self.kind in ("azure", "slm") and answered > 0
        tokens, (seconds,) = read("tokens", "input", "cached", "output"), read("seconds", "generate")
        counted = read("tokens", "rows")[0] if "rows" in part("tokens") else answered
        known = measured and None not in tokens and 0 < tokens[0] >= tokens[1] and 0 < (counted or 0) <= self.rows
        self.counted = counted if known else None
        self.tokens = [count / counted for count in tokens] if known else None
        self.seconds = seconds / answered if measured and seconds else None

    def cost(self, prices: Prices) -> Fraction | None:
        """What a row costs: a hosted model's tokens, or the time of a local one's machine."""
        if self.kind == "azure":
            return prices.deployment(self.name).cost(*self.tokens) if self.tokens else None
        return prices.local.cost(self.seconds) if self.seconds else None

    def unmeasured(self, side: str) -> list[str]:
        """Which measurement of it is missing, and why; `side` is the --model-kind that makes it."""
        evaluate = f"evaluate it with 01_eval/eval.py --model-kind {side}"
        if self.kind == "azure":
            return [] if self.tokens else [f"tokens of deployment {self.name}: its report has no count of them; {evaluate}"]
        if self.seconds:
            return []
        if self.kind == "slm":
            return [f"seconds of {self.name}: its report has none; {evaluate}"]
        why = "its replies are recorded" if self.kind == "replay" else "its report does not say what it is (model.kind, model.deployment or path)"
        return [f"tokens and seconds of the {'hosted' if side == 'azure' else 'small'} model: {why}; {evaluate}"]

    def unpriced(self, side: str, prices: Prices) -> list[str]:
        """Which price of a row of it is missing, and where to set it."""
        if self.kind != "azure":
            return _missing_local(prices, "hour") if "slm" in (side, self.kind) else []
        own, table = prices.deployment(self.name), f"{_hosted_table(self.name)} in {prices.path}"
        if own == HostedPrices():
            return [f"price of deployment {self.name}: {table}"]
        absent = [key for key in ("input", "output") if getattr(own, key) is None]
        return [f"{key} price of deployment {self.name}: {key} in {table}" for key in absent]


def _measurement(value: Any) -> Fraction | None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= HIGHEST
    return _exact(value) if number else None


def _missing_local(prices: Prices, key: str) -> list[str]:
    what = {
        "hour": "price of the machine's hour: {}",
        "hours_per_month": "hours a month that the machine is kept running: {}; without it the small model's month is not known",
        "training_hour": "price of an hour of training: {}",
        "pay_off_months": "months that training is spread over: {}; without it the small model's month is not known",
    }
    return [what[key].format(f"{key} in [local] in {prices.path}")] if getattr(prices.local, key) is None else []


@dataclass(frozen=True)
class _Training:
    """The training of an adapter: its seconds, what it cost, and a month's share of that."""

    seconds: Fraction | None
    cost: Fraction | None
    month: Fraction | None

    def to_json(self) -> dict[str, float | None]:
        return {"seconds": to_float(self.seconds), "cost": to_float(self.cost), "per_month": to_float(self.month)}


def _training(slm: _Measured, training_seconds: float | None, local: LocalPrices) -> _Training | None:
    """None where the small model has no adapter: there is nothing to pay back."""
    if not slm.model.get("adapter") and not training_seconds:
        return None
    seconds, months = _measurement(training_seconds), local.pay_off_months
    cost = None if seconds is None or local.training_hour is None else _exact(local.training_hour) * seconds / 3600
    return _Training(seconds, cost, cost if not cost else None if months is None else cost / _exact(months))


def compare_costs(
    azure_report: dict,
    slm_report: dict,
    prices: Prices,
    training_seconds: float | None,
    *,
    fallback_share: float | None = None,
    delta: float | None = None,
    verdict: str | None = None,
) -> dict[str, Any]:
    """The decision's `cost`: a month's bill of both models, and at which volumes the small one is the cheaper.

    What the reports measured is taken at the prices given. `training_seconds` made the small model's adapter. `fallback_share` (0..1) is
    the share of tasks that the hosted model answers again, `delta` the margin (0..1), `verdict` the decision's: only beside a SWAP is
    anything paid back. Whatever is not known is None, and `unknown` names it and says where to set it; slm_swap/README.md has the keys.
    """
    azure, slm, local, traffic = _Measured(azure_report), _Measured(slm_report), prices.local, prices.traffic
    training = _training(slm, training_seconds, local)
    machines = None if slm.kind == "azure" else _machines(slm, prices)
    small = slm.cost(prices)
    months = Monthly(
        azure.cost(prices), machines, small if machines is None else Fraction(0),
        training.month if training else Fraction(0), _exact(fallback_share or 0),
    )  # fmt: skip
    unmeasured, unpriced = _unknown(azure, slm, training, prices)
    volume = None if traffic.tasks_per_month is None else int(traffic.tasks_per_month)
    bills = [months.bill(tasks) for tasks in ([volume] if volume else VOLUMES)]
    found, tokens = months.cheaper(), azure.tokens or [None] * 3
    why = f"fill in {prices.path}" if unpriced else "a measurement is missing"
    return {
        "currency": prices.currency,
        "azure": {"per_1000": to_float(months.hosted, 1000), "rows": int(azure.rows), "rows_counted": azure.counted and int(azure.counted)}
        | {f"{name}_tokens_per_row": to_float(count) for name, count in zip(("input", "cached", "output"), tokens, strict=True)},
        "slm": {
            "per_1000": to_float(small, 1000),
            "utilisation": 1.0 if machines and small is not None else None,
            "seconds_per_row": to_float(slm.seconds),
            "hour": local.hour,
        },
        "machine": machines and {
            "hours_per_month": local.hours_per_month,
            "per_month": to_float(machines.month),
            "capacity_tasks_per_month": None if machines.capacity is None else int(machines.capacity),
        },
        "training": training and training.to_json() | {"pay_off_months": local.pay_off_months},
        "traffic": {
            "tasks_per_month": volume, "peak_factor": traffic.peak_factor, "fallback_share": fallback_share,
            "cost_of_error": traffic.cost_of_error,
        },
        "bills": [_told(bill, delta, traffic.cost_of_error) for bill in bills],
        **_crossings(found, why),
        "curve": [
            {"tasks": bill.tasks, "machines": bill.machines, "azure": to_float(bill.hosted), "slm": to_float(bill.small)}
            for bill in months.curve(volume)
        ],
        "paid_back_months": _paid_back(bills[0], training) if volume and verdict == "SWAP" else None,
        "assumed": _assumed(slm, machines, fallback_share, prices),
        "unknown": list(dict.fromkeys(unmeasured + unpriced)),
    }  # fmt: skip


def _machines(slm: _Measured, prices: Prices) -> Machines:
    """The machines that serve the small model, each at the rate of the evaluation."""
    local, hours = prices.local, prices.local.hours_per_month
    full = None if hours is None or not slm.seconds else _exact(hours) * 3600 / slm.seconds
    month = None if hours is None or local.hour is None else _exact(hours) * _exact(local.hour)
    return Machines(month, full, _exact(prices.traffic.peak_factor or 1))


def _unknown(azure: _Measured, slm: _Measured, training: _Training | None, prices: Prices) -> tuple[list[str], list[str]]:
    """The measurements and the prices that are missing, a text for each."""
    unmeasured = azure.unmeasured("azure") + slm.unmeasured("slm")
    unpriced = azure.unpriced("azure", prices) + slm.unpriced("slm", prices)
    if training:
        if training.seconds is None:
            advice = "evaluate it again with the training_info.json that was written with it"
            unmeasured.append(f"seconds of training of {slm.model.get('adapter')}: the report has none; {advice}")
        unpriced += _missing_local(prices, "training_hour")
        unpriced += _missing_local(prices, "pay_off_months") if training.cost != 0 else []
    return unmeasured, unpriced + (_missing_local(prices, "hours_per_month") if slm.kind != "azure" else [])


def _told(bill: Bill, delta: float | None, cost_of_error: float | None) -> dict[str, Any]:
    """A bill as the decision holds it, with what the margin costs: `delta` more wrong replies a task, at most."""
    wrong = None if delta is None else _exact(delta) * bill.tasks
    return {
        "tasks": bill.tasks,
        "azure": to_float(bill.hosted),
        "slm": to_float(bill.small),
        "saving": to_float(bill.saving),
        "machines": bill.machines,
        "utilisation": to_float(bill.utilisation),
        "slm_parts": {name: to_float(amount) for name, amount in bill.parts.items()},
        "slm_per_1000": to_float(bill.small, Fraction(1000, bill.tasks)),
        "wrong_replies": to_float(wrong),
        "wrong_replies_cost": None if wrong is None or cost_of_error is None else to_float(wrong * _exact(cost_of_error)),
    }


def _crossings(found: Cheaper | None, why: str) -> dict[str, Any]:
    if found is None:
        return {"cheaper": None, "looked_up_to": None, "why": why}
    intervals = [{"first": first, "last": last} for first, last in found.intervals]
    return {"cheaper": intervals, "looked_up_to": found.up_to, "why": found.why}


def _paid_back(bill: Bill, training: _Training | None) -> float | None:
    """The months after which the running saving has paid for training; None without training, or where there is no saving."""
    if training is None or not training.cost or bill.hosted is None or bill.running is None or bill.running >= bill.hosted:
        return None
    return to_float(training.cost / (bill.hosted - bill.running))


def _assumed(slm: _Measured, machines: Machines | None, fallback_share: float | None, prices: Prices) -> list[str]:
    """What the bills take for granted."""
    found = []
    if machines and prices.traffic.peak_factor is None:
        found.append(f"tasks come evenly over the hours: the peak is not known (peak_factor in [traffic] in {prices.path})")
    if machines and slm.seconds:
        rate = float(1 / slm.seconds)
        found.append(f"a machine does {rate:.3g} tasks a second, as in the evaluation: under a limit on latency it does fewer")
    if fallback_share is None:
        found.append("the small model answers every task: no share falls back to the hosted one")
    return found
