"""What the page shows of a decision: its figures, tables and words."""

from typing import Any

from slm_swap.scoring.tracks import TRACKS
from slm_swap.scoring.words import level
from slm_swap.verdict.cascade_words import sure
from slm_swap.verdict.cost_words import money
from slm_swap.verdict.decision import FINE_TUNE, SWAP
from slm_swap.verdict.evaluations import is_simulated
from slm_swap.verdict.gap import FINE_TUNING, measured_gain
from slm_swap.verdict.html_report import plots, words
from slm_swap.verdict.html_report.cost import CostView
from slm_swap.verdict.html_report.parts import Figure, Table
from slm_swap.verdict.html_report.text import one_line, word_diff
from slm_swap.verdict.html_report.words import count, percent, range_of, rate_of, signed, standing

MOST_GROUPS = 16  # in the plot; the table has all
MOST_AUDITED = 20  # rows shown in full above the table of rows


class Page:
    """What the template shows of a decision whose strings are visible already; a part that is not there is None."""

    def __init__(self, decision: dict[str, Any]):
        self.decision = decision
        self.track = TRACKS[decision["track"]].with_metrics(decision["metrics"])
        self.exact = f"{self.track.exact}_rate"
        given = decision["labels"] or {}
        self.labels = {
            side: one_line(given.get(side) or name, 80)
            for side, name in (("azure", "hosted model"), ("slm", "small model"), ("before", "small model"))
        }
        models = decision["models"] or {}
        self.simulated = [name for side, name in (("azure", "hosted"), ("slm", "small")) if is_simulated(models.get(side) or {})]
        self.labels |= {side: f"{self.labels[side]} (simulated)" for side, name in (("azure", "hosted"), ("slm", "small")) if name in self.simulated}
        self.hosted, self.small = (f"{name} (simulated)" if name in self.simulated else name for name in ("hosted", "small"))
        known = [name for name in self.track.gate if name in decision["metrics"]]
        self.metrics = known + [name for name in decision["metrics"] if name not in known]
        self.delta, self.alpha = decision["delta"], decision["alpha"]
        self.level = None if self.alpha is None else level(2 * self.alpha)
        self.swap_alpha = decision["swap_alpha"] or self.alpha
        self.currency = one_line((decision["cost"] or {}).get("currency") or "", 12)
        self.cost = CostView(decision, self.currency, self.hosted, self.small) if decision["cost"] else None

    def money(self, amount: float) -> str:
        return money(amount, self.currency)

    # -- The verdict -------------------------------------------------------------------------------------------------------------

    @property
    def headline(self) -> str:
        withheld, latency = self.decision["withheld"], self.decision["latency"] or {}
        if withheld and latency.get("passed") is False and not self.decision["unmeasured"]:
            return words.TOO_SLOW
        return words.UNMEASURED if withheld else words.HEADLINES[self.decision["verdict"]]

    @property
    def both(self) -> str:
        return f"{self.hosted} → {self.small}"

    def facts(self) -> list[tuple[str, str, str]]:
        """The few numbers beside the verdict: (what, number, explanation)."""
        decision, facts = self.decision, []
        if main := decision["metrics"].get(self.exact):
            told = f"{percent(main['azure'])} → {percent(main['slm'])}"
            what = f"{self.name(self.exact)}: {self.both}"
            facts.append((what, told, self.spelled(main["difference"], main["interval"])))
        worst = (decision["failing"] or [None])[0] or max(self.metrics, key=lambda name: decision["metrics"][name]["difference"])
        if worst != self.exact and worst in decision["metrics"]:
            values = decision["metrics"][worst]
            told = f"{percent(values['azure'])} → {percent(values['slm'])}"
            facts.append((f"{self.name(worst)}: {self.both}", told, self.spelled(values["difference"], values["interval"])))
        facts += self.cost.facts() if self.cost else [("Savings", "unknown", "compare by the rows, and fill in slm_swap/prices.toml")]
        if partly := decision["cascade"]:
            what = "regret" if partly["guarantee"] == "regret" else "other answers"
            told = f"the hosted model behind it; {what} at most {100 * partly['delta']:g}% ({sure(partly)})"
            facts.append(("The small model may answer now", percent(partly["share_local"]), told))
        facts += self.speed()
        if decision["rows"] is not None:
            facts.append(("Compared on", count(decision["rows"], "rows"), self.unmeasured() + self.clusters()))
        return facts

    def spelled(self, difference: float, interval: list[float] | None) -> str:
        """A gap with its interval, in words."""
        between = f" ({words.stretch(*interval)})" if interval else ""
        return f"{standing(difference)}{between}, margin {100 * self.delta:g}"

    def speed(self) -> list[tuple[str, str, str]]:
        """The latencies as a fact: alone where both were measured so, else under load, else whatever is known."""
        told = self.decision["latency"] or {}
        sides = [told.get(side) or {} for side in ("azure", "slm")]
        for way in ("alone", "loaded"):
            if any(side.get(way) for side in sides):
                shown = [f"{1000 * side[way]['p50']:,.0f} ms" if side.get(way) else "not measured" for side in sides]
                slow = ", ".join(
                    f"{name} {1000 * side[way]['p95']:,.0f} ms" for name, side in zip(("hosted", "small"), sides, strict=True) if side.get(way)
                )
                load = "one request at a time" if way == "alone" else "under load"
                return [(f"Latency, median: {self.both}", " → ".join(shown), f"{load}; 95th percentile: {slow}")]
        return []

    def latency_table(self) -> Table | None:
        """Both models' latencies as measured; None where none was."""
        told, rows = self.decision["latency"] or {}, []
        for side, name in (("azure", self.hosted.capitalize()), ("slm", self.small.capitalize())):
            for way in ("alone", "loaded"):
                if found := (told.get(side) or {}).get(way):
                    load = "one at a time" if way == "alone" else f"{count(found['concurrency'])} at a time" if found["concurrency"] else "under load"
                    rows.append([f"{name}, {load}", *(f"{1000 * found[p]:,.0f} ms" for p in ("p50", "p95")), count(found["rows"] or 0)])
        return Table("Latency of a request", ["Model and load", "Median", "95th percentile", "Rows"], rows) if rows else None

    def clusters(self) -> str:
        clusters = self.decision["clusters"]
        if not clusters:
            return ""
        scope = f", {words.SCOPES[self.decision['question']]}" if self.decision["question"] and self.decision["tools"] else ""
        if clusters["by"] == "row":
            return f"each row counts for itself{scope}"
        return f"in {count(clusters['count'], clusters['by'] + 's')}, worth {count(clusters['effective'])} independent ones{scope}"

    def unmeasured(self) -> str:
        """`80 hosted and 3 small replies not measured; `, or nothing."""
        told = self.decision["unmeasured"] or {}
        sides = {name: sum(filter(None, (told.get(side) or {}).values())) for side, name in (("azure", "hosted"), ("slm", "small"))}
        missing = " and ".join(f"{count(number)} {name}" for name, number in sides.items() if number)
        return f"{missing} replies not measured; " if missing else ""

    def doubts(self) -> list[str]:
        """Where the verdict would be another one."""
        decision, found = self.decision, []
        others = [words.MATCHERS[name][0].lower() for name, told in self.matchers() if told["verdict"] != decision["verdict"]]
        if others:
            found.append(f"Counted another way ({', '.join(others)}) the verdict is different: see “Does the verdict hold?”.")
        filtered = decision["filtered"]
        if filtered and filtered["azure"] and filtered["verdict_without"] not in (None, decision["verdict"]):
            told = words.VERDICTS[filtered["verdict_without"]]
            found.append(f"Without the {count(filtered['azure'], 'rows')} whose hosted reply a content filter took the verdict is “{told}”.")
        audit = decision["gold_audit"]
        if audit and audit["count"] and audit["verdict_without"] not in (None, decision["verdict"]):
            told = words.VERDICTS[audit["verdict_without"]]
            found.append(f"Without the {count(audit['count'], 'rows')} whose reference looks wrong the verdict is “{told}”.")
        return found

    def next_steps(self) -> list[str]:
        """What to do now, in order."""
        decision, verdict, need = self.decision, self.decision["verdict"], self.decision["need"]
        if verdict == SWAP:
            return [
                "Move the traffic over in steps, and keep the hosted model at hand as the way back.",
                "Go on scoring a sample of the live replies: the verdict holds for requests like those compared here.",
                *([self.cost.advice()] if self.cost else []),
            ]
        keep = "Keep the hosted model until then."
        if decision["withheld"]:
            commands = (decision["unmeasured"] or {}).get("measure") or []
            asked = [f"Measure the rows that were not measured: {one_line(command, 400)}" for command in commands]
            return [*(asked or ["Serve the small model faster, and measure its latency again."]), "Then compare again.", keep]
        if verdict == FINE_TUNE:
            first = (decision["gap"] or {}).get("first")
            cheapest = [f"Begin with {first.rstrip('.')}."] if first and first != FINE_TUNING else []
            train = "Fine-tune the small model (train_unsloth.py), evaluate it on the same rows and compare again."
            if decision["before"] or ((decision["models"] or {}).get("slm") or {}).get("adapter"):
                train = "Training once was not enough: look at the rows that still miss, then train with more rows like them."
            return [*cheapest, train, keep]
        if need and need["rows"] is None and need["clusters"] and decision["question"] == "others":
            more = f"Evaluate both models on rows of at least {count(need['clusters'], 'further tools')}: more rows of the same tools do not help."
        elif need and need["rows"] is not None:
            more = f"Evaluate both models on {self.further(need)}, then compare all rows again."
        else:
            more = "Look at the rows below: on these models more rows alone will hardly settle it."
        return [more, keep]

    # -- Quality -----------------------------------------------------------------------------------------------------------------

    def name(self, metric: str) -> str:
        return words.metric_name(metric)

    def glossary(self) -> list[tuple[str, str]]:
        return [words.METRICS[name] for name in self.metrics if name in words.METRICS]

    def values(self, name: str) -> dict[str, Any]:
        return self.decision["metrics"][name]

    def finding(self, name: str) -> str:
        """What one metric says: the words that belong to its tests."""
        values = self.values(name)
        if name in (self.decision["failing"] or []):
            return "worse than the margin"
        shown = values["p_value"] <= self.swap_alpha if values["p_value"] is not None and self.alpha else None
        if shown is None:
            shown = (values["interval"] or [0, values["difference"]])[1] <= self.delta
        return "good enough" if shown else "not settled"

    def behind_figure(self) -> Figure:
        names = [self.name(name) for name in self.metrics]
        values = [self.values(name) for name in self.metrics]
        pairs = [value["difference"] for value in values], [value["interval"] for value in values]
        told = "; ".join(f"{name} {range_of(*pair)}" for name, *pair in zip(names, *pairs, strict=True))
        caption = "Points by which the small model is behind; left of zero it is ahead."
        if self.level:
            caption += f" Lines are {self.level} intervals: wholly inside the shaded area is good enough, wholly outside is not."
        draw = plots.behind(names, *pairs, self.delta, "points that the small model is behind")
        return Figure(plots.svgs(draw), f"Gap on each metric against a margin of {100 * self.delta:g} points. {told}.", caption)

    def models_figure(self) -> Figure:
        names = [self.name(name) for name in self.metrics]
        values = [self.values(name) for name in self.metrics]
        told = "; ".join(
            f"{name}: hosted {rate_of(value['azure'], value['azure_interval'])}, "
            f"small {rate_of(value['slm'], value['slm_interval'])}"
            for name, value in zip(names, values, strict=True)
        )
        caption = "Round: the hosted model. Square: the small one." + (
            f" Lines are {self.level} intervals." if self.level else ""
        )
        draw = plots.both_models(names, values, [self.labels["azure"], self.labels["slm"]])
        return Figure(plots.svgs(draw), f"Both models on each metric. {told}.", caption)

    def metrics_table(self) -> Table:
        intervals = f" ({self.level} interval)" if self.level else ""
        rows = []
        for name in self.metrics:
            value = self.values(name)
            sides = [rate_of(value[side], value[f"{side}_interval"]) for side in ("azure", "slm")]
            rows.append([self.name(name), *sides, range_of(value["difference"], value["interval"]), self.finding(name)])
        head = ["Metric", f"{self.hosted.capitalize()}{intervals}", f"{self.small.capitalize()}{intervals}", f"Behind by, points{intervals}", "Finding"]
        return Table("Both models on every metric", head, rows)

    def tests_table(self) -> Table | None:
        """The tests behind the findings; None where the rule makes none."""
        rows = []
        for name in self.metrics:
            value = self.values(name)
            if value["p_value"] is None:
                return None
            split = value["discordant"]
            told = [count(split[side]) for side in ("azure_better", "slm_better", "equal")] if split else ["–"] * 3
            rows.append([self.name(name), p_value(value["p_value"]), p_value(value["p_worse_holm"]), *told])
        head = [
            "Metric",
            "p, no worse than the margin",
            "p, worse than the margin (Holm)",
            "Rows: hosted better",
            "Rows: small better",
            "Rows: equal",
        ]
        return Table("Tests", head, rows)

    def further(self, need: dict[str, Any]) -> str:
        """`400 further rows (60 further tools)`"""
        by = (self.decision["clusters"] or {}).get("by", "row")
        clusters = (
            f" (of about {count(need['clusters'], f'further {by}s')})" if need["clusters"] is not None and by != "row" else ""
        )
        return f"about {count(need['rows'], 'further rows')}{clusters}"

    def compared_table(self, caption: str, metrics: dict[str, dict[str, Any]]) -> Table:
        """Some metrics of both models, computed in another way."""
        rows = [
            [self.name(name), percent(metrics[name]["azure"]), percent(metrics[name]["slm"]),
             range_of(metrics[name]["difference"], metrics[name]["interval"])]
            for name in self.metrics if name in metrics
        ]  # fmt: skip
        return Table(caption, ["Metric", "Hosted", "Small", "Behind by, points"], rows)

    # -- Gap and groups ----------------------------------------------------------------------------------------------------------

    def kind(self, name: str) -> str:
        return words.ERROR_KINDS.get(name, one_line(name, 40))

    def gap_figure(self) -> Figure | None:
        """None where neither model misses a row."""
        errors = [error for error in self.decision["gap"]["errors"] if error["azure_rows"] or error["slm_rows"]]
        if not errors:
            return None
        errors.sort(key=lambda error: -error["difference"])
        names = [self.kind(error["kind"]) for error in errors]
        told = "; ".join(f"{name} {signed(error['difference'])}" for name, error in zip(names, errors, strict=True))
        caption = "Filled: the small model misses more rows so. Hollow: the hosted one does. The bars add up to the gap."
        return Figure(plots.svgs(plots.error_bars(names, errors)), f"Points of the gap by kind of error. {told}.", caption)

    def gap_table(self) -> Table:
        gap = self.decision["gap"]
        rows = [
            [self.kind(error["kind"]), f"{count(error['azure_rows'])} ({percent(error['azure'])})",
             f"{count(error['slm_rows'])} ({percent(error['slm'])})", signed(error["difference"])]
            for error in gap["errors"]
        ]  # fmt: skip
        missed = [percent(1 - gap["azure"]), percent(1 - gap["slm"]), signed(gap["difference"])]
        return Table(
            "Misses by kind of error", ["Kind", "Hosted, rows", "Small, rows", "Points of the gap"], [*rows, ["All", *missed]]
        )

    def remedies_table(self) -> Table | None:
        remedies = self.decision["gap"]["remedies"]
        if not remedies:
            return None
        first = self.decision["gap"]["first"]
        rows = [
            [remedy["remedy"] + (" (begin here)" if remedy["remedy"] == first else ""), ", ".join(self.kind(kind).lower() for kind in remedy["kinds"]), count(remedy["rows"]),
             signed(remedy["gain_at_most"]),
             measured_gain(remedy, signed)]
            for remedy in remedies
        ]  # fmt: skip
        head = ["Remedy", "Against", "Rows", "Gain at most, points", "Right but for that, points"]
        return Table("Remedies, the cheapest first", head, rows)

    def groups_figure(self) -> Figure:
        groups = self.decision["groups"]
        worst = groups["all"][:MOST_GROUPS]
        names = [f"{one_line(group['group'] or '(none)', 16)} ({count(group['rows'])})" for group in worst]
        pairs = [group["shrunk"] for group in worst], [group["interval"] for group in worst]
        told = "; ".join(f"{name} {range_of(*pair)}" for name, *pair in zip(names[:5], *pairs, strict=False))
        caption = (
            f"In brackets: rows. Hollow: as measured. Filled: drawn towards the mean of all {groups['by']}s, the more the fewer rows there are."
        )
        if len(worst) < len(groups["all"]):
            caption = f"The {len(worst)} of {len(groups['all'])} with the largest gap; the table has all. {caption}"
        own = [group["difference"] for group in worst]
        draw = plots.behind(names, *pairs, None, f"points behind on {self.name(groups['metric'])}", own)
        return Figure(plots.svgs(draw), f"Gap by {groups['by']}, the largest first. {told}.", caption)

    def groups_table(self) -> Table:
        groups = self.decision["groups"]
        rows = [
            [group["group"] or "(none)", count(group["rows"]), percent(group["azure"]), percent(group["slm"]),
             signed(group["difference"]), range_of(group["shrunk"], group["interval"])]
            for group in groups["all"]
        ]  # fmt: skip
        head = [groups["by"].capitalize(), "Rows", "Hosted", "Small", "Behind by, points", "Estimate (interval), points"]
        return Table(f"Gap on {self.name(groups['metric'])} by {groups['by']}, the largest first", head, rows)

    # -- Confidence --------------------------------------------------------------------------------------------------------------

    def signal(self, name: str) -> str:
        return words.SIGNALS.get(name, (one_line(name, 40), ""))[0]

    def confidence_figure(self) -> Figure:
        signals = self.decision["confidence"]
        names = [self.signal(name) for name in signals]
        told = "; ".join(f"{name}: {auroc_of(own)}" for name, own in zip(names, signals.values(), strict=True))
        caption = "Further down is better: answering only the surest replies leaves fewer wrong ones. A flat line tells nothing."
        draw = plots.risk_coverage(names, [own["curve"] for own in signals.values()])
        return Figure(plots.svgs(draw), f"Share of wrong replies by the share answered. AUROC: {told}.", caption)

    def confidence_table(self) -> Table:
        rows = [
            [f"{self.signal(name)}: {words.SIGNALS[name][1]}" if name in words.SIGNALS else self.signal(name), auroc_of(own),
             count(own["rows"]), count(own["missing"] or 0)]
            for name, own in self.decision["confidence"].items()
        ]  # fmt: skip
        return Table("How well each signal tells right replies from wrong ones", ["Signal", "AUROC (95% interval)", "Rows", "Rows without it"], rows)

    # -- Before and after --------------------------------------------------------------------------------------------------------

    def before_figure(self) -> Figure:
        metrics = self.decision["before"]["metrics"]
        shown = [name for name in self.metrics if name in metrics]
        names, values = [self.name(name) for name in shown], [metrics[name] for name in shown]
        told = "; ".join(f"{name} {percent(v['before'])} → {percent(v['slm'])}" for name, v in zip(names, values, strict=True))
        draw = plots.before_after(names, values, [self.values(name)["azure"] for name in shown], [self.labels["azure"]])
        caption = (
            f"Hollow: before ({self.labels['before']}). Filled: after ({self.labels['slm']}). The upright line: the hosted model."
        )
        return Figure(plots.svgs(draw), f"The small model before and after fine-tuning. {told}.", caption)

    def before_table(self) -> Table:
        metrics = self.decision["before"]["metrics"]
        rows = [
            [self.name(name), percent(metrics[name]["before"]), percent(metrics[name]["slm"]),
             range_of(metrics[name]["gain"], metrics[name]["interval"])]
            for name in self.metrics if name in metrics
        ]  # fmt: skip
        return Table("Before and after fine-tuning", ["Metric", "Before", "After", "Gain (interval), points"], rows)

    # -- Does it hold? -----------------------------------------------------------------------------------------------------------

    def matchers(self) -> list[tuple[str, dict[str, Any]]]:
        """The three matchers, the strictest first."""
        found = self.decision["matchers"] or {}
        return [(name, found[name]) for name in words.MATCHERS if name in found]

    def matchers_table(self) -> Table:
        rows = []
        for name, told in self.matchers():
            main = told["metrics"].get(self.exact)
            numbers = (
                [percent(main["azure"]), percent(main["slm"]), range_of(main["difference"], main["interval"])]
                if main
                else ["–"] * 3
            )
            rows.append([f"{words.MATCHERS[name][0]}: {words.MATCHERS[name][1]}", *numbers, words.VERDICTS[told["verdict"]]])
        head = ["Matcher", f"{self.name(self.exact)}: hosted", "Small", "Behind by, points", "Verdict"]
        return Table("The verdict by matcher", head, rows)

    def audited(self) -> list[dict[str, Any]]:
        """The first rows of the gold audit, each with its difference from the reference."""
        rows = self.decision["gold_audit"]["rows"][:MOST_AUDITED]
        return [row | {"diff": word_diff(row["reference"], row["reply"])} for row in rows]

    # -- How it was measured -----------------------------------------------------------------------------------------------------

    def provenance(self) -> list[tuple[str, str]]:
        decision, told = self.decision, []
        rules = {"paired": "paired tests over the same rows", "sequential": "tests that hold at every row", "point": "means only"}
        told.append(("Rule", f"{decision['rule']}: {rules[decision['rule']]}" if decision["rule"] in rules else decision["rule"]))
        told.append(("Margin", f"{100 * self.delta:g} points" + (f"; each test at {100 * self.alpha:g}%" if self.alpha else "")))
        for side, title in (("azure", "Hosted model"), ("slm", "Small model"), ("before", "Small model before")):
            described, report = (decision["models"] or {}).get(side), decision["reports"][side]
            if described:
                given = ", ".join(f"{key} {value}" for key, value in described.items() if isinstance(value, (str, int, float)))
                told.append((title, given or "not described"))
            if report and report["path"]:
                told.append((f"{title}’s report", f"{report['path']}, sha256 {report['sha256'] or 'not recorded'}"))
        if decision["inputs"] and decision["inputs"]["path"]:
            told.append(("Data", f"{decision['inputs']['path']}, sha256 {decision['inputs']['sha256'] or 'not recorded'}"))
        if decision["code"] and decision["code"]["commit"]:
            told.append(("Code", decision["code"]["commit"] + (", changed since" if decision["code"]["dirty"] else "")))
        if decision["created_at"]:
            told.append(("Decided", decision["created_at"]))
        return told

    def trace_url(self) -> str | None:
        """The trace's address, where it is one that a browser may be sent to."""
        url = (self.decision["trace"] or {}).get("url")
        return url if url and url.lower().startswith(("https://", "http://")) else None


def auroc_of(own: dict[str, Any]) -> str:
    """`0.812 (0.761 to 0.853)`"""
    if own["auroc"] is None:
        return "all rows alike"
    return f"{own['auroc']:.3f}" + (" ({:.3f} to {:.3f})".format(*own["interval"]) if own["interval"] else "")


def p_value(p: float | None) -> str:
    return "–" if p is None else "below 0.001" if p < 0.001 else f"{p:.3f}"
