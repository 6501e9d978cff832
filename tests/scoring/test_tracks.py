"""A track as data: names, means over known rows, and gold that cannot be read."""

import pytest

from slm_swap.common.errors import UserError
from slm_swap.rows.examples import Example
from slm_swap.scoring.metrics import Match
from slm_swap.scoring.tracks import TRACKS

HIT = Match(True, True, True, 2, 2, 2)
HALF = Match(True, True, False, 1, 2, 4)  # precision 1/2, recall 1/4, F1 1/3
WRONG_TOOL = Match(True, False, False, 0, 3, 1)
INVALID = Match(False, False, False, 0, 0, 5)


def test_the_names_are_the_design_s():
    assert set(TRACKS) == {"structured", "toolcall"}
    assert list(TRACKS["structured"].row_metrics(HIT)) == [
        "json_valid", "exact_match", "field_precision", "field_recall", "field_f1",
    ]  # fmt: skip
    assert list(TRACKS["toolcall"].row_metrics(HIT)) == [
        "valid_call", "name_match", "args_exact", "args_precision", "args_recall", "args_f1",
    ]  # fmt: skip
    assert TRACKS["structured"].gate == ("json_valid_rate", "exact_match_rate", "field_precision", "field_recall", "field_f1")
    assert TRACKS["toolcall"].gate == (
        "valid_call_rate", "name_match_rate", "args_exact_rate", "args_precision", "args_recall", "args_f1",
    )  # fmt: skip


def test_row_metrics():
    assert TRACKS["toolcall"].row_metrics(HALF) == {
        "valid_call": 1, "name_match": 1, "args_exact": 0, "args_precision": 1 / 2, "args_recall": 1 / 4, "args_f1": 1 / 3,
    }  # fmt: skip
    assert set(TRACKS["toolcall"].row_metrics(INVALID).values()) == {0}
    assert all(type(value) is float for value in TRACKS["structured"].row_metrics(HIT).values())


def test_gate_values_have_the_report_s_names():
    assert TRACKS["toolcall"].gate_values(HALF) == {
        "valid_call_rate": 1, "name_match_rate": 1, "args_exact_rate": 0, "args_precision": 1 / 2, "args_recall": 1 / 4, "args_f1": 1 / 3,
    }  # fmt: skip
    assert tuple(TRACKS["structured"].gate_values(HIT)) == TRACKS["structured"].gate


def test_means_and_pooled_by_hand():
    found = TRACKS["toolcall"].summarize([HIT, HALF, WRONG_TOOL, INVALID])
    assert found == pytest.approx(
        {
            "valid_call_rate": 3 / 4,
            "name_match_rate": 2 / 4,
            "args_exact_rate": 1 / 4,
            "args_precision": (1 + 1 / 2) / 4,
            "args_recall": (1 + 1 / 4) / 4,
            "args_f1": (1 + 1 / 3) / 4,
            # 3 of 7 predicted leaves are right, and 3 of 12 expected ones were found
            "args_precision_micro": 3 / 7,
            "args_recall_micro": 3 / 12,
            "args_f1_micro": 2 * 3 / (7 + 12),
        }
    )
    assert set(TRACKS["toolcall"].gate) <= set(found)


def test_structured_summary():
    found = TRACKS["structured"].summarize(match for match in (HIT, INVALID))
    assert found == pytest.approx(
        {
            "json_valid_rate": 1 / 2, "exact_match_rate": 1 / 2, "field_precision": 1 / 2, "field_recall": 1 / 2,
            "field_f1": 1 / 2,
            "field_precision_micro": 1, "field_recall_micro": 2 / 7, "field_f1_micro": 4 / 9,
        }
    )  # fmt: skip
    assert set(TRACKS["structured"].gate) <= set(found)


def test_nothing_right_and_nothing_at_all():
    assert set(TRACKS["toolcall"].summarize([INVALID, INVALID]).values()) == {0}
    with pytest.raises(ValueError, match="no rows"):
        TRACKS["toolcall"].summarize([])


@pytest.mark.parametrize(
    ("track", "completion", "error"),
    [
        ("structured", "no JSON", "no_json"),
        ("structured", '{"a":', "bad_json"),
        ("structured", '{"a":1,"a":2}', "bad_json"),
        ("structured", '{"a":NaN}', "bad_json"),
        ("structured", '```\n{"a":1}\n```', "extra_text"),
        ("structured", "1", "wrong_shape"),
        ("toolcall", '{"a":1}', "wrong_shape"),
        ("toolcall", '<tool_call name="f">{"a":}</tool_call>', "bad_json"),
        ("toolcall", 'Sure: <tool_call name="f">{"a":1}</tool_call>', "extra_text"),
    ],
)
def test_bad_gold_is_the_user_s_to_mend(track, completion, error):
    with pytest.raises(UserError, match=f"^rows.jsonl:7: the completion is not a {track} reply.*{error}") as raised:
        TRACKS[track].reference(Example("p", completion, where="rows.jsonl:7"))
    assert "\n" not in str(raised.value)


def test_the_schema_of_a_reference():
    call = '<tool_call name="f">{}</tool_call>'
    tools = [{"name": "g", "parameters": {"x": 1}}, {"name": "f", "parameters": {"y": 1}}, "odd"]
    assert TRACKS["toolcall"].reference(Example("p", call, tools=tools)).schema == {"y": 1}
    assert TRACKS["toolcall"].reference(Example("p", call, tools=tools[:1])).schema is None
    assert TRACKS["toolcall"].reference(Example("p", call)).schema is None
    assert TRACKS["structured"].reference(Example("p", "{}", schema={"z": 1})).schema == {"z": 1}
