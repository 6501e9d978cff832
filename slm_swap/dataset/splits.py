"""Whole groups of rows into train, val, test and, where it is asked for, calibration."""

from dataclasses import dataclass
from datetime import datetime, timezone
from random import Random

from slm_swap.common.errors import UserError
from slm_swap.dataset.row import Dropped, Row
from slm_swap.rows.lines import text_hash

ALL_IN_TEST = "--train-size 0 --val-size 0 makes all rows the test split"
SPLITS = ("train", "val", "test", "calibration")
LEAST_TEST, FROM_ROWS = 300, 1000  # rows in test, where there are at least so many: fewer decide little


@dataclass(frozen=True)
class Sizes:
    """Rows wanted in each split; None: a tenth in test and val, the rest in train. With no train, test takes the rest. `calibration` has
    rows only where they are asked for.

    A test split that nobody sized has at least LEAST_TEST rows where there are FROM_ROWS or more.
    """

    train: int | None = None
    val: int | None = None
    test: int | None = None
    calibration: int = 0

    def targets(self, rows: int) -> dict[str, int]:
        """Rows to put into each split out of `rows`.

        Raises:
            UserError: more rows are wanted than there are.
        """
        tenth = max(round(rows / 10), 1)
        val = tenth if self.val is None else self.val
        left = rows - val - self.calibration
        if self.test is not None:
            test = self.test
        elif self.train == 0:
            test = max(left, 0)
        else:
            least = LEAST_TEST if rows >= FROM_ROWS else 0
            test = max(tenth, min(least, left - (self.train or 0)))
        train = max(left - test, 0) if self.train is None else self.train
        if train + val + test + self.calibration > rows:
            more = f" + calibration {self.calibration}" if self.calibration else ""
            raise UserError(f"train {train} + val {val} + test {test}{more} rows are wanted, {rows} can be used: ask for fewer ({ALL_IN_TEST})")
        return {"train": train, "val": val, "test": test, "calibration": self.calibration}


def split(
    groups: list[list[Row]], sizes: Sizes, seed: int, unseen_tools: bool = False, by_time: bool = False
) -> tuple[dict[str, list[Row]], list[Dropped]]:
    """Whole groups into test, then calibration, val and train, in seeded order, passing over what no longer fits.

    With `by_time` the groups with the newest rows come first, so that test is the newest, and calibration the newest of the rest. With `unseen_tools` test is filled tool by
    tool; then every row that shows one of its gold tools, as gold or on offer, is dropped (`shares_test_tool`). Taking few tools whole
    keeps more rows than keeping all rows of connected tools together: on real data nearly all tools are connected through what is
    offered. Rows that no size asks for are dropped as `unused`.

    Raises:
        UserError: a size cannot be met; the message says what can, why, and which flag helps. Or a row has no time.
    """
    shuffled = order = _ordered(groups, seed, by_time)
    if unseen_tools:
        order = _by_tool(shuffled, seed)
    targets = sizes.targets(sum(map(len, groups)))
    filled: dict[str, list[Row]] = {}
    dropped: list[Dropped] = []
    for name in ("test", "calibration", "val", "train"):
        asked = getattr(sizes, name)
        target = targets[name] if asked is not None or name != "train" else sum(map(len, order))
        exact = asked is not None and not by_time and not (unseen_tools and name == "test")
        before = order
        filled[name], order = _fill(order, target, exact)
        if asked is None and not filled[name] and name != "train":
            filled[name], order = _smallest(order)
        if len(filled[name]) < target and (asked is not None or not filled[name]):
            raise UserError(_cannot(name, target, len(filled[name]), before, unseen_tools))
        if unseen_tools and name == "test":
            taken = {row.id for row in filled["test"]}
            left = [group for group in shuffled if group[0].id not in taken]
            order, dropped = _without_tools(left, set().union(*(row.gold_names for row in filled["test"])))
    dropped += [Dropped(row.id, row.where, "unused") for group in order for row in group]
    for name, rows in filled.items():
        Random(f"{seed}:{name}").shuffle(rows)
    return {name: filled[name] for name in SPLITS}, dropped


def _ordered(groups: list[list[Row]], seed: int, by_time: bool) -> list[list[Row]]:
    if not by_time:
        return sorted(groups, key=lambda group: min(text_hash(f"{seed}:{row.id}") for row in group))
    times = [[moment(row.time) for row in group] for group in groups]
    without = sum(time is None for group in times for time in group)
    if without:
        raise UserError(
            f"--split-by time needs a time in every row, {without} have none (`created_at`, `startTime` or `timestamp`): "
            "add it, or split without the flag"
        )
    newest = [max(time for time in group if time is not None) for group in times]
    return [groups[at] for at in sorted(range(len(groups)), key=lambda at: (-newest[at], groups[at][0].id))]


def moment(text: str | None) -> float | None:
    """Seconds since 1970 of an ISO 8601 time (UTC unless it says so), or of seconds or milliseconds; None where it is neither."""
    try:
        seconds = float(text or "")
        return seconds / 1000 if seconds > 10**11 else seconds
    except ValueError:
        pass
    try:
        time = datetime.fromisoformat(text or "")
    except ValueError:
        return None
    return (time if time.tzinfo else time.replace(tzinfo=timezone.utc)).timestamp()


def _by_tool(groups: list[list[Row]], seed: int) -> list[list[Row]]:
    """The groups tool by tool, the tools in seeded order; a row without a call counts for the tools on offer."""
    if any(not (row.gold_names or row.tools) for group in groups for row in group):
        raise UserError("--unseen-tools needs to know each row's tool: structured completions name it as `tool_name`")
    shown = [[row.gold_names or row.names for row in group] for group in groups]
    rank = {tool: text_hash(f"{seed}:{tool}") for tool in sorted(set().union(*(names for group in shown for names in group)))}
    ranks = [max(rank[tool] for names in group for tool in names) for group in shown]
    return [groups[at] for at in sorted(range(len(groups)), key=lambda at: ranks[at])]


def _fill(groups: list[list[Row]], target: int, exact: bool) -> tuple[list[Row], list[list[Row]]]:
    """(rows taken, groups left): in order; to be `exact`, with the largest groups first where that comes closer."""
    best: tuple[list[Row], list[list[Row]]] = ([], groups)
    for tried in (groups, sorted(groups, key=len, reverse=True)) if exact else (groups,):
        taken: list[Row] = []
        left: list[list[Row]] = []
        for group in tried:
            fits = len(taken) + len(group) <= target
            taken.extend(group if fits else ())
            left.extend(() if fits else (group,))
        if len(taken) > len(best[0]) or not best[0]:
            best = taken, left
        if len(taken) == target:
            break
    return best


def _smallest(groups: list[list[Row]]) -> tuple[list[Row], list[list[Row]]]:
    """The smallest group, where no split was sized and none fits, as long as it leaves half of the rows."""
    least = min(groups, key=len, default=[])
    if 2 * len(least) > sum(map(len, groups)):
        return [], groups
    return list(least), [group for group in groups if group is not least]


def _cannot(name: str, target: int, can: int, groups: list[list[Row]], unseen_tools: bool) -> str:
    """Why a split cannot be made, and what helps."""
    left, largest = sum(map(len, groups)), max(map(len, groups), default=0)
    kept = "near-duplicates kept together" + unseen_tools * " and test's tools apart"
    said = f"{name}: {target} rows are wanted, {can} can be had with {kept}"
    if can:
        return f"{said}: set --{name}-size {can}"
    if not left:
        return f"{said}: the splits before it took all rows: set --{name}-size 0, or smaller sizes for the others"
    return (
        f"{said}: {largest} of the {left} rows left hang together (one conversation, one request, or much the same words): "
        f"{ALL_IN_TEST}; rows that only share a preamble are told apart by `request`"
    )


def _without_tools(groups: list[list[Row]], tools: set[str]) -> tuple[list[list[Row]], list[Dropped]]:
    """The groups without the rows that show one of the tools, and those rows."""
    dropped, kept = [], []
    for group in groups:
        shared = [row for row in group if row.names & tools]
        dropped += [Dropped(row.id, row.where, "shares_test_tool", ", ".join(sorted(row.names & tools))) for row in shared]
        kept.append([row for row in group if not row.names & tools])
    return [group for group in kept if group], dropped
