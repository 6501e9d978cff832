"""The loop over rows and the report: hashes, counts, means, percentiles."""

import json
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_swap.clients.protocol import Reply
from slm_swap.common.errors import UserError
from slm_swap.common.reports import json_line
from slm_swap.evaluating.evaluation import Stopwatch, evaluate, references, score_replies
from slm_swap.evaluating.report import Digests, Tally, make_report, percentile, summary
from slm_swap.evaluating.row import Row, read_reply, score_row
from slm_swap.evaluating.row_traces import RowTracer, model_name, trace_rows
from slm_swap.rows.examples import Example
from slm_swap.rows.lines import text_hash
from slm_swap.rows.prompts import SYSTEM_PROMPTS
from slm_swap.scoring.metrics import ERRORS, MATCHERS
from slm_swap.scoring.tracks import TRACKS

STRUCTURED = TRACKS["structured"]


class Canned:
    """A client that answers from a map, and remembers how it was asked."""

    kind = "azure"
    load_seconds = 0.25

    def __init__(self, replies):
        self.replies, self.batches = replies, []

    def generate(self, batch):
        self.batches.append(batch)
        return [self.replies[messages.messages[-1]["content"]] for messages in batch]

    def describe(self):
        return {"kind": self.kind, "deployment": "canned"}

    def cost(self, input_tokens, cached_tokens, output_tokens, seconds):
        return input_tokens + 10 * cached_tokens + 100 * output_tokens

    def cost_parts(self, *counts):
        return {"total": self.cost(*counts, 0.0)}

    def close(self):
        pass


EXAMPLES = [Example(f"p{number}", f'{{"a":{number}}}', id=f"r{number}", group="g" if number else None) for number in range(5)]
REPLIES = {
    "p0": Reply('{"a":0}', "stop", 10, 2, 4, 0.5),
    "p1": Reply('{"a":9}', "stop", 20, 3, 0, 1.0),
    "p2": Reply("", "content_filter", 30, 0, 0, 1.5),
    "p3": Reply("", "error", error="HTTP 500"),  # whose tokens are not known
    "p4": Reply('Here: {"a":4}', "stop", 5, 5, 5, 2.0),
}


def run(examples=EXAMPLES, replies=REPLIES, size=2):
    client = Canned(replies)
    rows = evaluate("structured", client, examples, references(STRUCTURED, examples), size)
    return client, rows


def report_of(examples=EXAMPLES, replies=REPLIES):
    client, rows = run(examples, replies)
    return make_report("structured", client, rows, 2.5, 3.0, {"path": "x", "sha256": "y"}, {"seed": 42})


def test_every_row_is_asked_once_in_batches_and_in_order():
    client, rows = run()
    assert [len(batch) for batch in client.batches] == [2, 2, 1]
    assert [messages.messages[1]["content"] for batch in client.batches for messages in batch] == ["p0", "p1", "p2", "p3", "p4"]
    assert all(messages.messages[0]["role"] == "system" for batch in client.batches for messages in batch)
    assert [row.example for row in rows] == EXAMPLES and [row.reply for row in rows] == list(REPLIES.values())
    assert [row.scored.error for row in rows] == [None, "wrong_value", "filtered", "no_json", "extra_text"]


def test_a_client_that_loses_a_row_is_a_bug():
    client = Canned(REPLIES)
    client.generate = lambda batch: [Reply("{}")]
    with pytest.raises(ValueError):
        evaluate("structured", client, EXAMPLES, references(STRUCTURED, EXAMPLES), 2)


def test_bad_gold_stops_before_a_model_is_asked():
    with pytest.raises(UserError, match=r"rows\.jsonl:2: the completion is not a structured reply"):
        references(STRUCTURED, [EXAMPLES[0], Example("p", "{", where="rows.jsonl:2")])


def test_scoring_needs_as_many_replies_as_rows():
    gold = references(STRUCTURED, EXAMPLES)
    assert [scored.error for scored in score_replies(STRUCTURED, gold, REPLIES.values())] == [
        None, "wrong_value", "filtered", "no_json", "extra_text",
    ]  # fmt: skip
    with pytest.raises(ValueError):
        score_replies(STRUCTURED, gold, list(REPLIES.values())[:2])


def test_a_line_of_the_rows_file():
    _, rows = run()
    line = rows[1].to_json(STRUCTURED)
    assert line.pop("scores_by_matcher") == {matcher: line["scores"] for matcher in MATCHERS}
    assert line == {
        "id": "r1",
        "group": "g",
        "tool": None,
        "prompt_sha256": text_hash("p1"),
        "reply": '{"a":9}',
        "calls": None,
        "reference": '{"a":1}',
        "scores": {"json_valid": 1, "exact_match": 0, "field_precision": 0, "field_recall": 0, "field_f1": 0},
        "error": "wrong_value",
        "finish_reason": "stop",
        "reply_error": None,
        "constrained": None,
        "grammar_error": None,
        "cut": None,
        "tokens": {"input": 20, "cached": 0, "output": 3, "reasoning": None},
        "seconds": 1.0,
        "load": None,
        "confidence": None,
        "parses": True,
        "keeps_schema": None,
    }
    assert rows[3].to_json(STRUCTURED)["reply_error"] == "HTTP 500"
    assert rows[4].to_json(STRUCTURED)["scores_by_matcher"]["lenient"]["exact_match"] == 1


SURE = {"min_logprob": -0.5, "sum_logprob": -1.25, "tokens": 4, "tool_logprob": None, "min_margin": 0.75}


def test_confidence_is_kept_in_a_line_and_older_lines_have_none():
    row = score_row(STRUCTURED, EXAMPLES[0], Reply('{"a":1}', confidence=SURE))
    line = json.loads(row.line(STRUCTURED))
    assert line["confidence"] == SURE and read_reply(line).confidence == SURE
    older = {name: value for name, value in line.items() if name not in ("confidence", "parses", "keeps_schema")}
    assert read_reply(older).confidence is None
    assert score_row(STRUCTURED, EXAMPLES[0], read_reply(line)).line(STRUCTURED) == row.line(STRUCTURED), "a journal's row that is read again"


@pytest.mark.parametrize(("groups", "low"), [((None,) * 8, 0.2), ((*"aabb", *"ccdd"), 0.0)])
def test_the_report_says_how_well_confidence_tells_right_from_wrong(groups, low):
    """By hand: three of four right rows lie above all four wrong ones, the last above two. One row has no confidence."""
    examples = [Example(f"p{at}", '{"a":1}', f"r{at}", group=group) for at, group in enumerate(groups)]
    sure, tally = [-0.1, -0.2, -0.3, -0.6, -0.4, -0.5, -0.7, -0.8], Tally("structured")
    for at, (example, logprob) in enumerate(zip(examples, sure, strict=True)):
        tally.add(score_row(STRUCTURED, example, Reply(f'{{"a":{1 + at // 4}}}', confidence=SURE | {"min_logprob": logprob})))
    tally.add(score_row(STRUCTURED, Example("p", '{"a":1}', "r"), Reply("{")))
    found = tally.confidence()
    assert set(found) == {"min_logprob", "sum_logprob", "min_margin", "parses"}
    assert {name: found["min_logprob"][name] for name in ("auroc", "rows", "missing")} == {"auroc": 14 / 16, "rows": 8, "missing": 1}
    assert low <= found["min_logprob"]["interval"][0] < 14 / 16 < found["min_logprob"]["interval"][1] <= 1
    assert found["min_margin"]["auroc"] == 0.5 and (found["parses"]["rows"], found["parses"]["auroc"]) == (9, 0.6)


def test_summary():
    _, rows = run()
    found = summary(STRUCTURED, rows)
    assert found["metrics"] == found["metrics_by_matcher"]["strict"] and set(found["metrics_by_matcher"]) == set(MATCHERS)
    assert found["metrics"]["exact_match_rate"] == 1 / 5 and found["metrics"]["json_valid_rate"] == 2 / 5
    assert found["metrics_by_matcher"]["lenient"]["exact_match_rate"] == 2 / 5
    assert found["counts"]["rows"] == 5 and found["counts"]["failed_requests"] == 1
    expected = Counter(["wrong_value", "filtered", "no_json", "extra_text"])
    assert found["counts"]["errors"] == {error: expected[error] for error in ERRORS}


def test_the_report_has_the_design_s_keys():
    report = report_of()
    assert set(report) == {
        "schema_version", "stage", "created_at", "track", "args", "code", "packages", "hardware", "model", "inputs",
        "prompt_sha256", "ask", "references_by_teacher", "metrics", "metrics_by_matcher", "counts", "tokens", "sessions", "cached_replies", "seconds", "latency",
        "cost", "confidence",
    }  # fmt: skip
    assert report["stage"] == "eval" and report["schema_version"] == 1 and report["track"] == "structured"
    assert report["model"] == {"kind": "azure", "deployment": "canned"} and report["args"] == {"seed": 42}
    assert report["inputs"] == {"path": "x", "sha256": "y", "rows": 5, "rows_sha256": rows_hash(EXAMPLES)}
    assert set(report["code"]) == {"commit", "dirty"} and len(report["prompt_sha256"]) == 64
    assert report["tokens"] == {"input": 65, "cached": 9, "output": 10, "rows": 4}
    assert report["seconds"] == {"load": 0.25, "generate": 2.5, "total": 3.0}
    assert report["cost"] == {"total": 65 + 90 + 1000, "per_1000_rows": 1155 * 1000 / 4, "rows": 4, "repeat": None}
    assert report["latency"]["alone"] is report["latency"]["loaded"] is None and report["latency"]["why"]
    json.dumps(report, allow_nan=False)


def test_without_prices_there_is_no_cost():
    client, rows = run()
    client.cost = lambda *used: None
    report = make_report("structured", client, rows, 1.0, 1.0, {}, {})
    assert report["cost"] == {"total": None, "per_1000_rows": None, "rows": 0, "repeat": None}


def test_nothing_answered_is_nothing_to_report():
    failed = dict.fromkeys(REPLIES, Reply("", "error", error="HTTP 503"))
    with pytest.raises(UserError, match=r"none of the 5 requests was answered \(HTTP 503\)"):
        report_of(replies=failed)
    assert report_of(replies=failed | {"p0": REPLIES["p0"]})["counts"]["failed_requests"] == 4


def test_hashes_are_of_the_rows_and_not_of_their_order():
    first, second = report_of(), report_of(EXAMPLES[::-1])
    assert first["inputs"]["rows_sha256"] == second["inputs"]["rows_sha256"]
    assert first["prompt_sha256"] == second["prompt_sha256"]
    fewer = report_of(EXAMPLES[1:])
    assert fewer["inputs"]["rows_sha256"] != first["inputs"]["rows_sha256"] and fewer["prompt_sha256"] != first["prompt_sha256"]


def test_the_prompts_hash_sees_the_system_prompt(monkeypatch):
    before = report_of()["prompt_sha256"]
    monkeypatch.setitem(SYSTEM_PROMPTS, "structured", "Another prompt.")
    assert report_of()["prompt_sha256"] != before


def test_what_a_replayed_model_was_asked_is_not_known():
    client, rows = run()
    client.kind = "replay"
    assert make_report("structured", client, rows, 1.0, 1.0, {}, {})["prompt_sha256"] is None


def rows_hash(rows):
    return Digests(row.content_hash for row in rows).together()


def test_rows_hash():
    same = [Example("p", "{}", id="1"), Example("p", "{}", id="2", group="g")]
    assert rows_hash(same[:1]) == rows_hash(same[1:]) != rows_hash(same)
    assert rows_hash(same[:1]) != rows_hash([Example("p", "{}", tools=[])])


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ([7.0], 0.5, 7.0), ([7.0], 0.95, 7.0), ([2.0, 1.0], 0.5, 1.0), ([3.0, 1.0, 2.0], 0.5, 2.0),
        ([4.0, 3.0, 2.0, 1.0], 0.5, 2.0),
        (list(range(1, 101)), 0.5, 50), (list(range(1, 101)), 0.95, 95), (list(range(1, 21)), 0.95, 19), ([1.0, 2.0], 0.95, 2.0),
        ([5.0, 6.0], 0.0, 5.0), ([5.0, 6.0], 1.0, 6.0),
    ],
)  # fmt: skip
def test_percentile(values, share, expected):
    assert percentile(values, share) == expected


@given(st.lists(st.floats(0, 100), min_size=1, max_size=50), st.sampled_from([0.5, 0.95]))
def test_a_percentile_is_one_of_the_values_and_covers_its_share(values, share):
    found = percentile(values, share)
    assert found in values and sum(value <= found for value in values) >= share * len(values) - 1e-9


class Trace:
    def __init__(self):
        self.calls = []

    def generation(self, **told):
        self.calls.append(told)


def test_each_row_is_a_generation_of_the_trace():
    client, rows = run()
    trace = Trace()
    trace_rows(trace, "structured", client, rows)
    assert [call["row"] for call in trace.calls] == ["r0", "r1", "r2", "r3", "r4"]
    first = trace.calls[1]
    assert (
        first["model"] == "canned"
        and first["error"] == "wrong_value"
        and first["scores"] == STRUCTURED.row_metrics(rows[1].scored.strict) | {"error": "wrong_value"}
    )
    assert first["asked"][1]["content"] == "p1" and first["reply"] is rows[1].reply and first["cost"] == {"total": 320}
    client.kind = "slm"
    trace_rows(trace, "structured", client, rows[:1])
    assert trace.calls[-1]["cost"] is None, "how much of the machine's time was its own is not known"
    trace_rows(trace, "structured", client, rows[:1], seconds=3.0)
    assert trace.calls[-1]["cost"] == {"total": client.cost(0, 0, 0, 3.0)}


class Spans(Trace):
    id = "t"

    def span(self, name, start, end, metadata):
        self.calls.append((name, metadata))
        return f"{name} {metadata['batch']}"


@pytest.mark.parametrize("batches", [True, False])
def test_local_rows_share_the_machines_time_of_their_batch_and_sum_up_to_all_of_it(batches, monkeypatch):
    """Replies of a batch come at once: the first one has all of the time since the reply before it."""
    client, rows = run()
    client.kind = "slm"
    monkeypatch.setattr(client, "cost", lambda *counts: counts[-1])
    trace, spent = Spans(), [10.0]
    tell = RowTracer(trace, "structured", client, spent=lambda: spent[0], earlier=1)
    tell(0, rows[0])
    assert trace.calls[-1]["cost"] == {"total": 10.0}, "answered in a session before: its share of that one's time"
    for row, batch, took in zip((rows[1], rows[2], rows[4], rows[0]), ("7", "7", "7", "8"), (6.0, 0.0, 0.0, 5.0), strict=True):
        spent[0] += took
        tell(1, replace(row, reply=replace(row.reply, batch=batch if batches else None)))
    tell.finish()
    told = [call for call in trace.calls[1:] if isinstance(call, dict)]
    assert [call["cost"]["total"] for call in told] == ([2.0, 2.0, 2.0, 5.0] if batches else [2.75] * 4)
    assert [call["parent"] for call in told] == (["batch 7"] * 3 + ["batch 8"] if batches else [None] * 4)


def test_rows_of_an_earlier_report_whose_time_is_not_known_look_not_free(monkeypatch):
    client, rows = run()
    client.kind = "slm"
    trace = Spans()
    tell = RowTracer(trace, "structured", client, spent=lambda: 0.0, earlier=5)
    tell(0, rows[0])
    assert trace.calls[-1]["cost"] is None


def test_stopwatch(monkeypatch):
    times = iter([10.0, 12.0, 15.0, 15.5])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    clock = Stopwatch()
    assert (clock.lap(), clock.lap(), clock.total) == (2.0, 3.0, 5.5)


def test_model_name():
    assert model_name({"deployment": "gpt", "path": "x"}) == "gpt" and model_name({"path": "models/phi-4-mini"}) == "phi-4-mini"


def test_a_row_is_written_as_json():
    _, rows = run()
    for row in rows:
        assert isinstance(row, Row) and row.line(STRUCTURED) == json_line(row.to_json(STRUCTURED))
        assert row.to_json(STRUCTURED)["scores_by_matcher"] == {
            matcher: STRUCTURED.row_metrics(getattr(row.scored, matcher)) for matcher in MATCHERS
        }
