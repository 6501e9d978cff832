"""Train, merge and evaluate a model of Qwen3-4B's shape by the stage scripts, and compare the replies of adapter and merged model in each engine.

    python benchmarks/whole_path.py
    python benchmarks/whole_path.py --shape tiny-qwen3 --engines transformers --precisions fp32 --train "--preset fast --precision fp32 --pack-length 2048"

The base has random weights: what it learns says nothing about Qwen3. Greedy replies are equal but for rounding, which shows between engines, and where
the merged weights are rounded to 16 bits. A stage whose result is in --scratch is not run again, so that the engines may be in environments of
their own: run it once in each.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from itertools import takewhile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere

from shapes import SHAPES, make_checkpoint

from slm_swap.cli import Parser, positive, run
from slm_swap.common.errors import UserError
from slm_swap.common.reports import code_version, now, package_versions, read_json, rows_path, write_json
from slm_swap.common.settings import PACKAGE, ROOT, display_path

TRACK = "structured"
TRAIN = "--preset fast --epochs 4 --learning-rate 1e-3"
MARKS = ["<|im_start|>", "<|im_end|>"]


def chat_checkpoint(scratch: Path, shape: str) -> Path:
    """The benchmarks' weights with the embedded model's tokenizer and Qwen3's chat template, as TRL has it."""
    base, folder = make_checkpoint(scratch / shape, shape), scratch / f"{shape}-chat"
    if (folder / "tokenizer.json").exists():
        return folder
    import trl
    from transformers import GenerationConfig

    from slm_swap.clients.loading import load_tokenizer

    folder.mkdir(exist_ok=True)
    for path in [*base.glob("*.safetensors*"), base / "config.json"]:
        (folder / path.name).unlink(missing_ok=True)
        os.link(path, folder / path.name)
    tokenizer = load_tokenizer(PACKAGE / "models/phi-tiny")
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates/qwen3.jinja").read_text(encoding="utf-8")
    tokenizer.add_tokens(MARKS, special_tokens=True)
    tokenizer.add_tokens(["<tool_call>", "</tool_call>", "<think>", "</think>"])
    tokenizer.eos_token = MARKS[1]
    GenerationConfig(eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id], pad_token_id=tokenizer.pad_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Stages:
    """Stage scripts, each run once: a stage that left its result is not run again."""

    def __init__(self, scratch: Path):
        self.scratch = scratch

    def __call__(self, name: str, result: Path, script: str, *flags: object) -> None:
        if result.exists():
            return
        log, clock = self.scratch / f"{name}.log", time.perf_counter()
        known = os.environ | {"LANGFUSE_DISABLED": "1", "HF_HUB_OFFLINE": "1"}
        with log.open("w") as output:
            code = subprocess.run(
                [sys.executable, str(PACKAGE / script), *map(str, flags)], env=known, stdout=output, stderr=subprocess.STDOUT
            ).returncode
        if code:
            last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
            raise UserError(f"{name} failed with exit code {code} ({last[0][:300]}): the whole log is {display_path(log)}")
        seconds = time.perf_counter() - clock
        write_json(self.scratch / f"{name}.seconds.json", seconds)
        print(f"{name}: {seconds:.1f} s", flush=True)

    def seconds(self, name: str) -> float:
        """Of the whole command."""
        return json.loads((self.scratch / f"{name}.seconds.json").read_text())


def replies(report: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in rows_path(report).read_text().splitlines()]
    return {row["id"]: row["reply"] for row in rows}


def compared(one: dict[str, str], other: dict[str, str]) -> dict[str, Any]:
    """The share of equal replies, and how long the part is in which replies agree from their start, as a share of the longer one: the mean of all."""
    shares = []
    for name, left in one.items():
        right = other[name]
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))
        shares.append(1.0 if left == right else same / max(len(left), len(right)))
    return {"equal": shares.count(1.0) / len(shares), "agree_from_the_start": sum(shares) / len(shares), "rows": len(shares)}


def pairs(names: list[str]) -> list[tuple[str, str]]:
    """Evaluations ("engine precision model") that differ in one of the three."""
    told = [name.split() for name in names]
    return [
        (" ".join(one), " ".join(other))
        for at, one in enumerate(told)
        for other in told[at + 1 :]
        if sum(left != right for left, right in zip(one, other, strict=True)) == 1
    ]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-4b", help="the model (default: qwen3-4b)")
    parser.add_argument("--engines", nargs="+", choices=("transformers", "vllm"), default=["transformers", "vllm"], help="(default: both)")
    parser.add_argument(
        "--precisions", nargs="+", choices=("bf16", "fp32"), default=["bf16"], help="of merged weights and evaluations; fp32: transformers alone (default: bf16)"
    )
    parser.add_argument("--rows", type=positive, default=64, help="rows evaluated (default: 64)")
    parser.add_argument("--max-new-tokens", type=positive, default=128, help="of a reply (default: 128)")
    parser.add_argument("--train", default=TRAIN, metavar="FLAGS", help=f"flags of train_unsloth.py (default: {TRAIN})")
    parser.add_argument("--scratch", type=Path, default=ROOT / "runs/whole_path", metavar="DIR", help="checkpoints, rows, reports and logs")
    parser.add_argument("--out", type=Path, metavar="FILE", default=ROOT / "benchmarks/results/whole_path.json")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    scratch = args.scratch.resolve() / f"{args.shape}-path"
    scratch.mkdir(parents=True, exist_ok=True)
    base, adapter, stage = chat_checkpoint(scratch.parent, args.shape), scratch / "adapter", Stages(scratch)
    rows = {split: scratch / f"rows/{TRACK}/{split}.jsonl" for split in ("train", "val", "test")}
    sample = PACKAGE / "02_dataset/sample/xlam_sample.jsonl"
    stage("rows", rows["test"], "02_dataset/prepare_data.py", "--source", "xlam", "--dataset-path", sample, "--out-dir", scratch / "rows")
    files = ("--train", rows["train"], "--val", rows["val"], "--test", rows["test"])
    stage("train", adapter, "04_ft/train_unsloth.py", "--track", TRACK, "--model", base, *files, "--out", adapter, *shlex.split(args.train))
    training = read_json(adapter / "training_info.json", "train_unsloth.py")
    told: dict[str, Any] = {"created_at": now(), "code": code_version(), "hardware": training["hardware"], "packages": package_versions(), "shape": args.shape}
    kept = ("hyperparameters", "rows", "tokens", "steps", "eval_loss", "train_loss", "seconds", "tokens_per_second", "peak_memory_gib")
    told["training"] = {name: training[name] for name in kept} | {"command_seconds": stage.seconds("train")}
    told |= {"merging": {}, "evaluations": {}, "replies": {}}
    for precision in args.precisions:
        merged = scratch / f"merged-{precision}"
        stage(f"merge-{precision}", merged, "04_ft/merge_adapter.py", "--adapter", adapter, "--out", merged, "--dtype", precision)
        told["merging"][precision] = {"command_seconds": stage.seconds(f"merge-{precision}")}
        for engine in args.engines if precision == "bf16" else {"transformers"} & set(args.engines):
            asked = ("--engine", engine, "--precision", precision, "--latency-rows", 0, "--max-new-tokens", args.max_new_tokens)
            asked += ("--track", TRACK, "--model-kind", "slm", "--dataset", rows["test"], "--limit", args.rows)
            for model, flags in (("adapter", ("--adapter", adapter)), ("merged", ())):
                name = f"{engine}-{precision}-{model}"
                os.environ["SLM_MODEL_PATH"] = str(base if flags else merged)
                stage(name, scratch / f"{name}.json", "01_eval/eval.py", *asked, *flags, "--out", scratch / f"{name}.json")
    found = {" ".join(path.stem.split("-")): path for path in scratch.glob("*-*-*.json") if path.stem.endswith(("-adapter", "-merged"))}
    for name, path in sorted(found.items()):
        report = json.loads(path.read_text())
        kept = {key: report[key] for key in ("counts", "metrics", "seconds", "packages", "hardware")}
        told["evaluations"][name] = kept | {"command_seconds": stage.seconds(path.stem)}
    said = {name: replies(path) for name, path in found.items()}
    for one, other in pairs(sorted(found)):
        told["replies"][f"{one}, {other}"] = same = compared(said[one], said[other])
        print(f"{one}, {other}: {same['equal']:.1%} equal, {same['agree_from_the_start']:.1%} from the start", flush=True)
    write_json(args.out, told)
    print(f"report: {display_path(args.out)}")
    return 0


if __name__ == "__main__":
    run(main)
