"""The trainer of either back end."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slm_swap.clients.loading import padding_id
from slm_swap.common.errors import UserError
from slm_swap.tuning.backends import decoder_of
from slm_swap.tuning.checks import UNPACKED
from slm_swap.tuning.hyperparameters import Hyperparameters
from slm_swap.tuning.packing import PackCollator, StepPacks, StepRows, add_targets, packed_rows
from slm_swap.tuning.validation import ExactEvaluation

STEP_MULTIPLE = 128  # compiled, a step's packs have lengths of so many tokens: what tensor cores and kernels divide


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
        ddp_broadcast_buffers=False,  # all ranks have the same ones, and none changes
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
    say: Callable[[str], object] = lambda _: None,
) -> Any:
    """A trainer for rows of {"input_ids", "labels"}, packed where that is wanted; its `train` and `evaluate` are ready to be called.

    Where the rows of a step cannot be computed as packs, it says so, and takes micro-batches of padded rows.

    Raises:
        UserError: the TRL back end's loss or packed attention is not the model's own: see model_checks.
    """
    from datasets import Dataset

    rows = [row["input_ids"] for row in train_rows]
    if parameters.packing:
        train_rows, val_rows = (packed_rows(rows, parameters.pack_length, parameters.seed) for rows in (train_rows, val_rows))
    # Packs as tensors: a fast GPU waits for the next one, and to make it of lists takes milliseconds.
    form = "torch" if parameters.packing and backend == "trl" else None
    train_set, val_set = (Dataset.from_list(part).with_format(form) if part else None for part in (train_rows, val_rows))
    given = {
        "model": model,
        "args": arguments,
        "train_dataset": train_set,
        "eval_dataset": val_set,
        "processing_class": tokenizer,
    }
    if backend == "unsloth":
        from trl import SFTTrainer

        # On one GPU Unsloth's own evaluation is exact, too.
        several = type("UnslothTrainer", (ExactEvaluation, SFTTrainer), {})
        return (several if arguments.world_size > 1 else SFTTrainer)(**given)
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from slm_swap.tuning.fast_training import CHUNK, CompletionTrainer, compile_layers, give_completion_loss
    from slm_swap.tuning.model_checks import check_loss

    base, own_attention = model.get_base_model(), decoder_of(model.get_base_model()).config._attn_implementation
    check_loss(base, min((ids for ids in rows if len(ids) > 1), key=len))
    longest = max(map(len, rows + [row["input_ids"] for row in val_rows]))
    room, step_packed = parameters.step_room(longest), False
    if parameters.packing:
        attend_in_packs(model, rows, parameters.pack_length, parameters.precision)
    elif parameters.step_packed:
        step_packed = can_pack_steps(model, rows, room, parameters, arguments, say)
        if not step_packed and parameters.gradient_checkpointing != arguments.gradient_checkpointing:
            arguments.gradient_checkpointing = parameters.gradient_checkpointing
            say("gradient checkpointing stays: memory sufficed for packs without it")
    compiled = parameters.compiled and (parameters.packing or step_packed or parameters.compile == "yes")
    give_completion_loss(base, compiled)
    if compiled:
        compile_layers(base, one_shape=not step_packed)
    pad, targets = padding_id(tokenizer), CHUNK if compiled else 1
    if parameters.packing:
        collator = PackCollator.for_packs([*train_rows, *val_rows], parameters.pack_length, pad, targets)
    elif step_packed:
        collator = StepRows
    else:
        padded = DataCollatorForLanguageModeling(pad)

        def collator(rows: list[dict]) -> dict:
            return add_targets(padded(rows))

    trainer = CompletionTrainer(**given, data_collator=collator)
    trainer.own_attention, trainer.say = own_attention, say
    if step_packed:
        together = max(parameters.step_rows, arguments.per_device_eval_batch_size)
        trainer.step_packs = StepPacks(room, together, longest, pad, STEP_MULTIPLE if compiled else 1, targets)
    return trainer


def attend_in_packs(model: Any, rows: list[list[int]], room: int, precision: str) -> None:
    """Give a PEFT model the attention of packed rows (of token ids), where there are kernels for it, and look that it is the model's own.

    Raises:
        UserError: it is not, or rows of a pack see each other: see model_checks. The model then has the attention that it came with.
    """
    from slm_swap.tuning.fast_training import VARLEN
    from slm_swap.tuning.model_checks import check_packing

    decoder = decoder_of(model.get_base_model())
    own = decoder.config._attn_implementation
    if model.device.type == "cuda" and precision != "fp32":
        decoder.set_attn_implementation(VARLEN)
    try:
        check_packing(model.get_base_model(), rows, room, own)
    except UserError:
        decoder.set_attn_implementation(own)
        raise


def can_pack_steps(model: Any, rows: list[list[int]], room: int, parameters: Hyperparameters, arguments: Any, say: Callable[[str], object]) -> bool:
    """Whether the rows of a step can be computed as packs, for which the model then has the attention; says so where not.

    Raises:
        UserError: they cannot, and were to be.
    """
    reason = "DeepSpeed counts micro-batches" if arguments.deepspeed else None
    if reason is None:
        try:
            attend_in_packs(model, rows, room, parameters.precision)
        except UserError as refused:
            reason = str(refused).removesuffix(f": {UNPACKED}")
    if reason is None:
        return True
    if parameters.step_packs == "yes":
        raise UserError(f"the rows of a step cannot be packed ({reason}): use --step-packs no")
    say(f"a step's rows are computed {parameters.batch_size} at a time, not as packs: {reason}")
    return False
