"""Rows that want any number of calls, none included: matched one to one with the calls that were made.

The calls due are an unordered multiset. Each matcher pairs them with the calls that were made so that as many as can be are exact,
then of the same tool, then equal in their leaves; what has no partner counts as missed or as made for nothing. Where no call is due,
"no call" is the one leaf that is expected.
"""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from slm_swap.common.exact_json import EXACT
from slm_swap.rows.lines import dump_json
from slm_swap.scoring.json_values import leaves, objects_in, parse_json, size
from slm_swap.scoring.metrics import ERRORS, UNSCORED, Match, Reference, Scored, compared
from slm_swap.scoring.replies import InvalidReply, Parsed, native_calls, parse_calls, tries_to_call

TOOLS_BETWEEN = ", "  # the names of tools that one row calls
NOTHING_DUE = 1  # leaf: that no call is due


@dataclass(frozen=True)
class Calls:
    """A row's gold: each call that is due, with its schema and acceptable values."""

    parts: tuple[Reference, ...]

    @property
    def due(self) -> bool:
        return bool(self.parts)

    @property
    def tool(self) -> str | None:
        """The tool that the gold calls; several by their names, each once; None where no call is due."""
        return TOOLS_BETWEEN.join(dict.fromkeys(part.parsed.name or "" for part in self.parts)) or None

    @property
    def expected(self) -> int:
        return sum(size(part.parsed.value) for part in self.parts) or NOTHING_DUE


def score_calls(gold: Calls, text: str, finish_reason: str = "stop", calls: list[dict[str, str]] | None = None) -> Scored:
    """Score one reply; `calls` are a native reply's, else they are in `text`.

    Where no call is due, a text that holds one in a form that is not read is as wrong as a call: it is no answer in words.
    A filtered, refused or failed reply scores 0, and so does one without a call that the limit cut before a word of the answer. A
    longer one that was cut counts as it stands: the model had decided to talk.
    """
    if finish_reason in UNSCORED:
        missed = _missed(gold, False)
        return Scored(missed, missed, missed, UNSCORED[finish_reason])
    try:
        made = _in_order(parse_calls(text) if calls is None else native_calls(calls))
    except InvalidReply as invalid:  # it tried to call
        strict, error = _missed(gold, gold.due), invalid.error
        found = _loosely(text) if calls is None else None
        schema, lenient = strict, _matches(gold, _in_order(found))[2] if found else strict
    else:
        silent = not made and says_nothing(text)
        if not gold.due and not made and tries_to_call(text):
            strict = schema = lenient = _missed(gold, False)
            error = "unwanted_call"
        elif silent or (gold.due and not made):
            strict = schema = lenient = _missed(gold, False)
            error = "no_json" if silent else "wrong_shape" if objects_in(text) else "no_call"
        else:
            strict, schema, lenient, error = _matches(gold, made)
    return Scored(strict, schema, lenient, "truncated" if finish_reason == "length" and error else error)


def answer(track: str, text: str, calls: list[dict[str, str]] | None = None) -> Counter:
    """What a reply says, as scoring compares it: its calls, or its JSON value, by their leaves; `calls` are a native reply's.

    Raises:
        InvalidReply: it is not well-formed.
        ValueError: it is no JSON.
    """
    if track == "structured":
        return Counter([leaves(parse_json(text))])
    made = parse_calls(text) if calls is None else native_calls(calls)
    return Counter((call.name, leaves(call.value)) for call in made)


def answer_json(track: str, text: str, calls: list[dict[str, str]] | None = None) -> Any:
    """What a reply says, as a row's `calls` or `object`; numbers keep their digits.

    Raises:
        ValueError: as `answer`.
    """
    answer(track, text, calls)  # which is stricter: no duplicate key, no NaN
    if track == "structured":
        return json.loads(text, **EXACT)
    made = parse_calls(text) if calls is None else native_calls(calls)
    return [{"name": call.name, "arguments": json.loads(dump_json(call.value), **EXACT)} for call in made]


def _in_order(calls: tuple[Parsed, ...]) -> tuple[Parsed, ...]:
    """Calls in an order of their own, so that no score depends on the one in which they were made."""
    return calls if len(calls) < 2 else tuple(sorted(calls, key=lambda call: (call.name or "", dump_json(call.value))))


def says_nothing(text: str) -> bool:
    """Whether a reply without calls has no word of an answer: it is empty, or all of it is a thought that does not end."""
    said = text.strip()
    return not said or (said.startswith("<think>") and "</think>" not in said)


def _loosely(text: str) -> tuple[Parsed, ...] | None:
    try:
        return parse_calls(text, lenient=True)
    except InvalidReply:
        return None


def _missed(gold: Calls, decided: bool) -> Match:
    return Match(False, False, False, 0, 0, gold.expected, gold.due, decided)


def _matches(gold: Calls, made: tuple[Parsed, ...]) -> Scored:
    """Well-formed calls, at least one where one is due, under the three matchers, and the error under `strict`."""
    if not gold.due:
        if not made:
            right = Match(True, True, True, NOTHING_DUE, NOTHING_DUE, NOTHING_DUE, False, True)
            return Scored(right, right, right, None)
        wrong = Match(True, False, False, 0, sum(size(call.value) for call in made), NOTHING_DUE, False, False)
        return Scored(wrong, wrong, wrong, "unwanted_call")
    pairs = [[compared(call, part) for part in gold.parts] for call in made]
    strict, schema, lenient = (_paired(gold, made, [[pair[at] for pair in row] for row in pairs]) for at in range(3))
    return Scored(strict[0], schema[0], lenient[0], _error(gold, made, pairs, strict[1]))


def _paired(gold: Calls, made: tuple[Parsed, ...], matches: list[list[Match]]) -> tuple[Match, list[tuple[int, int]]]:
    """The reply's match under one matcher, and which call was paired with which that was due."""
    pairs = _assign(matches)
    partners = [matches[call][part] for call, part in pairs]
    alone = set(range(len(made))) - {call for call, _ in pairs}
    even = len(made) == len(gold.parts)
    predicted = sum(match.predicted for match in partners) + sum(size(made[call].value) for call in alone)
    unmet = set(range(len(gold.parts))) - {part for _, part in pairs}
    expected = sum(match.expected for match in partners) + sum(size(gold.parts[part].parsed.value) for part in unmet)
    same_tools, exact = even and all(match.name for match in partners), even and all(match.exact for match in partners)
    return Match(True, same_tools, exact, sum(match.matched for match in partners), predicted, expected, True, True), pairs


def _assign(matches: list[list[Match]]) -> list[tuple[int, int]]:
    """Pairs (call, call due), as many as can be: exact ones first, then those of the same tool, then those with most leaves in common."""
    if len(matches) == len(matches[0]) == 1:
        return [(0, 0)]
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    most = 1 + max(match.matched for row in matches for match in row) * min(len(matches), len(matches[0]))
    whole = most * (1 + min(len(matches), len(matches[0])))
    worth = np.array([[match.exact * whole + match.name * most + match.matched for match in row] for row in matches], dtype=float)
    return [(int(call), int(part)) for call, part in zip(*linear_sum_assignment(worth, maximize=True), strict=True)]


def _error(gold: Calls, made: tuple[Parsed, ...], pairs: list[list[Scored]], chosen: list[tuple[int, int]]) -> str | None:
    """The first of ERRORS that holds for well-formed calls where some are due; None where they are right."""
    if len(made) != len(gold.parts):
        return "missing_call" if len(made) < len(gold.parts) else "extra_call"
    if Counter(call.name for call in made) != Counter(part.parsed.name for part in gold.parts):
        return "wrong_tool"
    found: set[Any] = {pairs[call][part].error for call, part in chosen} - {None}
    return min(found, key=ERRORS.index) if found else None
