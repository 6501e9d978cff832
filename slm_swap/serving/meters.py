"""What is counted of an endpoint: Prometheus' metrics, of all workers together, and a line of `minutes.jsonl` for each worker's minute."""

import os
import time
from bisect import bisect_right
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from slm_swap.clients.protocol import Reply
from slm_swap.serving import state

BINS = 20
UNLIKE = ("tools", "schema", "unsupported", "too_long")  # reasons that say of a request that none like it was measured
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


GAUGES = ("gauge_livemax", "gauge_livesum")  # files of prometheus_client, each kind with its mode
FILES = ("counter", "histogram", *GAUGES)
FILE_BYTES = 2**16  # of each: as much as prometheus_client takes at first. No reason makes a worker's values more than a third of it.


def make_room(folder: Path, workers: int) -> None:
    """The files of all workers' values, each with all its bytes: processes map them into their memory, where a byte that finds no room kills its process.

    Raises:
        OSError: there is no such room.
    """
    for worker in range(workers):
        for kind in FILES:
            descriptor = os.open(_file(folder, kind, worker), os.O_RDWR | os.O_CREAT, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, FILE_BYTES)
            finally:
                os.close(descriptor)


def forget_gauges(folder: Path, worker: int) -> None:
    """A worker has ended: what it had under way is under way no more. What it counted stays, and the next one of its number counts on."""
    for kind in GAUGES:
        with open(_file(folder, kind, worker), "r+b") as file:
            file.write(bytes(8))  # the head of prometheus_client's files: how much of it is used. Removed, the file's room could go to another.


def _file(folder: Path, kind: str, worker: int) -> Path:
    return folder / f"{kind}_{worker}.db"


class Meters:
    """One worker's. Prometheus' values of all workers stand in files of the folder that PROMETHEUS_MULTIPROC_DIR names, set before this is made. They are named by the
    worker's number and not by its process, so that there are not more of them with each worker that is started again."""

    def __init__(self, folder: Path, worker: int, edges: dict[str, tuple[str, list[float]]], priced: bool):
        """`edges`: for each class its signal, and the values between its bins. `priced`: the hosted model's prices are known; else there are no metrics of money, as
        a counter's 0 would say that nothing was saved."""
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, multiprocess, values

        values.ValueClass = values.MultiProcessValue(lambda: worker)
        self.folder, self.worker, self._edges = folder, worker, edges
        own = CollectorRegistry()
        self._requests = Counter("slm_swap_requests", "Requests by who answered and why", ["answered_by", "reason"], registry=own)
        self._failures = Counter("slm_swap_failures", "Requests that nobody answered", ["reason"], registry=own)
        self._gone = Counter("slm_swap_clients_gone", "Requests whose client left before its answer", registry=own)
        self._seconds = Histogram("slm_swap_request_seconds", "Seconds to the whole answer", ["answered_by"], buckets=SECONDS, registry=own)
        self._tokens = Counter("slm_swap_tokens", "Tokens, as each model counts them", ["answered_by", "kind"], registry=own)
        if priced:
            self._saved = Counter("slm_swap_saved_money", "Hosted price of what was answered locally, by the small model's counts of tokens, all input in full", registry=own)
            self._audit_cost = Counter("slm_swap_audit_money", "What audits cost", registry=own)
        self._audits = Counter("slm_swap_audits", "Local answers that the hosted model was asked for too", ["agree"], registry=own)
        self._engine = Gauge("slm_swap_engine_up", "Whether the small model answers", multiprocess_mode="livemax", registry=own)  # a worker that starts does not know yet
        self._under_way = Gauge("slm_swap_under_way", "Requests that are being answered", multiprocess_mode="livesum", registry=own)
        for by in ("local", "hosted"):
            self._seconds.labels(by)  # opens its file now, as the others are: later the folder may be gone, and a request would fail of it
        self._all = CollectorRegistry()
        multiprocess.MultiProcessCollector(self._all)
        self.begin()

    def begin(self) -> None:
        """Start a minute."""
        self._since = time.time()
        self._by: dict[str, Counter[str]] = defaultdict(Counter)
        self._failed, self._unlike, self._saved_now = 0, 0, 0.0
        self._saved_known = True
        self._latency: dict[str, list[float]] = defaultdict(list)
        self._signal: dict[str, list[int]] = {}
        self._tools: Counter[str] = Counter()
        self._counted: Counter[str] = Counter()

    def answered(self, by: str, reason: str, seconds: float, tokens: tuple[int | None, int | None] = (None, None)) -> None:
        """A request got its answer; `tokens` are its input's and output's, None where not known."""
        self._requests.labels(by, reason).inc()
        self._seconds.labels(by).observe(seconds)
        self._by[by][reason] += 1
        self._latency[by].append(seconds)
        self._unlike += reason in UNLIKE
        for kind, count in zip(("input", "output"), tokens, strict=True):
            if count is not None:
                self._tokens.labels(by, kind).inc(count)
                self._counted[f"{by}_{kind}"] += count

    def under_way(self, change: int) -> None:
        """A request has come (1), or has its answer (-1)."""
        self._under_way.inc(change)

    def failed(self, reason: str) -> None:
        """A request that nobody answered."""
        self._failures.labels(reason).inc()
        self._failed += 1

    def gone(self) -> None:
        """A request whose client left before it was answered; it is neither answered nor failed."""
        self._gone.inc()

    def judged(self, kind: str, reply: Reply, tools: tuple[str, ...]) -> None:
        """A small model's reply was decided on."""
        self._tools.update(tools)
        signal, edges = self._edges.get(kind, ("", []))
        value = (reply.confidence or {}).get(signal)
        if value is not None and edges:
            self._signal.setdefault(kind, [0] * (len(edges) + 1))[bisect_right(edges, value)] += 1

    def saved(self, money: float | None) -> None:
        """What a local answer would have cost; None: not known."""
        if money is None:
            self._saved_known = False
        else:
            self._saved.inc(money)
            self._saved_now += money

    def audited(self, agree: bool, cost: float | None) -> None:
        self._audits.labels("yes" if agree else "no").inc()
        if cost is not None:
            self._audit_cost.inc(cost)

    def engine(self, up: bool) -> None:
        self._engine.set(up)

    def text(self) -> bytes:
        """All workers' metrics, as Prometheus reads them."""
        from prometheus_client import generate_latest

        return generate_latest(self._all)

    def end(self) -> None:
        """Write the minute's line, if anything happened in it, and start the next."""
        if self._by or self._failed:
            state.append(self.folder, state.MINUTES, self._line())
        self.begin()

    def _line(self) -> dict[str, Any]:
        return {
            "time": self._since,
            "worker": self.worker,
            "seconds": round(time.time() - self._since, 3),
            "requests": {by: dict(reasons) for by, reasons in self._by.items()},
            "failures": self._failed,
            "latency": {by: [_quantile(told, 0.5), _quantile(told, 0.95), len(told)] for by, told in self._latency.items()},
            "signal": self._signal,
            "tools": dict(self._tools),
            "tokens": dict(self._counted),
            "saved": round(self._saved_now, 9) if self._saved_known else None,
            "unlike": self._unlike,
        }


def _quantile(values: list[float], share: float) -> float:
    """The nearest-rank quantile."""
    return round(sorted(values)[min(len(values) - 1, int(share * len(values)))], 6)
