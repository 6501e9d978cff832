"""Money: the price table, what measured work costs by it, and the volume from which the small model is the cheaper one.

Sums are exact: every number counts as the decimal that it is written as, and is rounded once, when it is told. So a break-even is
the smallest volume that pays off, never one task beside it. A task is a row: one request and its reply.
"""

import math
import tomllib
from dataclasses import dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

from slm_swap.common.errors import UserError
from slm_swap.common.settings import PACKAGE, display_path, find_path

HIGHEST = 10**12  # above it a number is a slip, not a price, a count or a time
LONGEST_MONTH = 744  # hours
NOT_KNOWN = "a price or a measurement is not known"


@dataclass(frozen=True)
class HostedPrices:
    """A deployment's prices per million tokens, None where not known; cached tokens without a price cost as much as others."""

    input: float | None = None
    cached: float | None = None
    output: float | None = None

    def cost(self, input_tokens: Any, cached_tokens: Any, output_tokens: Any) -> Fraction | None:
        """What the tokens cost; `input_tokens` includes the cached ones."""
        if self.input is None or self.output is None:
            return None
        cached = self.input if self.cached is None else self.cached
        fresh = (_exact(input_tokens) - _exact(cached_tokens)) * _exact(self.input)
        return (fresh + _exact(cached_tokens) * _exact(cached) + _exact(output_tokens) * _exact(self.output)) / 10**6


@dataclass(frozen=True)
class LocalPrices:
    """The price of an hour of the serving and of the training machine, and over which times they are counted; None where not known."""

    hour: float | None = None
    hours_per_month: float | None = None
    training_hour: float | None = None
    pay_off_months: float | None = None

    def cost(self, seconds: Any) -> Fraction | None:
        """What the machine costs while it works."""
        return None if self.hour is None else _exact(self.hour) * _exact(seconds) / 3600


@dataclass(frozen=True)
class Prices:
    """A price table; `path` is where it says, or would say, what things cost."""

    path: str
    currency: str | None = None
    hosted: dict[str, HostedPrices] = field(default_factory=dict)
    local: LocalPrices = field(default_factory=LocalPrices)

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
    try:
        table = tomllib.loads(found.read_text(encoding="utf-8"))
    except OSError as error:
        if path is None and isinstance(error, FileNotFoundError):
            return Prices(shown)
        raise UserError(f"cannot read the prices in {shown} ({error.strerror}): set PRICES_FILE, or leave it out") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{shown} is not TOML ({error}): write it as slm_swap/prices.toml explains") from None
    _check_table(table, "the file", ("currency", "hosted", "local"), shown)
    currency, hosted = table.get("currency"), table.get("hosted", {})
    if currency is not None and not (isinstance(currency, str) and currency.strip()):
        raise UserError(f'{shown}: currency is {currency!r}, not a name: write it as currency = "USD"')
    _check_table(hosted, "[hosted]", None, shown)
    return Prices(
        shown,
        currency,
        {name: _read_prices(HostedPrices, values, _hosted_table(name), shown) for name, values in hosted.items()},
        _read_prices(LocalPrices, table.get("local", {}), "[local]", shown),
    )


def _check_table(value: Any, name: str, keys: tuple[str, ...] | None, shown: str) -> None:
    if not isinstance(value, dict):
        raise UserError(f'{shown}: {name} is {value!r}, not a table: prices stand under [hosted."DEPLOYMENT"] or [local]')
    for key in value:
        if keys is not None and key not in keys:
            hint = " (a deployment with a dot in its name takes quotes)" if isinstance(value[key], dict) else ""
            raise UserError(f"{shown}: {name} has an unknown key {key!r}{hint}: it takes {', '.join(keys)}")


def _read_prices(kind: type, values: Any, name: str, shown: str) -> Any:
    _check_table(values, name, tuple(item.name for item in fields(kind)), shown)
    for key, value in values.items():
        highest = LONGEST_MONTH if key == "hours_per_month" else HIGHEST
        above_0 = key in ("hours_per_month", "pay_off_months")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value <= highest or (above_0 and value == 0):
            wanted = f"a number {'above' if above_0 else 'from'} 0 up to {highest:,}"
            raise UserError(f"{shown}: {key} in {name} is {value!r}: set it to {wanted}, or leave it out")
    return kind(**values)


def _hosted_table(deployment: str) -> str:
    return f'[hosted."{deployment}"]'


def _exact(number: int | float | Fraction) -> Fraction:
    """A number as the decimal that it is written as: 0.1 is a tenth, not the float beside it."""
    return Fraction(str(number))


def to_float(number: Fraction | None, times: int = 1) -> float | None:
    """The float nearest to so many times the number; None stays None."""
    return None if number is None else float(times * number)


def row_cost(report: dict, prices: Prices) -> float | None:
    """What a row of an evaluation costs by the prices, None where a price or a measurement is not known."""
    return to_float(_Measured(report).cost(prices))


class _Measured:
    """What a report measured of its model for each row that was answered; None where it did not.

    Recorded replies carry no measurement of ours, and a server that counts no tokens is not free.
    """

    def __init__(self, report: dict):
        def read(part: str, *names: str) -> list[Fraction | None]:
            values = report.get(part) if isinstance(report.get(part), dict) else {}
            return [_measurement(values.get(name)) for name in names]

        self.model = report.get("model") if isinstance(report.get("model"), dict) else {}
        kind = self.model.get("kind")
        self.name = self.model.get("deployment" if kind == "azure" else "path")
        self.kind = kind if isinstance(self.name, str) else None
        rows, failed = read("counts", "rows", "failed_requests")
        answered = (rows or read("inputs", "rows")[0] or 0) - (failed or 0)
        measured = self.kind in ("azure", "slm") and answered > 0
        tokens, (seconds,) = read("tokens", "input", "cached", "output"), read("seconds", "generate")
        counted = measured and None not in tokens and 0 < tokens[0] >= tokens[1]
        self.tokens = [count / answered for count in tokens] if counted else None
        self.seconds = seconds / answered if measured and seconds else None

    def cost(self, prices: Prices) -> Fraction | None:
        """What a row costs: a hosted model's tokens, or the time of a local one's machine."""
        if self.kind == "azure":
            return prices.deployment(self.name).cost(*self.tokens) if self.tokens else None
        return prices.local.cost(self.seconds) if self.seconds else None

    def missing(self, side: str, prices: Prices) -> list[str]:
        """Why the cost of a row is not known, a text for each reason; `side` is the --model-kind that measures it."""
        evaluate = f"evaluate it with 01_eval/eval.py --model-kind {side}"
        if self.kind == "azure":
            own, table = prices.deployment(self.name), f"{_hosted_table(self.name)} in {prices.path}"
            texts = [] if self.tokens else [f"tokens of deployment {self.name}: its report has no count of them; {evaluate}"]
            if own == HostedPrices():
                return [*texts, f"price of deployment {self.name}: {table}"]
            absent = [key for key in ("input", "output") if getattr(own, key) is None]
            return texts + [f"{key} price of deployment {self.name}: {key} in {table}" for key in absent]
        if self.seconds:
            texts = []
        elif self.kind == "slm":
            texts = [f"seconds of {self.name}: its report has none; {evaluate}"]
        else:
            why = "its replies are recorded" if self.kind == "replay" else "its report does not say what it is (model.kind, model.deployment or path)"
            texts = [f"tokens and seconds of the {side} model: {why}; {evaluate}"]
        return texts + (_missing_local(prices, "hour") if "slm" in (side, self.kind) else [])


def _measurement(value: Any) -> Fraction | None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= HIGHEST
    return _exact(value) if number else None


def _missing_local(prices: Prices, key: str) -> list[str]:
    what = {
        "hour": "price of the machine's hour: {}",
        "hours_per_month": "hours a month that the machine is kept running: {}; without it idle time is not counted",
        "training_hour": "price of an hour of training: {}",
        "pay_off_months": "months that training is spread over: {}; without it a month's cost leaves training out",
    }
    return [what[key].format(f"{key} in [local] in {prices.path}")] if getattr(prices.local, key) is None else []


def compare_costs(azure_report: dict, slm_report: dict, prices: Prices, training_seconds: float | None) -> dict[str, Any]:
    """The decision's `cost`: what a task costs on either side, and from which volume the small model is the cheaper one.

    What the reports measured is taken at the prices given. `training_seconds` made the small model's adapter; without an
    adapter there is nothing to pay back. Whatever is not known is None, and `unknown` names it and says where to set it.
    """
    azure, slm, local = _Measured(azure_report), _Measured(slm_report), prices.local
    hosted_cost, slm_cost = azure.cost(prices), slm.cost(prices)
    unknown = azure.missing("azure", prices) + slm.missing("slm", prices)
    training, training_cost = None, Fraction(0)
    if slm.model.get("adapter") or training_seconds:
        seconds = _measurement(training_seconds)
        if seconds is None:
            advice = "evaluate it again with the training_info.json that was written with it"
            unknown.append(f"seconds of training of {slm.model.get('adapter')}: the report has none; {advice}")
        unknown += _missing_local(prices, "training_hour")
        known = seconds is not None and local.training_hour is not None
        training_cost = _exact(local.training_hour) * seconds / 3600 if known else None
        training = {"seconds": to_float(seconds), "cost": to_float(training_cost)}
    always_on = None
    if slm.kind != "azure":
        unknown += _missing_local(prices, "hours_per_month")
        if local.hours_per_month is not None:
            unknown += _missing_local(prices, "pay_off_months") if training else []
            always_on = _always_on(hosted_cost, slm.seconds, training_cost, local)
    tokens = azure.tokens or [None] * 3
    return {
        "currency": prices.currency,
        "azure": {"per_1000": to_float(hosted_cost, 1000)}
        | {f"{name}_tokens_per_row": to_float(count) for name, count in zip(("input", "cached", "output"), tokens, strict=True)},
        "slm": {
            "per_1000": to_float(slm_cost, 1000),
            "seconds_per_row": to_float(slm.seconds),
            "hour": local.hour,
        },
        "training": training,
        "on_demand": _on_demand(hosted_cost, slm_cost, training_cost),
        "always_on": always_on,
        "unknown": list(dict.fromkeys(unknown)),
    }


def _on_demand(hosted: Fraction | None, local: Fraction | None, training: Fraction | None) -> dict[str, Any]:
    """The number of tasks n from which training + n x local is at most n x hosted."""
    tasks, why = None, NOT_KNOWN
    if hosted is not None and local is not None:
        if local >= hosted:
            why = "a task of the small model costs no less than a hosted one: no volume makes it the cheaper one"
        elif training is not None:
            tasks, why = math.ceil(training / (hosted - local)), None
    return {"break_even_tasks": tasks, "why": why}


def _always_on(hosted: Fraction | None, seconds: Fraction | None, training: Fraction | None, local: LocalPrices) -> dict[str, Any]:
    """The number of tasks n a month from which the machine's month is at most n x hosted, where one machine can do as many."""
    hours = _exact(local.hours_per_month)
    capacity = math.floor(hours * 3600 / seconds) if seconds else None
    machine = None if local.hour is None else hours * _exact(local.hour)
    spread = training / _exact(local.pay_off_months) if training is not None and local.pay_off_months else Fraction(0)
    per_month = None if machine is None else machine + spread
    tasks, why = None, NOT_KNOWN
    if hosted is not None and capacity is not None and per_month is not None:
        needed = math.ceil(per_month / hosted) if hosted else math.inf
        if needed <= capacity:
            tasks, why = needed, None if spread or training == 0 else "training is not counted"
        elif machine >= capacity * hosted:
            why = f"one machine does at most {capacity:,} tasks a month: hosted stays cheaper whatever the volume"
        else:
            why = f"one machine does at most {capacity:,} tasks a month, too few to pay for it and for training"
    return {
        "hours_per_month": local.hours_per_month,
        "per_month": to_float(per_month),
        "capacity_tasks_per_month": capacity,
        "pay_off_months": local.pay_off_months,
        "break_even_tasks_per_month": tasks,
        "why": why,
    }
