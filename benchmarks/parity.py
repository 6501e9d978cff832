"""Measure how often a local model's reply depends on how it is run: engine, precision and batch size, over the same rows.

    python benchmarks/parity.py
    python benchmarks/parity.py --model models/phi-4-mini --dataset 02_dataset/toolcall/test.jsonl --limit 500

Greedy decoding is exact but for rounding: where two tokens are all but equally likely, another order of additions may choose the
other one. Each setting is one run of 01_eval/eval.py; its replies are compared with those of the first setting. The file is written
after each.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere

from slm_swap.cli import Parser, positive, run
from slm_swap.common.errors import UserError
from slm_swap.common.reports import code_version, hardware, now, package_versions, rows_path, sha256_file, write_json
from slm_swap.common.settings import PACKAGE, ROOT, display_path, find_path
from slm_swap.scoring.tracks import TRACKS

SETTINGS = {  # flags of eval.py
    "transformers-fp32-1": "--engine transformers --precision fp32 --batch-size 1",
    "transformers-fp32-8": "--engine transformers --precision fp32 --batch-size 8",
    "transformers-fp32-auto": "--engine transformers --precision fp32 --batch-size auto",
    "transformers-bf16-8": "--engine transformers --precision bf16 --batch-size 8",
    "transformers-bf16-auto": "--engine transformers --precision bf16 --batch-size auto",
    "transformers-int8-8": "--engine transformers --precision int8 --batch-size 8",
    "transformers-nf4-8": "--engine transformers --precision nf4 --batch-size 8",
    "vllm-fp32": "--engine vllm --precision fp32",
    "vllm-bf16-eager": "--engine vllm --precision bf16 --engine-start eager",
    "vllm-bf16-graphs": "--engine vllm --precision bf16 --engine-start graphs",
    "vllm-fp8": "--engine vllm --precision fp8",
}


def evaluated(args: argparse.Namespace, flags: str, out: Path) -> dict[str, Any]:
    """{"report", "replies" by row} of one setting, or {"failed": why}."""
    words = [sys.executable, PACKAGE / "01_eval/eval.py", "--track", args.track, "--model-kind", "slm", "--dataset", args.dataset]
    words += ["--limit", args.limit, "--overwrite", "--latency-rows", 0, "--out", out, *flags.split(), *(["--adapter", args.adapter] if args.adapter else [])]
    environment = os.environ | {"SLM_MODEL_PATH": args.model, "LANGFUSE_DISABLED": "1"}
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, env=environment)
    if done.returncode:
        return {"failed": (done.stderr or done.stdout).strip()[-500:]}
    rows = [json.loads(line) for line in rows_path(out).read_text().splitlines()]
    return {"report": json.loads(out.read_text()), "replies": {row["id"]: row["reply"] for row in rows}}


def compared(track: str, reference: dict[str, str], told: dict[str, Any]) -> dict[str, Any]:
    """What is reported of a setting: the share of rows whose reply differs, and the metrics that it ends in."""
    if "failed" in told:
        return told
    differ = sum(told["replies"][name] != reply for name, reply in reference.items())
    metrics = told["report"]["metrics"]
    return {"differ": differ, "share": differ / len(reference), "metrics": {name: metrics[name] for name in TRACKS[track].gate}}


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", default="models/phi-tiny", metavar="DIR", help="the checkpoint")
    parser.add_argument("--adapter", metavar="DIR", help="a LoRA adapter for it")
    parser.add_argument("--track", choices=TRACKS, default="toolcall", help="the task")
    parser.add_argument("--dataset", metavar="FILE", help="the rows (default: 02_dataset/<track>/test.jsonl)")
    parser.add_argument("--limit", type=positive, default=500, metavar="N", help="only the first N rows")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="what to compare; the first is the reference")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the file to write (default: benchmarks/results/parity.json)")
    args = parser.parse_args(argv)
    args.dataset = find_path(args.dataset or f"02_dataset/{args.track}/test.jsonl")
    if not args.dataset.is_file():
        raise UserError(f"no rows at {display_path(args.dataset)}: make them with 02_dataset/prepare_data.py or pass --dataset FILE")
    out = args.out or ROOT / "benchmarks/results/parity.json"
    about = {"model": args.model, "adapter": args.adapter, "dataset": display_path(args.dataset), "dataset_sha256": sha256_file(args.dataset)}
    about |= {"created_at": now(), "code": code_version(), "hardware": hardware(), "packages": package_versions(), "settings": {}}
    reference = None
    with tempfile.TemporaryDirectory() as folder:
        for name in args.settings:
            told = evaluated(args, SETTINGS[name], Path(folder, f"{name}.json"))
            if "report" in told:
                reference = reference or told["replies"]
                about["hardware"] = told["report"]["hardware"]
            elif reference is None:
                raise UserError(f"{name}, the reference, failed ({told['failed']}): choose --settings that work here")
            about["settings"][name] = one = compared(args.track, reference, told)
            print(f"{name:24} {one.get('failed') or format(one['share'], '8.2%') + ' of the replies differ'}", flush=True)
            write_json(out, about)
    print(f"report: {display_path(out)}")
    return 0


if __name__ == "__main__":
    run(main)
