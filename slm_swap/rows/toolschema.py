"""Tools of other formats to JSON Schema (draft 2020-12).

A tool is `{"name", "description", "parameters": JSON Schema of the arguments object}`.
"""

import ast
import json
import re
from functools import lru_cache
from typing import Any

from slm_swap.common.exact_json import EXACT, plain
from slm_swap.rows.json_schema import coerce, fits_as_json
from slm_swap.rows.lines import dump_json
from slm_swap.rows.schema_parts import leads_to_itself, map_schema, modern, types_of, with_prefix_items

PAIRS = {"(": ")", "[": "]", "{": "}"}
_TYPE_NAMES = {  # of JSON Schema, Python, Java and JavaScript, in lower case
    "string": "string str text char character varchar callable",
    "integer": "integer int long short byte bigint biginteger int32 int64",
    "number": "number float double decimal bigdecimal",
    "boolean": "boolean bool",
    "array": "array list arraylist linkedlist tuple sequence queue stack vector set hashset",
    "object": "object dict dictionary map mapping hashmap hashtable treemap json",
    "null": "null none nonetype",
}
NAMED_TYPES: dict[str, dict[str, Any]] = {name: {"type": kind} for kind, names in _TYPE_NAMES.items() for name in names.split()}
NAMED_TYPES |= {"set": {"type": "array", "uniqueItems": True}, "hashset": {"type": "array", "uniqueItems": True}, "any": {}}
BFCL_KEYS = ("type", "optional", "default", "properties", "items", "required")  # those that do not stay as they are


# -- xLAM-60k --------------------------------------------------------------------------------------------------------------------


def xlam_tool(tool: Any) -> dict:
    """A tool of xLAM-60k, whose parameters are a flat map `{name: {"description", "type", "default"?}}`.

    What is optional: the type string alone decides. A parameter may be left out where its type says `optional`, is
    `Optional[...]` or a `Union` with None, or carries the default itself (`str, default='London'`, the form of a function's
    signature). A `default` key beside any other type does not make a parameter optional: the APIs that xLAM was made from give
    their required parameters an example there (`"type": "str", "default": "game"`), or `""` for none. Such a value becomes the
    schema's `examples`, `""` and null become nothing. So no required parameter has a default.

    The default of an optional parameter is converted as `coerce` does ("10" for an int) and kept where it fits the type; null,
    and the `""` that means None on types other than `str`, do not fit and are dropped. One in the type string goes before one
    beside it.

    Raises:
        ValueError: not such a tool, or a type string that cannot be read; the type string is named.
    """
    name, description, parameters = _head(tool)
    properties, required = {}, []
    for key, parameter in parameters.items():
        if not isinstance(parameter, dict) or not isinstance(parameter.get("type"), str):
            raise ValueError(f"{name}: parameter {key!r} has no type")
        schema, optional, defaults = parse_type(parameter["type"])
        if isinstance(parameter.get("description"), str) and parameter["description"]:
            schema = schema | {"description": parameter["description"]}
        if not optional:
            required.append(key)
        beside = [parameter["default"]] if "default" in parameter and (optional or parameter["default"] not in ("", None)) else []
        for value in (plain(coerce(value, schema)) for value in (*beside, *defaults)):
            if fits_as_json(value, schema):
                schema = schema | ({"default": value} if optional else {"examples": [value]})
        properties[key] = schema
    return {
        "name": name,
        "description": description,
        "parameters": {"type": "object", "properties": properties, "required": required},
    }


@lru_cache(maxsize=4096)
def parse_type(text: str) -> tuple[dict, bool, list]:
    """(schema, may be left out, [default] or []) of a type string: `List[int]`, `str, optional`, `Union[int, str], default=3`.

    `set` is an array of unique items, a tuple of fixed length has `prefixItems`, `Callable` is a string, `Any` the empty schema,
    and a bare `default='London'` has the type of its value.

    Raises:
        ValueError: brackets that do not close, an unknown type or an unknown word behind it.
    """
    named, optional, defaults = [], False, []
    for part in _split(text):
        key, equals, value = part.partition("=")
        if equals and key.strip() == "default":
            optional, defaults = True, [_literal(value.strip())]
        elif part.lower() == "optional":
            optional = True
        else:
            named.append(part)
    if len(named) > 1 or not (named or defaults):
        raise ValueError(f"cannot read the type {text!r}")
    try:
        schema = _type(named[0] if named else "any" if defaults[0] is None else type(defaults[0]).__name__)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"cannot read the type {text!r} ({error})") from None
    may_be_null = schema.get("type") != "null" and _allows_null(schema)
    return schema, optional or may_be_null, defaults


def _split(text: str) -> list[str]:
    """The parts between top-level commas, stripped; commas inside brackets or quotes do not count."""
    parts, closing, quote, start = [], [], "", 0
    for at, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in PAIRS:
            closing.append(PAIRS[char])
        elif char in PAIRS.values():
            if not closing or closing.pop() != char:
                raise ValueError(f"cannot read the type {text!r} (brackets)")
        elif char == "," and not closing:
            parts.append(text[start:at].strip())
            start = at + 1
    if closing or quote:
        raise ValueError(f"cannot read the type {text!r} (it does not close)")
    return [*parts, text[start:].strip()]


def _type(text: str) -> dict:
    """The schema of one Python type, without the words behind it."""
    base, bracket, inner = text.partition("[")
    base = base.strip().lower()
    if not bracket:
        if base not in NAMED_TYPES:
            raise ValueError(f"no type {text!r}")
        return dict(NAMED_TYPES[base])
    if not inner.endswith("]"):
        raise ValueError(f"no type {text!r}")
    items = _split(inner[:-1])
    if base == "callable":
        return {"type": "string"}
    if base == "optional" and len(items) == 1:
        return _union([_type(items[0]), {"type": "null"}])
    if base == "union":
        return _union([_type(item) for item in items])
    if base in ("list", "set") and len(items) == 1:
        return NAMED_TYPES[base] | _keyed("items", _type(items[0]))
    if base == "dict" and len(items) == 2:
        return {"type": "object"} | _keyed("additionalProperties", _type(items[1]))
    if base == "tuple" and len(items) == 2 and items[1] == "...":
        return {"type": "array"} | _keyed("items", _type(items[0]))
    if base == "tuple":
        return {"type": "array", "prefixItems": [_type(item) for item in items], "minItems": len(items), "maxItems": len(items)}
    raise ValueError(f"no type {text!r}")


def _keyed(key: str, schema: dict) -> dict:
    return {key: schema} if schema else {}


def _union(schemas: list[dict]) -> dict:
    """Plain types as a list of types, others as `anyOf`; with Any among them everything is allowed."""
    schemas = [schema for at, schema in enumerate(schemas) if schema not in schemas[:at]]
    if {"type": "number"} in schemas:
        schemas = [schema for schema in schemas if schema != {"type": "integer"}]
    if {} in schemas:
        return {}
    if len(schemas) == 1:
        return schemas[0]
    if all(schema.keys() == {"type"} and isinstance(schema["type"], str) for schema in schemas):
        return {"type": [schema["type"] for schema in schemas]}
    return {"anyOf": schemas}


def _allows_null(schema: dict) -> bool:
    return "null" in types_of(schema) or any(_allows_null(part) for part in schema.get("anyOf", []))


def _literal(text: str) -> Any:
    """A default out of a type string: a Python or JSON literal, else the text as it stands."""
    for read in (ast.literal_eval, json.loads):
        try:
            value = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return list(value) if isinstance(value, (tuple, set)) else value
    return text


# -- BFCL ------------------------------------------------------------------------------------------------------------------------


def bfcl_tool(tool: Any) -> dict:
    """A tool of the Berkeley leaderboard: nested types of its own (`dict`, `float`, `tuple`, `any`) to JSON Schema.

    An `enum` beside `array` names the allowed items. `optional: true` takes a parameter out of `required`. A default is converted
    as `coerce` does ("False" for a boolean) and kept where it fits; null usually means "none" and does not.

    Raises:
        ValueError: not such a tool, an unknown type, or `required` names a parameter that is not listed.
    """
    name, description, parameters = _head(tool)
    schema = _bfcl_schema(parameters, name)
    if schema.get("type") != "object":
        raise ValueError(f"{name}: its parameters are {schema.get('type')!r}, not a dict")
    _check(schema, name)
    return {"name": name, "description": description, "parameters": {"properties": {}, "required": []} | schema}


def _check(schema: dict, at: str) -> None:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError

    try:
        Draft202012Validator.check_schema(modern(json.loads(dump_json(schema))))  # which knows no Decimal
    except SchemaError as error:
        raise ValueError(f"{at}: no JSON Schema comes of it: {error.message[:200]}") from None
    if leads_to_itself(schema):
        raise ValueError(f"{at}: a $ref in its schema leads back to itself")


def _bfcl_schema(node: Any, at: str) -> dict:
    kind = node.get("type") if isinstance(node, dict) else None
    if not isinstance(kind, str) or kind.lower() not in NAMED_TYPES:
        raise ValueError(f"{at}: cannot read the type {kind!r}")
    schema = dict(NAMED_TYPES[kind.lower()])
    kind = schema.get("type")
    schema |= {key: value for key, value in node.items() if key not in BFCL_KEYS}
    if "items" in node:
        schema["items"] = _bfcl_schema(node["items"], f"{at}[]")
    if kind == "array" and "enum" in schema:
        schema["items"] = schema.get("items", {}) | {"enum": schema.pop("enum")}
    if "properties" in node:
        properties, required = node["properties"], node.get("required") or []
        if not isinstance(properties, dict) or not isinstance(required, list) or not all(key in properties for key in required):
            raise ValueError(f"{at}: its properties are not a map, or `required` names what they do not list")
        schema["properties"] = {key: _bfcl_schema(value, f"{at}.{key}") for key, value in properties.items()}
        schema["required"] = [key for key in required if str(properties[key].get("optional")).lower() != "true"]
    if "default" in node:
        _check(schema, at)
        default = plain(coerce(node["default"], schema))
        return schema | ({"default": default} if fits_as_json(default, schema) else {})
    return schema


def _head(tool: Any) -> tuple[str, str, dict]:
    """(name, description, parameters) of a tool of either format; the name must stand in `<tool_call name="X">`."""
    if not isinstance(tool, dict) or not isinstance(tool.get("name"), str) or not re.fullmatch(r'[^"<>\r\n]+', tool["name"]):
        raise ValueError(f"a tool needs a name without quotes and angle brackets: {str(tool)[:80]}")
    description, parameters = tool.get("description") or "", tool.get("parameters") or {}
    if not isinstance(description, str) or not isinstance(parameters, dict):
        raise ValueError(f"{tool['name']}: its description is not a text or its parameters are not a map")
    return tool["name"], description, parameters


# -- OpenAI ----------------------------------------------------------------------------------------------------------------------


def openai_tool(tool: Any) -> dict:
    """A tool as hosted APIs take it: OpenAI's chat form (`function` inside), its Responses and old `functions` forms (flat), or
    with `input_schema` (Anthropic). Its parameters are JSON Schema already, except for names of types (see `json_schema_of`).
    `strict: true` is kept.

    Raises:
        ValueError: not such a tool, or its parameters are no JSON Schema of an object.
    """
    inner = tool.get("function", tool) if isinstance(tool, dict) else tool
    if isinstance(inner, dict) and "parameters" not in inner:
        inner = inner | {"parameters": inner.get("input_schema", inner.get("inputSchema"))}
    name, description, parameters = _head(inner)
    parameters = json_schema_of(parameters, name)
    if parameters.get("type", "object") != "object":
        raise ValueError(f"{name}: its parameters are {parameters.get('type')!r}, not an object")
    made = {
        "name": name,
        "description": description,
        "parameters": {"type": "object", "properties": {}, "required": []} | parameters,
    }
    strict = inner.get("strict") is True or (isinstance(tool, dict) and tool.get("strict") is True)
    return made | ({"strict": True} if strict else {})


def json_schema_of(schema: Any, at: str = "the schema") -> dict:
    """A JSON Schema (draft 2020-12) of one that names its types otherwise (`String`, `HashMap`, `float`, `any`) at any depth, or
    writes a tuple as a list of `items`.

    Raises:
        ValueError: no JSON Schema comes of it: a type that nobody knows, a `$ref` that leads back to itself.
    """
    if not isinstance(schema, dict):
        raise ValueError(f"{at}: a JSON Schema is an object, not {type(schema).__name__}")
    schema = map_schema(schema, lambda part: with_prefix_items(_with_types(part, at)))
    _check(schema, at)
    return schema


def _with_types(part: dict, at: str) -> dict:
    kind = part.get("type")
    kinds = [kind] if isinstance(kind, str) else kind
    if not isinstance(kinds, list) or not kinds or not all(isinstance(one, str) for one in kinds):
        return part
    unknown = [one for one in kinds if one.lower() not in NAMED_TYPES]
    if unknown:
        raise ValueError(f"{at}: cannot read the type {unknown[0]!r}")
    schemas = [NAMED_TYPES[one.lower()] for one in kinds]
    rest = {key: value for key, value in part.items() if key != "type"}
    if not all(schemas):  # any value
        return rest
    names = list(dict.fromkeys(schema["type"] for schema in schemas))
    if names == kinds:
        return part
    made = {"type": names[0] if isinstance(kind, str) or len(names) == 1 else names}
    return {key: made.get(key, value) for key, value in part.items()} | {key: True for one in schemas for key in one if key != "type"}


def lost_defaults(tool: Any, converted: dict) -> int:
    """How many defaults of a BFCL tool, null aside, did not fit their own type and were left out."""
    return _defaults(tool.get("parameters")) - _defaults(converted["parameters"])


def _defaults(schema: Any) -> int:
    found: list[Any] = []

    def look(part: dict) -> dict:
        found.extend([part["default"]] if part.get("default") is not None else [])
        return part

    map_schema(schema, look)
    return len(found)



def kept_tool(tool: Any) -> dict:
    """A tool of a row in the form that is kept: as it is where it has that form, else read by `openai_tool`.

    Raises:
        ValueError: as `openai_tool`, or the tool is only a name.
    """
    if isinstance(tool, dict) and isinstance(tool.get("parameters"), dict) and "function" not in tool:
        return tool
    if not isinstance(tool, dict):
        raise ValueError(f"{str(tool)[:80]!r} is not an object")
    return dict(_kept(dump_json(tool)))


@lru_cache(maxsize=4096)
def _kept(text: str) -> dict:
    return openai_tool(json.loads(text, **EXACT))
