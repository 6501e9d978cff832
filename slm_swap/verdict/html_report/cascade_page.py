"""A calibration as one HTML page that needs nothing else."""

from collections.abc import Iterator
from typing import Any

from slm_swap.verdict import cascade_words
from slm_swap.verdict.html_report import plots, words
from slm_swap.verdict.html_report.page import assets, environment
from slm_swap.verdict.html_report.parts import Figure, Table
from slm_swap.verdict.html_report.text import all_visible
from slm_swap.verdict.html_report.words import count, percent


def write_cascade_page(told: dict[str, Any]) -> Iterator[str]:
    """The page, piece by piece; `told` is what `calibration.describe` gives, with `warnings`."""
    shown = all_visible(told)
    return environment().get_template("cascade.html.j2").generate(told=shown, page=CascadePage(shown), **assets())


class CascadePage:
    """What the page shows of a calibration whose strings are visible already."""

    def __init__(self, told: dict[str, Any]):
        self.told = told
        self.headline = f"The small model may answer {percent(told['share_local'])} of the requests" if told["share_local"] else "Nothing may be answered locally yet"
        self.sentence, *self.details = cascade_words.sentences(told)
        self.what = "regret" if told["guarantee"] == "regret" else "other answers"

    def facts(self) -> list[tuple[str, str, str]]:
        """(what, number, explanation)"""
        told, unit = self.told, cascade_words.units(self.told)
        found = [(
            f"{self.what.capitalize()}: seen → bound", f"{percent(told['regret']['seen'])} → {percent(told['regret']['bound'])}",
            f"of all {unit}, target {100 * told['delta']:g}%, {cascade_words.sure(told)}",
        )]  # fmt: skip
        if told["disagreement"]["seen"] is not None:
            seen, bound = (told["disagreement"][name] for name in ("seen", "bound"))
            found.append(("Local answers that differ: seen → bound", f"{percent(seen)} → {percent(bound)}", f"of {count(told['disagreement']['units'])} {unit}"))
        found.append(("Calibrated on", count(told["calibration"]["rows"] or 0, "rows"), f"{count(told['units']['count'])} {unit}"))
        return found

    def figures(self) -> list[Figure]:
        """Each class' regret over the share that is answered locally, for each signal."""
        found = []
        for kind, curves in self.told["curves"].items():
            if not curves:
                continue
            names = [words.SIGNALS[signal][0] for signal in curves]
            ends = [f"{name} {percent(curve[-1][1])} (bound {percent(curve[-1][2])}) at {percent(curve[-1][0])}" for name, curve in zip(names, curves.values(), strict=True)]
            what = cascade_words.CLASS_NAMES[kind]
            caption = (
                f"{what[0].upper()}{what[1:]}: {self.what} over the share answered locally, seen and its bound ({cascade_words.sure(self.told['rules'][kind])}). "
                f"The rule takes “{words.SIGNALS[self.told['rules'][kind]['signal']][0]}”; the other signals are shown to compare."
            )
            pictures = plots.svgs(plots.regret_curves(names, list(curves.values()), self.told["delta"], self.what))
            found.append(Figure(pictures, f"{what}: {self.what} where all that is fit is answered locally: {'; '.join(ends)}", caption))
        return found

    def rules_table(self) -> Table:
        head = ["Class", "Signal", "Threshold", "Answered locally", "Lost", "Seen", "Bound"]
        rows = []
        for kind, rule in self.told["rules"].items():
            name = cascade_words.CLASS_NAMES[kind]
            never = rule["threshold"] is None
            answered = f"{count(rule['rows_local'])} of {count(rule['rows'], 'rows')}"
            lost = f"{count(rule['losses'])} of {count(rule['units'])}"
            signal = words.SIGNALS[rule["signal"]][0]
            rows.append([name, signal, "never" if never else f"{rule['threshold']:.6g}", answered, lost, percent(rule["seen"]), percent(rule["bound"])])
        return Table("The rule of each class", head, rows)

    def tools_table(self) -> Table | None:
        """Local replies by the tool that they call."""
        rows = [[name, *(count(own[key]) for key in ("local", "losses", "disagreements"))] for name, own in self.told["per_tool"].items()]
        return Table("Answered locally, by tool", ["Tool", "Rows", "Losses", "Other answers"], rows) if rows else None

    def provenance(self) -> list[tuple[str, str]]:
        told = self.told
        model = ", ".join(f"{name} {value}" for name, value in told["identity"].items() if value is not None and name != "files_sha256")
        return [
            ("Rows", f"{told['calibration']['path']} (sha256 {str(told['calibration']['sha256'])[:12]})"),
            ("Hosted model", str(told["hosted"])), ("Small model", f"{told['slm']}: {model}"),
            ("Recipe", told["recipe"]["path"] if told["recipe"] else "none"),
        ]  # fmt: skip
