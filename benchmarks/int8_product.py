"""Measure products of 8-bit weights on a GPU: of a layer's shape, microseconds and GB/s of each way to make them.

    python benchmarks/int8_product.py
    python benchmarks/int8_product.py --rows 8 --sweep --out /tmp/int8_sweep.json

The four linear layers of Phi-4-mini, in bf16, in replays of a CUDA graph. A graph goes through as many copies of a weight as fill the GPU's L2 cache
several times, as no weight of a model is still there when it is read again. The figures are the median of the replays, for one product. Ways: `bf16`, cuBLAS
with a 16-bit weight; `plain`, torch's own cast, product and scaling; `few_rows`, the kernel that reads 8 bits; `dequantised`, a 16-bit weight by a kernel,
then cuBLAS. `program` is which of the last two the program takes for so many rows. GB/s count the weight once, as it is held, in 8 or 16 bits. Compare
them with `copy_gb_per_s`, what a copy reads and writes. `dequantise` is a 16-bit weight alone, by the kernel and by the one that torch.compile makes for
training. `--sweep` also tries other ways to cut up `few_rows`, and prints the best of each shape. The program does not use them.
"""

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere

from slm_swap.cli import Parser, positive, run
from slm_swap.clients import int8
from slm_swap.common.errors import UserError
from slm_swap.common.reports import code_version, hardware, now, package_versions, write_json
from slm_swap.common.settings import ROOT, display_path

SHAPES = {"qkv": (5120, 3072), "o": (3072, 3072), "gate_up": (16384, 3072), "down": (3072, 8192)}  # (out, in) of Phi-4-mini's layers
ROWS = (1, 8, 16, 32, 64, 128, 256)
CACHES = 5  # how many L2 caches all copies of a weight fill
DTYPE = torch.bfloat16

Layer = tuple[torch.Tensor, torch.Tensor]  # a weight and its scales


def captured_microseconds(work: Callable[[Any], Any], copies: list[Any], replays: int) -> float:
    """The median time of `work` on one of the copies, all of which a replay goes through."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for copy in copies[:3]:
            work(copy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in copies:
            work(copy)
    found = []
    for _ in range(replays + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) * 1000 / len(copies))
    return median(found[2:])  # the first ones raise the clocks


def copies_of(outputs: int, inputs: int) -> list[Layer]:
    count = max(4, -(-CACHES * torch.cuda.get_device_properties(0).L2_cache_size // (outputs * inputs)))
    return [
        (torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, device="cuda"), torch.rand(outputs, device="cuda") / 1000) for _ in range(count)
    ]


def told(microseconds: float, weight_bytes: int) -> dict[str, float]:
    return {"microseconds": round(microseconds, 2), "gb_per_s": round(weight_bytes / microseconds / 1000)}


def measure(kernels: Any, name: str, rows: tuple[int, ...], replays: int) -> list[dict[str, Any]]:
    """One entry for each number of rows."""
    outputs, inputs = SHAPES[name]
    copies, size, entries = copies_of(outputs, inputs), outputs * inputs, []
    wide = [kernels.dequantised(*layer, DTYPE) for layer in copies]
    for count in rows:
        x = torch.randn(count, inputs, device="cuda", dtype=DTYPE)
        ways = {
            "plain": lambda layer, x=x: int8.plain_product(x, *layer, None),
            "few_rows": lambda layer, x=x: kernels.few_rows(x, *layer, None),
            "dequantised": lambda layer, x=x: functional.linear(x, kernels.dequantised(*layer, DTYPE)),
        }
        entry = {"layer": name, "out": outputs, "in": inputs, "rows": count, "program": "few_rows" if count <= kernels.FEW else "dequantised"}
        entry["bf16"] = told(captured_microseconds(lambda weight, x=x: functional.linear(x, weight), wide, replays), 2 * size)
        entry |= {way: told(captured_microseconds(work, copies, replays), size) for way, work in ways.items()}
        entries.append(entry)
        print(f"{name:8s} {count:4d} rows: " + "  ".join(f"{way} {entry[way]['microseconds']:7.1f} µs" for way in ("bf16", *ways)), flush=True)
    return entries


def dequantise(kernels: Any, name: str, replays: int) -> dict[str, Any]:
    copies, size = copies_of(*SHAPES[name]), SHAPES[name][0] * SHAPES[name][1]
    ways = {"kernel": lambda layer: kernels.dequantised(*layer, DTYPE), "compiled": lambda layer: int8._weight_in(*layer, DTYPE)}
    return {way: told(captured_microseconds(work, copies, replays), size) for way, work in ways.items()}


def sweep(kernels: Any, name: str, rows: int, replays: int) -> list[dict[str, Any]]:
    """`few_rows` cut up otherwise, the fastest first; what a multiprocessor's memory has no room for is left out."""
    (outputs, inputs), found = SHAPES[name], []
    copies, x = copies_of(outputs, inputs), torch.randn(rows, inputs, device="cuda", dtype=DTYPE)
    for split, block_n, block_k, warps, stages in itertools.product((1, 2, 4), (32, 64, 128), (128, 256), (4, 8), (3, 4, 5)):
        block_m = 16 if rows <= 16 else 32
        if 2 * block_k * (block_n + 2 * block_m) * (stages - 1) > 200 << 10 or block_n < 8 * warps:
            continue
        cut = dict(SPLIT=split, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps, num_stages=stages)
        with mock.patch.object(kernels, "few_rows_blocks", lambda *_, cut=cut: cut):
            found.append(cut | told(captured_microseconds(lambda layer: kernels.few_rows(x, *layer, None), copies, replays), outputs * inputs))
    found.sort(key=lambda entry: entry["microseconds"])
    print(f"{name:8s} {rows:4d} rows, best of {len(found)}: {found[0]}", flush=True)
    return [{"layer": name, "rows": rows, **entry} for entry in found[:5]]


def copy_speed(replays: int) -> int:
    """GB/s that a copy of 1 GiB reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return round(2 * len(source) / captured_microseconds(target.copy_, [source], replays) / 1000)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--rows", type=positive, nargs="+", default=ROWS, help="rows of the activations")
    parser.add_argument("--layers", choices=list(SHAPES), nargs="+", default=list(SHAPES), help="whose shapes")
    parser.add_argument("--replays", type=positive, default=15, help="how often each graph is replayed")
    parser.add_argument("--sweep", action="store_true", help="try other ways to cut up few_rows, too")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/int8_product.json", metavar="FILE", help="the file to write")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError("products of 8-bit weights are measured on a GPU, and torch sees none here: run it on a machine with one (see nvidia-smi)")
    kernels = int8._kernels(torch.device("cuda", torch.cuda.current_device()))
    if kernels is None:
        raise UserError("there is nothing to measure without triton's kernels: see the warning above")
    torch.manual_seed(0)
    with torch.inference_mode():
        report = {
            "created_at": now(), "code": code_version(), "packages": package_versions() | {"triton": kernels.triton.__version__},
            "hardware": hardware(), "replays": args.replays,
            "copy_gb_per_s": copy_speed(args.replays),
            "products": [entry for name in args.layers for entry in measure(kernels, name, args.rows, args.replays)],
            "dequantise": {name: dequantise(kernels, name, args.replays) for name in args.layers},
        }  # fmt: skip
        if args.sweep:
            few = [rows for rows in args.rows if rows <= kernels.FEW]
            report["sweep"] = [entry for name in args.layers for rows in few for entry in sweep(kernels, name, rows, args.replays)]
    write_json(args.out, report)
    print(f"report: {display_path(args.out)}")
    return 0


if __name__ == "__main__":
    run(main)
