"""Whether rows are fit to calibrate on: nothing that is to be certified may have been chosen, or learned, on any of them."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from slm_swap.common.errors import UserError
from slm_swap.common.reports import read_json
from slm_swap.common.settings import PACKAGE, find_path, real_path, shown_path
from slm_swap.rows.examples import Example, read_examples
from slm_swap.verdict.cascade import identity_of_report
from slm_swap.verdict.evaluations import Evaluation, model_of
from slm_swap.verdict.html_report.decision_file import dataset, prompt_hashes

OTHER_SPLITS = ("train", "val", "test")
ADVICE = "put rows aside by 02_dataset/prepare_data.py --calibration-size N, and evaluate both models on --split calibration"
TRAINING_INFO = "training_info.json"  # what an adapter's folder, or a merged model's, says of its making


def calibration_examples(slm: Evaluation) -> list[Example]:
    """The rows themselves, as they were evaluated: their form, and what each of them offers to call.

    Raises:
        UserError: their file is missing, or was changed.
    """
    inputs = slm.report["inputs"]
    path = dataset({"path": inputs.get("path"), "sha256": inputs.get("sha256")})
    if path is None:
        raise UserError(f"{inputs.get('path')!r} is missing, or is not the file that was evaluated: put it back: the rule depends on the form of its rows and on their tools")
    ids = {row["id"] for row in slm.rows}
    return [example for example in read_examples(path) if example.id in ids]


def require_unused(slm: Evaluation, track: str, chosen_on: Mapping[str, Any] | None, validation: Evaluation | None) -> list[str]:
    """Refuse rows on which anything was chosen or learned: splits of other uses, what a recipe was chosen on (`chosen_on`, as in the recipe),
    the rows that were shown as examples, those of the validation reports, the adapter's own; gives what could not be looked at, for a warning.

    Raises:
        UserError: so; the message says which rows.
    """
    inputs, model = slm.report["inputs"], model_of(slm.report)
    path, digest = Path(str(inputs.get("path"))), inputs.get("sha256")
    shown = inputs.get("few_shot") if isinstance(inputs.get("few_shot"), dict) else {}
    if path.stem in OTHER_SPLITS:
        raise UserError(f"the reports are of the {path.stem} split, {path}, and not of rows that nothing was chosen on: {ADVICE}")
    for what, other in (("the recipe was chosen on", (chosen_on or {}).get("sha256")), ("the model was shown examples from", shown.get("sha256"))):
        if digest is not None and digest == other:
            raise UserError(f"{what} {path}, the rows of these reports: {ADVICE}")
    learned, warnings = _trained_on(model, path, digest)
    folders = {real_path(find_path(path)).parent, PACKAGE / "02_dataset" / track}
    files = [folder / f"{name}.jsonl" for folder in sorted(folders) for name in OTHER_SPLITS]
    files += [find_path(other["path"]) for other in (chosen_on or {}, shown, *learned) if isinstance(other.get("path"), str)]
    prompts = {row["prompt_sha256"]: row["id"] for row in slm.rows if row.get("prompt_sha256")}
    for file in dict.fromkeys(map(real_path, files)):
        if file.is_file() and file != real_path(find_path(path)):
            _share_nothing(prompts, prompt_hashes(file), shown_path(file))
    if validation:
        _share_nothing({row["id"]: row["id"] for row in slm.rows}, {row["id"] for row in validation.rows}, shown_path(validation.path))
        _share_nothing(prompts, {row.get("prompt_sha256") for row in validation.rows}, shown_path(validation.path))
    return warnings


def _share_nothing(mine: Mapping[str, str], theirs: Iterable[str | None], shown: str) -> None:
    if common := sorted(mine[key] for key in mine.keys() & set(theirs)):
        raise UserError(f"{len(common)} of the rows are in {shown} too (first: id {common[0]!r}): {ADVICE}")


def _trained_on(model: Mapping[str, Any], path: Path, digest: str | None) -> tuple[list[dict[str, Any]], list[str]]:
    """(the files that the adapter, or the merged model, was trained or stopped on; a warning where that is not known).

    Raises:
        UserError: one of them is that of these reports.
    """
    trained = model.get("adapter") or (model.get("path") if model.get("trained_on_sha256") else None)
    if not trained:
        return [], []
    info = find_path(trained) / TRAINING_INFO
    if not info.is_file():
        return [], [f"no {shown_path(info)}: whether {trained} was trained on these rows is not known"]
    inputs = read_json(info, "train_unsloth.py").get("inputs")
    used = [part for part in inputs.values() if isinstance(part, dict)] if isinstance(inputs, dict) else []
    if digest is not None and digest in [part.get("sha256") for part in used]:
        raise UserError(f"{trained} was trained on {path}, the rows of these reports: {ADVICE}")
    return used, []


def same_model(slm: Evaluation, validation: Evaluation) -> bool:
    """Whether the validation reports are of the same small model, asked and run alike."""
    return identity_of_report(slm.report) == identity_of_report(validation.report)
