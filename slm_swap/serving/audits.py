"""Audits: a share of what was answered locally is asked of the hosted model too, in the background, and compared by value."""

import asyncio
import json
import random
import time
from typing import Any

from slm_swap.clients.completions import read_completion
from slm_swap.clients.pricing import HostedPrices, to_float
from slm_swap.clients.protocol import Reply
from slm_swap.common.errors import UserError
from slm_swap.rows.lines import dump_json, writable
from slm_swap.scoring.several import TOOLS_BETWEEN, answer, answer_json, says_nothing
from slm_swap.serving import state
from slm_swap.serving.hosted import Hosted, HostedDown
from slm_swap.serving.meters import Meters
from slm_swap.serving.options import Options

AT_ONCE = 4  # audits of a worker under way; more of them are left out
DAY = 86_400


def agree(track: str, one: Reply, other: Reply) -> bool:
    """Whether two replies say the same by value; one that is not well-formed agrees with none."""
    try:
        return answer(track, one.text, one.calls) == answer(track, other.text, other.calls)
    except ValueError:
        return False


def is_readable(track: str, reply: Reply) -> bool:
    """Whether a reply says something by value: it is calls, words without any, or a JSON value."""
    try:
        found = answer(track, reply.text, reply.calls)
    except ValueError:
        return False
    return bool(found) or not says_nothing(reply.text)


def said(track: str, reply: Reply) -> Any:
    """A reply as JSON: its calls or its value with what it said where there are none, or its text where it cannot be read."""
    try:
        value = answer_json(track, reply.text, reply.calls)
    except ValueError:
        return {"text": writable(reply.text)}  # a value may look so too: `is_readable` tells them apart
    return value or {"text": writable(reply.text)} if track == "toolcall" else value


class Audits:
    """One worker's. What was spent today stands in the shared file, so that all workers keep one budget."""

    def __init__(self, options: Options, hosted: Hosted, meters: Meters, prices: HostedPrices):
        self._options, self._hosted, self._meters, self._prices = options, hosted, meters, prices
        self._lines, self._day, self._spent = state.Tail(options.state / state.AUDITS), 0, 0.0
        self._under_way, self._unwritten = 0, 0.0

    def due(self) -> bool:
        """Whether this local answer is to be audited."""
        if self._under_way >= AT_ONCE or random.random() >= self._options.audit_share:
            return False
        return self._options.audit_budget is None or self._left() > 0

    def _left(self) -> float:
        """What may be spent today."""
        day = int(time.time() // DAY)
        if day != self._day:
            self._day, self._spent, self._unwritten, self._lines = day, 0.0, 0.0, state.Tail(self._lines.path)
        try:
            for line in self._lines.new():
                if int(float(line["time"]) // DAY) == day:
                    self._spent += float(line["cost"]["hosted"] or 0.0)
        except state.Replaced:  # what was spent stays spent
            self._lines = state.Tail(self._lines.path)
        except UserError:  # it cannot be read: nothing more is spent until it can
            return 0.0
        return self._options.audit_budget - self._spent - self._unwritten

    async def audit(self, name: str, kind: str, tools: tuple[str, ...], path: str, body: dict[str, Any], local: Reply) -> Reply | None:
        """Ask the hosted model, compare, write; its reply, None where it gave none that says anything."""
        self._under_way += 1
        try:
            asked = {key: value for key, value in body.items() if key not in ("stream", "stream_options")}
            began = time.perf_counter()
            url = self._hosted.url(path, "", self._hosted.name)
            try:
                raw = self._hosted.body(dump_json(asked).encode("utf-8"), asked, self._hosted.name)
                async with self._hosted.send("POST", url, [("content-type", "application/json")], raw) as response:
                    told = json.loads(await response.aread()) if response.status_code == 200 else None
            except (HostedDown, ValueError):
                return None
            hosted = read_completion(told, self._options.track == "toolcall")
            self.compared(name, kind, tools, body, local, hosted, time.perf_counter() - began, paid=True)
            return hosted
        except asyncio.CancelledError:
            return None
        finally:
            self._under_way -= 1

    def compared(
        self, name: str, kind: str, tools: tuple[str, ...], body: dict[str, Any], local: Reply, hosted: Reply, seconds: float, paid: bool
    ) -> None:
        """Both answered: write whether they agree. A hosted reply that was filtered, refused or cut says nothing. `paid`: for the audit's sake."""
        if hosted.finish_reason != "stop":
            return
        same = agree(self._options.track, local, hosted)
        cost = self._cost(local, hosted)
        shown = self._options.audit_content and not same
        unreadable = [side for side, reply in (("local", local), ("hosted", hosted)) if not is_readable(self._options.track, reply)]
        line = {
            "time": time.time(),
            "id": name,
            "kind": kind,
            "tool": TOOLS_BETWEEN.join(tools) or None,
            "tools": list(tools),
            "agree": same,
            "unreadable": unreadable,
            "confidence": local.confidence,
            "seconds": {"local": round(local.seconds, 6), "hosted": round(seconds, 6)},
            "cost": {"hosted": cost if paid else 0.0},
            "local": said(self._options.track, local) if shown else None,
            "hosted": said(self._options.track, hosted) if shown else None,
            "request": body if shown else None,
        }
        self._meters.audited(same, cost if paid else None)
        try:
            state.append(self._options.state, state.AUDITS, line)
        except OSError:  # it was paid for all the same
            self._unwritten += (cost or 0.0) if paid else 0.0
            raise

    def _cost(self, local: Reply, hosted: Reply) -> float | None:
        """By the hosted model's count of tokens; where it gave none, by the small model's."""
        if None in (hosted.input_tokens, hosted.output_tokens):
            return hosted_price(self._prices, local)
        return hosted_price(self._prices, hosted, hosted.cached_tokens or 0)


def hosted_price(prices: HostedPrices, reply: Reply, cached: int = 0) -> float | None:
    """What a reply's tokens cost at the hosted model, None where that is not known. Without `cached`, what it would have had in its cache is not known, and
    all input counts in full."""
    if reply.input_tokens is None or reply.output_tokens is None:
        return None
    return to_float(prices.cost(reply.input_tokens, cached, reply.output_tokens))
