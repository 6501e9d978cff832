"""State folders as an endpoint leaves them: audits, minutes and the cascade that is served."""

import json
from pathlib import Path
from typing import Any

from slm_swap.common.reports import sha256_file
from slm_swap.rows.lines import with_checksum

START = 1_800_000_000.0  # unix s, the beginning of a minute
TOOLS = [
    {"type": "function", "function": {"name": "order_status", "description": "", "parameters": {"type": "object", "properties": {"order": {}}}}}
]


def line(value: dict[str, Any]) -> bytes:
    return with_checksum(json.dumps(value).encode() + b"\n")


def append(path: Path, *values: dict[str, Any]) -> None:
    with open(path, "ab") as stream:
        for value in values:
            stream.write(line(value))


def audit(number: int, agree: bool, tool: str | None = "order_status", content: bool = True, **more: Any) -> dict[str, Any]:
    told = {"time": START + number, "id": f"r{number}", "kind": "call" if tool else "value", "tool": tool, "agree": agree}
    told |= {"confidence": {}, "seconds": {}, "cost": {}, "unreadable": []}
    shown = content and not agree
    return told | {"local": calls(1) if shown else None, "hosted": calls(2) if shown else None, "request": body(number) if shown else None} | more


def calls(order: int) -> list[dict[str, Any]]:
    """A reply as an audit keeps it."""
    return [{"name": "order_status", "arguments": {"order": order}}]


def body(number: int) -> dict[str, Any]:
    return {"model": "any", "messages": [{"role": "user", "content": f"Where is order {number}?"}], "tools": TOOLS, "tool_choice": "auto"}


def minute(number: int, local: int = 90, handed_on: int = 10, failures: int = 0, **more: Any) -> dict[str, Any]:
    requests = {"local": {"local": local}, "hosted": {"below_threshold": handed_on}}
    return {"time": START + 60 * number, "worker": 1, "seconds": 60, "requests": requests, "failures": failures, "unlike": 0} | more


def cascade(path: Path, **more: Any) -> Path:
    """Of 1,000 calibration rows: 900 answered locally, of which 20 disagreed."""
    told = {
        "schema_version": 1, "stage": "cascade", "track": "toolcall", "hosted": "gpt-x", "share_local": 0.9,
        "guarantee": "regret", "delta": 0.02, "alpha": 0.05, "regret": {"seen": 0.01, "bound": 0.02}, "identity": {}, "tools": None, "prompts": 0,
        "rules": {
            "call": {"signal": "sum_logprob", "threshold": -0.5, "units": 1000, "local": 900},
            "no_call": {"signal": "sum_logprob", "threshold": None, "units": 0, "local": 0},
        },
        "disagreement": {"seen": 20 / 900, "bound": 0.05, "units": 900},
        "per_tool": {
            "order_status": {"local": 800, "losses": 10, "disagreements": 15},
            "rare": {"local": 5, "losses": 0, "disagreements": 0},
            "never": {"local": 0, "losses": 0, "disagreements": 0},
        },
    }  # fmt: skip
    path.write_text(json.dumps(told | more))
    return path


def state(folder: Path, **more: Any) -> Path:
    """A folder whose endpoint serves `cascade`, without audits or minutes."""
    folder.mkdir()
    serve(folder, cascade(folder.parent / "cascade.json", **more))
    return folder


def serve(folder: Path, made: Path) -> None:
    """Name the cascade that is served, as the endpoint does when it starts."""
    told = {"mode": "cascade", "track": "toolcall", "hosted": {"model": "gpt-x"}, "cascade": {"path": str(made), "sha256": sha256_file(made)}}
    (folder / "endpoint.json").write_text(json.dumps(told | {"rule": json.loads(made.read_text())}))
