"""Chat templates without a system role: the system text goes in front of the first user message."""

from functools import lru_cache
from typing import Any

_SYSTEM, _USER = "probe system 7d1f", "probe user 7d1f"


def fitted(tokenizer: Any, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages as the tokenizer's chat template takes them: as they are, or with the system texts in front of the first user's."""
    if not any(message["role"] == "system" for message in messages) or takes_system(tokenizer):
        return messages
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system" and message["content"])
    kept = [message for message in messages if message["role"] != "system"]
    first = next((at for at, message in enumerate(kept) if message["role"] == "user"), None)
    if first is None or not system:
        return kept
    return [message | {"content": f"{system}\n\n{message['content']}"} if at == first else message for at, message in enumerate(kept)]


def takes_system(tokenizer: Any) -> bool:
    """Whether the chat template shows a system message; found by trying, as some refuse it and some leave it out."""
    return _takes_system(tokenizer, tokenizer.chat_template)


@lru_cache(maxsize=8)
def _takes_system(tokenizer: Any, template: str) -> bool:
    from jinja2 import TemplateError

    messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}]
    try:
        return _SYSTEM in tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError:
        return False
