"""A frozen base whose products are made in 8-bit floats, of activations as of weights: the tensor cores of Hopper and Ada have twice the peak rate for them.

An 8-bit float has 3 bits behind its leading one, whatever it is scaled by: finer scales gain little. But a few columns of a layer's input make most
of its product, the same ones for nearly all tokens. These *doubled* columns have a second 8-bit float for what the first one rounds away, in
activations and weights, and are longer rows of the same product. Backward has none: its rounding is a quarter of forward's.

Gemma 3 270M with a short training's LoRA, fake quantisation on a CPU, 6 rows: the last hidden states' error is 0.111 of their norm with no column doubled,
0.090 with one in 64, 0.085 with one in 32, 0.081 with one in 16 and 0.073 with one in 8; with one in 32 and all of attention's layers in 16 bits 0.070.

Imports torch: import it inside functions.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch

from slm_swap.clients.int8 import FrozenLinear, product_dtype
from slm_swap.clients.loading import first_line
from slm_swap.common.errors import UserError

if FUSED := find_spec("triton") is not None:
    from slm_swap.tuning.fp8_kernels import scaled_rows

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
MULTIPLE = 16  # of which both sizes of a weight must be, for tensor cores
DOUBLED = 16  # of so many columns one is doubled: a forward product then is longer by an eighth
SAMPLES = 8  # training rows by which columns are chosen


def quantised(rows: torch.Tensor, doubled: torch.Tensor | None = None, of_weight: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (count, size) in 8-bit floats, and what each row is to be multiplied by, (count, 1), so that its largest value is the largest of theirs.

    With `doubled` columns, indices (columns,), rows are longer by two floats for each: for activations what was rounded away and the value, for a
    weight the value and what was rounded away, so that the product of two such rows has the value of each times the other's rest.
    """
    scale = rows.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    values = rows.float() / scale
    if doubled is not None:
        chosen = values.index_select(-1, doubled)
        rest = chosen - chosen.to(E4M3).float()
        values = torch.cat([values, *((chosen, rest) if of_weight else (rest, chosen))], -1)
    return values.to(E4M3), scale


def scaled_product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, doubled: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., in) times the transpose of a weight (out, in) of 8-bit floats, held as int8, with a scale (out,) for each row; in bfloat16.

    With `doubled` columns the weight has them, too: (out, in + 2 * columns).
    """
    # Without doubled columns compiled code does it in the kernel that makes x.
    by_kernel = FUSED and x.is_cuda and (doubled is not None or not torch.compiler.is_compiling())
    rows, scales = (scaled_rows if by_kernel else quantised)(x.flatten(0, -2), doubled)
    found = torch._scaled_mm(rows, weight.view(E4M3).t(), scales, scale[None], out_dtype=torch.bfloat16, use_fast_accum=True)
    return found.unflatten(0, x.shape[:-1])


class Fp8Product(torch.autograd.Function):
    """x (..., in) to (..., out) by a frozen weight, and gradients back by its transpose, which has scales of its own."""

    @staticmethod
    def forward(ctx, x, weight, scale, doubled, transposed, scale_back):
        ctx.save_for_backward(transposed, scale_back)
        ctx.dtype = x.dtype
        found, kind = scaled_product(x, weight, scale, doubled), product_dtype(x)
        return found if found.dtype == kind else found.to(kind)  # compiled by torch 2.11, a change of type that changes nothing has gradients of 0

    @staticmethod
    def backward(ctx, gradient):
        return scaled_product(gradient, *ctx.saved_tensors).to(ctx.dtype), None, None, None, None, None


class Fp8Linear(FrozenLinear):
    """A frozen linear layer with a weight (out, in) in 8-bit floats, once by rows and once by columns, which is what tensor cores read backward.

    `doubled`: the indices (columns,) of the input's columns with two floats each, a multiple of 8 of them; their second ones are the last of `weight`
    (out, in + 2 * columns).
    """

    def __init__(self, layer: torch.nn.Linear, doubled: torch.Tensor | None = None):
        weight, scale = quantised(layer.weight.detach(), doubled, of_weight=True)
        transposed, scale_back = quantised(layer.weight.detach().t().contiguous())
        super().__init__(weight.view(torch.int8), layer.bias, scale=scale[:, 0], scale_back=scale_back[:, 0])
        self.in_features = layer.in_features
        self.register_buffer("transposed", transposed.view(torch.int8))
        self.register_buffer("doubled", doubled)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = Fp8Product.apply(x, self.weight, self.scale, self.doubled, self.transposed, self.scale_back)
        return found if self.bias is None else found + self.bias.to(found.dtype)


def columns_to_double(decoder: Any, layers: dict[str, torch.nn.Linear], rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """For each of a text decoder's layers the indices of one in DOUBLED columns of its input (at least 8): those with the largest parts in its products.

    By SAMPLES of the training rows ({"input_ids"}). A column's part for a token is |x| times the norm of the weight's column, squared, as a share of all
    columns': a token with large values, as the first one has in many models, counts no more than others. A layer that no token reaches is left out.
    """
    parts: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Any:
        def look(layer: torch.nn.Linear, given: tuple[torch.Tensor, ...]) -> None:
            part = given[0].flatten(0, -2).float().square() * layer.weight.float().square().sum(0)
            share = (part / part.sum(-1, keepdim=True).clamp(min=1e-12)).sum(0)
            parts[name] = parts[name] + share if name in parts else share

        return look

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            for row in rows[:: max(1, len(rows) // SAMPLES)][:SAMPLES]:
                decoder(input_ids=torch.tensor([row["input_ids"]], device=decoder.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: part.topk(8 * -(-len(part) // (8 * DOUBLED))).indices.sort().values for name, part in parts.items()}


def give_fp8_products(model: Any, decoder: Any, names: list[str], rows: Sequence[dict[str, list[int]]]) -> int:
    """Put an Fp8Linear in the place of each plain linear layer of these names whose size fits; gives how many there were.

    `decoder`: the part of the model that has these layers and takes token ids. `rows`: those to train on, {"input_ids"}, by which columns are doubled;
    without any no column is.

    Raises:
        UserError: this machine makes no such products, or there is no layer for them.
    """
    require_fp8(model.device)
    named = {name: model.get_submodule(name) for name in names}
    layers = {name: part for name, part in named.items() if type(part) is torch.nn.Linear and not any(size % MULTIPLE for size in part.weight.shape)}
    if not layers:
        raise UserError(f"no linear layer of {type(model).__name__} is of a kind and size for products in fp8: use --precision bf16")
    doubled = columns_to_double(decoder, layers, rows)
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Fp8Linear(layer, doubled.get(name)))
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
        doubled = torch.arange(MULTIPLE, device=device)
        weight, scale = quantised(torch.ones(MULTIPLE, MULTIPLE, device=device), doubled, of_weight=True)
        scaled_product(torch.ones(1, MULTIPLE, device=device), weight.view(torch.int8), scale[:, 0], doubled)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise UserError(f"torch {torch.__version__} makes no products in fp8 on {what} ({first_line(error)}): use --precision bf16") from None
