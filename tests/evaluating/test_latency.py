"""How long a model takes for a row, alone and under load; and how much it differs from itself."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_swap.clients.protocol import Reply
from slm_swap.common.errors import UserError
from slm_swap.evaluating import repeat
from slm_swap.evaluating.latency import alone_rows, local_latency, sample
from slm_swap.evaluating.report import Tally, hosted_latency, spread
from slm_swap.evaluating.row import score_row
from slm_swap.rows.examples import Example
from slm_swap.scoring.tracks import TRACKS
from tests.evaluating.conftest import ROWS
from tests.support.scripted import DOWN, plain


@given(st.integers(1, 500), st.integers(0, 60), st.integers(0, 9))
def test_the_rows_asked_alone_are_few_and_the_seeds(rows, wanted, seed):
    found = alone_rows(rows, wanted, seed)
    assert found == alone_rows(rows, wanted, seed) == sorted(set(found)) and all(0 <= index < rows for index in found)
    assert len(found) == (0 if wanted == 0 else min(wanted, max(1, rows // 10)))


def test_samples_of_two_purposes_are_two_draws():
    assert sample("alone", 42, 1000, 20) != sample("repeat", 42, 1000, 20)


def test_a_hosted_models_latency_leaves_out_what_is_no_answer():
    tally = Tally("structured")
    for reply in (
        Reply("", seconds=2.0, load=1), Reply("", "length", seconds=1.0, load=1), Reply("", "error", seconds=60.0, load=1),
        Reply("", "prompt_too_long", seconds=0.1, load=1), Reply("", seconds=9.0), Reply("", seconds=4.0, load=8),
        *[Reply("", seconds=5.0 + n, load=32) for n in range(3)],
    ):  # fmt: skip
        tally.add(score_row(TRACKS["structured"], Example("p", "{}"), reply))
    assert hosted_latency(tally) == {
        "alone": {"rows": 2, "p50": 1.0, "p95": 2.0}, "loaded": {"concurrency": 32, "rows": 3, "p50": 6.0, "p95": 7.0}, "why": None,
    }  # fmt: skip
    assert hosted_latency(Tally("structured"))["why"] == "no row was asked alone (--latency-rows) or under load (--concurrency)"
    assert spread([]) is None


def test_hosted_rows_are_asked_alone_first_and_never_twice(hosted):
    order = []

    def noted(prompt, before, body, answer):
        order.append((prompt, hosted.server._in_flight))
        return answer

    hosted.server.script = noted
    assert hosted.run("--concurrency", 8)[0] == 0 and hosted.requests() == len(ROWS)
    alone = alone_rows(len(ROWS), 20, 42)
    assert [order[number] for number in range(2)] == [(ROWS[index].prompt, 1) for index in alone]
    loads = [line["load"] for line in hosted.lines()]
    assert [index for index, load in enumerate(loads) if load == 1] == alone and set(loads) == {1, 8}
    latency = hosted.report()["latency"]
    assert (latency["alone"]["rows"], latency["loaded"]["rows"], latency["loaded"]["concurrency"], latency["why"]) == (2, 22, 8, None)
    seconds = sorted(hosted.lines()[index]["seconds"] for index in alone)
    assert (latency["alone"]["p50"], latency["alone"]["p95"]) == tuple(seconds)


def test_without_rows_alone_there_is_a_reason(hosted):
    assert hosted.run("--latency-rows", 0)[0] == 0
    latency = hosted.report()["latency"]
    assert latency["alone"] is None and "--latency-rows" in latency["why"] and latency["loaded"]["rows"] == 24


def test_a_local_model_is_asked_again_with_an_empty_cache():
    class Local:
        def __init__(self):
            self.told = []

        def generate(self, batch):
            self.told.append(len(batch))
            return [Reply("")]

        def forget(self):
            self.told.append("forget")

        def stream(self, rows, answered=()):
            rows = list(rows)
            self.told.append(len(rows))
            return ((index, Reply("", "prompt_too_long" if messages.messages[-1]["content"] == "p3" else "stop")) for index, messages in rows)

    client, examples = Local(), [Example(f"p{n}", "{}") for n in range(40)]
    found = local_latency(client, "structured", examples, 40, 20, 42, 64)
    assert client.told == [1, "forget", *[1] * 4, "forget", 40], "one row to warm up, a tenth of the rows alone, one burst"
    assert found["alone"]["rows"] == 4 - (3 in alone_rows(40, 20, 42)) and found["why"] is None
    assert (found["loaded"]["concurrency"], found["loaded"]["rows"]) == (40, 39)
    assert 0 <= found["loaded"]["p50"] <= found["loaded"]["p95"]
    assert local_latency(Local(), "structured", examples, 40, 0, 42, 8) == {"alone": None, "loaded": None, "why": "--latency-rows 0"}
    only = local_latency(Local(), "structured", [Example("p3", "{}")], 1, 20, 42, 8)
    assert only == {"alone": None, "loaded": None, "why": "every prompt of the sample is longer than the context"}


# --repeat


def changing(prompts, to="nonsense"):
    """A script that answers some prompts otherwise from the second time on."""

    def script(prompt, before, body, answer):
        if prompt in prompts and before:
            answer.body["choices"][0]["message"]["content"] = to
        return answer

    return script


def test_replies_that_differ_are_counted_and_paid_for(hosted):
    hosted.server.script = changing({"Say 1", "Say 2"})
    code, printed, _ = hosted.run("--repeat", 2, "--repeat-rows", 24)
    report = hosted.report()
    assert code == 0 and hosted.requests() == 48
    assert report["repeat"] == {"runs": 2, "rows": 24, "different_text": 2, "exact_changed": 2, "share": 2 / 24}
    assert report["metrics"]["exact_match_rate"] == 1, "the rows' replies are the first ones"
    cost = report["cost"]
    assert cost["repeat"] > 0 and cost["total"] == pytest.approx(cost["repeat"] + cost["per_1000_rows"] * 24 / 1000)
    assert "asked 2 times: 2 of 24 replies have another text, 2 change between right and wrong; asking again cost" in printed
    before = hosted.out.read_bytes()
    assert hosted.run("--repeat", 2)[0] == 0 and hosted.requests() == 0 and hosted.out.read_bytes() == before


def test_another_text_may_be_as_right(hosted):
    hosted.server.script = lambda prompt, before, body, answer: changing({"Say 3"}, '{ "number": 3 }')(prompt, before, body, answer)
    assert hosted.run("--repeat", 3)[0] == 0 and hosted.requests() == 72
    assert hosted.report()["repeat"] == {"runs": 3, "rows": 24, "different_text": 1, "exact_changed": 0, "share": 0.0}


def test_a_finished_report_can_be_repeated_without_asking_its_rows(hosted):
    assert hosted.run()[0] == 0
    first, lines = hosted.report(), hosted.lines()
    assert first["repeat"] is None and hosted.requests() == 24
    assert hosted.run("--repeat", 2, "--repeat-rows", 5)[0] == 0 and hosted.requests() == 5
    second = hosted.report()
    assert second["repeat"]["rows"] == 5 and hosted.lines() == lines and second["again"] == []
    for key in ("metrics", "counts", "tokens", "asked", "latency"):
        assert second[key] == first[key]


def test_a_failed_request_is_no_difference_and_nothing_is_paid_twice(hosted, monkeypatch):
    hosted.server.script = lambda prompt, before, body, answer: DOWN if prompt == "Say 4" and before else answer
    with monkeypatch.context() as patch:  # the run ends after the repeats, before the report
        patch.setattr(hosted._script, "make_report", lambda *_: (_ for _ in ()).throw(UserError("stop")))
        assert hosted.run("--repeat", 2)[0] == 2 and hosted.requests() == 48
    assert hosted.run("--repeat", 2)[0] == 0 and hosted.requests() == 1, "only the one that failed is asked again"
    assert hosted.report()["repeat"] == {"runs": 2, "rows": 24, "different_text": 0, "exact_changed": 0, "share": 0.0}


def test_what_repeats_cost_is_unknown_without_counts():
    class Client:
        kind = "azure"

    assert repeat._cost(Client(), [{"counts": None, "seconds": 1.0}]) is None


def test_several_fingerprints_are_warned_of(hosted):
    def exchanged(prompt, before, body, answer):
        answer.body["system_fingerprint"] = "fp_b" if int(prompt.split()[1]) > 11 else "fp_a"
        return answer

    hosted.server.script = exchanged
    code, _, error = hosted.run()
    assert code == 0 and "2 versions of the hosted model answered (system_fingerprint fp_a, fp_b)" in error
    hosted.server.script = plain
    assert "versions" not in hosted.run("--overwrite")[2]
    assert json.dumps(hosted.report()["model"]["system_fingerprint"]) == '["fp_simulator_42"]'
