"""The state of a watch to look at: as tables in the terminal, as one line, and as one HTML page that needs no network."""

import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from slm_swap.rows.lines import dump_json
from slm_swap.serving.state import flag
from slm_swap.serving.watching import Watch, Watched
from slm_swap.verdict.html_report.parts import Table
from slm_swap.verdict.html_report.text import one_line, visible

FOLDER = Path(__file__).parent
HEAD = ["Watched", "Seen", "Of", "At most", "Evidence", "Alarm at", "State"]


def verdict_line(watch: Watch) -> str:
    """The state in one line."""
    told = f"{watch.overall.seen:,} audited requests, {_percent(watch.overall.share)} differ, {_percent(watch.overall.most)} allowed"
    if up := flag(watch.folder):
        return f"ALARM, nothing is answered locally: {visible(one_line(up['why'], 400))}. In all: {told}"
    if watch.alarms:
        return f"warning: {'; '.join(visible(alarm.why) for alarm in watch.alarms)}. In all: {told}"
    return f"quiet: {told}"


def promise(watch: Watch) -> str:
    """How often an alarm is false."""
    return (
        f"Disagreement, all tools together: one false alarm in {watch.alarms_in:,} audited requests, at most. "
        f"Each other one: one in {watch.warnings_in:,} minutes with requests."
    )


def cautions(watch: Watch) -> list[str]:
    """What the numbers do not say."""
    found = []
    if not watch.overall.seen:
        found.append("no request has been audited: disagreement cannot be found")
    if watch.damaged:
        found.append(f"{watch.damaged:,} damaged lines are left out of {watch.audits.lines + watch.minutes.lines:,}")
    if watch.replaced:
        found.append("a file of the state was replaced: the detectors began anew with what it holds")
    if watch.more.seen and not any(one.seen for one in watch.signals.values()):
        found.append("confidence is not watched: the endpoint counts none, as its cascade has no quantiles of it")
    if watch.allowed.grouped:
        found.append("the calibration's bound is of groups of rows, and audits are single requests: a group with many of them weighs more here")
    untested = [one.name for one in watch.everything if one.detector is None and one.seen]
    if untested:
        found.append(f"shown and not tested, as the calibration has too few replies of it: {', '.join(map(visible, untested))}")
    return found


def watched_table(watch: Watch) -> Table:
    tools = sorted(watch.tools.values(), key=lambda one: (-one.seen, one.name))
    shown = [watch.overall, *(one for one in tools if one.seen), watch.failing, watch.more, watch.less, *watch.signals.values()]
    return Table(promise(watch), HEAD, [_cells(one, one.kind in watch.take_back_on) for one in shown])


def _cells(one: Watched, takes_back: bool) -> list[str]:
    if one.detector is None:
        return [visible(one.name), _percent(one.share), f"{one.seen:,} {one.of}", _percent(one.most), "–", "–", "not tested"]
    state = "quiet" if one.alarm is None else "ALARM" if takes_back else "warning"
    return [
        visible(one.name), _percent(one.share), f"{one.seen:,} {one.of}", _percent(one.most), f"{one.detector.evidence:,.1f}",
        f"{one.detector.alarm_at:,.0f}", state,
    ]  # fmt: skip


def traffic_table(watch: Watch) -> Table:
    """Who answered why, of all requests since the detectors began."""
    total = sum(watch.total.requests.values())
    rows = [[visible(f"{by}: {reason}"), f"{n:,}", _percent(n / total)] for (by, reason), n in watch.total.requests.most_common() if n]
    return Table("Who answered, and why", ["Answered by", "Requests", "Share"], rows)


def figures_table(watch: Watch) -> Table:
    """What is shown and not tested."""
    rows = [["requests that nobody answered", f"{watch.total.failures:,}"], ["prompts unlike those measured", f"{watch.total.unlike:,}"]]
    money, known, unknown = watch.total.saved
    told = f"{money:.4g}" if known else "not known"
    rows.append(["saved, in the price table's currency", f"{told}; not known of {unknown:,} of {known + unknown:,} lines" if known and unknown else told])
    for by in sorted({by for minute in watch.recent for by in minute.latency}):
        found = [one for minute in watch.recent for one in minute.latency.get(by, [])]
        rows.append([visible(f"latency, {by}: p50, p95"), f"{median(one[0] for one in found):.3g} s, {median(one[1] for one in found):.3g} s"])
    rows += [["last audit", _when(watch.last_audit)], ["last minute", _when(watch.last_minute)], ["started anew", _when(watch.restart.time or None)]]
    return Table(f"Also (latency: the median of the last {len(watch.recent)} minutes)", ["What", "Value"], rows)


def disagreements_table(watch: Watch) -> Table:
    """The last audits that disagree, the newest first."""
    rows = []
    for audit in reversed(watch.disagreeing):
        replies = [_reply(audit, side) for side in ("local", "hosted")]
        rows.append([visible(audit["id"]), _when(audit["time"]), visible(audit.get("tool") or audit.get("kind") or ""), *replies])
    return Table("The last audited requests on which the models differ", ["Request", "When", "Tool", "Small model", "Hosted model"], rows)


def _reply(audit: dict[str, Any], side: str) -> str:
    if audit.get(side) is None:
        return "not kept"
    unreadable = audit.get("unreadable")
    mark = "unreadable: " if isinstance(unreadable, list) and side in unreadable else ""
    return mark + visible(one_line(dump_json(audit[side]), 300))


def terminal(watch: Watch) -> Any:
    """The state for rich."""
    from rich.console import Group
    from rich.table import Table as Rich
    from rich.text import Text

    parts: list[Any] = [Text(verdict_line(watch), style="bold red" if flag(watch.folder) else "bold")]
    for table in (watched_table(watch), traffic_table(watch), figures_table(watch)):
        shown = Rich(title=Text(table.caption), title_justify="left")
        for at, heading in enumerate(table.head):
            shown.add_column(heading, justify="right" if 0 < at < len(table.head) - 1 else "left")
        for row in table.rows:
            shown.add_row(*map(Text, row))
        parts.append(shown)
    return Group(*parts, *(Text(f"caution: {line}") for line in cautions(watch)))


def write_page(watch: Watch) -> Iterator[str]:
    """The page, piece by piece."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    from slm_swap.verdict.html_report.page import FOLDER as REPORT
    from slm_swap.verdict.html_report.page import csp_hash

    style = (REPORT / "page.css").read_text(encoding="utf-8")
    made = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    up = flag(watch.folder)
    return made.get_template("watch_page.html.j2").generate(
        style=Markup(style),
        policy=f"default-src 'none'; style-src '{csp_hash(style)}'; base-uri 'none'; form-action 'none'",
        line=verdict_line(watch), promise=promise(watch), up=up is not None, rows=[visible(row) for row in _ids(up)],
        alarms=[visible(alarm.why) for alarm in watch.alarms if not (up and alarm.takes_back)],
        cautions=cautions(watch), written=_when(time.time()), cascade=visible(watch.allowed.path), hosted=visible(watch.allowed.hosted),
        tables=[table for make in (watched_table, traffic_table, figures_table, disagreements_table) if (table := make(watch)).rows],
    )  # fmt: skip


def _ids(up: dict[str, Any] | None) -> list[str]:
    rows = (up or {}).get("rows")
    return [row for row in rows if isinstance(row, str)] if isinstance(rows, list) else []


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def _when(at: float | None) -> str:
    return "never" if at is None else time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at))
