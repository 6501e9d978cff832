"""Real evaluations of made-up rows: reports and rows files as 01_eval/eval.py writes them, for tests of what reads them."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from slm_swap.clients.replay_client import ReplayClient
from slm_swap.common.reports import code_version, package_versions, rows_path, write_json, write_jsonl
from slm_swap.evaluating import report as reporting
from slm_swap.evaluating.evaluation import evaluate, references
from slm_swap.rows.examples import Example
from slm_swap.rows.prompts import structured_prompt, toolcall_prompt
from slm_swap.scoring.tracks import TRACKS

AZURE = {"kind": "azure", "deployment": "gpt-4o-mini"}
SLM = {"kind": "slm", "path": "slm_swap/models/phi-4-mini", "precision": "int8", "adapter": None, "training_seconds": None}
TUNED = SLM | {"adapter": "slm_swap/04_ft/adapter_toolcall", "training_seconds": 3600}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "nights": {"type": "integer"}}, "required": ["city", "nights"]}

# What a model may say to a row that wants book(city, nights), by the error that it is; `another_value` is wrong in another way.
CALL = '<tool_call name="{name}">{{"city":"Oslo","nights":{number}}}</tool_call>'
REPLIES = {
    "right": CALL,
    "number": '{{"number":{number}}}',  # a right one to rows of `objects`
    "no_json": "I cannot say.",
    "bad_json": '<tool_call name="{name}">{{"city":"Oslo,"nights"}}</tool_call>',
    "extra_text": "Here you are: " + CALL,
    "wrong_shape": '{{"city":"Oslo","nights":{number}}}',
    "wrong_tool": '<tool_call name="cancel">{{"city":"Oslo","nights":{number}}}</tool_call>',
    "missing_argument": '<tool_call name="{name}">{{"city":"Oslo"}}</tool_call>',
    "extra_argument": '<tool_call name="{name}">{{"city":"Oslo","nights":{number},"pets":1}}</tool_call>',
    "wrong_type": '<tool_call name="{name}">{{"city":"Oslo","nights":"{number}"}}</tool_call>',
    "wrong_value": '<tool_call name="{name}">{{"city":"Bergen","nights":{number}}}</tool_call>',
    "another_value": '<tool_call name="{name}">{{"city":"Narvik","nights":{number}}}</tool_call>',
    "folded": '<tool_call name="{name}">{{"city":"OSLO","nights":{number}}}</tool_call>',
    "truncated": '<tool_call name="{name}">{{"city":"Os',
    "filtered": "",
    "refused": "I must not.",
    "failed": "",
}
# What git and the packages say of themselves: a tenth of a second a report, of hundreds of them, and always the same.
ASKED_ONCE = {"code_version": cache(code_version), "package_versions": cache(package_versions)}
ENDS = {"truncated": "length", "filtered": "content_filter", "refused": "refusal", "failed": "error"}


def calls(count: int, groups: Sequence[str | None] = (None,), tools: Sequence[str] = ("book",)) -> list[Example]:
    """Toolcall rows; groups and tools in turn."""
    found = []
    for number in range(count):
        tool = {"name": tools[number % len(tools)], "description": "", "parameters": SCHEMA}
        prompt = toolcall_prompt([tool, tool | {"name": "cancel"}], f"Oslo, {number} nights")
        completion = CALL.format(name=tool["name"], number=number)
        group = groups[number % len(groups)]
        found.append(Example(prompt, completion, f"row-{number}", tools=[tool, tool | {"name": "cancel"}], group=group))
    return found


def objects(count: int) -> list[Example]:
    """Structured rows without tools: nothing but their place tells them apart."""
    schema = {"type": "object", "properties": {"number": {"type": "integer"}}}
    return [Example(structured_prompt(schema, str(n)), f'{{"number":{n}}}', f"row-{n}", schema=schema) for n in range(count)]


def replies(examples: Sequence[Example], errors: Sequence[str]) -> list[dict[str, Any]]:
    """Lines of a file of replies to rows of `calls`, with errors of REPLIES in turn: 100 tokens in, 20 out, a quarter second."""
    lines = []
    for number, example in enumerate(examples):
        error = errors[number % len(errors)]
        name = example.tools[0]["name"] if example.tools else ""
        line = {"id": example.id, "prediction": REPLIES[error].format(name=name, number=number)}
        line |= {"finish_reason": ENDS.get(error, "stop"), "reply_error": "timeout" if error == "failed" else None}
        answered = {"tokens": {"input": 100, "cached": 40, "output": 20}, "seconds": 0.25}
        lines.append(line | (answered if error != "failed" else {}))
    return lines


class Model(ReplayClient):
    """Replies in a file that a certain model is said to have given."""

    def __init__(self, path: Path, examples: list[Example], told: dict[str, Any]):
        super().__init__(path, examples)
        self.told, self.kind = told, told["kind"]

    def describe(self) -> dict[str, Any]:
        return super().describe() if self.kind == "replay" else self.told


def write_report(
    out: Path, examples: list[Example], lines: list[dict[str, Any]], model: dict[str, Any], track: str = "toolcall", **more: Any
) -> Path:
    """Evaluate recorded replies as the model's; report and rows at `out`, with `more` keys in the report."""
    given = out.with_suffix(".replies.jsonl")
    given.write_text("".join(json.dumps(line) + "\n" for line in lines))
    client = Model(given, examples, model)
    rows = evaluate(track, client, examples, references(TRACKS[track], examples), 64)
    seconds = sum(row.reply.seconds for row in rows)
    with mock.patch.multiple(reporting, **ASKED_ONCE):
        report = reporting.make_report(track, client, rows, seconds, seconds, {"path": "rows.jsonl", "sha256": "a" * 64}, {})
    write_jsonl(rows_path(out), (row.to_json(TRACKS[track]) for row in rows))
    write_json(out, report | {"trace": {"id": None, "url": None}} | more)
    return out
