"""Fine-tune the small model on one track with QLoRA: Unsloth on a GPU, TRL + PEFT elsewhere.

python 04_ft/train_unsloth.py --track toolcall --train 02_dataset/toolcall/train.jsonl --val 02_dataset/toolcall/val.jsonl --out 04_ft/adapter_toolcall
python 04_ft/train_unsloth.py --track structured --train 02_dataset/structured/train.jsonl --val 02_dataset/structured/val.jsonl --out 04_ft/adapter_structured --backend trl --precision fp32
"""

import argparse
import sys
from dataclasses import asdict, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere

from slm_swap.cli import Parser, positive, run, run_metadata, tracing_options, warn
from slm_swap.engines import PRECISIONS
from slm_swap.examples import read_examples, read_jsonl
from slm_swap.langfuse_helpers import connect, trace_run
from slm_swap.reports import sha256_file
from slm_swap.settings import display_path, find_path, load_settings
from slm_swap.slm_client import model_path
from slm_swap.tracks import TRACKS
from slm_swap.training import BACKENDS, COMPILE, PRESETS, Hyperparameters, choose_backend, train


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_track()
    parser.add_argument("--train", required=True, metavar="FILE", help="rows to train on")
    parser.add_argument("--val", required=True, metavar="FILE", help="rows to measure the loss on, never trained on")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the adapter's folder")
    parser.add_argument("--model", metavar="DIR", help="the base model (default: SLM_MODEL_PATH)")
    parser.add_argument(
        "--backend", choices=BACKENDS, default="auto", help="auto: unsloth where there is a CUDA GPU and no packing, trl elsewhere"
    )
    parser.add_argument(
        "--preset", choices=PRESETS, default="documented", help="what the hyperparameters are where no flag says otherwise"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N rows of --train")
    choices = {"precision": PRECISIONS["transformers"], "compile": COMPILE}
    for field in fields(Hyperparameters):  # left out of the result where the flag is not given: the preset decides then
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(field.default, bool) else {"type": type(field.default)}
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", default=argparse.SUPPRESS, choices=choices.get(field.name),
            help=f"hyperparameter (documented: {field.default})", **kind,
        )  # fmt: skip
    parser.add_tracing()
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    settings = load_settings()
    connection = connect(settings, tracing_options(args, settings))
    base = model_path(settings, args.model)
    paths = {"train": find_path(args.train), "val": find_path(args.val)}
    rows = {"train": read_examples(paths["train"], args.limit), "val": read_examples(paths["val"])}
    for split in rows.values():
        for example in split:
            TRACKS[args.track].reference(example)
    shared = {example.prompt for example in rows["train"]} & {example.prompt for example in rows["val"]}
    if shared:
        warn(f"{len(shared)} prompts stand in both files: the validation loss will look better than it is")
    inputs = {
        name: {"path": display_path(path), "sha256": sha256_file(path), "rows": len(rows[name])} for name, path in paths.items()
    }
    given = {field.name: getattr(args, field.name) for field in fields(Hyperparameters) if hasattr(args, field.name)}
    parameters = Hyperparameters(**PRESETS[args.preset] | given)
    backend = choose_backend(args.backend, parameters.packing)
    metadata, tags = run_metadata(args) | {"backend": backend}, ["train", args.track]
    with trace_run(connection, f"train-{args.track}", args.out, metadata, tags) as trace:
        info = train(args.track, base, rows["train"], rows["val"], args.out, parameters, backend, inputs, args.preset)
        for _, point in read_jsonl(args.out / "training_log.jsonl"):
            trace.event("loss", point)
        adapter = {"adapter": display_path(args.out), "adapter_sha256": sha256_file(args.out / "adapter_model.safetensors")}
        trace.update(output=info, metadata={"hyperparameters": asdict(parameters)} | adapter)
        losses = {
            "train_loss": info["train_loss"],
            "eval_loss_before": info["eval_loss"]["before"],
            "eval_loss_after": info["eval_loss"]["after"],
        }
        trace.scores({name: value for name, value in losses.items() if value is not None})
    if info["rows"]["too_long"]:
        warn(
            f"{info['rows']['too_long']} rows are longer than {parameters.max_length} tokens and were left out: raise --max-length"
        )
    print(f"{info['rows']['train']} rows, {info['steps']} steps in {info['seconds']['train']} s on {backend}")
    print(f"loss on the validation rows: {info['eval_loss']['before']:.4f} before, {info['eval_loss']['after']:.4f} after")
    print(f"adapter: {display_path(args.out)}")
    return 0


if __name__ == "__main__":
    run(main)
