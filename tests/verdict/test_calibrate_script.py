"""calibrate.py: what it prints, writes, exits with and refuses."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from slm_swap.common.reports import sha256_file
from slm_swap.verdict.cascade import read_cascade, schema_hash
from tests.support.calibrated import ARGS, SMALL, write_pair
from tests.support.evaluated import SLM, calls, objects
from tests.support.scripts import load_script

UNSURE = ["right"] * 9 + ["wrong_value"]


@pytest.fixture(scope="module")
def script():
    return load_script("03_compare/calibrate.py")


@pytest.fixture
def calibrate(run_script, script, tmp_path):
    """A function that calibrates on reports named by flags: (exit code, stdout, stderr)."""
    return lambda *flags: run_script(script, "--track", "toolcall", "--out", tmp_path / "cascade.json", *flags)


@pytest.fixture
def refused(calibrate, tmp_path):
    """A function that sees a calibration refused in one line with nothing written, and gives the line."""

    def run_it(*flags):
        code, printed, error = calibrate(*flags)
        [line] = [line for line in error.splitlines() if not line.startswith("warning: ")]
        assert (code, printed) == (2, "") and not (tmp_path / "cascade.json").exists()
        return line

    return run_it


def test_a_good_model_answers_everything(calibrate, tmp_path):
    code, printed, error = calibrate(*write_pair(tmp_path), "--html", tmp_path / "cascade.html")
    assert code == 0 and error == "warning: without reports on validation rows (--val-azure, --val-slm) the signal is sum_logprob\n"
    assert "may answer 100.0% of the requests" in printed and "in at most 2% of all requests" in printed and "95% sure" in printed
    assert "Savings unknown" in printed and "Replies that call none: there are none in these rows" in printed
    found = read_cascade(tmp_path / "cascade.json")
    assert found.told["share_local"] == 1.0 and found.local("call", True, {"sum_logprob": -0.2})[0] and not found.local("call", True, {"sum_logprob": -0.200001})[0]
    assert found.identity == {
        "files_sha256": ["f" * 64], "path": None, "precision": "int8", "products": None, "engine": "transformers", "ask": "text", "thinking": None, "constrain": "off",
        "max_new_tokens": 512, "few_shot_sha256": None, "shots": None,
    }  # fmt: skip
    assert set(found.tools) == {"book", "cancel"} and found.schemas is None and found.told["calibration"]["sha256"] == sha256_file(tmp_path / "calibration.jsonl")
    assert found.told["per_tool"] == {"book": {"local": 200, "losses": 0, "disagreements": 0}} and "curves" not in found.told
    page = (tmp_path / "cascade.html").read_text()
    assert "may answer 100.0% of the requests" in page and "data:image/svg+xml" in page and "<script" not in page and "None" not in re.sub(r"base64,[\w+/=]+", "", page)


def test_the_threshold_lies_where_the_confidence_parts_right_from_wrong(calibrate, tmp_path):
    code, printed, _ = calibrate(*write_pair(tmp_path, rows=300, slm=UNSURE), "--signal", "min_logprob")
    told = read_cascade(tmp_path / "cascade.json").told
    rule = told["rules"]["call"]
    # 270 rows are right and surer than every wrong one; of 300 one may be lost, the surest of the 30 that are wrong
    assert code == 0 and (rule["signal"], rule["local"], rule["losses"], rule["units"]) == ("min_logprob", 271, 1, 300) and rule["threshold"] == -10.01
    assert told["share_local"] == pytest.approx(271 / 300) and "271 of 300 rows (90.3%)" in printed
    assert "To answer 90.7% of the replies that call a tool locally: 13 further rows" in printed


def test_a_tiny_alpha_is_not_certainty(calibrate, tmp_path):
    code, printed, _ = calibrate(*write_pair(tmp_path, rows=300), "--delta", 0.1, "--alpha", 1e-9, "--html", tmp_path / "cascade.html")
    assert code == 0 and "over 99.99% sure" in printed
    for text in (printed, (tmp_path / "cascade.html").read_text()):
        assert "over 99.99% sure" in text and "100% sure" not in text


def test_rows_that_are_prompts_are_told(calibrate, tmp_path):
    code, _, error = calibrate(*write_pair(tmp_path, as_prompts=True))
    assert code == 0 and "200 rows are prompts" in error and read_cascade(tmp_path / "cascade.json").prompts == 200


def test_a_target_that_lets_through_what_is_wrong_is_warned_of_once(calibrate, tmp_path):
    code, _, error = calibrate(*write_pair(tmp_path, rows=300, slm=["wrong_value"] * 300), "--delta", 0.5)
    assert code == 0 and error.count("100% of what would be answered locally (call) is lost") == 1 and "give a smaller one" in error
    _, _, quiet = calibrate(*write_pair(tmp_path, rows=300, slm=UNSURE))
    assert "is lost" not in quiet


def test_a_cascade_names_the_schemas_of_its_rows(run_script, script, tmp_path):
    rows = objects(150)
    rows[7] = replace(rows[7], schema=None)
    for examples, wanted in ((rows, [schema_hash(rows[0].schema), None]), (objects(150), [schema_hash(rows[0].schema)])):
        flags = write_pair(tmp_path, examples=examples, track="structured", azure=["number"], slm=["number"])
        code, _, _ = run_script(script, "--track", "structured", "--out", tmp_path / "cascade.json", *flags)
        told = read_cascade(tmp_path / "cascade.json").told
        assert (code, told["schemas"], told["tools"]) == (0, wanted, None)


def test_nothing_to_certify_is_exit_11_and_no_file(calibrate, tmp_path):
    code, printed, _ = calibrate(*write_pair(tmp_path, rows=148), "--html", tmp_path / "cascade.html")
    assert code == 11 and "Nothing may be answered locally yet: on 148 rows" in printed and "1 further rows without a loss would do" in printed
    assert not (tmp_path / "cascade.json").exists() and "Nothing may be answered locally yet" in (tmp_path / "cascade.html").read_text()


def test_without_any_confidence_nothing_is_certified(calibrate, tmp_path):
    code, printed, _ = calibrate(*write_pair(tmp_path, sure=lambda number, right: None))
    assert code == 11 and "further rows do not help before more of them are fit and have sum_logprob" in printed


def test_agreement(calibrate, tmp_path):
    flags = write_pair(tmp_path, rows=300, azure=["right", "another_value"], slm=["right", "right"])
    assert calibrate(*flags)[0] == 0 and read_cascade(tmp_path / "cascade.json").told["disagreement"]["seen"] == 0.5
    (tmp_path / "cascade.json").unlink()
    code, printed, _ = calibrate(*flags, "--agreement")
    assert code == 11 and "different from the hosted model's" in printed


def test_groups_are_units(calibrate, tmp_path):
    flags = write_pair(tmp_path, rows=298, groups=[f"g{number}" for number in range(149)])
    code, printed, _ = calibrate(*flags)
    told = read_cascade(tmp_path / "cascade.json").told
    assert code == 0 and told["rules"]["call"]["units"] == 149 and "in at most 2% of all groups" in printed
    again = write_pair(tmp_path, rows=298, groups=[f"g{number}" for number in range(148)])
    assert calibrate(*again)[0] == 11


def test_signals_are_chosen_on_validation(calibrate, tmp_path):
    def sure(number, right):
        return {"min_logprob": -float(number * 37 % 300), "sum_logprob": -float(number * 37 % 300), "tool_logprob": None, "min_margin": float(right)}

    validation = write_pair(tmp_path, "val", 120, slm=UNSURE, sure=sure, first=1000)
    flags = write_pair(tmp_path, rows=300, slm=UNSURE, sure=sure)
    assert calibrate(*flags)[0] == 11
    code, _, error = calibrate(*flags, "--val-azure", validation[1], "--val-slm", validation[3])
    assert (code, error) == (0, "")
    rule = read_cascade(tmp_path / "cascade.json").told["rules"]["call"]
    assert (code, error, rule["signal"], rule["local"]) == (0, "", "min_margin", 270)


def test_tokens_and_seconds_become_a_bill(calibrate, tmp_path, monkeypatch):
    prices = tmp_path / "prices.toml"
    prices.write_text(
        'currency = "USD"\n[hosted."gpt-4o-mini"]\ninput = 100\noutput = 1000\n[local]\nhour = 1\nhours_per_month = 730\ntraining_hour = 0\npay_off_months = 1\n'
        "[traffic]\ntasks_per_month = 100_000\npeak_factor = 1\n"
    )
    monkeypatch.setenv("PRICES_FILE", str(prices))
    code, printed, _ = calibrate(*write_pair(tmp_path, rows=300, slm=["right"] * 9 + ["no_json"]))
    bill = read_cascade(tmp_path / "cascade.json").told["costs"]["bills"][0]
    assert code == 0 and bill["azure"] == pytest.approx(100_000 * (100 * 100 + 20 * 1000) / 1e6)
    assert bill["slm"] == pytest.approx(730 + 0.1 * bill["azure"]) and "at 100,000 tasks 3,000.00 USD hosted alone, 1,030.00 USD with the small model in front" in printed


# -- Refused ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_another_split_is_refused(refused, tmp_path, split):
    assert f"are of the {split} split" in refused(*write_pair(tmp_path, split))


def test_rows_that_stand_in_another_split_are_refused(refused, calibrate, tmp_path):
    flags = write_pair(tmp_path, rows=200)
    other = tmp_path / "train.jsonl"
    other.write_text("".join(json.dumps(example.to_json() | {"id": f"t{at}"}) + "\n" for at, example in enumerate(calls(230)[199:])))
    line = refused(*flags)
    assert "1 of the rows are in" in line and "train.jsonl too (first: id 'row-199')" in line and "--calibration-size N" in line
    other.write_text("".join(json.dumps(example.to_json()) + "\n" for example in calls(230)[200:]))
    assert calibrate(*flags)[0] == 0


def test_rows_of_the_validation_reports_are_refused(refused, tmp_path):
    flags = write_pair(tmp_path, rows=200)
    validation = write_pair(tmp_path, "other", rows=20, first=190)
    assert "10 of the rows are in" in refused(*flags, "--val-azure", validation[1], "--val-slm", validation[3])
    another = write_pair(tmp_path, "another", rows=20, first=300, model=SMALL | {"precision": "fp8"})
    assert "is of another small model" in refused(*flags, "--val-azure", another[1], "--val-slm", another[3])
    assert "go together" in refused(*flags, "--val-azure", validation[1])


def test_rows_that_the_adapter_was_trained_on_are_refused(refused, calibrate, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    flags = write_pair(tmp_path, model=SMALL | {"adapter": str(adapter), "trained_on_sha256": None})
    code, _, error = calibrate(*flags)
    assert code == 0 and f"whether {adapter} was trained on these rows is not known" in error
    (tmp_path / "cascade.json").unlink()
    for place, sha in (("train", sha256_file(tmp_path / "calibration.jsonl")), ("val", "0" * 64)):
        (adapter / "training_info.json").write_text(json.dumps({"inputs": {place: {"path": str(tmp_path / "rows.jsonl"), "sha256": sha}}}))
        if place == "train":
            assert "was trained on" in refused(*flags)
    (tmp_path / "rows.jsonl").write_text(json.dumps(calls(4)[3].to_json()) + "\n")
    assert "rows.jsonl too (first: id 'row-3')" in refused(*flags)


def recipe(path, chosen_on):
    told = {
        "schema_version": 1, "stage": "recipe", "track": "toolcall", "model": {"path": SLM["path"], "files_sha256": "f" * 64}, "adapter": None, "few_shot": None,
        "ask": "text", "thinking": None, "constrain": "off", "max_new_tokens": 512, "precision": "int8", "engine": "transformers", "chosen_on": chosen_on,
    }  # fmt: skip
    path.write_text(json.dumps(told))
    return path


def test_rows_that_the_recipe_was_chosen_on_are_refused(refused, calibrate, tmp_path):
    flags = write_pair(tmp_path)
    path = recipe(tmp_path / "recipe.json", {"path": "gone.jsonl", "sha256": sha256_file(tmp_path / "calibration.jsonl"), "rows": 200})
    assert "the recipe was chosen on" in refused(*flags, "--recipe", path)
    flags = write_pair(tmp_path, args=ARGS | {"recipe": str(path)})
    assert "the recipe was chosen on" in refused(*flags), "the report's own recipe"
    recipe(path, {"path": "gone.jsonl", "sha256": "0" * 64, "rows": 200})
    assert calibrate(*flags)[0] == 0
    assert read_cascade(tmp_path / "cascade.json").told["recipe"] == {"path": str(path), "sha256": sha256_file(path)}


@pytest.mark.parametrize("by_recipe", [False, True])
def test_the_next_command_serves_the_model_as_it_was_calibrated(calibrate, tmp_path, by_recipe):
    """Another way of asking would be a mismatch, and all requests would go to the hosted model."""
    args = ARGS | {"few_shot": str(tmp_path / "train rows.jsonl"), "shots": 2, "constrain": "retry", "thinking": None, "trust_remote_code": False}
    path = recipe(tmp_path / "recipe.json", {"path": "gone.jsonl", "sha256": "0" * 64, "rows": 200})
    flags = write_pair(tmp_path, ask="native", args=args | ({"recipe": str(path)} if by_recipe else {}))
    code, printed, _ = calibrate(*flags)
    [line] = [line for line in printed.splitlines() if line.startswith("next: ")]
    words = shlex.split(line.removeprefix("next: python "))
    assert code == 0 and words[0] == "05_serve/serve.py"
    told = load_script("05_serve/serve.py").parse_args(words[1:])
    assert (told.track, told.mode, Path(told.cascade)) == ("toolcall", "cascade", tmp_path / "cascade.json")
    if by_recipe:
        assert Path(told.recipe) == path
    else:
        assert (told.engine, told.precision, told.constrain, told.max_new_tokens, told.ask, told.shots) == ("transformers", "int8", "retry", 512, None, 2)
        assert told.few_shot == args["few_shot"]


def test_rows_that_were_shown_as_examples_are_refused(refused, tmp_path):
    flags = write_pair(tmp_path)
    report = json.loads((tmp_path / "slm_calibration.json").read_text())
    report["inputs"]["few_shot"] = {"path": str(tmp_path / "calibration.jsonl"), "sha256": report["inputs"]["sha256"], "shots": 2}
    (tmp_path / "slm_calibration.json").write_text(json.dumps(report))
    assert "the model was shown examples from" in refused(*flags)


def test_a_file_of_rows_that_was_changed_is_refused(refused, tmp_path):
    flags = write_pair(tmp_path)
    with (tmp_path / "calibration.jsonl").open("a") as file:
        file.write(json.dumps(calls(500)[499].to_json()) + "\n")
    assert "is not the file that was evaluated" in refused(*flags)


def test_other_mistakes_are_one_line(refused, tmp_path):
    flags = write_pair(tmp_path)
    assert "of kind azure" in refused("--azure", flags[1], "--slm", flags[1])
    assert "--delta must be above 0" in refused(*flags, "--delta", "0")
    assert "missing.json" in refused("--azure", flags[1], "--slm", tmp_path / "missing.json")
    assert "is read and would be overwritten" in refused(*flags, "--html", tmp_path / "calibration.jsonl")
