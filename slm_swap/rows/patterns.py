"""Regular expressions of JSON Schema, which are JavaScript's (ECMA-262), in the form that Python's `re` reads."""

import re
import sys
import unicodedata
import warnings
from functools import lru_cache

LONG_NAMES = {"letter": "L", "uppercase_letter": "Lu", "lowercase_letter": "Ll", "mark": "M", "number": "N", "decimal_number": "Nd",
              "punctuation": "P", "symbol": "S", "separator": "Z", "other": "C", "alphabetic": "L", "alpha": "L"}  # fmt: skip
_STEP = re.compile(r"\\([pP])\{(?:General_Category=|gc=)?(\w+)\}|\\k<(\w+)>|\\u\{([0-9A-Fa-f]+)\}|\(\?<(?![=!])(\w+)>|\\.|[\[\]]", re.DOTALL)


@lru_cache(maxsize=4096)
def python_pattern(pattern: str) -> str | None:
    """The pattern for Python's `re`: `\\p{L}` is written out, `(?<year>...)` becomes `(?P<year>...)`; None where it cannot be read."""
    if not isinstance(pattern, str):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a later Python may read otherwise
        for read in (str, _translated):
            try:
                made = read(pattern)
                re.compile(made)
                return made
            except (re.error, RecursionError, OverflowError, KeyError, ValueError):
                continue
    return None


def matches(pattern: str, text: str) -> bool | None:
    """Whether a pattern is found in a text; None where it cannot be read."""
    readable = python_pattern(pattern)
    return None if readable is None else re.search(readable, text) is not None


def _translated(pattern: str) -> str:
    in_class = False

    def step(match: re.Match) -> str:
        nonlocal in_class
        kind, category, back, code, group = match.groups()
        if kind:
            ranges = _ranges(category, kind == "P")
            return ranges if in_class else f"[{ranges}]"
        if back:
            return f"(?P={back})"
        if code:
            return re.escape(chr(int(code, 16)))
        if group:
            return match[0] if in_class else f"(?P<{group}>"
        if match[0] == "[" and in_class:
            return r"\["
        in_class = {"[": True, "]": False}.get(match[0], in_class)
        return match[0]

    return _STEP.sub(step, pattern)


@lru_cache(maxsize=64)
def _ranges(name: str, negated: bool) -> str:
    """The characters of a Unicode category (`L`, `Lu`, `Letter`, ...), or all others, as they stand inside [...].

    Raises:
        KeyError: no such category (a script, for example).
    """
    category = name if name in _categories() else LONG_NAMES[name.lower()]
    found, start = [], None
    for code in range(sys.maxunicode + 2):
        inside = code <= sys.maxunicode and unicodedata.category(chr(code)).startswith(category) is not negated
        if inside and start is None:
            start = code
        elif not inside and start is not None:
            found.append(f"\\U{start:08x}-\\U{code - 1:08x}")
            start = None
    return "".join(found)


@lru_cache(maxsize=1)
def _categories() -> frozenset[str]:
    names = {unicodedata.category(chr(code)) for code in range(0x3000)} | {"Co", "Cn", "Cs"}
    return frozenset(names | {name[0] for name in names})
