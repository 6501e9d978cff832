"""What few-shot, constrained decoding and fine-tuning gain on a real pretrained base model, and how well each confidence tells right from wrong.

    python benchmarks/real_model.py --model DIR --rows FILE ... --answers FILE ... --form-rows FILE ... --form-answers FILE ...
    python benchmarks/real_model.py --model models/phi-tiny --rows ... --answers ... --limit 20 --out /tmp/real.json

All by the stage scripts, on BFCL's rows. A base model keeps no form of reply, so other rows (`--form-rows`) teach it one first, and the adapter is merged.
The rows are then cut in two halves. Each half is measured with the other one as its train rows, for few-shot and for fine-tuning, so that every
row counts once and none was learned from. Gains are paired, over the first setting, with intervals of 95% of their own. What was measured already in --scratch
is not measured again.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere

from slm_swap.cli import Parser, positive, run
from slm_swap.common.errors import UserError
from slm_swap.common.reports import now, read_json, sha256_file, write_json
from slm_swap.common.settings import PACKAGE, ROOT, display_path
from slm_swap.scoring.tracks import TRACKS
from slm_swap.verdict.confidence import SIGNALS, discrimination, signals_of
from slm_swap.verdict.evaluations import Evaluation, read_evaluation
from slm_swap.verdict.gap import gains

TRACK = "toolcall"
HALVES = ("a", "b")
TRAINING = "--preset fast --epochs 6 --learning-rate 3e-4 --lora-dropout 0 --pack-length 2048 --save-steps 0"
SETTINGS = {  # TRAIN and ADAPTER stand for the other half's rows and for what was trained on them
    "as it is": "",
    "few-shot 1": "--few-shot TRAIN --shots 1",
    "few-shot 3": "--few-shot TRAIN --shots 3",
    "few-shot 5": "--few-shot TRAIN --shots 5",
    "constrained retry": "--constrain retry",
    "constrained always": "--constrain always",
    "few-shot 3, retry": "--few-shot TRAIN --shots 3 --constrain retry",
    "fine-tuned": "--adapter ADAPTER",
    "fine-tuned, few-shot 3": "--adapter ADAPTER --few-shot TRAIN --shots 3",
    "fine-tuned, retry": "--adapter ADAPTER --constrain retry",
}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="the checkpoint")
    parser.add_argument("--form-rows", type=Path, nargs="+", help="BFCL's rows that teach the form of a reply; none: the model keeps one")
    parser.add_argument("--form-answers", type=Path, nargs="+", help="their answers")
    parser.add_argument("--rows", type=Path, nargs="+", required=True, help="BFCL's rows")
    parser.add_argument("--answers", type=Path, nargs="+", required=True, help="their answers")
    parser.add_argument("--limit", type=positive, help="only the first N rows of each half")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="what is measured")
    parser.add_argument("--training", default=TRAINING, metavar="FLAGS", help="flags of every training, in one word")
    parser.add_argument("--evaluation", default="", metavar="FLAGS", help="flags of every evaluation, in one word")
    parser.add_argument("--parallel", type=positive, default=1, help="evaluations at a time")
    parser.add_argument("--scratch", type=Path, help="keep what was made here")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/real_model.json", help="the figures")
    return parser.parse_args(argv)


class Scripts:
    """Stage scripts, each run once: one that left its result is not run again."""

    def __init__(self, folder: Path, model: Path):
        self.folder, self.model = folder, model

    def __call__(self, name: str, result: Path, script: str, *flags: object) -> None:
        if result.exists():
            return
        log = self.folder / f"{name.replace(', ', '_').replace(' ', '_')}.log"
        with log.open("w") as output:
            env = os.environ | {"LANGFUSE_DISABLED": "1", "SLM_MODEL_PATH": str(self.model)}
            code = subprocess.run([sys.executable, str(PACKAGE / script), *map(str, flags)], env=env, stdout=output, stderr=output).returncode
        if code:
            last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
            raise UserError(f"{name} ended with exit code {code} ({last[0][:300]}): its log is {display_path(log)}")
        print(f"{name}: done", flush=True)


def prepare(scripts: Scripts, name: str, rows: list[Path], answers: list[Path], held: float) -> tuple[Path, Path]:
    """The rows in two splits, the second with that share of them; near-duplicates are in one split."""
    count = sum(1 for path in rows for line in path.open(encoding="utf-8") if line.strip())
    data = scripts.folder / name
    flags = ["--source", "bfcl", "--dataset-path", *rows, "--answers", *answers, "--val-size", int(held * count), "--test-size", 0, "--out-dir", data]
    scripts(f"prepare {name}", data / TRACK / "train.jsonl", "02_dataset/prepare_data.py", *flags)
    return data / TRACK / "train.jsonl", data / TRACK / "val.jsonl"


def teach_form(scripts: Scripts, args: argparse.Namespace) -> Path:
    """The model with the form of a reply: tuned on other rows, merged."""
    train, val = prepare(scripts, "form_rows", args.form_rows, args.form_answers, 0.1)
    adapter, merged = scripts.folder / "form_adapter", scripts.folder / "formed"
    flags = ["--track", TRACK, "--train", train, "--val", val, "--model", scripts.model, "--out", adapter, *shlex.split(args.training)]
    scripts("form", adapter / "training_info.json", "04_ft/train_unsloth.py", *flags)
    scripts("merge", merged / "config.json", "04_ft/merge_adapter.py", "--adapter", adapter, "--model", scripts.model, "--out", merged, "--dtype", "fp32")
    return merged


def measure(scripts: Scripts, args: argparse.Namespace, rows: dict[str, Path]) -> dict[str, list[Evaluation]]:
    """Each setting's evaluation of either half."""
    adapters = {half: scripts.folder / f"adapter_{half}" for half in HALVES}  # what was trained on that half
    other = dict(zip(HALVES, reversed(HALVES), strict=True))

    def train(half: str) -> None:
        flags = ["--track", TRACK, "--train", rows[half], "--val", rows[other[half]], "--out", adapters[half], *shlex.split(args.training)]
        scripts(f"train {half}", adapters[half] / "training_info.json", "04_ft/train_unsloth.py", *flags)

    def evaluate(job: tuple[str, str]) -> Evaluation:
        name, half = job
        words = {"TRAIN": rows[other[half]], "ADAPTER": adapters[other[half]]}
        flags = [words.get(word, word) for word in shlex.split(f"{SETTINGS[name]} {args.evaluation}")]
        flags += ["--limit", args.limit] if args.limit else []
        report = scripts.folder / f"{name.replace(', ', '_').replace(' ', '_')}_{half}.json"
        scripts(f"{name} {half}", report, "01_eval/eval.py", "--track", TRACK, "--model-kind", "slm", "--dataset", rows[half], "--out", report, *flags)
        return read_evaluation(report, TRACKS[TRACK], with_rows=True)

    with ThreadPoolExecutor(args.parallel) as pool:
        if any("ADAPTER" in SETTINGS[name] for name in args.settings):
            list(pool.map(train, HALVES))
        jobs = [(name, half) for name in args.settings for half in HALVES]
        found = list(pool.map(evaluate, jobs))
    return {name: [one for job, one in zip(jobs, found, strict=True) if job[0] == name] for name in args.settings}


def figures(sides: list[Evaluation], first: list[Evaluation]) -> dict[str, Any]:
    """One setting over both halves together."""
    track = TRACKS[TRACK].with_metrics(sides[0].report["metrics"])
    rows, before = ([row for side in own for row in side.rows] for own in (sides, first))
    found = gains(before, rows, track, 0.025, None)
    gained, confident = found["metrics"][found["metric"]], [signals_of(row) for row in rows]
    right = [row["scores_by_matcher"]["strict"][track.exact] == 1 for row in rows]
    errors: dict[str, int] = {}
    for row in rows:
        if row["error"]:
            errors[row["error"]] = errors.get(row["error"], 0) + 1
    counted = [side.report for side in sides]
    return {
        "rows": len(rows), "metric": found["metric"], "value": sum(right) / len(rows),
        "gain": None if sides is first else {name: gained[name] for name in ("gain", "interval", "p_value")},
        "better": len(found["better"]), "worse": len(found["worse"]), "errors": errors,
        "constrained_rows": sum(row.get("constrained") is True for row in rows),
        "tokens_per_row": {name: sum(report["tokens"][name] for report in counted) / len(rows) for name in ("input", "output")},
        "generate_seconds": [report["seconds"]["generate"] for report in counted],
        "confidence": discrimination({name: [told[name] for told in confident] for name in SIGNALS}, right),
    }  # fmt: skip


def show(told: dict[str, Any]) -> None:
    for name, one in told["settings"].items():
        gain = one["gain"] and f"{one['gain']['gain']:+.3f} [{one['gain']['interval'][0]:+.3f}, {one['gain']['interval'][1]:+.3f}]"
        print(f"{name}: {one['value']:.3f} {gain or ''} {one['errors']}")
        for signal, own in (one["confidence"] or {}).items():
            if own["auroc"] is not None:
                print(f"    {signal}: AUROC {own['auroc']:.3f} [{own['interval'][0]:.3f}, {own['interval'][1]:.3f}] ({own['rows']} rows)")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.scratch or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        scripts = Scripts(folder, args.model.resolve())
        if args.form_rows:
            scripts.model = teach_form(scripts, args)
        rows = dict(zip(HALVES, prepare(scripts, "rows", args.rows, args.answers, 0.5), strict=True))
        found = measure(scripts, args, rows)
        last = found[args.settings[-1]][-1].report
        told = {
            "created_at": now(), **{name: last[name] for name in ("code", "hardware", "packages")},
            "model": read_json(args.model / "config.json", "a checkpoint").get("model_type"), "model_config_sha256": sha256_file(args.model / "config.json"),
            "training": args.training, "evaluation": args.evaluation, "files": [path.name for path in args.rows],
            "form_rows": [path.name for path in args.form_rows or ()],
            "settings": {name: figures(sides, found[args.settings[0]]) for name, sides in found.items()},
        }  # fmt: skip
    show(told)
    write_json(args.out, told)
    print(f"report: {display_path(args.out)}")
    return 0


if __name__ == "__main__":
    run(main)
