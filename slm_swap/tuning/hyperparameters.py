"""Everything that decides what comes out of a training, and its presets."""

from dataclasses import dataclass

from slm_swap.common.errors import UserError
from slm_swap.scoring.tracks import Track

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
    eval_steps: int = (
        0  # steps between evaluations on the validation rows, the best of which is kept; 0: none, and the last step is kept
    )
    eval_generate: int = 0  # validation rows that are replied to at each evaluation
    best_by: str = "loss"  # which evaluation is the best: the lowest loss, or the highest value of one of the track's metrics
    early_stopping: int = 0  # evaluations in a row without a new best after which training ends; 0: it never does
    seed: int = 42

    def __post_init__(self):
        if not self.eval_steps and (self.eval_generate or self.early_stopping or self.best_by != "loss"):
            raise UserError(
                "--eval-generate, --best-by and --early-stopping are about evaluations during training: add --eval-steps N"
            )
        if self.best_by != "loss" and not self.eval_generate:
            raise UserError(f"--best-by {self.best_by} is measured on generated replies: add --eval-generate N")
        if self.packing and self.pack_length < self.max_length:
            raise UserError(
                f"rows of up to {self.max_length} tokens do not fit into packs of {self.pack_length}: raise --pack-length or lower --max-length"
            )

    def check_metric(self, track: Track) -> None:
        """Refuse a `best_by` that the track, for the rows that are generated for, does not have (see `Track.for_gold`).

        Raises:
            UserError: so.
        """
        known = ("loss", *track.gate)
        if self.best_by not in known:
            raise UserError(f"--best-by {self.best_by} is no metric of these {track.title} rows: choose one of {', '.join(known)}")

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
