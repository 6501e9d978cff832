"""Close the gap by the cheapest means that works: climb the ladder on validation rows, and write what to deploy as recipe.json.

    python 04_ft/improve.py --track toolcall --dry-run
    python 04_ft/improve.py --track toolcall --azure 01_eval/reports/toolcall_azure_val.json --delta 0.05 --hours 3
    python 04_ft/improve.py --track structured --rungs ask,few-shot,constrain

Each rung (how it is asked, thinking, more tokens, few-shot, constrained decoding, fine-tuning, combinations of them) is evaluated on the
validation split, and stays if a paired test shows a gain. The ladder ends early if the verdict on these rows would be SWAP: --azure is the
hosted model's report of the same rows. The test split is not used. After an interruption the same command continues.
"""

import argparse
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere

from slm_swap.cli import CONCURRENCY, Parser, check_out, load_rows, next_step, positive, positive_number, run, share
from slm_swap.clients.loading import adapter_path, files_hash, model_path
from slm_swap.clients.pricing import load_prices
from slm_swap.common.errors import UserError
from slm_swap.common.processes import alone_in
from slm_swap.common.reports import read_json, sha256_file, write_json
from slm_swap.common.settings import PACKAGE, Settings, display_path, find_path, load_settings, shown_path
from slm_swap.evaluating.evaluation import check_rows
from slm_swap.evaluating.recipe import make_recipe
from slm_swap.rows.prompts import ASKS
from slm_swap.scoring.tracks import TRACKS
from slm_swap.tuning.hyperparameters import PRESETS
from slm_swap.tuning.ladder import KINDS, Ladder, OutOfBudget, Setting, Unfit, rungs
from slm_swap.tuning.ladder_tables import outlook, show, show_outlook
from slm_swap.tuning.stages import Budget, Stages
from slm_swap.verdict.evaluations import Evaluation, read_evaluation


def several(known: tuple[str, ...] | dict) -> Any:
    """Some of `known` with commas between, for argparse."""

    def read(text: str) -> list[str]:
        chosen = [word.strip() for word in text.split(",")]
        if unknown := [word for word in chosen if word not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r}: give some of {', '.join(known)} with commas between")
        return [name for name in known if name in chosen]

    return read


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_track()
    parser.add_argument("--split", default="val", help="the rows of 02_dataset/<track>/<split>.jsonl to measure on, never the test split")
    parser.add_argument("--dataset", metavar="FILE", help="rows from this file instead of a split")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N rows; trainings, too, are validated on these")
    parser.add_argument("--ask", choices=ASKS, help="how rows are asked to begin with (default: conversations native, others text)")
    parser.add_argument("--train", metavar="FILE", help="rows to show and to train on (default: train.jsonl beside those rows, if it is there)")
    parser.add_argument("--azure", metavar="REPORT", help="the hosted model's report of the same rows (default: 01_eval/reports/<track>_azure_<split>.json, if it is there)")
    parser.add_argument("--delta", type=share, default=0.02, help="non-inferiority margin of that verdict, 0..1")
    parser.add_argument("--alpha", type=share, default=0.05, help="error rate of each rung's test and of that verdict")
    parser.add_argument("--rungs", type=several(KINDS), default=list(KINDS), metavar="KINDS", help=f"which kinds of rungs: {','.join(KINDS)}")
    parser.add_argument("--presets", type=several(PRESETS), default=["fast"], metavar="NAMES", help=f"trainings: {','.join(PRESETS)}")
    parser.add_argument("--training-flags", default="", metavar="FLAGS", help='further flags of train_unsloth.py, in one word: "--epochs 2"')
    parser.add_argument("--hours", type=positive_number, help="most hours of work, those of an interrupted run included")
    parser.add_argument("--spend", type=positive_number, metavar="MONEY", help="most money for the machine, by the prices of prices.toml")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, for how long, at what cost")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the ladder's folder (default: 04_ft/improve_<track>)")
    parser.add_client(replay=False)
    parser.add_seed()
    parser.add_tracing()
    args = parser.parse_args(argv)
    if args.delta >= 1 or not 0 < args.alpha < 0.5:
        parser.error("--delta must be below 1, and --alpha above 0 and below 0.5")
    if args.split == "test" and not args.dataset:
        parser.error("the test split chooses nothing, or its figures would be too good: measure on another split, such as val")
    try:
        args.training_flags = shlex.split(args.training_flags)
    except ValueError as error:
        parser.error(f"--training-flags cannot be read as words ({error}): check its quotes")
    return args


def common_flags(args: argparse.Namespace, rows: Path) -> list[str]:
    """The flags of every evaluation that its replies depend on."""
    named = {"track": args.track, "dataset": rows, "limit": args.limit, "engine": args.engine, "batch-size": args.batch_size, "seed": args.seed}
    named |= {"precision": args.precision}
    flags = [word for name, value in named.items() if value is not None for word in (f"--{name}", str(value))]
    return flags + ["--trust-remote-code"] * args.trust_remote_code


def parts_of(settings: Settings, adapter: str | None, train: Path | None) -> dict[str, str]:
    """What an evaluation is made of besides rows and flags. Where one has changed, what was measured before says nothing.

    Raises:
        UserError: the model or the adapter is missing.
    """
    if settings.slm_base_url:
        found = {"served": f"{settings.slm_base_url} {settings.slm_model_name or ''}"}
    else:
        found = {"model_sha256": files_hash(model_path(settings))}
        if folder := adapter_path(adapter):
            found["adapter_sha256"] = files_hash(folder)
    return found | ({"train_sha256": sha256_file(train)} if train else {})


def tracing_flags(args: argparse.Namespace, session: str | None) -> list[str]:
    """What every stage is given besides: its runs are one session in Langfuse."""
    flags = ["--session", args.session or session or f"improve-{args.track}"]
    return flags + [f"--{name.replace('_', '-')}" for name in ("langfuse_optional", "no_trace_content") if getattr(args, name)]


def find_hosted(args: argparse.Namespace, name: str, rows_sha256: str) -> Evaluation | None:
    """The hosted model's evaluation of these rows, where there is one; `rows_sha256` is theirs.

    Raises:
        UserError: --azure cannot be read, or is of other rows.
    """
    usual = PACKAGE / f"01_eval/reports/{args.track}_azure_{name}.json"
    path = args.azure or (usual if usual.is_file() else None)
    found = read_evaluation(path, TRACKS[args.track], with_rows=True) if path else None
    if found and found.report["inputs"].get("rows_sha256") == rows_sha256:
        return found
    how = f"python 01_eval/eval.py --track {args.track} --model-kind azure {f'--dataset {args.dataset}' if args.dataset else f'--split {args.split}'}"
    how += f" --limit {args.limit}" if args.limit else ""
    if args.azure:
        raise UserError(f"{shown_path(found.path)} is of other rows than these: evaluate the hosted model on them by {how}")
    say(f"no report of the hosted model on these rows, so no verdict and no early end: make it with {how}, and pass it as --azure")
    return None


def say(text: str) -> None:
    print(text, flush=True)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    settings = load_settings()
    prices = load_prices(settings.prices_file)
    if args.spend is not None and prices.local.hour is None:
        raise UserError("--spend needs the machine's price: write `hour` under [local] in prices.toml")
    examples, inputs, name = load_rows(args, [])
    folder = args.out or PACKAGE / f"04_ft/improve_{args.track}"
    path, rows = folder / "recipe.json", find_path(inputs["path"])
    check_out(path)
    train = find_path(args.train) if args.train else rows.with_name("train.jsonl")
    if args.train and not train.is_file():
        raise UserError(f"no train rows at {shown_path(train)}: check --train")
    train = train if train.is_file() else None
    if train and sha256_file(train) == inputs["sha256"]:
        raise UserError(f"{shown_path(train)} has the rows that are measured: what a model was shown or trained on chooses nothing; name other rows with --train")
    if train is None:
        say("no train rows: few-shot and fine-tuning are left out; name them with --train")
    local = settings.slm_base_url is None
    kinds = [kind for kind in args.rungs if local or kind not in ("constrain", "train", "combine")]
    if not local:
        say("the model of SLM_BASE_URL is served elsewhere: constrained decoding and fine-tuning are left out")
    training = ["--track", args.track, "--train", str(train), "--val", str(rows), "--seed", str(args.seed), *args.training_flags]
    training += ["--val-limit", str(args.limit)] if args.limit else []  # an adapter is chosen by the rows that are measured, and by no others
    parts = parts_of(settings, args.adapter, train)
    plan, common = rungs(kinds, train, args.presets, folder, [*training, *sorted(parts.values())]), common_flags(args, rows)
    begin: Setting = {name: getattr(args, name) for name in ("ask", "thinking", "adapter") if getattr(args, name) is not None}
    begin |= {"max_new_tokens": args.max_new_tokens} | ({"constrain": args.constrain} if args.constrain != "off" else {})
    pace = [word for flag, value, usual in (("--concurrency", args.concurrency, CONCURRENCY), ("--engine-start", args.engine_start, "auto")) if value != usual for word in (flag, str(value))]
    budget = Budget(args.hours and 3600 * args.hours, args.spend)
    stages = Stages(folder, budget, prices, common, training, tracing_flags(args, settings.session), say, pace)

    def measure(name: str, setting: Setting, preset: str | None, report: Path) -> float:
        trained = stages.train(preset, setting) if preset else 0.0
        return trained + stages.evaluate(name, setting, report)

    hosted = find_hosted(args, name, check_rows(args.track, examples).contents.together())
    ladder = Ladder(folder, args.track, inputs | {"rows": len(examples), "parts": parts}, plan, common, measure, hosted, args.delta, args.alpha, prices, say)
    with alone_in(folder, f"another improve.py is at work in {shown_path(folder)}: wait for its end, or choose another folder with --out"):
        if args.dry_run:
            try:
                show_outlook(outlook(ladder, begin, examples, stages, train), prices.local.cost)
            except (Unfit, OutOfBudget) as why:
                raise UserError(f"the ladder cannot begin: {why}") from None
            next_step("the same command without --dry-run")
            return 0
        stages.take_up(ladder.spent())
        best = ladder.climb(begin)
        write_recipe(path, make_recipe(best.evaluation.report, display_path(ladder.path)))
    show(ladder)
    tell_commands(args, path, rows, ladder.verdict)
    return 0


def write_recipe(path: Path, recipe: dict[str, Any]) -> None:
    """Write it; an earlier one that says something else, as of other rungs, or cannot be read, is kept beside it."""
    before: Any = recipe
    if path.exists():
        try:
            before = read_json(path, "04_ft/improve.py")
        except UserError:
            before = None
    if not isinstance(before, dict) or any(before.get(name) != value for name, value in recipe.items() if name not in ("created_at", "code")):
        kept = path.with_name(f"recipe_{sha256_file(path)[:8]}.json")
        shutil.copyfile(path, kept)
        say(f"the recipe that an earlier run chose was another one and is kept: {shown_path(kept)}")
    write_json(path, recipe)


def tell_commands(args: argparse.Namespace, recipe: Path, rows: Path, verdict: str | None) -> None:
    """What to do next: the test split is asked once, by the recipe."""
    report = f"01_eval/reports/{args.track}_slm_recipe.json"
    test = rows.with_name("test.jsonl")
    own = ["--dataset", shown_path(test)] if args.dataset and test.is_file() else []
    say(f"recipe: {shown_path(recipe)}")
    say(f"on the validation rows the verdict is {verdict or 'not known'}; the next commands measure the recipe on the test split, which chose nothing")
    next_step(
        f"python {shlex.join(['01_eval/eval.py', '--track', args.track, '--model-kind', 'slm', *own, '--recipe', shown_path(recipe), '--out', report])}",
        f"python 03_compare/compare.py --track {args.track} --azure 01_eval/reports/{args.track}_azure_test.json --slm {report} --delta {args.delta:g} --table",
    )


if __name__ == "__main__":
    run(main)
