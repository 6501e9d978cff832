"""Replies read from a file: recorded traffic, another team's run, or the rows file of an earlier evaluation."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from slm_swap.clients import Reply
from slm_swap.errors import UserError
from slm_swap.examples import Example, parse_example, read_jsonl
from slm_swap.prompts import Messages
from slm_swap.reports import sha256_file
from slm_swap.settings import display_path

FINISH_REASONS = ("stop", "length", "content_filter", "refusal", "error")


class ReplayClient:
    """A client whose replies stand in a file: one JSON object a line with `prediction` (or `reply`) and `id` or `prompt`.

    Lines may also hold `finish_reason`, `tokens` and `seconds`, as a rows file does. A row is found by its id where the line has
    one, else by its prompt; equal prompts take their lines in order.

    Raises:
        UserError: a bad line, or rows without a reply; nothing is guessed.
    """

    kind = "replay"
    load_seconds = 0.0

    def __init__(self, path: str | Path, examples: list[Example]):
        self.path = path
        by_id: dict[str, Reply] = {}
        by_prompt: dict[str, list[Reply]] = defaultdict(list)
        for where, line in read_jsonl(path):
            reply = _read_reply(line, where)
            if isinstance(line.get("id"), (str, int)):
                if str(line["id"]) in by_id:
                    raise UserError(f"{where}: a second reply for id {line['id']!r}: keep one")
                by_id[str(line["id"])] = reply
            elif isinstance(line.get("prompt"), str):
                by_prompt[line["prompt"]].append(reply)
            else:
                raise UserError(f"{where}: neither `id` nor `prompt`: say which row the reply belongs to")
        self._replies: dict[str, list[Reply]] = defaultdict(list)
        missing = []
        for example in examples:
            recorded = by_id.get(example.id) or next(iter(by_prompt.get(example.prompt, ())), None)
            if recorded is None:
                missing.append(example)
                continue
            if example.id not in by_id:
                by_prompt[example.prompt].pop(0)
            self._replies[example.prompt].append(recorded)
        if missing:
            raise UserError(
                f"{display_path(path)} has no reply for {len(missing)} of {len(examples)} rows (first: id {missing[0].id!r}): "
                "give the dataset that the replies were recorded on, or --limit"
            )

    def generate(self, batch: list[Messages]) -> list[Reply]:
        return [self._replies[messages[-1]["content"]].pop(0) for messages in batch]

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "path": display_path(self.path), "sha256": sha256_file(self.path)}

    def cost(self, input_tokens: int, cached_tokens: int, output_tokens: int, seconds: float) -> float | None:
        return None  # what the recorded run cost is not in the file

    def close(self) -> None: ...


def _read_reply(line: Any, where: str) -> Reply:
    if not isinstance(line, dict):
        raise UserError(f"{where}: a line is a JSON object with `prediction` and `id` or `prompt`")
    text = line.get("prediction", line.get("reply"))
    if not isinstance(text, str):
        raise UserError(f"{where}: `prediction` must be a text, the model's reply as it came (empty where there was none)")
    finish_reason = line.get("finish_reason") or "stop"
    if finish_reason not in FINISH_REASONS:
        raise UserError(f"{where}: finish_reason {finish_reason!r} is none of {', '.join(FINISH_REASONS)}")
    tokens = line.get("tokens") if isinstance(line.get("tokens"), dict) else {}
    counts = {f"{name}_tokens": value for name, value in tokens.items() if name in ("input", "output", "cached") and type(value) is int}
    seconds = line.get("seconds")
    return Reply(
        text.encode("utf-8", "replace").decode(),
        finish_reason,
        seconds=float(seconds) if isinstance(seconds, (int, float)) else 0.0,
        error=line.get("reply_error") if isinstance(line.get("reply_error"), str) else None,
        **counts,
    )


def dataset_of_replies(path: str | Path, limit: int | None = None) -> list[Example]:
    """The rows that a file of replies itself holds, where every line has `prompt` and `reference`.

    Raises:
        UserError: a line lacks one of them, or the file is empty.
    """
    examples = []
    for where, line in read_jsonl(path):
        if not isinstance(line, dict) or not isinstance(line.get("reference"), str) or not isinstance(line.get("prompt"), str):
            raise UserError(f"{where}: no `prompt` and `reference`, so the file is not its own dataset: pass --dataset or --split")
        fields = {name: line[name] for name in ("id", "prompt", "tools", "schema", "accept", "group", "source") if name in line}
        examples.append(parse_example(fields | {"completion": line["reference"]}, where))
        if len(examples) == limit:
            break
    if not examples:
        raise UserError(f"{display_path(path)} has no replies: one JSON object a line")
    return examples
