"""QLoRA fine-tuning: rows to token ids, the trainer of either back end, and an adapter that says how it was made."""

import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slm_swap.errors import UserError
from slm_swap.evaluation import Stopwatch
from slm_swap.examples import Example
from slm_swap.packing import IGNORED, PackCollator, add_targets, packed_rows
from slm_swap.prompts import build_messages
from slm_swap.reports import SCHEMA_VERSION, code_version, hardware, now, package_versions, sha256_file, write_json, write_jsonl
from slm_swap.seeds import set_seed
from slm_swap.settings import display_path
from slm_swap.slm_client import encode_prompt, load_model, load_tokenizer
from slm_swap.tracks import TRACKS

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
    seed: int = 42

    def __post_init__(self):
        if self.packing and self.pack_length < self.max_length:
            raise UserError(
                f"rows of up to {self.max_length} tokens do not fit into packs of {self.pack_length}: raise --pack-length or lower --max-length"
            )

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


def tokenize(tokenizer: Any, track: str, examples: list[Example], max_length: int) -> tuple[list[dict[str, list[int]]], int]:
    """Rows to {"input_ids", "labels"}; the prompt's labels are IGNORED, the completion ends with the model's end token.

    The prompt is exactly what evaluation shows. Rows longer than `max_length` tokens are left out (a completion that is cut would
    teach the model to stop early): the second value counts them.

    Raises:
        UserError: a completion is not a reply of the track.
    """
    rows, too_long = [], 0
    end = end_token(tokenizer)
    for example in examples:
        TRACKS[track].reference(example)
        prompt = encode_prompt(tokenizer, build_messages(track, example.prompt))
        completion = [*tokenizer(example.completion, add_special_tokens=False)["input_ids"], end]
        if len(prompt) + len(completion) > max_length:
            too_long += 1
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


def _load_unsloth(path: Path, parameters: Hyperparameters) -> Any:
    import torch
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        model_name=str(path),
        max_seq_length=parameters.pack_length if parameters.packing else parameters.max_length,
        dtype=torch.float32 if parameters.precision == "fp32" else torch.bfloat16,
        load_in_4bit=parameters.precision == "nf4",
        load_in_8bit=parameters.precision == "int8",
    )
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


def trainer_arguments(parameters: Hyperparameters, backend: str, output_dir: str) -> Any:
    """TRL's configuration: no checkpoints of its own, no reporting, no waiting for the GPU between steps."""
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
        train_sampling_strategy="random" if packing else "group_by_length",
        bf16=cuda and parameters.precision != "fp32",
        use_cpu=not cuda,
        save_strategy="no",
        eval_strategy="no",
        logging_steps=0.05,  # of all steps
        logging_nan_inf_filter=False,
        ddp_find_unused_parameters=False,
        accelerator_config={"non_blocking": cuda},
        report_to="none",
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

        return SFTTrainer(**given)
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from slm_swap.fast_training import CHUNK, VARLEN, CompletionTrainer, compile_layers, give_completion_loss

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
) -> dict[str, Any]:
    """Fine-tune a LoRA adapter and put it, with the story of its making, in the folder `out`: all of it or nothing.

    Gives what `training_info.json` holds.

    Raises:
        UserError: no row is short enough, or a completion is not a reply of the track.
    """
    clock = Stopwatch()
    if backend == "unsloth":
        import unsloth  # noqa: F401  it patches transformers and TRL, so it must come before them
    set_seed(parameters.seed)
    tokenizer = load_tokenizer(base)
    rows, too_long = tokenize(tokenizer, track, train_rows, parameters.max_length)
    held_out, _ = tokenize(tokenizer, track, val_rows, parameters.max_length)
    if not rows:
        raise UserError(f"every train row is longer than {parameters.max_length} tokens: raise --max-length")
    with tempfile.TemporaryDirectory() as scratch:
        arguments = trainer_arguments(parameters, backend, scratch)
        model = load_trainable(base, parameters, backend, arguments.device)
        trainer = make_trainer(model, tokenizer, arguments, rows, held_out, parameters, backend)
        before = trainer.evaluate()["eval_loss"] if held_out else None
        clock.lap()
        trainer.train()
        seconds = clock.lap()
        after = trainer.evaluate()["eval_loss"] if held_out else None
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    info = {
        "schema_version": SCHEMA_VERSION,
        "stage": "train",
        "created_at": now(),
        "track": track,
        "backend": backend,
        "base_model": {"path": display_path(base), "config_sha256": sha256_file(base / "config.json")},
        "preset": preset,
        "hyperparameters": asdict(parameters),
        "inputs": inputs,
        "rows": {"train": len(rows), "val": len(held_out), "too_long": too_long},
        "tokens": {"train": sum(len(row["input_ids"]) for row in rows), "longest": max(len(row["input_ids"]) for row in rows)},
        "steps": trainer.state.global_step,
        "train_loss": losses[-1]["loss"] if losses else None,
        "eval_loss": {"before": before, "after": after},
        "seconds": {"train": round(seconds, 2), "total": round(clock.total, 2)},
        "code": code_version(),
        "packages": package_versions(),
        "hardware": hardware(),
    }
    _save(trainer.model, tokenizer, out, info, losses, base)
    return info


def _save(model: Any, tokenizer: Any, out: Path, info: dict, losses: list[dict], base: Path) -> None:
    """Write the adapter beside its place, then move it there: an older adapter stays whole until the new one is."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    except OSError as error:
        raise UserError(f"cannot write {display_path(out)} ({error.strerror}): choose another place with --out") from None
    try:
        model.peft_config["default"].base_model_name_or_path = display_path(base)
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        write_json(staged / "training_info.json", info)
        write_jsonl(staged / "training_log.jsonl", losses)
        staged.chmod(0o755)
        if out.exists():
            shutil.rmtree(out)
        staged.rename(out)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
