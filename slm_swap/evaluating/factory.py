"""The factory: from a kind of model to the client that speaks to it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from slm_swap.clients.protocol import Client
from slm_swap.common.errors import UserError
from slm_swap.common.settings import Settings
from slm_swap.rows.examples import Example
from slm_swap.rows.prompts import request_of


def make_client(
    kind: str,
    settings: Settings,
    track: str,
    examples: Iterable[Example],
    *,
    replies: str | Path | None = None,
    max_new_tokens: int = 256,
    seed: int = 42,
    concurrency: int = 32,
    temperature: float = 0.0,
    **local: Any,
) -> Client:
    """The client of one of MODEL_KINDS for those rows; `local` are options of `slm_client.SLMClient`, which other kinds have no use for.

    Kind "slm" is the model of SLM_BASE_URL where that is set, else the checkpoint of SLM_MODEL_PATH. Where a launcher has started
    several processes and this is the first of them, the local model is asked through all of them.

    Raises:
        UserError: the kind is not set up (a variable, a checkpoint, a file is missing), or a flag of a local model is given for a served one.
    """
    if kind == "azure":
        from slm_swap.azure_client import AzureClient

        return AzureClient(settings, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, concurrency=concurrency)
    if kind == "replay":
        from slm_swap.clients.replay_client import ReplayClient

        if replies is None:
            raise UserError("--model-kind replay needs --replies FILE: the recorded replies")
        return ReplayClient(replies, examples)
    if settings.slm_base_url:
        from slm_swap.clients.served_client import ServedClient, refuse_local_options

        refuse_local_options(local)
        return ServedClient(settings, max_new_tokens, seed, concurrency, local.get("thinking"))
    from slm_swap.slm_client import local_client

    return local_client(settings, (request_of(track, example) for example in examples), max_new_tokens, seed, **local)
