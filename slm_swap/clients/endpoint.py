"""Where a model answers over HTTP: the forms of its URL."""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from slm_swap.common.errors import UserError
from slm_swap.common.secrets import looks_like_key
from slm_swap.common.settings import load_proxies

FORMS = (
    "https://R.openai.azure.com, .../openai/deployments/NAME, .../openai/v1, or https://R.services.ai.azure.com/models; "
    "for an OpenAI-compatible server its base URL, such as https://api.openai.com/v1 or http://127.0.0.1:8000/v1"
)
COMPATIBLE = "http://127.0.0.1:8000/v1"
# Hosts that speak Azure's forms and nothing else, and Azure's gateway, which may stand in front of anything.
AZURE_HOST = re.compile(r".+\.(openai|cognitiveservices|services\.ai)\.azure\.(com|us|cn)", re.IGNORECASE)
GATEWAY_HOST = re.compile(r".+\.azure-api\.(net|us|cn)", re.IGNORECASE)
AZURE_PATH = re.compile(r"(?P<prefix>.*?)/(?:openai/deployments/(?P<name>[^/]+)|(?P<models>models)|openai/(?P<v1>v1))")
COMPATIBLE_PATH = re.compile(r"(.*/)?v\d+[a-z]*\d*(/openai)?")  # the last is Gemini's: /v1beta/openai
CHAT = "/chat/completions"


class Variables(NamedTuple):
    """The names by which messages call what they are about."""

    client: str
    url: str
    model: str
    key: str
    version: str | None


AZURE = Variables("the azure client", "AZURE_ENDPOINT", "AZURE_DEPLOYMENT", "AZURE_API_KEY", "AZURE_API_VERSION")
SERVED = Variables("the served small model", "SLM_BASE_URL", "SLM_MODEL_NAME", "SLM_API_KEY", None)


@dataclass(frozen=True)
class Endpoint:
    """Where a model answers; `form` is "deployments", "models" or "v1" (Azure's), or "openai" (any OpenAI-compatible server)."""

    base_url: str
    deployment: str
    form: str
    query: dict[str, str] = field(default_factory=dict)

    @property
    def host(self) -> str:
        return urlsplit(self.base_url).hostname or ""

    @property
    def place(self) -> str:
        """What tells the server from others, without the scheme: the host, and a path in front of Azure's own form."""
        url = urlsplit(self.base_url)
        if self.form == "openai":
            return url.netloc + url.path
        found = AZURE_PATH.fullmatch(url.path)
        return self.host + (found["prefix"] if found else "")

    @property
    def bearer(self) -> bool:
        """Whether the key goes as `Authorization: Bearer`; else as `api-key`, which Azure and its gateway take."""
        return self.form == "openai" and not GATEWAY_HOST.fullmatch(self.host)

    @property
    def hint(self) -> str:
        """What to try where a server that may be no Azure at all refuses Azure's form."""
        if self.form == "openai" or AZURE_HOST.fullmatch(self.host) or GATEWAY_HOST.fullmatch(self.host):
            return ""
        if self.form == "v1":
            return "; the key goes as api-key, in Azure's way: leave AZURE_API_VERSION empty where it goes as Authorization: Bearer"
        return f"; an OpenAI-compatible server is written {self.base_url.split('/openai/')[0]}/v1"


def is_loopback(host: str) -> bool:
    """Whether the host is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def open_client(kind: type, host: str, **options: Any) -> Any:
    """An HTTP client, one of the openai package's, for a host: by the environment's proxies unless it is this machine.

    Raises:
        UserError: as `require_proxies`.
    """
    far = not is_loopback(host)
    if far:
        require_proxies()
    return kind(trust_env=far, follow_redirects=False, **options)  # the key stays with the host that it was meant for


def require_proxies() -> None:
    """Refuse a proxy that no client can be made with, whatever is asked through it. What it holds is never shown: there may be a password.

    Raises:
        UserError: so; the variable is named.
    """
    for name, value in load_proxies().items():
        if fault := _proxy_fault(value):
            raise UserError(f"{name} {fault}, or unset it")


def _proxy_fault(value: str) -> str | None:
    wanted = "set it to http://HOST:PORT"
    try:
        url = urlsplit(value if "://" in value else f"http://{value}")
        host, _ = url.hostname, url.port
    except ValueError:
        return f"has no port from 0 to 65535, or is no URL: {wanted}"
    if url.scheme not in ("http", "https", "socks5", "socks5h"):
        return f"has a scheme that is no proxy's: {wanted}"
    if not re.fullmatch(r"[\w.:-]+", host or "", re.ASCII):
        return f"has no host: {wanted}"
    if url.scheme.startswith("socks") and not find_spec("socksio"):
        return "is a SOCKS proxy, which takes a package that is not installed: pip install socksio"
    return None


def proxy_secrets() -> list[str]:
    """The passwords in the proxies' variables, as they are written there and decoded."""
    urls = (value if "://" in value else f"http://{value}" for value in load_proxies().values())
    found = [re.match(r"[^:]+://[^:@/]*:(.*)@", url) for url in urls]  # urlsplit fails at some, which are refused elsewhere
    return [text for match in found if match and match[1] for text in {match[1], unquote(match[1])}]


def parse_endpoint(
    endpoint: str | None,
    deployment: str | None,
    api_version: str | None,
    missing: tuple[str, ...] = (),
    key: bool = True,
    secrets: Sequence[str] = (),
) -> Endpoint:
    """AZURE_ENDPOINT as the portal shows it, in any of the forms of FORMS, with or without /chat/completions?api-version=...

    A gateway's path may stand in front of Azure's forms. A bare host takes the deployments form. A path that ends with a version, such
    as /v1, is an OpenAI-compatible server, and so is any other path in front of /chat/completions. `/openai/v1` is Azure's on Azure's
    hosts, on this machine, and where an api-version is given; elsewhere (Groq) it is OpenAI-compatible. A dated api-version is left out
    of the v1 form, which refuses it (400). `missing` are variables that the caller misses besides, for Azure's forms; `key` is whether
    one would be sent. `secrets` are in no part of it.

    Raises:
        UserError: variables are missing (all are named), the URL has no known form, it would carry the key in clear over a
            network, a part of it or the deployment is a key, or it says otherwise than AZURE_DEPLOYMENT or AZURE_API_VERSION.
    """
    _check_name(deployment, AZURE, secrets)
    parts = _take_apart(endpoint, AZURE, key, secrets) if endpoint else None
    base, form, name, version = _azure_form(parts, bool(api_version)) if parts else ("", "deployments", None, None)
    if parts and parts.clear and form != "openai":
        raise UserError(_in_clear(AZURE, parts.host))
    for variable, here, there in ((AZURE.model, deployment, name), (AZURE.version, api_version, version)):
        if here and there and here != there and (variable == AZURE.model or form != "openai"):
            raise UserError(f"AZURE_ENDPOINT says {there!r} but {variable} says {here!r}: take one of them out")
    name = name or deployment
    version = version or (api_version if form != "openai" else None)
    needed = {AZURE.url: endpoint, AZURE.model: name, AZURE.version: version or form in ("v1", "openai")}
    absent = [variable for variable, value in needed.items() if not value] + [*(missing if form != "openai" else ())]
    if absent:
        bare = f"; an OpenAI-compatible server is written with its path: {parts.origin}/v1" if parts and not parts.path else ""
        where = "set them in .env or the environment (see .env.example)"
        raise UserError(f"the azure client misses {', '.join(absent)}: {where}{bare if AZURE.version in absent else ''}")
    if form == "v1" and version and version[0].isdigit():
        version = None
    path = {"deployments": f"/openai/deployments/{quote(name, safe='')}", "models": "/models", "v1": "/openai/v1", "openai": ""}[form]
    return Endpoint(base + path, name, form, {"api-version": version} if version else {})


def parse_base_url(url: str, model: str, key: bool = True, secrets: Sequence[str] = ()) -> Endpoint:
    """SLM_BASE_URL: the base URL of an OpenAI-compatible server, with or without /chat/completions. `secrets` are in no part of it.

    Raises:
        UserError: it is no such URL, it would carry the key in clear over a network, or a part of it or the model's name is a key.
    """
    _check_name(model, SERVED, secrets)
    parts = _take_apart(url, SERVED, key, secrets)
    path = parts.path.removesuffix(CHAT)
    if not (COMPATIBLE_PATH.fullmatch(path) or parts.path.endswith(CHAT)):
        wanted = f"write {parts.origin}/v1" if not path else f"write the path that ends with /v1, as in {COMPATIBLE}"
        raise UserError(f"SLM_BASE_URL has the path {parts.shown!r} at {parts.host}, which no OpenAI-compatible server has: {wanted}")
    return Endpoint(parts.origin + path, model, "openai")


class _Parts(NamedTuple):
    origin: str
    host: str
    path: str  # without a slash behind it
    shown: str  # as it was given
    version: str | None
    clear: bool  # http to another machine


def _azure_form(parts: _Parts, versioned: bool) -> tuple[str, str, str | None, str | None]:
    """(base without the form's own path, form, deployment, api-version) of a URL; `versioned` is whether an api-version is set besides.

    Raises:
        UserError: the path is of no known form.
    """
    host, version = parts.host, parts.version
    chat, path = parts.path.endswith(CHAT), parts.path.removesuffix(CHAT)
    found = re.fullmatch(AZURE_PATH, path)
    azure = bool(AZURE_HOST.fullmatch(host))
    if host == "api.openai.com" and not path:
        raise UserError("AZURE_ENDPOINT is OpenAI's host without a path: set it to https://api.openai.com/v1")
    if not parts.path:
        return parts.origin, "deployments", None, version
    if found and not (found["models"] and COMPATIBLE_PATH.fullmatch(found["prefix"])):  # /v1/models is where a server lists its models
        theirs = azure or GATEWAY_HOST.fullmatch(host) or is_loopback(host) or versioned or version
        if not found["v1"] or theirs:
            form = "models" if found["models"] else "v1" if found["v1"] else "deployments"
            return parts.origin + found["prefix"], form, unquote(found["name"]) if found["name"] else None, version
    if not azure and (chat or COMPATIBLE_PATH.fullmatch(path)) and "/openai/deployments" not in path:
        return parts.origin + path, "openai", None, version
    raise UserError(f"AZURE_ENDPOINT has the path {parts.shown!r} at {host}, none of the known forms: set it to {FORMS}")


def _check_name(name: str | None, named: Variables, secrets: Sequence[str]) -> None:
    if name and looks_like_key(name, secrets):
        raise UserError(f"{named.model} looks like a key: set it to the name of the {'deployment' if named is AZURE else 'model'}, and the key as {named.key}")


def _take_apart(endpoint: str, named: Variables, key: bool, secrets: Sequence[str]) -> _Parts:
    """A URL's parts; messages never show more of it than its host and path."""
    try:
        url = urlsplit(endpoint)
        host, _ = url.hostname, url.port
    except ValueError:
        host = None
    if not re.fullmatch(r"[\w.:-]+", host or "", re.ASCII) or url.scheme not in ("http", "https"):
        raise UserError(f"{named.url} is not a URL: set it to {FORMS if named is AZURE else COMPATIBLE}")
    if url.username is not None or url.password is not None:
        raise UserError(f"{named.url} ({host}) has a user or password inside: take it out and set {named.key}")
    said = [*map(unquote, url.path.split("/")), *(value for _, value in parse_qsl(url.query))]
    if any(looks_like_key(part, secrets, bool(AZURE_HOST.fullmatch(host))) for part in said):
        raise UserError(f"{named.url} ({host}) has what looks like a key in its path or parameters: take it out and set {named.key}")
    clear = url.scheme == "http" and not is_loopback(host)
    if clear and key:
        raise UserError(_in_clear(named, host))
    query = dict(parse_qsl(url.query, keep_blank_values=True))
    if set(query) - ({"api-version"} if named is AZURE else set()):
        allowed = "besides api-version" if named is AZURE else "behind its path"
        raise UserError(f"{named.url} ({host}) has parameters {allowed}: take them out")
    return _Parts(f"{url.scheme}://{url.netloc}", host, url.path.rstrip("/"), url.path, query.get("api-version"), clear)


def _in_clear(named: Variables, host: str) -> str:
    return f"{named.url} ({host}) is http, which would send the key in clear: write https://"
