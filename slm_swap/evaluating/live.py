"""Two models side by side over the same rows, batch by batch, until all rows are answered or the verdict is certain."""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from slm_swap.clients.chat_client import ChatClient
from slm_swap.clients.protocol import Client
from slm_swap.common.progress import Progress
from slm_swap.evaluating.evaluation import Stopwatch, evaluate
from slm_swap.evaluating.report import summary
from slm_swap.evaluating.row import Row
from slm_swap.evaluating.row_traces import model_name
from slm_swap.rows.examples import Example
from slm_swap.rows.few_shot import FewShot
from slm_swap.scoring.metrics import Reference
from slm_swap.scoring.tracks import TRACKS, Track
from slm_swap.scoring.words import metric_name
from slm_swap.verdict.decision import FINE_TUNE, NEED_MORE_DATA
from slm_swap.verdict.evaluations import require_tools, units

if TYPE_CHECKING:
    from slm_swap.verdict.stats.betting import SequentialVerdict


class Side:
    """One of the two models: what it has answered and how long it took. `form` gives a row as this model is asked it, with
    shots of `few_shot` where there is one."""

    def __init__(self, client: Client, form: Callable[[Example], Example] = lambda example: example, few_shot: FewShot | None = None):
        self.client, self.form, self.few_shot, self.rows, self.seconds = client, form, few_shot, [], 0.0

    @property
    def unmeasured(self) -> int:
        """Rows that say nothing of the model: see `scoring.measured`."""
        hosted = self.client.kind != "slm"
        return sum(row.unmeasured(hosted) is not None for row in self.rows)

    def work(self, track: str, batch: list[Example], gold: list[Reference]) -> tuple[list[Row], float]:
        clock = Stopwatch()
        return evaluate(track, self.client, list(map(self.form, batch)), gold, len(batch)), clock.lap()


def side_by_side(
    track: str, sides: list[Side], examples: list[Example], gold: list[Reference], batch_size: int
) -> Iterator[None]:
    """Ask all sides at the same time, a batch at a time; yields when a batch is answered by all of them. Left early, clients of servers are closed."""
    pool = ThreadPoolExecutor(len(sides))
    try:
        for start in range(0, len(examples), batch_size):
            part = slice(start, start + batch_size)
            running = [pool.submit(side.work, track, examples[part], gold[part]) for side in sides]
            # Both or none: a batch counts only when both models have answered it.
            for side, (rows, seconds) in zip(sides, [future.result() for future in running], strict=True):
                side.rows += rows
                side.seconds += seconds
            yield
    except BaseException:  # Ctrl-C, or one of the models failed: what a server is still asked may take minutes, and is not waited for
        for side in sides:
            if isinstance(side.client, ChatClient):
                side.client.close()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def row_of(track: Track, example: Example) -> dict[str, Any]:
    """What `evaluations.units` goes by, of a row that is not answered yet."""
    return {"id": example.id, "group": example.group, "tool": track.reference(example).tool, "reference": example.completion}


class EarlyStop:
    """Stops a run once the sequential verdict is certain (`stats.betting`).

    `examples` are the rows in the order in which they are to be asked: random, as the rows of a file may be sorted, and the rows
    that are one bet together: those of a group, or for the question about other tools those of a tool. A look counts the bets that
    are answered whole.
    """

    def __init__(self, track: Track, examples: list[Example], delta: float, alpha: float, seed: int, question: str = "these"):
        from slm_swap.verdict.stats.betting import random_clusters

        _, labels = units([row_of(track, example) for example in examples], track, question)
        require_tools(labels, question)
        clusters = random_clusters(labels or [None] * len(examples), seed)
        self.track, self.delta, self.alpha, self.question = track, delta, alpha, question
        self.examples = [examples[index] for cluster in clusters for index in cluster]
        self.sizes = [len(cluster) for cluster in clusters]
        self.found: SequentialVerdict | None = None
        self.unmeasured = 0

    @property
    def verdict(self) -> str:
        """What is certain; a row that was not measured says nothing of a model, so that nothing is certain then."""
        return self.found.verdict if self.found and not self.unmeasured else NEED_MORE_DATA

    @property
    def rows_if_equal(self) -> int | None:
        """The rows after which two models that never differ would be a SWAP; None where all rows are too few."""
        return self._decide({"difference": [0.0] * len(self.examples)}, self.sizes).rows

    def _decide(self, differences: dict[str, list[float]], sizes: list[int]) -> "SequentialVerdict":
        from slm_swap.verdict.stats.betting import sequential_verdict

        return sequential_verdict(differences, sizes, delta=self.delta, alpha=self.alpha, largest=max(self.sizes))

    def look(self, azure: Side, slm: Side) -> bool:
        """Look at what both have answered so far; True once the verdict is certain."""
        self.unmeasured = azure.unmeasured + slm.unmeasured
        complete = rows = 0
        while complete < len(self.sizes) and rows + self.sizes[complete] <= len(azure.rows):
            rows += self.sizes[complete]
            complete += 1
        if complete:
            left, right = ([self.track.gate_values(row.scored.strict) for row in side.rows[:rows]] for side in (azure, slm))
            differences = {name: [a[name] - b[name] for a, b in zip(left, right, strict=True)] for name in self.track.gate}
            self.found = self._decide(differences, self.sizes[:complete])
        return self.verdict != NEED_MORE_DATA

    def line(self) -> str:
        """The verdict so far, and the metric that stands worst."""
        if self.unmeasured:
            return f"{NEED_MORE_DATA}: {self.unmeasured} rows are not measured (failed or cut by --max-new-tokens): nothing is certain"
        if not self.found:
            return f"{NEED_MORE_DATA}: no group of rows is answered whole"
        end = 0 if self.verdict == FINE_TUNE else 1
        name, worst = max(self.found.metrics.items(), key=lambda item: item[1].interval[end])
        low, high = worst.interval
        return f"{self.verdict}: “{metric_name(name)}”, hosted - small, is between {low:+.3f} and {high:+.3f}, margin {self.delta:g}"

    def saved(self, azure: Side) -> str:
        """How many of the hosted calls were saved, and the money."""
        done, available = len(azure.rows), len(self.examples)
        saved = available - done
        told = f"{self.verdict} after {done} of {available} rows: {saved} hosted calls saved ({saved / available:.0%})"
        counted = [row.reply.counts for row in azure.rows if row.reply.counts]
        if not counted:
            return f"{told}; the money is not known: no answer says how many tokens it took"
        cost = azure.client.cost(*map(sum, zip(*counted, strict=True)), azure.seconds)
        if cost is None:
            return f"{told}; the money is not known: give the deployment's prices in slm_swap/prices.toml"
        each = cost / len(counted)
        return f"{told}, about {each * saved:.4g} at {each * 1000:.4g} per 1,000 calls"

    def to_json(self, rows: int) -> dict[str, Any]:
        """The reports' `stopped_early`."""
        return {
            "rows_available": len(self.examples),
            "rows": rows,
            "largest_cluster": max(self.sizes),
            "delta": self.delta,
            "alpha": self.alpha,
            "tools": self.question,
            "verdict": self.verdict,
        }


def table(track: Track, sides: list[Side], total: int, early: EarlyStop | None) -> Any:
    """The running metrics of both models, as a rich table, and the verdict so far under it."""
    from rich.console import Group
    from rich.table import Table

    done = len(sides[0].rows)
    shown = Table(title=f"{track.title}: {done} of {total} rows")
    names = [model_name(side.client.describe()) for side in sides]
    for heading in ("metric", *names, f"{names[0]} - {names[1]}"):
        shown.add_column(heading, justify="left" if heading == "metric" else "right")
    if done:
        left, right = (summary(track, side.rows)["metrics"] for side in sides)
        for name in left:
            shown.add_row(metric_name(name), f"{left[name]:.3f}", f"{right[name]:.3f}", f"{left[name] - right[name]:+.3f}")
        shown.add_row("seconds", *(f"{side.seconds:.1f}" for side in sides), "")
    return Group(shown, early.line()) if early else shown


def watch(
    track: str, sides: list[Side], examples: list[Example], gold: list[Reference], batch_size: int, early: EarlyStop | None
) -> bool:
    """Both models over the rows with their metrics in the terminal; False when Ctrl-C ended it."""
    from rich.live import Live

    quiet = not sys.stdout.isatty()  # then the table comes at the end alone
    azure, slm = sorted(sides, key=lambda side: side.client.kind != "azure")
    try:
        with Live(table(TRACKS[track], sides, len(examples), early), refresh_per_second=4) as live, Progress(track, len(examples), shown=quiet) as shown:
            for _ in side_by_side(track, sides, examples, gold, batch_size):
                shown.update(len(azure.rows) - shown.done)
                certain = early is not None and early.look(azure, slm)
                live.update(table(TRACKS[track], sides, len(examples), early))
                if certain:
                    break
    except KeyboardInterrupt:
        return False
    finally:
        if quiet:
            print()  # where there is no terminal, rich leaves the last line open
    return True
