"""Measure training speed: a model of Phi-4-mini's or another shape with random weights, LoRA r=64 on all linear layers, rows of ~210 tokens.

    python benchmarks/train.py
    python benchmarks/train.py --configs documented fast fast:precision=int8 rtx3090:precision=int8 fast:precision=fp8
    python benchmarks/train.py --configs fast fast:processes=2 fast:processes=2,zero2=yes --out benchmarks/results/train_gpus.json
    python benchmarks/train.py --shape tiny --configs fast:precision=fp32,pack_length=2048 --rows 64 --seconds 1 --out /tmp/train.json

Each configuration runs in processes of its own, with a time limit; one that fails is reported with its error and the others go on. The
clock starts after three optimizer steps, compilation included in them, or 80 where a step is of packs of many lengths, whose CUDA graphs are captured
meanwhile. Tokens are those of the rows, without padding:
  documented, documented-unsloth   the documented setting: 8-bit base, one row at a time, accumulation 8, checkpointing; of TRL's on a GPU a
                                   step's 8 rows are packs (documented:step_packs=no: they are not), and it checkpoints only where memory is short
  trl, unsloth                     the libraries as they come, bf16 base, packed to 2,048 tokens
  fast, rtx3090                    train_unsloth.py with that --preset
NAME:HYPERPARAMETER=VALUE,... changes hyperparameters of train_unsloth.py (not of `trl`); `processes=N` among them starts so many, one a
GPU, by plain DDP, or with `zero2=yes` by DeepSpeed's ZeRO-2. Tokens a second are those of all processes.
"""

import argparse
import math
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere

from own_process import in_own_process
from shapes import SHAPES, lengths, make_checkpoint

from slm_swap.cli import Parser, positive, run
from slm_swap.clients.replicas import take_one_gpu
from slm_swap.common.errors import UserError
from slm_swap.common.reports import code_version, hardware, now, package_versions, read_json, write_json
from slm_swap.common.settings import PACKAGE, ROOT, display_path, load_launch
from slm_swap.tuning.backends import import_unsloth, load_trainable
from slm_swap.tuning.hyperparameters import PRESETS, Hyperparameters
from slm_swap.tuning.packing import IGNORED
from slm_swap.tuning.trainer import make_trainer, trainer_arguments
from slm_swap.tuning.training import lean_or_fast

WARM_UP = 3  # optimizer steps
WARM_UP_PACKS = 240  # where a step's rows are packs: by then hardly a length is new to a process, which would compile and capture it while all others wait
ZERO2 = PACKAGE / "accelerate_config/deepspeed_zero2.json"
PACKED = {"precision": "bf16", "packing": True, "pack_length": 2048}
CONFIGS = {  # back end and hyperparameters; "stock" is TRL's own trainer
    "documented": ("trl", {}),
    "documented-unsloth": ("unsloth", {}),
    "trl": ("stock", PACKED),
    "unsloth": ("unsloth", PACKED),
    "fast": ("trl", PRESETS["fast"]),
    "rtx3090": ("trl", PRESETS["rtx3090"]),
}


def make_rows(count: int, vocabulary: int) -> list[dict[str, list[int]]]:
    """Random token ids; prompts of ~160 and completions of ~50 tokens, lognormal."""
    import numpy as np

    rng, rows = np.random.default_rng(4), []
    for prompt, completion in zip(*lengths(count, 3), strict=True):
        ids = rng.integers(16, vocabulary, prompt + completion).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]})
    return rows


@dataclass(frozen=True)
class Configuration:
    """What one measurement is of."""

    backend: str
    parameters: Hyperparameters
    processes: int = 1
    zero2: bool = False


def parse_config(text: str) -> Configuration:
    """The configuration that is called `NAME` or `NAME:HYPERPARAMETER=VALUE,...`.

    Raises:
        UserError: there is no such configuration, hyperparameter or value, or ZeRO-2 is asked for in one process.
    """
    name, _, changes = text.partition(":")
    if name not in CONFIGS:
        raise UserError(f"no configuration {name!r}: choose among {', '.join(CONFIGS)}")
    backend, given = CONFIGS[name]
    known = {field.name: field.default for field in fields(Hyperparameters)} | {"processes": 1, "zero2": False}
    changed: dict[str, Any] = {"epochs": 1000.0}  # the clock ends it
    for change in filter(None, changes.split(",")):
        key, _, value = change.partition("=")
        if key not in known:
            raise UserError(f"no hyperparameter {key!r}: choose among {', '.join(known)}")
        kind = type(known[key])
        try:
            changed[key] = value.lower() in ("1", "true", "yes") if kind is bool else kind(value)
        except ValueError:
            raise UserError(f"{change!r} in {text!r} is no {kind.__name__}: give one") from None
    processes, zero2 = changed.pop("processes", 1), changed.pop("zero2", False)
    if processes < 1 or (zero2 and processes == 1):
        raise UserError(f"{text!r}: give processes=N, which is 1 or more, and with zero2 2 or more")
    return Configuration(backend, Hyperparameters(**given | changed), processes, zero2)


def stock_trainer(folder: Path, tokenizer: Any, rows: list[dict], parameters: Hyperparameters, scratch: str, deepspeed: Path | None) -> Any:
    """TRL's trainer with its own packing, attention and loss."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from slm_swap.clients.loading import load_model
    from slm_swap.tuning.backends import linear_names

    cuda = torch.cuda.is_available()
    arguments = SFTConfig(
        output_dir=scratch, packing=True, max_length=parameters.pack_length, per_device_train_batch_size=1,
        gradient_accumulation_steps=parameters.gradient_accumulation, num_train_epochs=parameters.epochs, bf16=cuda, use_cpu=not cuda,
        save_strategy="no", report_to="none", disable_tqdm=True, ddp_find_unused_parameters=False,
        deepspeed=str(deepspeed) if deepspeed else None,
    )  # fmt: skip
    model = load_model(folder, parameters.precision, device_map={"": arguments.device})
    lora = LoraConfig(
        r=parameters.lora_r, lora_alpha=parameters.lora_alpha, lora_dropout=parameters.lora_dropout, target_modules=linear_names(model),
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return SFTTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=lora
    )


def make_clock(seconds: float, warm_up: int) -> Any:
    """A trainer's callback that stops training some seconds after so many steps, and says what was done in them."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """The first step after the warm-up tells how many there is time for; nothing waits for the GPU until they are made."""

        begun = elapsed = epochs = 0.0
        steps = 0

        def now(self) -> float:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            step = state.global_step - warm_up
            if step == 0:
                self.begun, self.epochs = self.now(), -state.epoch
            elif step == 1:
                self.steps = self.agreed(math.ceil(seconds / (self.now() - self.begun)), args.device)
            if step > 0 and step == self.steps:
                self.elapsed = self.now() - self.begun
                self.epochs += state.epoch
                control.should_training_stop = True

        def agreed(self, steps: int, device: Any) -> int:
            """What rank 0 says: ranks that stop at different steps would wait for each other."""
            if not torch.distributed.is_initialized():
                return steps
            told = torch.tensor(steps, device=device)
            torch.distributed.broadcast(told, 0)
            return int(told)

    return Clock()


def measure(config: str, folder: Path, rows_wanted: int, seconds: float, out: Path) -> None:
    """Train for `seconds` after the warm-up and write what was measured: the work of one process a GPU."""
    wanted = parse_config(config)
    backend, parameters, deepspeed = wanted.backend, wanted.parameters, ZERO2 if wanted.zero2 else None
    if wanted.processes == 1:
        take_one_gpu(load_launch())  # the trainer would spread each batch over all that it sees
    if backend == "unsloth":
        import_unsloth(folder.with_name("unsloth"), load_launch().rank)
    import torch
    from transformers import AutoConfig

    from slm_swap.clients.loading import load_tokenizer
    from slm_swap.common.seeds import set_seed

    cuda = torch.cuda.is_available()
    set_seed(parameters.seed)
    started = time.perf_counter()
    tokenizer = load_tokenizer(folder)
    rows = make_rows(rows_wanted, AutoConfig.from_pretrained(folder).vocab_size)

    with tempfile.TemporaryDirectory() as scratch:
        if backend == "stock":
            trainer = stock_trainer(folder, tokenizer, rows, parameters, scratch, deepspeed)
        else:
            arguments = trainer_arguments(parameters, backend, scratch, deepspeed)
            if backend == "trl":
                lean_or_fast(folder, parameters, max(len(row["input_ids"]) for row in rows), arguments, print)
            model = load_trainable(folder, parameters, backend, arguments.device, rows=rows)
            trainer = make_trainer(model, tokenizer, arguments, rows, [], parameters, backend, print)
        step_packs = getattr(trainer, "step_packs", None)
        clock = make_clock(seconds, WARM_UP_PACKS if step_packs else WARM_UP)
        trainer.add_callback(clock)
        loaded = time.perf_counter()
        loss = trainer.train().training_loss
    args = trainer.args
    tokens = sum(len(row["input_ids"]) for row in rows)
    together = parameters.step_rows if step_packs else args.per_device_train_batch_size  # rows, or packs, of a micro-batch
    if args.process_index:
        return
    found = {
        "tokens_per_second": round(clock.epochs * tokens / clock.elapsed, 1),
        "rows_per_second": round(clock.epochs * len(rows) / clock.elapsed, 2),
        "tokens_per_micro_batch": round(tokens / len(trainer.train_dataset) * together, 1),
        "steps": clock.steps,
        "seconds": {
            "load": round(loaded - started, 2), "warm_up": round(clock.begun - loaded, 2), "measured": round(clock.elapsed, 2)
        },
        "peak_gib": {
            "allocated": round(torch.cuda.max_memory_allocated() / 2**30, 2),
            "reserved": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        } if cuda else None,
        "mean_loss": round(loss, 4),
        "backend": backend,
        "step_packs": step_packs is not None,
        "gradient_checkpointing": args.gradient_checkpointing,
        "hyperparameters": asdict(parameters),
        "processes": args.world_size,
        "zero2": wanted.zero2,
    }  # fmt: skip
    write_json(out, found)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=list(CONFIGS), metavar="NAME", help="what to measure (default: all)")
    parser.add_argument("--shape", choices=SHAPES, default="phi-4-mini", help="the model (default: phi-4-mini)")
    parser.add_argument("--rows", type=positive, default=4096, help="training rows, gone through again and again (default: 4096)")
    parser.add_argument("--seconds", type=float, default=20, help="seconds measured (default: 20)")
    parser.add_argument("--limit", type=float, default=240, help="seconds that a configuration may take in all (default: 240)")
    parser.add_argument("--scratch", type=Path, default=ROOT / "runs/benchmark_train", metavar="DIR", help="the model and logs")
    parser.add_argument("--out", type=Path, metavar="FILE", default=ROOT / "benchmarks/results/train.json")
    parser.add_argument("--measure", metavar="NAME", help=argparse.SUPPRESS)  # the work of a child process
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    folder, result = args.scratch / args.shape, args.scratch / "result.json"
    if args.measure == "model":
        make_checkpoint(folder, args.shape)
        return 0
    if args.measure:
        measure(args.measure, folder, args.rows, args.seconds, result)
        return 0
    processes = {config: parse_config(config).processes for config in args.configs}
    width = max(map(len, processes))
    args.scratch.mkdir(parents=True, exist_ok=True)
    flags = ["--shape", args.shape, "--rows", str(args.rows), "--seconds", str(args.seconds), "--scratch", str(args.scratch)]
    if not (folder / "model.done").exists():
        error = in_own_process(__file__, [*flags, "--measure", "model"], args.limit, args.scratch / "model.log")
        if error:
            raise UserError(f"cannot make the model ({error}): see {display_path(args.scratch / 'model.log')}")
    import torch  # noqa: F401  hardware() tells of the GPUs then

    told = {"created_at": now(), "code": code_version(), "hardware": hardware(), "packages": package_versions(), "shape": args.shape}
    told |= {"configurations": {}}
    for config in args.configs:
        result.unlink(missing_ok=True)
        log = args.scratch / f"{config.replace(':', '_')}.log"
        error = in_own_process(__file__, [*flags, "--measure", config], args.limit, log, processes[config])
        if not error and not result.exists():
            error = "no result"
        found = {"error": error} if error else read_json(result, "benchmarks/train.py")
        told["configurations"][config] = found
        write_json(args.out, told)
        if error:
            print(f"{config:{width}} failed: {error} ({display_path(log)})", flush=True)
            continue
        peak, seconds = found["peak_gib"] or {}, found["seconds"]
        print(
            f"{config:{width}} {found['tokens_per_second']:>9,.0f} tokens/s {found['rows_per_second']:>7.1f} rows/s, "
            f"peak {peak.get('allocated')} GiB, load {seconds['load']:.0f} s, warm-up {seconds['warm_up']:.0f} s",
            flush=True,
        )
    print(f"report: {display_path(args.out)}")
    return 0 if any("error" not in found for found in told["configurations"].values()) else 1


if __name__ == "__main__":
    run(main, launched="--measure" in sys.argv)
