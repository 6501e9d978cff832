"""One row with its reply: scored, and as a line of the rows file."""

import json
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from slm_swap.clients.protocol import Client, Reply
from slm_swap.common.reports import json_line, json_text
from slm_swap.rows.conversations import unsaid
from slm_swap.rows.examples import Example
from slm_swap.rows.lines import text_hash
from slm_swap.scoring.form import UNKNOWN, Form, form_of
from slm_swap.scoring.measured import unmeasured
from slm_swap.scoring.metrics import MATCHERS, Reference, Scored
from slm_swap.scoring.several import Calls
from slm_swap.scoring.tracks import TRACKS, Track


@dataclass(frozen=True)
class Row:
    """One row with its reply and scores; `tool` is its gold's, `form` what can be said of the reply without the gold."""

    example: Example
    reply: Reply
    scored: Scored
    tool: str | None = None
    form: Form = UNKNOWN

    def unmeasured(self, hosted: bool) -> str | None:
        """Why the row says nothing of the model: see `scoring.measured`."""
        told = {"finish_reason": self.reply.finish_reason, "error": self.scored.error, "cut": self.reply.cut, "tool": self.tool}
        return unmeasured(told | {"scores": {"decision_match": self.scored.strict.decided}}, hosted)

    def to_json(self, track: Track) -> dict[str, Any]:
        """What the rows file says of it."""
        return json.loads(self.line(track))

    def line(self, track: Track) -> str:
        """Its line of the rows file, put together by hand: rows have few different scores, and they are the most of it."""
        example, reply = self.example, self.reply
        return (
            f'{{"id": {json_text(example.id)}, "group": {json_text(example.group)}, "tool": {json_text(self.tool)}, '
            f'"prompt_sha256": "{text_hash(example.prompt)}", '
            f'"reply": {json_text(reply.shown)}, "calls": {json_line(reply.calls)[:-1] if reply.calls is not None else "null"}, '
            f'"reference": {json_text(example.completion)}, '
            f'{_scores_json(track.title, self.scored)}, "finish_reason": {json_text(reply.finish_reason)}, '
            f'"reply_error": {json_text(reply.error)}, "cut": {json_line(reply.cut)[:-1] if reply.cut else "null"}, '
            f'"constrained": {json_text(reply.constrained)}, "grammar_error": {json_text(reply.grammar_error)}, '
            f'"tokens": {{"input": {_number(reply.input_tokens)}, "cached": {_number(reply.cached_tokens)}, '
            f'"output": {_number(reply.output_tokens)}, "reasoning": {_number(reply.reasoning_tokens)}}}, '
            f'"seconds": {round(reply.seconds, 6)}, "load": {_number(reply.load)}, '
            f'"confidence": {json_line(reply.confidence)[:-1] if reply.confidence else "null"}, '
            f'"parses": {_flag(self.form.parses)}, "keeps_schema": {_flag(self.form.keeps_schema)}}}\n'
        )


def _number(value: int | None) -> str:
    return "null" if value is None else str(value)


def _flag(value: bool | None) -> str:
    return "null" if value is None else "true" if value else "false"


@lru_cache(maxsize=4096)
def _scores_json(track_name: str, scored: Scored) -> str:
    """The scores and the error of a line, without the braces around them."""
    by_matcher = {matcher: TRACKS[track_name].row_metrics(getattr(scored, matcher)) for matcher in MATCHERS}
    return json_line({"scores": by_matcher["strict"], "scores_by_matcher": by_matcher, "error": scored.error})[1:-2]


def score_row(track: Track, example: Example, reply: Reply, client: Client | None = None) -> Row:
    """A row with its reply, scored; `client` counts the reference's tokens where the limit cut the reply."""
    gold = track.reference(example)
    return make_row(track, example, gold, reply, client)


def make_row(track: Track, example: Example, gold: Reference | Calls, reply: Reply, client: Client | None = None) -> Row:
    """`score_row` where the gold is parsed already."""
    if reply.finish_reason == "length" and reply.cut is None:
        reply = replace(reply, cut=cut_of(reply, example.completion, client))
    told = reply.text, reply.finish_reason, reply.calls
    return Row(example, reply, track.score(gold, *told), gold.tool, form_of(track.title, example, *told))


def cut_of(reply: Reply, reference: str, client: Client | None) -> dict[str, Any]:
    """What is known of a reply that the limit cut: the `limit` on its new tokens, `reference_tokens` (how many the reference has by
    the local model's tokenizer), and whether it was cut while the model was still `thinking`.

    It was thinking if its text opens a `<think>` and does not close it, or if the server says that all new tokens were reasoning.
    """
    counted = client.count_tokens(reference) if client else None
    reasoning, spent = reply.reasoning_tokens, reply.output_tokens
    only_thought = reasoning is not None and spent is not None and 0 < spent <= reasoning
    opened, closed = ([match.end() for match in re.finditer(tag, reply.text)] for tag in ("<think>", "</think>"))
    thinking = only_thought or max(opened, default=0) > max(closed, default=0)
    return {"limit": reply.limit, "reference_tokens": counted, "thinking": thinking}


def is_of(line: dict[str, Any], example: Example) -> bool:
    """Whether a line of `Row.to_json` is of that row."""
    return line.get("id") == example.id and line.get("prompt_sha256") == text_hash(example.prompt)


def read_reply(line: dict[str, Any]) -> Reply:
    """The reply of a line of `Row.to_json`; an older file's line lacks what came to the rows file later."""
    tokens = line["tokens"]
    return Reply(
        unsaid(line["reply"], line.get("calls")),
        line["finish_reason"],
        tokens["input"],
        tokens["output"],
        tokens["cached"],
        line["seconds"],
        line["reply_error"],
        reasoning_tokens=tokens.get("reasoning"),
        cut=line.get("cut"),
        load=line.get("load"),
        calls=line.get("calls"),
        confidence=line.get("confidence"),
        constrained=line.get("constrained"),
        grammar_error=line.get("grammar_error"),
    )
