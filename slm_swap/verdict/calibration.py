"""From two evaluations on the same rows to the rule of a cascade: which replies of the small model may be given to the user."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slm_swap.clients.confidence import SIGNALS
from slm_swap.clients.pricing import Prices, compare_costs
from slm_swap.rows.conversations import unsaid
from slm_swap.rows.examples import Example
from slm_swap.scoring.measured import unmeasured
from slm_swap.scoring.replies import InvalidReply, native_calls, parse_calls
from slm_swap.scoring.several import answer
from slm_swap.scoring.tracks import Track
from slm_swap.verdict.cascade import CLASSES, identity_of_report, is_fit, kind_of, schema_hash, tool_hash
from slm_swap.verdict.comparison import speed
from slm_swap.verdict.confidence import signals_of
from slm_swap.verdict.evaluations import Evaluation, aligned, model_of, units
from slm_swap.verdict.stats.regret import LEAST_LOCAL, Rung, further_units, is_shown, loosest, rungs, told, upper_bound, wanted

DEFAULT_SIGNAL = "sum_logprob"
DISAGREEMENT_ALPHA = 0.05  # of the bound that watching tests against
POINTS = 200  # of a curve that is drawn
BINS = 20  # of a signal, in service


@dataclass(frozen=True)
class Target:
    """What is to be kept to: losses of at most `delta` of a class' units, with probability 1 - `alpha`. A loss is, by the `guarantee`, a
    local reply that is wrong where the hosted one is right ("regret"), or one that differs from it ("agreement")."""

    guarantee: str
    delta: float
    alpha: float


@dataclass(frozen=True)
class Reply:
    """A row of both evaluations: what matters of the small model's reply. `differs` from the hosted one, None where that was not measured."""

    kind: str
    fit: bool
    lost: bool
    differs: bool | None
    unit: int
    signals: dict[str, float | None]
    tools: tuple[str, ...]


@dataclass(frozen=True)
class Ladder:
    """A class with one signal: its `rungs`, and the one that keeps to the target (None: none does)."""

    rungs: list[Rung]
    chosen: Rung | None


# -- Rows ------------------------------------------------------------------------------------------------------------------------


def offered_tools(examples: Iterable[Example]) -> tuple[dict[str, str] | None, set[str]]:
    """(each tool that the rows offer with the hash of its definition, the ids of rows that offer one defined otherwise). Of several definitions
    the one that most rows have counts. None where no row says what it offers."""
    counts: dict[str, Counter[str]] = {}
    offers: list[tuple[str, list[tuple[str, str]]]] = []
    for example in examples:
        tools = [(str(tool.get("name")), tool_hash(tool)) for tool in example.tools or ()]
        offers.append((example.id, tools))
        for name, digest in tools:
            counts.setdefault(name, Counter())[digest] += 1
    usual = {name: found.most_common(1)[0][0] for name, found in sorted(counts.items())}
    return usual or None, {name for name, tools in offers if any(usual[tool] != digest for tool, digest in tools)}


def wanted_schemas(examples: Iterable[Example]) -> list[str | None]:
    """The hashes of the schemas that the rows want, each once; last None, where there are rows without one."""
    found = {schema_hash(example.schema) for example in examples}
    return sorted(found - {None}) + ([None] if None in found else [])


def replies(azure: Evaluation, slm: Evaluation, track: Track, guarantee: str, unusual: Iterable[str] = ()) -> list[Reply]:
    """The small model's replies beside the hosted one's. Rows whose small request failed say nothing of it and are left out; rows in
    `unusual` (ids) go to the hosted model, whatever is replied. A hosted reply that was not measured counts as right, and as another
    answer, wherever that is against the rule."""
    unusual, numbers, found = set(unusual), dict[str, int](), []
    labels = units(azure.rows, track, "these")[1] or [row["id"] for row in azure.rows]
    for hosted, small, label in zip(azure.rows, aligned(slm.rows, azure.rows), labels, strict=True):
        if unmeasured(small, hosted=False) == "failed":
            continue
        text = unsaid(small["reply"], small.get("calls"))
        fit = is_fit(small.get("finish_reason"), small.get("parses"), small.get("keeps_schema")) and small["id"] not in unusual
        measured = unmeasured(hosted, hosted=True) is None
        differs = fit and not same_answer(track.title, hosted, small)
        if guarantee == "agreement":
            lost = fit and (differs or not measured)
        else:
            lost = fit and small["error"] is not None and (hosted["error"] is None or not measured)
        signals = {name: signals_of(small)[name] for name in SIGNALS}
        made = called(text, small.get("calls")) if track.name else ()
        kind, unit = kind_of(track.title, text, small.get("calls")), numbers.setdefault(label, len(numbers))
        found.append(Reply(kind, fit, lost, differs if measured else None, unit, signals, made))
    return found


def same_answer(track: str, hosted: Mapping[str, Any], small: Mapping[str, Any]) -> bool:
    """Whether both rows' replies say the same, by value: the same calls or the same JSON, or both no call. One that the server withheld, or
    that is not well-formed, says something else."""
    if hosted.get("finish_reason") != "stop":
        return False
    try:
        one, other = (answer(track, unsaid(row["reply"], row.get("calls")), row.get("calls")) for row in (hosted, small))
    except ValueError:
        return False
    return one == other


def called(text: str, calls: list[dict[str, str]] | None) -> tuple[str, ...]:
    """The tools that a reply calls, each once."""
    try:
        made = parse_calls(text) if calls is None else native_calls(calls)
    except InvalidReply:
        return ()
    return tuple(dict.fromkeys(call.name or "" for call in made))


# -- Rules -----------------------------------------------------------------------------------------------------------------------


def tested(rows: Sequence[Reply], track: Track, target: Target) -> list[str]:
    """The classes among which alpha is shared: those with units enough to be certified at all. How many units a class has says nothing of
    its losses, so that it may be looked at first."""
    counts = {kind: count_units(rows, kind) for kind in CLASSES[track.title]}
    kinds = [kind for kind in sorted(counts, key=lambda kind: -counts[kind]) if counts[kind] >= LEAST_LOCAL]
    while kinds and not is_shown(0, counts[kinds[-1]], target.delta, target.alpha / len(kinds)):
        kinds.pop()
    return kinds


def count_units(rows: Sequence[Reply], kind: str) -> int:
    """The units with a row of a class."""
    return len({row.unit for row in rows if row.kind == kind})


def ladder(rows: Sequence[Reply], kind: str, signal: str, target: Target, alpha: float) -> Ladder:
    """A class with one of the signals; `alpha` is the class' share of it."""
    mine = [row for row in rows if row.kind == kind]
    able = [row for row in mine if row.fit and row.signals[signal] is not None]
    found = rungs([row.signals[signal] for row in able], [row.lost for row in able], [row.unit for row in able])
    count = count_units(rows, kind)
    return Ladder(found, loosest(found, count, target.delta, alpha) if count else None)


def choose_signal(rows: Sequence[Reply], kind: str, target: Target, alpha: float) -> str:
    """The signal that answers most rows of a class on validation by the same rule; where these are too few for it, most rows at a seen
    share of losses of at most delta. `sum_logprob` where several do as well."""
    count = count_units(rows, kind)

    def worth(signal: str) -> tuple[int, int, bool]:
        own = ladder(rows, kind, signal, target, alpha)
        kept = [rung.rows for rung in own.rungs if rung.losses <= target.delta * count]
        return own.chosen.rows if own.chosen else 0, max(kept, default=0), signal == DEFAULT_SIGNAL

    return max(SIGNALS, key=worth)


def calibrate(
    rows: Sequence[Reply], track: Track, target: Target, signal: str | None = None, validation: Sequence[Reply] | None = None
) -> dict[str, Any]:
    """The rules of a cascade with all that is told of them; `rules` is as in cascade.json, each class' `more` says what would certify more.

    `signal` is used for every class; without it each class' own is chosen on `validation`, and is `sum_logprob` without that.
    """
    kinds, rules, curves, more = tested(rows, track, target), {}, {}, {}
    share = target.alpha / max(1, len(kinds))
    for kind in CLASSES[track.title]:
        name = signal or (choose_signal(validation, kind, target, share) if validation else DEFAULT_SIGNAL)
        count, of_class = count_units(rows, kind), sum(row.kind == kind for row in rows)
        ladders = {one: ladder(rows, kind, one, target, share) for one in SIGNALS}
        rung = ladders[name].chosen if kind in kinds else None
        counted = {"rows": of_class, "rows_local": rung.rows if rung else 0}
        rules[kind] = {"signal": name, "alpha": share, "quantiles": quantiles(rows, kind, name)} | counted | (told(rung, count, share) if rung else NEVER | {"units": count})
        curves[kind] = {one: curve(own.rungs, count, share) for one, own in ladders.items() if own.rungs}
        more[kind] = further(ladders[name], count, target, share, of_class, len(rows))
    local = [row for row in rows if row.fit and is_local(row, rules)]
    return {
        "track": track.title,
        "guarantee": target.guarantee,
        "delta": target.delta,
        "alpha": target.alpha,
        "rules": rules,
        "share_local": len(local) / len(rows) if rows else 0.0,
        "regret": regret(rows, local, rules),
        "disagreement": disagreement(local),
        "per_tool": per_tool(local) if track.name else {},
        "more": more,
        "curves": curves,
        "units": {"by": "group" if len({row.unit for row in rows}) < len(rows) else "row", "count": len({row.unit for row in rows})},
    }


NEVER = {"threshold": None, "units": 0, "local": 0, "losses": 0, "seen": 0.0, "bound": 0.0, "local_only": {"seen": None, "bound": None}}


def quantiles(rows: Sequence[Reply], kind: str, signal: str) -> list[float] | None:
    """The edges between BINS equally full bins of a class' signal, over all replies that have it: what watching compares the later ones with. None
    where no reply has it."""
    import numpy as np

    values = [row.signals[signal] for row in rows if row.kind == kind and row.signals[signal] is not None]
    return [float(edge) for edge in np.quantile(values, np.arange(1, BINS) / BINS)] if values else None


def is_local(row: Reply, rules: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the rules answer a fit reply locally."""
    rule = rules[row.kind]
    value = row.signals[rule["signal"]]
    return rule["threshold"] is not None and value is not None and value >= rule["threshold"]


def regret(rows: Sequence[Reply], local: Sequence[Reply], rules: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Over all classes: the share of units that were lost, and its bound. A row is of one class, so that the worst class bounds the mean; a
    group may be lost in several classes, so that their bounds add up."""
    count, bounds = len({row.unit for row in rows}), [rule["bound"] for rule in rules.values() if rule["threshold"] is not None]
    alone = len({(row.unit, row.kind) for row in rows}) == count
    bound = max(bounds, default=0.0) if alone else min(1.0, sum(bounds))
    return {"seen": len({row.unit for row in local if row.lost}) / count if count else 0.0, "bound": bound}


def disagreement(local: Sequence[Reply]) -> dict[str, Any]:
    """Among the units that are answered locally: how many have a reply that differs from the hosted one, where that was measured."""
    measured = {row.unit for row in local if row.differs is not None}
    other = len({row.unit for row in local if row.differs})
    bound = upper_bound(other, len(measured), DISAGREEMENT_ALPHA)
    return {"seen": other / len(measured) if measured else None, "bound": bound if measured else None, "units": len(measured)}


def per_tool(local: Sequence[Reply]) -> dict[str, dict[str, int]]:
    """By the tool that is called, over the rows that are answered locally: how many, losses, and replies that differ from the hosted one."""
    names = sorted({name for row in local for name in row.tools})
    mine = {name: [row for row in local if name in row.tools] for name in names}
    return {
        name: {"local": len(found), "losses": sum(row.lost for row in found), "disagreements": sum(bool(row.differs) for row in found)}
        for name, found in mine.items()
    }


def further(own: Ladder, count: int, target: Target, alpha: float, of_class: int, rows: int) -> dict[str, Any] | None:
    """What a class would gain by more rows: the `share` of its rows that would be answered locally, and about how many further rows of all
    classes that takes, if no further unit is lost (`rows_without_losses`) and if they are lost as those seen (`rows_as_seen`, None: no number).

    None where all that may be answered locally is, or the class has no row.
    """
    rung = wanted(own.rungs, own.chosen) if of_class else None
    if rung is None:
        return None
    needs = [further_units(rung.losses, count, target.delta, alpha, rate) for rate in (0.0, rung.losses / count)]
    scaled = [need and -(-need * rows // count) for need in needs]
    return {"share": rung.rows / of_class, "losses": rung.losses, "rows_without_losses": scaled[0], "rows_as_seen": scaled[1]}


def curve(found: Sequence[Rung], count: int, alpha: float) -> list[list[float]]:
    """Points (share of the class' units that is answered locally, seen regret, its bound), at most POINTS of them."""
    step = max(1, -(-len(found) // POINTS))
    kept = [rung for at, rung in enumerate(found) if at % step == 0 or at == len(found) - 1]
    return [[rung.units / count, rung.losses / count, upper_bound(rung.losses, count, alpha)] for rung in kept]


# -- The whole of it -------------------------------------------------------------------------------------------------------------


def costs(azure: Evaluation, slm: Evaluation, share_local: float, prices: Prices) -> dict[str, Any]:
    """The bill of the cascade against the hosted model alone: as a decision's `cost`, where the small model is asked first and the hosted
    one answers the rest; without its curve. What is not known is None."""
    seconds = model_of(slm.report).get("training_seconds")
    found = compare_costs(azure.report, slm.report, prices, seconds, fallback_share=1 - share_local)
    return {name: value for name, value in found.items() if name != "curve"}


def describe(
    azure: Evaluation, slm: Evaluation, found: dict[str, Any], tools: dict[str, str] | None, schemas: list[str | None] | None, prices: Prices
) -> dict[str, Any]:
    """`found` of `calibrate` with what it holds for: the models, the rows, the tools or the schemas, costs and latencies."""
    inputs = azure.report["inputs"]
    return found | {
        "tools": tools,
        "schemas": schemas,
        "identity": identity_of_report(slm.report),
        "calibration": {name: inputs.get(name) for name in ("path", "sha256", "rows")},
        "hosted": azure.label,
        "slm": slm.label,
        "reports": {"azure": azure.files(), "slm": slm.files()},
        "costs": costs(azure, slm, found["share_local"], prices),
        "latency": {side: speed(azure.report, slm.report, None)[side] for side in ("azure", "slm")},
    }
