"""Training in several processes: the same result, one that speaks, and no rank left waiting for one that has failed."""

import contextlib
import importlib.util
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from slm_swap.common.errors import UserError
from slm_swap.common.settings import PACKAGE, Launch
from slm_swap.tuning import backends
from slm_swap.tuning.backends import choose_deepspeed, has_gpu
from slm_swap.tuning.checkpoints import Checkpoints
from slm_swap.tuning.training import load_together, train
from tests.support.processes import PATIENCE, children_of, commands_path, free_port, wait_until
from tests.support.training_rows import BASE, INPUTS, QUICK, ROWS
from tests.support.untaught_end import untaught_end

CONFIGS = PACKAGE / "accelerate_config"
ZERO2 = CONFIGS / "deepspeed_zero2.json"
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
FLAGS = (
    "--track", "structured", "--model", BASE, "--precision", "fp32", "--batch-size", "2", "--gradient-accumulation", "1",
    "--no-gradient-checkpointing", "--learning-rate", "5e-3", "--lora-dropout", "0", "--save-steps", "1",
)  # fmt: skip


def on_two_ranks(work, *args, killed: bool = False) -> list:
    """What `work(rank, *args)` gives on each of two forked processes that find each other as torchrun's do. `killed`: rank 0 kills itself."""
    context, port = multiprocessing.get_context("fork"), free_port()
    results = context.SimpleQueue()

    def rank(number: int) -> None:
        os.environ |= {"RANK": str(number), "WORLD_SIZE": "2", "LOCAL_RANK": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
        if ZERO2 in args:
            from deepspeed import ops

            ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled first: half a minute and more
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            found = work(number, *args)
        results.put((number, found, output.getvalue()))

    children = [context.Process(target=rank, args=(number,)) for number in range(2)]
    for child in children:
        child.start()
    children[0].join(120)
    if killed:
        children[1].kill()
    children[1].join(120)
    codes = [child.exitcode for child in children]
    assert (codes[0] == -signal.SIGKILL and codes[1] in (-signal.SIGKILL, 1)) if killed else codes == [0, 0], codes  # rank 1 may notice it first
    return [] if killed else sorted(results.get() for _ in children)


def train_rank(rank: int, out: Path, parameters, base: Path = BASE) -> dict:
    said: list[str] = []
    told = train(
        "structured", base, ROWS, ROWS[:3], out, parameters, "trl", INPUTS, launch=Launch(rank, 2, rank), say=said.append
    )
    return {"eval_loss": told["eval_loss"], "metrics": told["metrics"], "said": said}


@pytest.mark.parametrize("shape", [{}, {"packing": True, "pack_length": 400, "max_length": 400, "eval_generate": 3}])
def test_two_processes_do_what_one_does_with_twice_the_accumulation(tmp_path, shape):
    parameters = replace(QUICK, batch_size=1, epochs=1, lora_dropout=0.0, eval_steps=2, **shape)
    found = on_two_ranks(train_rank, tmp_path / "two", parameters)
    alone = train("structured", BASE, ROWS, ROWS[:3], tmp_path / "one", replace(parameters, gradient_accumulation=2), "trl", INPUTS)
    logs = [[json.loads(line) for line in (tmp_path / name / "training_log.jsonl").open()] for name in ("one", "two")]
    assert len(logs[0]) == len(logs[1]) >= 3
    for one, two in zip(*logs, strict=True):
        assert two == pytest.approx(one, rel=2e-3, abs=1e-5)
    for _, told, _ in found:
        assert told["eval_loss"] == pytest.approx(alone["eval_loss"], rel=2e-3) and told["metrics"] == alone["metrics"]
    assert found[0][2] and not found[1][2], "only rank 0 prints"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"], "only rank 0 writes"


def test_a_row_of_the_head_is_trained_in_two_processes_as_in_one(tmp_path):
    from safetensors.torch import load_file

    parameters, base = replace(QUICK, batch_size=1, epochs=1, lora_dropout=0.0), untaught_end(tmp_path / "base")
    on_two_ranks(train_rank, tmp_path / "two", parameters, base)
    train("structured", base, ROWS, [], tmp_path / "one", replace(parameters, gradient_accumulation=2), "trl", INPUTS)
    rows = []
    for name in ("one", "two"):
        weights = load_file(tmp_path / name / "adapter_model.safetensors")
        rows += [weight for key, weight in weights.items() if "trainable_tokens" in key]
    began = load_file(base / "model.safetensors")["model.embed_tokens.weight"][0]
    assert len(rows) == 2 and (rows[0] - began).norm() > 0.01, "it has moved from where it began, the end of a text"
    assert (rows[0] - rows[1]).norm() < 0.05 * (rows[0] - began).norm()


def train_resumably(rank: int, out: Path, deepspeed: Path | None, dies: bool = False) -> None:
    """With `dies`, rank 0 is killed as its second checkpoint is whole."""
    complete, calls = Checkpoints.complete, []

    def complete_and_die(*args, **options):
        complete(*args, **options)
        calls.append(1)
        if dies and len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    Checkpoints.complete = complete_and_die
    parameters = replace(QUICK, batch_size=1, epochs=2, lora_dropout=0.1, eval_steps=4)
    train("structured", BASE, ROWS, ROWS[:3], out, parameters, "trl", INPUTS, save_steps=3, resume=True, deepspeed=deepspeed, launch=Launch(rank, 2, rank))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Callable[[Path | None], Path]:
    """The adapter that two processes have trained, by plain DDP or with a DeepSpeed configuration."""

    @cache
    def trained(config: Path | None) -> Path:
        out = tmp_path_factory.mktemp("two") / "adapter"
        on_two_ranks(train_resumably, out, config)
        return out

    return trained


@pytest.mark.parametrize("config", [None, pytest.param(ZERO2, marks=needs_deepspeed)])
def test_two_processes_that_are_killed_go_on_to_the_same_adapter(two_processes, tmp_path, config):
    """On one CPU thread a process the sums are the same to the bit."""
    on_two_ranks(train_resumably, tmp_path / "adapter", config, True, killed=True)
    assert Checkpoints(tmp_path / "adapter").steps() and not (tmp_path / "adapter").exists()
    on_two_ranks(train_resumably, tmp_path / "adapter", config)
    told = json.loads((tmp_path / "adapter/training_info.json").read_text())
    assert told["sessions"] == 2 and (told["deepspeed_sha256"] is None) == (config is None)
    assert (tmp_path / "adapter/adapter_model.safetensors").read_bytes() == (two_processes(config) / "adapter_model.safetensors").read_bytes()


@needs_deepspeed
def test_zero_2_gives_the_adapter_of_plain_ddp(two_processes):
    """Up to the last bits: each process updates its part of the weights laid end to end."""
    import torch
    from safetensors.torch import load_file

    plain, parted = (load_file(two_processes(config) / "adapter_model.safetensors") for config in (None, ZERO2))
    assert plain.keys() == parted.keys()
    for name, weight in plain.items():
        assert torch.allclose(weight, parted[name], rtol=1e-5, atol=1e-7), name


def train_as_unsloth(rank: int, out: Path, deepspeed: Path | None, processes: int) -> dict:
    """With what Unsloth's trainer is made of, TRL's, on a model that PEFT made: a stand-in, as Unsloth needs a GPU."""
    sys.modules["unsloth"] = types.ModuleType("unsloth")
    backends._load_unsloth = lambda path, parameters, _: backends.load_trainable(path, parameters, "trl", "cpu")
    launch = Launch(rank, 2, rank) if processes == 2 else Launch()
    parameters = replace(QUICK, batch_size=1, gradient_accumulation=4 // processes, epochs=2, eval_steps=3, lora_dropout=0.0)
    told = train("structured", BASE, ROWS, ROWS[:5], out, parameters, "unsloth", INPUTS, deepspeed=deepspeed, launch=launch)
    return told["eval_loss"] | {"train": told["train_loss"]}


@pytest.mark.parametrize("config", [None, pytest.param(ZERO2, marks=needs_deepspeed)])
def test_the_other_back_ends_trainer_measures_in_two_processes_what_it_does_in_one(tmp_path, config, monkeypatch):
    monkeypatch.setitem(sys.modules, "unsloth", None)
    monkeypatch.setattr(backends, "_load_unsloth", None)
    alone = train_as_unsloth(0, tmp_path / "one", None, 1)
    for _, told, _ in on_two_ranks(train_as_unsloth, tmp_path / "two", config, 2):
        assert told == pytest.approx(alone, rel=2e-3)
    assert alone["after"] < 0.5 * alone["before"]


def load_on(rank: int) -> str:
    import torch

    torch.distributed.init_process_group("gloo")

    def load():
        if rank == 1:
            raise UserError("the file is torn: download it again")

    try:
        load_together(load, 2)
    except UserError as error:
        return str(error)


def test_a_model_that_one_rank_cannot_load_ends_all_with_its_error():
    assert [told for _, told, _ in on_two_ranks(load_on)] == ["rank 1: the file is torn: download it again"] * 2


@pytest.fixture
def files(write_rows, tmp_path):
    write_rows("train.jsonl", [row.to_json() for row in ROWS])
    write_rows("val.jsonl", [row.to_json() for row in ROWS[:2]])
    return "--train", tmp_path / "train.jsonl", "--val", tmp_path / "val.jsonl", "--out", tmp_path / "adapter"


def start(*command: object, cwd: Path = PACKAGE, **environment: str) -> subprocess.CompletedProcess:
    known = os.environ | {"LANGFUSE_DISABLED": "1", "OMP_NUM_THREADS": "1", "PATH": commands_path()}
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, cwd=cwd, env=known | environment, timeout=PATIENCE
    )


def test_the_documented_launch_with_accelerate(files, tmp_path):
    """The file is for GPUs: without one the same two processes work on the CPU."""
    done = start("accelerate", "launch", "--config_file", "accelerate_config/phi4_2gpu.yaml", "--main_process_port", free_port(),
                 "train_unsloth.py", *FLAGS, *files)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("adapter:") == 1 and "8 rows, 2 steps" in done.stdout and "2 processes" in done.stdout
    info = json.loads((tmp_path / "adapter/training_info.json").read_text())
    assert info["processes"] == 2 and info["deepspeed_sha256"] is None and info["eval_loss"]["after"] < info["eval_loss"]["before"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "train.jsonl", "val.jsonl"]


DRIVER = """
import os, runpy, sys
if os.environ["RANK"] == "1":
    import slm_swap.tuning.fast_training
    def broken(*_, **__):
        raise RuntimeError("rank 1 has lost its GPU")
    slm_swap.tuning.fast_training.CompletionTrainer.compute_loss = broken
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_failing_rank_ends_the_others_with_its_own_error(files, tmp_path):
    (tmp_path / "driver.py").write_text(DRIVER)
    done = start("torchrun", "--standalone", "--nproc_per_node=2", tmp_path / "driver.py", PACKAGE / "train_unsloth.py", *FLAGS, *files,
                 PYTHONPATH=str(PACKAGE.parent))  # fmt: skip
    assert done.returncode != 0
    assert "RuntimeError: rank 1 has lost its GPU" in done.stderr and "adapter:" not in done.stdout
    assert not (tmp_path / "adapter").exists()


TALKING = """
import runpy, sys
import slm_swap.tuning.training
plain = slm_swap.tuning.training.load_trainable
def talking(*given):
    from tqdm import tqdm
    print("a package talks")
    list(tqdm([1], desc="a package works"))
    return plain(*given)
slm_swap.tuning.training.load_trainable = talking
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_what_packages_say_is_heard_from_rank_0_alone(files, tmp_path):
    """In new interpreters all through: packages read when they are imported whether they may talk."""
    (tmp_path / "driver.py").write_text(TALKING)
    done = start(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", tmp_path / "driver.py",
                 PACKAGE / "train_unsloth.py", *FLAGS, *files, PYTHONPATH=str(PACKAGE.parent))  # fmt: skip
    assert done.returncode == 0 and done.stdout.count("a package talks") == 1 and done.stdout.count("adapter:") == 1, done.stderr
    assert "a package works" not in done.stderr, "this is no terminal"


def test_the_configurations_fit_any_number_of_processes():
    from accelerate.commands.config.config_args import load_config_from_file

    zero = json.loads((CONFIGS / "deepspeed_zero2.json").read_text())
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert zero["zero_optimization"]["stage"] == 2 and {zero[name] for name in sizes} == {"auto"}
    for count in (2, 4):
        config = load_config_from_file(str(CONFIGS / f"phi4_{count}gpu.yaml"))
        assert config.num_processes == count and not config.deepspeed_config, "the script decides on DeepSpeed"


def test_deepspeed_is_for_several_gpus(monkeypatch, tmp_path):
    import importlib.util

    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for launch in (Launch(), Launch(0, 2)):
        assert choose_deepspeed(None, launch) is None and choose_deepspeed("none", launch) is None
        with pytest.raises(UserError, match="for several processes on CUDA GPUs"):
            choose_deepspeed(str(CONFIGS / "deepspeed_zero2.json"), launch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_deepspeed(None, Launch()) is None and choose_deepspeed("none", Launch(0, 2)) is None
    assert has_gpu(Launch(1, 4, 1)) and not has_gpu(Launch(2, 4, 2))
    with pytest.raises(UserError, match="no DeepSpeed configuration at"):
        choose_deepspeed(str(tmp_path / "none.json"), Launch(0, 2))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="deepspeed is not installed"):
        choose_deepspeed(str(ZERO2), Launch(0, 2))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert choose_deepspeed("accelerate_config/deepspeed_zero2.json", Launch(0, 2)) == ZERO2
    assert choose_deepspeed(None, Launch(0, 2)) is None, "plain DDP is faster for LoRA"


GPUS = "#!/bin/sh\nfor gpu in {numbers}; do echo \"GPU $gpu: NVIDIA GeForce RTX 3090 (UUID: GPU-$gpu)\"; done\n"


@pytest.fixture
def checkout(tmp_path):
    """A function that makes a folder with the wrappers, the real script, rows of some tracks, and a stand-in nvidia-smi."""

    def make(gpus: int, tracks=()) -> Path:
        for name in ("train_parallel.sh", "train_sequential.sh"):
            shutil.copy(PACKAGE / name, tmp_path)
        (tmp_path / "train_unsloth.py").symlink_to(PACKAGE / "train_unsloth.py")
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin/nvidia-smi").write_text(GPUS.format(numbers=" ".join(map(str, range(gpus)))))
        (tmp_path / "bin/nvidia-smi").chmod(0o755)
        for track in tracks:
            (tmp_path / f"02_dataset/{track}").mkdir(parents=True)
            for split, rows in (("train", ROWS), ("val", ROWS[:2])):
                lines = [json.dumps(row.to_json() | TOOLCALL.get(track, {})) + "\n" for row in rows]
                (tmp_path / f"02_dataset/{track}/{split}.jsonl").write_text("".join(lines))
        return tmp_path

    return make


TOOLCALL = {"toolcall": {"completion": '<tool_call name="paint_wall">{"color":"white"}</tool_call>'}}


def environment(folder: Path, **more: str) -> dict[str, str]:
    known = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    return known | {"LANGFUSE_DISABLED": "1", "OMP_NUM_THREADS": "1", "PATH": f"{folder / 'bin'}:{commands_path()}"} | more


def launched(folder: Path, wrapper: str, **visible: str) -> list[str]:
    """The commands that a wrapper runs, each with the GPUs that it is given: the real ones, which only print their help."""
    done = subprocess.run(
        [folder / wrapper, "--help"], capture_output=True, text=True, env=environment(folder, SHELLOPTS="xtrace", **visible), timeout=PATIENCE
    )
    assert done.returncode == 0 and done.stdout.count("done") == 2, done.stdout + done.stderr
    lines = [line.lstrip("+ ") for line in done.stderr.splitlines()]
    words = ("CUDA_VISIBLE_DEVICES=", "python train_unsloth", "torchrun --standalone")
    return sorted(line.split(" --train ")[0] for line in lines if line.startswith(words))


def test_the_wrappers_count_the_gpus(checkout):
    folder = checkout(4)
    both = [f"train_unsloth.py --track {track}" for track in ("structured", "toolcall")]
    halves = launched(folder, "train_parallel.sh")
    assert halves == ["CUDA_VISIBLE_DEVICES=0,1", "CUDA_VISIBLE_DEVICES=2,3", *(f"torchrun --standalone --nproc_per_node=2 {run}" for run in both)]
    singles = [f"python {run}" for run in both]
    assert launched(folder, "train_parallel.sh", CUDA_VISIBLE_DEVICES="3,1") == ["CUDA_VISIBLE_DEVICES=1", "CUDA_VISIBLE_DEVICES=3", *singles]
    assert launched(folder, "train_parallel.sh", CUDA_VISIBLE_DEVICES="2") == singles, "one GPU takes one after the other"
    assert launched(folder, "train_parallel.sh", CUDA_VISIBLE_DEVICES="") == ["CUDA_VISIBLE_DEVICES="] * 2 + singles
    assert launched(folder, "train_sequential.sh") == [f"torchrun --standalone --nproc_per_node=4 {run}" for run in both]


def test_both_tracks_are_trained_and_a_failure_is_reported(checkout):
    folder = checkout(0, tracks=["structured"])
    (folder / "02_dataset/toolcall").mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        (folder / f"02_dataset/toolcall/{split}.jsonl").write_text("no JSON\n")
    flags = [*map(str, FLAGS[2:]), "--limit", "4"]
    done = subprocess.run([folder / "train_parallel.sh", *flags], capture_output=True, text=True, env=environment(folder), timeout=PATIENCE)
    assert done.returncode == 1 and "structured: done" in done.stdout and "toolcall: failed with exit code 2" in done.stderr
    assert (folder / "04_ft/adapter_structured/adapter_model.safetensors").is_file()
    log = (folder / "04_ft/adapter_structured.log").read_text()
    assert "4 rows, 2 steps" in log and log.splitlines()[0].startswith("preset ")
    assert "02_dataset/toolcall/train.jsonl:1" in (folder / "04_ft/adapter_toolcall.log").read_text()


@pytest.mark.parametrize("wrapper", ["train_parallel.sh", "train_sequential.sh"])
def test_an_interrupted_wrapper_stops_its_children(checkout, wrapper):
    folder = checkout(0, tracks=["structured", "toolcall"])
    process = subprocess.Popen(
        [folder / wrapper, *map(str, FLAGS[2:]), "--epochs", "1000"], env=environment(folder), stderr=subprocess.PIPE, text=True
    )
    expected = 2 if wrapper == "train_parallel.sh" else 1
    wait_until(lambda: len(children_of(process.pid)) == expected)
    children = children_of(process.pid)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and "interrupted" in error
    assert not any(Path(f"/proc/{child}").exists() for child in children)
