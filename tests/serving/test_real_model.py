"""The endpoint with the embedded model: what it sends is what an evaluation of the same request measured."""

import json

import httpx2
import pytest

from slm_swap.clients.loading import files_hash
from slm_swap.common.settings import PACKAGE, Settings
from slm_swap.demo.azure_simulator import AzureSimulator
from slm_swap.rows.examples import read_examples
from slm_swap.rows.prompts import request_of
from slm_swap.scoring.several import answer_json
from slm_swap.serving import state
from slm_swap.slm_client import SLMClient
from tests.support.endpoints import HOSTED_KEY, HOSTED_NAME, cascade, serving
from tests.support.processes import wait_until
from tests.support.scripts import load_script
from tests.support.shop_bot import write_log

ROWS, NEW = 6, 96
MODEL = PACKAGE / "models/phi-tiny"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Rows as prepare_data.py makes them of a shop bot's log."""
    folder = tmp_path_factory.mktemp("rows")
    load_script("02_dataset/prepare_data.py").main(
        ["--source", "chat", "--dataset-path", str(write_log(folder / "log.jsonl", 120)), "--track", "toolcall", "--out-dir", str(folder)]
    )
    return list(read_examples(next(folder.rglob("test.jsonl"))))[:ROWS]


@pytest.fixture(scope="module")
def measured(rows):
    """Each row's reply, as evaluations have them."""
    client = SLMClient(Settings(), MODEL, "fp32", max_new_tokens=NEW, constrain="always")
    return client.generate([request_of("toolcall", row) for row in rows])


def body_of(row):
    """What production sent of a row."""
    tools = [{"type": "function", "function": tool} for tool in row.tools]
    return {"model": HOSTED_NAME, "messages": row.messages, "tools": tools} | (row.options or {})


@pytest.fixture(scope="module")
def endpoint(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("endpoint")
    identity = {
        "files_sha256": [files_hash(MODEL)], "precision": "fp32", "path": None, "engine": "transformers", "ask": "native", "thinking": None, "constrain": "always",
        "max_new_tokens": NEW, "few_shot_sha256": None,
    }  # fmt: skip
    rule = {"signal": "min_logprob", "threshold": -1000.0}
    rules = {"call": rule, "no_call": rule}
    path = cascade(folder / "cascade.json", identity, rules=rules, tools=None)
    flags = ("--mode", "cascade", "--cascade", path, "--precision", "fp32", "--engine", "transformers", "--constrain", "always", "--max-new-tokens", NEW, "--deadline", 120)
    environment = {"SLM_MODEL_PATH": "models/phi-tiny"}
    with (
        AzureSimulator(rows, key=HOSTED_KEY) as hosted,
        serving(folder, *flags, "--audit-share", 0, hosted=hosted, script="slm_swap/05_serve/serve.py", **environment) as running,
    ):
        yield running


def test_what_is_sent_is_what_was_measured(endpoint, rows, measured):
    assert httpx2.get(f"{endpoint.url}/healthz").json()["mismatches"] == []
    local = 0
    for row, wanted in zip(rows, measured, strict=True):
        told = httpx2.post(f"{endpoint.url}/v1/chat/completions", json=body_of(row), timeout=120)
        assert told.status_code == 200
        if told.headers["x-slm-swap"] != "local; reason=local":
            assert told.headers["x-slm-swap"] == "hosted; reason=unfit"
            continue
        local += 1
        choice = told.json()["choices"][0]
        calls = [call["function"] for call in choice["message"].get("tool_calls") or ()]
        assert calls == wanted.calls
        assert (choice["message"]["content"] or "").strip() == wanted.text.strip()
        assert told.json()["usage"]["prompt_tokens"] == wanted.input_tokens
        assert told.json()["usage"]["completion_tokens"] == wanted.output_tokens
    assert local  # else nothing was compared


def test_requests_that_come_together_are_answered_as_alone(endpoint, rows, measured):
    """A batch's padding changes no reply, and no reply goes to another's client."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        bodies = [body_of(row) for row in rows]
        answers = list(pool.map(lambda body: httpx2.post(f"{endpoint.url}/v1/chat/completions", json=body, timeout=240), bodies))
    for told, wanted in zip(answers, measured, strict=True):
        if told.headers["x-slm-swap"].startswith("local"):
            calls = [call["function"] for call in told.json()["choices"][0]["message"].get("tool_calls") or ()]
            assert [json.loads(call["arguments"]) for call in calls] == [one["arguments"] for one in answer_json("toolcall", wanted.text, wanted.calls) or ()]


def test_a_flag_is_kept_in_the_endpoints_own_folder(endpoint, rows):
    state.raise_flag(endpoint.state, "a look", [], [])
    told = httpx2.post(f"{endpoint.url}/v1/chat/completions", json=body_of(rows[0]), timeout=120)
    state.lower_flag(endpoint.state)
    assert told.headers["x-slm-swap"] == "hosted; reason=stopped"


def test_a_prompt_beyond_the_context_goes_to_the_hosted_model(endpoint, rows):
    body = body_of(rows[0])
    body["messages"] = [{"role": "user", "content": "word " * 5000}]
    told = httpx2.post(f"{endpoint.url}/v1/chat/completions", json=body, timeout=120)
    assert told.headers["x-slm-swap"] == "hosted; reason=too_long"


def test_the_endpoint_says_what_runs(endpoint):
    wait_until(lambda: (endpoint.state / "endpoint.json").exists())
    told = json.loads((endpoint.state / "endpoint.json").read_text())
    assert told["identity"]["engine"] == "transformers" and told["answers"] == "cascade"
