"""Calibrate a cascade: which replies of the small model may be given to the user, with the hosted model behind it for the rest.

    python 03_compare/calibrate.py --track toolcall --delta 0.02
    python 03_compare/calibrate.py --track structured --azure A.json --slm S.json --signal sum_logprob --html cascade.html

It takes both models' reports on rows that were used for nothing else (01_eval/eval.py --split calibration). You give the target, --delta: the largest
share of all requests in which the small model answers, is wrong, and the hosted one would be right (with --agreement: in which both differ). The
thresholds follow from it. The exit code is 0, or 11 if nothing can be certified. Then no cascade is written.
"""

import argparse
import shlex
import sys
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from anywhere

from slm_swap.cli import Parser, check_out, next_step, run, share, warn
from slm_swap.clients.confidence import SIGNALS
from slm_swap.clients.pricing import load_prices
from slm_swap.common.errors import UserError
from slm_swap.common.reports import read_json, rows_path, sha256_file, write_atomically
from slm_swap.common.settings import PACKAGE, display_path, find_path, load_settings, shown_path
from slm_swap.evaluating.recipe import read_recipe
from slm_swap.scoring.tracks import TRACKS
from slm_swap.verdict import cascade_words
from slm_swap.verdict.calibration import Reply, Target, calibrate, describe, offered_tools, replies, wanted_schemas
from slm_swap.verdict.cascade import write_cascade
from slm_swap.verdict.evaluations import Evaluation, fit_together, model_of, read_evaluation
from slm_swap.verdict.unused_rows import calibration_examples, require_unused, same_model

MUCH_LOST = 0.2  # of the local answers
NOTHING = 11  # as compare.py's NEED_MORE_DATA
PAGE = "choose another place with --html"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_track()
    where = "01_eval/reports/<track>_{}_{}.json"
    parser.add_argument("--azure", metavar="REPORT", help=f"the hosted model's report (default: {where.format('azure', 'calibration')})")
    parser.add_argument("--slm", metavar="REPORT", help=f"the small model's report (default: {where.format('slm', 'calibration')})")
    parser.add_argument("--val-azure", metavar="REPORT", help=f"the hosted model's on validation, to choose signals (default: {where.format('azure', 'val')} if it is there)")
    parser.add_argument("--val-slm", metavar="REPORT", help=f"the small model's on validation (default: {where.format('slm', 'val')} if it is there)")
    parser.add_argument("--delta", type=share, default=0.02, help="the target: the most regret, as a share of all requests, above 0")
    parser.add_argument("--alpha", type=share, default=0.05, help="how often the target may be missed")
    parser.add_argument("--agreement", action="store_true", help="bound the answers that differ from the hosted model's, right or wrong")
    parser.add_recipe(())
    parser.add_argument("--signal", choices=SIGNALS, help="the signal of confidence (default: of each class the best on validation)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the cascade (default: 03_compare/cascade_<track>.json)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots, too")
    args = parser.parse_args(argv)
    if not 0 < args.delta < 1 or not 0 < args.alpha < 0.5:
        parser.error("--delta must be above 0 and below 1, and --alpha above 0 and below 0.5")
    if bool(args.val_azure) != bool(args.val_slm):
        parser.error("--val-azure and --val-slm go together")
    if args.html and args.out and args.html.resolve() == args.out.resolve():
        parser.error("--html and --out name the same file")
    return args


def read_pair(args: argparse.Namespace, azure: str | Path, slm: str | Path) -> tuple[dict[str, Evaluation], list[str]]:
    """Both models' evaluations of the same rows, and what to be warned of.

    Raises:
        UserError: as `read_evaluation` and `fit_together`; or the small model's is of another kind of model, which has no confidence.
    """
    sides = {name: read_evaluation(path, TRACKS[args.track], with_rows=True) for name, path in (("azure", azure), ("slm", slm))}
    if (kind := model_of(sides["slm"].report).get("kind")) != "slm":
        raise UserError(f"the small model's report {shown_path(sides['slm'].path)} is of kind {kind}: a cascade takes the report of a local model (--model-kind slm)")
    return sides, fit_together(sides, sequential=False, question="these")


def read_validation(args: argparse.Namespace, slm: Evaluation) -> tuple[dict[str, Evaluation] | None, list[str]]:
    """The evaluations on validation rows, None where signals are not chosen there; and what to be warned of.

    Raises:
        UserError: as `read_pair`; those that were named are of another small model.
    """
    given = bool(args.val_slm)
    paths = [args.val_azure, args.val_slm] if given else [PACKAGE / f"01_eval/reports/{args.track}_{kind}_val.json" for kind in ("azure", "slm")]
    if not given and not all(Path(path).is_file() for path in paths):
        return None, [] if args.signal else ["without reports on validation rows (--val-azure, --val-slm) the signal is sum_logprob"]
    sides, warnings = read_pair(args, *paths)
    if same_model(slm, sides["slm"]):
        return sides, warnings
    told = f"{shown_path(sides['slm'].path)} is of another small model, or of one that was asked or run otherwise"
    if given:
        raise UserError(f"{told}: evaluate the same on the validation rows, or leave --val-azure and --val-slm out")
    return None, [f"{told}: it chooses no signal, which is {args.signal or 'sum_logprob'}"]


def recipe_of(args: argparse.Namespace, slm: Evaluation) -> tuple[dict[str, str] | None, dict[str, Any] | None]:
    """(the recipe's path and hash, what it was chosen on); None where the small model has none.

    Raises:
        UserError: as `read_recipe`; or it is of another model than the report.
    """
    named = args.recipe or (slm.report.get("args") or {}).get("recipe")
    if not named:
        return None, None
    recipe = read_recipe(named, args.track)
    recipe.check(model_of(slm.report))
    return {"path": display_path(recipe.path), "sha256": sha256_file(recipe.path)}, read_json(recipe.path, "04_ft/improve.py").get("chosen_on")


def serving_flags(slm: Evaluation, recipe: dict[str, Any] | None) -> list[str]:
    """The flags by which serve.py loads and asks the small model as this report's was."""
    if recipe:
        return ["--recipe", shown_path(find_path(recipe["path"]))]
    model, args = model_of(slm.report), slm.report.get("args") or {}
    told = {} if model.get("engine") == "served" else {name: model.get(name) for name in ("engine", "precision", "adapter")}
    told |= {"ask": "text"} if slm.report.get("ask") == "text" else {}  # conversations are asked natively otherwise
    told |= {name: args.get(name) for name in ("thinking", "constrain", "max_new_tokens", *(("few_shot", "shots") if args.get("few_shot") else ()))}
    told |= {name: shown_path(find_path(told[name])) for name in ("adapter", "few_shot") if told.get(name)}
    words = [[f"--{name.replace('_', '-')}", str(value)] for name, value in told.items() if value not in (None, "off")]
    return [*chain(*words), *(["--trust-remote-code"] if args.get("trust_remote_code") else [])]


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    track, target = TRACKS[args.track], Target("agreement" if args.agreement else "regret", args.delta, args.alpha)
    default = [PACKAGE / f"01_eval/reports/{args.track}_{kind}_calibration.json" for kind in ("azure", "slm")]
    sides, warnings = read_pair(args, args.azure or default[0], args.slm or default[1])
    azure, slm = sides["azure"], sides["slm"]
    validation, more = read_validation(args, slm)
    recipe, chosen_on = recipe_of(args, slm)
    warnings += more + require_unused(slm, args.track, chosen_on, validation and validation["slm"])
    out = args.out or PACKAGE / f"03_compare/cascade_{args.track}.json"
    read = [path for side in (*sides.values(), *(validation or {}).values()) for path in (side.path, rows_path(side.path))]
    read += [find_path(slm.report["inputs"]["path"]), *([recipe["path"]] if recipe else [])]
    check_out(out, inputs=read)
    if args.html:
        check_out(args.html, inputs=read, advice=PAGE)
    examples = calibration_examples(slm)
    tools, unusual = offered_tools(examples) if track.name else (None, set())
    schemas = None if track.name else wanted_schemas(examples)
    if prompts := sum(example.messages is None for example in examples):
        warnings.append(f"{prompts} rows are prompts, and requests are conversations, which are asked otherwise: 05_serve/serve.py will not answer by this rule (prepare_data.py --source chat)")
    if unusual:
        warnings.append(f"{len(unusual)} rows offer a tool that most rows define otherwise: such requests go to the hosted model")
    rows = replies(azure, slm, track, target.guarantee, unusual)
    if left_out := len(slm.rows) - len(rows):
        warnings.append(f"{left_out} of {len(slm.rows)} slm requests failed: these rows say nothing of the model and are left out (eval.py --again failed)")
    held: list[Reply] | None = replies(validation["azure"], validation["slm"], track, target.guarantee) if validation else None
    found = calibrate(rows, track, target, args.signal, held)
    for kind, rule in found["rules"].items():
        if (lost := rule["local_only"]["seen"]) is not None and lost > MUCH_LOST:
            warnings.append(f"{lost:.0%} of what would be answered locally ({kind}) is lost: such a --delta lets the small model answer what it gets wrong; give a smaller one")
    warnings = list(dict.fromkeys(warnings))
    told = describe(azure, slm, found, tools, schemas, load_prices(load_settings().prices_file)) | {"prompts": prompts, "recipe": recipe, "warnings": warnings}
    for text in warnings:
        warn(text)
    for text in cascade_words.sentences(told):
        print(text)
    if args.html:
        from slm_swap.verdict.html_report.cascade_page import write_cascade_page

        write_atomically(args.html, lambda stream: stream.writelines(write_cascade_page(told)), PAGE)
        print(f"report: {shown_path(args.html)}")
    if not told["share_local"]:
        print(f"no cascade is written{f'; {shown_path(out)} is an earlier one' if out.exists() else ''}")
        return NOTHING
    write_cascade(out, {name: value for name, value in told.items() if name != "curves"})
    print(f"cascade: {shown_path(out)}")
    words = ["05_serve/serve.py", "--track", args.track, "--mode", "cascade", "--cascade", shown_path(out), *serving_flags(slm, recipe)]
    next_step(f"python {shlex.join(words)}")
    return 0


if __name__ == "__main__":
    run(main)
