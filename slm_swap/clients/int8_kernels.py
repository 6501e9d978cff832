"""Triton kernels of 8-bit weights: a product of few rows, which reads each weight as the 8 bits that it is, and a dequantised weight.

torch's own cast of int8 runs far below the memory's speed, and writes 16 bits that the product has to read again. Imports torch and triton, which CPU
builds of torch come without: import it inside functions.
"""

from functools import cache

import torch
import triton
import triton.language as tl

FEW = 64  # rows of a product that `few_rows` makes: from here on the weight is read too often
KINDS = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit(do_not_specialize=["rows"])
def _few_rows(
    x, weight, scale, bias, out, rows, outputs, inputs,
    EVEN: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A block of out (rows, outputs), or with SPLIT of sums of one part of the inputs, out (SPLIT, rows, outputs). EVEN: inputs are a multiple of 2 BLOCK_K."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    share = tl.cdiv(tl.cdiv(inputs, 2 * BLOCK_K), SPLIT) * 2 * BLOCK_K
    first = tl.program_id(2) * share
    x_at = x + m[:, None] * inputs + first + k[None, :]
    weight_at = weight + n[None, :].to(tl.int64) * inputs + first + k[:, None]
    x_in, weight_in = m[:, None] < rows, n[None, :] < outputs
    # Two sums, as tensor cores wait for the last product of a sum before they add the next.
    even = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    odd = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, tl.minimum(first + share, inputs), 2 * BLOCK_K):
        if EVEN:
            x_even = tl.load(x_at, x_in, 0.0)
            weight_even = tl.load(weight_at, weight_in, 0)
            x_odd = tl.load(x_at + BLOCK_K, x_in, 0.0)
            weight_odd = tl.load(weight_at + BLOCK_K, weight_in, 0)
        else:
            left = inputs - start
            x_even = tl.load(x_at, x_in & (k[None, :] < left), 0.0)
            weight_even = tl.load(weight_at, weight_in & (k[:, None] < left), 0)
            x_odd = tl.load(x_at + BLOCK_K, x_in & (k[None, :] + BLOCK_K < left), 0.0)
            weight_odd = tl.load(weight_at + BLOCK_K, weight_in & (k[:, None] + BLOCK_K < left), 0)
        even = tl.dot(x_even, weight_even.to(x_even.dtype), even, input_precision="ieee")
        odd = tl.dot(x_odd, weight_odd.to(x_odd.dtype), odd, input_precision="ieee")
        x_at += 2 * BLOCK_K
        weight_at += 2 * BLOCK_K
    total = even + odd
    if SPLIT == 1:
        total *= tl.load(scale + n, n < outputs, 0.0)[None, :]
        if bias is not None:
            total += tl.load(bias + n, n < outputs, 0.0).to(tl.float32)[None, :]
    row = tl.program_id(2) * rows + m
    tl.store(out + row[:, None] * outputs + n[None, :], total.to(out.dtype.element_ty), x_in & weight_in)


@triton.jit(do_not_specialize=["rows"])
def _add_parts(parts, scale, bias, out, rows, outputs, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr):
    """A block of one row of out (rows, outputs): the sums of parts (SPLIT, rows, outputs), in their order, as `_few_rows` ends its own."""
    row, n = tl.program_id(0), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(parts + (part * rows + row) * outputs + n, n < outputs, 0.0)
    total *= tl.load(scale + n, n < outputs, 0.0)
    if bias is not None:
        total += tl.load(bias + n, n < outputs, 0.0).to(tl.float32)
    tl.store(out + row * outputs + n, total.to(out.dtype.element_ty), n < outputs)


@triton.jit
def _dequantise(weight, scale, out, outputs, inputs, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    at = n[:, None].to(tl.int64) * inputs + k[None, :]
    inside = (n[:, None] < outputs) & (k[None, :] < inputs)
    found = tl.load(weight + at, inside, 0).to(tl.float32) * tl.load(scale + n, n < outputs, 0.0)[:, None]
    tl.store(out + at, found.to(out.dtype.element_ty), inside)


@cache
def few_rows_blocks(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> dict[str, int]:
    """How a product is cut up, by its shape alone: blocks found by trying would differ from run to run, and could not be captured.

    Each row of a product of up to FEW rows is the same to the bit whatever the others are: what orders a sum (SPLIT, BLOCK_K) hangs on the weight, and
    with fewer than 64 rows in a block tensor cores add in one way (mma.sync). An H200 has 132 multiprocessors, to which the blocks of a weight have to bring
    some 4 MiB at a time: layers of few outputs and many inputs are split along these. No block needs more than 72 KiB of a multiprocessor's memory.
    """
    split = 4 if outputs < 8192 and inputs >= 6144 else 1
    if dtype == torch.float32:  # without tensor cores: the operands of a sum are held in registers
        return dict(SPLIT=split, BLOCK_M=16, BLOCK_N=32, BLOCK_K=32, num_warps=4, num_stages=3)
    if rows > 16:
        return dict(SPLIT=split, BLOCK_M=32, BLOCK_N=64, BLOCK_K=128, num_warps=4, num_stages=3)
    if outputs >= 8192:
        return dict(SPLIT=split, BLOCK_M=16, BLOCK_N=64, BLOCK_K=128, num_warps=4, num_stages=4)
    return dict(SPLIT=split, BLOCK_M=16, BLOCK_N=32, BLOCK_K=128, num_warps=4, num_stages=5)


def few_rows(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (..., in), of one of KINDS and of 1 to FEW rows, times the transpose of a contiguous int8 weight (out, in) with a scale (out,) in 32 bits: (..., out).

    The whole numbers are multiplied as they are and added in 32 bits. The sum is scaled, the bias added, and the result rounded once, to x's type.
    """
    flat, (outputs, inputs) = x.reshape(-1, x.shape[-1]).contiguous(), weight.shape
    rows = len(flat)
    cut = few_rows_blocks(rows, outputs, inputs, x.dtype)
    split, even = cut["SPLIT"], inputs % (2 * cut["BLOCK_K"]) == 0
    grid = triton.cdiv(rows, cut["BLOCK_M"]), triton.cdiv(outputs, cut["BLOCK_N"]), split  # blocks that read the same weights are neighbours
    out = x.new_empty(rows, outputs)
    with torch.cuda.device_of(x):  # triton asks for the current device, which may be another one where a model is spread
        if split == 1:
            _few_rows[grid](flat, weight, scale, bias, out, rows, outputs, inputs, EVEN=even, **cut)
        else:
            parts = x.new_empty(split, rows, outputs, dtype=torch.float32)
            _few_rows[grid](flat, weight, None, None, parts, rows, outputs, inputs, EVEN=even, **cut)
            _add_parts[rows, triton.cdiv(outputs, 512)](parts, scale, bias, out, rows, outputs, SPLIT=split, BLOCK_N=512)
    return out.view(*x.shape[:-1], outputs)


def dequantised(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A contiguous int8 weight (out, in) times the scale of each row (out,) in 32 bits, rounded once, to `dtype`."""
    outputs, inputs = weight.shape
    out = torch.empty(outputs, inputs, dtype=dtype, device=weight.device)
    with torch.cuda.device_of(weight):
        _dequantise[triton.cdiv(outputs, 4), triton.cdiv(inputs, 1024)](weight, scale, out, outputs, inputs, BLOCK_N=4, BLOCK_K=1024, num_warps=4)
    return out
