"""recipe.json: what is measured by it is what it says, and a part that was changed is refused."""

import json
import shutil

import pytest

from slm_swap.clients.loading import files_hash
from slm_swap.common.reports import sha256_file
from slm_swap.common.settings import PACKAGE
from slm_swap.evaluating.recipe import make_recipe
from slm_swap.rows.prompts import toolcall_prompt
from tests.support.scripts import load_script

TINY = PACKAGE / "models/phi-tiny"
TOOL = {"name": "paint", "description": "Paint.", "parameters": {"type": "object", "properties": {"color": {"type": "string"}}}}
REQUESTS = ["paint the door", "a blue fence", "the big door in red", "some green door"]


def row(request: str) -> dict:
    return {"prompt": toolcall_prompt([TOOL], request), "completion": '<tool_call name="paint">{"color":"red"}</tool_call>', "tools": [TOOL]}


@pytest.fixture
def files(write_rows, monkeypatch):
    """(rows, train rows) as paths; the model is phi-tiny."""
    monkeypatch.setenv("SLM_MODEL_PATH", str(TINY))
    return write_rows("rows.jsonl", [row(text) for text in REQUESTS]), write_rows("train.jsonl", [row("a red door"), row("a red fence")])


@pytest.fixture
def evaluate(run_script, eval_script, files, tmp_path):
    def run_it(*flags, out="out.json"):
        known = ("--track", "toolcall", "--model-kind", "slm", "--dataset", files[0], "--latency-rows", 0)
        return run_script(eval_script, *known, *flags, "--out", tmp_path / out)

    return run_it


@pytest.fixture
def recipe(evaluate, files, tmp_path):
    """The recipe of an evaluation with a shot."""
    code, _, error = evaluate(
        "--few-shot", files[1], "--shots", 1, "--precision", "fp32", "--engine", "transformers", "--max-new-tokens", 4, out="first.json"
    )
    assert code == 0, error
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(make_recipe(json.loads((tmp_path / "first.json").read_text()), "ladder.json")))
    return path


def test_an_evaluation_by_a_recipe_asks_the_same_of_the_same_model(evaluate, recipe, files, tmp_path):
    code, _, error = evaluate("--recipe", recipe)
    assert code == 0, error
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("first.json", "out.json"))
    assert second["asked"] == first["asked"] and second["metrics"] == first["metrics"]
    told = json.loads(recipe.read_text())
    assert told["few_shot"] == {"path": str(files[1]), "sha256": sha256_file(files[1]), "shots": 1}
    assert told["model"] == {"path": "slm_swap/models/phi-tiny", "files_sha256": files_hash(TINY)} and told["adapter"] is None
    assert second["inputs"]["few_shot"]["shown"] == {"1": 4}


@pytest.mark.parametrize("flags", [("--shots", 2), ("--precision", "bf16"), ("--max-new-tokens=9",), ("--thinking", "on"), ("--adapter", "x")])
def test_a_flag_of_the_recipe_is_refused_beside_it(evaluate, recipe, flags):
    flags = (*flags, "--few-shot", "x") if flags[0] == "--shots" else flags
    code, _, error = evaluate("--recipe", recipe, *flags)
    assert code == 2 and "is a part of the recipe: leave it out, or leave --recipe out" in error and error.count("\n") == 1


def test_other_shots_another_model_and_another_track_are_refused(evaluate, recipe, files, tmp_path):
    lines = files[1].read_text()
    files[1].write_text(lines + "\n")
    assert "was changed: put it back, or make the recipe again with 04_ft/improve.py" in evaluate("--recipe", recipe)[2]
    files[1].unlink()
    assert "is missing: put it back" in evaluate("--recipe", recipe)[2]
    files[1].write_text(lines)
    told = json.loads(recipe.read_text())
    for change, why in (
        ({"track": "structured"}, "is of track structured, not toolcall"),
        ({"stage": "eval"}, "is no recipe of this version"),
        ({"few_shot": {}}, "is no recipe of this version"),
        *(
            (change, "is no recipe of this version")
            for change in (
                {"engine": "foo"}, {"precision": "int3"}, {"constrain": "never"}, {"ask": "xx"}, {"ask": 1}, {"thinking": True}, {"max_new_tokens": "many"},
                {"max_new_tokens": -5}, {"max_new_tokens": True}, {"max_new_tokens": None}, {"model": {"path": 7, "files_sha256": "f"}}, {"model": None},
                {"model": told["model"] | {"files_sha256": [1]}}, {"few_shot": told["few_shot"] | {"shots": "2"}}, {"few_shot": told["few_shot"] | {"shots": 0}},
                {"few_shot": told["few_shot"] | {"path": 1}}, {"few_shot": told["few_shot"] | {"sha256": None}}, {"adapter": {"path": 1, "files_sha256": "f"}},
            )
        ),
        ({"adapter": {"path": "none", "files_sha256": "0"}}, "is missing, none: put it back"),
    ):
        recipe.write_text(json.dumps(told | change))
        code, _, error = evaluate("--recipe", recipe)
        assert code == 2 and why in error and error.count("\n") == 1
    other = shutil.copytree(TINY, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"note": 1}))
    recipe.write_text(json.dumps(told | {"model": told["model"] | {"path": str(other)}}))
    code, _, error = evaluate("--recipe", recipe)
    assert code == 2 and "the model is not the one of" in error
    assert not (tmp_path / "out.json").exists() and not (tmp_path / "out.rows.jsonl.part").exists()


@pytest.fixture
def run_by(run_script, eval_script, files, write_rows, tmp_path):
    """A function (script, recipe) -> the one line by which a script that runs the small model refuses it."""
    replies = write_rows("replies.jsonl", [{"prompt": row(text)["prompt"], "prediction": row(text)["completion"]} for text in REQUESTS])
    flags = {
        "eval": (eval_script, "--model-kind", "slm", "--dataset", files[0], "--out", tmp_path / "out.json"),
        "live_compare": (load_script("01_eval/live_compare.py"), "--models", "replay", "slm", "--dataset", files[0], "--replies", replies),
        "serve": (load_script("05_serve/serve.py"), "--mode", "local", "--port", 0, "--state", tmp_path / "state"),
    }

    def refused(script, recipe):
        code, _, error = run_script(flags[script][0], "--track", "toolcall", *flags[script][1:], "--recipe", recipe)
        assert code == 2 and error.count("\n") == 1, error
        assert not any(flag in error for flag in ("--adapter ", "--precision", "--engine", "--model", "SLM_MODEL_PATH")), "which nobody gave"
        return error

    return refused


@pytest.mark.parametrize("script", ["eval", "live_compare", "serve"])
def test_a_recipe_of_another_place_is_refused_by_what_was_given(run_by, recipe, tmp_path, monkeypatch, script):
    told = json.loads(recipe.read_text())
    recipe.write_text(json.dumps(told | {"model": told["model"] | {"path": "models/gone"}}))
    assert f"no checkpoint at models/gone (no config.json): put the model of {recipe} back, or make the recipe again with 04_ft/improve.py" in run_by(script, recipe)
    recipe.write_text(json.dumps(told | {"model": {"path": "small", "files_sha256": None}, "engine": "served", "precision": None}))
    monkeypatch.delenv("SLM_MODEL_PATH")
    assert "recipe.json is of the served model small: set SLM_BASE_URL to its server, or make the recipe again with 04_ft/improve.py" in run_by(script, recipe)
    recipe.write_text(json.dumps(told))
    monkeypatch.setenv("SLM_BASE_URL", "http://127.0.0.1:9/v1")
    assert "recipe.json is of the checkpoint slm_swap/models/phi-tiny, and SLM_BASE_URL names a server: unset SLM_BASE_URL, or" in run_by(script, recipe)
    monkeypatch.delenv("SLM_BASE_URL")
    (tmp_path / "adapter").mkdir()
    recipe.write_text(json.dumps(told | {"adapter": {"path": str(tmp_path / "adapter"), "files_sha256": "0" * 64}}))
    assert f"recipe.json has no adapter_config.json, {tmp_path / 'adapter'}: put it back, or make the recipe again with 04_ft/improve.py" in run_by(script, recipe)


def test_a_recipe_is_of_the_small_model(run_script, eval_script, recipe, files):
    code, _, error = run_script(eval_script, "--track", "toolcall", "--model-kind", "azure", "--dataset", files[0], "--recipe", recipe)
    assert code == 2 and "--recipe says how the small model is asked" in error


def test_live_compare_asks_the_small_model_alone_by_it(run_script, recipe, files, tmp_path, write_rows):
    replies = write_rows("replies.jsonl", [{"prompt": row(text)["prompt"], "prediction": row(text)["completion"]} for text in REQUESTS])

    def compare(*flags):
        known = ("--track", "toolcall", "--models", "replay", "slm", "--dataset", files[0], "--replies", replies, "--save", "--out-dir", tmp_path / "live")
        return run_script(load_script("01_eval/live_compare.py"), *known, *flags)

    code, _, error = compare("--recipe", recipe)
    assert code == 0, error
    first, slm, replay = (json.loads(path.read_text()) for path in (
        tmp_path / "first.json", tmp_path / "live/toolcall_slm_rows_live.json", tmp_path / "live/toolcall_replay_rows_live.json",
    ))  # fmt: skip
    assert slm["prompt_sha256"] == first["prompt_sha256"] and slm["inputs"]["few_shot"]["shots"] == 1 and "few_shot" not in replay["inputs"]
    assert slm["model"]["parameters"]["max_new_tokens"] == 4
    code, printed, error = compare("--recipe", recipe)
    assert code == 0 and "both reports are finished" in printed, error
    recipe.write_text(json.dumps(json.loads(recipe.read_text()) | {"few_shot": None}))
    for flags in (("--recipe", recipe), ("--precision", "fp32", "--engine", "transformers", "--max-new-tokens", 4)):
        code, printed, error = compare(*flags)
        assert code == 2 and "is a finished report of another run (recipe_sha256" in error and printed == "", "asked otherwise, or without the recipe"


def test_training_asks_as_it_says_of_the_same_model_alone(run_script, recipe, files, tmp_path):
    script = load_script("04_ft/train_unsloth.py")
    known = ("--track", "toolcall", "--train", files[1], "--val", files[0], "--backend", "trl", "--precision", "fp32", "--epochs", 1, "--out", tmp_path / "adapter")
    told = json.loads(recipe.read_text())
    recipe.write_text(json.dumps(told | {"model": told["model"] | {"files_sha256": "0" * 64}}))
    code, _, error = run_script(script, *known, "--recipe", recipe)
    assert code == 2 and "the model is not the one of" in error and not (tmp_path / "adapter").exists()
    recipe.write_text(json.dumps(told))
    code, printed, error = run_script(script, *known, "--recipe", recipe)
    assert code == 0, error
    assert f" --few-shot {files[1]} --shots 1 --out " in printed.splitlines()[-1], "an adapter is evaluated as it learned"
