"""Traced runs against the recording Langfuse server: settings, rows, outages, and what is left on disk."""

import json

from slm_swap.clients.protocol import Reply
from slm_swap.common.settings import Settings
from slm_swap.tracing.runs import outbox_path

MESSAGES = [{"role": "system", "content": "Call a tool."}, {"role": "user", "content": "Grüße nach 東京"}]
REPLY = Reply('<tool_call name="f">{"n":1}</tool_call>', "stop", 60, 20, 15, 0.25)


def kept(folder, report="report.json"):
    """(span names, scores) that lie on disk, undelivered or not; None where no file is left."""
    path = outbox_path(folder / report)
    if not path.exists():
        return None
    records = [json.loads(line) for line in path.read_text().splitlines()]
    spans = [r["span"] for r in records if "span" in r]
    return [span["facts"]["metadata"].get("row_id", span["name"]) for span in spans], [name for r in records for name in r.get("scores", ())]


def settings_for(server, **changes):
    public_key, secret_key = server.keys.split(":")
    values = {"langfuse_public_key": public_key, "langfuse_secret_key": secret_key, "langfuse_base_url": server.url}
    return Settings(**values | changes)


def send_rows(trace, count, first=0, scores=None):
    for number in range(first, first + count):
        trace.generation(f"row-{number}", "phi-4-mini", MESSAGES, REPLY, {"args_exact": 1.0} if scores is None else scores)


def outage(server, trouble):
    if trouble == "refusing":
        server.refuse()
    elif trouble == "hanging":
        server.hanging = True
    else:
        server.status = trouble


def found_failing(folder):
    """Whether the sender has noted that a request failed."""
    marks = [json.loads(line) for line in outbox_path(folder / "report.json").read_text().splitlines() if '"delivered"' in line]
    return any(mark["reason"] for mark in marks)
