"""Progress where nobody looks at a terminal."""

import sys
import threading

import pytest

from slm_swap.common.progress import Progress, duration, last_line


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("given", "updates", "seconds", "line"),
    [
        ({"total": 300}, [100, 20], 60, "toolcall slm: 120 of 300 rows, 2 rows/s, 2 min left"),
        ({"total": 300}, [240], 60, "toolcall slm: 240 of 300 rows, 4 rows/s, 15 s left"),
        ({"total": 300, "earlier": 200}, [200, 50], 50, "toolcall slm: 250 of 300 rows, 1 rows/s, 50 s left"),
        ({"total": 300, "earlier": 200}, [150], 30, "toolcall slm: 150 of 300 rows after 30 s"),
        ({"total": 12_000, "unit": "steps"}, [], 30, "toolcall slm: 0 of 12,000 steps after 30 s"),
        ({}, [1500], 30, "toolcall slm: 1,500 rows, 50 rows/s"),
        ({}, [], 7200, "toolcall slm: at work for 2.0 h"),
    ],
)
def test_a_line_has_what_was_done_the_rate_and_the_time_left(given, updates, seconds, line):
    clock = Clock()
    with Progress("toolcall slm", clock=clock, **given) as shown:
        for number in updates:
            shown.update(number)
        clock.now += seconds
        assert shown.line() == line


def test_what_was_done_before_is_no_rate():
    clock = Clock()
    with Progress("training", None, "steps", clock=clock) as shown:
        shown.expect(100, 40)
        clock.now += 10
        assert shown.line() == "training: 40 of 100 steps after 10 s"
        shown.update(20)
        assert shown.line() == "training: 60 of 100 steps, 2 steps/s, 20 s left"


def test_without_a_terminal_there_are_lines_also_while_nothing_ends(monkeypatch):
    told, enough = [], threading.Event()

    class Stream:
        def isatty(self):
            return False

        def write(self, text):
            told.append(text)
            if "".join(told).count("\n") >= 2:
                enough.set()

        def flush(self):
            pass

    monkeypatch.setattr(sys, "stderr", Stream())
    with Progress("eval", 4, every=0.01):
        assert enough.wait(60)
    lines = "".join(told).splitlines()
    assert len(lines) >= 2 and all(line.startswith("eval: 0 of 4 rows after ") for line in lines)
    assert not any(thread.name == "progress of eval" for thread in threading.enumerate())
    told.clear()
    with Progress("eval", 4, every=0.01, shown=False) as shown:
        shown.update()
        shown.say("not by this process")
    assert told == []


def test_the_last_line_of_a_log_is_taken_where_it_is_one_of_progress(tmp_path):
    log = tmp_path / "eval.log"
    for text, found in (
        ("warning: x\ntoolcall slm: 120 of 1,300 rows, 2.1 rows/s, 9 min left\n", "toolcall slm: 120 of 1,300 rows, 2.1 rows/s, 9 min left"),
        ("toolcall slm: 0 of 300 rows after 30 s", "toolcall slm: 0 of 300 rows after 30 s"),
        ("toolcall slm: 120 of 300 rows, 2.1 rows/s, 86 s left\nreport: x.json\n", None),
        ("", None),
    ):
        log.write_text(text)
        assert last_line(log) == found


def test_durations():
    assert [duration(seconds) for seconds in (0.4, 89.4, 90, 5399, 5400)] == ["0 s", "89 s", "2 min", "90 min", "1.5 h"]
