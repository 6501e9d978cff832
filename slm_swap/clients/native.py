"""Asking a local checkpoint as production asks: the chat template's own `tools=`, and its own form of calls read back.

What a template can do is found by rendering, not by the model's name: a made-up tool, an earlier call and its result must show in the
prompt, and a call that the template writes must be read back as it was. A checkpoint that fails is refused in one line.

- Prompt: `tools` in OpenAI's nested form; earlier calls with their arguments as objects. `tool_choice` and `parallel_tool_calls` have no
  place in a chat template and are not shown.
- Phi-4-mini's published template ignores `tools=` and reads `tools` of the system message as JSON text; it writes no calls. They are
  written here as its model card shows them, `<|tool_call|>[{"name": ..., "arguments": {...}}]<|/tool_call|>`. Microsoft does not say how
  results are told: they are a turn of `<|tool_response|>`, the token that its tokenizer has for them.
- A wanted value's JSON Schema (hosted models get `response_format`) ends the system text in one fixed sentence, `SCHEMA_SENTENCE`;
  `response_format: json_object` without a schema gives `JSON_SENTENCE`.
- Reply: read by the tokenizer's `response_template`, else as JSON between marks where the template proves to write that, else by TRL's
  response template for the chat template. See `native_replies`.
"""

import json
import re
import uuid
from bisect import bisect_left
from collections.abc import Callable
from decimal import Decimal
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

from slm_swap.clients.endings import call_ending, require_ending
from slm_swap.clients.native_replies import (
    PHI_CALLS,
    TAGGED_CALLS,
    Call,
    Spoken,
    TemplateReader,
    read_channels,
    read_marked,
)
from slm_swap.clients.templates import apply
from slm_swap.clients.thinking import cut_thinking, has_channels, prefilled
from slm_swap.common.errors import UserError
from slm_swap.common.exact_json import EXACT, ExactEncoder
from slm_swap.common.settings import display_path
from slm_swap.rows.prompts import Request

SCHEMA_SENTENCE = "Reply with one JSON value that matches this JSON Schema, and with nothing else: {schema}"
JSON_SENTENCE = "Reply with one JSON object and with nothing else."
PHI_SYSTEM = "You are a helpful assistant with some tools."  # of Phi-4-mini's model card, for conversations without a system text
ADVICE = "use --ask text"
_NUMBER = f"number-{uuid.uuid4().hex}:"  # before a number's digits while a template has it as a text
_NUMBERS = re.compile(f'"{_NUMBER}([^"]*)"|{_NUMBER}')
_PROBE = {name: f"probe_{name}_7d1f" for name in ("tool", "call", "key", "value", "result", "user", "text")}

Reader = Callable[[str, bool, list[dict] | None], Spoken]  # (reply without its end token, whether that came, tools on offer)


class CannotShow(UserError):
    """The chat template cannot show a conversation."""


# -- Messages as templates take them ---------------------------------------------------------------------------------------------


def _hidden(value: Any) -> Any:
    """A JSON value whose Decimals are texts that `_revealed` makes numbers again: templates write floats, which would round them."""
    if isinstance(value, Decimal):
        return f"{_NUMBER}{value}"
    if isinstance(value, dict):
        return {key: _hidden(child) for key, child in value.items()}
    return [_hidden(child) for child in value] if isinstance(value, list) else value


def _revealed(text: str) -> str:
    return _NUMBERS.sub(lambda match: match[1] or "", text) if _NUMBER in text else text


def _arguments(told: Any) -> Any:
    """A call's arguments as a template takes them: an object, or the text itself where it is no JSON object."""
    try:
        value = json.loads(told, **EXACT) if isinstance(told, str) else told
    except (ValueError, RecursionError):
        return told
    return _hidden(value) if isinstance(value, dict) else told


def _messages(request: Request) -> list[dict[str, Any]]:
    """The conversation as templates take it: arguments are objects, tool results have their tool's name, no content is None."""
    told, names = [], {}
    for message in request.messages:
        message = message | {"content": message.get("content") or ""}
        if calls := message.pop("tool_calls", None):
            functions = [call["function"] for call in calls]
            names |= {call["id"]: call["function"]["name"] for call in calls if call.get("id")}
            parts = [{"name": one["name"], "arguments": _arguments(one["arguments"])} for one in functions]
            made = [{"id": call.get("id"), "type": "function", "function": part} for call, part in zip(calls, parts, strict=True)]
            message["tool_calls"] = [{key: value for key, value in one.items() if value is not None} for one in made]
        if message["role"] == "tool" and "name" not in message and message.get("tool_call_id") in names:
            message["name"] = names[message["tool_call_id"]]
        told.append(message)
    return with_json_sentence(told, request)


def with_json_sentence(messages: list[dict], request: Request) -> list[dict]:
    """The messages with the sentence that asks for JSON at the end of the system text, where there is something to ask for."""
    wanted = (request.options or {}).get("response_format")
    if request.schema is not None:
        sentence = SCHEMA_SENTENCE.format(schema=json.dumps(request.schema, ensure_ascii=False, cls=ExactEncoder))
    elif isinstance(wanted, dict) and wanted.get("type") == "json_object":
        sentence = JSON_SENTENCE
    else:
        return messages
    if messages and messages[0]["role"] == "system":
        return [messages[0] | {"content": f"{messages[0]['content']}\n\n{sentence}".strip()}, *messages[1:]]
    return [{"role": "system", "content": sentence}, *messages]


def _phi_messages(messages: list[dict], tools: list[dict] | None) -> list[dict]:
    """The messages with tools, calls and results where Phi-4-mini has them."""
    told = []
    for message in messages:
        content = message["content"]
        if calls := message.get("tool_calls"):
            content += f"<|tool_call|>{json.dumps([call['function'] for call in calls], ensure_ascii=False)}<|/tool_call|>"
        told.append({"role": "tool_response" if message["role"] == "tool" else message["role"], "content": content})
    if tools:
        if not told or told[0]["role"] != "system":
            told.insert(0, {"role": "system", "content": PHI_SYSTEM})
        told[0] = told[0] | {"tools": json.dumps(_hidden(tools), ensure_ascii=False)}
    return told


# -- A checkpoint's chat format --------------------------------------------------------------------------------------------------


def uses_tools(request: Request) -> bool:
    """Whether a request shows tools or earlier calls, for which a chat template needs a form."""
    return bool(request.tools) or any(message.get("tool_calls") or message["role"] == "tool" for message in request.messages)


def _render(tokenizer: Any, messages: list[dict], open_turn: bool, **options: Any) -> str:
    """A conversation as text.

    Raises:
        CannotShow: the template refuses it.
    """
    from jinja2 import TemplateError

    try:
        return _revealed(apply(tokenizer, messages, open_turn, **options))
    except (TemplateError, TypeError, ValueError, KeyError) as error:  # each template has its own way to refuse
        reason = str(error).strip().split("\n")[0][:120]
        raise CannotShow(f"the chat template cannot show this conversation ({reason}): {ADVICE}, or leave the row out") from None


def _place(tokenizer: Any) -> str:
    return display_path(tokenizer.name_or_path) if tokenizer.name_or_path else "the checkpoint"


class ChatFormat:
    """How a checkpoint's chat template shows tools and writes calls.

    Raises:
        UserError: it shows none, loses earlier calls or their results, or writes calls that cannot be read back.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer, where = tokenizer, _place(tokenizer)
        tools = [{"name": _PROBE["tool"], "description": "", "parameters": {"type": "object", "properties": {}}}]
        asked = [{"role": "user", "content": _PROBE["user"]}]
        self.phi = False
        if _PROBE["tool"] not in self._tried(asked, tools):
            self.phi = True
            if _PROBE["tool"] not in self._tried(asked, tools):
                raise UserError(f"{where}: its chat template shows no tools: {ADVICE}")
        call = {"name": _PROBE["call"], "arguments": {_PROBE["key"]: _PROBE["value"]}}
        turn = {"role": "assistant", "content": "", "tool_calls": [{"id": "call00001", "type": "function", "function": call}]}
        result = {"role": "tool", "tool_call_id": "call00001", "name": _PROBE["call"], "content": _PROBE["result"]}
        shown = self._tried([*asked, turn, result, {"role": "user", "content": _PROBE["text"]}], tools)
        if lost := [name for name in ("call", "key", "value", "result") if _PROBE[name] not in shown]:
            what = "tool results" if lost == ["result"] else "calls"
            raise UserError(f"{where}: its chat template leaves out earlier {what}: {ADVICE}")
        ends = require_ending(tokenizer).id, (call_ending(tokenizer) or require_ending(tokenizer)).id
        self.end, self.call_end = (self.tokenizer.decode([one]) for one in ends)
        self.read = self._reader(asked, turn, tools)

    def _tried(self, messages: list[dict], tools: list[dict]) -> str:
        try:
            return self.show(messages, tools)
        except CannotShow:
            return ""

    def show(self, messages: list[dict], tools: list[dict] | None, open_turn: bool = True) -> str:
        """A conversation, with messages as `_messages` gives them and flat tools, as text."""
        if self.phi:
            return _render(self.tokenizer, _phi_messages(messages, tools), open_turn)
        nested = [{"type": "function", "function": _hidden(tool)} for tool in tools or []]
        return _render(self.tokenizer, messages, open_turn, **({"tools": nested} if nested else {}))

    def turn(self, messages: list[dict], tools: list[dict] | None, message: dict) -> tuple[str, str]:
        """(the prompt, what the template writes behind it for an assistant's message up to and with the end of the turn).

        Raises:
            UserError: the two do not join, or the turn does not end as the chat format ends it.
        """
        prompt, whole = self.show(messages, tools), self.show([*messages, message], tools, open_turn=False)
        return prompt, completion_of(prompt, whole, self.call_end if message.get("tool_calls") else self.end)

    def _reader(self, asked: list[dict], turn: dict, tools: list[dict]) -> Reader:
        """What reads back the call that the template writes.

        Raises:
            UserError: nothing does.
        """
        if self.phi:
            return self._marked(PHI_CALLS)
        prompt, whole = self.show(asked, tools), self.show([*asked, turn], tools, open_turn=False)
        prefix, written = prompt.rsplit(_PROBE["user"], 1)[-1], whole.removeprefix(prompt)
        if self.call_end in written:
            written = written[: written.rindex(self.call_end)]

        def proven(reader: Reader) -> bool:
            told = reader(written, True, tools)
            said = [(call["name"], json.loads(call["arguments"])) for call in told.calls if call["arguments"].startswith("{")]
            return said == [(_PROBE["call"], {_PROBE["key"]: _PROBE["value"]})] and not told.content.strip()

        template = getattr(self.tokenizer, "response_template", None)
        tagged = self._marked(TAGGED_CALLS)
        if template is None and proven(tagged):
            return tagged
        if has_channels(self.tokenizer) and proven(_channels):
            return _channels
        template = template or _known_template(self.tokenizer.get_chat_template(tools=tools))
        try:
            reader = TemplateReader(self.tokenizer, template, prefix, self.end).read if template else None
            if reader and proven(reader):
                return reader
        except (ValueError, KeyError, TypeError):
            pass
        raise UserError(f"{_place(self.tokenizer)}: no response template is known for its chat template, to read calls by: {ADVICE}")


    def _marked(self, marks: tuple[re.Pattern, str]) -> Reader:
        """The reader of calls that stand as JSON behind a mark."""

        def read(text: str, stopped: bool, offered: list[dict] | None) -> Spoken:
            rest, thinking = cut_thinking(text, prefilled(self.tokenizer))
            return Spoken(rest, [], thinking) if thinking == text else read_marked(rest, marks)._replace(thinking=thinking)

        return read


def _channels(text: str, stopped: bool, offered: list[dict] | None) -> Spoken:
    return read_channels(text)


def _known_template(chat_template: Any) -> dict | None:
    """TRL's response template for a chat template; None where it knows none."""
    from trl.chat_template_utils import add_response_schema

    try:
        return add_response_schema(SimpleNamespace(chat_template=chat_template)).response_template
    except ValueError:
        return None


@lru_cache(maxsize=8)
def chat_format(tokenizer: Any) -> ChatFormat:
    """A tokenizer's `ChatFormat`, found once.

    Raises:
        UserError: as `ChatFormat`.
    """
    return ChatFormat(tokenizer)


def completion_of(prompt: str, whole: str, end: str) -> str:
    """What a whole conversation has behind its prompt, up to and with the last end token.

    Raises:
        UserError: the conversation does not begin with its prompt, or its last turn does not end so.
    """
    if not whole.startswith(prompt):
        raise UserError(f"the chat template writes a conversation otherwise than its prompt, so no reply can be taught: {ADVICE}")
    written = whole[len(prompt) :]
    if end not in written:
        raise UserError(f"the chat template does not end a call with {end!r}, as it ends a text: {ADVICE}")
    return written[: written.rindex(end) + len(end)]


# -- Requests and replies --------------------------------------------------------------------------------------------------------


def text_prompt(tokenizer: Any, request: Request) -> str:
    """What the model is shown for one request in text form.

    Raises:
        CannotShow: the template refuses the conversation.
    """
    from jinja2 import TemplateError

    try:
        return apply(tokenizer, request.messages, open_turn=True)
    except TemplateError as error:
        reason = str(error).strip().split("\n")[0][:120]
        raise CannotShow(f"the chat template cannot show this conversation ({reason}): leave the row out, or take another checkpoint") from None


def native_prompt(tokenizer: Any, request: Request) -> str:
    """What the model is shown for one native request.

    Raises:
        UserError: as `ChatFormat`, or the template cannot show this conversation.
    """
    messages = _messages(request)
    if uses_tools(request):
        return chat_format(tokenizer).show(messages, request.tools)
    return _render(tokenizer, messages, open_turn=True)


def native_turn(tokenizer: Any, request: Request, content: str, calls: list[dict[str, Any]]) -> tuple[str, str]:
    """(prompt, completion) that teach a native reply: `calls` are [{"name", "arguments": object}], `content` the reply's text.

    Raises:
        UserError: as `native_prompt`; or the template breaks the completion off from its prompt.
    """
    made = [
        {"id": f"call{number:05}", "type": "function", "function": {"name": call["name"], "arguments": _hidden(call["arguments"])}}
        for number, call in enumerate(calls)
    ]
    message: dict[str, Any] = {"role": "assistant", "content": content} | ({"tool_calls": made} if made else {})
    messages = _messages(request)
    if made or uses_tools(request):
        return chat_format(tokenizer).turn(messages, request.tools, message)
    prompt, whole = (_render(tokenizer, told, open_turn) for told, open_turn in ((messages, True), ([*messages, message], False)))
    return prompt, completion_of(prompt, whole, tokenizer.decode([require_ending(tokenizer).id]))


def read_reply(tokenizer: Any, request: Request, tokens: list[int], stopped: bool) -> tuple[str, list[Call] | None, str]:
    """(text, calls, thinking) of the tokens that a model made for a request, without the token that ended them.

    `calls` is None in text form. A thinking block that the reply begins with is cut off; one that does not end stays in the text.
    """
    if not (request.native and uses_tools(request)):
        return _read_text(tokenizer, tokens, [] if request.native else None)
    spoken = chat_format(tokenizer).read(_decoded(tokenizer, tokens), stopped, request.tools)
    return spoken.content, spoken.calls, spoken.thinking


def _read_text(tokenizer: Any, tokens: list[int], calls: list[Call] | None) -> tuple[str, list[Call] | None, str]:
    """`read_reply` of a reply that makes no calls in a form of the model's own. The marks around thinking may be special tokens."""
    whole = _decoded(tokenizer, tokens)
    rest, thinking = cut_thinking(whole, prefilled(tokenizer))
    if thinking and thinking == whole:
        return rest, calls, thinking
    spent = bisect_left(range(len(tokens)), len(thinking), key=lambda count: len(_decoded(tokenizer, tokens[:count]))) if thinking else 0
    if _decoded(tokenizer, tokens[:spent]).rstrip() == thinking.rstrip():
        rest = tokenizer.decode(tokens[spent:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return rest.lstrip() if thinking else rest, calls, thinking


def _decoded(tokenizer: Any, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
