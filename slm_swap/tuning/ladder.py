"""The ladder: the means of closing the gap in the order of their cost, each measured on validation rows before it stays.

A rung is the setting that holds, with one change. It is evaluated on the same rows and stays where a one-sided paired test says that it
gains (the track's exact metric, at alpha). The intervals hold for all planned rungs at once (Bonferroni), as the best of several looks
better than it is. Nothing here looks at the test split.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slm_swap.clients.pricing import Prices, to_float
from slm_swap.common.errors import UserError
from slm_swap.common.reports import SCHEMA_VERSION, code_version, now, read_json, sha256_file, write_json
from slm_swap.common.settings import display_path
from slm_swap.rows.lines import text_hash
from slm_swap.scoring.tracks import TRACKS
from slm_swap.verdict.comparison import examine
from slm_swap.verdict.decision import SWAP
from slm_swap.verdict.evaluations import Evaluation, aligned, fit_together, read_evaluation, units
from slm_swap.verdict.gap import gains
from slm_swap.verdict.judge import Gate

Setting = dict[str, Any]  # the flags of eval.py that differ from its defaults: recipe.FLAGS

SHOTS = (1, 3, 5)
TAUGHT_SHOTS = 3  # shown in training, where no number of them has held
CUT = 0.01  # share of replies that the limit cuts, from which a larger one is tried
MORE_TOKENS = 4  # times as many
THINKING_TOKENS = 4096
STAYS, GOES, NOT_TRIED = "stays", "goes", "not tried"


class Unfit(Exception):
    """Why a rung is not tried."""


class OutOfBudget(Exception):
    """The hours or the money are spent."""


@dataclass(frozen=True)
class Rung:
    """`change` gives the new setting from the best one so far and its report.

    Raises (in `change`):
        Unfit: there is nothing to try.
    """

    name: str
    kind: str
    what: str
    change: Callable[[Setting, dict[str, Any]], Setting]
    preset: str | None = None  # of a training that comes first


def rungs(kinds: list[str], train: Path | None, presets: list[str], folder: Path, training: list[str]) -> list[Rung]:
    """All rungs of the `kinds`, some of KINDS, in the order of their cost; `training` is all that a training hangs on besides: flags and hashes."""
    found = [
        Rung("ask", "ask", "asked in the other form, text or native", _other_form),
        Rung("thinking", "thinking", "thinking on", _thinking),
        Rung("tokens", "tokens", f"{MORE_TOKENS} times --max-new-tokens", _more_tokens),
        *(Rung(f"few-shot {count}", "few-shot", f"{count} train rows shown", _with(few_shot=train, shots=count)) for count in SHOTS if train),
        Rung("retry", "constrain", "constrained where the free reply does not parse", _with(constrain="retry")),
        Rung("always", "constrain", "constrained always", _with(constrain="always")),
    ]
    for preset in presets if train else ():
        found.append(Rung(f"train {preset}", "train", f"fine-tuned, preset {preset}", _trained(folder, preset, training), preset))
    if train and presets:
        found += [Rung(f"trained, few-shot {count}", "combine", f"adapter, {count} train rows shown", _combined(train, count)) for count in SHOTS]
        for preset in presets:
            what = f"fine-tuned with train rows shown, preset {preset}"
            found.append(Rung(f"train {preset} with shots", "combine", what, _taught(folder, preset, training, train), preset))
    return [rung for rung in found if rung.kind in kinds]


KINDS = ("ask", "thinking", "tokens", "few-shot", "constrain", "train", "combine")


def _other_form(setting: Setting, report: dict[str, Any]) -> Setting:
    if report["ask"] not in ("text", "native"):
        raise Unfit("the rows are asked in both forms already")
    return setting | {"ask": "native" if report["ask"] == "text" else "text"}


def _thinking(setting: Setting, report: dict[str, Any]) -> Setting:
    return setting | {"thinking": "on", "max_new_tokens": max(THINKING_TOKENS, report["args"]["max_new_tokens"])}


def _more_tokens(setting: Setting, report: dict[str, Any]) -> Setting:
    cut, rows = report["counts"]["errors"]["truncated"], report["counts"]["rows"]
    if cut < CUT * rows:
        raise Unfit(f"{cut} of {rows} replies were cut by the limit")
    return setting | {"max_new_tokens": MORE_TOKENS * report["args"]["max_new_tokens"]}


def _with(**more: Any) -> Callable[[Setting, dict[str, Any]], Setting]:
    return lambda setting, report: setting | more


def _trained(folder: Path, preset: str, training: list[str]) -> Callable[[Setting, dict[str, Any]], Setting]:
    """The adapter learns without shots and without thinking, and is asked so."""
    return lambda setting, report: _with_adapter(folder, preset, training, setting, {})


def _taught(folder: Path, preset: str, training: list[str], train: Path) -> Callable[[Setting, dict[str, Any]], Setting]:
    """The adapter learns with shots, as many as hold, and is asked so."""
    return lambda setting, report: _with_adapter(folder, preset, training, setting, {"few_shot": train, "shots": setting.get("shots", TAUGHT_SHOTS)})


def _with_adapter(folder: Path, preset: str, training: list[str], setting: Setting, shown: Setting) -> Setting:
    told = text_hash(json.dumps([setting.get("ask"), preset, training, *([shown["shots"]] if shown else ())]))[:8]
    kept = {name: value for name, value in setting.items() if name not in ("few_shot", "shots", "thinking")}
    return kept | {"adapter": folder / f"adapter_{preset}_{told}"} | shown


def _combined(train: Path, count: int) -> Callable[[Setting, dict[str, Any]], Setting]:
    def change(setting: Setting, report: dict[str, Any]) -> Setting:
        if "adapter" not in setting:
            raise Unfit("no adapter stayed")
        return setting | {"few_shot": train, "shots": count}

    return change


@dataclass
class Measured:
    """A rung as it was measured."""

    name: str
    setting: Setting
    evaluation: Evaluation
    seconds: float  # of the stage scripts, training included


@dataclass
class Ladder:
    """Climbs, and keeps what it has measured in `folder`/ladder.json, from which it goes on.

    Args:
        inputs: of the rows, as a report has them; `parts` are the hashes of what else an evaluation is made of: model, adapter, train rows.
        common: what else it hangs on: the flags that all evaluations have.
        run: (name, setting, preset, report) -> seconds: trains where a preset is given, evaluates, and writes the report.
            It raises Unfit where the model or the rows cannot be asked so, OutOfBudget where the hours or the money are spent.
        hosted: the hosted model's evaluation of the same rows; None: no verdict, and so no early end.
    """

    folder: Path
    track: str
    inputs: dict[str, Any]
    plan: list[Rung]
    common: list[str]
    run: Callable[[str, Setting, str | None, Path], float]
    hosted: Evaluation | None
    delta: float
    alpha: float
    prices: Prices
    say: Callable[[str], object]
    told: list[dict[str, Any]] = field(default_factory=list)
    verdict: str | None = None

    @property
    def path(self) -> Path:
        return self.folder / "ladder.json"

    def report_path(self, name: str, setting: Setting) -> Path:
        """One for each setting of each rung, model and train rows: what was measured for others is not written over, nor taken."""
        told = text_hash(json.dumps([self.inputs["sha256"], self.inputs["parts"], self.common, _shown(setting)], sort_keys=True))[:8]
        return self.folder / "reports" / f"{file_name(name)}_{told}.json"

    def spent(self) -> tuple[float, float | None]:
        """(seconds, money) that what is in the folder took; money is None where the machine's price is not known."""
        seconds = sum(one["seconds"] for one in self._kept().values())
        return seconds, to_float(self.prices.local.cost(seconds))

    def climb(self, begin: Setting) -> Measured:
        """The best setting, from the one to `begin` with.

        Raises:
            UserError: the setting to begin with cannot be measured, or what is in the folder is another ladder's.
        """
        kept = self._kept()
        best = self._first(begin, kept)
        self._tell(best, None, STAYS, "where the ladder begins")
        for rung in self.plan:
            if self.verdict == SWAP:
                self._leave(rung, "the verdict on the validation rows is SWAP already")
                continue
            try:
                setting = rung.change(best.setting, best.evaluation.report)
                if rung.kind == "combine" and not self._helped("few-shot"):
                    raise Unfit("no shots helped before training")
                found = self._measure(rung.name, setting, rung.preset, kept)
            except (Unfit, OutOfBudget) as why:
                self._leave(rung, str(why))
                continue
            gain = self._gain(best, found)
            stays = gain["p_value"] < self.alpha
            why = f"p = {gain['p_value']:.2g}"
            best = found if stays else best
            self._tell(found, gain, STAYS if stays else GOES, why, rung.what)
        return best

    def _first(self, begin: Setting, kept: dict[str, dict[str, Any]]) -> Measured:
        try:
            return self._measure("base", begin, None, kept)
        except (Unfit, OutOfBudget) as why:
            raise UserError(f"the ladder cannot begin: {why}") from None

    def _helped(self, kind: str) -> bool:
        names = {rung.name for rung in self.plan if rung.kind == kind}
        return any(told["rung"] in names and told["outcome"] == STAYS for told in self.told)

    def _measure(self, name: str, setting: Setting, preset: str | None, kept: dict[str, dict[str, Any]]) -> Measured:
        """From the folder where it was measured already, else by `run`."""
        report = self.report_path(name, setting)
        before = kept.get(display_path(report))
        if before and report.is_file() and sha256_file(report) == before["report_sha256"]:
            seconds = before["seconds"]
            self.say(f"{name}: measured already")
        else:
            seconds = self.run(name, setting, preset, report)
        return Measured(name, setting, read_evaluation(report, TRACKS[self.track], with_rows=True), seconds)

    def _gain(self, old: Measured, new: Measured) -> dict[str, Any]:
        """The exact metric's gain over the setting that held, {"before", "slm", "gain", "interval", "p_value"}."""
        track = TRACKS[self.track].with_metrics(new.evaluation.report["metrics"])
        rows = aligned(old.evaluation.rows, new.evaluation.rows)
        labels = units(new.evaluation.rows, track, "these")[1]
        found = gains(rows, new.evaluation.rows, track, self.alpha / max(1, len(self.plan)), labels)
        return found["metrics"][found["metric"]] | {"metric": found["metric"], "over": old.name}

    def _judge(self, one: Measured) -> str | None:
        if self.hosted is None:
            return None
        sides = {"azure": self.hosted, "slm": one.evaluation}
        fit_together(sides, False, "these")
        metrics = set.intersection(*(set(side.report["metrics"]) for side in sides.values()))
        return examine(TRACKS[self.track].with_metrics(metrics), sides, Gate("paired", self.delta, self.alpha), self.prices)["verdict"]

    def _tell(self, one: Measured, gain: dict[str, Any] | None, outcome: str, why: str, what: str = "as it is") -> None:
        report, verdict = one.evaluation.report, self._judge(one)
        if outcome == STAYS:
            self.verdict = verdict
        rows, exact = report["counts"]["rows"], TRACKS[self.track].with_metrics(report["metrics"]).exact_gate
        counted = report["tokens"]["rows"] or None
        self.told.append({
            "rung": one.name, "what": what, "outcome": outcome, "why": why, "setting": _shown(one.setting), "metric": exact,
            "value": report["metrics"][exact], "gain": gain, "verdict": verdict,
            "tokens_per_row": {name: counted and round(report["tokens"][name] / counted, 1) for name in ("input", "output")},
            "seconds_per_row": round(report["seconds"]["generate"] / rows, 4),
            "latency": report.get("latency"),
            "cost_per_1000_rows": report["cost"]["per_1000_rows"], "cost": report["cost"]["total"], "seconds": round(one.seconds, 1),
            "report": display_path(one.evaluation.path), "report_sha256": sha256_file(one.evaluation.path),
        })  # fmt: skip
        change = "" if gain is None else f" ({gain['gain']:+.3f} over {gain['over']})"
        self.say(f"{one.name}: {exact} {report['metrics'][exact]:.3f}{change}, {outcome}: {why}")
        self.write()

    def _leave(self, rung: Rung, why: str) -> None:
        self.told.append({"rung": rung.name, "what": rung.what, "outcome": NOT_TRIED, "why": why})
        self.say(f"{rung.name}: {NOT_TRIED}: {why}")
        self.write()

    def _kept(self) -> dict[str, dict[str, Any]]:
        """What was measured before, by the place of its report.

        Raises:
            UserError: the folder's ladder is of another track or of other rows, or cannot be read.
        """
        if not self.path.exists():
            return {}
        try:
            told = read_json(self.path, "04_ft/improve.py")
            same = (told["track"], told["inputs"]["sha256"]) == (self.track, self.inputs["sha256"])
            found = {one["report"]: one for one in told["measured"] if one["report_sha256"] and one["seconds"] is not None}
            sum(one["seconds"] for one in found.values())
        except (UserError, KeyError, TypeError):
            shown = display_path(self.path)
            raise UserError(f"{shown} is no ladder of 04_ft/improve.py: move it away, and all is measured again, or choose another folder with --out") from None
        if not same:
            raise UserError(f"{display_path(self.path)} is of another track or of other rows: choose another folder with --out")
        return found

    def write(self) -> None:
        kept = self._kept() | {one["report"]: one for one in self.told if one["outcome"] != NOT_TRIED}
        hosted = self.hosted and {"report": display_path(self.hosted.path), "label": self.hosted.label}
        write_json(self.path, {
            "schema_version": SCHEMA_VERSION, "stage": "improve", "created_at": now(), "code": code_version(), "track": self.track,
            "inputs": self.inputs, "delta": self.delta, "alpha": self.alpha, "planned": [rung.name for rung in self.plan], "hosted": hosted,
            "verdict": self.verdict, "rungs": self.told, "measured": list(kept.values()),
        })  # fmt: skip


def _shown(setting: Setting) -> Setting:
    return {name: display_path(value) if isinstance(value, Path) else value for name, value in setting.items()}


def flags_of(setting: Setting) -> Iterator[str]:
    """A setting as flags of eval.py."""
    for name, value in setting.items():
        yield from (f"--{name.replace('_', '-')}", str(value))


def file_name(name: str) -> str:
    """A rung's name as that of a file."""
    return name.replace(", ", "_").replace(" ", "_")
