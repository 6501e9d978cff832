"""Few-shot: train rows that are like a row, shown to the model as earlier turns of its conversation.

Of the train rows whose reply a row could have too (calls of tools on offer, the same schema), the nearest ones by BM25 over the requests
(Lucene's variant: Kamphuis et al. 2020), the nearest last. Never the row itself, one of its own group, or a near-duplicate, whatever
its reply.
"""

import json
import sys
from collections import Counter
from functools import lru_cache
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from slm_swap.common.errors import UserError
from slm_swap.common.exact_json import ExactEncoder
from slm_swap.common.reports import sha256_file
from slm_swap.common.settings import display_path, shown_path
from slm_swap.rows.conversations import call_of
from slm_swap.rows.examples import Example, read_examples
from slm_swap.rows.prompts import asked_natively, request_text, shot_turns
from slm_swap.rows.words import near, words

AT_ONCE = 64  # rows of the best that are looked at before all are


def import_bm25s() -> ModuleType:
    """bm25s without JAX, which it loads where it is installed: JAX would take most of the GPU's memory from the model."""
    before = sys.modules.get("jax", sys)  # sys: it is not imported
    sys.modules["jax"] = None
    try:
        import bm25s
    finally:
        if before is sys:
            del sys.modules["jax"]
        else:
            sys.modules["jax"] = before
    return bm25s


class FewShot:
    """The index over a file of rows.

    Args:
        path: rows as `read_examples` reads them, with the replies wanted: a train split.
        count: most rows that are shown.

    Raises:
        UserError: the file is missing or cannot be read.
    """

    def __init__(self, path: Path, track: str, count: int):
        if not path.is_file():
            raise UserError(f"no train rows at {shown_path(path)}: name them with --few-shot, or make them with 02_dataset/prepare_data.py")
        bm25s = import_bm25s()
        self.path, self.track, self.count, self.sha256 = path, track, count, sha256_file(path)
        self.shown: Counter[int] = Counter()  # how many rows were given how many
        self._rows = [row for row in read_examples(path) if row.calls != [] or row.content]  # the others have no reply to show
        if not self._rows:
            raise UserError(f"{shown_path(path)} has no row with a reply that could be shown: name other rows with --few-shot")
        texts = [request_text(row) for row in self._rows]
        self._queries = [" ".join(text.casefold().split()) for text in texts]
        self._words = [words(text) for text in texts]
        self._wanted = [wanted_of(row) for row in self._rows]
        self._index = bm25s.BM25(method="lucene")
        self._index.index([list(one) for one in self._words], show_progress=False)
        self._fitting = lru_cache(256)(self._find_fitting)

    def turns(self, example: Example) -> list[dict[str, Any]]:
        """The messages that stand before a row's own, [] where no row is like it."""
        found = self._nearest(example)
        self.shown[len(found)] += 1
        native = asked_natively(example)
        return [turn for at, shot in enumerate(reversed(found)) for turn in shot_turns(self.track, self._rows[shot], native, at)]

    def report(self) -> dict[str, Any]:
        """What a report says of it: `shown` is how many rows were given how many shots."""
        told = {"path": display_path(self.path), "sha256": self.sha256, "shots": self.count, "rows": len(self._rows)}
        return told | {"shown": {str(count): rows for count, rows in sorted(self.shown.items())}}

    def _nearest(self, example: Example) -> list[int]:
        """The places of the rows to show, the nearest first; of equal ones the one that stands first in the file."""
        text = request_text(example)
        query, own = " ".join(text.casefold().split()), words(text)
        fitting = self._fitting(offer_of(example))
        if not own or not len(fitting):
            return []
        scores = self._index.get_scores(list(own))[fitting]
        for size in (min(AT_ONCE, len(fitting)), len(fitting)):
            likely = (int(fitting[at]) for at in _top(scores, size) if scores[at] > 0)
            taken = list(islice((at for at in likely if self._may_be_shown(at, example.group, query, own)), self.count))
            if len(taken) == self.count or size == len(fitting):
                return taken
        return []

    def _may_be_shown(self, at: int, group: str | None, query: str, own: tuple[str, ...]) -> bool:
        """By what is known of a request in production, too: not by the reply that is due."""
        same_group = group is not None and self._rows[at].group == group
        return not (same_group or self._queries[at] == query or near(self._words[at], own))

    def _find_fitting(self, offer: "Offer") -> Any:
        import numpy as np

        return np.array([at for at, wanted in enumerate(self._wanted) if offer.has(wanted)], dtype=np.int64)


class Offer(NamedTuple):
    """What a row may reply with: the tools on offer, {(name, definition)}, or the schema of a JSON value.

    `text` is the prompt of a row whose tools stand in it alone; None where they are known.
    """

    tools: frozenset[tuple[str, str]]
    schema: str | None
    text: str | None

    def has(self, wanted: "Offer") -> bool:
        """Whether a reply that takes what is `wanted` is one that this row could have."""
        if self.schema != wanted.schema:
            return False
        if self.text is None and wanted.text is None:
            return wanted.tools <= self.tools
        names = {name for name, _ in self.tools}
        return all(name in names or (self.text is not None and f'"{name}"' in self.text) for name, _ in wanted.tools)


def offer_of(example: Example) -> Offer:
    tools = frozenset((tool["name"], _canonical(tool)) for tool in example.tools or ())
    schema = None if example.schema is None else _canonical(example.schema)
    known = bool(tools) or schema is not None or example.messages is not None
    return Offer(tools, schema, None if known else example.prompt)


def wanted_of(example: Example) -> Offer:
    """What a row's own reply takes."""
    called = call_of(example.completion) if example.messages is None else None
    names = {called[0]} if called else {call["name"] for call in example.calls or ()}
    offered = offer_of(example)
    known = {name: definition for name, definition in offered.tools}
    return offered._replace(tools=frozenset((name, known.get(name, "")) for name in names))


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, cls=ExactEncoder)


def _top(scores: Any, size: int) -> Any:
    """The places of the `size` best scores, the best first; of equal ones the first."""
    import numpy as np

    edge = np.partition(scores, -size)[-size]
    found = np.flatnonzero(scores >= edge)
    return found[np.argsort(-scores[found], kind="stable")][:size]
