"""What is measured while a model is being trained: the loss on the validation rows, and the track's own metrics on generated replies."""

from collections.abc import Callable
from typing import Any

from slm_swap.common.errors import UserError
from slm_swap.common.progress import Progress
from slm_swap.evaluating.console import NEARLY_ALL
from slm_swap.evaluating.evaluation import evaluate, references
from slm_swap.evaluating.report import summary
from slm_swap.rows.examples import Example
from slm_swap.scoring.tracks import TRACKS
from slm_swap.slm_client import SLMClient
from slm_swap.tuning.backends import attending_by
from slm_swap.tuning.packing import IGNORED

MAX_NEW_TOKENS = 256  # as eval.py
BATCH = 32


class ExactEvaluation:
    """Mixed into a Trainer: the mean loss over all targets of the validation rows, however they lie in batches and on ranks.

    transformers' own loop repeats rows so that all ranks have as many, and counts the repeats; with DeepSpeed it refuses to run before
    training has begun. Here each rank has its rows, nothing waits in between, and the model is not cast or wrapped.
    """

    def targets_loss(self, batch: dict[str, Any]) -> tuple[Any, Any]:
        """The sum of the losses of a batch's targets, and their number, as tensors; by default of a model that gives the mean."""
        count = (batch["labels"][..., 1:] != IGNORED).sum()
        return self.model(**batch, use_cache=False)["loss"] * count, count

    def get_eval_dataloader(self, eval_dataset=None):
        """Each row once: ranks may have different numbers of batches."""
        self.accelerator.even_batches = False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.accelerator.even_batches = True

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        import torch

        training = self.model.training
        self.model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        with torch.no_grad(), self.accelerator.autocast():
            batches = self.get_eval_dataloader(eval_dataset)
            with Progress("validation", len(batches), "batches", shown=self.args.process_index == 0) as shown:
                for batch in batches:
                    loss, count = self.targets_loss(self._prepare_inputs(batch))
                    total += torch.stack((loss.double(), count.double()))
                    shown.update()
        self.model.train(training)
        loss, count = self.accelerator.reduce(total).tolist()
        metrics = {f"{metric_key_prefix}_loss": loss / count}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class GenerationSample:
    """Called, it lets a trainer's model reply to some rows, each rank to its share, and gives the metrics of eval.py's report.

    At the first evaluation of a tuned model it says so, where nearly all replies ran to the limit.

    Raises:
        UserError: the back end's model cannot generate while it is trained.
    """

    def __init__(self, trainer: Any, tokenizer: Any, track: str, examples: list[Example], backend: str, say: Callable[[str], object]):
        if examples and backend == "unsloth":
            raise UserError("--eval-generate does not work with Unsloth's model: use --backend trl, or drop it")
        self.trainer, self.tokenizer, self.track, self.examples = trainer, tokenizer, track, examples
        self.say, self.tuned = say, 0

    def __call__(self) -> dict[str, float]:
        if not self.examples:
            return {}
        import torch
        from accelerate.utils import gather_object

        model, arguments = self.trainer.model, self.trainer.args
        share, training = self.examples[arguments.process_index :: arguments.world_size], model.training
        # That of packed rows knows no cache; the one that the model came with knows all that the model asks of it.
        with attending_by(model.get_base_model(), self.trainer.own_attention):
            try:
                with torch.compiler.set_stance("force_eager"), Progress("validation replies", len(share), shown=arguments.process_index == 0) as shown:
                    client = LiveClient(model.eval(), self.tokenizer)
                    rows = evaluate(self.track, client, share, references(TRACKS[self.track], share), BATCH, shown.update)
            finally:
                model.train(training)
        told = summary(TRACKS[self.track], gather_object(rows))
        self.tuned += self.trainer.state.global_step > 0
        if self.tuned == 1 and (warning := endless(told["counts"], self.trainer.state.global_step)):
            self.say(warning)
        return told["metrics"]


def endless(counts: dict[str, Any], step: int) -> str | None:
    """What to say of a tuned model after some steps of which nearly all replies ran to the limit; None where they did not."""
    rows, cut = counts["rows"], counts["errors"]["truncated"]
    if cut < NEARLY_ALL * rows:
        return None
    return (
        f"warning: after step {step}, {cut} of {rows} replies ran to the limit of {MAX_NEW_TOKENS} tokens: the tuned model does not end them. If the "
        "references are shorter and the next evaluation finds no more that end, stop, and train longer, at a higher --learning-rate, or an instruct checkpoint"
    )


class LiveClient(SLMClient):
    """A model in memory behind the client protocol."""

    def __init__(self, model: Any, tokenizer: Any):
        from slm_swap.clients.engines.transformers_engine import TransformersEngine

        self.tokenizer, self.max_new_tokens, self.constrain, self.grammars = tokenizer, MAX_NEW_TOKENS, "off", None
        self.engine = TransformersEngine(model, tokenizer, BATCH, capture=False)
