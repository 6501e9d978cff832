"""The watch over a state folder: what is allowed, what raises an alarm, damaged files, starting anew."""

import errno
import json
import os
import random

import pytest

from slm_swap.common.errors import UserError
from slm_swap.serving import state
from slm_swap.serving.state import Tail
from slm_swap.serving.watch_page import cautions, verdict_line, write_page
from slm_swap.serving.watching import KINDS, TAKES_BACK, Watch, find_cascade, read_allowed, restart
from slm_swap.verdict.stats.e_detector import EDetector
from slm_swap.verdict.stats.regret import upper_bound
from tests.serving import states
from tests.serving.states import append, audit, line, minute


@pytest.fixture
def folder(tmp_path):
    return states.state(tmp_path / "state")


@pytest.fixture
def watch(folder):
    """A function that begins a watch, as a new process would."""
    return lambda **more: Watch(folder, read_allowed(find_cascade(folder, None)), **{"alarms_in": 1000, "warnings_in": 1000, "failures": 0.01} | more)


def names(alarms) -> set[str]:
    return {alarm.name for alarm in alarms}


# -- What is allowed -------------------------------------------------------------------------------------------------------------


def test_upper_bounds_of_clopper_and_pearson():
    assert upper_bound(0, 100, 0.05) == pytest.approx(1 - 0.05 ** (1 / 100))
    assert upper_bound(0, 0, 0.05) == upper_bound(5, 5, 0.05) == 1
    assert upper_bound(5, 50, 0.025) == pytest.approx(0.2181, abs=1e-4)  # the textbook's 95% interval of 5 in 50: 3.3% to 21.8%


def test_what_a_cascade_allows(tmp_path):
    told = read_allowed(states.cascade(tmp_path / "cascade.json"))
    assert told.disagreement == 0.05 and told.hosted == "gpt-x" and told.units == {"call": 1000, "no_call": 0}
    assert told.tools == {"order_status": 0.05, "rare": upper_bound(0, 5, 0.05 / 3)}  # never below the bound of all; `never` cannot be tested
    low, high = told.handed_on
    assert low == pytest.approx(1 - upper_bound(900, 1000, 0.025)) and high == upper_bound(100, 1000, 0.025) and 0.08 < low < 0.1 < high < 0.13


def test_rows_of_a_group_are_no_further_evidence(tmp_path):
    told = read_allowed(states.cascade(tmp_path / "cascade.json", units={"by": "group", "count": 100}))
    assert told.grouped and told.handed_on == (1 - upper_bound(90, 100, 0.025), upper_bound(10, 100, 0.025))


@pytest.mark.parametrize(
    "broken",
    [{"stage": "compare"}, {"share_local": 1.5}, {"disagreement": None}, {"disagreement": {}}, {"disagreement": {"bound": 2}},
     {"units": {"by": "row", "count": 0}}, {"rules": {}}, {"rules": {"call": {"units": -1}, "no_call": {"units": 9}}}, {"per_tool": {"t": {"local": 1}}},
     {"per_tool": {"t": {"local": 1, "disagreements": 2}}}, {"rules": []}],
)  # fmt: skip
def test_no_cascade(tmp_path, broken):
    with pytest.raises(UserError, match=r"cascade\.json is no cascade of this version: make it with 03_compare/calibrate\.py"):
        read_allowed(states.cascade(tmp_path / "cascade.json", **broken))


def test_the_cascade_is_the_one_that_is_served(folder, tmp_path):
    assert find_cascade(folder, None) == find_cascade(folder, str(tmp_path / "cascade.json")) == tmp_path / "cascade.json"
    states.cascade(tmp_path / "cascade.json", share_local=0.5)
    for given in (None, str(tmp_path / "cascade.json")):
        with pytest.raises(UserError, match="is not the cascade that is served"):
            find_cascade(folder, given)
    (folder / "endpoint.json").unlink()
    with pytest.raises(UserError, match="pass --cascade FILE"):
        find_cascade(folder, None)


# -- Disagreement ----------------------------------------------------------------------------------------------------------------


def test_a_quiet_endpoint_is_quiet(folder, watch):
    drawn = random.Random(1)
    append(folder / "audits.jsonl", *(audit(number, drawn.random() > 0.02) for number in range(800)))
    append(folder / "minutes.jsonl", *(minute(number, signal={"call": [5] * 20}) for number in range(200)))
    found = watch()
    assert found.read(final=True) == [] and found.overall.seen == 800 and found.failing.seen == 200
    assert verdict_line(found).startswith("quiet: 800 audited requests") and cautions(found) == []


def test_more_disagreement_than_allowed_is_an_alarm_with_the_requests_that_show_it(folder, watch):
    append(folder / "audits.jsonl", *(audit(number, True) for number in range(300)))
    found = watch()
    assert found.read() == []
    append(folder / "audits.jsonl", *(audit(number, number % 3 > 0, None) for number in range(300, 400)))
    [alarm] = found.read()
    assert (alarm.kind, alarm.name, alarm.takes_back) == ("disagreement", "disagreement", True)
    assert "of the replies differ from the hosted model's" in alarm.why and "allowed 5.0%" in alarm.why and alarm.at < states.START + 400
    assert alarm.rows[0] == "r300" and set(alarm.rows) <= {f"r{number}" for number in range(300, 400, 3)}
    assert found.read() == [] and found.alarms == [alarm]  # told once


def test_one_bad_tool_is_named(folder, watch):
    """One in forty requests: too few to show in all of them."""
    audits = [audit(number, number % 40 > 0 or number < 400, "rare" if number % 40 == 0 else "order_status") for number in range(1200)]
    append(folder / "audits.jsonl", *audits)
    found = watch()
    [alarm] = found.read()
    assert (alarm.kind, alarm.name) == ("tools", "disagreement on rare") and found.tools["rare"].most > 0.5
    assert found.overall.detector.alarm_at == found.tools["rare"].detector.alarm_at == 2000


def test_a_tool_that_the_calibration_does_not_know_is_shown_and_not_tested(folder, watch):
    append(folder / "audits.jsonl", *(audit(number, number > 0, "new") for number in range(50)))
    found = watch()
    assert found.read() == [] and found.tools["new"].seen == 50 and found.tools["new"].share == 0.02
    assert any("not tested" in told and "disagreement on new" in told for told in cautions(found))


def test_an_audit_of_several_calls_counts_for_each_tool_of_its_reply(folder, watch):
    """As an earlier version wrote them, too."""
    both, new = {"tools": ["order_status", "rare"]}, {"tools": ["rare", "new", "rare"]}
    audits = [audit(0, False, "order_status, rare"), audit(1, False, "order_status, rare") | both, audit(2, True, "rare, new") | new, audit(3, True, "rare")]
    append(folder / "audits.jsonl", *audits)
    found = watch()
    found.read()
    assert {name: (one.seen, one.total) for name, one in found.tools.items() if one.seen} == {"order_status": (2, 2), "rare": (4, 2), "new": (1, 0)}
    assert found.overall.seen == 4 and next(told for told in cautions(found) if "not tested" in told).endswith(": disagreement on new")
    by_hand = EDetector(found.tools["rare"].most, 2000)
    for x, money in ((1, 0.5), (1, 0.5), (0, 1), (0, 1)):  # shared by two tools that are tested, then alone
        by_hand.add(x, money)
    assert found.tools["rare"].detector.evidence == by_hand.evidence


def test_a_bad_tool_is_found_in_replies_of_several_calls(folder, watch):
    tools = {"tools": ["order_status", "rare"]}
    append(folder / "audits.jsonl", *(audit(number, number % 40 > 0, "x") | (tools if number % 40 == 0 else {"tools": ["order_status"]}) for number in range(1200)))
    assert names(watch().read()) == {"disagreement on rare"}


def test_without_tools_the_one_detector_has_the_whole_rate(tmp_path):
    folder = states.state(tmp_path / "state", per_tool=None)
    found = Watch(folder, read_allowed(find_cascade(folder, None)), 1000, 1000, 0.01)
    assert found.tools == {} and found.overall.detector.alarm_at == 1000


@pytest.mark.parametrize("bound", [1.0, None])
def test_a_bound_of_everything_or_none_is_not_tested(tmp_path, bound):
    folder = states.state(tmp_path / "state", disagreement={"seen": None, "bound": bound, "units": 0}, per_tool={})
    append(folder / "audits.jsonl", *(audit(number, False) for number in range(100)))
    found = Watch(folder, read_allowed(find_cascade(folder, None)), 1000, 1000, 0.01)
    assert found.read() == [] and any("not tested" in told and "disagreement" in told for told in cautions(found))


# -- Minutes ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "change"),
    [
        ("failures", "failures", {"failures": 20}),
        ("handed on", "handed_on", {"local": 60, "handed_on": 40}),
        ("answered locally", "handed_on", {"local": 100, "handed_on": 0}),
        ("confidence (call)", "confidence", {"signal": {"call": [20] * 5 + [0] * 15}}),
    ],
)
def test_each_change_of_the_traffic_is_told_as_what_it_is(folder, watch, name, kind, change):
    usual = {"signal": {"call": [5] * 20}}
    append(folder / "minutes.jsonl", *(minute(number, **usual) for number in range(100)), *(minute(number, **usual | change) for number in range(100, 400)))
    [alarm] = watch().read(final=True)
    assert (alarm.name, alarm.kind, alarm.takes_back) == (name, kind, kind in TAKES_BACK) and alarm.at >= states.START + 6000
    [alarm] = watch(take_back_on=KINDS).read(final=True)
    assert alarm.takes_back


def test_workers_of_one_minute_are_one_observation_and_other_reasons_are_not_the_rule_s(folder, watch):
    stopped = {"hosted": {"stopped": 50, "mode": 50, "queue_full": 3}}
    append(folder / "minutes.jsonl", minute(0), minute(0, 10, 90, failures=50) | {"worker": 2}, minute(1) | {"requests": stopped}, minute(2, 0, 0))
    found = watch()
    found.read(final=True)
    assert found.failing.seen == 2 and found.failing.total == 0.2
    assert found.more.seen == 1 and found.more.share == pytest.approx(0.5) and found.less.share == pytest.approx(0.5)
    assert found.total.requests["hosted", "stopped"] == 50


def test_a_minute_is_taken_when_no_worker_can_still_add_to_it(folder, watch):
    append(folder / "minutes.jsonl", minute(0), minute(1))
    found = watch()
    found.read()
    assert found.failing.seen == 0
    append(folder / "minutes.jsonl", minute(0) | {"worker": 2}, minute(2), minute(3))
    found.read()
    assert found.failing.seen == 2 and found.total.requests["local", "local"] == 270  # minutes 0 (both workers) and 1
    append(folder / "minutes.jsonl", minute(0) | {"worker": 3})  # too late for its own: it counts with the next
    found.read(final=True)
    assert found.failing.seen == 4 and found.total.requests["local", "local"] == 540


YEARS, HOURS = 9 * 365 * 1440, 120  # minutes
STEPS = {
    "forward": [*range(10), *range(YEARS, YEARS + 20)],
    "back by two hours": [*range(10), *range(10 - HOURS, 30 - HOURS)],
    "2036 for five minutes": [*range(10), *range(YEARS, YEARS + 5), *range(15, 30)],
    "2036 for an hour, then back to where it was": [*range(10), *range(YEARS, YEARS + 60), *range(9, 30)],
    "back by two hours, then right": [*range(10), *range(10 - HOURS, 15 - HOURS), *range(15, 30)],
    "a gap of a day": [*range(10), *range(1500, 1520)],
}


@pytest.mark.parametrize("minutes", STEPS.values(), ids=STEPS)
def test_a_clock_that_is_set_holds_up_no_minute_and_tests_none_twice(folder, watch, minutes):
    """Of two workers, read as they come: only the last two minutes are still open."""
    found = watch()
    for come, number in enumerate(minutes, 1):
        for worker in (1, 2):
            append(folder / "minutes.jsonl", minute(number) | {"worker": worker})
            found.read()
        assert come - 2 <= found.failing.seen <= come
    again = watch()
    for one in (found, again):
        one.read(final=True)
        assert one.failing.seen == len(minutes) and one.total.requests["local", "local"] == 180 * len(minutes)
        assert [of.at for of in one.recent] == [states.START + 60 * number for number in minutes][-60:]


@pytest.mark.parametrize("steps", [range(YEARS, YEARS + 5), range(10 - HOURS, 15 - HOURS), range(0)])
def test_failures_after_a_clock_was_set_are_an_alarm_at_once(folder, watch, steps):
    append(folder / "minutes.jsonl", *(minute(number) for number in (*range(10), *steps)))
    found = watch()
    assert found.read() == []
    for number in range(15, 315):
        append(folder / "minutes.jsonl", minute(number, 0, 0, failures=100))
        if alarms := found.read():
            break
    assert names(alarms) == {"failures"} and number < 25


def test_a_worker_that_is_late_when_the_clock_is_set_counts_with_the_next_minute(folder, watch):
    told = [(0, 1), (0, 2), (1, 1), (1, 2), (2, 1), (YEARS, 1), (2, 2), (YEARS + 1, 1), (YEARS, 2), (YEARS + 2, 1), (YEARS + 1, 2), (YEARS + 2, 2)]
    append(folder / "minutes.jsonl", *(minute(number) | {"worker": worker} for number, worker in told))
    found = watch()
    found.read(final=True)
    assert found.failing.seen == 6 and found.total.requests["local", "local"] == 90 * len(told)
    assert [of.requests["local", "local"] for of in found.recent][-3:] == [270, 180, 180]


def test_two_machines_whose_clocks_differ_share_their_minutes(folder, watch):
    found = watch()
    for number in range(50):
        append(folder / "minutes.jsonl", minute(number), minute(number - 30) | {"worker": 2})
        found.read()
        assert found.failing.seen >= number - 3
    found.read(final=True)
    assert 50 <= found.failing.seen <= 53 and found.total.requests["local", "local"] == 90 * 100


# -- Files -----------------------------------------------------------------------------------------------------------------------


def test_damaged_lines_are_counted_and_a_torn_one_is_awaited(folder, watch):
    path, whole = folder / "audits.jsonl", line(audit(1, True))
    changed = whole.replace(b'"agree": true', b'"agree": null')
    unusable = [line(audit(2, True) | {"agree": None}), line({"id": "x"}), line(audit(3, True) | {"tool": 3}), line(audit(4, True) | {"time": True})]
    path.write_bytes(whole + changed + b"\xff\xfe\n" + b"[1]\n" + b"\n" + b"".join(unusable) + line(audit(5, False))[:-20])
    append(folder / "minutes.jsonl", minute(0), minute(1) | {"requests": {"local": 3}}, minute(1, failures=-1), minute(2, signal={"call": [1]}))
    found = watch()
    found.read(final=True)
    assert found.overall.seen == 1 and found.failing.seen == 1 and found.damaged == 3 + len(unusable) + 3
    assert any("10 damaged lines are left out of 12" in told for told in cautions(found))
    with open(path, "ab") as stream:
        stream.write(line(audit(5, False))[-20:])
    found.read()
    assert found.overall.seen == 2 and found.overall.total == 1 and found.damaged == 10


def test_a_watch_of_many_looks_is_one_of_a_single_look(folder, watch):
    drawn, found = random.Random(2), watch()
    for start in range(0, 400, 7):
        tools = [drawn.choice(["order_status", "rare", None]) for _ in range(7)]
        append(folder / "audits.jsonl", *(audit(start + at, drawn.random() > 0.15, tool) for at, tool in enumerate(tools)))
        append(folder / "minutes.jsonl", minute(start, failures=drawn.randrange(3)))
        found.read()
    found.read(final=True)
    anew = watch()
    anew.read(final=True)
    assert anew.alarms == found.alarms and anew.overall.detector.alarm is not None
    assert [(one.seen, one.total, one.detector and one.detector.evidence) for one in anew.everything] == [
        (one.seen, one.total, one.detector and one.detector.evidence) for one in found.everything
    ]


def test_starting_anew_leaves_behind_what_was(folder, watch):
    append(folder / "audits.jsonl", *(audit(number, False) for number in range(50)))
    append(folder / "minutes.jsonl", minute(0, failures=100))
    found = watch()
    assert names(found.read(final=True)) == {"disagreement", "disagreement on order_status"}
    restart(folder)
    append(folder / "audits.jsonl", audit(0, True))  # a worker's clock does not matter
    for one in (found, watch()):
        assert one.read(final=True) == [] and one.alarms == [] and (one.overall.seen, one.failing.seen) == (1, 0)
    append(folder / "audits.jsonl", *(audit(number, False) for number in range(50)))
    assert "disagreement" in names(found.read())


@pytest.mark.parametrize("told", ['{"time": 1}', '{"time": 1, "audits": -1, "minutes": 0}', "{}", "x"])
def test_a_damaged_restart_is_one_line(folder, watch, told):
    (folder / "restart.json").write_text(told)
    with pytest.raises(UserError, match=r"restart\.json"):
        watch()


@pytest.mark.parametrize("how", ["shorter", "another", "gone"])
def test_a_file_that_is_replaced_is_read_from_its_beginning(folder, watch, how):
    path = folder / "audits.jsonl"
    append(path, *(audit(number, True) for number in range(20)))
    restart(folder)
    append(path, audit(20, True))
    found = watch()
    found.read()
    assert found.overall.seen == 1 and not found.replaced
    path.rename(folder / "audits.1.jsonl")
    if how != "gone":
        append(path, *(audit(number, True) for number in range(2 if how == "shorter" else 40)))
    found.read()
    assert found.overall.seen == {"shorter": 2, "another": 40, "gone": 0}[how] and found.replaced
    assert any("replaced" in told for told in cautions(found))
    found.read()
    assert found.overall.seen == {"shorter": 2, "another": 40, "gone": 0}[how]


def test_an_endpoint_that_counts_no_confidence_is_told(folder, watch):
    append(folder / "audits.jsonl", audit(0, True))
    append(folder / "minutes.jsonl", minute(0))
    found = watch()
    found.read(final=True)
    assert [told.split(":")[0] for told in cautions(found)] == ["confidence is not watched"]


def test_no_files_yet(folder, watch):
    found = watch()
    assert found.read(final=True) == [] and any("no request has been audited" in told for told in cautions(found))


def test_a_tail_gives_each_line_once(tmp_path):
    tail = Tail(tmp_path / "lines.jsonl")
    assert list(tail.new()) == []
    append(tail.path, {"a": 1}, {"a": 2})
    assert [value["a"] for value in tail.new()] == [1, 2] and list(tail.new()) == []
    append(tail.path, {"a": 3})
    assert [value["a"] for value in tail.new()] == [3] and tail.lines == 3


# -- The flag --------------------------------------------------------------------------------------------------------------------


def test_the_flag_is_raised_once_and_kept_when_it_is_lowered(tmp_path):
    assert state.flag(tmp_path) is None and state.lower_flag(tmp_path) is None
    assert state.raise_flag(tmp_path, "why", [{"name": "a"}], ["r1"]) and not state.raise_flag(tmp_path, "other", [], [])
    told = state.flag(tmp_path)
    assert told["why"] == "why" and told["rows"] == ["r1"] and told["alarms"] == [{"name": "a"}] and told["schema_version"] == 1
    kept = state.lower_flag(tmp_path)
    assert state.flag(tmp_path) is None and json.loads(kept.read_text()) == told and kept.name.startswith("stop-2")
    assert state.raise_flag(tmp_path, "again", [], []) and state.lower_flag(tmp_path) != kept and len(list(tmp_path.glob("stop-*.json"))) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"why": 3}'])
def test_a_flag_that_cannot_be_read_is_up(tmp_path, content):
    (tmp_path / "stop.json").write_text(content)
    assert isinstance(state.flag(tmp_path)["why"], str) and not state.raise_flag(tmp_path, "why", [], [])


def test_a_flag_is_down_only_where_there_is_surely_none(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    for name, up in (("none", False), ("file", False), (".", False), ("loop", True)):
        assert bool(state.Stopped(tmp_path / name)) is up and (state.flag(tmp_path / name) is not None) is up


@pytest.mark.parametrize(("number", "up"), [(errno.EACCES, True), (errno.ESTALE, True), (errno.EIO, True), (errno.ENOENT, False), (errno.ENOTDIR, False)])
def test_a_folder_that_cannot_be_read_counts_as_stopped(tmp_path, monkeypatch, number, up):
    def fails(path, *args, **more):
        raise OSError(number, os.strerror(number), path)

    stopped = state.Stopped(tmp_path)
    with monkeypatch.context() as context:
        context.setattr(os, "lstat", fails)
        found = bool(stopped)
    assert found is up


def test_a_dangling_flag_is_up(tmp_path):
    (tmp_path / "stop.json").symlink_to("nowhere")
    assert state.Stopped(tmp_path) and state.flag(tmp_path)["why"] and not state.raise_flag(tmp_path, "why", [], [])


# -- The page --------------------------------------------------------------------------------------------------------------------


def test_the_page_shows_everything_and_nothing_in_it_acts(folder, watch):
    hostile = "<script>window.ran=1</script>\u202e"
    append(folder / "audits.jsonl", *(audit(number, False, hostile, local={"text": hostile}) | {"id": hostile} for number in range(40)))
    odd = minute(0, latency={"local": [0.25, 0.5, 90]}, saved=0.5, unlike=7) | {"requests": {"local": {"local": 9}, hostile: {hostile: 1}}}
    append(folder / "minutes.jsonl", odd, minute(0, saved=None))
    found = watch()
    [alarm] = found.read(final=True)
    state.raise_flag(folder, alarm.why, [], [hostile])
    page = "".join(write_page(found))
    assert "<script" not in page and "\u202e" not in page and "http" not in page.replace("http-equiv", "") and "default-src &#39;none&#39;" in page
    assert page.count("&lt;script&gt;window.ran=1&lt;/script&gt;\\u202e") > 20
    shown = ("All requests go to the hosted model", "--resume", "--export", "0.25 s, 0.5 s", "0.5; not known of 1 of 2 lines", "100.0%", "gpt-x")
    for told in (*shown, "<td data-head=\"Value\">7</td>"):
        assert told in page
