"""Which preset `--preset auto` is, by the memory of the GPUs."""

from pathlib import Path
from typing import Any

from slm_swap.clients.loading import load_config
from slm_swap.common.errors import UserError
from slm_swap.tuning.checks import memory_needed
from slm_swap.tuning.hyperparameters import PRESETS, Hyperparameters


def choose_preset(base: Path, given: dict[str, Any], gpus: list[float] | None = None) -> tuple[str, str]:
    """The preset of `--preset auto`, and why: the fastest one whose estimated memory is there on each GPU that this process sees.

    `given` are the hyperparameters that flags set; `gpus` the GiB of each GPU, by default of those that there are.

    Raises:
        UserError: the model's configuration cannot be read.
    """
    import torch

    if gpus is None:
        gpus = [torch.cuda.get_device_properties(number).total_memory / 2**30 for number in range(torch.cuda.device_count())]
    if not gpus:
        return "documented", "there is no CUDA GPU"
    config, room = load_config(base), min(gpus)
    for name in ("fast", "rtx3090"):
        try:
            parameters = Hyperparameters(**PRESETS[name] | given)
            needed = sum(memory_needed(config, parameters, parameters.max_length).values())
        except UserError:  # it does not go with the flags
            continue
        except AttributeError as missing:
            return "documented", f"no estimate of the memory that others take: the model's configuration lacks {missing.name or missing}"
        if needed <= 0.95 * room:  # the rest is the driver's and CUDA's
            return name, f"an estimated {needed:.1f} of a GPU's {room:.1f} GiB"
    return "documented", f"the others do not fit into {room:.1f} GiB, or not with these flags"
