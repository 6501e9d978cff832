"""The simulator of Azure OpenAI, over real sockets."""

import http.client
import json
import math
import random
import signal
import subprocess
import sys
from contextlib import contextmanager
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_swap.common.errors import UserError
from slm_swap.common.settings import PACKAGE
from slm_swap.demo.azure_simulator import AzureSimulator, Bucket, Faults, count_tokens
from slm_swap.demo.mistakes import make_mistake, parse_call
from slm_swap.demo.simulator_replies import UNKNOWN_PROMPT
from slm_swap.rows.examples import Example
from slm_swap.rows.lines import dump_json
from tests.support.processes import PATIENCE

KEY = "simulator-key"
DEPLOYMENTS = "/openai/deployments/simulator/chat/completions?api-version=2024-10-21"
MODELS = "/models/chat/completions?api-version=2024-05-01-preview"
V1 = "/openai/v1/chat/completions"
SCRIPT = PACKAGE / "demo" / "azure_simulator.py"


def toolcall(name="get_weather", **arguments):
    return f'<tool_call name="{name}">{dump_json(arguments)}</tool_call>'


def structured(name="get_weather", **arguments):
    return dump_json({"tool_name": name, "arguments": arguments})


ROWS = [Example(f"toolcall {n}", toolcall(f"tool_{n % 7}", city="New York", days=n, fast=True)) for n in range(200)]
ROWS += [Example(f"structured {n}", structured(f"tool_{n % 7}", tags=["a", "b"], share=n / 7)) for n in range(200)]


def call(server, path, body, headers=None, method="POST"):
    """(status, headers, JSON) of one request; `body` is an object or raw bytes."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    try:
        raw = body if isinstance(body, bytes) else json.dumps(body)
        connection.request(method, path, raw, {"api-key": KEY} if headers is None else headers)
        response = connection.getresponse()
        return response.status, response.headers, json.loads(response.read())
    finally:
        connection.close()


def ask(server, prompt, path=DEPLOYMENTS, **more):
    return call(server, path, {"model": "simulator", "messages": [{"role": "user", "content": prompt}], **more})


@contextmanager
def serving(rows=ROWS, **options):
    with AzureSimulator(rows, **options) as server:
        yield server


@pytest.fixture(scope="module")
def plain():
    with serving() as server:
        yield server


@pytest.mark.parametrize("path", [DEPLOYMENTS, MODELS, V1, f"{V1}?api-version=preview"])
def test_each_url_form_answers(plain, path):
    status, _, body = ask(plain, "toolcall 3", path)
    assert status == 200
    assert body["choices"][0]["message"] == {"role": "assistant", "content": ROWS[3].completion, "refusal": None}
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["choices"][0]["content_filter_results"]["hate"] == {"filtered": False, "severity": "safe"}
    assert body["model"] == "azure-simulator"
    assert body["id"].startswith("chatcmpl-")


@pytest.mark.parametrize("path", [DEPLOYMENTS, MODELS, V1])
def test_the_key_is_checked(plain, path):
    for headers in ({}, {"api-key": "wrong"}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "}):
        status, _, body = call(plain, path, {}, headers)
        assert (status, body["error"]["code"]) == (401, "401")
        assert body["error"]["message"].startswith("Access denied due to invalid subscription key or wrong API endpoint")
    body = {"model": "simulator", "messages": [{"role": "user", "content": "toolcall 3"}]}
    assert call(plain, path, body, {"Authorization": f"Bearer {KEY}"})[0] == 200


@pytest.mark.parametrize(
    "path, method",
    [
        (DEPLOYMENTS.partition("?")[0], "POST"),
        (MODELS.partition("?")[0], "POST"),
        ("/openai/deployments/simulator?api-version=1", "POST"),
        ("/openai/chat/completions?api-version=1", "POST"),
        ("/", "POST"),
        (DEPLOYMENTS, "GET"),
    ],
)
def test_elsewhere_is_not_found(plain, path, method):
    assert call(plain, path, {}, method=method)[::2] == (404, {"error": {"code": "404", "message": "Resource not found"}})


def test_a_dated_version_is_refused_by_v1(plain):
    status, _, body = ask(plain, "toolcall 3", f"{V1}?api-version=2024-10-21")
    assert (status, body["error"]["message"]) == (400, "api-version query parameter is not allowed when using /v1 path")


def test_an_unknown_deployment(plain):
    for path in (DEPLOYMENTS.replace("simulator", "other"), MODELS, V1):
        status, _, body = call(plain, path, {"model": "other", "messages": [{"role": "user", "content": "x"}]})
        assert (status, body["error"]["code"]) == (404, "DeploymentNotFound")


@pytest.mark.parametrize(
    "body, param",
    [
        (b"{", None),
        (b"[]", None),
        (b"\xff", None),
        (b"[" * 100_000, None),
        ({}, "messages"),
        ({"messages": "x"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": ["x"]}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x"}], "max_tokens": 0}, "max_tokens"),
        ({"messages": [{"role": "user", "content": "x"}], "max_completion_tokens": True}, "max_completion_tokens"),
    ],
)
def test_a_malformed_body(plain, body, param):
    status, _, reply = call(plain, DEPLOYMENTS, body)
    assert (status, reply["error"]["type"], reply["error"]["param"]) == (400, "invalid_request_error", param)


def test_tokens_are_counted_by_the_documented_rule():
    assert [count_tokens(text) for text in ("", "a", "abcd", "abcde", "ééé")] == [0, 1, 1, 2, 2]
    with serving([Example("hello", "x" * 9)]) as server:
        body = {"messages": [{"role": "system", "content": "be good"}, {"role": "user", "content": "hello"}]}
        usage = call(server, DEPLOYMENTS, body)[2]["usage"]
    # system + 2 line ends + "be good" = 15 bytes, user + 2 + "hello" = 11: 26 bytes
    assert usage == {
        "prompt_tokens": 7,
        "completion_tokens": 3,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_reply_is_cut_at_the_limit(name):
    with serving([Example("hello", "abcdefghijkl" + "é" * 10)]) as server:
        whole, cut, split = (ask(server, "hello", **{name: limit})[2] for limit in (8, 3, 4))
    assert (whole["choices"][0]["finish_reason"], whole["usage"]["completion_tokens"]) == ("stop", 8)
    assert (cut["choices"][0]["finish_reason"], cut["choices"][0]["message"]["content"]) == ("length", "abcdefghijkl")
    assert cut["usage"]["completion_tokens"] == 3
    assert split["choices"][0]["message"]["content"] == "abcdefghijkléé"


def test_prefixes_seen_before_are_cached_in_steps():
    head = "a" * 4 * 1100
    with serving() as server:
        tokens = [
            ask(server, prompt)[2]["usage"]["prompt_tokens_details"]["cached_tokens"]
            for prompt in (head + "b" * 800, head + "b" * 800, head + "c" * 800, "d" * 4000, "d" * 4000)
        ]
    # 1,302 tokens hold 1,024 + 2 x 128; the head ends before 1,152; 1,002 tokens are too few
    assert tokens == [0, 1280, 1024, 0, 0]


def test_a_prompt_without_a_reference(plain):
    assert ask(plain, "who are you?")[2]["choices"][0]["message"]["content"] == UNKNOWN_PROMPT


def test_the_last_user_message_is_looked_up(plain):
    contents = [("user", "toolcall 1"), ("assistant", "toolcall 3"), ("user", "toolcall 2"), ("assistant", "toolcall 4")]
    body = {"messages": [{"role": role, "content": content} for role, content in contents]}
    assert call(plain, DEPLOYMENTS, body)[2]["choices"][0]["message"]["content"] == ROWS[2].completion


def test_the_first_of_equal_prompts_counts():
    assert AzureSimulator([Example("a", "1"), Example("a", "2")]).reply_text("a") == ("answered", "1")


# Mistakes


@pytest.mark.parametrize("completion", [toolcall(city="Bonn", days=3), structured(city="Bonn", days=3)])
def test_every_kind_of_mistake_is_what_it_says(completion):
    gold, seen = {"city": "Bonn", "days": 3}, {}
    for seed in range(300):
        kind, text = make_mistake(parse_call(completion), completion, ["get_news"], random.Random(seed))
        seen.setdefault(kind, text)
        made = parse_call(text)
        match kind:
            case "prose" | "code_fence":
                assert completion in text and text != completion
            case "truncated":
                assert completion.startswith(text) and len(text) < len(completion)
            case "other_tool":
                assert (made.name, made.arguments) == ("get_news", gold)
            case "extra_argument":
                assert made.arguments.items() > gold.items()
            case "missing_argument":
                assert made.arguments.items() < gold.items()
            case "changed_value" | "wrong_type":
                assert made.name == "get_weather" and made.arguments.keys() == gold.keys()
                (key,) = (key for key in gold if made.arguments[key] != gold[key])
                assert (type(made.arguments[key]) is type(gold[key])) == (kind == "changed_value")
    assert len(seen) == 8


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.text(max_size=6), JSON, max_size=4), st.booleans(), st.integers(0, 999))
def test_a_mistake_always_differs(arguments, wrapped, seed):
    completion = (toolcall if wrapped else structured)("f").replace("{}", dump_json(arguments))
    _, text = make_mistake(parse_call(completion), completion, [], random.Random(seed))
    assert text != completion


@given(st.text(min_size=1).filter(lambda text: text.strip()), st.integers(0, 99))
def test_any_text_can_be_spoilt(completion, seed):
    assert make_mistake(None, completion, [], random.Random(seed))[1] != completion.strip()


def test_what_is_not_a_call_is_not_taken_for_one():
    for text in ("", "hi", "[]", "1", "NaN", '{"tool_name": "f"}', '{"tool_name": "f", "arguments": {"a": NaN}}', "[" * 100_000):
        assert parse_call(text) is None
    assert parse_call('<tool_call name="f">[1]</tool_call>') is None
    assert parse_call('{"query": "q", "tool_name": "f", "arguments": {"a": 1}}').text() == (
        '{"query":"q","tool_name":"f","arguments":{"a":1}}'
    )


def mistaken(server, prompts):
    return {prompt for prompt in prompts if server.reply_text(prompt)[0] != "answered"}


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_the_share_of_mistakes_is_the_chosen_one(rate):
    rows = [Example(f"prompt {n}", toolcall(days=n)) for n in range(4000)]
    server = AzureSimulator(rows, mistake_rate=rate)
    wrong = [row for row in rows if server.reply_text(row.prompt)[1] != row.completion]
    assert abs(len(wrong) / 4000 - rate) <= 4 * math.sqrt(rate * (1 - rate) / 4000)
    assert mistaken(server, [row.prompt for row in rows]) == {row.prompt for row in wrong}


@given(st.permutations(range(30)))
def test_mistakes_do_not_depend_on_the_order_or_on_repetition(order):
    prompts = [row.prompt for row in ROWS[:30]]
    there, here = AzureSimulator(ROWS, mistake_rate=0.5), AzureSimulator(ROWS, mistake_rate=0.5)
    replies = {prompts[n]: here.reply_text(prompts[n]) for n in order}
    assert replies == {prompt: there.reply_text(prompt) for prompt in prompts}
    assert replies == {prompts[n]: here.reply_text(prompts[n]) for n in reversed(order)}


def test_a_higher_rate_keeps_the_mistakes_and_another_seed_moves_them():
    prompts = [row.prompt for row in ROWS]
    sets = [mistaken(AzureSimulator(ROWS, mistake_rate=rate), prompts) for rate in (0.1, 0.3, 0.6)]
    assert all(few < many for few, many in pairwise(sets))
    assert mistaken(AzureSimulator(ROWS, mistake_rate=0.3, seed=1), prompts) != sets[1]


def test_another_tool_is_one_that_the_prompt_offers():
    rows = [Example(f'Tools: {{"name": "a"}} {{"name": "b"}} {n}', toolcall("a")) for n in range(200)]
    rows += [Example(name, toolcall(name)) for name in "bcdefgh"]
    server = AzureSimulator(rows, mistake_rate=1.0)
    replies = [server.reply_text(row.prompt) for row in rows[:200]]
    assert {parse_call(text).name for kind, text in replies if kind == "mistake:other_tool"} == {"b"}


# Faults


def test_a_filtered_prompt_stays_filtered():
    with serving(faults=Faults(content_filter=0.5)) as server:
        statuses = [[ask(server, row.prompt)[0] for _ in range(3)] for row in ROWS[:20]]
        body = next(body for status, _, body in (ask(server, row.prompt) for row in ROWS) if status == 400)
    assert sorted(map(tuple, {tuple(tries) for tries in statuses})) == [(200, 200, 200), (400, 400, 400)]
    assert (body["error"]["code"], body["error"]["param"]) == ("content_filter", "prompt")
    assert body["error"]["innererror"]["code"] == "ResponsibleAIPolicyViolation"
    assert body["error"]["innererror"]["content_filter_result"]["violence"]["filtered"] is True


def test_a_rate_limit_says_when_to_come_back():
    with serving(faults=Faults(rate_limit=1.0, retry_after_seconds=1.5)) as server:
        status, headers, body = ask(server, "toolcall 1")
    assert (status, body["error"]["code"]) == (429, "429")
    assert (headers["Retry-After"], headers["retry-after-ms"]) == ("2", "1500")
    for name in ("requests", "tokens"):
        assert [headers[f"x-ratelimit-{what}-{name}"] for what in ("limit", "remaining", "reset")] == ["60", "0", "2"]


@pytest.mark.parametrize("fault, status", [("rate_limit", 429), ("server_error", 500)])
def test_a_retry_can_succeed_and_attempts_do_not_depend_on_other_prompts(fault, status):
    prompts = [row.prompt for row in ROWS[:12]]
    tries = {}
    for order in ([(p, t) for p in prompts for t in range(5)], [(p, t) for t in range(5) for p in reversed(prompts)]):
        with serving(faults=Faults(**{fault: 0.5})) as server:
            got = {(prompt, attempt): ask(server, prompt)[0] for prompt, attempt in order}
            assert server.counts == {
                fault: sum(s == status for s in got.values()),
                "answered": sum(s == 200 for s in got.values()),
            }
        assert tries in ({}, got)
        tries = got
    assert all({tries[prompt, attempt] for attempt in range(5)} == {200, status} for prompt in prompts[:3])


def test_a_slow_reply_is_still_a_reply():
    with serving(faults=Faults(slow=1.0, slow_seconds=0.01)) as server:
        assert ask(server, "toolcall 1")[2]["choices"][0]["message"]["content"] == ROWS[1].completion
        assert server.counts == {"slow": 1}


def test_a_cut_off_reply_ends_in_the_middle_of_its_body():
    with serving(faults=Faults(cut_off=1.0)) as server:
        with pytest.raises(http.client.IncompleteRead) as caught:
            ask(server, "toolcall 1")
        assert server.counts == {"cut_off": 1}
    assert caught.value.partial.startswith(b'{"id"') and caught.value.expected > 0


def test_a_refusal_has_no_content():
    with serving(faults=Faults(refusal=1.0)) as server:
        body = ask(server, "toolcall 1")[2]
    assert body["choices"][0]["message"]["content"] is None
    assert body["choices"][0]["message"]["refusal"] == "I'm sorry, but I can't help with that."


def test_a_filtered_completion_keeps_its_first_half():
    with serving(faults=Faults(filtered_completion=1.0)) as server:
        choice = ask(server, "toolcall 1")[2]["choices"][0]
    text = ROWS[1].completion
    assert (choice["finish_reason"], choice["message"]["content"]) == ("content_filter", text[: len(text) // 2])
    assert choice["content_filter_results"]["violence"]["filtered"] is True


@pytest.mark.parametrize(
    "parameter, code, message",
    [
        (
            {"max_tokens": 5},
            "unsupported_parameter",
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
        ),
        ({"seed": 5}, "unsupported_parameter", "Unsupported parameter: 'seed' is not supported with this model."),
        (
            {"temperature": 0},
            "unsupported_value",
            "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is supported.",
        ),
    ],
)
def test_an_unsupported_parameter_is_named(parameter, code, message):
    (name,) = parameter
    with serving(faults=Faults(unsupported_parameters=frozenset({"max_tokens", "seed", "temperature"}))) as server:
        status, _, body = ask(server, "toolcall 1", **parameter)
        assert ask(server, "toolcall 1", temperature=1)[0] == 200
    assert (status, body["error"]["code"], body["error"]["param"], body["error"]["message"]) == (400, code, name, message)


def test_an_unrecognized_parameter_is_named_in_the_message_alone():
    with serving(faults=Faults(unrecognized_parameters=frozenset({"seed"}))) as server:
        error = ask(server, "toolcall 1", seed=1)[2]["error"]
    assert (error["code"], error["param"]) == (None, None)
    assert error["message"] == "Unrecognized request argument supplied: seed"


def test_a_rate_out_of_bounds_is_refused():
    for wrong in ({"slow": 1.1}, {"refusal": -0.1}, {"slow_seconds": -1.0}, {"cut_off": math.nan}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            Faults(**wrong)
    for wrong in ({"mistake_rate": 2.0}, {"requests_per_minute": 0}, {"tokens_per_minute": -1}, {"window_seconds": 0}, {"window_seconds": math.nan}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            AzureSimulator([], **wrong)


# Quotas


def test_a_bucket_refills_evenly():
    now = 0.0
    bucket = Bucket(60, clock=lambda: now)
    assert bucket.wait(60) == 0
    bucket.take(50)
    assert (bucket.level, bucket.wait(15), bucket.wait(1000)) == (10, 5, 50)
    now = 5.0
    assert (bucket.level, bucket.wait(15)) == (15, 0)
    bucket.take(1000)
    assert bucket.level == 0
    now = 1000.0
    assert bucket.level == 60


def test_a_window_is_what_may_be_used_at_once():
    now = 50.0
    bucket = Bucket(600, 10.0, clock=lambda: now)
    assert (bucket.capacity, bucket.level, bucket.used, bucket.permitted) == (100, 100, 0, 100)
    now = 53.0
    bucket.take(100)
    assert (bucket.wait(1), bucket.wait(1000), bucket.permitted) == (0.1, 10, 100)
    now = 55.0
    bucket.take(5)
    now = 99.0
    assert (bucket.used, bucket.permitted) == (105, 120)  # what comes after the last request does not count
    assert Bucket(30, 1.0).capacity == 1


def test_a_quota_of_requests():
    with serving(requests_per_minute=2) as server:
        replies = [ask(server, "toolcall 1") for _ in range(3)]
        assert server.counts == {"answered": 2, "quota": 1}
        assert server.buckets["requests"].used == 2
        assert call(server, "/simulator/stats", b"", {}, method="GET")[2]["quotas"]["requests"]["used"] == 2
    assert [status for status, _, _ in replies] == [200, 200, 429]
    assert [headers["x-ratelimit-remaining-requests"] for _, headers, _ in replies] == ["1", "0", "0"]
    assert replies[0][1]["x-ratelimit-limit-requests"] == "2" and replies[0][1]["x-ratelimit-remaining-tokens"] is None
    # half a minute for one request, less what has passed
    assert int(replies[2][1]["Retry-After"]) == math.ceil(int(replies[2][1]["retry-after-ms"]) / 1000) <= 30


def test_a_quota_of_tokens_charges_the_limit_of_the_reply():
    with serving(tokens_per_minute=1000) as server:
        first, second = (ask(server, "toolcall 1", max_tokens=600) for _ in range(2))
    assert (first[0], second[0]) == (200, 429)
    assert 395 <= int(first[1]["x-ratelimit-remaining-tokens"]) < 1000 - 600
    assert first[1]["x-ratelimit-remaining-requests"] is None


def test_counts_are_served(plain):
    ask(plain, "toolcall 1")
    status, _, body = call(plain, "/simulator/stats", b"", {}, method="GET")
    assert status == 200
    assert body["counts"] == plain.counts and body["counts"]["answered"] >= 1 and body["most_in_flight"] >= 1


# The script


def start(tmp_path, *flags, rows=ROWS):
    references = tmp_path / "references.jsonl"
    references.write_text("".join(json.dumps(row.to_json() | {"id": str(n)}) + "\n" for n, row in enumerate(rows)))
    words = [sys.executable, str(SCRIPT), "--references", str(references), *flags]
    return subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_script_serves_until_it_is_told_to_stop(tmp_path, number):
    flags = ("--key", "k", "--deployment", "d", "--mistake-rate", "1", "--unsupported-parameters", "seed,top_p")
    process = start(tmp_path, *flags)
    try:
        server = AzureSimulator([], port=int(process.stdout.readline().rsplit(":", 1)[1]))
        path, body = DEPLOYMENTS.replace("simulator", "d"), {"messages": [{"role": "user", "content": "toolcall 1"}]}
        status, _, reply = call(server, path, body, {"api-key": "k"})
        assert status == 200 and reply["choices"][0]["message"]["content"] != ROWS[1].completion
        assert call(server, path, body | {"top_p": 1}, {"api-key": "k"})[0] == 400
        process.send_signal(number)
        assert process.wait(timeout=PATIENCE) == 0
    finally:
        process.kill()
        _, errors = process.communicate()
    assert errors == ""


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--slow", "2"), "slow=2.0"),
        (("--references", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--port", "70000"), "port 70000"),
    ],
)
def test_bad_input_is_one_line(tmp_path, flags, said):
    process = start(tmp_path, *flags)
    output, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, output) == (2, "")
    assert said in errors and errors.count("\n") == 1


def test_a_taken_port_is_named(plain):
    with pytest.raises(UserError, match=f"port {plain.port}"), AzureSimulator([], port=plain.port):
        pass


def test_every_fault_has_a_flag(tmp_path):
    shown = subprocess.run([sys.executable, str(SCRIPT), "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    for name in Faults.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in shown.stdout
