"""Whether the endpoint still does what the calibration found: its audits and minutes, read as they come, each against what is allowed.

Tested by e-detectors (`verdict.stats.e_detector`), each against a bound on its mean:

- disagreement, over all audited requests and for each tool: the small model's answer differs from the hosted one's. Allowed is the bound of the
  calibration; for a tool its own bound if that is higher; a reply of several calls counts for each of its tools, as in the calibration. All of them together raise one false alarm in `alarms_in` audited requests, at most;
- failures, the share handed on (both ways), and confidence lower than in the calibration: the shares of one minute, over all workers, are one
  observation, so that requests of one minute may depend on each other. Each raises one false alarm in `warnings_in` minutes with requests.

The bounds are of 95% each, over the calibration's rows: where one of them is wrong, what it allows is not what was meant. Audits are a random share
of what is answered locally. Everything is worked out from the files in their order, so a watcher that was killed goes on where it was. `restart`, after a
person has looked, writes into `restart.json` how far the files went: only what stands behind that counts from then on. So does `begin` where another
cascade is served than before.
"""

import math
import os
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from slm_swap.common.errors import UserError
from slm_swap.common.reports import SCHEMA_VERSION, now, read_json, sha256_file, write_json
from slm_swap.common.settings import display_path, find_path, shown_path
from slm_swap.scoring.several import TOOLS_BETWEEN
from slm_swap.serving.state import ADVICE, AUDITS, ENDPOINT, MINUTES, Replaced, Tail
from slm_swap.verdict.cascade import CLASSES, MADE_BY, read_cascade
from slm_swap.verdict.stats.e_detector import EDetector, Mixture
from slm_swap.verdict.stats.regret import upper_bound

RESTART = "restart.json"
ALPHA = 0.05  # of each bound that the calibration's rows give
BINS, LOW_BINS = 20, (1, 5, 10)  # of a signal, over the calibration's quantiles; confidence is low below the 5%, 25% or 50% quantile
DECIDED = ("unfit", "no_confidence", "below_threshold", "class_never")  # the rule's reasons to hand on; others are none of the calibration's
TAKES_BACK = ("disagreement", "tools", "failures")
KINDS = (*TAKES_BACK, "handed_on", "confidence")
SHOWN_ROWS, RECENT_MINUTES = 20, 60
LATE = 3  # minutes: a worker may write its line so late; what is older shows that a clock was set


# -- What is allowed -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Allowed:
    """What a calibration allows; shares 0..1. `disagreement` is None where it was not measured, `tools` are the tools that can be tested, `handed_on` the
    lowest and highest share, `units` of each class, `grouped` whether a unit is a group of rows."""

    path: str
    sha256: str
    hosted: str
    disagreement: float | None
    tools: dict[str, float]
    handed_on: tuple[float, float]
    units: dict[str, int]
    grouped: bool


def read_allowed(path: Path) -> Allowed:
    """What a cascade.json allows.

    Raises:
        UserError: it is missing, or is none.
    """
    return _allowed(read_cascade(path).told, path, sha256_file(path))


def _allowed(told: dict[str, Any], path: Path, sha256: str) -> Allowed:
    try:
        bound, share_local, by = told["disagreement"]["bound"], float(told["share_local"]), told.get("units") or {}
        units = {name: int(rule["units"]) for name, rule in told["rules"].items()}
        tools = {name: (int(own["disagreements"]), int(own["local"])) for name, own in (told.get("per_tool") or {}).items()}
        n = min(sum(units.values()), int(by.get("count", sum(units.values()))))  # rows of a group are no further evidence
        good = (bound is None or 0 <= bound <= 1) and 0 <= share_local <= 1 and n >= 1 and min(units.values()) >= 0
        if not good or not all(0 <= k <= of for k, of in tools.values()):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{shown_path(path)} is no cascade of this version: make it with {MADE_BY}") from None
    handed_on = round((1 - share_local) * n)
    own = {name: max(bound or 0.0, upper_bound(k, of, ALPHA / len(tools))) for name, (k, of) in tools.items()}
    limits = 1 - upper_bound(n - handed_on, n, ALPHA / 2), upper_bound(handed_on, n, ALPHA / 2)
    own = {name: most for name, most in own.items() if most < 1}
    return Allowed(display_path(path), sha256, str(told.get("hosted") or "hosted"), bound, own, limits, units, by.get("by") == "group")


def find_cascade(folder: Path, given: str | None) -> Path:
    """The cascade that is served: the one given, else the one that endpoint.json names.

    Raises:
        UserError: there is none, or the file is not the one that is served.
    """
    named = _named(_endpoint(folder))
    if not (path := given or named.get("path")):
        raise UserError(f"{shown_path(folder / ENDPOINT)} names no cascade: pass --cascade FILE, the one that is served")
    path = find_path(path)
    if named.get("sha256") and sha256_file(path) != named["sha256"]:
        raise UserError(f"{shown_path(path)} is not the cascade that is served (its sha256 differs): pass the one that is, or start 05_serve/serve.py again")
    return path


def _endpoint(folder: Path) -> dict[str, Any]:
    """What the endpoint told when it started; empty where none has."""
    return read_json(folder / ENDPOINT, "05_serve/serve.py") if os.path.lexists(folder / ENDPOINT) else {}


def _named(told: dict[str, Any]) -> dict[str, Any]:
    return told["cascade"] if isinstance(told.get("cascade"), dict) else {}


def find_allowed(folder: Path, given: str | None, kept: Allowed | None = None) -> Allowed:
    """What the cascade that is served allows, whatever its file has become since the endpoint read it: `kept`, as a watcher read it before, while the
    endpoint names no other one; else by the endpoint's own copy; else, or if one is given, by the file.

    Raises:
        UserError: as `find_cascade` and `read_allowed`.
    """
    told = _endpoint(folder)
    named = _named(told)
    path, sha256, rule = named.get("path"), named.get("sha256"), told.get("rule")
    if kept and sha256 in (None, kept.sha256):
        return kept
    if not given and isinstance(rule, dict) and isinstance(path, str) and isinstance(sha256, str):
        return _allowed(rule, find_path(path), sha256)
    return read_allowed(find_cascade(folder, given))


def has_changed(allowed: Allowed) -> bool:
    """Whether the cascade's file is no longer what the endpoint read: another one, or none."""
    try:
        return sha256_file(find_path(allowed.path)) != allowed.sha256
    except (UserError, OSError):
        return True


def audited_by(folder: Path, given: str | None) -> tuple[str, str]:
    """(the hosted model's name, the track) of a folder's audits: as a cascade says that is given, else as the endpoint told when it started, else as the
    cascade says that it names.

    Raises:
        UserError: as `find_cascade` and `read_cascade`.
    """
    told = _endpoint(folder)
    hosted = told["hosted"].get("model") if isinstance(told.get("hosted"), dict) else None
    if not given and isinstance(hosted, str) and told.get("track") in CLASSES:
        return hosted, told["track"]
    cascade = read_cascade(find_path(given) if given else find_cascade(folder, None))
    return str(cascade.told.get("hosted") or "hosted"), cascade.track


# -- What is watched -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alarm:
    """`kind` is one of KINDS, `why` one line with the numbers, `rows` the ids of requests that show it, `at` the time of what raised it (unix s)."""

    kind: str
    name: str
    why: str
    at: float
    rows: list[str]
    takes_back: bool

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "name": self.name, "why": self.why, "at": self.at}


@dataclass
class Watched:
    """One thing that is tested; `most` is the share allowed of `what`, `detector` None where nothing can be tested. Confidence has a `what` for each part."""

    kind: str
    name: str
    what: str | list[str]
    of: str  # what is counted: audited requests, minutes
    most: float | None
    detector: EDetector | Mixture | None
    alarm: Alarm | None = None
    recent: deque = field(default_factory=lambda: deque(maxlen=200))  # (number, id) of the audits that disagree
    seen: int = 0
    total: float = 0.0

    def add(self, x: float | list[float], money: float) -> bool:
        self.seen += 1
        self.total += x[-1] if isinstance(x, list) else x
        return self.detector is not None and self.detector.add(x, money)

    @property
    def share(self) -> float | None:
        return self.total / self.seen if self.seen else None

    def why(self) -> str:
        """The numbers of an alarm."""
        part, most, what = self.detector, self.most, self.what
        if isinstance(self.detector, Mixture):
            part, what = max(zip(self.detector.parts, self.what, strict=True), key=lambda one: one[0].evidence)
            most = part.allowed
        start, before = part.since
        n, total = part.seen - start + 1, part.total - before
        counted = f"the mean of the last {n:,} minutes with requests" if self.of == "minutes" else f"{total:.0f} of the last {n:,} audited requests"
        return f"{self.name}: {total / n:.1%} of the {what} ({counted}; allowed {most:.1%})"

    def rows(self) -> list[str]:
        start = self.detector.since[0] if isinstance(self.detector, EDetector) else 0
        return [name for number, name in self.recent if number >= start][-SHOWN_ROWS:]


def testable(most: float | None, alarm_at: float) -> EDetector | None:
    return EDetector(most, alarm_at) if most is not None and 0 < most < 1 else None


def _is_audit(value: dict[str, Any]) -> bool:
    tool, tools = value.get("tool"), value.get("tools", [])
    if not (isinstance(tools, list) and all(isinstance(name, str) for name in tools)):
        return False
    return _number(value.get("time")) and isinstance(value.get("id"), str) and type(value.get("agree")) is bool and isinstance(tool, str | None)


def _tools(audit: dict[str, Any], known: Mapping[str, Any]) -> list[str]:
    """The tools that an audit's reply calls, each once. Earlier versions wrote those of several calls as one name."""
    tool = audit.get("tool")
    if "tools" in audit or tool is None:
        return list(dict.fromkeys(audit.get("tools", ())))
    return [tool] if tool in known else tool.split(TOOLS_BETWEEN)


def _is_minute(value: dict[str, Any]) -> bool:
    requests = value.get("requests")
    if not (_number(value.get("time")) and isinstance(requests, dict) and _count(value.get("failures", 0)) and _count(value.get("unlike") or 0)):
        return False
    signal = value.get("signal") or {}
    good = isinstance(signal, dict) and all(isinstance(bins, list) and len(bins) == BINS and all(map(_count, bins)) for bins in signal.values())
    return good and all(isinstance(reasons, dict) and all(map(_count, reasons.values())) for reasons in requests.values())


def _number(value: Any) -> bool:
    return not isinstance(value, bool | str) and value is not None and not isinstance(value, list | dict) and math.isfinite(value)


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


class Order:
    """The numbers of minutes in the order in which they come, so that a clock that was set, forward or back, holds up none.

    Minutes of one clock that was not set have consecutive numbers. A minute that is more than LATE minutes behind the newest one, or
    more than two ahead of it, is of a clock that was set (or follows a gap): its number is the next one, all before it are over, and later ones count from
    there. A worker that is still at the clock's former time goes on with the former numbers. `over`: the minutes below this number are.
    """

    def __init__(self) -> None:
        self.newest, self.over = -1, 0  # the highest number so far
        self._clocks: deque[tuple[int, int]] = deque(maxlen=2)  # (the newest minute, its number less itself), the one in use first

    def number(self, minute: int) -> int:
        for clock in list(self._clocks):
            last, shift = clock
            ahead = 2 if clock == self._clocks[0] else 1
            if -LATE <= minute - last <= ahead and minute + shift >= self.newest - LATE:
                self._clocks.remove(clock)
                break
        else:
            last, shift = minute, self.newest + 1 - minute
            self.over = self.newest + 1
        self._clocks.appendleft((max(last, minute), shift))
        self.newest = max(self.newest, minute + shift)
        self.over = max(self.over, self.newest - 1)
        return minute + shift


@dataclass
class Minute:
    """One minute of all workers; `at` is its beginning (unix s)."""

    at: float = 0.0
    requests: Counter = field(default_factory=Counter)  # (answered by, reason)
    failures: int = 0
    unlike: int = 0
    signal: dict[str, list[int]] = field(default_factory=dict)
    latency: dict[str, list[list[float]]] = field(default_factory=dict)
    saved: list[float] = field(default_factory=lambda: [0.0, 0, 0])  # the sum, lines that know it, lines that do not

    def take(self, told: dict[str, Any]) -> None:
        self.requests.update({(by, reason): n for by, reasons in told["requests"].items() for reason, n in reasons.items()})
        self.failures += told.get("failures", 0)
        self.unlike += told.get("unlike") or 0
        known = _number(told.get("saved"))
        self.saved = [a + b for a, b in zip(self.saved, [float(told["saved"]) if known else 0.0, known, not known], strict=True)]
        for name, bins in (told.get("signal") or {}).items():
            self.signal[name] = [a + b for a, b in zip(self.signal.get(name, [0] * BINS), bins, strict=True)]
        for by, found in (told.get("latency") or {}).items():
            if isinstance(found, list) and len(found) == 3 and all(map(_number, found)):
                self.latency.setdefault(by, []).append([float(value) for value in found])

    @property
    def asked(self) -> int:
        """Requests that were answered, and those that nobody answered."""
        return sum(self.requests.values()) + self.failures

    def decided(self) -> tuple[int, int]:
        """Requests that the rule decided on, and those of them that it handed on."""
        on = sum(n for (by, reason), n in self.requests.items() if by != "local" and reason in DECIDED)
        return on + sum(n for (by, _), n in self.requests.items() if by == "local"), on


class Watch:
    """The watch over one state folder: `read` takes what has come and gives the new alarms."""

    def __init__(self, folder: Path, allowed: Allowed, alarms_in: int, warnings_in: int, failures: float, take_back_on: tuple[str, ...] = TAKES_BACK):
        self.folder, self.allowed, self.alarms_in, self.warnings_in = folder, allowed, alarms_in, warnings_in
        self.failures, self.take_back_on = failures, take_back_on
        self._begin()

    def _begin(self, replaced: bool = False) -> None:
        self.replaced, self.restart = replaced, read_restart(self.folder)
        starts = (0, 0) if replaced else (self.restart.audits, self.restart.minutes)
        self.audits, self.minutes = (Tail(self.folder / name, start) for name, start in zip((AUDITS, MINUTES), starts, strict=True))
        self.unusable, self.last_audit, self.last_minute = 0, None, None
        self.disagreeing: deque = deque(maxlen=SHOWN_ROWS)  # audits
        self.total, self.recent = Minute(), deque(maxlen=RECENT_MINUTES)
        self._open: dict[int, Minute] = {}
        self._order, self._closed = Order(), -1
        allowed, shared = self.allowed, 2 * self.alarms_in if self.allowed.tools else self.alarms_in
        differ, minutes, late = "replies differ from the hosted model's", "minutes", self.warnings_in
        self.overall = Watched("disagreement", "disagreement", differ, "audited requests", allowed.disagreement, testable(allowed.disagreement, shared))
        self.tools = {
            name: Watched("tools", f"disagreement on {name}", differ, "audited requests", most, testable(most, shared)) for name, most in allowed.tools.items()
        }
        least, most = allowed.handed_on
        self.failing = Watched("failures", "failures", "requests failed", minutes, self.failures, testable(self.failures, late))
        self.more = Watched("handed_on", "handed on", "requests were handed on to the hosted model", minutes, most, testable(most, late))
        self.less = Watched("handed_on", "answered locally", "requests were answered locally", minutes, 1 - least, testable(1 - least, late))
        self.signals = {name: self._signal(name, units) for name, units in allowed.units.items()}

    def _signal(self, name: str, units: int) -> Watched:
        """All of a class' quantiles hold at once with a probability of 1 - ALPHA (Dvoretzky, Kiefer and Wolfowitz; one-sided, Massart 1990)."""
        margin = math.sqrt(math.log(1 / ALPHA) / (2 * units)) if units else 1.0
        most = [low / BINS + margin for low in LOW_BINS]
        what = [f"replies are as unsure as the least sure {low / BINS:.0%} of the calibration" for low in LOW_BINS]
        detector = Mixture(most, self.warnings_in) if most[-1] < 1 else None
        return Watched("confidence", f"confidence ({name})", what, "minutes", most[-1], detector)

    @property
    def everything(self) -> list[Watched]:
        return [self.overall, *self.tools.values(), self.failing, self.more, self.less, *self.signals.values()]

    @property
    def alarms(self) -> list[Alarm]:
        return [one.alarm for one in self.everything if one.alarm]

    @property
    def damaged(self) -> int:
        return self.audits.damaged + self.minutes.damaged + self.unusable

    def read(self, final: bool = False) -> list[Alarm]:
        """Take what has come since the last time and give the alarms that it raises. A minute is taken when a later one but one has begun, as workers
        write theirs one after the other; with `final`, every one. Which is later, `Order` says: the clock may be set.

        Raises:
            UserError: a file cannot be read.
        """
        if read_restart(self.folder) != self.restart:
            self._begin()
        try:
            return self._read(final)
        except Replaced:
            self._begin(replaced=True)
            return self._read(final)

    def _read(self, final: bool) -> list[Alarm]:
        found = []
        for audit in self.audits.new():
            if not _is_audit(audit):
                self.unusable += 1
            else:
                found += self._take_audit(audit)
        for minute in self.minutes.new():
            if not _is_minute(minute):
                self.unusable += 1
            else:
                self.last_minute = float(minute["time"])
                began = int(minute["time"] // 60)
                number = max(self._order.number(began), self._closed + 1)
                self._open.setdefault(number, Minute(60.0 * began)).take(minute)
                found += self._close(self._order.over)
        return found + (self._close(math.inf) if final else [])

    def _close(self, before: float) -> list[Alarm]:
        """Take the minutes whose numbers are below `before`."""
        found = []
        for number in sorted(number for number in self._open if number < before):
            self._closed = number
            found += self._take_minute(self._open.pop(number))
        return found

    def _take_audit(self, audit: dict[str, Any]) -> list[Alarm]:
        self.last_audit = float(audit["time"])
        differs, found = not audit["agree"], []
        if differs:
            self.disagreeing.append(audit)
        names = _tools(audit, self.allowed.tools)
        for tool in names:
            if tool not in self.tools:
                self.tools[tool] = Watched("tools", f"disagreement on {tool}", "", "audited requests", None, None)  # shown alone: no bound of its own
        tools = [self.tools[tool] for tool in names]
        share = 1 / max(1, sum(one.detector is not None for one in tools))  # so that all tools together keep their rate of false alarms
        for one, money in ((self.overall, 1.0), *((one, share) for one in tools)):
            if differs:
                one.recent.append((one.seen + 1, audit["id"]))
            found += self._add(one, float(differs), self.last_audit, money)
        return found

    def _take_minute(self, minute: Minute) -> list[Alarm]:
        at = minute.at
        self.recent.append(minute)
        for name in ("requests", "failures", "unlike"):
            setattr(self.total, name, getattr(self.total, name) + getattr(minute, name))
        self.total.saved = [a + b for a, b in zip(self.total.saved, minute.saved, strict=True)]
        found = self._add(self.failing, minute.failures / minute.asked, at) if minute.asked else []
        decided, on = minute.decided()
        if decided:
            found += self._add(self.more, on / decided, at) + self._add(self.less, 1 - on / decided, at)
        for name, bins in minute.signal.items():
            if sum(bins) and name in self.signals:
                found += self._add(self.signals[name], [sum(bins[:low]) / sum(bins) for low in LOW_BINS], at)
        return found

    def _add(self, one: Watched, x: float | list[float], at: float, money: float = 1.0) -> list[Alarm]:
        if not one.add(x, money):
            return []
        one.alarm = Alarm(one.kind, one.name, one.why(), at, one.rows(), one.kind in self.take_back_on)
        return [one.alarm]


# -- Starting anew ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Restart:
    """When the detectors were last started anew (unix s, 0: never), how many bytes the files had then, and the sha256 of the cascade since then."""

    time: float = 0.0
    audits: int = 0
    minutes: int = 0
    cascade: str | None = None


def read_restart(folder: Path) -> Restart:
    """The last one.

    Raises:
        UserError: restart.json cannot be read.
    """
    if not os.path.lexists(folder / RESTART):
        return Restart()
    told = read_json(folder / RESTART, "05_serve/watch.py --resume")
    if not (_number(told.get("time")) and _count(told.get("audits")) and _count(told.get("minutes"))):
        raise UserError(f"{shown_path(folder / RESTART)} does not say from where on: write it again with 05_serve/watch.py --resume")
    cascade = told.get("cascade")
    return Restart(float(told["time"]), told["audits"], told["minutes"], cascade if isinstance(cascade, str) else None)


def restart(folder: Path) -> None:
    """Start the detectors anew from here on, in every watcher of this folder.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        cascade = read_restart(folder).cascade
    except UserError:
        cascade = None
    audits, minutes = (path.stat().st_size if (path := folder / name).exists() else 0 for name in (AUDITS, MINUTES))
    _write(folder, Restart(time.time(), audits, minutes, cascade))


def begin(folder: Path, allowed: Allowed) -> bool:
    """Start the detectors anew where they have gone by another cascade so far: what was audited under that one says nothing of this one.

    Raises:
        UserError: the folder cannot be written, or restart.json cannot be read.
    """
    so_far = read_restart(folder)
    if so_far.cascade == allowed.sha256:
        return False
    if so_far.cascade:
        restart(folder)
    _write(folder, replace(read_restart(folder), cascade=allowed.sha256))
    return so_far.cascade is not None


def _write(folder: Path, told: Restart) -> None:
    write_json(folder / RESTART, {"schema_version": SCHEMA_VERSION, "created_at": now()} | asdict(told), ADVICE)
