"""Requests and answers as APIs and tracers wrap them: a request to its turns, an answer to the one turn that it is."""

from typing import Any

from slm_swap.dataset.readers.messages import Transcript, Turn, decoded, dumped, read_turns, text_of
from slm_swap.dataset.row import Unusable

MESSAGE_MARKS = {"tool_calls", "function_call", "refusal"}  # a message without a role has one of these


def request_turns(asked: Any) -> list[Turn]:
    """The turns of what was asked: a text, a list of messages, or a body with `messages` or `input` (and `instructions`, `system`).

    Raises:
        Unusable: no messages that can be read.
    """
    if isinstance(asked, dict):
        messages = decoded(asked.get("messages", asked.get("input", [asked] if "role" in asked else None)))
        instructions = [asked[name] for name in ("instructions", "system") if asked.get(name)]
    else:
        messages, instructions = asked, []
    if isinstance(messages, str) and messages.strip():
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, list) or not messages:
        raise Unusable("no_request", "no messages that can be read")
    system = [{"role": "system", "content": text_of(text)} for text in instructions]
    return read_turns([*system, *messages])


def read_reply(given: Any) -> Turn:
    """The one turn of an answer: a chat completion, a Responses answer, Anthropic's message, one message, a list of items, a text, or
    the JSON that a text was.

    Raises:
        Unusable: it failed, holds several replies, or is in a form that is not read.
    """
    output = decoded(given)
    if isinstance(output, dict) and isinstance(output.get("choices"), list):  # a whole chat completion
        if len(output["choices"]) != 1:
            raise Unusable("several_replies" if output["choices"] else "failed", f"{len(output['choices'])} choices")
        choice = output["choices"][0]
        turn = read_reply(choice.get("message"))
        turn.finish = str(choice.get("finish_reason") or turn.finish).lower()
        return turn
    if isinstance(output, dict) and isinstance(output.get("output"), list):  # a whole Responses answer
        turn = read_reply(output["output"])
        turn.finish = str((output.get("incomplete_details") or {}).get("reason") or turn.finish).lower()
        return turn
    if isinstance(output, dict) and (output.get("role") in ("assistant", "ai") or MESSAGE_MARKS & output.keys() or "kwargs" in output):
        return _only([output])
    if isinstance(output, list) and any(isinstance(item, dict) and _is_item(item) for item in output):
        return _only([item for item in output if isinstance(item, dict)])
    if isinstance(output, dict):
        _refuse_wrapper(output)
    if given is None or isinstance(given, str):
        return _only([{"role": "assistant", "content": given or ""}])
    return Turn({"role": "assistant", "content": dumped(output)})  # the reply was JSON, and the server has read it


def _only(items: list[dict]) -> Turn:
    """The one reply of a list of items or messages: a text and the calls beside it are one."""
    transcript = Transcript()
    turns = [
        turn
        for turn in read_turns([{"role": "assistant"} | item if _is_bare(item) else item for item in items], transcript)
        if turn.message["role"] == "assistant"
    ]
    if len(turns) > 1:
        raise Unusable("several_replies", f"{len(turns)} replies")
    return turns[0] if turns else Turn({"role": "assistant", "content": ""})


def _is_bare(item: dict) -> bool:
    return "role" not in item and "kwargs" not in item and item.get("type") not in (
        "function_call", "function_call_output", "reasoning", "ai", "AIMessage",
    )  # fmt: skip


def _is_item(item: dict) -> bool:
    return item.get("role") in ("assistant", "ai") or item.get("type") in ("function_call", "tool_use")


def _refuse_wrapper(output: dict) -> None:
    """Another API's wrapper around a reply, or an error, is no JSON reply of the model's.

    Raises:
        Unusable: it is one.
    """
    error, message = output.get("error"), output.get("message")
    if output.keys() == {"error"} and isinstance(error, dict) and "message" in error:
        raise Unusable("failed", str(error["message"])[:200])
    bedrock = isinstance(message, dict) and "role" in message and isinstance(message.get("content"), list)
    gemini = isinstance(output.get("candidates"), list) or (output.get("role") == "model" and "parts" in output)
    if bedrock or gemini or isinstance(output.get("toolCalls"), list):
        raise Unusable("other_form", "Bedrock's, Gemini's or the Vercel AI SDK's form")
