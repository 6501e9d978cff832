"""The trainer of either back end."""

import sys
from pathlib import Path
from typing import Any

from slm_swap.clients.loading import padding_id
from slm_swap.tuning.backends import decoder_of
from slm_swap.tuning.hyperparameters import Hyperparameters
from slm_swap.tuning.packing import PackCollator, add_targets, packed_rows
from slm_swap.tuning.validation import ExactEvaluation


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
    """A trainer for rows of {"input_ids", "labels"}, packed where that is wanted; its `train` and `evaluate` are ready to be called.

    Raises:
        UserError: the TRL back end's loss or packed attention is not the model's own: see model_checks.
    """
    from datasets import Dataset

    rows = [row["input_ids"] for row in train_rows]
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
    from slm_swap.tuning.model_checks import check_loss, check_packing

    base, compiled = model.get_base_model(), parameters.compiled
    decoder = decoder_of(base)
    own_attention = decoder.config._attn_implementation
    check_loss(base, min((ids for ids in rows if len(ids) > 1), key=len))
    if parameters.packing:
        if model.device.type == "cuda" and parameters.precision != "fp32":
            decoder.set_attn_implementation(VARLEN)
        check_packing(base, rows, parameters.pack_length, own_attention)
    give_completion_loss(base, compiled)
    if compiled:
        compile_layers(base)
    if parameters.packing:
        multiple_of = CHUNK if compiled else 1
        collator = PackCollator.for_packs([*train_rows, *val_rows], parameters.pack_length, padding_id(tokenizer), multiple_of)
    else:
        pad = DataCollatorForLanguageModeling(padding_id(tokenizer))

        def collator(rows: list[dict]) -> dict:
            return add_targets(pad(rows))

    trainer = CompletionTrainer(**given, data_collator=collator)
    trainer.own_attention = own_attention
    return trainer
