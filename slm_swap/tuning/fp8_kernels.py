"""A Triton kernel that turns rows to 8-bit floats, some columns twice: it reads a row once from memory. torch.compile makes three kernels of it, of which
the last computes what the row is made of anew for each of its parts.

Imports torch and triton, which CPU builds of torch come without: import it inside functions.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

E4M3 = torch.float8_e4m3fn
LARGEST: float = torch.finfo(E4M3).max


@triton.jit
def scaled_rows_kernel(
    x, doubled, rows, scales, size, columns, LARGEST: tl.constexpr, BLOCK: tl.constexpr, CHOSEN: tl.constexpr
):  # fmt: skip
    """One row of x (count, size) to rows (count, size + 2 * columns) and scales (count,). `doubled` (columns,), or None with no columns."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < size
    value = tl.load(x + row * size + at, inside, 0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(value), 0), 1e-12) / LARGEST
    scale = tl.where(tl.max((value != value).to(tl.int32), 0) != 0, float("nan"), scale)  # of numbers and none the largest is a number here
    rows += row * (size + 2 * columns)
    tl.store(scales + row, scale)
    tl.store(rows + at, (value / scale).to(rows.dtype.element_ty), inside)
    if doubled is not None:
        lane = tl.arange(0, CHOSEN)
        wanted = lane < columns
        chosen = tl.load(x + row * size + tl.load(doubled + lane, wanted, 0), wanted, 0.0).to(tl.float32) / scale
        bits = chosen.to(rows.dtype.element_ty)
        tl.store(rows + size + lane, (chosen - bits.to(tl.float32)).to(rows.dtype.element_ty), wanted)
        tl.store(rows + size + columns + lane, bits, wanted)


def launch(kernel: Any, x: torch.Tensor, doubled: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """What `scaled_rows` gives, by `scaled_rows_kernel` or torch's wrapper of it."""
    (count, size), columns = x.shape, 0 if doubled is None else len(doubled)
    rows, scales = x.new_empty(count, size + 2 * columns, dtype=E4M3), x.new_empty(count, 1, dtype=torch.float32)
    block = triton.next_power_of_2(size)
    cut = {"LARGEST": LARGEST, "BLOCK": block, "CHOSEN": triton.next_power_of_2(max(columns, 1)), "num_warps": max(1, min(16, block // 1024))}
    kernel[(count,)](x.contiguous(), doubled, rows, scales, size, columns, **cut)
    return rows, scales


@triton_op("slm_swap::scaled_rows", mutates_args=())
def scaled_rows(x: torch.Tensor, doubled: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of activations (count, size) as `fp8.quantised` gives them, on a GPU; an operation that torch.compile looks into."""
    return launch(wrap_triton(scaled_rows_kernel), x, doubled)
