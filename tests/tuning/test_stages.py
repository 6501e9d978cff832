"""The ladder's processes: their ends, their hours and money, and that they end with it; and improve.py from the command line."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from slm_swap.clients.pricing import LocalPrices, Prices
from slm_swap.common.errors import UserError
from slm_swap.common.settings import PACKAGE, ROOT
from slm_swap.rows.prompts import toolcall_prompt
from slm_swap.tuning import stages
from slm_swap.tuning.ladder import OutOfBudget, Unfit
from slm_swap.tuning.stages import Budget, Stages
from tests.support.evaluated import AZURE, calls, replies, write_report
from tests.support.processes import wait_until
from tests.support.scripts import load_script

WRITES = "import sys; from pathlib import Path; Path(sys.argv[sys.argv.index('--out') + 1]).write_text(' '.join(sys.argv[1:]))"


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A function that makes Stages whose eval.py is the given code."""
    monkeypatch.setattr(stages, "PACKAGE", tmp_path)
    (tmp_path / "01_eval").mkdir()

    def make(code: str, budget: Budget | None = None, hour: float | None = None) -> Stages:
        (tmp_path / "01_eval/eval.py").write_text(code)
        prices = Prices("prices.toml", local=LocalPrices(hour=hour))
        return Stages(tmp_path / "ladder", budget or Budget(), prices, ["--track", "toolcall"], [], ["--session", "s"], lambda text: None)

    return make


def test_an_evaluation_is_given_its_flags(made, tmp_path):
    stage = made(WRITES, hour=3600.0)
    seconds = stage.evaluate("few-shot 1", {"few_shot": Path("train.jsonl"), "shots": 1}, tmp_path / "out.json")
    told = (tmp_path / "out.json").read_text()
    assert told == f"--model-kind slm --track toolcall --few-shot train.jsonl --shots 1 --out {tmp_path / 'out.json'} --session s"
    assert stage.budget.spent_money == pytest.approx(seconds) and (tmp_path / "ladder/logs/few-shot_1.log").exists()


@pytest.mark.parametrize(
    ("setting", "shown"), [({"ask": "text"}, "--ask text "), ({"few_shot": Path("train.jsonl"), "shots": 3}, "--few-shot train.jsonl --shots 3 ")]
)
def test_a_training_is_asked_as_its_adapter_will_be(made, tmp_path, setting, shown):
    stage = made("")
    (tmp_path / "04_ft").mkdir()
    (tmp_path / "04_ft/train_unsloth.py").write_text(WRITES)
    stage.train("fast", setting | {"adapter": tmp_path / "out", "max_new_tokens": 96})
    assert (tmp_path / "out").read_text() == f"--preset fast {shown}--out {tmp_path / 'out'} --resume --session s"


def test_what_cannot_be_asked_is_told_by_its_own_line(made, tmp_path):
    stage = made("import sys; print('warning: x', file=sys.stderr); print('error: no such thing: do that', file=sys.stderr); sys.exit(2)")
    with pytest.raises(Unfit, match=r"^no such thing: do that$"):
        stage.evaluate("ask", {}, tmp_path / "out.json")
    with pytest.raises(Unfit, match="it ended with exit code 2: its log is"):
        made("import sys; sys.exit(2)").evaluate("ask", {}, tmp_path / "out.json")
    with pytest.raises(UserError, match=r"01_eval/eval.py ended with exit code 7: its log is"):
        made("import sys; sys.exit(7)").evaluate("ask", {}, tmp_path / "out.json")


def test_hours_and_money_end_it(made, tmp_path):
    with pytest.raises(OutOfBudget, match=r"what --hours allows is spent, after 1 s of it: the same command with more --hours goes on"):
        made("import time; time.sleep(600)", Budget(seconds=1.0)).evaluate("ask", {}, tmp_path / "out.json")
    with pytest.raises(OutOfBudget, match="the 1 hours are spent"):
        made(WRITES, Budget(seconds=3600.0, spent_seconds=3600.0)).evaluate("ask", {}, tmp_path / "out.json")
    with pytest.raises(OutOfBudget, match="the 2 of --spend are spent"):
        made(WRITES, Budget(money=2.0, spent_money=2.5)).evaluate("ask", {}, tmp_path / "out.json")
    with pytest.raises(OutOfBudget, match=r"what --spend allows is spent, after 1 s of it: the same command with more --spend goes on"):
        made("import time; time.sleep(600)", Budget(seconds=3600.0, money=2.0, spent_money=1.0), hour=3600.0).evaluate("ask", {}, tmp_path / "out.json")


@pytest.mark.parametrize("ends", ["OutOfBudget", "Unfit", "well", "torn"])
def test_what_a_stage_took_counts_in_the_next_run_whether_it_ended_or_not(made, tmp_path, ends):
    code = {"OutOfBudget": "import time; time.sleep(600)", "Unfit": "import sys; sys.exit(2)"}.get(ends, WRITES)
    stage = made(code, Budget(seconds=6.0 if ends == "OutOfBudget" else None), hour=3600.0)
    stage.take_up((5.0, 5.0))
    with suppress(OutOfBudget, Unfit):
        stage.evaluate("ask", {}, tmp_path / "out.json")
    spent = stage.budget.spent_money
    assert spent > (5.9 if ends == "OutOfBudget" else 5.0)
    if ends == "torn":
        with open(stage.ledger, "a") as file:
            file.write('{"began": "x", "sec')
    again = made(WRITES, hour=3600.0)
    again.take_up((999.0, 999.0))
    assert again.budget.spent_money == pytest.approx(spent) and again.budget.spent_seconds == pytest.approx(spent, abs=0.01)
    again.evaluate("ask", {}, tmp_path / "out.json")
    last = made(WRITES, hour=3600.0)
    last.take_up((999.0, 999.0))
    assert last.budget.spent_money == pytest.approx(again.budget.spent_money)


def test_a_training_costs_what_an_hour_of_training_does(made, tmp_path):
    stage = made(WRITES)
    (tmp_path / "04_ft").mkdir()
    (tmp_path / "04_ft/train_unsloth.py").write_text(WRITES)
    stage.prices = Prices("prices.toml", local=LocalPrices(hour=3600.0, training_hour=36000.0))
    seconds = stage.train("fast", {"adapter": tmp_path / "out"})
    assert stage.budget.spent_money == pytest.approx(10 * seconds, rel=0.2)


def test_a_stage_that_is_still_at_work_elsewhere_says_nothing_of_the_model(made, tmp_path):
    for said in ("x.part is another process's: wait until it is done", "another process trains with x: wait for its end"):
        with pytest.raises(UserError, match=r"^ask: .*another process"):
            made(f"import sys; print('error: {said.replace(chr(39), '')}', file=sys.stderr); sys.exit(2)").evaluate("ask", {}, tmp_path / "out.json")


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux'")
@pytest.mark.parametrize("background", [False, True])
def test_a_stage_ends_with_a_killed_ladder(made, tmp_path, background):
    """Else the next run would find its journal in use. In the `background` of a script SIGINT is ignored, which is handed down."""
    made("import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(600)")
    code = (
        "from pathlib import Path; from slm_swap.tuning import stages; from slm_swap.clients.pricing import Prices; import sys\n"
        "stages.PACKAGE = Path(sys.argv[1])\n"
        "stages.Stages(Path('ladder'), stages.Budget(), Prices('p'), [], [], [], print).evaluate('ask', {}, Path('out.json'))"
    )
    ladder = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN if background else signal.SIG_DFL),
    )  # fmt: skip
    wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    pid = int((tmp_path / "pid").read_text())
    ladder.send_signal(signal.SIGKILL)
    ladder.wait()

    def ended() -> bool:
        return not Path(f"/proc/{pid}").exists() or Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] == "Z"

    wait_until(ended)
    assert ended()


TOOL = {"name": "paint", "description": "Paint.", "parameters": {"type": "object", "properties": {"color": {"type": "string"}}}}


@pytest.fixture
def improve(run_script, write_rows, tmp_path, monkeypatch):
    monkeypatch.setenv("SLM_MODEL_PATH", str(PACKAGE / "models/phi-tiny"))
    completion = '<tool_call name="paint">{"color":"red"}</tool_call>'
    rows = [{"prompt": toolcall_prompt([TOOL], text), "completion": completion, "tools": [TOOL]} for text in ("paint a door", "a red fence", "the roof")]
    val = write_rows("val.jsonl", rows)
    flags = ("--track", "toolcall", "--dataset", val, "--engine", "transformers", "--precision", "fp32", "--max-new-tokens", 2, "--out", tmp_path / "ladder")
    return lambda *more: run_script(load_script("04_ft/improve.py"), *flags, *more)


def test_improve_climbs_writes_a_recipe_and_goes_on(improve, tmp_path):
    code, printed, error = improve("--rungs", "tokens,few-shot,train")
    assert code == 0, error
    assert "no train rows: few-shot and fine-tuning are left out; name them with --train" in printed
    assert "no report of the hosted model on these rows, so no verdict and no early end" in printed
    told, recipe = (json.loads((tmp_path / "ladder" / name).read_text()) for name in ("ladder.json", "recipe.json"))
    assert [one["rung"] for one in told["rungs"]] == ["base", "tokens"] and told["rungs"][1]["outcome"] == "goes"
    assert recipe["max_new_tokens"] == 2 and recipe["few_shot"] is None and recipe["engine"] == "transformers"
    assert "--recipe" in printed.splitlines()[-2] and "compare.py" in printed.splitlines()[-1]
    code, printed, _ = improve("--rungs", "tokens")
    assert code == 0 and "base: measured already" in printed and "tokens: measured already" in printed
    code, printed, _ = improve("--rungs", "tokens", "--dry-run")
    assert code == 0 and "by 3 rows" in printed and "if every reply takes all 8 tokens" in printed


def test_a_model_that_changes_where_it_lies_is_measured_anew(improve, tmp_path, monkeypatch):
    model = tmp_path / "model"
    shutil.copytree(PACKAGE / "models/phi-tiny", model)
    monkeypatch.setenv("SLM_MODEL_PATH", str(model))
    for changed in (False, True):
        if changed:
            (model / "config.json").write_text((model / "config.json").read_text() + "\n")
        code, printed, error = improve("--rungs", "tokens")
        assert code == 0 and "measured already" not in printed, error
    assert len(list((tmp_path / "ladder/reports").glob("base_????????.json"))) == 2


def test_a_hosted_report_of_other_rows_is_refused_before_anything_runs(improve, tmp_path):
    other = write_report(tmp_path / "azure.json", rows := calls(4), replies(rows, ["right"]), AZURE)
    code, _, error = improve("--azure", other)
    assert code == 2 and "azure.json is of other rows than these: evaluate the hosted model on them by python 01_eval/eval.py" in error
    assert not (tmp_path / "ladder").exists()


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (("--rungs", "ask,magic"), "'magic': give some of ask, thinking, tokens, few-shot, constrain, train, combine"),
        (("--hours", "0"), "0 is not a number above 0"),
        (("--spend", "3"), "--spend needs the machine's price: write `hour` under [local] in prices.toml"),
        (("--train", "none.jsonl"), "none.jsonl: check --train"),
        (("--azure", "none.json"), "none.json"),
        (("--delta", "1"), "--delta must be below 1"),
        (("--training-flags", "--epochs '2"), "--training-flags cannot be read as words (No closing quotation): check its quotes"),
        (("--train", "val.jsonl"), "has the rows that are measured: what a model was shown or trained on chooses nothing; name other rows with --train"),
    ],
)
def test_bad_input_is_one_line(improve, flags, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, error = improve(*flags)
    assert code == 2 and why in error and error.count("\n") == 1 and not (tmp_path / "ladder").exists()


def test_the_test_split_chooses_nothing(run_script):
    code, _, error = run_script(load_script("04_ft/improve.py"), "--track", "toolcall", "--split", "test")
    assert code == 2 and "the test split chooses nothing" in error and error.count("\n") == 1


def test_a_plan_that_cannot_begin_is_one_line(improve):
    code, _, error = improve("--dry-run", "--thinking", "on")
    assert code == 2 and "the ladder cannot begin: " in error and "Traceback" not in error


def test_a_folder_is_one_ladder_s(improve, tmp_path):
    (tmp_path / "ladder").mkdir()
    with open(tmp_path / "ladder/lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code, _, error = improve("--rungs", "tokens")
    assert code == 2 and "another improve.py is at work in" in error and error.count("\n") == 1


@pytest.mark.parametrize("change", [lambda told: told | {"constrain": "retry"}, lambda told: [told], lambda told: None])
def test_a_recipe_of_other_rungs_is_kept(improve, tmp_path, change):
    """And so is one that cannot be read: the ladder is climbed by then."""
    assert improve("--rungs", "tokens")[0] == 0
    path = tmp_path / "ladder/recipe.json"
    better = change(json.loads(path.read_text()))
    path.write_text("torn" if better is None else json.dumps(better))
    code, printed, error = improve("--rungs", "tokens")
    assert code == 0 and "the recipe that an earlier run chose was another one and is kept" in printed, error
    [kept] = (tmp_path / "ladder").glob("recipe_????????.json")
    assert kept.read_text() == ("torn" if better is None else json.dumps(better)) and json.loads(path.read_text())["constrain"] != "retry"
    assert improve("--rungs", "tokens")[0] == 0 and len(list((tmp_path / "ladder").glob("recipe_*"))) == 1, "of the same again none is kept"


def test_the_next_commands_are_of_the_same_rows(improve, tmp_path, write_rows):
    write_rows("test.jsonl", [])
    printed = improve("--rungs", "tokens")[1]
    assert f" --dataset {tmp_path / 'test.jsonl'} " in printed.splitlines()[-2]


@pytest.mark.parametrize("limit", [None, 2])
def test_a_training_is_validated_on_the_rows_that_are_measured(improve, tmp_path, write_rows, monkeypatch, limit):
    seen = []

    def train(self, preset, setting):
        seen.append((self.training, setting["adapter"]))
        raise Unfit("not trained here")

    monkeypatch.setattr(Stages, "train", train)
    train_rows = write_rows("train.jsonl", [{"prompt": toolcall_prompt([TOOL], "a wall"), "completion": '<tool_call name="paint">{"color":"blue"}</tool_call>', "tools": [TOOL]}])
    code, printed, error = improve("--rungs", "train", "--train", train_rows, *(["--limit", limit] if limit else []))
    assert code == 0 and "train fast: not tried: not trained here" in printed, error
    [(flags, _)] = seen
    script = load_script("04_ft/train_unsloth.py")
    rows, inputs = script.read_rows(script.parse_args([*flags, "--out", str(tmp_path / "adapter")]))
    assert (len(rows["val"]), inputs["val"]["rows"], len(rows["train"])) == (limit or 3, limit or 3, 1)
    assert json.loads((tmp_path / "ladder/ladder.json").read_text())["inputs"]["rows"] == (limit or 3)
