"""Models behind OpenAI-compatible URLs, hosted ones and small ones that somebody serves, over real sockets."""

import json
import sys
import types
from contextlib import contextmanager

import pytest

from slm_swap.azure_client import AzureClient
from slm_swap.clients.protocol import Reply
from slm_swap.clients.served_client import ServedClient, read_confidence
from slm_swap.common.errors import UserError
from slm_swap.common.settings import Settings
from slm_swap.demo.azure_simulator import AzureSimulator, Faults
from slm_swap.evaluating.factory import make_client
from slm_swap.rows.examples import Example
from slm_swap.rows.prompts import Request

KEY = "fedcba9876543210-of-no-server"
ROWS = [Example(f"row {n}", f'{{"n":{n}}}') for n in range(12)]


class Recording(AzureSimulator):
    """Keeps the headers and paths of every request, and asks for a key only if it has one."""

    async def handle(self, request):
        self.seen = [*getattr(self, "seen", []), (request.path, dict(request.headers))]
        return await super().handle(request)

    def _check_access(self, request):
        return super()._check_access(request) if self.key else None

    async def _models(self, request):
        self.listed = dict(request.headers)
        return await super()._models(request)


def chat(rows=ROWS):
    return [Request([{"role": "user", "content": row.prompt}]) for row in rows]


RIGHT = [row.completion for row in ROWS]


@contextmanager
def closing_client(client):
    try:
        yield client
    finally:
        client.close()


def slm_settings(server, **changes):
    return Settings(**{"slm_base_url": f"{server.url}/v1", "slm_model_name": "simulator", "slm_api_key": KEY} | changes)


def test_a_hosted_model_of_an_openai_compatible_server():
    with Recording(ROWS, key=KEY) as server:
        settings = Settings(azure_endpoint=f"{server.url}/v1", azure_deployment="simulator", azure_api_key=KEY, azure_api_version="2024-10-21")
        with closing_client(AzureClient(settings)) as client:
            assert [reply.text for reply in client.generate(chat())] == RIGHT
            told = client.describe()
        path, headers = server.seen[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}" and "api-key" not in headers
    assert (told["kind"], told["form"], told["endpoint"], told["api_version"]) == ("azure", "openai", f"127.0.0.1:{server.port}/v1", None)
    assert told["parameters"]["max_tokens"] == 256 and KEY not in repr(told)


def test_a_server_without_a_key_is_asked_without_one(monkeypatch):
    """Nor with a token of the signed-in Azure identity, which is nothing to show to others."""
    module = types.ModuleType("azure.identity")
    module.DefaultAzureCredential = lambda: None
    module.get_bearer_token_provider = lambda *_: lambda: "a-token-of-azure"
    monkeypatch.setitem(sys.modules, "azure", types.ModuleType("azure"))
    monkeypatch.setitem(sys.modules, "azure.identity", module)
    with Recording(ROWS, key="") as server:
        settings = Settings(azure_endpoint=f"{server.url}/v1", azure_deployment="simulator")
        with closing_client(AzureClient(settings)) as client:
            assert [reply.text for reply in client.generate(chat())] == RIGHT
        assert not any({"authorization", "api-key"} & {name.lower() for name in headers} for _, headers in server.seen)


def test_a_server_that_wants_a_key_says_which_variable():
    with Recording(ROWS, key=KEY) as server:
        settings = Settings(azure_endpoint=f"{server.url}/v1", azure_deployment="simulator")
        with closing_client(AzureClient(settings)) as client, pytest.raises(UserError, match=r"401.*: set AZURE_API_KEY"):
            client.generate(chat())
        with closing_client(ServedClient(slm_settings(server, slm_api_key=None))) as client, pytest.raises(UserError, match="set SLM_API_KEY"):
            client.generate(chat())


def test_azures_form_at_another_server_says_how_it_is_written():
    with AzureSimulator(ROWS, key=KEY) as server:
        url = f"{server.url}/somewhere/openai/deployments/simulator"
        settings = Settings(azure_endpoint=url, azure_api_key=KEY, azure_api_version="2024-10-21")
        said = f"404: .*an OpenAI-compatible server is written {server.url}/somewhere/v1"
        with closing_client(AzureClient(settings)) as client, pytest.raises(UserError, match=said):
            client.generate(chat())


def test_a_served_small_model(tmp_path):
    prices = tmp_path / "prices.toml"
    prices.write_text("[local]\nhour = 3.6\n")
    with Recording(ROWS, key=KEY, faults=Faults(slow=1.0, slow_seconds=0.2)) as server:
        settings = slm_settings(server, prices_file=str(prices))
        with closing_client(make_client("slm", settings, "structured", [], concurrency=5, max_new_tokens=99)) as client:
            assert [reply.text for reply in client.generate(chat())] == RIGHT
            told = client.describe()
            assert client.cost(1, 1, 1, 10.0) == pytest.approx(0.01)  # 3.6 an hour is 0.001 a second
        assert server.most_in_flight == 5
        assert all(headers["Authorization"] == f"Bearer {KEY}" for _, headers in server.seen)
    assert told == {
        "kind": "slm", "path": "simulator", "endpoint": f"127.0.0.1:{server.port}/v1", "engine": "served", "precision": None,
        "adapter": None, "training_seconds": None,
        "parameters": {"temperature": 0.0, "seed": 42, "max_tokens": 99, "logprobs": True, "top_logprobs": 2},
        "dropped_parameters": [], "served_model": ["azure-simulator"], "system_fingerprint": ["fp_simulator_42"],
    }  # fmt: skip


def test_a_servers_log_probabilities_are_a_replys_confidence():
    tools = [{"name": "pay", "description": "", "parameters": {"type": "object", "properties": {"to": {"type": "string"}}}}]
    row = Example("Pay Zoë", '<tool_call name="pay">{"to":"Zoë"}</tool_call>', messages=[{"role": "user", "content": "Pay Zoë"}], calls=[], tools=tools)
    with AzureSimulator([row], key=KEY) as server, closing_client(make_client("slm", slm_settings(server), "toolcall", [])) as client:
        [reply] = client.generate([Request([{"role": "user", "content": "Pay Zoë"}], tools, None, None, True)])
    assert reply.calls == [{"name": "pay", "arguments": '{"to":"Zoë"}'}]
    each = reply.confidence["tool_logprob"]  # the simulator's tokens of 4 bytes are equally likely, and one of them is `"pay`
    assert -1 < each <= 0
    assert reply.confidence == {
        "min_logprob": each, "sum_logprob": pytest.approx(3 * each, abs=1e-5), "tokens": 3, "tool_logprob": each, "min_margin": 1.0,
    }  # fmt: skip  and two share the ë


@pytest.mark.parametrize("faults", [{}, {"unrecognized_parameters": frozenset(["logprobs", "top_logprobs"])}])
def test_a_server_without_log_probabilities_gives_no_confidence(faults):
    class Without(AzureSimulator):
        def answer(self, request, raw):
            told = super().answer(request, raw)
            for choice in told.body.get("choices", ()):
                choice["logprobs"] = None
            return told

    with Without(ROWS, key=KEY, faults=Faults(**faults)) as server, closing_client(make_client("slm", slm_settings(server), "structured", [])) as client:
        replies = client.generate(chat())
        assert [reply.text for reply in replies] == RIGHT and {reply.confidence for reply in replies} == {None}
        assert client.describe()["dropped_parameters"] == sorted(faults.get("unrecognized_parameters", ()))


@pytest.mark.parametrize("content", [None, [], [{"token": "x"}], [{"token": "x", "logprob": 0, "top_logprobs": []}], [{"bytes": [255], "token": "x", "logprob": 0, "top_logprobs": [{"token": "y", "logprob": -1}]}]])
def test_log_probabilities_that_cannot_be_read_give_no_confidence(content):
    body = {"choices": [{"message": {"content": "x"}, "logprobs": {"content": content}}]}
    assert read_confidence(body, chat()[0], Reply("x")) is None


@pytest.mark.parametrize(("wanted", "sent"), [(None, None), ("off", False), ("on", True)])
def test_thinking_is_told_to_the_servers_chat_template(wanted, sent):
    class Told(AzureSimulator):
        async def handle(self, request):
            self.bodies = [*getattr(self, "bodies", []), json.loads(await request.read())]
            return await super().handle(request)

    with Told(ROWS, key=KEY) as server, closing_client(make_client("slm", slm_settings(server), "structured", [], thinking=wanted)) as client:
        client.generate(chat()[:1])
        assert [body.get("chat_template_kwargs") for body in server.bodies] == [sent if sent is None else {"enable_thinking": sent, "thinking": sent}]
        assert client.describe().get("thinking") == wanted


def test_a_server_that_cannot_switch_thinking_ends_the_run():
    faults = Faults(unrecognized_parameters=frozenset(["chat_template_kwargs"]))
    with AzureSimulator(ROWS, key=KEY, faults=faults) as server:
        client = make_client("slm", slm_settings(server), "structured", [], thinking="on")
        with closing_client(client), pytest.raises(UserError, match=r"takes no chat_template_kwargs .*leave --thinking out"):
            client.generate(chat())


def test_without_a_price_its_cost_is_not_known():
    with AzureSimulator(ROWS, key=KEY) as server, closing_client(ServedClient(slm_settings(server))) as client:
        assert client.cost(1, 1, 1, 10.0) is None


def test_the_server_says_which_model_it_serves():
    with Recording(ROWS, key=KEY) as server:
        with closing_client(ServedClient(slm_settings(server, slm_model_name=None))) as client:
            assert client.describe()["path"] == "simulator"
            assert [reply.text for reply in client.generate(chat())] == RIGHT
        assert server.listed["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("path", ["/v2", "/none/v1"])
def test_a_server_that_does_not_say_needs_the_name(path):
    with AzureSimulator(ROWS, key=KEY) as server:
        settings = slm_settings(server, slm_model_name=None, slm_base_url=server.url + path)
        with pytest.raises(UserError, match=r"does not say what it serves \(404\): set SLM_MODEL_NAME"):
            ServedClient(settings)
    with pytest.raises(UserError, match=r"ConnectError.*set SLM_MODEL_NAME"):
        ServedClient(settings)


def test_several_models_are_named():
    class Two(AzureSimulator):
        async def _models(self, request):
            from aiohttp import web

            return web.json_response({"data": [{"id": "b"}, {"id": "a"}]})

    with Two(ROWS, key=KEY) as server, pytest.raises(UserError, match="serves a, b: set SLM_MODEL_NAME"):
        ServedClient(slm_settings(server, slm_model_name=None))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"engine": "vllm"}, "--engine"),
        ({"precision": "bf16"}, "--precision"),
        ({"adapter": "here"}, "--adapter"),
        ({"engine_start": "fast", "adapter": "here"}, "--engine-start, --adapter"),
    ],
)
def test_flags_of_a_local_model_are_refused(flags, said):
    settings = Settings(slm_base_url="http://127.0.0.1:9/v1", slm_model_name="m")
    with pytest.raises(UserError, match=f"^{said}: the model of SLM_BASE_URL is loaded by its server"):
        make_client("slm", settings, "structured", [], **({"engine": "auto", "engine_start": "auto"} | flags))


def test_an_evaluation_of_a_served_model(run_script, eval_script, write_rows, tmp_path, monkeypatch):
    """As of a local one, but asked over HTTP with --concurrency: its report, its latency, its cost by the machine's hour."""
    rows = [{"id": f"r{n}", "prompt": f"row {n}", "completion": f'{{"n":{n}}}'} for n in range(12)]
    path, out, prices = write_rows("rows.jsonl", rows), tmp_path / "slm.json", tmp_path / "prices.toml"
    prices.write_text("[local]\nhour = 3.6\n")
    with AzureSimulator(ROWS, key=KEY) as server:
        for name, value in (("BASE_URL", f"{server.url}/v1"), ("MODEL_NAME", "simulator"), ("API_KEY", KEY)):
            monkeypatch.setenv(f"SLM_{name}", value)
        monkeypatch.setenv("PRICES_FILE", str(prices))
        words = ["--track", "structured", "--model-kind", "slm", "--dataset", path, "--out", out, "--latency-rows", 1, "--concurrency", 4]
        code, _, said = run_script(eval_script, *words, "--repeat", 2)
    assert code == 0, said
    report = json.loads(out.read_text())
    assert report["metrics"] == dict.fromkeys(report["metrics"], 1.0)
    assert report["model"]["kind"] == "slm" and report["model"]["engine"] == "served"
    assert report["latency"]["alone"]["rows"] == 1 and report["latency"]["loaded"]["concurrency"] == 4
    assert report["cost"]["rows"] == 12 and report["cost"]["total"] > 0 and report["cost"]["repeat"] is None


def test_a_served_model_is_compared_with_a_hosted_one(run_script, eval_script, compare_script, write_rows, tmp_path, monkeypatch):
    rows = [{"id": f"r{n}", "prompt": f"row {n}", "completion": f'{{"n":{n}}}'} for n in range(12)]
    path, prices = write_rows("rows.jsonl", rows), tmp_path / "prices.toml"
    prices.write_text("[local]\nhour = 3.6\nhours_per_month = 720\n[hosted.simulator]\ninput = 1.0\ncached = 1.0\noutput = 1.0\n")
    monkeypatch.setenv("PRICES_FILE", str(prices))
    with AzureSimulator(ROWS, key=KEY, deployment="Tiny-0.6B") as small, AzureSimulator(ROWS, key=KEY) as hosted:
        values = {"SLM_BASE_URL": f"{small.url}/v1", "SLM_MODEL_NAME": "Tiny-0.6B", "SLM_API_KEY": KEY}
        values |= {"AZURE_ENDPOINT": f"{hosted.url}/v1", "AZURE_DEPLOYMENT": "simulator", "AZURE_API_KEY": KEY}
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        for kind in ("slm", "azure"):
            words = ["--track", "structured", "--model-kind", kind, "--dataset", path, "--out", tmp_path / f"{kind}.json"]
            code, _, said = run_script(eval_script, *words)
            assert code == 0, said
    out = tmp_path / "decision.json"
    words = ["--track", "structured", "--azure", tmp_path / "azure.json", "--slm", tmp_path / "slm.json", "--out", out]
    code, _, told = run_script(compare_script, *words)
    decision = json.loads(out.read_text())
    assert code in (0, 10, 11), told
    assert decision["labels"] == {"azure": "simulator", "slm": "Tiny-0.6B", "before": None}
    assert decision["cost"]["slm"]["per_1000"] > 0 and decision["cost"]["azure"]["per_1000"] > 0
    assert decision["latency"]["slm"]["alone"]["rows"] == 1
