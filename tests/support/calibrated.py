"""Evaluations of both models on rows of a split, as calibrate.py reads them: real replies, really scored, with made-up confidences."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from slm_swap.common.reports import rows_path, sha256_file, write_jsonl
from slm_swap.rows.examples import Example
from slm_swap.rows.lines import read_jsonl
from slm_swap.scoring.replies import InvalidReply, parse_toolcall
from tests.support.evaluated import AZURE, SLM, calls, replies, write_report

SMALL = SLM | {"engine": "transformers", "files_sha256": ["f" * 64]}
ARGS = {"max_new_tokens": 512, "constrain": "off"}


def sureness(number: int, right: bool) -> dict[str, Any]:
    """The surer the lower the number; of what is wrong the least sure, so that the signal tells everything."""
    value = -(number + 1) / 1000 - (0 if right else 10)
    return {"min_logprob": value, "sum_logprob": value, "tool_logprob": value, "min_margin": 11 + value, "tokens": 3}


def prompt_row(example: Example) -> dict[str, Any]:
    return example.to_json()


def conversation(example: Example) -> dict[str, Any]:
    """The row as a conversation, as chat logs give it."""
    told = example.to_json()
    prompt, completion = told.pop("prompt"), told.pop("completion")
    try:
        call = parse_toolcall(completion)
        wanted = {"calls": [{"name": call.name, "arguments": call.value}]}
    except InvalidReply:
        wanted = {"object": json.loads(completion)}
    return told | wanted | {"messages": [{"role": "user", "content": prompt}]}


def write_pair(
    folder: Path,
    split: str = "calibration",
    rows: int = 200,
    azure: Sequence[str] = ("right",),
    slm: Sequence[str] = ("right",),
    sure: Callable[[int, bool], dict[str, Any] | None] = sureness,
    groups: Sequence[str | None] = (None,),
    model: dict[str, Any] | None = None,
    examples: list[Example] | None = None,
    first: int = 0,
    as_prompts: bool = False,
    track: str = "toolcall",
    **more: Any,
) -> list[str]:
    """The flags that name both reports. `azure` and `slm` are what each says in turn (`evaluated.REPLIES`), rows `first` and on; `more` are
    keys of the small model's report."""
    whole = examples or calls(first + rows, groups)
    examples = whole[first:]
    path = folder / f"{split}.jsonl"
    write_jsonl(path, ((prompt_row if as_prompts else conversation)(example) for example in examples))
    inputs = {"path": str(path), "sha256": sha256_file(path), "rows": len(examples), "rows_sha256": "r" * 64}
    flags = []
    for side, errors, told in (("azure", azure, AZURE), ("slm", slm, model or SMALL)):
        out, own = folder / f"{side}_{split}.json", more if side == "slm" else {}
        write_report(out, examples, replies(whole, errors)[first:], told, track, **({"inputs": inputs, "args": ARGS, "ask": "text"} | own))
        flags += [f"--{side}", str(out)]
    lines = [line for _, line in read_jsonl(rows_path(out))]
    for number, line in enumerate(lines):
        line["confidence"] = sure(number, line["error"] is None)
    rows_path(out).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return flags
