"""The same schema says the same however it is written: inline, by `$ref`, in an `allOf`, as a choice beside null."""

from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_swap.rows.json_schema import call_violations, coerce, violations, with_defaults
from slm_swap.rows.schema_parts import allows_text, item_schema, known_property, leads_to_itself, property_schema

INTEGER, NUMBER, STRING, NULL = ({"type": kind} for kind in ("integer", "number", "string", "null"))
INNER = {"type": "object", "properties": {"n": INTEGER, "u": STRING | {"default": "kg"}}, "required": ["n"]}


def inside(part, **more):
    return {"type": "object", "properties": {"i": part}, **more}


FORMS = {
    "inline": inside(INNER),
    "$defs": inside({"$ref": "#/$defs/I"}, **{"$defs": {"I": INNER}}),
    "definitions": inside({"$ref": "#/definitions/I"}, definitions={"I": INNER}),
    "a name with signs": inside({"$ref": "#/$defs/a~1b~0c%20d"}, **{"$defs": {"a/b~c d": INNER}}),
    "ref to ref": inside({"$ref": "#/$defs/J"}, **{"$defs": {"I": INNER, "J": {"$ref": "#/$defs/I"}}}),
    "$id": inside({"$ref": "my.json#/$defs/I"}, **{"$id": "my.json", "$defs": {"I": INNER}}),
    "$anchor": inside({"$ref": "#here"}, **{"$defs": {"I": {"$anchor": "here", **INNER}}}),
    "into a list": inside({"$ref": "#/allOf/0/properties/k"}, allOf=[{"properties": {"k": INNER}}]),
    "allOf of one": inside({"allOf": [{"$ref": "#/$defs/I"}], "description": "x"}, **{"$defs": {"I": INNER}}),
    "allOf of parts": inside(
        {"type": "object", "allOf": [{"properties": {"n": INTEGER}, "required": ["n"]}, {"properties": {"u": INNER["properties"]["u"]}}]}
    ),
    "allOf of one key twice": inside({"allOf": [INNER, {"properties": {"n": NUMBER, "u": {"default": "kg"}}}]}),
    "anyOf beside null": inside({"anyOf": [INNER, NULL]}),
    "anyOf of a ref beside null": inside({"anyOf": [NULL, {"$ref": "#/$defs/I"}], "default": None}, **{"$defs": {"I": INNER}}),
    "oneOf": inside({"oneOf": [INNER, NULL]}),
    "top-level ref": {"$ref": "#/$defs/T", "$defs": {"T": inside({"$ref": "#/$defs/I"}), "I": INNER}},
    "top-level allOf": {"type": "object", "allOf": [inside(INNER)]},
    "top-level anyOf": {"type": "object", "anyOf": [inside(INNER, required=["i"]), {"properties": {"x": STRING}, "required": ["x"]}]},
    "patternProperties": {"type": "object", "patternProperties": {"^i$": INNER}},
    "properties and patterns": inside({"properties": {"u": INNER["properties"]["u"]}}, patternProperties={"i": INNER}),
    "$schema of another draft": inside({"$ref": "#/$defs/I"}, **{"$schema": "http://json-schema.org/draft-07/schema#", "$defs": {"I": INNER}}),
}  # fmt: skip


@pytest.mark.parametrize("schema", FORMS.values(), ids=FORMS)
def test_every_form_of_one_schema(schema):
    assert coerce({"i": {"n": "3"}}, schema) == {"i": {"n": 3}}
    assert coerce({"i": {"n": "x", "u": 5}}, schema) == {"i": {"n": "x", "u": "5"}}
    assert with_defaults({"i": {"n": 3}}, schema) == {"i": {"n": 3, "u": "kg"}}
    assert with_defaults({"i": {}}, schema)["i"] == {"u": "kg"}  # the required one stays missing
    tool = {"name": "f", "parameters": schema}
    assert call_violations({"i": {"n": 3}}, tool) == call_violations({"i": {"n": Decimal("3.0")}}, tool) == []
    assert call_violations({"i": {"n": "x"}}, tool) and call_violations({"i": {}}, tool)
    assert call_violations({"i": {"n": 3}, "z": 1}, tool) == ["arguments.z: f does not list it"]
    part = known_property(schema, "i", schema)
    assert allows_text(known_property(part, "u", schema), schema) and not allows_text(known_property(part, "n", schema), schema)


@pytest.mark.parametrize("default", [3, None, 0, [], Decimal("0.1000000000000000055")])
@pytest.mark.parametrize(
    "write",
    [
        lambda default: {"default": default},
        lambda default: {"$ref": "#/$defs/D", "default": default},
        lambda default: {"allOf": [{"$ref": "#/$defs/D"}], "default": default},
        lambda default: {"anyOf": [{"default": default}, STRING]},
    ],
)
def test_a_default_inside_a_form(write, default):
    schema = {"properties": {"d": write(default)}, "$defs": {"D": {"default": default}}}
    assert with_defaults({}, schema) == {"d": default}


def test_a_recursive_schema_is_followed_as_deep_as_the_value_goes():
    tree = {"type": "object", "properties": {"n": INTEGER, "kids": {"type": "array", "items": {"$ref": "#"}}}}
    tree["properties"]["u"] = {"default": 1}
    assert coerce({"n": "1", "kids": [{"n": "2", "kids": [{"n": "3"}]}]}, tree) == {"n": 1, "kids": [{"n": 2, "kids": [{"n": 3}]}]}
    assert with_defaults({"kids": [{}]}, tree) == {"kids": [{"u": 1}], "u": 1}


@pytest.mark.parametrize("leaf", ["3", "x"])
def test_a_hundred_levels_of_choices_end(leaf):  # tried again at every level, they would double a hundred times
    kinds = [{"properties": {"n": INTEGER, "kid": {"$ref": "#"}, "op": {"type": "string"}}, "required": ["n"]} for _ in range(3)]
    schema, value = {"anyOf": [*kinds, NULL]}, {"n": leaf}
    for _ in range(98):
        value = {"n": "1", "kid": value}
    made = with_defaults(coerce(value, schema), schema)
    for _ in range(98):
        made = made["kid"]
    assert made == {"n": 3 if leaf == "3" else "x"}


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"allOf": [{"$ref": "#"}]},
        {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]},
        {"oneOf": [{"allOf": [{"$ref": "#"}]}]},
        {"$ref": "#/properties/a", "properties": {"a": {"$ref": "#/properties/a"}}},
        {"$ref": "https://example.com/schema"},
        {"$ref": "http://[bad"},
        {"$ref": "#/$defs/none"},
        {"$ref": "#nowhere"},
        {"$ref": 5},
        {"allOf": 5, "anyOf": "x"},
        {"patternProperties": {"(": INTEGER}},
    ],
)
def test_what_leads_nowhere_allows_anything(schema):
    for value in ("5", {"a": "5", "b": [1]}, [{"a": 1}], None):
        assert coerce(value, schema) == with_defaults(value, schema) == value
    assert allows_text(schema, schema) and property_schema(schema, "b") is True


@pytest.mark.parametrize(
    ("schema", "circle"),
    [
        ({"$ref": "#"}, True),
        ({"properties": {"a": {"$ref": "#/properties/a"}}}, True),
        ({"properties": {"a": {"$ref": "#/properties/b"}, "b": {"not": {"$ref": "#/properties/a"}}}}, True),
        ({"$defs": {"A": {"anyOf": [{"type": "null"}, {"allOf": [{"$ref": "#/$defs/A"}]}]}}}, True),
        ({"properties": {"a": {"$ref": "#"}}}, False),
        ({"properties": {"a": {"items": {"$ref": "#/properties/a"}}}}, False),
        ({"allOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/A"}], "$defs": {"A": INTEGER}}, False),
        ({"properties": {"$ref": {"type": "string"}}}, False),
        ({"$ref": "https://example.com/"}, False),
        (FORMS["ref to ref"], False),
    ],
)
def test_a_ref_that_leads_back_to_itself(schema, circle):
    assert leads_to_itself(schema) == circle


def test_a_default_that_leads_back_to_itself_ends():
    schema = {"properties": {"a": {"$ref": "#", "default": {}}}}
    assert with_defaults({}, schema) == {"a": {"a": {}}}


def test_an_older_tuple_and_nullable():
    schema = {"type": "array", "items": [INTEGER, STRING], "additionalItems": NUMBER}
    assert coerce(["1", 2, "3"], schema) == [1, "2", 3]
    assert [item_schema(schema, at) for at in range(3)] == [INTEGER, STRING, NUMBER]
    schema = {"type": "object", "properties": {"p": {"type": "string", "nullable": True}}}
    assert violations({"p": None}, schema) == [] and violations({"p": 1}, schema) and violations({"q": None, "p": "x"}, schema) == []
    assert violations({"p": None}, {"properties": {"p": {"type": "string", "nullable": False}}})


@pytest.mark.parametrize(
    ("parameters", "arguments", "broken"),
    [
        ({"patternProperties": {"^X_": STRING}}, {"X_A": "1"}, []),
        ({"patternProperties": {"^X_": STRING}}, {"Y_A": "1"}, ["arguments.Y_A: f does not list it"]),
        ({"properties": {}, "unevaluatedProperties": True}, {"a": 1}, []),
        ({"allOf": [{"properties": {"a": INTEGER}, "additionalProperties": True}]}, {"b": 1}, []),
        ({"if": {"required": ["a"]}, "then": {"properties": {"b": INTEGER}}, "properties": {"a": INTEGER}}, {"a": 1, "b": 2}, []),
        ({"dependentSchemas": {"a": {"properties": {"b": INTEGER}}}, "properties": {"a": INTEGER}}, {"a": 1, "b": 2}, []),
        ({"properties": {"a": INTEGER}}, {"b": 1}, ["arguments.b: f does not list it"]),
        ({}, {"b": 1}, ["arguments.b: f does not list it"]),
    ],
)
def test_what_a_tool_lists(parameters, arguments, broken):
    assert call_violations(arguments, {"name": "f", "parameters": parameters}) == broken


@pytest.mark.parametrize(
    ("value", "schema", "message"),
    [
        (4.94, {"multipleOf": 0.01}, None),
        (19.99, {"multipleOf": 0.01}, None),
        (4.945, {"multipleOf": 0.01}, "the value: 4.945 is not a multiple of 0.01"),
        ("x", {"multipleOf": 0.01}, None),
        (True, {"multipleOf": 2}, None),
        (Decimal("0.1000000000000000055"), {"enum": [0.1]}, "the value: 0.1000000000000000055 is not one of [0.1]"),
        (Decimal("0.1000000000000000055"), {"maximum": 0.1}, "the value: 0.1000000000000000055 is greater than the maximum of 0.1"),
        (Decimal("1e400"), {"type": "integer", "minimum": 1}, None),
        (0.5, {"type": "integer"}, "the value: 0.5 is not of type 'integer'"),
        (True, {"type": "number"}, "the value: True is not of type 'number'"),
        (1.0, {"const": 1}, None),
    ],
)
def test_numbers_are_the_decimals_that_are_written(value, schema, message):
    assert violations(value, schema) == ([message] if message else [])


def test_a_choice_is_told_by_multiple_of():
    cents, tens = {"type": "number", "multipleOf": 0.01}, {"type": "number", "multipleOf": 10}
    schema = {"anyOf": [{"properties": {"p": tens, "k": {"default": 1}}}, {"properties": {"p": cents, "k": {"default": 2}}}]}
    assert with_defaults({"p": 4.94}, schema) == {"p": 4.94, "k": 2} and with_defaults({"p": 20}, schema) == {"p": 20, "k": 1}


# -- Properties ------------------------------------------------------------------------------------------------------------------

scalars = st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from(["", "5", "0.5", "true", "x", 0.5])
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3), max_leaves=8
)
schemas = st.recursive(
    st.builds(lambda kind, default: {"type": kind, **default}, st.sampled_from(["string", "integer", "number", "boolean", "null"]),
              st.just({}) | st.builds(lambda value: {"default": value}, scalars)),
    lambda inner: st.one_of(
        st.builds(lambda properties, required: {"type": "object", "properties": properties, "required": required},
                  st.dictionaries(st.sampled_from("abc"), inner, max_size=3), st.lists(st.sampled_from("abc"), unique=True, max_size=1)),
        st.builds(lambda items: {"type": "array", "items": items}, inner),
        st.builds(lambda choices: {"anyOf": choices}, st.lists(inner, min_size=1, max_size=2)),
    ),
    max_leaves=8,
)  # fmt: skip


def rewritten(schema, defs, rng):
    """The same schema with its parts behind `$ref`s and in `allOf`s."""
    made = dict(schema)
    if "properties" in made:
        made["properties"] = {key: rewritten(child, defs, rng) for key, child in made["properties"].items()}
    if "items" in made:
        made["items"] = rewritten(made["items"], defs, rng)
    if "anyOf" in made:
        made["anyOf"] = [rewritten(child, defs, rng) for child in made["anyOf"]]
    form = rng.randrange(4)
    if form == 0:
        return made
    name = f"part {len(defs)}"
    defs[name] = made
    ref = {"$ref": f"#/$defs/{name.replace(' ', '%20')}"}
    return (ref, {"allOf": [ref]}, {"allOf": [{"description": "x"}, ref], "title": "y"})[form - 1]


@settings(max_examples=300, deadline=None)
@given(schemas, values, st.randoms(use_true_random=False))
def test_inline_and_by_reference_are_one_schema(schema, value, rng):
    defs: dict = {}
    other = rewritten(schema, defs, rng) | {"$defs": defs}
    made = coerce(value, schema)
    assert repr(coerce(value, other)) == repr(made)
    filled = with_defaults(made, schema)
    assert with_defaults(made, other) == filled
    assert bool(violations(value, other)) == bool(violations(value, schema))
    assert with_defaults(filled, other) == filled or "anyOf" in repr(schema)


@settings(max_examples=150, deadline=None)
@given(schemas, values)
def test_beside_null_a_schema_says_the_same_of_what_is_valid_in_it(schema, value):
    optional = {"anyOf": [schema, NULL]}
    made = coerce(value, schema)
    if not violations(made, schema) and made is not None:
        assert repr(coerce(made, optional)) == repr(made) and with_defaults(made, optional) == with_defaults(made, schema)
