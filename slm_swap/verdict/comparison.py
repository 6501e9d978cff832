"""The evidence behind a verdict: both models' rows side by side, where the gap comes from, for which tools, and what was gained."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_swap.clients.pricing import Prices, compare_costs, row_cost
from slm_swap.common.errors import UserError
from slm_swap.common.reports import read_json, rows_path, sha256_file
from slm_swap.common.settings import display_path, find_path
from slm_swap.rows.examples import read_jsonl
from slm_swap.scoring.metrics import ERRORS, MATCHERS, InvalidReply, same
from slm_swap.scoring.tracks import Track
from slm_swap.verdict.decision import (
    FINE_TUNE,
    MIN_CLUSTERS,
    SWAP,
    Decision,
    Values,
    paired_decision,
    point_decision,
    sequential_decision,
)

MADE_BY = "01_eval/eval.py"
CLUSTERS = ("group", "tool", "row")
EVIDENCE = ("matchers", "flips", "gap", "groups", "gold_audit", "before", "cost", "sequential")  # what only rows can show

KINDS = {  # what went wrong, and the errors of metrics.ERRORS that say so
    "format": ("no_json", "bad_json", "extra_text", "wrong_shape"),
    "wrong_tool": ("wrong_tool",),
    "missing": ("missing_argument",),
    "extra": ("extra_argument",),
    "type": ("wrong_type",),
    "value": ("wrong_value",),
    "truncated": ("truncated",),
    "filtered": ("filtered", "refused"),
    "failed": (),  # a request that was never answered, whatever its error
}
REMEDIES = (  # the cheapest first: what, which errors it would close, and the matcher that says what is right already but for that
    ("evaluate again: requests failed", ("failed",), None),
    ("a larger --max-new-tokens", ("truncated",), None),
    ("the prompt, or the model's native tool format", ("extra_text", "wrong_shape"), "lenient"),
    ("constrained decoding by the JSON Schema", ("no_json", "bad_json", "wrong_type"), "schema"),
    ("a few examples in the prompt (few-shot)", ("wrong_tool", "missing_argument", "extra_argument"), "schema"),
    ("the content filter's settings, or those rows to the other model", ("filtered", "refused"), None),
    ("fine-tuning", ("wrong_value",), "schema"),
)
FINE_TUNING = REMEDIES[-1][0]
ANSWERS = {"wrong_tool", "missing_argument", "extra_argument", "wrong_type", "wrong_value"}  # whole replies that miss the reference


# -- Reading ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """A report of `01_eval/eval.py` and, where they were asked for, its rows."""

    path: Path
    report: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def label(self) -> str:
        """The model's short name: deployment or folder, and its adapter."""
        model = self.report.get("model") if isinstance(self.report.get("model"), dict) else {}
        name = str(model.get("deployment") or Path(str(model.get("path") or "?")).stem)
        adapter = model.get("adapter")
        path = adapter.get("path") if isinstance(adapter, dict) else adapter
        return f"{name} + {Path(path).name}" if path else name

    def files(self) -> dict[str, Any]:
        """Which files these are, as the decision records them."""
        told = {"path": display_path(self.path), "sha256": sha256_file(self.path), "rows_path": None, "rows_sha256": None}
        if self.rows:
            rows = rows_path(self.path)
            told |= {"rows_path": display_path(rows), "rows_sha256": sha256_file(rows)}
        return told


def read_evaluation(path: str | Path, track: Track, with_rows: bool) -> Evaluation:
    """A report with every gate metric, and its rows if they are asked for.

    Raises:
        UserError: not such a report, of another track, or rows that are not the report's.
    """
    found = find_path(path)
    report = read_json(found, MADE_BY)
    shown = display_path(found)
    if report.get("stage") not in (None, "eval") or not isinstance(report.get("metrics"), dict):
        raise UserError(f"{shown} is not a report of {MADE_BY}: make one with it")
    if report.get("track") != track.title:
        raise UserError(f"{shown} is of track {report.get('track')!r}, not {track.title}: give reports of the same track as --track")
    missing = [name for name in track.gate if not _is_share(report["metrics"].get(name))]
    if missing:
        raise UserError(f"{shown} has no usable {', '.join(missing)} among its metrics: make it again with {MADE_BY}")
    return Evaluation(found, report, _read_rows(found, report, track) if with_rows else [])


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def _read_rows(path: Path, report: dict[str, Any], track: Track) -> list[dict[str, Any]]:
    rows_file = rows_path(path)
    if not rows_file.is_file():
        raise UserError(f"no {display_path(rows_file)} beside its report: put it there, or decide on the means alone by --rule point")
    rows, metrics_of_rows, yes_no = [], tuple(track.row_names.values()), track.yes_no
    for where, row in read_jsonl(rows_file):
        if not _is_row(row, metrics_of_rows, yes_no, track.exact):
            raise UserError(f"{where}: not a row as {MADE_BY} writes them: make report and rows again with it")
        rows.append({"group": None, "error": None} | row)
    told = f"{display_path(rows_file)} does not match its report"
    if len({row["id"] for row in rows}) != len(rows):
        raise UserError(f"{told}: an id stands there twice; make both again with {MADE_BY}")
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
    if (row.get("error") is None) != (scores["strict"].get(exact) == 1):  # what went wrong adds up to the misses
        return False
    return all(
        _is_share(value := scores[matcher].get(name)) and (name not in yes_no or value in (0, 1))
        for matcher in MATCHERS
        for name in names
    )


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
        raise UserError(f"the reports are of different data, {told}: evaluate both models on the same rows")
    if not isinstance(inputs[0].get("rows"), int) or inputs[0]["rows"] < 2:
        raise UserError(f"the reports are of {inputs[0].get('rows')!r} rows: a comparison needs at least 2, and a verdict some hundreds")
    if azure.rows and other.rows:
        theirs = {row["id"]: row for row in other.rows}
        for row in azure.rows:
            twin = theirs.get(row["id"])
            if twin is None or any(row.get(name) != twin.get(name) for name in ("reference", "prompt_sha256", "group")):
                raise UserError(
                    f"{display_path(rows_path(azure.path))} and {display_path(rows_path(other.path))} hold different rows "
                    f"(first: id {row['id']!r}): evaluate both models on the same rows"
                )
    prompts = [side.report.get("prompt_sha256") for side in (azure, other)]
    if None in prompts:
        return ["what a replayed model was asked is not recorded: whether both got the same prompts is not known"]
    if prompts[0] != prompts[1]:
        raise UserError("the reports are of different prompts: evaluate both models with the same version of the code")
    return []


def aligned(rows: list[dict[str, Any]], like: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows in the order of others with the same ids."""
    by_id = {row["id"]: row for row in rows}
    return [by_id[row["id"]] for row in like]


def values_of(rows: Sequence[dict[str, Any]], track: Track, matcher: str = "strict") -> Values:
    """Each gate metric's value on each row."""
    return {name: [float(row["scores_by_matcher"][matcher][key]) for row in rows] for name, key in track.row_names.items()}


def cluster_labels(rows: Sequence[dict[str, Any]], track: Track, by: str) -> list[str] | None:
    """The cluster of each row: its `group` or its reference's tool; a row without one is alone. None where every row is alone."""
    if by == "row":
        return None
    names = [row["group"] if by == "group" else _tool(track, row["reference"]) for row in rows]
    if not any(names):
        return None
    return [f"={name}" if name else f"#{row['id']}" for name, row in zip(names, rows, strict=True)]


def _tool(track: Track, reference: str) -> str | None:
    try:
        parsed = track.parse_reference(reference)
    except InvalidReply:  # no reference that an evaluation takes: somebody changed the rows file
        return None
    name = parsed.name or (parsed.value.get("tool_name") if isinstance(parsed.value, dict) else None)
    return name if isinstance(name, str) else None


# -- Where the gap comes from ----------------------------------------------------------------------------------------------------


def gap(azure: Sequence[dict], slm: Sequence[dict], track: Track) -> dict[str, Any]:
    """The difference in the exact metric split by what went wrong: each row has one error or none, so the parts add up to it.

    A remedy could gain at most the rows that miss so, were all of them right afterwards. `gain_measured` is what a looser matcher
    finds right already: rows that only the format, a convertible type or an acceptable value keeps from being exact.
    """
    counts = {"azure": Counter(map(_kind, azure)), "slm": Counter(map(_kind, slm))}
    n = len(azure)
    rates = {side: {kind: count[kind] / n for kind in KINDS} for side, count in counts.items()}
    exact = {side: (n - sum(count[kind] for kind in KINDS)) / n for side, count in counts.items()}
    remedies = []
    for remedy, errors, matcher in REMEDIES:
        rows = [row for row in slm if _error(row) in errors]
        if rows:
            already = matcher and sum(row["scores_by_matcher"][matcher][track.exact] for row in rows) / n
            kinds = [kind for kind in KINDS if any(_kind(row) == kind for row in rows)]
            remedies.append(
                {"remedy": remedy, "kinds": kinds, "rows": len(rows), "gain_at_most": len(rows) / n, "gain_measured": already}
            )
    return {
        "metric": track.exact_gate,
        **exact,
        "difference": exact["azure"] - exact["slm"],
        "errors": [
            {
                "kind": kind, "azure": rates["azure"][kind], "slm": rates["slm"][kind],
                "difference": rates["slm"][kind] - rates["azure"][kind],
                "azure_rows": counts["azure"][kind], "slm_rows": counts["slm"][kind],
            }
            for kind in KINDS
        ],
        "remedies": remedies,
    }  # fmt: skip


def _error(row: dict) -> str | None:
    return "failed" if row.get("finish_reason") == "error" else row["error"]


def _kind(row: dict) -> str | None:
    error = _error(row)
    return error and next((kind for kind, errors in KINDS.items() if error in errors), error)


def by_group(
    azure: Sequence[dict], slm: Sequence[dict], track: Track, by: Sequence[str], alpha: float
) -> dict[str, Any] | None:
    """Each group's or tool's difference in the exact metric, shrunk towards the mean where its rows are few; the worst first.

    `by` is group or tool, the first of them that the rows have; None where they have none.
    """
    from slm_swap.verdict.stats.shrink import shrink

    by, labels = next(((own, labels) for own in by if (labels := cluster_labels(azure, track, own))), (None, None))
    if not labels:
        return None
    members: dict[str, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        members[label].append(index)
    values = [[row["scores_by_matcher"]["strict"][track.exact] for row in rows] for rows in (azure, slm)]
    found = shrink([[values[0][i] - values[1][i] for i in indices] for indices in members.values()], alpha)
    groups = [
        {
            "group": label[1:],
            "rows": len(indices),
            "azure": sum(values[0][i] for i in indices) / len(indices),
            "slm": sum(values[1][i] for i in indices) / len(indices),
            "difference": estimate.raw,
            "shrunk": estimate.shrunk,
            "interval": [estimate.low, estimate.high],
        }
        for (label, indices), estimate in zip(members.items(), found.groups, strict=True)
    ]
    groups.sort(key=lambda group: (-group["shrunk"], group["group"]))
    return {"by": by, "metric": track.exact_gate, "mean": found.mean, "between_sd": found.between_sd, "all": groups}


def gold_audit(
    azure: Sequence[dict], slm: Sequence[dict], track: Track, decide: Callable[[list[int]], Decision | None]
) -> dict[str, Any]:
    """Rows on which both models agree with each other and not with the reference: perhaps the reference is wrong.

    `decide` gives the decision on the rows at some indices, None where they are too few. Leaving such rows out hides
    misses that both models share, so the verdict on all rows stays the verdict.
    """
    doubtful = [index for index, pair in enumerate(zip(azure, slm, strict=True)) if _agree(track, *pair)]
    left = sorted(set(range(len(azure))) - set(doubtful))
    without = decide(left) if doubtful and len(left) > 1 else None
    return {
        "rows": [{name: azure[index][name] for name in ("id", "group", "reference", "reply")} for index in doubtful],
        "count": len(doubtful),
        "verdict_without": without and without.verdict,
        "metrics_without": without and without.metrics,
    }


def _agree(track: Track, left: dict, right: dict) -> bool:
    if not {left["error"], right["error"]} <= ANSWERS:
        return False
    try:
        parsed = [track.parse(row["reply"]) for row in (left, right)]
    except InvalidReply:
        return False
    return parsed[0].name == parsed[1].name and same(parsed[0].value, parsed[1].value)


def gains(
    before: Sequence[dict], slm: Sequence[dict], track: Track, alpha: float, labels: Sequence[str] | None
) -> dict[str, Any]:
    """What fine-tuning changed: each gate metric's gain (slm - before) with its interval of level 1 - 2 alpha, and a one-sided
    p-value of "no gain"; the rows that were right before and are not now, and the other way round."""
    from slm_swap.verdict.decision import differences
    from slm_swap.verdict.stats.score import interval, p_above

    old, new = values_of(before, track), values_of(slm, track)
    yes_no = [name for name, key in track.row_names.items() if key in track.yes_no]
    metrics = {
        name: {
            "before": sum(old[name]) / len(before), "slm": sum(new[name]) / len(slm), "gain": sample.mean,
            "interval": list(interval(sample, alpha)), "p_value": p_above(sample, 0.0),
        }
        for name, sample in differences(new, old, yes_no, labels).items()
    }  # fmt: skip
    was, now = old[track.exact_gate], new[track.exact_gate]
    ids = [row["id"] for row in slm]
    return {
        "metrics": metrics,
        "metric": track.exact_gate,
        "worse": [name for name, left, right in zip(ids, was, now, strict=True) if left > right],
        "better": [name for name, left, right in zip(ids, was, now, strict=True) if left < right],
    }


# -- All of it -------------------------------------------------------------------------------------------------------------------


def examine(
    track: Track, sides: dict[str, Evaluation], rule: str, delta: float, alpha: float, cluster: str, prices: Prices
) -> dict[str, Any]:
    """The decision on two evaluations (`azure`, `slm`; perhaps `before`) with all of its evidence, as the decision file holds it.

    `rule` is paired or sequential, `cluster` one of CLUSTERS; slm_swap/README.md describes every key.
    """
    azure, slm = sides["azure"], sides["slm"]
    rows = {name: aligned(side.rows, azure.rows) for name, side in sides.items()}
    labels = cluster_labels(azure.rows, track, cluster)
    yes_no = [name for name, key in track.row_names.items() if key in track.yes_no]
    stopped = azure.report.get("stopped_early") or slm.report.get("stopped_early")

    def decide(matcher: str = "strict", some: Sequence[int] | None = None) -> Decision:
        some = range(len(azure.rows)) if some is None else some
        values = [values_of([rows[name][i] for i in some], track, matcher) for name in ("azure", "slm")]
        own = labels and [labels[i] for i in some]
        if rule == "paired":
            return paired_decision(*values, yes_no, delta, alpha, own)
        return sequential_decision(*values, yes_no, delta, alpha, own, in_order=bool(stopped), largest=(stopped or {}).get("largest_cluster"))

    by_matcher = {matcher: decide(matcher) for matcher in MATCHERS}
    decision, verdicts = by_matcher["strict"], {matcher: found.verdict for matcher, found in by_matcher.items()}
    flips = len(set(verdicts.values())) > 1
    warnings = []
    if flips:
        told = ", ".join(f"{matcher} {verdict}" for matcher, verdict in verdicts.items())
        warnings.append(f"the verdict depends on how replies are compared with references ({told}): look at the rows before you decide")
    if "before" in sides:
        warnings += run_otherwise(sides["before"].report, slm.report)
    if decision.need:
        decision.need.update(
            {f"{name}_cost": _cost_of(decision.need["rows"], row_cost(sides[name].report, prices)) for name in ("azure", "slm")}
        )
    model = slm.report.get("model") if isinstance(slm.report.get("model"), dict) else {}
    costs = compare_costs(azure.report, slm.report, prices, model.get("training_seconds"))
    found, split = decision.to_json(), gap(rows["azure"], rows["slm"], track)
    return found | {
        "sentence": sentence(decision, len(azure.rows), split["remedies"]),
        "clusters": {"by": cluster if labels else "row"} | found["clusters"],
        "matchers": {matcher: {"verdict": own.verdict, "metrics": own.metrics} for matcher, own in by_matcher.items()},
        "flips": flips,
        "gap": split,
        "groups": by_group(rows["azure"], rows["slm"], track, ("tool", "group") if cluster == "tool" else ("group", "tool"), alpha),
        "gold_audit": gold_audit(rows["azure"], rows["slm"], track, lambda some: decide(some=some)),
        "before": gains(rows["before"], rows["slm"], track, alpha, labels) if "before" in rows else None,
        "cost": costs,
        "sequential": _saved(decision, stopped, len(azure.rows), row_cost(azure.report, prices)) if rule == "sequential" else None,
        "warnings": warnings,
    }


def run_otherwise(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """A warning where two reports of the small model come from another engine or precision: the gain is not the training's alone."""
    models = [report.get("model") if isinstance(report.get("model"), dict) else {} for report in (before, after)]
    ways = [" in ".join(str(model[name]) for name in ("engine", "precision") if model.get(name)) for model in models]
    if not all(ways) or ways[0] == ways[1]:
        return []
    return [f"the small model was run by {ways[0]} before and by {ways[1]} now: a part of the gain may come from that (benchmarks/parity.py)"]


def examine_means(track: Track, sides: dict[str, Evaluation], delta: float) -> dict[str, Any]:
    """The decision by the point rule, as `examine` gives one; what rows would show is None."""
    azure, slm = sides["azure"].report, sides["slm"].report
    decision = point_decision(azure["metrics"], slm["metrics"], track.gate, delta)
    told = {"sentence": sentence(decision, azure["inputs"]["rows"]), "warnings": []}
    return decision.to_json() | dict.fromkeys(EVIDENCE) | told


def _cost_of(rows: int | None, each: float | None) -> float | None:
    return None if rows is None or each is None else rows * each


def _saved(decision: Decision, stopped: dict | None, rows: int, each: float | None) -> dict[str, Any]:
    """What stopping early saved, and after how many rows each metric (`certain_at`) and the verdict were certain."""
    available = stopped["rows_available"] if stopped else rows
    return {
        "stopped_after_rows": rows if stopped else None,
        "rows_available": available,
        "calls_saved": available - rows,
        "azure_cost_saved": _cost_of(available - rows, each),
        "certain_after_rows": decision.certain_after,
        "certain_at": {name: values["certain_at"] for name, values in decision.metrics.items()},
    }


# -- In words --------------------------------------------------------------------------------------------------------------------


def points(value: float) -> str:
    """A share as percentage points with one decimal."""
    return f"{100 * value:.1f}".replace("-0.0", "0.0")


def sentence(decision: Decision, rows: int, remedies: Sequence[dict] = ()) -> str:
    """The verdict for a person who decides: what was found, how sure it is, and what comes next (of `gap`'s remedies)."""
    margin = f"the margin of {points(decision.delta)} points"
    worst = max(decision.metrics, key=lambda name: decision.metrics[name]["difference"])
    if decision.alpha is None:
        gap = points(decision.metrics[worst]["difference"])
        compared = "more" if decision.fine_tune else "not more"
        return f"By the means of {rows} rows alone the largest gap ({worst}, {gap} points) is {compared} than {margin}."
    sure = f"{100 * (1 - decision.alpha):g}%"
    if decision.verdict == SWAP:
        bound = max(values["interval"][1] for values in decision.metrics.values())
        lost = f"loses at most {points(bound)} points" if bound > 0 else "is better"
        return f"The small model can take over: on {rows} rows it {lost} on every metric ({sure} sure), within {margin}."
    if decision.verdict == FINE_TUNE:
        name = decision.failing[0]
        low, high = decision.metrics[name]["interval"]
        gap = points(decision.metrics[name]["difference"])
        cheaper = [own for own in remedies if own["remedy"] != FINE_TUNING]
        best = max(cheaper, key=lambda own: own["gain_at_most"], default=None)
        first = f"First try what is cheaper: {best['remedy']} (at most {points(best['gain_at_most'])} points). Then fine" if best else "Fine"
        return (
            f"The small model is worse by more than {margin}: {name} is {gap} points lower "
            f"({points(low)} to {points(high)}) on {rows} rows. {first}-tune it, and measure again."
        )
    if decision.clusters["effective"] < MIN_CLUSTERS and decision.clusters["count"] < rows:
        return (
            f"{rows} rows in {decision.clusters['count']} groups do not settle it: a verdict for other groups than these needs at least "
            f"{MIN_CLUSTERS} (of even size). If these are all that there will ever be, decide by rows: --cluster row."
        )
    need = decision.need
    name = need["metric"]
    low, high = decision.metrics[name]["interval"]
    found = f"{rows} rows do not settle it: in {name} azure - slm is {points(low)} to {points(high)} points, too near {margin}."
    if decision.clusters["effective"] < MIN_CLUSTERS:
        found = f"{rows} rows are too few: SWAP takes at least {MIN_CLUSTERS}."
    if need["rows"] is None:
        return f"{found} No number of rows would: choose another margin, or fine-tune."
    return f"{found} About {need['rows']:,} further rows would settle it (towards {need['towards']}, with 80% power)."
