"""A small model that somebody serves already, behind an OpenAI-compatible URL (vLLM, Ollama, llama.cpp, LM Studio)."""

from dataclasses import replace
from typing import Any

from slm_swap.clients.chat_client import CONNECT_SECONDS, ChatClient
from slm_swap.clients.completions import content_text
from slm_swap.clients.confidence import served_confidence
from slm_swap.clients.endpoint import SERVED, Endpoint, open_client, parse_base_url
from slm_swap.clients.pricing import to_float
from slm_swap.clients.protocol import Reply
from slm_swap.clients.templates import SWITCHES
from slm_swap.clients.thinking import cut_served_thinking
from slm_swap.common.errors import UserError
from slm_swap.common.settings import Settings
from slm_swap.rows.prompts import Request

LOCAL_ONLY = {"engine": "auto", "engine_start": "auto", "precision": None, "adapter": None, "constrain": "off"}  # options of a model that is loaded here


class ServedClient(ChatClient):
    """The model of SLM_BASE_URL; `ChatClient` has the arguments. Without SLM_MODEL_NAME the server is asked which one it serves.

    `thinking`, one of thinking.THINKING, is told to the server as variables of its chat template; None leaves it to the server.

    Raises:
        UserError: the URL is none, the server does not say which model it serves or serves several; and as `ChatClient`.
    """

    kind = "slm"

    def __init__(
        self, settings: Settings, max_new_tokens: int = 256, seed: int = 42, concurrency: int = 32, thinking: str | None = None, **options: Any
    ) -> None:
        key = settings.slm_api_key
        endpoint = parse_base_url(settings.slm_base_url or "", settings.slm_model_name or "", bool(key), settings.secrets)
        name = endpoint.deployment or served_model(endpoint, key)
        endpoint = Endpoint(endpoint.base_url, name, endpoint.form)
        identity = {
            "kind": self.kind, "path": name, "endpoint": endpoint.place, "engine": "served", "precision": None, "adapter": None,
            "training_seconds": None, **({"thinking": thinking} if thinking else {}),
        }  # fmt: skip
        super().__init__(
            settings, endpoint, SERVED, identity, key, None, max_new_tokens=max_new_tokens, seed=seed, concurrency=concurrency,
            template_variables=dict.fromkeys(SWITCHES, thinking == "on") if thinking else None,
            more={"logprobs": True, "top_logprobs": 2}, **options
        )  # fmt: skip

    def _accept(self, body: Any, request: Request) -> Reply:
        """A reply with its confidence, where the server gives the log-probabilities of its tokens."""
        reply = super()._accept(body, request)
        return replace(reply, confidence=read_confidence(body, request, reply)) if reply.finish_reason in ("stop", "length") else reply

    def cost(self, input_tokens: int, cached_tokens: int, output_tokens: int, seconds: float) -> float | None:
        """The machine's price an hour times the seconds that it worked."""
        return to_float(self.prices.local.cost(seconds))


def read_confidence(body: Any, request: Request, reply: Reply) -> dict[str, Any] | None:
    """How sure the model was of a reply, from its completion's `logprobs`; None where the server gives none, or none that can be read.

    A token's bytes are those that the server tells, or its text's. Its margin is that of the two best tokens, among which it may not be.
    """
    try:
        choice = body["choices"][0]
        told, message = choice["logprobs"]["content"], choice["message"]
        pieces = [bytes(one["bytes"]) if one.get("bytes") is not None else one["token"].encode() for one in told]
        chances = []
        for one in told:
            best = sorted({one["token"]: one["logprob"], **{other["token"]: other["logprob"] for other in one["top_logprobs"]}}.values(), reverse=True)
            chances.append((float(one["logprob"]), float(best[0] - best[1])))
        content, _ = content_text(message.get("content"))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        return None
    thinking = message.get("reasoning_content") or message.get("reasoning") or cut_served_thinking(content)[1]
    return served_confidence(request, pieces, chances, (reply.text, reply.calls, thinking if isinstance(thinking, str) else ""))


def refuse_local_options(options: dict[str, Any]) -> None:
    """Refuse flags of a model that is loaded here.

    Raises:
        UserError: one of them is given.
    """
    given = [name for name, default in LOCAL_ONLY.items() if options.get(name, default) not in (default, None)]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UserError(f"{flags}: the model of SLM_BASE_URL is loaded by its server; leave the flag out, or unset SLM_BASE_URL")


def served_model(endpoint: Endpoint, key: str | None) -> str:
    """The one model that a server serves.

    Raises:
        UserError: the server does not say, or serves several.
    """
    import openai

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    names, why = [], "no list of models"
    try:
        with open_client(openai.DefaultHttpxClient, endpoint.host, timeout=CONNECT_SECONDS) as client:
            answer = client.get(f"{endpoint.base_url}/models", headers=headers)
        why = str(answer.status_code)
        names = [model["id"] for model in answer.json()["data"]] if answer.is_success else []
    except UserError:
        raise
    except (ValueError, KeyError, TypeError):
        pass  # no list of models
    except Exception as error:  # no connection: the classes belong to the package that openai brings
        why = type(error).__name__
    if len(names) != 1:
        shown = f"serves {', '.join(sorted(map(str, names))[:5])}" if names else f"does not say what it serves ({why})"
        raise UserError(f"the server of SLM_BASE_URL at {endpoint.host} {shown}: set SLM_MODEL_NAME to the model to ask, and check SLM_BASE_URL")
    return str(names[0])
