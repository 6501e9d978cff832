"""Requests for JSON go to the small model under the schemas that the cascade was calibrated on, and under no other."""

import json

import httpx2
import pytest

from slm_swap.rows.examples import Example
from slm_swap.verdict.cascade import schema_hash
from tests.support.endpoints import HOSTED_KEY, HOSTED_NAME, cascade, serving
from tests.support.scripted import Scripted, plain

VALUE = '{"kind":"late","sure":true}'
SCHEMA = {"type": "object", "properties": {"kind": {"type": "string"}, "sure": {"type": "boolean"}}, "required": ["kind"]}
WIDER = SCHEMA | {"properties": SCHEMA["properties"] | {"why": {"type": "string"}}}
LOCAL = "local; reason=local"


@pytest.fixture(scope="module")
def hosted():
    with Scripted([Example(VALUE, VALUE), Example("shown", VALUE), Example("call Porto", VALUE)], plain, key=HOSTED_KEY) as server:
        yield server


def structured(folder, hosted, schemas, *flags, mode="cascade", **changes):
    """An endpoint whose cascade was calibrated on `schemas`; all its requests ask for JSON."""
    path = cascade(folder / "cascade.json", track="structured", schemas=schemas, **changes)
    words = ("--mode", mode, "--cascade", path, "--json-in-prompt", "--audit-share", 0, *flags)
    return serving(folder, *words, hosted=hosted, track="structured", **({} if hosted else {"AZURE_ENDPOINT": ""}))


def asked(running, wanted) -> httpx2.Response:
    """What comes of a request, whose local answer would be VALUE, for a `response_format`."""
    body = {"model": HOSTED_NAME, "messages": [{"role": "user", "content": VALUE}, {"role": "user", "content": "shown"}]}
    body |= {} if wanted is None else {"response_format": wanted}
    return httpx2.post(f"{running.url}/v1/chat/completions", json=body, timeout=60)


def of(schema, name="case"):
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema}}


def test_a_schema_that_was_not_calibrated_on_goes_to_the_hosted_model(hosted, tmp_path):
    turned = dict(reversed(SCHEMA.items())) | {"properties": dict(reversed(SCHEMA["properties"].items()))}
    with structured(tmp_path, hosted, [schema_hash(SCHEMA)]) as running:
        told = [asked(running, wanted) for wanted in (of(SCHEMA), of(turned, "renamed"), of(WIDER), {"type": "json_object"}, None)]
        assert [reply.headers["x-slm-swap"] for reply in told] == [
            LOCAL, LOCAL, "hosted; reason=schema; detail=case", "hosted; reason=schema; detail=json_object", "hosted; reason=schema; detail=none",
        ]  # fmt: skip
        assert all(reply.status_code == 200 for reply in told)
        assert 'slm_swap_requests_total{answered_by="hosted",reason="schema"} 3.0' in httpx2.get(f"{running.url}/metrics").text
    [minute] = running.lines("minutes.jsonl")
    assert (minute["requests"], minute["unlike"]) == ({"local": {"local": 2}, "hosted": {"schema": 3}}, 3)


def test_where_no_calibrated_row_had_a_schema_none_is_taken(hosted, tmp_path):
    with structured(tmp_path, hosted, [None]) as running:
        told = [asked(running, wanted).headers["x-slm-swap"] for wanted in (None, of(SCHEMA))]
    assert told == [LOCAL, "hosted; reason=schema; detail=case"]


def test_a_cascade_that_does_not_say_its_schemas_answers_nothing(hosted, tmp_path):
    """An earlier version wrote it."""
    with structured(tmp_path, hosted, None) as running:
        assert [asked(running, wanted).headers["x-slm-swap"] for wanted in (of(SCHEMA), None)] == ["hosted; reason=mismatch"] * 2
        [said] = [line for line in running.log.read_text().splitlines() if line.startswith("MISMATCH: ")]
        assert "does not say which schemas it was calibrated on" in said and said.endswith("make it anew with 03_compare/calibrate.py")


def test_without_a_hosted_model_another_schema_is_refused(tmp_path):
    with structured(tmp_path, None, [schema_hash(SCHEMA)], mode="local") as running:
        told = asked(running, of(WIDER))
        assert (told.status_code, told.json()["error"]["code"]) == (400, "schema")
        assert json.loads(asked(running, of(SCHEMA)).json()["choices"][0]["message"]["content"]) == json.loads(VALUE)


def test_a_cascade_that_names_no_tools_was_measured_on_none(hosted, tmp_path):
    with serving(tmp_path, "--mode", "cascade", "--cascade", cascade(tmp_path / "cascade.json", tools=None), hosted=hosted) as running:
        assert running.ask("call Porto")[0] == "hosted; reason=tools; detail=check_stock"
