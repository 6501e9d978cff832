"""A model's RMSNorms by torch's fused kernel: written out, each is six kernels of a decode step that is bound by their number."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

NEAR = 2**-6  # of two roundings to bfloat16, in the size of what is rounded

Norms = Sequence[tuple[Any, Callable[[Any], Any]]]


def plain_norms(model: Any) -> Norms:
    """The modules that torch's `rms_norm` can stand for, with what does so. Each is tried: some families scale by one more than their weight."""
    import torch

    found = []
    for module in model.modules():
        weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not type(module).__name__.endswith("RMSNorm") or weight is None or not isinstance(eps, float) or "forward" in vars(module):
            continue
        fused = partial(_fused, plain=module.forward, weight=weight, eps=eps)
        with torch.inference_mode():
            x = torch.linspace(-2, 2, 2 * weight.numel(), dtype=weight.dtype, device=weight.device).view(2, -1)
            with suppress(Exception):  # of any package: one that takes other inputs is no plain one
                if torch.allclose(module(x).float(), fused(x).float(), NEAR, NEAR):
                    found.append((module, fused))
    return found


def _fused(x: Any, plain: Callable[[Any], Any], weight: Any, eps: float) -> Any:
    from torch.nn.functional import rms_norm

    if x.dtype != weight.dtype:  # the kernel is for one type, and families differ in what type they give
        return plain(x)
    return rms_norm(x, (x.shape[-1],), weight, eps)


@contextmanager
def fused_norms(norms: Norms) -> Iterator[None]:
    """Within it these modules are computed so."""
    for module, fused in norms:
        module.forward = fused
    try:
        yield
    finally:
        for module, _ in norms:
            del module.forward
