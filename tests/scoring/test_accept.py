"""Acceptable values: right under every matcher, by value with JSON's own types; `""` is absence."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_swap.rows.examples import Dataset, Example
from slm_swap.scoring.metrics import MATCHERS
from slm_swap.scoring.tracks import TRACKS

PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "n": {"type": "integer"},
        "r": {"type": "number"},
        "maybe": {"anyOf": [{"type": "number"}, {"type": "null"}]},
        "text": {"anyOf": [{"$ref": "#/$defs/T"}, {"type": "null"}]},
        "word": {"enum": ["a", "b"]},
        "code": {"enum": [1, 2]},
        "body": {"$ref": "#/$defs/B"},
        "rows": {"type": "array", "items": {"$ref": "#/$defs/B"}},
    },
    "$defs": {
        "T": {"type": "string"},
        "B": {"type": "object", "properties": {"k": {"type": "string"}, "v": {"type": "integer"}}},
    },
}


def call(arguments, name="f"):
    return f'<tool_call name="{name}">{arguments}</tool_call>'


def scores(gold, reply, accept, schema=PARAMETERS):
    """The score of arguments as a call and as a structured row of function-calling data: the two agree."""
    tools = [{"name": "f", "parameters": schema}] if schema else None
    track = TRACKS["toolcall"]
    called = track.score(track.reference(Example("p", call(gold), tools=tools, accept=accept)), call(reply))
    whole = {"type": "object", "properties": {"tool_name": {"const": "f"}, "arguments": schema}, "$defs": (schema or {}).get("$defs")}
    row = Example("p", f'{{"tool_name":"f","arguments":{gold}}}', schema=whole if schema else None, accept=accept)
    track = TRACKS["structured"]
    built = track.score(track.reference(row), f'{{"tool_name":"f","arguments":{reply}}}')
    assert built.error == called.error and exact(built) == exact(called)
    return called


def exact(scored):
    return tuple(getattr(scored, matcher).exact for matcher in MATCHERS)


@pytest.mark.parametrize(
    ("gold", "accept", "reply"),
    [
        ('{"city":"New York"}', {"city": ["New York", "NYC"]}, '{"city":"NYC"}'),
        ('{"city":"B"}', {"city": ["B", ""]}, "{}"),
        ('{"city":"B"}', {"city": ["B"], "n": [3, ""]}, '{"city":"B","n":3}'),
        ('{"city":"B"}', {"city": ["B"], "n": [3, ""]}, '{"n":3.0,"city":"B"}'),
        ('{"r":5}', {"r": [5, 0.1]}, '{"r":0.10}'),
        ('{"a":"x"}', {"a": ["x"], "maybe": ["", None]}, '{"a":"x","maybe":null}'),
        ('{"rows":[{"k":"a","v":1}]}', {"rows": [[{"k": ["a"], "v": [1, 2]}]]}, '{"rows":[{"v":2,"k":"a"}]}'),
        ('{"body":{"k":"a","v":1}}', {"body": [{"k": ["a"], "v": [1, ""]}]}, '{"body":{"k":"a"}}'),
        ('{"body":{"k":"a"}}', {"body": [{"k": ["a"], "v": [1, ""]}]}, '{"body":{"k":"a","v":1}}'),
        ('{"city":"B","n":1}', {"city": ["B", "Berlin"], "n": [1, 2, ""]}, '{"city":"Berlin"}'),
    ],
)
def test_an_accepted_value_is_right_under_every_matcher(gold, accept, reply):
    for schema in (PARAMETERS, None):
        scored = scores(gold, reply, accept, schema)
        assert scored.error is None and exact(scored) == (True, True, True)
        assert scored == scores(gold, gold, accept, schema)  # as right as the gold itself, leaf by leaf


@pytest.mark.parametrize(
    ("gold", "accept", "reply", "error"),
    [
        ('{"any":9}', {"any": [1]}, '{"any":"1"}', "wrong_type"),
        ('{"any":9}', {"any": [1]}, '{"any":true}', "wrong_type"),
        ('{"any":9}', {"any": ["1"]}, '{"any":1}', "wrong_value"),
        ('{"any":"x"}', {"any": ["New York"]}, '{"any":"new york"}', "wrong_value"),
        ('{"any":9}', {"any": [[1, 2]]}, '{"any":[2,1]}', "wrong_type"),
        ('{"any":{"x":9}}', {"any": [{"x": [1, 2]}]}, '{"any":{"x":"1"}}', "wrong_type"),
        ('{"any":{"x":9}}', {"any": [{"x": [1, 2]}]}, '{"any":{"x":1,"y":1}}', "extra_argument"),
    ],
)
def test_strict_converts_nothing(gold, accept, reply, error):
    scored = scores(gold, reply, accept)
    assert scored.error == error and not scored.strict.exact


def test_the_schema_matcher_converts_what_is_accepted_too():
    assert exact(scores('{"n":1}', '{"n":"2"}', {"n": [1, 2]})) == (False, True, True)
    assert exact(scores('{"n":1}', '{"n":2}', {"n": [1, "2"]})) == (False, True, True)
    assert exact(scores('{"city":"B"}', '{"city":" nyc"}', {"city": ["B", "NYC"]})) == (False, False, True)


def test_what_is_accepted_counts_as_the_gold_s_own_where_something_else_is_wrong():
    accept = {"city": ["B", "Berlin"], "n": [3, ""]}
    scored = scores('{"city":"B","r":1}', '{"city":"Berlin","n":3,"r":2}', accept)
    assert scored.error == "wrong_value"  # r, not the city nor the argument that the gold left out
    for match in (getattr(scored, matcher) for matcher in MATCHERS):
        assert (match.matched, match.predicted, match.expected, match.exact) == (1, 2, 2, False)
    assert scores('{"city":"B","n":1}', '{"city":"B"}', {"city": ["B"]}).error == "missing_argument"


def test_accept_does_not_make_another_tool_right():
    track = TRACKS["toolcall"]
    reference = track.reference(Example("p", call('{"a":1}'), accept={"a": [1, 2]}))
    scored = track.score(reference, call('{"a":2}', "g"))
    assert scored.error == "wrong_tool" and scored.strict[1:4] == (False, False, 0)


def test_the_form_and_the_limit_still_count():
    track = TRACKS["toolcall"]
    reference = track.reference(Example("p", call('{"a":1}'), accept={"a": [1, 2]}))
    assert exact(track.score(reference, "Sure: " + call('{"a":2}'))) == (False, False, True)
    assert track.score(reference, call('{"a":2}'), "length").error is None
    assert track.score(reference, call('{"a":3}'), "length").error == "truncated"
    assert track.score(reference, call('{"a":2}'), "content_filter").error == "filtered"


# -- "": absence, and a value only where the schema allows a string -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "schema", "literal"),
    [
        ("n", PARAMETERS, False),
        ("r", PARAMETERS, False),
        ("maybe", PARAMETERS, False),
        ("code", PARAMETERS, False),
        ("rows", PARAMETERS, False),
        ("city", PARAMETERS, True),
        ("text", PARAMETERS, True),
        ("word", PARAMETERS, True),
        ("unlisted", PARAMETERS, True),
        ("n", None, True),
    ],
)
def test_an_empty_text_is_absence(key, schema, literal):
    accept = {"a": ["x"], key: ["", 7]}
    assert exact(scores('{"a":"x"}', '{"a":"x"}', accept, schema)) == (True, True, True)
    scored = scores('{"a":"x"}', json.dumps({"a": "x", key: ""}), accept, schema)
    assert exact(scored) == (literal, literal, literal) and scored.error == (None if literal else "extra_argument")


def test_an_empty_text_inside_an_object():
    accept = {"body": [{"k": ["a", ""], "v": ["", 1]}]}
    gold = '{"body":{"k":"a"}}'
    assert scores(gold, '{"body":{"k":""}}', accept).error is None
    assert scores(gold, '{"body":{}}', accept).error is None
    assert exact(scores(gold, '{"body":{"k":"a","v":""}}', accept)) == (False, False, False)
    assert exact(scores(gold, '{"body":{"k":"a","v":""}}', accept, None)) == (True, True, True)


def test_digits_of_an_accepted_value(write_rows):
    line = b'{"prompt":"p","completion":"{\\"x\\":1}","accept":{"x":[52.520006599999998,12345678901234567.25]}}'
    rows = Dataset(write_rows("rows.jsonl", [line]))
    track = TRACKS["structured"]
    for example in (*rows, *rows):  # checked, and read again
        reference = track.reference(example)
        assert track.score(reference, '{"x":52.520006599999998}').error is None
        assert track.score(reference, '{"x":12345678901234567.25}').error is None
        assert track.score(reference, '{"x":52.520006599999995}').error == "wrong_value"  # the nearest float


# -- Properties ------------------------------------------------------------------------------------------------------------------

scalars = st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["a", "A ", "1", "true", 0.5])
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("xy"), inner, max_size=2))
arguments = st.dictionaries(st.sampled_from(["city", "n", "r", "maybe", "body", "rows", "any"]), values, max_size=3)


@settings(max_examples=200, deadline=None)
@given(arguments, arguments, st.sampled_from([PARAMETERS, None]))
def test_any_value_that_is_listed_is_right(gold, reply, schema):
    accept = {key: [gold.get(key), value] for key, value in reply.items()} | {key: [""] for key in gold.keys() - reply.keys()}
    scored = scores(json.dumps(gold), json.dumps(reply), accept, schema)
    assert scored.error is None and exact(scored) == (True, True, True)


@settings(max_examples=200, deadline=None)
@given(arguments, arguments, st.dictionaries(st.sampled_from(["city", "n", "any"]), st.lists(values, max_size=2), max_size=2))
def test_accept_takes_nothing_away(gold, reply, accept):
    without, given_ = (scores(json.dumps(gold), json.dumps(reply), some) for some in (None, accept))
    for before, after in zip(exact(without), exact(given_), strict=True):
        assert before <= after
    assert given_.strict.exact <= given_.schema.exact <= given_.lenient.exact
    assert (given_.error is None) == given_.strict.exact
