"""What a reply may say, as a grammar in llguidance's variant of Lark: the form that is asked for, as training writes it, and nothing else.

- JSON is written as `rows.lines.dump_json` does, or with the separators of a chat template: no free white space, in which a model may loop,
  and no escape that training never shows (`\\/`, `\\u00e9`).
- An object's properties come in any order, each at most once: rows hold them in the order in which production wrote them, which need not be
  the schema's. llguidance's parametric rules count them, by one bit for each.
- What a schema says holds, as far as a grammar can say it. `format` is left to the model, as it is when rows are checked. An object that
  lists properties holds no others unless its schema says what else it may hold, as `json_schema.call_violations` has it for arguments: in
  open objects a model goes on with keys of its own, to the limit. There alone a key may come twice.
- A schema that no grammar says (`not`, `if`, `uniqueItems`, ...) raises NoGrammar: nobody makes a grammar that lets more through.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from slm_swap.common.exact_json import ExactEncoder, same
from slm_swap.rows.json_schema import violations
from slm_swap.rows.patterns import python_pattern
from slm_swap.rows.prompts import Wanted
from slm_swap.rows.schema_parts import (
    is_open,
    item_schema,
    leads_to_itself,
    map_schema,
    mapping,
    parts,
    property_schema,
    types_of,
    with_prefix_items,
)

MOST_PROPERTIES = 64  # bits of a parametric rule
MOST_CHOICES = 1000  # at one place: llguidance takes 2,000 and no more, and says so only while it decodes
CALL_ID = "\0id\0"  # in a CallForm, where a call has an id: nine letters and digits
ANY_NAME = r'[^"<>\x00-\x20]+'  # of a tool, where those on offer are not known
_PLAIN_NAME = re.compile(r'[^"<>\\\x00-\x20]+')  # one that stands in every format as it is
_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_CHARACTER = r'([^"\\\x00-\x1f]|\\["\\bfnrt]|\\u00(0[0-7be-f]|1[0-9a-f]))'  # of a JSON string, as Python's json writes it
_PAIR = r"d[89ab][0-9a-f]{2}\\ud[c-f][0-9a-f]{2}"
_ESCAPED = rf"(\\u(007f|00[89a-f][0-9a-f]|0[1-9a-f][0-9a-f]{{2}}|[1-9a-cef][0-9a-f]{{3}}|d[0-7][0-9a-f]{{2}}|{_PAIR})|{_CHARACTER})"  # with its ensure_ascii
_INTEGER, _NUMBER = r"-?(0|[1-9][0-9]*)(\.0)?", r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]{1,3})?"
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_LENGTHS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_SAID = (  # what a grammar can say
    "type", "nullable", "enum", "const", "properties", "required", "additionalProperties", "unevaluatedProperties", "items", "prefixItems", "anyOf", "oneOf", "pattern",
    *_BOUNDS, *_LENGTHS,
)  # fmt: skip
_UNSAID = (  # and what none can
    "not", "if", "uniqueItems", "contains", "propertyNames", "patternProperties", "dependentRequired", "dependentSchemas", "dependencies",
    "unevaluatedItems", "$dynamicRef", "$recursiveRef",
)  # fmt: skip
_HARMLESS = {"uniqueItems": (False,), "unevaluatedItems": (True, {}), "propertyNames": (True, {}), "patternProperties": ({},)}


class NoGrammar(Exception):
    """A reply that no grammar describes; the message says why, in a few words that are the same for rows with the same reason."""


class _NoValue(Exception):
    """A schema that allows no value."""


@dataclass(frozen=True)
class CallForm:
    """How calls are written: `opening`, then for each call `before` NAME `between` ARGUMENTS `behind`, with `joint` between two, then `closing`.

    `separators` are those of the arguments' JSON (None: the row's own). `joint` None: no more than one call. `text` is a regular expression of what a reply without
    calls may be, white space in front of it aside, and `mark` what must not stand in it, in capitals or not.
    """

    before: str = '<tool_call name="'
    between: str = '">'
    behind: str = "</tool_call>"
    opening: str = ""
    closing: str = ""
    joint: str | None = "\n"
    separators: tuple[str, str] | None = None
    text: str = r"(?s:\S.*)"
    mark: str | None = "<tool_call"


@dataclass(frozen=True)
class Frame:
    """What stands around a reply: `opening`, which may be left out, or a thought between two marks (without the first, the prompt has opened
    the thought, and it has to end); then `closing`, which may be left out, and the tokens that end the reply.

    `spaced` is whether the tokenizer puts spaces in front of a text. `special` are the texts that llguidance knows as tokens and not as
    text, with their ids, `plain` those of them that may be spelled too.
    """

    opening: str = ""
    thought: tuple[str | None, str] | None = None
    closing: str = ""
    ends: tuple[int, ...] = ()
    spaced: bool = False
    special: Mapping[str, int] = field(default_factory=dict)
    plain: frozenset[str] = frozenset()


TEXT_CALLS = CallForm()


def grammar_of(wanted: Wanted, frame: Frame, calls: CallForm = TEXT_CALLS) -> str:
    """The grammar of what a row's reply may be.

    Raises:
        NoGrammar: none says it.
    """
    separators = calls.separators if wanted.form in ("call", "calls") and calls.separators else wanted.separators
    if separators is None:
        raise NoGrammar("JSON over several lines")
    made = _Maker(separators, frame, _ESCAPED if wanted.escaped else _CHARACTER)
    try:
        if wanted.form in ("call", "calls"):
            reply = _calls(made, wanted, calls)
        else:
            schema = wanted.schema if wanted.schema is not None else {"type": "object"} if wanted.form == "object" else True
            schema = _rooted(schema)
            reply = made.value(schema, schema)
    except _NoValue:
        raise NoGrammar("the schema allows no value") from None
    except RecursionError:
        raise NoGrammar("the schema is nested too deeply") from None
    begun = [f"({made.spelled(frame.opening)})?"] if frame.opening else []
    if frame.thought:
        begun = [_thought(made, frame)]
    begun += [f"{made.terminal(' {1,2}')}?"] if frame.spaced else []
    ended = [f"({made.spelled(frame.closing)})?"] if frame.closing else []
    ended += [f"<[{','.join(map(str, sorted(frame.ends)))}]>?"] if frame.ends else []
    return made.text(" ".join([*begun, f"({reply})", *ended]))


def _calls(made: "_Maker", wanted: Wanted, form: CallForm) -> str:
    bodies = []
    for tool in sorted(wanted.tools or (), key=lambda tool: tool["name"]):  # rows have them in any order
        if not _PLAIN_NAME.fullmatch(tool["name"]):
            raise NoGrammar("a tool's name with quotes, brackets or spaces")
        parameters = _rooted(tool.get("parameters") or {"type": "object"})
        try:
            arguments = made.value({"allOf": [parameters, {"type": "object"}]}, parameters, closed=not is_open(parameters))
        except _NoValue:
            continue  # a tool that cannot be called
        bodies.append(f"{made.spelled(tool['name'] + form.between)} {arguments}")
    if not wanted.tools:
        bodies.append(f"{made.terminal(ANY_NAME)} {made.spelled(form.between)} {made.value({'type': 'object'}, {})}")
    elif not bodies:
        raise _NoValue
    call = made.rule(f"{made.spelled(form.before)} ({' | '.join(bodies)}) {made.spelled(form.behind)}")
    once = wanted.form == "call" or not wanted.several or form.joint is None
    more = "" if once else f" ({made.spelled(form.joint)} {call})*"
    some = f"{made.spelled(form.opening)} {call}{more} {made.spelled(form.closing)}"
    if wanted.form == "call" or wanted.choice == "required":
        return some
    # The white space in front is a terminal of its own: within the text's, it would keep a space in front of a call from ending.
    text = made.terminal(r"[ \t\r\n]+") + "? " + made.terminal(form.text, f"(?s:.*)(?i:{_escaped(form.mark)})(?s:.*)" if form.mark else None)
    return text if wanted.choice == "none" else f"{some} | {text}"


def _thought(made: "_Maker", frame: Frame) -> str:
    opening, closing = frame.thought
    space = made.terminal(r"[ \t\r\n]+")
    if closing in frame.special:
        thought = f"{made.terminal('(?s:.*)')} <[{frame.special[closing]}]>"
    else:
        thought = made.rule(f"/(?s:.*){_escaped(closing)}/", "[lazy]")
    # a space that the model is used to stands in front of the mark
    return f"{thought} {space}?" if opening is None else f"({space}? {made.spelled(opening)} {thought} {space}?)?"


def _rooted(schema: Any) -> Any:
    """A whole schema in the form that is read here.

    Raises:
        NoGrammar: it has a `$ref` that comes back to itself.
    """
    if leads_to_itself(schema):
        raise NoGrammar("a `$ref` that leads to itself")
    return map_schema(schema, with_prefix_items)


def _escaped(text: str) -> str:
    """A text as a part of a regular expression between slashes."""
    return re.sub(r"[^A-Za-z0-9_ ]", lambda match: f"\\x{{{ord(match[0]):x}}}", text)


class _Maker:
    """The rules of a grammar, as they are found to be needed; equal ones are made once."""

    def __init__(self, separators: tuple[str, str], frame: Frame, character: str):
        (self.comma, self.colon), self.character = separators, character
        self._frame = frame
        self._split = re.compile("|".join(map(re.escape, sorted([*frame.special, CALL_ID], key=len, reverse=True))))
        self._lines: list[str] = []
        self._names: dict[Any, str] = {}
        self._roots: list[Any] = []

    def text(self, start: str) -> str:
        return "\n".join(["%llguidance {}", f"start: {start}", *self._lines, ""])

    def rule(self, body: str, options: str = "") -> str:
        if (body, options) not in self._names:
            self._names[body, options] = name = f"r{len(self._lines)}"
            self._lines.append(f"{name}{options}: {body}")
        return self._names[body, options]

    def terminal(self, pattern: str, but: str | None = None) -> str:
        """What matches a regular expression and not the other one."""
        key = "terminal", pattern, but
        if key not in self._names:
            self._names[key] = name = f"T{len(self._lines)}"
            self._lines.append(f"{name}: /{pattern}/" + (f" & ~/{but}/" if but else ""))
        return self._names[key]

    def spelled(self, text: str) -> str:
        """A text to the letter, its special tokens as such."""
        return self._spelled(text, self._frame.plain, frozenset())

    def literal(self, text: str) -> str:
        """A text of the row's own to the letter, its special tokens as such, as the tokenizer gives them in training, or spelled. One that ends a
        reply would end it there, and is only spelled."""
        ends = frozenset(text for text, token in self._frame.special.items() if token in self._frame.ends)
        return self._spelled(text, frozenset(self._frame.special), ends)

    def _spelled(self, text: str, plain: frozenset[str], never: frozenset[str]) -> str:
        """`spelled`, where those `plain` may be text too, and those that `never` are tokens are text alone."""
        found, at = [], 0
        for mark in self._split.finditer(text):
            found += [_quoted(text[at : mark.start()])] if mark.start() > at else []
            if mark[0] == CALL_ID:
                found.append("/[A-Za-z0-9]{9}/")
            elif mark[0] in never:
                found.append(_quoted(mark[0]))
            else:
                token = f"<[{self._frame.special[mark[0]]}]>"
                found.append(f"({token} | {_quoted(mark[0])})" if mark[0] in plain else token)
            at = mark.end()
        if text[at:] or not found:
            found.append(_quoted(text[at:]))
        return " ".join(found)

    def json(self, value: Any) -> str:
        """A JSON value to the letter. A list or an object is written in parts: as one, llguidance would take `{"` for the beginning of this value
        alone, where others may stand as well."""
        comma = f" {_quoted(self.comma)} "
        if isinstance(value, dict) and value:
            return '"{" ' + comma.join(f"{self.literal(_string(key) + self.colon)} {self.json(part)}" for key, part in value.items()) + ' "}"'
        if isinstance(value, list) and value:
            return '"[" ' + comma.join(map(self.json, value)) + ' "]"'
        return self.literal(self._encoded(value))

    def _encoded(self, value: Any) -> str:
        return ExactEncoder(ensure_ascii=False, allow_nan=False, separators=(self.comma, self.colon)).encode(value)

    # -- Values ------------------------------------------------------------------------------------------------------------------

    def value(self, schema: Any, root: Any, closed: bool = False) -> str:
        """The name of the rule for the values that a schema allows; an object that is `closed` may list none and then holds none.

        Raises:
            NoGrammar: none says it.
            _NoValue: there is no such value.
        """
        found = [_vocabulary(part) for part in parts(schema, root) if part is not True]
        if False in found:
            raise _NoValue
        found = [part for at, part in enumerate(found) if part and part not in found[:at]]
        text = json.dumps(found, cls=ExactEncoder)
        key = text, closed, self._number(root) if '"$ref"' in text else None
        if key not in self._names:
            self._names[key] = name = f"r{len(self._lines)}"
            place = len(self._lines)
            self._lines.append("")  # its place: a schema may hold itself
            try:
                self._lines[place] = f"{name}: {self._alternatives(found, root, closed)}"
            except _NoValue:
                self._names[key] = ""
        if not self._names[key]:
            raise _NoValue
        return self._names[key]

    def _number(self, root: Any) -> int:
        for number, known in enumerate(self._roots):
            if known is root:
                return number
        self._roots.append(root)
        return len(self._roots) - 1

    def _alternatives(self, found: list[dict], root: Any, closed: bool) -> str:
        for at, part in enumerate(found):
            if listed := next((name for name in ("enum", "const") if name in part), None):
                # what the list itself says holds for each of its values: asked again, thousands would take seconds
                rest = {"allOf": [*found[:at], {name: told for name, told in part.items() if name != listed}, *found[at + 1 :]]}
                values = part["enum"] if listed == "enum" else [part["const"]]
                return self._listed([value for value in values if not violations(value, rest, root=root if isinstance(root, dict) else {})])
        for at, part in enumerate(found):
            for name in ("anyOf", "oneOf"):
                if name in part:
                    rest = [*found[:at], {key: value for key, value in part.items() if key != name}, *found[at + 1 :]]
                    rest = [part for part in rest if part]
                    choices = [{"allOf": [*rest, choice]} if rest else choice for choice in part[name]]
                    if name == "oneOf":
                        _require_apart(choices, root)
                    return self._any_of(self._tried(lambda choice=choice: self.value(choice, root, closed)) for choice in choices)
        allowed = _allowed_types(found)
        made = {
            "object": lambda: self._object(found, root, closed),
            "array": lambda: self._array(found, root),
            "string": lambda: self._string(found),
            "number": lambda: self._bounded("number", found) or self.terminal(_NUMBER),
            "integer": lambda: self._bounded("integer", found) or self.terminal(_INTEGER),
            "boolean": lambda: '"true" | "false"',
            "null": lambda: '"null"',
        }
        return self._any_of(self._tried(made[kind]) for kind in _TYPES if kind in allowed and not (kind == "integer" and "number" in allowed))

    def _listed(self, values: list) -> str:
        """One of these values; of many, those that are one text each are a single terminal."""
        found = list(dict.fromkeys(map(self.json, values)))
        if len(found) > MOST_CHOICES:
            texts = {_quoted(text): text for text in map(self._encoded, values)}  # those without special tokens and parts
            whole = [texts[one] for one in found if one in texts]
            found = [one for one in found if one not in texts] + ([self.terminal(f"({'|'.join(map(_escaped, whole))})")] if whole else [])
        if len(found) > MOST_CHOICES:
            raise NoGrammar(f"more than {MOST_CHOICES} listed values of several parts")
        return self._any_of(found)

    @staticmethod
    def _tried(make: Callable[[], str]) -> str | None:
        try:
            return make()
        except _NoValue:
            return None

    @staticmethod
    def _any_of(alternatives: Iterable[str | None]) -> str:
        found = list(dict.fromkeys(one for one in alternatives if one is not None))
        if not found:
            raise _NoValue
        return " | ".join(found)

    def _string(self, found: list[dict]) -> str:
        least, most = _range(found, "minLength", "maxLength")
        patterns = {part["pattern"] for part in found if isinstance(part.get("pattern"), str) and python_pattern(part["pattern"]) is not None}
        if len(patterns) > 1:
            raise NoGrammar("two patterns for one string")
        if patterns:
            lengths = ({"minLength": least} if least else {}) | ({"maxLength": most} if most is not None else {})
            return self._by_llguidance({"type": "string", "pattern": patterns.pop()} | lengths)
        return self.terminal(f'"{self.character}{_times(least, most)}"')

    def _bounded(self, kind: str, found: list[dict]) -> str | None:
        """A number within bounds; None where there are none."""
        told = [{name: part[name] for name in _BOUNDS if name in part} for part in found]
        told = [bounds for at, bounds in enumerate(told) if bounds and bounds not in told[:at]]
        if len(told) > 1:
            raise NoGrammar("several bounds for one number")
        if told and any(isinstance(bound, bool) for bound in told[0].values()):
            raise NoGrammar("bounds of an older draft")
        return self._by_llguidance({"type": kind} | told[0]) if told else None

    def _by_llguidance(self, schema: dict) -> str:
        told = schema | {"x-guidance": {"whitespace_flexible": False}}
        return self.rule(f"%json {json.dumps(told, cls=ExactEncoder)}")

    def _array(self, found: list[dict], root: Any) -> str:
        least, most = _range(found, "minItems", "maxItems")
        whole = {"allOf": found}
        prefix = max((len(part.get("prefixItems", ())) for part in found), default=0)
        if most is not None and most < least:
            raise _NoValue
        comma = _quoted(self.comma)
        try:
            item = self.value(item_schema(whole, prefix, root), root)
        except _NoValue:
            item, most = None, prefix if most is None else min(prefix, most)
            if most < least:
                raise
        if not prefix:
            if item is None or most == 0:
                return '"[]"'
            rest = f" ({comma} {item}){_times(max(0, least - 1), None if most is None else most - 1)}"
            some = f'"[" {item}{rest} "]"'
            return some if least else f'"[]" | {some}'
        # from the last item to the first: what may follow it
        tail = ""
        if item is not None and (most is None or most > prefix):
            tail = f"({comma} {item}){_times(max(0, least - prefix), None if most is None else most - prefix)}"
        for at in reversed(range(prefix if most is None else min(prefix, most))):
            try:
                own = self.value(item_schema(whole, at, root), root)
            except _NoValue:
                if at < least:
                    raise
                tail = ""
                continue
            here = f"{comma} {own} {tail}" if at else f"{own} {tail}"
            tail = self.rule(here) if at < least else f"({self.rule(here)})?"
        return f'"[" {tail} "]"'

    def _object(self, found: list[dict], root: Any, closed: bool) -> str:
        whole, least_most = {"allOf": found}, _range(found, "minProperties", "maxProperties")
        required = list(dict.fromkeys(key for part in found for key in part.get("required", ())))
        listed = list(dict.fromkeys([*required, *(key for part in found for key in part.get("properties", {}))]))
        said = any(name in part for part in found for name in ("additionalProperties", "unevaluatedProperties"))
        others = [part.get("additionalProperties", part.get("unevaluatedProperties", True)) for part in found]
        members = []
        for key in listed:
            try:
                members.append(f"{self.literal(_string(key) + self.colon)} {self.value(property_schema(whole, key, root), root)}")
            except _NoValue:
                if key in required:
                    raise
        other = None
        if said or not (closed or listed):
            other = self._tried(lambda: self.value({"allOf": others} if others else True, root))
        if other is not None:
            name = f'"{self.character}*"{_escaped(self.colon)}'
            taken = "|".join(_escaped(_string(key)) for key in listed)
            other = f"{self.terminal(name, f'({taken}){_escaped(self.colon)}' if taken else None)} {other}"
        return self._members(members, len(required), other, least_most)

    def _members(self, members: list[str], required: int, other: str | None, lengths: tuple[int, int | None]) -> str:
        """An object of these members in any order, those `required` first in the list, and any number of `other` ones."""
        least, most = lengths
        if most is not None and most < max(least, required):
            raise _NoValue
        counted = least > required or (most is not None and (other is not None or most < len(members)))
        if other is not None and counted:
            raise NoGrammar("a number of properties")
        if other is None and least > len(members):
            raise _NoValue
        if len(members) > MOST_PROPERTIES:
            raise NoGrammar(f"an object of more than {MOST_PROPERTIES} properties")
        comma = _quoted(self.comma)
        if not members:
            return '"{}"' if other is None else f'"{{" ({other} ({comma} {other})*)? "}}"'
        done = ([f"is_ones([0:{required}])"] if required else []) + ([f"bit_count_ge(_, {least})"] if least > required else [])
        room = [f"bit_count_lt(_, {most})"] if counted and most is not None else []
        first, after = (f"r{len(self._lines) + number}" for number in range(2))
        self._lines += ["", ""]
        for name, joint in ((first, ""), (after, f"{comma} ")):
            told = ['"}"' + _if(done)]
            told += [f"{joint}{member} {after}::set_bit({bit}){_if([f'bit_clear({bit})', *room])}" for bit, member in enumerate(members)]
            told += [f"{joint}{other} {after}::_"] if other is not None else []
            self._lines[int(name[1:])] = f"{name}::_ : " + "\n  | ".join(told)
        return f'"{{" {first}::0x0'


def _if(conditions: list[str]) -> str:
    if not conditions:
        return ""
    told = conditions[-1]
    for condition in reversed(conditions[:-1]):
        told = f"and({condition}, {told})"
    return f" %if {told}"


def _quoted(text: str) -> str:
    """A text as a string of a grammar."""
    return json.dumps(text)


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _times(least: int, most: int | None) -> str:
    if most is None:
        return "*" if least == 0 else f"{{{least},}}"
    return f"{{{least},{most}}}"


def _range(found: list[dict], least: str, most: str) -> tuple[int, int | None]:
    """The tightest bounds on a length."""
    told = [[int(part[name]) for part in found if isinstance(part.get(name), (int, float))] for name in (least, most)]
    low, high = max(told[0], default=0), min(told[1], default=None)
    if high is not None and high < low:
        raise _NoValue
    return low, high


def _vocabulary(part: Any) -> Any:
    """What a part says of a value, besides `$ref` and `allOf`, which are followed elsewhere.

    Raises:
        NoGrammar: it says something that no grammar can.
    """
    if part is None or isinstance(part, bool):
        return part
    if not isinstance(part, dict):
        raise NoGrammar("a schema that is none")
    for name in _UNSAID:
        if name in part and part[name] not in _HARMLESS.get(name, ()):
            raise NoGrammar(f"`{name}` in the schema")
    told = {name: part[name] for name in _SAID if name in part}
    lists = ("enum", "anyOf", "oneOf", "required", "prefixItems")
    if not (all(isinstance(told.get(name, []), list) for name in lists) and isinstance(told.get("properties", {}), dict)):
        raise NoGrammar("a schema that is none")
    if not all(isinstance(name, str) for name in (*types_of(told), *told.get("required", ()))):
        raise NoGrammar("a schema that is none")
    return told


def _allowed_types(found: list[dict]) -> set[str]:
    """The types that all parts allow; "number" with "integer"."""
    allowed = set(_TYPES)
    for part in found:
        if named := types_of(part):
            if unknown := set(named) - set(_TYPES):
                raise NoGrammar(f"a type {sorted(map(str, unknown))[0]}")
            allowed &= set(named) | ({"integer"} if "number" in named else set())
    return allowed


def _require_apart(choices: list, root: Any) -> None:
    """
    Raises:
        NoGrammar: a value may fit two of the choices, which `oneOf` forbids.
    """
    told = [[_vocabulary(part) for part in parts(choice, root) if isinstance(part, dict)] for choice in choices]
    for one, other in combinations(told, 2):
        if not (_kinds(one).isdisjoint(_kinds(other)) or _told_apart(one, other, root)):
            raise NoGrammar("`oneOf` whose choices overlap")


def _kinds(found: list[dict]) -> set[str]:
    """The types that a value of all these parts may have, "integer" being a "number"."""
    named = _named(found)
    return _allowed_types(found) if named is None else {_type_of(value) for value in named} | ({"integer"} if any(map(_is_number, named)) else set())


def _told_apart(one: list[dict], other: list[dict], root: Any) -> bool:
    """Whether two choices are told apart by their named values, or by those of a property that both require."""
    if (mine := _named(one)) is not None and (theirs := _named(other)) is not None:
        return not any(same(left, right) for left in mine for right in theirs)
    if not _allowed_types(one) & _allowed_types(other) <= {"object"}:
        return False
    shared = set.intersection(*({key for part in found for key in part.get("required", ())} for found in (one, other)))
    for key in shared:
        left, right = (_named([mapping(part) for part in parts(property_schema({"allOf": found}, key, root), root)]) for found in (one, other))
        if left is not None and right is not None and not any(same(mine, theirs) for mine in left for theirs in right):
            return True
    return False


def _named(found: list[dict]) -> list | None:
    return next((part["enum"] if "enum" in part else [part["const"]] for part in found if "enum" in part or "const" in part), None)


def _is_number(value: Any) -> bool:
    return _type_of(value) == "number"


def _type_of(value: Any) -> str:
    known = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return known.get(type(value), "number")
