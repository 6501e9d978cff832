"""A frozen base whose products are made in 8-bit floats, of activations as of weights: the tensor cores of Hopper and Ada have twice the peak rate for them.

Imports torch: import it inside functions.
"""

from typing import Any

import torch

from slm_swap.clients.int8 import FrozenLinear, product_dtype
from slm_swap.clients.loading import first_line
from slm_swap.common.errors import UserError

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
MULTIPLE = 16  # of which both sizes of a weight must be, for tensor cores


def quantised(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (count, size) in 8-bit floats, and what each row is to be multiplied by, (count, 1), so that its largest value is the largest of theirs."""
    scale = rows.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (rows.float() / scale).to(E4M3), scale


def scaled_product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x (..., in) times the transpose of a weight (out, in) of 8-bit floats, held as int8, with a scale (out,) for each row; in bfloat16."""
    rows, scales = quantised(x.flatten(0, -2))
    found = torch._scaled_mm(rows, weight.view(E4M3).t(), scales, scale[None], out_dtype=torch.bfloat16, use_fast_accum=True)
    return found.unflatten(0, x.shape[:-1])


class Fp8Product(torch.autograd.Function):
    """x (..., in) to (..., out) by a frozen weight, and gradients back by its transpose, which has scales of its own."""

    @staticmethod
    def forward(ctx, x, weight, scale, transposed, scale_back):
        ctx.save_for_backward(transposed, scale_back)
        ctx.dtype = x.dtype
        return scaled_product(x, weight, scale).to(product_dtype(x))

    @staticmethod
    def backward(ctx, gradient):
        return scaled_product(gradient, *ctx.saved_tensors).to(ctx.dtype), None, None, None, None


class Fp8Linear(FrozenLinear):
    """A frozen linear layer with a weight (out, in) in 8-bit floats, once by rows and once by columns, which is what tensor cores read backward."""

    def __init__(self, layer: torch.nn.Linear):
        weight, scale = quantised(layer.weight.detach())
        transposed, scale_back = quantised(layer.weight.detach().t().contiguous())
        super().__init__(weight.view(torch.int8), layer.bias, scale=scale[:, 0], scale_back=scale_back[:, 0])
        self.register_buffer("transposed", transposed.view(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = Fp8Product.apply(x, self.weight, self.scale, self.transposed, self.scale_back)
        return found if self.bias is None else found + self.bias.to(found.dtype)


def give_fp8_products(model: Any, names: list[str]) -> int:
    """Put an Fp8Linear in the place of each plain linear layer of these names whose size fits; gives how many there were.

    Raises:
        UserError: this machine makes no such products, or there is no layer for them.
    """
    require_fp8(model.device)
    named = {name: model.get_submodule(name) for name in names}
    layers = {name: part for name, part in named.items() if type(part) is torch.nn.Linear and not any(size % MULTIPLE for size in part.weight.shape)}
    if not layers:
        raise UserError(f"no linear layer of {type(model).__name__} is of a kind and size for products in fp8: use --precision bf16")
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Fp8Linear(layer))
    return len(layers)


def require_fp8(device: torch.device) -> None:
    """Refuse a machine that makes no products of 8-bit floats.

    Raises:
        UserError: so, with what it is.
    """
    cuda = device.type == "cuda"
    what = torch.cuda.get_device_name(device) if cuda else "a CPU"
    if cuda and torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError(f"--precision fp8 needs an Ada or Hopper GPU (compute capability 8.9 or more), and this is {what}: use --precision bf16")
    try:
        weight, scale = quantised(torch.ones(MULTIPLE, MULTIPLE, device=device))
        scaled_product(torch.ones(1, MULTIPLE, device=device), weight.view(torch.int8), scale[:, 0])
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise UserError(f"torch {torch.__version__} makes no products in fp8 on {what} ({first_line(error)}): use --precision bf16") from None
