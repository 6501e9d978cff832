"""Values against a JSON Schema: what they break, and what they become where it allows a conversion."""

import json
import re
from decimal import Decimal
from functools import lru_cache
from typing import Any


def violations(value: Any, schema: dict, at: str = "") -> list[str]:
    """What a value breaks, by jsonschema: `arguments.limit: 'x' is not of type 'integer'`; `at` names the value itself.

    JSON's own types hold: `true` is no integer, `1.0` is one. Decimals count as the numbers that they are.
    """
    validator = _validator(json.dumps(schema, default=float))
    return [
        f"{'.'.join([at, *map(str, error.absolute_path)]).strip('.') or 'the value'}: {error.message[:200]}"
        for error in validator.iter_errors(plain(value))
    ]


def call_violations(arguments: Any, tool: dict) -> list[str]:
    """What a call's arguments break; an argument that the tool does not list is a violation too."""
    parameters = tool["parameters"]
    broken = violations(arguments, parameters, "arguments")
    listed = parameters.get("properties", {})
    closed = isinstance(arguments, dict) and "additionalProperties" not in parameters
    extra = [key for key in arguments if key not in listed] if closed else []
    return broken + [f"arguments.{key}: {tool['name']} does not list it" for key in extra]


@lru_cache(maxsize=8192)
def _validator(schema: str) -> Any:
    from jsonschema import Draft202012Validator
    from referencing.jsonschema import EMPTY_REGISTRY  # never fetches a `$ref` from the network

    return Draft202012Validator(json.loads(schema), registry=EMPTY_REGISTRY)


def plain(value: Any) -> Any:
    """The value with floats for Decimals: jsonschema takes no Decimal for an integer or an enum's member."""
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, dict):
        return {key: plain(child) for key, child in value.items()}
    return [plain(child) for child in value] if isinstance(value, list) else value


def fits_as_json(value: Any, schema: dict) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (ValueError, TypeError):
        return False
    return not violations(value, schema)


_INTEGER = re.compile(r"-?(0|[1-9]\d{0,99})")
_NUMBER = re.compile(r"-?(0|[1-9]\d{0,99})(\.\d{1,99})?([eE][+-]?\d{1,3})?")


def coerce(value: Any, schema: Any) -> Any:
    """The value with what the schema allows converted without loss, in objects and arrays too; else unchanged.

    "5" becomes 5 where a number and no string is wanted ("0.5" becomes a Decimal), "true" becomes True, 5 becomes "5" where
    only a string is wanted, 5.0 becomes 5 for an integer. A value that fits already stays what it is.
    """
    if not isinstance(schema, dict):
        return value
    for choices in (schema.get("anyOf"), schema.get("oneOf")):
        if choices:
            fitting = (made for made in (coerce(value, choice) for choice in choices) if any(_fits(made, c) for c in choices))
            value = value if any(_fits(value, choice) for choice in choices) else next(fitting, value)
    value = _scalar(value, types_of(schema))
    if isinstance(value, dict):
        return {key: coerce(child, property_schema(schema, key)) for key, child in value.items()}
    if isinstance(value, list):
        return [coerce(child, item_schema(schema, at)) for at, child in enumerate(value)]
    return value


def with_defaults(value: Any, schema: Any) -> Any:
    """The value with every optional property that is missing and has a `default` filled in, in the objects and arrays that
    are present too. A required property stays missing: leaving it out is a mistake, whatever the schema would put there.
    """
    if not isinstance(schema, dict):
        return value
    if isinstance(value, list):
        return [with_defaults(child, item_schema(schema, at)) for at, child in enumerate(value)]
    if not isinstance(value, dict):
        return value
    filled = {key: with_defaults(child, property_schema(schema, key)) for key, child in value.items()}
    required = schema.get("required") or ()
    for key, part in _mapping(schema.get("properties")).items():
        if key not in filled and key not in required and isinstance(part, dict) and "default" in part:
            filled[key] = with_defaults(part["default"], part)
    return filled


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
    return isinstance(value, (float, Decimal)) and _is_integral(value) and Decimal(value).adjusted() < 400


def _is_integral(value: int | float | Decimal) -> bool:
    if isinstance(value, Decimal):
        return value.is_finite() and value == value.to_integral_value()
    return isinstance(value, int) or value.is_integer()


def types_of(schema: dict) -> tuple:
    kind = schema.get("type")
    return (kind,) if isinstance(kind, str) else tuple(kind) if isinstance(kind, list) else ()


def _is_a(value: Any, types: tuple) -> bool:
    """Whether a value has one of the JSON types; nothing is converted."""
    if isinstance(value, bool):
        return "boolean" in types
    if isinstance(value, (int, float, Decimal)):
        return "number" in types or ("integer" in types and _is_integral(value))
    names = {str: "string", dict: "object", list: "array", type(None): "null"}
    return names.get(type(value)) in types


def _fits(value: Any, schema: Any) -> bool:
    """Whether a value has the schema's types all the way down: no valid value is refused, some invalid ones pass."""
    if not isinstance(schema, dict):
        return schema is not False
    if types_of(schema) and not _is_a(value, types_of(schema)):
        return False
    if "const" in schema and plain(value) != plain(schema["const"]):
        return False
    if isinstance(schema.get("enum"), list) and plain(value) not in plain(schema["enum"]):
        return False
    if schema.get("anyOf") and not any(_fits(value, choice) for choice in schema["anyOf"]):
        return False
    if isinstance(value, dict):
        return all(key in value for key in schema.get("required") or ()) and all(
            _fits(child, property_schema(schema, key)) for key, child in value.items()
        )
    if isinstance(value, list):
        size = len(value)
        if size < schema.get("minItems", 0) or size > schema.get("maxItems", size):
            return False
        return all(_fits(child, item_schema(schema, at)) for at, child in enumerate(value))
    return True


def property_schema(schema: dict, key: str) -> Any:
    """The schema of one of an object's values."""
    properties = _mapping(schema.get("properties"))
    return properties[key] if key in properties else schema.get("additionalProperties", True)


def item_schema(schema: dict, at: int) -> Any:
    """The schema of one of an array's items."""
    prefix = schema.get("prefixItems")
    return prefix[at] if isinstance(prefix, list) and at < len(prefix) else schema.get("items", True)


def _mapping(value: Any) -> dict:
    return value if isinstance(value, dict) else {}
