"""Grammars of replies: all that training writes is in them, and nothing that is no reply."""

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_swap.clients.endings import reply_ends
from slm_swap.clients.engines.masks import Grammars
from slm_swap.clients.grammar import Frame, NoGrammar, grammar_of
from slm_swap.clients.loading import load_tokenizer
from slm_swap.clients.reply_forms import row_grammar
from slm_swap.common.settings import PACKAGE, ROOT
from slm_swap.rows.examples import Example, parse_example, read_examples
from slm_swap.rows.json_schema import violations
from slm_swap.rows.lines import dump_json
from slm_swap.rows.prompts import Wanted, request_of

SHARED = ROOT.parent / "shared" / "data"
WEATHER = {"name": "get_weather", "description": "", "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}}
STOCK = {"name": "check_stock", "description": "", "parameters": {"type": "object", "properties": {"item": {"enum": ["oak table", "chair"]}}}}
CALL = '<tool_call name="get_weather">{"city":"Rome"}</tool_call>'


@cache
def tokenizer():
    return load_tokenizer(PACKAGE / "models/phi-tiny")


@cache
def grammars() -> Grammars:
    return Grammars(tokenizer())


def takes(grammar: str, text: str) -> bool:
    """Whether a grammar takes a whole text, by the tokens that the tokenizer makes of it."""
    assert grammars().why_not(grammar) is None, grammar
    matcher, tokens = grammars().matcher(grammar), tokenizer()(text, add_special_tokens=False)["input_ids"]
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def of_row(track: str, example: Example) -> str:
    return row_grammar(tokenizer(), request_of(track, example), reply_ends(tokenizer()), grammars().special)


def of_schema(schema, form: str = "value") -> str:
    return grammar_of(Wanted(form, schema=schema), Frame())


def of_calls(form: str, *tools, **more) -> str:
    return grammar_of(Wanted(form, list(tools), **more), Frame())


# -- Gold ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Path:
    """The sample as prepare_data.py writes it."""
    from tests.support.scripts import load_script

    folder = tmp_path_factory.mktemp("sample")
    flags = ["--source", "xlam", "--dataset-path", str(PACKAGE / "02_dataset/sample/xlam_sample.jsonl"), "--train-size", "0", "--val-size", "0"]
    assert load_script("02_dataset/prepare_data.py").main([*flags, "--test-size", "150", "--out-dir", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("track", ["structured", "toolcall"])
def test_every_gold_reply_of_the_sample_is_in_its_grammar(sample, track):
    rows = read_examples(sample / track / "test.jsonl")
    assert len(rows) > 100
    said = [row for row in rows if row.completion]
    assert [row.completion for row in said if not takes(of_row(track, replace(row, ask="text")), row.completion)] == []


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize("track", ["structured", "toolcall"])
def test_rows_that_others_wrote_keep_their_own_spaces_and_escapes(track):
    rows = read_examples(SHARED / f"recorded/xlam_{track}_rows.jsonl", 100)
    assert [row.completion for row in rows if not takes(of_row(track, row), row.completion)] == []


@pytest.mark.parametrize("name", ["openai_chat", "anthropic", "hermes", "tau"])
def test_replies_of_imported_conversations_are_in_their_grammars(name, tmp_path):
    from tests.support.scripts import load_script

    found = next((ROOT / "tests/data").glob(f"{name}.json*"))
    assert load_script("02_dataset/prepare_data.py").main(["--source", "chat", "--dataset-path", str(found), "--out-dir", str(tmp_path)]) == 0
    rows = [row for path in tmp_path.glob("toolcall/*.jsonl") for row in read_examples(path)]
    assert len(rows) >= 10
    for row in rows:
        if row.completion:
            assert takes(of_row("toolcall", replace(row, ask="text")), row.completion), row.completion


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
KEYS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x7f"), min_size=1, max_size=5)
SCALARS = [
    ({"type": "string"}, TEXT),
    ({"type": "string", "minLength": 2, "maxLength": 3}, st.text(st.characters(exclude_categories=["Cs"]), min_size=2, max_size=3)),
    ({"type": "string", "pattern": "^[a-c]+$"}, st.from_regex(r"\A[a-c]+\Z")),
    ({"type": "string", "format": "date"}, TEXT),  # which nobody checks
    ({"type": "integer"}, st.integers()),
    ({"type": "integer", "minimum": -3, "exclusiveMaximum": 12}, st.integers(-3, 11)),
    ({"type": "number"}, st.floats(allow_nan=False, allow_infinity=False)),
    ({"type": "boolean"}, st.booleans()),
    ({"type": ["integer", "null"]}, st.none() | st.integers()),
    ({"enum": ["a", "ab", 1, 12, None, {"b": [1]}]}, st.sampled_from(["a", "ab", 1, 12, None, {"b": [1]}])),
    ({"const": "é\n\"/\x01"}, st.just("é\n\"/\x01")),
    ({}, st.recursive(st.none() | st.booleans() | st.integers() | TEXT, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2))),
]  # fmt: skip


@st.composite
def schemas(draw, depth: int = 2):
    """(a schema, a strategy of values that it allows)"""
    kind = draw(st.sampled_from(["scalar", "object", "array", "map", "anyOf", "allOf", "prefix"] if depth else ["scalar"]))
    if kind == "scalar":
        return draw(st.sampled_from(SCALARS))
    if kind == "object":
        inner = {key: draw(schemas(depth - 1)) for key in draw(st.lists(KEYS, max_size=4, unique=True))}
        required = [key for key in inner if draw(st.booleans())]
        schema = {"type": "object", "properties": {key: part for key, (part, _) in inner.items()}, "required": required}
        optional = {key: values for key, (_, values) in inner.items() if key not in required}
        made = st.fixed_dictionaries({key: inner[key][1] for key in required}, optional=optional)
        return schema, made.flatmap(lambda value: st.permutations(list(value.items())).map(dict))
    part, values = draw(schemas(depth - 1))
    if kind == "array":
        least = draw(st.integers(0, 2))
        return {"type": "array", "items": part, "minItems": least, "maxItems": least + 2}, st.lists(values, min_size=least, max_size=least + 2)
    if kind == "map":
        return {"type": "object", "additionalProperties": part}, st.dictionaries(KEYS, values, max_size=3)
    if kind == "prefix":
        other, others = draw(schemas(depth - 1))
        return {"type": "array", "prefixItems": [part, other], "items": False}, st.tuples(values, others).map(list) | st.lists(values, max_size=1)
    if kind == "allOf":
        return {"allOf": [part, {"description": "said twice"}]}, values
    other, others = draw(schemas(depth - 1))
    return {"anyOf": [part, other]}, values | others


@settings(max_examples=150)
@given(schemas(), st.data())
def test_what_a_schema_allows_is_in_its_grammar(made, data):
    schema, values = made
    value = data.draw(values)
    assert violations(value, schema) == []
    assert takes(of_schema(schema), dump_json(value))


# -- What is no reply ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, right",
    [
        (CALL, True),
        ('<tool_call name="get_weather">{"days":2,"city":"Rome"}</tool_call>', True),  # in any order
        ('<tool_call name="get_weather">{"city":"\\u001f\\n\\"/é"}</tool_call>', True),
        ('<tool_call name="check_stock">{}</tool_call>', True),
        ('<tool_call name="get_weather">{"city": "Rome"}</tool_call>', False),  # another white space
        ('<tool_call name="get_weather"> {"city":"Rome"}</tool_call>', False),
        (CALL + "\n", False),
        ('<tool_call name="get_weather">{"city":"\\/"}</tool_call>', False),  # other escapes
        ('<tool_call name="get_weather">{"city":"\\u00e9"}</tool_call>', False),
        ('<tool_call name="get_weather">{"city":"\\u001F"}</tool_call>', False),
        ('<tool_call name="get_time">{"city":"Rome"}</tool_call>', False),  # not on offer
        ('<tool_call name="get_weather">{}</tool_call>', False),  # a required argument
        ('<tool_call name="get_weather">{"city":"Rome","city":"Rome"}</tool_call>', False),  # twice
        ('<tool_call name="get_weather">{"city":"Rome","unit":"C"}</tool_call>', False),  # not listed
        ('<tool_call name="get_weather">{"city":"Rome","days":"2"}</tool_call>', False),
        ('<tool_call name="check_stock">{"item":"table"}</tool_call>', False),
        (f"{CALL}\n{CALL}", False),
        ("It is sunny.", False),
    ],
)
def test_one_call(text, right):
    assert takes(of_calls("call", WEATHER, STOCK), text) is right


@pytest.mark.parametrize(
    "text, more, right",
    [
        (CALL, {}, True),
        (f"{CALL}\n{CALL}", {}, True),
        (f"{CALL}\n{CALL}", {"several": False}, False),
        (CALL + CALL, {}, False),
        ("It is <b>sunny</b>: {}", {}, True),
        (" ", {}, False),
        (f"Here: {CALL}", {}, False),
        ("Here: <TOOL_CALL>", {}, False),
        ("It is sunny.", {"choice": "required"}, False),
        (CALL, {"choice": "required"}, True),
        ("It is sunny.", {"choice": "none"}, True),
        (CALL, {"choice": "none"}, False),
    ],
)
def test_any_number_of_calls_or_a_text(text, more, right):
    assert takes(of_calls("calls", WEATHER, STOCK, **more), text) is right


def test_without_known_tools_the_form_alone_is_kept():
    grammar = of_calls("call")
    assert takes(grammar, '<tool_call name="any">{"a":[1,{"b":null}]}</tool_call>')
    assert not takes(grammar, '<tool_call name="any">[1]</tool_call>')


@pytest.mark.parametrize(
    "schema, right, wrong",
    [
        ({"$ref": "#/$defs/node", "$defs": {"node": {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}}}},
         ['{"next":{"next":null}}', "{}"], ['{"next":1}', '{"nex":null}']),
        ({"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": True}, ['{"b":"x","a":1}', '{"a":1}'], ['{"a":"x"}']),
        ({"type": "object", "properties": {"a": {}, "b": {}, "c": {}}, "minProperties": 2, "maxProperties": 2}, ['{"c":1,"a":2}'], ['{"a":1}', '{"a":1,"b":1,"c":1}']),
        ({"type": "object", "properties": {"a": {}, "b": {}}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]}, ['{"a":1}', '{"b":1,"a":2}'], ["{}"]),
        ({"allOf": [{"properties": {"a": {"type": "integer"}}, "required": ["a"]}, {"type": "object", "properties": {"a": {"minimum": 3}}}]}, ['{"a":3}'], ['{"a":2}', "{}"]),
        ({"oneOf": [{"type": "string"}, {"type": "integer"}]}, ['"x"', "1"], ["1.5", "null"]),
        ({"oneOf": [{"properties": {"k": {"const": 1}, "x": {"type": "null"}}, "required": ["k"], "type": "object"},
                    {"properties": {"k": {"const": 2}}, "required": ["k"], "type": "object"}]}, ['{"x":null,"k":1}', '{"k":2}'], ['{"k":2,"x":null}', '{"k":3}']),
        ({"type": "string", "nullable": True}, ['"a"', "null"], ["1"]),
        ({"enum": [1, "a"], "type": "string"}, ['"a"'], ["1"]),
        ({"anyOf": [{"enum": [{"b": [1, {}]}, [[], 2]]}, {"type": "object", "properties": {"a": {}}}]}, ['{"b":[1,{}]}', "[[],2]", '{"a":null}'], ['{"b":[1]}', "[[]]"]),
        ({"type": "array", "items": [{"type": "integer"}], "additionalItems": {"type": "string"}}, ["[]", "[1]", '[1,"a","b"]'], ['["a"]', "[1,2]"]),
        ({"type": "integer"}, ["5", "-12", "5.0"], ["5.5", "05", "+5", "NaN"]),
        ({"type": "object", "properties": {"a": False, "b": {}}}, ['{"b":1}'], ['{"a":1}']),
    ],
)  # fmt: skip
def test_schemas(schema, right, wrong):
    grammar = of_schema(schema)
    assert [text for text in right if not takes(grammar, text)] == []
    assert [text for text in wrong if takes(grammar, text)] == []


@pytest.mark.parametrize(
    "schema, reason",
    [
        ({"not": {"type": "string"}}, "`not`"),
        ({"if": {"type": "string"}, "then": {"minLength": 1}}, "`if`"),
        ({"type": "array", "uniqueItems": True}, "`uniqueItems`"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "`oneOf` whose choices overlap"),
        ({"type": "object", "properties": {f"k{n}": {} for n in range(65)}}, "more than 64 properties"),
        ({"$ref": "#"}, "leads to itself"),
        (False, "allows no value"),
        ({"enum": [1], "type": "string"}, "allows no value"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "allows no value"),
        ({"type": "float"}, "a type float"),
    ],
)
def test_schemas_that_no_grammar_says(schema, reason):
    with pytest.raises(NoGrammar, match=reason):
        of_schema(schema)


def test_what_llguidance_does_not_take_is_told():
    why = grammars().why_not(of_schema({"type": "string", "pattern": "^(?=a)"}))
    assert why.startswith("llguidance: look-around") and "\n" not in why


def test_a_grammar_is_compiled_once_for_a_set_of_tools_in_any_order():
    assert of_calls("call", WEATHER, STOCK) == of_calls("call", STOCK, WEATHER)
    made = Grammars(tokenizer())
    for _ in range(3):
        made.matcher(of_calls("call", WEATHER, STOCK))
    assert made.compiled == 1 and made.seconds > 0


def test_every_end_token_stays_in_reach_and_nothing_follows():
    example = parse_example({"prompt": "p", "completion": CALL, "tools": [WEATHER]}, "rows:1")
    ends = sorted(reply_ends(tokenizer()))
    assert len(ends) > 1
    for end in ends:
        matcher = grammars().matcher(of_row("toolcall", example))
        tokens = tokenizer()(CALL, add_special_tokens=False)["input_ids"]
        assert matcher.try_consume_tokens([*tokens[:-1], end]) == len(tokens) - 1, "not in the midst of a reply"
        matcher = grammars().matcher(of_row("toolcall", example))
        assert matcher.try_consume_tokens([*tokens, end]) == len(tokens) + 1
        assert matcher.try_consume_tokens(tokens[:1]) == 0


# -- Special tokens in a row's own texts -----------------------------------------------------------------------------------------


def marked(name: str) -> Example:
    """A row whose tool has a required property of that name, and a value that is a special token."""
    parameters = {"type": "object", "properties": {name: {"type": "integer"}, "role": {"enum": ["<|system|>", "none"]}}, "required": [name]}
    tool = {"name": "set_mark", "description": "", "parameters": parameters}
    reply = f'<tool_call name="set_mark">{dump_json({name: 1, "role": "<|system|>"})}</tool_call>'
    return parse_example({"prompt": "p", "completion": reply, "tools": [tool]}, "rows:1")


@pytest.mark.parametrize("name", ["<|user|>", "a <|user|>b", "<|user|><|assistant|>"])
def test_names_and_values_that_hold_special_tokens_stay_in_reach(name):
    from slm_swap.clients.endings import require_ending
    from slm_swap.tuning.tokens import lesson

    example = marked(name)
    tokens, grammar = lesson(tokenizer(), "toolcall", example, require_ending(tokenizer()))[1], of_row("toolcall", example)
    assert {grammars().special["<|user|>"], grammars().special["<|system|>"]} < set(tokens), "as they are taught"
    assert grammars().why_not(grammar) is None
    assert grammars().matcher(grammar).try_consume_tokens(tokens) == len(tokens)
    spelled = [token for part in re.split(r"(?<=<\|)", example.completion) for token in tokenizer()(part, add_special_tokens=False)["input_ids"]]
    assert not set(spelled) & set(grammars().special.values())
    assert grammars().matcher(grammar).try_consume_tokens(spelled) == len(spelled), "and may be spelled"
    other = tokenizer()(example.completion.replace("<|user|>", "<|assistant|>", 1), add_special_tokens=False)["input_ids"]
    assert grammars().matcher(grammar).try_consume_tokens(other) < len(other)


def test_a_name_that_holds_an_end_is_spelled_as_the_end_would_end_the_reply():
    example = marked("a<|end|>")
    grammar, special = of_row("toolcall", example), grammars().special["<|end|>"]
    begun = tokenizer()('<tool_call name="set_mark">{"a', add_special_tokens=False)["input_ids"]
    assert grammars().matcher(grammar).try_consume_tokens([*begun, special]) == len(begun)
    spelled = [token for part in re.split(r"(?<=<\|)", example.completion) for token in tokenizer()(part, add_special_tokens=False)["input_ids"]]
    assert grammars().matcher(grammar).try_consume_tokens(spelled) == len(spelled)


@pytest.mark.parametrize("extra", [[], [3], ["<|user|>", [1], {"a": "v1"}, None]])
def test_thousands_of_listed_values_are_decoded_to_the_end(extra):
    values = [*extra, *(f'V\u00e4lue "{number}"/' for number in range(2500))]
    grammar = grammar_of(Wanted("value", schema={"enum": values}), Frame(special=grammars().special))
    assert all(takes(grammar, dump_json(value)) for value in (*extra, values[-2500], values[-1]))
    assert not any(takes(grammar, dump_json(value)) for value in ("V\u00e4lue", 'V\u00e4lue "2500"/', 4, [2]))


def test_thousands_of_listed_lists_have_no_grammar():
    with pytest.raises(NoGrammar, match="listed values"):
        of_schema({"enum": [[number] for number in range(2500)]})


@pytest.mark.parametrize("broken", ["string", 3, ["string"], {"type": [["string"]]}, {"type": [{"type": "string"}]}, {"required": [3]}, {"required": [["a"]]}])
def test_a_broken_schema_within_a_tool_has_no_grammar(broken):
    tool = {"name": "find", "description": "", "parameters": {"type": "object", "properties": {"x": broken}}}
    with pytest.raises(NoGrammar, match="a schema that is none"):
        of_calls("call", tool)
