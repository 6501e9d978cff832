"""Measure how fast the local model is evaluated on a GPU: engines and settings side by side, on a model of Phi-4-mini's shape.

    python benchmarks/eval.py
    python benchmarks/eval.py --only vllm-eager vllm-graphs --scratch /tmp/phi --out /tmp/eval.json

Each setting runs in processes of its own. `once started` is requests a second after the model is loaded and has answered a few
other rows (which compiles and captures what there is); `command` is the whole of `01_eval/eval.py` over some rows, from its start
to its report. `documented` is transformers' own `generate` in the documented setting. Replies are stopped at their own lengths.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere

from phi_shape import SHAPES, lengths, make_checkpoint, write_rows

from slm_swap.cli import Parser, positive, run
from slm_swap.reports import code_version, hardware, now, package_versions, write_json
from slm_swap.settings import PACKAGE, ROOT, display_path

LONGEST = 256  # new tokens, as eval.py's default
FEWER = (8, 8, 32, 32, 128, 512)  # rows that the two starts of vLLM are compared over, besides: vllm_engine.start_for goes by them
SETTINGS: dict[str, dict[str, Any]] = {  # flags of eval.py; rows once started, rows of the whole command (0: not measured)
    "documented": {"flags": {"precision": "int8", "batch_size": 8}, "rows": 16, "command": 0},
    "transformers-int8-8": {"flags": {"engine": "transformers", "precision": "int8", "batch_size": 8}, "rows": 16, "command": 0},
    "transformers-int8-auto": {"flags": {"engine": "transformers", "precision": "int8", "batch_size": "auto"}, "rows": 64, "command": 0},
    "transformers-bf16-8": {"flags": {"engine": "transformers", "precision": "bf16", "batch_size": 8}, "rows": 64, "command": 0},
    "transformers-bf16-auto": {"flags": {"engine": "transformers", "precision": "bf16", "batch_size": "auto"}, "rows": 2048, "command": 512},
    "vllm-eager": {"flags": {"engine": "vllm", "precision": "bf16", "engine_start": "eager"}, "rows": 2048, "command": 512, "fewer": FEWER},
    "vllm-graphs": {"flags": {"engine": "vllm", "precision": "bf16", "engine_start": "graphs"}, "rows": 2048, "command": 512, "fewer": FEWER},
    "vllm-fp8-graphs": {"flags": {"engine": "vllm", "precision": "fp8", "engine_start": "graphs"}, "rows": 2048, "command": 0},
}


def stop_at_own_length() -> None:
    """Let row i of the workload get exactly as many new tokens as its reply has."""
    from slm_swap import slm_client
    from slm_swap.engines import Prompt

    _, replies = lengths(WORKLOAD, 7)
    slm_client.Prompt = lambda index, tokens, limit: Prompt(index, tokens, min(limit, replies[index % WORKLOAD]))


WORKLOAD = 4096  # rows of which prompt and reply lengths are drawn at once, so that the first n are the same for any n


def once_started(checkpoint: Path, rows: Path, setting: dict[str, Any], warm: int) -> dict[str, Any]:
    """Load the model, answer `warm` rows of the workload's end, then time its first rows."""
    import torch

    from slm_swap.examples import read_examples
    from slm_swap.prompts import build_messages
    from slm_swap.settings import Settings
    from slm_swap.slm_client import SLMClient, load_tokenizer, measure_workload

    stop_at_own_length()
    examples = [build_messages("structured", example.prompt) for example in read_examples(rows)]
    workload = measure_workload(load_tokenizer(checkpoint), examples, LONGEST)
    captured = time_capture() if setting["flags"]["engine"] == "vllm" else []
    count, clock = setting["rows"], time.perf_counter()
    client = SLMClient(Settings(slm_model_path=str(checkpoint)), max_new_tokens=LONGEST, workload=workload, **setting["flags"])
    told: dict[str, Any] = {"load_seconds": time.perf_counter() - clock}
    clock = time.perf_counter()
    for _ in client.stream((len(examples) - warm + at, messages) for at, messages in enumerate(examples[-warm:])):
        pass
    told["warm_seconds"] = time.perf_counter() - clock

    def timed(start: int, rows: int) -> tuple[int, float]:
        clock = time.perf_counter()
        replies = [reply for _, reply in client.stream((start + at, examples[start + at]) for at in range(rows))]
        return sum(reply.output_tokens for reply in replies), time.perf_counter() - clock

    told |= _rates(count, *timed(0, count))
    if fewer := setting.get("fewer"):
        starts = [count + sum(fewer[:at]) for at in range(len(fewer))]
        told["fewer"] = [{"rows": rows, "seconds": timed(start, rows)[1]} for start, rows in zip(starts, fewer, strict=True)]
    memory = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
    return told | {"capture_seconds": sum(captured), "peak_gib": memory / 2**30, "model": client.describe()}


def time_capture() -> list[float]:
    """What vLLM's capturing of CUDA graphs takes is added to this list: seconds."""
    from slm_swap.engines.vllm_engine import ENVIRONMENT

    os.environ.update(ENVIRONMENT)  # before vLLM is imported
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    seconds, capture = [], GPUModelRunner.capture_model

    def timed(runner: Any) -> Any:
        clock = time.perf_counter()
        told = capture(runner)
        seconds.append(time.perf_counter() - clock)
        return told

    GPUModelRunner.capture_model = timed
    return seconds


def _rates(rows: int, tokens: int, seconds: float) -> dict[str, float]:
    return {"rows": rows, "seconds": seconds, "requests_per_second": rows / seconds, "reply_tokens_per_second": tokens / seconds}


def documented(checkpoint: Path, rows: Path, setting: dict[str, Any], warm: int) -> dict[str, Any]:
    """transformers' `generate`, LLM.int8(), device_map="auto", batches of 8 in the rows' order."""
    import torch
    from transformers import StoppingCriteria

    from slm_swap.examples import read_examples
    from slm_swap.prompts import build_messages
    from slm_swap.slm_client import encode_prompt, load_model, load_tokenizer

    class OwnLength(StoppingCriteria):
        def __init__(self, width: int, limits: list[int]):
            self.width, self.limits = width, torch.tensor(limits, device="cuda" if torch.cuda.is_available() else "cpu")

        def __call__(self, ids, scores, **_):
            return ids.shape[1] - self.width >= self.limits

    clock = time.perf_counter()
    model, tokenizer = load_model(checkpoint, setting["flags"]["precision"]), load_tokenizer(checkpoint)
    told = {"load_seconds": time.perf_counter() - clock}
    prompts = [encode_prompt(tokenizer, build_messages("structured", example.prompt)) for example in read_examples(rows, setting["rows"])]
    limits, size = lengths(WORKLOAD, 7)[1], setting["flags"]["batch_size"]
    clock = time.perf_counter()
    for start in range(0, len(prompts), size):
        batch = tokenizer.pad({"input_ids": prompts[start : start + size]}, return_tensors="pt").to(model.device)
        stop = OwnLength(batch["input_ids"].shape[1], limits[start : start + size])
        model.generate(**batch, max_new_tokens=LONGEST, do_sample=False, stopping_criteria=[stop], pad_token_id=tokenizer.pad_token_id)
    return told | _rates(len(prompts), sum(limits[: len(prompts)]), time.perf_counter() - clock)


def command(checkpoint: Path, rows: Path, setting: dict[str, Any], out: Path) -> None:
    """The whole of eval.py, in this process."""
    import runpy

    stop_at_own_length()
    flags = [word for name, value in setting["flags"].items() for word in (f"--{name.replace('_', '-')}", str(value))]
    sys.argv = ["eval.py", "--track", "structured", "--model-kind", "slm", "--dataset", str(rows), "--limit", str(setting["command"])]
    sys.argv += ["--out", str(out), *flags]
    runpy.run_path(str(PACKAGE / "01_eval/eval.py"), run_name="__main__")


def child(args: argparse.Namespace, part: str, name: str, timeout: int) -> dict[str, Any]:
    """One part of one setting in a process of its own; where it fails, the end of what it said."""
    out = args.scratch / f"{name}.{part}.json"
    for old in args.scratch.glob(f"{out.stem}*"):
        old.unlink()
    words = [sys.executable, __file__, "--part", part, "--only", name, "--scratch", str(args.scratch), "--shape", args.shape, "--out", str(out)]
    words += ["--rows", str(args.rows)] if args.rows else []
    environment = {"SLM_MODEL_PATH": str(args.scratch / args.shape), "LANGFUSE_DISABLED": "1"}
    clock = time.perf_counter()
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=timeout, env=os.environ | environment, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {timeout} s"}
    seconds = time.perf_counter() - clock
    if done.returncode:
        return {"failed": (done.stderr or done.stdout).strip()[-1500:]}
    told = json.loads(out.read_text())
    if part == "command":
        return {"seconds": seconds, "rows": told["counts"]["rows"], **{f"{name}_seconds": told["seconds"][name] for name in ("load", "generate", "total")}}
    return told


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="the settings to measure")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/slm_swap_benchmark"), metavar="DIR", help="where checkpoint and rows go")
    parser.add_argument("--shape", choices=SHAPES, default="phi-4-mini", help="tiny: to try the benchmark on a CPU")
    parser.add_argument("--rows", type=positive, help="measure so many rows in each setting, instead of its own number")
    parser.add_argument("--timeout", type=positive, default=240, help="seconds that one part of one setting may take")
    parser.add_argument("--part", choices=("once_started", "command"), help="for the processes that this one starts")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the file to write (default: benchmarks/results/eval.json)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    rows = args.scratch / f"rows-{args.shape}.jsonl"
    checkpoint = args.scratch / args.shape
    if args.part:
        (name,) = args.only
        setting = SETTINGS[name] | ({"rows": args.rows, "command": args.rows} if args.rows else {})
        if args.part == "command":
            command(checkpoint, rows, setting, args.out)
        measure = documented if name == "documented" else once_started
        write_json(args.out, measure(checkpoint, rows, setting, warm=min(64, setting["rows"] // 4)))
        return 0
    import torch

    make_checkpoint(checkpoint, args.shape)
    write_rows(rows, WORKLOAD, json.loads((checkpoint / "config.json").read_text())["vocab_size"])
    torch.cuda.empty_cache()
    out = args.out or ROOT / "benchmarks/results/eval.json"
    told = {"created_at": now(), "code": code_version(), "hardware": hardware(), "packages": package_versions(), "shape": args.shape}
    results: dict[str, Any] = {}
    for name in args.only:
        results[name] = {"flags": SETTINGS[name]["flags"], "once_started": child(args, "once_started", name, args.timeout)}
        if SETTINGS[name]["command"]:
            results[name]["command"] = child(args, "command", name, args.timeout)
        print(name, json.dumps({key: value for key, value in results[name].items() if key != "flags"}), flush=True)
        write_json(out, told | {"settings": results})  # each time: a machine may be taken away
    print(f"report: {display_path(out)}")
    return 0


if __name__ == "__main__":
    run(main)
