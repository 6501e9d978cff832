"""The track's own metrics on replies that a model generates while it is being trained."""

from typing import Any

from slm_swap.errors import UserError
from slm_swap.evaluation import evaluate, references, summary
from slm_swap.examples import Example
from slm_swap.slm_client import SLMClient
from slm_swap.tracks import TRACKS

MAX_NEW_TOKENS = 256  # as eval.py
BATCH = 32


class GenerationSample:
    """Called, it lets a trainer's model reply to some rows, each rank to its share, and gives the metrics of eval.py's report.

    Raises:
        UserError: the back end's model cannot generate while it is trained.
    """

    def __init__(self, trainer: Any, tokenizer: Any, track: str, examples: list[Example], backend: str):
        if examples and backend == "unsloth":
            raise UserError("--eval-generate does not work with Unsloth's model: use --backend trl, or drop it")
        self.trainer, self.tokenizer, self.track, self.examples = trainer, tokenizer, track, examples

    def __call__(self) -> dict[str, float]:
        if not self.examples:
            return {}
        import torch
        from accelerate.utils import gather_object

        model, arguments = self.trainer.model, self.trainer.args
        base, share = model.get_base_model(), self.examples[arguments.process_index :: arguments.world_size]
        attention, training = base.config._attn_implementation, model.training
        base.set_attn_implementation("sdpa")  # that of packed rows knows no cache
        try:
            with torch.compiler.set_stance("force_eager"):
                client = LiveClient(model.eval(), self.tokenizer)
                rows = evaluate(self.track, client, share, references(TRACKS[self.track], share), BATCH)
        finally:
            base.set_attn_implementation(attention)
            model.train(training)
        return summary(TRACKS[self.track], gather_object(rows))["metrics"]


class LiveClient(SLMClient):
    """A model in memory behind the client protocol."""

    def __init__(self, model: Any, tokenizer: Any):
        from slm_swap.engines.transformers_engine import TransformersEngine

        self.tokenizer, self.max_new_tokens = tokenizer, MAX_NEW_TOKENS
        self.engine = TransformersEngine(model, tokenizer, BATCH, capture=False)
