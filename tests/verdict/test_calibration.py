"""From the rows of two evaluations to the rules of a cascade, and the file that they are kept in."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_swap.common.errors import UserError
from slm_swap.rows.examples import Example
from slm_swap.scoring.tracks import TRACKS
from slm_swap.verdict.calibration import (
    Reply,
    Target,
    calibrate,
    choose_signal,
    is_local,
    offered_tools,
    replies,
    same_answer,
    wanted_schemas,
)
from slm_swap.verdict.cascade import (
    IDENTITY,
    Cascade,
    Rule,
    identity_of,
    is_fit,
    kind_of,
    read_cascade,
    schema_hash,
    tool_hash,
    write_cascade,
)
from slm_swap.verdict.evaluations import read_evaluation
from slm_swap.verdict.stats.regret import upper_bound
from tests.support.calibrated import write_pair
from tests.support.evaluated import calls

TOOLCALL, STRUCTURED, TARGET = TRACKS["toolcall"], TRACKS["structured"], Target("regret", 0.02, 0.05)


def reply(unit, value, lost=False, kind="call", fit=True, differs=None, tools=("book",), **signals):
    return Reply(kind, fit, lost, lost if differs is None else differs, unit, {"min_logprob": None, "sum_logprob": value, "tool_logprob": None, "min_margin": None} | signals, tools)


def read_pair(flags):
    return [read_evaluation(path, TOOLCALL, with_rows=True) for path in flags[1::2]]


# -- Rows ------------------------------------------------------------------------------------------------------------------------


def test_what_is_a_loss(tmp_path):
    hosted = ["right", "wrong_value", "failed", "truncated", "filtered"]
    small = ["wrong_value"] * 5 + ["right"] * 5 + ["missing_argument"] * 5 + ["no_json"] * 5 + ["failed"] * 5
    pair = read_pair(write_pair(tmp_path, rows=25, azure=hosted, slm=small))
    rows = replies(*pair, TOOLCALL, "regret")
    assert len(rows) == 20, "a small request that failed says nothing"
    assert [row.lost for row in rows[:5]] == [True, False, True, True, False], "what was not measured of the hosted model counts as right"
    assert not any(row.lost for row in rows[5:]) and [row.fit for row in rows] == [True] * 10 + [False] * 10, "what breaks the schema is never local"
    assert [row.kind for row in rows] == ["call"] * 15 + ["no_call"] * 5
    assert [row.differs for row in rows[:10]] == [True, False, None, None, True, False, True, None, None, True]
    agreed = replies(*pair, TOOLCALL, "agreement")
    assert [row.lost for row in agreed[:10]] == [True, False, True, True, True, False, True, True, True, True], "another answer is a loss even where it is right"


def test_rows_of_a_group_are_one_unit(tmp_path):
    pair = read_pair(write_pair(tmp_path, rows=12, groups=["a", "b", None]))
    rows = replies(*pair, TOOLCALL, "regret")
    assert len({row.unit for row in rows}) == 6 and rows[0].unit == rows[3].unit != rows[1].unit and rows[2].unit != rows[5].unit


def test_answers_are_compared_by_value():
    def row(text, calls=None, finish="stop"):
        return {"reply": text, "calls": calls, "finish_reason": finish}

    assert same_answer("structured", row('{"a": 1, "b": 2.0}'), row('{"b":2,"a":1.0}')) and not same_answer("structured", row('{"a": 1}'), row('{"a": true}'))
    assert same_answer("toolcall", row("Two are left."), row("There are two.")) and not same_answer("toolcall", row("", finish="content_filter"), row("There are two."))
    one, other = ([{"name": name, "arguments": '{"x": 1}'}] for name in ("a", "b"))
    assert same_answer("toolcall", row("", one), row("", one)) and not same_answer("toolcall", row("", one), row("", other))
    assert not same_answer("structured", row("no JSON"), row("no JSON"))


def test_a_tool_that_most_rows_define_otherwise_is_not_calibrated_on(tmp_path):
    examples = calls(6)
    examples[4] = replace(examples[4], tools=[examples[4].tools[0] | {"description": "another"}, examples[4].tools[1]])
    tools, unusual = offered_tools(examples)
    assert tools == {tool["name"]: tool_hash(tool) for tool in examples[0].tools} and unusual == {"row-4"}
    pair = read_pair(write_pair(tmp_path, examples=examples))
    assert [row.fit for row in replies(*pair, TOOLCALL, "regret", unusual)] == [True] * 4 + [False, True]
    assert offered_tools([Example("x", "{}", "1")]) == (None, set())


def test_each_schema_that_rows_want_is_calibrated_on_and_so_is_none():
    one, other = ({"type": "object", "properties": {"a": {"type": kind}}} for kind in ("string", "number"))
    turned = dict(reversed(one.items()))
    examples = [Example("x", "{}", str(at), schema=schema) for at, schema in enumerate((one, turned, other, None))]
    assert wanted_schemas(examples) == [*sorted({schema_hash(one), schema_hash(other)}), None] and schema_hash(one) == schema_hash(turned) != schema_hash(other)
    assert wanted_schemas(examples[:1]) == [schema_hash(one)] and wanted_schemas(examples[3:]) == [None]


# -- Rules -----------------------------------------------------------------------------------------------------------------------


def test_known_rules():
    rows = [reply(at, -float(at)) for at in range(149)]
    found = calibrate(rows, TOOLCALL, TARGET)
    rule = found["rules"]["call"]
    assert (rule["threshold"], rule["units"], rule["local"], rule["losses"]) == (-148.0, 149, 149, 0) and found["share_local"] == 1.0
    assert rule["bound"] == found["regret"]["bound"] == upper_bound(0, 149, 0.05) <= 0.02 and found["more"]["call"] is None
    assert rule["quantiles"] == pytest.approx([-148 + 7.4 * at for at in range(1, 20)]) and found["rules"]["no_call"]["quantiles"] is None
    assert found["rules"]["no_call"]["threshold"] is None and found["rules"]["no_call"]["units"] == 0
    few = calibrate(rows[:148], TOOLCALL, TARGET)
    assert few["share_local"] == 0 and few["rules"]["call"]["threshold"] is None and few["regret"] == {"seen": 0.0, "bound": 0.0}
    assert few["more"]["call"] == {"share": 1.0, "losses": 0, "rows_without_losses": 1, "rows_as_seen": 1}
    some = calibrate([reply(at, -float(at), lost=at in (200, 250, 280)) for at in range(313)], TOOLCALL, TARGET)
    assert some["rules"]["call"]["threshold"] == -279.0 and some["rules"]["call"]["losses"] == 2
    assert some["regret"]["seen"] == 2 / 313 and some["disagreement"]["seen"] == 2 / 280 and some["disagreement"]["units"] == 280
    assert some["per_tool"] == {"book": {"local": 280, "losses": 2, "disagreements": 2}}
    assert some["more"]["call"]["losses"] == 3 and some["more"]["call"]["share"] == 1.0


def test_two_classes_share_alpha_and_have_their_own_thresholds():
    rows = [reply(at, -1.0) for at in range(183)] + [reply(1000 + at, -2.0, kind="no_call") for at in range(183)]
    found = calibrate(rows, TOOLCALL, TARGET)
    assert [(rule["alpha"], rule["threshold"]) for rule in found["rules"].values()] == [(0.025, -1.0), (0.025, -2.0)]
    fewer = calibrate(rows[:-1], TOOLCALL, TARGET)["rules"]
    assert (fewer["call"]["alpha"], fewer["call"]["threshold"], fewer["no_call"]["threshold"]) == (0.05, -1.0, None), "a class that is too small takes no alpha"


def test_a_group_may_be_lost_in_both_classes_so_that_their_bounds_add_up():
    rows = [reply(at, -1.0) for at in range(200)] + [reply(at, -2.0, kind="no_call") for at in range(200)]
    found = calibrate(rows, TOOLCALL, TARGET)
    assert found["units"] == {"by": "group", "count": 200}
    assert found["regret"]["bound"] == pytest.approx(2 * upper_bound(0, 200, 0.025))


def test_one_lost_row_loses_its_unit_once():
    rows = [reply(at // 2, -float(at), lost=at in (0, 1, 5)) for at in range(600)]
    assert calibrate(rows, TOOLCALL, TARGET)["rules"]["call"]["threshold"] is None, "two of 300 units"
    rule = calibrate([*rows, *(reply(300 + at, -700.0) for at in range(13))], TOOLCALL, TARGET)["rules"]["call"]
    assert (rule["units"], rule["local"], rule["losses"], rule["rows_local"]) == (313, 313, 2, 613)


def test_what_is_unfit_or_has_no_signal_counts_and_is_never_local():
    rows = [reply(at, -1.0) for at in range(100)] + [reply(100 + at, -1.0, fit=False) for at in range(30)] + [reply(200 + at, None) for at in range(19)]
    rows = [replace(row, kind="value") for row in rows]
    found = calibrate(rows, STRUCTURED, TARGET)
    rule = found["rules"]["value"]
    assert (rule["units"], rule["local"]) == (149, 100) and found["share_local"] == 100 / 149
    assert [is_local(row, found["rules"]) for row in (rows[0], rows[-1])] == [True, False]


@given(st.lists(st.tuples(st.sampled_from([-3.0, -2.0, -1.0]), st.booleans(), st.booleans()), min_size=150, max_size=200), st.sampled_from([0.05, 0.2, 0.5]))
def test_every_threshold_keeps_its_target_among_the_rows_seen(rows, delta):
    found = calibrate([reply(at, value, lost and fit, fit=fit) for at, (value, lost, fit) in enumerate(rows)], TOOLCALL, Target("regret", delta, 0.05))
    assert found["regret"]["seen"] <= found["regret"]["bound"] <= delta
    wider = calibrate([reply(at, value, lost and fit, fit=fit) for at, (value, lost, fit) in enumerate(rows)], TOOLCALL, Target("regret", min(0.9, 2 * delta), 0.05))
    assert wider["share_local"] >= found["share_local"]


def test_the_signal_is_the_best_on_validation():
    """min_margin tells right from wrong, sum_logprob nothing; the rule on the calibration rows is by the one chosen."""

    def made(count, shift):
        lost = [at % 10 == 0 for at in range(count)]
        return [reply(shift + at, -float(at * 7919 % count), lost[at], min_margin=-float(lost[at])) for at in range(count)]

    validation, rows = made(400, 0), made(400, 10_000)
    assert choose_signal(validation, "call", TARGET, 0.05) == "min_margin"
    found = calibrate(rows, TOOLCALL, TARGET, validation=validation)
    assert found["rules"]["call"]["signal"] == "min_margin" and found["rules"]["call"]["rows_local"] == 360
    assert calibrate(rows, TOOLCALL, TARGET)["rules"]["call"]["signal"] == "sum_logprob"
    assert calibrate(rows, TOOLCALL, TARGET, "min_logprob", validation)["share_local"] == 0
    assert choose_signal(validation[:40], "call", TARGET, 0.05) == "min_margin", "too few to certify anything: by the share seen"
    assert choose_signal([], "call", TARGET, 0.05) == "sum_logprob"


# -- The file --------------------------------------------------------------------------------------------------------------------


IDENTITY_TOLD = identity_of({"files_sha256": ["a"], "engine": "vllm", "precision": "bf16", "path": "models/x"}, "native", None, 512)


@pytest.fixture
def cascade():
    rules = {"call": Rule("sum_logprob", -0.5), "no_call": Rule("min_logprob", None)}
    return Cascade(None, "", "toolcall", rules, IDENTITY_TOLD, None, 0, {})


@pytest.mark.parametrize(
    ("kind", "fit", "confidence", "expected"),
    [
        ("call", True, {"sum_logprob": -0.5}, (True, "local")),
        ("call", True, {"sum_logprob": -0.500001}, (False, "below_threshold")),
        ("call", False, {"sum_logprob": 0.0}, (False, "unfit")),
        ("call", True, {"sum_logprob": None}, (False, "no_confidence")),
        ("call", True, {"sum_logprob": float("nan")}, (False, "no_confidence")),
        ("call", True, None, (False, "no_confidence")),
        ("no_call", True, {"min_logprob": 0.0}, (False, "class_never")),
        ("value", True, {"sum_logprob": 0.0}, (False, "class_never")),
    ],
)
def test_a_reply_is_local_or_why_not(cascade, kind, fit, confidence, expected):
    assert cascade.local(kind, fit, confidence) == expected


def test_another_model_is_named(cascade):
    assert cascade.mismatches(IDENTITY_TOLD) == [] and IDENTITY_TOLD["path"] is None and IDENTITY_TOLD["constrain"] == "off"
    for name in IDENTITY:
        [line] = cascade.mismatches(IDENTITY_TOLD | {name: "another"})
        assert line.startswith(f"{name} is 'another', and ")
    assert identity_of({"engine": "served", "path": "phi"}, None, None, None)["path"] == "phi"


def test_classes_and_fitness():
    call = '<tool_call name="a">{}</tool_call>'
    assert [kind_of("toolcall", text) for text in (call, call * 2, '<tool_call name="a">{', "No.")] == ["call", "call", "call", "no_call"]
    assert [kind_of("toolcall", "", made) for made in ([{"name": "a", "arguments": "{"}], [])] == ["call", "no_call"] and kind_of("structured", "x") == "value"
    assert is_fit("stop", True, True) and is_fit("stop", True, None), "without a schema there is none to break"
    assert not any((is_fit("length", True, True), is_fit("stop", False, False), is_fit("stop", True, False), is_fit("stop", None, None)))


def test_the_order_of_a_definitions_keys_is_nothing():
    one = {"name": "a", "description": "", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}
    assert tool_hash(one) == tool_hash({name: one[name] for name in reversed(one)}) != tool_hash(one | {"description": "b"})


def test_a_cascade_that_was_written_is_read(tmp_path):
    told = calibrate([reply(at, -1.0) for at in range(149)], TOOLCALL, TARGET) | {"identity": IDENTITY_TOLD, "tools": {"book": "ab"}, "prompts": 3}
    write_cascade(tmp_path / "cascade.json", told)
    found = read_cascade(tmp_path / "cascade.json")
    assert found.rules == {"call": Rule("sum_logprob", -1.0), "no_call": Rule("sum_logprob", None)} and found.tools == {"book": "ab"}
    assert found.prompts == 3 and found.told["share_local"] == 1.0 and found.mismatches(IDENTITY_TOLD) == [] and found.schemas is None
    write_cascade(tmp_path / "cascade.json", told | {"schemas": ["ab", None]})
    assert read_cascade(tmp_path / "cascade.json").schemas == {"ab", None}


@pytest.mark.parametrize(
    "change",
    [
        {"stage": "compare"}, {"schema_version": 0}, {"rules": {}}, {"rules": {"call": {"signal": "x", "threshold": 1}, "no_call": {"signal": "sum_logprob", "threshold": None}}},
        {"rules": {kind: {"signal": "sum_logprob", "threshold": "1"} for kind in ("call", "no_call")}}, {"tools": {"a": 1}}, {"tools": []}, {"identity": None}, {"schemas": "ab"}, {"schemas": [1]},
        {"share_local": 2}, {"regret": None}, {"track": "poetry"}, {"guarantee": "none"}, {"prompts": None},
    ],
)  # fmt: skip
def test_what_is_no_cascade_is_refused(tmp_path, change):
    path = tmp_path / "cascade.json"
    write_cascade(path, calibrate([reply(at, -1.0) for at in range(149)], TOOLCALL, TARGET) | {"identity": IDENTITY_TOLD, "tools": None, "prompts": 0})
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match="is no cascade of this version: make it with"):
        read_cascade(path)
