"""A hosted model: a deployment on Azure, in any of its forms, or a model of any OpenAI-compatible server."""

from collections.abc import Callable
from fractions import Fraction

from slm_swap.clients.chat_client import ChatClient
from slm_swap.clients.endpoint import AZURE, parse_endpoint
from slm_swap.clients.pricing import to_float
from slm_swap.common.settings import Settings

TOKEN_SCOPE = "https://cognitiveservices.azure.com/.default"


def entra_token() -> Callable[[], str] | None:
    """A function that gives a fresh bearer token of the signed-in identity; None without azure-identity."""
    try:
        from azure.identity import DefaultAzureCredential, get_bearer_token_provider
    except ImportError:
        return None
    return get_bearer_token_provider(DefaultAzureCredential(), TOKEN_SCOPE)


class AzureClient(ChatClient):
    """The deployment of AZURE_ENDPOINT; `ChatClient` has the arguments.

    Raises:
        UserError: variables are missing or contradict each other, or the prices cannot be read; and as `ChatClient`.
    """

    kind = "azure"

    def __init__(
        self,
        settings: Settings,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 42,
        concurrency: int = 32,
        timeout: float = 60.0,
        max_retries: int = 6,
    ) -> None:
        key = settings.azure_api_key
        token = None if key else entra_token()
        missing = () if key or token else ("AZURE_API_KEY (or pip install azure-identity)",)
        names = settings.azure_endpoint, settings.azure_deployment, settings.azure_api_version
        endpoint = parse_endpoint(*names, missing, bool(key), settings.secrets)
        if endpoint.form == "openai":
            token = None  # a token of Azure's is nothing to show to another server
        identity = {
            "kind": self.kind,
            "deployment": endpoint.deployment,
            "endpoint": endpoint.place,
            "form": endpoint.form,
            "api_version": endpoint.query.get("api-version"),
        }
        super().__init__(
            settings, endpoint, AZURE, identity, key, token, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
            concurrency=concurrency, timeout=timeout, max_retries=max_retries,
        )  # fmt: skip

    def cost(self, input_tokens: int, cached_tokens: int, output_tokens: int, seconds: float) -> float | None:
        """By the deployment's prices per million tokens."""
        prices = self.prices.deployment(self.endpoint.deployment)
        return to_float(prices.cost(input_tokens, cached_tokens, output_tokens))

    def cost_parts(self, input_tokens: int, cached_tokens: int, output_tokens: int) -> dict[str, float] | None:
        """The cost of one reply, by what it is for (see `HostedPrices.parts`), and its `total`."""
        parts = self.prices.deployment(self.endpoint.deployment).parts(input_tokens, cached_tokens, output_tokens)
        return None if parts is None else {name: float(cost) for name, cost in (parts | {"total": sum(parts.values(), Fraction())}).items()}
