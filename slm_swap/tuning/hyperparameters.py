"""Everything that decides what comes out of a training, and its presets."""

from dataclasses import dataclass

from slm_swap.common.errors import UserError
from slm_swap.scoring.tracks import Track

BACKENDS = ("auto", "unsloth", "trl")
SWITCH = ("auto", "yes", "no")
PRECISIONS = ("int8", "bf16", "fp32", "nf4", "fp8")  # fp8 is for training alone: its adapter is evaluated over 16 bits


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
    gradient_checkpointing: bool = True  # where steps are packs, only if memory is short: the gradients are the same
    packing: bool = False  # a step's micro-batch is one pack of whole rows; gradient_accumulation then counts packs
    pack_length: int = 8192  # tokens in a pack, or at most in one of a step's
    step_packs: str = "auto"  # without packing: a step's rows are computed as few packs, with the same gradients; auto: where it pays
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
    def step_packed(self) -> bool:
        """Whether the rows of a step are computed as packs: it pays where attention of packed rows has kernels, which is on a CUDA GPU in 16 bits."""
        import torch

        where_it_pays = torch.cuda.is_available() and self.precision != "fp32"
        return not self.packing and (self.step_packs == "yes" or (self.step_packs == "auto" and where_it_pays))

    @property
    def step_rows(self) -> int:
        """The rows of a step and device, without packing."""
        return self.batch_size * self.gradient_accumulation

    def step_room(self, longest: int) -> int:
        """The most tokens in a pack of a step's rows, of which the longest one has `longest`."""
        return min(max(self.pack_length, longest), self.step_rows * longest)

    @property
    def compiled(self) -> bool:
        """Whether layers are compiled: it takes a minute, and pays where rows are packed. bitsandbytes' 4-bit layers break graphs."""
        import torch

        where_it_pays = (self.packing or self.step_packed) and self.precision in ("bf16", "int8", "fp8") and torch.cuda.is_available()
        return self.compile == "yes" or (self.compile == "auto" and where_it_pays)


PRESETS = {  # what each changes in the documented setting
    "documented": {},
    "fast": {  # in such packs Phi-4-mini's shape took 32.8 GiB of an H200 over an 8-bit base
        "precision": "bf16", "packing": True, "pack_length": 7872, "gradient_accumulation": 1, "gradient_checkpointing": False
    },
    "rtx3090": {
        "precision": "bf16", "packing": True, "pack_length": 2048, "gradient_accumulation": 4, "gradient_checkpointing": False
    },
}  # fmt: skip
