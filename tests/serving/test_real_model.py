"""The endpoint with the embedded model: what it sends is what an evaluation of the same request measured."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest

from slm_swap.clients.loading import files_hash
from slm_swap.common.reports import sha256_file
from slm_swap.common.settings import PACKAGE, Settings
from slm_swap.demo.azure_simulator import AzureSimulator
from slm_swap.rows.examples import Example, read_examples
from slm_swap.rows.few_shot import FewShot
from slm_swap.rows.prompts import request_of
from slm_swap.scoring.form import form_of
from slm_swap.serving import state
from slm_swap.slm_client import SLMClient
from slm_swap.verdict.cascade import is_fit, schema_hash
from tests.support.endpoints import HOSTED_KEY, HOSTED_NAME, cascade, serving
from tests.support.processes import wait_until
from tests.support.scripts import load_script

NEW = 32
MODEL = PACKAGE / "models/phi-tiny"
SAID = ("late by two days", "the lamp is broken", "a refund of 30 euros", "two chairs instead of one", "nothing at all", "the rug smells")
SHORT = {"type": "object", "properties": {"kind": {"enum": ["late", "broken", "refund"]}, "sure": {"type": "boolean"}}, "required": ["kind", "sure"], "additionalProperties": False}
LONG = {"type": "object", "properties": {"why": {"type": "string", "minLength": 400}}, "required": ["why"], "additionalProperties": False}


def asked(said: str) -> dict:
    """What production sent: a request whose reply is short, or does not fit into NEW tokens."""
    schema, format_name = (LONG, "essay") if said == SAID[-1] else (SHORT, "case")
    messages = [{"role": "system", "content": "Sort the complaint."}, {"role": "user", "content": f"Complaint: {said}"}]
    return {"messages": messages, "response_format": {"type": "json_schema", "json_schema": {"name": format_name, "schema": schema}}}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("rows"), SAID)


def prepared(folder: Path, said: Sequence[str]) -> list[Example]:
    """Rows as prepare_data.py makes them of a log."""
    log = []
    for one in said:
        gold = {"why": "x" * 400} if one == SAID[-1] else {"kind": "late", "sure": True}
        log.append(asked(one) | {"messages": [*asked(one)["messages"], {"role": "assistant", "content": json.dumps(gold)}]})
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    load_script("02_dataset/prepare_data.py").main(["--source", "chat", "--dataset-path", str(folder / "log.jsonl"), "--out-dir", str(folder)])
    (folder / "all.jsonl").write_text("".join(split.read_text() for split in folder.rglob("structured/*.jsonl")))
    found = read_examples(folder / "all.jsonl")
    assert len(found) == len(said)
    return sorted(found, key=lambda row: row.messages[-1]["content"])


@pytest.fixture(scope="module")
def measured(rows):
    """Each row's reply as evaluations have it."""
    client = SLMClient(Settings(), MODEL, "fp32", max_new_tokens=NEW, constrain="always")
    told = list(zip(rows, client.generate([request_of("structured", row) for row in rows]), strict=True))
    assert {fits(*pair) for pair in told} == {True, False}
    return told


def fits(row, reply) -> bool:
    return is_fit(reply.finish_reason, *form_of("structured", row, reply.text, reply.finish_reason, reply.calls))


def body_of(row):
    return asked(row.messages[-1]["content"].removeprefix("Complaint: ")) | {"model": HOSTED_NAME}


@pytest.fixture(scope="module")
def endpoint(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("endpoint")
    identity = {
        "files_sha256": [files_hash(MODEL)], "precision": "fp32", "path": None, "engine": "transformers", "ask": "native", "thinking": None, "constrain": "always",
        "max_new_tokens": NEW, "few_shot_sha256": None,
    }  # fmt: skip
    rule = {"signal": "min_logprob", "threshold": -1000.0}
    schemas = sorted({schema_hash(row.schema) for row in rows})
    path = cascade(folder / "cascade.json", identity, "structured", rules={"value": rule}, schemas=schemas)
    flags = ("--mode", "cascade", "--cascade", path, "--precision", "fp32", "--engine", "transformers", "--constrain", "always", "--max-new-tokens", NEW, "--deadline", 120)
    environment = {"SLM_MODEL_PATH": "models/phi-tiny"}
    with (
        AzureSimulator(rows, key=HOSTED_KEY) as hosted,
        serving(folder, *flags, "--audit-share", 0, hosted=hosted, script="slm_swap/05_serve/serve.py", track="structured", **environment) as running,
    ):
        yield running


def test_what_is_sent_is_what_was_measured(endpoint, measured):
    assert httpx2.get(f"{endpoint.url}/healthz").json()["mismatches"] == []
    for row, wanted in measured:
        told = httpx2.post(f"{endpoint.url}/v1/chat/completions", json=body_of(row), timeout=120)
        assert told.status_code == 200
        assert told.headers["x-slm-swap"] == ("local; reason=local" if fits(row, wanted) else "hosted; reason=unfit")
        if not fits(row, wanted):
            continue
        assert told.json()["choices"][0]["message"] == {"role": "assistant", "content": wanted.text, "refusal": None}
        assert told.json()["usage"]["prompt_tokens"] == wanted.input_tokens
        assert told.json()["usage"]["completion_tokens"] == wanted.output_tokens


def test_requests_that_come_together_are_answered_as_alone(endpoint, measured):
    """A batch's padding changes no reply, and no reply goes to another's client."""
    with ThreadPoolExecutor(8) as pool:
        bodies = [body_of(row) for row, _ in measured]
        answers = list(pool.map(lambda body: httpx2.post(f"{endpoint.url}/v1/chat/completions", json=body, timeout=240), bodies))
    for told, (row, wanted) in zip(answers, measured, strict=True):
        if fits(row, wanted):
            assert json.loads(told.json()["choices"][0]["message"]["content"]) == json.loads(wanted.text)


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


def test_a_recipe_is_asked_through_the_endpoint_as_it_was_measured(rows, measured, tmp_path):
    prepared(tmp_path, ("the parcel came late", "a torn box and a broken lamp", "money back for the rug"))
    shots, recipe = tmp_path / "all.jsonl", tmp_path / "recipe.json"
    row, plain = next(pair for pair in measured if fits(*pair))
    row = replace(row, ask="native")
    row = replace(row, shots=FewShot(shots, "structured", 2).turns(row))
    [wanted] = SLMClient(Settings(), MODEL, "fp32", max_new_tokens=NEW, constrain="always").generate([request_of("structured", row)])
    assert fits(row, wanted) and wanted.input_tokens > plain.input_tokens + 50, "the shots are in the prompt"
    told = {
        "schema_version": 1, "stage": "recipe", "track": "structured", "model": {"path": "models/phi-tiny", "files_sha256": files_hash(MODEL)}, "adapter": None,
        "precision": "fp32", "engine": "transformers", "ask": "native", "few_shot": {"path": str(shots), "sha256": sha256_file(shots), "shots": 2},
        "thinking": None, "constrain": "always", "max_new_tokens": NEW,
    }  # fmt: skip
    recipe.write_text(json.dumps(told))
    flags = ("--mode", "local", "--recipe", recipe, "--deadline", 120)
    with serving(tmp_path, *flags, script="slm_swap/05_serve/serve.py", track="structured", SLM_MODEL_PATH="models/phi-tiny", AZURE_ENDPOINT="") as running:
        assert httpx2.get(f"{running.url}/healthz").json()["mismatches"] == []
        answer = httpx2.post(f"{running.url}/v1/chat/completions", json=body_of(row), timeout=120)
    assert answer.headers["x-slm-swap"] == "local; reason=local"
    assert answer.json()["choices"][0]["message"]["content"] == wanted.text
    assert answer.json()["usage"]["prompt_tokens"] == wanted.input_tokens
