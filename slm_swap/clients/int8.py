"""8-bit weights as bitsandbytes quantises them, with products of our own: in the activation's precision, of whole numbers times row scales.

Imports torch: import it inside functions.
"""

import sys
from functools import cache
from typing import Any

import torch
from torch.nn import functional

from slm_swap.clients.loading import first_line


def dequantized(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An int8 weight (out, in) times the scale of each row (out,), rounded once, to `dtype`."""
    return (weight * scale[:, None]).to(dtype)


@cache
def _fused_dequantized() -> Any:
    return torch.compile(dequantized, dynamic=True)


def _weight_in(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`dequantized`, on a GPU by one kernel for all shapes: torch.compile makes another one for the shape of each nn.Parameter, and half as fast."""
    if not weight.is_cuda:
        return dequantized(weight, scale, dtype)
    if (kernels := _kernels(weight.device)) and dtype in kernels.KINDS and weight.is_contiguous():
        return kernels.dequantised(weight, scale, dtype)
    return _fused_dequantized()(weight.detach(), scale, dtype)


# The product of backward is one operation to torch.compile. Were it several, the 16-bit weight would be found to be the forward pass's and kept for
# backward: all weights in 8 and in 16 bits.
torch.library.define("slm_swap::int8_backward", "(Tensor gradient, Tensor weight, Tensor scale) -> Tensor")


@torch.library.impl("slm_swap::int8_backward", "default")
def _int8_backward(gradient, weight, scale):
    return gradient @ _weight_in(weight, scale, gradient.dtype)


@torch.library.register_fake("slm_swap::int8_backward")
def _int8_backward_shape(gradient, weight, scale):
    return gradient.new_empty((*gradient.shape[:-1], weight.shape[1]))


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """In what a linear layer makes its products, as autocast wants it."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


class Int8Product(torch.autograd.Function):
    """x (..., in) times the transpose of a frozen int8 weight; kept for backward are the 8 bits."""

    @staticmethod
    def forward(ctx, x, weight, scale, bias):
        ctx.save_for_backward(weight, scale)
        ctx.dtype = x.dtype
        kind = product_dtype(x)
        inner = dequantized if torch.compiler.is_compiling() else _weight_in  # compiled, it becomes one kernel with what is around it
        return functional.linear(x.to(kind), inner(weight, scale, kind), None if bias is None else bias.to(kind))

    @staticmethod
    def backward(ctx, gradient):
        weight, scale = ctx.saved_tensors
        return torch.ops.slm_swap.int8_backward(gradient, weight, scale).to(ctx.dtype), None, None, None


class FrozenLinear(torch.nn.Linear):
    """A linear layer whose weight (out, in) is of 8 bits, held as int8, with `scales` in 32 bits, each an attribute.

    A linear layer to PEFT and to whoever looks for such, and of whole numbers, as PEFT gives LoRA the type of a weight of floats. PEFT's `merge` into
    it fails: 8 bits have no room for it.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, **scales: torch.Tensor):
        torch.nn.Module.__init__(self)  # nn.Linear's would make a weight of floats
        self.out_features, self.in_features = weight.shape
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else torch.nn.Parameter(bias.detach(), requires_grad=False)
        self.scales = tuple(scales)
        for name, scale in scales.items():
            self.register_buffer(name, scale.float())

    def _apply(self, fn, recurse=True):
        scales = {name: getattr(self, name) for name in self.scales}
        super()._apply(fn, recurse)
        for name, scale in scales.items():
            setattr(self, name, scale.to(self.weight.device))  # in 32 bits whatever the model is cast to
        return self


class Int8Linear(FrozenLinear):
    """A frozen linear layer of whole numbers from -127 to 127 (out, in), and what one of them is worth in each row: `scale` (out,)."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None):
        super().__init__(weight, bias, scale=scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            return Int8Product.apply(x, self.weight, self.scale, self.bias)
        kind = product_dtype(x)
        return product(x.to(kind), self.weight, self.scale, self.bias)


@cache
def _kernels(device: torch.device) -> Any:
    """The module `int8_kernels`, tried on a GPU once; None where its kernels cannot be had there, which is told in one line."""
    try:
        from slm_swap.clients import int8_kernels

        for rows, size in ((1, 16), (17, 16), (17, 6144)):  # one block of rows, two, and sums in parts
            weight, scale = torch.ones(16, size, dtype=torch.int8, device=device), torch.ones(16, device=device)
            int8_kernels.few_rows(torch.ones(rows, size, dtype=torch.bfloat16, device=device), weight, scale, None)
        int8_kernels.dequantised(weight, scale, torch.bfloat16)
    except torch.OutOfMemoryError:  # says nothing of the kernels
        raise
    except Exception as error:  # no triton, a GPU that it does not know, no C compiler for its launcher
        where = f"{torch.cuda.get_device_name(device)} ({type(error).__name__}: {first_line(error)})"
        told = f"triton's kernels for 8-bit weights do not run on {where}: products are made in plain torch, several times slower"
        print(f"warning: {told}; see that triton and a C compiler are installed", file=sys.stderr, flush=True)
        return None
    return int8_kernels


def product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (..., in) times the transpose of an int8 weight (out, in) with a scale (out,), without a gradient: (..., out), of x's type.

    On a GPU, of up to `int8_kernels.FEW` rows, by a kernel that reads 8 bits, and each row is the same whatever the others are. Of more rows by torch's
    product with the dequantised weight, which it may order by their number.
    """
    # Compiled (an evaluation within training), the plain way: a kernel of ours would break the graph.
    kernels = _kernels(x.device) if x.is_cuda and weight.is_contiguous() and not torch.compiler.is_compiling() else None
    if kernels and x.dtype in kernels.KINDS and x.numel():
        if x.numel() <= kernels.FEW * x.shape[-1]:
            return kernels.few_rows(x, weight, scale, bias)
        return functional.linear(x, kernels.dequantised(weight, scale, x.dtype), None if bias is None else bias.to(x.dtype))
    return plain_product(x, weight, scale, bias)


def plain_product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`product` in plain torch: on a CPU, and where there are no kernels."""
    # The whole numbers are exact in 16 bits: only the product is scaled, which costs less than scaling the weight, and rounds less.
    out = functional.linear(x, weight.to(x.dtype)) * scale
    return (out if bias is None else out + bias).to(x.dtype)


def give_own_products(model: Any) -> int:
    """Put an Int8Linear of the same bits in the place of each of bitsandbytes' 8-bit layers; gives how many there were.

    LLM.int8() rounds activations to 8 bits too, except in columns with outliers, and so every product hangs on the whole batch. These products
    round nothing but the weights. The model then is an ordinary one to the trainers, which train LoRA in 32 bits as on a 16-bit base.
    """
    from bitsandbytes.nn import Linear8bitLt

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear8bitLt)}
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        scale = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB  # the latter after a first product
        setattr(model.get_submodule(parent), child, Int8Linear(layer.weight.data, scale / 127, layer.bias))
    if layers:
        model.is_loaded_in_8bit = False
        model.hf_quantizer.remove_quantization_config(model)
    return len(layers)
