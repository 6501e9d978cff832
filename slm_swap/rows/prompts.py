"""What a model is shown: the system prompt of each track and the one builder of messages.

Evaluation, training and the dataset all go through this module, so a model is always measured on what it was trained on.
"""

import json
from typing import Any

from slm_swap.common.exact_json import ExactEncoder
from slm_swap.rows.examples import dump_json

Messages = list[dict[str, str]]

SYSTEM_PROMPTS = {
    "structured": (
        "You turn a request into one JSON object that matches the given JSON Schema. Reply with the JSON object and "
        "nothing else. Leave out optional arguments that the request does not ask for."
    ),
    "toolcall": (
        'You answer a request by calling one of the given tools. Reply with exactly one <tool_call name="TOOL">'
        "{arguments as a JSON object}</tool_call> and nothing else. Leave out optional arguments that the request does "
        "not ask for."
    ),
}


def build_messages(track: str, prompt: str) -> Messages:
    """The chat that asks for one row: the track's system prompt, then the row's prompt."""
    return [{"role": "system", "content": SYSTEM_PROMPTS[track]}, {"role": "user", "content": prompt}]


def toolcall_prompt(tools: list[dict], request: str) -> str:
    """The prompt of a toolcall row: every tool on offer, one a line as JSON, then the request."""
    lines = "\n".join(json.dumps(tool, ensure_ascii=False, cls=ExactEncoder) for tool in tools)
    return f"Tools:\n{lines}\n\nRequest: {request}"


def toolcall_completion(tool: str, arguments: dict[str, Any]) -> str:
    """The one call that answers a toolcall row."""
    return f'<tool_call name="{tool}">{dump_json(arguments)}</tool_call>'


def structured_prompt(schema: dict, request: str) -> str:
    """The prompt of a structured row: the wanted object's JSON Schema, then the request."""
    return f"JSON Schema:\n{json.dumps(schema, ensure_ascii=False, cls=ExactEncoder)}\n\nRequest: {request}"


def structured_schema(tool: dict) -> dict:
    """The schema of `{"tool_name": ..., "arguments": {...}}` for one tool."""
    return {
        "type": "object",
        "description": tool.get("description", ""),
        "properties": {"tool_name": {"const": tool["name"]}, "arguments": tool["parameters"]},
        "required": ["tool_name", "arguments"],
    }
