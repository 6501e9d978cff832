"""QLoRA fine-tuning: rows to token ids, the trainer of either back end, and an adapter that says how it was made."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from slm_swap.clients.endings import require_ending
from slm_swap.clients.loading import files_hash, load_tokenizer, quiet_packages
from slm_swap.clients.thinking import thinking
from slm_swap.common.errors import UserError
from slm_swap.common.reports import SCHEMA_VERSION, code_version, hardware, now, package_versions, sha256_file
from slm_swap.common.seeds import set_seed
from slm_swap.common.settings import Launch, display_path
from slm_swap.evaluating.evaluation import Stopwatch
from slm_swap.rows.examples import Example
from slm_swap.rows.prompts import asked_natively
from slm_swap.tuning.backends import import_unsloth, load_trainable, products_of
from slm_swap.tuning.checkpoints import Checkpoints
from slm_swap.tuning.checks import (
    head_options,
    length_report,
    lora_reach,
    memory_needed,
    memory_warning,
    reach_report,
    without_needless_checkpointing,
)
from slm_swap.tuning.hyperparameters import Hyperparameters
from slm_swap.tuning.record import peak_memory_gib, save_adapter
from slm_swap.tuning.tokens import Tokenized, tokenize
from slm_swap.tuning.trainer import make_trainer, trainer_arguments
from slm_swap.tuning.untrained import say_trained, untrained_tokens
from slm_swap.tuning.validation import GenerationSample

TRAINING_PACKAGES = ("accelerate", "bitsandbytes", "deepspeed", "peft", "transformers", "trl", "unsloth", "unsloth_zoo")


def load_together(load: Callable[[], Any], processes: int) -> Any:
    """`load()`; where it fails on one of several ranks, all end with that rank's error.

    Raises:
        UserError: as `load`, on whichever rank; or a package refused this model or these settings.
    """
    loaded = error = None
    try:
        with packages_refuse():
            loaded = load()
    except UserError as reason:
        error = str(reason)
    errors = [error]
    if processes > 1:
        import torch

        errors = [None] * processes
        torch.distributed.all_gather_object(errors, error)
    for rank, reason in enumerate(errors):
        if reason:
            raise UserError(f"rank {rank}: {reason}" if rank else reason)
    return loaded


@contextmanager
def packages_refuse() -> Iterator[None]:
    """Make what a package says against a model or its settings a UserError; an error of our own code stays what it is.

    Raises:
        UserError: so.
    """
    try:
        yield
    except Exception as error:
        modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
        *_, package = (name.partition(".")[0] for name in modules if not name.startswith("torch."))
        if isinstance(error, UserError) or package not in TRAINING_PACKAGES:
            raise
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{package} does not train this model ({first[:300]}): use another model, --precision or --backend") from None


def train(
    track: str,
    base: Path,
    train_rows: list[Example],
    val_rows: list[Example],
    out: Path,
    parameters: Hyperparameters,
    backend: str,
    inputs: dict[str, dict],
    preset: str = "documented",
    *,
    save_steps: int = 0,
    resume: bool = False,
    run_id: str | None = None,
    deepspeed: Path | None = None,
    launch: Launch = Launch(),  # noqa: B008  frozen
    say: Callable[[str], object] = lambda _: None,
) -> dict[str, Any]:
    """Fine-tune a LoRA adapter and put it, with the story of its making, in the folder `out`: all of it or nothing.

    Each process of a launch calls this; rank 0 writes. `save_steps` steps apart (0: only with each best evaluation) there is a
    checkpoint beside `out`, from the last of which `resume` goes on, and there `run_id` is kept. Gives what `training_info.json` holds.

    Raises:
        UserError: `out` is no folder; no row is short enough, or a completion is not a reply of the track; the model or the checkpoints do not fit, or
            the back end cannot train this model right.
    """
    clock = Stopwatch()
    quiet_packages()
    if out.exists() and not out.is_dir():
        raise UserError(f"{display_path(out)} is there and is no folder: choose another --out, or move it away")
    if backend == "trl":
        head_options(read_config(base))
    if backend == "unsloth":
        import_unsloth(out.with_name(f"{out.name}.unsloth"), launch.rank)
    set_seed(parameters.seed)
    tokenizer = load_tokenizer(base)
    learned, held_out = as_tokens(tokenizer, track, train_rows, val_rows, parameters, say)
    rows, lengths = learned.rows, sorted(len(row["input_ids"]) for row in learned.rows)
    say(length_report(lengths, learned.too_long, parameters.max_length))
    checkpoints, run = Checkpoints(out), {}
    if launch.rank == 0:
        run = {"ask": ask_of(train_rows)} | identity(track, base, parameters, backend, inputs, deepspeed, launch)
        checkpoints.open(run, resume, run_id)
    from slm_swap.tuning.loop import run_trainer

    with said_what_is_kept(checkpoints, launch.rank, say):
        arguments = trainer_arguments(parameters, backend, str(checkpoints.folder), deepspeed)
        if backend == "trl":
            lean_or_fast(base, parameters, lengths[-1], arguments, say)
        warn_of_memory(base, replace(parameters, gradient_checkpointing=arguments.gradient_checkpointing), lengths[-1], arguments.device, say)
        learn = partial(untrained_tokens, tokenizer=tokenizer, rows=rows)
        model = load_together(lambda: load_trainable(base, parameters, backend, arguments.device, learn, rows), launch.world)
        say_trained(model, tokenizer, say)
        reach = lora_reach(model)
        for line in reach_report(reach):
            say(line)
        trainer = load_together(lambda: make_trainer(model, tokenizer, arguments, rows, held_out, parameters, backend, say), launch.world)
        sample = GenerationSample(trainer, tokenizer, track, val_rows[: parameters.eval_generate], backend, say)
        told, log = run_trainer(trainer, parameters, sample, checkpoints, save_steps, clock, say)
        if trainer.state.global_step == 1 and 0 < parameters.warmup_share < 1:
            say("warning: the only step had a learning rate of 0, with which the warm-up begins: nothing was learned; give more rows or --epochs")
        info = {"preset": preset, "run_id": run_id, **run, "base_model": {"path": display_path(base), **run.get("base_model", {})}, "lora": reach}
        info |= {
            "computed": {
                "step_packs": getattr(trainer, "step_packs", None) is not None, "gradient_checkpointing": arguments.gradient_checkpointing
            },
            "inputs": inputs,
            "rows": {"train": len(rows), "val": len(held_out), "too_long": len(learned.too_long), "untaught": learned.untaught.total()},
            "ending": require_ending(tokenizer)._asdict(),
            "thinking": thinking(tokenizer),
        }  # fmt: skip
        info |= told | account(trainer.state, log, lengths, learned.too_long, told["seconds"]["train"])
        if launch.rank == 0:
            save_adapter(trainer.model, tokenizer, out, info, log, base, checkpoints)
    return info


@contextmanager
def said_what_is_kept(checkpoints: Checkpoints, rank: int, say: Callable[[str], object]) -> Iterator[None]:
    """Around a training: where it ends early, say from which checkpoint it can go on; without one, nothing of it stays."""
    try:
        yield
    except BaseException:
        if rank == 0:
            if steps := checkpoints.steps():
                say(f"step {steps[-1]} is kept: the same command with --resume goes on from there")
            else:
                checkpoints.remove()
        raise


def as_tokens(
    tokenizer: Any, track: str, train_rows: list[Example], val_rows: list[Example], parameters: Hyperparameters, say: Callable[[str], object]
) -> tuple[Tokenized, list[dict[str, list[int]]]]:
    """The train rows as they are learned, and the validation rows as they are measured.

    Raises:
        UserError: there are none that can be learned, or measured where `parameters` want that.
    """
    learned, measured = (tokenize(tokenizer, track, given, parameters.max_length) for given in (train_rows, val_rows))
    require_rows(learned, "train", parameters.max_length, say)
    if parameters.eval_steps:
        require_rows(measured, "val", parameters.max_length, say)
    return learned, measured.rows


def require_rows(told: Tokenized, kind: str, max_length: int, say: Callable) -> None:
    """Say which rows cannot be taught.

    Raises:
        UserError: there is no other row.
    """
    for reason, count in told.untaught.items():
        say(f"{count} {kind} rows are not taught: {reason}")
    if not told.rows and told.untaught and not told.too_long:
        raise UserError(f"no {kind} row can be taught: {next(iter(told.untaught))}")
    if not told.rows:
        raise UserError(f"every {kind} row is longer than {max_length} tokens: raise --max-length")


def ask_of(rows: list[Example]) -> str:
    """How the model was asked while it learned: it is to be asked so afterwards."""
    asked = {asked_natively(example) for example in rows}
    return "mixed" if len(asked) > 1 else "native" if True in asked else "text"


def account(state: Any, log: list[dict], lengths: list[int], too_long: list[int], seconds: float) -> dict[str, Any]:
    """What `training_info.json` says of a run besides its set-up and its evaluations; `lengths` are sorted."""
    tokens = sum(lengths) * (state.epoch or 0)
    return {
        "schema_version": SCHEMA_VERSION,
        "stage": "train",
        "created_at": now(),
        "tokens": {"train": sum(lengths), "longest": lengths[-1], "longest_left_out": max(too_long, default=None)},
        "steps": state.global_step,
        "best_step": state.best_global_step,
        "train_loss": next((entry["loss"] for entry in reversed(log) if "loss" in entry), None),
        "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
        "peak_memory_gib": peak_memory_gib(),
        "code": code_version(),
        "packages": package_versions(),
        "hardware": hardware(),
    }


def read_config(base: Path) -> Any:
    """A checkpoint's configuration, as transformers reads it.

    Raises:
        UserError: it cannot be read.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(base, trust_remote_code=False)  # left out, it would ask on a terminal
    except Exception as error:  # whatever stands in that file
        raise UserError(f"cannot read {display_path(base / 'config.json')} ({str(error).strip().splitlines()[0][:200]}): check --model, or use another model") from None


def warn_of_memory(base: Path, parameters: Hyperparameters, longest: int, device: Any, say: Callable) -> None:
    """Say so where the GPU's free memory is less than what training is estimated to take, or where there is no estimate."""
    import torch

    if device.type != "cuda":
        return
    try:
        needed = memory_needed(read_config(base), parameters, longest)
    except AttributeError as missing:
        say(f"no estimate of the memory that training takes: the model's configuration lacks {missing.name or missing}")
        return
    warning = memory_warning(needed, torch.cuda.mem_get_info(device)[0] / 2**30, parameters)
    if warning:
        say(f"warning: {warning}")


def lean_or_fast(base: Path, parameters: Hyperparameters, longest: int, arguments: Any, say: Callable[[str], object]) -> None:
    """Leave gradient checkpointing out of a trainer's `arguments` where it is needless: see without_needless_checkpointing. Says so."""
    import torch

    if arguments.device.type != "cuda":
        return
    try:
        fit = without_needless_checkpointing(read_config(base), parameters, longest, torch.cuda.mem_get_info(arguments.device)[0] / 2**30)
    except AttributeError:  # no estimate: warn_of_memory says so
        return
    if fit != parameters:
        arguments.gradient_checkpointing = False
        say("gradient checkpointing is left out, as memory suffices: the gradients are the same")


def identity(
    track: str,
    base: Path,
    parameters: Hyperparameters,
    backend: str,
    inputs: dict[str, dict],
    deepspeed: Path | None,
    launch: Launch,
) -> dict[str, Any]:
    """What a run's checkpoints are of: two runs of one identity can go on with each other's."""
    return {
        "track": track,
        "backend": backend,
        "base_model": {"config_sha256": sha256_file(base / "config.json"), "files_sha256": files_hash(base)},
        "hyperparameters": asdict(parameters),
        "inputs": {name: {key: told[key] for key in ("sha256", "rows", "shots") if key in told} for name, told in inputs.items()},
        "processes": launch.world,
        "deepspeed_sha256": sha256_file(deepspeed) if deepspeed else None,
        "products": products_of(backend, parameters.precision),
    }
