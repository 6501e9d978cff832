"""Parse, match, score: pure functions from a reply and a reference to numbers.

Every row stays in the denominator: a bad reply scores 0 with one `error` out of `ERRORS`. JSON is compared by value with JSON's
own types (RFC 8259): `true` is not 1, `1` equals `1.0`, key order is nothing, list order counts, numbers are compared exactly
at any size; duplicate keys, NaN and nesting deeper than 100 levels make a reply invalid. A value that the row's `accept` lists
is right under every matcher: it counts as the gold's own value, in the leaves and in the error too.

A miss has the first of these errors that holds:

- `filtered`, `refused`: the client says so, and the text is no answer whatever stands in it.
- `prompt_too_long`: the prompt does not fit in the model's context, so that nothing was generated.
- `truncated`: the reply was cut off, and misses.
- `no_json`: no JSON in the text; a request that failed counts here too.
- `bad_json`: a `{` stands in the text, but no whole JSON object (syntax, a duplicate key, NaN, nested too deeply, cut off).
- `extra_text`: a whole reply stands in the text, and so does something else: prose, a code fence, a second object or call.
- `wrong_shape`: JSON, but no whole reply: not an object, or no wrapper or another one around it.
- `unwanted_call`: a call where none is due, in the text in whatever form; `no_call`: none where one is due; `missing_call`,
  `extra_call`: fewer or more than are due. (Where a row is `{prompt, completion}`, exactly one call is due; plain text is `no_json` then, and a second call `extra_text`.)
- `wrong_tool`, then the differences between the two objects: `missing_argument` and `extra_argument` (keys, at any depth),
  `wrong_type` (another JSON type) and `wrong_value` (also a list of another length).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from slm_swap.rows.json_schema import coerce, with_defaults
from slm_swap.rows.schema_parts import allows_text, item_schema, known_property
from slm_swap.scoring.json_values import Leaf, json_type, leaves, same, size
from slm_swap.scoring.replies import InvalidReply, Parsed, Parser, native_calls

ERRORS = (
    "filtered", "refused", "prompt_too_long", "truncated", "no_json", "bad_json", "extra_text", "wrong_shape", "unwanted_call",
    "no_call", "missing_call", "extra_call", "wrong_tool", "missing_argument", "extra_argument", "wrong_type", "wrong_value",
)  # fmt: skip
MATCHERS = ("strict", "schema", "lenient")
UNSCORED = {  # such a text is no answer
    "content_filter": "filtered", "refusal": "refused", "prompt_too_long": "prompt_too_long", "error": "no_json",
}  # fmt: skip


# -- Matching --------------------------------------------------------------------------------------------------------------------


class Match(NamedTuple):
    """How one reply compares with its reference: yes-no answers and the counts behind precision and recall.

    `predicted` and `expected` count leaves, `matched` those in both; with the wrong tool `matched` is 0. `due` is whether a call is
    due, and `decided` whether the model called exactly if so: None where the row always wants one call, or a JSON value.
    """

    valid: bool
    name: bool
    exact: bool
    matched: int
    predicted: int
    expected: int
    due: bool | None = None
    decided: bool | None = None

    @property
    def precision(self) -> float:
        return self.matched / self.predicted if self.predicted else 0.0

    @property
    def recall(self) -> float:
        return self.matched / self.expected if self.expected else 0.0

    @property
    def f1(self) -> float:
        return 2 * self.matched / (self.predicted + self.expected) if self.predicted + self.expected else 0.0


@dataclass(frozen=True)
class Reference:
    """A row's gold, parsed once, with what the looser matchers need: worked out when the first miss asks for it.

    `text` is what it was parsed from: a reply that is the same letter by letter needs no parsing.
    """

    parsed: Parsed
    schema: dict | None = None
    accept: dict[str, list] | None = None
    text: str | None = None

    @cached_property
    def tool(self) -> str | None:
        """The tool that the gold calls: the call's name, or a structured object's `tool_name`."""
        value = self.parsed.value
        name = self.parsed.name or (value.get("tool_name") if isinstance(value, dict) else None)
        return name if isinstance(name, str) else None

    @cached_property
    def leaves(self) -> frozenset[Leaf]:
        return leaves(self.parsed.value)

    @cached_property
    def coerced(self) -> dict[str, Any]:
        return coerce(self.parsed.value, self.schema)

    @cached_property
    def filled(self) -> frozenset[Leaf]:
        """The leaves that an aligned reply is compared with."""
        return leaves(with_defaults(self.coerced, self.schema))

    @cached_property
    def nested(self) -> bool:
        """Whether a structured gold is `{"tool_name", "arguments"}`, so that `accept` speaks of what stands under `arguments`."""
        value = self.parsed.value
        call = self.parsed.name is None and isinstance(value, dict) and "tool_name" in value
        return call and isinstance(value.get("arguments"), dict)

    @cached_property
    def options(self) -> "_Options":
        """`accept` as it is written."""
        schema = known_property(self.schema, "arguments", self.schema) if self.nested else self.schema
        parts = {key: known_property(schema, key, self.schema) for key in self.accept or {}}
        return _Options(self.accept or {}, parts, self.schema)

    @cached_property
    def converted(self) -> "_Options":
        """`accept` with its values converted as a reply's are."""
        parts, given = self.options.parts, self.options.given
        coerced = {key: [coerce(option, parts[key], self.schema) for option in options] for key, options in given.items()}
        return _Options(coerced, parts, self.schema)

    def take(self, value: dict[str, Any]) -> dict[str, Any]:
        """A reply with every value that is acceptable as it stands replaced by the gold's own."""
        return self._replaced(value, self.parsed.value, self.options, folded=False)

    def align(self, value: dict[str, Any], folded: bool) -> frozenset[Leaf]:
        """A reply's leaves, once its types are converted, acceptable values replaced by the gold's own and defaults filled in."""
        value = coerce(value, self.schema)
        if self.accept:
            value = self._replaced(value, self.coerced, self.converted, folded)
        return leaves(with_defaults(value, self.schema))

    def _replaced(self, value: dict[str, Any], gold: dict[str, Any], options: "_Options", folded: bool) -> dict[str, Any]:
        if not isinstance(value, dict):
            return value
        if not self.nested:
            return options.replace(value, gold, folded)
        if not isinstance(value.get("arguments"), dict):
            return value
        return value | {"arguments": options.replace(value["arguments"], gold["arguments"], folded)}


class Scored(NamedTuple):
    """One reply under the three matchers, and why it missed under `strict` (None: it did not)."""

    strict: Match
    schema: Match
    lenient: Match
    error: str | None


def score(
    parse: Parser, reference: Reference, text: str, finish_reason: str = "stop", calls: list[dict[str, str]] | None = None
) -> Scored:
    """Score one reply to a row that wants one call or one JSON value; `calls` are a native reply's.

    A filtered, refused or failed reply, and one to a prompt longer than the context, scores 0 whatever its text; a truncated one is scored as it stands (a reply may be whole
    when the limit cuts it), and its error is `truncated` where it misses.
    """
    if finish_reason in UNSCORED:
        missed = _missed(reference)
        return Scored(missed, missed, missed, UNSCORED[finish_reason])
    gold = reference.parsed
    written = calls is None or (gold.name is None and not calls)  # a JSON value stands in the text in either form
    try:
        if written:
            parsed = gold if text == reference.text else parse(text, like=gold.value)
        else:
            parsed = _one_call(parse, gold, text, calls)
    except InvalidReply as invalid:
        strict, error = _missed(reference), invalid.error
        parsed = _leniently(parse, text, gold) if written else None
        schema, lenient = strict, _loose_matches(parsed, reference)[1] if parsed else strict
    else:
        strict, schema, lenient, error = compared(parsed, reference)
    return Scored(strict, schema, lenient, "truncated" if finish_reason == "length" and error else error)


def _one_call(parse: Parser, gold: Parsed, text: str, calls: list[dict[str, str]]) -> Parsed:
    """The one call of a native reply.

    Raises:
        InvalidReply: there is none, more than one, its arguments are no JSON object, or a JSON value was wanted.
    """
    if gold.name is None:
        raise InvalidReply("unwanted_call", "a call instead of a JSON value")
    if not calls:
        try:
            parse(text)
        except InvalidReply as invalid:
            raise InvalidReply(invalid.error if invalid.error != "extra_text" else "wrong_shape", str(invalid)) from None
        raise InvalidReply("wrong_shape", "a call in the reply's text instead of a tool call")
    (call, *others) = native_calls(calls)
    if others:
        raise InvalidReply("extra_call", f"{len(calls)} calls instead of one")
    return call


def compared(parsed: Parsed, reference: Reference) -> Scored:
    """One well-formed reply against its reference."""
    gold = reference.parsed
    if parsed is gold or (parsed.name == gold.name and same(parsed.value, gold.value)):
        return _exact(parsed.value)
    taken = parsed
    if reference.accept and parsed.name == gold.name:
        taken = Parsed(reference.take(parsed.value), parsed.name)
        if same(taken.value, gold.value):
            return _exact(taken.value)
    strict = _match(leaves(taken.value), reference.leaves, taken.name == gold.name)
    return Scored(strict, *_loose_matches(parsed, reference), _difference_error(taken, gold))


def _exact(value: dict[str, Any]) -> Scored:
    """What is right under `strict` is right under the looser matchers too."""
    count = size(value)
    match = Match(True, True, True, count, count, count)
    return Scored(match, match, match, None)


def _leniently(parse: Parser, text: str, gold: Parsed) -> Parsed | None:
    try:
        return parse(text, lenient=True, like=gold.value)
    except InvalidReply:
        return None


def _missed(reference: Reference) -> Match:
    return Match(False, False, False, 0, 0, size(reference.parsed.value))


def _match(predicted: frozenset[Leaf], expected: frozenset[Leaf], right_tool: bool = True) -> Match:
    matched = len(predicted & expected) if right_tool else 0
    return Match(True, right_tool, right_tool and predicted == expected, matched, len(predicted), len(expected))


def _difference_error(parsed: Parsed, gold: Parsed) -> str:
    """The first of ERRORS that holds for a well-formed reply that is not equal to its reference."""
    named = gold.name is None and isinstance(gold.value, dict) and "tool_name" in gold.value
    if parsed.name != gold.name or (named and _differs_at(parsed, gold, "tool_name")):
        return "wrong_tool"
    found: set[str] = set()
    _collect(gold.value, parsed.value, found)
    return min(found, key=ERRORS.index)


def _differs_at(parsed: Parsed, gold: Parsed, key: str) -> bool:
    return key in parsed.value and not same(parsed.value[key], gold.value[key])


def _collect(want: Any, got: Any, found: set[str]) -> None:
    """Add the errors between two JSON values; lists of other lengths are a wrong value, not missing arguments."""
    if json_type(want) != json_type(got):
        found.add("wrong_type")
    elif isinstance(want, dict):
        found.update({"missing_argument"} if want.keys() - got.keys() else ())
        found.update({"extra_argument"} if got.keys() - want.keys() else ())
        for key in want.keys() & got.keys():
            _collect(want[key], got[key], found)
    elif isinstance(want, list) and len(want) == len(got):
        for left, right in zip(want, got, strict=True):
            _collect(left, right, found)
    elif want != got:
        found.add("wrong_value")


# -- The looser matchers ---------------------------------------------------------------------------------------------------------


def _loose_matches(parsed: Parsed, reference: Reference) -> tuple[Match, Match]:
    """(schema, lenient). To the schema matcher the same is what the schema allows: types that it can convert, and its defaults. To
    the lenient one, case and white space in the tool's name and in values (not in keys) are nothing besides."""
    if _fold(parsed.name) != _fold(reference.parsed.name):
        wrong = _match(leaves(parsed.value), reference.leaves, right_tool=False)
        return wrong, wrong
    aligned = reference.align(parsed.value, folded=False)
    schema = _match(aligned, reference.filled, parsed.name == reference.parsed.name)
    if reference.accept:  # more values are acceptable once they are folded
        aligned = reference.align(parsed.value, folded=True)
    return schema, _match(_folded(aligned), _folded(reference.filled))


def _fold(text: Any) -> Any:
    """A text without its case and white space; anything else as it is."""
    return " ".join(text.casefold().split()) if isinstance(text, str) else text


def _folded(fields: frozenset[Leaf]) -> frozenset[Leaf]:
    return frozenset([(path, kind, _fold(value)) for path, kind, value in fields])


# -- Acceptable values -----------------------------------------------------------------------------------------------------------


class _Options(NamedTuple):
    """Acceptable values: `given` maps an argument to them, `parts` to its schema inside `root`.

    `""` says that an argument may be left out. It is a value as well only where the schema allows a string, or says nothing.
    """

    given: dict[str, list]
    parts: dict[str, Any]
    root: Any

    def replace(self, value: dict[str, Any], gold: dict[str, Any], folded: bool) -> dict[str, Any]:
        """The arguments with every acceptable value replaced by the gold's own."""
        value = dict(value)
        for key, options in self.given.items():
            if key in value:
                if not _accepts_one(options, value[key], folded, self.parts[key], self.root):
                    continue
                del value[key]
            elif "" not in options:
                continue
            if key in gold:
                value[key] = gold[key]
        return value


def _accepts_one(options: list, value: Any, folded: bool, schema: Any, root: Any) -> bool:
    literal = (option for option in options if option != "" or allows_text(schema, root))
    return any(_accepts(option, value, folded, schema, root) for option in literal)


def _accepts(option: Any, value: Any, folded: bool, schema: Any = True, root: Any = None) -> bool:
    """Whether a value is one that the row accepts: equal, or (BFCL) an object whose leaves are lists of acceptable values."""
    wanted, given = leaves(option), leaves(value)
    if wanted == given or (folded and _folded(wanted) == _folded(given)):
        return True
    if isinstance(option, dict) and isinstance(value, dict):
        choices = {key: given if isinstance(given, list) else [given] for key, given in option.items()}
        return value.keys() <= choices.keys() and all(
            _accepts_one(given, value[key], folded, known_property(schema, key, root), root) if key in value else "" in given
            for key, given in choices.items()
        )
    if isinstance(option, list) and isinstance(value, list) and len(option) == len(value):
        pairs = enumerate(zip(option, value, strict=True))
        return all(_accepts(left, right, folded, item_schema(schema, at, root), root) for at, (left, right) in pairs)
    return False
