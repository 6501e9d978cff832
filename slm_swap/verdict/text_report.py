"""A decision as text: the lines that compare.py prints, its tables in a terminal, and Markdown for a pull request.

Names of models, groups and rows come from outside: what a terminal or Markdown would act on is shown, not done.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from slm_swap.scoring.words import ERROR_KINDS, MATCHERS, SIGNALS, level, metric_name
from slm_swap.verdict import cascade_words
from slm_swap.verdict.cost_words import headline, known, money, percent, sentences
from slm_swap.verdict.decision import FINE_TUNE
from slm_swap.verdict.gap import measured_gain
from slm_swap.verdict.sentence import points

SIDES = {"azure": "hosted", "slm": "small"}
DIFFERENCE = "hosted - small"
MOST = 10  # groups, rows or ids that are listed; the decision file has all
ACTING = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # Unicode's categories of what is no visible character
Table = tuple[str, Sequence[str], list[Sequence[str]]]  # title, headings, rows


def plain(text: Any, length: int = 80) -> str:
    """One line without control, direction or line-break characters, cut to a length."""
    shown = "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in ACTING else c for c in str(text))
    return shown if len(shown) <= length else shown[: length - 1] + "…"


def brief(told: dict[str, Any]) -> None:
    """All differences, on standard output."""
    print(f"{'metric':24} {'hosted':>8} {'small':>8} {DIFFERENCE:>14}" + ("" if told["alpha"] is None else f"  {_level(told)} interval"))
    for name, values in told["metrics"].items():
        shown = f"{metric_name(name):24} {values['azure']:8.4f} {values['slm']:8.4f} {values['difference']:+14.4f}"
        if told["alpha"] is not None:
            shown += "  {:+.4f} to {:+.4f}".format(*values["interval"])
        print(shown + (f"  worse by more than {told['delta']:g}" if name in told["failing"] else ""))
    for text in (gained(told), _latency(told.get("latency"))):
        if text:
            print(text)
    if told.get("cost"):
        print(plain(headline(told["cost"], told["cost"]["currency"] or ""), 1000))
    if told.get("sentence"):
        print(told["sentence"])
    if text := _cascade(told):
        print(text)


def gained(told: dict[str, Any]) -> str | None:
    """`Before fine-tuning “Fully right call” was 0.4000: +0.3000 gained (+0.2100 to +0.3900), 60 rows better and 12 worse.`"""
    before = told.get("before")
    if not before:
        return None
    name, own = before["metric"], before["metrics"][before["metric"]]
    low, high = own["interval"]
    return (
        f"Before fine-tuning “{metric_name(name)}” was {own['before']:.4f}: {own['gain']:+.4f} gained ({low:+.4f} to {high:+.4f}), "
        f"{len(before['better'])} rows better and {len(before['worse'])} worse."
    )


def table(told: dict[str, Any]) -> None:
    """The evidence as tables, on standard output."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as Rich
    from rich.text import Text

    console = Console(highlight=False)
    for title, headings, rows in tables(told):
        console.print(Text(title, style="bold"))
        shown = Rich(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for index, heading in enumerate(headings):
            shown.add_column(Text(heading), justify="left" if _is_text(index, heading) else "right", overflow="fold", no_wrap=heading == "metric")
        for row in rows:
            shown.add_row(*(Text(cell) for cell in row))
        console.print(shown)
    for text in notes(told):
        console.print(Text(plain(text, 1000)))


def markdown(told: dict[str, Any]) -> str:
    """The same as Markdown."""
    parts = [f"## {told['track']}: {told['verdict']}", *(_escape(plain(text, 1000)) for text in notes(told))]
    for title, headings, rows in tables(told):
        cells = [[_escape(cell) for cell in line] for line in (headings, *rows)]
        cells.insert(1, ["---" if _is_text(*heading) else "--:" for heading in enumerate(headings)])
        parts.append("\n".join([f"**{_escape(title)}**", "", *(f"| {' | '.join(line)} |" for line in cells)]))
    return "\n\n".join(parts) + "\n"


def _is_text(index: int, heading: str) -> bool:
    """Whether a column holds texts, which stand to the left, and not numbers."""
    return index == 0 or heading in ("verdict", "reference", "both models say")


def _escape(text: str) -> str:
    """Text that Markdown leaves alone: no markup, no HTML, and (by a space of no width) no mention, reference or link of itself."""
    text = re.sub(r"([\\`*_{}\[\]<>|~&$])", r"\\\1", text)
    return re.sub(r"([@#]|:(?=//)|www(?=\.)|gh(?=-))", "\\1\u200b", text, flags=re.IGNORECASE)


def notes(told: dict[str, Any]) -> list[str]:
    """What is said in sentences: the verdict, what would settle it, doubtful references, money, warnings."""
    told = {"question": None, "need": None, "gold_audit": None, "cost": None, "sequential": None, "before": None, "sentence": None} | told
    found = [text for text in (told["sentence"], _cascade(told)) if text]
    if text := _latency(told.get("latency")):
        found.append(text)
    other = next((name for name in told.get("questions") or {} if name != told["question"]), None)
    if other and told["questions"][other]:
        scope = {"these": "For the tools of these rows", "others": "For other tools like these"}[other]
        found.append(f"{scope} the verdict would be {told['questions'][other]['verdict']}.")
    if told.get("filtered"):
        taken = told["filtered"]
        without = f" Without them the verdict is {taken['verdict_without']}." if taken["verdict_without"] != told["verdict"] else ""
        found.append(f"A content filter took {taken['azure']} hosted and {taken['slm']} small replies, which count as misses.{without}")
    if told["need"] and told["need"]["azure_cost"] is not None:
        rows, cost = told["need"]["rows"], told["need"]["azure_cost"]
        found.append(f"The hosted model's replies to {rows:,} further rows would cost about {cost:.2f}{_currency(told)}.")
    if told["sequential"]:
        found.append(_sequential(told))
    if told["gold_audit"] and told["gold_audit"]["count"]:
        audit = told["gold_audit"]
        without = f"; the verdict without them: {audit['verdict_without']}" if audit["verdict_without"] else ""
        found.append(f"Rows on which both models agree with each other and not with the reference: {audit['count']}{without}.")
    if told["before"]:
        changed = told["before"]
        found.append(f"Rows that are right now and were wrong before: {len(changed['better'])}. Right before and wrong now: {_ids(changed['worse'])}.")
    found += _money(told)
    return found + [f"Warning: {text}" for text in told["warnings"]]


def _cascade(told: dict[str, Any]) -> str | None:
    """What the small model may answer already; None where the sentence says it, or nothing is known of it."""
    return cascade_words.brief(told["cascade"]) if told.get("cascade") and told["verdict"] != FINE_TUNE else None


def _latency(latency: dict[str, Any] | None) -> str | None:
    """`Latency p50/p95: hosted 412/980 ms alone, 520/1,400 ms with 32 at a time; small not measured.`; None where neither was."""
    if not latency or not any((latency[side] or {}).get(way) for side in ("azure", "slm") for way in ("alone", "loaded")):
        return None
    parts = []
    for side in ("azure", "slm"):
        told = latency[side] or {}
        ways = [
            f"{1000 * way['p50']:,.0f}/{1000 * way['p95']:,.0f} ms {load}"
            for way, load in ((told.get("alone"), "alone"), (told.get("loaded"), f"with {(told.get('loaded') or {}).get('concurrency')} at a time"))
            if way
        ]
        parts.append(f"{SIDES[side]} {', '.join(ways) or 'not measured'}")
    return f"Latency p50/p95: {'; '.join(parts)}."


def _ids(ids: Sequence[str]) -> str:
    """How many, and which are the first."""
    shown = ", ".join(plain(name, 40) for name in ids[:MOST])
    return f"{len(ids)}" + (f" ({shown}{', …' if len(ids) > MOST else ''})" if ids else "")


def _sequential(told: dict[str, Any]) -> str:
    saved = told["sequential"]
    if saved["stopped_after_rows"] is None:
        at = saved["certain_after_rows"]
        return f"Looked at after every row, the verdict was certain after {at} rows." if at else "Looked at after every row, no verdict is certain yet."
    money = "" if saved["azure_cost_saved"] is None else f", {saved['azure_cost_saved']:.2f}{_currency(told)}"
    return f"Stopped after {saved['stopped_after_rows']} of {saved['rows_available']} rows: {saved['calls_saved']} calls saved{money}."


def _currency(told: dict[str, Any]) -> str:
    currency = (told["cost"] or {}).get("currency")
    return f" {currency}" if currency else ""


def _money(told: dict[str, Any]) -> list[str]:
    cost = told["cost"]
    if not cost:
        return []
    found = sentences(cost, told["verdict"], told["delta"], cost["currency"] or "")
    return found + [f"Assumed: {text}." for text in cost["assumed"]] + [f"Not known: {text}." for text in cost["unknown"]]


def _level(told: dict[str, Any]) -> str:
    return level(2 * told["alpha"])


def _range(interval: Iterable[float] | None) -> str:
    return "" if interval is None else " to ".join(points(end) for end in interval)


def tables(told: dict[str, Any]) -> list[Table]:
    """The decision's tables, in points (hundredths) except for p-values and counts; tables without evidence are left out."""
    found: list[Table] = [_metrics(told)]
    if told.get("matchers"):
        title = "Verdict by matcher" + (": it flips" if told["flips"] else "")
        exact = told["gap"]["metric"]
        rows = [
            (MATCHERS[name][0], own["verdict"], points(own["metrics"][exact]["difference"]), _range(own["metrics"][exact]["interval"]))
            for name, own in told["matchers"].items()
        ]
        found.append((title, ("matcher", "verdict", f"{metric_name(exact)}, {DIFFERENCE}", "interval"), rows))
    if told.get("gap"):
        found += _gap(told["gap"])
    if told.get("groups"):
        found.append(_groups(told["groups"]))
    if told.get("gold_audit") and told["gold_audit"]["rows"]:
        audit = told["gold_audit"]
        rows = [[plain(row[name], 120) for name in ("id", "reference", "reply")] for row in audit["rows"][:MOST]]
        found.append((f"Doubtful references, {len(rows)} of {audit['count']}", ("id", "reference", "both models say"), rows))
    if told.get("confidence"):
        found.append(_confidence(told["confidence"]))
    if told.get("before"):
        rows = [
            (metric_name(name), points(own["before"]), points(own["slm"]), points(own["gain"]), _range(own["interval"]))
            for name, own in told["before"]["metrics"].items()
        ]
        found.append((f"Before: {plain(told['labels']['before'])}, in points", ("metric", "before", "now", "gain", "interval"), rows))
    if told.get("cost") and known(told["cost"]):
        found.append(_bills(told["cost"]))
    return found


def _metrics(told: dict[str, Any]) -> Table:
    paired = told["alpha"] is not None
    headings = ["metric", "hosted", "small", DIFFERENCE, *([f"{_level(told)} interval", "p non-inf.", "p worse"] if paired else [])]
    rows = []
    for name, values in told["metrics"].items():
        row = [metric_name(name), points(values["azure"]), points(values["slm"]), points(values["difference"])]
        if paired:
            row += [_range(values["interval"]), f"{values['p_value']:.4f}", f"{values['p_worse_holm']:.4f}"]
        rows.append(row)
    labels = ", ".join(f"{side}: {plain(told['labels'][name], 40)}" for name, side in SIDES.items())
    return f"{told['rows']} rows, margin {points(told['delta'])}, in points; {labels}", headings, rows


def _gap(gap: dict[str, Any]) -> list[Table]:
    errors = [
        (ERROR_KINDS.get(own["kind"], own["kind"]), str(own["azure_rows"]), str(own["slm_rows"]), points(own["difference"]))
        for own in gap["errors"] if own["azure_rows"] or own["slm_rows"]
    ]  # fmt: skip
    errors.append(("all", "", "", points(gap["difference"])))
    remedies = [
        (own["remedy"], str(own["rows"]), points(own["gain_at_most"]), measured_gain(own, points))
        for own in gap["remedies"]
    ]
    found: list[Table] = [(f"Where the gap in “{metric_name(gap['metric'])}” comes from", ("what is wrong", "hosted rows", "small rows", "points"), errors)]
    if remedies:
        title = "What would close it, the cheapest first" + (f"; begin with {gap['first']}" if gap.get("first") else "")
        found.append((title, ("remedy", "rows", "gain at most", "right but for that"), remedies))
    return found


def _confidence(confidence: dict[str, Any]) -> Table:
    rows = [
        (SIGNALS[name][0], "" if own["auroc"] is None else f"{own['auroc']:.3f}", "" if own["interval"] is None else "{:.3f} to {:.3f}".format(*own["interval"]),
         str(own["rows"]), str(own["missing"]))
        for name, own in confidence.items()
    ]  # fmt: skip
    title = "How well confidence tells right small replies from wrong ones (AUROC: 0.5 not at all, 1 always)"
    return title, ("signal", "AUROC", "95% interval", "rows", "rows without"), rows


def _bills(cost: dict[str, Any]) -> Table:
    """What a month costs, by volume."""
    rows = []
    for bill in cost["bills"]:
        run = ("–", "–") if bill["machines"] is None else (f"{bill['machines']:,}", percent(bill["utilisation"]))
        rows.append((f"{bill['tasks']:,}", money(bill["azure"]), money(bill["slm"]), *run, money(bill["slm_per_1000"])))
    unit = f", in {plain(cost['currency'], 12)}" if cost["currency"] else ""
    return f"What a month costs{unit}", ("tasks a month", "hosted", "small", "machines", "utilised", "small per 1,000"), rows


def _groups(groups: dict[str, Any]) -> Table:
    rows = [
        (plain(own["group"], 40), str(own["rows"]), points(own["azure"]), points(own["slm"]), points(own["shrunk"]), _range(own["interval"]))
        for own in groups["all"][:MOST]
    ]
    title = f"By {groups['by']}, the worst {len(rows)} of {len(groups['all'])}: “{metric_name(groups['metric'])}”, {DIFFERENCE} shrunk towards {points(groups['mean'])}"
    if (1.0 if groups["between_sd"] == 0 else groups.get("p_value") or 0.0) > 0.05:
        title += "; no difference between them is shown"
    return title, (groups["by"], "rows", "hosted", "small", "shrunk", "interval"), rows
