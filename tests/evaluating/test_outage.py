"""A hosted model that stops answering: pauses, one probe at a time, and an end that keeps everything."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_swap.clients.protocol import Reply
from slm_swap.common.errors import UserError
from slm_swap.evaluating.journal import journal_path
from slm_swap.evaluating.outage import Outage
from tests.evaluating.conftest import ROWS
from tests.support.scripted import DOWN, plain, refused

FAILED, REFUSED, ANSWER = Reply("", "error", error="503", transient=True), Reply("", "error", error="422"), Reply("{}")


class Time:
    """A clock that only sleeping moves."""

    def __init__(self):
        self.now, self.slept = 0.0, []

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


def patient(minutes=5.0, failures=3):
    time, said = Time(), []
    return Outage(minutes, failures, lambda: time.now, time.sleep, said.append), time, said


class Service:
    """Answers requests by a script, in the order in which they come; once it is used up, all are answered."""

    def __init__(self, script, rows):
        self.script, self.rows, self.streams = list(script), rows, 0

    def ask(self, index):
        return self.script.pop(0) if self.script else ANSWER

    def stream(self, answered):
        self.streams += 1
        return ((index, self.ask(index)) for index in range(self.rows) if index not in answered)


def run(script, rows=6, answered=(), **options):
    outage, time, said = patient(**options)
    service = Service(script, rows)
    return list(outage.replies(service.stream, service.ask, answered)), service, time, said, outage


def test_failures_here_and_there_are_given_as_they_come():
    replies, service, time, said, _ = run([ANSWER, FAILED, FAILED, ANSWER, FAILED, FAILED])
    assert replies == list(enumerate([ANSWER, FAILED, FAILED, ANSWER, FAILED, FAILED]))
    assert (service.streams, time.slept, said) == (1, [], [])


def test_an_outage_is_waited_out_and_its_rows_are_asked_again():
    replies, service, time, said, outage = run([ANSWER, FAILED, FAILED, FAILED, FAILED, FAILED])
    assert sorted(index for index, _ in replies) == list(range(6)) and all(reply == ANSWER for _, reply in replies)
    assert time.slept == [5, 10, 20] and outage.paused == 35 and service.streams == 2
    assert len(said) == 2 and said[0].startswith("3 requests failed in a row (503): pausing") and said[1].startswith("answered again after 35 s")


def test_a_refused_request_shows_that_the_service_is_there():
    replies, _, time, *_ = run([FAILED, FAILED, REFUSED, FAILED, FAILED, ANSWER])
    assert [reply for _, reply in replies] == [FAILED, FAILED, REFUSED, FAILED, FAILED, ANSWER] and time.slept == []


def test_without_an_answer_the_run_ends_after_the_minutes():
    outage, time, said = patient(minutes=5)
    service, given = Service([ANSWER, *[FAILED] * 99], 40), []
    with pytest.raises(UserError, match=r"no answer for 5 minutes \(last: 503\).*--outage-minutes"):
        for reply in outage.replies(service.stream, service.ask, ()):
            given.append(reply)
    assert given == [(0, ANSWER)], "no failure of the outage is booked as a miss"
    assert time.now == 300 and time.slept == [5, 10, 20, 40, 60, 60, 60, 45] and len(said) == 1


@given(st.lists(st.sampled_from([FAILED, FAILED, REFUSED, ANSWER]), max_size=60), st.sets(st.integers(0, 19)), st.integers(1, 5))
def test_every_row_gets_one_reply_whatever_fails(script, answered, failures):
    replies, _, _, said, _ = run(script, 20, answered, failures=failures, minutes=10**6)
    assert sorted(index for index, _ in replies) == sorted(set(range(20)) - answered)
    assert len(said) % 2 == 0


# In a whole evaluation


@pytest.fixture
def quick(monkeypatch, eval_script):
    """Outages are seen after four failures, and waiting takes no time."""
    time = Time()
    monkeypatch.setattr(eval_script, "Outage", lambda minutes: Outage(minutes, 4, lambda: time.now, time.sleep))
    return time


def test_an_outage_ends_the_run_and_the_same_command_goes_on(hosted, quick):
    asked = []

    def dies(prompt, before, body, answer):
        asked.append(prompt)
        return answer if len(asked) <= 10 else DOWN

    hosted.server.script = dies
    code, _, error = hosted.run("--concurrency", 4)
    assert code == 2 and not hosted.out.exists()
    pausing, ended, kept = error.splitlines()[-3:]
    assert pausing.startswith("4 requests failed in a row (503 after 1 try: no healthy upstream): pausing")
    assert kept.startswith("error: no answer for 5 minutes") and "10 of 24 rows are answered and kept" in ended
    journal = [json.loads(line) for line in journal_path(hosted.out).read_text().splitlines()]
    assert sum("row" in line for line in journal) == 10 and quick.now == 300
    hosted.server.script = plain
    hosted.requests()
    assert hosted.run()[0] == 0 and hosted.requests() == len(ROWS) - 10
    assert hosted.report()["counts"]["unmeasured"]["failed"] == 0 and hosted.report()["metrics"]["exact_match_rate"] == 1


def test_a_short_outage_costs_no_row(hosted, quick):
    asked = []

    def blinks(prompt, before, body, answer):
        asked.append(prompt)
        return DOWN if 8 < len(asked) <= 14 else answer

    hosted.server.script = blinks
    code, _, error = hosted.run("--concurrency", 3)
    assert code == 0 and "answered again" in error and hosted.report()["metrics"]["exact_match_rate"] == 1
    assert hosted.report()["seconds"]["generate"] < 60, "the pauses are no time of the model's"


def test_refused_requests_are_no_outage(hosted, quick):
    hosted.server.script = lambda prompt, before, body, answer: answer if prompt == "Say 0" else refused(422, None, "no")
    code, _, error = hosted.run()
    assert code == 0 and "pausing" not in error and hosted.report()["counts"]["failed_requests"] == 23 and quick.slept == []
