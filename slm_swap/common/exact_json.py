"""JSON whose numbers keep their digits: a number that a float would change is a Decimal, and a Decimal is written as it is."""

import json
import re
import uuid
from decimal import Decimal, InvalidOperation
from math import isfinite
from typing import Any


def number(digits: str) -> float | Decimal:
    """A number with a fraction or an exponent: a float where its shortest form is the number as written, else a Decimal.

    Raises:
        ValueError: an exponent that no Decimal has (about 10**18).
    """
    rounded = float(digits)
    try:
        exact = Decimal(digits)
    except InvalidOperation:
        raise ValueError("an exponent that no number has") from None
    return rounded if isfinite(rounded) and Decimal(repr(rounded)) == exact else exact


def integer(digits: str) -> int | Decimal:
    """An integer; a Decimal where Python's `int` refuses to read so many digits (more than 4300)."""
    try:
        return int(digits)
    except ValueError:
        return Decimal(digits)


EXACT = {"parse_float": number, "parse_int": integer}  # for json.loads

_MARK = uuid.uuid4().hex  # in front of a Decimal while it is a text; no data holds it
_MARKED = re.compile(f'"{_MARK}([^"]*)"')


class ExactEncoder(json.JSONEncoder):
    """`json.JSONEncoder` that writes a Decimal with its own digits. NaN and infinity as Decimals are refused (ValueError)."""

    def default(self, value: Any) -> Any:
        if not isinstance(value, Decimal):
            return super().default(value)
        if not value.is_finite():
            raise ValueError(f"{value} is not JSON")
        return f"{_MARK}{value}"

    def encode(self, value: Any) -> str:
        text = super().encode(value)
        return _MARKED.sub(r"\1", text) if _MARK in text else text


# -- Numbers by value ------------------------------------------------------------------------------------------------------------


def exact(value: int | float | Decimal) -> Decimal:
    """A number as the decimal that it is written as: 0.1 is Decimal("0.1")."""
    return Decimal(repr(value)) if isinstance(value, float) else Decimal(value)


def is_number(value: Any) -> bool:
    """Whether a value is a number in JSON's sense; Decimals that are NaN or infinite are none."""
    return isinstance(value, (int, float, Decimal)) and not isinstance(value, bool) and exact(value).is_finite()


def is_integral(value: int | float | Decimal) -> bool:
    """Whether a number has no fraction."""
    if isinstance(value, Decimal):
        return value.is_finite() and value == value.to_integral_value()
    return isinstance(value, int) or value.is_integer()


def is_multiple(value: int | float | Decimal, divisor: int | float | Decimal) -> bool:
    """Whether a number is a whole multiple of another, as decimals, exactly and at any size: 4.94 is one of 0.01."""
    (_, digits, power), (_, unit_digits, unit_power) = exact(value).as_tuple(), exact(divisor).as_tuple()
    whole, unit = (int(Decimal((0, part, 0))) for part in (digits, unit_digits))
    shift = power - unit_power
    if not whole or not unit:
        return not whole
    if shift >= 0:
        return whole * pow(10, shift, unit) % unit == 0
    return -shift <= len(digits) and whole % (unit * 10**-shift) == 0


def same(left: Any, right: Any) -> bool:
    """Equality as JSON: `true` is not 1, 1 is 1.0, and a float is the decimal that it is written as."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(child, right[key]) for key, child in left.items())
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    if is_number(left) and is_number(right):
        return exact(left) == exact(right)
    return type(left) is type(right) and left == right


def decimals(value: Any) -> Any:
    """A JSON value with Decimals for floats."""
    if isinstance(value, float):
        return exact(value)
    if isinstance(value, dict):
        return {key: decimals(child) for key, child in value.items()}
    return [decimals(child) for child in value] if isinstance(value, list) else value


def plain(value: Any) -> Any:
    """A JSON value with floats for Decimals, except where a float would change the number."""
    if isinstance(value, Decimal):
        return number(str(value))
    if isinstance(value, dict):
        return {key: plain(child) for key, child in value.items()}
    return [plain(child) for child in value] if isinstance(value, list) else value
