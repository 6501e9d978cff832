"""A training run that is killed goes on from its last checkpoint and ends as if nothing had happened, to the bit."""

import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from slm_swap.common.errors import UserError
from slm_swap.common.settings import Launch, Settings
from slm_swap.evaluating.evaluation import evaluate, references
from slm_swap.evaluating.report import summary
from slm_swap.scoring.tracks import TRACKS
from slm_swap.slm_client import SLMClient
from slm_swap.tuning.checkpoints import LOCK, MARKER, RUN, Checkpoints
from slm_swap.tuning.training import identity, train
from tests.support.disks import mounted
from tests.support.training_rows import BASE, INPUTS, QUICK, ROWS, example

# Epochs in another order each, dropout, an accumulation that the epoch does not divide by, a best step before the last one.
PARAMETERS = replace(QUICK, batch_size=1, gradient_accumulation=3, epochs=4, learning_rate=5e-3, eval_steps=3, lora_r=8)
SAVE_STEPS = 4
# They ask for the color that the train rows forbid: the better the model learns, the worse it is here.
HELD_OUT = [example(color, f'{{"tool_name":"paint_wall","arguments":{{"color":"{color}"}}}}') for color in ("teal", "gold", "lime")]


def run(out: Path, resume: bool = False, parameters=PARAMETERS, inputs=INPUTS, **options) -> dict:
    options = {"save_steps": SAVE_STEPS, "resume": resume} | options
    return train("structured", BASE, ROWS, HELD_OUT, out, parameters, "trl", inputs, **options)


def in_child(out: Path, sabotage=None, kill_after: float | None = None) -> int:
    """The exit code of a resumed run in a process of its own: -9 where `sabotage`, or a SIGKILL after some seconds, ended it."""

    def work():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if sabotage:
            sabotage()
        run(out, resume=True)

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    if kill_after is not None:
        child.join(kill_after)
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
    child.join(120)
    return child.exitcode


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run: its folder, what it told, and the seconds that it took."""
    out, began = tmp_path_factory.mktemp("whole") / "adapter", time.perf_counter()
    return out, run(out), time.perf_counter() - began


def same(out: Path, whole) -> bool:
    names = ("adapter_model.safetensors", "training_log.jsonl", "adapter_config.json")
    return all((out / name).read_bytes() == (whole[0] / name).read_bytes() for name in names)


def test_the_uninterrupted_run_tests_what_it_should(whole):
    out, told, _ = whole
    assert told["steps"] == 12 and 0 < told["best_step"] < 12 and told["sessions"] == 1
    assert [path.name for path in out.parent.iterdir()] == ["adapter"], "its checkpoints go when the adapter is there"
    values = [entry["eval_loss"] for entry in map(json.loads, (out / "training_log.jsonl").open()) if "eval_loss" in entry]
    assert len(values) == 4 and told["eval_loss"]["after"] == min(values) < values[-1]


def kill_in(module: str, name: str, call: int):
    """Lets the process kill itself in the middle of the given call of a function."""

    def sabotage():
        import importlib

        owner = importlib.import_module(module)
        if "." in name:
            owner = getattr(owner, name.split(".")[0])
        attribute, calls = name.rsplit(".", 1)[-1], []
        original = getattr(owner, attribute)

        def wrapped(*args, **options):
            calls.append(1)
            if len(calls) == call:
                die()
            return original(*args, **options)

        setattr(owner, attribute, wrapped)

    return sabotage


MOMENTS = {
    "before the first checkpoint is whole": ("slm_swap.tuning.checkpoints", "Checkpoints.complete", 1),
    "in the optimizer's file of the second": ("torch", "save", 6),
    "while an older checkpoint is removed": ("shutil", "rmtree", 2),
    "while the adapter is written": ("slm_swap.tuning.record", "plot", 1),
    "when the adapter is there and the checkpoints are not gone": ("slm_swap.tuning.checkpoints", "Checkpoints.remove", 1),
}


def test_killed_at_the_worst_moments_it_ends_in_the_same_adapter(whole, tmp_path):
    out, told = tmp_path / "adapter", {}
    for moment, (module, name, call) in MOMENTS.items():
        told[moment] = (in_child(out, kill_in(module, name, call)), Checkpoints(out).steps())
    assert {code for code, _ in told.values()} == {-signal.SIGKILL}, told
    assert [steps for _, steps in told.values()] == [[], [3], [3, 4, 8], [3, 4, 8], [3, 4, 8]], told
    assert in_child(out) == 0 and same(out, whole)
    info = json.loads((out / "training_info.json").read_text())
    assert info["sessions"] == 3, "the others added nothing"
    assert info["eval_loss"] == whole[1]["eval_loss"] and info["best_step"] == whole[1]["best_step"]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_killed_at_random_moments_it_ends_in_the_same_adapter(whole, tmp_path):
    out, dice = tmp_path / "adapter", random.Random()
    moments = [dice.uniform(0.2, 1.0) * whole[2] for _ in range(2)]
    codes = [in_child(out, kill_after=moment) for moment in moments]
    assert in_child(out) == 0 and same(out, whole), (moments, codes)


def test_checkpoints_of_another_run_are_refused(tmp_path):
    out = tmp_path / "adapter"
    checkpoints = Checkpoints(out)
    checkpoints.open(identity("structured", BASE, PARAMETERS, "trl", INPUTS, None, Launch()), resume=False)
    checkpoints.path(8).mkdir()
    checkpoints.complete(8, {})
    kept = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"holds an unfinished run \(step 8\): go on with --resume, or delete"):
        run(out)
    others = {
        "inputs.train.sha256 was 000.* is 111": {"inputs": {"train": INPUTS["train"] | {"sha256": "1" * 64}}},
        "hyperparameters.learning_rate was 0.005, is 0.01": {"parameters": replace(PARAMETERS, learning_rate=0.01)},
    }
    for message, other in others.items():
        with pytest.raises(UserError, match=message):
            run(out, resume=True, **other)
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == kept and checkpoints.steps() == [8]


def test_only_marked_checkpoints_count_and_the_rest_goes(tmp_path):
    checkpoints = Checkpoints(tmp_path / "adapter")
    checkpoints.open({"seed": 1}, resume=False)
    for step in (5, 10, 15, 20, 25):
        checkpoints.path(step).mkdir()
        if step < 25:
            checkpoints.complete(step, {"z": 0.1, "step": step}, best=5)
    assert checkpoints.steps() == [5, 15, 20] and checkpoints.latest() == (checkpoints.path(20), {"z": 0.1, "step": 20})
    checkpoints.open({"seed": 1}, resume=True)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["checkpoint-15", "checkpoint-20", "checkpoint-5", LOCK, RUN]
    assert (checkpoints.path(20) / MARKER).is_file()
    checkpoints.remove()
    assert checkpoints.latest() is None and not list(tmp_path.iterdir())


def test_training_ends_early_and_the_best_step_is_kept(tmp_path, whole):
    told = run(tmp_path / "adapter", parameters=replace(PARAMETERS, early_stopping=2))
    assert (told["steps"], told["best_step"]) == (9, 3)
    weights = [(out / "adapter_model.safetensors").read_bytes() for out in (tmp_path / "adapter", whole[0])]
    assert weights[0] == weights[1], "both keep step 3"


def test_the_best_step_may_go_by_the_tracks_own_metric(tmp_path):
    rows = [*ROWS[:2], HELD_OUT[0]]
    parameters = replace(PARAMETERS, epochs=2, eval_generate=3, best_by="exact_match_rate")
    out = tmp_path / "adapter"
    told = train("structured", BASE, ROWS, rows, out, parameters, "trl", INPUTS)
    points = [entry for entry in map(json.loads, (out / "training_log.jsonl").open()) if "eval_loss" in entry]
    rates = {point["step"]: point["eval_exact_match_rate"] for point in points}
    best = max(rates.values())
    assert told["metrics"]["before"]["exact_match_rate"] != best, "training changed nothing"
    assert told["best_step"] == min(step for step, rate in rates.items() if rate == best)
    assert told["metrics"]["after"]["exact_match_rate"] == best
    client = SLMClient(Settings(slm_model_path=str(BASE)), precision="fp32", adapter=out)
    scored = evaluate("structured", client, rows, references(TRACKS["structured"], rows), 8)
    assert summary(TRACKS["structured"], scored)["metrics"] == told["metrics"]["after"]


@pytest.mark.parametrize("kib, kept", [(4_000, []), (18_000, ["step 1 is kept: the same command with --resume goes on from there"])])
def test_a_full_disk_is_named_and_the_training_goes_on(tmp_path, kib, kept):
    """Full while the first checkpoint is written, by torch or safetensors, and while the adapter is."""
    rows, parameters, said = ROWS[:8], replace(QUICK, epochs=1), []
    train("structured", BASE, rows, [], tmp_path / "whole", parameters, "trl", INPUTS, save_steps=1)
    with mounted(tmp_path / "big", 48) as disk:
        out = disk.folder / "adapter"
        disk.leave(kib)
        place = out if kept else f"{out}.checkpoints"
        with pytest.raises(UserError, match=rf"^cannot write {place} \(No space left on device\): make room and run the same command again$"):
            train("structured", BASE, rows, [], out, parameters, "trl", INPUTS, save_steps=1, say=said.append)
        assert [line for line in said if "is kept" in line] == kept and bool(disk.files()) == bool(kept)
        disk.make_room()
        train("structured", BASE, rows, [], out, parameters, "trl", INPUTS, save_steps=1, resume=True)
        assert (out / "adapter_model.safetensors").read_bytes() == (tmp_path / "whole/adapter_model.safetensors").read_bytes()
        assert [path.name for path in disk.folder.iterdir()] == ["adapter"]


def test_a_place_that_is_no_folder_is_refused_and_kept(tmp_path):
    (tmp_path / "adapter").write_text("mine")
    with pytest.raises(UserError, match="is there and is no folder"):
        train("structured", BASE, ROWS, [], tmp_path / "adapter", QUICK, "trl", INPUTS)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
