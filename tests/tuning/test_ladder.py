"""The ladder over recorded replies: what stays, what goes, what is not tried, and that it goes on."""

from pathlib import Path

import pytest

from slm_swap.clients.pricing import Prices
from slm_swap.common.errors import UserError
from slm_swap.scoring.tracks import TRACKS
from slm_swap.tuning.ladder import KINDS, Ladder, OutOfBudget, Unfit, rungs
from slm_swap.verdict.evaluations import read_evaluation
from tests.support.evaluated import AZURE, SLM, TUNED, calls, replies, write_report

ROWS = calls(60)
HALF, BETTER, MOST, RIGHT = ["right", "wrong_value"], ["right", "right", "wrong_value"], ["right"] * 9 + ["wrong_value"], ["right"]
TRAIN = Path("train.jsonl")


def ladder(folder: Path, quality, kinds=KINDS, presets=("fast",), hosted=None, rows=ROWS, model="a" * 64, **more) -> Ladder:
    """One whose model's errors are `quality(setting)`; what was asked for is in `.asked`."""
    asked = []

    def run(name, setting, preset, report):
        asked.append(name)
        errors = quality(setting)
        report.parent.mkdir(parents=True, exist_ok=True)
        arguments = {"max_new_tokens": setting["max_new_tokens"], "ask": setting.get("ask"), "thinking": setting.get("thinking")}
        write_report(report, rows, replies(rows, errors), TUNED if "adapter" in setting else SLM, args=arguments)
        return 10.0

    plan = rungs(list(kinds), TRAIN, list(presets), folder, [])
    made = Ladder(
        folder, "toolcall", {"sha256": "b" * 64, "rows": len(rows), "parts": {"model_sha256": model}}, plan, [], run, hosted, 0.05, 0.05, Prices("prices.toml"), lambda text: None, **more
    )
    made.asked = asked
    return made


def outcomes(climbed: Ladder) -> dict[str, str]:
    return {told["rung"]: told["outcome"] for told in climbed.told}


def by_shots(setting) -> list[str]:
    return BETTER if setting.get("shots") == 3 else HALF


BEGIN = {"max_new_tokens": 96}


def test_a_rung_stays_where_it_gains_and_goes_where_it_does_not(tmp_path):
    climbed = ladder(tmp_path, by_shots, ("ask", "few-shot", "constrain"))
    best = climbed.climb(BEGIN)
    assert outcomes(climbed) == {
        "base": "stays", "ask": "goes", "few-shot 1": "goes", "few-shot 3": "stays", "few-shot 5": "goes", "retry": "goes", "always": "goes",
    }  # fmt: skip
    assert best.setting == BEGIN | {"few_shot": TRAIN, "shots": 3}
    stayed = next(told for told in climbed.told if told["rung"] == "few-shot 3")
    assert stayed["gain"]["gain"] == pytest.approx(1 / 6) and stayed["gain"]["over"] == "base" and stayed["gain"]["p_value"] < 0.05
    assert stayed["gain"]["interval"][0] < 1 / 6 < stayed["gain"]["interval"][1]


def test_the_intervals_hold_for_all_planned_rungs_at_once(tmp_path):
    few = ladder(tmp_path / "few", by_shots, ("few-shot",))
    many = ladder(tmp_path / "many", by_shots)
    for climbed in (few, many):
        climbed.climb(BEGIN)
    narrow, wide = (next(told["gain"]["interval"] for told in climbed.told if told["rung"] == "few-shot 3") for climbed in (few, many))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_more_tokens_are_tried_where_replies_were_cut(tmp_path):
    cut = ladder(tmp_path, lambda setting: RIGHT if setting["max_new_tokens"] == 384 else ["right", "truncated"], ("tokens",))
    assert cut.climb(BEGIN).setting == {"max_new_tokens": 384}
    whole = ladder(tmp_path / "whole", lambda setting: HALF, ("tokens",))
    whole.climb(BEGIN)
    assert outcomes(whole)["tokens"] == "not tried" and whole.told[1]["why"] == "0 of 60 replies were cut by the limit"


def test_a_training_drops_the_shots_and_takes_them_up_again_where_they_help(tmp_path):
    def quality(setting):
        return (RIGHT if setting.get("shots") == 1 else MOST) if "adapter" in setting else by_shots(setting)

    climbed = ladder(tmp_path, quality, ("few-shot", "train", "combine"))
    best = climbed.climb(BEGIN)
    assert outcomes(climbed)["train fast"] == outcomes(climbed)["trained, few-shot 1"] == "stays"
    assert best.setting["shots"] == 1 and best.setting["adapter"].name.startswith("adapter_fast_")
    trained = next(told for told in climbed.told if told["rung"] == "train fast")
    assert "shots" not in trained["setting"] and trained["gain"]["over"] == "few-shot 3"


def test_an_adapter_is_trained_with_shots_too_where_shots_helped(tmp_path):
    """Of its own, which is asked as it was taught."""
    adapters = []

    def quality(setting):
        if "adapter" not in setting:
            return by_shots(setting)
        adapters.append((setting["adapter"].name, setting.get("shots")))
        return RIGHT if len({name for name, _ in adapters}) == 2 else BETTER

    climbed = ladder(tmp_path, quality, ("few-shot", "train", "combine"))
    best = climbed.climb(BEGIN)
    assert climbed.told[-1]["rung"] == "train fast with shots" and climbed.told[-1]["outcome"] == "stays"
    assert best.setting == BEGIN | {"adapter": tmp_path / adapters[-1][0], "few_shot": TRAIN, "shots": 3}


def test_combinations_need_an_adapter_and_shots_that_helped(tmp_path):
    climbed = ladder(tmp_path, lambda setting: MOST if "adapter" in setting else HALF, ("few-shot", "train", "combine"))
    climbed.climb(BEGIN)
    assert outcomes(climbed)["trained, few-shot 3"] == "not tried" and climbed.told[-1]["why"] == "no shots helped before training"
    no_gain = ladder(tmp_path / "other", by_shots, ("few-shot", "train", "combine"))
    no_gain.climb(BEGIN)
    assert [told["why"] for told in no_gain.told if told["outcome"] == "not tried"] == ["no adapter stayed"] * 3


def test_what_cannot_be_asked_so_and_what_is_too_dear_is_left_out(tmp_path):
    def quality(setting):
        if setting.get("thinking"):
            raise Unfit("the chat template cannot")
        if setting.get("shots"):
            raise OutOfBudget("the hours are spent")
        return HALF

    climbed = ladder(tmp_path, quality, ("thinking", "few-shot", "constrain"))
    climbed.climb(BEGIN)
    assert outcomes(climbed)["thinking"] == outcomes(climbed)["few-shot 5"] == "not tried" and outcomes(climbed)["retry"] == "goes"
    assert climbed.told[1]["why"] == "the chat template cannot"
    with pytest.raises(UserError, match="the ladder cannot begin: the chat template cannot"):
        ladder(tmp_path / "none", quality).climb(BEGIN | {"thinking": "on"})


def hosted(folder: Path, rows=ROWS):
    return read_evaluation(write_report(folder / "azure.json", rows, replies(rows, MOST), AZURE), TRACKS["toolcall"], with_rows=True)


def test_it_ends_where_the_verdict_is_swap(tmp_path):
    rows = calls(300)
    climbed = ladder(tmp_path, lambda setting: RIGHT if setting.get("shots") == 1 else HALF, hosted=hosted(tmp_path, rows), rows=rows)
    best = climbed.climb(BEGIN)
    assert best.name == "few-shot 1" and climbed.verdict == "SWAP" and climbed.asked[-1] == "few-shot 1"
    assert climbed.told[0]["verdict"] == "FINE_TUNE"
    assert climbed.told[-1]["why"] == "the verdict on the validation rows is SWAP already"


def test_nothing_is_measured_twice(tmp_path):
    """Killed after any rung, the next run takes what is there and comes to the same end."""
    first = ladder(tmp_path, by_shots)
    best = first.climb(BEGIN)
    again = ladder(tmp_path, by_shots)
    assert again.climb(BEGIN).setting == best.setting and again.asked == []
    assert outcomes(again) == outcomes(first) and again.spent() == (10.0 * len(first.asked), None)
    left = ladder(tmp_path / "killed", by_shots, ("few-shot",))
    left.climb(BEGIN)
    more = ladder(tmp_path / "killed", by_shots, ("few-shot", "constrain"))
    more.climb(BEGIN)
    assert more.asked == ["retry", "always"]


def test_what_another_model_was_measured_at_is_not_taken(tmp_path):
    """Nor written over: the first model goes on without a new measurement."""
    first = ladder(tmp_path, by_shots, ("few-shot",))
    first.climb(BEGIN)
    other = ladder(tmp_path, lambda setting: HALF, ("few-shot",), model="c" * 64)
    other.climb(BEGIN)
    assert other.asked == first.asked and other.told[0]["report"] != first.told[0]["report"]
    again = ladder(tmp_path, by_shots, ("few-shot",))
    again.climb(BEGIN)
    assert again.asked == [] and outcomes(again) == outcomes(first)


def test_a_report_that_was_changed_is_measured_again(tmp_path):
    first = ladder(tmp_path, by_shots, ("few-shot",))
    first.climb(BEGIN)
    path = first.report_path("few-shot 1", BEGIN | {"few_shot": TRAIN, "shots": 1})
    path.write_text(path.read_text().replace('"track"', '"track" '))
    again = ladder(tmp_path, by_shots, ("few-shot",))
    again.climb(BEGIN)
    assert again.asked == ["few-shot 1"]


@pytest.mark.parametrize("text", ["", '{"tra', "{}", "[1]", '{"track": "toolcall", "inputs": {"sha256": "c"}, "measured": []}'])
def test_another_ladder_in_the_folder_is_refused(tmp_path, text):
    (tmp_path / "ladder.json").write_text(text)
    with pytest.raises(UserError, match=r"choose another folder with --out$"):
        ladder(tmp_path, by_shots).climb(BEGIN)
