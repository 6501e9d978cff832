"""Merge an adapter into its base model: a full checkpoint that eval.py (SLM_MODEL_PATH) and vLLM load.

    python 04_ft/merge_adapter.py --adapter 04_ft/adapter_toolcall --out models/phi-4-mini-toolcall
    python 04_ft/merge_adapter.py --adapter 04_ft/adapter_toolcall --out models/phi-4-mini-toolcall --dtype fp32
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere

from slm_swap.cli import Parser, next_step, run, warn
from slm_swap.clients.loading import adapter_path, model_path, trained_base
from slm_swap.common.reports import read_json
from slm_swap.common.settings import load_settings, shown_path
from slm_swap.tuning.merging import DTYPES, merge_adapter


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--adapter", required=True, metavar="DIR", help="the adapter, as train_unsloth.py writes it")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the checkpoint's folder")
    parser.add_argument("--model", metavar="DIR", help="the base model (default: the one that the adapter names)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="the checkpoint's weights")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    adapter = adapter_path(args.adapter)
    named = read_json(adapter / "adapter_config.json", "train_unsloth.py").get("base_model_name_or_path")
    base = model_path(load_settings(), args.model or named, "check --model" if args.model else "pass the adapter's base with --model")
    info = merge_adapter(base, adapter, args.out, args.dtype)
    if trained_base(adapter) is None:
        warn(f"{shown_path(adapter)} does not say by hash what it was trained on: that it was {shown_path(base)} is not proven")
    if left_out := info["merged"]["generation_config_left_out"]:
        told = ", ".join(f"{name} {value}" for name, value in left_out.items())
        print(f"generation_config.json is without {told}: they are invalid there, and the base model is run without them")
    print(f"{info['merged']['adapter']['path']} merged into {shown_path(base)}, {args.dtype}: {shown_path(args.out)}")
    track = info.get("track") or "TRACK"
    next_step(f"SLM_MODEL_PATH={shown_path(args.out)} python 01_eval/eval.py --track {track} --model-kind slm --out 01_eval/reports/{track}_slm_merged.json")
    return 0


if __name__ == "__main__":
    run(main)
