"""JavaScript's regular expressions, as Python reads them."""

import pytest

from slm_swap.rows.json_schema import violations
from slm_swap.rows.patterns import matches, python_pattern
from slm_swap.rows.schema_parts import lists_property, modern, unread_patterns


@pytest.mark.parametrize(
    ("pattern", "text", "found"),
    [
        (r"^\p{L}+$", "Zoë", True),
        (r"^\p{L}+$", "Zo3", False),
        (r"^[\p{Lu}\d-]+$", "Ä-3", True),
        (r"^[\p{Lu}\d-]+$", "ä", False),
        (r"^\P{L}$", "3", True),
        (r"^\p{Letter}\p{gc=Nd}$", "a1", True),
        (r"^(?<year>\d{4})-\k<year>$", "2026-2026", True),
        (r"^(?<year>\d{4})-\k<year>$", "2026-2025", False),
        (r"^\u{1F600}$", "\U0001f600", True),
        (r"^[[\p{L}]$", "[", True),
        (r"(?<=a)b", "ab", True),
        (r"^\d+$", "12", True),
        (r"\p{Script=Greek}", "α", None),
        ("(", "a", None),
    ],
)
def test_patterns(pattern, text, found):
    assert matches(pattern, text) is found


def test_a_pattern_that_python_reads_stays():
    assert python_pattern(r"^a\\p{2}$") == r"^a\\p{2}$"


def test_in_a_schema():
    schema = {"properties": {"pattern": {"pattern": r"^\p{L}+$"}, "bb": {"pattern": "("}}, "patternProperties": {r"^\p{L}$": {"type": "integer"}}}
    assert violations({"pattern": "Zoë", "bb": "x", "ä": 1}, schema) == []
    assert len(violations({"pattern": "1", "ä": "x"}, schema)) == 2
    assert lists_property(schema, "ä") and not lists_property(schema, "1")
    assert unread_patterns(schema) == 1
    open_schema = {"patternProperties": {"(": {}}, "additionalProperties": False}
    assert violations({"a": 1}, open_schema) == [], "what an unread pattern lets in is not forbidden"


def test_values_are_no_schemas():
    schema = {"default": {"pattern": "("}, "enum": [{"items": []}], "items": [{"type": "integer"}], "additionalItems": False}
    assert modern(schema) == {
        "default": {"pattern": "("}, "enum": [{"items": []}], "prefixItems": [{"type": "integer"}], "items": False,
    }  # fmt: skip
    assert violations([1], {"items": [{"type": "integer"}]}) == [] and violations(["x"], {"items": [{"type": "integer"}]})
