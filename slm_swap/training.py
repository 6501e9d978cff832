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
from slm_swap.prompts import build_messages
from slm_swap.reports import SCHEMA_VERSION, code_version, hardware, now, package_versions, sha256_file, write_json, write_jsonl
from slm_swap.seeds import set_seed
from slm_swap.settings import display_path
from slm_swap.slm_client import encode_prompt, load_model, load_tokenizer
from slm_swap.tracks import TRACKS

BACKENDS = ("auto", "unsloth", "trl")
IGNORED = -100  # the label of tokens that carry no loss


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
    seed: int = 42


def choose_backend(wanted: str) -> str:
    """`auto` is Unsloth where there is a CUDA GPU, and TRL + PEFT elsewhere.

    Raises:
        UserError: Unsloth is asked for and cannot work here.
    """
    import importlib.util

    import torch

    installed = importlib.util.find_spec("unsloth") is not None
    if wanted == "auto":
        return "unsloth" if torch.cuda.is_available() and installed else "trl"
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


def load_trainable(path: Path, tokenizer: Any, parameters: Hyperparameters, backend: str) -> tuple[Any, Any]:
    """The base model, frozen, with fresh LoRA weights on all linear layers: (model, tokenizer)."""
    if backend == "unsloth":
        return _load_unsloth(path, parameters), tokenizer
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    model = load_model(path, parameters.precision, device_map={"": 0} if torch.cuda.is_available() else None)
    if parameters.precision in ("int8", "nf4"):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=parameters.gradient_checkpointing)
    lora = LoraConfig(
        r=parameters.lora_r,
        lora_alpha=parameters.lora_alpha,
        lora_dropout=parameters.lora_dropout,
        target_modules=linear_names(model),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora), tokenizer


def _load_unsloth(path: Path, parameters: Hyperparameters) -> Any:
    import torch
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        model_name=str(path),
        max_seq_length=parameters.max_length,
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


def trainer_arguments(parameters: Hyperparameters, output_dir: str, steps: int) -> Any:
    """TRL's configuration: no checkpoints of its own, no reporting, rows of like length together."""
    import torch
    from trl import SFTConfig

    cuda = torch.cuda.is_available()
    return SFTConfig(
        output_dir=output_dir,
        learning_rate=parameters.learning_rate,
        num_train_epochs=parameters.epochs,
        per_device_train_batch_size=parameters.batch_size,
        per_device_eval_batch_size=max(8, parameters.batch_size),
        gradient_accumulation_steps=parameters.gradient_accumulation,
        warmup_steps=round(parameters.warmup_share * steps),
        lr_scheduler_type=parameters.scheduler,
        weight_decay=parameters.weight_decay,
        gradient_checkpointing=parameters.gradient_checkpointing,
        seed=parameters.seed,
        max_length=None,  # the rows are measured already
        dataset_kwargs={"skip_prepare_dataset": True},
        train_sampling_strategy="group_by_length",
        bf16=cuda and parameters.precision != "fp32",
        use_cpu=not cuda,
        save_strategy="no",
        eval_strategy="no",
        logging_steps=max(1, steps // 20),
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),
    )


def train(
    track: str,
    base: Path,
    train_rows: list[Example],
    val_rows: list[Example],
    out: Path,
    parameters: Hyperparameters,
    backend: str,
    inputs: dict[str, dict],
) -> dict[str, Any]:
    """Fine-tune a LoRA adapter and put it, with the story of its making, in the folder `out`: all of it or nothing.

    Gives what `training_info.json` holds.

    Raises:
        UserError: no row is short enough, or a completion is not a reply of the track.
    """
    clock = Stopwatch()
    if backend == "unsloth":
        import unsloth  # noqa: F401  it patches transformers and TRL, so it must come before them
    from datasets import Dataset
    from trl import SFTTrainer

    set_seed(parameters.seed)
    tokenizer = load_tokenizer(base)
    rows, too_long = tokenize(tokenizer, track, train_rows, parameters.max_length)
    held_out, _ = tokenize(tokenizer, track, val_rows, parameters.max_length)
    if not rows:
        raise UserError(f"every train row is longer than {parameters.max_length} tokens: raise --max-length")
    model, tokenizer = load_trainable(base, tokenizer, parameters, backend)
    steps = max(1, round(len(rows) / (parameters.batch_size * parameters.gradient_accumulation) * parameters.epochs))
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SFTTrainer(
            model=model,
            args=trainer_arguments(parameters, scratch, steps),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(held_out) if held_out else None,
            processing_class=tokenizer,
        )
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
