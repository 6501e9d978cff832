"""Rows that want several calls, one, or none: known answers, and properties of the one-to-one matching."""

import json
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_swap.common.errors import UserError
from slm_swap.rows.examples import parse_example
from slm_swap.scoring.metrics import MATCHERS
from slm_swap.scoring.several import Calls
from slm_swap.scoring.tracks import TRACKS

TOOLCALL, STRUCTURED = TRACKS["toolcall"], TRACKS["structured"]
NUMBER = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string", "default": "x"}}}
TOOLS = [{"name": name, "description": "", "parameters": NUMBER} for name in ("f", "g")]


def due(*calls, **fields):
    wanted = [{"name": name, "arguments": arguments} for name, arguments in calls]
    row = {"messages": [{"role": "user", "content": "do"}], "tools": TOOLS, "calls": wanted} | fields
    return TOOLCALL.reference(parse_example(row, "rows.jsonl:1"))


def made(*calls):
    return [{"name": name, "arguments": json.dumps(arguments)} for name, arguments in calls]


def text(*calls):
    return "\n".join(f'<tool_call name="{name}">{json.dumps(arguments)}</tool_call>' for name, arguments in calls)


def both(gold, *calls, said=""):
    """The scores of the same calls in both forms, which must be equal."""
    native, written = TOOLCALL.score(gold, said, "stop", made(*calls)), TOOLCALL.score(gold, text(*calls) or said)
    assert native == written
    return native


F1, F2, G1 = ("f", {"a": 1}), ("f", {"a": 2}), ("g", {"a": 1})


def test_calls_in_any_order_are_right():
    for order in permutations([F1, F2, G1]):
        scored = both(due(F1, F2, G1), *order)
        assert scored.error is None and scored.strict.exact and scored.strict.f1 == 1 and scored.strict.decided


def test_no_call_where_none_is_due():
    right = both(due(), said="Sure, we open at nine.")
    assert right.error is None and right.strict[:3] == (True, True, True) and right.strict.f1 == 1
    assert (right.strict.due, right.strict.decided) == (False, True)


def test_a_call_where_none_is_due():
    wrong = both(due(), F1)
    assert wrong.error == "unwanted_call" and wrong.strict.valid and not wrong.strict.exact and wrong.strict.f1 == 0
    assert (wrong.strict.due, wrong.strict.decided) == (False, False)


def test_no_call_where_one_is_due():
    missed = both(due(F1), said="Which size?")
    assert missed.error == "no_call" and not missed.strict.valid and (missed.strict.recall, missed.strict.decided) == (0, False)


def test_too_few_and_too_many_calls():
    few, many = both(due(F1, G1), F1), both(due(F1), F1, G1)
    assert (few.error, many.error) == ("missing_call", "extra_call")
    assert (few.strict.precision, few.strict.recall, few.strict.name, few.strict.exact) == (1, 0.5, False, False)
    assert (many.strict.precision, many.strict.recall, many.strict.name, many.strict.exact) == (0.5, 1, False, False)


def test_the_same_call_twice_is_due_twice():
    assert both(due(F1, F1), F1, F1).error is None
    assert both(due(F1, F1), F1, F2).error == "wrong_value"


def test_the_tools_and_then_the_arguments():
    assert both(due(F1, F2), F1, G1).error == "wrong_tool"
    scored = both(due(F1, G1), ("g", {"a": 3}), F1)
    assert scored.error == "wrong_value" and scored.strict.name and scored.strict.matched == 1
    assert both(due(F1, G1), F1, ("g", {})).error == "missing_argument"


def test_looser_matchers_pair_for_themselves():
    scored = both(due(F1, F2), ("f", {"a": "2"}), ("f", {"a": 1, "b": "x"}))
    assert not scored.strict.exact and scored.schema.exact and scored.lenient.exact and scored.error == "extra_argument"


def test_an_exact_pair_goes_before_many_equal_leaves():
    long = ("f", {"a": 1, "b": "y"})
    scored = both(due(F1, long), long, ("f", {"a": 1, "b": "z"}))
    assert scored.strict.matched == 3  # `long` with itself, though the other order has as many calls of the right tool


def test_accept_is_of_each_call_or_of_all():
    gold = due(F1, G1, accept=[{"a": [1, 5]}, {}])
    assert both(gold, ("f", {"a": 5}), G1).error is None and both(gold, F1, ("g", {"a": 5})).error == "wrong_value"
    assert both(due(F1, G1, accept={"a": [1, 5]}), ("f", {"a": 5}), ("g", {"a": 5})).error is None


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        ("", "no_json"),
        ("  \n", "no_json"),
        ('{"a": 1}', "wrong_shape"),
        ("Let me see. " + text(F1), "extra_text"),
        (text(F1) + " Done.", "extra_text"),
        ('<tool_call name="f">{"a":}</tool_call>', "bad_json"),
        ('<tool_call name="f">{"a":1,"a":1}</tool_call>', "bad_json"),
        ('<tool_call name="f">[1]</tool_call>', "wrong_shape"),
        ('<tool_call name="f">{"a":1}', "wrong_shape"),
        ("<tool_call>{}</tool_call>", "wrong_shape"),
    ],
)
def test_texts_that_are_no_reply(reply, error):
    scored = TOOLCALL.score(due(F1), reply)
    assert scored.error == error and not scored.strict.valid and not scored.strict.exact
    assert scored.strict.decided == ("tool_call" in reply)
    if "tool_call" in reply or not reply.strip():
        assert TOOLCALL.score(due(), reply).error is not None


def test_text_around_calls_is_forgiven_by_the_lenient_matcher_alone():
    scored = TOOLCALL.score(due(F1, F2), f"Let me see. {text(F2)} and {text(F1)}")
    assert not scored.strict.exact and not scored.schema.exact and scored.lenient.exact


def test_native_calls_may_have_words_beside_them():
    assert TOOLCALL.score(due(F1), "One moment.", "stop", made(F1)).error is None


@pytest.mark.parametrize(("arguments", "error"), [("{", "bad_json"), ('{"a":1,"a":1}', "bad_json"), ("[]", "wrong_shape"), ('{"a":NaN}', "bad_json")])
def test_arguments_that_are_no_object(arguments, error):
    for gold in (due(F1), due(F1, F2), due()):
        scored = TOOLCALL.score(gold, "", "stop", [{"name": "f", "arguments": arguments}])
        assert scored.error == error and not scored.strict.exact


def test_no_arguments_are_an_empty_object():
    assert TOOLCALL.score(due(("f", {})), "", "stop", [{"name": "f", "arguments": ""}]).error is None


@pytest.mark.parametrize(("reason", "error"), [("content_filter", "filtered"), ("refusal", "refused"), ("error", "no_json"), ("prompt_too_long", "prompt_too_long")])
def test_what_is_no_answer_is_never_right(reason, error):
    scored = TOOLCALL.score(due(), "I cannot.", reason, [])
    assert scored.error == error and not scored.lenient.exact and scored.strict.decided is False


def test_a_cut_reply_counts_as_it_stands_once_it_speaks():
    assert TOOLCALL.score(due(), "We open at nine and", "length", []).error is None
    for nothing in ("", "<think>The user wants"):
        assert TOOLCALL.score(due(), nothing, "length", []).error == "truncated"
    assert TOOLCALL.score(due(F1), "We open", "length", []).error == "truncated"
    assert TOOLCALL.score(due(F1), text(F1), "length").error is None


def test_one_call_due_is_scored_as_a_row_with_a_prompt():
    row = {"prompt": "p", "completion": text(F1), "tools": TOOLS}
    alone = TOOLCALL.reference(parse_example(row, "rows.jsonl:1"))
    for reply in (F1, F2, G1, ("f", {}), ("f", {"a": "1"}), ("f", {"a": 1, "b": "x"})):
        old, new = TOOLCALL.score(alone, text(reply)), TOOLCALL.score(due(F1), text(reply))
        assert old.error == new.error and [getattr(old, m)[:6] for m in MATCHERS] == [getattr(new, m)[:6] for m in MATCHERS]
        assert TOOLCALL.score(alone, "", "stop", made(reply)) == old


@pytest.mark.parametrize(
    ("said", "calls", "error"),
    [("Hello", [], "no_json"), (text(F1), [], "wrong_shape"), ("", made(F1, F1), "extra_call"), ("", [{"name": "f", "arguments": "{"}], "bad_json")],
)
def test_native_replies_to_a_row_with_a_prompt(said, calls, error):
    alone = TOOLCALL.reference(parse_example({"prompt": "p", "completion": text(F1), "tools": TOOLS}, "rows.jsonl:1"))
    scored = TOOLCALL.score(alone, said, "stop", calls)
    assert scored.error == error and not scored.lenient.exact


def test_a_json_value_of_any_type():
    def wanted(value):
        return STRUCTURED.reference(parse_example({"messages": [{"role": "user", "content": "u"}], "object": value}, "rows.jsonl:1"))

    array = wanted([{"a": 1}, 2])
    assert STRUCTURED.score(array, '[{"a": 1.0}, 2]').error is None
    assert STRUCTURED.score(array, '{"a": 1}').error == "wrong_shape" and STRUCTURED.score(array, "[1").error == "bad_json"
    fenced = STRUCTURED.score(array, 'Here: [{"a":1},2]')
    assert fenced.error == "extra_text" and fenced.lenient.exact
    assert STRUCTURED.score(array, "[2]").error == "wrong_value" and STRUCTURED.score(wanted("x"), '"x"').error is None
    assert STRUCTURED.score(wanted({"a": 1}), "", "stop", made(F1)).error == "unwanted_call"
    assert STRUCTURED.score(wanted({"a": 1}), '{"a":1}', "stop", []).error is None


def test_an_array_may_be_a_completion():
    gold = STRUCTURED.reference(parse_example({"prompt": "p", "completion": "[1, 2]"}, "rows.jsonl:1"))
    assert STRUCTURED.score(gold, "[1,2]").error is None and STRUCTURED.score(gold, "{}").error == "wrong_shape"


def test_a_row_is_for_one_track():
    with pytest.raises(UserError, match=r"^rows\.jsonl:1: the row wants calls: it is for --track toolcall$"):
        row = {"messages": [{"role": "user", "content": "u"}], "calls": []}
        STRUCTURED.reference(parse_example(row, "rows.jsonl:1"))


def test_decision_match_is_a_metric_where_the_rows_have_both():
    call, none = both(due(F1), F1).strict, both(due(), said="no").strict
    unwanted = both(due(), F1).strict
    metrics = TOOLCALL.summarize([call, none, none, unwanted])
    assert metrics["decision_match_rate"] == 0.75 == metrics["args_exact_rate"]
    assert list(metrics)[:4] == ["valid_call_rate", "decision_match_rate", "name_match_rate", "args_exact_rate"]
    for rows in ([call], [none, unwanted]):
        assert "decision_match_rate" not in TOOLCALL.summarize(rows)
    track = TOOLCALL.with_metrics(metrics)
    assert "decision_match_rate" in track.gate and track.row_names["decision_match_rate"] == "decision_match"
    assert TOOLCALL.for_gold([due(F1), due()]) == track and TOOLCALL.for_gold([due(F1)]) == TOOLCALL


@given(st.lists(st.tuples(st.sampled_from("fg"), st.dictionaries(st.sampled_from("ab"), st.integers(0, 3))), max_size=4), st.randoms())
def test_gold_in_any_order_is_right_and_nothing_else_is_more(calls, random):
    gold, shuffled = due(*calls), random.sample(calls, len(calls))
    scored = both(gold, *shuffled, said="no")
    assert scored.error is None and all(getattr(scored, matcher).exact for matcher in MATCHERS)
    assert isinstance(gold, Calls) and scored.strict.matched == scored.strict.expected == scored.strict.predicted


@given(
    st.lists(st.tuples(st.sampled_from("fg"), st.dictionaries(st.sampled_from("ab"), st.integers(0, 2))), max_size=3),
    st.lists(st.tuples(st.sampled_from("fg"), st.dictionaries(st.sampled_from("ab"), st.integers(0, 2))), max_size=3),
)
def test_scores_are_shares_and_exact_means_equal(gold, reply):
    scored = both(due(*gold), *reply, said="no")
    for match in (getattr(scored, matcher) for matcher in MATCHERS):
        assert 0 <= match.matched <= min(match.predicted, match.expected) or not match.predicted
        assert match.exact <= match.name and match.exact == (match.exact and match.f1 == 1)
    key = lambda calls: sorted(json.dumps(call, sort_keys=True) for call in calls)  # noqa: E731
    assert scored.strict.exact == (key(gold) == key(reply)) == (scored.error is None)


@pytest.mark.parametrize(
    "written",
    [
        '{"name": "f", "arguments": {"a": 1}}',
        '```json\n{"name": "f", "parameters": {}}\n```',
        '{"type": "function", "function": {"name": "f", "arguments": "{}"}}',
        '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>',
        '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}]',
        'functools[{"name": "f", "arguments": {"a": 1}}]',
        '<|tool_call|>[{"name": "f", "arguments": {"a": 1}}]<|/tool_call|>',
        '<function=f>{"a": 1}</function>',
        "[f(a=1)]",
        '{"name": "f", "arguments": {"a": ',
    ],
)
def test_a_call_in_another_form_is_no_answer_where_none_is_due(written):
    """A server that reads no calls leaves them in the text: on such rows it would be right every time."""
    for calls in (None, []):
        scored = TOOLCALL.score(due(), written, "stop", calls)
        assert scored.error and not (scored.strict.exact or scored.lenient.exact or scored.strict.decided)
        assert not TOOLCALL.score(due(F1), written, "stop", calls).strict.exact


@pytest.mark.parametrize("said", ["Your name and the arguments are noted (a=1).", '{"name": "Ana"}', "The function f(x) = 2x grows.", "[]", "Ok."])
def test_words_are_no_call(said):
    assert both(due(), said=said).error is None


def test_no_number_depends_on_the_order_of_calls():
    gold = due(("f", {}), ("f", {"b": True, "c": [1]}), ("f", {}))
    one, two = ("f", {"c": None}), ("f", {})
    assert both(gold, one, two) == both(gold, two, one)


@pytest.mark.parametrize("said", ['```json\n{"a": 1}\n```', 'Here: {"a": 1}', '{"a": "1"}', '{"a": 2}', "no"])
def test_a_json_value_scores_alike_in_both_forms(said):
    row = {"messages": [{"role": "user", "content": "do"}], "object": {"a": 1}, "schema": NUMBER}
    gold = STRUCTURED.reference(parse_example(row, "rows.jsonl:1"))
    assert STRUCTURED.score(gold, said, "stop", []) == STRUCTURED.score(gold, said)
