"""The parts of a JSON Schema: what it says of a value, of its properties and of its items, however it is written.

`$ref` (into the same schema, recursive ones too) and `allOf` are followed here and nowhere else. A part of a schema needs the whole
schema beside it, its `root`, for its `$ref`s. Nothing is ever fetched: a `$ref` to elsewhere allows any value.
"""

from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote

from slm_swap.rows.patterns import matches, python_pattern

COMPOSED = frozenset(("$ref", "allOf", "anyOf", "oneOf", "patternProperties"))  # without these, a schema says all of it itself


def parts(schema: Any, root: Any) -> list[Any]:
    """The schemas that all hold for a value: this one, what its `$ref` leads to, the members of its `allOf`, and theirs."""
    if not isinstance(schema, dict) or ("$ref" not in schema and "allOf" not in schema):
        return [schema]
    found, waiting = [], [schema]
    while waiting:
        part = waiting.pop(0)
        if any(part is one for one in found):  # a circle
            continue
        found.append(part)
        if isinstance(part, dict):
            waiting += [_target(part["$ref"], root)] if isinstance(part.get("$ref"), str) else []
            waiting += part["allOf"] if isinstance(part.get("allOf"), list) else []
    return found


def _target(ref: str, root: Any) -> Any:
    """What a `$ref` leads to inside the root; True, which allows anything, where it leads nowhere or elsewhere."""
    base, _, pointer = ref.partition("#")
    if base not in ("", mapping(root).get("$id")) or pointer[:1] not in ("", "/"):
        return _looked_up(ref, root)
    node = root
    for step in pointer.split("/")[1:]:  # a JSON Pointer (RFC 6901)
        step = unquote(step).replace("~1", "/").replace("~0", "~")
        if isinstance(node, list) and step.isdecimal() and int(step) < len(node):
            node = node[int(step)]
        elif isinstance(node, dict) and step in node:
            node = node[step]
        else:
            return True
    return node


def _looked_up(ref: str, root: Any) -> Any:
    """What a `$ref` leads to by `$anchor` or by the `$id` of a part."""
    from referencing import Registry
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    try:
        return Registry().resolver_with_root(DRAFT202012.create_resource(root)).lookup(ref).contents
    except (Unresolvable, ValueError):
        return True


def choices_of(part: Any) -> list[list]:
    """The lists of schemas of which a value has to fit one: `anyOf` and `oneOf`."""
    if not isinstance(part, dict) or ("anyOf" not in part and "oneOf" not in part):
        return []
    return [part[name] for name in ("anyOf", "oneOf") if isinstance(part.get(name), list) and part[name]]


def property_schema(schema: Any, key: str, root: Any = None) -> Any:
    """The schema of one of an object's values; several that all hold are an `allOf`. Without `root` the schema is a whole one."""
    if isinstance(schema, dict) and COMPOSED.isdisjoint(schema):  # nearly all; the rest comes to the same, slowly
        properties = schema.get("properties")
        return properties[key] if isinstance(properties, dict) and key in properties else schema.get("additionalProperties", True)
    return _all_of([_property(part, key) for part in parts(schema, schema if root is None else root)])


def known_property(schema: Any, key: str, root: Any) -> Any:
    """As `property_schema`; where only choices of `anyOf` and `oneOf` know the key, what one of them says of it."""
    child = property_schema(schema, key, root)
    if child is not True:
        return child
    choices = [choice for part in parts(schema, root) for choices in choices_of(part) for choice in choices]
    known = [child for choice in choices if isinstance(child := property_schema(choice, key, root), dict)]
    return {"anyOf": known} if known else True


def _property(part: Any, key: str) -> Any:
    if not isinstance(part, dict):
        return True
    properties, patterns = mapping(part.get("properties")), part.get("patternProperties")
    if not isinstance(patterns, dict):
        return properties[key] if key in properties else part.get("additionalProperties", True)
    found = [properties[key]] if key in properties else []
    found += [child for pattern, child in patterns.items() if matches(pattern, key)]
    return _all_of(found) if found else part.get("additionalProperties", True)


def item_schema(schema: Any, at: int, root: Any = None) -> Any:
    """The schema of one of an array's items; several that all hold are an `allOf`. Without `root` the schema is a whole one."""
    return _all_of([_item(part, at) for part in parts(schema, schema if root is None else root)])


def _item(part: Any, at: int) -> Any:
    if not isinstance(part, dict):
        return True
    prefix, rest = part.get("prefixItems"), part.get("items", True)
    if isinstance(rest, list):  # as drafts before 2020-12 write a prefix
        prefix, rest = rest, part.get("additionalItems", True)
    return prefix[at] if isinstance(prefix, list) and at < len(prefix) else rest


def _all_of(schemas: list) -> Any:
    """One schema for several that all hold."""
    if len(schemas) == 1:
        return schemas[0]
    different = [schema for at, schema in enumerate(schemas) if schema is not True and schema not in schemas[:at]]
    return {"allOf": different} if len(different) > 1 else different[0] if different else True


# -- Types -----------------------------------------------------------------------------------------------------------------------


def types_of(schema: dict) -> tuple:
    """The JSON types that a schema itself names, with OpenAPI's `nullable`; () where it names none."""
    kind = schema.get("type")
    types = (kind,) if isinstance(kind, str) else tuple(kind) if isinstance(kind, list) else ()
    return (*types, "null") if types and schema.get("nullable") is True else types


def common_types(found: list) -> tuple:
    """The types that all of the parts allow; () where none of them names any."""
    allowed: tuple = ()
    for types in filter(None, (types_of(part) for part in found if isinstance(part, dict))):
        both = [kind for kind in allowed if kind in types or (kind == "integer" and "number" in types)]
        both += [kind for kind in types if kind == "integer" and "number" in allowed and kind not in both]
        allowed = tuple(both) if allowed else types
    return allowed


def allows_text(schema: Any, root: Any, above: tuple = ()) -> bool:
    """Whether a value may be a string, as far as types, `enum` and `const` say. (`above`: the parts that are being looked at.)"""
    for part in parts(schema, root):
        if part is False:
            return False
        if not isinstance(part, dict) or any(part is one for one in above):
            continue
        named = part["enum"] if isinstance(part.get("enum"), list) else [part["const"]] if "const" in part else [""]
        if (types_of(part) and "string" not in types_of(part)) or not any(isinstance(value, str) for value in named):
            return False
        if not all(any(allows_text(choice, root, (*above, part)) for choice in choices) for choices in choices_of(part)):
            return False
    return True


# -- What an object may hold -----------------------------------------------------------------------------------------------------


def is_open(schema: Any) -> bool:
    """Whether a whole schema says itself what else an object may hold."""
    said = ("additionalProperties", "unevaluatedProperties")
    return any(name in part for part in _applied(schema, schema, []) for name in said)


def lists_property(schema: Any, key: str) -> bool:
    """Whether a whole schema knows a key of an object, be it in a part, in a choice or behind a condition."""
    return any(
        key in mapping(part.get("properties")) or any(matches(pattern, key) for pattern in mapping(part.get("patternProperties")))
        for part in _applied(schema, schema, [])
    )


def _applied(schema: Any, root: Any, seen: list) -> Iterator[dict]:
    """All schemas that may speak of the value itself, once each."""
    for part in parts(schema, root):
        if not isinstance(part, dict) or any(part is one for one in seen):
            continue
        seen.append(part)
        yield part
        behind = [choice for choices in choices_of(part) for choice in choices]
        behind += [part[name] for name in ("if", "then", "else") if name in part]
        for child in [*behind, *mapping(part.get("dependentSchemas")).values()]:
            yield from _applied(child, root, seen)


def leads_to_itself(schema: Any) -> bool:
    """Whether a `$ref` in a whole schema comes back to where it stands without going into the value: no check of it would end."""
    waiting, clear = [schema], set()
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict) and isinstance(node.get("$ref"), str) and _comes_back(node, schema, [], clear):
            return True
        waiting += node.values() if isinstance(node, dict) else node if isinstance(node, list) else []
    return False


def _comes_back(part: Any, root: Any, above: list, clear: set[int]) -> bool:
    if not isinstance(part, dict) or id(part) in clear:
        return False
    if any(part is one for one in above):
        return True
    beside = [_target(part["$ref"], root)] if isinstance(part.get("$ref"), str) else []
    for name in ("allOf", "anyOf", "oneOf"):
        beside += part[name] if isinstance(part.get(name), list) else []
    beside += [part[name] for name in ("not", "if", "then", "else") if name in part]
    if any(_comes_back(child, root, [*above, part], clear) for child in [*beside, *mapping(part.get("dependentSchemas")).values()]):
        return True
    clear.add(id(part))
    return False


def mapping(value: Any) -> dict:
    """The value where it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


# -- Schemas of other drafts -----------------------------------------------------------------------------------------------------

_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_SCHEMAS = (
    "items", "additionalItems", "additionalProperties", "unevaluatedProperties", "unevaluatedItems", "contains", "propertyNames",
    "not", "if", "then", "else",
)  # fmt: skip


def map_schema(schema: Any, change: Callable[[dict], dict]) -> Any:
    """A schema with `change` made to each object schema in it, the inner ones first; what is a value (`default`, `enum`) stays."""
    if not isinstance(schema, dict):
        return schema
    made = dict(schema)
    for key, child in schema.items():
        if key in _MAPS and isinstance(child, dict):
            made[key] = {name: map_schema(part, change) for name, part in child.items()}
        elif key in _LISTS and isinstance(child, list):
            made[key] = [map_schema(part, change) for part in child]
        elif key in _SCHEMAS and isinstance(child, dict):
            made[key] = map_schema(child, change)
    return change(made)


def modern(schema: Any) -> Any:
    """A schema as draft 2020-12 and Python read it: a list of `items` is `prefixItems`, patterns are Python's.

    A pattern that cannot be read is left out: it forbids nothing.
    """
    return map_schema(schema, _modern_part)


def _modern_part(part: dict) -> dict:
    made = with_prefix_items(part)
    if "pattern" in made and isinstance(made["pattern"], str):
        pattern = python_pattern(made.pop("pattern"))
        made |= {} if pattern is None else {"pattern": pattern}
    if isinstance(made.get("patternProperties"), dict):
        named = {python_pattern(pattern): child for pattern, child in made["patternProperties"].items()}
        if None in named:  # what its unread pattern lets in must not be forbidden
            del named[None]
            made.pop("additionalProperties", None)
        made["patternProperties"] = named
    return made


def with_prefix_items(part: dict) -> dict:
    """One object schema with a list of `items`, the form of drafts before 2020-12, as `prefixItems`."""
    if not isinstance(part.get("items"), list):
        return part
    made = {key: value for key, value in part.items() if key not in ("items", "additionalItems")} | {"prefixItems": part["items"]}
    if not made["prefixItems"]:  # an empty list says nothing, and 2020-12 has none
        del made["prefixItems"]
    return made | ({"items": part["additionalItems"]} if "additionalItems" in part else {})


def unread_patterns(schema: Any) -> int:
    """How many patterns of a schema cannot be read, and so forbid nothing."""
    found: list[Any] = []

    def look(part: dict) -> dict:
        found.append(part.get("pattern"))
        found.extend(mapping(part.get("patternProperties")))
        return part

    map_schema(schema, look)
    return sum(isinstance(pattern, str) and python_pattern(pattern) is None for pattern in found)
