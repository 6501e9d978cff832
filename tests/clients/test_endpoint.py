"""URLs of OpenAI-compatible servers and of gateways; Azure's own stand in test_azure_client."""

import pytest

from slm_swap.clients.endpoint import Endpoint, parse_base_url, parse_endpoint
from slm_swap.common.errors import UserError

DATE = "2024-10-21"
DATED = {"api-version": DATE}


@pytest.mark.parametrize(
    ("url", "version", "expected", "bearer"),
    [
        ("https://api.openai.com/v1", None, Endpoint("https://api.openai.com/v1", "m", "openai"), True),
        ("https://api.openai.com/v1/", DATE, Endpoint("https://api.openai.com/v1", "m", "openai"), True),
        ("http://127.0.0.1:8000/v1", DATE, Endpoint("http://127.0.0.1:8000/v1", "m", "openai"), True),
        ("http://localhost:11434/v1/chat/completions", None, Endpoint("http://localhost:11434/v1", "m", "openai"), True),
        ("https://openrouter.ai/api/v1", None, Endpoint("https://openrouter.ai/api/v1", "m", "openai"), True),
        ("https://api.groq.com/openai/v1", None, Endpoint("https://api.groq.com/openai/v1", "m", "openai"), True),
        ("https://g.googleapis.com/v1beta/openai", None, Endpoint("https://g.googleapis.com/v1beta/openai", "m", "openai"), True),
        ("https://h.example/inference/chat/completions", None, Endpoint("https://h.example/inference", "m", "openai"), True),
        ("https://m.eastus.models.ai.azure.com/v1", None, Endpoint("https://m.eastus.models.ai.azure.com/v1", "m", "openai"), True),
        ("https://gw.azure-api.net/llm/v1", None, Endpoint("https://gw.azure-api.net/llm/v1", "m", "openai"), False),
        ("https://gw.example/openai/v1", DATE, Endpoint("https://gw.example/openai/v1", "m", "v1"), False),
        ("https://gw.azure-api.net/llm/openai/v1", None, Endpoint("https://gw.azure-api.net/llm/openai/v1", "m", "v1"), False),
        ("https://r.services.ai.azure.com/api/projects/p/openai/v1", None,
         Endpoint("https://r.services.ai.azure.com/api/projects/p/openai/v1", "m", "v1"), False),
        ("https://gw.azure-api.net/llm/openai/deployments/m/chat/completions?api-version=2024-10-21", DATE,
         Endpoint("https://gw.azure-api.net/llm/openai/deployments/m", "m", "deployments", DATED), False),
        ("https://gw.example/a/b/models", DATE, Endpoint("https://gw.example/a/b/models", "m", "models", DATED), False),
    ],
)  # fmt: skip
def test_compatible_servers_and_gateways(url, version, expected, bearer):
    found = parse_endpoint(url, "m", version)
    assert (found, found.bearer) == (expected, bearer)
    if "/inference/" not in url:  # of a path without a version, only the whole URL says that it is one
        assert parse_endpoint(found.base_url, "m", version) == found


@pytest.mark.parametrize(
    ("url", "version", "said"),
    [
        ("https://api.openai.com", DATE, "set it to https://api.openai.com/v1"),
        ("http://127.0.0.1:11434", None, "an OpenAI-compatible server is written with its path: http://127.0.0.1:11434/v1"),
        ("https://gw.azure-api.net/llm", DATE, "'/llm' at gw.azure-api.net"),
        ("https://h.example/v1/models", DATE, "'/v1/models'"),
        ("https://h.example/v1/embeddings", DATE, "'/v1/embeddings'"),
        ("http://10.0.0.5:8000/v1", None, "send the key in clear"),
        ("https://h.example/v1?key=secret", None, "besides api-version"),
        ("https://me:secret@h.example/v1", None, "user or password"),
    ],
)
def test_what_is_no_base_url_is_said_in_one_line(url, version, said):
    with pytest.raises(UserError) as caught:
        parse_endpoint(url, "m", version)
    assert said in str(caught.value) and "\n" not in str(caught.value) and "secret" not in str(caught.value)


def test_without_a_key_only_azures_forms_need_https():
    assert parse_endpoint("http://10.0.0.5:8000/v1", "m", None, key=False).base_url == "http://10.0.0.5:8000/v1"
    with pytest.raises(UserError, match="write https"):
        parse_endpoint("http://10.0.0.5/openai/v1", "m", DATE, key=False)


def test_a_model_is_needed_and_what_azure_misses_is_not():
    with pytest.raises(UserError, match="misses AZURE_DEPLOYMENT: set"):
        parse_endpoint("https://api.openai.com/v1", None, None, ("AZURE_API_KEY",))
    assert parse_endpoint("https://api.openai.com/v1", "m", None, ("AZURE_API_KEY",)).form == "openai"
    with pytest.raises(UserError, match="misses AZURE_API_KEY"):
        parse_endpoint("https://r.openai.azure.com/openai/v1", "m", None, ("AZURE_API_KEY",))


def test_a_place_tells_servers_apart():
    urls = ["http://127.0.0.1:8000/v1", "http://127.0.0.1:8001/v1", "https://h.example/a/v1", "https://h.example/b/v1"]
    urls += ["https://gw.azure-api.net/a/openai/v1", "https://gw.azure-api.net/b/openai/v1"]
    places = [parse_endpoint(url, "m", None).place for url in urls]
    assert places == [
        "127.0.0.1:8000/v1", "127.0.0.1:8001/v1", "h.example/a/v1", "h.example/b/v1", "gw.azure-api.net/a", "gw.azure-api.net/b",
    ]  # fmt: skip
    assert parse_endpoint("https://r.openai.azure.com", "m", DATE).place == "r.openai.azure.com"


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1"),
        ("http://10.0.0.5:8000/v1/", "http://10.0.0.5:8000/v1"),
        ("https://h.example/x/chat/completions", "https://h.example/x"),
        ("https://h.example/openai/v1", "https://h.example/openai/v1"),
    ],
)
def test_the_base_url_of_a_served_model(url, base):
    assert parse_base_url(url, "m", key=False) == Endpoint(base, "m", "openai")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1:8000", "write http://127.0.0.1:8000/v1"),
        ("http://127.0.0.1:8000/api/generate", "ends with /v1"),
        ("127.0.0.1:8000/v1", "SLM_BASE_URL is not a URL"),
        ("http://10.0.0.5/v1", "SLM_BASE_URL .* in clear"),
        ("https://h/v1?api-version=1", "parameters behind its path"),
    ],
)
def test_what_is_no_base_url_of_a_served_model(url, said):
    with pytest.raises(UserError, match=said):
        parse_base_url(url, "m", key=True)
