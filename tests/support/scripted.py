"""A hosted model that answers as a test's script says: the simulator's answers, changed on their way, over a real socket."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from slm_swap.azure_client import AzureClient
from slm_swap.common.settings import Settings
from slm_swap.demo.azure_simulator import Answer, AzureSimulator

# (the row's prompt, how often it was asked before, the request's body, the simulator's answer) -> the answer that is sent
Script = Callable[[str, int, dict[str, Any], Answer], Answer]


class Scripted(AzureSimulator):
    """`script` may be exchanged at any time; `asked` counts the requests by prompt."""

    def __init__(self, references: Any, script: Script, **options: Any):
        super().__init__(references, **options)
        self.script, self.asked = script, Counter[str]()

    def answer(self, request: Any, raw: bytes) -> Answer:
        try:
            body = json.loads(raw)
            prompt = str(body["messages"][-1]["content"])
        except (ValueError, TypeError, KeyError):  # the simulator says what is wrong with it
            return super().answer(request, raw)
        before = self.asked[prompt]
        self.asked[prompt] += 1
        return self.script(prompt, before, body, super().answer(request, raw))


@contextmanager
def served(rows: Any, script: Script, key: str, **options: Any) -> Iterator[tuple[Scripted, AzureClient]]:
    """(server, client) of a server that answers as `script` says; `options` are the client's."""
    with Scripted(rows, script, key=key) as server:
        settings = Settings(azure_endpoint=server.url, azure_deployment="simulator", azure_api_key=key, azure_api_version="2024-10-21")
        client = AzureClient(settings, **options)
        try:
            yield server, client
        finally:
            client.close()


def plain(prompt: str, before: int, asked: dict[str, Any], answer: Answer) -> Answer:
    """The simulator's own answer."""
    return answer


def with_usage(answer: Answer, usage: Any) -> Answer:
    return replace(answer, body=answer.body | {"usage": usage})


def reasoned(answer: Answer, limit: int) -> Answer:
    """All new tokens were reasoning, so that no text is left."""
    choice = answer.body["choices"][0] | {"message": {"role": "assistant", "content": ""}, "finish_reason": "length"}
    usage = {"prompt_tokens": 100, "completion_tokens": limit, "completion_tokens_details": {"reasoning_tokens": limit}}
    return replace(answer, body=answer.body | {"choices": [choice], "usage": usage})


def refused(status: int, code: Any, message: str, **more: Any) -> Answer:
    """An error that the client does not try again of its own accord."""
    return Answer(status, {"error": {"code": code, "message": message} | more}, "refused", headers={"x-should-retry": "false"})


DOWN = refused(503, None, "no healthy upstream")
NO_ROOM = refused(
    400, None, "Could not finish the message because max_tokens or model output limit was reached. Please try again with higher max_tokens."
)
TOO_LONG = refused(400, "context_length_exceeded", "This model's maximum context length is 8192 tokens.")
