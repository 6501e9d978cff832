"""Types of other formats to JSON Schema; values against schemas: known answers for every form, then properties."""

import json
import math
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_swap.rows.json_schema import call_violations, coerce, violations, with_defaults
from slm_swap.rows.toolschema import bfcl_tool, lost_defaults, openai_tool, parse_type, xlam_tool
from slm_swap.scoring.json_values import leaves

STRING, INTEGER, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}


def array(items):
    return {"type": "array", "items": items}


@pytest.mark.parametrize(
    "text, schema, optional, defaults",
    [
        ("str", STRING, False, []),
        ("int", INTEGER, False, []),
        ("float", NUMBER, False, []),
        ("bool", {"type": "boolean"}, False, []),
        ("list", {"type": "array"}, False, []),
        ("dict", {"type": "object"}, False, []),
        ("set", {"type": "array", "uniqueItems": True}, False, []),
        ("Any", {}, False, []),
        ("str, optional", STRING, True, []),
        ("List[int]", array(INTEGER), False, []),
        ("List[List[int]]", array(array(INTEGER)), False, []),
        ("List[Any]", {"type": "array"}, False, []),
        ("Set[str]", {"type": "array", "uniqueItems": True, "items": STRING}, False, []),
        ("Dict[str, int]", {"type": "object", "additionalProperties": INTEGER}, False, []),
        ("Dict[str, List[float]]", {"type": "object", "additionalProperties": array(NUMBER)}, False, []),
        ("Dict[str, Any]", {"type": "object"}, False, []),
        ("Tuple", {"type": "array"}, False, []),
        ("Tuple[int, str]", {"type": "array", "prefixItems": [INTEGER, STRING], "minItems": 2, "maxItems": 2}, False, []),
        ("Tuple[float, ...]", array(NUMBER), False, []),
        ("List[Tuple[int, int]], optional", array(parse_type("Tuple[int, int]")[0]), True, []),
        ("Union[int, str]", {"type": ["integer", "string"]}, False, []),
        ("Union[int, float]", NUMBER, False, []),
        ("Union[int, Any]", {}, False, []),
        ("Union[List[int], str], optional", {"anyOf": [array(INTEGER), STRING]}, True, []),
        ("Union[int, None]", {"type": ["integer", "null"]}, True, []),
        ("Optional[str]", {"type": ["string", "null"]}, True, []),
        ("Optional[List[int]]", {"anyOf": [array(INTEGER), {"type": "null"}]}, True, []),
        ("List[Optional[int]]", array({"type": ["integer", "null"]}), False, []),
        ("Callable", STRING, False, []),
        ("Callable[[float, int], float]", STRING, False, []),
        ("Callable[[int], Tuple[int, str]], optional", STRING, True, []),
        ("str, default='London'", STRING, True, ["London"]),
        ("str, optional, default='London, UK'", STRING, True, ["London, UK"]),
        ('str, default="]"', STRING, True, ["]"]),
        ("int, default=10", INTEGER, True, [10]),
        ("List[int], default=[1, 2]", array(INTEGER), True, [[1, 2]]),
        ("bool, optional, default=true", {"type": "boolean"}, True, [True]),
        ("str, default=London", STRING, True, ["London"]),
        ("default='London'", STRING, True, ["London"]),
        ("default=2.5", NUMBER, True, [2.5]),
        ("default=False", {"type": "boolean"}, True, [False]),
        ("default=(1, 2)", {"type": "array"}, True, [[1, 2]]),
        ("default=None", {}, True, [None]),
    ],
)
def test_type_strings(text, schema, optional, defaults):
    assert parse_type(text) == (schema, optional, defaults)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "optional",
        "string of text",
        "List[int",
        "List[int]]",
        "List(int]",
        "List[foo]",
        "Dict[str]",
        "Tuple[]",
        "str, maybe",
        "int, str",
        "default='x",
    ],
)
def test_a_type_that_cannot_be_read_is_named(text):
    with pytest.raises(ValueError, match="cannot read the type") as raised:
        parse_type(text)
    assert repr(text) in str(raised.value)


def xlam_parameters(**parameters):
    return xlam_tool({"name": "f", "description": "F.", "parameters": parameters})["parameters"]


def test_xlam_tool_with_parameters_called_type_and_properties():
    tool = xlam_tool(
        {
            "name": "giveaways",
            "description": "Live giveaways.",
            "parameters": {
                "type": {"description": "Beta or game.", "type": "str", "default": "game"},
                "properties": {"description": "", "type": "List[str], optional"},
            },
        }
    )
    assert tool == {
        "name": "giveaways",
        "description": "Live giveaways.",
        "parameters": {
            "type": "object",
            "properties": {
                "type": {"type": "string", "description": "Beta or game.", "examples": ["game"]},
                "properties": array(STRING),
            },
            "required": ["type"],
        },
    }


@pytest.mark.parametrize(
    "parameter, schema, required",
    [
        ({"type": "str", "default": "London"}, STRING | {"examples": ["London"]}, True),  # an example, not a default
        ({"type": "str", "default": ""}, STRING, True),  # no example either
        ({"type": "int", "default": None}, INTEGER, True),
        ({"type": "int", "default": "many"}, INTEGER, True),  # does not fit its own type
        ({"type": "str, optional", "default": ""}, STRING | {"default": ""}, False),
        ({"type": "int, optional", "default": ""}, INTEGER, False),  # means None
        ({"type": "int, optional", "default": "10"}, INTEGER | {"default": 10}, False),
        ({"type": "float, optional", "default": "0.5"}, NUMBER | {"default": 0.5}, False),
        ({"type": "float, optional", "default": math.inf}, NUMBER, False),  # no JSON
        ({"type": "int, optional", "default": True}, INTEGER, False),
        ({"type": "str, optional", "default": None}, STRING, False),
        ({"type": "Optional[str]", "default": None}, {"type": ["string", "null"], "default": None}, False),
        ({"type": "str, default='London'"}, STRING | {"default": "London"}, False),
        ({"type": "str, default='London'", "default": ""}, STRING | {"default": "London"}, False),
        ({"type": "int, default='London'", "default": 3}, INTEGER | {"default": 3}, False),
    ],
)
def test_xlam_defaults_and_what_is_required(parameter, schema, required):
    built = xlam_parameters(p=parameter)
    assert built == {"type": "object", "properties": {"p": schema}, "required": ["p"] if required else []}
    assert type(built["properties"]["p"].get("default")) is not Decimal


@pytest.mark.parametrize(
    "tool",
    [
        {"description": "no name"},
        {"name": 'a"b'},
        {"name": "f", "parameters": {"p": {"description": "no type"}}},
        {"name": "f", "parameters": {"type": "object", "properties": {}}},  # JSON Schema is no flat map
        {"name": "f", "parameters": [1]},
        {"name": "f", "parameters": {"p": {"type": "Listt[int]"}}},
        "f",
    ],
)
def test_tools_that_are_none(tool):
    with pytest.raises(ValueError):
        xlam_tool(tool)


def test_bfcl_tool_converts_nested_types():
    tool = bfcl_tool(
        {
            "name": "uber.ride",
            "description": "A ride.",
            "parameters": {
                "type": "dict",
                "required": ["at", "mode"],
                "properties": {
                    "at": {"type": "tuple", "items": {"type": "float"}, "description": "Where."},
                    "mode": {"type": "array", "items": {"type": "string"}, "enum": ["plus", "black"]},
                    "type": {"type": "any"},
                    "round": {"type": "boolean", "default": "False", "optional": True},
                    "date": {"type": "string", "format": "date", "default": None},
                    "unit": {"type": "string", "enum": ["s", "ms"], "default": "N/A"},
                    "body": {
                        "type": "dict",
                        "properties": {"fee": {"type": "integer", "maximum": 400, "default": 3}},
                        "required": ["fee"],
                    },
                },
            },
        }
    )
    assert tool["parameters"] == {
        "type": "object",
        "properties": {
            "at": array(NUMBER) | {"description": "Where."},
            "mode": array(STRING | {"enum": ["plus", "black"]}),
            "type": {},
            "round": {"type": "boolean", "default": False},
            "date": STRING | {"format": "date"},
            "unit": STRING | {"enum": ["s", "ms"]},
            "body": {"type": "object", "properties": {"fee": INTEGER | {"maximum": 400, "default": 3}}, "required": ["fee"]},
        },
        "required": ["at", "mode"],
    }


@pytest.mark.parametrize("flag, required", [(True, []), ("True", []), (False, ["p"])])
def test_bfcl_optional_goes_before_required(flag, required):
    parameters = {"type": "dict", "properties": {"p": {"type": "string", "optional": flag}}, "required": ["p"]}
    assert bfcl_tool({"name": "f", "parameters": parameters})["parameters"]["required"] == required


@pytest.mark.parametrize(
    "parameters",
    [
        {"type": "dict", "properties": {"p": {"type": "strin"}}},
        {"type": "dict", "properties": {"p": {}}},
        {"type": "dict", "properties": {"p": {"type": ["string"]}}},
        {"type": "dict", "properties": {}, "required": ["p"]},
        {"type": "dict", "properties": {"p": {"type": "integer", "minimum": "one"}}},
        {"type": "dict", "properties": {"p": {"type": "array", "items": []}}},
        {"type": "dict", "properties": []},
        {"type": "array", "items": {"type": "string"}},
    ],
)
def test_bfcl_faults(parameters):
    with pytest.raises(ValueError, match=r"^f"):
        bfcl_tool({"name": "f", "parameters": parameters})


# -- Violations ------------------------------------------------------------------------------------------------------------------

TOOL = xlam_tool(
    {
        "name": "f",
        "parameters": {"limit": {"type": "int"}, "tags": {"type": "List[str], optional"}, "rate": {"type": "float, optional"}},
    }
)


@pytest.mark.parametrize(
    "arguments, broken",
    [
        ({"limit": 5}, []),
        ({"limit": 1.0}, []),  # JSON has one kind of number
        ({"limit": Decimal("1.0"), "rate": Decimal("0.1")}, []),
        ({"limit": 10**40}, []),
        ({"limit": 1, "rate": 2}, []),
        ({"limit": True}, ["arguments.limit: True is not of type 'integer'"]),
        ({"limit": "x"}, ["arguments.limit: 'x' is not of type 'integer'"]),
        ({"limit": Decimal("1.5")}, ["arguments.limit: 1.5 is not of type 'integer'"]),
        ({"limit": 1, "tags": ["a", 2]}, ["arguments.tags.1: 2 is not of type 'string'"]),
        ({}, ["arguments: 'limit' is a required property"]),
        ({"limit": 1, "page": 2}, ["arguments.page: f does not list it"]),
        ([1], ["arguments: [1] is not of type 'object'"]),
    ],
)
def test_call_violations(arguments, broken):
    assert call_violations(arguments, TOOL) == broken


def test_violations_name_the_place():
    assert violations({"arguments": {"n": "x"}}, {"properties": {"arguments": {"properties": {"n": INTEGER}}}}) == [
        "arguments.n: 'x' is not of type 'integer'"
    ]
    assert violations("x", INTEGER) == ["the value: 'x' is not of type 'integer'"]
    assert violations(Decimal("0.1"), {"enum": [0.1]}) == violations(Decimal("0.1"), {"enum": [Decimal("0.1")]}) == []


def test_a_tool_that_allows_more_arguments_gets_them():
    tool = {"name": "f", "parameters": {"type": "object", "properties": {}, "additionalProperties": INTEGER}}
    assert call_violations({"a": 1}, tool) == []
    assert call_violations({"a": "x"}, tool) == ["arguments.a: 'x' is not of type 'integer'"]


# -- coerce, with_defaults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, schema, made",
    [
        ("5", INTEGER, 5),
        ("-5", NUMBER, -5),
        ("0.50", NUMBER, Decimal("0.5")),
        ("1e3", NUMBER, Decimal(1000)),
        ("5.0", INTEGER, 5),
        ("5.5", INTEGER, "5.5"),
        ("05", INTEGER, "05"),
        (" 5", INTEGER, " 5"),
        ("٥", INTEGER, "٥"),  # a digit, not a JSON one
        ("1" * 200, INTEGER, "1" * 200),
        ("5", {"type": ["integer", "string"]}, "5"),
        ("5", {"type": ["integer", "null"]}, 5),
        ("5", {}, "5"),
        (5.0, INTEGER, 5),
        (Decimal("5.0"), INTEGER, 5),
        (Decimal("1e999999999"), INTEGER, Decimal("1e999999999")),  # would be a gigabyte of digits
        (Decimal("NaN"), INTEGER, Decimal("NaN")),
        (5.5, INTEGER, 5.5),
        (True, INTEGER, True),
        (1, {"type": "boolean"}, 1),
        ("true", {"type": "boolean"}, True),
        ("False", {"type": "boolean"}, False),
        ("yes", {"type": "boolean"}, "yes"),
        ("true", STRING, "true"),
        (5, STRING, "5"),
        (Decimal("0.1"), STRING, "0.1"),
        (True, STRING, True),
        (None, STRING, None),
        (5, {"type": ["string", "null"]}, 5),  # not only a string is wanted
        (["1", 2.0], array(INTEGER), [1, 2]),
        ([1, 2], {"type": "array", "prefixItems": [STRING], "items": INTEGER}, ["1", 2]),
        ({"a": "1", "b": "1"}, {"type": "object", "properties": {"a": INTEGER}}, {"a": 1, "b": "1"}),
        ({"a": "1"}, {"type": "object", "additionalProperties": INTEGER}, {"a": 1}),
        (["5"], {"anyOf": [array(INTEGER), array(STRING)]}, ["5"]),  # fits the second as it is
        (["5"], {"anyOf": [array(INTEGER), STRING]}, [5]),
        ([5], {"oneOf": [array(STRING), INTEGER]}, ["5"]),
        (["x"], {"anyOf": [array(INTEGER), INTEGER]}, ["x"]),
        (Decimal("0.1"), {"anyOf": [{"enum": [0.1]}, STRING]}, Decimal("0.1")),  # fits the first, by value
        ("5", True, "5"),
    ],
)
def test_coerce(value, schema, made):
    got = coerce(value, schema)
    assert repr(got) == repr(made) or (isinstance(made, Decimal) and got == made)


def test_coerce_leaves_its_input_alone():
    value = {"a": ["1"]}
    assert coerce(value, {"properties": {"a": array(INTEGER)}}) == {"a": [1]}
    assert value == {"a": ["1"]}


def test_with_defaults():
    schema = {
        "type": "object",
        "properties": {
            "city": STRING | {"default": "Oslo"},
            "unit": STRING | {"default": "C"},
            "body": {"type": "object", "properties": {"n": INTEGER | {"default": 1}}, "default": {}},
            "list": array({"type": "object", "properties": {"n": INTEGER | {"default": 1}}}),
            "plain": STRING,
        },
        "required": ["city"],
    }
    assert with_defaults({}, schema) == {"unit": "C", "body": {"n": 1}}  # required stays missing, a default has its own defaults
    assert with_defaults({"unit": "F", "body": {"n": 2}, "list": [{}], "more": 1}, schema) == {
        "unit": "F", "body": {"n": 2}, "list": [{"n": 1}], "more": 1,
    }  # fmt: skip
    assert with_defaults("x", schema) == "x"
    value = {"list": [{}]}
    assert with_defaults(value, schema) != value and value == {"list": [{}]}


# -- Properties ------------------------------------------------------------------------------------------------------------------

decimals = st.decimals(allow_nan=False, allow_infinity=False, places=3)
texts = st.sampled_from(["", "5", "-0", "5.0", "0.1", "1e2", "true", "False", "null", "x", "ß"])
scalars = st.none() | st.booleans() | st.integers() | decimals | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3), max_leaves=6
)
kinds = st.sampled_from(["string", "integer", "number", "boolean", "null", "array", "object"])


def _object(properties, required, more):
    required = [key for key in required if key in properties]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": more}


def _tuple(items, rest):
    return {"type": "array", "prefixItems": items, "items": rest}


def _nested(inner):
    properties = st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
    return st.one_of(
        st.builds(array, inner),
        st.builds(_tuple, st.lists(inner, min_size=1, max_size=2), inner),
        st.builds(lambda choices: {"anyOf": choices}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(_object, properties, st.lists(st.sampled_from("abc"), unique=True), inner | st.booleans()),
        st.builds(lambda schema, default: schema | {"default": default}, inner, values),
    )


schemas = st.recursive(
    st.builds(lambda kind: {"type": kind}, kinds)
    | st.builds(lambda some: {"type": some}, st.lists(kinds, min_size=1, max_size=3, unique=True))
    | st.builds(lambda members: {"enum": members}, st.lists(scalars, min_size=1, max_size=3))
    | st.just({}),
    _nested,
    max_leaves=6,
)


@settings(max_examples=400, deadline=None)
@given(values, schemas)
def test_coerce_is_idempotent_and_leaves_valid_values_alone(value, schema):
    made = coerce(value, schema)
    assert leaves(coerce(made, schema)) == leaves(made)
    if not violations(value, schema):
        assert leaves(made) == leaves(value)


@settings(max_examples=300, deadline=None)
@given(values, schemas)
def test_with_defaults_is_idempotent_and_keeps_what_is_there(value, schema):
    filled = with_defaults(value, schema)
    assert with_defaults(filled, schema) == filled
    if isinstance(value, dict):
        assert value.keys() <= filled.keys()


names = st.sampled_from(["str", "int", "float", "bool", "list", "dict", "set", "Any", "List", "Tuple", "Callable"])
type_texts = st.recursive(
    names,
    lambda inner: st.one_of(
        st.builds("List[{}]".format, inner), st.builds("Optional[{}]".format, inner), st.builds("Dict[str, {}]".format, inner),
        st.builds("Tuple[{}, {}]".format, inner, inner), st.builds("Union[{}, {}]".format, inner, inner),
        st.builds("Callable[[{}, {}], {}]".format, inner, inner, inner),
    ),
    max_leaves=5,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(type_texts, st.sampled_from(["", ", optional", ", default='a, b]'", ", optional, default=[1, (2, 3)]"]))
def test_every_type_becomes_a_schema_that_can_be_written(text, behind):
    schema, optional, _ = parse_type(text + behind)
    json.dumps(schema)
    violations(None, schema)
    assert optional or not behind


# -- Types of other languages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "schema"),
    [
        ("String", {"type": "string"}), ("Boolean", {"type": "boolean"}), ("long", {"type": "integer"}), ("HashMap", {"type": "object"}),
        ("ArrayList", {"type": "array"}), ("Array", {"type": "array"}), ("dict", {"type": "object"}), ("any", {}), ("float", {"type": "number"}),
        ("double", {"type": "number"}), ("short", {"type": "integer"}), ("byte", {"type": "integer"}), ("char", {"type": "string"}),
        ("tuple", {"type": "array"}), ("Hashtable", {"type": "object"}), ("set", {"type": "array", "uniqueItems": True}),
        (["String", "null"], {"type": ["string", "null"]}), (["int", "long"], {"type": "integer"}),
    ],
)  # fmt: skip
def test_names_of_types_at_any_depth(named, schema):
    inner = {"type": named, "description": "x"}
    parameters = {"type": "dict", "properties": {"a": inner, "type": {"type": "array", "items": {"anyOf": [inner, {"type": "int"}]}}}}
    made = openai_tool({"type": "function", "function": {"name": "f", "parameters": parameters}})["parameters"]
    assert made["type"] == "object" and made["properties"]["a"] == schema | {"description": "x"}
    assert made["properties"]["type"]["items"]["anyOf"] == [schema | {"description": "x"}, {"type": "integer"}]


def test_a_type_that_nobody_knows():
    with pytest.raises(ValueError, match="cannot read the type 'strin'"):
        openai_tool({"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "strin"}}}})


def test_a_tuple_of_draft_7_has_prefix_items():
    tuples = {"type": "array", "items": [{"type": "float"}, {"type": "string"}], "additionalItems": False}
    [made] = openai_tool({"name": "f", "parameters": {"type": "object", "properties": {"a": tuples}}})["parameters"]["properties"].values()
    assert made == {"type": "array", "prefixItems": [{"type": "number"}, {"type": "string"}], "items": False}


@pytest.mark.parametrize("place", ["inside", "beside"])
def test_strict_is_kept(place):
    inner = {"name": "f", "parameters": {}}
    tool = {"type": "function", "function": inner | {"strict": True}} if place == "inside" else {"type": "function", "strict": True, **inner}
    assert openai_tool(tool)["strict"] is True and "strict" not in openai_tool(inner)


def test_defaults_that_do_not_fit_are_counted():
    properties = {"a": {"type": "integer", "default": "many"}, "b": {"type": "integer", "default": "3"}, "c": {"type": "string", "default": None}}
    tool = {"name": "f", "parameters": {"type": "dict", "properties": properties}}
    assert lost_defaults(tool, bfcl_tool(tool)) == 1
