"""The endpoint with a scripted small model: who answers, in which form, and what goes wrong without a request being lost."""

import json
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import openai
import pytest

from slm_swap.demo.azure_simulator import Answer
from slm_swap.rows.examples import Example
from slm_swap.serving import processes, state
from slm_swap.serving.processes import MEMORY
from tests.support.disks import mounted
from tests.support.endpoints import CHECK_STOCK, HOSTED_KEY, HOSTED_NAME, SCRIPTED, cascade, is_up, known_to, serving
from tests.support.langfuse_server import LangfuseServer
from tests.support.processes import children_of, run_python, wait_until
from tests.support.scripted import Scripted, plain, refused
from tests.support.shop_bot import TOOLS

MESSAGES = [{"role": "user", "content": "call Porto"}]
ORDER_STATUS = next(tool for tool in TOOLS if tool["function"]["name"] == "order_status")
CALL = {"id": "c", "type": "function", "function": {"name": "check_stock", "arguments": "{}"}}
LOOKED_UP = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [CALL]}]
IMAGE = {"type": "image_url", "image_url": {"url": "data:x"}}
RIGHT = '<tool_call name="check_stock">{"city":"Porto","item":"lamp"}</tool_call>'
REFERENCES = [Example("call Porto", RIGHT), Example("call Lyon", RIGHT), Example("say hello", "hello")]


@pytest.fixture(scope="module")
def hosted():
    with Scripted(REFERENCES, plain, key=HOSTED_KEY) as server:
        yield server


@pytest.fixture
def untouched(hosted):
    """The simulator, whose script is its own again afterwards."""
    yield hosted
    hosted.script = plain


@pytest.fixture(scope="module")
def endpoint(hosted, tmp_path_factory):
    """One in cascade mode."""
    folder = tmp_path_factory.mktemp("cascade")
    flags = ("--mode", "cascade", "--cascade", cascade(folder / "cascade.json"), "--deadline", 1, "--max-body", 20_000)
    with serving(folder, *flags, "--audit-share", 1, hosted=hosted) as running:
        yield running


def post(endpoint, body, path="/v1/chat/completions", **headers):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx2.post(endpoint.url + path, content=raw, headers={"content-type": "application/json"} | headers, timeout=60)


def test_a_sure_call_is_answered_locally_in_openais_form(endpoint):
    told, reply = endpoint.ask("call Porto")
    choice = reply.choices[0]
    assert told == "local; reason=local"
    assert (choice.finish_reason, choice.message.role, choice.message.content, reply.model) == ("tool_calls", "assistant", None, HOSTED_NAME)
    [call] = choice.message.tool_calls
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == ("function", "check_stock", {"item": "lamp", "city": "Porto"})
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (20, 10, 30)


@pytest.mark.parametrize(
    "text, reason",
    [("unsure Porto", "below_threshold"), ("say hello", "class_never"), ("broken Porto", "unfit"), ("long Porto", "too_long"), ("fail Porto", "unfit")],
)
def test_the_hosted_model_answers_what_the_rule_keeps_from_the_small_one(endpoint, text, reason):
    told, reply = endpoint.ask(text)
    assert told == f"hosted; reason={reason}"
    assert reply.model == "azure-simulator"


@pytest.mark.parametrize(
    "more, detail",
    [
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"stop": ["x"]}, "stop"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "check_stock"}}}, "tool_choice"),
        ({"tools": None}, "no_tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"store": True}, "store"),
        ({"a_thing_of_next_year": 1}, "a_thing_of_next_year"),
        ({"model": "another-model"}, "model"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "no_request"),
        ({"messages": [*LOOKED_UP, {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "a"}, IMAGE]}, *MESSAGES]}, "no_request"),
    ],
)
def test_what_was_not_measured_goes_to_the_hosted_model(endpoint, more, detail):
    told = {"model": HOSTED_NAME, "messages": MESSAGES, "tools": [CHECK_STOCK]} | more
    answer = post(endpoint, {name: value for name, value in told.items() if value is not None})
    assert answer.headers["x-slm-swap"] == f"hosted; reason=unsupported; detail={detail}"


@pytest.mark.parametrize("more", [{"seed": 1}, {"temperature": 0.7}, {"user": "u"}, {"n": 1}, {"tool_choice": "auto"}, {"max_tokens": 10}, {"logprobs": False}])
def test_what_changes_nothing_is_answered_locally(endpoint, more):
    assert endpoint.ask("call Porto", **more)[0] == "local; reason=local"


@pytest.mark.parametrize("content", ["a", [{"type": "text", "text": "a"}], [{"type": "file", "name": "a.txt"}]])
def test_a_tools_result_in_text_is_answered_locally(endpoint, content):
    """A tool's own value may have a `type`."""
    messages = [*LOOKED_UP, {"role": "tool", "tool_call_id": "c", "content": content}, *MESSAGES]
    assert post(endpoint, {"model": HOSTED_NAME, "messages": messages, "tools": [CHECK_STOCK]}).headers["x-slm-swap"] == "local; reason=local"


def test_a_reply_longer_than_the_clients_own_limit_is_not_sent(endpoint):
    assert endpoint.ask("call Porto", max_tokens=9)[0] == "hosted; reason=unfit"


@pytest.mark.parametrize(
    "tools", [[ORDER_STATUS], [CHECK_STOCK, ORDER_STATUS], [CHECK_STOCK | {"function": CHECK_STOCK["function"] | {"description": "another one"}}]]
)
def test_tools_that_were_not_measured_go_to_the_hosted_model(endpoint, tools):
    assert endpoint.ask("call Porto", tools)[0].startswith("hosted; reason=tools; detail=")


def test_the_order_of_a_definitions_keys_is_nothing(endpoint):
    turned = json.loads(json.dumps(CHECK_STOCK), object_pairs_hook=lambda pairs: dict(reversed(pairs)))
    assert endpoint.ask("call Porto", [turned])[0] == "local; reason=local"


def test_a_local_stream_is_one_chunk_and_its_end(endpoint):
    with endpoint.client() as client:
        chunks = list(
            client.chat.completions.create(
                model=HOSTED_NAME, messages=MESSAGES, tools=[CHECK_STOCK], stream=True, stream_options={"include_usage": True}
            )
        )
    call = chunks[0].choices[0].delta.tool_calls[0]
    assert (call.index, call.function.name, chunks[0].choices[0].finish_reason) == (0, "check_stock", "tool_calls")
    assert (chunks[1].choices, chunks[1].usage.total_tokens, len(chunks)) == ([], 30, 2)
    raw = post(endpoint, {"model": HOSTED_NAME, "messages": MESSAGES, "tools": [CHECK_STOCK], "stream": True})
    assert raw.headers["content-type"] == "text/event-stream"
    assert raw.text.endswith("\n\ndata: [DONE]\n\n") and raw.text.count("data: ") == 2


def test_a_hosted_stream_comes_as_it_is(endpoint, hosted):
    body = {"model": HOSTED_NAME, "messages": [{"role": "user", "content": "unsure Porto"}], "tools": [CHECK_STOCK], "stream": True}
    there = httpx2.post(
        f"{hosted.url}/openai/deployments/{HOSTED_NAME}/chat/completions?api-version=2024-10-21", json=body, headers={"api-key": HOSTED_KEY}
    )
    here = post(endpoint, body)
    assert here.headers["x-slm-swap"] == "hosted; reason=below_threshold"
    assert here.headers["content-type"] == there.headers["content-type"]
    assert _without_time(here.text) == _without_time(there.text)


def _without_time(text):
    return [json.loads(line[6:]) | {"created": 0} for line in text.splitlines() if line.startswith("data: {")] + [text[-14:]]


def test_an_azure_client_changes_its_endpoint_alone(endpoint):
    with openai.AzureOpenAI(azure_endpoint=endpoint.url, api_key="none", api_version="2024-10-21", max_retries=0) as client:
        for text, who in (("call Porto", "local"), ("unsure Porto", "hosted")):
            raw = client.chat.completions.with_raw_response.create(
                model=HOSTED_NAME, messages=[{"role": "user", "content": text}], tools=[CHECK_STOCK]
            )
            assert raw.headers["x-slm-swap"].startswith(who)
            assert raw.parse().choices[0].message is not None


def test_models_are_told(endpoint):
    with endpoint.client() as client:
        assert [model.id for model in client.models.list()] == [HOSTED_NAME]


def test_the_raw_body_reaches_the_hosted_model_as_it_came(endpoint, untouched):
    seen = []
    own = untouched.answer

    def answer(request, raw):
        seen.append((raw, {name.lower(): value for name, value in request.headers.items()}))
        return own(request, raw)

    untouched.answer = answer
    raw = b'{"messages" : [{"role":"user","content":"unsure caf\\u00e9"}],  "stop": ["x"], "seed": 12345678901234567890, "model": "simulator"}'
    post(endpoint, raw, authorization="Bearer a-clients-own-key-0123456789", cookie="a=b", **{"x-request-id": "r1"})
    del untouched.answer
    [(body, headers)] = seen
    assert body == raw
    assert headers["api-key"] == HOSTED_KEY and headers["x-request-id"] == "r1"
    assert not {"authorization", "cookie"} & set(headers)


def test_a_refusal_of_the_hosted_model_is_passed_on(endpoint, untouched):
    untouched.script = lambda *_: Answer(429, {"error": {"message": "slowly", "code": "429"}}, "refused", {"Retry-After": "7"})
    answer = post(endpoint, {"model": HOSTED_NAME, "messages": [{"role": "user", "content": "unsure Porto"}], "tools": [CHECK_STOCK]})
    assert (answer.status_code, answer.headers["retry-after"], answer.json()["error"]["message"]) == (429, "7", "slowly")


def test_a_body_that_is_no_json_is_the_hosted_models_to_refuse(endpoint):
    answer = post(endpoint, b"{")
    assert (answer.status_code, answer.headers["x-slm-swap"]) == (400, "hosted; reason=unsupported; detail=body")


def test_an_odd_definition_costs_no_other_request(endpoint):
    odd = b'{"model": "simulator", "messages": [{"role": "user", "content": "call Porto"}], "tools": [{"type": "function", "function": {"name": "check_stock", "parameters": {"maximum": 1e400}}}]}'
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(endpoint.ask, "slow 0.5")
        assert post(endpoint, odd).headers["x-slm-swap"].startswith("hosted; reason=tools")
        assert slow.result()[0] in ("local; reason=local", "hosted; reason=deadline")


def test_too_large_a_body_is_refused_before_it_is_read(endpoint):
    answer = post(endpoint, b"x" * 20_001)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    chunked = httpx2.post(f"{endpoint.url}/v1/chat/completions", content=iter([b"x" * 10_000] * 3), timeout=60)
    assert chunked.status_code == 413


def test_errors_are_in_openais_form(endpoint):
    with endpoint.client() as client, pytest.raises(openai.NotFoundError) as error:
        client.get("/nowhere".replace("/", "../../../", 1), cast_to=object)
    assert error.value.body["type"] == "invalid_request_error"


def test_web_pages_may_not_ask_an_endpoint_without_keys(endpoint):
    assert post(endpoint, {"messages": MESSAGES}, origin="https://example.com").status_code == 403


# -- What goes wrong ---------------------------------------------------------------------------------------------------------------


def test_what_takes_too_long_goes_to_the_hosted_model_and_nothing_is_answered_twice(endpoint, hosted):
    before = hosted.asked["slow 1.5"]
    told, _ = endpoint.ask("slow 1.5")
    assert told == "hosted; reason=deadline"
    assert hosted.asked["slow 1.5"] == before + 1


def test_a_hosted_model_that_is_down_is_said_with_a_time_to_wait(endpoint, untouched):
    untouched.script = lambda *_: refused(502, None, "bad gateway")
    answer = post(endpoint, {"model": HOSTED_NAME, "messages": [{"role": "user", "content": "unsure Porto"}], "tools": [CHECK_STOCK]})
    assert (answer.status_code, answer.headers["retry-after"], answer.headers["x-slm-swap"]) == (503, "5", "none")
    assert answer.json()["error"]["type"] == "server_error"
    assert endpoint.ask("call Porto")[0] == "local; reason=local"


def test_a_late_reply_stands_in_for_a_hosted_model_that_is_down(endpoint, untouched):
    untouched.script = lambda *_: refused(500, None, "down")
    assert endpoint.ask("slow 1.4")[0] == "local; reason=local"


def test_the_flag_takes_everything_back_at_once(endpoint):
    assert endpoint.ask("call Porto")[0] == "local; reason=local"
    state.raise_flag(endpoint.state, "they disagree", [], ["r1"])
    try:
        assert endpoint.ask("call Porto")[0] == "hosted; reason=stopped"
        assert httpx2.get(f"{endpoint.url}/healthz").json()["stopped"] == "they disagree"
    finally:
        kept = state.lower_flag(endpoint.state)
    assert json.loads(kept.read_text())["rows"] == ["r1"]
    assert endpoint.ask("call Porto")[0] == "local; reason=local"


def test_every_local_answer_is_audited_where_all_are_to_be(endpoint):
    def audits(text):
        return [line for line in endpoint.lines("audits.jsonl") if line["id"] == text]

    ids = {text: endpoint.ask(text)[1].id for text in ("call Porto", "call Lyon")}
    wait_until(lambda: all(map(audits, ids.values())))
    [same], [other] = audits(ids["call Porto"]), audits(ids["call Lyon"])
    assert (same["agree"], same["kind"], same["tool"], same["request"], same["local"]) == (True, "call", "check_stock", None, None)
    assert other["agree"] is False  # the references say Porto for both
    assert other["local"] == [{"name": "check_stock", "arguments": {"item": "lamp", "city": "Lyon"}}]
    assert other["hosted"][0]["arguments"]["city"] == "Porto"
    assert other["request"]["messages"] == [{"role": "user", "content": "call Lyon"}]
    assert other["confidence"]["min_logprob"] == -0.01


def test_an_engine_that_dies_takes_no_request_with_it_and_comes_back(endpoint):
    with ThreadPoolExecutor(4) as pool:
        slow = [pool.submit(endpoint.ask, "slow 0.3") for _ in range(3)]
        time.sleep(0.05)
        died = endpoint.ask("die now")
        assert died[0] in ("hosted; reason=engine_down", "hosted; reason=deadline")  # behind slow ones on a slow machine
        assert {told.result()[0] for told in slow} <= {"local; reason=local", "hosted; reason=engine_down", "hosted; reason=deadline"}
    wait_until(lambda: endpoint.ask("call Porto")[0] == "local; reason=local")
    assert "is started again" in endpoint.log.read_text()


def test_a_bug_of_the_models_process_shows_its_traceback_and_no_key(endpoint):
    assert endpoint.ask("bug now")[0] in ("hosted; reason=engine_down", "hosted; reason=deadline")
    wait_until(lambda: "ValueError: of ***" in endpoint.log.read_text())
    wait_until(lambda: endpoint.ask("call Porto")[0] == "local; reason=local")
    assert HOSTED_KEY not in endpoint.log.read_text()


def test_an_engine_that_cannot_start_again_at_once_ends_no_endpoint(hosted, tmp_path):
    """The memory of the one that died may not be free yet. One that cannot start at all does end it."""
    refuses = tmp_path / "refuses"
    with serving(tmp_path, "--mode", "cascade", "--cascade", cascade(tmp_path / "c.json"), hosted=hosted, SCRIPTED_REFUSES=str(refuses)) as running:
        refuses.touch()
        running.ask("die now")
        wait_until(lambda: not refuses.exists())
        wait_until(lambda: running.ask("call Porto")[0] == "local; reason=local")
        assert "the small model's process ended (2) and is started again in 1 s" in running.log.read_text()
    refuses.touch()
    with pytest.raises(AssertionError, match="error: the GPU's memory is not free"), serving(tmp_path, "--mode", "local", SCRIPTED_REFUSES=str(refuses)):
        pass


def test_a_client_that_goes_costs_the_others_nothing(endpoint):
    body = json.dumps({"model": HOSTED_NAME, "messages": [{"role": "user", "content": "slow 0.5"}], "tools": [CHECK_STOCK]}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    host, _, port = endpoint.url.removeprefix("http://").partition(":")
    for sent in (head % len(body) + body, head % len(body) + body[:20], head % len(body)):
        with socket.create_connection((host, int(port))) as client:
            client.sendall(sent)
    assert endpoint.ask("call Porto")[0] in ("local; reason=local", "hosted; reason=deadline")
    wait_until(lambda: endpoint.ask("call Porto")[0] == "local; reason=local")


def test_counts_are_told_to_prometheus(endpoint):
    endpoint.ask("call Porto")
    text = httpx2.get(f"{endpoint.url}/metrics").text
    assert 'slm_swap_requests_total{answered_by="local",reason="local"}' in text
    assert "slm_swap_engine_up 1.0" in text


# -- Endpoints of their own --------------------------------------------------------------------------------------------------------------


def test_audits_end_where_their_budget_of_the_day_does(hosted, tmp_path):
    prices = tmp_path / "prices.toml"
    prices.write_text(f'[hosted."{HOSTED_NAME}"]\ninput = 1000000\noutput = 1000000\n')  # one a token
    flags = ("--mode", "cascade", "--cascade", cascade(tmp_path / "c.json"), "--audit-share", 1, "--audit-budget", 1)
    with serving(tmp_path, *flags, hosted=hosted, PRICES_FILE=str(prices)) as running:
        for _ in range(2):
            assert running.ask("call Porto")[0] == "local; reason=local"
            wait_until(lambda: len(running.lines("audits.jsonl")) == 1)
        assert running.lines("audits.jsonl")[0]["cost"]["hosted"] > 1
    [minute] = running.lines("minutes.jsonl")
    assert minute["requests"] == {"local": {"local": 2}} and minute["saved"] == 2 * (20 + 10)
    assert len(running.lines("audits.jsonl")) == 1


def test_overload_goes_to_the_hosted_model(hosted, tmp_path):
    flags = ("--mode", "cascade", "--cascade", cascade(tmp_path / "c.json"), "--queue", 2, "--audit-share", 0)
    with serving(tmp_path, *flags, hosted=hosted) as running, ThreadPoolExecutor(6) as pool:
        told = [one[0] for one in pool.map(lambda _: running.ask("slow 1"), range(6))]
    assert told.count("local; reason=local") == 2
    assert told.count("hosted; reason=queue_full") == 4


@pytest.mark.parametrize(("identity", "prompts", "why"), [({"files_sha256": ["1" * 64]}, 0, "files_sha256"), ({}, 12, "12 calibrated rows are prompts")])
def test_what_is_not_as_it_was_calibrated_answers_nothing_and_says_so(hosted, tmp_path, identity, prompts, why):
    other = cascade(tmp_path / "c.json", SCRIPTED | identity, prompts=prompts)
    with serving(tmp_path, "--mode", "cascade", "--cascade", other, hosted=hosted) as running:
        assert running.ask("call Porto")[0] == "hosted; reason=mismatch"
        health = httpx2.get(f"{running.url}/healthz").json()
        assert health["answers"] == "hosted" and why in health["mismatches"][0]
        assert "MISMATCH" in running.log.read_text()


def test_shadow_answers_with_the_hosted_model_and_compares(hosted, tmp_path):
    with serving(tmp_path, "--mode", "shadow", "--cascade", cascade(tmp_path / "c.json"), hosted=hosted) as running:
        told, reply = running.ask("call Lyon")
        assert (told, reply.model) == ("hosted; reason=mode", "azure-simulator")
        stream = post(running, {"model": HOSTED_NAME, "messages": MESSAGES, "tools": [CHECK_STOCK], "stream": True})
        assert stream.headers["x-slm-swap"] == "hosted; reason=mode"
        running.ask("unsure Porto")
        wait_until(lambda: len(running.lines("audits.jsonl")) == 2)
        assert sorted(line["agree"] for line in running.lines("audits.jsonl")) == [False, True]
        assert {line["cost"]["hosted"] for line in running.lines("audits.jsonl")} == {0.0}
    told = json.loads((tmp_path / "state/endpoint.json").read_text())
    assert (told["mode"], told["cascade"]["path"]) == ("shadow", str(tmp_path / "c.json"))
    assert told["rule"] == json.loads((tmp_path / "c.json").read_text())  # its file may be made anew while this one is served
    [minute] = running.lines("minutes.jsonl")
    assert minute["requests"] == {"hosted": {"mode": 3}}
    assert minute["tools"] == {"check_stock": 3}


def test_hosted_mode_loads_no_model(hosted, tmp_path):
    with serving(tmp_path, "--mode", "hosted", hosted=hosted) as running:
        assert running.ask("call Porto")[0] == "hosted; reason=mode"
        assert len(children_of(running.script.pid)) == 1


def test_local_mode_needs_no_hosted_model(tmp_path):
    with serving(tmp_path, "--mode", "local", AZURE_ENDPOINT="") as running:
        assert running.ask("say hello")[0] == "local; reason=local"
        with pytest.raises(openai.BadRequestError) as error:
            running.ask("say hello", n=2)
        assert error.value.code == "unsupported"
        with pytest.raises(openai.InternalServerError):
            running.ask("broken")


def test_a_request_that_nobody_answers_fails_once(tmp_path):
    with serving(tmp_path, "--mode", "local", "--deadline", 0.1, AZURE_ENDPOINT="") as running:
        answer = post(running, {"messages": [{"role": "user", "content": "slow 1"}], "tools": [CHECK_STOCK]})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        text = httpx2.get(f"{running.url}/metrics").text
        assert 'slm_swap_failures_total{reason="deadline"} 1.0' in text and "slm_swap_clients_gone_total 0.0" in text


def test_keys_are_asked_for_and_never_passed_on(hosted, tmp_path):
    key = "client-key-0123456789"
    (tmp_path / "keys").write_text(f"# the shop's\n{key}\n")
    with serving(tmp_path, "--mode", "hosted", "--keys", tmp_path / "keys", hosted=hosted) as running:
        body = {"model": HOSTED_NAME, "messages": [{"role": "user", "content": "x"}]}
        assert post(running, body, authorization=f"Bearer {key}").status_code == 200
        assert [post(running, body, authorization=f"{scheme} {key}").status_code for scheme in ("bearer", "BEARER", "Basic")] == [200, 200, 401]
        assert post(running, body, authorization=f"bearer {key.upper()}").status_code == 401
        for bare in (key, f"Bearer{key}", f"Bearer: {key}", f"Bearer Bearer {key}", f"Bearer {key} {key}", "Bearer"):
            assert post(running, body, authorization=bare).status_code == 401
        assert post(running, body, **{"api-key": f"Bearer {key}"}).status_code == 401
        assert post(running, body, **{"api-key": key}).status_code == 200
        for wrong in ("x", "client-key-012345678", HOSTED_KEY, key + "0"):
            answer = post(running, body, authorization=f"Bearer {wrong}")
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
            assert HOSTED_KEY not in answer.text
        assert post(running, body).status_code == 401
        for method, path in (("DELETE", "/v1/files/f"), ("GET", "/v1/files"), ("POST", "/v1/files"), ("DELETE", "/v1/models/m")):
            answer = httpx2.request(method, running.url + path, headers={"api-key": key})
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "not_passed_on")
        assert post(running, {"input": "x"}, "/v1/embeddings", **{"api-key": key}).headers["x-slm-swap"] == "hosted; reason=unsupported; detail=path"
        assert httpx2.get(f"{running.url}/metrics").status_code == 401
        assert httpx2.get(f"{running.url}/healthz").json() == {"status": "ok"}
        assert key not in running.log.read_text()


def refuses(running) -> bool:
    """Whether nobody listens: a client that could connect would wait for an answer that nobody gives."""
    try:
        socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2])), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False


@pytest.mark.parametrize("to_all", [False, True])
def test_sigterm_answers_what_is_under_way_and_takes_nothing_new(hosted, tmp_path, to_all):
    """Sent to the process that was started, or to all, as systemd does."""
    with serving(tmp_path, "--mode", "cascade", "--cascade", cascade(tmp_path / "c.json"), "--workers", 2, "--deadline", 60, hosted=hosted) as running:
        with ThreadPoolExecutor(2) as pool:
            under_way = [pool.submit(running.ask, "slow 4") for _ in range(2)]
            wait_until(lambda: "slm_swap_under_way 2.0" in httpx2.get(f"{running.url}/metrics").text)
            for child in children_of(running.script.pid) if to_all else []:
                os.kill(child, 15)
            running.script.send_signal(15)
            wait_until(lambda: refuses(running))
            assert not any(told.done() for told in under_way)
            assert [told.result()[0] for told in under_way] == ["local; reason=local"] * 2
        assert running.script.wait() == 0
        with pytest.raises(openai.APIConnectionError):
            running.ask("call Porto")


def test_a_worker_that_is_killed_comes_back_and_the_model_stays(hosted, tmp_path):
    with serving(tmp_path, "--mode", "cascade", "--cascade", cascade(tmp_path / "c.json"), hosted=hosted) as running:
        engine, worker = sorted(children_of(running.script.pid))
        os.kill(worker, 9)
        wait_until(lambda: len(children_of(running.script.pid)) == 2 and worker not in children_of(running.script.pid))
        assert engine in children_of(running.script.pid)

        def answers() -> bool:
            try:
                return running.ask("call Porto")[0] == "local; reason=local"
            except openai.APIConnectionError:
                return False

        wait_until(answers)


def kill_worker(running) -> None:
    """SIGKILL to the one worker, until another one answers."""
    worker = max(children_of(running.script.pid))
    os.kill(worker, 9)
    wait_until(lambda: len(children_of(running.script.pid)) == 2 and worker not in children_of(running.script.pid))
    wait_until(lambda: is_up(running))


@pytest.mark.parametrize("what", ["edited", "gone"])
def test_a_worker_that_comes_back_shows_the_rows_of_the_start(hosted, tmp_path, what):
    """Their hash is the one that was compared with the calibration's: rows that nobody measured must not be shown under it."""
    rows, before, after = tmp_path / "train.jsonl", "Is the desk lamp in stock in Porto?", "Another row of a desk lamp in Porto"
    called = [{"name": "check_stock", "arguments": {"item": "lamp", "city": "Porto"}}]
    row = {"messages": [{"role": "user", "content": before}], "tools": [CHECK_STOCK], "calls": called}
    rows.write_text(json.dumps(row) + "\n")
    with serving(tmp_path, "--mode", "local", "--few-shot", rows, hosted=hosted) as running:
        told, reply = running.ask("shown a lamp of Porto")
        assert (told, reply.choices[0].message.content) == ("local; reason=local", before)
        if what == "gone":
            rows.unlink()
        else:
            rows.write_text(rows.read_text().replace(before, after))
        kill_worker(running)
        told, reply = running.ask("shown a lamp of Porto")
        assert (told, reply.choices[0].message.content) == ("local; reason=local", before)


def test_a_worker_that_comes_back_counts_by_the_prices_of_the_start(hosted, tmp_path):
    """Else workers would count one bill, and keep one budget, by different prices."""
    prices = tmp_path / "prices.toml"
    prices.write_text(f'[hosted."{HOSTED_NAME}"]\ninput = 1000000\noutput = 2000000\n')  # 20 tokens in and 10 out: 40
    flags = ("--mode", "cascade", "--cascade", cascade(tmp_path / "c.json"), "--audit-share", 0)
    with serving(tmp_path, *flags, hosted=hosted, PRICES_FILE=str(prices)) as running:
        for saved, damaged in ((40, "no table"), (80, f'[hosted."{HOSTED_NAME}"]\ninput = 7\noutput = 7\n')):
            assert running.ask("call Porto")[0] == "local; reason=local"
            assert f"slm_swap_saved_money_total {saved}.0" in httpx2.get(f"{running.url}/metrics").text
            prices.write_text(damaged)
            kill_worker(running)
        assert running.ask("call Porto")[0] == "local; reason=local"
        assert "slm_swap_saved_money_total 120.0" in httpx2.get(f"{running.url}/metrics").text


def test_without_prices_no_metric_says_what_was_saved_or_spent(hosted, tmp_path):
    """A counter that never counts would say that it is nothing."""
    with serving(tmp_path, "--mode", "cascade", "--cascade", cascade(tmp_path / "c.json"), "--audit-share", 1, hosted=hosted) as running:
        assert running.ask("call Porto")[0] == "local; reason=local"
        wait_until(lambda: "slm_swap_audits_total{" in httpx2.get(f"{running.url}/metrics").text)
        told = httpx2.get(f"{running.url}/metrics").text
    assert "slm_swap_tokens_total{" in told and "money" not in told


def test_a_worker_that_cannot_start_again_ends_no_endpoint(hosted, tmp_path):
    """A file of the start may be gone for a while: the other worker still answers, and it comes back."""
    with mounted(tmp_path / "memory", 1) as memory, serving(tmp_path, "--mode", "hosted", "--workers", 2, hosted=hosted, SCRIPTED_MEMORY=str(memory.folder)) as running:
        [metrics] = memory.folder.iterdir()
        metrics.rename(away := memory.folder / "away")
        first, second = children_of(running.script.pid)
        os.kill(second, 9)
        wait_until(lambda: " ended (2) and is started again in 1 s" in running.log.read_text())
        assert first in children_of(running.script.pid)
        assert running.ask("call Porto")[0] == "hosted; reason=mode"
        away.rename(metrics)
        wait_until(lambda: len(children_of(running.script.pid)) == 2)
        assert running.script.poll() is None
    assert running.script.wait() == 0


def metrics_folders(state_folder) -> list[Path]:
    told = os.stat(state_folder)
    return list(MEMORY.glob(f"slm_swap-{told.st_dev:x}-{told.st_ino:x}-*"))


@pytest.mark.skipif(not MEMORY.is_dir(), reason="this machine has no /dev/shm")
def test_what_is_counted_lies_in_memory_and_goes_at_the_end(hosted, tmp_path):
    with serving(tmp_path, "--mode", "hosted", hosted=hosted) as running:
        [killed] = metrics_folders(running.state)
        assert list(killed.glob("*.db")) and not (running.state / "metrics").exists()
        children = children_of(running.script.pid)
        running.script.kill()
        wait_until(lambda: not any(Path(f"/proc/{child}").exists() for child in children))
    assert killed.exists()
    (running.log).unlink()
    with serving(tmp_path, "--mode", "hosted", hosted=hosted) as running:
        [folder] = metrics_folders(running.state)
        assert folder != killed
        assert running.ask("call Porto")[0] == "hosted; reason=mode"
        assert 'slm_swap_requests_total{answered_by="hosted",reason="mode"} 1.0' in httpx2.get(f"{running.url}/metrics").text
    assert running.script.wait() == 0
    assert metrics_folders(running.state) == []


def in_state_folder(state_folder) -> None:
    """What is counted lies there, with all its room."""
    (state_folder / "metrics").mkdir()
    (state_folder / "metrics/left.db").touch()
    with processes.metrics_folder(state_folder, 2) as folder:
        assert folder == state_folder / "metrics"
        files = {f"{kind}_{worker}.db" for kind in ("counter", "histogram", "gauge_livemax", "gauge_livesum") for worker in (0, 1)}
        assert {path.name: path.stat().st_blocks * 512 for path in folder.iterdir()} == dict.fromkeys(files, 65536)
    assert not folder.exists()


def test_without_memory_what_is_counted_lies_in_the_state_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "MEMORY", tmp_path / "nowhere")
    in_state_folder(tmp_path)


def test_without_room_in_memory_what_is_counted_lies_in_the_state_folder(tmp_path, monkeypatch):
    with mounted(tmp_path / "memory", 1) as memory:
        monkeypatch.setattr(processes, "MEMORY", memory.folder)
        memory.leave(508)  # two workers' files have 512 KiB
        in_state_folder(tmp_path)
        assert memory.files() == {}


def test_without_any_room_for_what_is_counted_the_endpoint_does_not_start(hosted, tmp_path):
    with mounted(tmp_path / "disk", 1) as disk:
        disk.leave(508)
        words = ("tests/support/scripted_endpoint.py", "--track", "toolcall", "--mode", "hosted", "--port", 0, "--workers", 2, "--state", disk.folder / "state")
        ended = run_python(*words, LANGFUSE_DISABLED="1", PRICES_FILE="", SCRIPTED_MEMORY=str(disk.folder), **known_to(hosted))
        assert (ended.returncode, ended.stdout) == (2, "")
        [line] = ended.stderr.splitlines()
        assert line.startswith("error: no room for the 512 KiB of what 2 workers count, in ") and line.endswith(": make room in one of them")
        assert disk.files() == {"state/lock": 0}


def test_memory_that_fills_later_ends_no_worker_and_restarts_leave_no_files(hosted, tmp_path):
    """A byte that is mapped and finds no room is SIGBUS. What a killed worker counted stays counted."""
    flags = ("--mode", "cascade", "--cascade", cascade(tmp_path / "c.json"), "--audit-share", 0)
    with mounted(tmp_path / "memory", 1) as memory, serving(tmp_path, *flags, hosted=hosted, SCRIPTED_MEMORY=str(memory.folder)) as running:
        files = memory.files()
        assert len(files) == 4 and set(files.values()) == {65536}
        memory.leave(0)
        for turn in range(1, 4):
            assert running.ask("call Porto")[0] == "local; reason=local"
            assert running.ask("unsure Porto")[0] == "hosted; reason=below_threshold"
            for path in ("/metrics", "/healthz"):
                assert httpx2.get(running.url + path).status_code == 200
            kill_worker(running)
            text = httpx2.get(f"{running.url}/metrics").text
            assert f'slm_swap_requests_total{{answered_by="local",reason="local"}} {turn}.0' in text
            assert f'slm_swap_request_seconds_count{{answered_by="hosted"}} {turn}.0' in text
            assert "slm_swap_engine_up 1.0" in text and "slm_swap_under_way 0.0" in text
            assert memory.files() == files
        assert running.log.read_text().count(" ended (-9) ") == running.log.read_text().count(" ended (") == 3


@pytest.mark.skipif(not MEMORY.is_dir(), reason="this machine has no /dev/shm")
def test_a_full_state_folder_stops_no_answer(hosted, tmp_path):
    """Audits, minutes, traces and the log, which lies there too, are not written; requests are answered, by a new worker as well."""
    with mounted(tmp_path / "disk", 8) as disk, LangfuseServer("pk-lf-full") as langfuse:
        public, secret = langfuse.keys.split(":")
        known = {"LANGFUSE_DISABLED": "0", "LANGFUSE_PUBLIC_KEY": public, "LANGFUSE_SECRET_KEY": secret, "LANGFUSE_BASE_URL": langfuse.url}
        flags = ("--mode", "cascade", "--cascade", cascade(tmp_path / "c.json"), "--audit-share", 1)
        with serving(disk.folder, *flags, hosted=hosted, **known) as running:
            worker = max(children_of(running.script.pid))
            for died in (False, True):
                disk.leave(0)
                if died:
                    os.kill(worker, 9)
                    wait_until(lambda: worker not in children_of(running.script.pid))
                    wait_until(lambda: is_up(running))
                for _ in range(3):
                    assert running.ask("call Porto")[0] == "local; reason=local"
                    assert running.ask("unsure Porto")[0] == "hosted; reason=below_threshold"
                    assert httpx2.get(f"{running.url}/metrics").status_code == 200
            disk.make_room()
        assert running.script.wait() == 0
        assert metrics_folders(running.state) == []


def test_gauges_are_of_the_processes_that_live(hosted, tmp_path):
    with serving(tmp_path, "--mode", "cascade", "--cascade", cascade(tmp_path / "c.json"), "--deadline", 60, hosted=hosted) as running, ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(running.ask, "slow 1")
        wait_until(lambda: "slm_swap_under_way 1.0" in httpx2.get(f"{running.url}/metrics").text)
        kill_worker(running)
        with pytest.raises(openai.APIConnectionError):
            under_way.result()
        text = httpx2.get(f"{running.url}/metrics").text
        assert "slm_swap_under_way 0.0" in text and "slm_swap_engine_up 1.0" in text
        engine, worker = sorted(children_of(running.script.pid))
        os.kill(engine, 9)
        wait_until(lambda: "slm_swap_engine_up 0.0" in httpx2.get(f"{running.url}/metrics").text)
        os.kill(worker, 9)
        wait_until(lambda: worker not in children_of(running.script.pid))
        wait_until(lambda: is_up(running))
        assert "slm_swap_engine_up 1.0" in httpx2.get(f"{running.url}/metrics").text


def test_a_socket_that_cannot_be_made_is_said_at_the_start_and_waited_for_later(hosted, tmp_path):
    place = tmp_path / "state/engine.sock"
    place.mkdir(parents=True)
    with pytest.raises(AssertionError, match=r"error: cannot listen at \S+engine\.sock \(.*\): check --state"), serving(tmp_path, "--mode", "local", hosted=hosted):
        pass
    place.rmdir()
    (tmp_path / "log").unlink()
    with serving(tmp_path, "--mode", "local", hosted=hosted) as running:
        place.unlink()
        place.mkdir()
        assert running.ask("die now")[0] == "hosted; reason=engine_down"
        wait_until(lambda: "the small model's process ended (2) and is started again in 1 s" in running.log.read_text())
        assert running.ask("call Porto")[0] == "hosted; reason=engine_down"
        place.rmdir()
        wait_until(lambda: running.ask("call Porto")[0] == "local; reason=local")


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--mode", "cascade"), "--mode cascade needs --cascade"),
        (("--mode", "hosted", "--host", "0.0.0.0"), "give clients keys"),
        (("--mode", "cascade", "--cascade", "nowhere.json"), "nowhere.json"),
        (("--mode", "hosted", "--audit-budget", "1"), "needs the hosted model's prices"),
    ],
)
def test_a_wrong_set_up_is_one_line(hosted, tmp_path, flags, said):
    with pytest.raises(AssertionError) as error, serving(tmp_path, *flags, hosted=hosted):
        pass
    assert said in str(error.value) and "Traceback" not in str(error.value)


@pytest.mark.parametrize(
    "environment, flags, said",
    [
        ({}, ("--state", "FILE"), "FILE"),
        ({}, ("--state", "FILE/below"), "FILE/below"),
        ({"AZURE_ENDPOINT": "no-url"}, (), "AZURE_ENDPOINT"),
        ({"SLM_BASE_URL": "no-url"}, (), "SLM_BASE_URL"),
        ({"SLM_BASE_URL": "http://127.0.0.1:9/v1"}, (), "SLM_"),
        ({}, ("--engine", "transformers", "--adapter", "nowhere"), "nowhere"),
        ({}, ("--mode", "hosted", "--port", "TAKEN"), "cannot listen on 127.0.0.1 port TAKEN"),
    ],
)
def test_before_a_failing_exit_nothing_is_said_but_the_error(hosted, tmp_path, environment, flags, said):
    """No URL where nobody will listen, and no next step."""
    (tmp_path / "file").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        names = {"FILE": str(tmp_path / "file"), "TAKEN": str(taken.getsockname()[1])}

        def named(text: str) -> str:
            return text.replace("FILE", names["FILE"]).replace("TAKEN", names["TAKEN"])

        words = ("slm_swap/05_serve/serve.py", "--track", "toolcall", "--mode", "shadow", "--port", 0, "--state", tmp_path / "state", *map(named, flags))
        known = {"SLM_BASE_URL": "", "SLM_MODEL_PATH": "models/phi-tiny", "PRICES_FILE": "", "LANGFUSE_DISABLED": "1"}
        ended = run_python(*words, **known | known_to(hosted) | environment)
    [line] = ended.stderr.splitlines()
    assert (ended.returncode, ended.stdout) == (2, "") and line.startswith("error: ") and os.path.basename(named(said)) in line


def test_each_request_is_a_generation_in_langfuse_with_both_replies(hosted, tmp_path):
    with LangfuseServer("pk-lf-serve") as langfuse:
        public, secret = langfuse.keys.split(":")
        known = {"LANGFUSE_DISABLED": "0", "LANGFUSE_PUBLIC_KEY": public, "LANGFUSE_SECRET_KEY": secret, "LANGFUSE_BASE_URL": langfuse.url}
        with serving(tmp_path, "--mode", "cascade", "--cascade", cascade(tmp_path / "c.json"), "--audit-share", 1, hosted=hosted, **known) as running:
            ids = [running.ask(text)[1].id for text in ("call Lyon", "unsure Porto")]
            wait_until(lambda: running.lines("audits.jsonl"))
        running.script.wait()
        spans = {span.json("metadata.answered_by"): span for span in langfuse.spans if span.kind == "generation"}
    assert set(spans) == {"local", "hosted"}
    assert {span.name for span in spans.values()} == {"request"} and spans["local"].json("metadata.request_id") == ids[0]
    assert "Porto" in str(spans["local"].attributes["langfuse.observation.metadata.other_reply"])
    assert HOSTED_KEY not in str(spans)
    own = "langfuse.observation.metadata.slm_swap_run"
    assert own in spans["local"].attributes and own not in spans["hosted"].attributes  # what the hosted model answered is production's traffic
