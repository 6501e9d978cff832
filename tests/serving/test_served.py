"""The endpoint with a small model that somebody serves: its log-probabilities decide as a loaded model's confidence does."""

import pytest

from slm_swap.demo.azure_simulator import AzureSimulator
from slm_swap.demo.mistakes import draw
from slm_swap.rows.examples import Example
from slm_swap.verdict.cascade import identity_of
from tests.support.endpoints import HOSTED_KEY, cascade, serving

SERVED_KEY = "served-key-0123456789"
CALL = '<tool_call name="check_stock">{"item":"lamp","city":"%s"}</tool_call>'
CITIES = ("Porto", "Lyon", "Graz", "Turin", "Bergen", "Leeds")


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    rows = [Example(f"call {city}", CALL % city) for city in CITIES]
    identity = identity_of({"path": "simulator", "engine": "served"}, "native", "off", 256, None)
    rule = {"signal": "tool_logprob", "threshold": -0.5}
    path = cascade(folder / "cascade.json", identity, rules={"call": rule, "no_call": rule | {"threshold": None}})
    with AzureSimulator(rows, key=SERVED_KEY) as small, AzureSimulator(rows, key=HOSTED_KEY) as hosted:
        environment = {"SLM_BASE_URL": f"{small.url}/v1", "SLM_API_KEY": SERVED_KEY}
        flags = ("--mode", "cascade", "--cascade", path, "--audit-share", 0)
        with serving(folder, *flags, hosted=hosted, script="slm_swap/05_serve/serve.py", **environment) as running:
            yield running, small, hosted


def test_the_servers_log_probabilities_decide(endpoint):
    running, small, hosted = endpoint
    told = {city: running.ask(f"call {city}") for city in CITIES}
    # `check_stock` lies in 3 of the simulator's tokens of 4 bytes, each as likely as its draw for this request says
    wanted = {city: -round(3 * draw(42, "logprob", f"call {city}"), 6) >= -0.5 for city in CITIES}
    assert {city: header == "local; reason=local" for city, (header, _) in told.items()} == wanted
    assert set(wanted.values()) == {True, False}
    assert {header for header, _ in told.values()} == {"local; reason=local", "hosted; reason=below_threshold"}
    assert all(city in reply.choices[0].message.tool_calls[0].function.arguments for city, (_, reply) in told.items())
    assert small.counts["answered"] == len(CITIES) and hosted.counts["answered"] == list(wanted.values()).count(False)
