"""Numbers that keep their digits: what is read, what is written, and arithmetic of decimals."""

import json
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_swap.common.exact_json import EXACT, ExactEncoder, decimals, is_multiple, is_number, plain, same

number_texts = st.from_regex(r"-?(0|[1-9][0-9]{0,24})(\.[0-9]{1,24})?([eE][+-]?[0-9]{1,3})?", fullmatch=True)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.1", 0.1),
        ("1.10", 1.1),
        ("1e23", 1e23),
        ("-0.0", -0.0),
        ("1E5", 100000.0),
        ("7", 7),
        ("100000000000000000000001", 100000000000000000000001),
        ("52.520006599999998", Decimal("52.520006599999998")),
        ("12345678901234567.25", Decimal("12345678901234567.25")),
        ("0.1000000000000000055", Decimal("0.1000000000000000055")),
        ("1e400", Decimal("1e400")),
        ("1e-400", Decimal("1e-400")),
        ("9" * 5000, Decimal("9" * 5000)),
    ],
)
def test_a_number_is_read_as_it_is_written(text, value):
    read = json.loads(text, **EXACT)
    assert type(read) is type(value) and repr(read) == repr(value)
    assert Decimal(json.dumps(read, cls=ExactEncoder)) == Decimal(text)


def test_an_exponent_that_no_number_has():
    with pytest.raises(ValueError, match="an exponent that no number has"):
        json.loads("1e99999999999999999999", **EXACT)


@given(st.recursive(number_texts, lambda inner: st.lists(inner, max_size=3).map(lambda some: f"[{','.join(some)}]"), max_leaves=6))
def test_any_number_is_written_with_the_value_that_was_read(text):
    def exactly(written):
        return json.loads(written, parse_float=Decimal, parse_int=Decimal)

    assert exactly(json.dumps(json.loads(text, **EXACT), cls=ExactEncoder)) == exactly(text)


def test_the_encoder_keeps_every_option_of_the_standard_one():
    value = {"b": Decimal("1.50"), "a": ["é", Decimal("1E+400"), {"c": Decimal("-0.0")}]}
    assert json.dumps(value, cls=ExactEncoder) == '{"b": 1.50, "a": ["\\u00e9", 1E+400, {"c": -0.0}]}'
    compact = json.dumps(value, cls=ExactEncoder, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    assert compact == '{"a":["é",1E+400,{"c":-0.0}],"b":1.50}'
    assert json.dumps([Decimal(1)], cls=ExactEncoder, indent=1) == "[\n 1\n]"


@pytest.mark.parametrize(("value", "error"), [(Decimal("NaN"), ValueError), (Decimal("-Infinity"), ValueError), ({1}, TypeError)])
def test_what_is_no_json_is_not_written(value, error):
    with pytest.raises(error):
        json.dumps({"a": value}, cls=ExactEncoder)


@pytest.mark.parametrize(
    ("value", "divisor", "whole"),
    [
        (4.94, 0.01, True),
        (19.99, 0.01, True),
        (Decimal("4.94"), Decimal("0.01"), True),
        (4.945, 0.01, False),
        (1e308, 1e-7, True),
        (Decimal("1e999999999"), 0.01, True),
        (Decimal("1e999999999"), 3, False),
        (Decimal("3e999999999"), 3, True),
        (Decimal("1e-999999999"), 0.01, False),
        (Decimal("1.00"), 1, True),
        (-9, 3, True),
        (0, 7, True),
        (0.0, 0.1, True),
        (5, 0.3, False),
        (10**400 + 1, 10, False),
    ],
)
def test_multiples_of_decimals(value, divisor, whole):
    assert is_multiple(value, divisor) == whole


@given(st.integers(-(10**9), 10**9), st.integers(1, 10**6), st.integers(-6, 6), st.integers(-6, 6))
def test_a_multiple_is_one_in_integers_too(value, divisor, power, by_power):
    shifted = value * 10 ** (power + 6) % (divisor * 10 ** (by_power + 6)) == 0
    assert is_multiple(Decimal(value).scaleb(power), Decimal(divisor).scaleb(by_power)) == shifted


@pytest.mark.parametrize(
    ("left", "right", "equal"),
    [
        (1, 1.0, True),
        (0.1, Decimal("0.10"), True),
        (0.1, Decimal("0.1000000000000000055"), False),
        (True, 1, False),
        (False, 0.0, False),
        (True, True, True),
        ("1", 1, False),
        (None, None, True),
        (None, False, False),
        ({"a": [1, {"b": 2.0}]}, {"a": [1.0, {"b": 2}]}, True),
        ({"a": 1}, {"a": 1, "b": 1}, False),
        ([1], [1, 1], False),
        ([True], [1], False),
        ({}, [], False),
    ],
)
def test_equality_is_json_s(left, right, equal):
    assert same(left, right) == same(right, left) == equal


def test_floats_and_decimals():
    value = {"a": [0.1, 1, True, None, "x"], "b": {"c": 2.0}}
    exact = {"a": [Decimal("0.1"), 1, True, None, "x"], "b": {"c": Decimal("2.0")}}
    assert repr(decimals(value)) == repr(exact) and repr(plain(exact)) == repr(value)
    assert plain([Decimal("12345678901234567.25")]) == [Decimal("12345678901234567.25")]
    assert is_number(Decimal("1")) and not is_number(True) and not is_number(float("nan")) and not is_number(Decimal("inf"))
