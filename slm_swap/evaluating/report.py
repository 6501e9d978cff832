"""What a report says of the rows of one evaluation."""

import hashlib
import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from slm_swap.clients.protocol import Client
from slm_swap.common.errors import UserError
from slm_swap.common.reports import SCHEMA_VERSION, code_version, hardware, now, package_versions
from slm_swap.dataset.labels import TEACHER
from slm_swap.evaluating.row import Row
from slm_swap.rows.examples import Example
from slm_swap.rows.lines import text_hash
from slm_swap.rows.prompts import request_of
from slm_swap.scoring.metrics import ERRORS, MATCHERS, Match
from slm_swap.scoring.tracks import TRACKS, Track
from slm_swap.verdict.confidence import SIGNALS, discrimination, signals_of

ANSWERED = ("stop", "length", "refusal", "content_filter")  # what says how long the model takes: not a failure, not a prompt that is too long


class Digests:
    """sha256 digests, 32 bytes each and no more: a million rows are to be counted, too."""

    def __init__(self, digests: Iterable[str] = ()):
        self._bytes = bytearray()
        for digest in digests:
            self.add(digest)

    def __len__(self) -> int:
        return len(self._bytes) // 32

    def add(self, digest: str) -> None:
        """`digest` in hex."""
        self._bytes += bytes.fromhex(digest)

    def together(self) -> str:
        """One digest for all of them, in hex, whatever order they came in: of their lines of hex, sorted."""
        digests = sorted(bytes(self._bytes[at : at + 32]) for at in range(0, len(self._bytes), 32))
        whole = hashlib.sha256()
        for number, digest in enumerate(digests):
            whole.update(f"{chr(10) if number else ''}{digest.hex()}".encode())
        return whole.hexdigest()


class Tally:
    """What a report says of rows, without the rows: of each, some 250 bytes are kept.

    `hosted` is whether every cut reply is unmeasured: see `scoring.measured`.
    """

    def __init__(self, track_name: str, hosted: bool = True):
        self.track, self.hosted = TRACKS[track_name], hosted
        self.matches: dict[str, Counter[Match]] = {matcher: Counter() for matcher in MATCHERS}
        self.errors: Counter[str | None] = Counter()
        self.unmeasured: Counter[str | None] = Counter()
        self.rows = self.failed_requests = 0
        self.last_failure: str | None = None
        self.counted = 0  # rows of which all three counts of tokens are known: the sums are over these
        self.tokens = {"input": 0, "cached": 0, "output": 0}
        self.seconds: defaultdict[int, array] = defaultdict(lambda: array("d"))  # of answered rows, by how many were asked at a time
        self.contents, self.prompts = Digests(), Digests()
        self.asks: set[str] = set()
        self.constrained: Counter[bool] = Counter()  # whether a reply was made under a grammar, where a run has any
        self.without_grammar: Counter[str] = Counter()  # by reason
        self.teachers: Counter[str] = Counter()  # of rows whose gold is a model's own reply
        self.signals = {name: array("d") for name in SIGNALS}  # of each row; NaN where it has none
        self.right, self.groups = bytearray(), array("q")  # of each row, too; groups by their hashes, below 0 of rows without one

    def __len__(self) -> int:
        return self.rows

    def expect(self, example: Example) -> None:
        """Note what a row says and asks; its reply comes with `add`."""
        self.contents.add(example.content_hash)
        request = request_of(self.track.title, example)
        self.prompts.add(text_hash(str(request.key())))
        self.asks.add("native" if request.native else "text")
        if (example.source or "").startswith(TEACHER):
            self.teachers[(example.source or "").removeprefix(TEACHER)] += 1

    @property
    def ask(self) -> str:
        """How the rows are asked: one of prompts.ASKS, or "mixed"."""
        return "mixed" if len(self.asks) > 1 else next(iter(self.asks))

    @property
    def prompt_sha256(self) -> str:
        """One hash for all messages, in any order."""
        return self.prompts.together()

    def add(self, row: Row) -> None:
        reply, scored = row.reply, row.scored
        self.rows += 1
        for matcher, counts in self.matches.items():
            counts[getattr(scored, matcher)] += 1
        self.errors[scored.error] += 1
        self.unmeasured[row.unmeasured(self.hosted)] += 1
        if reply.finish_reason == "error":
            self.failed_requests, self.last_failure = self.failed_requests + 1, reply.error
        if counts := reply.counts:
            self.counted += 1
            for name, count in zip(self.tokens, counts, strict=True):
                self.tokens[name] += count
        if reply.constrained is not None:
            self.constrained[reply.constrained] += 1
        if reply.grammar_error is not None:
            self.without_grammar[reply.grammar_error] += 1
        if reply.load is not None and reply.finish_reason in ANSWERED:
            self.seconds[reply.load].append(reply.seconds)
        for name, value in signals_of({"confidence": reply.confidence} | row.form._asdict()).items():
            self.signals[name].append(math.nan if value is None else value)
        self.right.append(scored.strict.exact)
        group = row.example.group
        self.groups.append(-self.rows if group is None else hash(group) & 0x7FFF_FFFF_FFFF_FFFF)

    def confidence(self) -> dict[str, Any] | None:
        """The report's `confidence`: see `verdict.confidence.discrimination`."""
        grouped = any(group >= 0 for group in self.groups)
        return discrimination(self.signals, self.right, self.groups if grouped else None)

    def summary(self) -> dict[str, Any]:
        """Metrics and counts: what a report and a running display show."""
        by_matcher = {matcher: self.track.summarize(counts) for matcher, counts in self.matches.items()}
        return {
            "metrics": by_matcher["strict"],
            "metrics_by_matcher": by_matcher,
            "counts": {
                "rows": self.rows,
                "errors": {error: self.errors[error] for error in ERRORS},
                "failed_requests": self.failed_requests,
                "prompt_too_long": self.errors["prompt_too_long"],
                "unmeasured": {why: self.unmeasured[why] for why in ("failed", "truncated")},
                "constrained": {"rows": self.constrained[True], "without_grammar": dict(self.without_grammar)} if self.constrained else None,
            },
        }


def summary(track: Track, rows: Iterable[Row]) -> dict[str, Any]:
    """`Tally.summary` of some rows."""
    tally = Tally(track.title)
    for row in rows:
        tally.add(row)
    return tally.summary()


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def spread(seconds: Sequence[float]) -> dict[str, Any] | None:
    """How many rows, and the 50th and 95th percentile of their seconds; None where there are none."""
    if not len(seconds):
        return None
    return {"rows": len(seconds)} | {name: round(percentile(seconds, share), 6) for name, share in (("p50", 0.5), ("p95", 0.95))}


def hosted_latency(tally: Tally) -> dict[str, Any]:
    """The report's `latency` of a hosted model: of the rows that were asked alone, and of those under load.

    Rows from a cache say nothing. Where a run went on with another --concurrency, the load is the one of the most rows.
    """
    alone = spread(tally.seconds.get(1, ()))
    under_load = [load for load in tally.seconds if load > 1]
    most = max(under_load, key=lambda load: len(tally.seconds[load]), default=None)
    loaded = None if most is None else {"concurrency": most} | spread(tally.seconds[most])
    missing = [name for name, found in (("alone (--latency-rows)", alone), ("under load (--concurrency)", loaded)) if found is None]
    return {"alone": alone, "loaded": loaded, "why": f"no row was asked {' or '.join(missing)}" if missing else None}


def make_report(
    track_name: str,
    client: Client,
    rows: Tally | Iterable[Row],
    generate_seconds: float,
    total_seconds: float,
    inputs: dict,
    args: dict,
    sessions: int = 1,
    cached_replies: int = 0,
    repeat_cost: float | None = None,
) -> dict[str, Any]:
    """The report of one evaluation; every key of it is documented in slm_swap/README.md. `repeat_cost` is what asking rows a second
    time has cost besides.

    Raises:
        UserError: no request was answered: there is nothing to report.
    """
    tally = rows if isinstance(rows, Tally) else Tally(track_name, client.kind != "slm")
    for row in rows if tally is not rows else ():
        tally.expect(row.example)
        tally.add(row)
    count = len(tally)
    if tally.failed_requests == count:
        raise UserError(f"none of the {count} requests was answered ({tally.last_failure}): nothing to report")
    sums = tally.tokens if tally.counted else dict.fromkeys(tally.tokens)
    return {
        "schema_version": SCHEMA_VERSION,
        "stage": "eval",
        "created_at": now(),
        "track": track_name,
        "args": args,
        "code": code_version(),
        "packages": package_versions(),
        "hardware": hardware(),
        "model": client.describe(),
        "inputs": inputs | {"rows": count, "rows_sha256": tally.contents.together()},
        # What was said to a model whose replies were recorded elsewhere is not known.
        "prompt_sha256": None if client.kind == "replay" else tally.prompt_sha256,
        "ask": None if client.kind == "replay" else tally.ask,
        "references_by_teacher": dict(tally.teachers),
        **tally.summary(),
        "confidence": tally.confidence(),
        "tokens": sums | {"rows": tally.counted},
        "sessions": sessions,
        "cached_replies": cached_replies,
        "seconds": {
            "load": round(client.load_seconds, 3),
            "generate": round(generate_seconds, 3),
            "total": round(total_seconds, 3),
        },
        "latency": hosted_latency(tally) if client.kind == "azure" else no_latency("01_eval/eval.py --model-kind slm measures it"),
        "cost": _cost(client, tally, generate_seconds, repeat_cost),
    }


def no_latency(why: str) -> dict[str, Any]:
    """The report's `latency` where nothing was measured."""
    return {"alone": None, "loaded": None, "why": why}


def _cost(client: Client, tally: Tally, seconds: float, repeat: float | None) -> dict[str, Any]:
    """What asking the rows cost: a hosted model's by those whose tokens are known, a local one's by its seconds, which all rows share."""
    rows = len(tally) if client.kind == "slm" else tally.counted
    cost = client.cost(*tally.tokens.values(), seconds) if rows else None
    known = cost is not None
    return {
        "rows": rows if known else 0,
        "per_1000_rows": cost * 1000 / rows if known else None,
        "repeat": repeat,
        "total": cost + (repeat or 0.0) if known else None,
    }
