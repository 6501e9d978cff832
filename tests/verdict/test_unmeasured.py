"""A verdict never rests on rows that were not measured, whichever side lacks them."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_swap.clients.pricing import Prices
from slm_swap.scoring.measured import ROOM, unmeasured
from slm_swap.scoring.tracks import TRACKS
from slm_swap.verdict.comparison import examine
from slm_swap.verdict.decision import NEED_MORE_DATA, paired_decision
from slm_swap.verdict.evaluations import read_evaluation
from slm_swap.verdict.judge import Gate
from slm_swap.verdict.unmeasured import guarded
from tests.support.evaluated import AZURE, SLM, calls, replies, write_report

TRACK = TRACKS["toolcall"]


@pytest.fixture
def decide(tmp_path):
    """A function that decides at a margin of 5 points on 240 rows with errors of evaluated.REPLIES in turn."""

    def examined(azure, slm, args=None, **gate):
        examples = calls(240, tools=["book", "hire"])
        sides = {
            name: read_evaluation(write_report(tmp_path / f"{name}.json", examples, replies(examples, errors), model), TRACK, True)
            for name, errors, model in (("azure", azure, AZURE), ("slm", slm, SLM))
        }
        for side in sides.values():
            side.report["args"] = {"max_new_tokens": 256, "dataset": "rows.jsonl", "seed": 42} | (args or {})
        return examine(TRACK, sides, Gate("paired", 0.05, 0.05, **gate), Prices("prices.toml"))

    return examined


# -- Which rows ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "hosted", "small"),
    [
        ({"finish_reason": "stop", "error": "wrong_value"}, None, None),
        ({"finish_reason": "error", "error": "no_json"}, "failed", "failed"),
        ({"finish_reason": "length", "error": None}, None, None),  # whole, and right, when the limit came
        ({"finish_reason": "length", "error": "truncated"}, "truncated", "truncated"),
        ({"finish_reason": "length", "error": "truncated", "cut": {"limit": 256, "reference_tokens": 64}}, "truncated", None),
        ({"finish_reason": "length", "error": "truncated", "cut": {"limit": 255, "reference_tokens": 64}}, "truncated", "truncated"),
        ({"finish_reason": "length", "error": "truncated", "cut": {"limit": 4096, "reference_tokens": 9, "thinking": True}}, "truncated", "truncated"),
        ({"finish_reason": "length", "error": "truncated", "cut": {"limit": None, "reference_tokens": 9}}, "truncated", "truncated"),
        ({"finish_reason": "content_filter", "error": "filtered"}, None, None),
        ({"finish_reason": "prompt_too_long", "error": "prompt_too_long"}, None, None),
    ],
)
def test_which_rows_are_not_measured(row, hosted, small):
    assert (unmeasured(row, hosted=True), unmeasured(row, hosted=False)) == (hosted, small)
    assert ROOM == 4


# -- The verdict -----------------------------------------------------------------------------------------------------------------


def test_a_third_of_the_hosted_replies_cut_by_our_own_limit_is_no_swap(decide):
    """Hosted 0.667, small 0.800 gave SWAP: reasoning had eaten the limit on new tokens, and all else of the hosted model was right."""
    told = decide(["right", "right", "truncated"], ["right"] * 4 + ["wrong_value"])
    assert (told["verdict"], told["withheld"], told["need"], told["failing"]) == (NEED_MORE_DATA, "SWAP", None, [])
    assert told["unmeasured"]["azure"] == {"truncated": 80} and told["unmeasured"]["slm"] == {}
    (command,) = told["unmeasured"]["measure"]
    assert command.startswith("python 01_eval/eval.py --track toolcall --model-kind azure --dataset rows.jsonl --out ")
    assert command.endswith("--again truncated --max-new-tokens 1024")
    assert "Not all of the 240 rows were measured: 80 hosted replies were cut off by --max-new-tokens." in told["sentence"]
    assert any("80 of 240 azure replies were cut off by --max-new-tokens" in text for text in told["warnings"])


@pytest.mark.parametrize("share", [2, 20])
def test_failed_hosted_requests_give_no_swap(decide, share):
    told = decide((["right"] * (share - 1) + ["failed"]), ["right"] * 15 + ["wrong_value"])
    assert (told["verdict"], told["withheld"]) == (NEED_MORE_DATA, "SWAP") and told["unmeasured"]["azure"] == {"failed": 240 // share}
    assert told["unmeasured"]["measure"][0].endswith("--again failed")


def test_a_verdict_that_holds_with_them_against_it_stands(decide):
    swap = decide(["right"] * 79 + ["failed"], ["right"])
    assert (swap["verdict"], swap["withheld"]) == ("SWAP", None) and swap["unmeasured"]["azure"] == {"failed": 3}
    tune = decide(["right"] * 79 + ["truncated"], ["right", "wrong_value"])
    assert (tune["verdict"], tune["withheld"]) == ("FINE_TUNE", None) and tune["failing"]


def test_a_small_model_that_our_limit_cut_is_not_shown_to_be_worse(decide):
    told = decide(["right"], ["right", "truncated"])
    assert (told["verdict"], told["withheld"]) == (NEED_MORE_DATA, "FINE_TUNE") and told["unmeasured"]["slm"] == {"truncated": 120}
    assert "--model-kind slm" in told["unmeasured"]["measure"][0]


def test_all_measured_is_said_by_null(decide):
    told = decide(["right"], ["right", "wrong_value"])
    assert told["unmeasured"] is None and told["withheld"] is None and told["warnings"] == []


def test_filtered_replies_count_and_the_verdict_without_them_is_told(decide):
    told = decide(["right"] * 7 + ["filtered"], ["right"] * 7 + ["wrong_value"])
    assert told["filtered"] == {"azure": 30, "slm": 0, "verdict_without": "SWAP"} and told["verdict"] == "SWAP"
    told = decide(["right"] * 3 + ["filtered"], ["right", "right", "wrong_value", "right"])
    assert told["filtered"]["verdict_without"] == "FINE_TUNE" != told["verdict"]


ERRORS = st.lists(st.sampled_from(["right", "wrong", "failed"]), min_size=40, max_size=120)


@settings(max_examples=60, deadline=None)
@given(ERRORS, st.data())
def test_a_verdict_that_stands_holds_whatever_the_unmeasured_rows_are(hosted, data):
    """Every way to fill in the unmeasured rows that moves all of a side's the same way leaves the verdict as it is."""
    small = data.draw(st.lists(st.sampled_from(["right", "right", "wrong", "failed"]), min_size=len(hosted), max_size=len(hosted)))
    given_rows = {"azure": hosted, "slm": small}
    values = {side: {"exact": [float(error == "right") for error in errors]} for side, errors in given_rows.items()}
    missing = {side: ["failed" if error == "failed" else None for error in errors] for side, errors in given_rows.items()}

    def rule(azure, slm):
        return paired_decision(azure, slm, ["exact"], 0.1, brief=True)

    decision = guarded(values, missing, rule)
    if decision.verdict == NEED_MORE_DATA:
        return
    for filled in itertools.product((0.0, 1.0), repeat=2):
        tried = {
            side: {"exact": [worth if why else value for value, why in zip(values[side]["exact"], missing[side], strict=True)]}
            for side, worth in zip(("azure", "slm"), filled, strict=True)
        }
        assert rule(tried["azure"], tried["slm"]).verdict == decision.verdict


# -- Latency ---------------------------------------------------------------------------------------------------------------------


def speeds(p95, way="loaded"):
    return {"alone": None, "loaded": None, "why": None} | {way: {"rows": 20, "concurrency": 32, "p50": 0.1, "p95": p95}}


@pytest.mark.parametrize(
    ("latency", "limit", "verdict", "passed"),
    [
        (None, None, "SWAP", None),
        (speeds(0.5), None, "SWAP", None),
        (speeds(0.5), 500, "SWAP", True),
        (speeds(0.501), 500, NEED_MORE_DATA, False),
        (speeds(0.4, "alone"), 500, "SWAP", True),
        (None, 500, NEED_MORE_DATA, False),
    ],
)
def test_a_small_model_that_is_too_slow_is_no_swap(tmp_path, latency, limit, verdict, passed):
    examples = calls(240)
    sides = {}
    for name, model in (("azure", AZURE), ("slm", SLM)):
        path = write_report(tmp_path / f"{name}.json", examples, replies(examples, ["right"]), model)
        sides[name] = read_evaluation(path, TRACK, True)
    sides["slm"].report["latency"] = latency
    told = examine(TRACK, sides, Gate("paired", 0.05, 0.05, max_p95_ms=limit), Prices("prices.toml"))
    assert (told["verdict"], told["latency"]["passed"], told["withheld"]) == (verdict, passed, None if verdict == "SWAP" else "SWAP")
    if verdict != "SWAP":
        assert "the limit is 500 ms: serve it faster" in told["sentence"]
