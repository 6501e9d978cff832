"""cascade.json: which replies of the small model may be given to the user, and which requests go on to the hosted model.

The rule is of one model as it was measured, asked and run in one way: `Cascade.mismatches` says where another one is loaded.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_swap.clients.confidence import SIGNALS
from slm_swap.common.errors import UserError
from slm_swap.common.exact_json import ExactEncoder
from slm_swap.common.reports import SCHEMA_VERSION, code_version, now, read_json, sha256_file, write_json
from slm_swap.common.settings import display_path, shown_path
from slm_swap.scoring.replies import InvalidReply, parse_calls
from slm_swap.scoring.tracks import TRACKS

STAGE, MADE_BY = "cascade", "03_compare/calibrate.py"
CLASSES = {"structured": ("value",), "toolcall": ("call", "no_call")}  # of a small model's replies: each has a signal and a threshold of its own
GUARANTEES = ("regret", "agreement")
IDENTITY = ("files_sha256", "path", "precision", "products", "engine", "ask", "thinking", "constrain", "max_new_tokens", "few_shot_sha256", "shots")

_CANONICAL = ExactEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True)
class Rule:
    """A class' rule: answer locally where `signal` is at least `threshold` (None: never)."""

    signal: str
    threshold: float | None


@dataclass(frozen=True)
class Cascade:
    """A cascade.json that was read: `rules` by class, `told` the whole file, `sha256` its hash. `prompts` is how many of its rows are
    `{prompt, completion}`, which are asked in another way than the conversations that come to an endpoint. `schemas` are `schema_hash` of the rows'
    schemas; None where the file does not say, as one of an earlier version."""

    path: Path
    sha256: str
    track: str
    rules: dict[str, Rule]
    identity: dict[str, Any]
    tools: dict[str, str] | None
    prompts: int
    told: dict[str, Any]
    schemas: frozenset[str | None] | None = None

    def local(self, kind: str, fit: bool, confidence: Mapping[str, Any] | None) -> tuple[bool, str]:
        """Whether a reply of the small model is the answer, and why: "local", "unfit", "no_confidence", "below_threshold", "class_never".

        `kind` is `kind_of` the reply, `fit` is `is_fit`, `confidence` what its client says of it.
        """
        rule = self.rules.get(kind)
        if rule is None or rule.threshold is None:
            return False, "class_never"
        if not fit:
            return False, "unfit"
        value = (confidence or {}).get(rule.signal)
        if value is None or not math.isfinite(value):
            return False, "no_confidence"
        return (True, "local") if value >= rule.threshold else (False, "below_threshold")

    def mismatches(self, identity: Mapping[str, Any]) -> list[str]:
        """Where a model that is loaded is not the one of the rule, a line each; `identity` is `identity_of` it."""
        return [
            f"{name} is {identity.get(name)!r}, and {self.identity.get(name)!r} was calibrated"
            for name in IDENTITY
            if identity.get(name) != self.identity.get(name)
        ]


def kind_of(track: str, text: str, calls: list[dict[str, str]] | None = None) -> str:
    """The class of a small model's reply, one of CLASSES; `calls` are a native reply's. A call that cannot be read is one too."""
    if track == "structured":
        return "value"
    try:
        made = calls if calls is not None else parse_calls(text)
    except InvalidReply:
        return "call"
    return "call" if made else "no_call"


def is_fit(finish_reason: str | None, parses: bool | None, keeps_schema: bool | None) -> bool:
    """Whether a reply may be answered locally at all: it ended by itself, parses, and breaks no schema. Without a schema (`keeps_schema` is
    None) there is none to break. `parses` and `keeps_schema` are those of `scoring.form`: a call of a tool that is not on offer does not parse."""
    return finish_reason == "stop" and parses is True and keeps_schema is not False


def tool_hash(tool: Mapping[str, Any]) -> str:
    """The sha256 of a tool's definition (`name`, `description`, `parameters`), the order of its keys being nothing."""
    definition = {name: tool.get(name) for name in ("name", "description", "parameters")}
    return hashlib.sha256(_CANONICAL.encode(definition).encode()).hexdigest()


def schema_hash(schema: Mapping[str, Any] | None) -> str | None:
    """The sha256 of a wanted value's JSON Schema, the order of its keys being nothing; None where none is wanted."""
    return None if schema is None else hashlib.sha256(_CANONICAL.encode(schema).encode()).hexdigest()


def identity_of(
    model: Mapping[str, Any],
    ask: str | None,
    constrain: str | None,
    max_new_tokens: int | None,
    few_shot_sha256: str | None = None,
    shots: int | None = None,
) -> dict[str, Any]:
    """What a rule holds for: a local model as `Client.describe` tells it, and how it is asked. `ask` is "native", "text" or "mixed";
    `few_shot_sha256` is the hash of the file whose rows are shown as examples, `shots` how many of them."""
    return {
        "files_sha256": model.get("files_sha256"),
        "path": model.get("path") if model.get("engine") == "served" else None,
        "precision": model.get("precision"),
        "products": model.get("products"),
        "engine": model.get("engine"),
        "ask": ask,
        "thinking": model.get("thinking"),
        "constrain": constrain or "off",
        "max_new_tokens": max_new_tokens,
        "few_shot_sha256": few_shot_sha256,
        "shots": shots if few_shot_sha256 else None,
    }


def identity_of_report(report: Mapping[str, Any]) -> dict[str, Any]:
    """`identity_of` the small model of an evaluation's report."""
    model, args, inputs = (part if isinstance(part := report.get(name), dict) else {} for name in ("model", "args", "inputs"))
    shown = inputs["few_shot"] if isinstance(inputs.get("few_shot"), dict) else {}
    return identity_of(model, report.get("ask"), args.get("constrain"), args.get("max_new_tokens"), shown.get("sha256"), shown.get("shots"))


def write_cascade(path: Path, told: Mapping[str, Any]) -> None:
    """Write what `calibration.calibrate` found as a cascade.json.

    Raises:
        UserError: as `write_json`.
    """
    write_json(path, {"schema_version": SCHEMA_VERSION, "stage": STAGE, "created_at": now(), "code": code_version()} | dict(told))


def read_cascade(path: Path) -> Cascade:
    """A cascade.json.

    Raises:
        UserError: no such file, or no cascade of this version.
    """
    told, shown = read_json(path, MADE_BY), shown_path(path)
    try:
        if told["stage"] != STAGE or told["schema_version"] != SCHEMA_VERSION or told["track"] not in TRACKS or told["guarantee"] not in GUARANTEES:
            raise ValueError
        rules = {kind: _rule(told["rules"][kind]) for kind in CLASSES[told["track"]]}
        tools, schemas = told["tools"], told.get("schemas")
        if not all(_is_share(value) for value in (told["share_local"], told["delta"], told["alpha"], told["regret"]["seen"], told["regret"]["bound"])):
            raise ValueError
        if type(told["prompts"]) is not int or not isinstance(told["identity"], dict) or not (tools is None or all(isinstance(value, str) for value in tools.values())):
            raise ValueError
        if not (schemas is None or (isinstance(schemas, list) and all(value is None or isinstance(value, str) for value in schemas))):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{shown} is no cascade of this version: make it with {MADE_BY}") from None
    known = None if schemas is None else frozenset(schemas)
    return Cascade(path, sha256_file(path), told["track"], rules, told["identity"], tools, told["prompts"], told, known)


def beside_verdict(path: Path, track: str, hosted: str, slm: Mapping[str, Any], required: bool) -> dict[str, Any] | None:
    """What a decision says of a cascade: the decision's `cascade`. None where it is of other models than the reports compared, and not `required`.

    Args:
        hosted: the hosted model's label.
        slm: the small model's report.

    Raises:
        UserError: as `read_cascade`; or it is `required`, and of other models.
    """
    found = read_cascade(path)
    differences = found.mismatches(identity_of_report(slm))
    if found.track != track:
        differences.insert(0, f"track is {track!r}, and {found.track!r} was calibrated")
    if found.told.get("hosted") != hosted:
        differences.append(f"the hosted model is {hosted!r}, and {found.told.get('hosted')!r} was calibrated")
    if differences and not required:
        return None
    if differences:
        raise UserError(f"{shown_path(path)} is of other models than these reports: {differences[0]}: calibrate again with {MADE_BY}, or leave --cascade out")
    kept = ("guarantee", "share_local", "delta", "alpha", "regret")
    return {"path": display_path(path), "sha256": found.sha256} | {name: found.told[name] for name in kept}


def _rule(told: Mapping[str, Any]) -> Rule:
    threshold = told["threshold"]
    number = isinstance(threshold, int | float) and not isinstance(threshold, bool) and math.isfinite(threshold)
    if told["signal"] not in SIGNALS or not (threshold is None or number):
        raise ValueError
    return Rule(told["signal"], threshold)


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
