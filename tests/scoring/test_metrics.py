"""Parsing, matching and scoring: known answers for every rule of the design's scores, and what holds for any JSON."""

import json
import random
import string
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_swap.rows.examples import Example
from slm_swap.scoring.json_values import leaves, parse_json, same, size
from slm_swap.scoring.metrics import ERRORS, MATCHERS, Match
from slm_swap.scoring.replies import InvalidReply, parse_structured, parse_toolcall
from slm_swap.scoring.tracks import TRACKS

quick = settings(max_examples=150, deadline=None)
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer", "default": 3},
        "rate": {"type": "number", "default": 0.1},
        "metric": {"type": "boolean"},
        "code": {"type": "string"},
        "tags": {"type": "array", "items": {"type": "integer"}},
        "any": {},
    },
    "required": ["city"],
}


def structured(gold, reply, finish_reason="stop", **fields):
    """The score of a structured reply; `gold` and `reply` are JSON texts."""
    track = TRACKS["structured"]
    return track.score(track.reference(Example("p", gold, **fields)), reply, finish_reason)


def call(arguments, name="f"):
    return f'<tool_call name="{name}">{arguments}</tool_call>'


ONE, OTHER, DOTS = call('{"a":1}'), call("{}", "g"), call("{...}")


def toolcall(gold, reply, finish_reason="stop", parameters=None, **fields):
    """The score of a toolcall reply, given whole; `gold` are the arguments of a call of `f`."""
    track = TRACKS["toolcall"]
    tools = [{"name": "g", "parameters": {}}, {"name": "f", "parameters": parameters}] if parameters else None
    return track.score(track.reference(Example("p", call(gold), tools=tools, **fields)), reply, finish_reason)


def exact(scored):
    return tuple(getattr(scored, matcher).exact for matcher in MATCHERS)


# -- JSON by value ---------------------------------------------------------------------------------------------------------------

LONG = "9" * 5000  # Python's int() refuses more than 4300 digits


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ('{"a":1,"b":2}', '{"b":2,"a":1}'),
        ('{"a":{"x":1,"y":[{"p":1,"q":2}]}}', '{"a":{"y":[{"q":2,"p":1}],"x":1}}'),
        ('{"a":1}', '{"a":1.0}'),
        ('{"a":1}', '{"a":10e-1}'),
        ('{"a":0}', '{"a":-0.0}'),
        ('{"a":0.1}', '{"a":0.10}'),
        ('{"a":-1.6e-19}', '{"a":-0.00000000000000000016}'),
        ('{"a":"\\u00e9"}', '{"a":"é"}'),
        ('{"a":1}', ' \n{ "a" :\t1 }\r\n'),
        (f'{{"a":{LONG}}}', f'{{"a":{LONG}}}'),
        (f'{{"a":1{"0" * 5000}}}', '{"a":1e5000}'),
        (f'{{"a":-{LONG}}}', f'{{"a":-{LONG}.0}}'),
        ("{}", "{ }"),
    ],
)
def test_equal_as_json(left, right):
    assert structured(left, right).strict.exact and structured(right, left).strict.exact
    assert leaves(parse_json(left)) == leaves(parse_json(right))


@pytest.mark.parametrize(
    ("left", "right", "error"),
    [
        ('{"a":true}', '{"a":1}', "wrong_type"),
        ('{"a":false}', '{"a":0}', "wrong_type"),
        ('{"a":[true]}', '{"a":[1]}', "wrong_type"),
        ('{"a":"1"}', '{"a":1}', "wrong_type"),
        ('{"a":null}', '{"a":""}', "wrong_type"),
        ('{"a":null}', '{"a":false}', "wrong_type"),
        ('{"a":[]}', '{"a":{}}', "wrong_type"),
        ('{"a":null}', '{"a":[]}', "wrong_type"),
        ('{"a":[1,2]}', '{"a":[2,1]}', "wrong_value"),
        ('{"a":[1]}', '{"a":[1,1]}', "wrong_value"),
        ('{"a":[]}', '{"a":[[]]}', "wrong_value"),
        ('{"a":"A"}', '{"a":"a"}', "wrong_value"),
        ('{"a":"x"}', '{"a":"x "}', "wrong_value"),
        ('{"a":9007199254740993}', '{"a":9007199254740992}', "wrong_value"),  # equal as floats
        ('{"a":0.1}', '{"a":0.10000000000000001}', "wrong_value"),  # equal as floats
        ('{"a":1e400}', '{"a":2e400}', "wrong_value"),  # both are infinite as floats
        (f'{{"a":{LONG}}}', f'{{"a":{LONG[:-1]}8}}', "wrong_value"),
        ('{"a":{"0":1}}', '{"a":[1]}', "wrong_type"),
    ],
)
def test_different_as_json(left, right, error):
    for gold, reply in ((left, right), (right, left)):
        scored = structured(gold, reply)
        assert scored.strict.valid and not scored.strict.exact and scored.error == error


BAD_JSON = {
    "duplicate key": '{"a":1,"a":1}',
    "duplicate key inside": '{"b":[{"a":1,"a":2}]}',
    "duplicate key by escape": '{"a":1,"\\u0061":1}',
    "NaN": '{"a":NaN}',
    "Infinity": '{"a":Infinity}',
    "minus Infinity": '{"a":-Infinity}',
    "no exponent has so many digits": '{"a":1e99999999999999999999}',
    "no exponent is so small": '{"a":1e-99999999999999999999}',
    "single quotes": "{'a': 1}",
    "escaped quotes": '{\\"a\\": 1}',
    "HTML": "{&quot;a&quot;: 1}",
    "a comma too many": '{"a":1,}',
    "a comment": '{"a":1 /* one */}',
    "a leading zero": '{"a":01}',
    "a line break in a string": '{"a":"x\ny"}',
    "cut off": '{"a":1,"b":',
    "cut off behind an inner object": '{"a":{"b":1},"c":',
    "an inner object is whole": '{"a":{"b":1},c:2}',
    "elided": "{...}",
}


@pytest.mark.parametrize("text", BAD_JSON.values(), ids=BAD_JSON)
def test_bad_json(text):
    gold = '{"a":1}'
    assert structured(gold, text).error == "bad_json"
    assert toolcall(gold, call(text)).error == "bad_json"
    assert toolcall(gold, f"<tool_call name='f' arguments=\"{text}\"/>").error == "bad_json"
    for scored in (structured(gold, text), toolcall(gold, call(text))):
        assert [getattr(scored, matcher) for matcher in MATCHERS] == [scored.strict] * 3  # even the lenient one reads no more
        assert not scored.strict.valid and scored.strict.f1 == 0


@pytest.mark.parametrize("opening", ['{"a":', "["])
@pytest.mark.parametrize("depth", [101, 500, 900, 100_000])
def test_too_deep_is_bad_json_and_no_crash(opening, depth):
    body = opening * (depth - 1) + "1" + {"[": "]"}.get(opening, "}") * (depth - 1)
    assert structured('{"a":1}', f'{{"a":{body}}}').error == "bad_json"
    assert toolcall('{"a":1}', call(f'{{"a":{body}}}')).error == "bad_json"


def test_a_hundred_levels_are_read():
    def nested(value):
        return '{"a":' * 98 + f'[{{"b":{value}}}]' + "}" * 98

    assert structured(nested(1), nested("1.0")).error is None
    scored = structured(nested(1), nested('"X"'), schema=SCHEMA)
    assert scored.error == "wrong_type" and exact(scored) == (False, False, False)


@pytest.mark.parametrize("text", ['{"a":' * 30_000, "{" * 100_000, '{"\\"' + '\\"' * 50_000, "{x}" * 20_000, '{"a":[' * 30_000])
def test_long_broken_texts_take_no_time(text):  # read again from every brace, they would take minutes
    assert structured('{"a":1}', text).error == "bad_json"
    assert toolcall('{"a":1}', call(text)).error == "bad_json"


# -- Leaves ----------------------------------------------------------------------------------------------------------------------


def test_leaves():
    value = parse_json('{"a":{"b":[1,{"c":null}],"d":{}},"e":[],"f":true,"g":"x","h":2.50}')
    assert leaves(value) == {
        (("a", "b", 0), "number", 1),
        (("a", "b", 1, "c"), "null", None),
        (("a", "d"), "object", None),
        (("e",), "array", None),
        (("f",), "boolean", True),
        (("g",), "string", "x"),
        (("h",), "number", Decimal("2.5")),
    }


def test_an_empty_value_is_one_leaf():
    assert leaves({}) == {((), "object", None)} and leaves([]) == {((), "array", None)}
    assert leaves({"a": None}) != leaves({"a": {}}) != leaves({"a": []})


def test_a_float_of_a_schema_is_the_number_that_it_is_written_as():
    assert leaves({"a": 0.1, "b": 3.0}) == leaves(parse_json('{"a":0.1,"b":3}'))


def test_a_key_is_not_a_position():
    assert leaves({"0": 1}) != leaves([1])


# -- What is wrong with a text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        ('{"a":1}', None),
        (' \n\t{"a":1}\n ', None),
        ("", "no_json"),
        ("   ", "no_json"),
        ("I cannot help with that.", "no_json"),
        ("5\n}", "no_json"),
        ("[see above] a is 1", "no_json"),
        ("a=1", "no_json"),
        ("None", "no_json"),
        ("NaN", "no_json"),
        ("{a: 1} and more", "bad_json"),
        ("```json\n{'a': 1}\n```", "bad_json"),
        ('Here it is: {"a":1}', "extra_text"),
        ('{"a":1} I hope that helps.', "extra_text"),
        ('```json\n{"a":1}\n```', "extra_text"),
        ('{"a":1}{"a":1}', "extra_text"),
        ('{"a":1}\n{"a":2}', "extra_text"),
        ('{"a":1}}', "extra_text"),
        ('{"a":1}"', "extra_text"),
        ('{a} {"a":1}', "extra_text"),
        ('<think>{"x"}</think>{"a":1}', "extra_text"),
        ('"a", {"a":1}', "extra_text"),
        ('[{"a":1}]', "wrong_shape"),
        ("[]", "wrong_shape"),
        ("5", "wrong_shape"),
        ("null", "wrong_shape"),
        ('"text"', "wrong_shape"),
        ('"{\\"a\\":1}"', "wrong_shape"),
    ],
)
def test_errors_of_structured_texts(reply, error):
    scored = structured('{"a":1}', reply)
    assert scored.error == error and scored.strict.valid == scored.strict.exact == (error is None)
    if error:
        with pytest.raises(InvalidReply) as raised:
            parse_structured(reply)
        assert raised.value.error == error and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (ONE, None),
        (f"\n {ONE} \n", None),
        (call(' \n{ "a": 1 }\n'), None),
        ("", "no_json"),
        ("I cannot help with that.", "no_json"),
        ("f(a=1)", "no_json"),
        ('<tool_call name="f">', "no_json"),
        ('<tool_call name="f" a="1"></tool_call>', "no_json"),
        (call(""), "no_json"),
        (call("a=1"), "no_json"),
        (call("{a: 1}"), "bad_json"),
        (call('{"a":1'), "bad_json"),
        ('<tool_call name="f">{"a":', "bad_json"),
        ('Sure: <tool_call name="f">{...}</tool_call>', "bad_json"),
        (f"Sure: {ONE}", "extra_text"),
        (f"{ONE} Done.", "extra_text"),
        (f"```xml\n{ONE}\n```", "extra_text"),
        (ONE * 2, "extra_text"),
        (f"{ONE}\n{OTHER}", "extra_text"),
        (f"{DOTS} then {ONE}", "extra_text"),
        (call('{"a":1}"'), "extra_text"),
        (call('{"a":1}{"b":2}'), "extra_text"),
        (call('now {"a":1}'), "extra_text"),
        (ONE + "</tool_call>", "extra_text"),
        ('{"a":1}', "wrong_shape"),
        ('{"name":"f","arguments":{"a":1}}', "wrong_shape"),
        ('[{"name":"f","arguments":{"a":1}}]', "wrong_shape"),
        ('<tool_call name="f" arguments={"a":1} />', "wrong_shape"),
        ("<tool_call name='f'>{\"a\":1}</tool_call>", "wrong_shape"),
        ('<tool_call name="">{"a":1}</tool_call>', "wrong_shape"),
        ('<tool_call>{"a":1}</tool_call>', "wrong_shape"),
        ('<tool_call name=f>{"a":1}</tool_call>', "wrong_shape"),
        ('<tool_call  name="f">{"a":1}</tool_call>', "wrong_shape"),
        ('<TOOL_CALL name="f">{"a":1}</TOOL_CALL>', "wrong_shape"),
        ('<tool_call name="f">{"a":1}', "wrong_shape"),
        ('{"a":1}<tool_call name="f"></tool_call>', "wrong_shape"),
        ('<tool_call name="f">{"a":1}</tool_end>', "wrong_shape"),
        ('<tool_call name="f">{"a":1}/tool_call>>', "wrong_shape"),  # as long as a closing tag
        (call("[1]"), "wrong_shape"),
        (call("1"), "wrong_shape"),
        (call("null"), "wrong_shape"),
        (call('"{}"'), "wrong_shape"),
    ],
)
def test_errors_of_toolcall_texts(reply, error):
    scored = toolcall('{"a":1}', reply)
    assert scored.error == error and scored.strict.valid == scored.strict.exact == (error is None)
    if error:
        with pytest.raises(InvalidReply) as raised:
            parse_toolcall(reply)
        assert raised.value.error == error and "\n" not in str(raised.value)


def test_the_errors_are_the_design_s():
    assert ERRORS == (
        "filtered", "refused", "prompt_too_long", "truncated", "no_json", "bad_json", "extra_text", "wrong_shape", "unwanted_call",
        "no_call", "missing_call", "extra_call", "wrong_tool", "missing_argument", "extra_argument", "wrong_type", "wrong_value",
    )  # fmt: skip
    assert MATCHERS == ("strict", "schema", "lenient")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a":NaN}', "NaN is not JSON"),
        ('{"a":1,"a":2}', "an object with a duplicate key"),
        ('{"a":1e99999999999999999999}', "an exponent that no number has"),
        (f'{{"a":{"[" * 100}{"]" * 100}}}', "nested too deeply"),
        ('{"a":', "Expecting value: line 1 column 6 (char 5)"),
    ],
)
def test_the_reason_is_said(text, reason):
    for parse, reply in ((parse_structured, text), (parse_toolcall, call(text))):
        with pytest.raises(InvalidReply) as raised:
            parse(reply)
        assert (raised.value.error, str(raised.value)) == ("bad_json", reason)


def test_a_closing_tag_inside_a_string_is_text():
    for inside in ("</tool_call>", "x</tool_call>y", '<tool_call name=\\"g\\">{}</tool_call>'):
        body = f'{{"a":"{inside}"}}'
        assert toolcall(body, call(body)).error is None
        assert toolcall(body, call(body) + call(body)).error == "extra_text"


def test_braces_inside_strings_are_text():
    assert structured('{"a":"}{"}', '{"a":"}{"}').error is None
    assert structured('{"a":"}{"}', 'Here: {"a":"}{"}').lenient.exact
    assert structured('{"a":1}', '{"x":"{\\"a\\":1}", y}').error == "bad_json"


# -- White space -----------------------------------------------------------------------------------------------------------------

JSON_SPACE = [" ", "\t", "\r", "\n", " \r\n\t "]
OTHER_SPACE = ["\xa0", "\u2028", "\u3000", "\x1c", "\x0b", "\x0c", "\x85", " \xa0"]


@pytest.mark.parametrize("space", JSON_SPACE)
def test_json_s_white_space_is_nothing(space):
    body = f'{space}{{{space}"a"{space}:{space}1{space}}}{space}'
    assert exact(structured('{"a":1}', body)) == (True, True, True)
    assert exact(toolcall('{"a":1}', f"{space}{call(body)}{space}")) == (True, True, True)


@pytest.mark.parametrize("space", OTHER_SPACE)
def test_other_white_space_is_text(space):  # no JSON parser takes it
    body = '{"a":1}'
    for around in (f"{space}{body}", f"{body}{space}"):
        scored = structured(body, around)
        assert scored.error == "extra_text" and exact(scored) == (False, False, True) and not scored.schema.valid
    for around in (f"{space}{ONE}", f"{ONE}{space}", call(f"{space}{body}"), call(f"{body}{space}")):
        scored = toolcall(body, around)
        assert scored.error == "extra_text" and exact(scored) == (False, False, True) and not scored.schema.valid
    assert structured(body, f'{{{space}"a":1}}').error == "bad_json"


# -- Numbers ---------------------------------------------------------------------------------------------------------------------


def test_partial_credit_by_hand():
    scored = structured('{"a":1,"b":{"c":2,"d":[3,4]},"e":"x"}', '{"a":1,"b":{"c":9,"d":[3,5]},"f":"y","g":[]}')
    # gold: a, b.c, b.d.0, b.d.1, e; reply: a, b.c, b.d.0, b.d.1, f, g; the same: a, b.d.0
    match = scored.strict
    assert (match.matched, match.predicted, match.expected) == (2, 6, 5)
    assert (match.precision, match.recall, match.f1) == (2 / 6, 2 / 5, 4 / 11)
    assert match.valid and not match.exact


def test_empty_against_empty_is_one():
    for match in (structured("{}", "{}").strict, toolcall("{}", call("{}")).strict):
        assert (match.exact, match.precision, match.recall, match.f1) == (True, 1, 1, 1)


def test_empty_against_something_is_zero():
    for gold, reply in (("{}", '{"a":1}'), ('{"a":1}', "{}")):
        match = structured(gold, reply).strict
        assert (match.valid, match.exact, match.precision, match.recall, match.f1) == (True, False, 0, 0, 0)


def test_an_invalid_reply_is_zero_everywhere():
    match = structured('{"a":1,"b":2}', "none").strict
    assert match == Match(False, False, False, 0, 0, 2) and (match.precision, match.recall, match.f1) == (0, 0, 0)


def test_the_wrong_tool_has_no_right_arguments():
    scored = toolcall('{"a":1}', call('{"a":1}', "g"))
    for match in (getattr(scored, matcher) for matcher in MATCHERS):
        assert match.valid and not match.name and not match.exact
        assert (match.precision, match.recall, match.f1, match.predicted, match.expected) == (0, 0, 0, 1, 1)
    assert scored.error == "wrong_tool"


def test_the_right_tool_with_wrong_arguments_keeps_its_name():
    match = toolcall('{"a":1}', call('{"a":2}')).strict
    assert match.name and not match.exact and match.f1 == 0


# -- Errors between two objects --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gold", "reply", "error"),
    [
        ('{"a":1,"b":2}', '{"a":1}', "missing_argument"),
        ('{"a":1}', '{"a":1,"b":2}', "extra_argument"),
        ('{"a":1}', '{"a":"1"}', "wrong_type"),
        ('{"a":1}', '{"a":2}', "wrong_value"),
        ('{"a":{"b":1}}', '{"a":{}}', "missing_argument"),
        ('{"a":{}}', '{"a":{"b":1}}', "extra_argument"),
        ('{"a":[{"b":1}]}', '{"a":[{"c":1}]}', "missing_argument"),
        ('{"a":[1,2]}', '{"a":[1]}', "wrong_value"),
        ('{"a":[1,2]}', '{"a":["1",3]}', "wrong_type"),
        ('{"a":1,"b":2}', '{"a":"1","c":2}', "missing_argument"),  # of several, the first in the order of ERRORS
        ('{"a":1,"b":2}', '{"a":"1","b":2,"c":2}', "extra_argument"),
        ('{"a":1,"b":2}', '{"a":"1","b":3}', "wrong_type"),
    ],
)
def test_errors_between_objects(gold, reply, error):
    assert structured(gold, reply).error == toolcall(gold, call(reply)).error == error


def test_a_structured_reply_names_its_tool():
    gold = '{"tool_name":"f","arguments":{"a":1}}'
    assert structured(gold, '{"tool_name":"g","arguments":{"b":1}}').error == "wrong_tool"
    assert structured(gold, '{"arguments":{"a":1}}').error == "missing_argument"
    assert structured(gold, '{"tool_name":"f","arguments":{"a":2}}').error == "wrong_value"
    assert structured('{"a":1}', '{"tool_name":"g"}').error == "missing_argument"


@pytest.mark.parametrize(
    ("finish_reason", "right", "wrong", "nothing"),
    [
        ("stop", None, "wrong_value", "no_json"),
        ("length", None, "truncated", "truncated"),
        ("content_filter", "filtered", "filtered", "filtered"),
        ("refusal", "refused", "refused", "refused"),
        ("error", "no_json", "no_json", "no_json"),
    ],
)
def test_finish_reasons(finish_reason, right, wrong, nothing):
    for text, error in (('{"a":1}', right), ('{"a":2}', wrong), ("", nothing)):
        for scored in (structured('{"a":1}', text, finish_reason), toolcall('{"a":1}', text and call(text), finish_reason)):
            assert scored.error == error and scored.strict.exact == (error is None)
            if error in ("filtered", "refused"):
                assert not any(getattr(scored, matcher).valid for matcher in MATCHERS)


def test_a_truncated_reply_keeps_its_partial_credit():
    assert structured('{"a":1,"b":2}', '{"a":1,"b":3}', "length").strict.f1 == 0.5


# -- The looser matchers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gold", "reply", "expected"),
    [
        ('{"city":"B"}', '{"city":"B","days":3}', (False, True, True)),  # a default written out
        ('{"city":"B","days":3}', '{"city":"B"}', (False, True, True)),  # a default left out
        ('{"city":"B"}', '{"city":"B","rate":0.1}', (False, True, True)),
        ('{"city":"B"}', '{"city":"B","rate":0.10000000000000001}', (False, False, False)),
        ('{"city":"B"}', '{"city":"B","days":4}', (False, False, False)),
        ('{"city":"B","days":5}', '{"city":"B","days":"5"}', (False, True, True)),
        ('{"city":"B","rate":0.5}', '{"city":"B","rate":"0.5"}', (False, True, True)),
        ('{"city":"B","rate":0.3}', '{"city":"B","rate":"0.30000000000000004"}', (False, False, False)),
        ('{"city":"B","metric":true}', '{"city":"B","metric":"true"}', (False, True, True)),
        ('{"city":"B","metric":true}', '{"city":"B","metric":1}', (False, False, False)),
        ('{"city":"B","code":"5"}', '{"city":"B","code":5}', (False, True, True)),
        ('{"city":"B","tags":[1,2]}', '{"city":"B","tags":["1",2]}', (False, True, True)),
        ('{"city":"B","tags":[1,2]}', '{"city":"B","tags":[2,1]}', (False, False, False)),
        ('{"city":"B","any":5}', '{"city":"B","any":"5"}', (False, False, False)),
        ('{"city":"Berlin"}', '{"city":" berlin"}', (False, False, True)),
        ('{"city":"New York"}', '{"city":"new  york"}', (False, False, True)),
        ('{"city":"New York"}', '{"city":"NewYork"}', (False, False, False)),
        ('{"city":"Straße"}', '{"city":"STRASSE"}', (False, False, True)),
        ('{"city":"B","any":["X"]}', '{"city":"b","any":["x"]}', (False, False, True)),
        ('{"city":"B"}', '{"City":"B"}', (False, False, False)),  # keys are the schema's
        ('{"city":"B"}', "{}", (False, False, False)),
        ('{"city":"B"}', '{"city":"B"}', (True, True, True)),
    ],
)
def test_schema_and_lenient(gold, reply, expected):
    scored = toolcall(gold, call(reply), parameters=SCHEMA)
    assert exact(scored) == expected and (scored.error is None) == expected[0]
    assert exact(structured(gold, reply, schema=SCHEMA)) == expected


def test_a_built_structured_row():
    schema = {
        "type": "object",
        "properties": {"tool_name": {"const": "f"}, "arguments": SCHEMA},
        "required": ["tool_name", "arguments"],
    }
    gold = '{"tool_name":"f","arguments":{"city":"B"}}'
    assert exact(structured(gold, '{"tool_name":"f","arguments":{"city":"B","days":"3"}}', schema=schema)) == (False, True, True)
    accept = {"city": ["B", "Berlin"], "days": ["7", ""]}  # "7" is converted as a reply's is
    for reply, expected in (
        ('{"city":"Berlin","days":7}', (False, True, True)),
        ('{"city":"berlin"}', (False, False, True)),
        ('{"city":"Bonn"}', (False, False, False)),
    ):
        text = f'{{"tool_name":"f","arguments":{reply}}}'
        assert exact(structured(gold, text, schema=schema, accept=accept)) == expected
    assert not structured(gold, '{"tool_name":"f","arguments":"none"}', schema=schema, accept=accept).lenient.exact


def test_without_a_schema_the_schema_matcher_is_strict():
    scored = structured('{"days":5}', '{"days":"5"}')
    assert exact(scored) == (False, False, False) and scored.schema == scored.strict


def test_only_the_schema_of_the_called_tool_counts():
    track = TRACKS["toolcall"]
    tools = [{"name": "g", "parameters": SCHEMA}, {"name": "f", "parameters": {"type": "object"}}]
    reference = track.reference(Example("p", call('{"city":"B"}'), tools=tools))
    assert not track.score(reference, call('{"city":"B","days":3}')).schema.exact


@pytest.mark.parametrize(
    ("accept", "reply", "expected"),
    [
        ({"city": ["B", "Berlin"]}, '{"city":"Berlin"}', (True, True, True)),
        ({"city": ["B", "Berlin"]}, '{"city":"BERLIN"}', (False, False, True)),
        ({"city": ["B", "Berlin"]}, '{"city":"Bonn"}', (False, False, False)),
        ({"city": ["B"], "code": ["x", ""]}, '{"city":"B","code":"x"}', (True, True, True)),  # may be left out, and the gold did
        ({"city": ["B"], "code": ["x", ""]}, '{"city":"B","code":"y"}', (False, False, False)),
        ({"city": ["B"], "code": ["x"]}, '{"city":"B","code":"x"}', (True, True, True)),
        ({"city": ["B", ""]}, "{}", (True, True, True)),
        ({"city": ["B"]}, "{}", (False, False, False)),
        ({"city": ["B"], "days": [5, 7]}, '{"city":"B","days":"7"}', (False, True, True)),
        ({"city": ["B"], "rate": [0.2]}, '{"city":"B","rate":0.20}', (True, True, True)),
        ({"city": ["B"], "code": [7]}, '{"city":"B","code":"7"}', (False, True, True)),  # converted as the reply is
        ({"city": ["B"], "any": [[1, 2]]}, '{"city":"B","any":[1,2]}', (True, True, True)),
        ({"city": ["B"], "any": [[1, 2]]}, '{"city":"B","any":1}', (False, False, False)),
        ({"city": ["B"], "any": [[1, 2]]}, '{"city":"B","any":[1]}', (False, False, False)),
        ({"city": ["B"], "any": ["xy"]}, '{"city":"B","any":["x","y"]}', (False, False, False)),
        ({"city": ["B"], "any": [True]}, '{"city":"B","any":1}', (False, False, False)),
    ],
)
def test_acceptable_values(accept, reply, expected):
    assert exact(toolcall('{"city":"B"}', call(reply), parameters=SCHEMA, accept=accept)) == expected


@pytest.mark.parametrize(
    ("value", "accepted"),
    [
        ('{"x":1,"y":"a"}', True),
        ('{"x":2,"y":"a"}', True),
        ('{"x":1}', True),  # y may be left out
        ('{"x":3,"y":"a"}', False),
        ('{"y":"a"}', False),
        ('{"x":1,"y":"b"}', False),
        ('{"x":1,"z":1}', False),
        ('{"x":true}', False),
        ("{}", False),
        ("1", False),
    ],
)
def test_a_nested_dict_has_lists_of_acceptable_leaves(value, accepted):
    accept = {"any": [{"x": [1, 2], "y": ["a", ""]}]}
    scored = toolcall('{"any":{"x":1}}', call(f'{{"any":{value}}}'), accept=accept)
    assert scored.schema.exact == scored.lenient.exact == accepted
    listed = toolcall('{"any":[{"x":1}]}', call(f'{{"any":[{value}]}}'), accept={"any": [accept["any"]]})
    assert listed.schema.exact == accepted


def test_a_nested_dict_of_plain_values_accepts_them_alone():
    accept = {"any": [{"x": 1}]}
    assert toolcall('{"any":{"x":9}}', call('{"any":{"x":1}}'), accept=accept).schema.exact
    assert not toolcall('{"any":{"x":9}}', call('{"any":{"x":2}}'), accept=accept).schema.exact


def test_a_toolcall_whose_arguments_look_like_a_structured_row():
    gold, accept = '{"tool_name":"x","arguments":{"a":1}}', {"tool_name": ["x", "y"], "a": [2]}
    assert not toolcall(gold, call('{"tool_name":"x","arguments":{"a":2}}'), accept=accept).schema.exact
    assert toolcall(gold, call('{"tool_name":"y","arguments":{"a":1}}'), accept=accept).schema.exact


@pytest.mark.parametrize(
    ("reply", "lenient"),
    [
        (f"Sure: {ONE} Done.", True),
        (f"```\n{ONE}\n```", True),
        ("<TOOL_CALL Name = 'F' >{\"a\":1} </Tool_Call >", True),
        (call('{"a":1}', " f "), True),
        (call('{"a":1}', "F"), True),
        (call("{...}") + ONE, True),
        (ONE * 2, False),
        (call('{"a":1}', "g"), False),
        ('<tool_call name="f">{"a":1}', False),
        ('{"a":1}', False),
        ('<tool_call name="f" arguments={"a":1} />', False),
        (call("[1]"), False),
    ],
)
def test_lenient_toolcalls(reply, lenient):
    scored = toolcall('{"a":1}', reply)
    assert exact(scored) == (False, False, lenient) and scored.error


def test_a_call_inside_a_call_s_string_is_no_second_call():
    body = '{"a":"<tool_call name=\'g\'>{}</tool_call>"}'
    assert toolcall(body, f"Sure: {call(body)}").lenient.exact
    assert not toolcall("{}", f'Sure: <tool_call name="f">{body}').lenient.valid


@pytest.mark.parametrize(
    ("reply", "lenient"),
    [
        ('Here it is: {"a":1}.', True),
        ('```json\n{"a":1}\n```', True),
        ('[{"a":1}]', True),
        ('{a} is {"a":1}', True),
        ('{"a":1}{"a":1}', False),
        ('{"b":{"a":1}, c}', False),  # what stands inside a broken object is no reply
        ('{"b":{"a":1},', False),
    ],
)
def test_lenient_structured(reply, lenient):
    assert exact(structured('{"a":1}', reply)) == (False, False, lenient)


# -- What holds for any JSON -----------------------------------------------------------------------------------------------------

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"), max_size=8)
    | st.sampled_from(["", "a", "A ", "1", "true", "</tool_call>", "{"])
)
keys = st.sampled_from(["city", "days", "rate", "metric", "code", "tags", "any", "a", "b"])
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=8)
objects = st.dictionaries(keys, values, max_size=4)
replies = (
    objects.map(json.dumps)
    | values.map(json.dumps)
    | st.text(max_size=20)
    | st.text('{}[]":,\\\n <>/ae1', max_size=30)
    | st.builds(lambda value, cut: json.dumps(value)[:cut], objects, st.integers(0, 40))
    | st.builds(lambda value, text: f"{text}{json.dumps(value)}{text}", objects, st.sampled_from(["", " ", "x", "```", "{", "}"]))
)
accepts = st.none() | st.dictionaries(keys, st.lists(values, max_size=3), max_size=3)


def equal(left, right):
    """Equality of JSON values as the standard library reads them, written down a second time."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(equal, left, right))
    numbers = (int, float)
    return left == right and (type(left) is type(right) or (isinstance(left, numbers) and isinstance(right, numbers)))


def shuffled(value, rng):
    """The value with its keys in another order."""
    if isinstance(value, dict):
        return {key: shuffled(value[key], rng) for key in rng.sample(sorted(value), len(value))}
    return [shuffled(child, rng) for child in value] if isinstance(value, list) else value


@quick
@given(values, values)
def test_leaves_are_equal_exactly_where_the_values_are(left, right):
    read = parse_json(json.dumps(left)), parse_json(json.dumps(right))
    assert same(*read) == (leaves(read[0]) == leaves(read[1])) == equal(left, right)
    assert same(read[0], parse_json(json.dumps(left))) and leaves(read[0]) == leaves(left)
    assert size(read[0]) == len(leaves(left))


@pytest.mark.parametrize(
    ("text", "count"), [("{}", 1), ("[]", 1), ("0", 1), ("null", 1), ("[[],{}]", 2), ('{"a":{"b":[1,2]},"c":0}', 3)]
)
def test_size(text, count):
    assert size(parse_json(text)) == len(leaves(parse_json(text))) == count


@quick
@given(objects, st.none() | st.just(SCHEMA), accepts)
def test_a_reference_against_itself_is_exact(gold, schema, accept):
    text = json.dumps(gold)
    for scored in (
        structured(text, text, schema=schema, accept=accept),
        toolcall(text, call(text), parameters=schema, accept=accept),
    ):
        assert exact(scored) == (True, True, True) and scored.error is None
        assert all(match.precision == match.recall == match.f1 == 1 for match in scored[:3])


@quick
@given(objects, objects, st.randoms(use_true_random=False), accepts)
def test_the_order_of_keys_changes_nothing(gold, reply, rng, accept):
    before = structured(json.dumps(gold), json.dumps(reply), schema=SCHEMA, accept=accept)
    after = structured(json.dumps(shuffled(gold, rng)), json.dumps(shuffled(reply, rng)), schema=SCHEMA, accept=accept)
    assert before == after


def near(gold, rng):
    """Another object that one of the matchers may take for the same."""
    made = {}
    for key, value in gold.items():
        turn = rng.randrange(5)
        if turn == 0 and isinstance(value, str):
            value = f" {value.swapcase()}"
        elif turn == 1 and not isinstance(value, (str, list, dict)):
            value = json.dumps(value)
        elif turn == 2:
            continue
        made[key] = value
    return made | ({"days": 3} if rng.random() < 0.5 else {})


@quick
@given(objects, replies, st.none() | st.just(SCHEMA), accepts, st.sampled_from(["stop", "length"]), st.integers(0, 2**32))
def test_matchers_are_ordered_and_scores_are_bounded(gold, reply, schema, accept, finish_reason, seed):
    rng = random.Random(seed)
    reply = json.dumps(near(gold, rng)) if rng.random() < 0.5 else reply
    tries = [structured(json.dumps(gold), reply, finish_reason, schema=schema, accept=accept)]
    for text in (reply, call(reply), f"Sure: {call(reply, 'F')}"):
        tries.append(toolcall(json.dumps(gold), text, finish_reason, parameters=schema, accept=accept))
    for scored in tries:
        strict, as_schema, lenient = scored[:3]
        assert strict.exact <= as_schema.exact <= lenient.exact
        assert strict.valid == as_schema.valid <= lenient.valid and strict.name == as_schema.name <= lenient.name
        assert (scored.error is None) == strict.exact and scored.error in (None, *ERRORS)
        for match in scored[:3]:
            assert match.exact <= match.name <= match.valid
            assert all(0 <= value <= 1 for value in (match.precision, match.recall, match.f1))
            assert match.exact == (match.precision == match.recall == match.f1 == 1)


def harmonic(match):
    total = match.precision + match.recall
    return 2 * match.precision * match.recall / total if total else 0


@quick
@given(objects, objects)
def test_f1_is_the_harmonic_mean(gold, reply):
    match = structured(json.dumps(gold), json.dumps(reply)).strict
    assert match.f1 == pytest.approx(harmonic(match))


@quick
@given(st.text(string.printable) | replies)
def test_any_text_is_a_reply_or_has_an_error(text):
    for parse in (parse_structured, parse_toolcall):
        for lenient in (False, True):
            try:
                assert isinstance(parse(text, lenient=lenient).value, dict)
            except InvalidReply as invalid:
                assert invalid.error in ("no_json", "bad_json", "extra_text", "wrong_shape") and str(invalid)


@quick
@given(objects.filter(bool), st.text(st.characters(codec="utf-8", exclude_characters="{}"), min_size=1, max_size=10))
def test_text_around_a_reply_is_extra_text_and_nothing_to_the_lenient_matcher(gold, text):
    if not text.strip():
        return
    body = json.dumps(gold)
    for around in (f"{text}{body}", f"{body}{text}"):
        scored = structured(body, around)
        assert scored.error == "extra_text" and exact(scored) == (False, False, True)
    for around in (f"{text}{call(body)}", f"{call(body)}{text}"):
        scored = toolcall(body, around)
        assert scored.error == "extra_text" and exact(scored) == (False, False, True)
