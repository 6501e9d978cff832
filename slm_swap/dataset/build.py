"""From source rows to the files of both tracks: what is left out and why, splits that share nothing, written all at once."""

import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from slm_swap.common.errors import UserError
from slm_swap.common.reports import sha256_file, write_json, write_jsonl
from slm_swap.common.settings import display_path
from slm_swap.dataset.importers import Dropped, Row
from slm_swap.rows.examples import Example
from slm_swap.rows.lines import dump_json, text_hash
from slm_swap.rows.prompts import structured_prompt, structured_schema, toolcall_completion, toolcall_prompt
from slm_swap.scoring.tracks import TRACKS

SPLITS = ("train", "val", "test")
NEAR = (7, 10)  # near-duplicates: token Jaccard of at least 7/10, in whole numbers so that no rounding decides
EXAMPLES = 20  # dropped rows that the report shows for each reason


@dataclass(frozen=True)
class Sizes:
    """Rows wanted in each split; None: a tenth in test and val, the rest in train. With no train, test takes the rest."""

    train: int | None = None
    val: int | None = None
    test: int | None = None

    def targets(self, rows: int) -> dict[str, int]:
        """Rows to put into each split out of `rows`.

        Raises:
            UserError: more rows are wanted than there are.
        """
        tenth = round(rows / 10)
        val = tenth if self.val is None else self.val
        test = self.test if self.test is not None else max(rows - val, 0) if self.train == 0 else tenth
        train = max(rows - val - test, 0) if self.train is None else self.train
        if train + val + test > rows:
            raise UserError(f"train {train} + val {val} + test {test} rows are wanted, {rows} can be used: ask for fewer")
        return {"train": train, "val": val, "test": test}


def select(items: Iterable[Row | Dropped]) -> tuple[list[Row], list[Dropped]]:
    """The rows that can be used and those that cannot; of exact duplicates (request, tools and answer) the first stays.

    Raises:
        UserError: an id stands twice, a text is no Unicode, or no row is left.
    """
    rows: list[Row] = []
    dropped: list[Dropped] = []
    seen: dict[str, Row] = {}
    ids: dict[str, Row] = {}
    for item in items:
        if isinstance(item, Dropped):
            dropped.append(item)
            continue
        content = _content(item)
        if content in seen:
            dropped.append(Dropped(item.id, item.where, "duplicate", f"the same as {seen[content].where}"))
            continue
        if item.id in ids:
            raise UserError(f"{item.where}: id {item.id!r} stands at {ids[item.id].where} already: ids must be unique")
        seen[content] = ids[item.id] = item
        rows.append(item)
    if not rows:
        reasons = ", ".join(f"{reason} {count}" for reason, count in Counter(drop.reason for drop in dropped).items())
        raise UserError(f"none of {len(dropped)} rows can be used ({reasons}): check --source and --answers")
    return rows, dropped


def _content(row: Row) -> str:
    """A hash of the request, the tools in any order and the answer.

    Raises:
        UserError: the row cannot be written: it holds NaN, or half of a surrogate pair.
    """
    try:
        text_hash(row.source)
        if row.example:
            text_hash(dump_json(row.example.to_json()))
            return row.example.content_hash
        tools = sorted(dump_json(tool) for tool in row.tools)
        return text_hash(dump_json([row.request, tools, row.tool, row.arguments, row.accept]))
    except ValueError as error:
        reason = "half of a surrogate pair" if isinstance(error, UnicodeEncodeError) else "NaN or Infinity"
        raise UserError(f"{row.where}: it holds {reason}, which no JSON file can: mend that row") from None


# -- Near-duplicates -------------------------------------------------------------------------------------------------------------


def near_duplicates(texts: list[str]) -> list[int]:
    """A label for each text: equal for texts that a chain of near-duplicates connects, different for all others.

    Near-duplicates are texts whose sets of lower-cased words (`\\w+`) have a Jaccard index of at least 0.7,
    |A n B| >= 0.7 |A u B|, that is 17 |A n B| >= 7 (|A| + |B|). Exact: all pairs that are not too different in size are
    compared, block by block, as a matrix product of whole numbers that float32 holds exactly. Words that many texts have go
    through a dense product, the others through a sparse one, so the time depends little on how much the texts have in common.
    """
    import numpy as np
    from scipy import sparse
    from scipy.sparse.csgraph import connected_components

    near, whole = NEAR
    block, dense_from, dense_most = 512, 50, 2048  # rows at a time; a word in 1/50 of the texts is cheaper in the dense product
    tokens = [tuple(sorted(set(re.findall(r"\w+", text.lower())))) for text in texts]
    index = {words: at for at, words in enumerate(sorted(set(tokens), key=lambda words: (len(words), words)))}
    vocabulary: dict[str, int] = {}
    columns = np.array([vocabulary.setdefault(word, len(vocabulary)) for words in index for word in words], dtype=np.int64)
    sizes = np.array([len(words) for words in index], dtype=np.float32)
    offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    sets = sparse.csr_matrix((np.ones(len(columns), np.float32), columns, offsets), shape=(len(index), len(vocabulary) + 1))
    counts = np.bincount(columns, minlength=sets.shape[1])
    common = min(int((counts > len(index) / dense_from).sum()), dense_most)
    sets = sets[:, np.argsort(-counts, kind="stable")]
    dense, rare = np.column_stack([sets[:, :common].toarray(), sizes]), sets[:, common:].tocsr()
    labels = np.arange(len(index))
    for start in range(0, len(index), block):
        rows = slice(start, start + block)
        others = slice(start, np.searchsorted(near * sizes, whole * sizes[rows][-1], side="right"))
        left = np.column_stack([(near + whole) * dense[rows, :-1], np.full(len(dense[rows]), -near, np.float32)])
        excess = left @ dense[others].T  # 17 |A n B| - 7 |B|, so far over the common words
        shared = (rare[rows] @ rare[others].T).tocoo()
        excess[shared.row, shared.col] += (near + whole) * shared.data
        pairs = (excess >= near * sizes[rows, None]) & (labels[rows, None] != labels[others])
        ends = tuple(labels[side + start] for side in np.nonzero(pairs))
        links = sparse.coo_matrix((np.ones(len(ends[0]), bool), ends), shape=(len(index), len(index)))
        labels = connected_components(links, directed=False)[1][labels]
    return [int(labels[index[words]]) for words in tokens]


def components(rows: list[Row]) -> list[list[Row]]:
    """Rows that must not be torn apart: connected by a near-duplicate, the same query (but for case and white space) or the
    same source row. In the order of their first rows.
    """
    parent = list(range(len(rows)))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = node = parent[parent[node]]
        return node

    first: dict[tuple[str, Any], int] = {}
    for at, (row, label) in enumerate(zip(rows, near_duplicates([row.request for row in rows]), strict=True)):
        for key in (("near", label), ("query", " ".join(row.request.casefold().split())), ("source", row.source)):
            parent[root(at)] = root(first.setdefault(key, at))
    found: dict[int, list[Row]] = {}
    for at, row in enumerate(rows):
        found.setdefault(root(at), []).append(row)
    return list(found.values())


# -- Splits ----------------------------------------------------------------------------------------------------------------------


def split(
    groups: list[list[Row]], sizes: Sizes, seed: int, unseen_tools: bool = False
) -> tuple[dict[str, list[Row]], list[Dropped]]:
    """Whole groups into test, then val, then train, in seeded order, passing over what no longer fits.

    With `unseen_tools` test is filled tool by tool; then every row that shows one of its gold tools, as gold or on offer, is
    dropped (`shares_test_tool`). Taking few tools whole keeps more rows than keeping all rows of connected tools together:
    on real data nearly all tools are connected through what is offered. Rows that no size asks for are dropped as `unused`.

    Raises:
        UserError: a size cannot be met; the message says what can.
    """
    targets = sizes.targets(sum(map(len, groups)))
    shuffled = order = sorted(groups, key=lambda group: min(text_hash(f"{seed}:{row.id}") for row in group))
    if unseen_tools:
        if any(row.tool is None for group in groups for row in group):
            raise UserError("--unseen-tools needs to know each row's tool: structured completions name it as `tool_name`")
        rank = {tool: text_hash(f"{seed}:{tool}") for tool in sorted({row.tool for group in groups for row in group})}
        order = sorted(shuffled, key=lambda group: max(rank[row.tool] for row in group))
    filled: dict[str, list[Row]] = {}
    dropped: list[Dropped] = []
    for name in ("test", "val", "train"):
        asked = getattr(sizes, name)
        target = targets[name] if asked is not None or name != "train" else sum(map(len, order))
        exact = asked is not None and not (unseen_tools and name == "test")
        filled[name], order = _fill(order, target, exact)
        if len(filled[name]) < target and (asked is not None or not filled[name]):
            can = f"{len(filled[name])} can be had with near-duplicates kept together" + unseen_tools * " and test's tools apart"
            raise UserError(f"{name}: {target} rows are wanted, {can}: set --{name}-size {len(filled[name])}")
        if unseen_tools and name == "test":
            taken = {row.id for row in filled["test"]}
            left = [group for group in shuffled if group[0].id not in taken]
            order, dropped = _without_tools(left, {row.tool for row in filled["test"]})
    dropped += [Dropped(row.id, row.where, "unused") for group in order for row in group]
    for name, rows in filled.items():
        Random(f"{seed}:{name}").shuffle(rows)
    return {name: filled[name] for name in SPLITS}, dropped


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


def _without_tools(groups: list[list[Row]], tools: set[str | None]) -> tuple[list[list[Row]], list[Dropped]]:
    """The groups without the rows that show one of the tools, and those rows."""
    dropped, kept = [], []
    for group in groups:
        shared = [row for row in group if row.names & tools]
        dropped += [Dropped(row.id, row.where, "shares_test_tool", ", ".join(sorted(row.names & tools))) for row in shared]
        kept.append([row for row in group if not row.names & tools])
    return [group for group in kept if group], dropped


# -- Rows and files --------------------------------------------------------------------------------------------------------------


def make_example(row: Row, track: str, seed: int) -> Example:
    """One track's row: the toolcall prompt shows every tool in shuffled order, the structured prompt the wanted schema."""
    if row.example:
        return row.example
    shared = {"id": row.id, "accept": row.accept, "source": row.source, "where": row.where}
    if track == "toolcall":
        tools = list(row.tools)
        Random(f"{seed}:{row.id}").shuffle(tools)
        return Example(toolcall_prompt(tools, row.request), toolcall_completion(row.tool, row.arguments), tools=tools, **shared)
    schema = structured_schema(next(tool for tool in row.tools if tool["name"] == row.tool))
    completion = dump_json({"tool_name": row.tool, "arguments": row.arguments})
    return Example(structured_prompt(schema, row.request), completion, schema=schema, **shared)


def build(
    items: Iterable[Row | Dropped],
    out_dir: Path,
    head: dict[str, Any],
    sizes: Sizes,
    seed: int,
    unseen_tools: bool = False,
    tracks: Iterable[str] = tuple(TRACKS),
) -> dict[str, Any]:
    """Select, split, write each track's splits and `prepare_report.json` below `out_dir`; the report is given back.

    `head` is what the report starts with (stage, args, inputs, ...). The same items and seed give the same bytes in every split.
    Everything is written to a folder beside its place first: where something fails, nothing has changed. A split without rows
    is not written, and the file that an earlier run left there is removed.

    Raises:
        UserError: as `select` and `split`; or the place cannot be written.
    """
    rows, dropped = select(items)
    read = len(rows) + len(dropped)
    groups = components(rows)
    splits, left_out = split(groups, sizes, seed, unseen_tools)
    dropped += left_out
    near = [len(group) for group in groups if len(group) > 1]
    report = head | {
        "counts": {
            "read": read,
            "kept": sum(map(len, splits.values())),
            "dropped": dict(Counter(drop.reason for drop in dropped)),
        },
        "dropped_examples": _shown(dropped),
        "near_duplicates": {
            "jaccard": NEAR[0] / NEAR[1],
            "components": len(near),
            "rows": sum(near),
            "largest": max(near, default=1),
        },
        "splits": {},
    }
    with _staging(out_dir) as staging:
        for track in tracks:
            report["splits"][track] = {
                name: _write_split(staging / track / f"{name}.jsonl", out_dir, track, rows, seed) for name, rows in splits.items()
            }
        write_json(staging / "prepare_report.json", report)
        for track in tracks:
            (out_dir / track).mkdir(exist_ok=True)
        for path in sorted(staging.rglob("*.json*")):
            os.replace(path, out_dir / path.relative_to(staging))
        for track, name in ((track, name) for track in tracks for name, rows in splits.items() if not rows):
            (out_dir / track / f"{name}.jsonl").unlink(missing_ok=True)
    return report


def _shown(dropped: list[Dropped]) -> dict[str, list[dict[str, str]]]:
    """The first rows dropped for each reason, with why."""
    shown: dict[str, list] = {}
    for drop in dropped:
        if len(examples := shown.setdefault(drop.reason, [])) < EXAMPLES:
            examples.append({"id": drop.id, "where": drop.where, "why": drop.why})
    return shown


def _write_split(path: Path, out_dir: Path, track: str, rows: list[Row], seed: int) -> dict[str, Any]:
    """Write one split of one track to its staging place; what the report says of it."""
    if not rows:
        return {"rows": 0}
    write_jsonl(path, (make_example(row, track, seed).to_json() for row in rows))
    return {
        "path": display_path(out_dir / track / path.name),
        "sha256": sha256_file(path),
        "rows": len(rows),
        "gold_tools": len({row.tool for row in rows}),
        "tools": len(set().union(*(row.names for row in rows))),
    }


@contextmanager
def _staging(out_dir: Path) -> Iterator[Path]:
    """A folder in `out_dir` that is gone afterwards, whatever happens."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out_dir, prefix=".prepare-") as name:
            yield Path(name)
    except OSError as error:
        raise UserError(f"cannot write {display_path(out_dir)} ({error.strerror}): choose another place with --out-dir") from None
