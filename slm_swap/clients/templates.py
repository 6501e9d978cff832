"""Chat templates as every prompt goes through them: with a system text where they have no system role, and with a date that stays.

Some templates write today's date (Llama 3.2, SmolLM3, gpt-oss). A prompt would then change at midnight: within a run that goes on,
between a cache and the run that reads it, between training and evaluation. So they are told one date, always the same.
"""

from datetime import datetime
from functools import lru_cache
from typing import Any

from slm_swap.common.errors import UserError
from slm_swap.common.settings import shown_path

DATE = datetime(2026, 1, 1)
SWITCHES = ("enable_thinking", "thinking")  # the variables by which templates ask for thinking or not: see thinking.py
_SYSTEM, _USER = "probe system 7d1f", "probe user 7d1f"


def apply(tokenizer: Any, messages: list[dict[str, Any]], open_turn: bool, **options: Any) -> str:
    """A conversation as text, with the beginning of a reply behind it where the turn is `open_turn`; without thinking, unless `use_thinking`."""
    fixed = {"strftime_now": DATE.strftime} | getattr(tokenizer, "slm_swap_variables", dict.fromkeys(SWITCHES, False))
    return rendered(tokenizer, fitted(tokenizer, messages), add_generation_prompt=open_turn, **fixed, **options)


def rendered(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    """What the chat template writes for these messages.

    Raises:
        jinja2.TemplateError: the template fails, in whatever way: it is a program that may divide by zero or add a text to None.
    """
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except TemplateError:
        raise
    except Exception as error:
        raise TemplateError(f"{type(error).__name__}: {error}") from error


def template_key(tokenizer: Any) -> str:
    """The chat template as a key of caches. It may be several by name, of which transformers takes `tool_use` where there are tools."""
    return str(tokenizer.chat_template)


def particulars(tokenizer: Any) -> dict[str, str]:
    """What a report says of how prompts were written; empty for a template that takes all messages and writes no date."""
    told = {} if takes_system(tokenizer) else {"system_text": "in front of the first user message"}
    return told | ({"template_date": f"{DATE:%Y-%m-%d}"} if _writes_date(tokenizer, template_key(tokenizer)) else {})


@lru_cache(maxsize=8)
def _writes_date(tokenizer: Any, template: str) -> bool:
    """Whether a prompt depends on the date."""
    from jinja2 import TemplateError

    messages = [{"role": "user", "content": _USER}]
    days = (DATE, datetime(1999, 12, 31))
    try:
        first, second = (rendered(tokenizer, messages, strftime_now=day.strftime) for day in days)
    except TemplateError:
        return False
    return first != second


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


def require_text(tokenizer: Any) -> None:
    """Look whether the chat template shows a message that is a text: some know only lists of parts, and leave a text out.

    Raises:
        UserError: it does not.
    """
    from jinja2 import TemplateError

    reason = "leaves it out"
    try:
        if _USER in apply(tokenizer, [{"role": "user", "content": _USER}], open_turn=True):
            return
    except TemplateError as error:
        reason = str(error).strip().split("\n")[0][:120]
    raise UserError(
        f"the chat template of {shown_path(tokenizer.name_or_path)} cannot show a user's message that is a text ({reason}): use an instruct checkpoint of a text model"
    )


def takes_system(tokenizer: Any) -> bool:
    """Whether the chat template shows a system message; found by trying, as some refuse it and some leave it out."""
    return _takes_system(tokenizer, template_key(tokenizer))


@lru_cache(maxsize=8)
def _takes_system(tokenizer: Any, template: str) -> bool:
    from jinja2 import TemplateError

    messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}]
    tool = {"type": "function", "function": {"name": "probe_tool", "description": "", "parameters": {"type": "object", "properties": {}}}}
    several = isinstance(tokenizer.chat_template, dict) and "tool_use" in tokenizer.chat_template
    offered = [{}, {"tools": [tool]}] if several else [{}]
    try:
        return all(_SYSTEM in rendered(tokenizer, messages, add_generation_prompt=True, **tools) for tools in offered)
    except TemplateError:
        return False
