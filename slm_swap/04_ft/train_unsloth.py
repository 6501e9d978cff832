"""Fine-tune the small model on one track with QLoRA, by TRL + PEFT or, on a GPU, by Unsloth.

    python train_unsloth.py --track toolcall --train 02_dataset/toolcall/train.jsonl --val 02_dataset/toolcall/val.jsonl --out 04_ft/adapter_toolcall
    python train_unsloth.py --track structured --train 02_dataset/structured/train.jsonl --val 02_dataset/structured/val.jsonl --out 04_ft/adapter_structured --backend trl --precision fp32
"""

import argparse
import shlex
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere

from slm_swap.cli import Parser, few_shot_of, next_step, not_negative, positive, quieten, run, run_metadata, tracing_options, warn
from slm_swap.clients.loading import model_path
from slm_swap.clients.replicas import take_one_gpu
from slm_swap.common.reports import sha256_file
from slm_swap.common.settings import Launch, display_path, find_path, load_settings, shown_path
from slm_swap.evaluating.recipe import ROW_FLAGS, read_recipe
from slm_swap.rows.examples import Example, read_examples
from slm_swap.rows.lines import read_jsonl
from slm_swap.scoring.tracks import TRACKS
from slm_swap.scoring.words import metric_name
from slm_swap.tracing.runs import connect, trace_run
from slm_swap.tuning.backends import choose_backend, choose_deepspeed, has_gpu
from slm_swap.tuning.checkpoints import Checkpoints
from slm_swap.tuning.checks import check_test_split
from slm_swap.tuning.hyperparameters import BACKENDS, PRECISIONS, PRESETS, SWITCH, Hyperparameters
from slm_swap.tuning.presets import choose_preset
from slm_swap.tuning.training import train

EXPLAINED = {  # each hyperparameter
    "precision": "weights of the frozen base",
    "lora_r": "rank of LoRA's matrices",
    "lora_alpha": "scale of LoRA's product, over its rank",
    "lora_dropout": "share of LoRA's inputs that is dropped",
    "learning_rate": "of AdamW, at its highest",
    "epochs": "passes over the train rows",
    "max_length": "longest row in tokens; longer rows are left out",
    "batch_size": "rows (or packs) in one pass of each GPU",
    "gradient_accumulation": "passes in one step",
    "warmup_share": "share of the steps in which the learning rate rises",
    "scheduler": "how the learning rate falls, by transformers' names",
    "weight_decay": "of AdamW",
    "gradient_checkpointing": "compute activations twice to save memory",
    "packing": "several whole rows in one sequence",
    "pack_length": "tokens in a pack",
    "step_packs": "without --packing: compute a step's rows as packs, with the same gradients; auto: if it is faster",
    "compile": "compile the layers; auto: if it is faster",
    "eval_steps": "steps between evaluations on the validation rows; the best step is kept; 0: none",
    "eval_generate": "validation rows that the model replies to in each evaluation; needs --eval-steps",
    "best_by": "what the best step has: the lowest loss, or the highest value of one of the track's metrics; needs --eval-generate",
    "early_stopping": "end after this many evaluations in a row without a new best; 0: never",
    "seed": "seed of everything random",
}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_track()
    parser.add_argument("--train", required=True, metavar="FILE", help="rows to train on")
    parser.add_argument("--val", required=True, metavar="FILE", help="rows to measure the loss on, never trained on")
    parser.add_argument("--test", metavar="FILE", help="rows that must not be trained on (default: test.jsonl beside --train, if it is there)")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the adapter's folder")
    parser.add_argument("--model", metavar="DIR", help="the base model (default: SLM_MODEL_PATH)")
    parser.add_argument(
        "--backend", choices=BACKENDS, default="auto", help="auto: unsloth on a CUDA GPU if rows are not packed, else trl"
    )
    parser.add_argument(
        "--preset", choices=("auto", *PRESETS), default="documented",
        help="the hyperparameters that no flag sets; auto: the fastest preset that fits the GPU's memory",
    )
    parser.add_ask()
    parser.add_recipe(ROW_FLAGS)
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N rows of --train")
    parser.add_argument("--val-limit", type=positive, metavar="N", help="only the first N rows of --val")
    parser.add_argument("--save-steps", type=not_negative, default=100, metavar="N", help="steps between checkpoints; 0: none")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint, if there is one")
    parser.add_argument(
        "--deepspeed-config", metavar="FILE", help="train by DeepSpeed, as accelerate_config/deepspeed_zero2.json says (default: plain DDP, which is faster)"
    )
    choices = {"precision": PRECISIONS, "compile": SWITCH, "step_packs": SWITCH}
    for field in fields(Hyperparameters):  # left out of the result where the flag is not given: the preset decides then
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(field.default, bool) else {"type": type(field.default)}
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", default=argparse.SUPPRESS, choices=choices.get(field.name),
            help=f"{EXPLAINED[field.name]} (documented: {field.default})", **kind,
        )  # fmt: skip
    parser.add_tracing()
    return parser.parse_args(argv)


def read_rows(args: argparse.Namespace) -> tuple[dict[str, list[Example]], dict[str, dict]]:
    """The rows of --train and --val, and what is told of all files."""
    paths = {"train": find_path(args.train), "val": find_path(args.val)}
    read = {"train": read_examples(paths["train"], args.limit), "val": read_examples(paths["val"], args.val_limit)}
    rows = {name: [replace(example, ask=args.ask) for example in examples] for name, examples in read.items()}
    few_shot = few_shot_of(args)
    if few_shot:
        rows = {name: [replace(example, shots=few_shot.turns(example)) for example in examples] for name, examples in rows.items()}
    for split in rows.values():
        for example in split:
            TRACKS[args.track].reference(example)
    inputs = {
        name: {"path": display_path(path), "sha256": sha256_file(path), "rows": len(rows[name])} for name, path in paths.items()
    }
    inputs |= {"few_shot": few_shot.report()} if few_shot else {}
    if test := check_test_split(paths["train"], rows["train"], find_path(args.test) if args.test else None):
        inputs["test"] = {"path": display_path(test), "sha256": sha256_file(test), "rows": None}
    return rows, inputs


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    settings = load_settings()
    launch = settings.launch
    quieten(launch.rank)
    if launch.world == 1:
        take_one_gpu(launch)  # one process that sees several would spread each batch over them
    connection = connect(settings, tracing_options(args, settings)) if launch.rank == 0 else None
    base = model_path(settings, args.model, "check --model")
    if args.recipe:
        read_recipe(args.recipe, args.track).check_base(base)
    rows, inputs = read_rows(args)
    given = {field.name: getattr(args, field.name) for field in fields(Hyperparameters) if hasattr(args, field.name)}
    if args.preset == "auto":
        args.preset, why = choose_preset(base, given)
        if launch.rank == 0:
            print(f"preset {args.preset}: {why}", flush=True)  # in a log, before any warning
    parameters = Hyperparameters(**PRESETS[args.preset] | given)
    track = TRACKS[args.track]
    parameters.check_metric(track.for_gold([track.reference(example) for example in rows["val"][: parameters.eval_generate]]))
    backend = choose_backend(args.backend, parameters.packing or parameters.step_packed, parameters.precision)
    deepspeed = choose_deepspeed(args.deepspeed_config, launch)
    if not has_gpu(launch):
        print(f"error: rank {launch.rank} has no GPU: start no more processes than there are GPUs", file=sys.stderr)
        return 2
    shared = {example.prompt for example in rows["train"]} & {example.prompt for example in rows["val"]}
    if shared and launch.rank == 0:
        warn(f"{len(shared)} prompts are in both files: the validation loss will look better than it is")
    metadata, tags = run_metadata(args) | {"backend": backend}, ["train", args.track]
    run_id = Checkpoints(args.out).run_id(args.resume) if launch.rank == 0 else None
    with trace_run(connection, f"train-{args.track}", args.out, metadata, tags, seed=run_id) as trace:
        info = train(
            args.track, base, rows["train"], rows["val"], args.out, parameters, backend, inputs, args.preset,
            save_steps=args.save_steps, resume=args.resume, run_id=run_id, deepspeed=deepspeed, launch=launch, say=print if launch.rank == 0 else str,
        )  # fmt: skip
        if launch.rank == 0:
            tell(trace, info, args.out)
            show(info, args.out, launch)
            words = ["01_eval/eval.py", "--track", args.track, "--model-kind", "slm", "--adapter", shown_path(args.out), *(["--ask", args.ask] if args.ask else [])]
            if args.few_shot:  # an adapter is asked as it learned
                words += ["--few-shot", shown_path(find_path(args.few_shot)), "--shots", str(inputs["few_shot"]["shots"])]
            next_step(f"python {shlex.join(words)} --out 01_eval/reports/{args.track}_slm_adapter.json")
    return 0


def tell(trace: Any, info: dict[str, Any], out: Path) -> None:
    """The run's trace: the loss curve, hyperparameters and losses. The log has steps and no times: they are taken as equally long, so that
    Langfuse, whose charts are over time, shows the curve."""
    ended, took = time.time_ns(), info["seconds"]["train"] * 1e9
    for _, point in read_jsonl(out / "training_log.jsonl"):
        losses = {f"step_{name}": point[name] for name in ("loss", "eval_loss") if name in point}
        trace.event("loss", point, ended - round(took * (1 - point["step"] / info["steps"])), losses)
    adapter = {"adapter": display_path(out), "adapter_sha256": sha256_file(out / "adapter_model.safetensors")}
    trace.update(output=info, metadata={"hyperparameters": info["hyperparameters"]} | adapter)
    losses = {"train_loss": info["train_loss"], **{f"eval_loss_{when}": loss for when, loss in info["eval_loss"].items()}}
    trace.scores({name: value for name, value in (losses | info["metrics"]["after"]).items() if value is not None})


def show(info: dict[str, Any], out: Path, launch: Launch) -> None:
    """What came out, on standard output."""
    processes = f", {launch.world} processes" if launch.world > 1 else ""
    print(
        f"{info['rows']['train']} rows, {info['steps']} steps in {info['seconds']['train']} s on {info['backend']}{processes}: "
        f"{info['tokens_per_second']} tokens/s"
    )
    for name, value in {"loss": info["eval_loss"], **info["metrics"]["after"]}.items():
        before, after = (value["before"], value["after"]) if name == "loss" else (info["metrics"]["before"][name], value)
        if after is not None:
            print(f"{metric_name(name)} on the validation rows: {'unknown' if before is None else f'{before:.4f}'} before, {after:.4f} after")
    if info["best_step"] not in (None, info["steps"]):
        print(f"kept is step {info['best_step']}, the best one by {metric_name(info['hyperparameters']['best_by'])}")
    print(f"adapter: {shown_path(out)}")


if __name__ == "__main__":
    run(main, launched=True)
