"""Measure how fast the local model is evaluated on a GPU: engines and settings side by side, on a model of Phi-4-mini's shape.

    python benchmarks/eval.py
    python benchmarks/eval.py --only vllm-eager vllm-graphs --scratch /tmp/phi --out /tmp/eval.json
    python benchmarks/eval.py --processes 1 2 --repeats 5 --only vllm-graphs --out benchmarks/results/eval_gpus.json

Each setting runs in processes of its own. `once started` is requests and reply tokens a second after the model is loaded and, but for `documented`, each
process has answered a few other rows (which compiles and captures what there is); `later_` is the same of the rows after those, when less is new
to it. `command` is the whole of `01_eval/eval.py` over some rows, from its start to its report. `documented` is transformers' own `generate` in the
documented setting. Replies are stopped at their own lengths. Several processes, one a GPU, are started by torchrun. Once started, each row is there so
many times, so that every GPU answers the rows of one; a whole command has as many rows as with one process. With `--repeats`, the settings take turns,
since a machine that others share is now faster, now slower: told are the run of median speed (of two in the middle, the slower one), the speeds of all
in reply tokens a second, and how many times one process' speed several have, as the median of the turns.
"""

import argparse
import importlib.util
import itertools
import json
import os
import sys
import time
from collections import defaultdict
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere

from own_process import in_own_process
from shapes import SHAPES, lengths, make_checkpoint, write_rows

from slm_swap.cli import Parser, positive, run
from slm_swap.common.reports import code_version, hardware, now, package_versions, write_json
from slm_swap.common.settings import PACKAGE, ROOT, display_path

LONGEST = 256  # new tokens, as eval.py's default
SETTINGS: dict[str, dict[str, Any]] = {  # flags of eval.py; rows once started, rows of the whole command (0: not measured)
    "documented": {"flags": {"precision": "int8", "batch_size": 8}, "rows": 16, "command": 0},
    "transformers-int8-8": {"flags": {"engine": "transformers", "precision": "int8", "batch_size": 8}, "rows": 64, "command": 0},
    "transformers-int8-auto": {"flags": {"engine": "transformers", "precision": "int8", "batch_size": "auto"}, "rows": 2048, "command": 0},
    "transformers-bf16-8": {"flags": {"engine": "transformers", "precision": "bf16", "batch_size": 8}, "rows": 64, "command": 0},
    "transformers-bf16-auto": {"flags": {"engine": "transformers", "precision": "bf16", "batch_size": "auto"}, "rows": 2048, "command": 512},
    "vllm-eager": {"flags": {"engine": "vllm", "precision": "bf16", "engine_start": "eager"}, "rows": 2048, "command": 512},
    "vllm-graphs": {"flags": {"engine": "vllm", "precision": "bf16", "engine_start": "graphs"}, "rows": 2048, "command": 512},
    "vllm-fp8-graphs": {"flags": {"engine": "vllm", "precision": "fp8", "engine_start": "graphs"}, "rows": 2048, "command": 0},
}


SPEED = "reply_tokens_per_second"
SPEEDS = (SPEED, f"later_{SPEED}")
WORKLOAD = 4096  # rows whose prompt and reply lengths are drawn at once, so that the first n are the same for any n


def stop_at_own_length(processes: int) -> None:
    """Let each row of the workload get exactly as many new tokens as its reply has."""
    from slm_swap import slm_client
    from slm_swap.clients.engines import Prompt

    _, replies = lengths(WORKLOAD, 7)
    class OwnLength(Prompt):
        def __init__(self, index, tokens, limit, **more):
            super().__init__(index, tokens, min(limit, replies[index // processes]), **more)

    slm_client.Prompt = OwnLength


def spans(rows: int, processes: int) -> dict[str, range]:
    """Which rows of the workload are answered to warm up, then timed, and those timed later; all of them a process' rows so many times."""
    warm = min(64, rows // 4, WORKLOAD - rows)
    told = {"warm": (WORKLOAD - warm, WORKLOAD), "first": (0, rows), "later": (rows, min(2 * rows, WORKLOAD - warm))}
    return {name: range(start * processes, end * processes) for name, (start, end) in told.items()}


def once_started(checkpoint: Path, rows: Path, setting: dict[str, Any]) -> dict[str, Any] | None:
    """Load the model, warm it up, then time the first rows and those after; None but in the first process."""
    from slm_swap.clients.replicas import fork_replica, take_one_gpu
    from slm_swap.common.settings import Settings, load_launch
    from slm_swap.rows.examples import read_examples
    from slm_swap.rows.prompts import text_request
    from slm_swap.slm_client import local_client, serve_rows

    launch, flags = load_launch(), setting["flags"]
    stop_at_own_length(launch.world)
    if launch.world > 1:
        take_one_gpu(launch)
        launch = fork_replica(launch)
    settings = Settings(slm_model_path=str(checkpoint), launch=launch)
    if launch.serves:
        serve_rows(settings, seed=0, max_new_tokens=LONGEST, **flags)
        return None
    examples = [text_request("structured", example.prompt) for example in read_examples(rows)]
    client = local_client(settings, examples, LONGEST, seed=0, **flags)

    def timed(span: range) -> dict[str, float]:
        clock = time.perf_counter()
        replies = [reply for _, reply in client.stream((at, examples[at]) for at in span)]
        return _rates(len(span), sum(reply.output_tokens for reply in replies), time.perf_counter() - clock)

    with closing(client):
        taken = spans(setting["rows"], launch.world)
        told = {"load_seconds": client.load_seconds, "warm_seconds": timed(taken["warm"])["seconds"], **timed(taken["first"])}
        if taken["later"]:
            told |= {f"later_{name}": value for name, value in timed(taken["later"]).items()}
        if launch.world == 1:
            import torch

            told["peak_gib"] = torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else None
        return told | {"model": client.describe()}


def _rates(rows: int, tokens: int, seconds: float) -> dict[str, float]:
    return {"rows": rows, "seconds": seconds, "requests_per_second": rows / seconds, SPEED: tokens / seconds}


def documented(checkpoint: Path, rows: Path, setting: dict[str, Any]) -> dict[str, Any]:
    """transformers' `generate`, LLM.int8(), device_map="auto", batches of 8 in the rows' order."""
    import torch
    from transformers import StoppingCriteria

    from slm_swap.clients.loading import encode_prompt, load_model, load_tokenizer
    from slm_swap.rows.examples import read_examples
    from slm_swap.rows.prompts import text_request

    class OwnLength(StoppingCriteria):
        def __init__(self, width: int, limits: list[int]):
            self.width, self.limits = width, torch.tensor(limits, device="cuda" if torch.cuda.is_available() else "cpu")

        def __call__(self, ids, scores, **_):
            return ids.shape[1] - self.width >= self.limits

    clock = time.perf_counter()
    model, tokenizer = load_model(checkpoint, setting["flags"]["precision"]), load_tokenizer(checkpoint)
    told = {"load_seconds": time.perf_counter() - clock}
    prompts = [encode_prompt(tokenizer, text_request("structured", example.prompt)) for example in read_examples(rows, setting["rows"])]
    limits, size = lengths(WORKLOAD, 7)[1], setting["flags"]["batch_size"]
    clock = time.perf_counter()
    for start in range(0, len(prompts), size):
        batch = tokenizer.pad({"input_ids": prompts[start : start + size]}, return_tensors="pt").to(model.device)
        stop = OwnLength(batch["input_ids"].shape[1], limits[start : start + size])
        model.generate(**batch, max_new_tokens=LONGEST, do_sample=False, stopping_criteria=[stop], pad_token_id=tokenizer.pad_token_id)
    return told | _rates(len(prompts), sum(limits[: len(prompts)]), time.perf_counter() - clock)


def command(checkpoint: Path, rows: Path, setting: dict[str, Any], out: Path, processes: int) -> None:
    """The whole of eval.py, in this process."""
    import runpy

    stop_at_own_length(processes)
    flags = [word for name, value in setting["flags"].items() for word in (f"--{name.replace('_', '-')}", str(value))]
    sys.argv = ["eval.py", "--track", "structured", "--model-kind", "slm", "--dataset", str(rows), "--limit", str(setting["command"])]
    sys.argv += ["--out", str(out), "--overwrite", "--latency-rows", "0", *flags]
    runpy.run_path(str(PACKAGE / "01_eval/eval.py"), run_name="__main__")


def child(args: argparse.Namespace, part: str, name: str, processes: int = 1) -> dict[str, Any]:
    """One part of one setting in processes of its own; where it fails, why."""
    out = args.scratch / f"{name}-{processes}.{part}.json"
    for old in args.scratch.glob(f"{out.stem}*"):
        old.unlink()
    words = ["--part", part, "--only", name, "--scratch", args.scratch, "--shape", args.shape, "--processes", processes, "--out", out]
    words += ["--rows", args.rows] if args.rows else []
    clock = time.perf_counter()
    error = in_own_process(__file__, [str(word) for word in words], args.timeout, out.with_suffix(".log"), processes)
    seconds = time.perf_counter() - clock
    if error:
        return {"failed": error}
    told = json.loads(out.read_text())
    if part == "command":
        return {"seconds": seconds, "rows": told["counts"]["rows"], **{f"{name}_seconds": told["seconds"][name] for name in ("load", "generate", "total")}}
    return told


def summary(runs: list[dict[str, Any]], alone: list[dict[str, Any]]) -> dict[str, Any]:
    """The run of median speed, all speeds, and how many times those of one process in the same turns they are; why the last one failed."""
    good = sorted((one for one in runs if "failed" not in one), key=lambda one: one[SPEED])
    if not good:
        return {"once_started": runs[-1]}
    names = [name for name in SPEEDS if name in good[0]]
    told = {"once_started": good[(len(good) - 1) // 2], "speeds": {name: [one.get(name) for one in runs] for name in names}}
    if pairs := [(several, one) for several, one in zip(runs, alone, strict=False) if "failed" not in several | one]:
        told["times_one_process"] = {name: median(several[name] / one[name] for several, one in pairs) for name in names}
    return told | ({"failed": runs[-1]["failed"]} if "failed" in runs[-1] else {})


def rows_file(scratch: Path, shape: str, processes: int) -> Path:
    return scratch / f"rows-{shape}-{processes}.jsonl"


def prepare(scratch: Path, shape: str, processes: list[int]) -> dict[str, Any]:
    """Make checkpoint and rows, and say where they are measured."""
    import torch

    checkpoint = scratch / shape
    os.environ |= {"SLM_MODEL_PATH": str(checkpoint.resolve()), "LANGFUSE_DISABLED": "1"}
    make_checkpoint(checkpoint, shape)
    vocabulary = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    for count in processes:
        write_rows(rows_file(scratch, shape, count), WORKLOAD, vocabulary, copies=count)
    torch.cuda.empty_cache()
    # torch's bytecode, as pip leaves it: without, a command compiles torch anew
    ready = Path(importlib.util.cache_from_source(torch.__file__)).exists()
    told = {"created_at": now(), "code": code_version(), "hardware": hardware(), "packages": package_versions()}
    return told | {"shape": shape, "bytecode": ready}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="the settings to measure (default: all)")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/slm_swap_benchmark"), metavar="DIR", help="where checkpoint and rows go")
    parser.add_argument("--shape", choices=SHAPES, default="phi-4-mini", help="tiny: to try the benchmark on a CPU")
    parser.add_argument("--rows", type=positive, help="measure so many rows a process in each setting, instead of its own number")
    parser.add_argument(
        "--processes", type=positive, nargs="+", default=[1], help="measure with each of these numbers of processes, one a GPU (default: 1)"
    )
    parser.add_argument("--repeats", type=positive, default=1, help="runs of each setting once started; the command is run in the first (default: 1)")
    parser.add_argument("--timeout", type=positive, default=240, help="seconds that one part of one setting may take")
    parser.add_argument("--part", choices=("once_started", "command"), help="for the processes that this one starts")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the file to write (default: benchmarks/results/eval.json)")
    args = parser.parse_args(argv)
    args.only, args.processes = list(dict.fromkeys(args.only)), sorted(set(args.processes))
    if args.rows and args.rows > WORKLOAD:
        parser.error(f"--rows {args.rows}: the workload has {WORKLOAD} rows")
    if args.only == ["documented"] and 1 not in args.processes:
        parser.error("the documented setting is one process: measure it with --processes 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.part:
        (name,), (processes,) = args.only, args.processes
        rows, checkpoint = rows_file(args.scratch, args.shape, processes), args.scratch / args.shape
        setting = SETTINGS[name] | ({"rows": args.rows, "command": args.rows} if args.rows else {})
        if args.part == "command":
            command(checkpoint, rows, setting, args.out, processes)
        measure = documented if name == "documented" else once_started
        if told := measure(checkpoint, rows, setting):
            write_json(args.out, told)
        return 0
    out = args.out or ROOT / "benchmarks/results/eval.json"
    told = prepare(args.scratch, args.shape, args.processes)
    runs: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    commands: dict[str, dict[str, Any]] = {}
    results: dict[str, Any] = {}
    for turn, name, processes in itertools.product(range(args.repeats), args.only, args.processes):
        if (name == "documented" and processes > 1) or any("failed" in one for one in runs[name, processes]):
            continue  # it is one process, whatever there is; and what has failed is not tried again: its log is kept
        title = name if processes == 1 else f"{name}, {processes} processes"
        runs[name, processes].append({"turn": turn + 1, **child(args, "once_started", name, processes)})
        measured = summary(runs[name, processes], runs[name, 1] if processes > 1 else [])
        if turn == 0 and SETTINGS[name]["command"]:
            commands[title] = {"command": child(args, "command", name, processes)}
        results[title] = {"flags": SETTINGS[name]["flags"], "processes": processes, **measured, **commands.get(title, {})}
        print(title, json.dumps(results[title]), flush=True)
        write_json(out, told | {"settings": results})  # each time: a machine may be taken away
    print(f"report: {display_path(out)}")
    return 0


if __name__ == "__main__":
    run(main, launched="--part" in sys.argv)
