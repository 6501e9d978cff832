"""recipe.json: how the small model is asked and run, each part with its hash, so that what is measured is what is deployed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from slm_swap.clients.engines import CONSTRAINTS, PRECISIONS
from slm_swap.clients.loading import files_hash, model_path
from slm_swap.clients.thinking import THINKING
from slm_swap.common.errors import UserError
from slm_swap.common.reports import SCHEMA_VERSION, code_version, now, read_json, sha256_file
from slm_swap.common.settings import Settings, find_path, shown_path
from slm_swap.rows.examples import Example
from slm_swap.rows.few_shot import FewShot
from slm_swap.rows.prompts import ASKS
from slm_swap.scoring.tracks import TRACKS

STAGE, MADE_BY = "recipe", "04_ft/improve.py"
ROW_FLAGS = ("ask", "few_shot", "shots")  # how rows are asked
CLIENT_FLAGS = ("thinking", "constrain", "max_new_tokens", "precision", "engine", "adapter")  # how the model is run
FLAGS = (*ROW_FLAGS, *CLIENT_FLAGS)


def make_recipe(report: dict[str, Any], ladder: str | None = None) -> dict[str, Any]:
    """The recipe of what an evaluation of the small model measured, as it is written; `report` is the evaluation's.

    `ladder` names the file that says why.
    """
    args, model, inputs = report["args"], report["model"], report["inputs"]
    few_shot, hashes = inputs.get("few_shot"), model.get("files_sha256") or []
    adapter = {"path": model["adapter"], "files_sha256": hashes[1]} if model.get("adapter") else None
    return {
        "schema_version": SCHEMA_VERSION,
        "stage": STAGE,
        "created_at": now(),
        "code": code_version(),
        "track": report["track"],
        "model": {"path": model["path"], "files_sha256": hashes[0] if hashes else None},
        "adapter": adapter,
        "precision": model.get("precision"),
        "engine": model.get("engine"),
        "ask": args.get("ask"),
        "few_shot": few_shot and {name: few_shot[name] for name in ("path", "sha256", "shots")},
        "thinking": args.get("thinking"),
        "constrain": args.get("constrain"),
        "max_new_tokens": args["max_new_tokens"],
        "chosen_on": {name: inputs[name] for name in ("path", "sha256", "rows")},
        "ladder": ladder,
    }


@dataclass(frozen=True)
class Recipe:
    """A recipe that was read: `flags` are the values of FLAGS that it sets, `model` the checkpoint's path (None: a served model's)."""

    path: Path
    track: str
    flags: dict[str, Any]
    model: str | None
    files_sha256: list[str] | None
    served: str | None

    @cached_property
    def sha256(self) -> str:
        """The file's."""
        return sha256_file(self.path)

    def few_shot(self) -> FewShot | None:
        """The index of its shots.

        Raises:
            UserError: as `FewShot`.
        """
        path = self.flags.get("few_shot")
        return FewShot(find_path(path), self.track, self.flags["shots"]) if path else None

    def as_asked(self, example: Example, few_shot: FewShot | None) -> Example:
        """A row as the small model is asked it."""
        asked = replace(example, ask=self.flags.get("ask"))
        return replace(asked, shots=few_shot.turns(asked)) if few_shot else asked

    def check_place(self, settings: Settings) -> None:
        """Refuse settings by which another kind of model would be asked than the recipe's, before one is loaded.

        Raises:
            UserError: a served model's recipe without SLM_BASE_URL, a local one's with it, or one whose checkpoint is missing.
        """
        shown = shown_path(self.path)
        if self.served and not settings.slm_base_url:
            raise UserError(f"{shown} is of the served model {self.served}: set SLM_BASE_URL to its server, or make the recipe again with {MADE_BY}")
        if not self.served and settings.slm_base_url:
            raise UserError(f"{shown} is of the checkpoint {self.model}, and SLM_BASE_URL names a server: unset SLM_BASE_URL, or make the recipe again with {MADE_BY}")
        if not self.served:
            model_path(settings, self.model, f"put the model of {shown} back, or make the recipe again with {MADE_BY}")

    def check(self, identity: dict[str, Any]) -> None:
        """Refuse a model that is not the recipe's; `identity` is its client's.

        Raises:
            UserError: so.
        """
        if self.served and identity["path"] != self.served:
            raise UserError(f"{shown_path(self.path)} is of the served model {self.served}, and {identity['path']} answers: set SLM_BASE_URL and SLM_MODEL_NAME")
        for at, what in enumerate(("model", "adapter")) if self.files_sha256 else ():
            wanted, found = (hashes[at] if at < len(hashes) else None for hashes in (self.files_sha256, identity.get("files_sha256") or []))
            self._require_same(what, wanted, found)

    def check_base(self, base: Path) -> None:
        """Refuse a checkpoint to train on that is not the recipe's model. The rows may be asked as a served model's recipe says.

        Raises:
            UserError: so.
        """
        if self.files_sha256 and not self.served:
            self._require_same("model", self.files_sha256[0], files_hash(base))

    def _require_same(self, what: str, wanted: str | None, found: str | None) -> None:
        if wanted != found:
            raise UserError(f"the {what} is not the one of {shown_path(self.path)}: its files have another hash; make the recipe again with {MADE_BY}")


def require_known(flags: Mapping[str, Any]) -> None:
    """Refuse values of FLAGS that the scripts' own flags would not take.

    Raises:
        ValueError: so.
    """
    kinds: dict[str, Callable[[Any], bool]] = {
        "ask": (None, *ASKS).__contains__,
        "thinking": (None, *THINKING).__contains__,
        "constrain": (None, *CONSTRAINTS).__contains__,
        "precision": (None, *chain(*PRECISIONS.values())).__contains__,
        "engine": (*PRECISIONS, "served").__contains__,
        **dict.fromkeys(("max_new_tokens", "shots"), lambda value: type(value) is int and value > 0),
        **dict.fromkeys(("few_shot", "adapter"), lambda value: isinstance(value, str)),
    }
    if not all(kinds[name](value) for name, value in flags.items()):
        raise ValueError


def read_recipe(path: str | Path, track: str) -> Recipe:
    """A recipe, whose file of shots is still the same; the model's files are checked once they are loaded (`Recipe.check`).

    Raises:
        UserError: no such file, or no recipe, of another track; a part is missing or was changed.
    """
    found = find_path(path)
    told, shown = read_json(found, MADE_BY), shown_path(found)
    try:
        if told["stage"] != STAGE or told["schema_version"] != SCHEMA_VERSION or told["track"] not in TRACKS:
            raise ValueError
        few_shot, adapter, model = told["few_shot"], told["adapter"], told["model"]
        flags = {name: told[name] for name in ("ask", "thinking", "constrain", "max_new_tokens", "precision", "engine")}
        name, hashes, indexed = model["path"], model["files_sha256"] and [model["files_sha256"]], None
        if few_shot is not None:
            flags |= {"few_shot": few_shot["path"], "shots": few_shot["shots"]}
            indexed = few_shot["sha256"]
        if adapter is not None:
            flags["adapter"] = adapter["path"]
            hashes = [*hashes, adapter["files_sha256"]]
        require_known(flags)
        if not all(isinstance(part, str) for part in (name, *(hashes or ()), *([indexed] if few_shot is not None else []))):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{shown} is no recipe of this version: make it with {MADE_BY}") from None
    if told["track"] != track:
        raise UserError(f"{shown} is of track {told['track']}, not {track}: name the recipe of this track")
    if indexed:
        rows = find_path(flags["few_shot"])
        if not rows.is_file() or sha256_file(rows) != indexed:
            what = "was changed" if rows.is_file() else "is missing"
            raise UserError(f"{shown_path(rows)}, which {shown} shows to each row, {what}: put it back, or make the recipe again with {MADE_BY}")
    if adapter and not (find_path(flags["adapter"]) / "adapter_config.json").is_file():
        what = "has no adapter_config.json" if find_path(flags["adapter"]).is_dir() else "is missing"
        raise UserError(f"the adapter of {shown} {what}, {flags['adapter']}: put it back, or make the recipe again with {MADE_BY}")
    served = name if flags["engine"] == "served" else None
    flags = {flag: value for flag, value in flags.items() if value is not None and not (served and flag == "engine")}
    return Recipe(found, track, flags, None if served else name, hashes, served)
