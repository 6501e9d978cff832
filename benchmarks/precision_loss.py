"""What the precision in which an adapter is trained costs: the last validation loss, as trained and over the base in 16 bits, and exact match there.

    python benchmarks/precision_loss.py --model DIR --train FILE --val FILE
    python benchmarks/precision_loss.py --model models/phi-tiny --train FILE --val FILE --precisions fp32 int8 --seeds 1 2 --training "--epochs 1" --out /tmp/loss.json

Each precision trains an adapter with each seed, by the stage scripts; `fp8-undoubled` is fp8 in which no column has a second 8-bit float. The first
precision is the reference: the others are compared with its run of the same seed. Standard errors are those of the seeds: they say nothing about other
rows. What was measured already in --scratch is not measured again.
"""

import argparse
import math
import runpy
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere

from benchmarks.real_model import Scripts
from slm_swap.cli import Parser, positive, run
from slm_swap.clients.loading import model_path
from slm_swap.common.reports import now, read_json, sha256_file, write_json
from slm_swap.common.settings import PACKAGE, ROOT, display_path, find_path, load_settings
from slm_swap.rows.examples import read_examples
from slm_swap.scoring.tracks import TRACKS
from slm_swap.tuning.hyperparameters import PRECISIONS
from slm_swap.tuning.packing import IGNORED

TRAIN = PACKAGE / "04_ft/train_unsloth.py"
UNDOUBLED = "fp8-undoubled"
TRAINING = "--backend trl --epochs 4 --learning-rate 3e-4 --compile no --save-steps 0"
AS_TRAINED, OVER_16_BITS = "loss_as_trained", "loss_over_bf16"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", help="the checkpoint (default: SLM_MODEL_PATH)")
    parser.add_argument("--track", choices=TRACKS, default="toolcall", help="the task")
    parser.add_argument("--train", required=True, metavar="FILE", help="rows to train on")
    parser.add_argument("--val", required=True, metavar="FILE", help="rows to measure on, never trained on")
    parser.add_argument("--precisions", nargs="+", choices=(*PRECISIONS, UNDOUBLED), default=["bf16", "int8", "fp8", UNDOUBLED], help="the first is the reference")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5], help="of the trainings in each precision")
    parser.add_argument("--training", default=TRAINING, metavar="FLAGS", help="flags of every training, in one word")
    parser.add_argument("--evaluation", default="", metavar="FLAGS", help="flags of every evaluation, in one word")
    parser.add_argument("--parallel", type=positive, default=1, help="trainings and evaluations at a time")
    parser.add_argument("--scratch", type=Path, help="keep what was made here")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/precision_loss.json", help="the figures")
    return parser.parse_args(argv)


def train_undoubled(flags: list[str]) -> None:
    """train_unsloth.py with products in fp8 in which no column is doubled."""
    from slm_swap.tuning import fp8

    fp8.columns_to_double = lambda *_: {}
    sys.argv = [str(TRAIN), *flags]
    runpy.run_path(str(TRAIN), run_name="__main__")


def mean_loss(model: Any, rows: list[dict[str, list[int]]]) -> float:
    """The mean loss over all targets of rows {"input_ids", "labels"}, in nats, one row at a time."""
    import torch

    total = count = 0.0
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]], device=model.device), use_cache=False).logits[0, :-1].float()
        targets = torch.tensor(row["labels"][1:], device=logits.device)
        total += torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum").item()
        count += (targets != IGNORED).sum().item()
    return total / count


def loss_over_16_bits(model: Path, adapter: Path, info: dict[str, Any], track: str, val: Path) -> float:
    """The validation loss of an adapter on the base in bf16, whatever it was trained on; on the rows and prompts that training measured, too."""
    import torch

    from slm_swap.clients.loading import load_model, load_tokenizer, with_adapter
    from slm_swap.tuning.tokens import tokenize

    examples = [replace(example, ask=info["ask"]) for example in read_examples(val)]
    rows = tokenize(load_tokenizer(model), track, examples, info["hyperparameters"]["max_length"]).rows
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    return mean_loss(with_adapter(load_model(model, "bf16", device_map={"": device}), adapter, model).eval(), rows)


def measure(scripts: Scripts, args: argparse.Namespace, precision: str, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What came of one training: its `training_info.json`, and the report of its adapter over the base in 16 bits."""
    name = f"{precision}_{seed}"
    adapter, report = scripts.folder / name, scripts.folder / f"{name}.json"
    flags = ["--track", args.track, "--train", args.train, "--val", args.val, "--out", adapter, *shlex.split(args.training), "--seed", seed]
    first = [__file__, UNDOUBLED] if precision == UNDOUBLED else [TRAIN]
    scripts(f"train {name}", adapter / "training_info.json", *first, *flags, "--precision", "fp8" if precision == UNDOUBLED else precision)
    flags = ["--engine", "transformers", "--precision", "bf16", "--latency-rows", 0, "--adapter", adapter, *shlex.split(args.evaluation)]
    scripts(f"evaluate {name}", report, "01_eval/eval.py", "--track", args.track, "--model-kind", "slm", "--dataset", args.val, "--out", report, *flags)
    return read_json(adapter / "training_info.json", "train_unsloth.py"), read_json(report, "eval.py")


def mean(values: Sequence[float]) -> dict[str, Any]:
    """The mean of the seeds' values and its standard error, which is None where there is one seed."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_error": error, "seeds": len(values)}


def summary(runs: dict[str, dict[str, dict[str, Any]]], reference: str, exact: str) -> dict[str, dict[str, Any]]:
    """For each precision the means over its seeds, and those of the differences from the reference's run of the same seed: of losses as a share of the
    reference's mean loss, of exact match in points of 1.

    `runs`: by precision and seed {"loss_as_trained", "loss_over_bf16", "metrics"}; every precision has the same seeds.
    """
    picks = {AS_TRAINED: lambda one: one[AS_TRAINED], OVER_16_BITS: lambda one: one[OVER_16_BITS], exact: lambda one: one["metrics"][exact]}
    told: dict[str, dict[str, Any]] = {}
    for precision, seeds in runs.items():
        told[precision] = {"from_the_reference": {}}
        for name, pick in picks.items():
            own, other = ([pick(side[seed]) for seed in seeds] for side in (runs[precision], runs[reference]))
            whole = 1.0 if name == exact else statistics.fmean(other)
            told[precision][name] = mean(own)
            told[precision]["from_the_reference"][name] = mean([(one - two) / whole for one, two in zip(own, other, strict=True)])
    return told


def show(told: dict[str, dict[str, Any]], exact: str) -> None:
    def plus_minus(value: dict[str, Any], form: str) -> str:
        error = value["standard_error"]
        return f"{value['mean']:{form}}" + ("" if error is None else f" ({error:{form.removeprefix('+')}})")

    for precision, one in told.items():
        apart = one["from_the_reference"]
        print(
            f"{precision}: loss {plus_minus(one[AS_TRAINED], '.4f')}, {plus_minus(apart[AS_TRAINED], '+.2%')}; over 16 bits "
            f"{plus_minus(one[OVER_16_BITS], '.4f')}, {plus_minus(apart[OVER_16_BITS], '+.2%')}; {exact} {plus_minus(one[exact], '.3f')}"
        )


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    model, exact = model_path(load_settings(), args.model).resolve(), TRACKS[args.track].exact_gate
    args.train, args.val = find_path(args.train).resolve(), find_path(args.val).resolve()
    with tempfile.TemporaryDirectory() as temporary:
        scripts = Scripts((args.scratch or Path(temporary)).resolve(), model)
        scripts.folder.mkdir(parents=True, exist_ok=True)
        jobs = [(precision, seed) for seed in args.seeds for precision in args.precisions]
        with ThreadPoolExecutor(args.parallel) as pool:
            found = dict(zip(jobs, pool.map(lambda job: measure(scripts, args, *job), jobs), strict=True))
        runs: dict[str, dict[str, dict[str, Any]]] = {precision: {} for precision in args.precisions}
        for (precision, seed), (info, report) in found.items():
            runs[precision][str(seed)] = {
                AS_TRAINED: info["eval_loss"]["after"], "loss_before": info["eval_loss"]["before"], "metrics": report["metrics"],
                OVER_16_BITS: loss_over_16_bits(model, scripts.folder / f"{precision}_{seed}", info, args.track, args.val),
                **{name: info[name] for name in ("products", "steps", "computed", "seconds")},
            }  # fmt: skip
    told = {
        "created_at": now(), **{name: info[name] for name in ("code", "hardware", "packages")}, "track": args.track, "reference": args.precisions[0],
        "model": read_json(model / "config.json", "a checkpoint").get("model_type"), "model_config_sha256": sha256_file(model / "config.json"),
        "rows": {name: {key: info["inputs"][name][key] for key in ("rows", "sha256")} for name in ("train", "val")},
        "training": args.training, "evaluation": args.evaluation, "precisions": summary(runs, args.precisions[0], exact), "runs": runs,
    }  # fmt: skip
    show(told["precisions"], exact)
    write_json(args.out, told)
    print(f"report: {display_path(args.out)}")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == [UNDOUBLED]:
        train_undoubled(sys.argv[2:])
    else:
        run(main)
