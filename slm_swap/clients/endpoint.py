"""Where a hosted deployment answers: the forms of its URL."""

import ipaddress
import re
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from slm_swap.common.errors import UserError

FORMS = "https://R.openai.azure.com, .../openai/deployments/NAME, .../openai/v1, or https://R.services.ai.azure.com/models"


@dataclass(frozen=True)
class Endpoint:
    """Where a deployment answers; `form` is "deployments", "models" or "v1"."""

    base_url: str
    deployment: str
    form: str
    query: dict[str, str] = field(default_factory=dict)

    @property
    def host(self) -> str:
        return urlsplit(self.base_url).hostname or ""


def is_loopback(host: str) -> bool:
    """Whether the host is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def parse_endpoint(
    endpoint: str | None, deployment: str | None, api_version: str | None, missing: tuple[str, ...] = ()
) -> Endpoint:
    """AZURE_ENDPOINT as the portal shows it, in any of the forms of FORMS, with or without /chat/completions?api-version=...

    A bare resource takes the deployments form. A dated api-version is left out of the v1 form, which refuses it (400).
    `missing` are variables that the caller misses besides.

    Raises:
        UserError: variables are missing (all are named), the URL has no known form, it would carry the key in clear over a
            network, or it says otherwise than AZURE_DEPLOYMENT or AZURE_API_VERSION.
    """
    origin, form, name, version = _take_apart(endpoint) if endpoint else ("", "deployments", None, None)
    for variable, here, there in (("AZURE_DEPLOYMENT", deployment, name), ("AZURE_API_VERSION", api_version, version)):
        if here and there and here != there:
            raise UserError(f"AZURE_ENDPOINT says {there!r} but {variable} says {here!r}: take one of them out")
    name, version = name or deployment, version or api_version
    needed = {"AZURE_ENDPOINT": endpoint, "AZURE_DEPLOYMENT": name, "AZURE_API_VERSION": version or form == "v1"}
    missing = (*(variable for variable, value in needed.items() if not value), *missing)
    if missing:
        raise UserError(f"the azure client misses {', '.join(missing)}: set them in .env or the environment (see .env.example)")
    if form == "v1" and version and version[0].isdigit():
        version = None
    path = {"deployments": f"openai/deployments/{quote(name, safe='')}", "models": "models", "v1": "openai/v1"}[form]
    return Endpoint(f"{origin}/{path}", name, form, {"api-version": version} if version else {})


def _take_apart(endpoint: str) -> tuple[str, str, str | None, str | None]:
    """(origin, form, deployment, api-version) of a URL; never shows more of it than its host and path."""
    try:
        url = urlsplit(endpoint)
        host, _ = url.hostname, url.port
    except ValueError:
        host = None
    if not re.fullmatch(r"[\w.:-]+", host or "", re.ASCII) or url.scheme not in ("http", "https"):
        raise UserError(f"AZURE_ENDPOINT is not a URL: set it to {FORMS}")
    if url.username is not None or url.password is not None:
        raise UserError(f"AZURE_ENDPOINT ({host}) has a user or password inside: take it out and set AZURE_API_KEY")
    if url.scheme == "http" and not is_loopback(host):
        raise UserError(f"AZURE_ENDPOINT ({host}) is http, which would send the key in clear: write https://")
    query = dict(parse_qsl(url.query, keep_blank_values=True))
    if set(query) - {"api-version"}:
        raise UserError(f"AZURE_ENDPOINT ({host}) has parameters besides api-version: take them out")
    forms = r"/openai/deployments/(?P<name>[^/]+)|/(?P<models>models)|/openai/(?P<v1>v1)"
    found = re.fullmatch(f"|(?:{forms})(?:/chat/completions)?", url.path.rstrip("/"))
    if not found:
        raise UserError(f"AZURE_ENDPOINT has the path {url.path!r} at {host}, none of Azure's forms: set it to {FORMS}")
    form = "models" if found["models"] else "v1" if found["v1"] else "deployments"
    return f"{url.scheme}://{url.netloc}", form, unquote(found["name"]) if found["name"] else None, query.get("api-version")
