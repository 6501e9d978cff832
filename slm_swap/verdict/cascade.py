"""cascade.json: the calibrated rule by which a small model's reply is sent, or the hosted model is asked instead."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_swap.common.errors import UserError
from slm_swap.common.exact_json import ExactEncoder
from slm_swap.common.reports import SCHEMA_VERSION, read_json, sha256_file
from slm_swap.common.settings import display_path, find_path
from slm_swap.rows.lines import text_hash

STAGE, MADE_BY = "cascade", "03_compare/calibrate.py"
CLASSES = {"toolcall": ("call", "no_call"), "structured": ("value",)}


def tool_hash(tool: dict[str, Any]) -> str:
    """sha256 of a tool's definition in the kept form (`toolschema.kept_tool`), whatever the order of its keys."""
    return text_hash(json.dumps(tool, sort_keys=True, ensure_ascii=False, cls=ExactEncoder))


def identity_of(model: dict[str, Any], ask: str | None, max_new_tokens: int, few_shot_sha256: str | None) -> dict[str, Any]:
    """What a small model's replies hang on: `model` is a report's, or a client's `identity`."""
    served = {"path": model["path"]} if model.get("engine") == "served" else {}
    return served | {
        "files_sha256": model.get("files_sha256"), "precision": model.get("precision"), "engine": model.get("engine"), "ask": ask,
        "thinking": model.get("thinking"), "constrain": model.get("constrain") or "off", "max_new_tokens": max_new_tokens,
        "few_shot_sha256": few_shot_sha256,
    }  # fmt: skip


@dataclass(frozen=True)
class Cascade:
    """A calibration that was read: its fields are those of the file."""

    path: Path
    sha256: str
    track: str
    guarantee: str
    delta: float
    alpha: float
    rules: dict[str, dict[str, Any]]
    share_local: float
    regret: dict[str, Any]
    disagreement: dict[str, Any]
    tools: dict[str, str] | None
    per_tool: dict[str, dict[str, Any]]
    identity: dict[str, Any]
    recipe: dict[str, Any] | None
    calibration: dict[str, Any]
    hosted: str | None
    costs: dict[str, Any]

    def local(self, kind: str, fit: bool, confidence: dict[str, Any] | None) -> tuple[bool, str]:
        """(whether a reply of a class may be sent, why or why not): "local", "unfit", "no_confidence", "below_threshold", "class_never"."""
        rule = self.rules.get(kind)
        if rule is None or rule["threshold"] is None:
            return False, "class_never"
        if not fit:
            return False, "unfit"
        value = (confidence or {}).get(rule["signal"])
        if value is None:
            return False, "no_confidence"
        return (True, "local") if value >= rule["threshold"] else (False, "below_threshold")

    def mismatches(self, identity: dict[str, Any]) -> list[str]:
        """What of a loaded model differs from what was calibrated, each as one phrase."""
        return [
            f"{name} is {identity.get(name)!r}, calibrated with {wanted!r}" for name, wanted in self.identity.items() if identity.get(name) != wanted
        ]


def read_cascade(path: str | Path) -> Cascade:
    """
    Raises:
        UserError: no such file, or no cascade of this version.
    """
    found = find_path(path)
    told = read_json(found, MADE_BY)
    try:
        if told["stage"] != STAGE or told["schema_version"] != SCHEMA_VERSION or told["track"] not in CLASSES:
            raise ValueError
        names = [name for name in Cascade.__dataclass_fields__ if name not in ("path", "sha256")]
        read = Cascade(path=found, sha256=sha256_file(found), **{name: told[name] for name in names})
        for rule in read.rules.values():
            if not isinstance(rule["signal"], str) or not isinstance(rule["threshold"], int | float | None):
                raise ValueError
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{display_path(found)} is no cascade of this version: make it with {MADE_BY}") from None
    return read
