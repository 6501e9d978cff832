"""The evaluations that a comparison reads: reports with their rows, and whether they answer the same question."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_swap.common.errors import UserError
from slm_swap.common.reports import read_json, rows_path, sha256_file
from slm_swap.common.settings import display_path, find_path, shown_path
from slm_swap.rows.lines import read_jsonl
from slm_swap.scoring.metrics import ERRORS, MATCHERS, InvalidReply
from slm_swap.scoring.several import TOOLS_BETWEEN
from slm_swap.scoring.tracks import Track
from slm_swap.verdict.confidence import is_confidence
from slm_swap.verdict.decision import Values

MADE_BY = "01_eval/eval.py"
NO_CALL = "no call due"  # stands for the tool of rows in which none is to be called
SIMULATOR = "azure-simulator"  # what the model of demo/azure_simulator.py calls itself
QUESTIONS = ("these", "others")  # what a verdict is about: the tools of the rows, or other tools like them


@dataclass(frozen=True)
class Evaluation:
    """A report of `01_eval/eval.py` and, where they were asked for, its rows."""

    path: Path
    report: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def label(self) -> str:
        """The model's short name: deployment or folder, and its adapter."""
        model = model_of(self.report)
        path = Path(str(model.get("path") or "?"))
        # a file of replies has an ending, a model's name may have a point: Qwen3-0.6B
        name = str(model.get("deployment") or (path.name if model.get("kind") == "slm" else path.stem))
        adapter = model.get("adapter")
        path = adapter.get("path") if isinstance(adapter, dict) else adapter
        return f"{name} + {Path(path).name}" if path else name

    def files(self) -> dict[str, Any]:
        """Which files these are, as the decision records them."""
        told = {"path": display_path(self.path), "sha256": sha256_file(self.path), "rows_path": None, "rows_sha256": None}
        few_shot = self.report["inputs"].get("few_shot") or {}
        told |= {"ask": self.report.get("ask"), "shots": few_shot.get("shots")}
        if self.rows:
            rows = rows_path(self.path)
            told |= {"rows_path": display_path(rows), "rows_sha256": sha256_file(rows)}
        return told


def model_of(report: dict[str, Any]) -> dict[str, Any]:
    """What a report says of its model; empty where it says nothing."""
    return report["model"] if isinstance(report.get("model"), dict) else {}


def is_simulated(model: dict[str, Any]) -> bool:
    """Whether the demo's simulator answered for a report's `model`: its numbers are no real model's."""
    return SIMULATOR in (model.get("served_model") or [])


def read_evaluation(path: str | Path, track: Track, with_rows: bool) -> Evaluation:
    """A report with every gate metric, and its rows if they are asked for.

    Raises:
        UserError: not such a report, of another track, or rows that are not the report's.
    """
    found = find_path(path)
    report = read_json(found, MADE_BY)
    shown = shown_path(found)
    if report.get("stage") not in (None, "eval") or not isinstance(report.get("metrics"), dict):
        raise UserError(f"{shown} is not a report of {MADE_BY}: make one with it")
    if report.get("track") != track.title:
        raise UserError(
            f"{shown} is of track {report.get('track')!r}, not {track.title}: give reports of the same track as --track"
        )
    track = track.with_metrics(report["metrics"])
    missing = [name for name in track.gate if not _is_share(report["metrics"].get(name))]
    if missing:
        raise UserError(f"{shown} has no usable {', '.join(missing)} among its metrics: make it again with {MADE_BY}")
    return Evaluation(found, report, _read_rows(found, report, track) if with_rows else [])


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def _read_rows(path: Path, report: dict[str, Any], track: Track) -> list[dict[str, Any]]:
    rows_file = rows_path(path)
    if not rows_file.is_file():
        raise UserError(
            f"no {shown_path(rows_file)} beside its report: put it there, or decide on the means alone by --rule point"
        )
    rows, metrics_of_rows, yes_no = [], tuple(track.row_names.values()), track.yes_no
    for where, row in read_jsonl(rows_file):
        if not _is_row(row, metrics_of_rows, yes_no, track.exact):
            raise UserError(f"{where}: not a row as {MADE_BY} writes them: make report and rows again with it")
        rows.append({"group": None, "error": None} | row)
    told = f"{shown_path(rows_file)} does not match its report"
    if len({row["id"] for row in rows}) != len(rows):
        raise UserError(f"{told}: an id occurs twice; make both again with {MADE_BY}")
    expected = report["inputs"].get("rows") if isinstance(report.get("inputs"), dict) else None
    if len(rows) != expected or not rows:
        raise UserError(f"{told}: {len(rows)} rows for {expected}; make both again with {MADE_BY}")
    by_matcher = report["metrics_by_matcher"] if isinstance(report.get("metrics_by_matcher"), dict) else {}
    for matcher in MATCHERS:
        metrics = report["metrics"] if matcher == "strict" else by_matcher.get(matcher, {})
        for name, values in values_of(rows, track, matcher).items():
            if not _is_share(metrics.get(name)) or abs(sum(values) / len(values) - metrics[name]) > 1e-6:
                raise UserError(f"{told}: another mean of {name} ({matcher}); make both again with {MADE_BY}")
    return rows


def _is_row(row: Any, names: Sequence[str], yes_no: Sequence[str], exact: str) -> bool:
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("id", "reply", "reference")):
        return False
    if row.get("error") not in (None, *ERRORS) or not isinstance(row.get("group"), (str, type(None))):
        return False
    scores = row.get("scores_by_matcher")
    if not isinstance(scores, dict) or not all(isinstance(scores.get(matcher), dict) for matcher in MATCHERS):
        return False
    if not is_confidence(row):
        return False
    if (row.get("error") is None) != (scores["strict"].get(exact) == 1):  # what went wrong adds up to the misses
        return False
    return all(
        _is_share(value := scores[matcher].get(name)) and (name not in yes_no or value in (0, 1))
        for matcher in MATCHERS
        for name in names
    )


NAMED = {"azure": "hosted", "slm": "small"}  # kinds of models, in messages
ASKED = {"text": "as text", "native": "natively (tools, response_format)", "mixed": "some as text and some natively"}


def require_same(azure: Evaluation, other: Evaluation) -> list[str]:
    """Refuse evaluations that do not answer the same question; gives what is not known, for a warning.

    Raises:
        UserError: other rows or other prompts, or fewer than two rows.
    """
    inputs = [given if isinstance(given := side.report.get("inputs"), dict) else {} for side in (azure, other)]
    # The rows' own hash where both have it: two files of recorded replies hold the same rows and differ all the same.
    key = "rows_sha256" if all(given.get("rows_sha256") for given in inputs) else "sha256"
    if any(not given.get(key) for given in inputs):
        raise UserError(f"a report does not say which data it is of (inputs.sha256): make it again with {MADE_BY}")
    if inputs[0][key] != inputs[1][key] or inputs[0].get("rows") != inputs[1].get("rows"):
        told = " and ".join(f"{given.get('path')!r} ({given.get('rows')!r} rows)" for given in inputs)
        changed = ", whose rows have changed in between" if inputs[0].get("path") == inputs[1].get("path") else ""
        raise UserError(f"the reports are of different data, {told}{changed}: evaluate both models on the same rows")
    if not isinstance(inputs[0].get("rows"), int) or inputs[0]["rows"] < 2:
        raise UserError(
            f"the reports are of {inputs[0].get('rows')!r} rows: a comparison needs at least 2, and a verdict some hundreds"
        )
    if azure.rows and other.rows:
        theirs = {row["id"]: row for row in other.rows}
        for row in azure.rows:
            twin = theirs.get(row["id"])
            if twin is None or any(row.get(name) != twin.get(name) for name in ("reference", "prompt_sha256", "group")):
                raise UserError(
                    f"{shown_path(rows_path(azure.path))} and {shown_path(rows_path(other.path))} hold different rows "
                    f"(first: id {row['id']!r}): evaluate both models on the same rows"
                )
    prompts = [side.report.get("prompt_sha256") for side in (azure, other)]
    if None in prompts:
        return ["what a replayed model was asked is not recorded: whether both got the same prompts is not known"]
    kinds = [model_of(side.report).get("kind") for side in (azure, other)]
    asks = [side.report.get("ask") for side in (azure, other)]
    if asks[0] != asks[1] and None not in asks and key == "rows_sha256":
        names = [f"the {NAMED.get(kind, kind)} model {ASKED.get(ask, ask)}" for kind, ask in zip(kinds, asks, strict=True)]
        return [f"the same rows were asked in two forms: {' and '.join(names)}"]
    shown = [((side.report.get("inputs") or {}).get("few_shot") or {}).get("shots", 0) for side in (azure, other)]
    if shown[0] != shown[1] and key == "rows_sha256":
        told = (f"the {NAMED.get(kind, kind)} model {count}" for kind, count in zip(kinds, shown, strict=True))
        return [f"the same rows were asked with another number of examples in front (--few-shot): {', '.join(told)}"]
    if prompts[0] != prompts[1]:
        raise UserError("the reports are of different prompts: evaluate both models with the same version of the code")
    return []


def fit_together(sides: dict[str, Evaluation], sequential: bool, question: str) -> list[str]:
    """Refuse evaluations (`azure`, `slm`, perhaps `before`) that no verdict can be made of; gives what to be warned of.

    Raises:
        UserError: as `require_same` and `require_same_base`; a model stands on the wrong side, or against itself; or a run was stopped
            early, and the rule or the question is another one.
    """
    kinds = {name: model_of(side.report).get("kind") for name, side in sides.items()}
    if kinds["azure"] == "slm":  # the difference, and so the verdict, would be the wrong way round
        raise UserError("the --azure report is of a local model (model.kind is slm): give it as --slm, and the hosted one here")
    if kinds.get("before") == "azure":
        raise UserError("the --before report is of a hosted model (model.kind is azure): give the small model's before fine-tuning")
    names = list(sides)
    for at, left in enumerate(names):
        for right in names[at + 1 :]:
            if sides[left].report == sides[right].report:
                raise UserError(f"--{left} and --{right} are the same report: a model cannot be compared with itself")
    if "before" in sides:
        require_same_base(sides["before"], sides["slm"])
    warnings: list[str] = []
    for side in list(sides.values())[1:]:
        warnings += [text for text in require_same(sides["azure"], side) if text not in warnings]
    if kinds["slm"] == "azure":
        warnings.append("the --slm report is of a hosted model (model.kind is azure)")
    limits = {name: limit for name, side in sides.items() if (limit := token_limit(side.report)) is not None}
    cut = any(row.get("finish_reason") == "length" for side in sides.values() for row in side.rows)
    if len(set(limits.values())) > 1 and (cut or not sides["azure"].rows):  # a limit that cuts nothing changes nothing
        told = ", ".join(f"{name} {limit}" for name, limit in limits.items())
        warnings.append(f"the reports were made with different --max-new-tokens ({told}): a part of the gap may come from that")
    for side in sides.values():
        stopped, shown = side.report.get("stopped_early"), shown_path(side.path)
        if stopped and not sequential:
            raise UserError(
                f"{shown} was stopped as soon as its verdict was certain (live_compare.py --stop-early): only --sequential holds for such rows"
            )
        if stopped and (drawn := stopped.get("tools", "these")) != question:
            raise UserError(f"{shown} was stopped early for the question --tools {drawn}: pass --tools {drawn}")
    return warnings


def base_weights(report: dict[str, Any]) -> str | None:
    """The hash of the weights under a local model's training: those below its adapter, those that a merged model was trained on, or its
    own where it was not trained here; None where the report does not say."""
    model = model_of(report)
    files = model.get("files_sha256")
    own = files[0] if isinstance(files, list) and files else None
    return own if model.get("adapter") else model.get("trained_on_sha256") or own


def require_same_base(before: Evaluation, after: Evaluation) -> None:
    """Refuse, as what was gained by fine-tuning, the difference between a tuned model and other weights than it was trained on.

    Raises:
        UserError: both reports say which weights, and they are not the same.
    """
    model = model_of(after.report)
    weights = [base_weights(side.report) for side in (before, after)]
    if (model.get("adapter") or model.get("trained_on_sha256")) and None not in weights and weights[0] != weights[1]:
        raise UserError(
            f"the --before report is of other weights ({before.label}) than those that {after.label} was trained on, so their difference is not "
            f"what training gained: evaluate its own base with {MADE_BY}, or leave --before out"
        )


def token_limit(report: dict[str, Any]) -> int | None:
    """The limit on new tokens that a report was made with."""
    given = model_of(report).get("parameters")
    limits = [given.get(name) for name in ("max_new_tokens", "max_completion_tokens", "max_tokens")] if isinstance(given, dict) else []
    return next((limit for limit in limits if isinstance(limit, int)), None)


def aligned(rows: list[dict[str, Any]], like: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows in the order of others with the same ids."""
    by_id = {row["id"]: row for row in rows}
    return [by_id[row["id"]] for row in like]


def values_of(rows: Sequence[dict[str, Any]], track: Track, matcher: str = "strict") -> Values:
    """Each gate metric's value on each row."""
    return {name: [float(row["scores_by_matcher"][matcher][key]) for row in rows] for name, key in track.row_names.items()}


def cluster_labels(rows: Sequence[dict[str, Any]], track: Track, by: str) -> list[str] | None:
    """The cluster of each row: its `group`, or its reference's tool; a row without one is alone. None where every row is alone."""
    names = [tool_of(row, track) if by == "tool" else row["group"] for row in rows]
    if not any(names):
        return None
    if by == "tool" and track.name:  # a row in which no call is due says nothing of any one tool
        names = [name or NO_CALL for name in names]
    return [f"={name}" if name else f"#{row['id']}" for name, row in zip(names, rows, strict=True)]


def groups_are_tools(rows: Sequence[dict[str, Any]], track: Track) -> bool:
    """Whether every row's `group` is its tool's name, as earlier importers wrote it: no thing that rows come from."""
    return any(row["group"] for row in rows) and all(row["group"] in (None, tool_of(row, track)) for row in rows)


def units(rows: Sequence[dict[str, Any]], track: Track, question: str) -> tuple[str, list[str] | None]:
    """(by, labels) of the independent units of a question: for these tools the row, or the `group` where rows have one; for other
    tools the tool."""
    if question == "others":
        by, labels = "tool", _joined(cluster_labels(rows, track, "tool"))
    else:
        by, labels = "group", None if groups_are_tools(rows, track) else cluster_labels(rows, track, "group")
    return (by, labels) if labels else ("row", None)


def _joined(labels: list[str] | None) -> list[str] | None:
    """Tools that are called together in one row are one unit, and so are those that hang together by others."""
    if labels is None or not any(TOOLS_BETWEEN in label for label in labels):
        return labels
    root: dict[str, str] = {}

    def find(name: str) -> str:
        while (above := root.setdefault(name, name)) != name:
            name = above
        return name

    for label in dict.fromkeys(labels):
        first, *others = label[1:].split(TOOLS_BETWEEN)
        for other in others:
            root[find(other)] = find(first)
    return [f"={find(label[1:].split(TOOLS_BETWEEN)[0])}" for label in labels]


def tools_of(rows: Sequence[dict[str, Any]], track: Track) -> set[str]:
    """The tools that the references call."""
    return {name for row in rows for name in (tool_of(row, track) or "").split(TOOLS_BETWEEN) if name}


def require_tools(labels: Sequence[str] | None, question: str) -> None:
    """Refuse the question about other tools where the rows have none, `labels` being its units.

    Raises:
        UserError: so.
    """
    if question == "others" and not labels:
        raise UserError("no row names a tool, so there is nothing to ask of other tools: leave --tools out")


def tool_of(row: dict[str, Any], track: Track) -> str | None:
    """The tool that a row's reference calls; several with TOOLS_BETWEEN them."""
    if isinstance(row.get("tool"), str):
        return row["tool"]
    try:
        parsed = track.parse_reference(row["reference"])
    except InvalidReply:  # no reference that an evaluation takes: somebody changed the rows file
        return None
    name = parsed.name or (parsed.value.get("tool_name") if isinstance(parsed.value, dict) else None)
    return name if isinstance(name, str) else None


def shown_tool(row: dict[str, Any], track: Track) -> str:
    """The tool as tables show it: rows whose reference calls none stand together."""
    return tool_of(row, track) or (NO_CALL if track.name else "no tool named")
