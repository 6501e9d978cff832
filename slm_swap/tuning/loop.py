"""What goes on around a trainer's steps: the order of the rows, evaluations, checkpoints, and when to stop.

Imports torch and transformers: import it inside functions, and after Unsloth where that is used.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from slm_swap.common.os_errors import writing
from slm_swap.common.progress import Progress
from slm_swap.evaluating.evaluation import Stopwatch
from slm_swap.tuning.checkpoints import GO_ON, Checkpoints

LOG_EVERY = 0.05  # of all steps


class SeededOrder(Sampler):
    """Row numbers in an order that hangs on the seed and the epoch alone, so that every rank and every resumed run finds the same.

    With `lengths`, rows of like length come together, the longest first, in stretches of 50 `group`s: that saves padding, and what does
    not fit in memory shows at once.
    """

    def __init__(self, count: int, seed: int, lengths: Sequence[int] | None = None, group: int = 1):
        self.count, self.seed, self.lengths, self.group, self.epoch = count, seed, lengths, group, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        from transformers.trainer_pt_utils import get_length_grouped_indices

        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        if self.lengths is None:
            return iter(torch.randperm(self.count, generator=generator).tolist())
        return iter(get_length_grouped_indices(self.lengths, self.group, generator=generator))


def use_seeded_order(trainer: Any, seed: int, by_length: bool) -> SeededOrder:
    """Let a trainer take its rows in a SeededOrder; a global batch, of all ranks, is of rows of like length if `by_length`."""
    arguments, dataset = trainer.args, trainer.train_dataset
    lengths = [len(ids) for ids in dataset["input_ids"]] if by_length else None
    group = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    order = SeededOrder(len(dataset), seed, lengths, group)
    trainer._get_train_sampler = lambda _=None: order  # both back ends' trainers ask here
    return order


def tell_where_it_saves(trainer: Any, folder: Path) -> None:
    """Let a trainer name the checkpoints' folder where it cannot write one: what it raises names no file, and may be a package's own.

    Around the saving alone: a file that training cannot read is not one that it cannot write.
    """
    save = trainer._save_checkpoint  # both back ends' trainers save here

    def save_or_tell(*given: Any, **named: Any) -> Any:
        with writing(folder, GO_ON):
            return save(*given, **named)

    trainer._save_checkpoint = save_or_tell


class Watch(TrainerCallback):
    """Decides after each step what is due, keeps the best evaluation in the trainer's state, and completes checkpoints.

    Whatever it decides by is in that state, which checkpoints hold: a resumed run decides alike. `sample` gives the metrics of
    generated replies; `best_by` is "loss" or one of them. `clock` began with this session; `earlier` is the `progress` of those before.
    """

    def __init__(
        self,
        parameters: Any,
        order: SeededOrder,
        checkpoints: Checkpoints,
        save_steps: int,
        sample: Callable[[], dict[str, float]],
        clock: Stopwatch,
        earlier: dict[str, Any],
    ):
        self.parameters, self.order, self.checkpoints, self.save_steps = parameters, order, checkpoints, save_steps
        self.sample, self.clock, self.earlier = sample, clock, earlier
        self.lap, self.training, self.evaluating = Stopwatch(), 0.0, 0.0

    def on_train_begin(self, args, state, control, **_):
        self.lap = Stopwatch()

    def on_train_end(self, args, state, control, **_):
        self.training += self.lap.lap()

    def on_epoch_begin(self, args, state, control, **_):
        self.order.epoch = int(state.epoch or 0)

    def on_step_end(self, args, state, control, **_):
        step, last, every = state.global_step, state.global_step >= state.max_steps, self.parameters.eval_steps
        control.should_evaluate = bool(every) and (last or step % every == 0)
        control.should_save = bool(self.save_steps) and not last and step % self.save_steps == 0
        # A logged loss is the mean since the one before it, and who resumes from a checkpoint does not know what came before that.
        regularly = step % math.ceil(state.max_steps * LOG_EVERY) == 0
        control.should_log = regularly or control.should_evaluate or control.should_save
        self.training += self.lap.lap()

    def on_evaluate(self, args, state, control, metrics, **_):
        sampled = {f"eval_{name}": value for name, value in self.sample().items()}
        metrics.update(sampled)
        state.log_history[-1].update(sampled)
        value, sign = metrics[f"eval_{self.parameters.best_by}"], -1 if self.parameters.best_by == "loss" else 1
        if math.isfinite(value) and (state.best_metric is None or sign * value > sign * state.best_metric):
            state.best_metric, state.best_global_step = value, state.global_step
            control.should_save = state.global_step < state.max_steps
        else:
            since = [entry for entry in state.log_history if "eval_loss" in entry and entry["step"] > (state.best_global_step or 0)]
            control.should_training_stop |= 0 < self.parameters.early_stopping <= len(since)
        self.evaluating += self.lap.lap()

    def on_save(self, args, state, control, **_):
        if args.world_size > 1:
            torch.distributed.barrier()  # every rank's part is written
        if state.is_world_process_zero:
            self.checkpoints.complete(state.global_step, self.progress(), state.best_global_step)

    def progress(self) -> dict[str, Any]:
        """What is told of a run besides the trainer's state: the seconds of all its sessions, and what `earlier` says."""
        spent = {"train": self.training, "evaluate": self.evaluating, "total": self.clock.total}
        return self.earlier | {"seconds": {name: round(spent[name] + self.earlier["seconds"][name], 2) for name in spent}}


class Told(TrainerCallback):
    """The steps as Progress, and each loss as a line, in the place of what transformers would show."""

    def __init__(self, shown: Progress):
        self.shown = shown

    def on_train_begin(self, args, state, control, **_):
        self.shown.expect(state.max_steps, state.global_step)

    def on_step_end(self, args, state, control, **_):
        self.shown.update(state.global_step - self.shown.done)

    def on_log(self, args, state, control, logs=None, **_):
        named = (("loss", "loss"), ("eval_loss", "validation loss"))
        if found := [f"{title} {logs[name]:.4g}" for name, title in named if name in (logs or {})]:
            self.shown.say(f"step {state.global_step} of {state.max_steps}: {', '.join(found)}")


def run_trainer(
    trainer: Any,
    parameters: Any,
    sample: Callable[[], dict[str, float]],
    checkpoints: Checkpoints,
    save_steps: int,
    clock: Stopwatch,
    say: Callable[[str], object],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train, from the last checkpoint where there is one, until the trainer's model is the one to keep.

    Gives `sessions`, `seconds`, and `eval_loss` and `metrics` before and after, as `training_info.json` has them; and the loss curve.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)  # Told says it in their place
    order = use_seeded_order(trainer, parameters.seed, by_length=not parameters.packing)
    checkpoint, earlier = checkpoints.latest(say) or (None, None)
    rows = trainer.eval_dataset is not None
    device = trainer.args.device
    if checkpoint:
        say(f"going on from {checkpoint.name}")
        if device.type == "cuda":  # PEFT would load it onto the first GPU
            trainer.model.load_adapter = partial(trainer.model.load_adapter, torch_device=str(device))
        elif device.index is not None:  # "cpu:0", as it is called among several processes, is a place that torch cannot load to
            torch.serialization.register_package(11, lambda _: None, lambda storage, place: storage if place == str(device) else None)
    else:
        earlier = {
            "sessions": 0,
            "seconds": {"train": 0.0, "evaluate": 0.0, "total": 0.0},
            "eval_loss": {"before": trainer.evaluate()["eval_loss"] if rows else None},
            "metrics": {"before": sample()},
        }
    tell_where_it_saves(trainer, checkpoints.folder)
    watch = Watch(parameters, order, checkpoints, save_steps, sample, clock, earlier | {"sessions": earlier["sessions"] + 1})
    with Progress("training", None, "steps", shown=trainer.is_world_process_zero()) as shown:
        steps = Told(shown)
        trainer.add_callback(watch)
        trainer.add_callback(steps)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trainer.remove_callback(steps)
        trainer.remove_callback(watch)
    state, told = trainer.state, watch.progress()
    log = [entry for entry in state.log_history if "loss" in entry or "eval_loss" in entry]
    if best := state.best_global_step:
        kept = next(entry for entry in log if "eval_loss" in entry and entry["step"] == best)
        if best != state.global_step:
            load_adapter(trainer.model, checkpoints.require_whole(best))
            if trainer.args.world_size > 1:
                torch.distributed.barrier()  # rank 0 removes the checkpoints when it has saved the adapter
    else:
        kept = {"eval_loss": trainer.evaluate()["eval_loss"] if rows else None}
    told["eval_loss"]["after"] = kept["eval_loss"]
    told["metrics"]["after"] = {name: kept[f"eval_{name}"] for name in told["metrics"]["before"]}
    told["seconds"]["total"] = watch.progress()["seconds"]["total"]
    return told, log


def load_adapter(model: Any, folder: Path) -> None:
    """Give a PEFT model the weights of an adapter in a folder."""
    from peft import load_peft_weights, set_peft_model_state_dict

    set_peft_model_state_dict(model, load_peft_weights(str(folder), device=str(model.device)))
