"""The evidence behind a verdict, on real evaluations whose numbers are known."""

import json
import random
import re

import pytest

from slm_swap.clients.pricing import HostedPrices, LocalPrices, Prices
from slm_swap.common.errors import UserError
from slm_swap.common.reports import rows_path
from slm_swap.rows.examples import parse_example
from slm_swap.scoring.metrics import ERRORS
from slm_swap.scoring.tracks import TRACKS
from slm_swap.verdict.comparison import examine, examine_means
from slm_swap.verdict.decision import clusters_if_identical
from slm_swap.verdict.evaluations import QUESTIONS, aligned, cluster_labels, read_evaluation, require_same, tools_of, units
from slm_swap.verdict.gap import KINDS, REMEDIES, gap
from slm_swap.verdict.html_report.words import metric_name, stretch
from slm_swap.verdict.judge import Gate
from slm_swap.verdict.sentence import points
from tests.support.evaluated import AZURE, SLM, TUNED, calls, objects, replies, write_report

TRACK = TRACKS["toolcall"]
PRICES = Prices("prices.toml")


@pytest.fixture
def sides(tmp_path):
    """A function that evaluates rows with errors of evaluated.REPLIES in turn, and reads the evaluations back."""

    def make(examples, azure=("right",), slm=("right",), before=None):
        given = {"azure": (azure, AZURE), "slm": (slm, TUNED), "before": (before, SLM)}
        return {
            name: read_evaluation(write_report(tmp_path / f"{name}.json", examples, replies(examples, errors), model), TRACK, True)
            for name, (errors, model) in given.items()
            if errors
        }

    return make


def look(sides, rule="paired", delta=0.02, question="these", prices=PRICES, **gate):
    return examine(TRACK, sides, Gate(rule, delta, 0.05, question, **gate), prices)


# -- Where the gap comes from ----------------------------------------------------------------------------------------------------


def test_the_gap_adds_up_and_every_error_has_its_kind_and_its_remedy(sides):
    errors = [
        "right", "extra_text", "no_json", "bad_json", "wrong_shape", "wrong_tool", "missing_argument", "extra_argument", "wrong_type",
        "wrong_value", "truncated", "filtered", "refused", "failed", "right", "right",
    ]  # fmt: skip
    found = sides(calls(32), ["right", "wrong_value", "right", "right"], errors)
    told = gap(found["azure"].rows, found["slm"].rows, TRACK)
    assert (told["metric"], told["azure"], told["slm"], told["difference"]) == ("args_exact_rate", 24 / 32, 6 / 32, 18 / 32)
    rows = {own["kind"]: (own["azure_rows"], own["slm_rows"]) for own in told["errors"]}
    assert rows == {
        "format": (0, 8), "calls": (0, 0), "wrong_tool": (0, 2), "missing": (0, 2), "extra": (0, 2), "type": (0, 2), "value": (8, 2), "truncated": (0, 2),
        "too_long": (0, 0), "filtered": (0, 4), "failed": (0, 2),
    }  # fmt: skip
    assert sum(own["difference"] for own in told["errors"]) == pytest.approx(told["difference"], abs=1e-12)
    value = next(own for own in told["errors"] if own["kind"] == "value")
    assert (value["azure"], value["slm"], value["difference"]) == (8 / 32, 2 / 32, -6 / 32)
    told = {own["remedy"]: own for own in told["remedies"]}
    names = [remedy for remedy, *_ in REMEDIES]
    assert [name for name in names if name in told] == list(told), "the cheapest first"
    rows = {own["kinds"][0] if len(own["kinds"]) == 1 else name: own["rows"] for name, own in told.items()}
    assert (rows["failed"], rows["truncated"], rows["format"], rows["filtered"]) == (2, 2, 8, 4)
    prompt, few_shot, constrained, tuning = (told[name] for name in names if (name in told and len(told[name]["kinds"]) > 1) or "wording" in name)
    assert prompt["gain_measured"] == 2 / 32  # extra_text is right leniently
    assert few_shot["rows"] == 18 and tuning["rows"] == 20 and constrained["rows"] == 18
    assert constrained["gain_measured"] == 2 / 32  # wrong_type is right by the schema


def test_the_bound_is_of_what_the_remedy_can_gain_not_of_the_misses_that_bear_its_name(sides):
    """100 rows, 50 misses, as in an audit: a grammar could close all but the wrong values, training all of them."""
    errors = ["right"] * 50 + ["extra_text"] * 10 + ["wrong_shape"] * 10 + ["missing_argument"] * 10 + ["wrong_tool"] * 10 + ["wrong_value"] * 10
    told = look(sides(calls(100), slm=errors))
    most = {own["remedy"]: own["gain_at_most"] for own in told["gap"]["remedies"]}
    assert most["constrained decoding by the JSON Schema"] == 0.4 and most["fine-tuning"] == 0.5
    assert most["a few examples in the prompt (few-shot)"] == 0.5
    assert told["gap"]["first"] == "a few examples in the prompt (few-shot)", "the prompt's wording could gain 20 points at most"
    assert "First try a few examples in the prompt (few-shot) (at most 50.0 points)." in told["sentence"]


def test_every_error_belongs_to_one_kind_and_some_remedy():
    kinds = [error for errors in KINDS.values() for error in errors]
    remedies = {error for _, errors, _ in REMEDIES for error in errors}
    assert set(kinds) - {"prompt_too_long"} == set(ERRORS) - {"prompt_too_long"} and len(kinds) == len(set(kinds))
    assert remedies >= {*ERRORS, "failed", "limit"} - {"prompt_too_long"}


def test_without_misses_there_is_nothing_to_close(sides):
    found = sides(calls(4))
    told = gap(found["azure"].rows, found["slm"].rows, TRACK)
    assert told["first"] is None and told["remedies"] == [] and told["difference"] == 0 and len(told["errors"]) == len(KINDS)


# -- Groups ----------------------------------------------------------------------------------------------------------------------


def test_cluster_labels(sides):
    rows = sides(calls(4, groups=["a", None], tools=["book", "hire"]))["azure"].rows
    assert cluster_labels(rows, TRACK, "group") == ["=a", "#row-1", "=a", "#row-3"]  # a row without a group is alone
    assert cluster_labels(rows, TRACK, "tool") == ["=book", "=hire", "=book", "=hire"]
    for row in rows:
        row["group"] = None
    assert cluster_labels(rows, TRACK, "group") is None
    nested = [{"id": "1", "reference": '{"tool_name":"book","arguments":{}}'}, {"id": "2", "reference": '{"tool_name":1}'}, {"id": "3", "reference": "no"}]
    assert cluster_labels(nested, TRACKS["structured"], "tool") == ["=book", "#2", "#3"]


def test_groups_by_known_means_the_worst_first(sides):
    examples = calls(60, tools=["bad", "good", "good"])
    found = sides(examples, slm=["wrong_value", "right", "right"])
    groups = look(found)["groups"]
    assert (groups["by"], groups["metric"]) == ("tool", "args_exact_rate")
    assert [(own["group"], own["rows"], own["azure"], own["slm"], own["difference"]) for own in groups["all"]] == [
        ("bad", 20, 1.0, 0.0, 1.0), ("good", 40, 1.0, 1.0, 0.0),
    ]  # fmt: skip
    bad, good = groups["all"]
    assert bad["interval"][0] <= bad["shrunk"] <= bad["interval"][1] and good["shrunk"] < groups["mean"] < bad["shrunk"] <= 1


def test_rows_in_which_no_call_is_due_stand_together(sides):
    talk = {"messages": [{"role": "user", "content": "Thank you."}], "calls": [], "content": "You are welcome."}
    silent = [parse_example(talk | {"id": f"talk-{number}", "tools": calls(1)[0].tools}, "rows.jsonl") for number in range(3)]
    told = look(sides([*calls(6), *silent], slm=["right"]))["groups"]
    assert (told["by"], {own["group"]: own["rows"] for own in told["all"]}) == ("tool", {"book": 6, "no call due": 3})


def test_few_rows_are_shrunk_more(sides):
    examples = calls(80, tools=["few"] * 2 + ["many"] * 38 + ["other"] * 40)
    found = sides(examples, slm=["wrong_value"] * 32 + ["right"] * 8 + ["wrong_value"] * 10 + ["right"] * 30)
    told = look(found)["groups"]
    groups = {own["group"]: own for own in told["all"]}
    assert groups["few"]["difference"] == 1 and groups["many"]["difference"] == 30 / 38 and told["between_sd"] > 0
    shares = {name: (own["difference"] - own["shrunk"]) / (own["difference"] - told["mean"]) for name, own in groups.items()}
    assert 0 < shares["other"] < shares["many"] < shares["few"] < 1
    wide, narrow = (groups[name]["interval"][1] - groups[name]["interval"][0] for name in ("few", "many"))
    assert wide > narrow


@pytest.mark.parametrize(
    ("question", "groups", "unit"),
    [
        ("these", ["a", "b"], ("group", 2)),
        ("others", ["a", "b"], ("tool", 3)),
        ("these", [None], ("row", 60)),
        ("others", [None], ("tool", 3)),
        ("these", ["all"], ("group", 1)),
        ("these", ["book", "hire", "rent"], ("row", 60)),  # the tools themselves, as earlier importers wrote them
        ("these", ["book", "hire", None], ("row", 60)),
        ("these", ["hire", "book", "rent"], ("group", 3)),  # names of tools, but not of the rows' own
    ],
)
def test_the_unit_of_each_question(sides, question, groups, unit):
    told = look(sides(calls(60, groups, ["book", "hire", "rent"])), question=question)
    assert told["groups"]["by"] == "tool" and {own["group"] for own in told["groups"]["all"]} == {"book", "hire", "rent"}
    assert (told["clusters"]["by"], told["clusters"]["count"]) == unit and told["tools"] == 3
    assert told["question"] == question and told["questions"][question]["verdict"] == told["verdict"]
    assert told["questions"]["others"]["clusters"]["by"] == "tool"
    assert any("tool's name" in text for text in told["warnings"]) == (unit == ("row", 60) and groups != [None] and question == "these")


def test_rows_without_group_and_tool_have_no_groups(tmp_path):
    examples = objects(20)
    lines = [{"id": example.id, "prediction": example.completion} for example in examples]
    track = TRACKS["structured"]
    found = {
        name: read_evaluation(write_report(tmp_path / f"{name}.json", examples, lines, AZURE, "structured"), track, True)
        for name in ("azure", "slm")
    }
    with pytest.raises(UserError, match="no row names a tool"):
        examine(track, found, Gate("paired", 0.02, 0.05, "others"), PRICES)
    for question in QUESTIONS:
        told = examine(track, found, Gate("paired", 0.02, 0.05), PRICES)
        assert told["tools"] is None and told["questions"]["others"] is None
        assert units(found["azure"].rows, track, question) == ("row", None)
        assert told["groups"] is None and told["clusters"] == {"by": "row", "count": 20, "effective": 20}


# -- Doubtful references ---------------------------------------------------------------------------------------------------------


def test_gold_audit_finds_the_rows_on_which_both_agree(sides):
    azure = ["right", "wrong_value", "wrong_value", "right", "filtered", "no_json", "wrong_tool", "right"]
    slm = ["right", "wrong_value", "another_value", "wrong_value", "filtered", "no_json", "wrong_tool", "extra_text"]
    found = sides(calls(160), azure, slm)
    audit = look(found)["gold_audit"]
    assert audit["count"] == 40 and {row["id"] for row in audit["rows"]} == {f"row-{n}" for n in range(160) if n % 8 in (1, 6)}
    first = audit["rows"][0]
    assert first == {
        "id": "row-1", "group": None, "reference": '<tool_call name="book">{"city":"Oslo","nights":1}</tool_call>',
        "reply": '<tool_call name="book">{"city":"Bergen","nights":1}</tool_call>',
    }  # fmt: skip
    exact = audit["metrics_without"]["args_exact_rate"]
    assert (exact["azure"], exact["slm"]) == (60 / 120, 20 / 120)
    assert audit["verdict_without"] == "FINE_TUNE"


def test_gold_audit_compares_by_value_and_a_filtered_reply_says_nothing(tmp_path):
    examples = calls(40)
    lines = replies(examples, ["right"])
    other = [dict(line) for line in lines]
    lines[0]["prediction"] = '<tool_call name="book">{"city":"Rome","nights":1.0}</tool_call>'
    other[0]["prediction"] = '<tool_call name="book"> {"nights":1, "city":"Rome"} </tool_call>\n'
    for both in (lines, other):
        both[1] |= {"prediction": '<tool_call name="book">{"city":"Rome"}</tool_call>', "finish_reason": "content_filter"}
    found = {
        name: read_evaluation(write_report(tmp_path / f"{name}.json", examples, given, told), TRACK, True)
        for name, given, told in (("azure", lines, AZURE), ("slm", other, SLM))
    }
    assert [row["id"] for row in look(found)["gold_audit"]["rows"]] == ["row-0"]


def test_gold_audit_of_no_and_of_all_rows(sides):
    assert look(sides(calls(20)))["gold_audit"] == {"rows": [], "count": 0, "verdict_without": None, "metrics_without": None}
    audit = look(sides(calls(20), ["wrong_value"], ["wrong_value"]))["gold_audit"]
    assert (audit["count"], audit["verdict_without"], audit["metrics_without"]) == (20, None, None)
    audit = look(sides(calls(20), ["right"] + ["wrong_value"] * 19, ["wrong_value"] * 20))["gold_audit"]
    assert (audit["count"], audit["verdict_without"]) == (19, None)  # one row is too few to decide on


def test_the_verdict_without_doubtful_references_may_be_another(sides):
    # 400 rows: the small model misses 8 that azure gets and in 40 both say the same wrong thing
    found = sides(calls(400), ["right"] * 9 + ["wrong_value"], (["right"] * 9 + ["wrong_value"]) * 4 + ["right"] * 8 + ["no_json", "wrong_value"])
    told = look(found, delta=0.05)
    audit = told["gold_audit"]
    assert audit["count"] == 40 and audit["metrics_without"]["args_exact_rate"]["difference"] == 8 / 360
    assert told["metrics"]["args_exact_rate"]["difference"] == 8 / 400


# -- Before and after ------------------------------------------------------------------------------------------------------------


def test_gains_by_known_numbers(sides):
    # of each 10 rows before: 4 right; now: 8 right, and one that was right is not
    before = ["right"] * 4 + ["wrong_value"] * 6
    now = ["wrong_tool"] + ["right"] * 8 + ["wrong_value"]
    told = look(sides(calls(100), slm=now, before=before))["before"]
    exact = told["metrics"]["args_exact_rate"]
    assert (exact["before"], exact["slm"]) == (0.4, 0.8) and exact["gain"] == pytest.approx(0.4)
    assert exact["interval"][0] < 0.4 < exact["interval"][1] and exact["interval"][0] > 0.2 and exact["p_value"] < 1e-6
    assert told["worse"] == [f"row-{n}" for n in range(0, 100, 10)] and len(told["better"]) == 50
    assert told["metric"] == "args_exact_rate" and list(told["metrics"]) == list(TRACK.gate)
    name = told["metrics"]["name_match_rate"]
    assert name["gain"] == pytest.approx(-0.1) and name["p_value"] > 0.99


def test_nothing_gained(sides):
    told = look(sides(calls(50), slm=["right", "no_json"], before=["right", "no_json"]))["before"]
    assert told["worse"] == told["better"] == []
    for values in told["metrics"].values():
        assert values["gain"] == 0 and values["interval"][0] < 0 < values["interval"][1] and values["p_value"] == pytest.approx(0.5)
    assert look(sides(calls(50)))["before"] is None


# -- The decision ----------------------------------------------------------------------------------------------------------------


def test_rows_are_paired_by_id_whatever_their_order(sides):
    examples = calls(120, groups=[f"g{n}" for n in range(12)])
    found = sides(examples, ["right"] * 5 + ["wrong_value"], ["right", "another_value", "no_json"], ["no_json", "right"])
    told = {rule: look(found, rule) for rule in ("paired", "sequential")}
    for name in ("slm", "before"):
        random.Random(name).shuffle(found[name].rows)
    for rule, expected in told.items():
        require_same(found["azure"], found["slm"])
        assert look(found, rule) == expected
    random.Random(3).shuffle(found["azure"].rows)
    by_rows = look(found)
    assert by_rows["verdict"] == told["paired"]["verdict"] and sorted(by_rows["before"]["worse"]) == sorted(told["paired"]["before"]["worse"])
    for name, values in by_rows["metrics"].items():
        expected = told["paired"]["metrics"][name]
        assert values["interval"] == pytest.approx(expected["interval"]) and values["discordant"] == expected["discordant"]


def test_aligned():
    assert aligned([{"id": "b"}, {"id": "a"}], [{"id": "a"}, {"id": "b"}]) == [{"id": "a"}, {"id": "b"}]


def test_a_swap_and_its_sentence(sides):
    told = look(sides(calls(400)))
    assert told["verdict"] == "SWAP" and told["failing"] == [] and told["need"] is None and not told["flips"]
    high = max(values["interval"][1] for values in told["metrics"].values())
    assert 0 < high < 0.02
    assert told["sentence"] == (
        f"The small model can take over this tool: on 400 rows it loses at most {points(high)} points on every metric (95% sure), "
        "within the margin of 2.0 points."
    )
    better = look(sides(calls(400), ["right", "no_json"], ["right"]))
    assert "it is better on every metric" in better["sentence"]


def test_fine_tune_and_its_sentence(sides):
    told = look(sides(calls(200), slm=["right", "right", "wrong_value", "truncated"]))
    exact = told["metrics"]["args_exact_rate"]
    assert (told["verdict"], told["failing"][0], exact["difference"]) == ("FINE_TUNE", "args_exact_rate", 0.5)
    low, high = (points(end) for end in exact["interval"])
    assert told["sentence"] == (
        f"The small model is worse by more than the margin of 2.0 points: “Fully right call” is 50.0 points lower ({low} to {high}) on 200 "
        "rows. First try a larger --max-new-tokens (at most 25.0 points). Then train it on more rows, or on better ones, and measure again."
    )


def test_need_more_data_and_its_sentence(sides):
    told = look(sides(calls(60), slm=["right"] * 29 + ["wrong_value"]), delta=0.05)
    assert told["verdict"] == "NEED_MORE_DATA"
    need = told["need"]
    shown = stretch(*told["metrics"][need["metric"]]["interval"])
    assert shown.endswith("points behind") and told["sentence"] == (
        f"60 rows do not settle it: in “{metric_name(need['metric'])}” the small model is {shown}, too near the margin of 5.0 points. "
        f"About {need['rows']:,} further rows would settle it (towards SWAP, with 80% power). So few rows say little of the gap: the number is "
        "rough."
    )
    assert need["rows"] > 60 and need["azure_cost"] is None and need["clusters"] is None


def test_no_number_of_rows_settles_a_gap_of_just_the_margin(sides):
    told = look(sides(calls(40), slm=["right"] * 3 + ["no_json"]), delta=0.25)
    assert told["verdict"] == "NEED_MORE_DATA" and told["need"]["rows"] is None
    assert told["sentence"].endswith("No number of rows would: choose another margin, or fine-tune.")


def test_few_groups_and_few_rows_say_different_things(sides):
    grouped = look(sides(calls(400, groups=["a", "b", "c"])))
    assert grouped["verdict"] == "NEED_MORE_DATA" and grouped["clusters"]["count"] == 3
    assert "400 rows in 3 groups are too few: SWAP takes at least 10 of even size." in grouped["sentence"]
    for count in (2, 9):
        few = look(sides(calls(count)))
        assert few["verdict"] == "NEED_MORE_DATA" and few["sentence"].startswith(f"{count} rows are too few: SWAP takes at least 10. About ")
        assert "group" not in few["sentence"]


def test_eight_tools_are_decided_by_their_rows_and_never_for_other_tools(sides):
    """What an audit saw undecided: identical models over 8 tools, and one that is right on 92% against one on 13%."""
    tools = [f"tool_{n}" for n in range(8)]
    same = look(sides(calls(1000, tools=tools)), delta=0.05)
    assert same["verdict"] == "SWAP" and "can take over these 8 tools" in same["sentence"]
    others = same["questions"]["others"]
    assert others["verdict"] == "NEED_MORE_DATA" and others["need"]["rows"] is None
    assert others["need"]["clusters"] == clusters_if_identical(0.05, 0.05) - 8
    asked = look(sides(calls(1000, tools=tools)), delta=0.05, question="others")
    assert asked["verdict"] == "NEED_MORE_DATA" and asked["questions"]["these"]["verdict"] == "SWAP"
    assert "further rows of the same tools do not help" in asked["sentence"] and "47 further tools" in asked["sentence"]
    bad = look(sides(calls(1000, tools=tools), ["right"] * 12 + ["no_json"], ["right"] + ["wrong_value"] * 6), delta=0.05)
    assert bad["verdict"] == "FINE_TUNE"


@pytest.mark.parametrize("tools", [54, 55])
def test_for_other_tools_identical_models_need_a_number_of_tools(sides, tools):
    found = sides(calls(4 * tools, tools=[f"tool_{n}" for n in range(tools)]))
    told = look(found, delta=0.05, question="others")
    assert told["verdict"] == ("SWAP" if tools == 55 else "NEED_MORE_DATA")
    assert (told["need"] or {"clusters": 0})["clusters"] == 55 - tools
    assert look(found, delta=0.05, swap_share=0.7, question="others")["verdict"] == "NEED_MORE_DATA", "a smaller share takes more tools"


def test_the_point_rule_s_sentence(sides):
    found = sides(calls(20), slm=["right", "right", "right", "wrong_value"])
    told = examine_means(TRACK, found, 0.02)
    assert told["verdict"] == "FINE_TUNE" and told["gap"] is None and told["cost"] is None
    assert told["sentence"] == "By the means of 20 rows alone the largest gap (“Fully right call”, 25.0 points) is more than the margin of 2.0 points."
    assert "is not more than the margin of 30.0" in examine_means(TRACK, found, 0.3)["sentence"]


def test_a_verdict_that_flips_with_the_matcher_is_warned_of(sides):
    told = look(sides(calls(300), slm=["right", "right", "folded"]))
    assert {name: own["verdict"] for name, own in told["matchers"].items()} == {"strict": "FINE_TUNE", "schema": "FINE_TUNE", "lenient": "SWAP"}
    assert told["verdict"] == "FINE_TUNE" and told["flips"]
    (warning,) = told["warnings"]
    assert "strict FINE_TUNE, schema FINE_TUNE, lenient SWAP" in warning
    assert told["matchers"]["lenient"]["metrics"]["args_exact_rate"]["difference"] == 0
    told = look(sides(calls(300), slm=["right", "right", "wrong_value"]))
    assert not told["flips"] and told["warnings"] == []


def test_a_gain_across_engines_or_precisions_is_warned_of(sides):
    found = sides(calls(40), before=["right", "no_json"])
    ways = [{"engine": "transformers", "precision": "int8"}, {"engine": "vllm", "precision": "bf16"}]
    for name, way in zip(("before", "slm"), ways, strict=True):
        found[name].report["model"] = found[name].report["model"] | way
    (warning,) = look(found)["warnings"]
    assert "run by transformers in int8 before and by vllm in bf16 now" in warning
    found["before"].report["model"] |= ways[1]
    assert look(found)["warnings"] == []


@pytest.mark.parametrize("rule", ["paired", "sequential"])
@pytest.mark.parametrize("groups", [[None], ["a"], ["a", None]])
@pytest.mark.parametrize(("azure", "slm"), [(["right"], ["failed", "right"]), (["no_json"], ["no_json"])])
def test_two_rows(sides, rule, groups, azure, slm):
    told = look(sides(calls(2, groups), azure, slm, ["right", "no_json"]), rule)
    assert told["verdict"] == "NEED_MORE_DATA"
    json.dumps(told, allow_nan=False)


# -- Money -----------------------------------------------------------------------------------------------------------------------


def test_what_further_rows_cost(sides):
    prices = Prices("p", "USD", {"gpt-4o-mini": HostedPrices(1.0, 0.5, 2.0)}, LocalPrices(hour=3.6))
    told = look(sides(calls(60), slm=["right"] * 29 + ["wrong_value"]), delta=0.05, prices=prices)
    rows = told["need"]["rows"]
    # a row: 60 fresh tokens at 1, 40 cached at 0.5, 20 out at 2, a million; and a quarter second at 3.6 an hour
    assert told["need"]["azure_cost"] == pytest.approx(rows * 120e-6) and told["need"]["slm_cost"] == pytest.approx(rows * 0.25e-3)
    assert told["cost"]["azure"]["per_1000"] == pytest.approx(0.12) and told["cost"]["slm"]["per_1000"] == pytest.approx(0.25)
    assert (told["cost"]["training"]["seconds"], told["cost"]["training"]["cost"]) == (3600, None)


# -- Stopped early ---------------------------------------------------------------------------------------------------------------


def test_a_stopped_run(sides):
    found = sides(calls(300, groups=[f"g{n // 3}" for n in range(300)]), slm=["right", "wrong_value"])
    prices = Prices("p", "USD", {"gpt-4o-mini": HostedPrices(1.0, 0.5, 2.0)})
    whole = look(found, "sequential", prices=prices)
    saved = whole["sequential"]
    assert (whole["rule"], whole["verdict"]) == ("sequential", "FINE_TUNE")
    assert (saved["stopped_after_rows"], saved["rows_available"], saved["calls_saved"], saved["azure_cost_saved"]) == (None, 300, 0, 0)
    assert 10 < saved["certain_after_rows"] < 300 and saved["certain_after_rows"] in saved["certain_at"].values()
    stopped = {"rows_available": 1000, "rows": 300, "largest_cluster": 3, "delta": 0.02, "alpha": 0.05, "verdict": "FINE_TUNE"}
    for name in found:
        found[name].report["stopped_early"] = stopped
    saved = look(found, "sequential", prices=prices)["sequential"]
    assert (saved["stopped_after_rows"], saved["rows_available"], saved["calls_saved"]) == (300, 1000, 700)
    assert saved["azure_cost_saved"] == pytest.approx(700 * 120e-6)


def test_the_largest_cluster_that_a_stopped_run_could_meet_counts(sides):
    found = sides(calls(300), slm=["right", "wrong_value"])
    certain = []
    for largest in (1, 10):
        found["azure"].report["stopped_early"] = {"rows_available": 300, "largest_cluster": largest}
        certain.append(look(found, "sequential")["sequential"]["certain_after_rows"])
    assert certain[0] < certain[1]  # bets are smaller where a larger cluster might have come


# -- Reading ---------------------------------------------------------------------------------------------------------------------


def edit_rows(path, change):
    lines = [json.loads(line) for line in rows_path(path).read_text().splitlines()]
    rows_path(path).write_text("".join(json.dumps(change(number, line)) + "\n" for number, line in enumerate(lines)))


def test_labels(sides):
    found = sides(calls(2), before=["right"])
    assert [side.label for side in found.values()] == ["gpt-4o-mini", "phi-4-mini + adapter_toolcall", "phi-4-mini"]
    found["slm"].report["model"] = {"adapter": {"path": "x/lora"}}
    found["before"].report["model"] = None
    assert [found[name].label for name in ("slm", "before")] == ["? + lora", "?"]
    del found["azure"].report["model"]
    assert found["azure"].label == "?"


def test_rows_files_without_groups_are_read(tmp_path):
    path = write_report(tmp_path / "a.json", calls(20), replies(calls(20), ["right", "no_json"]), AZURE)
    edit_rows(path, lambda number, line: {key: value for key, value in line.items() if key not in ("group", "reply_error", "tokens", "seconds")})
    found = read_evaluation(path, TRACK, True)
    told = look({"azure": found, "slm": found})
    assert told["clusters"]["by"] == "row" and told["groups"]["by"] == "tool" and told["gold_audit"]["rows"] == []


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda n, line: line | {"id": "row-0"}, "an id occurs twice"),
        (lambda n, line: line | {"id": 7}, "not a row"),
        (lambda n, line: line | {"error": "unheard_of"}, "not a row"),
        (lambda n, line: line | {"error": ["no_json"]}, "not a row"),
        (lambda n, line: line | {"error": None}, "not a row"),  # a miss without an error would be missing from the gap
        (lambda n, line: line | {"group": 1}, "not a row"),
        (lambda n, line: line | {"reply": None}, "not a row"),
        (lambda n, line: [line], "not a row"),
        (lambda n, line: line | {"scores_by_matcher": {}}, "not a row"),
        (lambda n, line: {key: value for key, value in line.items() if key != "scores_by_matcher"}, "not a row"),
        (lambda n, line: line | {"scores_by_matcher": line["scores_by_matcher"] | {"schema": line["scores_by_matcher"]["strict"] | {"args_f1": 2}}}, "not a row"),
        (lambda n, line: line | {"scores_by_matcher": line["scores_by_matcher"] | {"lenient": line["scores_by_matcher"]["lenient"] | {"valid_call": 0.5}}}, "not a row"),
        (lambda n, line: line | {"scores_by_matcher": line["scores_by_matcher"] | {"lenient": line["scores_by_matcher"]["lenient"] | {"args_f1": 0.9}}}, "another mean of args_f1 (lenient)"),
    ],
)
def test_rows_that_are_not_the_report_s(tmp_path, change, what):
    examples = calls(8)
    path = write_report(tmp_path / "a.json", examples, replies(examples, ["right", "no_json"]), AZURE)
    edit_rows(path, lambda number, line: change(number, line) if number == 1 else line)
    with pytest.raises(UserError, match=re.escape(what)):
        read_evaluation(path, TRACK, True)


@pytest.mark.parametrize("kept", [0, 7, 9])
def test_too_few_or_too_many_rows(tmp_path, kept):
    examples = calls(8)
    path = write_report(tmp_path / "a.json", examples, replies(examples, ["right"]), AZURE)
    lines = rows_path(path).read_text().splitlines()
    lines += [lines[-1].replace("row-7", "row-8")]
    rows_path(path).write_text("".join(line + "\n" for line in lines[:kept]))
    with pytest.raises(UserError, match=f"does not match its report: {kept} rows for 8"):
        read_evaluation(path, TRACK, True)


def test_no_rows_at_all(tmp_path):
    examples = calls(2)
    path = write_report(tmp_path / "a.json", examples, replies(examples, ["right"]), AZURE)
    rows_path(path).write_text("")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"inputs": {"rows": 0, "rows_sha256": "a"}}))
    with pytest.raises(UserError, match="0 rows for 0"):
        read_evaluation(path, TRACK, True)


def test_other_rows_are_refused_and_named(tmp_path):
    examples = calls(4)
    made = [write_report(tmp_path / f"{name}.json", examples, replies(examples, ["right"]), AZURE) for name in "ab"]
    for name, value in (("id", "other"), ("reference", CALL_OF_ANOTHER), ("prompt_sha256", "0" * 64), ("group", "g")):
        before = rows_path(made[1]).read_text()
        edit_rows(made[1], lambda number, line, name=name, value=value: line | {name: value} if number == 2 else line)
        left, right = (read_evaluation(path, TRACK, True) for path in made)
        with pytest.raises(UserError, match=r"hold different rows \(first: id 'row-2'\)"):
            require_same(left, right)
        rows_path(made[1]).write_text(before)


CALL_OF_ANOTHER = '<tool_call name="book">{}</tool_call>'


def test_tools_that_are_called_together_are_one_unit_of_the_question_about_other_tools():
    def rows(*tools):
        return [{"id": str(at), "group": None, "tool": tool, "reference": "none"} for at, tool in enumerate(tools)]

    def alike(*tools):
        by, labels = units(rows(*tools), TRACK, "others")
        assert by == "tool"
        return [labels.index(label) for label in labels]

    assert alike("a", "b", "a") == [0, 1, 0]
    assert alike("a", "b", "a, b", "c") == [0, 0, 0, 3]
    assert alike("a, b", "b, c", "d", "c") == [0, 0, 2, 0]
    assert alike("a", None, None, "b") == [0, 1, 1, 3], "rows in which no call is due are no tools of their own"
    assert units(rows(None, None), TRACK, "others") == ("row", None)
    assert tools_of(rows("a, b", "b", None), TRACK) == {"a", "b"}
