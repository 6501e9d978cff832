"""Values against a JSON Schema: what they break, and what they become where it allows a conversion.

A schema says the same however it is written: `schema_parts` follows `$ref` and `allOf`, and the choice of an `anyOf` or `oneOf` that
a value is taken for counts like the schema itself.
"""

import json
import re
from collections.abc import Iterator
from decimal import Decimal
from functools import lru_cache
from typing import Any

from slm_swap.common.exact_json import ExactEncoder, decimals, is_integral, is_multiple, is_number, same
from slm_swap.rows.schema_parts import (
    COMPOSED,
    choices_of,
    common_types,
    is_open,
    item_schema,
    lists_property,
    mapping,
    modern,
    parts,
    property_schema,
    types_of,
)

# -- What a value breaks ---------------------------------------------------------------------------------------------------------


def violations(value: Any, schema: Any, at: str = "", root: dict | None = None) -> list[str]:
    """What a value breaks, by jsonschema: `arguments.limit: 'x' is not of type 'integer'`; `at` names the value itself.

    JSON's own types hold: `true` is no integer, `1.0` is one. Numbers are the decimals that are written, on both sides: 4.94 is a
    multiple of 0.01. A part of a schema needs its `root` for its `$ref`s.

    Raises:
        referencing.exceptions.Unresolvable: a `$ref` that leads nowhere, or elsewhere: nothing is fetched.
        RecursionError: nested too deeply for the schema.
    """
    validator = _validator(json.dumps(schema if root is None else root, cls=ExactEncoder))
    if root is not None:
        validator = validator.evolve(schema=modern(decimals(schema)))
    try:
        errors = list(validator.iter_errors(decimals(value)))
    except BaseException as error:
        if type(error).__name__ == "PanicException":  # of the library below `referencing`, once Python's stack is used up
            raise RecursionError("nested too deeply for the schema") from None
        raise
    found = [(".".join([at, *map(str, error.absolute_path)]), error.message) for error in errors]
    return [f"{where.strip('.') or 'the value'}: {_DECIMAL.sub(_digits, message)[:200]}" for where, message in found]


def call_violations(arguments: Any, tool: dict) -> list[str]:
    """What a call's arguments break; an argument that the tool lists nowhere is a violation too, unless its schema says itself
    what else an object may hold."""
    parameters = tool["parameters"]
    broken = violations(arguments, parameters, "arguments")
    keys = arguments if isinstance(arguments, dict) and not is_open(parameters) else []
    return broken + [f"arguments.{key}: {tool['name']} does not list it" for key in keys if not lists_property(parameters, key)]


_DECIMAL = re.compile(r"Decimal\('([^']*)'\)")  # in jsonschema's messages


def _digits(match: re.Match) -> str:
    return match[1]


@lru_cache(maxsize=8192)
def _validator(schema: str) -> Any:
    from referencing.jsonschema import EMPTY_REGISTRY  # never fetches a `$ref` from the network

    loaded = modern(json.loads(schema, parse_float=Decimal))
    named = [part for name in ("$defs", "definitions") for part in mapping(mapping(loaded).get(name)).values()]
    for part in (loaded, *named):  # behind a `$ref`, jsonschema would go over to a class of its own, which knows no Decimal
        mapping(part).pop("$schema", None)
    return _validator_class()(loaded, registry=EMPTY_REGISTRY)


@lru_cache(maxsize=1)
def _validator_class() -> Any:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import ValidationError
    from jsonschema.validators import extend

    def multiple_of(validator: Any, divisor: Any, instance: Any, schema: dict) -> Iterator[Any]:
        if is_number(instance) and not is_multiple(instance, divisor):
            yield ValidationError(f"{instance} is not a multiple of {divisor}")

    def type_named(validator: Any, types: Any, instance: Any, schema: dict) -> Iterator[Any]:
        if instance is not None or schema.get("nullable") is not True:
            yield from Draft202012Validator.VALIDATORS["type"](validator, types, instance, schema)

    numbers = {
        "number": lambda checker, value: is_number(value),
        "integer": lambda checker, value: is_number(value) and is_integral(value),
    }
    checker = Draft202012Validator.TYPE_CHECKER.redefine_many(numbers)
    return extend(Draft202012Validator, {"multipleOf": multiple_of, "type": type_named}, type_checker=checker)


def fits_as_json(value: Any, schema: dict) -> bool:
    """Whether a value can be written as JSON and breaks nothing."""
    try:
        json.dumps(value, allow_nan=False, cls=ExactEncoder)
    except (ValueError, TypeError):
        return False
    return not violations(value, schema)


# -- What a value becomes --------------------------------------------------------------------------------------------------------

_INTEGER = re.compile(r"-?(0|[1-9]\d{0,99})")
_NUMBER = re.compile(r"-?(0|[1-9]\d{0,99})(\.\d{1,99})?([eE][+-]?\d{1,3})?")


def coerce(value: Any, schema: Any, root: Any = None) -> Any:
    """The value with what the schema allows converted without loss, in objects and arrays too; else unchanged.

    "5" becomes 5 where a number and no string is wanted ("0.5" becomes a Decimal), "true" becomes True, 5 becomes "5" where
    only a string is wanted, 5.0 becomes 5 for an integer. A value that fits already stays what it is. A part of a schema needs its
    `root` for its `$ref`s.
    """
    return _Walk(schema if root is None else root).coerce(value, schema)


def with_defaults(value: Any, schema: Any, root: Any = None) -> Any:
    """The value with every optional property that is missing and has a `default` filled in, in the objects and arrays that
    are present too. A required property stays missing: leaving it out is a mistake, whatever the schema would put there.
    """
    return _Walk(schema if root is None else root).with_defaults(value, schema)


class _Walk:
    """One walk through a value beside its schema.

    `chosen` and `fitting` keep what was found for a value and a list of choices. Without them the work would double with every level
    of a recursive schema, and a choice that leads back to itself would never end.
    """

    def __init__(self, root: Any):
        self.root = root
        self.chosen: dict[tuple[int, int], tuple] = {}
        self.fitting: dict[tuple[int, int], tuple] = {}
        self.under_way: set[tuple[int, int]] = set()

    def coerce(self, value: Any, schema: Any) -> Any:
        if not isinstance(schema, dict):
            return value
        if COMPOSED.isdisjoint(schema):
            types = types_of(schema)
        else:
            found = parts(schema, self.root)
            for choices in (choices for part in found for choices in choices_of(part)):
                value = self._choose(value, choices)[1]
            types = common_types(found)
        value = _scalar(value, types)
        if isinstance(value, dict):
            return {key: self.coerce(child, property_schema(schema, key, self.root)) for key, child in value.items()}
        if isinstance(value, list):
            return [self.coerce(child, item_schema(schema, at, self.root)) for at, child in enumerate(value)]
        return value

    def with_defaults(self, value: Any, schema: Any) -> Any:
        if not isinstance(schema, dict) or not isinstance(value, (dict, list)):
            return value
        found = [schema]
        if not COMPOSED.isdisjoint(schema):
            found = [part for part in parts(schema, self.root) if isinstance(part, dict)]
            for choices in (choices for part in found for choices in choices_of(part)):
                value = self._filled((id(value), id(choices)), value, self._choose(value, choices)[0])
        if isinstance(value, list):
            return [self.with_defaults(child, item_schema(schema, at, self.root)) for at, child in enumerate(value)]
        filled = {}
        for key, child in value.items():
            nested = isinstance(child, (dict, list))
            filled[key] = self.with_defaults(child, property_schema(schema, key, self.root)) if nested else child
        for part in found:
            for key in mapping(part.get("properties")):
                if key not in filled and not any(key in (one.get("required") or ()) for one in found):
                    self._fill(filled, key, property_schema(schema, key, self.root))
        return filled

    def _fill(self, filled: dict, key: str, schema: Any) -> None:
        if isinstance(schema, dict) and COMPOSED.isdisjoint(schema):
            defaults = [schema["default"]] if "default" in schema else []
        else:
            defaults = self._defaults(schema)
        for default in defaults[:1]:
            filled[key] = self._filled((id(default), id(default)), default, schema)

    def _filled(self, key: tuple[int, int], value: Any, schema: Any) -> Any:
        """As `with_defaults`; a choice or a default that leads back to itself is not followed again."""
        if key in self.under_way:
            return value
        self.under_way.add(key)
        value = self.with_defaults(value, schema)
        self.under_way.remove(key)
        return value

    def _defaults(self, schema: Any) -> list:
        """What a schema says of a value that is missing: its own `default`, else those of its choices."""
        found = [part for part in parts(schema, self.root) if isinstance(part, dict)]
        choices = (choice for part in found for choices in choices_of(part) for choice in choices)
        behind = (part for choice in choices for part in parts(choice, self.root) if isinstance(part, dict))
        return [part["default"] for part in (*found, *behind) if "default" in part]

    def _choose(self, value: Any, choices: list) -> tuple[Any, Any]:
        """(the choice that a value is taken for, what the value becomes by it): the first that it fits, else the first that it fits
        once converted, else the only one for values of its JSON type, or for objects with its keys; (None, the value) where there is
        no such choice."""
        key = id(value), id(choices)
        if key not in self.chosen:
            self.chosen[key] = None, value, value  # the last keeps the id from being given again
            fitting = next((choice for choice in choices if self._fits(value, choice)), None)
            if fitting is None:
                converted = [(choice, self.coerce(value, choice)) for choice in choices]
                fit = (pair for pair in converted if self._fits(pair[1], pair[0]))
                choice, made = next(fit, None) or self._likely(value, converted)
            else:
                choice, made = fitting, self.coerce(value, fitting)
            self.chosen[key] = choice, made, value
        return self.chosen[key][:2]

    def _likely(self, value: Any, converted: list[tuple[Any, Any]]) -> tuple[Any, Any]:
        for is_like in (self._has_type, self._has_keys):
            like = [(choice, made) for choice, made in converted if is_like(value, choice)]
            if len(like) == 1:
                return like[0]
        return None, value

    def _has_type(self, value: Any, choice: Any) -> bool:
        types = common_types(parts(choice, self.root))
        return choice is not False and (not types or _is_a(value, types))

    def _has_keys(self, value: Any, choice: Any) -> bool:
        found = [part for part in parts(choice, self.root) if isinstance(part, dict)]
        return isinstance(value, dict) and all(key in value for part in found for key in part.get("required") or ())

    def _fits(self, value: Any, schema: Any) -> bool:
        """Whether a value has the schema's types all the way down: no valid value is refused, some invalid ones pass."""
        for part in parts(schema, self.root):
            if part is False or (isinstance(part, dict) and not self._fits_here(value, part)):
                return False
            for choices in choices_of(part):
                if not self._fits_one(value, choices):
                    return False
        if isinstance(value, dict):
            for key, child in value.items():
                if not self._fits(child, property_schema(schema, key, self.root)):
                    return False
        elif isinstance(value, list):
            for at, child in enumerate(value):
                if not self._fits(child, item_schema(schema, at, self.root)):
                    return False
        return True

    def _fits_one(self, value: Any, choices: list) -> bool:
        key = id(value), id(choices)
        if key not in self.fitting:
            self.fitting[key] = False, value  # the value keeps its id from being given again
            for choice in choices:
                if self._fits(value, choice):
                    self.fitting[key] = True, value
                    break
        return self.fitting[key][0]

    def _fits_here(self, value: Any, part: dict) -> bool:
        """What one part says of the value itself."""
        types = types_of(part)
        if types and not _is_a(value, types):
            return False
        if "const" in part and not same(value, part["const"]):
            return False
        if isinstance(part.get("enum"), list) and not any(same(value, choice) for choice in part["enum"]):
            return False
        if isinstance(value, dict):
            return all(key in value for key in part.get("required") or ())
        if isinstance(value, list):
            return part.get("minItems", 0) <= len(value) <= part.get("maxItems", len(value))
        return not (is_number(part.get("multipleOf")) and is_number(value)) or is_multiple(value, part["multipleOf"])


def _scalar(value: Any, types: tuple) -> Any:
    if not types or _is_a(value, types):
        return int(value) if "integer" in types and not isinstance(value, bool) and _is_whole(value) else value
    if isinstance(value, str):
        if _INTEGER.fullmatch(value) and ("integer" in types or "number" in types):
            return int(value)
        if _NUMBER.fullmatch(value) and (number := Decimal(value)).is_finite():
            if "number" in types:
                return number
            if "integer" in types and _is_whole(number):
                return int(number)
        if "boolean" in types and value.lower() in ("true", "false"):
            return value.lower() == "true"
    if types == ("string",) and isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        return str(value)
    return value


def _is_whole(value: Any) -> bool:
    """A number without a fraction that int() makes exact and in no time (1e999999999 is whole, and a gigabyte as an int)."""
    return isinstance(value, (float, Decimal)) and is_integral(value) and Decimal(value).adjusted() < 400


def _is_a(value: Any, types: tuple) -> bool:
    """Whether a value has one of the JSON types; nothing is converted."""
    if isinstance(value, bool):
        return "boolean" in types
    if isinstance(value, (int, float, Decimal)):
        return "number" in types or ("integer" in types and is_integral(value))
    names = {str: "string", dict: "object", list: "array", type(None): "null"}
    return names.get(type(value)) in types
