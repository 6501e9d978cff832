"""Where a request goes on the hosted side, in each form of the hosted model's URL."""

import pytest

from slm_swap.common.settings import Settings
from slm_swap.serving.hosted import Hosted

V = "api-version=2024-10-21"
AZURE, OPENAI = "/openai/deployments/other%20one/chat/completions", "/v1/chat/completions"


def hosted(endpoint: str, version: str | None = None) -> Hosted:
    return Hosted(Settings(azure_endpoint=endpoint, azure_deployment="gpt", azure_api_key="k" * 32, azure_api_version=version), 60)


@pytest.mark.parametrize(
    ("endpoint", "version", "path", "query", "model", "url"),
    [
        ("https://r.openai.azure.com", "2024-10-21", OPENAI, "", "gpt", f"https://r.openai.azure.com/openai/deployments/gpt/chat/completions?{V}"),
        ("https://r.openai.azure.com", "2024-10-21", OPENAI, "", "o/3", f"https://r.openai.azure.com/openai/deployments/o%2F3/chat/completions?{V}"),
        ("https://r.openai.azure.com", "2024-10-21", AZURE, "api-version=new", "other one", "https://r.openai.azure.com/openai/deployments/other%20one/chat/completions?api-version=new"),
        ("https://r.openai.azure.com", "2024-10-21", "/openai/deployments/gpt/embeddings", V, None, f"https://r.openai.azure.com/openai/deployments/gpt/embeddings?{V}"),
        ("https://r.openai.azure.com", "2024-10-21", "/v1/responses", "", None, "https://r.openai.azure.com/openai/v1/responses"),
        ("https://gw.azure-api.net/llm/openai/deployments/gpt", "2024-10-21", OPENAI, "", "gpt", f"https://gw.azure-api.net/llm/openai/deployments/gpt/chat/completions?{V}"),
        ("https://r.openai.azure.com/openai/v1", None, AZURE, V, "other one", "https://r.openai.azure.com/openai/v1/chat/completions"),
        ("https://r.openai.azure.com/openai/v1", None, OPENAI, "", "gpt", "https://r.openai.azure.com/openai/v1/chat/completions"),
        ("https://r.services.ai.azure.com/models", "2024-10-21", OPENAI, "", "gpt", f"https://r.services.ai.azure.com/models/chat/completions?{V}"),
        ("https://api.openai.com/v1", None, AZURE, V, "other one", "https://api.openai.com/v1/chat/completions"),
        ("https://api.openai.com/v1", None, "/v1/files", "limit=2&after=a", None, "https://api.openai.com/v1/files?limit=2&after=a"),
    ],
)  # fmt: skip
def test_a_request_keeps_its_meaning_in_the_other_form(endpoint, version, path, query, model, url):
    assert hosted(endpoint, version).url(path, query, model) == url


def test_the_name_of_the_clients_url_goes_into_a_body_that_needs_it():
    body = b' {"messages": [], "seed": 12345678901234567890}'
    openai, azure = hosted("https://api.openai.com/v1"), hosted("https://r.openai.azure.com", "2024-10-21")
    assert openai.body(body, {"messages": [], "seed": 1}, 'a"b') == b'{"model": "a\\"b", "messages": [], "seed": 12345678901234567890}'
    assert azure.body(body, {"messages": []}, "gpt") == body
    assert openai.body(b'{"model": "m"}', {"model": "m"}, "m") == b'{"model": "m"}'
