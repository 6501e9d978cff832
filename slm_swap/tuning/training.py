"""QLoRA fine-tuning: rows to token ids, the trainer of either back end, and an adapter that says how it was made."""

import atexit
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slm_swap.common.errors import UserError
from slm_swap.common.reports import SCHEMA_VERSION, code_version, hardware, now, package_versions, sha256_file
from slm_swap.common.seeds import set_seed
from slm_swap.common.settings import PACKAGE, Launch, display_path, find_path
from slm_swap.evaluating.evaluation import Stopwatch
from slm_swap.rows.examples import Example
from slm_swap.rows.prompts import build_messages
from slm_swap.scoring.tracks import TRACKS
from slm_swap.slm_client import encode_prompt, files_hash, load_model, load_tokenizer, quiet_int8
from slm_swap.tuning.checkpoints import Checkpoints
from slm_swap.tuning.checks import length_report, memory_needed, memory_warning
from slm_swap.tuning.packing import IGNORED, PackCollator, add_targets, packed_rows
from slm_swap.tuning.record import peak_memory_gib, save_adapter
from slm_swap.tuning.validation import ExactEvaluation, GenerationSample

BACKENDS = ("auto", "unsloth", "trl")
COMPILE = ("auto", "yes", "no")


@dataclass(frozen=True)
class Hyperparameters:
    """Everything that decides what comes out; used, logged and saved with the adapter."""

    precision: str = "int8"  # the frozen base
    lora_r: int = 64
    lora_alpha: int = 16
    lora_dropout: float = 0.1
    learning_rate: float = 2e-4
    epochs: float = 1.0
    max_length: int = 2048  # tokens of prompt and completion together
    batch_size: int = 1  # rows a step and device
    gradient_accumulation: int = 8
    warmup_share: float = 0.03
    scheduler: str = "cosine"
    weight_decay: float = 0.0
    gradient_checkpointing: bool = True
    packing: bool = False  # a step's micro-batch is one pack of whole rows; gradient_accumulation then counts packs
    pack_length: int = 8192  # tokens in a pack
    compile: str = "auto"  # the layers, by torch.compile; auto: where it pays
    eval_steps: int = 0  # steps between evaluations on the validation rows, the best of which is kept; 0: none, and the last step is kept
    eval_generate: int = 0  # validation rows that are replied to at each evaluation
    best_by: str = "loss"  # which evaluation is the best: the lowest loss, or the highest value of one of the track's metrics
    early_stopping: int = 0  # evaluations in a row without a new best after which training ends; 0: it never does
    seed: int = 42

    def __post_init__(self):
        if not self.eval_steps and (self.eval_generate or self.early_stopping or self.best_by != "loss"):
            raise UserError("--eval-generate, --best-by and --early-stopping are about evaluations during training: add --eval-steps N")
        if self.best_by != "loss" and not self.eval_generate:
            raise UserError(f"--best-by {self.best_by} is measured on generated replies: add --eval-generate N")
        if self.packing and self.pack_length < self.max_length:
            raise UserError(
                f"rows of up to {self.max_length} tokens do not fit into packs of {self.pack_length}: raise --pack-length or lower --max-length"
            )

    def check_metric(self, track: str) -> None:
        """Refuse a `best_by` that the track does not have.

        Raises:
            UserError: so.
        """
        known = ("loss", *TRACKS[track].gate)
        if self.best_by not in known:
            raise UserError(f"--best-by {self.best_by} is no metric of {track}: choose one of {', '.join(known)}")

    @property
    def compiled(self) -> bool:
        """Whether layers are compiled: it takes a minute, and pays where all micro-batches have one shape."""
        import torch

        where_it_pays = self.packing and self.precision == "bf16" and torch.cuda.is_available()
        return self.compile == "yes" or (self.compile == "auto" and where_it_pays)


PRESETS = {  # what each changes in the documented setting
    "documented": {},
    "fast": {"precision": "bf16", "packing": True, "gradient_accumulation": 1, "gradient_checkpointing": False},
    "rtx3090": {
        "precision": "bf16", "packing": True, "pack_length": 2048, "gradient_accumulation": 4, "gradient_checkpointing": False
    },
}  # fmt: skip


def choose_backend(wanted: str, packing: bool = False) -> str:
    """`auto` is Unsloth where there is a CUDA GPU, and TRL + PEFT elsewhere, and where rows are packed: there it is faster.

    Raises:
        UserError: Unsloth is asked for and cannot work here.
    """
    import importlib.util

    import torch

    installed = importlib.util.find_spec("unsloth") is not None
    if wanted == "auto":
        return "unsloth" if torch.cuda.is_available() and installed and not packing else "trl"
    if wanted == "unsloth" and not torch.cuda.is_available():
        raise UserError("--backend unsloth needs a CUDA GPU and there is none: use --backend trl")
    if wanted == "unsloth" and not installed:
        raise UserError("unsloth is not installed: pip install -r requirements.txt, or use --backend trl")
    return wanted


def has_gpu(launch: Launch) -> bool:
    """Whether this process has a GPU of its own, or none has one."""
    import torch

    return not torch.cuda.is_available() or launch.local_rank < torch.cuda.device_count()


def choose_deepspeed(given: str | None, launch: Launch) -> Path | None:
    """DeepSpeed's configuration: `given`, for "none" no DeepSpeed, and for None ZeRO-2 where several GPUs are used.

    Raises:
        UserError: there is no such file, or DeepSpeed cannot work here.
    """
    import importlib.util

    import torch

    if given == "none" or (given is None and (launch.world == 1 or not torch.cuda.is_available())):
        return None
    path = find_path(given or PACKAGE / "accelerate_config/deepspeed_zero2.json")
    if not path.is_file():
        raise UserError(f"no DeepSpeed configuration at {display_path(path)}: check --deepspeed-config, or pass none")
    if launch.world == 1 or not torch.cuda.is_available():
        raise UserError("DeepSpeed is for several processes on CUDA GPUs: start them with torchrun or accelerate launch, or pass none")
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError("deepspeed is not installed: pip install -r requirements.txt, or use --deepspeed-config none")
    return path


def tokenize(tokenizer: Any, track: str, examples: list[Example], max_length: int) -> tuple[list[dict[str, list[int]]], list[int]]:
    """Rows to {"input_ids", "labels"}; the prompt's labels are IGNORED, the completion ends with the model's end token.

    The prompt is exactly what evaluation shows. Rows longer than `max_length` tokens are left out (a completion that is cut would
    teach the model to stop early): the second value is their lengths.

    Raises:
        UserError: a completion is not a reply of the track.
    """
    rows, too_long = [], []
    end = end_token(tokenizer)
    for example in examples:
        TRACKS[track].reference(example)
        prompt = encode_prompt(tokenizer, build_messages(track, example.prompt))
        completion = [*tokenizer(example.completion, add_special_tokens=False)["input_ids"], end]
        if len(prompt) + len(completion) > max_length:
            too_long.append(len(prompt) + len(completion))
            continue
        rows.append({"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + completion})
    return rows, too_long


def end_token(tokenizer: Any) -> int:
    """The token that ends a turn in the tokenizer's own chat format: what stands behind the last message's text."""
    mark = "\x00"
    text = tokenizer.apply_chat_template([{"role": "assistant", "content": mark}], tokenize=False)
    behind = tokenizer(text.split(mark, 1)[1], add_special_tokens=False)["input_ids"] if mark in text else []
    return behind[0] if behind else tokenizer.eos_token_id


def load_trainable(path: Path, parameters: Hyperparameters, backend: str, device: Any) -> Any:
    """The base model on `device` (a torch.device), frozen, with fresh LoRA weights on all linear layers."""
    if backend == "unsloth":
        return _load_unsloth(path, parameters)
    from peft import LoraConfig, get_peft_model

    model = load_model(path, parameters.precision, device_map={"": device})
    lora = LoraConfig(
        r=parameters.lora_r,
        lora_alpha=parameters.lora_alpha,
        lora_dropout=parameters.lora_dropout,
        target_modules=linear_names(model),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)


def import_unsloth(generated: Path, rank: int) -> None:
    """Import Unsloth, which patches transformers and TRL and so must come before them.

    The code that it generates goes into the folder `generated`, which rank 0 removes in the end, not into whatever folder one is in,
    where two trainings would share it.
    """
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(generated.resolve()))
    if rank == 0:
        atexit.register(shutil.rmtree, generated, ignore_errors=True)
    import unsloth  # noqa: F401


def _load_unsloth(path: Path, parameters: Hyperparameters) -> Any:
    import torch
    from transformers import AutoConfig

    # Unsloth compiles by default. bitsandbytes' 8-bit layers break its graphs: more than a minute, on an H200, before the first step.
    if parameters.compile == "no" or (parameters.compile == "auto" and parameters.precision == "int8"):
        os.environ["UNSLOTH_BLOCK_COMPILE"] = "0"
    from unsloth import FastLanguageModel

    quiet_int8()
    model, _ = FastLanguageModel.from_pretrained(
        model_name=str(path),
        max_seq_length=parameters.pack_length if parameters.packing else parameters.max_length,
        dtype=torch.float32 if parameters.precision == "fp32" else torch.bfloat16,
        load_in_4bit=parameters.precision == "nf4",
        load_in_8bit=parameters.precision == "int8",
    )
    vocabulary = AutoConfig.from_pretrained(path).vocab_size
    if model.get_input_embeddings().weight.shape[0] != vocabulary:
        # Where padding and the end of a text are one token, Unsloth adds a row for another: the checkpoint has none.
        model.resize_token_embeddings(vocabulary)
    return FastLanguageModel.get_peft_model(
        model,
        r=parameters.lora_r,
        lora_alpha=parameters.lora_alpha,
        lora_dropout=parameters.lora_dropout,
        target_modules=linear_names(model),
        use_gradient_checkpointing="unsloth" if parameters.gradient_checkpointing else False,
        random_state=parameters.seed,
    )


def linear_names(model: Any) -> list[str]:
    """The names of a decoder's linear layers, without the output head: what LoRA goes onto."""
    from torch import nn

    names = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return sorted(names - {"lm_head"})


def trainer_arguments(parameters: Hyperparameters, backend: str, output_dir: str, deepspeed: Path | None = None) -> Any:
    """TRL's configuration: what is due when is left to loop.Watch; no reporting, no waiting for the GPU between steps."""
    import torch
    from trl import SFTConfig

    cuda, packing = torch.cuda.is_available(), parameters.packing
    if cuda:
        torch.set_float32_matmul_precision("high")
    # Unsloth has its own loss and packed attention; on the other back end TRL's would take the place of ours.
    own = {"loss_type": "nll"} if backend == "trl" else {"packing": True, "padding_free": True} if packing else {}
    return SFTConfig(
        output_dir=output_dir,
        learning_rate=parameters.learning_rate,
        num_train_epochs=parameters.epochs,
        per_device_train_batch_size=1 if packing else parameters.batch_size,
        per_device_eval_batch_size=1 if packing else max(8, parameters.batch_size),
        gradient_accumulation_steps=parameters.gradient_accumulation,
        warmup_steps=parameters.warmup_share,
        lr_scheduler_type=parameters.scheduler,
        weight_decay=parameters.weight_decay,
        gradient_checkpointing=parameters.gradient_checkpointing,
        seed=parameters.seed,
        max_length=None,  # the rows are measured already
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        optim="adamw_torch_fused",  # Unsloth's default would be another one than TRL's
        train_sampling_strategy="random" if packing else "group_by_length",
        bf16=cuda and parameters.precision != "fp32",
        use_cpu=not cuda,
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,
        ddp_find_unused_parameters=False,
        accelerator_config={"non_blocking": cuda},
        report_to="none",
        deepspeed=str(deepspeed) if deepspeed else None,
        disable_tqdm=not sys.stderr.isatty(),
        **own,
    )


def make_trainer(
    model: Any,
    tokenizer: Any,
    arguments: Any,
    train_rows: list[dict[str, list[int]]],
    val_rows: list[dict[str, list[int]]],
    parameters: Hyperparameters,
    backend: str,
) -> Any:
    """A trainer for rows of {"input_ids", "labels"}, packed where that is wanted; its `train` and `evaluate` are ready to be called."""
    from datasets import Dataset

    if parameters.packing:
        train_rows, val_rows = (packed_rows(rows, parameters.pack_length, parameters.seed) for rows in (train_rows, val_rows))
    given = {
        "model": model,
        "args": arguments,
        "train_dataset": Dataset.from_list(train_rows),
        "eval_dataset": Dataset.from_list(val_rows) if val_rows else None,
        "processing_class": tokenizer,
    }
    if backend == "unsloth":
        from trl import SFTTrainer

        # On one GPU Unsloth's own evaluation is exact, too.
        several = type("UnslothTrainer", (ExactEvaluation, SFTTrainer), {})
        return (several if arguments.world_size > 1 else SFTTrainer)(**given)
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from slm_swap.tuning.fast_training import CHUNK, VARLEN, CompletionTrainer, compile_layers, give_completion_loss

    base, compiled = model.get_base_model(), parameters.compiled
    give_completion_loss(base, compiled)
    if compiled:
        compile_layers(base)
    if parameters.packing:
        multiple_of = CHUNK if compiled else 1
        collator = PackCollator.for_packs([*train_rows, *val_rows], parameters.pack_length, tokenizer.pad_token_id, multiple_of)
        if model.device.type == "cuda" and parameters.precision != "fp32":
            base.set_attn_implementation(VARLEN)
    else:
        pad = DataCollatorForLanguageModeling(tokenizer.pad_token_id)

        def collator(rows: list[dict]) -> dict:
            return add_targets(pad(rows))

    return CompletionTrainer(**given, data_collator=collator)


def load_together(load: Callable[[], Any], processes: int) -> Any:
    """`load()`; where it fails on one of several ranks, all end with that rank's error.

    Raises:
        UserError: as `load`, on whichever rank.
    """
    loaded = error = None
    try:
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
        UserError: no row is short enough, or a completion is not a reply of the track; the model or the checkpoints do not fit.
    """
    clock = Stopwatch()
    if backend == "unsloth":
        import_unsloth(out.with_name(f"{out.name}.unsloth"), launch.rank)
    set_seed(parameters.seed)
    tokenizer = load_tokenizer(base)
    rows, too_long = tokenize(tokenizer, track, train_rows, parameters.max_length)
    held_out, _ = tokenize(tokenizer, track, val_rows, parameters.max_length)
    if not rows or (parameters.eval_steps and not held_out):
        raise UserError(f"every {'val' if rows else 'train'} row is longer than {parameters.max_length} tokens: raise --max-length")
    lengths = sorted(len(row["input_ids"]) for row in rows)
    say(length_report(lengths, too_long, parameters.max_length))
    checkpoints, run = Checkpoints(out), {}
    if launch.rank == 0:
        run = identity(track, base, parameters, backend, inputs, deepspeed, launch)
        checkpoints.open(run, resume, run_id)
    from slm_swap.tuning.loop import run_trainer

    try:
        arguments = trainer_arguments(parameters, backend, str(checkpoints.folder), deepspeed)
        warn_of_memory(base, parameters, lengths[-1], arguments.device, say)
        model = load_together(lambda: load_trainable(base, parameters, backend, arguments.device), launch.world)
        trainer = make_trainer(model, tokenizer, arguments, rows, held_out, parameters, backend)
        sample = GenerationSample(trainer, tokenizer, track, val_rows[: parameters.eval_generate], backend)
        told, log = run_trainer(trainer, parameters, sample, checkpoints, save_steps, clock, say)
        tokens, seconds = sum(lengths) * (trainer.state.epoch or 0), told["seconds"]["train"]
        info = {
            "schema_version": SCHEMA_VERSION,
            "stage": "train",
            "created_at": now(),
            "preset": preset,
            "run_id": run_id,
            **run,
            "base_model": {"path": display_path(base), **run.get("base_model", {})},
            "inputs": inputs,
            "rows": {"train": len(rows), "val": len(held_out), "too_long": len(too_long)},
            "tokens": {"train": sum(lengths), "longest": lengths[-1], "longest_left_out": max(too_long, default=None)},
            "steps": trainer.state.global_step,
            "best_step": trainer.state.best_global_step,
            "train_loss": next((entry["loss"] for entry in reversed(log) if "loss" in entry), None),
            **told,
            "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
            "peak_memory_gib": peak_memory_gib(),
            "code": code_version(),
            "packages": package_versions(),
            "hardware": hardware(),
        }
        if launch.rank == 0:
            save_adapter(trainer.model, tokenizer, out, info, log, base, checkpoints)
    except BaseException:
        if launch.rank == 0 and not checkpoints.steps():
            checkpoints.remove()
        raise
    return info


def warn_of_memory(base: Path, parameters: Hyperparameters, longest: int, device: Any, say: Callable) -> None:
    """Say so where the GPU's free memory is less than what training is estimated to take."""
    import torch
    from transformers import AutoConfig

    if device.type == "cuda":
        needed = memory_needed(AutoConfig.from_pretrained(base), parameters, longest)
        warning = memory_warning(needed, torch.cuda.mem_get_info(device)[0] / 2**30, parameters)
        if warning:
            say(f"warning: {warning}")


def identity(
    track: str, base: Path, parameters: Hyperparameters, backend: str, inputs: dict[str, dict], deepspeed: Path | None, launch: Launch
) -> dict[str, Any]:
    """What a run's checkpoints are of: two runs of one identity can go on with each other's."""
    return {
        "track": track,
        "backend": backend,
        "base_model": {"config_sha256": sha256_file(base / "config.json"), "files_sha256": files_hash(base)},
        "hyperparameters": asdict(parameters),
        "inputs": {name: {key: told[key] for key in ("sha256", "rows")} for name, told in inputs.items()},
        "processes": launch.world,
        "deepspeed_sha256": sha256_file(deepspeed) if deepspeed else None,
    }
