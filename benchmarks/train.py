"""Measure training speed: a model of Phi-4-mini's shape with random weights, LoRA r=64 on all linear layers, rows of ~210 tokens.

    python benchmarks/train.py
    python benchmarks/train.py --configs fast fast:pack_length=16384 --seconds 30 --processes 2
    python benchmarks/train.py --shape tiny --configs fast:precision=fp32,pack_length=2048 --rows 64 --seconds 1 --out /tmp/train.json

Each configuration runs in processes of its own, with a time limit; one that fails is reported with its error and the others go on. The
clock starts after three optimizer steps, compilation included in them, and tokens are those of the rows, without padding:
  documented, documented-unsloth   the documented setting: 8-bit base, one row at a time, accumulation 8, checkpointing
  trl, unsloth                     the libraries as they come, bf16 base, packed to 2,048 tokens
  fast, rtx3090                    train_unsloth.py with that --preset
NAME:HYPERPARAMETER=VALUE,... changes one of the hyperparameters of train_unsloth.py (not of `trl`).
"""

import argparse
import sys
import tempfile
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere

from own_process import in_own_process
from phi_shape import SHAPES, lengths, make_checkpoint

from slm_swap.cli import Parser, positive, run
from slm_swap.errors import UserError
from slm_swap.packing import IGNORED
from slm_swap.reports import code_version, hardware, now, package_versions, read_json, write_json
from slm_swap.settings import ROOT, display_path
from slm_swap.training import PRESETS, Hyperparameters, load_trainable, make_trainer, trainer_arguments

WARM_UP = 3  # optimizer steps
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


def parse_config(text: str) -> tuple[str, Hyperparameters]:
    """The back end and the hyperparameters of `NAME` or `NAME:HYPERPARAMETER=VALUE,...`.

    Raises:
        UserError: there is no such configuration or hyperparameter.
    """
    name, _, changes = text.partition(":")
    if name not in CONFIGS:
        raise UserError(f"no configuration {name!r}: choose among {', '.join(CONFIGS)}")
    backend, given = CONFIGS[name]
    defaults, changed = {field.name: field.default for field in fields(Hyperparameters)}, {}
    for change in filter(None, changes.split(",")):
        key, _, value = change.partition("=")
        if key not in defaults:
            raise UserError(f"no hyperparameter {key!r}: choose among {', '.join(defaults)}")
        kind = type(defaults[key])
        changed[key] = value.lower() in ("1", "true", "yes") if kind is bool else kind(value)
    return backend, Hyperparameters(**given | {"epochs": 1000.0} | changed)  # the clock ends it


def stock_trainer(folder: Path, tokenizer: Any, rows: list[dict], parameters: Hyperparameters, scratch: str) -> Any:
    """TRL's trainer with its own packing, attention and loss."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from slm_swap.slm_client import load_model
    from slm_swap.training import linear_names

    cuda = torch.cuda.is_available()
    arguments = SFTConfig(
        output_dir=scratch, packing=True, max_length=parameters.pack_length, per_device_train_batch_size=1,
        gradient_accumulation_steps=parameters.gradient_accumulation, num_train_epochs=parameters.epochs, bf16=cuda, use_cpu=not cuda,
        save_strategy="no", report_to="none", disable_tqdm=True, ddp_find_unused_parameters=False,
    )  # fmt: skip
    model = load_model(folder, parameters.precision, device_map={"": arguments.device})
    lora = LoraConfig(
        r=parameters.lora_r, lora_alpha=parameters.lora_alpha, lora_dropout=parameters.lora_dropout, target_modules=linear_names(model),
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return SFTTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=lora
    )


def measure(config: str, folder: Path, rows_wanted: int, seconds: float, out: Path) -> None:
    """Train for `seconds` after the warm-up and write what was measured: the work of one process a GPU."""
    backend, parameters = parse_config(config)
    if backend == "unsloth":
        import unsloth  # noqa: F401  it patches transformers and TRL, so it must come before them
    import torch
    from transformers import AutoConfig, TrainerCallback

    from slm_swap.seeds import set_seed
    from slm_swap.slm_client import load_tokenizer

    cuda = torch.cuda.is_available()
    set_seed(parameters.seed)
    started = time.perf_counter()
    tokenizer = load_tokenizer(folder)
    rows = make_rows(rows_wanted, AutoConfig.from_pretrained(folder).vocab_size)

    class Clock(TrainerCallback):
        begun = elapsed = 0.0
        steps = 0

        def now(self) -> float:
            if cuda:
                torch.cuda.synchronize()
            return time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            if state.global_step == WARM_UP:
                self.begun = self.now()
            elif state.global_step > WARM_UP and self.over(time.perf_counter() - self.begun > seconds, args.device):
                self.elapsed, self.steps = self.now() - self.begun, state.global_step - WARM_UP
                control.should_training_stop = True

        def over(self, late: bool, device: Any) -> bool:
            """Whether rank 0 says so: ranks that stop at different steps would wait for each other."""
            if not torch.distributed.is_initialized():
                return late
            decision = torch.tensor(int(late), device=device)
            torch.distributed.broadcast(decision, 0)
            return bool(decision)

    with tempfile.TemporaryDirectory() as scratch:
        if backend == "stock":
            trainer = stock_trainer(folder, tokenizer, rows, parameters, scratch)
        else:
            arguments = trainer_arguments(parameters, backend, scratch)
            model = load_trainable(folder, parameters, backend, arguments.device)
            trainer = make_trainer(model, tokenizer, arguments, rows, [], parameters, backend)
        clock = Clock()
        trainer.add_callback(clock)
        loaded = time.perf_counter()
        loss = trainer.train().training_loss
    args = trainer.args
    items = clock.steps * args.gradient_accumulation_steps * args.per_device_train_batch_size * args.world_size
    share = items / len(trainer.train_dataset)  # of the rows; a bit more or less where packs are not all alike
    tokens = sum(len(row["input_ids"]) for row in rows)
    if args.process_index:
        return
    found = {
        "tokens_per_second": round(share * tokens / clock.elapsed, 1),
        "rows_per_second": round(share * len(rows) / clock.elapsed, 2),
        "tokens_per_micro_batch": round(tokens / len(trainer.train_dataset) * args.per_device_train_batch_size, 1),
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
        "hyperparameters": asdict(parameters),
        "processes": args.world_size,
        "hardware": hardware(),
        "packages": package_versions(),
    }  # fmt: skip
    write_json(out, found)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=list(CONFIGS), metavar="NAME", help="what to measure (default: all)")
    parser.add_argument("--shape", choices=SHAPES, default="phi-4-mini", help="the model (default: phi-4-mini)")
    parser.add_argument("--rows", type=positive, default=4096, help="training rows, gone through again and again (default: 4096)")
    parser.add_argument("--seconds", type=float, default=20, help="seconds measured (default: 20)")
    parser.add_argument("--limit", type=float, default=240, help="seconds that a configuration may take in all (default: 240)")
    parser.add_argument("--processes", type=positive, default=1, help="processes, one a GPU (default: 1)")
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
    for config in args.configs:
        parse_config(config)
    args.scratch.mkdir(parents=True, exist_ok=True)
    flags = ["--shape", args.shape, "--rows", str(args.rows), "--seconds", str(args.seconds), "--scratch", str(args.scratch)]
    if not (folder / "model.done").exists():
        error = in_own_process(__file__, [*flags, "--measure", "model"], args.limit, args.scratch / "model.log")
        if error:
            raise UserError(f"cannot make the model ({error}): see {display_path(args.scratch / 'model.log')}")
    told: dict[str, Any] = {"created_at": now(), "code": code_version(), "shape": args.shape, "configurations": {}}
    for config in args.configs:
        result.unlink(missing_ok=True)
        log = args.scratch / f"{config.replace(':', '_')}.log"
        error = in_own_process(__file__, [*flags, "--measure", config], args.limit, log, args.processes)
        if not error and not result.exists():
            error = "no result"
        found = {"error": error} if error else read_json(result, "benchmarks/train.py")
        for name in ("hardware", "packages"):
            told |= {name: found.pop(name)} if name in found else {}
        told["configurations"][config] = found
        write_json(args.out, told)
        if error:
            print(f"{config:24} failed: {error} ({display_path(log)})", flush=True)
            continue
        peak, seconds = found["peak_gib"] or {}, found["seconds"]
        print(
            f"{config:24} {found['tokens_per_second']:>9,.0f} tokens/s {found['rows_per_second']:>7.1f} rows/s, "
            f"peak {peak.get('allocated')} GiB, load {seconds['load']:.0f} s, warm-up {seconds['warm_up']:.0f} s",
            flush=True,
        )
    print(f"report: {display_path(args.out)}")
    return 0 if any("error" not in found for found in told["configurations"].values()) else 1


if __name__ == "__main__":
    run(main)
