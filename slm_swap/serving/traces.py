"""Each request as a generation in Langfuse, in the background: a request never waits for it.

An hour of a worker is one trace, whose file lies in the state folder until it has arrived (`tracing.outbox`): an outage loses nothing. Where the folder takes
no file, requests are answered all the same, without traces until it does. What the hosted
model answered is production's traffic there, which `pull_langfuse.py` makes rows of; what the small model answered is marked as this program's own.
"""

import json
import os
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

from slm_swap.clients.protocol import Reply
from slm_swap.common.errors import UserError
from slm_swap.serving.notices import say
from slm_swap.tracing.runs import Connection, RunTrace

HOUR = 3600
AGAIN_SECONDS = 60  # until a file that could not be made is tried again


class Traces:
    """A worker's traces; `facts` are told of each."""

    def __init__(self, connection: Connection, folder: Path, facts: dict[str, Any]):
        self._connection, self._folder, self._facts = connection, folder, facts
        self._begin()

    def _begin(self) -> None:
        self._until = time.monotonic() + HOUR
        place = self._folder / f"serve-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{os.getpid()}.json"
        self._trace: RunTrace | None = None
        try:
            self._trace = RunTrace(self._connection, f"serve-{self._facts['track']}", place, self._facts, ["serve", self._facts["track"]], str(place))
        except UserError as error:
            self._until = time.monotonic() + AGAIN_SECONDS
            say(f"Langfuse is not told of requests for {AGAIN_SECONDS} s: {error}")

    def answered(
        self, request: str, model: str, body: dict[str, Any] | None, by: str, reason: str, local: Reply | None, hosted: Reply | None, agree: bool | None
    ) -> None:
        """A request that `by`, "local" or "hosted", answered; the metadata has the other model's reply, if there is one."""
        if self._trace is None:
            return
        reply, other = (local, hosted) if by == "local" else (hosted, local)
        metadata: dict[str, Any] = {"answered_by": by, "reason": reason, "confidence": local.confidence if local else None}
        if other is not None:
            metadata["agree"] = agree
            metadata |= {"other_reply": {"text": other.text, "calls": other.calls}} if self._connection.tracing.content else {}
        asked = {key: value for key, value in (body or {}).items() if key not in ("stream", "stream_options")}
        asked = json.loads(json.dumps(asked, default=lambda value: float(value) if isinstance(value, Decimal) else str(value)))
        scores = {} if agree is None else {"agreement": float(agree)}
        self._trace.generation(request, model, asked, reply, scores, metadata=metadata, own=by == "local", name="request")

    def old(self) -> RunTrace | None:
        """The trace that has been open for an hour, to be closed; another one has taken its place. None where there is none."""
        if time.monotonic() < self._until:
            return None
        old = self._trace
        self._begin()
        return old

    def close(self) -> None:
        if self._trace:
            self._trace.close()
