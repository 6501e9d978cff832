"""What the page shows of money: tiles, sentences, tables and the plot of both bills."""

from collections.abc import Sequence
from typing import Any

from slm_swap.verdict import cost_words
from slm_swap.verdict.cost_words import money
from slm_swap.verdict.html_report import plots, words
from slm_swap.verdict.html_report.parts import Figure, Table
from slm_swap.verdict.html_report.words import count, significant

Fact = tuple[str, str, str]  # what, number, explanation


class CostView:
    """The `cost` of a decision, where it has one; `unit` is the currency as the page shows it, `hosted` and `small` are what it calls the models."""

    def __init__(self, decision: dict[str, Any], unit: str, hosted: str = "hosted", small: str = "small"):
        self.cost, self.unit, self.hosted, self.small = decision["cost"], unit, hosted, small
        self.verdict, self.delta = decision["verdict"], decision["delta"]
        self.volume = (self.cost["traffic"] or {}).get("tasks_per_month")
        self.bills = self.cost["bills"] or []
        self.known = cost_words.known(self.cost)

    def money(self, amount: float | None) -> str:
        return "not known" if amount is None else money(amount, self.unit)

    # -- Beside the verdict ------------------------------------------------------------------------------------------------------

    def facts(self) -> list[Fact]:
        """The tiles: a month's bill or where it can be had, what the margin allows, and beside a SWAP when training is paid back."""
        if not self.known:
            return [("Savings", "unknown", self.cost["why"] or "compare again")]
        if not self.volume:
            where = cost_words.volumes(self.cost) or "at no volume"
            return [("The small model costs less", where, "idle machines included; set tasks_per_month for your bill")]
        bill = self.bills[0]
        told = f"{cost_words.difference(bill['saving'], self.unit)} a month"
        facts = [(
            f"A month of {count(self.volume, 'tasks')}: {self.hosted} → {self.small}", f"{self.money(bill['azure'])} → {self.money(bill['slm'])}",
            ": ".join(filter(None, (told, cost_words.machines(bill)))),
        )]  # fmt: skip
        if bill["wrong_replies"]:
            price = bill["wrong_replies_cost"]
            worth = "more than the hosted model’s" if price is None else f"worth {self.money(price)}"
            facts.append(("Wrong replies that the margin allows", f"up to {count(bill['wrong_replies'])} a month", worth))
        if months := cost_words.paid_back(self.cost, self.verdict):
            facts.append(("Training is paid back after", months, "at this volume"))
        return facts

    def advice(self) -> str:
        """What money says to somebody who is about to swap."""
        if not self.known:
            return "Savings unknown: fill in the prices and compare again (see Cost) before you count on any."
        if not self.volume:
            return "Check under Cost whether the small model costs less at your volume."
        saving = self.bills[0]["saving"]
        if saving > 0:
            return f"At your volume the small model costs {cost_words.difference(saving, self.unit)} a month: see Cost."
        return f"At your volume the small model saves nothing ({cost_words.difference(saving, self.unit)} a month): swap for other reasons or not at all."

    # -- The section -------------------------------------------------------------------------------------------------------------

    def sentences(self) -> list[str]:
        return cost_words.sentences(self.cost, self.verdict, self.delta, self.unit)

    def bills_table(self) -> Table | None:
        """A month by volume; None where neither bill is known."""
        if all(bill["azure"] is None and bill["slm"] is None for bill in self.bills):
            return None
        head = ["Tasks a month", self.hosted.capitalize(), self.small.capitalize(), "Machines", "Small, 1,000 tasks", "More wrong replies, at most"]
        rows = []
        for bill in self.bills:
            wrong = "–" if bill["wrong_replies"] is None else count(bill["wrong_replies"])
            each = self.money(bill["slm_per_1000"])
            run = cost_words.machines(bill)
            rows.append([count(bill["tasks"]), self.money(bill["azure"]), self.money(bill["slm"]), run or "–", each, wrong])
        return Table("What a month costs, idle machines included", head, rows)

    def parts_table(self) -> Table:
        """What the bills are made of: the small model's parts where a volume is given, then prices and measurements."""
        cost = self.cost
        azure, slm, training, machine = (cost[name] or {} for name in ("azure", "slm", "training", "machine"))
        bill = self.bills[0] if self.volume and self.bills else {}
        parts, run = bill.get("slm_parts") or {}, cost_words.machines(bill) if bill else ""
        names = words.COST_PARTS | ({"machines": run} if run else {})
        share = slm.get("utilisation")
        busy = "" if share is None else f", machine {cost_words.utilised(share)}"
        told = [
            *((f"Small, a month: {names.get(name, name)}", amount, self.money) for name, amount in parts.items()),
            ("Small, a machine’s month", machine.get("per_month"), self.money),
            ("Small, tasks a month that one machine can do", machine.get("capacity_tasks_per_month"), count),
            ("Hosted, 1,000 tasks", azure.get("per_1000"), self.money),
            (f"Small, 1,000 tasks in the evaluation{busy}", slm.get("per_1000"), self.money),
            ("Hosted, rows with token counts", azure.get("rows_counted"), count),
            ("Hosted, tokens a task: in", azure.get("input_tokens_per_row"), significant),
            ("Hosted, tokens a task: of these cached", azure.get("cached_tokens_per_row"), significant),
            ("Hosted, tokens a task: out", azure.get("output_tokens_per_row"), significant),
            ("Small, time of a task", slm.get("seconds_per_row"), words.duration),
            ("Small, an hour of the machine", slm.get("hour"), self.money),
            ("Training, once", training.get("cost"), self.money),
            ("Training, time", training.get("seconds"), words.duration),
        ]
        return Table("What the bills are made of", ["What", "Amount"], [[what, show(value)] for what, value, show in told if value is not None])

    def figure(self, labels: Sequence[str]) -> Figure | None:
        """Both bills over the volume; None where one of them is not known."""
        curve = self.cost["curve"] or []
        if len(curve) < 2 or any(None in (at["azure"], at["slm"]) for at in curve):
            return None
        most = curve[-1]["tasks"]
        inside = [own for own in self.cost["cheaper"] or [] if own["first"] <= most]
        shaded = [(own["first"], most if own["last"] is None else min(own["last"], most)) for own in inside]
        volume = self.volume if self.volume and self.volume <= most else None
        draw = plots.cost_steps(curve, shaded, volume, labels, ("tasks a month", f"{self.unit or 'amount'} a month"))
        told = self._reading(curve, shaded, most)
        here = f" The dotted line is your volume, {count(volume, 'tasks')} a month." if volume else ""
        return Figure(plots.svgs(draw), f"Both bills of a month against the tasks a month. {told}", f"{told}{here}")

    def _reading(self, curve: list[dict[str, Any]], shaded: list[tuple[int, int]], most: int) -> str:
        """What the plot shows, by the numbers that it draws."""
        machines = curve[-1]["machines"]
        steps = "" if machines is None else "One machine does all of it. " if machines == 1 else f"The small model’s line climbs a step with each machine, up to {count(machines)} here. "
        if not shaded:
            return f"{steps}Up to {count(most, 'tasks')} the small model is nowhere cheaper."
        if shaded == [(1, most)]:
            return f"{steps}The small model is cheaper at every volume shown."
        shown = [
            f"{count(first)} to {count(last)}" if last < most else f"{count(first)} to the right edge"
            for first, last in shaded[: cost_words.MOST_INTERVALS]
        ]
        left_out = len(shaded) - len(shown)
        shown += [f"{left_out:,} further ranges"] if left_out else []
        return f"{steps}Shaded: the volumes at which the small model is cheaper ({', '.join(shown)})."
